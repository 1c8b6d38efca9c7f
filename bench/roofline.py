"""Writes docs/roofline.md and its picture from bench/results: python -m effattn.bench.roofline [--check]

How near every recorded row of ours comes to what the machine can do: the least time by FLOPs and bytes at the ceilings
measured in the row's own run, over the time measured. --check exits 1 if the committed page is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from effattn._files import write_atomically

from . import recorded
from .cases import OURS, families
from .ceilings import Ceilings
from .roofline_reasons import ABOVE, BELOW, Reason

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
PICTURE = "images/roofline.png"
LOW = 0.5  # of the ceiling, below which a row needs a reason
TRAINING = "forward+backward"

# Twice the multiply-adds per channel of a token beside both products: LePE's 3 x 3 taps, LCE's 5 x 5.
TAPS = {"cross_shaped_window": 18.0, "manhattan decomposed, LCE": 50.0}
COUNTS_BITS = {"binary_matmul"}  # its FLOPs are not multiply-adds: only bytes bind it

# 2^(x - c) per second on one thread, float32 and bfloat16, of runs from before the probe measured it: docs/cpu_engine.md
# has 1.98 and 1.8 ns per vector of 16.
EXP2_BY_HAND = {"amd-epyc-zen4-2-cores": (16 / 1.98e-9, 16 / 1.8e-9)}


class Point(NamedTuple):
    """One row: work, time and limits in seconds."""

    machine: str
    row: dict
    ms: float
    noise: float
    flops_limit: float
    bytes_limit: float
    exponentials_limit: float  # 0: no softmax, or their rate is not known

    @property
    def intensity(self) -> float:
        return self.row["flops"] / self.row["bytes"]

    @property
    def share(self) -> float:
        return 1e3 * max(self.flops_limit, self.bytes_limit) / self.ms

    @property
    def share_with_exponentials(self) -> float:
        """The exponentials' time is added to that of the multiply-adds: both need the multipliers."""
        return 1e3 * max(self.flops_limit + self.exponentials_limit, self.bytes_limit) / self.ms

    @property
    def bound(self) -> str:
        return "FLOPs" if self.flops_limit >= self.bytes_limit else "bytes"

    @property
    def keys(self) -> float:
        """That a query meets in one softmax; decomposed attention has two, along rows and columns."""
        batch, heads, tokens, _ = self.row["shape"]
        softmaxes = (2 if "decomposed" in self.row["operator"] else 1) * (2 if self.row["direction"] == TRAINING else 1)
        return exponentials(self.row) / (batch * heads * tokens * softmaxes)


def exponentials(row: dict) -> float:
    """How many a row computes: one a score, and again in the backward pass."""
    operator = families()[row["family"]].operators[row["operator"]]
    training = row["direction"] == TRAINING
    forward = row["flops"] / (operator.training if training else 1.0)
    batch, heads, tokens, head_dim = row["shape"]
    channels = batch * heads * tokens * head_dim
    if row["operator"] == "soft_merge":
        count = forward / (2 * head_dim)
    elif _has_softmax(row):
        count = (forward - TAPS.get(row["operator"], 0.0) * channels) / (4 * head_dim)
    else:
        count = 0.0
    return count * (2 if training else 1)


def _has_softmax(row: dict) -> bool:
    operator = row["operator"]
    if row["family"] == "retention":
        return operator.startswith("manhattan")
    if row["family"] == "toeplitz":
        return operator == "urpe"
    return row["family"] != "shift_add" and operator not in ("soft_merge", "match and merge")


def points(folder: Path = recorded.RESULTS) -> list[Point]:
    """The newest measurement of every row, machine by machine; machines without ceilings (GPUs) are left out."""
    runs = recorded.runs(folder)
    found = []
    for machine in sorted({run.machine for run in runs}):
        own = [run for run in runs if run.machine == machine]
        rates = _exp2_rates(machine, own)
        for row, run in recorded.newest_rows(own).values():
            result = row["results"].get(OURS) or {}
            if result.get("ms") and run.ceilings.copy and not run.ceilings.problem:
                found.append(_point(machine, row, result, run.ceilings, rates))
    return sorted(found, key=lambda p: (p.machine, p.row["family"], p.row["operator"], p.row["direction"]))


def _exp2_rates(machine: str, runs: list) -> tuple[float, float]:
    """Of float32 and bfloat16 on all threads, 0 if unknown."""
    measured = [run.ceilings for run in runs if run.ceilings.exp2]
    if measured:
        return measured[-1].exp2, measured[-1].exp2_bf16
    threads = max((run.ceilings.threads for run in runs), default=0)
    return tuple(threads * rate for rate in EXP2_BY_HAND.get(machine, (0.0, 0.0)))


def _point(machine: str, row: dict, result: dict, ceilings: Ceilings, rates: tuple[float, float]) -> Point:
    coarse = row["dtype"] == "bfloat16" and ceilings.bf16
    peak, rate = (ceilings.bf16, rates[1]) if coarse else (ceilings.fp32, rates[0])
    low, high = result["quartiles"]
    flops = 0.0 if row["operator"] in COUNTS_BITS else row["flops"] / peak
    return Point(
        machine,
        row,
        result["ms"],
        (high - low) / result["ms"],
        flops,
        row["bytes"] / ceilings.copy,
        exponentials(row) / rate if rate else 0.0,
    )


