"""``python -m effattn tune``: measures the choices of this machine side by side and keeps those that repeat."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from . import _native, _tuning
from ._tuning_defaults import NEVER, TILES
from .ops import retention, retnet_log_decay, scaled_dot_product_attention, toeplitz_costs, toeplitz_methods
from .ops.attention import SMALLEST_WORK
from .ops.retention import CPU_CHUNK
from .ops.toeplitz_costs import COSTS

CPU_FAMILIES = ("attention", "retention", "toeplitz")
FAMILIES = (*CPU_FAMILIES, "gaussian_mixture", "cross_shaped_window", "token_merging", "shift_add")
WORTH = 1.05  # a choice is changed only where the time in use was so many times longer,
REPEATS = 1.03  # and in a second measurement still so many

CHUNKS = (16, 32, 64, 128, 256)
KEYS = (8, 32, 128, 512, 2048)
SQUARES = ((1, 16, 32), (2, 16, 64), (8, 16, 64), (8, 32, 64), (8, 64, 64), (8, 128, 64))


class Outcome(NamedTuple):
    """What became of one choice; times are geometric means of what was timed, in seconds."""

    name: str
    place: int | str
    features: tuple
    before: Any
    after: Any
    predicted: tuple[float, float] | None = None  # before and after, from the sweep that chose
    measured: tuple[float, float] | None = None  # the same, in a second measurement
    repeats: bool = True

    @property
    def kept(self):
        return self.after if self.repeats else self.before


Times = Callable[[dict[str, Callable]], dict[str, float]]


def timer(seconds: float, device: str = "cpu") -> Times:
    """Median seconds of calls that take turns, for about so long."""
    from .bench.runner import Effort, take_turns

    def times(calls: dict[str, Callable]) -> dict[str, float]:
        timed = {}
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            timed[name] = call, time.perf_counter() - start
        results = take_turns(timed, Effort(seconds=seconds, rounds=15, fewest=3), device)
        return {name: result.ms / 1e3 for name, result in results.items()}

    return times


def mean(values: Iterable[float]) -> float:
    """The geometric one."""
    return math.exp(sum(map(math.log, values := list(values))) / len(values))


def settle(name, place, features, before, after, predicted: tuple[float, float], again: Callable) -> Outcome:
    """``before`` unless ``after`` is predicted to be worth it and ``again()``, (before, after), says so too."""
    if after == before or predicted[0] < WORTH * predicted[1]:
        return Outcome(name, place, features, before, before)
    measured = again()
    return Outcome(name, place, features, before, after, predicted, measured, measured[0] >= REPEATS * measured[1])


# ---- attention ----


def tune_attention(seconds: float) -> Iterator[Outcome]:
    keys = list(itertools.product(*_tuning.CHOICES[SMALLEST_WORK].fields.values()))
    for dtype, queries in keys:
        yield _crossover(dtype, queries, timer(seconds / len(keys) / 8))


def _crossover(dtype: torch.dtype, queries: int, times: Times) -> Outcome:
    """The work that parts the points where torch is faster from those where we are, at the least time in all."""
    shapes = SQUARES if queries == 16 else tuple((8, queries, 64) for _ in KEYS)
    lengths = [shape[1] for shape in SQUARES] if queries == 16 else KEYS
    points = [((*shape, keys), math.prod(shape) * keys) for shape, keys in zip(shapes, lengths)]
    ours, torchs = {}, {}
    for shape, work in points:
        ours[work], torchs[work] = times(_attention_calls(dtype, *shape)).values()
    threads, before = torch.get_num_threads(), _tuning.value(SMALLEST_WORK, dtype, queries)

    def taken(threshold: int, work: int) -> float:
        return ours[work] if work >= threshold else torchs[work]

    def total(threshold: int) -> float:
        return sum(math.log(taken(threshold, work)) for work in ours)

    after = min((before, *ours, NEVER), key=total)  # the first of equals
    changed = [(shape, work) for shape, work in points if (work >= before) != (work >= after)]
    if not changed:
        return Outcome(SMALLEST_WORK, threads, (dtype, queries), before, before)

    def again() -> tuple[float, float]:
        found = [(work >= after, *times(_attention_calls(dtype, *shape)).values()) for shape, work in changed]
        return mean(t if us else o for us, o, t in found), mean(o if us else t for us, o, t in found)

    predicted = tuple(mean(taken(threshold, work) for _, work in changed) for threshold in (before, after))
    return settle(SMALLEST_WORK, threads, (dtype, queries), before, after, predicted, again)


def _attention_calls(dtype, heads, queries, head_dim, keys) -> dict[str, Callable]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, queries, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, heads, keys, head_dim, generator=generator).to(dtype).unbind(0)

    def call(backend):
        with torch.no_grad():
            return scaled_dot_product_attention(query, key, value, backend=backend)

    return {backend: lambda backend=backend: call(backend) for backend in ("cpu", "torch")}


# ---- retention ----


def tune_retention(seconds: float) -> Iterator[Outcome]:
    keys = list(itertools.product(*_tuning.CHOICES[CPU_CHUNK].fields.values()))
    for dtype, width in keys:
        yield _chunk(dtype, width, timer(seconds / len(keys) / 3))


def _chunk(dtype: torch.dtype, width: int, times: Times) -> Outcome:
    """The chunk with the least geometric mean of a forward and of a training step."""
    before = _tuning.value(CPU_CHUNK, dtype, width)
    calls = _retention_calls(dtype, width)

    def measured(chunks) -> dict[int, float]:
        found = [times({str(chunk): lambda c=chunk, call=call: call(c) for chunk in chunks}) for call in calls]
        return {chunk: mean(seconds[str(chunk)] for seconds in found) for chunk in chunks}

    sweep = measured(dict.fromkeys((before, *CHUNKS)))
    after = min(sweep, key=sweep.get)
    return settle(
        *(CPU_CHUNK, torch.get_num_threads(), (dtype, width), before, after),
        (sweep[before], sweep[after]),
        lambda: tuple(measured((before, after)).values()),
    )


def _retention_calls(dtype: torch.dtype, width: int) -> tuple[Callable, Callable]:
    heads, tokens = max(4, torch.get_num_threads()), 1024 if width <= 64 else 512
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, heads, tokens, min(width, 256), generator=generator).to(dtype).unbind(0)
    value, grad = torch.randn(2, 1, heads, tokens, width, generator=generator).to(dtype).unbind(0)
    log_decay = retnet_log_decay(heads)

    def forward(chunk: int):
        with torch.no_grad():
            return retention(query, key, value, log_decay, chunk_size=chunk, backend="cpu")

    def step(chunk: int):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output = retention(*leaves, log_decay, chunk_size=chunk, backend="cpu")
        return torch.autograd.grad(output, leaves, grad)

    return forward, step


# ---- Toeplitz ----

CHECK = (3000, 48, 64)  # (N, M, D), not one that the costs are fitted to


def tune_toeplitz(seconds: float) -> Iterator[Outcome]:
    """Costs are a model: they are kept where they predict other shapes better than those in force."""
    before, after = toeplitz_costs.costs(), toeplitz_costs.measured()
    calls = {method: toeplitz_costs._call(method, *CHECK) for method in toeplitz_costs.SHAPES}
    truth = timer(seconds / 2)(calls).values()

    def error(costs) -> float:
        """The factor by which predictions are off."""
        expected = toeplitz_methods.predicted(costs, *CHECK, heads=toeplitz_costs._heads())
        return mean(max(t / e, e / t) for e, t in zip(expected, truth))

    old, new = error(before), error(after)
    yield Outcome(COSTS, torch.get_num_threads(), (), before, after, None, (old, new), new < old)


# ---- the command ----


def main(argv: list[str] | None = None) -> int:
    arguments = _parsed(argv)
    threads = torch.get_num_threads()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.show:
            return show()
        if arguments.clear:
            return clear()
        if _is_busy() and not (arguments.force or arguments.dry_run):
            print(
                f"not tuned: {_busy()}.\nWhat is measured now would be wrong later; --dry-run shows it, --force keeps it"
            )
            return 1
        return tune(arguments.families or FAMILIES, arguments.seconds, arguments.dry_run)
    finally:
        torch.set_num_threads(threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m effattn tune",
        description="measure the choices of this machine side by side, and keep what is faster and repeats",
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="measure, print and write nothing")
    parser.add_argument("--show", action="store_true", help="print what is in force and where it comes from")
    parser.add_argument("--force", action="store_true", help="write although other processes keep the machine busy")
    parser.add_argument("--clear", action="store_true", help="forget what was measured on this machine")
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="threads of the CPU; default: torch's")
    parser.add_argument(
        *("--seconds",), type=_positive(float), default=20.0, metavar="S", help="about how long a family may take; 20"
    )
    return parser


def _parsed(argv) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    for family in arguments.families:
        if family not in FAMILIES:
            parser.error(f"FAMILY must be one of {', '.join(FAMILIES)}, got {family!r}")
    return arguments


def _positive(kind):
    def positive(text: str):
        number = kind(text)
        if not 0 < number < 1e6:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return number

    return positive


def tune(families: Iterable[str], seconds: float, dry_run: bool) -> int:
    """Measure, print what changed, write it unless ``dry_run``."""
    has_gpu = torch.cuda.is_available()
    if not _native.loaded and not has_gpu:
        print(f"there is nothing to tune: {_native.problem}")
        return 1
    _print_machine()
    if _is_busy():
        print(f"{_busy()}: do not trust what follows")
    outcomes, settled = [], set()  # families share kernels
    for family in families:
        found = list(_tune_family(family, seconds, has_gpu, settled))
        if not found:
            print(f"{family}: nothing to tune without a GPU; its choices on a CPU are compiled in")
        outcomes += found
    if not outcomes:
        print("there is nothing to tune")
        return 0
    _print_outcomes(outcomes)
    if dry_run:
        print("nothing is written (--dry-run)")
        return 0
    try:
        _tuning.keep({_tuning.key(o.name, o.place, o.features): o.kept for o in outcomes})
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"measured, but not kept: {error}")
        return 1
    print(f"written to {_tuning.path()}")
    if _tuning.is_ignored():
        print("EFFATTN_TUNING=0 is set: calls do not look at it")
    return 0


def _tune_family(family: str, seconds: float, has_gpu: bool, settled: set) -> Iterator[Outcome]:
    on_cpu = {"attention": tune_attention, "retention": tune_retention, "toeplitz": tune_toeplitz}
    if family in on_cpu and _native.loaded:
        yield from on_cpu[family](seconds)
    if has_gpu:
        from . import _tune_triton

        yield from _tune_triton.tune(family, seconds, settled)


def show() -> int:
    """Print every choice in force and where it comes from."""
    _print_machine()
    state = "ignored, for EFFATTN_TUNING=0" if _tuning.is_ignored() else "read"
    print(f"file: {_tuning.path()} ({state if _tuning.path().exists() else 'absent'})")
    for choice in _tuning.choices("cpu"):
        print(f"\n{choice.name}: {choice.about}")
        for features in itertools.product(*choice.fields.values()):
            value, origin = _tuning.find(choice.name, *features)
            print(f"  {_described(choice.name, features):32}{_worded(value):>40}   {origin}")
    print(f"\n{_tuning.tiles()}")
    return 0


def clear() -> int:
    try:
        removed = _tuning.clear()
    except (OSError, RuntimeError) as error:
        print(f"not cleared: {error}")
        return 1
    print(f"{removed} entries of this machine removed from {_tuning.path()}")
    return 0


def _print_machine() -> None:
    print(f"{_tuning.cpu()}, {torch.get_num_threads()} threads")
    print(f"{_tuning.gpu(torch.cuda.current_device())}" if torch.cuda.is_available() else f"no GPU; {TILES}")


def _is_busy() -> bool:
    """By the processes that ran in the last minute; this one has hardly begun."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)


