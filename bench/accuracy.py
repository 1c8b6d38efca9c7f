"""The accuracy table: every operator on every backend against the rule that it must keep.

    python -m effattn.bench.accuracy [--backend cpu triton reference] [--output docs/accuracy.md]

With ``ref`` the float64 reference on the same inputs and ``low`` PyTorch's eager formula in the inputs' dtype:

    forward   max|out - ref| <= 2 * max|low - ref| + eps(dtype) * max|ref|
    backward  the same with factor 3, for every gradient

``used`` is the error over that budget: above 1 the operator is out of its budget, and the tests fail. Every term is the
largest over a few draws of inputs: of one draw, and of tensors with few elements, max|low - ref| is an accident of
eager's order of summation.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import effattn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD_FACTOR, BACKWARD_FACTOR = 2.0, 3.0
DRAWS = 3


class Problem(NamedTuple):
    """One operator on one shape. ``make(dtype, seed)`` returns its differentiable tensors by name."""

    operator: str
    shape: str
    make: Callable[[torch.dtype, int], dict[str, Tensor]]
    call: Callable[..., Tensor]  # call(tensors, backend)
    reference: Callable[[dict[str, Tensor]], Tensor]
    small: bool = False  # small enough for Triton's interpreter


class Entry(NamedTuple):
    operator: str
    backend: str
    dtype: torch.dtype
    shape: str
    tensor: str  # "output" or "grad_<argument>"
    error: float
    low: float  # eager's error in the same dtype
    largest: float  # element of the float64 reference

    @property
    def budget(self) -> float:
        factor = FORWARD_FACTOR if self.tensor == "output" else BACKWARD_FACTOR
        return factor * self.low + torch.finfo(self.dtype).eps * self.largest

    @property
    def used(self) -> float:
        """Error over budget; infinite where a result is not a number."""
        if not math.isfinite(self.error):
            return math.inf
        return self.error / self.budget if self.budget else (0.0 if self.error == 0.0 else math.inf)


def _qkv(batch, heads, tokens, head_dim, dtype, generator, kv_heads=None) -> dict[str, Tensor]:
    def random(h):
        return torch.randn(batch, h, tokens, head_dim, generator=generator).to(dtype)

    kv_heads = kv_heads or heads
    return {"query": random(heads), "key": random(kv_heads), "value": random(kv_heads)}


def _mixture(batch, heads, grid, prefix, head_dim, gaussians=5, small=False) -> Problem:
    tokens = prefix + grid[0] * grid[1]

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        tensors["alpha"] = 2 * torch.randn(gaussians, heads, generator=generator)
        tensors["sigma"] = 10 + 10 * torch.randn(gaussians, heads, generator=generator)
        return tensors

    def call(t, backend):
        return effattn.gaussian_mixture_attention(**t, grid=grid, num_prefix_tokens=prefix, backend=backend)

    def reference(t):
        return effattn.reference.gaussian_mixture_attention(**t, grid=grid, num_prefix_tokens=prefix)

    shape = f"{batch}x{heads}x{tokens}x{head_dim}, grid {grid[0]}x{grid[1]}"
    return Problem("gaussian_mixture_attention", shape, make, call, reference, small)


def _masked_product(batch, heads, tokens, head_dim, small=False) -> Problem:
    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        return {**tensors, "weight": torch.randn(heads, tokens, tokens, generator=generator)}

    def call(t, backend):
        return effattn.masked_product_attention(**t, backend=backend)

    def reference(t):
        return effattn.reference.masked_product_attention(**t)

    return Problem("masked_product_attention", f"{batch}x{heads}x{tokens}x{head_dim}", make, call, reference, small)


def _attention(batch, heads, tokens, head_dim, kind="", kv_heads=None, small=False) -> Problem:
    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        return _qkv(batch, heads, tokens, head_dim, dtype, generator, kv_heads)

    def arguments(t) -> dict:
        generator = torch.Generator().manual_seed(3)
        if kind == "additive mask":
            bias = torch.randn(heads, tokens, tokens, generator=generator)
            return {"attn_mask": bias.to(t["query"].dtype)}
        if kind == "boolean mask":
            return {"attn_mask": torch.rand(tokens, tokens, generator=generator) < 0.7}
        return {"is_causal": kind == "causal"}

    def call(t, backend):
        return effattn.scaled_dot_product_attention(
            **t, **arguments(t), enable_gqa=kv_heads is not None, backend=backend
        )

    def reference(t):
        return effattn.reference.scaled_dot_product_attention(**t, **arguments(t), enable_gqa=kv_heads is not None)

    detail = ", ".join(filter(None, (kind, f"{kv_heads} key heads" if kv_heads else "")))
    shape = f"{batch}x{heads}x{tokens}x{head_dim}{', ' + detail if detail else ''}"
    return Problem("scaled_dot_product_attention", shape, make, call, reference, small)


def _shift_add(batch, heads, tokens, head_dim, binarize, small=False) -> Problem:
    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        return {**tensors, "residual_weight": torch.randn(heads, 1, 9, 1, generator=generator) / 3}

    def call(t, backend):
        return effattn.shift_add_attention(**t, binarize=binarize, backend=backend)

    def reference(t):
        return effattn.reference.shift_add_attention(**t, binarize_mode=binarize)

    shape = f"{batch}x{heads}x{tokens}x{head_dim}, {binarize}"
    return Problem("shift_add_attention", shape, make, call, reference, small)


def _stripes(batch, heads, grid, head_dim, stripe_width, small=False, **options) -> Problem:
    operator = "stripe_attention" if "orientation" in options else "cross_shaped_window_attention"
    details = "".join(f", {detail}" for detail in options.values())
    options |= {"grid": grid, "stripe_width": stripe_width}

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, grid[0] * grid[1], head_dim, dtype, generator)
        tensors["lepe_weight"] = torch.randn(heads * head_dim, 1, 3, 3, generator=generator) / 3
        tensors["lepe_bias"] = torch.randn(heads * head_dim, generator=generator)
        return tensors

    def call(t, backend):
        return getattr(effattn, operator)(**t, **options, backend=backend)

    def reference(t):
        return getattr(effattn.reference, operator)(**t, **options)

    shape = (
        f"{batch}x{heads}x{grid[0] * grid[1]}x{head_dim}, grid {grid[0]}x{grid[1]}, stripes of {stripe_width}{details}"
    )
    return Problem(operator, shape, make, call, reference, small)


def _windows(batch, heads, grid, head_dim, window, small=False, **options) -> Problem:
    shift, overlap = options.get("shift", 0), options.get("overlap", 0)
    options |= {"grid": grid, "window": (window,) * 2, "shift": (shift,) * 2, "overlap": (overlap,) * 2}

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, grid[0] * grid[1], head_dim, dtype, generator)
        return {**tensors, "bias_table": torch.randn((2 * window + 2 * overlap - 1) ** 2, heads, generator=generator)}

    def call(t, backend):
        return effattn.window_attention(**t, **options, backend=backend)

    def reference(t):
        return effattn.reference.window_attention(**t, **options)

    details = {"windows of": window, "shift": shift, "overlap": overlap, "padding": options.get("padding")}
    shape = f"{batch}x{heads}x{grid[0] * grid[1]}x{head_dim}, grid {grid[0]}x{grid[1]}"
    shape += "".join(f", {name} {detail}" for name, detail in details.items() if detail)
    return Problem("window_attention", shape, make, call, reference, small)


def _retention(batch, heads, tokens, head_dim, value_dim=None, small=False, state=False, **options) -> Problem:
    """Decays are RetNet's."""
    value_dim = value_dim or head_dim
    extra = options.get("normalize") == "retnet"

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        tensors["value"] = torch.randn(batch, heads, tokens, value_dim, generator=generator).to(dtype)
        tensors["log_decay"] = effattn.retnet_log_decay(heads, dtype=torch.float32)
        if state:
            rows = torch.randn(batch, heads, head_dim, value_dim, generator=generator)
            sums = 10 * torch.rand(batch, heads, 1, 1, generator=generator).expand(-1, -1, -1, value_dim)
            tensors["initial_state"] = torch.cat((rows, sums), 2) if extra else rows
        return tensors

    def call(t, backend):
        return effattn.retention(**t, **options, backend=backend)

    def reference(t):
        method = {"recurrent": 1, "parallel": None}.get(options.get("method"), 64)
        chunk = options.get("chunk_size", method) if options.get("is_causal", True) else None
        kept = {name: value for name, value in options.items() if name not in ("method", "chunk_size")}
        return effattn.reference.retention(**t, **kept, chunk_size=chunk)

    details = [str(v) if k in ("method", "normalize") else f"{k} {v}" for k, v in options.items()]
    details = ", ".join([f"Dv {value_dim}"] * (value_dim != head_dim) + ["state"] * state + details)
    shape = f"{batch}x{heads}x{tokens}x{head_dim}{', ' + details if details else ''}"
    return Problem("retention", shape, make, call, reference, small)


