"""Benchmarks of effattn against every peer: ``python -m effattn bench``."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    from .cli import main as run

    return run(argv)
