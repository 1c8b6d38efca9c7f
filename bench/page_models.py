"""Markdown of whole models and of the shift-add paper's kernel shapes, out of the JSON of those programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .page_tables import NONE, provenance, table
from .pictures import times
from .standing import noisy

EAGER, OURS = "eager", "effattn"


class Other(NamedTuple):
    """A file of ``python -m effattn.bench.models`` or of ``shift_add_honesty``."""

    path: Path
    content: dict


def others(folder: Path) -> list[Other]:
    """Those whose format today's programs write, by machine."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        if "problems" in content or "model" in next(iter(content.get("comparisons", ())), ()):
            found.append(Other(path, content))
    return found


def section(found: list[Other]) -> str:
    parts = []
    for one in found:
        write = _models if "comparisons" in one.content else _kernels
        parts.append(write(one))
    return "\n\n".join(parts)


def runs(found: list[Other]) -> str:
    header = ["run", "machine", "threads", "date", "commit", "torch", "cores used by others"]
    return table(header, (provenance(o.path, o.content["about"], o.content["foreign_cores"]) for o in found))


def _speed(one: dict, form: str) -> str:
    return f"{one['images_per_second'][form]:.3g}" + ("†" if noisy(one["results"][form]) else "")


def _models(file: Other) -> str:
    header = ["model", "pass", "batch", "effattn", "eager", "ratio", "if our operators took no time", "other forms"]
    lines = []
    for one in file.content["comparisons"]:
        rest = [form for form in one["results"] if form not in (OURS, EAGER)]
        beside = ", ".join(f"{form} {_speed(one, form)} ({_ratio(one['ratio'][form])})" for form in rest) or NONE
        cells = [f"{one['model']}, {one['pixels']} pixels", one["direction"], str(one["batch"])]
        cells += [_speed(one, OURS), _speed(one, EAGER), _ratio(one["ratio"][EAGER])]
        lines.append([*cells, times(one["ratio_if_our_operators_took_no_time"]), beside])
    slower = sum(one["ratio"][form] < 1 for one in file.content["comparisons"] for form in one["results"])
    return (
        f"### Whole models, {file.path.parent.name}\n\nImages per second on photographs, float32; in brackets and under ratio, "
        f"how many times as many ours classifies or trains on. Ours has fewer in {slower} comparisons. "
        f"What the models are: [Models](models.md).\n\n{table(header, lines)}"
    )


def _ratio(ratio: float) -> str:
    return f"**{ratio:.2f}x**" if ratio < 1 else f"{ratio:.2f}x"


def _kernels(file: Other) -> str:
    lines, slower = [], 0
    for problem in file.content["problems"]:
        named = {one["name"]: one for one in problem["contenders"]}
        for one in problem["contenders"]:
            if one["rival"] and one["rival_over_it"] and named[one["rival"]]["ms"]:
                slower += one["rival_over_it"] < 1
                cells = [
                    problem["kind"],
                    problem["name"],
                    one["name"],
                    _ms(one),
                    one["rival"],
                    _ms(named[one["rival"]]),
                ]
                lines.append([*cells, _ratio(one["rival_over_it"])])
    header = ["kind", "shape", "effattn", "its ms", "rival", "rival's ms", "rival's time over ours"]
    return (
        f"### The shift-add paper's kernel shapes, {file.path.parent.name}\n\n`python -m effattn.bench.shift_add_honesty`: of {len(lines)} "
        f"comparisons with the rival of the same precision, the rival is faster in {slower}.\n\n{table(header, lines)}"
    )


def _ms(one: dict) -> str:
    low, high = one["quartiles_ms"]
    return f"{one['ms']:.3g}" + ("†" if noisy({"ms": one["ms"], "quartiles": (low, high)}) else "")
