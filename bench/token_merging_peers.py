"""Token merging as users have it: ToMe's published algorithm in eager PyTorch, and attention over merged tokens without us.

Written from the formulas of arXiv 2210.09461, with the operations that the paper's code takes: a matrix of similarities, an
argmax and an argsort, gathers and a scatter_reduce with indices expanded to all channels, and a softmax that is
materialised so that log sizes can be added to its scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Call, Case, Inputs
from .peers import flex, scores


@torch.no_grad()
def published_matching(metric: Tensor, num_merged: int, class_token: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens of a, merged tokens of a, and the tokens of b that these go to, (B, ., 1) each."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    first, second = metric[:, ::2], metric[:, 1::2]
    similarity = first @ second.transpose(-1, -2)
    if class_token:
        similarity[:, 0] = -torch.inf
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True).unsqueeze(-1)
    kept, merged = order[:, num_merged:], order[:, :num_merged]
    if class_token:
        kept = kept.sort(dim=1).values
    return kept, merged, partner.unsqueeze(-1).gather(1, merged)


def published_sums(x: Tensor, kept: Tensor, merged: Tensor, destination: Tensor) -> Tensor:
    first, second = x[:, ::2], x[:, 1::2]
    channels = x.shape[2]
    alone = first.gather(1, kept.expand(-1, -1, channels))
    moved = first.gather(1, merged.expand(-1, -1, channels))
    second = second.scatter_reduce(1, destination.expand(-1, -1, channels), moved, "sum")
    return torch.cat([alone, second], dim=1)


def published_merge(metric: Tensor, x: Tensor, sizes: Tensor | None, num_merged: int) -> tuple[Tensor, Tensor]:
    """Matching, then the weighted average and the new sizes (B, N, 1)."""
    plan = published_matching(metric, num_merged)
    sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
    totals = published_sums(sizes, *plan)
    return published_sums(x * sizes, *plan) / totals, totals


def eager_merge(wrap: Callable = lambda function: function):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        merge = wrap(published_merge)
        num_merged = case.tokens - case.output_tokens
        return lambda: merge(inputs.query[:, 0], inputs.key[:, 0], None, num_merged)[0].unsqueeze(1)

    return prepare


def copy(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: inputs.key.clone()[:, :, : case.output_tokens]


def eager_soft_merge(wrap: Callable = lambda function: function):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        merge = wrap(lambda tokens, logits: logits.softmax(1).mT @ tokens)
        return lambda: merge(inputs.query[:, 0], inputs.key[:, 0]).unsqueeze(1)

    return prepare


def product_alone(case: Case, inputs: Inputs, training: bool) -> Call:
    """The matrix product of soft_merge with its weights given: what a softmax for free would leave."""
    weights = inputs.key.detach()[:, 0].softmax(1).mT
    return lambda: (weights @ inputs.query[:, 0]).unsqueeze(1)


def published_attention(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor) -> Tensor:
    """As ToMe's patched timm attention."""
    logits = query.shape[-1] ** -0.5 * scores(query, key) + sizes.log()[:, None, None].to(query.dtype)
    return logits.softmax(-1) @ value


def eager_attention(wrap: Callable = lambda function: function):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        attend = wrap(published_attention)
        return lambda: attend(*inputs[:3], inputs.fixed["sizes"])

    return prepare


def sdpa_with_log_sizes(case: Case, inputs: Inputs, training: bool) -> Call:
    mask = inputs.fixed["sizes"].log()[:, None, None].to(inputs.query.dtype).expand(-1, -1, case.tokens, -1)
    return lambda: F.scaled_dot_product_attention(*inputs[:3], attn_mask=mask)


def flex_attention(case: Case, inputs: Inputs, training: bool) -> Call:
    logarithms = inputs.fixed["sizes"].log()
    return flex(inputs, lambda: lambda score, batch, head, query, key: score + logarithms[batch, key])


def similarity_memory(case: Case, training: bool) -> float:
    """Similarities of all pairs, once as they are and once as the maximum reads them."""
    return 8.0 * case.batch * (case.tokens / 2) ** 2


def dense_memory(case: Case, training: bool) -> float:
    return (16.0 if training else 8.0) * case.batch * case.heads * case.tokens**2
