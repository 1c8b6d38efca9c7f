"""``python -m effattn info | doctor [--gpu] | bench | tune``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m effattn", description="effattn: fused efficient attention")
    parser.add_argument(
        "command",
        choices=("info", "doctor", "bench", "tune"),
        help="what to do; `doctor --help`, `bench --help`, `tune --help`: options",
    )
    command = parser.parse_args(argv[:1]).command
    if command == "bench":
        from effattn.bench import main as bench

        return bench(argv[1:])
    if command == "tune":
        from effattn._tune import main as tune

        return tune(argv[1:])
    if command == "doctor":
        return _doctor(argv[1:])
    if len(argv) > 1:
        parser.error(f"{command} takes no further arguments, got {' '.join(argv[1:])}")
    from effattn import _diagnostics

    return _diagnostics.info()


def _doctor(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effattn doctor",
        description="What is wrong with this installation, and the command that fixes it.",
    )
    parser.add_argument("--gpu", action="store_true", help="check every GPU of this node: results and speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --gpu: write what was found there")
    parser.add_argument("--seconds", type=float, default=60.0, help="with --gpu: deadline (default: %(default)g)")
    options = parser.parse_args(argv)
    if not options.gpu and (options.json or options.seconds != parser.get_default("seconds")):
        parser.error("--json and --seconds need --gpu")
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds:g}")
    from effattn import _diagnostics

    return _diagnostics.doctor_gpu(options.seconds, options.json) if options.gpu else _diagnostics.doctor()


if __name__ == "__main__":
    from effattn._files import exit_status

    sys.exit(exit_status(main))
