"""How much slower head is than base, with its uncertainty: ratios of two sets of times.

Interleaved (``paired``): the unit is the launch, not the sample. A launch's figure is the median over its blocks of the
mean log ratio of the block; the ratio is the geometric mean over the launches, its interval Student's.

Apart (``apart``): ratio of medians, interval by bootstrap of either side. It knows the noise within each run only.

Of many rows some differ by chance. ``holm`` keeps the chance of *any* false alarm in the whole table at the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy

LEVEL = 0.05
RESAMPLES = 4000
FEWEST = 5  # samples a side below which a bootstrap of medians means nothing

Launches = Sequence[Sequence[float]]


class Ratio(NamedTuple):
    """Head over base; ``low`` and ``high`` bound it with 95 % confidence, ``p`` is the chance of this much if equal."""

    value: float
    low: float
    high: float
    p: float


def paired(base: Launches, head: Launches) -> Ratio:
    """Of interleaved samples in launches; two samples a side make a block."""
    return _student(launch_logs(base, head))


def launch_logs(base: Launches, head: Launches) -> numpy.ndarray:
    """log(head / base) of every launch."""
    logs = (numpy.log(numpy.reshape(h, (-1, 2))) - numpy.log(numpy.reshape(b, (-1, 2))) for b, h in zip(base, head))
    return numpy.array([numpy.median(blocks.mean(axis=1)) for blocks in logs])


def paired_overall(rows: Sequence[tuple[Launches, Launches]]) -> Ratio:
    """Geometric mean over rows, taken launch by launch: what a launch does to all rows alike does not average out."""
    return _student(numpy.mean([launch_logs(*row) for row in rows], axis=0))


def _student(logs: numpy.ndarray) -> Ratio:
    from scipy import stats

    mean, error, freedom = logs.mean(), logs.std(ddof=1) / math.sqrt(len(logs)), len(logs) - 1
    if error == 0:
        return Ratio(*[math.exp(mean)] * 3, p=float(mean == 0))
    reach = stats.t.ppf(1 - LEVEL / 2, freedom) * error
    low, high = math.exp(mean - reach), math.exp(mean + reach)
    return Ratio(math.exp(mean), low, high, 2 * stats.t.sf(abs(mean) / error, freedom))


def apart(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """Of samples of two runs."""
    return _percentile(_log_ratio(base, head), _resampled(base, head, seed=0))


def apart_overall(rows: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Ratio:
    """Geometric mean over rows."""
    mean = numpy.mean([_log_ratio(*row) for row in rows])
    return _percentile(mean, numpy.mean([_resampled(*row, seed) for seed, row in enumerate(rows)], axis=0))


def _log_ratio(base: Sequence[float], head: Sequence[float]) -> float:
    return math.log(numpy.median(head) / numpy.median(base))


def _resampled(base: Sequence[float], head: Sequence[float], seed: int) -> numpy.ndarray:
    random = numpy.random.default_rng(seed)
    medians = [numpy.median(random.choice(side, (RESAMPLES, len(side))), axis=1) for side in (base, head)]
    return numpy.log(medians[1]) - numpy.log(medians[0])


def _percentile(estimate: float, resampled: numpy.ndarray) -> Ratio:
    from scipy import stats

    low, high = numpy.quantile(resampled, (LEVEL / 2, 1 - LEVEL / 2))
    error = resampled.std()
    p = 2 * stats.norm.sf(abs(estimate) / error) if error else float(estimate == 0)
    return Ratio(math.exp(estimate), math.exp(min(low, estimate)), math.exp(max(high, estimate)), float(p))


def holm(chances: Sequence[float]) -> list[float]:
    """Chances adjusted for their number (Holm): those at most LEVEL are significant in the table as a whole."""
    adjusted, running = [0.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        running = max(running, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = running
    return adjusted