def _retention_step(batch, heads, head_dim, value_dim, small=False) -> Problem:
    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, 1, head_dim, dtype, generator)
        tensors["value"] = torch.randn(batch, heads, 1, value_dim, generator=generator).to(dtype)
        tensors["log_decay"] = effattn.retnet_log_decay(heads, dtype=torch.float32)
        return {**tensors, "state": torch.randn(batch, heads, head_dim, value_dim, generator=generator)}

    def call(t, backend):
        return effattn.retention_step(**t, backend=backend)[0]

    def reference(t):
        return effattn.reference.retention_step(**t)[0]

    return Problem("retention_step", f"{batch}x{heads}x1x{head_dim}, Dv {value_dim}", make, call, reference, small)


def _manhattan(batch, heads, grid, head_dim, small=False, lce=False, **options) -> Problem:
    prefix = options.get("num_prefix_tokens", 0)
    tokens = prefix + grid[0] * grid[1]

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        tensors["log_decay"] = effattn.rmt_log_decay(heads, dtype=torch.float32)
        if lce:
            tensors["lce_weight"] = torch.randn(heads * head_dim, 1, 5, 5, generator=generator) / 5
            tensors["lce_bias"] = torch.randn(heads * head_dim, generator=generator)
        return tensors

    def call(t, backend):
        return effattn.manhattan_attention(**t, grid=grid, **options, backend=backend)

    def reference(t):
        return effattn.reference.manhattan_attention(**t, grid=grid, **options)

    details = ["decomposed"] * options.get("decomposed", False) + ["weights"] * (options.get("decay") == "weights")
    details += ["LCE"] * lce + [f"{prefix} prefix"] * bool(prefix)
    shape = f"{batch}x{heads}x{tokens}x{head_dim}, grid {grid[0]}x{grid[1]}"
    return Problem("manhattan_attention", ", ".join([shape, *details]), make, call, reference, small)


