"""Bipartite soft matching: every backend's plan is the reference's, to the last index, on every input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import LAYOUTS, Placed, backends_of, device_of, is_slow, require, skip_level_of_other_tests
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from effattn import bipartite_soft_matching
from effattn.ops.token_merging import match

OP = "bipartite_soft_matching"
everywhere = pytest.mark.parametrize("backend", [b for b in backends_of(OP) if b != "reference"])
beside_matrix = pytest.mark.parametrize("backend", [b for b in backends_of(OP) if b not in ("cpu", "reference")])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 2, 63, 64, 65, 320, 1000)
PLAN = ("source", "members", "offsets")


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choices(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


def plan_of(backend: str, metric: torch.Tensor, num_merged: int, sizes=None, **options):
    device = device_of(backend)
    sizes = None if sizes is None else sizes.to(device)
    return bipartite_soft_matching(metric.to(device), num_merged, sizes=sizes, backend=backend, **options)


def assert_as_specified(backend: str, metric: torch.Tensor, num_merged: int, **options) -> None:
    plan = plan_of(backend, metric, num_merged, **options)
    wanted = bipartite_soft_matching(metric, num_merged, backend="reference", **options)
    for name in PLAN:
        got, specified = getattr(plan, name), getattr(wanted, name)
        assert got.dtype == torch.int32
        assert got.is_contiguous()
        assert torch.equal(got.cpu(), specified), (name, tuple(metric.shape), metric.dtype, num_merged, options)


def skip_float16_where_slow(backend: str, dtype: torch.dtype) -> None:
    if is_slow(backend) and dtype == torch.float16:
        pytest.skip("float16 takes bfloat16's way")


def sizes_for(backend: str, fast: tuple[int, ...], slow: tuple[int, ...]) -> tuple[int, ...]:
    return slow if is_slow(backend) else fast


# ---- random tokens ----


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_tokens(backend, dtype):
    require(OP, backend)
    for tokens in sizes_for(backend, (2, 3, 4, 5, 13, 31, 32, 33, 127, 130, 197, 258, 601), (2, 3, 8, 35)):
        for num_merged in {1, tokens // 4, tokens // 2, 10**6}:
            assert_as_specified(backend, draw(2, tokens, 24, dtype=dtype, seed=tokens), num_merged)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_length_of_token(backend, dtype):
    require(OP, backend)
    tokens = 20 if is_slow(backend) else 151
    for length in DIMS:
        assert_as_specified(backend, draw(2, tokens, length, dtype=dtype, seed=length), tokens // 3)


@everywhere
def test_more_tokens_than_one_block_holds(backend):
    require(OP, backend)
    if is_slow(backend):
        assert_as_specified(backend, draw(1, 270, 8), 60)
        return
    for tokens, length in ((2309, 8), (5000, 3), (2200, 64), (700, 1500)):
        assert_as_specified(backend, draw(1, tokens, length), tokens // 3)


@everywhere
def test_no_images(backend):
    require(OP, backend)
    plan = plan_of(backend, torch.randn(0, 9, 4), 2)
    assert plan.source.shape == plan.members.shape == (0, 9)
    assert plan.offsets.shape == (0, 8)
    assert plan_of(backend, torch.randn(0, 9, 4), 2, threshold=0.5).num_tokens == 9


@everywhere
def test_nothing_to_merge_is_the_identity(backend):
    require(OP, backend)
    for tokens, num_merged, options in (
        (9, 0, {}),
        (9, -3, {}),
        (1, 1, {}),
        (5, 2, {"num_protected": 5}),
        (3, 1, {"num_protected": 1, "distill_token": True}),
    ):
        plan = plan_of(backend, torch.randn(2, tokens, 4), num_merged, **options)
        assert torch.equal(plan.source_map().cpu(), torch.arange(tokens).expand(2, -1))
        assert plan.num_tokens == tokens


# ---- layouts ----


@everywhere
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("token_major", "packed")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_no_input_is_written(backend, layout, dtype):
    require(OP, backend)
    tokens = 21 if is_slow(backend) else 119
    for length in sizes_for(backend, (40, 65), (9,)):
        placed = Placed(draw(3, tokens, length, dtype=dtype).to(device_of(backend)), layout)
        sizes = choices(3, 3, tokens).float().to(placed.tensor.device)
        kept = sizes.clone()
        got = bipartite_soft_matching(placed.tensor, 7, sizes=sizes, backend=backend)
        wanted = bipartite_soft_matching(placed.tensor.contiguous(), 7, sizes=sizes, backend="reference")
        assert all(torch.equal(getattr(got, name), getattr(wanted, name)) for name in PLAN)
        assert placed.is_untouched()
        assert torch.equal(sizes, kept)


@everywhere
def test_a_metric_that_requires_a_gradient_is_only_read(backend):
    require(OP, backend)
    metric = draw(2, 11, 4).requires_grad_()
    sizes = torch.ones(2, 11, requires_grad=True)
    assert_as_specified(backend, metric, 3, sizes=sizes)


# ---- options ----


@everywhere
@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize("num_protected", range(6))
def test_protected_tokens_and_thresholds(backend, num_protected, distill_token):
    require(OP, backend)
    for tokens in sizes_for(backend, (3, 4, 7, 12, 49), (3, 4, 12)):
        metric = draw(3, tokens, 2, seed=tokens)
        for threshold in sizes_for(backend, (None, -1.0, 0.3, 0.99, 1.0), (None, 0.3)):
            for num_merged in sizes_for(backend, {1, tokens // 3, tokens}, {tokens // 3, tokens}):
                options = {"num_protected": num_protected, "distill_token": distill_token, "threshold": threshold}
                assert_as_specified(backend, metric, num_merged, **options)


@everywhere
@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize("num_protected", [0, 1, 3])
def test_tokens_without_a_size_are_merged_last(backend, num_protected, distill_token):
    require(OP, backend)
    batch, tokens = (2, 12) if is_slow(backend) else (4, 38)
    metric = draw(batch, tokens, 5)
    metric[:, 3::7] = float("nan")
    few = choices(3, batch, tokens)
    alone = torch.zeros(batch, tokens)
    alone[:, tokens // 2] = 1
    strange = few * torch.tensor([1.0, float("nan"), -1.0, float("inf")])[choices(4, batch, tokens, seed=1)]
    even_only = torch.arange(tokens).remainder(2).sub(1).abs().expand(batch, -1)
    everything = (few, few[..., None].half(), few == 1, alone, 0 * alone, strange, even_only, 1 - even_only)
    for sizes in sizes_for(backend, everything, (few, 0 * alone, strange, even_only)):
        for threshold in sizes_for(backend, (None, -1.0, 0.2), (None, 0.2)):
            for num_merged in sizes_for(backend, (2, tokens), (tokens,)):
                options = {"num_protected": num_protected, "distill_token": distill_token, "threshold": threshold}
                assert_as_specified(backend, metric, num_merged, sizes=sizes, **options)


@everywhere
def test_a_pair_exactly_at_the_threshold_is_merged(backend):
    require(OP, backend)
    metric = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, -1.0], [-1.0, 0.0]]])
    assert plan_of(backend, metric, 2, threshold=0.6).valid.sum() == 3
    assert plan_of(backend, metric, 2, threshold=0.6 + 1e-11).valid.sum() == 4
    assert plan_of(backend, metric, 2, threshold=0.0).valid.sum() == 2


# ---- ties ----


@everywhere
def test_ties_go_to_the_lowest_index(backend):
    require(OP, backend)
    right, up = [1.0, 0.0], [0.0, 1.0]
    #                       a0     b0  a1     b1         a2  b2  a3         b3
    metric = torch.tensor([[right, up, right, [3.0, 0.0], up, right, [0.5, 0.0], [0.0, 7.0]]])
    plan = plan_of(backend, metric, 2)
    assert plan.source_map().tolist() == [[3, 2, 3, 3, 0, 4, 1, 5]]
    assert plan.members.tolist() == [[4, 6, 1, 0, 2, 3, 5, 7]]
    assert plan.offsets.tolist() == [[0, 1, 2, 3, 6, 7, 8]]
    assert_as_specified(backend, metric, 3)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_and_parallel_tokens_tie(backend, dtype):
    require(OP, backend)
    skip_float16_where_slow(backend, dtype)
    tokens = 30 if is_slow(backend) else 182
    for length in sizes_for(backend, (1, 2, 17, 64, 320), (2, 17)):
        distinct = draw(2, tokens // 5, length, dtype=dtype, seed=length)
        copies = distinct[:, choices(tokens // 5, tokens, seed=1)]
        factors = torch.tensor([1, 2, -0.5, 8])[choices(4, 2, tokens, 1, seed=2)].to(dtype)
        for metric in (copies, copies * factors, distinct[:, :1].expand(2, tokens, length)):
            for options in ({}, {"num_protected": 1}, {"threshold": 1.0}):
                assert_as_specified(backend, metric, tokens // 3, **options)


@everywhere
def test_multiples_that_round_still_tie(backend):
    require(OP, backend)
    tokens = 16 if is_slow(backend) else 90
    base = draw(2, 1, 64)
    metric = base * torch.tensor([1.0, 3.0, 1e-3, 1e20])[choices(4, 2, tokens, 1)]
    assert_as_specified(backend, metric, tokens // 4)
    plan = plan_of(backend, metric, tokens // 4, num_protected=1)
    assert (plan.source_map()[:, 2:tokens:2][:, : tokens // 4] == plan.source_map()[:, 1:2]).all()


@everywhere
def test_small_integers_tie_often(backend):
    require(OP, backend)
    tokens = 24 if is_slow(backend) else 150
    for length in (1, 2, 3, 16):
        metric = (choices(3, 2, tokens, length, seed=length) - 1).float()
        for options in ({}, {"threshold": 0.5}):
            assert_as_specified(backend, metric, tokens // 4, **options)


@everywhere
@pytest.mark.parametrize("scale", [1e-10, 1e-7, 1e-4, 1e-3, 1e-2], ids=str)
def test_tokens_that_hardly_differ_are_told_apart(backend, scale):
    require(OP, backend)
    tokens = 24 if is_slow(backend) else 210
    for length in sizes_for(backend, (3, 64, 320), (16,)):
        metric = draw(1, 1, length) * (1 + scale * draw(2, tokens, length, seed=1).double())
        for dtype in DTYPES:
            assert_as_specified(backend, metric.to(dtype), tokens // 3)


@everywhere
def test_a_few_elements_that_outweigh_all_others_hide_nothing(backend):
    require(OP, backend)
    tokens = 24 if is_slow(backend) else 210
    metric = draw(2, tokens, 64)
    metric[..., :2] += torch.tensor([300.0, -90.0])
    assert_as_specified(backend, metric, tokens // 3)
    metric[:, ::3, 5] -= 800
    assert_as_specified(backend, metric, tokens // 3)


# ---- unusual tokens ----


@everywhere
def test_a_token_of_zeros_is_similar_to_nothing(backend):
    require(OP, backend)
    tokens = 14 if is_slow(backend) else 85
    metric = draw(2, tokens, 33)
    metric[choices(3, 2, tokens) == 0] = 0
    for zeros in (metric, 0 * metric, -0.0 * metric, metric * (torch.arange(tokens) % 2)[:, None]):
        for options in ({}, {"threshold": 0.0}):
            assert_as_specified(backend, zeros, tokens // 2, **options)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_is_not_finite_is_merged_last(backend, value, dtype):
    require(OP, backend)
    skip_float16_where_slow(backend, dtype)
    tokens = 14 if is_slow(backend) else 85
    metric = draw(2, tokens, 33, dtype=dtype)
    metric[..., 3][choices(3, 2, tokens) == 0] = value
    metric[..., 32][choices(5, 2, tokens, seed=1) == 0] = value
    for given_metric in (metric, metric.new_full(metric.shape, value)):
        for options in ({}, {"num_protected": 2}, {"threshold": -1.0}):
            for num_merged in sizes_for(backend, (3, tokens), (3,)):
                assert_as_specified(backend, given_metric, num_merged, **options)
    odd_only = draw(1, 8, 3, dtype=dtype)
    odd_only[:, 1::2] = value
    assert_as_specified(backend, odd_only, 2)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_magnitude(backend, dtype):
    require(OP, backend)
    tokens = 14 if is_slow(backend) else 85
    limits = torch.finfo(dtype)
    scales, lowest = (limits.max / 6, limits.tiny, limits.smallest_normal * limits.eps * 3), -1
    if backend == "triton" and is_slow(backend) and dtype == torch.bfloat16:
        scales, lowest = scales[:1], -0.5  # Triton's interpreter converts denormal numbers of bfloat16 wrongly
    for scale in scales:
        assert_as_specified(backend, (draw(2, tokens, 40).double() * scale).to(dtype), tokens // 3)
    exponents = torch.linspace(lowest, 1, tokens)[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))]
    reach = torch.finfo(dtype).max ** exponents.double() / 6
    assert_as_specified(backend, (draw(2, tokens, 40).double() * reach[:, None]).to(dtype), tokens // 3)


@everywhere
@settings(max_examples=60)
@given(data=st.data())
def test_every_plan_is_the_references(backend, data):
    require(OP, backend)
    limit = 16 if is_slow(backend) else 90
    tokens, length = data.draw(st.integers(2, limit)), data.draw(st.integers(1, limit))
    batch, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 10**6))
    metric = draw(batch, tokens, length, seed=seed)
    if data.draw(st.booleans()):
        metric = metric[:, choices(data.draw(st.integers(1, tokens)), tokens, seed=seed)]
    for value in data.draw(st.sets(st.sampled_from((0.0, float("nan"), float("inf"), 1e-30)), max_size=2)):
        metric = torch.where(choices(4, batch, tokens, 1, seed=seed + 1) == 0, metric * value, metric)
    sizes = choices(data.draw(st.integers(1, 3)), batch, tokens, seed=seed) if data.draw(st.booleans()) else None
    assert_as_specified(
        backend,
        metric.to(data.draw(st.sampled_from(DTYPES))),
        data.draw(st.integers(1, tokens)),
        num_protected=data.draw(st.integers(0, 5)),
        distill_token=data.draw(st.booleans()),
        sizes=sizes,
        threshold=data.draw(st.none() | st.floats(-1, 1)),
    )


# ---- CPU: threads and levels ----


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_same_plan_for_any_number_of_threads(batch):
    require(OP, "cpu")
    before = torch.get_num_threads()
    try:
        for metric in (draw(batch, 611, 48), draw(batch, 611, 48, dtype=torch.bfloat16).mT.contiguous().mT):
            metric[:, 100:130] = 0
            metric[:, 200:210] = float("nan")
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert_as_specified("cpu", metric, 150)
    finally:
        torch.set_num_threads(before)


LEVEL = """
import effattn, torch, test_token_matching as own
torch.set_num_threads(1)
for dtype in own.DTYPES:
    own.test_any_length_of_token("cpu", dtype)
