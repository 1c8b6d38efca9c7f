"""``python -m effattn bench --compare BASE.json HEAD.json``: is head slower than base?

With ``--base DIRECTORY`` both are measured first, interleaved, and written to the two files.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import effattn
from effattn._files import INTERRUPTED

from . import pairs, ratios, report
from .cases import OURS
from .load import ForeignLoad
from .runner import FULL, QUICK

THRESHOLD = 0.03
FEWEST_LAUNCHES = 3
FASTER, SLOWER, SAME, FEW = "faster", "slower", "no difference", "too few samples"
APART = """\
These are two runs, one after the other: what the machine did between them is not in the intervals, and ratios near 1
may be its doing. `--base DIRECTORY` measures interleaved."""


class Compared(NamedTuple):
    name: str
    ratio: ratios.Ratio | None
    verdict: str
    base_ms: float
    head_ms: float


class Comparison(NamedTuple):
    interleaved: bool
    rows: list[Compared]
    overall: ratios.Ratio | None
    remarks: list[str]
    broken: list[str]  # rows that head does not compute, or computes to something else


def add_arguments(parser) -> None:
    group = parser.add_argument_group("comparison of two versions")
    files = ("BASE.json", "HEAD.json")
    group.add_argument("--compare", nargs=2, metavar=files, help="compare two result files; exit status 1 if slower")
    group.add_argument(
        "--base",
        metavar="DIRECTORY",
        help="first measure the effattn in DIRECTORY and this one, interleaved, into them",
    )
    group.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="slower by how much is a failure, default %(default)s"
    )
    group.add_argument(
        "--launches",
        type=int,
        default=pairs.LAUNCHES,
        help=f"of either process, at least {FEWEST_LAUNCHES}; default %(default)s",
    )
    group.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of one thread, for a machine that others use; default %(default)s",
    )


def complaint(options) -> str:
    """What is wrong with the options of the comparison, or nothing."""
    if options.base and not options.compare:
        return "--base needs --compare BASE.json HEAD.json, the files to write"
    if options.base and not (Path(options.base) / "effattn" / "__init__.py").exists():
        return f"--base {options.base}: there is no effattn/__init__.py in it"
    if options.base and options.device != "cpu":
        return "--base measures on the CPU only"
    if options.launches < FEWEST_LAUNCHES:
        return f"--launches must be at least {FEWEST_LAUNCHES}, not {options.launches}"
    if options.clock == "cpu" and options.threads != 1:
        return "--clock cpu needs --threads 1: waiting threads use CPU time"
    if options.threshold < 0:
        return f"--threshold must not be negative, not {options.threshold}"
    return ""


def run(options, plan: list) -> int:
    """Measure if asked to, compare, print; 1 if head is slower by more than the threshold."""
    try:
        if options.base:
            print(f"{len(plan)} rows, {options.launches} launches", file=sys.stderr)
            for path, content in zip(options.compare, _measured(options, plan)):
                report.write_json(content, path)
        comparison = compare(*(_load(path) for path in options.compare))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(table(comparison, options.threshold))
    return 1 if comparison.broken or failures(comparison, options.threshold) else 0


# ---- measuring ----


def _measured(options, plan: list) -> list[dict]:
    trees = Path(options.base).resolve(), Path(effattn.__file__).resolve().parent.parent
    effort, load = QUICK if options.quick else FULL, ForeignLoad()
    how = {"threads": options.threads, "launches": options.launches, "clock": options.clock}
    found = pairs.measure(plan, trees, effort=effort, progress=_say, **how)
    pairing = {"id": os.urandom(8).hex(), **how}
    about, others = report.machine("cpu", options.threads), load.cores()
    return [
        {
            "machine": {**about, "commit": report.commit(tree), "effattn": found.versions[side]},
            "complete": True,
            "cores_used_by_others": others,
            "pairing": {**pairing, "side": name},
            "rows": [_row_as_json(pair, side) for pair in found.pairs],
        }
        for side, (name, tree) in enumerate(zip(("base", "head"), trees))
    ]


def _say(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def _row_as_json(pair: pairs.Pair, side: int) -> dict:
    launches = [[float(f"{1e3 * seconds:.4g}") for seconds in launch] for launch in pair.samples[side]]
    return {
        "family": pair.family.name,
        **report.case_as_json(pair.case, pair.dtype, pair.direction),
        "results": {OURS: {"launches_ms": launches, "note": pair.note}},
    }


# ---- comparing ----


def _load(path: str) -> dict:
    try:
        content = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError(f"{path} is not a result of python -m effattn bench --json")
    return content


def _rows(content: dict) -> dict[str, dict]:
    """Our result of every row by the row's name."""
    found = {}
    for row in content["rows"]:
        name = f"{row['operator']} {row['case']} {row['dtype']} {row['direction']}"
        found[name] = row["results"].get(OURS, {})
    return found