def _toeplitz(
    batch, heads, tokens, head_dim, features=16, method="auto", small=False, grid=None, given=False, **options
) -> Problem:
    """``given``: features instead of queries and keys, toeplitz_linear_attention."""
    width = features if given else head_dim

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        query, key = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(2))
        if given:
            query, key = query.exp(), key.exp()
        value = torch.randn(batch, heads, tokens, head_dim, generator=generator)
        names = ("query_features", "key_features", "value") if given else ("query", "key", "value")
        tensors = {name: tensor.to(dtype) for name, tensor in zip(names, (query, key, value))}
        tensors["rpe_bias"] = _table(heads, tokens, grid, generator)
        if not given:
            tensors["projection"] = effattn.random_features(features, head_dim, generator=generator)
        return tensors

    name = "toeplitz_linear_attention" if given else "kernelized_rpe_attention"

    def call(t, backend):
        return getattr(effattn, name)(**t, grid=grid, method=method, **options, backend=backend)

    def reference(t):
        return getattr(effattn.reference, name)(**t, grid=grid, **options)

    details = [f"M {features}", *(["grid {}x{}".format(*grid)] if grid else []), *(["causal"] * len(options)), method]
    return Problem(name, ", ".join([f"{batch}x{heads}x{tokens}x{head_dim}", *details]), make, call, reference, small)


def _urpe(batch, heads, tokens, head_dim, small=False, grid=None, **options) -> Problem:
    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        tensors["coefficient"] = 1 + _table(heads, tokens, grid, generator)
        return {**tensors, "rpe_bias": _table(heads, tokens, grid, generator)}

    def call(t, backend):
        return effattn.urpe_attention(**t, grid=grid, **options, backend=backend)

    def reference(t):
        return effattn.reference.urpe_attention(**t, grid=grid, **options)

    details = [*(["grid {}x{}".format(*grid)] if grid else []), *(["causal"] * len(options))]
    shape = ", ".join([f"{batch}x{heads}x{tokens}x{head_dim}", *details])
    return Problem("urpe_attention", shape, make, call, reference, small)


