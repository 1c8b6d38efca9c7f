"""One sample call of every registered operator, for checks that know nothing of what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conformance import CASES, Case, small
from torch import Tensor

import effattn


@dataclass(frozen=True, repr=False)
class Sample:
    """A call of one registered operator.

    Args:
        op: name in the registry.
        call: (tensors, options, backend) -> its result, a tensor or a tuple of them.
        draw: (length, batch, generator) -> float32 or integer arguments by name, batch first.
        options: length -> its other arguments.
        lengths: what `draw` takes: the plain one, then three that one compiled graph is to serve.
        differentiable: the arguments that receive a gradient.
        parameters: the arguments without a batch dimension.
        casts: the arguments that autocast puts into its dtype.
        linear: the arguments that have a forward-mode derivative.
        beneath: argument -> its name in the torch op, which a refused tangent is told by, where that is another.
        flops: (length, batch) -> FLOPs of the forward by the operator's convention.
        training_flops: of forward and backward over those of the forward alone.
    """

    op: str
    call: Callable = field(repr=False)
    draw: Callable = field(repr=False)
    options: Callable = field(repr=False)
    lengths: tuple
    differentiable: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    casts: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    beneath: dict[str, str] = field(default_factory=dict, repr=False)
    flops: Callable | None = None
    training_flops: float = 3.5

    def __repr__(self) -> str:
        return self.op

    def tensors(self, length=None, batch: int = 2, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
        length = self.lengths[0] if length is None else length
        drawn = self.draw(length, batch, torch.Generator().manual_seed(seed))
        return {name: tensor.to(device) for name, tensor in drawn.items()}

    def __call__(self, tensors: dict[str, Tensor], backend: str, options: dict | None = None) -> tuple[Tensor, ...]:
        options = self.options(self.lengths[0]) if options is None else options
        result = self.call(tensors, options, backend)
        return result if isinstance(result, tuple) else (result,)


LINEAR = {
    "cross_shaped_window_attention": ("value", "lepe_bias"),
    "stripe_attention": ("value", "lepe_bias"),
    "window_attention": ("value", "lepe_bias"),
    "retention": ("value", "initial_state"),
    "retention[normalized]": ("value",),  # the normalisation depends on the state
    "manhattan_attention[decomposed]": ("value", "lce_bias"),
    "shift_add_attention": (),
}
"""Of an operator of attention or one mode of it, what has a forward-mode derivative, where it is not value alone."""

BENEATH = {
    "manhattan_attention": {"log_decay": "bias", "lce_weight": "weight"},
    "retention[normalized]": {"initial_state": "row_scale"},
    "window_attention": {"bias_table": "bias"},
    "kernelized_rpe_attention": {"query": "x", "key": "x", "rpe_bias": "bias"},
    "toeplitz_linear_attention": {"rpe_bias": "bias"},
    "urpe_attention": {"rpe_bias": "bias"},
    "size_weighted_attention": {"sizes": "log_sizes"},
}
"""What the torch op calls an argument, where the public function has another name."""


def sample_of(case: Case, backend: str) -> Sample:
    """The sample that a case of the conformance suite makes."""

    def draw(shape, batch, generator):
        return case.tensors(shape.with_(batch=batch), seed=generator.initial_seed())

    plain = small(backend)
    unchanged = {*case.parameters, *case.in_float32, *case.not_autocast}
    return Sample(
        op=case.op,
        call=case,
        draw=draw,
        options=case.options,
        lengths=(plain, *(plain.with_(grid=grid, prefix=2) for grid in case.grids)),
        differentiable=case.differentiable,
        parameters=case.parameters,
        casts=tuple(name for name in case.tensors(plain) if name not in unchanged),
        linear=LINEAR.get(str(case), LINEAR.get(case.op, ("value",))),
        beneath=BENEATH.get(str(case), BENEATH.get(case.op, {})),
        flops=lambda shape, batch: case.flops(shape.with_(batch=batch)),
    )


def _normal(generator, *size) -> Tensor:
    return torch.randn(size, generator=generator)


# ---- operators that are no attention of query, key and value ----


def _signs(generator, *size) -> Tensor:
    return effattn.pack_signs(_normal(generator, *size), backend="reference")


def _plan(tokens: int, batch: int, generator) -> dict[str, Tensor]:
    """Every third token joins the one before it."""
    target = torch.arange(tokens) - (torch.arange(tokens) + 1) // 3
    outputs = int(target[-1]) + 1
    source = torch.stack([torch.randperm(outputs, generator=generator)[target] for _ in range(batch)])
    order = source.argsort(dim=1, stable=True)
    counts = torch.nn.functional.one_hot(source, outputs).sum(1).cumsum(1)
    offsets = torch.cat([counts.new_zeros(batch, 1), counts], 1)
    return {"source": source.int(), "members": order.int(), "offsets": offsets.int()}


def _merged(tokens: int) -> int:
    return tokens - tokens // 3


def _merge(method: str, draw_more: Callable, call: Callable, **more) -> Sample:
    def draw(tokens, batch, generator):
        return {**draw_more(tokens, batch, generator), **_plan(tokens, batch, generator)}

    def plan_and_call(tensors, options, backend):
        plan = effattn.TokenMerge(*(tensors[name] for name in ("source", "members", "offsets")))
        return call(plan, tensors, backend)

    return Sample(
        op=f"TokenMerge.{method}",
        call=plan_and_call,
        draw=draw,
        options=lambda tokens: {},
        lengths=(13, 12, 20, 31),
        training_flops=2,
        **more,
    )


def _draw_step(heads, batch, generator):
    return {
        "query": _normal(generator, batch, heads, 1, 16),
        "key": _normal(generator, batch, heads, 1, 16),
        "value": _normal(generator, batch, heads, 1, 16),
        "log_decay": -torch.rand(heads, generator=generator),
        "state": _normal(generator, batch, heads, 16, 16),
    }


def _shift_linear(tensors, options, backend):
    weight = effattn.PackedShiftWeight(tensors["codes"], None, 4, tensors["input"].shape[-1])
    return effattn.shift_linear(tensors["input"], weight, tensors["bias"], backend=backend)


def _draw_shift_linear(rows, batch, generator):
    weight = effattn.quantize_power_of_two(_normal(generator, 7, 10))
    return {"input": _normal(generator, batch, rows, 10), "codes": weight.codes, "bias": _normal(generator, 7)}


def _matching(tensors, options, backend):
    plan = effattn.bipartite_soft_matching(**tensors, num_merged=3, num_protected=1, backend=backend)
    return plan.source, plan.members, plan.offsets


OTHERS = (
    Sample(
        op="pack_signs",
        call=lambda tensors, options, backend: effattn.pack_signs(**tensors, backend=backend),
        draw=lambda length, batch, generator: {"x": _normal(generator, batch, 3, 5, length)},
        options=lambda length: {},
        lengths=(40, 70, 130, 100),
    ),
    Sample(
        op="add_matmul",
        call=lambda tensors, options, backend: effattn.add_matmul(**tensors, backend=backend),
        draw=lambda length, batch, generator: {
            "packed": _signs(generator, batch, 6, length),
            "dense": _normal(generator, batch, length, 9),
        },
        options=lambda length: {},
        lengths=(40, 70, 130, 100),
        differentiable=("dense",),
        casts=("dense",),
        linear=("dense",),
        flops=lambda length, batch: 2 * batch * 6 * length * 9,
        training_flops=2,
    ),
    Sample(
        op="binary_matmul",
        call=lambda tensors, options, backend: effattn.binary_matmul(**tensors, **options, backend=backend),
        draw=lambda tokens, batch, generator: {
            "left": _signs(generator, batch, tokens, 110),
            "right": _signs(generator, batch, tokens + 2, 110),
        },
        options=lambda tokens: {"length": 110},
        lengths=(6, 5, 9, 12),
        flops=lambda tokens, batch: 2 * batch * tokens * (tokens + 2) * 110,
    ),
    Sample(
        op="hamming_attention",
        call=lambda tensors, options, backend: effattn.hamming_attention(**tensors, **options, backend=backend),
        draw=lambda tokens, batch, generator: {
            "query_bits": _signs(generator, batch, 3, tokens, 110),
            "key_bits": _signs(generator, batch, 3, tokens + 2, 110),
            "value": _normal(generator, batch, 3, tokens + 2, 8),
        },
        options=lambda tokens: {"head_dim": 110},
        lengths=(6, 5, 9, 12),
        differentiable=("value",),
        casts=("value",),
        linear=("value",),
        flops=lambda tokens, batch: 2 * batch * 3 * tokens * (tokens + 2) * (110 + 8),
        training_flops=2,
    ),
    Sample(
        op="retention_step",
        call=lambda tensors, options, backend: effattn.retention_step(**tensors, backend=backend),
        draw=_draw_step,
        options=lambda heads: {},
        lengths=(3, 4, 5, 7),
        differentiable=("query", "key", "value", "log_decay", "state"),
        parameters=("log_decay",),
        casts=("query", "key", "value"),
        linear=("value", "state"),
        flops=lambda heads, batch: 4 * batch * heads * 16 * 16,
        training_flops=3.5 * (4 * 16 * 16 + 2 * (16 + 16)) / (4 * 16 * 16),  # retention's, a chunk of one token
    ),
    Sample(
        op="shift_linear",
        call=_shift_linear,
        draw=_draw_shift_linear,
        options=lambda rows: {},
        lengths=(3, 4, 6, 9),
        differentiable=("input", "bias"),
        parameters=("codes", "bias"),
        casts=("input",),
        linear=("input", "bias"),
        flops=lambda rows, batch: 2 * batch * rows * 10 * 7,
        training_flops=2,
    ),
    _merge(
        "merge",
        lambda tokens, batch, generator: {"x": _normal(generator, batch, tokens, 5)},
        lambda plan, tensors, backend: plan.merge(tensors["x"], backend=backend),
        differentiable=("x",),
        linear=("x",),
        flops=lambda tokens, batch: 2 * batch * tokens * 5,
    ),
    _merge(
        "merge_weighted",
        lambda tokens, batch, generator: {
            "x": _normal(generator, batch, tokens, 5),
            "residual": _normal(generator, batch, tokens, 5),
            "sizes": 1 + torch.rand(batch, tokens, generator=generator),
        },
        lambda plan, tensors, backend: plan.merge_weighted(
            tensors["x"], tensors["sizes"], residual=tensors["residual"], backend=backend
        ),
        differentiable=("x", "residual", "sizes"),
        linear=("x", "residual"),
        flops=lambda tokens, batch: 2 * batch * tokens * 5,
    ),
    _merge(
        "unmerge",
        lambda tokens, batch, generator: {"x": _normal(generator, batch, _merged(tokens), 5)},
        lambda plan, tensors, backend: plan.unmerge(tensors["x"], backend=backend),
        differentiable=("x",),
        linear=("x",),
        flops=lambda tokens, batch: batch * tokens * 5,
    ),
    Sample(
        op="bipartite_soft_matching",
        call=_matching,
        draw=lambda tokens, batch, generator: {
            "metric": _normal(generator, batch, tokens, 4),
            "sizes": 1 + torch.rand(batch, tokens, generator=generator),
        },
        options=lambda tokens: {},
        lengths=(13, 12, 20, 31),
        flops=lambda tokens, batch: 2 * batch * (tokens // 2) * (tokens - tokens // 2) * 4,
    ),
    Sample(
        op="soft_merge",
        call=lambda tensors, options, backend: effattn.soft_merge(**tensors, backend=backend),
        draw=lambda tokens, batch, generator: {
            "tokens": _normal(generator, batch, tokens, 20),
            "logits": _normal(generator, batch, tokens, 7),
        },
        options=lambda tokens: {},
        lengths=(21, 12, 33, 50),
        differentiable=("tokens", "logits"),
        casts=("tokens", "logits"),
        linear=("tokens",),
        flops=lambda tokens, batch: 2 * batch * tokens * 20 * 7,
        training_flops=3,
    ),
)

SAMPLES: dict[str, Sample] = {
    **{op: sample_of(cases[0], "cpu") for op, cases in CASES.items()},
    **{sample.op: sample for sample in OTHERS},
}
"""Registered operator -> its call in the matrix of torch features."""
