"""Whole models on photographs, ours and eager by turns: ``python -m effattn.bench.models``.

Forms of a model share one set of random weights. Where they are the same function their outputs are compared first. Then
they take turns; reported are medians of images per second, forward without autograd and whole training steps.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from effattn._files import INTERRUPTED, exit_status

from .. import photographs, report
from ..load import ForeignLoad
from ..runner import warm_up
from . import EAGER, OURS, models
from ._compare import ASKED, EFFORT, FORWARD, QUICK, TRAINING, Comparison, compare

DIRECTIONS = {FORWARD: (FORWARD,), TRAINING: (TRAINING,), "both": (FORWARD, TRAINING)}
HEADER = (
    "| model | direction | batch | effattn | eager | ratio | if our operators took no time | asked | beside |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(found: Comparison) -> str:
    """A line of the Markdown table."""
    noisy = {form: "†" if result.noise > report.NOISY else "" for form, result in found.results.items()}
    speeds = [f"{found.images_per_second(form):.3g}{noisy[form]}" for form in (OURS, EAGER)]
    beside = [f"{form} {found.images_per_second(form):.3g}{noisy[form]}" for form in list(found.results)[2:]]
    ratios = [f"{found.ratio():.2f}x", f"{found.limit:.2f}x", f"{ASKED}x: {'pass' if found.met else 'miss'}"]
    cells = [f"{found.model}, {found.pixels} pixels", found.direction, str(found.batch), *speeds, *ratios]
    return f"| {' | '.join([*cells, ', '.join(beside)])} |"


def as_json(about: dict, foreign_cores: float | None, found: list[Comparison]) -> dict:
    comparisons = [
        {
            **{name: getattr(one, name) for name in ("model", "direction", "batch", "pixels", "difference")},
            "images_per_second": {form: one.images_per_second(form) for form in one.results},
            "ratio": {form: one.ratio(form) for form in one.results},
            "ratio_if_our_operators_took_no_time": one.limit,
            "operators_ms": one.kernels_ms,
            "asked": ASKED,
            "met": one.met,
            "results": {form: result._asdict() for form, result in one.results.items()},
        }
        for one in found
    ]
    return {"about": about, "foreign_cores": foreign_cores, "comparisons": comparisons}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effattn.bench.models", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help=f"of {', '.join(models())}; default all")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=("both",), help="default both")
    parser.add_argument("--batch", type=int, help="photographs in a call; default the model's")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", metavar="FILE", help="write the results (atomically)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default %(default)s")
    options = parser.parse_args(argv)
    unknown = [name for name in options.model if name not in models()]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(models())}")
    if photographs.missing():
        parser.error(f"no photographs: {photographs.missing()}")
    if options.threads < 1 or (options.batch is not None and options.batch < 1):
        parser.error("--threads and --batch must be at least 1")
    torch.set_num_threads(options.threads)
    about, load, found = report.machine("cpu", options.threads), ForeignLoad(), []
    directions = dict.fromkeys(direction for name in options.direction for direction in DIRECTIONS[name])
    print(f"Images per second, float32, {options.threads} threads, {about['cpu']}\n\n{HEADER}", flush=True)
    try:
        warm_up("cpu")
        for name in options.model or models():
            for direction in directions:
                effort = QUICK if options.quick else EFFORT
                found.append(compare(models()[name], direction, options.batch, effort=effort))
                print(row(found[-1]), flush=True)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    foreign = load.say()
    if options.json:
        report.write_json(as_json(about, foreign, found), options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
