"""Numbers and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .timing import key
from .units import Size

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"), (1e-12, "ps"))


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def whole_number(value: int) -> str:
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Three digits and the unit that keeps them short."""
    if not seconds:
        return "0"
    scale, name = next(((scale, name) for scale, name in UNITS if abs(seconds) >= scale), UNITS[-1])
    return f"{seconds / scale:.3g} {name}"


def by_assumption(low: str, high: str) -> str:
    return low if low == high else f"{low} / {high}"


def size_text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def spread(samples: dict[str, list[float]], size: Size, direction: str) -> str:
    """By how much the slowest sample of one size is above the fastest."""
    taken = samples[key(size, direction)]
    return "there is one sample" if len(taken) == 1 else f"samples spread over {max(taken) / min(taken) - 1:.0%}"


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
