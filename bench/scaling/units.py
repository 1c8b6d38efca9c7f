"""The units of work that the time of an operator is a sum of, counted for a size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from effattn.ops.toeplitz_methods import transform_length

from ..bench_toeplitz import FEATURES

WINDOW, STRIPE, CHANNELS = 8, 2, 512
CACHES = 4 << 20  # bytes of the second-level caches of two cores
MAPPED = 32 << 20  # bytes from which glibc maps every allocation anew


class Size(NamedTuple):
    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def items(self) -> int:
        return self.batch * self.heads


Units = dict[str, float]


def grid(tokens: int) -> tuple[int, int]:
    """The squarest grid of so many tokens."""
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return height, tokens // height


def pairs(density: Callable[[Size], float] = lambda size: 1.0) -> Callable[[Size], Units]:
    """Of attention over pairs of tokens: a softmax entry a pair, and products of head_dim."""

    def units(size: Size) -> Units:
        tokens = size.items * size.tokens
        pairs = tokens * size.tokens * density(size)
        channels = tokens * size.head_dim
        return {"call": 1, "tokens": tokens, "channels": channels, "pairs": pairs, "products": pairs * size.head_dim}

    return units


EVERY_PAIR = pairs()


def masked(size: Size) -> Units:
    weights = size.heads * size.tokens**2
    return EVERY_PAIR(size) | {"weights": weights} | result(weights)


def result(count: float) -> Units:
    """Bytes of a large result: beyond the caches, and beyond what the C library keeps from call to call."""
    return {"far": 4 * count if 4 * count > CACHES else 0, "fresh": 4 * count if 4 * count >= MAPPED else 0}


def window_density(size: Size) -> float:
    return WINDOW**2 / size.tokens


def shifted(size: Size) -> Units:
    """Where shifted windows meet the border they hold pairs that are masked by -100, whose weights were denormal once."""
    windows = 2 * grid(size.tokens)[0] // WINDOW - 1
    return pairs(window_density)(size) | {"border": size.items * windows * WINDOW**4 * size.head_dim}


def cross_density(size: Size) -> float:
    """Half of the heads have stripes down, half across."""
    return STRIPE * sum(grid(size.tokens)) / 2 / size.tokens


def line_density(size: Size) -> float:
    return sum(grid(size.tokens)) / size.tokens


def state(size: Size) -> Units:
    """Of a scan over chunks of fixed length: a state of head_dim x head_dim is read and updated."""
    tokens = size.items * size.tokens
    channels = tokens * size.head_dim
    return {"call": 1, "tokens": tokens, "channels": channels, "states": channels * size.head_dim}


def step(size: Size) -> Units:
    states = size.items * size.head_dim**2
    units = {"call": 1, "tokens": size.items, "channels": size.items * size.head_dim, "states": states}
    return units | result(states)


def features(size: Size) -> Units:
    """Positive features of queries and keys."""
    tokens = size.items * size.tokens
    return {"call": 1, "tokens": tokens, "channels": tokens * size.head_dim}


def direct(size: Size) -> Units:
    pairs = size.items * size.tokens**2
    return features(size) | {"pairs": pairs, "products": pairs * (FEATURES + size.head_dim)}


def transforms(size: Size) -> Units:
    length = transform_length(2 * size.tokens - 1)
    count = size.items * FEATURES * (size.head_dim + 1)
    once = length * math.log2(length)
    return features(size) | {"table": once, "transformed": count * length, "butterflies": count * once}


def merge(size: Size) -> Units:
    tokens = size.batch * size.tokens
    pairs = tokens * size.tokens / 4
    return {
        "call": 1,
        "tokens": tokens,
        "channels": tokens * (size.head_dim + CHANNELS),
        "pairs": pairs,
        "products": pairs * size.head_dim,
    }


def soft_merge(size: Size) -> Units:
    pairs = size.batch * size.tokens * size.tokens // 4
    channels = size.batch * size.tokens * size.head_dim
    return {"call": 1, "channels": channels, "pairs": pairs, "products": pairs * size.head_dim}


def bits(size: Size) -> Units:
    pairs = size.items * size.tokens**2
    units = {"call": 1, "tokens": size.items * size.tokens, "pairs": pairs, "words": pairs * -(-size.head_dim // 32)}
    return units | result(pairs)


def linear(size: Size) -> Units:
    """Square layers: head_dim is both widths."""
    weights, channels = size.head_dim**2, size.tokens * size.head_dim
    return {"call": 1, "weights": weights, "channels": channels, "products": channels * size.head_dim}
