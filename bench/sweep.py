"""``python -m effattn bench --sweep``: operators over growing inputs, for the report; one JSON file per family.

A contender that would take too long is left out, with the time that its shorter inputs foretell. Contenders that compile
take part at a few lengths, for each costs them seconds of compiling.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from effattn._files import INTERRUPTED

from . import ceilings, machines, recorded, report
from .cases import BACKWARD, FORWARD, OURS, Case, Contender, Family, Sweep
from .load import ForeignLoad
from .progress import Progress
from .runner import Effort, Row, run_row, warm_up

EFFORT = Effort(seconds=1.5, rounds=15, fewest=3, longest=2.5)
QUICK = Effort(seconds=0.2, rounds=3, fewest=1, longest=0.5)
LIMIT = 8.0  # seconds of a call


class Pace:
    """Foretells a contender's seconds per call from those at the last two lengths that it was timed at."""

    def __init__(self):
        self._known: dict[str, list[tuple[int, float]]] = {}

    def learn(self, row: Row) -> None:
        for name, result in row.results.items():
            if result.ms:
                self._known.setdefault(name, []).append((row.case.tokens, result.ms / 1e3))

    def left_out(self, sweep: Sweep, case: Case, contender: Contender) -> str:
        """Why ``contender`` does not take part, or nothing."""
        if contender.compiles and case.tokens not in sweep.compiled:
            return f"compiled at {' and '.join(map(str, sweep.compiled))} {sweep.axis.split()[0]} only"
        known = self._known.get(contender.name)
        if contender.name == OURS or not known:
            return ""
        (last, seconds), exponent, grows = known[-1], 1.0, "taken to grow"
        if len(known) > 1:
            before, less = known[-2]
            exponent, grows = min(3.0, max(0.0, math.log(seconds / less) / math.log(last / before))), "growing"
        foretold = seconds * (case.tokens / last) ** exponent
        if foretold <= LIMIT:
            return ""
        return f"would take about {foretold:.0f} s a call: {seconds:.2g} s at {last}, {grows} with power {exponent:.1f}"


def rows(family: Family) -> Iterator[tuple[Sweep, Case, str, Pace]]:
    """In the order of measuring."""
    for sweep in family.sweeps:
        for direction in (FORWARD, BACKWARD):
            pace = Pace()
            for case in sweep.cases:
                if direction == FORWARD or case.tokens in sweep.trained:
                    yield sweep, case, direction, pace


def run(
    chosen: list[Family], effort: Effort, *, device: str, threads: int, folder: str | None, resume: bool = False
) -> int:
    """Measure and write; Ctrl-C keeps the families that are done. Returns the exit status."""
    torch.set_num_threads(threads)
    about = report.machine(device, threads)
    into = Path(folder) if folder else recorded.RESULTS / machines.folder(about)
    files = {family.name: into / f"sweep_{family.name}.json" for family in chosen}
    waiting = [family for family in chosen if not (resume and _is_done(files[family.name], about))]
    try:
        warm_up(device)
        with Progress(sum(len(list(rows(family))) for family in waiting)) as progress:
            for family in waiting:
                found = _measure(family, effort, device, threads, progress)
                report.write_json(report.as_json(found), str(files[family.name]))
                print(f"{report.table(found)}\n\nwritten: {files[family.name]}\n", flush=True)
    except KeyboardInterrupt:
        print("interrupted: the families before this one are kept; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


def _is_done(file: Path, about: dict) -> bool:
    """Whether ``file`` was measured here with this very code."""
    if not file.exists() or not about["commit"] or about["commit"].endswith("+"):
        return False
    then = json.loads(file.read_text())["machine"]
    return all(then[name] == about[name] for name in ("cpu", "cores", "gpu", "threads", "torch", "commit"))


def _measure(family: Family, effort: Effort, device: str, threads: int, progress: Progress) -> report.Report:
    about, load = report.machine(device, threads), ForeignLoad()
    limits = ceilings.measure(threads) if device == "cpu" else ceilings.none(threads, "not measured on CUDA")
    found = []
    for sweep, case, direction, pace in rows(family):
        progress.row(f"{case.operator} {case.name} {direction}")
        found.append(
            run_row(
                *(family, case, torch.float32, direction, effort),
                device=device,
                only=[c.name for c in family.operators[case.operator].contenders if c.name not in sweep.without],
                skip=lambda contender, where=(pace, sweep, case): Pace.left_out(*where, contender),
                progress=progress.step,
            )
        )
        pace.learn(found[-1])
        progress.row_done()
    return report.Report(about, ceilings.better(limits), found, {}, None, True, load.cores())
