"""Plain attention on our engine (no mask, dense additive mask, causal) against PyTorch's and every peer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effattn.bench.cases import OURS, Call, Case, Contender, Family, Inputs, Operator
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled, flex, scores, unmasked_sdpa

import effattn


def _inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    fixed = {}
    if case.operator == "additive mask":
        generator = torch.Generator().manual_seed(1)
        # One bias per head, shared by the batch, as relative position biases are.
        bias = torch.randn(1, case.heads, case.tokens, case.tokens, generator=generator)
        fixed["attn_mask"] = bias.to(dtype).to(device)
    return Inputs(*case.qkv(dtype, device), {}, fixed)


def _arguments(case: Case, inputs: Inputs) -> dict:
    return {"attn_mask": inputs.fixed.get("attn_mask"), "is_causal": case.operator == "causal"}


def _reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    arguments = _arguments(case, inputs)
    if arguments["attn_mask"] is not None:
        arguments["attn_mask"] = arguments["attn_mask"][:, head : head + 1]
    one_head = (tensor[:, head : head + 1] for tensor in inputs[:3])
    return effattn.reference.scaled_dot_product_attention(*one_head, **arguments)


def _ours(case: Case, inputs: Inputs, training: bool) -> Call:
    arguments = _arguments(case, inputs)
    return lambda: effattn.scaled_dot_product_attention(*inputs[:3], **arguments)


def _torch(case: Case, inputs: Inputs, training: bool) -> Call:
    arguments = _arguments(case, inputs)
    return lambda: F.scaled_dot_product_attention(*inputs[:3], **arguments)


def _additive(case: Case, inputs: Inputs) -> torch.Tensor | None:
    """The mask as a user of the plain formula has it at hand."""
    if case.operator == "causal":
        query = inputs.query
        return query.new_full((case.tokens, case.tokens), float("-inf")).triu(1)
    return inputs.fixed.get("attn_mask")


def _formula(query, key, value, mask, scale):
    logits = scores(query * scale, key)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ value


def _eager(case: Case, inputs: Inputs, training: bool) -> Call:
    q, k, v = inputs[:3]
    mask, scale = _additive(case, inputs), case.head_dim**-0.5
    if training:
        return lambda: _formula(q, k, v, mask, scale)

    def attend():
        logits = scores(q * scale, k)
        return (logits if mask is None else logits.add_(mask)).softmax(-1) @ v

    return attend


def _compiled(case: Case, inputs: Inputs, training: bool) -> Call:
    mask, scale = _additive(case, inputs), case.head_dim**-0.5
    attend = compiled(_formula)
    return lambda: attend(*inputs[:3], mask, scale)


def _flex(case: Case, inputs: Inputs, training: bool) -> Call:
    if case.operator == "causal":
        from torch.nn.attention.flex_attention import create_block_mask

        block_mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, case.tokens, case.tokens, device=inputs.query.device.type
        )
        return flex(inputs, block_mask=block_mask)
    if case.operator == "plain":
        return flex(inputs)
    bias = inputs.fixed["attn_mask"][0].float()

    def add(score, b, h, i, j):
        return score + bias[h, i, j]

    return flex(inputs, lambda: add)


CONTENDERS = (
    Contender(OURS, _ours),
    Contender("torch sdpa", _torch),
    Contender("eager", _eager),
    Contender("torch.compile", _compiled, compiles=True),
    Contender("flex", _flex, trains=False, compiles=True, why_not=NO_FLEX_BACKWARD),
)


def _causal_density(case: Case) -> float:
    return (case.tokens + 1) / (2 * case.tokens)


FAMILY = Family(
    "attention",
    operators={
        "plain": Operator(_inputs, _reference, CONTENDERS),
        "additive mask": Operator(_inputs, _reference, (*CONTENDERS, unmasked_sdpa)),
        "causal": Operator(_inputs, _reference, CONTENDERS, _causal_density),
    },
    cases=(
        Case("plain", 8, 12, 197, 64, asked=True),
        Case("plain", 1, 12, 1024, 64, asked=True, quick=True, trained=True),
        Case("plain", 1, 8, 4096, 64, asked=True),
        Case("plain", 8, 12, 197, 64, "photographs", (14, 14), 1, photograph=True),
        Case("plain", 1, 12, 1024, 64, "photographs", (32, 32), photograph=True),
        Case("additive mask", 8, 12, 197, 64, asked=True),
        Case("additive mask", 1, 12, 1024, 64, asked=True, quick=True),
        Case("additive mask", 1, 8, 4096, 64, asked=True),
        Case("causal", 1, 12, 1024, 64, quick=True),
        Case("causal", 1, 8, 4096, 64),
    ),
)


def test_attention(timed_call):
    timed_call()
