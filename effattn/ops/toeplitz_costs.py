"""What the methods of Toeplitz-weighted attention cost on this machine, in nanoseconds a unit with torch's threads busy.

``python -m effattn tune toeplitz`` measures; a call only ever reads what was kept.
"""

from __future__ import annotations

import time

import torch

from .. import _tuning

NAMES = ("direct_ns", "fft_ns", "double_fft_ns", "scan_ns")


def _are_costs(values) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == len(NAMES)
        and all(type(cost) in (int, float) and 0 < cost < float("inf") for cost in values)
    )


COSTS = _tuning.declare(
    _tuning.Choice(
        "toeplitz.costs", 1, "what a unit of work costs in each method, by which one is chosen", {}, _are_costs
    )
)


def costs() -> tuple[float, float, float, float]:
    """Measured for this machine and torch's number of threads, else the defaults."""
    return _tuning.value(COSTS)


costs._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import all of Dynamo


def crossover(values: tuple[float, ...], features: int = 32, value_dim: int = 64) -> int | None:
    """Tokens from which the float32 FFT is predicted to be faster than the direct method; None: not below 2^24."""
    from .toeplitz_methods import predicted

    low, high = 1, 1 << 24

    def is_faster(tokens: int) -> bool:
        direct, fft, *_ = predicted(values, tokens, features, value_dim)
        return fft < direct

    if not is_faster(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high


# ---- measuring ----

SHAPES = {"direct": (2048, 32, 64), "fft": (4096, 32, 64), "double_fft": (4096, 32, 64), "structured": (4096, 32, 64)}
"""(N, M, D) of what is timed: milliseconds each, and tiles, transforms and states of the sizes that models use."""

REPEATS = 7


def measured() -> tuple[float, float, float, float]:
    """Time every method (seconds) and return what a unit costs in each."""
    from .toeplitz_methods import predicted

    calls = [_call(method, *shape) for method, shape in SHAPES.items()]
    for call in calls:
        call()
    rounds = [[_seconds(call) for call in calls] for _ in range(REPEATS)]  # in turn, so that all see the same machine
    direct, fft, double_fft, structured = map(min, zip(*rounds))  # noise only adds
    heads = _heads()
    units = {method: predicted((1.0,) * 4, *shape, heads=heads) for method, shape in SHAPES.items()}
    direct_ns = direct / units["direct"][0]
    near = predicted((direct_ns, 1.0, 1.0, 0.0), *SHAPES["structured"], heads=heads)[3]
    scans = units["structured"][3] - predicted((1.0, 1.0, 1.0, 0.0), *SHAPES["structured"], heads=heads)[3]
    scan = max(structured - near, 0.1 * structured)  # noise must not make a scan free
    return direct_ns, fft / units["fft"][1], double_fft / units["double_fft"][2], scan / scans


def _heads() -> int:
    """So many that every thread has as much to do."""
    return max(2, torch.get_num_threads())


def _call(method: str, tokens: int, features: int, value_dim: int):
    from . import toeplitz_methods as methods
    from .toeplitz import toeplitz

    heads = _heads()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.rand(2, 1, heads, tokens, features, generator=generator)
    value = torch.randn(1, heads, tokens, value_dim, generator=generator)
    bias = torch.zeros(heads, 2 * tokens - 1)
    code = methods.CODES[method]

    def call() -> None:
        with torch.no_grad():
            toeplitz("cpu", query, key, value, bias, None, 1, tokens, False, code, 0.0, False)

    return call


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
