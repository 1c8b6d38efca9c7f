"""Gaussian-mixture-mask attention in plain PyTorch: the specification (arXiv 2309.05375, equations 5 to 7).

r2(i, j)  = (x_i - x_j)^2 + (y_i - y_j)^2
M_h(i, j) = sum_k alpha[k, h] * exp(-r2(i, j) / (2 * (sigma[k, h]^2 + eps)))         1 where i or j is a prefix token
O         = softmax((scale * Q K^T) * M) V
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture_mask(
    alpha: Tensor, sigma: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0, eps: float = 1e-5
) -> Tensor:
    """M as a dense (H, N, N) tensor, in alpha's dtype but at least float32."""
    height, width = grid
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    alpha, sigma = alpha.to(dtype)[..., None, None], sigma.to(dtype)[..., None, None]
    y = torch.arange(height, dtype=dtype, device=alpha.device).repeat_interleave(width)
    x = torch.arange(width, dtype=dtype, device=alpha.device).repeat(height)
    squared_distance = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2
    mask = (alpha * torch.exp(-squared_distance / (2 * (sigma**2 + eps)))).sum(0)
    return F.pad(mask, (num_prefix_tokens, 0, num_prefix_tokens, 0), value=1.0)


def gaussian_mixture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    eps: float = 1e-5,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    mask = mixture_mask(alpha.to(torch.promote_types(alpha.dtype, query.dtype)), sigma, grid, num_prefix_tokens, eps)
    return masked_product_attention(query, key, value, mask, scale, dropout_p)


def masked_product_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """O = softmax((scale * Q K^T) * weight) V, weight (H, N, N) or (N, N)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (scale * query @ key.transpose(-2, -1)) * weight.to(query.dtype)
    return F.dropout(logits.softmax(-1), dropout_p) @ value
