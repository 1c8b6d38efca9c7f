"""The arithmetic of the page's answers: what fits, when ranks pay, what a cluster would do."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from effattn.distributed import BLOCK

from ..bench_attention import ADDITIVE
from ..bench_retention import PARALLEL
from ..cases import FORWARD
from . import published, ranks
from .allocation import count
from .published import Efficiency
from .subjects import CAUSAL, SEQUENCE_PARALLEL, SUBJECTS, TRAINING, Subject, on_grid
from .units import Size

# ---- how long a sequence fits ----

BATCH, HEADS, HEAD_DIM, DTYPE = 1, 16, 64, torch.bfloat16

OURS = (
    "scaled_dot_product_attention",
    CAUSAL,
    "gaussian_mixture_attention",
    "masked_product_attention",
    "size_weighted_attention",
    "urpe_attention",
    "manhattan_attention",
    "manhattan_attention, decomposed",
    "window_attention",
    "cross_shaped_window_attention",
    "retention",
    "kernelized_rpe_attention, direct",
    "shift_add_attention",
)


def _peer(name: str, family: str, operator: str, contender: str, **rest) -> Subject:
    return Subject(name, family, operator, lambda size: {}, (), (), contender=contender, **rest)


PEERS = (
    _peer("F.scaled_dot_product_attention, a dense mask for each head", "attention", ADDITIVE, "torch sdpa"),
    _peer("plain attention, eager", "attention", "plain", "eager"),
    _peer(
        "gaussian mixture, the published formula, eager", "gaussian_mixture", "gaussian_mixture", "eager", case=on_grid
    ),
    _peer("retention, parallel form, eager", "retention", "retention", PARALLEL),
)


def _total(subject: Subject, direction: str, side: int, backend: str) -> int:
    """Bytes of inputs, results, what is saved and work space, of side x side tokens."""
    size = Size(BATCH, HEADS, side**2, HEAD_DIM)
    return count(subject.making(size, direction, DTYPE), backend=backend).total


def longest(subject: Subject, direction: str, backend: str, memory: float) -> dict[str, int]:
    """The longest sequence of (8 n)^2 tokens that ``memory`` bytes hold, and how many it takes."""
    fits, fails = 8, 16
    while _total(subject, direction, fails, backend) <= memory:
        fits, fails = fails, 2 * fails
    while fails - fits > 8:
        middle = (fits + fails) // 16 * 8
        if _total(subject, direction, middle, backend) <= memory:
            fits = middle
        else:
            fails = middle
    return {"tokens": fits**2, "bytes": _total(subject, direction, fits, backend)}


def all_longest() -> dict[str, dict[str, dict[str, int]]]:
    """Operator -> direction -> ``longest`` on an H200: of ours as Triton's launchers allocate, of peers as PyTorch does."""
    memory = published.USABLE * published.MEMORY.value
    everything = {name: (SUBJECTS[name], "triton") for name in OURS} | {peer.name: (peer, "cpu") for peer in PEERS}
    return {
        name: {direction: longest(subject, direction, backend, memory) for direction in subject.directions}
        for name, (subject, backend) in everything.items()
    }


# ---- when ranks pay ----


def first_that_pays(single, several, lengths=tuple(1 << bits for bits in range(6, 31))) -> int | None:
    """The shortest of ``lengths`` at which several ranks take less time than one."""
    return next((tokens for tokens in lengths if several(tokens) < single(tokens)), None)


