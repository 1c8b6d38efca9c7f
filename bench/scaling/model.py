"""Time = sum of prices times units: prices by non-negative least squares on relative errors, judged on held-out sizes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy

LIMIT = 0.15
"""Largest relative error that a prediction should have."""


class Fit(NamedTuple):
    """Seconds of one unit, and the relative errors (predicted / measured - 1) at the sizes that were held out."""

    prices: dict[str, float]
    errors: tuple[float, ...] = ()

    def seconds(self, units: Mapping[str, float]) -> float:
        return sum(price * units[name] for name, price in self.prices.items())

    @property
    def largest(self) -> float:
        """By what share prediction or measurement exceeded the other, whichever was more."""
        return max((max(error, -error / (1 + error)) for error in self.errors), default=0.0)

    @property
    def median(self) -> float:
        return statistics.median(map(abs, self.errors)) if self.errors else 0.0

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors), default=0.0)


def fit(points: Iterable[tuple[Mapping[str, float], float]]) -> Fit:
    """From (units, seconds): the prices, none negative, that minimise the sum of squared relative errors."""
    from scipy.optimize import nnls

    points = list(points)
    if not points:
        raise ValueError("fit: points must hold at least one measurement, got none")
    names = [name for name in points[0][0] if any(units[name] for units, _ in points)]
    shares = numpy.array([[units[name] / seconds for name in names] for units, seconds in points], dtype=float)
    sizes = numpy.linalg.norm(shares, axis=0)  # of columns that differ by ten orders of magnitude
    prices = nnls(shares / sizes, numpy.ones(len(points)))[0] / sizes
    return Fit({name: float(price) for name, price in zip(names, prices) if price > 0})


def judged(found: Fit, held_out: Iterable[tuple[Mapping[str, float], float]]) -> Fit:
    """The same with its errors at sizes that it has not seen."""
    return found._replace(errors=tuple(found.seconds(units) / seconds - 1 for units, seconds in held_out))
