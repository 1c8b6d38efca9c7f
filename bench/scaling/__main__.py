"""``python -m effattn.bench.scaling measure | page | predict``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from effattn._files import INTERRUPTED, exit_status

from ..recorded import RESULTS

ROUNDS = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effattn.bench.scaling", description="a cost model of the operators"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser(
        "measure", help="time, memory and messages on this machine; planned for less than 10 minutes on 2 idle cores"
    )
    measure.add_argument(
        "--json", metavar="FILE", required=True, help="write the results; FILE.partial keeps an interrupted run"
    )
    measure.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default %(default)s")
    measure.add_argument("--rounds", type=int, default=ROUNDS, help="samples of every size; default %(default)s")
    measure.add_argument(
        "--only", nargs="+", default=(), metavar="OPERATOR", help="times and memory of these operators only"
    )
    measure.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of one thread, where others use the machine",
    )
    page = commands.add_parser("page", help="docs/scaling.md and its picture from the newest measurement")
    page.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    predict = commands.add_parser("predict", help="time and memory of one call on the machine that was measured")
    predict.add_argument("operator", metavar="OPERATOR", help="as in docs/scaling.md")
    predict.add_argument("--tokens", type=int, required=True)
    predict.add_argument("--heads", type=int, required=True)
    predict.add_argument("--head-dim", type=int, required=True)
    predict.add_argument("--batch", type=int, default=1, help="default %(default)s")
    predict.add_argument("--ranks", type=int, default=1, help="processes that share the call; default %(default)s")
    for command in (page, predict):
        command.add_argument("--json", metavar="FILE", help="a measurement; default: the newest in bench/results")
    options = parser.parse_args(argv)
    try:
        return {"measure": _measure, "page": _page, "predict": _predict}[options.command](options)
    except ValueError as error:
        parser.error(str(error))


def _measure(options) -> int:
    from . import timing
    from .subjects import SUBJECTS

    unknown = [name for name in options.only if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"--only must name one of {'; '.join(SUBJECTS)}, got {', '.join(unknown)}")
    if options.threads < 1 or options.rounds < 1:
        raise ValueError("--threads and --rounds must be at least 1")
    if options.clock == "cpu" and options.threads != 1:
        raise ValueError(f"--clock cpu is that of one thread and needs --threads 1, got {options.threads}")
    try:
        timing.measure(options.json, options.threads, options.rounds, tuple(options.only), options.clock)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from {options.json}.partial", file=sys.stderr)
        return INTERRUPTED
    return 0


def _page(options) -> int:
    from . import page

    found, *others = measurements(options.json)
    return page.write(found, others, check=options.check)


def _predict(options) -> int:
    from . import predict

    size = options.batch, options.heads, options.tokens, options.head_dim
    print(predict.say(measurement(options.json), options.operator, size, options.ranks))
    return 0


def measurement(path: str | None = None) -> dict:
    """The content of ``path``, or of the newest scaling.json of a machine."""
    return measurements(path)[0]


def measurements(path: str | None = None) -> list[dict]:
    """The content of ``path``, or of every machine's scaling.json, the newest first."""
    paths = [Path(path)] if path else list(RESULTS.glob("*/scaling.json"))
    if not paths:
        raise ValueError(f"there is no */scaling.json in {RESULTS}: give --json FILE, as `measure` writes it")
    try:
        found = [json.loads(one.read_text()) for one in paths]
    except OSError as error:
        raise ValueError(f"--json: {error}") from None
    if not all("fits" in one and "points" in one for one in found):
        raise ValueError(f"--json: {path} was not written by `python -m effattn.bench.scaling measure`")
    return sorted(found, key=lambda one: one["machine"]["date"], reverse=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
