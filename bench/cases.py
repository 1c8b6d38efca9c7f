"""What is measured: families, their cases, and for each case our operator and every peer on the same inputs.

A family is one file ``bench_<family>.py`` beside this one that defines ``FAMILY``; it is found by its name. A case is
one shape with its inputs; a contender is one way of computing it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import photographs

OURS = "effattn"
UNMASKED = "unmasked sdpa"
FORWARD, BACKWARD = "forward", "backward"


class Inputs(NamedTuple):
    """Tensors of one case in one dtype. ``parameters`` are what else the operator is differentiable in."""

    query: Tensor
    key: Tensor
    value: Tensor
    parameters: dict[str, Tensor]
    fixed: dict[str, Tensor]  # dense masks and the like, never differentiated

    def leaves(self, *, gradients: bool) -> Inputs:
        """The same values as fresh autograd leaves, keeping every stride."""
        q, k, v = (t.detach().requires_grad_(gradients) for t in self[:3])
        parameters = {name: t.detach().clone().requires_grad_(gradients) for name, t in self.parameters.items()}
        return Inputs(q, k, v, parameters, self.fixed)

    def double(self) -> Inputs:
        """The values as stored, in float64."""
        q, k, v = (t.detach().double() for t in self[:3])
        groups = (
            {name: t.detach().double() if t.is_floating_point() else t for name, t in g.items()} for g in self[3:]
        )
        return Inputs(q, k, v, *groups)


Call = Callable[[], Tensor]


class Contender(NamedTuple):
    """One way to compute a case: ``prepare(case, inputs, training)`` returns the call that is timed.

    Whatever a user would do once (compile, or in inference precompute a mask) is done by ``prepare``.
    """

    name: str
    prepare: Callable[[Case, Inputs, bool], Call]
    trains: bool = True  # has a training step on CPU
    exact: bool = True  # computes the case, and not something simpler that serves as a ceiling
    compiles: bool = False  # takes seconds to prepare
    why_not: str = ""  # why there is no training step
    memory: Callable[[Case, bool], float] = lambda case, training: 0.0  # bytes it is known to need, if many


@dataclass(frozen=True)
class Case:
    """One shape of one operator.

    ``asked`` marks a shape whose figures the project promises, ``quick`` one that ``--quick`` measures forward and
    ``trained`` one that it also measures backward; of ``forward_only`` nothing measures it.
    """

    operator: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    label: str = ""
    grid: tuple[int, int] = ()
    num_prefix_tokens: int = 0
    photograph: bool = False
    outputs: int = 0  # last dimension of the result, where it is not head_dim
    output_tokens: int = 0  # tokens of the result, where they are not the tokens
    window: int = 0  # side of a window or width of a stripe, in tokens
    asked: bool = False
    quick: bool = False
    trained: bool = False
    forward_only: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.tokens, self.head_dim

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return *self.shape[:2], self.output_tokens or self.tokens, self.outputs or self.head_dim

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))}{' ' + self.label if self.label else ''}"

    def qkv(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of photographs in the packed layout that a model's qkv projection leaves, or random contiguous ones."""
        generator = torch.Generator().manual_seed(0)
        if self.photograph:
            return photographs.query_key_value(*self.shape, self.grid, self.num_prefix_tokens, generator, dtype, device)
        return tuple(torch.randn(self.shape, generator=generator).to(dtype).to(device) for _ in range(3))


class Operator(NamedTuple):
    """What a case of this operator is made of and how it is computed."""

    inputs: Callable[[Case, torch.dtype, str], Inputs]
    reference: Callable[[Case, Inputs, int], Tensor]  # one head of the specification, (B, 1, N, D), in any dtype
    contenders: tuple[Contender, ...]
    density: Callable[[Case], float] = lambda case: 1.0  # share of the score matrix that has to be computed
    flops: Callable[[Case], float] | None = None  # of the forward, where it is not two products of scores' size
    bytes: Callable[[Case, Inputs], float] | None = None  # least traffic of the forward, where it is not all tensors
    training: float = 3.5  # FLOPs of a training step over the forward's: attention recomputes its scores

    def expected(self, case: Case, inputs: Inputs) -> tuple[list[int], Tensor]:
        """Heads to compare and what they should be, in float64; of long inputs the first and the last head."""
        heads = list(range(case.heads)) if case.tokens <= 1024 else sorted({0, case.heads - 1})
        with torch.no_grad():
            exact = inputs.double()
            return heads, torch.cat([self.reference(case, exact, head) for head in heads], 1)


class Asked(NamedTuple):
    """What ``--asked`` measures of a family's asked shapes; a family of many has to be brief."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    forward: tuple[str, ...] = ()  # contenders, where not all
    backward: tuple[str, ...] = ()
    seconds: float | None = None  # for the timed part of a row


class Sweep(NamedTuple):
    """An operator over growing inputs, all else fixed: a panel of the report's pictures, measured by ``--sweep``."""

    title: str
    cases: tuple[Case, ...]  # by rising tokens
    eager: str = "eager"  # the contender that is the published form
    trained: tuple[int, ...] = ()  # tokens that are also measured backward
    compiled: tuple[int, ...] = ()  # tokens at which contenders that compile take part
    without: tuple[str, ...] = ()  # contenders that are left to the other cases
    rivals: tuple[str, ...] = ()  # contenders that are not exact, and yet what a user would take instead
    axis: str = "tokens"

    @property
    def operators(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(case.operator for case in self.cases))


class Family(NamedTuple):
    name: str
    operators: dict[str, Operator]
    cases: tuple[Case, ...]
    asked: Asked = Asked()
    sweeps: tuple[Sweep, ...] = ()


@functools.cache
def families() -> dict[str, Family]:
    """Every family that has a file ``bench_<family>.py``."""
    folder = str(Path(__file__).parent)
    modules = sorted(m.name for m in pkgutil.iter_modules([folder]) if m.name.startswith("bench_"))
    found = (importlib.import_module(f"{__package__}.{name}").FAMILY for name in modules)
    return {family.name: family for family in found}


def flops(family: Family, case: Case, direction: str) -> float:
    """Two matrix products forward, and of attention five more backward. A multiply-add is two."""
    operator = family.operators[case.operator]
    if operator.flops is not None:
        forward = operator.flops(case)
    else:
        forward = 4.0 * case.batch * case.heads * case.tokens**2 * case.head_dim * operator.density(case)
    return forward if direction == FORWARD else operator.training * forward


def bytes_moved(family: Family, case: Case, inputs: Inputs, direction: str) -> float:
    """Least traffic: each input read once and each result written once; a training step also re-reads what it saved."""

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    tensors, parameters, fixed = size(inputs[:3]), size(inputs.parameters.values()), size(inputs.fixed.values())
    output = inputs.query.numel() * inputs.query.element_size()
    special = family.operators[case.operator].bytes
    forward = tensors + parameters + fixed + output if special is None else special(case, inputs)
    # Backward reads inputs, output and its gradient, and writes the gradients of the inputs.
    return forward if direction == FORWARD else 2 * forward + output + tensors + parameters
