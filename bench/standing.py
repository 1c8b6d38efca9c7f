"""Where effattn stands in recorded rows: ratios to peers, losses, and the summary of a family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .cases import OURS, Family, Sweep
from .recorded import RESULTS, Run, newest_rows, runs
from .report import NOISY

DIRECTIONS = ("forward", "forward+backward")
Newest = list[tuple[dict, Run]]


class Against(NamedTuple):
    """A peer's time in a row beside ours."""

    row: dict
    run: Run
    peer: str

    @property
    def ours(self) -> dict:
        return self.row["results"][OURS]

    @property
    def theirs(self) -> dict:
        return self.row["results"][self.peer]

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes."""
        return self.theirs["ms"] / self.ours["ms"]

    @property
    def exact(self) -> bool:
        """Whether it computes the same function: only of those an error is recorded."""
        return self.theirs["error"] is not None

    @property
    def overlap(self) -> bool:
        """Whether the quartiles of both overlap, so that another run may order them otherwise."""
        (low, high), (least, most) = self.ours["quartiles"], self.theirs["quartiles"]
        return low <= most and least <= high


class Standing(NamedTuple):
    """Ratios of one sweep's operators in one direction, float32, over all recorded shapes."""

    sweep: Sweep
    family: str
    direction: str
    eager: list[float]
    fastest: list[float]  # to whichever peer was fastest in each row


class Machine(NamedTuple):
    """What has been recorded on one: the newest row of every case, and the rows that are shown.

    An older row is shown too where it timed a contender that the newest did not.
    """

    name: str
    newest: Newest
    shown: Newest


def by_machine(folder: Path = RESULTS) -> list[Machine]:
    by_name: dict[str, list[Run]] = {}
    for run in runs(folder):
        by_name.setdefault(run.machine, []).append(run)
    found = []
    for name, of_machine in sorted(by_name.items()):
        newest = newest_rows(of_machine)
        seen = {key: _who(row) for key, (row, _) in newest.items()}
        older = []
        for run in reversed(of_machine):
            for key, (row, _) in newest_rows([run]).items():
                if not _who(row) <= seen[key]:
                    older.append((row, run))
                    seen[key] |= _who(row)
        found.append(Machine(name, list(newest.values()), [*newest.values(), *older]))
    return found


def _who(row: dict) -> set[str]:
    return {name for name in row["results"] if timed(row, name)}


def is_own(name: str) -> bool:
    return name == OURS or name.startswith(("ours ", "effattn "))


def timed(row: dict, name: str = OURS) -> bool:
    return bool(row["results"].get(name, {}).get("ms"))


def noisy(result: dict) -> bool:
    return result["quartiles"][1] - result["quartiles"][0] > NOISY * result["ms"]


def against(rows: Iterable[tuple[dict, Run]]) -> Iterator[Against]:
    """Every timed peer of every row, other forms of ours among them."""
    for row, run in rows:
        for name in row["results"]:
            if name != OURS and timed(row) and timed(row, name):
                yield Against(row, run, name)


def standings(family: Family, rows: Newest) -> list[Standing]:
    found = []
    for sweep in family.sweeps:
        for direction in DIRECTIONS:
            eager, fastest = [], []
            for row, run in rows:
                of_sweep = row["family"] == family.name and row["operator"] in sweep.operators
                if not of_sweep or row["direction"] != direction or row["dtype"] != "float32":
                    continue
                peers = [a for a in against([(row, run)]) if not is_own(a.peer)]
                fastest += sorted(a.ratio for a in peers if a.exact or a.peer in sweep.rivals)[:1]
                eager += [a.ratio for a in peers if a.peer == sweep.eager]
            if fastest:
                found.append(Standing(sweep, family.name, direction, eager, fastest))
    return found
