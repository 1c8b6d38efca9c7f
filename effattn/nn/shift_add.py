"""Self-attention from additions, as in ShiftAddViT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops import shift_add_attention
from ..reference.shift_add import binarize
from .shift_linear import ShiftLinear

BINARIZE = ("published", "mean_threshold", "per_head", "sign")
SPARSE_THRESHOLD = 0.02  # published


class ShiftAddAttention(nn.Module):
    """Self-attention of ShiftAddViT: linear in the tokens, with binary queries and keys.

    Projections around :func:`effattn.shift_add_attention`: with q, k, v of each head and b(x) the binary code of x/|x|,

        U = v / 2 + b(q) (b(k)^T v) / pi;   y = proj(U / |U| + dconv(v))

    where dconv is a depthwise convolution over the tokens, one filter per head.

    Args:
        dim: channels of the input and output.
        num_heads: H.
        head_dim: channels of one head, default dim / num_heads.
        qkv_bias, proj_bias: whether the projections have a bias.
        fused_qkv: one projection ``qkv`` as in the published ``pvt_v2.py`` and timm; default ``q`` and ``kv``, as in
            ``pvt.py``.
        binarize: as :func:`effattn.shift_add_attention`. The default "per_head" keeps a sample independent of its batch;
            "published" does not.
        residual_kernel: taps of ``dconv``, odd; 0 for none.
        linear: "dense" for ``nn.Linear`` projections, "shift" for :class:`ShiftLinear`.
        linear_options: further options of :class:`ShiftLinear`.
        sparse_reg: in training, U gains sum_j a_j v_j over the tokens with a_j > 0.02, a = softmax(q k^T / sqrt(D)). That
            term is quadratic in the tokens and runs in plain PyTorch, on the reference. In evaluation it is absent;
            the published code applies it there too.
        proj_drop: probability of zeroing an element of the output.
        backend: passed to the operators.
        device, dtype: of the parameters.

    Shape:
        (B, N, dim) -> the same. The height and width that the published call passes are accepted and not used;
        ``attn_mask`` and ``is_causal`` of timm's call must be left unset.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.shift_add_attention`.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.1, ``LinAngularAttention_binary``; state-dict names are the published.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.ShiftAddAttention(64, num_heads=2)
        >>> attention(torch.randn(3, 50, 64)).shape
        torch.Size([3, 50, 64])
        >>> sorted(attention.state_dict())
        ['dconv.weight', 'kv.weight', 'proj.bias', 'proj.weight', 'q.weight']
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        head_dim: int | None = None,
        proj_bias: bool = True,
        fused_qkv: bool = False,
        binarize: str = "per_head",
        residual_kernel: int = 9,
        linear: str = "dense",
        linear_options: dict | None = None,
        sparse_reg: bool = False,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "ShiftAddAttention"
        biases = {"qkv_bias": qkv_bias, "proj_bias": proj_bias}
        _checks.module_options(name, device, dtype, **biases, fused_qkv=fused_qkv, sparse_reg=sparse_reg)
        if linear_options is not None and not isinstance(linear_options, dict):
            raise TypeError(f"{name}: linear_options must be a dict or None, got {type(linear_options).__name__}")
        _checks.integer(name, "dim", dim, 1)
        _checks.integer(name, "num_heads", num_heads, 1)
        _checks.integer(name, "residual_kernel", residual_kernel, 0)
        proj_drop = _checks.probability(name, "proj_drop", proj_drop)
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"{name}: dim {dim} must be a multiple of num_heads {num_heads}, or give head_dim")
            head_dim = dim // num_heads
        _checks.integer(name, "head_dim", head_dim, 1)
        if residual_kernel and residual_kernel % 2 == 0:
            raise ValueError(f"{name}: residual_kernel must be odd, or 0 for none, got {residual_kernel}")
        _checks.one_of(name, "binarize", binarize, BINARIZE)
        _checks.one_of(name, "linear", linear, ("dense", "shift"))
        if linear_options and linear == "dense":
            raise ValueError(f'{name}: linear_options are options of ShiftLinear and need linear="shift"')
        self.dim, self.num_heads, self.head_dim, self.fused_qkv = dim, num_heads, head_dim, fused_qkv
        self.binarize, self.sparse_reg, self.backend = binarize, sparse_reg, backend
        like = {"device": device, "dtype": dtype}
        inner = num_heads * head_dim

        def layer(inputs, outputs, bias):
            if linear == "dense":
                return nn.Linear(inputs, outputs, bias, **like)
            return ShiftLinear(inputs, outputs, bias, **{"backend": backend, **(linear_options or {}), **like})

        if fused_qkv:
            self.qkv = layer(dim, 3 * inner, qkv_bias)
        else:
            self.q = layer(dim, inner, qkv_bias)
            self.kv = layer(dim, 2 * inner, qkv_bias)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.proj = layer(inner, dim, proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        if residual_kernel:
            padding = residual_kernel // 2, 0
            kernel = residual_kernel, 1
            self.dconv = nn.Conv2d(num_heads, num_heads, kernel, padding=padding, bias=False, groups=num_heads, **like)
        else:
            self.dconv = None

    def forward(
        self, x: Tensor, height: int | None = None, width: int | None = None, *, attn_mask=None, is_causal=False
    ) -> Tensor:
        _checks.layer_input("ShiftAddAttention", "x", x, self.qkv if self.fused_qkv else self.q)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"ShiftAddAttention: x must have shape (batch, tokens, {self.dim}), got {tuple(x.shape)}")
        if attn_mask is not None or isinstance(height, Tensor):
            raise ValueError("ShiftAddAttention: attn_mask must be None: linear attention has no score matrix to mask")
        if is_causal:
            raise ValueError("ShiftAddAttention: is_causal must be False: every token sees all tokens")
        heads = self.num_heads, self.head_dim
        if self.fused_qkv:
            query, key, value = self.qkv(x).unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4)
        else:
            query = self.q(x).unflatten(-1, heads).transpose(1, 2)
            key, value = self.kv(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        weight = None if self.dconv is None else self.dconv.weight
        if self.sparse_reg and self.training:
            out = _with_sparse_term(query, key, value, self.binarize, weight)
        else:
            out = shift_add_attention(
                query, key, value, binarize=self.binarize, residual_weight=weight, backend=self.backend
            )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, binarize={self.binarize!r}, "
            f"sparse_reg={self.sparse_reg}"
        )


def _with_sparse_term(query: Tensor, key: Tensor, value: Tensor, mode: str, residual_weight: Tensor | None) -> Tensor:
    weights = (query.shape[-1] ** -0.5 * query @ key.mT).softmax(-1)
    sparse = torch.where(weights > SPARSE_THRESHOLD, weights, 0.0) @ value
    angular = binarize(query, mode) @ (binarize(key, mode).mT @ value) / math.pi
    out = nn.functional.normalize(sparse + 0.5 * value + angular, dim=-1)
    if residual_weight is None:
        return out
    padding = residual_weight.shape[2] // 2, 0
    return out + nn.functional.conv2d(value, residual_weight.to(value.dtype), padding=padding, groups=value.shape[1])


__all__ = ["ShiftAddAttention"]
