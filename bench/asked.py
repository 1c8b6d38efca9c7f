"""The figures that the project promises, beside what was measured.

``python -m effattn bench --asked`` measures every shape that has one and prints pass or miss.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from . import bench_retention as decays
from . import bench_toeplitz as toeplitz
from . import bench_token_merging as merging
from . import memory, photographs, vit
from .bench_attention import ADDITIVE, ADDITIVE_3D
from .bench_shift_add import INT8, LINEAR, LINEAR_BF16, MATMUL
from .cases import BACKWARD, FORWARD, OURS, UNMASKED, families
from .models import merging_vit, models
from .models._compare import QUICK as BRIEF
from .models._compare import compare
from .overhead import STOCK
from .window_peers import ON_WINDOWS

MIXTURE, WINDOWS, RETENTION, TOEPLITZ = "gaussian_mixture", "cross_shaped_window", "retention", "toeplitz"
MERGING = "token_merging"


class Figure(NamedTuple):
    what: str
    bound: float
    measured: float | None  # None: this run did not measure it
    at_most: bool
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def figures(report, *, build: bool) -> list[Figure]:
    """The promised figures of the families in a ``report.Report``; ``build``: also time the C++ build."""
    measured = {row.family for row in report.rows}
    found = _attention_figures(report) if measured & {MIXTURE, "attention"} else []
    if "shift_add" in measured:
        found += _shift_add_figures(report)
    if WINDOWS in measured:
        found += _window_figures(report)
    if RETENTION in measured:
        found += _retention_figures(report) + _doubling_figures(report)
    if TOEPLITZ in measured:
        found += _toeplitz_figures(report)
    if MERGING in measured:
        found += _merging_figures(report)
    if MIXTURE in measured:
        found += _memory_figures(report.ceilings.threads)
    extra, slowest = None, "slowest operator"
    if report.overhead_us:
        slowest = max(report.overhead_us, key=report.overhead_us.get)
        extra = report.overhead_us[slowest] - report.overhead_us[STOCK]
    found.append(Figure(f"call on 1x1x16x16: {slowest} above SDPA", 15.0, extra, True, "us"))
    found.append(Figure("import of effattn after torch", 50.0, report.import_ms, True, "ms"))
    found.append(Figure("full C++ build", 90.0, _build_seconds() if build else None, True, "s"))
    return found


def _attention_figures(report) -> list[Figure]:
    from .report import SHORT

    rows = {
        (r.family, r.case.operator, r.case.shape, r.dtype, r.direction): r for r in report.rows if not r.case.photograph
    }

    def speedup(operator, shape, dtype, direction, peer) -> float | None:
        family = MIXTURE if operator == MIXTURE else "attention"
        row = rows.get((family, operator, shape, dtype, direction))
        return row.ratio(peer) if row else None

    def inverse(ratio: float | None) -> float | None:
        return 1 / ratio if ratio else None

    found = []
    shapes = [case.shape for case in families()[MIXTURE].cases if case.asked]
    _, middle, large = shapes
    for dtype, bounds in ((torch.float32, (0.9, 0.9, 0.8)), (torch.bfloat16, (0.65, 0.65, 0.5))):
        name = SHORT[dtype]
        for shape, bound in zip(shapes, bounds):
            n = shape[2]
            time = inverse(speedup(MIXTURE, shape, dtype, FORWARD, UNMASKED))
            found.append(Figure(f"mixture forward {name}, N={n}: time over unmasked SDPA", bound, time, True))
            time = inverse(speedup(MIXTURE, shape, dtype, BACKWARD, UNMASKED))
            found.append(Figure(f"mixture forward+backward {name}, N={n}: time over unmasked SDPA", 1.0, time, True))
            for peer in ("torch.compile", "flex"):
                ratio = speedup(MIXTURE, shape, dtype, FORWARD, peer)
                found.append(Figure(f"mixture forward {name}, N={n}: faster than {peer} by", 1.0, ratio, False))
            ratio = speedup(MIXTURE, shape, dtype, BACKWARD, "torch.compile")
            found.append(
                Figure(f"mixture forward+backward {name}, N={n}: faster than torch.compile by", 1.0, ratio, False)
            )
        ratio = speedup(MIXTURE, large, dtype, FORWARD, "eager")
        found.append(Figure(f"mixture forward {name}, N={large[2]}: faster than eager by", 6.0, ratio, False))
        plain = 1.3 if dtype == torch.float32 else 2.0
        for shape in (middle, large):
            ratio = speedup("plain", shape, dtype, FORWARD, "torch sdpa")
            found.append(
                Figure(f"plain SDPA forward {name}, N={shape[2]}: faster than torch's by", plain, ratio, False)
            )
            for mask in (ADDITIVE_3D, ADDITIVE):
                ratio = speedup(mask, shape, dtype, FORWARD, "torch sdpa")
                found.append(Figure(f"{mask} forward {name}, N={shape[2]}: faster than torch's by", 4.0, ratio, False))
    return found


def _shift_add_figures(report) -> list[Figure]:
    """Float32 unless they say otherwise."""
    rows = {
        (r.case.operator, r.case.name, r.direction): r
        for r in report.rows
        if r.family == "shift_add" and r.dtype == torch.float32
    }

    def times(case, direction, peer, ours=OURS) -> float | None:
        """How many times ours the peer takes."""
        row = rows.get((case.operator, case.name, direction))
        found = [row.results.get(name) if row else None for name in (peer, ours)]
        return found[0].ms / found[1].ms if all(result and result.ms for result in found) else None

    figures = []
    for case in (case for case in families()["shift_add"].cases if case.asked):
        if case.operator == "attention":
            for direction, passes, bound in ((FORWARD, "forward", 5.0), (BACKWARD, "forward+backward", 2.5)):
                ratio = times(case, direction, "eager")
                what = f"shift-add attention {passes} {case.name}: faster than eager by"
                figures.append(Figure(what, bound, ratio, False))
        elif case.operator == "binary_matmul":
            ratio = times(case, FORWARD, MATMUL)
            figures.append(Figure(f"binary q k^T {case.name}: faster than matmul by", 5.0, ratio, False))
        elif case.tokens == 1:
            for peer, bound in ((LINEAR, 6.0), (LINEAR_BF16, 4.0)):
                ratio = times(case, FORWARD, peer)
                figures.append(Figure(f"shift linear {case.name}: faster than {peer} by", bound, ratio, False))
        else:
            ratio = times(case, FORWARD, LINEAR, INT8)
            figures.append(Figure(f"shift linear int8 {case.name}: faster than F.linear by", 2.0, ratio, False))
            slower = times(case, FORWARD, LINEAR)
            what = f"shift linear float {case.name}: time over F.linear"
            figures.append(Figure(what, 1.1, 1 / slower if slower else None, True))
    return figures


def _window_figures(report) -> list[Figure]:
    """Float32. Memory is of the forward pass, results included."""
    rows = {(r.case, r.direction): r for r in report.rows if r.family == WINDOWS and r.dtype == torch.float32}

    def extra(row, name) -> float | None:
        result = row.results.get(name) if row else None
        return result.memory / (4 * math.prod(row.case.output_shape)) if result and result.memory is not None else None

    figures = []
    for case in (case for case in families()[WINDOWS].cases if case.asked):
        forward, backward = (rows.get((case, direction)) for direction in (FORWARD, BACKWARD))
        for peer, bound in (("eager", 4.0), ("torch.compile", 2.0), (ON_WINDOWS, 2.0)):
            ratio = forward.ratio(peer) if forward else None
            figures.append(Figure(f"{case.label} forward: faster than {peer} by", bound, ratio, False))
        ratio = backward.ratio("eager") if backward else None
        figures.append(Figure(f"{case.label} forward+backward: faster than eager by", 2.0, ratio, False))
        eager = extra(forward, "eager")
        beside = f" (eager {eager:.1f})" if eager is not None else ""
        figures.append(
            Figure(f"{case.label} forward: extra memory over output{beside}", 1.2, extra(forward, OURS), True)
        )
    backbone = None if photographs.missing() else compare(models()["CSWin-T"], effort=BRIEF)
    what = "CSWin-T, 8 photographs: images/s over eager's"
    if backbone is None:
        return [*figures, Figure(what, 1.5, None, False)]
    what += f" (attention for free: {backbone.limit:.2f})"
    return [*figures, Figure(what, 1.5, backbone.ratio(), False)]


def _retention_figures(report) -> list[Figure]:
    """Float32."""
    rows = {(r.case, r.direction): r for r in report.rows if r.family == RETENTION and r.dtype == torch.float32}

    def times(case, peer, direction=FORWARD) -> float | None:
        row = rows.get((case, direction))
        return row.ratio(peer) if row else None

    figures = []
    for case in (case for case in families()[RETENTION].cases if case.asked):
        if case.operator == decays.RETENTION:
            for peer, bound in ((decays.CAUSAL, 15.0), (decays.PARALLEL, 100.0), (decays.CHUNKWISE, 2.5)):
                what = f"retention forward, N={case.tokens}: faster than {peer} by"
                figures.append(Figure(what, bound, times(case, peer), False))
            ratio = times(case, decays.CHUNKWISE, BACKWARD)
            what = f"retention forward+backward, N={case.tokens}: faster than {decays.CHUNKWISE} by"
            figures.append(Figure(what, 2.0, ratio, False))
        elif case.operator == decays.STEP:
            for name in (OURS, decays.INPLACE):
                share = _share_of_copying(rows.get((case, FORWARD)), name, report.ceilings.copy)
                what = f"retention_step {case.name}, {name}: share of copy bandwidth"
                figures.append(Figure(what, 0.6, share, False))
        elif case.operator == decays.FULL:
            ratio = times(case, UNMASKED)
            what = f"Manhattan forward {case.name}: time over unmasked SDPA"
            figures.append(Figure(what, 0.85, 1 / ratio if ratio else None, True))
        elif case.operator == decays.DECOMPOSED:
            ratio = times(case, decays.PUBLISHED)
            what = f"Manhattan decomposed forward {case.name}: faster than published by"
            figures.append(Figure(what, 4.0, ratio, False))
    return figures


def _share_of_copying(row, name: str, copy: float) -> float | None:
    """Bytes that have to move per second, over the bytes per second of a copy."""
    result = row.results.get(name) if row else None
    return row.bytes / (1e-3 * result.ms) / copy if result and result.ms and copy else None


def _doubling_figures(report) -> list[Figure]:
    """How time, and extra memory in fresh processes, grow when a sequence doubles: 2 where both are O(N)."""
    rows = {(r.case, r.direction): r for r in report.rows if r.family == RETENTION and r.dtype == torch.float32}
    cases = [case for case in families()[RETENTION].cases if case.operator == decays.DOUBLING]
    figures = []
    for direction, passes in ((FORWARD, "forward"), (BACKWARD, "forward+backward")):
        timed, peaks = [], []
        for case in cases:
            result = rows[case, direction].results.get(OURS) if (case, direction) in rows else None
            timed.append(result.ms if result and result.ms else None)
            fresh = (RETENTION, case, 0, "float32", direction, OURS, report.ceilings.threads)
            peaks.append(memory.in_own_process(*fresh) if timed[-1] else None)
        for what, measured in (("time", timed), ("extra memory", peaks)):
            for n, (case, half, whole) in enumerate(zip(cases, measured, measured[1:])):
                growth = whole / half if half and whole else None
                figures.append(
                    Figure(
                        f"{what}, retention {passes}, N={case.tokens} -> {cases[n + 1].tokens}: grows",
                        2.3,
                        growth,
                        True,
                    )
                )
    return figures


def _toeplitz_figures(report) -> list[Figure]:
    """Float32. Memory is of the forward pass, results included; that of the torch.fft formula is of one head at a time."""
    rows = {(r.case, r.direction): r for r in report.rows if r.family == TOEPLITZ and r.dtype == torch.float32}

    def of(case, name, field="ms", direction=FORWARD) -> float | None:
        row = rows.get((case, direction))
        result = row.results.get(name) if row else None
        return getattr(result, field) if result and result.ms else None

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    found, timed = [], []
    for case in (case for case in families()[TOEPLITZ].cases if case.asked):
        n, ours = case.tokens, of(case, OURS)
        if case.operator == toeplitz.URPE:
            found.append(
                Figure(f"URPE forward, N={n}: time over unmasked SDPA", 0.9, over(ours, of(case, UNMASKED)), True)
            )
            continue
        clipped = " clipped" * (case.operator == toeplitz.CLIPPED)
        names = (toeplitz.DIRECT, toeplitz.FFT, toeplitz.STRUCTURED)
        best = min((of(case, name) for name in names if of(case, name)), default=None)
        found.append(
            Figure(f"kernelized{clipped} forward, N={n}: time over the best method's", 1.1, over(ours, best), True)
        )
        if clipped:
            continue
        timed.append((n, ours))
        ratio = over(of(case, toeplitz.FORMULA), ours)
        found.append(Figure(f"kernelized forward, N={n}: faster than torch.fft by", 4.0, ratio, False))
        peak = of(case, toeplitz.FORMULA, "memory")
        for name in (OURS, toeplitz.FFT):
            share = over(of(case, name, "memory"), peak)
            found.append(Figure(f"kernelized forward, N={n}, {name}: memory over torch.fft's", 0.1, share, True))
        if n >= 16384:
            for peer, bound in ((toeplitz.BIASED, 10.0), (UNMASKED, 2.0)):
                ratio = over(of(case, peer), ours)
                found.append(Figure(f"kernelized forward, N={n}: faster than {peer} by", bound, ratio, False))
        if not case.forward_only:
            ratio = over(*(of(case, name, direction=BACKWARD) for name in (toeplitz.FORMULA, OURS)))
            found.append(Figure(f"kernelized forward+backward, N={n}: faster than torch.fft by", 3.0, ratio, False))
    growth = over(timed[-1][1], timed[-2][1])
    what = f"time, kernelized forward, N={timed[-2][0]} -> {timed[-1][0]}: grows"
    return [*found, Figure(what, 4.6, growth, True)]


def _merging_figures(report) -> list[Figure]:
    """Float32. Memory is what a call needs beside its result."""
    rows = {(r.case, r.direction): r for r in report.rows if r.family == MERGING and r.dtype == torch.float32}

    def result(case, name, direction=FORWARD):
        row = rows.get((case, direction))
        return row.results.get(name) if row else None

    def times(case, peer, direction=FORWARD) -> float | None:
        row = rows.get((case, direction))
        return row.ratio(peer) if row else None

    found = []
    for case in (case for case in families()[MERGING].cases if case.asked):
        if case.operator == merging.MERGE:
            bound = 8.0 if case.tokens < 1000 else 6.0
            ratio = times(case, merging.PUBLISHED)
            found.append(Figure(f"match and merge {case.name}: faster than published by", bound, ratio, False))
            if case.tokens >= 1000:
                size = 4 * math.prod(case.output_shape)
                ours, theirs = (result(case, name) for name in (OURS, merging.PUBLISHED))
                known = ours and theirs and ours.memory and theirs.memory
                share = (ours.memory - size) / (theirs.memory - size) if known else None
                found.append(Figure(f"match and merge {case.name}: memory over published's", 0.05, share, True))
        elif case.operator == merging.ATTENTION:
            ratio = times(case, UNMASKED)
            what = f"size-weighted attention {case.name}: time over unmasked SDPA"
            found.append(Figure(what, 0.8, 1 / ratio if ratio else None, True))
        else:
            for direction, passes in ((FORWARD, "forward"), (BACKWARD, "forward+backward")):
                ratio = times(case, merging.EAGER, direction)
                found.append(Figure(f"soft_merge {passes} {case.name}: faster than eager by", 2.0, ratio, False))
    for size, architecture in (("S", vit.SMALL), ("B", vit.BASE)):
        model, ratio = merging_vit.tome(f"ToMe-ViT-{size}", architecture), None
        if not photographs.missing():
            ratio = compare(model, effort=BRIEF).ratio(merging_vit.NOT_MERGED)
        found.append(Figure(f"ViT-{size}/16, r=16, 8 photographs: images/s over the same model's", 1.4, ratio, False))
    return found


def _memory_figures(threads: int) -> list[Figure]:
    """How extra memory grows when N grows 4 times: O(N) is 4, an N x N tensor anywhere is 16. In fresh processes."""
    case = next(c for c in reversed(families()[MIXTURE].cases) if c.asked)
    large, small = case.grid[0], case.grid[0] // 2
    found = []
    for direction in (FORWARD, BACKWARD):
        peaks = [
            memory.in_own_process(MIXTURE, case, side, "float32", direction, OURS, threads) for side in (small, large)
        ]
        passes = "forward" if direction == FORWARD else "forward+backward"
        growth = peaks[1] / peaks[0] if all(peaks) else None
        size = f", {peaks[1] / 1e6:.0f} MB" if growth else ""
        what = f"extra memory, mixture {passes} fp32, N={small**2} -> {large**2}{size}: grows"
        found.append(Figure(what, 5.0, growth, True))
    return found


def _build_seconds() -> float | None:
    """The whole C++ build, from nothing, into a scratch directory; None without a checkout or a compiler."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").exists() or not (root / "csrc").exists():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", scratch, "--build-lib", scratch]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        return seconds if done.returncode == 0 and any(Path(scratch).rglob("_cpu.so")) else None


def table(found: list[Figure]) -> str:
    lines = [f"{'asked figure':<74}{'bound':>12}{'measured':>12}"]
    for figure in found:
        bound = f"{'<=' if figure.at_most else '>='} {figure.bound:g} {figure.unit}"
        measured = "-" if figure.measured is None else f"{figure.measured:.2f} {figure.unit}"
        verdict = {True: "pass", False: "MISS", None: "not measured"}[figure.met]
        lines.append(f"{figure.what:<74}{bound:>12}{measured:>12}   {verdict}")
    met = [figure.met for figure in found]
    lines.append(f"{met.count(True)} pass, {met.count(False)} miss, {met.count(None)} not measured")
    return "\n".join(lines)
