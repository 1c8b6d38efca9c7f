"""Times every contender of a case in turn, again and again, so that whatever disturbs the machine disturbs all alike.

A row is one case in one dtype and direction. Each contender is compared with the float64 specification, warmed up, and
then sampled round-robin; the order rotates from round to round. Slow contenders take part in fewer rounds, spread
evenly, to keep a row within its time budget. Reported are the median and the quartiles.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import memory
from .cases import BACKWARD, FORWARD, OURS, Case, Contender, Family, Inputs, bytes_moved, flops

SHORTEST_SAMPLE = 2e-3  # seconds; quicker calls are repeated within one sample
LONG_CALL = 0.2  # seconds; longer calls need no further warm-up
# Largest error against the float64 specification, as a share of its largest element, of a contender that computes the
# case. bfloat16 is wide because the formula itself is that inexact in it: scores up to 50 are rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


class Effort(NamedTuple):
    seconds: float  # for the timed part of a row
    rounds: int
    fewest: int  # samples of the slowest contender
    longest: float = 20.0  # seconds; the first of longer calls, in which peak memory is taken, is their only sample


QUICK = Effort(seconds=1.5, rounds=12, fewest=3)
FULL = Effort(seconds=8.0, rounds=40, fewest=5)


class Result(NamedTuple):
    ms: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    samples: int = 0
    memory: int | None = None  # peak bytes above the inputs
    error: float | None = None  # against the float64 specification
    note: str = ""  # why there is no time
    times_ms: tuple[float, ...] = ()  # every sample, to four digits, in the order of the rounds

    @property
    def noise(self) -> float:
        return (self.quartiles[1] - self.quartiles[0]) / self.ms if self.ms else 0.0


class Row(NamedTuple):
    family: str
    case: Case
    dtype: torch.dtype
    direction: str
    flops: float
    bytes: float
    results: dict[str, Result]

    def ratio(self, peer: str) -> float | None:
        """How many times longer the peer takes than we do."""
        ours, theirs = self.results.get(OURS), self.results.get(peer)
        return theirs.ms / ours.ms if ours and theirs and ours.ms and theirs.ms else None


def prepare(contender: Contender, case: Case, inputs: Inputs, direction: str) -> Callable[[], object]:
    """The call to time: the forward pass without autograd, or forward and backward together."""
    training = direction == BACKWARD
    call = contender.prepare(case, inputs, training)
    if not training:

        def forward():
            with torch.no_grad():
                return call()

        return forward
    leaves = [*inputs[:3], *inputs.parameters.values()]
    generator = torch.Generator().manual_seed(2)
    grad_output = torch.randn(case.output_shape, generator=generator).to(inputs.query)
    if grad_output.shape == inputs.query.shape:  # laid out as a model has it: like the query
        grad_output = torch.empty_like(inputs.query, requires_grad=False).copy_(grad_output)

    def forward_and_backward():
        output = call()
        torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
        return output

    return forward_and_backward


def warm_up(device: str) -> None:
    """Load libraries and start thread pools, so that no row pays for them."""
    q = torch.randn(1, 2, 64, 16, device=device, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        cast = q.to(dtype)
        (F.scaled_dot_product_attention(cast, cast, cast).sum() + (cast @ cast.mT).softmax(-1).sum()).backward()


class _Clock:
    """Seconds per call of a sample of ``count`` calls."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            # Larger than the L2 cache of any GPU: every call finds its inputs in device memory, as in a model.
            self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def sample(self, call: Callable[[], object], count: int) -> float:
        if self.device == "cuda":
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count


