"""The CUDA kernels of windows: sizes of windows and heads, padding, shifts, bias, layouts, addresses, orders of threads.

They take 16 bits only, so the conformance suite, which begins in float32, leaves them to this file. Without a GPU in
the emulator, on tensors that end at a guard page.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from conformance import CASES, LAYOUTS, Shape, assert_within_budget, device_of, place, require

import effattn
from effattn import _library, _registry
from effattn._registry import Problem

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
    ("grid", "width"),
    [((7, 7), 1), ((4, 4), 2), ((7, 7), 7), ((56, 2), 1), ((14, 14), 7), ((12, 12), 12), ((14, 14), 14), ((3, 23), 3)],
    ids=str,
)
def test_windows_from_a_few_slots_to_several_tiles(backend, grid, width):
    """7, 8, 49, 56 (and 2), 98, 144, 196, 9 and 69 slots."""
    shape = (2 if grid[0] * grid[1] < 20 else 1, 2, grid[0] * grid[1], 24)
    padding = "zero_key" if any(side % width for side in grid) else "error"
    check("cross_shaped_window_attention", shape, torch.bfloat16, grid, stripe_width=width, lepe="bias", padding=padding)
