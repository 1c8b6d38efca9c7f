"""What past runs of the benchmark measured: the JSON in ``bench/results/<machine>/`` of a checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .ceilings import Ceilings

RESULTS = Path(__file__).resolve().parent / "results"


class Run(NamedTuple):
    """One file: its machine's folder, what ``report.machine`` said, the ceilings and the rows, all as stored."""

    path: Path
    about: dict
    ceilings: Ceilings
    rows: list[dict]
    foreign_load: float | None = None  # cores that other processes used meanwhile

    @property
    def machine(self) -> str:
        return self.path.parent.name


def runs(folder: Path = RESULTS) -> list[Run]:
    """Every complete run of ``python -m effattn bench``, the oldest first; files of other programs are passed over."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        if "rows" in content and content.get("complete"):
            limits, load = Ceilings(**content["ceilings"]), content.get("cores_used_by_others")
            found.append(Run(path, content["machine"], limits, content["rows"], load))
    return sorted(found, key=lambda run: run.about["date"])


def newest_rows(runs: list[Run]) -> dict[tuple[str, str, str, str], tuple[dict, Run]]:
    """By (operator, case, dtype, direction) the row that was measured last, with its run; ``runs`` are of one machine."""
    return {
        (row["operator"], row["case"], row["dtype"], row["direction"]): (row, run) for run in runs for row in run.rows
    }