def _token_sizes(batch, heads, tokens, keys, head_dim, small=False) -> Problem:
    """A seventh of the keys takes no part."""

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = _qkv(batch, heads, tokens, head_dim, dtype, generator)
        key, value = torch.randn(2, batch, heads, keys, head_dim, generator=generator).to(dtype)
        sizes = 1 + 3 * torch.rand(batch, keys, generator=generator)
        sizes[:, ::7] = 0
        return {**tensors, "key": key, "value": value, "sizes": sizes}

    def call(t, backend):
        return effattn.size_weighted_attention(**t, backend=backend)

    def reference(t):
        return effattn.reference.size_weighted_attention(**t)

    detail = f", {keys} keys" if keys != tokens else ""
    shape = f"{batch}x{heads}x{tokens}x{head_dim}{detail}"
    return Problem("size_weighted_attention", shape, make, call, reference, small)


def _table(heads, tokens, grid, generator) -> Tensor:
    """Entries for every relative position."""
    sizes = [2 * extent - 1 for extent in grid or (tokens,)]
    return 0.5 * torch.randn(heads, *sizes, generator=generator)


def _merge(batch, tokens, channels, num_merged, method="merge", small=False, **options) -> Problem:
    """``method`` of a plan that merges ``num_merged`` tokens."""
    metric = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(5))
    plan = effattn.bipartite_soft_matching(metric, num_merged, num_protected=1, backend="reference")

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = plan.num_tokens if method == "unmerge" else tokens
        tensors = {"x": torch.randn(batch, rows, channels, generator=generator).to(dtype)}
        if method == "merge_weighted":
            tensors["sizes"] = torch.randint(1, 9, (batch, tokens), generator=generator).float()
            tensors["residual"] = torch.randn(batch, tokens, channels, generator=generator).to(dtype)
        return tensors

    def call(t, backend):
        moved = effattn.TokenMerge(*(i.to(t["x"].device) for i in (plan.source, plan.members, plan.offsets)))
        result = getattr(moved, method)(**t, **options, backend=backend)
        return result[0] if method == "merge_weighted" else result

    def reference(t):
        return call(t, "reference")

    details = [f"{tokens - plan.num_tokens} merged", *options.values()]
    shape = ", ".join([f"{batch}x{tokens}x{channels}", *details])
    return Problem(f"TokenMerge.{method}", shape, make, call, reference, small)


def _soft_merge(batch, tokens, channels, outputs, small=False) -> Problem:
    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(batch, tokens, width, generator=generator) for width in (channels, outputs))
        return {name: tensor.to(dtype) for name, tensor in zip(("tokens", "logits"), drawn)}

    def call(t, backend):
        return effattn.soft_merge(**t, backend=backend)

    def reference(t):
        return effattn.reference.soft_merge(**t)

    return Problem("soft_merge", f"{batch}x{tokens}x{channels} to {outputs}", make, call, reference, small)


def _shift_linear(rows, columns, outputs, bits, small=False) -> Problem:
    """Codes over the whole range of exponents, the same in every dtype."""
    generator = torch.Generator().manual_seed(4)
    exponents = -torch.randint(0, 2 ** (bits - 1) - 1, (outputs, columns), generator=generator)
    weight = torch.randn(outputs, columns, generator=generator) * 2.0**exponents
    packed = effattn.quantize_power_of_two(weight, bits=bits)

    def make(dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        return {"input": x, "bias": torch.randn(outputs, generator=generator)}

    def call(t, backend):
        return effattn.shift_linear(t["input"], packed.to(t["input"].device), t["bias"], backend=backend)

    def reference(t):
        return effattn.reference.shift_linear(t["input"], packed.codes, None, t["bias"], bits)

    shape = f"{rows}x{columns} -> {outputs}, {bits} bits"
    return Problem("shift_linear", shape, make, call, reference, small)


def _bit_product(rows, columns, outputs, values) -> Problem:
    generator = torch.Generator().manual_seed(4)
    packed = effattn.pack_signs(torch.randn(rows, columns, generator=generator), backend="reference")

    def make(dtype, seed):
        return {"dense": torch.randn(columns, outputs, generator=torch.Generator().manual_seed(seed)).to(dtype)}

    def call(t, backend):
        return effattn.add_matmul(packed.to(t["dense"].device), t["dense"], values=values, backend=backend)

    def reference(t):
        return effattn.reference.add_matmul(packed, t["dense"], values)

    return Problem("add_matmul", f"{rows}x{columns} -> {outputs}, {values}", make, call, reference)


def _hamming(batch, heads, tokens, head_dim) -> Problem:
    generator = torch.Generator().manual_seed(4)
    signs = torch.randn(2, batch, heads, tokens, head_dim, generator=generator)
    bits = effattn.pack_signs(signs, backend="reference")

    def make(dtype, seed):
        drawn = torch.randn(batch, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))
        return {"value": drawn.to(dtype)}

    def call(t, backend):
        query, key = bits.to(t["value"].device)
        return effattn.hamming_attention(query, key, t["value"], head_dim, backend=backend)

    def reference(t):
        return effattn.reference.hamming_attention(*bits, t["value"], head_dim)

    return Problem("hamming_attention", f"{batch}x{heads}x{tokens}x{head_dim}", make, call, reference)