def reason(point: Point, reasons: tuple[Reason, ...]) -> Reason | None:
    """The first that speaks of this row."""
    return next((found for found in reasons if found.holds(point)), None)


# ---- page ----

HEADER = f"""\
<!-- Made by `python -m effattn.bench.roofline` from bench/results. Do not edit. -->

# Roofline

How near each recorded row of ours comes to what its machine can do. Every row is the newest run of it in
[bench/results](../bench/results/README.md), held against the ceilings that the probe (`bench/probe.cpp`) measured in that run: bandwidth of
copying, and the peak of multiply-adds of the dtype.

* **FLOPs**: those of the formula, a multiply-add is two. A training step of attention has 3.5 times the forward's, for it recomputes the scores.
* **Bytes**: every input read once, every result written once; a training step also reads again what it saved.
* **FLOP/B**: arithmetic intensity, the one over the other. **Bound by**: which of both takes longer at its ceiling.
* **Share**: the time at that ceiling over the time measured. Below {LOW:.0%} it is followed by the letter of a reason.
* **With exp**: the same with the time of softmax's exponentials, 2^(x - c) of the kernels' own precision, added to that of the multiply-adds. They
  need the same multipliers, so that a kernel without any waste would reach 100 % here and less of the plain share.

Results that lie in the cache when a call begins can beat the bandwidth of copying. A tilde marks a noisy row, quartiles further apart than 15 % of
the median. No GPU has been measured.

![roofline]({PICTURE})
"""


def page(found: list[Point]) -> str:
    machines = dict.fromkeys(point.machine for point in found)
    sections = (_machine([point for point in found if point.machine == machine]) for machine in machines)
    return "\n".join([HEADER, *sections]) + "\n"


def _machine(found: list[Point]) -> str:
    low = [point for point in found if point.share < LOW]
    letters = {why: _letter(n) for n, why in enumerate(w for w in BELOW if any(reason(p, BELOW) is w for p in low))}
    lines = [f"## {found[0].machine}", ""]
    lines.append(f"{len(found)} rows, {len(low)} of them below {LOW:.0%}. Ceilings: {_ceilings(found)}.")
    for family in dict.fromkeys(point.row["family"] for point in found):
        lines += ["", f"### {family}", ""]
        lines.append("| operator | case | dtype | pass | GFLOP | MB | FLOP/B | bound by | ms | share | with exp |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        lines += [_line(point, letters) for point in found if point.row["family"] == family]
    if letters:
        lines += ["", f"## Why below {LOW:.0%}", ""]
        lines.append(PROFILED)
        lines += ["", "| | rows | why | tried |", "| --- | --- | --- | --- |"]
        for why, letter in letters.items():
            count = sum(reason(point, BELOW) is why for point in low)
            lines.append(f"| **{letter}** | {why.what} ({count}) | {why.why} | {why.tried} |")
    above = [why for why in ABOVE if any(p.share > 1 and reason(p, ABOVE) is why for p in found)]
    if above:
        lines += ["", "## Why above 100 %", ""]
        lines += [f"* {why.what}: {why.why}" for why in above]
    return "\n".join(lines)


PROFILED = """\
Profiles are CPU time of one thread, sampled on another machine: an Intel Xeon with AVX-512 that others kept busy. "Not explained" are rows that neither
profile nor notes account for; some were recorded on older kernels and wait for the next run."""


def _ceilings(found: list[Point]) -> str:
    """The range of each over the runs."""

    def span(unit: str, rates: list[float]) -> str:
        low, high = (f"{1e-9 * rate:.3g}" for rate in (min(rates), max(rates)))
        return f"{low if low == high else f'{low} to {high}'} {unit}" if rates else "-"

    parts = [f"copy {span('GB/s', [point.row['bytes'] / point.bytes_limit for point in found])}"]
    for dtype in ("float32", "bfloat16"):
        own = [point for point in found if point.row["dtype"] == dtype]
        flops = [point.row["flops"] / point.flops_limit for point in own if point.flops_limit]
        exps = [exponentials(point.row) / point.exponentials_limit for point in own if point.exponentials_limit]
        if flops:
            parts.append(f"{dtype} {span('GFLOP/s', flops)}")
        if exps:
            parts.append(f"its exponentials {span('G/s', exps)}")
    return ", ".join(parts)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _letter(n: int) -> str:
    return chr(ord("a") + n)


def _line(point: Point, letters: dict[Reason, str]) -> str:
    row = point.row
    why = letters.get(reason(point, BELOW)) if point.share < LOW else None
    noisy = "~" if point.noise > 0.15 else ""
    cells = [
        row["operator"],
        row["case"],
        {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[row["dtype"]],
        row["direction"].replace("+", " + "),
        _number(row["flops"] / 1e9),
        _number(row["bytes"] / 1e6),
        _number(point.intensity),
        point.bound,
        noisy + _number(point.ms),
        f"{point.share:.0%}{f' **{why}**' if why else ''}",
        f"{point.share_with_exponentials:.0%}" if point.exponentials_limit else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effattn.bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/roofline.md is stale")
    options = parser.parse_args(argv)
    found = points()
    text = page(found)
    if options.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            print("docs/roofline.md is stale; run: python -m effattn.bench.roofline", file=sys.stderr)
            return 1
        return 0
    from . import roofline_picture

    write_atomically(PAGE, lambda name: Path(name).write_text(text))
    write_atomically(PAGE.parent / PICTURE, lambda name: roofline_picture.draw(found, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
