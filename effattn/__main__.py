"""``python -m effattn info | doctor | bench | tune``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m effattn", description="effattn: fused efficient attention")
    parser.add_argument(
        "command",
        choices=("info", "doctor", "bench", "tune"),
        help="what to do; `bench --help`, `tune --help`: options",
    )
    command = parser.parse_args(argv[:1]).command
    if command == "bench":
        from effattn.bench import main as bench

        return bench(argv[1:])
    if command == "tune":
        from effattn._tune import main as tune

        return tune(argv[1:])
    if len(argv) > 1:
        parser.error(f"{command} takes no further arguments, got {' '.join(argv[1:])}")
    from effattn import _diagnostics

    return _diagnostics.info() if command == "info" else _diagnostics.doctor()


if __name__ == "__main__":
    from effattn._files import exit_status

    sys.exit(exit_status(main))