own.test_any_number_of_tokens("cpu", torch.float32)
own.test_any_magnitude("cpu", torch.float32)
own.test_equal_and_parallel_tokens_tie("cpu", torch.bfloat16)
own.test_more_tokens_than_one_block_holds("cpu")
own.test_tokens_that_hardly_differ_are_told_apart("cpu", 1e-3)
print(effattn._native.isa())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_makes_the_same_plan(level):
    require(OP, "cpu")
    skip_level_of_other_tests(level)
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "EFFATTN_CPU_ISA": level, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    ran = subprocess.run([sys.executable, "-c", LEVEL], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if ran.stdout.strip() != level:
        pytest.skip(f"this processor runs {ran.stdout.strip()} where {level} is asked for")


# ---- torch ----


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Plan(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, metric, sizes):
        plan = bipartite_soft_matching(metric, 3, num_protected=1, sizes=sizes, backend=self.backend)
        return plan.source, plan.members, plan.offsets


@beside_matrix  # test_torch_features.py has the cpu backend
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_to_one_graph_for_every_batch(backend, fresh_compiler):
    require(OP, backend)
    compiled = torch.compile(Plan(backend), fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        metric = draw(batch, 12, 4, seed=batch).to(device_of(backend))
        sizes = torch.ones(batch, 12, device=metric.device)
        for tensor in (metric, sizes):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert all(map(torch.equal, compiled(metric, sizes), Plan(backend)(metric, sizes)))


@beside_matrix  # test_torch_features.py has the cpu backend
def test_export_leaves_the_batch_open(backend, fresh_compiler):
    require(OP, backend)
    device = device_of(backend)
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = (draw(2, 12, 4).to(device), torch.ones(2, 12, device=device))
    exported = torch.export.export(Plan(backend), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    more = (draw(5, 12, 4).to(device), torch.ones(5, 12, device=device))
    assert all(map(torch.equal, exported.module()(*more), Plan(backend)(*more)))


@everywhere
def test_vmap_is_a_loop(backend):
    require(OP, backend)
    metric = draw(3, 2, 12, 4).to(device_of(backend))
    sizes = choices(2, 3, 2, 12).float().to(metric.device)
    for in_dims, moved in ((0, metric), (2, metric.movedim(0, 2))):
        mapped = torch.func.vmap(Plan(backend), in_dims=(in_dims, 0))(moved, sizes)
        each = [Plan(backend)(m, s) for m, s in zip(metric, sizes)]
        assert all(torch.equal(m, torch.stack(e)) for m, e in zip(mapped, zip(*each)))


@everywhere
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_fake_tensors_tell_shapes_and_dtypes(backend, threshold):
    require(OP, backend)
    metric = draw(2, 12, 4).to(device_of(backend))
    wanted = bipartite_soft_matching(metric, 3, threshold=threshold, backend=backend)
    with FakeTensorMode() as mode:
        fake = bipartite_soft_matching(mode.from_tensor(metric), 3, threshold=threshold, backend=backend)
    for name in PLAN:
        got, real = getattr(fake, name), getattr(wanted, name)
        assert (got.shape, got.dtype, got.stride()) == (real.shape, real.dtype, real.stride())


@everywhere
def test_opcheck(backend):
    require(OP, backend)
    metric = draw(2, 12, 4).to(device_of(backend))
    sizes = torch.ones(2, 12, device=metric.device)
    for arguments in ((metric, None, 3, 0, False, -2.0, False), (metric.mT[:, :2].mT, sizes, 2, 1, True, 0.5, True)):
        torch.library.opcheck(match.overload(backend), arguments)


# ---- arguments ----

METRIC = torch.randn(2, 6, 4)
BAD = (
    ({"metric": [1.0]}, TypeError, "metric must be a Tensor"),
    ({"metric": METRIC.int()}, TypeError, "metric must be floating point"),
    ({"metric": METRIC[0]}, ValueError, "metric must have shape"),
    ({"metric": METRIC[..., :0]}, ValueError, "d at least 1"),
    ({"metric": torch.zeros(1, 1, 1).expand(1, 2**21 + 1, 1)}, ValueError, "at most 2097152 tokens"),
    ({"num_merged": 1.5}, TypeError, "num_merged must be an int"),
    ({"num_merged": True}, TypeError, "num_merged must be an int"),
    ({"num_protected": "1"}, TypeError, "num_protected must be an int"),
    ({"num_protected": -1}, ValueError, "num_protected must be at least 0"),
    ({"distill_token": 1}, TypeError, "distill_token must be a bool"),
    ({"threshold": "high"}, TypeError, "threshold must be"),
    ({"threshold": 1.5}, ValueError, r"threshold must be in \[-1, 1\]"),
    ({"threshold": float("nan")}, ValueError, "threshold must be"),
    ({"sizes": [1.0]}, TypeError, "sizes must be a Tensor"),
    ({"sizes": torch.ones(2, 6, dtype=torch.complex64)}, TypeError, "sizes must be real"),
    ({"sizes": torch.ones(2, 5)}, ValueError, "sizes must have shape"),
    ({"sizes": torch.ones(2, 6, 2)}, ValueError, "sizes must have shape"),
    ({"sizes": torch.ones(2, 6, device="meta")}, ValueError, "sizes must be on metric's device"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
    ({"metric": METRIC.double(), "backend": "cpu"}, NotImplementedError, "float64"),
)


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[f"{next(iter(b[0]))}: {b[2]}" for b in BAD])
def test_wrong_arguments_are_named(wrong, error, message):
    require(OP, "cpu")
    with pytest.raises(error, match=message):
        bipartite_soft_matching(**{"metric": METRIC, "num_merged": 2, **wrong})


def test_the_op_itself_guards_memory():
    require(OP, "cpu")
    good = (METRIC, None, 2, 0, False, -2.0, False)
    for position, value, message in (
        (0, METRIC[0], "3 dimensions"),
        (1, torch.ones(2, 5), "sizes has size 5"),
        (2, 4, "num_merged must be in"),
        (2, 0, "num_merged must be in"),
        (3, -1, "num_merged must be in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            match("cpu", *(value if i == position else argument for i, argument in enumerate(good)))
