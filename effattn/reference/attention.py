"""Scaled dot-product attention in plain PyTorch: the specification of our plain engine.

    O = softmax(scale * Q K^T + attn_mask) V          a row with nothing to attend to gives 0

A boolean mask is True where a key takes part; ``is_causal`` lets query i see keys 0..i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        group = query.shape[-3] // max(key.shape[-3], 1)
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    logits = scale * query @ key.transpose(-2, -1)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask.to(logits.dtype)
        nothing = (logits == float("-inf")).all(-1, keepdim=True)
        weights = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    else:
        weights = logits.softmax(-1)
    return F.dropout(weights, dropout_p) @ value
