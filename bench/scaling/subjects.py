"""What is modelled: operators, the sizes they are measured at, and the units of work that their time is a sum of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

import effattn

from ..bench_retention import DECOMPOSED, FULL, RETENTION, STEP
from ..bench_toeplitz import CLIPPED, DIRECT, FFT, KERNELIZED, STRUCTURED, URPE
from ..bench_token_merging import ATTENTION, MERGE, SOFT
from ..cases import BACKWARD, FORWARD, OURS, Call, Case, Contender, Inputs, families
from ..retention_peers import BIDIRECTIONAL
from ..runner import prepare
from ..window_peers import CROSS, SHIFTED
from . import allocation, units
from .units import CHANNELS, STRIPE, WINDOW, Size, Units, grid

TRAINING = "training step"
DIRECTIONS = {FORWARD: FORWARD, TRAINING: BACKWARD}


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
    training_units: Callable[[Size], Units] | None = None  # where a training step has others

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

    def work(self, size: Size, direction: str, fresh: int) -> Units:
        """All units of a call, ``fresh`` of its bytes being so."""
        counted = self.training_units if direction == TRAINING and self.training_units else self.units
        return counted(size) | {"fresh": fresh}

    def fresh(self, size: Size, direction: str) -> int:
        """``allocation.Bytes.fresh``; without counting where the largest tensor that an operator could make is too small."""
        largest = size.items * (size.tokens * max(size.tokens, size.head_dim, CHANNELS) + size.head_dim**2)
        return allocation.count(self.making(size, direction)).fresh if 4 * largest >= allocation.MAPPED else 0


# ---- shapes ----


def on_grid(size: Size) -> dict:
    return {"grid": grid(size.tokens)}


def _windows(width: int) -> Callable[[Size], dict]:
    return lambda size: {"grid": grid(size.tokens), "window": width}


def _halved(size: Size) -> dict:
    return {"outputs": CHANNELS, "output_tokens": size.tokens - size.tokens // 4}


def _quartered(size: Size) -> dict:
    return {"output_tokens": size.tokens // 4}


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


def _quadratic(name: str, family: str, operator: str, units=units.EVERY_PAIR, **rest) -> Subject:
    return Subject(name, family, operator, units, QUADRATIC, QUADRATIC_HELD, **rest)


def _linear_time(name: str, family: str, operator: str, units=units.state, **rest) -> Subject:
    return Subject(name, family, operator, units, LINEAR_SIZES, LINEAR_HELD, **rest)


CAUSAL = "scaled_dot_product_attention, causal"
SEQUENCE_PARALLEL = "sequence_parallel_retention, one rank"
ALL = (
    _quadratic("scaled_dot_product_attention", "attention", "plain", contender=_sdpa(False))._replace(
        fit=QUADRATIC + FURTHER, held_out=FURTHER_HELD
    ),
    _quadratic(CAUSAL, "attention", "causal", units.pairs(lambda size: 0.5), contender=_sdpa(True)),
    _quadratic("gaussian_mixture_attention", "gaussian_mixture", "gaussian_mixture", case=on_grid),
    _quadratic("masked_product_attention", "gaussian_mixture", "masked_product")._replace(
        held_out=_sizes((TWO, (384, 1536, 3072), (64,)), ((2, 2), (768,), (96,)), (TWO, (6144,), (64,)))
    ),
    _quadratic("size_weighted_attention", "token_merging", ATTENTION),
    _quadratic("urpe_attention", "toeplitz", URPE),
    _quadratic("manhattan_attention", "retention", FULL, case=on_grid),
    Subject(
        *("manhattan_attention, decomposed", "retention", DECOMPOSED, units.pairs(units.line_density)),
        *(GRIDS, GRIDS_HELD, on_grid),
    ),
    Subject(
        "window_attention",
        "cross_shaped_window",
        SHIFTED,
        units.pairs(units.window_density),
        GRIDS,
        GRIDS_HELD,
        _windows(WINDOW),
    ),
    Subject(
        *("cross_shaped_window_attention", "cross_shaped_window", CROSS, units.pairs(units.cross_density)),
        *(GRIDS, GRIDS_HELD, _windows(STRIPE)),
    ),
    _linear_time("retention", "retention", RETENTION),
    _linear_time(
        *("retention, bidirectional", "retention", BIDIRECTIONAL, units.bidirectional(1)),
        training_units=units.bidirectional(2),
    ),
    _linear_time(SEQUENCE_PARALLEL, "retention", RETENTION, contender=Contender(OURS, _sequence_parallel)),
    Subject(
        *("retention_step", "retention", STEP, units.step),
        fit=_sizes(*(((batch, 8), (1,), (64, 128, 256)) for batch in (4, 16, 64))),
        held_out=_sizes(((8, 8), (1,), (96, 256)), ((32, 8), (1,), (128,)), ((128, 8), (1,), (256,))),
        trains=False,
    ),
    _quadratic("kernelized_rpe_attention, direct", "toeplitz", KERNELIZED, units.direct, contender=DIRECT),
    _linear_time("kernelized_rpe_attention, fft", "toeplitz", KERNELIZED, units.transforms, contender=FFT),
    _linear_time(
        "kernelized_rpe_attention, structured", "toeplitz", CLIPPED, units.features, contender=STRUCTURED, trains=False
    ),
    _linear_time("shift_add_attention", "shift_add", "attention"),
    Subject(
        *("shift_linear", "shift_add", "linear", units.linear),
        fit=_sizes(
            ((1, 1), (64, 256, 1024, 4096), (256, 512)), ((1, 1), (64, 256), (1024, 2048)), ((1, 1), (64,), (4096,))
        ),
        held_out=_sizes(((1, 1), (128, 2048), (384,)), ((1, 1), (512,), (768, 1024)), ((1, 1), (512,), (3072,))),
        case=lambda size: {"outputs": size.head_dim},
    ),
    Subject(
        *("binary_matmul", "shift_add", "binary_matmul", units.bits, QUADRATIC, QUADRATIC_HELD),
        case=lambda size: {"outputs": size.tokens},
        trains=False,
    ),
    Subject(
        *("bipartite_soft_matching and merge", "token_merging", MERGE, units.merge),
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
        *("soft_merge", "token_merging", SOFT, units.soft_merge),
        fit=_sizes(
            ((2, 1), (128, 256, 512, 1024, 2048), (384,)),
            ((8, 1), (256, 512), (384,)),
            ((2, 1), (512, 1024), (192, 768)),
            ((8, 1), (2048,), (384,)),
        ),
        held_out=_sizes(((2, 1), (384, 768, 1536), (384,)), ((4, 1), (640,), (576,)), ((2, 1), (4096,), (384,))),
        case=_quartered,
    ),
)
SUBJECTS = {subject.name: subject for subject in ALL}
