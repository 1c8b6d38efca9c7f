"""Measures every subject at every size in rounds, so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import memory, report
from ..load import ForeignLoad
from ..runner import SHORTEST_SAMPLE, warm_up
from . import allocation, answers, model, ranks
from .subjects import SUBJECTS, Subject
from .units import Size

WARM_UPS, SETTLED = 3, 0.1
"""Calls before the timed ones, or as many as take so many seconds: in the first the heap, the kernels' buffers and huge pages
settle, and a user's loop goes on."""
SPREAD, MORE = 0.1, 2
"""Sizes whose samples' middle half spreads further than this share of their median are measured in up to so many times the
rounds: a share of calls waits for the operating system to find pages, and few samples do not tell how large a share."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""On a machine that others use, the CPU time of one thread is nearer to what it takes alone than the time on the wall."""
MEMORY_BYTES = 48 << 20  # results and saved tensors of the sizes whose peak is asked of the operating system


def measure(path: str, threads: int, rounds: int, only: tuple[str, ...] = (), clock: str = "wall") -> dict:
    """Measure and write ``path``. An interrupted run leaves ``path``.partial, where the same command goes on."""
    about, partial = report.machine("cpu", threads) | {"clock": clock}, Path(f"{path}.partial")
    found = _read(partial, about, rounds)
    chosen = [subject for name, subject in SUBJECTS.items() if not only or name in only]
    torch.set_num_threads(threads)
    warm_up("cpu")
    _settle_heap()
    load, start = ForeignLoad(), time.monotonic()

    def keep(where: str | Path = partial) -> None:
        session = {
            "date": about["date"],
            "seconds": round(time.monotonic() - start),
            "cores_used_by_others": load.cores(),
        }
        report.write_json(found | {"sessions": [*found["sessions"], session]}, where)

    for number in range(1, MORE * rounds + 1):
        for subject in chosen:
            if _round(subject, found["points"], number, rounds, CLOCKS[clock]):
                more = " more, of what spreads" if number > rounds else ""
                _say(f"round {number}/{rounds}{more} {subject.name}", start)
                keep()
    for subject in chosen:
        if subject.name not in found["memory"]:
            found["memory"][subject.name] = [_memory(subject, direction, threads) for direction in subject.directions]
            _say(f"memory {subject.name}", start)
            keep()
    if not only and not found["ranks"]:
        _say("messages and ranks", start)
        found["ranks"] = ranks.measure()
    if not only and not found["longest"]:
        _say("the longest sequences of an H200", start)
        found["longest"] = answers.all_longest()
    for subject in chosen:
        found["fresh"][subject.name] = fresh(subject)
        found["fits"][subject.name] = fits(subject, found["points"], found["fresh"])
    keep(path)
    partial.unlink(missing_ok=True)
    return json.loads(Path(path).read_text())


def _read(partial: Path, about: dict, rounds: int) -> dict:
    if not partial.exists():
        return {
            "machine": about,
            "sessions": [],
            "rounds": rounds,
            "sampling": {"warm_ups": WARM_UPS, "settled": SETTLED, "spread": SPREAD, "more": MORE},
            "fits": {},
            "memory": {},
            "ranks": {},
            "longest": {},
            "points": {},
            "fresh": {},
        }
    found = json.loads(partial.read_text())
    for name in ("cpu", "threads", "torch", "commit", "clock"):
        if found["machine"][name] != about[name]:
            raise ValueError(
                f"{partial} was begun with {name} {found['machine'][name]!r}, this is {about[name]!r}; remove it"
            )
    return found | {"rounds": rounds}


def key(size: Size, direction: str) -> str:
    return f"{'x'.join(map(str, size))} {direction}"


def _settle_heap() -> None:
    """Raise glibc's thresholds to their largest, as the first tensor of almost 32 MB that a process frees does."""
    torch.ones((allocation.MAPPED - (1 << 16)) // 4)


def _round(subject: Subject, points: dict, number: int, rounds: int, clock: Callable[[], float]) -> bool:
    """Bring every size to ``number`` samples, after ``rounds`` those that spread; whether any was missing."""
    samples = points.setdefault(subject.name, {})
    missed = False
    for size in (*subject.fit, *subject.held_out):
        for direction in subject.directions:
            taken = samples.setdefault(key(size, direction), [])
            if len(taken) < number and (number <= rounds or _spreads(taken)):
                missed = True
                taken.append(_sample(subject, size, direction, taken[-1] if taken else math.inf, clock))
    return missed


def _spreads(samples: list[float]) -> bool:
    if len(samples) < 2:
        return False
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low > SPREAD * middle


def _sample(subject: Subject, size: Size, direction: str, before: float, clock: Callable[[], float]) -> float:
    """Seconds of a call; ``before``: what it took the last time."""
    call = subject.call(size, subject.inputs(size, direction), direction)
    gc.collect()
    gc.disable()
    try:
        first = []
        while len(first) < WARM_UPS and sum(first) < SETTLED:
            first.append(_seconds(call, 1, clock))
        expected = min(before, *first)
        return float(f"{_seconds(call, math.ceil(SHORTEST_SAMPLE / expected), clock):.4g}")
    finally:
        gc.enable()


def _seconds(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(count):
        call()
    return (clock() - begin) / count


def fresh(subject: Subject) -> dict[str, int]:
    """Counted: the bytes of every measured call that come anew from the operating system."""
    sizes = (*subject.fit, *subject.held_out)
    counted = {key(size, d): subject.fresh(size, d) for size in sizes for d in subject.directions}
    return {name: count for name, count in counted.items() if count}


def fits(subject: Subject, points: dict, fresh: dict) -> dict[str, dict]:
    """By direction: prices in seconds a unit and errors at the sizes held out, of the sizes that were measured."""
    samples, found = points[subject.name], {}
    for direction in subject.directions:

        def measured(sizes, direction=direction):
            names = {size: key(size, direction) for size in sizes}
            return [
                (subject.work(size, direction, fresh[subject.name].get(name, 0)), statistics.median(samples[name]))
                for size, name in names.items()
                if name in samples
            ]

        prices = model.fit(measured(subject.fit))
        found[direction] = model.judged(prices, measured(subject.held_out))._asdict()
    return found


# ---- memory ----


def _memory(subject: Subject, direction: str, threads: int) -> dict:
    """At the first size whose call allocates enough for the operating system to tell, or the largest: counted, measured."""
    sizes = sorted((*subject.fit, *subject.held_out), key=lambda size: size.items * size.tokens * size.head_dim)
    for size in sizes:
        counted = allocation.count(subject.making(size, direction))
        if counted.extra >= MEMORY_BYTES:
            break
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fresh process: nothing an earlier call kept can serve this one
    context.set_forkserver_preload([__name__])  # which imports torch once for all
    with context.Pool(1) as pool:
        measured = pool.apply(_peak, (subject.name, size, direction, threads))
    return {"size": size, "direction": direction, "counted": counted.extra, "measured": measured}


def _peak(name: str, size: tuple, direction: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    warm_up("cpu")
    subject, size = SUBJECTS[name], Size(*size)
    return memory.peak_extra(subject.call(size, subject.inputs(size, direction), direction))


def _say(what: str, start: float) -> None:
    print(f"{time.monotonic() - start:5.0f} s  {what}", file=sys.stderr, flush=True)