def cpu_break_even(found: dict, direction: str, count: int) -> int | None:
    """Tokens from which so many one-thread ranks over gloo are faster than one such rank."""
    one, each = ranks.whole(found, direction), ranks.slices(found, direction)
    units = SUBJECTS[SEQUENCE_PARALLEL].units

    def several(tokens: int) -> float:
        return ranks.predicted(found, each, Size(1, 8, tokens // count, 64), count, direction)

    lengths = [tokens for tokens in (1 << bits for bits in range(6, 31)) if tokens >= count]
    return first_that_pays(lambda tokens: one.seconds(units(Size(1, 8, tokens, 64))), several, lengths)


SHAPE = HEADS, HEAD_DIM, HEAD_DIM
CHUNK = 64  # tokens of the kernels' tiles


def retention_seconds(tokens: float, heads: int, key_dim: int, value_dim: int, passes: float, how: Efficiency) -> float:
    """On an H200 by its published figures: the slower of arithmetic and memory; ``passes``: 1 forward, 3.5 training."""
    flops = heads * tokens * (2.0 * CHUNK * (key_dim + value_dim) + 4.0 * key_dim * value_dim)
    moved = 2.0 * 2 * heads * tokens * (key_dim + value_dim)
    arithmetic = flops / (published.BF16_PEAK.value * how.arithmetic)
    return passes * max(arithmetic, moved / (published.MEMORY_BANDWIDTH.value * how.memory))


def slice_seconds(tokens: float, heads: int, key_dim: int, value_dim: int, training: bool, how: Efficiency) -> float:
    """What the state costs beside that: float32 products of PyTorch, block by block, one forward and two backward."""
    products = 3 if training else 1
    flops = products * heads * tokens * 2.0 * key_dim * value_dim
    moved = products * 2.0 * heads * tokens * (key_dim + value_dim)  # float32 blocks stay in the cache
    arithmetic = flops / (published.FP32_PEAK.value * how.arithmetic)
    memory = moved / (published.MEMORY_BANDWIDTH.value * how.memory)
    started = math.ceil(tokens / BLOCK) * operations_a_block(training) * how.operation
    return max(arithmetic, memory, started)


@functools.cache
def operations_a_block(training: bool) -> int:
    """PyTorch operations that a further block of a slice adds to the one-rank call, counted."""

    def operations(blocks: int) -> int:
        direction = TRAINING if training else FORWARD
        size = Size(1, 2, blocks * BLOCK, 16)
        return count(SUBJECTS[SEQUENCE_PARALLEL].making(size, direction, DTYPE)).operations

    return operations(3) - operations(2)


def h200_break_even(count: int, training: bool, how: Efficiency, shape=SHAPE) -> int | None:
    """Tokens from which so many GPUs are faster than one, by published figures and assumed efficiencies."""
    passes = 3.5 if training else 1.0
    message = ranks.state_bytes(1, *shape)
    exchange = (2 if training else 1) * ranks.exchange_seconds(published.links(count, how), message)

    def several(tokens: float) -> float:
        each = tokens / count
        return retention_seconds(each, *shape, passes, how) + slice_seconds(each, *shape, training, how) + exchange

    return first_that_pays(lambda tokens: retention_seconds(tokens, *shape, passes, how), several)


def messages_break_even(count: int, training: bool, how: Efficiency, shape=SHAPE) -> int | None:
    """Tokens from which the messages of so many GPUs take less time than each one's own retention."""
    passes = 3.5 if training else 1.0
    exchange = (2 if training else 1) * ranks.exchange_seconds(
        published.links(count, how), ranks.state_bytes(1, *shape)
    )
    return first_that_pays(
        lambda tokens: retention_seconds(tokens / count, *shape, passes, how), lambda tokens: exchange
    )


# ---- what a cluster would do ----


class Step(NamedTuple):
    """Seconds of one training step of every GPU, and tokens a second of all."""

    compute: float
    states: float
    gradients: float
    tokens_a_second: float


def cluster_step(what: published.Model, gpus: int, tokens_each: int, sequence_parallel: bool, how: Efficiency) -> Step:
    """``tokens_each`` on every GPU: a sequence of its own, or its slice of one sequence."""
    compute = 6 * what.parameters * tokens_each / (published.BF16_PEAK.value * how.arithmetic)
    shape = (what.heads, what.key_dim, what.value_dim)
    compute += what.layers * retention_seconds(tokens_each, *shape, 3.5, how)
    states = 0.0
    if sequence_parallel:
        exchange = ranks.exchange_seconds(published.links(gpus, how), ranks.state_bytes(1, *shape))
        states = what.layers * (2 * exchange + slice_seconds(tokens_each, *shape, True, how))
    slow = published.link(gpus > published.GPUS_A_NODE, how)
    gradients = ranks.all_reduce_seconds(gpus, 2 * what.parameters, slow.bandwidth, slow.latency)
    backward = 2 / 3 * compute
    waiting = max(0.0, gradients - backward) if how.overlap else gradients
    return Step(compute, states, waiting, gpus * tokens_each / (compute + states + waiting))
