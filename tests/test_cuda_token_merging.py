"""The CUDA kernels of token matching and merging: tiles and their edges, what fp32 cannot decide, plans of one block and
of several, rows in pieces of 16 bytes and in single elements, layouts, orders of threads, wrong plans.

Without a GPU in the emulator, on tensors that end at a guard page.
"""

from __future__ import annotations

import pytest
import torch
from conformance import LAYOUTS, device_of, place, require

import effattn
from effattn import TokenMerge
from effattn.ops.token_merging import match
from effattn.ops.token_merging_plan import merge_op, unmerge_op, weighted_op

CUDA = pytest.mark.parametrize("backend", ["cuda"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
PLAN = ("source", "members", "offsets")
FLAT = [name for name in LAYOUTS if name not in ("token_major", "packed")]
"""Layouts of three dimensions."""

pytestmark = pytest.mark.usefixtures("_kernels")


@pytest.fixture
def _kernels():
    require("bipartite_soft_matching", "cuda")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_matching(metric, num_merged, **options):
    """The plan is the reference's, index for index; the reference's plan."""
    wanted = effattn.bipartite_soft_matching(metric, num_merged, backend="reference", **options)
    device = device_of("cuda")
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    got = effattn.bipartite_soft_matching(metric.to(device), num_merged, backend="cuda", **options)
    for name in PLAN:
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name
    return wanted


# ---- Matching


@CUDA
@DTYPES
@pytest.mark.parametrize("shape", [(2, 150, 70), (1, 129, 32), (3, 64, 1), (2, 2, 5), (2, 3, 4)], ids=str)
def test_tiles_of_rows_columns_and_depth(backend, dtype, shape):
    metric = normal(*shape).to(dtype)
    check_matching(metric, shape[1])
    check_matching(metric, shape[1] // 4, threshold=0.1)


@CUDA
@pytest.mark.parametrize(
    "options",
    [
        {"num_protected": 1},
        {"num_protected": 2, "threshold": 0.2},
        {"num_protected": 5},
        {"distill_token": True},
        {"distill_token": True, "num_protected": 1, "threshold": 0.0},
        {"distill_token": True, "threshold": 1.0},
    ],
    ids=str,
)
def test_protected_tokens_distillation_and_thresholds(backend, options):
    for tokens in (9, 70):
        metric = normal(2, tokens, 6)
        check_matching(metric, 3, **options)
        check_matching(metric, tokens, **options)
        sizes = torch.rand(2, tokens).where(torch.rand(2, tokens) > 0.3, torch.tensor(0.0))
        check_matching(metric, tokens, sizes=sizes, **options)


@CUDA
def test_a_single_b_that_is_protected_is_merged_into_all_the_same(backend):
    check_matching(normal(2, 3, 4), 1, distill_token=True)


@CUDA
def test_more_rows_than_one_block_ranks(backend):
    """515 rows of a: two blocks, the second with 3 of them."""
    metric = normal(1, 1030, 2)
    metric[0, 500:520] = metric[0, 100:120]
    check_matching(metric, 300, num_protected=1)
    check_matching(metric, 515, threshold=0.99999)
    check_matching(metric, 513, distill_token=True)


@CUDA
def test_tokens_that_are_all_alike_make_every_column_a_candidate(backend):
    wanted = check_matching(torch.ones(1, 140, 3), 40)
    assert (wanted.source[0, :80:2] == wanted.source[0, 1]).all()
    check_matching(torch.ones(1, 140, 3) * torch.arange(1, 141).view(1, -1, 1), 70)


@CUDA
def test_what_fp32_cannot_tell_apart_is_decided_in_double(backend):
    """Similarities of 1 - 1e-8 that differ by 1e-9, of which products in fp32 take the wrong one in most rows."""
    metric = normal(1, 1, 64) + 1e-4 * normal(1, 150, 64, seed=1)
    unit = metric[0].double() / metric[0].double().norm(dim=-1, keepdim=True)
    partner = (unit[::2] @ unit[1::2].T).argmax(1)
    assert ((unit[::2].float() @ unit[1::2].float().T).argmax(1) != partner).float().mean() > 0.5
    wanted = check_matching(metric, 75)
    assert torch.equal(wanted.source[0, ::2], wanted.source[0, 1::2][partner])


@CUDA
def test_similarities_closer_than_a_step_are_ties(backend):
    """1 - 5e-15 and 1 round to the same multiple of 2^-40: the first of them is chosen."""
    metric = torch.zeros(1, 8, 2)
    metric[..., 0] = 1
    metric[0, 1::2, 1] = torch.tensor([1e-7, 1e-3, 0.0, 1e-7])
    wanted = check_matching(metric, 4)
    assert (wanted.source[0, ::2] == 0).all()


@CUDA
def test_norms_of_any_size_and_tokens_that_are_similar_to_nothing(backend):
    metric = normal(2, 80, 5)
    scale = torch.ones(80)
    scale[::3], scale[1::3] = 1e-42, 1e37
    metric *= scale.view(-1, 1)
    metric[0, 4], metric[0, 9] = 0.0, 0.0
    metric[1, 6, 2], metric[1, 11, 0] = torch.nan, torch.inf
    metric[1, 12], metric[1, 13] = -torch.inf, torch.nan
    for options in ({}, {"threshold": -1.0}, {"num_protected": 3}):
        check_matching(metric, 40, **options)
    check_matching(torch.full((1, 6, 2), torch.nan), 2)
    check_matching(torch.zeros(1, 6, 2), 2)


@CUDA
@pytest.mark.parametrize("layout", FLAT)
def test_layouts_of_the_metric(backend, layout):
    check_matching(place(normal(2, 37, 6), layout), 9, num_protected=1)


@CUDA
def test_a_batch_of_nothing(backend):
    check_matching(torch.zeros(0, 10, 4), 3)
    x = torch.zeros(0, 10, 4)
    plan = effattn.bipartite_soft_matching(x, 3, backend="cuda")
    merged, sizes = plan.merge_weighted(x, backend="cuda")
    assert (merged.shape, sizes.shape) == ((0, 7, 4), (0, 7, 1))
    assert plan.unmerge(merged, backend="cuda").shape == (0, 10, 4)


@CUDA
def test_a_threshold_without_padding_is_refused(backend):
    with pytest.raises(RuntimeError, match="with a threshold the plan must be padded"):
        match("cuda", normal(1, 6, 2).to(device_of("cuda")), None, 2, 0, False, 0.5, False)


# ---- Merging


def plan_of(batch, tokens, outputs, seed=0):
    """Outputs of no, one and many members; the last is padding."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, outputs - 1, (batch, tokens), generator=generator)
    source[:, : tokens // 3] = 1
    members = source.argsort(dim=1, stable=True)
    offsets = torch.searchsorted(source.sort(1).values, torch.arange(outputs + 1).expand(batch, -1).contiguous())
    return [t.int().contiguous() for t in (source, members, offsets)]


def indices(*rows):
    return [torch.tensor([row], dtype=torch.int32, device=device_of("cuda")) for row in rows]


MODES = ("mean", "sum", "max")
METHODS = (*MODES, "weighted", "residual", "unweighted", "unmerge")


def exact(method, plan, x, residual, sizes, upstream):
    """Outputs, and the gradients of x and sizes (None: there is none), by the reference and autograd in float64."""
    x, residual, sizes = (t.detach().double().requires_grad_() for t in (x, residual, sizes))
    plan = TokenMerge(*plan)
    if method in MODES:
        outputs = [plan.merge(x, method, backend="reference")]
    elif method == "unmerge":
        outputs = [plan.unmerge(x, backend="reference")]
    else:
        merged, totals = plan.merge_weighted(
            *(x, None if method == "unweighted" else sizes),
            residual=None if method == "weighted" else residual,
            backend="reference",
        )
        outputs = [merged, totals.view(totals.shape[:2])]
    used = [(t, g.double()) for t, g in zip(outputs, upstream) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in used], (x, sizes), [g for _, g in used], allow_unused=True)
    return [*(t.detach() for t in outputs), *found]


def computed(method, plan, x, residual, sizes, upstream):
    """The same by the CUDA operators, forward and backward."""
    device = device_of("cuda")
    plan, upstream = [t.to(device) for t in plan], [g.to(device) for g in upstream]
    x, residual, sizes = (t.to(device) for t in (x, residual, sizes))
    if method in MODES:
        mode = MODES.index(method)
        output = merge_op("cuda", x, *plan, mode)
        found = [output, merge_op.backward("cuda", upstream[0], x, *plan, output, mode), None]
    elif method == "unmerge":
        found = [unmerge_op("cuda", x, *plan), unmerge_op.backward("cuda", upstream[0], x, *plan), None]
    else:
        given = (None if method == "weighted" else residual, None if method == "unweighted" else sizes)
        output, totals = weighted_op("cuda", x, *plan, *given, True)
        gradients = weighted_op.backward("cuda", *upstream, x, *plan, *given, output, True)
        found = [output, totals, gradients[0], gradients[1] if given[1] is not None else None]
    return [None if t is None else t.cpu() for t in found]


def check_merging(method, shape, dtype=torch.float32, layout=None):
    batch, tokens, outputs, channels = shape
    rows, results = (outputs, tokens) if method == "unmerge" else (tokens, outputs)
    x, residual, gradient = (
        normal(batch, count, channels, seed=seed).to(dtype) for seed, count in enumerate((rows, rows, results))
    )
    if method == "max":
        x = x.mul(2).round().div(2) + 0.25  # ties, but not at 0, where torch shares with the zeros that it starts from
    if layout is not None:
        x, residual, gradient = (place(t, layout) for t in (x, residual, gradient))
    sizes = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) + 0.5
    sizes[:, 0] = 0
    arguments = (
        method,
        plan_of(batch, tokens, outputs),
        x,
        residual,
        sizes,
        [gradient, normal(batch, outputs, seed=4)],
    )
    got, wanted = computed(*arguments), exact(*arguments)
    for index, (t, ref) in enumerate(zip(got, wanted, strict=True)):
        assert (t is None) == (ref is None)
        if ref is None or not ref.numel():
            assert ref is None or t.shape == ref.shape
            continue
        # The gradient of sizes goes through the output as it was rounded.
        rounding = 2 * torch.finfo(dtype).eps * (channels**0.5 if index == 3 else 1) + 1e-6
        assert t.shape == ref.shape
        assert (t - ref).abs().max() <= rounding * ref.abs().max(), index
    return got


@CUDA
@DTYPES
@pytest.mark.parametrize("method", METHODS)
def test_merging_reads_pieces_of_16_bytes_and_single_elements(backend, method, dtype):
    """Two trips through the columns, the second of one piece, and the same with rows that are not aligned."""
    vector = 4 if dtype == torch.float32 else 8
    check_merging(method, (2, 10, 6, 4 * 32 * vector + vector), dtype)
    check_merging(method, (1, 7, 5, 133), dtype)


@CUDA
@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("method", ["residual", "max", "unmerge"])
def test_layouts_of_the_tokens(backend, method, layout):
    check_merging(method, (2, 9, 6, 12), layout=layout)


@CUDA
def test_gradients_are_permuted_as_x_is(backend):
    device = device_of("cuda")
    plan = [t.to(device) for t in plan_of(2, 9, 6)]
    x, y = normal(2, 5, 9).to(device).mT, normal(2, 5, 6).to(device).mT
    for mode in range(3):
        output = merge_op("cuda", x, *plan, mode)
        assert merge_op.backward("cuda", y, x, *plan, output, mode).stride() == x.stride()
    assert unmerge_op.backward("cuda", x, y, *plan).stride() == y.stride()


@CUDA
def test_a_token_alone_is_copied_with_the_sign_of_its_zeros(backend):
    plan = indices([1, 0, 1], [1, 0, 2], [0, 1, 3])
    x = torch.full((1, 3, 2), -0.0, device=plan[0].device)
    sizes = torch.full((1, 3), 3.0, device=x.device)
    for output in (
        *(merge_op("cuda", x, *plan, mode) for mode in range(3)),
        weighted_op("cuda", x, *plan, None, sizes, True)[0],
    ):
        assert output[0, 0].signbit().all()


@CUDA
@pytest.mark.parametrize("method", ["mean", "max", "residual"])
def test_rows_of_no_channels(backend, method):
    got = check_merging(method, (2, 9, 6, 0))
    assert got[0].shape == (2, 6, 0)


@CUDA
def test_outputs_of_size_0_are_0_and_only_their_sizes_have_a_gradient(backend):
    plan, device = indices([0, 1, 0, 1], [0, 2, 1, 3], [0, 2, 4]), device_of("cuda")
    x = torch.tensor([[[1.0, torch.inf], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]], device=device)
    sizes = torch.tensor([[0.0, 1.0, 0.0, 3.0]], device=device)
    merged, totals = weighted_op("cuda", x, *plan, None, sizes, True)
    assert merged.tolist() == [[[0.0, 0.0], [5.0, 6.0]]]
    assert totals.tolist() == [[0.0, 4.0]]
    x[0, 0, 1] = 2.0
    upstream = torch.ones_like(merged), torch.tensor([[2.0, 7.0]], device=device)
    of_x, of_sizes = weighted_op.backward("cuda", *upstream, x, *plan, None, sizes, merged, True)
    assert of_x.tolist() == [[[0.0, 0.0], [0.25, 0.25], [0.0, 0.0], [0.75, 0.75]]]
    assert of_sizes.tolist() == [[2.0, 7.0 - 6 / 4, 2.0, 7.0 + 2 / 4]]


@CUDA
def test_a_maximum_propagates_nan_and_shares_its_gradient_among_ties(backend):
    plan, nan = indices([0, 0, 0, 1], [0, 1, 2, 3], [0, 3, 4]), torch.nan
    x = torch.tensor([[[1.0, 2.0, 0.0], [1.0, nan, -1.0], [0.0, 5.0, 0.0], [3.0, nan, 4.0]]], device=plan[0].device)
    merged = merge_op("cuda", x, *plan, MODES.index("max"))
    assert merged[0, :, ::2].tolist() == [[1.0, 0.0], [3.0, 4.0]]
    assert merged[0, :, 1].isnan().all()
    found = merge_op.backward("cuda", torch.full_like(merged, 6.0), x, *plan, merged, MODES.index("max"))
    assert found[0, :, 0].tolist() == [3.0, 3.0, 0.0, 6.0]
    assert found[0, :3, 1].isnan().all()
    assert found[0, :, 2].tolist() == [3.0, 0.0, 3.0, 6.0]


@CUDA
def test_sizes_that_need_no_gradient_get_zeros(backend):
    device = device_of("cuda")
    x, gradient, sizes = (t.to(device) for t in (normal(1, 9, 8), normal(1, 6, 8), torch.rand(1, 9)))
    plan = [t.to(device) for t in plan_of(1, 9, 6)]
    output, totals = weighted_op("cuda", x, *plan, None, sizes, False)
    found = weighted_op.backward("cuda", gradient, totals, x, *plan, None, sizes, output, False)
    assert found[0].any()
    assert not found[1].any()
    assert weighted_op.backward("cuda", gradient, None, x, *plan, None, None, output, True)[1].shape == (0,)


@CUDA
@pytest.mark.parametrize("wrong", [-1, 7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("which", range(3), ids=PLAN)
def test_a_plan_with_indices_out_of_range_reads_and_writes_in_bounds(backend, which, wrong):
    """The guard pages around every tensor are the assertion. What is computed does not matter."""
    plan = plan_of(2, 7, 5)
    plan[which][:, 1:4] = wrong
    plan, device = [t.to(device_of("cuda")) for t in plan], device_of("cuda")
    x, y, sizes = (t.to(device) for t in (normal(2, 7, 5), normal(2, 5, 5), torch.rand(2, 7)))
    for mode in range(3):
        output = merge_op("cuda", x, *plan, mode)
        assert merge_op.backward("cuda", y, x, *plan, output, mode).shape == x.shape
    output, totals = weighted_op("cuda", x, *plan, x, sizes, True)
    assert weighted_op.backward("cuda", y, totals, x, *plan, x, sizes, output, True)[1].shape == (2, 7)
    assert unmerge_op("cuda", y, *plan).shape == x.shape


@CUDA
def test_same_bits_in_every_order_of_threads(backend, monkeypatch):
    found = []
    for seed in range(3):
        monkeypatch.setenv("EFFATTN_EMULATOR_SEED", str(seed))
        check_matching(normal(2, 70, 9), 20, num_protected=1)
        found.append(
            [t for method in ("residual", "max") for t in check_merging(method, (2, 9, 5, 20)) if t is not None]
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.gpu
@CUDA
def test_matching_and_merging_are_captured_by_cuda_graphs(backend):
    metric, x = normal(4, 197, 64).cuda(), normal(4, 197, 96).cuda()

    def step():
        plan = effattn.bipartite_soft_matching(metric, 16, num_protected=1, threshold=0.0, backend="cuda")
        return plan.merge_weighted(x, backend="cuda")[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    metric.copy_(normal(4, 197, 64, seed=5))
    graph.replay()
    assert torch.equal(captured, step())
