"""The CUDA kernels of windows: sizes of windows and heads, padding, shifts, bias, layouts, addresses, orders of threads.

They take 16 bits only, so the conformance suite, which begins in float32, leaves them to this file. Without a GPU in
the emulator, on tensors that end at a guard page.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from conformance import CASES, LAYOUTS, SIXTEEN_BITS_ONLY, Shape, assert_within_budget, device_of, place, require

import effattn
from effattn import _library, _native, _registry

CUDA = pytest.mark.parametrize("backend", ["cuda"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _kernels():
    require("cross_shaped_window_attention", "cuda", torch.bfloat16)


def normal(*sizes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def draw(shape, dtype, *, lepe=None, table=None, seed=0):
    """Arguments by name; shape: (batch, heads, tokens, head_dim), lepe: None, "weight", "bias" or "shared"."""
    heads, head_dim = shape[1], shape[3]
    tensors = {n: normal(*shape, seed=8 * seed + i, dtype=dtype) for i, n in enumerate(("query", "key", "value"))}
    channels = head_dim if lepe == "shared" else heads * head_dim
    if lepe:
        tensors["lepe_weight"] = normal(channels, 1, 3, 3, seed=8 * seed + 3)
    if lepe == "bias":
        tensors["lepe_bias"] = normal(channels, seed=8 * seed + 4)
    if table:
        tensors["bias_table"] = normal(table, heads, seed=8 * seed + 5)
    return tensors


def error(got, exact):
    return (got.double() - exact).abs().max().item() if got.numel() else 0.0


def check(op, shape, dtype, grid, *, lepe=None, table=None, place_as=None, **options):
    """The accuracy rule for the output, pooled over draws where one misses it, as conformance/rule.py does."""
    function, worst = getattr(effattn, op), (0.0, 0.0, 0.0)
    for seed in range(8):
        tensors = draw(shape, dtype, lepe=lepe, table=table, seed=seed)
        if place_as:
            tensors.update({n: place(tensors[n], place_as) for n in ("query", "key", "value")})
        device = device_of("cuda")
        got = function(**{n: t.to(device) for n, t in tensors.items()}, grid=grid, **options, backend="cuda").cpu()
        low = function(**tensors, grid=grid, **options, backend="reference")
        exact = function(**{n: t.double() for n, t in tensors.items()}, grid=grid, **options, backend="reference")
        assert got.shape == exact.shape
        assert got.dtype == dtype
        assert got.isfinite().all()
        worst = tuple(map(max, worst, (error(got, exact), error(low, exact), error(exact, 0 * exact))))
        if worst[0] <= 2 * worst[1] + torch.finfo(dtype).eps * worst[2]:
            return
    raise AssertionError(f"error {worst[0]:.3e}, the dtype's {worst[1]:.3e}, largest value {worst[2]:.3e}")


# ---- Sizes


@CUDA
@DTYPES
@pytest.mark.parametrize("head_dim", [1, 8, 16, 24, 30, 32, 33, 40, 48, 53, 56, 64])
def test_every_head_dim(backend, dtype, head_dim):
    check("cross_shaped_window_attention", (1, 2, 15, head_dim), dtype, (3, 5), stripe_width=1, lepe="bias")


@CUDA
@pytest.mark.parametrize(
    ("grid", "width", "slots"),
    [
        ((7, 7), 1, 7),
        ((4, 4), 2, 8),
        ((6, 9), 3, 18),  # and 27: teams of two warps, and a half of other windows
        ((7, 7), 7, 49),
        ((56, 2), 1, 56),  # and 2
        ((8, 8), 8, 64),
        ((15, 5), 5, 75),
        ((14, 7), 7, 98),  # and 49
        ((12, 12), 12, 144),
        ((14, 14), 14, 196),
    ],
    ids=str,
)
def test_windows_of_any_number_of_slots(backend, grid, width, slots):
    assert slots in (grid[0] * width, grid[1] * width)
    shape = (2, 2, grid[0] * grid[1], 24) if slots < 60 else (1, 2, grid[0] * grid[1], 24)
    check("cross_shaped_window_attention", shape, torch.bfloat16, grid, stripe_width=width, lepe="bias")


@CUDA
@pytest.mark.parametrize("lepe", [None, "weight"])
def test_a_window_that_does_not_fit_shared_memory_is_streamed(backend, lepe):
    """At head_dim 64 from 137 slots on."""
    check(
        "stripe_attention",
        (1, 1, 150, 64),
        torch.bfloat16,
        (15, 10),
        stripe_width=10,
        orientation="vertical",
        lepe=lepe,
    )


@CUDA
@pytest.mark.parametrize("seed", range(4))
def test_streamed_keys_that_take_no_part(backend, seed, monkeypatch):
    """Three stages, so that a buffer is filled again."""
    monkeypatch.setenv("EFFATTN_EMULATOR_SEED", str(seed))
    options = {"stripe_width": 10, "orientation": "vertical", "padding": "mask"}
    check("stripe_attention", (1, 1, 135, 64), torch.bfloat16, (15, 9), **options)


@CUDA
def test_several_windows_of_a_block_are_of_one_head_and_the_last_block_is_not_full(backend):
    check(
        "stripe_attention",
        (3, 3, 15, 16),
        torch.float16,
        (5, 3),
        stripe_width=1,
        orientation="horizontal",
        lepe="shared",
    )


# ---- Geometry


@CUDA
@pytest.mark.parametrize("padding", ["zero_key", "mask"])
@pytest.mark.parametrize(("grid", "width"), [((5, 7), 3), ((3, 23), 4), ((17, 9), 8)], ids=str)
def test_padding(backend, padding, grid, width):
    shape = (1, 2, grid[0] * grid[1], 32)
    check(
        "cross_shaped_window_attention", shape, torch.bfloat16, grid, stripe_width=width, padding=padding, lepe="bias"
    )


@CUDA
@DTYPES
@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((14, 7), (7, 7), {"shift": (3, 3)}),
        ((14, 7), (7, 7), {}),
        ((8, 6), (4, 6), {"shift": (2, 0), "lepe": "weight"}),
        ((5, 6), (4, 4), {"shift": (1, 2), "padding": "zero_key", "lepe": "bias"}),
        ((7, 5), (7, 6), {"shift": (2, 0), "padding": "mask"}),
        ((12, 24), (12, 12), {"shift": (6, 6)}),
    ],
    ids=str,
)
def test_windows_with_a_bias_table(backend, dtype, grid, window, options):
    table = (2 * window[0] - 1) * (2 * window[1] - 1)
    shape = (1, 2, grid[0] * grid[1], 24)
    check("window_attention", shape, dtype, grid, window=window, table=table, **options)


@CUDA
def test_a_shift_without_bias(backend):
    check("window_attention", (1, 1, 24, 32), torch.bfloat16, (4, 6), window=(2, 3), shift=(1, 1))


SHAPES = [Shape(grid=(0, 3)), Shape(batch=0), Shape(grid=(1, 1)), Shape(grid=(1, 13)), Shape(grid=(11, 3), head_dim=7)]


@CUDA
@pytest.mark.parametrize("shape", SHAPES, ids=["no tokens", "no batch", "one token", "one row", "tall"])
@pytest.mark.parametrize(
    "case", [c for _, op in SIXTEEN_BITS_ONLY for c in CASES[op] if c.variant != "overlap"], ids=str
)
def test_corners_of_the_conformance_suite(case, backend, shape):
    options = case.options(shape)
    assert_within_budget(case, lambda seed: (case.tensors(shape, torch.bfloat16, None, seed), options, None), backend)


# ---- Memory


@CUDA
@pytest.mark.parametrize("head_dim", [24, 30, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, head_dim):
    check(
        *("cross_shaped_window_attention", (2, 4, 12, head_dim), torch.bfloat16, (4, 3)),
        stripe_width=1,
        lepe="bias",
        place_as=layout,
    )


@CUDA
@pytest.mark.parametrize("elements", [1, 2, 4])
def test_tokens_at_odd_addresses(backend, elements):
    tensors = draw((1, 2, 12, 24), torch.bfloat16)
    apart = {n: torch.cat([t.new_zeros(elements), t.flatten()])[elements:].view(t.shape) for n, t in tensors.items()}
    calls = [
        effattn.cross_shaped_window_attention(
            **{n: t.to(device_of(backend)) for n, t in some.items()}, grid=(4, 3), stripe_width=1, backend=backend
        )
        for some in (tensors, apart)
    ]
    assert torch.equal(*calls)


@CUDA
@pytest.mark.skipif(_native.cuda_device == "cuda", reason="the far memory is the CPU's")
@pytest.mark.parametrize("stride", [(1, 2**31 + 64, 16, 1), (0, 8, 2**29 + 64, 1), (0, 96, 8, 2**29)], ids=str)
def test_strides_past_two_to_the_31_elements(backend, stride):
    far = torch.frombuffer(mmap.mmap(-1, 2 * (5 * 2**29 + 2**20)), dtype=torch.bfloat16)  # few pages are touched
    near = draw((1, 2, 6, 5), torch.bfloat16)
    views = {n: far.as_strided(t.shape, stride, 4096 * i).copy_(t) for i, (n, t) in enumerate(near.items())}
    results = [
        effattn.cross_shaped_window_attention(**tensors, grid=(3, 2), stripe_width=1, backend=backend)
        for tensors in (near, views)
    ]
    assert torch.equal(*results)


@CUDA
def test_output_is_laid_out_like_query(backend):
    query = normal(2, 12, 3, 2, 24, seed=0, dtype=torch.bfloat16).to(device_of(backend))[:, :, 0].transpose(1, 2)
    output = effattn.cross_shaped_window_attention(query, query, query, (4, 3), 1, backend=backend)
    assert output.stride() == torch.empty_like(query).stride()


# ---- Numbers


@CUDA
@pytest.mark.parametrize("scale", [0.0, -1.5, 30.0])
def test_scales(backend, scale):
    check(
        "stripe_attention", (1, 1, 20, 16), torch.float16, (20, 1), stripe_width=1, orientation="vertical", scale=scale
    )


@CUDA
def test_logsumexp_is_that_of_scores_with_bias_and_mask(backend):
    tensors = draw((1, 2, 24, 16), torch.bfloat16)
    query, key, value = (t.to(device_of(backend)) for t in tensors.values())
    bias = normal(2, 3, 5, seed=9).to(query.device)
    options = (4, 6, 2, 3, 2, 3, 1, 2, 0, 0, 0, False, False, 0.25)
    _, got = _library._operators["window"].forward("cuda", query, key, value, bias, None, None, *options)
    grid = torch.arange(24).view(4, 6).roll((-1, -2), (0, 1)).unfold(0, 2, 2).unfold(1, 3, 3).reshape(-1, 6)
    for tokens in grid:
        y, x = tokens // 6, tokens % 6
        slots = torch.arange(6)
        dy, dx = slots // 3 - (slots // 3)[:, None], slots % 3 - (slots % 3)[:, None]
        scores = 0.25 * tensors["query"].double()[:, :, tokens] @ tensors["key"].double()[:, :, tokens].mT
        scores = scores + bias.cpu().double()[:, dy + 1, dx + 2]
        apart = ((y < 1) != (y < 1)[:, None]) | ((x < 2) != (x < 2)[:, None])
        expected = (scores - 100.0 * apart).logsumexp(-1).float()
        torch.testing.assert_close(got.cpu()[:, :, tokens], expected, rtol=1e-5, atol=1e-5)


@CUDA
@DTYPES
@pytest.mark.parametrize("options", [{}, {"padding": "mask"}], ids=["plain", "mask"])
def test_same_bits_in_every_order_of_threads(backend, dtype, options, monkeypatch):
    tensors = {n: t.to(device_of(backend)) for n, t in draw((2, 2, 70, 24), dtype, lepe="bias").items()}
    results = []
    for seed in range(4):
        monkeypatch.setenv("EFFATTN_EMULATOR_SEED", str(seed))
        results.append(
            effattn.cross_shaped_window_attention(**tensors, grid=(10, 7), stripe_width=1, **options, backend=backend)
        )
    assert all(torch.equal(other, results[0]) for other in results[1:])


# ---- Dispatch


@CUDA
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "take bfloat16 and float16"),
        ({"head_dim": 65}, "take head_dim up to 64, got 65"),
        ({"overlap": (1, 1)}, "have no overlap"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_is_refused_with_the_reason(backend, change, reason):
    query = torch.zeros(1, 2, 12, change.get("head_dim", 16), dtype=change.get("dtype", torch.bfloat16))
    query = query.to(device_of(backend))
    options = {"overlap": change["overlap"]} if "overlap" in change else {}
    with pytest.raises(NotImplementedError, match=reason):
        effattn.window_attention(query, query, query, (4, 3), (2, 3), **options, backend=backend)


def test_auto_takes_triton_before_cuda(monkeypatch):
    monkeypatch.setattr(_native, "cuda_device", "cuda")
    monkeypatch.setattr(_registry, "_gpu_generation", lambda: _registry.OLDEST_GPU)
    problem = _registry.Problem("cuda", torch.bfloat16, 24)
    for triton, expected in ((True, "triton"), (False, "cuda")):
        monkeypatch.setattr(_registry, "has_triton", lambda triton=triton: triton)
        assert _registry.choose("cross_shaped_window_attention", "auto", problem) == expected