PROBLEMS = (
    _mixture(1, 2, (5, 3), 1, 8, gaussians=3, small=True),
    _mixture(2, 3, (8, 8), 0, 16),
    _mixture(2, 3, (14, 14), 1, 64),
    _mixture(1, 2, (17, 23), 0, 80),
    _mixture(1, 2, (32, 32), 0, 64),
    _masked_product(1, 2, 15, 8, small=True),
    _masked_product(2, 3, 197, 64),
    _attention(1, 2, 15, 8, small=True),
    _attention(1, 2, 15, 8, "causal", small=True),
    _attention(2, 3, 197, 64),
    _attention(1, 2, 1024, 64),
    _attention(2, 3, 197, 64, "additive mask"),
    _attention(2, 3, 197, 64, "boolean mask"),
    _attention(2, 4, 197, 64, "causal", kv_heads=2),
    _shift_add(1, 2, 15, 8, "per_head", small=True),
    _shift_add(2, 3, 196, 64, "published"),
    _shift_add(2, 3, 196, 64, "mean_threshold"),
    _shift_add(2, 3, 196, 64, "per_head"),
    _shift_add(2, 3, 196, 64, "sign"),
    _shift_add(1, 1, 3136, 64, "published"),
    _shift_add(1, 2, 300, 100, "per_head"),
    _stripes(1, 2, (4, 3), 8, 2, small=True, padding="zero_key"),
    _stripes(2, 2, (56, 56), 32, 1),
    _stripes(2, 4, (14, 14), 32, 7),
    _stripes(2, 4, (24, 24), 24, 12),
    _stripes(1, 2, (30, 41), 32, 7, padding="zero_key"),
    _stripes(1, 1, (3, 4), 8, 2, small=True, orientation="vertical", padding="mask"),
    _stripes(1, 3, (30, 41), 46, 7, orientation="horizontal", padding="mask"),
    _windows(1, 2, (4, 6), 8, 2, shift=1, small=True),
    _windows(2, 3, (28, 28), 32, 7, shift=3),
    _windows(1, 3, (25, 34), 32, 7, shift=3, padding="mask"),
    _windows(1, 2, (48, 32), 30, 16, shift=8),
    _windows(1, 2, (48, 32), 30, 16, overlap=4, bias_index="hat_oca"),
    _retention(1, 2, 15, 8, 5, small=True, chunk_size=4),
    _retention(1, 2, 512, 64),
    _retention(2, 3, 197, 64, method="parallel"),
    _retention(1, 2, 24, 64, method="recurrent"),
    _retention(2, 3, 197, 64, is_causal=False),
    _retention(2, 3, 197, 64, normalize="retnet", state=True),
    _retention(1, 2, 300, 256, 432, state=True),
    _retention(1, 40, 300, 16),
    _retention_step(1, 2, 8, 5, small=True),
    _retention_step(2, 16, 256, 432),
    _retention_step(4, 40, 64, 64),
    _manhattan(1, 2, (3, 4), 8, small=True, lce=True),
    _manhattan(1, 2, (3, 4), 8, decomposed=True),
    _manhattan(2, 4, (56, 56), 16, decomposed=True, lce=True),
    _manhattan(2, 4, (28, 28), 32, decomposed=True),
    _manhattan(2, 4, (28, 28), 32, decomposed=True, decay="weights"),
    _manhattan(2, 8, (14, 14), 32, num_prefix_tokens=1),
    _manhattan(2, 8, (14, 14), 32, decay="weights"),
    _manhattan(2, 16, (7, 7), 32, lce=True),
    _toeplitz(1, 2, 15, 8, features=5, method="direct", small=True),
    _toeplitz(2, 3, 197, 64, features=32, method="direct"),
    _toeplitz(2, 3, 197, 64, features=32, method="fft"),
    _toeplitz(1, 2, 24 * 16, 32, features=20, method="direct", grid=(24, 16), is_causal=True),
    _toeplitz(1, 2, 24 * 16, 32, features=20, method="fft", grid=(24, 16)),
    _toeplitz(1, 2, 12, 8, features=5, method="direct", small=True, given=True, grid=(3, 4)),
    _toeplitz(1, 2, 500, 40, method="direct", given=True, is_causal=True),
    _toeplitz(1, 2, 500, 40, method="fft", given=True),
    _urpe(1, 2, 15, 8, small=True),
    _urpe(2, 3, 197, 64, is_causal=True),
    _urpe(1, 3, 24 * 16, 32, grid=(24, 16)),
    _merge(1, 15, 8, 5, small=True),
    _merge(2, 197, 100, 40),
    _merge(2, 197, 100, 40, mode="sum"),
    _merge(2, 197, 100, 40, mode="max"),
    _merge(1, 15, 8, 5, "merge_weighted", small=True),
    _merge(2, 197, 384, 16, "merge_weighted"),
    _merge(1, 15, 8, 5, "unmerge", small=True),
    _merge(2, 197, 384, 90, "unmerge"),
    _soft_merge(1, 15, 8, 5, small=True),
    _soft_merge(2, 197, 384, 157),
    _soft_merge(1, 1024, 100, 33),
    _token_sizes(1, 2, 15, 11, 8, small=True),
    _token_sizes(2, 3, 197, 197, 64),
    _token_sizes(1, 2, 1024, 512, 40),
    _shift_linear(3, 40, 24, 4, small=True),
    _shift_linear(1, 1024, 1024, 4),
    _shift_linear(16, 1024, 1024, 5),
    _shift_linear(784, 128, 1024, 4),
    _shift_linear(784, 1024, 128, 5),
    _bit_product(300, 196, 64, "binary"),
    _bit_product(300, 196, 64, "sign"),
    _hamming(2, 3, 196, 64),
)


