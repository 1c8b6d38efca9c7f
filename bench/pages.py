"""``python -m effattn.bench.pages``: writes docs/benchmarks.md and its pictures from the JSON in bench/results/.

Measures nothing. ``--check`` only says whether the page is what the JSON gives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effattn._files import write_atomically

from . import page_models, pictures
from .cases import Family, families
from .page_tables import losses, operators, run_list, summary
from .pictures import FEWEST
from .recorded import RESULTS, runs
from .standing import Machine, Newest, Standing, by_machine, standings

DOCS = RESULTS.parents[1] / "docs"
PAGE, IMAGES = DOCS / "benchmarks.md", DOCS / "images" / "benchmarks"
COMMAND = "python -m effattn.bench.pages"
TITLES = {
    "attention": "Plain attention",
    "cross_shaped_window": "Windows",
    "gaussian_mixture": "Gaussian mixtures",
    "retention": "Retention and decay",
    "shift_add": "Shift-add",
    "toeplitz": "Toeplitz",
    "token_merging": "Token merging",
}
HEAD = f"""# Benchmarks

<!-- Written by {COMMAND}; do not edit. -->

Every number below comes from JSON in [bench/results](../bench/results/README.md), which the benchmark wrote and nobody edited. A row is one shape in one
dtype and pass. In it, those who compute the same function were compared with a float64 reference, and then all were timed in turns; reported are medians.

* In brackets: a peer's time over ours. Above 1x ours is faster. Where the peer is faster the cell is **bold**, and the row is among the [losses](#where-a-peer-is-faster).
* †: the quartiles are further apart than 15 % of the median. ‡: a single call.
* "Of the limit": the least time by FLOPs and bytes at the measured ceilings of the machine, over our time. Above 100 % the call needed less than
  was counted: data came from a cache, or cheaper operations did part of the work.
* "Run" names the file; [Runs](#runs) has its machine, date, commit and the cores that other processes used meanwhile. Of a row that was measured more than
  once the newest is shown, and an older one that timed a contender which the newest did not.

`make report` measures the series of lengths on this machine and writes this page; `{COMMAND}` only writes it.
"""


def page(folder: Path = RESULTS) -> str:
    """The text of docs/benchmarks.md."""
    measured, other = by_machine(folder), page_models.others(folder)
    parts = [HEAD, _gpus(measured), "## In short"]
    for machine in measured:
        parts += [f"### {machine.name}", _picture(f"{machine.name}-summary", "Peers' times over ours, by operator")]
        parts += ["Float32, medians over all recorded shapes of an operator.", summary(_standings(machine.newest))]
    for family in families().values():
        parts.append(
            f"## {TITLES[family.name]}\n\nWhat it is and when it pays: [{TITLES[family.name]}]({family.name}.md)."
        )
        for machine in measured:
            if any(row["family"] == family.name for row, _ in machine.shown):
                parts += [f"### {TITLES[family.name]}, {machine.name}", *_drawn(family, machine)]
                parts.append(operators(family, machine.shown))
    parts += ["## Models and papers' kernels", page_models.section(other)]
    parts.append(
        "## Where a peer is faster\n\nOf whole models and of the shift-add paper's shapes see the bold cells [above](#models-and-papers-kernels)."
    )
    for machine in measured:
        parts += [f"### Losses, {machine.name}", losses(machine.shown)]
    parts += [
        '## Runs\n\nA "+" after a commit: tracked files of the checkout differed from it. "Cores used by others" far from 0: '
        "trust ratios more than milliseconds.",
        run_list(sorted(runs(folder), key=lambda run: (run.machine, run.path.name))),
        page_models.runs(other),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _gpus(measured: list[Machine]) -> str:
    gpus = [machine.name for machine in measured if any(run.about["gpu"] for _, run in machine.newest)]
    if gpus:
        return f"GPUs that have run this: {', '.join(gpus)}."
    return "**No GPU has run this**: there are times of CPUs only."


def _standings(rows: Newest) -> list[Standing]:
    return [standing for family in families().values() for standing in standings(family, rows)]


def _picture(name: str, text: str) -> str:
    return f"![{text}](images/benchmarks/{name}.png)"


def _drawn(family: Family, machine: Machine) -> list[str]:
    """The family's picture, and what is missing from it."""
    drawn = pictures.panels(family, machine.newest)
    parts = [_picture(f"{machine.name}-{family.name}", f"{TITLES[family.name]}: time against length")] if drawn else []
    have = {(sweep.title, direction) for sweep, direction, _ in drawn}
    wanted = [(sweep.title, direction) for sweep in family.sweeps for direction in pictures.passes(sweep)]
    lacking = [
        f"{title}, {pictures.PASSES[direction]}" for title, direction in wanted if (title, direction) not in have
    ]
    if lacking:
        parts.append(
            f"Not drawn, for fewer than {FEWEST} of its lengths have been measured on this machine: {'; '.join(lacking)}. "
            f"`python -m effattn bench --sweep {family.name}` measures them."
        )
    return parts


def write_pictures(folder: Path = RESULTS, into: Path = IMAGES) -> list[Path]:
    written = []
    for name, newest, _ in by_machine(folder):
        for family in families().values():
            if pictures.panels(family, newest):
                written.append(into / f"{name}-{family.name}.png")
                pictures.draw_family(family, newest, written[-1])
        written.append(into / f"{name}-summary.png")
        pictures.draw_summary(_standings(newest), newest, written[-1])
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    options = parser.parse_args(argv)
    if not RESULTS.is_dir():
        parser.error(f"there is no {RESULTS}: the page is written in a checkout")
    text = page()
    if options.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            print(f"{PAGE} is not what bench/results gives; run: {COMMAND}", file=sys.stderr)
            return 1
        return 0
    kept = write_pictures()
    for stale in set(IMAGES.glob("*.png")) - set(kept):
        stale.unlink()
    write_atomically(PAGE, lambda name: Path(name).write_text(text))
    print(f"written: {PAGE} and {len(kept)} pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