def _busy() -> str:
    return f"other processes are at work (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors)"


def _print_outcomes(outcomes: list[Outcome]) -> None:
    for o in outcomes:
        if o.after == o.before:
            continue
        mark = "changed" if o.repeats else "left as it was"
        print(f"\n{o.name} {_described(o.name, o.features)}: {mark}")
        print(f"  before {_worded(o.before)} ({_tuning.found(o.name, o.place, o.features).origin})")
        print(f"  now    {_worded(o.kept)}")
        if o.predicted:
            print(f"  predicted {_milliseconds(o.predicted)}, measured again {_milliseconds(o.measured)}")
        else:
            old, new = o.measured
            print(f"  predictions for other sizes are off by a factor of {old:.2f} before, {new:.2f} as measured now")
        if not o.repeats:
            print(f"  {_worded(o.after)} " + ("was not faster again" if o.predicted else "predicts them no better"))
    changed = sum(o.kept != o.before for o in outcomes)
    left = sum(not o.repeats for o in outcomes)
    print(f"\n{len(outcomes)} choices measured, {changed} changed" + (f", {left} did not repeat" if left else ""))


def _described(name: str, features: tuple) -> str:
    fields = _tuning.CHOICES[name].fields
    return ", ".join(f"{field} {str(value).removeprefix('torch.')}" for field, value in zip(fields, features))


def _worded(value) -> str:
    if value == NEVER:
        return "never"
    return ", ".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else str(value)


def _milliseconds(pair: tuple[float, float]) -> str:
    return f"{1e3 * pair[0]:.4f} -> {1e3 * pair[1]:.4f} ms ({pair[0] / pair[1]:.2f}x)"
