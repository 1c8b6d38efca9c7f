"""Masks given by tables over relative positions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._structured_mask import StructuredMask
from .reference.toeplitz import toeplitz_matrix


class KernelizedRPE(StructuredMask):
    """Replaces softmax attention by kernelised attention with a relative position bias: NPRF.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=KernelizedRPE(rpe_bias, projection))`` equals
    ``kernelized_rpe_attention(q, k, v, rpe_bias, projection)``, which documents the formula and the arguments. It is
    another attention and not a mask of the stock one: there are no softmax weights, so that ``scale`` and ``dropout_p``
    have nothing to act on and are refused, and ``dense()`` does not exist. Whether it is causal is an option of the mask.

    Args:
        rpe_bias: (H, 2N - 1), or (H, 2h - 1, 2w - 1) with ``grid``; it receives a gradient.
        projection: (M, D) or (H, M, D), directions of the random features; None for feature_map "identity".
        feature_map, normalize_qk, grid, is_causal, key_padding_mask, method, eps: as
            :func:`effattn.kernelized_rpe_attention`.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.kernelized_rpe_attention`.

    Source:
        Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, arXiv 2106.12566.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> mask = effattn.KernelizedRPE(torch.randn(2, 23), effattn.random_features(4, 8))
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        >>> torch.equal(out, effattn.kernelized_rpe_attention(query, key, value, mask.rpe_bias, mask.projection))
        True
    """

    def __init__(
        self,
        rpe_bias: Tensor,
        projection: Tensor | None = None,
        *,
        feature_map: str = "positive",
        normalize_qk: bool = True,
        grid: tuple[int, int] | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        method: str = "auto",
        eps: float = 0.0,
    ):
        self.rpe_bias, self.projection = rpe_bias, projection
        self.feature_map, self.normalize_qk, self.grid, self.is_causal = feature_map, normalize_qk, grid, is_causal
        self.key_padding_mask, self.method, self.eps = key_padding_mask, method, eps

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        if dropout_p != 0.0:
            raise ValueError(f"KernelizedRPE: dropout_p must be 0 (there are no attention weights), got {dropout_p}")
        if scale is not None:
            raise ValueError(f"KernelizedRPE: scale must be None (there are no scores to scale), got {scale}")
        return ops.kernelized_rpe_attention(
            *(query, key, value, self.rpe_bias, self.projection),
            feature_map=self.feature_map,
            normalize_qk=self.normalize_qk,
            grid=self.grid,
            is_causal=self.is_causal,
            key_padding_mask=self.key_padding_mask,
            method=self.method,
            eps=self.eps,
            backend=backend,
        )

    def dense(self) -> Tensor:
        raise NotImplementedError("KernelizedRPE is no mask of softmax attention and has no dense form")

    def __repr__(self) -> str:
        features = None if self.projection is None else self.projection.shape[-2]
        return (
            f"KernelizedRPE(rpe_bias={tuple(self.rpe_bias.shape)}, num_features={features}, "
            f"feature_map={self.feature_map!r}, grid={self.grid}, is_causal={self.is_causal}, method={self.method!r})"
        )


class RelativePositionBias(StructuredMask):
    """Adds a bias of the relative position to the scaled scores, and multiplies the weights with a coefficient of it.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=RelativePositionBias(rpe_bias, coefficient))`` equals
    ``urpe_attention(q, k, v, coefficient, rpe_bias)``, which documents the formula and the arguments. Without a
    coefficient it is the relative position bias of T5, ALiBi or, on a grid, of BEiT, with no N x N tensor.

    Args:
        rpe_bias: (H, 2N - 1), entry (j - i) + N - 1 for query i and key j, or (H, 2h - 1, 2w - 1) with ``grid``, entry
            (dy + h - 1, dx + w - 1) of key minus query; H may be 1: shared. None with a coefficient alone. It receives a
            gradient.
        coefficient: of the same form, of any sign: URPE; rows are not normalised again. None: ones. It receives a gradient.
        grid: (h, w), rows and columns of the token grid; None: a sequence.
        is_causal: token i sees tokens 0..i only.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.urpe_attention`.

    Source:
        Your Transformer May Not be as Powerful as You Expect, arXiv 2205.13401, section 4.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> mask = effattn.RelativePositionBias(torch.randn(2, 5, 7), grid=(3, 4))
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        >>> dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense())
        >>> torch.allclose(out, dense, atol=1e-5)
        True
    """

    def __init__(
        self,
        rpe_bias: Tensor | None,
        coefficient: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        is_causal: bool = False,
    ):
        if rpe_bias is None and coefficient is None:
            raise ValueError("RelativePositionBias: rpe_bias or coefficient must be given, got None for both")
        self.rpe_bias, self.coefficient, self.grid, self.is_causal = rpe_bias, coefficient, grid, is_causal

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        return ops.urpe_attention(
            *(query, key, value, self.coefficient, self.rpe_bias),
            grid=self.grid,
            is_causal=self.is_causal,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )

    def dense(self) -> Tensor:
        """The additive mask, (H or 1, N, N), in the bias' dtype; -inf above the diagonal where it is causal.

        Raises:
            NotImplementedError: with a coefficient, which multiplies the weights, no mask says the same.
        """
        if self.coefficient is not None:
            raise NotImplementedError(f"{self!r} multiplies the weights, so no dense mask is the same")
        bias = toeplitz_matrix(self.rpe_bias, self.grid)
        if not self.is_causal:
            return bias
        return bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))

    def __repr__(self) -> str:
        bias, coefficient = (None if t is None else tuple(t.shape) for t in (self.rpe_bias, self.coefficient))
        return (
            f"RelativePositionBias(rpe_bias={bias}, coefficient={coefficient}, grid={self.grid}, "
            f"is_causal={self.is_causal})"
        )
