"""The units of work that the time of an operator is a sum of, counted for a size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from effattn.ops.toeplitz_methods import transform_length

from ..bench_toeplitz import FEATURES

WINDOW, STRIPE, CHANNELS = 8, 2, 512
CACHE, CACHES = 512 << 10, 4 << 20  # bytes: a second-level cache at its smallest; more than those of two cores
THREADS = 2  # of the calls that are measured


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


def beyond_caches(count: float) -> Units:
    """Bytes of so many floats that a thread writes, or writes and reads again, for which its caches have no room."""
    return {"far": max(0, 4 * count - CACHES)}


def window_density(size: Size) -> float:
    return WINDOW**2 / size.tokens


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


CHUNK, SEGMENT = 64, 8 << 20  # of the retention kernels: tokens between two states, bytes of states that a thread keeps


def bidirectional(states: int) -> Callable[[Size], Units]:
    """A sweep leaves so many states a chunk for the sweep that runs the other way. More than a segment of them are computed
    ``again``, and those of all threads at once may not stay in the caches."""

    def units(size: Size) -> Units:
        floats, chunks = states * size.head_dim**2, -(-size.tokens // CHUNK)
        segment = min(max(SEGMENT // (4 * floats), 4), chunks)
        again = (chunks - 1) // segment * segment * CHUNK
        threads = min(THREADS, size.items)
        kept = beyond_caches(threads * segment * floats)["far"] * size.items / threads
        return state(size) | {"far": kept, "again": size.items * again * size.head_dim**2}

    return units


def step(size: Size) -> Units:
    """The old states are read, the new ones written."""
    states = size.items * size.head_dim**2
    units = {"call": 1, "tokens": size.items, "channels": size.items * size.head_dim, "states": states}
    return units | beyond_caches(2 * states)


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
    counted = features(size) | {"table": once, "butterflies": count * once}
    # Two channels share a transform of L / 2 complex numbers; spectrum, key, query, two values and two outputs lie beside it.
    working = 4 * length // 2 * (2 + 2 + 6)
    return counted | {"spilled": count / 2 * max(0, working - CACHE)}


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
    return units | beyond_caches(pairs)


def linear(size: Size) -> Units:
    """Square layers: head_dim is both widths."""
    weights, channels = size.head_dim**2, size.tokens * size.head_dim
    return {"call": 1, "weights": weights, "channels": channels, "products": channels * size.head_dim}
