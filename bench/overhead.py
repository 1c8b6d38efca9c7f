"""What a call costs before any arithmetic, and what importing the library costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import effattn

STOCK = "F.scaled_dot_product_attention"


@torch.no_grad()
def call_overhead(rounds: int = 15, calls: int = 200) -> dict[str, float]:
    """Microseconds per call on 1 x 1 x 16 x 16 float32, where all the time is overhead: the best of interleaved batches.

    The best and not the median, for a disturbance only ever adds, and to a call this short it adds a multiple.
    """
    q, k, v = torch.randn(3, 1, 1, 16, 16).unbind(0)
    alpha, sigma = torch.ones(5, 1), torch.ones(5, 1)
    contenders = {
        STOCK: lambda: F.scaled_dot_product_attention(q, k, v),
        "effattn.scaled_dot_product_attention": lambda: effattn.scaled_dot_product_attention(q, k, v),
        "effattn.gaussian_mixture_attention": lambda: effattn.gaussian_mixture_attention(q, k, v, alpha, sigma, (4, 4)),
    }
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(calls):
            call()
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            samples[name].append((time.perf_counter() - begin) / calls * 1e6)
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
