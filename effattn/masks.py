"""Structured masks: passed as ``attn_mask`` to the stock ``F.scaled_dot_product_attention``, they run our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._structured_mask import StructuredMask
from ._toeplitz_masks import KernelizedRPE, RelativePositionBias
from ._token_sizes import TokenSizes
from .reference import mixture_mask, window_mask
from .reference.cross_shaped_window import stripe_window
from .reference.retention import decay_logits, manhattan_distance

__all__ = [
    "CrossShapedWindow",
    "GaussianMixtureMask",
    "KernelizedRPE",
    "ManhattanDecay",
    "RelativePositionBias",
    "RetentionDecay",
    "ShiftAdd",
    "StructuredMask",
    "TokenSizes",
    "Window",
]


class GaussianMixtureMask(StructuredMask):
    """Multiplies the scaled scores by a mixture of Gaussians of the distance on the token grid.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=GaussianMixtureMask(alpha, sigma, grid))`` equals
    ``gaussian_mixture_attention(q, k, v, alpha, sigma, grid)``, which documents the formula and the arguments.

    Args:
        alpha, sigma: (K, H), weight and width of each Gaussian; they receive gradients.
        grid: (h, w), rows and columns of the token grid.
        num_prefix_tokens: tokens before the grid (class tokens), for which the factor is 1.
        eps: added to ``sigma**2``.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.gaussian_mixture_attention`.

    Source:
        arXiv 2309.05375, section 4.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> mask = effattn.GaussianMixtureMask(torch.zeros(1, 2), torch.ones(1, 2), grid=(3, 4))
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # alpha = 0: uniform attention
        >>> torch.allclose(out, value.mean(2, keepdim=True).expand_as(out), atol=1e-6)
        True
    """

    def __init__(
        self, alpha: Tensor, sigma: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0, *, eps: float = 1e-5
    ):
        self.alpha, self.sigma = alpha, sigma
        self.grid, self.num_prefix_tokens, self.eps = grid, num_prefix_tokens, eps

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        return ops.gaussian_mixture_attention(
            query,
            key,
            value,
            self.alpha,
            self.sigma,
            self.grid,
            num_prefix_tokens=self.num_prefix_tokens,
            eps=self.eps,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )

    def dense(self) -> Tensor:
        """M, the (H, N, N) factor of the scaled scores (not an additive mask)."""
        return mixture_mask(self.alpha, self.sigma, self.grid, self.num_prefix_tokens, self.eps)

    def __repr__(self) -> str:
        gaussians, heads = self.alpha.shape
        return (
            f"GaussianMixtureMask(gaussians={gaussians}, heads={heads}, grid={self.grid}, "
            f"num_prefix_tokens={self.num_prefix_tokens})"
        )


class CrossShapedWindow(StructuredMask):
    """Attention inside cross-shaped windows: vertical stripes for half of the heads, horizontal ones for the other.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=CrossShapedWindow(grid, stripe_width))`` equals
    ``cross_shaped_window_attention(q, k, v, grid, stripe_width)``, which documents the arguments.

    Args:
        grid: (h, w), rows and columns of the token grid.
        stripe_width: in tokens.
        lepe_weight, lepe_bias: the depthwise convolution of value that is added to the output; they receive gradients.
        padding: "error", "zero_key" or "mask".

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.cross_shaped_window_attention`.

    Source:
        CSWin Transformer, arXiv 2107.00652.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> mask = effattn.CrossShapedWindow((4, 4), 2)
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        >>> dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense(2))
        >>> torch.allclose(out, dense, atol=1e-5)
        True
    """

    def __init__(
        self,
        grid: tuple[int, int],
        stripe_width: int,
        *,
        lepe_weight: Tensor | None = None,
        lepe_bias: Tensor | None = None,
        padding: str = "error",
    ):
        self.grid, self.stripe_width, self.padding = grid, stripe_width, padding
        self.lepe_weight, self.lepe_bias = lepe_weight, lepe_bias

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        return ops.cross_shaped_window_attention(
            *(query, key, value, self.grid, self.stripe_width),
            lepe_weight=self.lepe_weight,
            lepe_bias=self.lepe_bias,
            padding=self.padding,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )

    def dense(self, heads: int = 2) -> Tensor:
        """The additive mask of (heads, h*w, h*w): 0 inside a stripe, -inf outside; without LePE and zero keys."""
        windows = [
            stripe_window(self.grid, self.stripe_width, orientation) for orientation in ("vertical", "horizontal")
        ]
        masks = [Window(self.grid, window, lepe_weight=self.lepe_weight, padding=self.padding) for window in windows]
        return torch.cat([mask.dense().expand(heads // 2, -1, -1) for mask in masks])

    def __repr__(self) -> str:
        return f"CrossShapedWindow(grid={self.grid}, stripe_width={self.stripe_width}, padding={self.padding!r})"


class Window(StructuredMask):
    """Attention inside the windows that tile a token grid: Swin's, shifted or not, and HAT's overlapping ones.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=Window(grid, window, ...))`` equals
    ``window_attention(q, k, v, grid, window, ...)``, which documents the arguments.

    Args:
        grid: (h, w), rows and columns of the token grid.
        window: (wh, ww), rows and columns of a window.
        shift, overlap: of the windows, (rows, columns).
        bias_table: relative position bias; receives a gradient.
        bias_index: "swin" or "hat_oca".
        lepe_weight, lepe_bias: the depthwise convolution of value that is added to the output; they receive gradients.
        padding: "error", "zero_key" or "mask".

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.window_attention`.

    Source:
        Swin Transformer, arXiv 2103.14030; HAT, arXiv 2205.04437.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> mask = effattn.Window((4, 4), (2, 2), shift=(1, 1), bias_table=torch.randn(9, 2))
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        >>> dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense())
        >>> torch.allclose(out, dense, atol=1e-5)
        True
    """

    def __init__(
        self,
        grid: tuple[int, int],
        window: tuple[int, int],
        *,
        shift: tuple[int, int] = (0, 0),
        overlap: tuple[int, int] = (0, 0),
        bias_table: Tensor | None = None,
        bias_index: str = "swin",
        lepe_weight: Tensor | None = None,
        lepe_bias: Tensor | None = None,
        padding: str = "error",
    ):
        self.grid, self.window, self.shift, self.overlap = grid, window, shift, overlap
        self.bias_table, self.bias_index = bias_table, bias_index
        self.lepe_weight, self.lepe_bias, self.padding = lepe_weight, lepe_bias, padding

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        return ops.window_attention(
            *(query, key, value, self.grid, self.window),
            shift=self.shift,
            overlap=self.overlap,
            bias_table=self.bias_table,
            bias_index=self.bias_index,
            lepe_weight=self.lepe_weight,
            lepe_bias=self.lepe_bias,
            padding=self.padding,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )

    def dense(self) -> Tensor:
        """The additive mask, (h*w, h*w) or (H, h*w, h*w): the bias inside a window, -inf outside.

        Raises:
            NotImplementedError: with LePE, or where zero keys take part, no mask says the same.
        """
        whole = all(extent % size == 0 for extent, size in zip(self.grid, self.window)) and self.overlap == (0, 0)
        if self.lepe_weight is not None or not (whole or self.padding == "mask"):
            raise NotImplementedError(f"{self!r} adds to the output or has zero keys, so no dense mask is the same")
        return window_mask(self.grid, self.window, self.shift, self.overlap, self.bias_table, self.bias_index)

    def __repr__(self) -> str:
        table = None if self.bias_table is None else tuple(self.bias_table.shape)
        return (
            f"Window(grid={self.grid}, window={self.window}, shift={self.shift}, overlap={self.overlap}, "
            f"bias_table={table}, bias_index={self.bias_index!r}, padding={self.padding!r})"
        )


class ShiftAdd(StructuredMask):
    """Replaces softmax attention by linear angular attention with binary queries and keys.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=ShiftAdd(...))`` equals ``shift_add_attention(q, k, v, ...)``,
    which documents the formula. It is another attention and not a mask of the stock one: there are no softmax weights,
    so that ``scale`` and ``dropout_p`` have nothing to act on and are refused, and ``dense()`` does not exist.

    Args:
        binarize: "published", "mean_threshold", "per_head" or "sign".
        residual_weight: (H, 1, T, 1) depthwise convolution of value over the tokens, or None; it receives a gradient.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.shift_add_attention`.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=effattn.ShiftAdd("per_head"))
        >>> torch.equal(out, effattn.shift_add_attention(query, key, value, binarize="per_head"))
        True
    """

    def __init__(self, binarize: str = "published", residual_weight: Tensor | None = None):
        self.binarize, self.residual_weight = binarize, residual_weight

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        if dropout_p != 0.0:
            raise ValueError(f"ShiftAdd: dropout_p must be 0 (there are no attention weights), got {dropout_p}")
        if scale is not None:
            raise ValueError(f"ShiftAdd: scale must be None (queries and keys are normalised), got {scale}")
        return ops.shift_add_attention(
            query, key, value, binarize=self.binarize, residual_weight=self.residual_weight, backend=backend
        )

    def dense(self) -> Tensor:
        raise NotImplementedError("ShiftAdd is no mask of softmax attention and has no dense form")

    def __repr__(self) -> str:
        shape = None if self.residual_weight is None else tuple(self.residual_weight.shape)
        return f"ShiftAdd(binarize={self.binarize!r}, residual_weight={shape})"


class RetentionDecay(StructuredMask):
    """Replaces softmax attention by retention: scores that decay with the distance of two tokens.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=RetentionDecay(log_decay))`` equals ``retention(q, k, v,
    log_decay)``, which documents the formula and the arguments. It is another attention and not a mask of the stock one:
    there are no softmax weights, so that ``dropout_p`` has nothing to act on and is refused, and ``dense()`` does not
    exist. Whether it is causal is an option of the mask, since the function takes no ``is_causal`` beside one.

    Args:
        log_decay: (H,), natural logarithm of gamma, at most 0; it receives a gradient.
        is_causal: False: scores decay to both sides.
        normalize: "none" or "retnet".
        method, chunk_size, cu_seqlens: as :func:`effattn.retention`.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.retention`.

    Source:
        Retentive Network, arXiv 2307.08621, section 2.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> log_decay = effattn.retnet_log_decay(2)
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=effattn.RetentionDecay(log_decay))
        >>> torch.equal(out, effattn.retention(query, key, value, log_decay))
        True
    """

    def __init__(
        self,
        log_decay: Tensor,
        *,
        is_causal: bool = True,
        normalize: str = "none",
        method: str = "auto",
        chunk_size: int | None = None,
        cu_seqlens: Tensor | None = None,
    ):
        self.log_decay, self.is_causal, self.normalize = log_decay, is_causal, normalize
        self.method, self.chunk_size, self.cu_seqlens = method, chunk_size, cu_seqlens

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        if dropout_p != 0.0:
            raise ValueError(f"RetentionDecay: dropout_p must be 0 (there are no attention weights), got {dropout_p}")
        return ops.retention(
            *(query, key, value, self.log_decay),
            is_causal=self.is_causal,
            scale=scale,
            normalize=self.normalize,
            method=self.method,
            chunk_size=self.chunk_size,
            cu_seqlens=self.cu_seqlens,
            backend=backend,
        )

    def dense(self) -> Tensor:
        raise NotImplementedError("RetentionDecay is no mask of softmax attention and has no dense form")

    def __repr__(self) -> str:
        return (
            f"RetentionDecay(heads={len(self.log_decay)}, is_causal={self.is_causal}, normalize={self.normalize!r}, "
            f"method={self.method!r})"
        )


class ManhattanDecay(StructuredMask):
    """Attention that decays with the Manhattan distance of two tokens on their grid.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=ManhattanDecay(log_decay, grid))`` equals
    ``manhattan_attention(q, k, v, log_decay, grid)``, which documents the formula and the arguments.

    Args:
        log_decay: (H,), natural logarithm of gamma, at most 0; it receives a gradient.
        grid: (h, w), rows and columns of the token grid.
        decomposed: attend along rows and then along columns.
        decay: "logits" or "weights".
        num_prefix_tokens: tokens before the grid (class tokens), at distance 0 from all.
        lce_weight, lce_bias: the depthwise convolution of value that is added to the output; they receive gradients.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.manhattan_attention`.

    Source:
        RMT, arXiv 2309.11523, section 3.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> mask = effattn.ManhattanDecay(effattn.rmt_log_decay(2), (3, 4))
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        >>> dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense().float())
        >>> torch.allclose(out, dense, atol=1e-5)
        True
    """

    def __init__(
        self,
        log_decay: Tensor,
        grid: tuple[int, int],
        *,
        decomposed: bool = False,
        decay: str = "logits",
        num_prefix_tokens: int = 0,
        lce_weight: Tensor | None = None,
        lce_bias: Tensor | None = None,
    ):
        self.log_decay, self.grid = log_decay, grid
        self.decomposed, self.decay, self.num_prefix_tokens = decomposed, decay, num_prefix_tokens
        self.lce_weight, self.lce_bias = lce_weight, lce_bias

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        return ops.manhattan_attention(
            *(query, key, value, self.log_decay, self.grid),
            decomposed=self.decomposed,
            decay=self.decay,
            num_prefix_tokens=self.num_prefix_tokens,
            lce_weight=self.lce_weight,
            lce_bias=self.lce_bias,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )

    def dense(self) -> Tensor:
        """The additive mask log_decay * D, (H, N, N), in log_decay's dtype.

        Raises:
            NotImplementedError: decomposed, with decay="weights" or with LCE no mask says the same.
        """
        if self.decomposed or self.decay != "logits" or self.lce_weight is not None:
            raise NotImplementedError(
                f"{self!r} is decomposed, multiplies the weights or adds to the output, so no dense mask is the same"
            )
        return decay_logits(
            self.log_decay, manhattan_distance(self.grid, self.num_prefix_tokens, self.log_decay.device)
        )

    def __repr__(self) -> str:
        return (
            f"ManhattanDecay(heads={len(self.log_decay)}, grid={self.grid}, decomposed={self.decomposed}, "
            f"decay={self.decay!r}, num_prefix_tokens={self.num_prefix_tokens}, lce={self.lce_weight is not None})"
        )
