"""``python -m effattn bench``: the command line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator

import torch

from effattn._files import INTERRUPTED, write_atomically

from . import asked, ceilings, compare, overhead, photographs, report
from .cases import BACKWARD, FORWARD, Case, Contender, Family, families, flops
from .load import ForeignLoad
from .progress import Progress
from .runner import FULL, QUICK, run_row, warm_up

QUICK_START, QUICK_ROWS = 45.0, 220.0  # seconds that --quick plans with before and for its rows; it must end in 300
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_OF_SWEEPS = ("asked", "case", "only", "dtype", "direction", "json", "plot")
DIRECTIONS = {"forward": (FORWARD,), "backward": (BACKWARD,), "both": (FORWARD, BACKWARD)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m effattn bench",
        description="Measure effattn against every peer: medians of interleaved runs, shares of the machine's ceilings.",
    )
    parser.add_argument("family", nargs="*", help=f"of {', '.join(families())}; default all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default float32 bfloat16")
    parser.add_argument(
        "--direction", nargs="+", choices=DIRECTIONS, help="backward is forward + backward; default both"
    )
    parser.add_argument("--quick", action="store_true", help="a subset of all families in under 5 minutes on 2 cores")
    parser.add_argument(
        "--asked",
        action="store_true",
        help="the shapes that have a promised figure, each with pass or miss; with --quick fewer samples, and "
        "the C++ build is timed only without FAMILY",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="growing lengths of every family, float32, for the report: one JSON file per family, each written when "
        "it is done; takes --quick, --resume, --into, --threads, --device",
    )
    parser.add_argument(
        "--resume", action="store_true", help="with --sweep: leave families that this commit has measured"
    )
    parser.add_argument("--into", metavar="FOLDER", help="of --sweep; default bench/results/<this machine>")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose operator or name contains TEXT")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=(), help="only these contenders")
    parser.add_argument("--json", metavar="FILE", help="write the results (atomically)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the ratios (PNG)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    compare.add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    unknown = [name for name in options.family if name not in families()]
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; there are {', '.join(families())}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if compare.complaint(options):
        parser.error(compare.complaint(options))
    chosen = [families()[name] for name in options.family] or list(families().values())
    if options.sweep:
        from . import recorded, sweep

        if taken := [name for name in NOT_OF_SWEEPS if getattr(options, name)]:
            parser.error(f"--sweep does not take --{taken[0]}")
        if options.quick and not options.into:
            parser.error("--sweep --quick is for trying out and needs --into: the report takes full measurements only")
        if not options.into and not recorded.RESULTS.is_dir():
            parser.error(f"--sweep needs --into: there is no {recorded.RESULTS}, this is no checkout")
        effort = sweep.QUICK if options.quick else sweep.EFFORT
        where = {"device": options.device, "threads": options.threads, "folder": options.into}
        return sweep.run(chosen, effort, resume=options.resume, **where)
    if options.resume or options.into:
        parser.error("--resume and --into belong to --sweep")
    plan = list(_plan(chosen, options))
    if not plan:
        parser.error("no case fits these options")
    if photographs.missing():
        print(f"cases on photographs are left out: {photographs.missing()}", file=sys.stderr)
    if options.compare:
        return compare.run(options, plan)
    torch.set_num_threads(options.threads)
    found = _measure(plan, options)
    print(report.table(found))
    figures = []
    if options.asked:
        figures = asked.figures(found, build=not options.quick and not options.family)
        print("\n" + asked.table(figures))
    if not found.complete:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        report.write_json(report.as_json(found), options.json)
    if options.plot:
        from . import plot

        write_atomically(options.plot, lambda name: plot.draw(report.as_json(found), name))
    return 1 if any(figure.met is False for figure in figures) else 0


def _plan(chosen: list[Family], options) -> Iterator[tuple[Family, Case, torch.dtype, str]]:
    names = options.direction or ["both"]
    wanted = dict.fromkeys(direction for name in names for direction in DIRECTIONS[name])
    for family in chosen:
        cases = [case for case in family.cases if _included(case, options)]
        for operator in family.operators:
            for direction in wanted:
                for dtype in options.dtype or (family.asked.dtypes if options.asked else ("float32", "bfloat16")):
                    for case in cases:
                        if case.operator != operator or (case.forward_only and direction == BACKWARD):
                            continue
                        # Unless told otherwise, the quick set trains few shapes.
                        few = options.quick and not options.asked and not options.direction
                        if few and direction == BACKWARD and not case.trained:
                            continue
                        yield family, case, DTYPES[dtype], direction


def _included(case: Case, options) -> bool:
    if (options.asked and not case.asked) or (options.quick and not options.asked and not case.quick):
        return False
    if case.photograph and photographs.missing():
        return False
    return not options.case or options.case in f"{case.operator} {case.name}"


def _skip_nothing(contender: Contender) -> str:
    return ""


def _skip_compiling(contender: Contender) -> str:
    return "--quick was behind its time; compiling was left out" if contender.compiles else ""


def _weight(family: Family, case: Case) -> float:
    """Roughly the seconds that a row of the quick set takes."""
    return 7 + 25 * flops(family, case, FORWARD) / 34e9


def _measure(plan, options) -> report.Report:
    """Run the plan; Ctrl-C ends it and keeps what is done for the printed table."""
    about = report.machine(options.device, options.threads)
    limits = ceilings.none(options.threads, "not measured on CUDA")
    rows, overheads, import_ms, complete = [], {}, None, False
    load, started = ForeignLoad(), time.monotonic()
    try:
        if options.device == "cpu":
            limits = ceilings.measure(options.threads)
            overheads, import_ms = overhead.call_overhead(), overhead.import_time(3 if options.quick else 7)
        warm_up(options.device)
        with Progress(len(plan)) as progress:
            weights = [_weight(family, case) for family, case, _, _ in plan]
            for done, (family, case, dtype, direction) in enumerate(plan):
                progress.row(f"{case.operator} {case.name} {report.SHORT[dtype]} {direction}")
                planned = QUICK_START + QUICK_ROWS * sum(weights[:done]) / sum(weights)
                behind = options.quick and not options.asked and time.monotonic() - started > planned
                effort = QUICK if options.quick else FULL
                only = options.only
                if options.asked:
                    only = only or (family.asked.forward if direction == FORWARD else family.asked.backward)
                    if family.asked.seconds:
                        brief = min(effort.seconds, family.asked.seconds)
                        effort = effort._replace(seconds=brief, fewest=QUICK.fewest)
                how = {"device": options.device, "only": only, "progress": progress.step}
                how["skip"] = _skip_compiling if behind else _skip_nothing
                rows.append(run_row(family, case, dtype, direction, effort, **how))
                progress.row_done()
        limits = ceilings.better(limits)
        complete = True
    except KeyboardInterrupt:
        pass
    return report.Report(about, limits, rows, overheads, import_ms, complete, load.cores())