def compare(base: dict, head: dict) -> Comparison:
    """Row by row; interleaved if the two were measured together."""
    pairings = [content.get("pairing") or {} for content in (base, head)]
    interleaved = bool(pairings[0]) and pairings[0]["id"] == pairings[1].get("id")
    if interleaved and [pairing["side"] for pairing in pairings] != ["base", "head"]:
        raise ValueError("the files are given in the wrong order: base is to be first")
    field = "launches_ms" if interleaved else "times_ms"
    ours, theirs = _rows(head), _rows(base)
    names, remarks, broken, samples = [], _differences(base, head), [], []
    for name in theirs:
        sides = [theirs[name], ours.get(name, {})]
        note = next((side["note"] for side in sides if side.get("note")), "")
        if note:
            (remarks if note.startswith("base:") else broken).append(f"{name}: {note}")
        elif name in ours:
            names.append(name)
            samples.append([_samples(side, field, name) for side in sides])
    missing = len(ours.keys() ^ theirs.keys())
    if missing:
        remarks.append(f"{missing} rows are in one of the files only")
    if not names and not broken:
        raise ValueError("the two files have no row in common")
    return _verdicts(names, samples, interleaved, remarks, broken)


def _samples(result: dict, field: str, name: str) -> list:
    found = result.get(field) or list(chain.from_iterable(result.get("launches_ms", ())))
    if not found:
        raise ValueError(f"{name} has no samples: files of before --compare keep only quartiles, measure again")
    return found


def _differences(base: dict, head: dict) -> list[str]:
    """What differs between the two runs beside the commit."""
    fields = ("cpu", "gpu", "cores", "threads", "torch", "torch_cpu_capability")
    pairs_of = ((field, base["machine"].get(field), head["machine"].get(field)) for field in fields)
    return [f"{field} differs: {a} and {b}" for field, a, b in pairs_of if a != b]


def _verdicts(names, samples, interleaved, remarks, broken) -> Comparison:
    ratio, overall = (ratios.paired, ratios.paired_overall) if interleaved else (ratios.apart, ratios.apart_overall)
    fewest = FEWEST_LAUNCHES if interleaved else ratios.FEWEST
    enough = [min(map(len, row)) >= fewest for row in samples]
    found = {name: ratio(*row) for name, row, known in zip(names, samples, enough) if known}
    significant = dict(zip(found, ratios.holm([r.p for r in found.values()])))
    rows = []
    for name, row in zip(names, samples):
        medians = [statistics.median(chain.from_iterable(side) if interleaved else side) for side in row]
        if name not in found:
            verdict = FEW
        elif significant[name] > ratios.LEVEL:
            verdict = SAME
        else:
            verdict = SLOWER if found[name].value > 1 else FASTER
        rows.append(Compared(name, found.get(name), verdict, *medians))
    kept = [row for row, known in zip(samples, enough) if known]
    return Comparison(interleaved, rows, overall(kept) if kept else None, remarks, broken)


def failures(comparison: Comparison, threshold: float) -> list[Compared]:
    """Rows that are significantly slower, by more than the threshold."""
    return [row for row in comparison.rows if row.verdict == SLOWER and row.ratio.value > 1 + threshold]


def table(comparison: Comparison, threshold: float) -> str:
    width = max((len(row.name) for row in comparison.rows), default=0) + 2
    lines = [f"{'':<{width}}{'base ms':>10}{'head ms':>10}{'head/base':>11}  95 % interval"]
    failed = failures(comparison, threshold)
    for row in comparison.rows:
        interval = f"{row.ratio.value:>11.3f}  {row.ratio.low:.3f} to {row.ratio.high:.3f}" if row.ratio else " " * 27
        mark = f", by more than {threshold:.0%}" if row in failed else ""
        lines.append(f"{row.name:<{width}}{row.base_ms:>10.3f}{row.head_ms:>10.3f}{interval}  {row.verdict}{mark}")
    if comparison.overall:
        mean, low, high, _ = comparison.overall
        lines.append(f"{'geometric mean':<{width}}{'':>20}{mean:>11.3f}  {low:.3f} to {high:.3f}")
    lines += ["", *comparison.broken, *comparison.remarks]
    lines.append("Measured interleaved, in the same launches." if comparison.interleaved else APART)
    lines.append(
        "An interval is for its row alone. Verdicts are for the table: the chance that any row which did not change is "
        f"called slower or faster is at most {ratios.LEVEL:.0%} (Holm)."
    )
    if comparison.rows:
        lines.append(f"{len(failed)} of {len(comparison.rows)} rows are slower by more than {threshold:.0%}.")
    return "\n".join(lines)
