"""Which of the exact methods of Toeplitz-weighted linear attention serves a call: by predicted time and by accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _tuning
from .._library import Op
from .toeplitz_costs import COSTS, costs

METHODS = ("auto", "direct", "fft", "structured")
BY_PLAN, DIRECT, FFT, DOUBLE_FFT, STRUCTURED = range(5)
"""Codes of the kernels' ``method``; BY_PLAN: what the plan says. A plan of 0: nothing serves the request."""

CODES = {"direct": DIRECT, "fft": FFT, "double_fft": DOUBLE_FFT, "structured": STRUCTURED}
NAMES = {DIRECT: "direct", FFT: "fft", DOUBLE_FFT: "fft in float64", STRUCTURED: "structured"}
REPORT = ("direct_s", "fft_s", "double_fft_s", "structured_s", "fft_error", "double_fft_error", "tail", "range")

TOLERANCE = {torch.float32: 7e-8, torch.bfloat16: 1e-4, torch.float16: 1.5e-5}
"""Error of an FFT, relative to the largest output, that a result of this dtype may have beside its own rounding."""


def _fake_plan(bias, *args):
    return bias.new_empty((1,), dtype=torch.int64), bias.new_empty((len(REPORT),), dtype=torch.float64)


plan = Op(
    "toeplitz_plan(Tensor bias, SymInt batch, SymInt features, SymInt value_dim, SymInt grid_h, SymInt grid_w, "
    "bool is_causal, int requested, float tolerance, float direct_ns, float fft_ns, float double_fft_ns, "
    "float scan_ns) -> (Tensor method, Tensor report)",
    _fake_plan,
    family="toeplitz",
    axes={"bias": "heads"},
    splits="heads",
    whole=lambda *args: "" if args[7] == METHODS.index("auto") else "heads",
)
"""The method for ``requested`` (an index of METHODS), (1,) int64, and what it was chosen by: REPORT, (8,) float64.

bias: (H, entries) contiguous float32 on the CPU. Predicted seconds are infinite where a method does not apply; errors are
relative to the largest output; tail is the distance from which the bias is linear; range is in nats.
    direct      batch H pairs (features + value_dim) direct_ns
    fft         batch H features (value_dim + 1) L log2(L) fft_ns, L the length of the transform
    structured  batch H N (near keys (features + value_dim) direct_ns + sides features value_dim scan_ns), sides 2,
                causal 1; near keys in blocks of BLOCK

A slice of the heads may plan for itself: any method gives the same within rounding. What is asked for by name serves all
heads or is refused.
"""

BLOCK = 64


def predicted(costs, tokens: int, features: int, value_dim: int, heads: int = 1) -> tuple[float, float, float, float]:
    """Those seconds of a constant bias, not causal, with a batch of 1 and no need for the bias."""
    direct_ns, fft_ns, double_fft_ns, scan_ns = (1e-9 * heads * cost for cost in costs)
    length = transform_length(max(2 * tokens - 1, 2))
    butterflies = features * (value_dim + 1) * length * math.log2(length)
    both, near = features + value_dim, min(BLOCK, tokens)
    return (
        tokens * tokens * both * direct_ns,
        butterflies * fft_ns,
        butterflies * double_fft_ns,
        tokens * (near * both * direct_ns + 2 * features * value_dim * scan_ns),
    )


def transform_length(least: int) -> int:
    """The shortest 2^a 3^b 5^c of at least ``least``."""
    odd = [3**b * 5**c for b in range(40) for c in range(28) if 3**b * 5**c < 2 * least]
    return min(number << max(-(-least // number) - 1, 0).bit_length() for number in odd)


def planned(bias: Tensor, query: Tensor, value: Tensor, grid, is_causal: bool, method: str) -> tuple[Tensor, Tensor]:
    """Run ``plan`` for features ``query`` and ``value``; ``bias`` may live on another device.

    "auto" does not take the structured method for a bias that is trained, whose gradient is a sum over whole diagonals.
    """
    direct_ns, fft_ns, double_fft_ns, scan_ns = costs()
    if method == "auto" and torch.is_grad_enabled() and bias.requires_grad:
        scan_ns = float("inf")
    bias = bias.detach().cpu()
    return plan(
        *("cpu", bias, query.shape[0], query.shape[3], value.shape[3], *grid, is_causal, METHODS.index(method)),
        *(TOLERANCE.get(value.dtype, 0.0), direct_ns, fft_ns, double_fft_ns, scan_ns),
    )


def known(plan: Tensor) -> int | None:
    """The planned method where Python can look at it now: not under torch.compile, not under vmap over the bias."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(plan):
        return None
    return plan.item()


def refuse(op: str, method: str, report: Tensor) -> None:
    """Raise for a request that no kernel can serve accurately."""
    found = dict(zip(REPORT, report.tolist()))
    if method == "fft":
        error = found["double_fft_error"]
        size = f"of {error:.0e} of the largest output" if error < 1 else "as large as the output"
        raise ValueError(
            f"{op}: method must not be 'fft' for this rpe_bias: its range of {found['range']:.1f} nats would give an "
            f"error {size} even in float64; allowed: 'auto' or 'direct'"
        )
    raise ValueError(
        f"{op}: method must not be 'structured' for this rpe_bias, which is not linear or constant beyond some distance; "
        "allowed: 'auto', 'direct' or 'fft'"
    )


def notes(method: str, chosen: int, report: Tensor) -> list[str]:
    """The choice in words, for ``explain``."""
    found = dict(zip(REPORT, report.tolist()))
    seconds = {
        DIRECT: found["direct_s"],
        FFT: found["fft_s"],
        DOUBLE_FFT: found["double_fft_s"],
        STRUCTURED: found["structured_s"],
    }
    lines = []
    for code, predicted in seconds.items():
        cost = "does not apply" if predicted == float("inf") else f"predicted {1e3 * predicted:.3g} ms"
        error = {FFT: found["fft_error"], DOUBLE_FFT: found["double_fft_error"]}.get(code)
        why = "" if error is None else f", error {error:.0e} of the largest output"
        lines.append(f"method {'->' if code == chosen else '  '} {NAMES[code]:<15} {cost}{why}")
    asked = "the fastest accurate one" if method == "auto" else f"as asked: {method!r}"
    lines.append(f"method {NAMES[chosen]}: {asked}; the bias ranges over {found['range']:.1f} nats")
    lines.append(f"costs of a unit of work: {_tuning.find(COSTS).origin}")
    return lines
