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
from .standing import Newest, Standing, by_machine, standings

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

Every number below comes from JSON in [bench/results](../bench/results/README.md), written by the benchmark and not edited. A row is one
shape in one dtype and pass; in it all contenders were checked against a float64 reference and then timed in turns. Reported are medians. A dagger (†) marks a median whose
quartiles are further apart than 15 % of it, a double dagger (‡) one call instead of a median. In brackets is a peer's time over ours: above 1x
ours is faster; where the peer is faster the cell is **bold**. "Of the limit" is the least time by FLOPs and bytes at the machine's measured ceilings over our
time; above 100 % the data stayed in a cache, which the copy bandwidth does not know of. The last column names the run; [Runs](#runs) gives its machine, date, commit and the cores that
other processes used meanwhile.
Of rows measured more than once the newest is shown. `make report` measures and writes all of this anew.
"""


def page(folder: Path = RESULTS) -> str:
    """The text of docs/benchmarks.md."""
    measured, other = by_machine(folder), page_models.others(folder)
    parts = [HEAD, _gpus(measured), "## In short"]
    for machine, rows in measured.items():
        parts += [f"### {machine}", _picture(f"{machine}-summary", "Ratios of peers' times to ours, by operator")]
        parts += ["Float32, over all recorded shapes of each operator.", summary(_standings(rows))]
    for family in families().values():
        parts.append(f"## {TITLES[family.name]}\n\nWhat it is and when it pays: [{TITLES[family.name]}]({family.name}.md).")
        for machine, rows in measured.items():
            if any(row["family"] == family.name for row, _ in rows):
                parts += [f"### {TITLES[family.name]}, {machine}", *_drawn(family, machine, rows), operators(family, rows)]
    parts += ["## Models and papers' kernels", page_models.section(other)]
    parts.append("## Where a peer is faster")
    for machine, rows in measured.items():
        parts += [f"### Losses, {machine}", losses(rows)]
    parts += [
        '## Runs\n\nA "+" after a commit: tracked files of the checkout differed from it. "Cores used by others" far from 0: '
        "trust ratios more than milliseconds.",
        run_list(sorted(runs(folder), key=lambda run: (run.machine, run.path.name))),
        page_models.runs(other),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _gpus(measured: dict[str, Newest]) -> str:
    gpus = [machine for machine, rows in measured.items() if any(run.about["gpu"] for _, run in rows)]
    if gpus:
        return f"GPUs that have run this: {', '.join(gpus)}."
    return "**No GPU has run this**: there are times of CPUs only."


def _standings(rows: Newest) -> list[Standing]:
    return [standing for family in families().values() for standing in standings(family, rows)]


def _picture(name: str, text: str) -> str:
    return f"![{text}](images/benchmarks/{name}.png)"


def _drawn(family: Family, machine: str, rows: Newest) -> list[str]:
    """The family's picture, and what is missing from it."""
    drawn = pictures.panels(family, rows)
    parts = [_picture(f"{machine}-{family.name}", f"{TITLES[family.name]}: time against length")] if drawn else []
    have = {(sweep.title, direction) for sweep, direction, _ in drawn}
    wanted = [(sweep.title, direction) for sweep in family.sweeps for direction in pictures.passes(sweep)]
    lacking = [f"{title}, {pictures.PASSES[direction]}" for title, direction in wanted if (title, direction) not in have]
    if lacking:
        parts.append(
            f"Not drawn, for fewer than {FEWEST} of its lengths have been measured on this machine: {'; '.join(lacking)}. "
            f"`python -m effattn bench --sweep {family.name}` measures them."
        )
    return parts


def write_pictures(folder: Path = RESULTS, into: Path = IMAGES) -> list[Path]:
    written = []
    for machine, rows in by_machine(folder).items():
        for family in families().values():
            if pictures.panels(family, rows):
                written.append(into / f"{machine}-{family.name}.png")
                pictures.draw_family(family, rows, written[-1])
        written.append(into / f"{machine}-summary.png")
        pictures.draw_summary(_standings(rows), rows, written[-1])
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    options = parser.parse_args(argv)
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
