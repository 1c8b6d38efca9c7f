"""What a call costs before any arithmetic, and what importing the library costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F

import effattn

STOCK = "F.scaled_dot_product_attention"


def calls() -> dict[str, Callable[[], object]]:
    """The stock function and every operator of the registry, on 1 x 1 x 16 x 16 float32 or as near as it can be."""
    query, key, value = torch.randn(3, 1, 1, 16, 16).unbind(0)
    two = torch.randn(3, 1, 2, 16, 16).unbind(0)  # a head for each direction of a cross
    ones = torch.ones(5, 1), torch.ones(5, 1)
    log_decay, bias = effattn.retnet_log_decay(1, dtype=torch.float32), torch.zeros(1, 31)
    state, token = torch.zeros(1, 1, 16, 16), (query[:, :, :1], key[:, :, :1], value[:, :, :1])
    tokens, sizes = value[0], torch.ones(1, 16)
    plan = effattn.bipartite_soft_matching(tokens, 4)
    merged = plan.merge(tokens)
    signs = effattn.pack_signs(query)
    weight = effattn.quantize_power_of_two(torch.randn(16, 16))
    grid = (4, 4)
    return {
        STOCK: lambda: F.scaled_dot_product_attention(query, key, value),
        "scaled_dot_product_attention": lambda: effattn.scaled_dot_product_attention(query, key, value),
        "gaussian_mixture_attention": lambda: effattn.gaussian_mixture_attention(query, key, value, *ones, grid),
        "masked_product_attention": lambda: effattn.masked_product_attention(query, key, value, query[0]),
        "cross_shaped_window_attention": lambda: effattn.cross_shaped_window_attention(*two, grid, 2),
        "stripe_attention": lambda: effattn.stripe_attention(query, key, value, grid, 2, orientation="vertical"),
        "window_attention": lambda: effattn.window_attention(query, key, value, grid, (2, 2)),
        "retention": lambda: effattn.retention(query, key, value, log_decay),
        "retention_step": lambda: effattn.retention_step(*token, log_decay, state),
        "manhattan_attention": lambda: effattn.manhattan_attention(query, key, value, log_decay, grid),
        "kernelized_rpe_attention": lambda: effattn.kernelized_rpe_attention(
            query, key, value, bias, feature_map="identity"
        ),
        "toeplitz_linear_attention": lambda: effattn.toeplitz_linear_attention(query, key, value, bias),
        "urpe_attention": lambda: effattn.urpe_attention(query, key, value, bias),
        "bipartite_soft_matching": lambda: effattn.bipartite_soft_matching(tokens, 4),
        "TokenMerge.merge": lambda: plan.merge(tokens),
        "TokenMerge.merge_weighted": lambda: plan.merge_weighted(tokens),
        "TokenMerge.unmerge": lambda: plan.unmerge(merged),
        "size_weighted_attention": lambda: effattn.size_weighted_attention(query, key, value, sizes),
        "soft_merge": lambda: effattn.soft_merge(tokens, tokens),
        "shift_linear": lambda: effattn.shift_linear(tokens, weight),
        "shift_add_attention": lambda: effattn.shift_add_attention(query, key, value),
        "pack_signs": lambda: effattn.pack_signs(query),
        "add_matmul": lambda: effattn.add_matmul(signs, value),
        "binary_matmul": lambda: effattn.binary_matmul(signs, signs, 16),
        "hamming_attention": lambda: effattn.hamming_attention(signs, signs, value, 16),
    }


@torch.no_grad()
def call_overhead(rounds: int = 15, count: int = 200, only: Collection[str] = ()) -> dict[str, float]:
    """Microseconds per call where all the time is overhead: the best of interleaved batches.

    The best and not the median, for a disturbance only ever adds, and to a call this short it adds a multiple.
    """
    contenders = {name: call for name, call in calls().items() if not only or name in only}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(count):
            call()
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - begin) / count * 1e6)
    return {name: min(times) for name, times in samples.items()}


def import_time(repeats: int = 5) -> float:
    """Median milliseconds of ``import effattn`` in a fresh process that has imported torch, with byte code at hand.

    pip writes byte code with an ordinary installation; where an editable one was told not to, a first run writes it.
    """
    code = "import time, torch; t = time.perf_counter(); import effattn; print(1e3 * (time.perf_counter() - t))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    run()
    return statistics.median(run() for _ in range(repeats))
