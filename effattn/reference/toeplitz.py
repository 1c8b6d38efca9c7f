"""Attention with Toeplitz matrices in plain PyTorch: the specification (NPRF, 2106.12566; URPE, 2205.13401).

Toeplitz     T_ij = t[j - i + N - 1];  on a grid t[dy + h - 1, dx + w - 1], (dy, dx) being key minus query
features     x <- x / |x| with normalize_qk;  a shift s of the exponent makes no difference where eps = 0
    positive       phi(x) = exp(w_m . x - |x|^2 / 2 - s) / sqrt(M)
    trigonometric  phi(x) = exp(|x|^2 / 2 - s) [sin(w_m . x), cos(w_m . x)] / sqrt(M)
    identity       phi(x) = x
kernelized   W_ij = (phi(q_i) . phi(k_j)) exp(b_{j-i} - max b),   O_i = sum_j W_ij v_j / (sum_j W_ij + eps)
URPE         O = (softmax(s Q K^T + B) * C) V                      B and C Toeplitz; not normalised again
causal: only j <= i. A row of no weight at all gives 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def toeplitz_matrix(entries: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """(H, N, N) of (H, 2N - 1), or of (H, 2h - 1, 2w - 1) with ``grid`` = (h, w)."""
    if grid is None:
        height, width = 1, (entries.shape[-1] + 1) // 2
    else:
        height, width = grid
    place = torch.arange(height, device=entries.device)[:, None] * (2 * width - 1)
    place = (place + torch.arange(width, device=entries.device)).flatten()
    middle = max(height - 1, 0) * (2 * width - 1) + width - 1
    return entries.flatten(1)[:, place - place[:, None] + middle]


def relative_weights(bias: Tensor, dim: int = -1) -> Tensor:
    """exp(b - max b); of nothing but -inf: zeros."""
    if not bias.numel():
        return bias.exp()
    highest = bias.amax(dim, keepdim=True)
    return (bias - torch.where(highest == float("-inf"), 0.0, highest)).exp()


def unit(x: Tensor) -> Tensor:
    """x / |x|, of at least float32, since squares leave the range of float16; a row of zeros stays."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    squared = exact.square().sum(-1, keepdim=True)
    return torch.where(squared == 0, 0.0, exact * torch.where(squared == 0, 1.0, squared).rsqrt()).to(x.dtype)


def feature_map(
    x: Tensor,
    projection: Tensor,
    kind: str = "positive",
    normalize: bool = True,
    shift: str = "none",
    mask: Tensor | None = None,
) -> Tensor:
    """phi of (B, H, N, D) by (M, D) or (H, M, D) directions: (B, H, N, M), trigonometric 2 M.

    ``shift``: what is subtracted from the exponents, "none", the largest of each "row", or of each "head" among the rows
    that are not masked. ``mask``: (B, N), True: a row of zeros.
    """
    projection = projection.to(x.dtype)
    if normalize:
        x = unit(x)
    product = x @ projection.mT
    half_square = x.square().sum(-1, keepdim=True) / 2
    exponent = product - half_square if kind == "positive" else half_square
    if mask is not None:
        mask = mask[:, None, :, None]
        exponent = exponent.masked_fill(mask, float("-inf"))
    if shift != "none" and exponent.numel():
        over = (-1,) if shift == "row" else (-2, -1)
        highest = exponent.detach().amax(over, keepdim=True)
        exponent = exponent - torch.where(highest == float("-inf"), 0.0, highest)
    factor = projection.shape[-2] ** -0.5
    if kind == "positive":
        return exponent.exp() * factor
    waves = torch.cat((product.sin(), product.cos()), -1)
    return exponent.exp() * factor * waves


def toeplitz_linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    grid: tuple[int, int] | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    if key_padding_mask is not None:
        key_features = key_features.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    exact = torch.promote_types(rpe_bias.dtype, torch.promote_types(value.dtype, torch.float32))
    bias = rpe_bias.to(exact)
    matrix = toeplitz_matrix(relative_weights(bias.flatten(1)).view(bias.shape), grid).to(value.dtype)
    if is_causal:
        matrix = matrix.tril()
    weights = query_features @ key_features.mT * matrix
    normalizer = weights.sum(-1, keepdim=True) + eps
    nothing = normalizer == 0
    return ((weights @ value) / normalizer.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def kernelized_rpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor | None = None,
    kind: str = "positive",
    normalize_qk: bool = True,
    grid: tuple[int, int] | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    if kind != "identity":
        shifts = ("row", "head") if eps == 0 else ("none", "none")
        query = feature_map(query, projection, kind, normalize_qk, shifts[0])
        key = feature_map(key, projection, kind, normalize_qk, shifts[1], key_padding_mask)
    return toeplitz_linear_attention(query, key, value, rpe_bias, grid, is_causal, key_padding_mask, eps)


def urpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficient: Tensor | None,
    rpe_bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * query @ key.mT
    if rpe_bias is not None:
        logits = logits + toeplitz_matrix(rpe_bias, grid).to(logits.dtype)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    nothing = (logits == float("-inf")).all(-1, keepdim=True)
    weights = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    weights = F.dropout(weights, dropout_p)
    if coefficient is not None:
        weights = weights * toeplitz_matrix(coefficient, grid).to(weights.dtype)
    return weights @ value
