"""What is modelled: operators, the sizes they are measured at, and the units of work that their time is a sum of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

import effattn
from effattn.ops.toeplitz_methods import transform_length

from ..bench_retention import DECOMPOSED, FULL, RETENTION, STEP
from ..bench_toeplitz import CLIPPED, DIRECT, FEATURES, FFT, KERNELIZED, STRUCTURED, URPE
from ..bench_token_merging import ATTENTION, MERGE, SOFT
from ..cases import BACKWARD, FORWARD, OURS, Call, Case, Contender, Inputs, families
from ..retention_peers import BIDIRECTIONAL
from ..runner import prepare
from ..window_peers import CROSS, SHIFTED

TRAINING = "training step"
DIRECTIONS = {FORWARD: FORWARD, TRAINING: BACKWARD}
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


class Subject(NamedTuple):
    """One operator in one form. ``fit`` are the sizes that prices are found from, ``held_out`` those that judge them."""

    name: str
    family: str
    operator: str
    units: Callable[[Size], Units]
    fit: tuple[Size, ...]
    held_out: tuple[Size, ...]
    case: Callable[[Size], dict] = lambda size: {}  # what a case has beside the size
    contender: str | Contender = OURS
    trains: bool = True
    note: str = ""

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, TRAINING) if self.trains else (FORWARD,)

    def at(self, size: Size) -> Case:
        return Case(self.operator, *size, **self.case(size))

    def inputs(self, size: Size, direction: str, dtype: torch.dtype = torch.float32) -> Inputs:
        operator = families()[self.family].operators[self.operator]
        return operator.inputs(self.at(size), dtype, "cpu").leaves(gradients=direction == TRAINING)

    def call(self, size: Size, inputs: Inputs, direction: str) -> Callable[[], object]:
        contender = self.contender
        if isinstance(contender, str):
            contenders = families()[self.family].operators[self.operator].contenders
            contender = next(c for c in contenders if c.name == contender)
        return prepare(contender, self.at(size), inputs, DIRECTIONS[direction])

    def making(self, size: Size, direction: str, dtype: torch.dtype = torch.float32):
        """What ``allocation.count`` counts: inputs and a call of them, when it is called."""

        def make() -> tuple[Inputs, Callable[[], object]]:
            inputs = self.inputs(size, direction, dtype)
            return inputs, self.call(size, inputs, direction)

        return make


# ---- shapes ----


def grid(tokens: int) -> tuple[int, int]:
    """The squarest grid of so many tokens."""
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return height, tokens // height


def on_grid(size: Size) -> dict:
    return {"grid": grid(size.tokens)}


def _windows(width: int) -> Callable[[Size], dict]:
    return lambda size: {"grid": grid(size.tokens), "window": width}


def _halved(size: Size) -> dict:
    return {"outputs": CHANNELS, "output_tokens": size.tokens - size.tokens // 4}


def _quartered(size: Size) -> dict:
    return {"output_tokens": size.tokens // 4}


# ---- units ----


def _pairs(density: Callable[[Size], float] = lambda size: 1.0) -> Callable[[Size], Units]:
    """Of attention over pairs of tokens: a softmax entry a pair, and products of head_dim."""

    def units(size: Size) -> Units:
        tokens = size.items * size.tokens
        pairs = tokens * size.tokens * density(size)
        channels = tokens * size.head_dim
        return {"call": 1, "tokens": tokens, "channels": channels, "pairs": pairs, "products": pairs * size.head_dim}

    return units


EVERY_PAIR = _pairs()


def _masked(size: Size) -> Units:
    weights = size.heads * size.tokens**2
    return EVERY_PAIR(size) | {"weights": weights} | _result(weights)


def _result(count: float) -> Units:
    """Bytes of a large result: beyond the caches, and beyond what the C library keeps from call to call."""
    return {"far": 4 * count if 4 * count > CACHES else 0, "fresh": 4 * count if 4 * count >= MAPPED else 0}


def _window_density(size: Size) -> float:
    return WINDOW**2 / size.tokens


def _shifted(size: Size) -> Units:
    """Where shifted windows meet the border they hold pairs that are masked by -100, whose weights are denormal."""
    windows = 2 * grid(size.tokens)[0] // WINDOW - 1
    return _pairs(_window_density)(size) | {"border": size.items * windows * WINDOW**4 * size.head_dim}


def _cross_density(size: Size) -> float:
    """Half of the heads have stripes down, half across."""
    return STRIPE * sum(grid(size.tokens)) / 2 / size.tokens


def _line_density(size: Size) -> float:
    return sum(grid(size.tokens)) / size.tokens


def _state(size: Size) -> Units:
    """Of a scan over chunks of fixed length: a state of head_dim x head_dim is read and updated."""
    tokens = size.items * size.tokens
    channels = tokens * size.head_dim
    return {"call": 1, "tokens": tokens, "channels": channels, "states": channels * size.head_dim}


def _step(size: Size) -> Units:
    states = size.items * size.head_dim**2
    units = {"call": 1, "tokens": size.items, "channels": size.items * size.head_dim, "states": states}
    return units | _result(states)


def _features(size: Size) -> Units:
    """Positive features of queries and keys."""
    tokens = size.items * size.tokens
    return {"call": 1, "tokens": tokens, "channels": tokens * size.head_dim}


def _direct(size: Size) -> Units:
    pairs = size.items * size.tokens**2
    return _features(size) | {"pairs": pairs, "products": pairs * (FEATURES + size.head_dim)}


def _transforms(size: Size) -> Units:
    length = transform_length(2 * size.tokens - 1)
    count = size.items * FEATURES * (size.head_dim + 1)
    once = length * math.log2(length)
    return _features(size) | {"table": once, "transformed": count * length, "butterflies": count * once}


def _merge(size: Size) -> Units:
    tokens = size.batch * size.tokens
    pairs = tokens * size.tokens / 4
    return {
        "call": 1,
        "tokens": tokens,
        "channels": tokens * (size.head_dim + CHANNELS),
        "pairs": pairs,
        "products": pairs * size.head_dim,
    }


def _soft_merge(size: Size) -> Units:
    pairs = size.batch * size.tokens * size.tokens // 4
    channels = size.batch * size.tokens * size.head_dim
    return {"call": 1, "channels": channels, "pairs": pairs, "products": pairs * size.head_dim}


def _bits(size: Size) -> Units:
    pairs = size.items * size.tokens**2
    units = {"call": 1, "tokens": size.items * size.tokens, "pairs": pairs, "words": pairs * -(-size.head_dim // 32)}
    return units | _result(pairs)


def _linear(size: Size) -> Units:
    """Square layers: head_dim is both widths."""
    weights, channels = size.head_dim**2, size.tokens * size.head_dim
    return {"call": 1, "weights": weights, "channels": channels, "products": channels * size.head_dim}


# ---- designs ----


def _sizes(*groups: tuple) -> tuple[Size, ...]:
    """Every combination of (batch, heads) with tokens and head_dims, group by group."""
    return tuple(Size(*items, n, d) for items, tokens, dims in groups for n in tokens for d in dims)


TWO, EIGHT = (1, 2), (1, 8)
QUADRATIC = _sizes(
    (TWO, (128, 256, 512, 1024, 2048, 4096), (64,)), (EIGHT, (256, 1024), (64,)), (TWO, (512, 2048), (32, 128))
)
QUADRATIC_HELD = _sizes((TWO, (384, 1536, 3072), (64,)), ((2, 2), (768,), (96,)), (TWO, (8192,), (64,)))
FURTHER = _sizes((TWO, (8192,), (64,)))
FURTHER_HELD = (*QUADRATIC_HELD[:-1], *_sizes((TWO, (6144, 16384), (64,))))
LINEAR_SIZES = _sizes(
    (TWO, (512, 1024, 2048, 4096, 8192, 16384), (64,)), (EIGHT, (1024, 4096), (64,)), (TWO, (2048, 8192), (32, 128))
)
LINEAR_HELD = _sizes((TWO, (1536, 6144, 12288), (64,)), ((2, 2), (3072,), (96,)), (TWO, (32768,), (64,)))
SQUARES = tuple(side**2 for side in (16, 24, 32, 48, 64, 96))
GRIDS = _sizes((TWO, SQUARES, (32,)), ((4, 4), (32**2,), (32,)), (TWO, (32**2, 64**2), (16, 64)))
GRIDS_HELD = _sizes((TWO, (40**2, 56**2, 80**2), (32,)), ((2, 2), (40**2,), (48,)), (TWO, (128**2,), (32,)))


def _sdpa(is_causal: bool) -> Contender:
    """On our engine at every size; "auto" goes to torch where that is faster."""

    def engine(case: Case, inputs: Inputs, training: bool) -> Call:
        return lambda: effattn.scaled_dot_product_attention(*inputs[:3], is_causal=is_causal, backend="cpu")

    return Contender(OURS, engine)


def _sequence_parallel(case: Case, inputs: Inputs, training: bool) -> Call:
    """What one rank computes: the retention of its slice, and the state that it sends. It has no one to send to."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from effattn.distributed import sequence_parallel_retention

    return lambda: sequence_parallel_retention(*inputs[:3], **inputs.parameters)


