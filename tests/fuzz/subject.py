"""What the fuzz needs to know of a public function."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Subject:
    """One public function.

    Args:
        name: what its messages begin with.
        function: called with the arguments by name.
        sample: random generator -> the arguments of a valid call by name, floating tensors in float64.
        differentiable: tensor arguments that receive a gradient.
        in_float32: tensor arguments that are float32 whatever the others' dtype (float64 with float64).
        any_dtype: whether all four floating dtypes are valid.
        sizes: integer arguments that decide how much memory is taken, so that they are not made large.
        shapes: tensor arguments whose own shape decides it, likewise.
        values: tensor arguments whose values may be refused.
        also_named: further words by which a message may name what is wrong.
        also_raises: exceptions that the documentation allows beside ValueError, TypeError and NotImplementedError.
        discontinuous: whether rounding of the arguments may change the result as a whole.
        selects: whether a sum leaves out what the formula multiplies by 0, so that a NaN there is not seen.
        on_meta: whether a call of nothing but meta tensors is valid.
        lenient: arguments -> whether the answer is torch's own, whose care of NaN and of odd shapes is not ours.
        random: arguments -> whether the result is drawn, so that it cannot be compared.
    """

    name: str
    function: Callable
    sample: Callable[[random.Random], dict]
    differentiable: tuple[str, ...] = ()
    in_float32: tuple[str, ...] = ()
    any_dtype: bool = True
    sizes: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    also_named: tuple[str, ...] = ()
    also_raises: tuple[type, ...] = ()
    discontinuous: bool = False
    selects: bool = False
    on_meta: bool = True
    lenient: Callable[[dict], bool] = field(default=lambda arguments: False)
    random: Callable[[dict], bool] = field(default=lambda arguments: bool(arguments.get("dropout_p")))
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name


def defaults(function: Callable) -> dict:
    """The optional arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def normal(rng: random.Random, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rng.getrandbits(32)), dtype=torch.float64)


def extent(rng: random.Random, most: int) -> int:
    """Mostly 1..most, sometimes 0."""
    return 0 if rng.random() < 0.04 else rng.randint(1, most)
