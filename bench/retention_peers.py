"""Peers of retention and Manhattan attention, written as a good user would.

Decays are constants to every peer, as in the published modules: tables of them are made once, outside the clock, in
inference and in training, and only our call pays for a gradient of log_decay. FlexAttention is no peer of retention: its
softmax cannot be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.reference import manhattan_distance
from effattn.reference.retention import decay_logits, powers

from .cases import Call, Case, Inputs
from .peers import compiled, flex

CHUNK = 64  # tokens of a chunk of the eager chunkwise form; 128 was slower here
BIDIRECTIONAL = "bidirectional"
Same = Callable[[Callable], Callable]


def uncompiled(function: Callable) -> Callable:
    return function


def _constants(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """exponents -> gamma^exponents, (H, *exponents), in query's dtype."""
    exact = inputs.parameters["log_decay"].detach().double()
    return lambda exponents: powers(exact, exponents.to(exact.device)).to(inputs.query.dtype)


# ---- retention ----


def causal_sdpa(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: F.scaled_dot_product_attention(*inputs[:3], is_causal=True)


def parallel(case: Case, inputs: Inputs, training: bool) -> Call:
    """(s Q K^T * G) V with all of G at hand."""
    query, key, value = inputs[:3]
    position = torch.arange(case.tokens)
    distance = position[:, None] - position
    weights = _constants(inputs)(distance.abs())
    if case.operator != BIDIRECTIONAL:
        weights = weights.tril_()
    weights = weights.mul_(case.head_dim**-0.5)
    if training:
        return lambda: (query @ key.mT * weights) @ value
    return lambda: (query @ key.mT).mul_(weights) @ value


def parallel_memory(case: Case, training: bool) -> float:
    """G, and score-sized tensors alive at once."""
    scores = case.heads * case.tokens**2
    return 4.0 * scores * (1 + case.batch * (4 if training else 1)) + 8.0 * scores


def chunkwise(how: Same = uncompiled) -> Callable[[Case, Inputs, bool], Call]:
    """All chunks of the parallel form in batched products, states handed on by a loop over chunks."""

    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        length = math.gcd(case.tokens, CHUNK)
        scale, gamma = case.head_dim**-0.5, _constants(inputs)
        position = torch.arange(length)
        distance = position[:, None] - position
        whole = gamma(torch.tensor(length))[:, None, None]
        inside = scale * gamma(distance.abs())[:, None]
        entering = scale * gamma(position + 1)[:, None, :, None]
        left = gamma(length - 1 - position)[:, None, :, None]
        both_ways = case.operator == BIDIRECTIONAL
        if not both_ways:
            inside = inside.tril()
        leaving = scale * gamma(length - position)[:, None, :, None]
        ahead = gamma(position)[:, None, :, None]

        def handed_on(updates: list[Tensor]) -> Tensor:
            states = [torch.zeros_like(updates[0])]
            for update in updates[:-1]:
                states.append(torch.addcmul(update, whole, states[-1]))
            return torch.stack(states, 2)

        def retention(query, key, value):
            query, key, value = (t.unflatten(2, (-1, length)) for t in (query, key, value))
            times, plus = (torch.mul, torch.add) if training else (Tensor.mul_, Tensor.add_)
            output = times(query @ key.mT, inside) @ value
            before = handed_on(((key * left).mT @ value).unbind(2))
            output = plus(output, (query * entering) @ before)
            if both_ways:
                after = handed_on(((key * ahead).mT @ value).flip(2).unbind(2)).flip(2)
                output = plus(output, (query * leaving) @ after)
            return output.flatten(2, 3)

        retention = how(retention)
        return lambda: retention(*inputs[:3])

    return prepare


def chunkwise_memory(case: Case, training: bool) -> float:
    """Updates and states, and the chunks' scores."""
    chunks = case.tokens / math.gcd(case.tokens, CHUNK)
    state = case.head_dim * (case.outputs or case.head_dim)
    per_head = chunks * (3 * state + 2 * CHUNK**2)
    return 4.0 * case.batch * case.heads * per_head * (3 if training else 1)


def step(how: Same = uncompiled, *, inplace: bool = False) -> Callable[[Case, Inputs, bool], Call]:
    """S = gamma S + k^T v and o = s q S."""

    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        query, key, value = inputs[:3]
        scale, decay = case.head_dim**-0.5, inputs.parameters["log_decay"].detach().exp()[:, None, None]
        state = inputs.fixed["state"].clone() if inplace else inputs.fixed["state"]

        def one_token(query, key, value, state):
            query, key, value = (t.to(state.dtype) for t in (query, key, value))
            new = (state.mul_ if inplace else state.mul)(decay).addcmul_(key.mT, value)
            return (scale * query) @ new, new

        one_token = how(one_token)
        return lambda: one_token(query, key, value, state)[0].to(query.dtype)

    return prepare


# ---- Manhattan attention ----


def _line(length: int) -> Tensor:
    position = torch.arange(length)
    return (position[:, None] - position).abs()


def _bias(inputs: Inputs, distance: Tensor) -> Tensor:
    """log_decay D, (H, *D), in query's dtype."""
    exact = inputs.parameters["log_decay"].detach().double()
    return decay_logits(exact, distance.to(exact.device)).to(inputs.query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return (query @ key.mT + bias).softmax(-1) @ value


def _enhanced(output: Tensor, value: Tensor, grid, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """output, with the depthwise convolution of value over the grid where there is one."""
    if weight is None:
        return output
    image = value.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, grid)
    convolved = F.conv2d(image, weight, bias, padding=weight.shape[2] // 2, groups=weight.shape[0])
    return output + convolved.flatten(2).unflatten(1, value.shape[1::2]).mT


def published(how: Same = uncompiled) -> Callable[[Case, Inputs, bool], Call]:
    """The published module's attention part: masks at hand, along x then along y where it is decomposed."""

    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        height, width = case.grid
        lce = (inputs.parameters.get("lce_weight"), inputs.parameters.get("lce_bias"))
        scale = case.head_dim**-0.5
        if not is_decomposed(case):
            bias = _bias(inputs, manhattan_distance(case.grid))

            def attend(query, key, value, weight, lce_bias):
                return _enhanced(_attend(query, key * scale, value, bias), value, case.grid, weight, lce_bias)

        else:
            along_x, along_y = _bias(inputs, _line(width)), _bias(inputs, _line(height))

            def attend(query, key, value, weight, lce_bias):
                rows = [t.unflatten(2, case.grid).transpose(1, 2) for t in (query, key * scale, value)]  # B, h, H, w, D
                first = over_lines(*rows, along_x)
                columns = (t.permute(0, 3, 2, 1, 4) for t in (*rows[:2], first))  # B, w, H, h, D
                output = over_lines(*columns, along_y).permute(0, 2, 3, 1, 4).flatten(2, 3)
                return _enhanced(output, value, case.grid, weight, lce_bias)

            def over_lines(query, key, value, bias):
                if how is uncompiled:
                    return _attend(query, key, value, bias)
                lines = (t.flatten(0, 1) for t in (query, key, value))  # of five dimensions its attention pattern fails
                return _attend(*lines, bias).unflatten(0, query.shape[:2])

        attend = how(attend)
        return lambda: attend(*inputs[:3], *lce)

    return prepare


def is_decomposed(case: Case) -> bool:
    return "decomposed" in case.operator


def dense_bias_sdpa(case: Case, inputs: Inputs, training: bool) -> Call:
    bias = _bias(inputs, manhattan_distance(case.grid))[None]
    return lambda: F.scaled_dot_product_attention(*inputs[:3], attn_mask=bias)


def flex_manhattan(case: Case, inputs: Inputs, training: bool) -> Call:
    log_decay, width = inputs.parameters["log_decay"].detach().float(), case.grid[1]

    def decayed(score, b, h, i, j):
        distance = (i // width - j // width).abs() + (i % width - j % width).abs()
        return score + log_decay[h] * distance

    return flex(inputs, lambda: decayed)


__all__ = [
    "BIDIRECTIONAL",
    "causal_sdpa",
    "chunkwise",
    "chunkwise_memory",
    "compiled",
    "dense_bias_sdpa",
    "flex_manhattan",
    "is_decomposed",
    "parallel",
    "parallel_memory",
    "published",
    "step",
]