def run_row(
    family: Family,
    case: Case,
    dtype: torch.dtype,
    direction: str,
    effort: Effort,
    *,
    device: str = "cpu",
    only: Iterable[str] = (),
    skip: Callable[[Contender], str] = lambda contender: "",
    progress: Callable[[str], None] = lambda step: None,
) -> Row:
    """Measure one row.

    ``skip`` says why a contender is to be left out, or nothing; ``progress`` is told of every contender prepared and,
    with an empty string, of every round of timing.
    """
    operator = family.operators[case.operator]
    training = direction == BACKWARD
    inputs = operator.inputs(case, dtype, device).leaves(gradients=training)
    expected = operator.expected(case, inputs)
    torch._dynamo.reset()  # shapes of earlier rows would count against the limit of recompilations
    results, calls = {}, {}
    for contender in operator.contenders:
        if only and contender.name not in only:
            continue
        progress(contender.name)
        outcome = skip(contender) or _admit(contender, case, inputs, direction, dtype, expected, device)
        if isinstance(outcome, str):
            results[contender.name] = Result(note=outcome)
        else:
            results[contender.name], *calls[contender.name] = outcome
    del expected
    for name, timed in take_turns(calls, effort, device, progress).items():
        results[name] = timed._replace(memory=results[name].memory, error=results[name].error)
    work = flops(family, case, direction), bytes_moved(family, case, inputs, direction)
    return Row(family.name, case, dtype, direction, *work, results)


def _admit(contender, case, inputs, direction, dtype, expected, device):
    """(result so far, call, its seconds) of a contender that can run and is right; else why it is left out."""
    if direction == BACKWARD and not contender.trains and (device == "cpu" or not contender.compiles):
        return contender.why_not
    needed = contender.memory(case, direction == BACKWARD)
    if device == "cpu" and needed > _available_memory():
        return f"needs about {needed / 1e9:.0f} GB"
    output, seconds = None, 0.0

    def once():
        nonlocal output, seconds
        begin = time.perf_counter()
        output = call()
        seconds = time.perf_counter() - begin

    try:
        call = prepare(contender, case, inputs, direction)
        if contender.compiles:
            call()
        peak = memory.peak_extra(once, device)
    except Exception as error:
        if contender.name == OURS:
            raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    heads, exact = expected
    error = (output.detach()[:, heads].double() - exact).abs().max().item()
    limit = TOLERANCE[dtype] * exact.abs().max().item()
    if contender.exact and not error <= limit:
        return f"wrong: error {error:.1e}, allowed {limit:.1e}"
    return Result(memory=peak, error=error if contender.exact else None), call, seconds


def take_turns(
    calls: dict[str, tuple[Callable[[], object], float]],
    effort: Effort,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Result]:
    """Time calls, each given with about the seconds that it takes, in turns."""
    results = {}
    for name, samples in _interleave(calls, effort, device, progress).items():
        median, low, high = (1e3 * _quantile(samples, share) for share in (0.5, 0.25, 0.75))
        times = tuple(float(f"{1e3 * seconds:.4g}") for seconds in samples)
        results[name] = Result(ms=median, quartiles=(low, high), samples=len(samples), times_ms=times)
    return results


def _interleave(calls: dict, effort: Effort, device: str, progress) -> dict[str, list[float]]:
    clock = _Clock(device)
    plan, samples = {}, {name: [seconds] if seconds > effort.longest else [] for name, (_, seconds) in calls.items()}
    for name, (call, seconds) in calls.items():
        if samples[name]:
            continue
        if seconds < LONG_CALL:  # its one call so far was as much a warm-up as a measurement
            call()
            seconds = min(clock.sample(call, 1) for _ in range(2))
        count = max(1, math.ceil(SHORTEST_SAMPLE / seconds)) if device == "cpu" else 1
        share = effort.seconds / len(calls) / (seconds * count)
        plan[name] = count, max(effort.fewest, min(effort.rounds, int(share)))
    names = list(plan)
    if not names:
        return samples
    gc.collect()
    gc.disable()
    try:
        for r in range(effort.rounds):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                count, wanted = plan[name]
                if (r + 1) * wanted // effort.rounds > r * wanted // effort.rounds:
                    samples[name].append(clock.sample(calls[name][0], count))
            progress("")
    finally:
        gc.enable()
    return samples


def _quantile(samples: list[float], p: float) -> float:
    ordered = sorted(samples)
    position = p * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _available_memory() -> float:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


__all__ = [
    "BACKWARD",
    "FORWARD",
    "FULL",
    "QUICK",
    "Effort",
    "Result",
    "Row",
    "prepare",
    "run_row",
    "take_turns",
    "warm_up",
]
