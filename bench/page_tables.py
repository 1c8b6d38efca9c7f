"""Markdown of the report's tables, every number out of recorded JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from .cases import OURS, Family
from .pictures import PASSES, times
from .plot import NAMES, OPERATORS
from .recorded import Run
from .standing import Against, Newest, Standing, against, is_own, noisy, timed

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NONE = "-"


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def milliseconds(result: dict) -> str:
    ms = result["ms"]
    text = f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"
    return text + ("†" if noisy(result) else "") + ("‡" if result["samples"] == 1 else "")


def name_of(run: Run) -> str:
    return run.path.stem


# ---- one family ----


def operators(family: Family, rows: Newest) -> str:
    """A table for every operator of the family that has been measured."""
    parts = []
    for operator in family.operators:
        of_operator = ((row, run) for row, run in rows if (row["family"], row["operator"]) == (family.name, operator))
        found = [(row, run) for row, run in of_operator if any(timed(row, name) for name in row["results"])]
        if found:
            parts += [f"#### {OPERATORS.get(operator, operator)}", _operator(found)]
            parts += _left_out(found)
    return "\n\n".join(parts)


def _operator(rows: Newest) -> str:
    rows = sorted(rows, key=lambda item: (item[0]["direction"], item[0]["dtype"] != "float32", *_size(item[0])))
    peers = dict.fromkeys(name for row, _ in rows for name in row["results"] if name != OURS and timed(row, name))
    header = ["B x H x N x D", "dtype", "pass", "effattn, ms", *(NAMES.get(p, p) for p in peers), "of the limit", "run"]
    return table(header, ([*_line(row, list(peers)), name_of(run)] for row, run in rows))


def _size(row: dict) -> tuple:
    return row["shape"][2], row["case"]


def _line(row: dict, peers: list[str]) -> list[str]:
    results = row["results"]
    cells = [row["case"], SHORT[row["dtype"]], PASSES[row["direction"]]]
    cells.append(milliseconds(results[OURS]) if timed(row) else NONE)
    for peer in peers:
        if not timed(row, peer):
            cells.append(NONE)
        elif not timed(row):
            cells.append(milliseconds(results[peer]))
        else:
            ratio = results[peer]["ms"] / results[OURS]["ms"]
            text = f"{milliseconds(results[peer])} ({times(ratio)})"
            cells.append(f"**{text}**" if ratio < 1 and not is_own(peer) else text)
    share = row["floor_ms"] / results[OURS]["ms"] if timed(row) and row["floor_ms"] else 0
    return [*cells, f"{100 * share:.0f} %" if share else NONE]


def _left_out(rows: Newest) -> list[str]:
    """Who was not timed, and why, as the runs noted it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, _ in rows:
        for name, result in row["results"].items():
            if result["note"]:
                reasons.setdefault((name, result["note"]), []).append(row["case"])
    said = []
    for (name, note), cases in reasons.items():
        where = f" ({', '.join(dict.fromkeys(cases))})" if len(set(cases)) < 3 else ""
        said.append(f"{NAMES.get(name, name)}{where}: {note}")
    return [f"Not timed: {'; '.join(said)}."] if said else []


# ---- all families ----


def summary(standings: list[Standing]) -> str:
    header = [
        "operator",
        "pass",
        "shapes",
        "over the fastest peer measured",
        "least",
        "largest",
        "over the published form in eager",
    ]
    lines = []
    for one in standings:
        least, largest = min(one.fastest), max(one.fastest)
        eager = times(median(one.eager)) if one.eager else NONE
        cells = [one.sweep.title.split(",")[0], PASSES[one.direction], str(len(one.fastest))]
        lines.append([*cells, _bold(median(one.fastest)), _bold(least), _bold(largest), eager])
    return table(header, lines)


def _bold(ratio: float) -> str:
    return f"**{times(ratio)}**" if ratio < 1 else times(ratio)


def losses(rows: Newest) -> str:
    """Every row in which a peer was faster, the largest loss first; then where another form of ours was."""
    every = list(against(rows))
    peers = [one for one in every if not is_own(one.peer)]
    lost = sorted((one for one in peers if one.ratio < 1), key=lambda one: one.ratio)
    own = sorted((one for one in every if is_own(one.peer) and one.exact and one.ratio < 1), key=lambda one: one.ratio)
    same = sum(one.exact for one in lost)
    parts = [
        f"Of {len(peers)} times of peers, {len(lost)} are shorter than ours in the same row. {same} of these are of peers whose results are "
        f"held to the same reference as ours, {len(lost) - same} of others: dense layers, lower precision, copies, attention without structure."
    ]
    if lost:
        lines = ([*_both(one), "yes" if one.exact else "no", *_doubt(one)] for one in lost)
        parts.append(table([*_LOSS, "same reference", *_DOUBT], lines))
    if own:
        parts.append(
            "Another way of ours to compute the same, which the caller has to choose, was faster than the call as it stands:"
        )
        parts.append(table([*_LOSS, *_DOUBT], ([*_both(one), *_doubt(one)] for one in own)))
    return "\n\n".join(parts)


_LOSS = ["operator", "B x H x N x D", "dtype", "pass", "effattn, ms", "faster", "its ms", "its time over ours"]
_DOUBT = ["quartiles overlap", "run"]


def _both(one: Against) -> list[str]:
    row = one.row
    cells = [row["operator"], row["case"], SHORT[row["dtype"]], PASSES[row["direction"]], milliseconds(one.ours)]
    return [*cells, NAMES.get(one.peer, one.peer), milliseconds(one.theirs), f"{one.ratio:.3f}x"]


def _doubt(one: Against) -> list[str]:
    return ["yes" if one.overlap else "no", name_of(one.run)]


def run_list(runs: list[Run]) -> str:
    header = [
        "run",
        "machine",
        "threads",
        "date",
        "commit",
        "torch",
        "cores used by others",
        "copy, GB/s",
        "fp32, GFLOP/s",
    ]
    return table(header, (_run(run) for run in runs))


def _run(run: Run) -> list[str]:
    limits = [f"{limit / 1e9:.1f}" if limit else NONE for limit in (run.ceilings.copy, run.ceilings.fp32)]
    return [*provenance(run.path, run.about, run.foreign_load), *limits]


def provenance(path: Path, about: dict, foreign: float | None) -> list[str]:
    """File, machine, threads, date, commit, torch and the load by other processes of a recorded run."""
    link = f"[{path.stem}](../bench/results/{path.parent.name}/{path.name})"
    load = NONE if foreign is None else f"{foreign:.2f}"
    machine = about["gpu"] or about["cpu"]
    return [link, machine, str(about["threads"]), about["date"][:10], about["commit"] or NONE, about["torch"], load]