def _quadratic(name: str, family: str, operator: str, units=EVERY_PAIR, **rest) -> Subject:
    return Subject(name, family, operator, units, QUADRATIC, QUADRATIC_HELD, **rest)


def _linear_time(name: str, family: str, operator: str, units=_state, **rest) -> Subject:
    return Subject(name, family, operator, units, LINEAR_SIZES, LINEAR_HELD, **rest)


CAUSAL = "scaled_dot_product_attention, causal"
SEQUENCE_PARALLEL = "sequence_parallel_retention, one rank"
ALL = (
    _quadratic("scaled_dot_product_attention", "attention", "plain", contender=_sdpa(False))._replace(
        fit=QUADRATIC + FURTHER, held_out=FURTHER_HELD
    ),
    _quadratic(CAUSAL, "attention", "causal", _pairs(lambda size: 0.5), contender=_sdpa(True)),
    _quadratic("gaussian_mixture_attention", "gaussian_mixture", "gaussian_mixture", case=on_grid),
    _quadratic("masked_product_attention", "gaussian_mixture", "masked_product", _masked)._replace(
        held_out=_sizes((TWO, (384, 1536, 3072), (64,)), ((2, 2), (768,), (96,)), (TWO, (6144,), (64,)))
    ),
    _quadratic("size_weighted_attention", "token_merging", ATTENTION),
    _quadratic("urpe_attention", "toeplitz", URPE),
    _quadratic("manhattan_attention", "retention", FULL, case=on_grid),
    Subject(
        *("manhattan_attention, decomposed", "retention", DECOMPOSED, _pairs(_line_density)),
        *(GRIDS, GRIDS_HELD, on_grid),
    ),
    Subject("window_attention", "cross_shaped_window", SHIFTED, _shifted, GRIDS, GRIDS_HELD, _windows(WINDOW)),
    Subject(
        *("cross_shaped_window_attention", "cross_shaped_window", CROSS, _pairs(_cross_density)),
        *(GRIDS, GRIDS_HELD, _windows(STRIPE)),
    ),
    _linear_time("retention", "retention", RETENTION),
    _linear_time("retention, bidirectional", "retention", BIDIRECTIONAL),
    _linear_time(SEQUENCE_PARALLEL, "retention", RETENTION, contender=Contender(OURS, _sequence_parallel)),
    Subject(
        *("retention_step", "retention", STEP, _step),
        fit=_sizes(*(((batch, 8), (1,), (64, 128, 256)) for batch in (4, 16, 64))),
        held_out=_sizes(((8, 8), (1,), (96, 256)), ((32, 8), (1,), (128,)), ((128, 8), (1,), (256,))),
        trains=False,
    ),
    _quadratic("kernelized_rpe_attention, direct", "toeplitz", KERNELIZED, _direct, contender=DIRECT),
    _linear_time("kernelized_rpe_attention, fft", "toeplitz", KERNELIZED, _transforms, contender=FFT),
    _linear_time(
        "kernelized_rpe_attention, structured", "toeplitz", CLIPPED, _features, contender=STRUCTURED, trains=False
    ),
    _linear_time("shift_add_attention", "shift_add", "attention"),
    Subject(
        *("shift_linear", "shift_add", "linear", _linear),
        fit=_sizes(((1, 1), (64, 256, 1024, 4096), (256, 512)), ((1, 1), (64, 256), (1024, 2048))),
        held_out=_sizes(((1, 1), (128, 2048), (384,)), ((1, 1), (512,), (768, 1024)), ((1, 1), (512,), (3072,))),
        case=lambda size: {"outputs": size.head_dim},
    ),
    Subject(
        *("binary_matmul", "shift_add", "binary_matmul", _bits, QUADRATIC, QUADRATIC_HELD),
        case=lambda size: {"outputs": size.tokens},
        trains=False,
    ),
    Subject(
        *("bipartite_soft_matching and merge", "token_merging", MERGE, _merge),
        fit=_sizes(
            ((4, 1), (128, 256, 512, 1024, 2048, 4096), (64,)),
            ((16, 1), (256, 1024), (64,)),
            ((4, 1), (1024,), (32, 128)),
        ),
        held_out=_sizes(((4, 1), (384, 1536, 3072), (64,)), ((8, 1), (768,), (96,)), ((4, 1), (6144,), (64,))),
        case=_halved,
        trains=False,
    ),
    Subject(
        *("soft_merge", "token_merging", SOFT, _soft_merge),
        fit=_sizes(
            ((2, 1), (128, 256, 512, 1024, 2048), (384,)),
            ((8, 1), (256, 512), (384,)),
            ((2, 1), (512, 1024), (192, 768)),
        ),
        held_out=_sizes(((2, 1), (384, 768, 1536), (384,)), ((4, 1), (640,), (576,)), ((2, 1), (4096,), (384,))),
        case=_quartered,
    ),
)
SUBJECTS = {subject.name: subject for subject in ALL}
