"""A run's results: the table that is printed and the JSON that is kept."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

import effattn
from effattn._files import write_atomically

from .cases import BACKWARD, OURS, Case
from .ceilings import Ceilings
from .overhead import STOCK
from .runner import Row

NOISY = 0.15  # quartile distance over median beyond which a time is marked
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Report(NamedTuple):
    machine: dict
    ceilings: Ceilings
    rows: list[Row]
    overhead_us: dict[str, float]
    import_ms: float | None
    complete: bool
    foreign_load: float | None  # cores that other processes used during the run


def machine(device: str, threads: int) -> dict:
    """Where and on what the figures were taken."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "effattn": effattn.__version__,
        "commit": commit(Path(__file__).resolve().parent.parent),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError, KeyError), open("/proc/cpuinfo") as lines:
        fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        return f"{fields['model name']} (family {fields['cpu family']} model {fields['model']})"
    return platform.processor() or platform.machine()


def commit(root: Path) -> str | None:
    """The commit of the checkout ``root``, with "+" if tracked files other than results and pages differ; None of an installed tree."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):

        def git(*arguments):
            return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

        if Path(git("rev-parse", "--show-toplevel").strip()) == root:
            others = (":(top)", ":(top,exclude)bench/results", ":(top,exclude)docs")
            changed = git("status", "--porcelain", "--untracked-files=no", "--", *others).strip()
            return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    return None


# ---- JSON ----


def as_json(report: Report) -> dict:
    return {
        "machine": report.machine,
        "complete": report.complete,
        "cores_used_by_others": report.foreign_load,
        "ceilings": report.ceilings._asdict(),
        "memory_method": "peak resident set during one call above that before it; see effattn/bench/memory.py",
        "rows": [_row_as_json(row, report.ceilings) for row in report.rows],
        "overhead_us": report.overhead_us,
        "import_ms": report.import_ms,
    }


def _row_as_json(row: Row, ceilings: Ceilings) -> dict:
    floor = ceilings.floor(row.flops, row.bytes, row.dtype)
    results = {}
    for name, result in row.results.items():
        entry = result._asdict()
        entry["ratio_to_effattn"] = row.ratio(name)
        entry["ceiling_share"] = 1e3 * floor / result.ms if result.ms else None
        results[name] = entry
    return {
        "family": row.family,
        **case_as_json(row.case, row.dtype, row.direction),
        "flops": row.flops,
        "bytes": row.bytes,
        "floor_ms": 1e3 * floor,
        "results": results,
    }


def case_as_json(case: Case, dtype: torch.dtype, direction: str) -> dict:
    return {
        "operator": case.operator,
        "case": case.name,
        "shape": case.shape,
        "grid": case.grid,
        "num_prefix_tokens": case.num_prefix_tokens,
        "photographs": case.photograph,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": "forward+backward" if direction == BACKWARD else direction,
    }


def write_json(content: dict, path: str) -> None:
    """Indented, but a list of numbers on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[([\d\s.,e+-]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(path, lambda name: Path(name).write_text(text + "\n"))


# ---- table ----

_CASE, _PEER = 31, 16


def table(report: Report) -> str:
    lines = [str(report.ceilings), ""]
    for (family, operator, direction, dtype), rows in groupby(report.rows, key=_section):
        rows = list(rows)
        peers = list(dict.fromkeys(name for row in rows for name in row.results if name != OURS))
        title = operator if operator == family else f"{family}, {operator}"
        lines.append(f"{title}, {'forward + backward' if direction == BACKWARD else direction}, {SHORT[dtype]}")
        header = f"  {'B x H x N x D':<{_CASE}}{OURS + ' ms':>12}" + "".join(f"{p:>{_PEER}}" for p in peers)
        lines.append(f"{header}{'% ceiling':>11}{'extra MB':>10}")
        lines += [_line(row, peers, report.ceilings) for row in rows]
        lines.append("")
    notes = dict.fromkeys(
        f"  {name}: {result.note}" for row in report.rows for name, result in row.results.items() if result.note
    )
    if notes:
        lines += ["left out (-)", *notes, ""]
    if report.rows:
        lines += [
            "Peers: ms, and how many times our time that is. ~: quartiles further apart than 15 % of the median.",
            "% ceiling: least time by FLOPs and bytes at the measured ceilings, over our time.",
            "extra MB: our peak memory above the inputs, results included.",
        ]
    if report.overhead_us:
        stock = report.overhead_us[STOCK]
        lines += ["", f"a call on 1 x 1 x 16 x 16, where all is overhead: {STOCK} {stock:.1f} us, and above it"]
        ours = sorted(((us - stock, name) for name, us in report.overhead_us.items() if name != STOCK), reverse=True)
        lines += [f"  {name:<32}{us:5.1f} us" for us, name in ours]
    if report.import_ms is not None:
        lines.append(f"import effattn after torch: {report.import_ms:.0f} ms")
    if report.foreign_load is not None and report.foreign_load > 0.1:
        lines.append(f"NOISE: other processes kept {report.foreign_load:.1f} cores busy during this run.")
    return "\n".join(lines)


def _section(row: Row):
    return row.family, row.case.operator, row.direction, row.dtype


def _line(row: Row, peers: list[str], ceilings: Ceilings) -> str:
    ours = row.results.get(OURS)
    cells = f"  {row.case.name:<{_CASE}}"
    cells += f"{_time(ours):>12}" if ours and ours.ms else f"{'-':>12}"
    for peer in peers:
        result, ratio = row.results.get(peer), row.ratio(peer)
        text = "-" if not result or not result.ms else _time(result) + (f" {ratio:5.2f}x" if ratio else "")
        cells += f"{text:>{_PEER}}"
    floor = ceilings.floor(row.flops, row.bytes, row.dtype)
    share = f"{1e5 * floor / ours.ms:.0f} %" if floor and ours and ours.ms else "-"
    extra = f"{ours.memory / 1e6:.1f}" if ours and ours.memory is not None else "-"
    return f"{cells}{share:>11}{extra:>10}"


def _time(result) -> str:
    ms = result.ms
    text = f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"
    return ("~" if result.noise > NOISY else "") + text