def measure(
    backend: str = "cpu",
    *,
    operators: Iterable[str] = (),
    dtypes: Iterable[torch.dtype] = DTYPES,
    problems: Iterable[Problem] = PROBLEMS,
) -> list[Entry]:
    """Error and budget of the output and of every gradient, for each problem and dtype.

    Args:
        backend: which one to measure. "triton" without a GPU runs in the interpreter (``TRITON_INTERPRET=1``), on the
            small problems only.
        operators: names of public functions; all by default.
        dtypes: of the activations. Parameters stay float32.
        problems: what to measure; :data:`PROBLEMS` by default.

    Raises:
        NotImplementedError: the backend cannot serve a problem.
    """
    operators = tuple(operators)
    device = "cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu"
    entries = []
    for problem in problems:
        if operators and problem.operator not in operators:
            continue
        if backend == "triton" and device == "cpu" and not problem.small:
            continue
        for dtype in dtypes:
            entries += _measure(problem, backend, dtype, device)
    return entries


def _served(backend: str, problem: Problem, dtype: torch.dtype) -> list[Entry] | str:
    """What is measured, or why a GPU's backend does not serve the call; the others serve every problem of the table."""
    try:
        return measure(backend, dtypes=[dtype], problems=[problem])
    except NotImplementedError as error:
        if backend in ("cpu", "reference"):
            raise
        return str(error).partition(". Others:")[0]


def _measure(problem: Problem, backend: str, dtype: torch.dtype, device: str) -> list[Entry]:
    pooled = _draw(problem, backend, dtype, device, 0)
    for seed in range(1, DRAWS):
        again = _draw(problem, backend, dtype, device, seed)
        pooled = [Entry(*a[:-3], *(_larger(x, y) for x, y in zip(a[-3:], b[-3:]))) for a, b in zip(pooled, again)]
    return pooled


