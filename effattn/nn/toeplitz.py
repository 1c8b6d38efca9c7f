"""Attention with learned tables over relative positions: kernelised with random features (NPRF), and URPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops import kernelized_rpe_attention, random_features, urpe_attention
from ..ops.toeplitz_checks import check_causal, check_eps
from ..ops.toeplitz_methods import METHODS

FEATURE_MAPS = ("positive", "trigonometric")


class _RelativeAttention(nn.Module):
    """Projections under timm's names, beside tables over the relative positions of a sequence or of a token grid."""

    own: tuple[str, ...] = ()
    """What a state dict of timm's attention does not hold."""

    def __init__(self, embed_dim, num_heads, num_tokens, grid, is_causal, qkv_bias, proj_drop, backend, device, dtype):
        super().__init__()
        name = type(self).__name__
        _checks.module_options(name, device, dtype, qkv_bias=qkv_bias)
        _checks.integer(name, "embed_dim", embed_dim, 1)
        _checks.integer(name, "num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ValueError(f"{name}: embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        if (num_tokens is None) == (grid is None):
            raise ValueError(f"{name}: one of num_tokens and grid must be given, got {num_tokens} and {grid}")
        if grid is None:
            _checks.integer(name, "num_tokens", num_tokens, 1)
            self.extents: tuple[int, ...] = (num_tokens,)
        else:
            self.extents = _checks.pair_of_integers(name, "grid", grid, 1)
        check_causal(name, is_causal)
        proj_drop = _checks.probability(name, "proj_drop", proj_drop)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.is_causal, self.backend = is_causal, backend
        like = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, qkv_bias, **like)
        self.proj = nn.Linear(embed_dim, embed_dim, **like)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w), or None of a sequence."""
        return self.extents if len(self.extents) == 2 else None

    def _new_table(self, device, dtype) -> nn.Parameter:
        sizes = (2 * extent - 1 for extent in self.extents)
        return nn.Parameter(torch.empty(self.num_heads, *sizes, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not any(f"{prefix}{name}" in state_dict for name in self.own):
            held = dict((*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)))
            for name in self.own:
                if name in held:
                    state_dict[f"{prefix}{name}"] = held[name].detach()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """query, key and value, (B, H, N, D), and the extents of what x is."""
        name = type(self).__name__
        _checks.layer_input(name, "x", x, self.qkv)
        image = x.dim() == 4 and self.grid is not None
        if (x.dim() != 3 and not image) or x.shape[-1] != self.embed_dim:
            allowed = f"(batch, tokens, {self.embed_dim})"
            allowed += f" or (batch, h, w, {self.embed_dim})" if self.grid else ""
            raise ValueError(f"{name}: x must have shape {allowed}, got {tuple(x.shape)}")
        if image:
            extents, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        else:
            extents, tokens = self.grid or (x.shape[1],), x
        if any(extent > most for extent, most in zip(extents, self.extents)):
            given = " x ".join(map(str, extents))
            raise ValueError(f"{name}: x has {given} tokens, at most {' x '.join(map(str, self.extents))} are allowed")
        heads = 3, self.num_heads, self.head_dim
        query, key, value = self.qkv(tokens).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        return query, key, value, extents

    def _table(self, table: Tensor, extents: tuple[int, ...]) -> Tensor:
        """The middle of a table: what serves so many tokens."""
        for dim, (extent, most) in enumerate(zip(extents, self.extents), 1):
            table = table.narrow(dim, most - extent, max(2 * extent - 1, 0))
        return table

    def _finish(self, output: Tensor, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(output.transpose(1, 2).flatten(2))).reshape(x.shape)

    def _place(self) -> str:
        return f"num_tokens={self.extents[0]}" if self.grid is None else f"grid={self.grid}"


class KernelizedRPEAttention(_RelativeAttention):
    """Multi-head kernelised attention with a learned relative position bias.

    Projections around :func:`effattn.kernelized_rpe_attention`. Stands in for timm's attention, whose state dict loads and
    leaves ``rpe_bias`` and ``projection`` as they are. A class token has no place on a grid: give ``num_tokens`` with it.

    Args:
        embed_dim: channels of the input and output.
        num_heads: H.
        num_features: M, random directions, shared by the heads.
        num_tokens: the longest sequence. Shorter ones take the middle of ``rpe_bias``.
        grid: (h, w), rows and columns of the largest token grid; exactly one of ``num_tokens`` and ``grid`` is given.
        feature_map: "positive", or "trigonometric", whose weights may be negative.
        normalize_qk: divide queries and keys by their length first.
        orthogonal: directions are orthogonal in blocks of D.
        is_causal: token i sees tokens 0..i only.
        qkv_bias: of the linear layer ``qkv``.
        proj_drop: dropout of the output. There are no attention weights that could be dropped.
        eps: added to the denominator.
        method: "auto", "direct", "fft" or "structured", as :func:`effattn.kernelized_rpe_attention`.
        backend: passed to the operator.
        device, dtype: of the parameters and of ``projection``.

    Shape:
        (B, N, embed_dim) with N at most ``num_tokens``, or h w with ``grid`` -> the same. With ``grid`` also an image
        (B, h', w', embed_dim), h' <= h and w' <= w. In the call: ``key_padding_mask``, (B, N) bool, True where a key takes
        no part.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.kernelized_rpe_attention`.

    Source:
        Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, arXiv 2106.12566. There is no
        official code; initialised as a vision transformer, truncated normal with deviation 0.02, ``rpe_bias`` too.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.KernelizedRPEAttention(64, 2, num_features=16, num_tokens=50)
        >>> attention(torch.randn(3, 50, 64)).shape, attention(torch.randn(3, 20, 64)).shape
        (torch.Size([3, 50, 64]), torch.Size([3, 20, 64]))
        >>> {name: tuple(tensor.shape) for name, tensor in attention.state_dict().items() if "." not in name}
        {'rpe_bias': (2, 99), 'projection': (16, 32)}
    """

    own = ("rpe_bias", "projection")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_features: int,
        num_tokens: int | None = None,
        grid: tuple[int, int] | None = None,
        feature_map: str = "positive",
        normalize_qk: bool = True,
        orthogonal: bool = True,
        is_causal: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        eps: float = 0.0,
        method: str = "auto",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(embed_dim, num_heads, num_tokens, grid, is_causal, qkv_bias, proj_drop, backend, device, dtype)
        name = type(self).__name__
        _checks.module_options(name, device, dtype, normalize_qk=normalize_qk, orthogonal=orthogonal)
        _checks.integer(name, "num_features", num_features, 1)
        _checks.one_of(name, "feature_map", feature_map, FEATURE_MAPS)
        _checks.one_of(name, "method", method, METHODS)
        eps = check_eps(name, eps)
        self.num_features, self.feature_map, self.normalize_qk = num_features, feature_map, normalize_qk
        self.orthogonal, self.eps, self.method = orthogonal, eps, method
        self.rpe_bias = self._new_table(device, dtype)
        self.register_buffer("projection", torch.empty(num_features, self.head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.rpe_bias, std=0.02)
        self.redraw_projection()

    @torch.no_grad()
    def redraw_projection(self, generator: torch.Generator | None = None) -> None:
        """Draw other random directions, with ``generator`` or torch's own on the CPU."""
        drawn = random_features(self.num_features, self.head_dim, orthogonal=self.orthogonal, generator=generator)
        self.projection.copy_(drawn)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        query, key, value, extents = self._project(x)
        output = kernelized_rpe_attention(
            *(query, key, value, self._table(self.rpe_bias, extents), self.projection),
            feature_map=self.feature_map,
            normalize_qk=self.normalize_qk,
            grid=None if self.grid is None else extents,
            is_causal=self.is_causal,
            key_padding_mask=key_padding_mask,
            method=self.method,
            eps=self.eps,
            backend=self.backend,
        )
        return self._finish(output, x)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_features={self.num_features}, {self._place()}, "
            f"feature_map={self.feature_map!r}, is_causal={self.is_causal}, method={self.method!r}"
        )


class URPEAttention(_RelativeAttention):
    """Multi-head softmax attention whose weights are multiplied with learned coefficients of the relative position.

    Projections around :func:`effattn.urpe_attention`. Stands in for timm's attention, whose state dict loads and leaves the
    tables as they are. With the coefficients at 1 and without bias it then computes the same. A class token has no place
    on a grid: give ``num_tokens`` with it.

    Args:
        embed_dim: channels of the input and output.
        num_heads: H.
        num_tokens: the longest sequence. Shorter ones take the middle of the tables.
        grid: (h, w), rows and columns of the largest token grid; exactly one of ``num_tokens`` and ``grid`` is given.
        rpe_bias: also learn a relative position bias, added to the scores before the softmax.
        is_causal: token i sees tokens 0..i only.
        qkv_bias: of the linear layer ``qkv``.
        attn_drop: dropout of the attention weights; in training, above 0, the reference serves the call.
        proj_drop: dropout of the output.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (B, N, embed_dim) with N at most ``num_tokens``, or h w with ``grid`` -> the same. With ``grid`` also an image
        (B, h', w', embed_dim), h' <= h and w' <= w.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.urpe_attention`.

    Source:
        Your Transformer May Not be as Powerful as You Expect, arXiv 2205.13401, section 4; lsj2408/URPE. ``coefficient``
        starts at 1, softmax attention; the official code shares coefficients among distances in buckets and draws them
        as BERT's weights: ``nn.init.normal_(attention.coefficient, std=0.02)``. The rest starts as a vision transformer.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.URPEAttention(64, 2, grid=(7, 5), rpe_bias=False)
        >>> attention(torch.randn(3, 35, 64)).shape, attention(torch.randn(3, 4, 5, 64)).shape
        (torch.Size([3, 35, 64]), torch.Size([3, 4, 5, 64]))
        >>> attention.coefficient.shape
        torch.Size([2, 13, 9])
    """

    own = ("coefficient", "rpe_bias")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_tokens: int | None = None,
        grid: tuple[int, int] | None = None,
        rpe_bias: bool = True,
        is_causal: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(embed_dim, num_heads, num_tokens, grid, is_causal, qkv_bias, proj_drop, backend, device, dtype)
        name = type(self).__name__
        if not isinstance(rpe_bias, bool):
            raise TypeError(f"{name}: rpe_bias must be a bool, got {type(rpe_bias).__name__}")
        attn_drop = _checks.probability(name, "attn_drop", attn_drop)
        self.attn_drop = nn.Dropout(attn_drop)
        self.coefficient = self._new_table(device, dtype)
        self.register_parameter("rpe_bias", self._new_table(device, dtype) if rpe_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.coefficient)
        if self.rpe_bias is not None:
            nn.init.trunc_normal_(self.rpe_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, extents = self._project(x)
        output = urpe_attention(
            *(query, key, value, self._table(self.coefficient, extents)),
            None if self.rpe_bias is None else self._table(self.rpe_bias, extents),
            grid=None if self.grid is None else extents,
            is_causal=self.is_causal,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            backend=self.backend,
        )
        return self._finish(output, x)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, {self._place()}, rpe_bias={self.rpe_bias is not None}, "
            f"is_causal={self.is_causal}"
        )
