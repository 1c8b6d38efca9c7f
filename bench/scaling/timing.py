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
    load, start = ForeignLoad(), time.monotonic()

    def keep(where: str | Path = partial) -> None:
        session = {
            "date": about["date"],
            "seconds": round(time.monotonic() - start),
            "cores_used_by_others": load.cores(),
        }
        report.write_json(found | {"sessions": [*found["sessions"], session]}, where)

    for number in range(1, rounds + 1):
        for subject in chosen:
            if _round(subject, found["points"], number, CLOCKS[clock]):
                _say(f"round {number}/{rounds} {subject.name}", start)
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
    found["fits"] = {subject.name: fits(subject, found["points"]) for subject in chosen}
    keep(path)
    partial.unlink(missing_ok=True)
    return json.loads(Path(path).read_text())


def _read(partial: Path, about: dict, rounds: int) -> dict:
    if not partial.exists():
        return {
            "machine": about,
            "sessions": [],
            "rounds": rounds,
            "fits": {},
            "memory": {},
            "ranks": {},
            "longest": {},
            "points": {},
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


def _round(subject: Subject, points: dict, number: int, clock: Callable[[], float]) -> bool:
    """Bring every size to ``number`` samples; whether any was missing."""
    samples = points.setdefault(subject.name, {})
    missed = False
    for size in (*subject.fit, *subject.held_out):
        for direction in subject.directions:
            taken = samples.setdefault(key(size, direction), [])
            if len(taken) < number:
                missed = True
                taken.append(_sample(subject, size, direction, taken[-1] if taken else math.inf, clock))
    return missed


def _sample(subject: Subject, size: Size, direction: str, before: float, clock: Callable[[], float]) -> float:
    """Seconds of a call; ``before``: what it took the last time."""
    call = subject.call(size, subject.inputs(size, direction), direction)
    gc.collect()
    gc.disable()
    try:
        first = _seconds(call, 1, clock)  # a warm-up
        expected = min(first, before)
        return float(f"{_seconds(call, math.ceil(SHORTEST_SAMPLE / expected), clock):.4g}")
    finally:
        gc.enable()


def _seconds(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(count):
        call()
    return (clock() - begin) / count


def fits(subject: Subject, points: dict) -> dict[str, dict]:
    """By direction: prices in seconds a unit and errors at the sizes held out."""
    samples, found = points[subject.name], {}
    for direction in subject.directions:

        def measured(sizes, direction=direction):
            return [(subject.units(size), statistics.median(samples[key(size, direction)])) for size in sizes]

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