def _draw(problem: Problem, backend: str, dtype: torch.dtype, device: str, seed: int) -> list[Entry]:
    tensors = problem.make(dtype, seed)
    exact = _results(problem.reference, {n: t.double() for n, t in tensors.items()}, dtype, seed)
    low = _results(problem.reference, tensors, dtype, seed)
    on_device = {n: t.to(device) for n, t in tensors.items()}
    ours = _results(lambda t: problem.call(t, backend), on_device, dtype, seed)
    entries = []
    for name, expected in exact.items():
        errors = _distance(ours[name], expected), _distance(low[name], expected)
        largest = expected.abs().max().item()
        entries.append(Entry(problem.operator, backend, dtype, problem.shape, name, *errors, largest))
    return entries


def _larger(a: float, b: float) -> float:
    return a if a > b or math.isnan(a) else b


def _results(function, tensors: dict[str, Tensor], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Output and gradients for one random gradient of the output, whose values are those of ``dtype``."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(leaves)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed + 1000)).to(dtype).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach(), **{f"grad_{name}": g for name, g in zip(leaves, gradients)}}


def _distance(tensor: Tensor, expected: Tensor) -> float:
    return (tensor.cpu().double() - expected).abs().max().item()


def markdown(entries: list[Entry]) -> str:
    """The committed page: one line per operator, shape and dtype, the gradient that uses most of its budget named."""
    backends = sorted({entry.backend for entry in entries})
    lines = [
        "# Accuracy",
        "",
        "Written by `make accuracy` (`python -m effattn.bench.accuracy`); the tests fail when an operator leaves its budget.",
        "",
        "With `ref` the float64 reference on the same inputs and `low` the eager PyTorch formula in the inputs' dtype, the budget",
        "is `2 * max|low - ref| + eps(dtype) * max|ref|` for the output and the same with factor 3 for every gradient. `used` is",
        f"the error over the budget; 100 % is the limit. Each term is the largest over {DRAWS} draws of inputs. Of the gradients",
        "the one that uses most is shown.",
        "",
        f"Measured on {datetime.date.today()} with torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), "
        f"backends: {', '.join(backends)}. Shapes are B x H x N x D, of linear layers and products M x K -> N.",
    ]
    for backend in backends:
        lines += [
            "",
            f"## {backend}",
            "",
            "| operator | shape | dtype | output error | budget | used | worst gradient | error | budget | used |",
            "| --- | --- | --- | --: | --: | --: | --- | --: | --: | --: |",
        ]
        groups: dict[tuple, list[Entry]] = {}
        for entry in entries:
            if entry.backend == backend:
                groups.setdefault((entry.operator, entry.shape, entry.dtype), []).append(entry)
        for (operator, shape, dtype), group in groups.items():
            output = next(entry for entry in group if entry.tensor == "output")
            worst = max((entry for entry in group if entry.tensor != "output"), key=lambda entry: entry.used)
            lines.append(
                f"| `{operator}` | {shape} | {str(dtype).removeprefix('torch.')} | {_numbers(output)} "
                f"| {worst.tensor.removeprefix('grad_')} | {_numbers(worst)} |"
            )
    return "\n".join(lines) + "\n"


def _numbers(entry: Entry) -> str:
    return f"{entry.error:.1e} | {entry.budget:.1e} | {entry.used:.0%}"


def main() -> int:
    from effattn._files import write_atomically

    parser = argparse.ArgumentParser(prog="python -m effattn.bench.accuracy", description="Write the accuracy table.")
    parser.add_argument("--backend", nargs="+", default=["cpu"], choices=("cpu", "triton", "cuda", "reference"))
    parser.add_argument("--output", default="docs/accuracy.md")
    options = parser.parse_args()
    if "triton" in options.backend and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    found = [_served(*what) for what in itertools.product(options.backend, PROBLEMS, DTYPES)]
    entries = [entry for measured in found if not isinstance(measured, str) for entry in measured]
    refused = [reason for reason in found if isinstance(reason, str)]
    page = markdown(entries)

    def write(name: str) -> None:
        with open(name, "w") as file:
            file.write(page)

    write_atomically(options.output, write)
    outside = [entry for entry in entries if entry.used > 1]
    for entry in outside:
        dtype = str(entry.dtype).removeprefix("torch.")
        print(
            f"out of budget: {entry.operator} {entry.shape} {dtype} {entry.backend} {entry.tensor} uses {entry.used:.2f}"
        )
    print(*dict.fromkeys(refused), sep="\n")
    print(f"{options.output}: {len(entries)} errors, {len(outside)} out of budget, {len(refused)} calls not served")
    return 1 if outside else 0


if __name__ == "__main__":
    from effattn._files import exit_status

    raise SystemExit(exit_status(main))
