"""Training on the CUDA kernels of stripes and windows: sizes, padding, layouts, LePE, shift, bias, orders of threads.

Of windows up to 64 slots all gradients come from one kernel, of others from a stream over keys and one over queries.
Without a GPU in the emulator, on tensors that end at a guard page.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from conformance import CASES, SIXTEEN_BITS_ONLY, Shape, assert_same_bits, assert_within_budget, device_of, run

import effattn
from effattn import _registry
from effattn._registry import Problem

CUDA = pytest.mark.parametrize("backend", ["cuda"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ONE_TILE, STREAMED = ((7, 3), 1), ((9, 9), 9)


@pytest.fixture(autouse=True)
def _kernels():
    problem = Problem(device_of("cuda"), torch.bfloat16, 16)
    ok, reason = next(b.predicate(problem) for b in _registry._table["window_attention"] if b.name == "cuda")
    if not ok:
        pytest.skip(reason)


def training(
    grid, width, head_dim=24, *, heads=2, batch=1, lepe="per head", op="cross_shaped_window_attention", **more
):
    """A case of conformance and its shape."""
    padding = "zero_key" if any(side % width for side in grid) and max(grid) > width else "error"
    options = {"grid": grid, "stripe_width": width, "padding": padding, **more}
    case = CASES["cross_shaped_window_attention"][1 if lepe == "shared" else 0]
    names = ("query", "key", "value", *(n for n in case.differentiable if lepe and n.startswith("lepe")))
    sample = case.sample
    case = case.with_(
        function=getattr(effattn, op),
        sample=lambda shape, generator: {n: t for n, t in sample(shape, generator).items() if n in names},
        differentiable=names,
        options=lambda shape: options,
        even_heads=False,
    )
    return case, Shape(batch=batch, heads=heads, grid=grid, prefix=0, head_dim=head_dim)


def swin(grid, window, head_dim=24, *, heads=2, batch=1, table=True, lepe=False, shift=None, **more):
    """The same of `window_attention`; shift: of half a window where it is not given."""
    case = CASES["window_attention"][0]
    shift = tuple(side // 2 for side in window) if shift is None else shift
    padding = "zero_key" if any(side % size for side, size in zip(grid, window)) else "error"
    options = {"grid": grid, "window": window, "shift": shift, "padding": padding, **more}
    names = ("query", "key", "value", *(("bias_table",) if table else ()))
    names += ("lepe_weight", "lepe_bias") if lepe else ()
    rows, draw = (2 * window[0] - 1) * (2 * window[1] - 1), case.sample

    def sample(shape, generator):
        drawn = draw(shape, generator)
        drawn["bias_table"] = torch.randn(rows, shape.heads, generator=generator, dtype=torch.float64)
        return {name: drawn[name] for name in names}

    case = case.with_(sample=sample, differentiable=names, options=lambda shape: options)
    return case, Shape(batch=batch, heads=heads, grid=grid, prefix=0, head_dim=head_dim)


def check(case, shape, dtype=torch.bfloat16, layouts=None, grad_layout=None):
    device = device_of("cuda")
    options, grad_output = case.options(shape), case.grad_output(shape, dtype, grad_layout, device)
    assert_within_budget(
        case, lambda seed: (case.tensors(shape, dtype, layouts, seed, device), options, grad_output), "cuda"
    )


@CUDA
@DTYPES
@pytest.mark.parametrize(
    "case", [case for _, op in SIXTEEN_BITS_ONLY for case in CASES[op] if case.variant != "overlap"], ids=str
)
def test_the_cases_of_the_conformance_suite(backend, dtype, case):
    check(case, Shape(heads=2), dtype)


@CUDA
@pytest.mark.parametrize("head_dim", [1, 8, 16, 24, 30, 32, 33, 40, 48, 53, 56, 64])
@pytest.mark.parametrize("windows", [ONE_TILE, STREAMED], ids=["one tile", "streamed"])
def test_every_head_dim(backend, windows, head_dim):
    check(*training(*windows, head_dim))


@CUDA
@pytest.mark.parametrize(
    ("grid", "width"),
    [((7, 7), 7), ((8, 8), 8), ((56, 2), 1), ((12, 4), 4), ((1, 1), 1), ((5, 13), 5), ((14, 14), 7), ((13, 13), 13)],
    ids=str,
)
def test_windows_from_one_slot_to_several_tiles(backend, grid, width):
    """49, 64, 56 and 2, 48 and 16, 1, 65, 98, 169 slots; after the first, not all warps of a block have rows."""
    check(*training(grid, width))


@CUDA
@pytest.mark.slow
def test_blocks_that_walk_over_several_groups_of_windows(backend):
    """4101 groups of four windows: 2051 blocks, the last with one group, of one window."""
    check(*training((3, 4 * 4100 + 1), 1, 8, heads=1, op="stripe_attention", orientation="vertical"))


@CUDA
@pytest.mark.parametrize("padding", ["zero_key", "mask"])
@pytest.mark.parametrize(("grid", "width"), [((6, 5), 4), ((10, 20), 6)], ids=["one tile", "both sides of one tile"])
def test_padding(backend, grid, width, padding):
    check(*training(grid, width, 16, padding=padding), dtype=torch.float16)


@CUDA
@pytest.mark.parametrize("lepe", [None, "shared"])
@pytest.mark.parametrize("windows", [ONE_TILE, STREAMED], ids=["one tile", "streamed"])
def test_without_lepe_and_with_one_for_all_heads(backend, windows, lepe):
    check(*training(*windows, lepe=lepe, heads=4))


@CUDA
@pytest.mark.parametrize("orientation", ["vertical", "horizontal"])
def test_stripes_of_one_orientation_and_of_one_head(backend, orientation):
    check(*training((6, 4), 2, heads=1, batch=3, op="stripe_attention", orientation=orientation))


@CUDA
@pytest.mark.parametrize("layout", ["packed", "transposed", "every_other", "expanded_tokens"])
@pytest.mark.parametrize("windows", [ONE_TILE, STREAMED], ids=["one tile", "streamed"])
def test_layouts(backend, windows, layout):
    check(*training(*windows, 16), layouts=layout, grad_layout=layout)


# ---- Shift and bias table

SWIN = pytest.mark.parametrize("sizes", [((6, 8), (3, 4)), ((9, 16), (9, 8))], ids=["one tile", "streamed"])


@CUDA
@DTYPES
@SWIN
@pytest.mark.parametrize(
    "more",
    [
        {"table": False},
        {"shift": (0, 0)},
        {},
        {"lepe": True},
        {"table": False, "lepe": True},
        {"bias_index": "hat_oca", "shift": (1, 0)},
    ],
    ids=["shift", "bias", "both", "both and LePE", "shift and LePE", "HAT's index"],
)
def test_shift_and_bias(backend, dtype, sizes, more):
    check(*swin(*sizes, **more), dtype)


@CUDA
@pytest.mark.parametrize(
    ("grid", "window", "more"),
    [
        ((14, 14), (7, 7), {"head_dim": 32, "heads": 1}),
        ((12, 24), (12, 12), {"head_dim": 32, "heads": 1}),
        ((16, 16), (16, 16), {"head_dim": 30, "heads": 1, "shift": (0, 0)}),
        ((16, 32), (16, 16), {"head_dim": 30, "heads": 1}),
    ],
    ids=["Swin 7", "Swin 12", "HAT 16", "HAT 16, shifted"],
)
def test_published_windows(backend, grid, window, more):
    check(*swin(grid, window, **more))


@CUDA
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((3, 3), (1, 1)),
        ((2, 7), (1, 7)),
        ((14, 1), (7, 1)),
        ((6, 5), (3, 5)),  # 15, 21, 33 slots: one, two and three warps of a team, and none over
        ((9, 7), (3, 7)),
        ((3, 22), (3, 11)),
        ((1, 64), (1, 64)),
        ((5, 13), (5, 13)),  # 65: the last tile of keys has one
        ((11, 9), (11, 9)),
        ((2, 67), (2, 67)),  # rows longer than a tile, two blocks of a window
        ((70, 3), (35, 3)),
    ],
    ids=str,
)
def test_windows_of_any_sides(backend, grid, window):
    check(*swin(grid, window, 16, batch=2))


@CUDA
@pytest.mark.parametrize("padding", ["zero_key", "mask"])
@pytest.mark.parametrize("more", [{"table": False}, {"shift": (0, 0)}, {}, {"lepe": True}], ids=str)
@pytest.mark.parametrize(
    ("grid", "window"), [((5, 6), (4, 4)), ((7, 11), (8, 9)), ((13, 8), (9, 9))], ids=["one tile", "one window", "both"]
)
def test_padding_with_shift_and_bias(backend, grid, window, padding, more):
    check(*swin(grid, window, 16, padding=padding, **more), dtype=torch.float16)


@CUDA
@pytest.mark.parametrize("head_dim", [1, 8, 16, 24, 30, 32, 33, 40, 48, 53, 56, 64])
@SWIN
def test_every_head_dim_with_shift_and_bias(backend, sizes, head_dim):
    check(*swin(*sizes, head_dim, heads=1))


@CUDA
@pytest.mark.parametrize("layout", ["packed", "transposed", "every_other", "expanded_tokens"])
@SWIN
def test_layouts_with_shift_and_bias(backend, sizes, layout):
    check(*swin(*sizes, 16), layouts=layout, grad_layout=layout)


@CUDA
@pytest.mark.slow
@pytest.mark.parametrize("window", [(1, 3), (1, 65)], ids=["one tile", "streamed"])
def test_blocks_that_sum_the_bias_of_several_windows(backend, window):
    """4101 blocks before they walk: 2051 of two windows, the last of one (of a tile: of two groups of four)."""
    windows = 4101 * (4 if window[1] == 3 else 1) - 3
    check(*swin((windows, window[1]), window, 8, heads=1, shift=(0, 1)))


@CUDA
@pytest.mark.slow
def test_the_largest_window_with_a_bias(backend):
    """Sums of more than the shared memory that every chip has, were all eight warps of a block to keep some."""
    check(*swin((32, 32), (32, 32), 64, heads=1, shift=(0, 0)))


@CUDA
def test_no_tokens_no_gradient_of_the_bias(backend):
    query = torch.zeros(0, 2, 16, 8, dtype=torch.bfloat16, device=device_of("cuda"), requires_grad=True)
    table = torch.ones(9, 2, device=query.device, requires_grad=True)
    effattn.window_attention(query, query, query, (4, 4), (2, 2), bias_table=table, backend="cuda").sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


# ---- Bits and numbers


@CUDA
@pytest.mark.parametrize(
    "training",
    [training(*ONE_TILE, batch=2), training(*STREAMED, batch=2), swin((6, 8), (3, 4), batch=2), swin((9, 16), (9, 8))],
    ids=["one tile", "streamed", "shift and bias", "shift and bias, streamed"],
)
def test_gradients_are_the_same_bits_in_every_order_of_threads(backend, training):
    case, shape = training
    tensors, options = case.tensors(shape, torch.bfloat16), case.options(shape)
    results = []
    for seed in range(4):
        os.environ["EFFATTN_EMULATOR_SEED"] = str(seed)
        try:
            results.append(run(case, tensors, options, "cuda", case.grad_output(shape, torch.bfloat16)))
        finally:
            del os.environ["EFFATTN_EMULATOR_SEED"]
    for other in results[1:]:
        assert_same_bits(other, results[0])


@CUDA
def test_one_nan_stays_in_its_window(backend):
    """Masked and padded keys are kept out before their exponential, not multiplied by 0 after it."""
    case, shape = training((7, 4), 1, lepe=None, op="stripe_attention", orientation="vertical")
    tensors = case.tensors(shape, torch.bfloat16)
    tensors["key"][0, :, 1] = float("nan")  # column 1
    found = run(case, tensors, case.options(shape), "cuda", case.grad_output(shape, torch.bfloat16))
    for name in ("query", "key", "value"):
        bad = ~found.gradients[name].isfinite().all(-1).unflatten(-1, (7, 4))
        assert bad[..., 1].all()
        assert not bad[..., [0, 2, 3]].any()


@CUDA
def test_logits_below_exp_of_minus_a_hundred_keep_keys_that_are_none_out(backend):
    """exp(0 - logsumexp) of a key that does not exist would be infinite."""
    for windows in (ONE_TILE, STREAMED):
        case, shape = training(*windows, 16, lepe=None, scale=300.0)
        tensors = case.tensors(shape, torch.bfloat16)
        tensors["query"], tensors["key"] = tensors["query"].abs(), -tensors["key"].abs()
        found = run(case, tensors, case.options(shape), "cuda", case.grad_output(shape, torch.bfloat16))
        assert all(gradient.isfinite().all() for gradient in found.gradients.values())


@CUDA
def test_a_bias_of_a_larger_window_has_no_backward_and_says_so(backend):
    query, key, value = (torch.zeros(1, 1, 1025, 8, dtype=torch.bfloat16, device=device_of("cuda")) for _ in range(3))
    table = torch.zeros(2049, 1, device=query.device)
    call = functools.partial(effattn.window_attention, key=key, value=value, grid=(1, 1025), window=(1, 1025))
    assert call(query, bias_table=table, backend="cuda").shape == query.shape
    with pytest.raises(NotImplementedError, match="for windows of up to 1024 tokens, got 1025"):
        call(query, bias_table=table.requires_grad_(), backend="cuda")
    call(query.requires_grad_(), shift=(0, 3), backend="cuda").sum().backward()
    assert query.grad.isfinite().all()
