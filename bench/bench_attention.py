"""Plain attention on our engine (no mask, dense additive and boolean masks, causal) against PyTorch's and every peer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effattn.bench.cases import OURS, Call, Case, Contender, Family, Inputs, Operator, Sweep
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled, flex, scores, unmasked_sdpa

import effattn

# torch's CPU flash kernel takes an additive mask of 2 or 4 dimensions; one of 3, as a per-head bias (H, N, N) that is
# left to broadcast, sends it to the plain formula. Both are measured.
ADDITIVE, ADDITIVE_3D, BOOLEAN = "additive mask (1,H,N,N)", "additive mask (H,N,N)", "boolean mask"


def _inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """One mask per head, shared by the batch, as relative position biases are."""
    generator = torch.Generator().manual_seed(1)
    fixed, shape = {}, (case.heads, case.tokens, case.tokens)
    if case.operator in (ADDITIVE, ADDITIVE_3D):
        bias = torch.randn(shape, generator=generator).to(dtype)
        fixed["attn_mask"] = (bias if case.operator == ADDITIVE_3D else bias[None]).to(device)
    if case.operator == BOOLEAN:
        fixed["attn_mask"] = (torch.rand(shape, generator=generator) < 0.5)[None].to(device)
    return Inputs(*case.qkv(dtype, device), {}, fixed)


def _arguments(case: Case, inputs: Inputs) -> dict:
    return {"attn_mask": inputs.fixed.get("attn_mask"), "is_causal": case.operator == "causal"}


def _reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    arguments = _arguments(case, inputs)
    if arguments["attn_mask"] is not None:
        arguments["attn_mask"] = arguments["attn_mask"][..., head : head + 1, :, :]
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
    mask = inputs.fixed.get("attn_mask")
    if case.operator == BOOLEAN:
        mask = torch.zeros_like(mask, dtype=inputs.query.dtype).masked_fill_(~mask, float("-inf"))
    return mask


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
    bias = _additive(case, inputs).view(case.heads, case.tokens, case.tokens).float()

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
        ADDITIVE: Operator(_inputs, _reference, (*CONTENDERS, unmasked_sdpa)),
        ADDITIVE_3D: Operator(_inputs, _reference, (*CONTENDERS, unmasked_sdpa)),
        BOOLEAN: Operator(_inputs, _reference, (*CONTENDERS, unmasked_sdpa)),
        "causal": Operator(_inputs, _reference, CONTENDERS, _causal_density),
    },
    cases=(
        Case("plain", 8, 12, 197, 64, asked=True),
        Case("plain", 1, 12, 1024, 64, asked=True, quick=True, trained=True),
        Case("plain", 1, 8, 4096, 64, asked=True),
        Case("plain", 8, 12, 197, 64, "photographs", (14, 14), 1, photograph=True),
        Case("plain", 1, 12, 1024, 64, "photographs", (32, 32), photograph=True),
        Case(ADDITIVE, 8, 12, 197, 64),
        Case(ADDITIVE, 1, 12, 1024, 64, asked=True, quick=True),
        Case(ADDITIVE, 1, 8, 4096, 64, asked=True),
        Case(ADDITIVE_3D, 1, 12, 1024, 64, asked=True, quick=True),
        Case(ADDITIVE_3D, 1, 8, 4096, 64, asked=True),
        Case(BOOLEAN, 1, 12, 1024, 64),
        Case(BOOLEAN, 1, 8, 4096, 64),
        Case("causal", 1, 12, 1024, 64, quick=True),
        Case("causal", 1, 8, 4096, 64),
    ),
    sweeps=(
        Sweep(
            "Plain attention, 8 heads of 64",
            tuple(Case("plain", 1, 8, tokens, 64) for tokens in (256, 1024, 2048, 4096, 8192)),
            trained=(256, 1024, 4096),
            compiled=(1024, 4096),
        ),
    ),
)


def test_attention(timed_call):
    timed_call()
