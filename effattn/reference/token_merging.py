"""Token merging in plain PyTorch: the specification (ToMe, arXiv 2210.09461; LTM, arXiv 2407.15219).

Bipartite soft matching: a are the tokens 0, 2, 4.., b the tokens 1, 3, 5.. A token of a proposes to merge into the b of
the largest cosine similarity; the best proposals are carried out. The similarities of all backends are those of exact
arithmetic, rounded to a multiple of 2^-40: what differs by less is a tie, and a tie goes to the lowest index.

A plan is three int32 tensors: ``source`` (B, N), the output token of each input; ``members`` (B, N), the inputs ordered by
output, ascending within each; ``offsets`` (B, T + 1), where the members of each output begin. An output without members
is padding: a row of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 2**40  # similarities are multiples of 1 / STEPS
INDICES = 2**20  # tokens of a and of b are at most so many: a similarity and an index share 63 bits
NOT_A_NUMBER, ABSENT, PROTECTED = -2, -3, -4  # below every similarity
MODES = ("mean", "sum", "max")


def bipartite_soft_matching(
    metric: Tensor,
    num_merged: int,
    num_protected: int = 0,
    distill_token: bool = False,
    sizes: Tensor | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A plan; ``num_merged`` is at least 1 and at most the number of unprotected pairs. With ``threshold`` T = N."""
    level = _similarity_levels(metric, num_protected, distill_token, sizes)
    _, firsts, seconds = level.shape
    best, partner = _largest(level)
    rank = _ranks(best)
    merged = rank < num_merged
    if threshold is not None:
        merged &= best >= round(threshold * STEPS)
    kept = ~merged
    num_kept = kept.sum(1, keepdim=True)
    # Kept tokens of a come first: in their own order if some are protected, else the most similar first.
    position = kept.cumsum(1) - 1 if num_protected else rank - (firsts - num_kept)
    own = num_kept + torch.arange(seconds, device=metric.device)
    if distill_token:  # the first of b stands right behind the first of a
        position = position + (position > 0)
        own[:, 0] = 1
    source = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    source[:, ::2] = torch.where(kept, position, own.gather(1, partner))
    source[:, 1::2] = own
    return group(source, source.shape[1] - (num_merged if threshold is None else 0))


def group(source: Tensor, num_outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The plan of (B, N) integers in 0..num_outputs - 1."""
    members = source.argsort(dim=1, stable=True)
    counts = torch.zeros((source.shape[0], num_outputs + 1), dtype=torch.int64, device=source.device)
    counts.scatter_add_(1, source + 1, torch.ones_like(source))
    return source.int(), members.int(), counts.cumsum(1).int()


def _similarity_levels(metric, num_protected, distill_token, sizes) -> Tensor:
    """(B, |a|, |b|) int64: similarities in steps of 2^-40. A token of zeros is similar to nothing: 0."""
    metric = metric.double()
    norm = metric.norm(dim=-1, keepdim=True)
    unit = metric / norm.masked_fill(norm == 0, 1.0)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    level = (similarity * STEPS).round().nan_to_num(NOT_A_NUMBER * STEPS).long()
    if sizes is not None:
        absent = ~(sizes > 0)
        level = level.masked_fill(absent[:, ::2, None] | absent[:, None, 1::2], ABSENT * STEPS)
    level[:, : (num_protected + 1) // 2] = PROTECTED * STEPS
    level[:, :, : max(num_protected // 2, int(distill_token))] = PROTECTED * STEPS
    return level


def _largest(level: Tensor) -> tuple[Tensor, Tensor]:
    """The largest element of each row, and the first place where it stands."""
    backwards = INDICES - 1 - torch.arange(level.shape[2], device=level.device)
    largest = (level * INDICES + backwards).amax(2)
    return largest >> 20, INDICES - 1 - (largest & (INDICES - 1))


def _ranks(best: Tensor) -> Tensor:
    """Each element's place in descending order, ties by index."""
    index = torch.arange(best.shape[1], device=best.device)
    order = (best * INDICES + (INDICES - 1 - index)).argsort(1, descending=True)
    return torch.empty_like(order).scatter_(1, order, index.expand_as(order))


def token_merge(x: Tensor, source: Tensor, offsets: Tensor, mode: str = "mean") -> Tensor:
    """(B, N, C) -> (B, T, C): mean, sum or maximum over the members of each output."""
    counts = offsets.diff().unsqueeze(-1)
    index = source.long().unsqueeze(-1).expand_as(x)
    shape = (*counts.shape[:2], x.shape[2])
    if mode == "max":
        # From NaN: torch shares a maximum's gradient with a start that equals it, even where the start takes no part.
        largest = x.new_full(shape, float("nan")).scatter_reduce(1, index, x, "amax", include_self=False)
        return largest.masked_fill(counts == 0, 0.0)
    total = x.new_zeros(shape).scatter_add(1, index, x)
    return total / counts.clamp(min=1).to(x.dtype) if mode == "mean" else total


def token_merge_weighted(
    x: Tensor, source: Tensor, offsets: Tensor, residual: Tensor | None = None, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = sum s_i (x_i + residual_i) / S_t and S_t = sum s_i over the members of t; 0 where S_t = 0. sizes (B, N)."""
    x = x if residual is None else x + residual
    sizes = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)) if sizes is None else sizes
    merged = token_merge(sizes.unsqueeze(-1), source, offsets, "sum")
    total = token_merge(x * sizes.unsqueeze(-1).to(x.dtype), source, offsets, "sum")
    nothing = merged == 0
    return (total / merged.masked_fill(nothing, 1.0).to(x.dtype)).masked_fill(nothing, 0.0), merged.squeeze(-1)


def token_unmerge(x: Tensor, source: Tensor) -> Tensor:
    """(B, T, C) -> (B, N, C): every input token gets the row of the output that it went to."""
    return x.gather(1, source.long().unsqueeze(-1).expand(-1, -1, x.shape[2]))


def soft_merge(tokens: Tensor, logits: Tensor) -> Tensor:
    """softmax over N of (B, N, P), transposed, times (B, N, C); a column of nothing but -inf gives 0."""
    nothing = (logits == float("-inf")).all(1, keepdim=True)
    weights = logits.masked_fill(nothing, 0.0).softmax(1).masked_fill(nothing, 0.0)
    return weights.mT @ tokens


def size_weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale Q K^T + log sizes) V; keys of size 0 take no part, and a row without keys gives 0. sizes (B, M)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * query @ key.mT + log_sizes(sizes)[:, None, None].to(query.dtype)
    nothing = (logits == float("-inf")).all(-1, keepdim=True)
    weights = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return torch.nn.functional.dropout(weights, dropout_p) @ value


def log_sizes(sizes: Tensor) -> Tensor:
    """log sizes, -inf where a size is 0 or below, with a gradient of 0 there."""
    absent = sizes <= 0
    return sizes.masked_fill(absent, 1.0).log().masked_fill(absent, float("-inf"))
