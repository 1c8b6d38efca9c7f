"""What ``nn.MultiheadAttention`` computes around its attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    weights: Tensor | list[Tensor],
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    batch_first: bool,
    attend: Callable,
) -> Tensor:
    """Projections, heads and output of ``nn.MultiheadAttention`` on batched tokens, as its masks are understood there."""
    heads = [
        tokens.unflatten(2, (num_heads, -1)).permute((0, 2, 1, 3) if batch_first else (1, 2, 0, 3))
        for tokens in _projected(query, key, value, weights, bias)
    ]
    options = {"dropout_p": dropout_p}
    if is_causal and attn_mask is None:
        raise RuntimeError("nn.MultiheadAttention: is_causal is a hint about attn_mask, which must be given with it")
    if is_causal and key_padding_mask is None:
        options["is_causal"] = True
    else:
        mask = _merged(attn_mask, key_padding_mask, heads[0])
        if mask is not None:
            options["attn_mask"] = mask
    out = attend(*heads, **options)
    out = out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
    return F.linear(out, out_weight, out_bias)


def _projected(query, key, value, weights, bias) -> list[Tensor]:
    if query is key and key is value and isinstance(weights, Tensor):
        return list(F.linear(query, weights, bias).chunk(3, -1))
    weights = weights.chunk(3) if isinstance(weights, Tensor) else weights
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, weight, b) for x, weight, b in zip((query, key, value), weights, biases)]


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """One mask for SDPA, in which True means that a key takes part; theirs are the other way round."""
    batch, heads, length, _ = query.shape
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.view(batch, heads, length, -1) if attn_mask.dim() == 3 else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if all(mask.dtype == torch.bool for mask in masks):
        masks = [mask.logical_not() for mask in masks]
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
    masks = [
        query.new_zeros(()).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask.to(query.dtype)
        for mask in masks
    ]
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]
