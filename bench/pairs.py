"""Measures two trees of effattn against each other: two processes kept alive, never both at work.

A block is four samples, base head head base or head base base head, turn by turn: a drift of the machine that is steady
over a block cancels within it. Blocks of a row come from several launches of the two processes, for where the loader and
the allocator put things stays for a process's life and is worth a per cent or two: what differs from launch to launch is
noise that blocks of one launch do not see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Case, Family
from .runner import SHORTEST_SAMPLE, TOLERANCE, Effort

BASE, HEAD = 0, 1
LAUNCHES = 8
BRIEF = 0.02  # seconds; briefer calls get one untimed call before each sample, for the other process had the caches
PAUSE = 0.003  # seconds that the other process's threads get to stop spinning
Progress = Callable[[str], None]


class Pair(NamedTuple):
    """One row: seconds per call of base and of head, in launches; sample i of one belongs to sample i of the other."""

    family: Family
    case: Case
    dtype: torch.dtype
    direction: str
    samples: tuple[list[list[float]], list[list[float]]]
    note: str = ""  # why there are no samples


class Measured(NamedTuple):
    pairs: list[Pair]
    versions: tuple[str, str]


class Worker:
    """``pair_worker.py`` on one tree."""

    def __init__(self, tree: Path, threads: int):
        self.tree = tree
        script = Path(__file__).with_name("pair_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tree)},
            start_new_session=True,  # Ctrl-C is for us, who then end the workers
        )
        try:
            about = self.ask("about", threads=threads)
            if about["problem"]:
                raise RuntimeError(f"{tree}: {about['problem']}; build it there: python setup.py build_ext --inplace")
        except BaseException:
            self.close()
            raise
        self.version = about["version"]

    def ask(self, what: str, **arguments) -> dict:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": what, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process on {self.tree} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def measure(
    plan: Iterable[tuple[Family, Case, torch.dtype, str]],
    trees: tuple[Path, Path],
    threads: int,
    effort: Effort,
    launches: int = LAUNCHES,
    clock: str = "wall",
    progress: Progress = lambda step: None,
) -> Measured:
    """Every row of the plan in every launch. Outputs of the two are compared in the first."""
    pairs = [Pair(*row, ([], [])) for row in plan]
    for launch in range(launches):
        with contextlib.ExitStack() as stack:
            workers: list = [None, None]
            for side in (BASE, HEAD) if launch % 2 == 0 else (HEAD, BASE):
                workers[side] = stack.enter_context(Worker(trees[side], threads))
            for index, pair in enumerate(pairs):
                if not pair.note:
                    progress(f"launch {launch + 1}/{launches} {pair.case.operator} {pair.case.name}")
                    pairs[index] = _launch(pair, workers, launch, effort, launches, clock)
    return Measured(pairs, tuple(worker.version for worker in workers))


def _launch(pair: Pair, workers: list[Worker], launch: int, effort: Effort, launches: int, clock: str) -> Pair:
    first = launch == 0
    with tempfile.TemporaryDirectory() as scratch:
        files = [f"{scratch}/{side}.pt" if first else None for side in (BASE, HEAD)]
        answers = [
            worker.ask("prepare", **_row(pair), clock=clock, output=file) for worker, file in zip(workers, files)
        ]
        for side, answer in enumerate(answers):
            if "error" in answer:
                return pair._replace(note=f"{('base', 'head')[side]}: {answer['error']}")
        if first:
            wrong = _difference(pair, answers, files)
            if wrong:
                return pair._replace(note=wrong)
    seconds = max(answer["seconds"] for answer in answers)
    count = max(1, math.ceil(SHORTEST_SAMPLE / seconds))
    warm = 1 if seconds < BRIEF else 0
    fits = int(effort.seconds / launches / (4 * seconds * (count + warm)))
    blocks = max(1, min(math.ceil(effort.rounds / launches), fits))
    taken: tuple[list[float], list[float]] = ([], [])
    for block in range(blocks):
        for side in turns(launch, block):
            time.sleep(PAUSE)
            taken[side].append(workers[side].ask("sample", count=count, warm=warm, clock=clock)["seconds"])
    return pair._replace(samples=tuple([*before, new] for before, new in zip(pair.samples, taken)))


def turns(launch: int, block: int) -> tuple[int, int, int, int]:
    return (BASE, HEAD, HEAD, BASE) if (launch + block) % 2 == 0 else (HEAD, BASE, BASE, HEAD)


def _row(pair: Pair) -> dict:
    dtype = str(pair.dtype).removeprefix("torch.")
    return {
        "family": pair.family.name,
        "case": dataclasses.asdict(pair.case),
        "dtype": dtype,
        "direction": pair.direction,
    }


def _difference(pair: Pair, answers: list[dict], files: list) -> str:
    """Why base and head did not compute the same, or nothing."""
    if answers[BASE]["inputs"] != answers[HEAD]["inputs"]:
        return "base and head were given different inputs"
    base, head = (torch.load(file).double() for file in files)
    if base.shape != head.shape:
        return f"outputs differ in shape: {tuple(base.shape)} and {tuple(head.shape)}"
    error, limit = (base - head).abs().max().item(), TOLERANCE[pair.dtype] * base.abs().max().item()
    return "" if error <= limit else f"outputs differ by {error:.1e}, allowed {limit:.1e}"
