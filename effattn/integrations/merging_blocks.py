"""The blocks of a vision transformer that merge tokens: other classes for the modules of ``effattn.integrations.timm``.

A patched block is

    out, keys = attention(norm1(x), sizes)           # softmax(scale Q K^T + log sizes) V, fused
    x, sizes = merge(x + out)                        # the r pairs of the most similar mean keys
    x = x + mlp(norm2(x))

Sizes and source map travel between the blocks beside the tokens, as one ``TokenStream``; nothing is kept on the side.
So a block that is checkpointed computes from what it was given, whatever ran in between, and no call resets anything.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import TokenMerge, bipartite_soft_matching, scaled_dot_product_attention, size_weighted_attention
from ..reference.token_merging import group

LAYER = "_effattn_merging_layer"


class TokenStream(NamedTuple):
    """What a patched block hands to the next, as a forward hook on it sees. The last block returns plain tokens."""

    tokens: Tensor  # (B, T, C)
    sizes: Tensor | None  # (B, T, 1) float32, how many patches each token stands for; None before the first merge
    source: Tensor | None  # (B, N) int64, the token of each patch; None before the first merge, or if nobody wants it


class Trace:
    """Where the last block leaves the source map."""

    def __init__(self):
        self.source: Tensor | None = None


class Layer(NamedTuple):
    """What one block is to do."""

    num_merged: int
    num_prefix_tokens: int
    distill_token: bool
    threshold: float | None
    size_weighted: bool
    keeps_source: bool
    unmerge: bool
    trace: Trace | None
    last: bool
    backend: str


class _MergingAttention:
    """Attention of timm's names that takes the sizes of its tokens, and returns their mean keys too if they merge."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        layer = getattr(self, LAYER)
        gate = getattr(self, "gate", None)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = _part(self, "q_norm", query), _part(self, "k_norm", key)
        dropout_p = self.attn_drop.p if self.training and hasattr(self, "attn_drop") else 0.0
        options = {"scale": getattr(self, "scale", None), "dropout_p": dropout_p, "backend": layer.backend}
        if sizes is None:
            out = scaled_dot_product_attention(query, key, value, **options)
        else:
            out = size_weighted_attention(query, key, value, sizes, **options)
        out = _part(self, "norm", out.transpose(1, 2).flatten(2))
        if gate is not None:
            out = out * gate(x).sigmoid()
        return _part(self, "proj_drop", self.proj(out)), key.mean(1) if layer.num_merged else None


class _MergingBlock:
    """A pre-norm block that merges tokens between its attention and its MLP."""

    def forward(self, x: Tensor | TokenStream, attn_mask=None, is_causal: bool = False) -> Tensor | TokenStream:
        if attn_mask is not None or is_causal:
            raise NotImplementedError("merge_tokens: a model that merges tokens takes no attn_mask and no is_causal")
        layer = getattr(self, LAYER)
        x, sizes, source = x if isinstance(x, TokenStream) else (x, None, None)
        weights = sizes
        if sizes is not None and not layer.size_weighted:  # padding must still take no part
            weights = None if layer.threshold is None else sizes > 0
        out, metric = self.attn(self.norm1(x), sizes=weights)
        out = _part(self, "drop_path1", _part(self, "ls1", out), "drop_path")
        if layer.num_merged:
            plan = _plan(layer, metric, sizes)
            dtype = torch.promote_types(x.dtype, out.dtype)  # they differ under autocast
            x, sizes = plan.merge_weighted(x.to(dtype), sizes, residual=out.to(dtype), backend=layer.backend)
            if layer.keeps_source:
                here = plan.source_map()
                source = here if source is None else here.gather(1, source)
        else:
            x = x + out
        x = x + _part(self, "drop_path2", _part(self, "ls2", self.mlp(self.norm2(x))), "drop_path")
        if not layer.last:
            return TokenStream(x, sizes, source)
        if layer.keeps_source and source is None:
            source = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        if layer.trace is not None:
            layer.trace.source = source
        if layer.unmerge:
            plan = TokenMerge(*group(source, x.shape[1]), padded=layer.threshold is not None)
            x = plan.unmerge(x, backend=layer.backend)
        return x


def _part(module: nn.Module, name: str, x: Tensor, other: str = "") -> Tensor:
    """``module.name(x)``, or ``module.other(x)``, or x where there is neither."""
    part = getattr(module, name, None) or getattr(module, other, None)
    return x if part is None else part(x)


def _plan(layer: Layer, metric: Tensor, sizes: Tensor | None) -> TokenMerge:
    prefix = layer.num_prefix_tokens
    sizes = None if layer.threshold is None else sizes  # only padding makes a difference
    options = {"threshold": layer.threshold, "backend": layer.backend}
    if prefix <= 1 or (prefix == 2 and layer.distill_token):  # as published: part of the matching, but protected
        options |= {"num_protected": prefix, "distill_token": layer.distill_token}
        return bipartite_soft_matching(metric, layer.num_merged, sizes=sizes, **options)
    # Several protected tokens would be divided among a and b and lose their places: match the patches alone.
    sizes = None if sizes is None else sizes[:, prefix:]
    plan = bipartite_soft_matching(metric[:, prefix:], layer.num_merged, sizes=sizes, **options)
    own = torch.arange(prefix, dtype=torch.int32, device=metric.device).expand(metric.shape[0], -1)
    moved = (torch.cat([own, part + prefix], 1) for part in (plan.source, plan.members, plan.offsets))
    return TokenMerge(*moved, padded=plan.padded)


# ---- other classes for the same modules ----


def patch(block: nn.Module, layer: Layer) -> list[tuple[nn.Module, type]]:
    originals = [(block, type(block)), (block.attn, type(block.attn))]
    for (module, original), behaviour in zip(originals, (_MergingBlock, _MergingAttention)):
        object.__setattr__(module, LAYER, layer)
        module.__class__ = _merging_class(behaviour, original)
    return originals


@functools.cache
def _merging_class(behaviour: type, original: type) -> type:
    def reduce(self, protocol):
        return _empty, (behaviour, original), vars(self)

    return type(
        f"Merging{original.__name__}",
        (behaviour, original),
        {"__reduce_ex__": reduce, "__module__": __name__, "__doc__": behaviour.__doc__},
    )


def _empty(behaviour: type, original: type) -> nn.Module:
    """A module without attributes: how copies and pickles begin."""
    merging = _merging_class(behaviour, original)
    return merging.__new__(merging)


def unpatch(module: nn.Module, original: type) -> None:
    module.__class__ = original
    del module.__dict__[LAYER]
