"""Which tokens to merge (bipartite soft matching, ToMe), and dropping tokens instead."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Op, _fold_or_loop
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, cuda_kernel, register, triton_kernel
from ..reference.token_merging import INDICES
from .token_merging_plan import TokenMerge, flat_sizes

NO_THRESHOLD = -2.0


def _fake(metric, sizes, num_merged, num_protected, distill_token, threshold, padded):
    batch, tokens = metric.shape[:2]
    indices = metric.new_empty((batch, tokens), dtype=torch.int32)
    offsets = metric.new_empty((batch, tokens + 1 - (0 if padded else num_merged)), dtype=torch.int32)
    return indices, torch.empty_like(indices), offsets


match = Op(
    "bipartite_match(Tensor metric, Tensor? sizes, SymInt num_merged, SymInt num_protected, bool distill_token, "
    "float threshold, bool padded) -> (Tensor source, Tensor members, Tensor offsets)",
    _fake,
    family="token_matching",
    vmap=lambda op: _fold_or_loop(op, frozenset(), 2, lambda *args: False),
    axes=dict.fromkeys(("metric", "sizes", "source", "members", "offsets"), "batch"),
    splits="batch",
    flops=lambda metric, *args, **kwargs: 2 * metric[0] * (metric[1] // 2) * (metric[1] - metric[1] // 2) * metric[2],
)
"""The plan of ``reference.bipartite_soft_matching``: contiguous int32, T = N - num_merged, or N if padded.

metric (B, N, d), any strides; sizes (B, N) contiguous float32; 1 <= num_merged <= unprotected pairs. threshold is
NO_THRESHOLD where there is none.
"""

register(
    "bipartite_soft_matching",
    (Backend("cuda", cuda_kernel), Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE),
)


def bipartite_soft_matching(
    metric: Tensor,
    num_merged: int,
    *,
    num_protected: int = 0,
    distill_token: bool = False,
    sizes: Tensor | None = None,
    threshold: float | None = None,
    backend: str = "auto",
) -> TokenMerge:
    r"""Plan which tokens to merge: the pairs that resemble each other most, by ToMe's bipartite soft matching.

    Tokens 0, 2, 4.. are a, tokens 1, 3, 5.. are b. Every a proposes the b of the largest cosine similarity

    .. math:: s_{ij} = \frac{a_i \cdot b_j}{|a_i|\,|b_j|}

    and the ``num_merged`` best proposals are carried out. The kernels never write the matrix of similarities. All backends
    decide alike: by the similarities of exact arithmetic to 2^-40, ties to the lowest index. A token of zeros has
    similarity 0; one with a NaN is merged last.

    Args:
        metric: (B, N, d), what tokens are compared by, usually the mean of the keys over the heads; float32, bfloat16,
            float16 or float64 (float64: reference only), any strides, N up to 2^21.
        num_merged: r, pairs to merge; min(r, (N - protected) // 2) are. 0 or less: the identity plan.
        num_protected: leading tokens that are never merged (class token). If there are any, the tokens of a that are kept
            stay in their order; else the most similar comes first, as published. Token 0 stays output 0; further
            protected tokens are divided between a and b as all others are.
        distill_token: token 1 is a distillation token: protected too, and output 1.
        sizes: (B, N) or (B, N, 1), any real dtype, how many patches each token stands for. The default of
            ``merge_weighted``; a token of size 0, such as the padding of an earlier plan, is merged last.
        threshold: in [-1, 1]: of the ``num_merged`` best, only pairs at least so similar are merged. The plan then has N
            outputs, of which ``plan.valid`` says which are tokens; the others are padding of size 0, behind them.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        TokenMerge: the plan. Outputs are first the tokens of a that are kept, then b (with ``distill_token`` a's first,
        b's first, the others of a, the others of b). The choice has no gradient.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3 and appendix D.

    Example:
        >>> import torch, effattn
        >>> keys = torch.randn(2, 12, 197, 64)
        >>> plan = effattn.bipartite_soft_matching(keys.mean(1), 16, num_protected=1)
        >>> tokens, sizes = plan.merge_weighted(torch.randn(2, 197, 768))
        >>> tokens.shape, sizes.sum(1).flatten()
        (torch.Size([2, 181, 768]), tensor([197., 197.]))
    """
    op = "bipartite_soft_matching"
    _checks.floating(op, "metric", metric)
    if metric.dim() != 3 or metric.shape[2] < 1:
        raise ValueError(
            f"{op}: metric must have shape (batch, tokens, d) with d at least 1, got {tuple(metric.shape)}"
        )
    batch, tokens = metric.shape[:2]
    if tokens > 2 * INDICES:
        raise ValueError(f"{op}: metric must have at most {2 * INDICES} tokens, got {tokens}")
    _checks.integer(op, "num_merged", num_merged, -_checks.LARGEST_INTEGER)
    _checks.integer(op, "num_protected", num_protected, 0)
    _checks.boolean(op, "distill_token", distill_token)
    if threshold is not None:
        threshold = _checks.interval(op, "threshold", threshold, -1.0, 1.0)
    flat = None if sizes is None else flat_sizes(op, sizes, metric, (batch, tokens), "metric")
    backend = choose(op, backend, Problem(metric.device.type, metric.dtype, 1))
    protected = max(num_protected, 2 if num_protected else 1) if distill_token else num_protected
    num_merged = min(num_merged, (tokens - protected) // 2)
    if num_merged <= 0:
        return _identity(metric, sizes, threshold is not None)
    metric = metric.detach()
    if backend == "reference":
        plan = reference.bipartite_soft_matching(metric, num_merged, num_protected, distill_token, flat, threshold)
    else:
        flat = None if flat is None else flat.detach().float().contiguous()
        limit = NO_THRESHOLD if threshold is None else threshold
        plan = match(backend, metric, flat, num_merged, num_protected, distill_token, limit, threshold is not None)
    return _made(*plan, sizes, threshold is not None)


def _identity(metric: Tensor, sizes: Tensor | None, padded: bool) -> TokenMerge:
    batch, tokens = metric.shape[:2]
    places = torch.arange(tokens + 1, dtype=torch.int32, device=metric.device).expand(batch, -1).contiguous()
    own = places[:, :tokens].contiguous()
    return _made(own, own, places, sizes, padded)


def _made(*arguments) -> TokenMerge:
    plan = TokenMerge(*arguments)
    plan._checked = True
    return plan


def keep_tokens(x: Tensor, scores: Tensor, num_kept: int, *, num_protected: int = 0) -> tuple[Tensor, Tensor]:
    """Drop tokens: keep the ``num_kept`` of the highest scores, in their order.

    Args:
        x: (B, N, C), any dtype and strides.
        scores: (B, N), any real dtype; of equal scores the lowest index is kept. NaN counts as the highest.
        num_kept: tokens that remain, the protected ones among them.
        num_protected: leading tokens that are kept whatever their score (class token).

    Returns:
        tuple[Tensor, Tensor]: (B, num_kept, C), and (B, num_kept) int64, which tokens these are. Differentiable in x.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers, arXiv 2106.12620.

    Example:
        >>> import torch, effattn
        >>> x = torch.arange(5.0).reshape(1, 5, 1)
        >>> kept, index = effattn.keep_tokens(x, torch.tensor([[0, 3, 1, 9, 2]]), 3, num_protected=1)
        >>> index
        tensor([[0, 1, 3]])
    """
    op = "keep_tokens"
    _checks.strided(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape (batch, tokens, channels), got {tuple(x.shape)}")
    _checks.real_tensor(op, "scores", scores)
    batch, tokens = x.shape[:2]
    if scores.shape != (batch, tokens):
        raise ValueError(f"{op}: scores must have shape {(batch, tokens)}, got {tuple(scores.shape)}")
    if scores.device != x.device:
        raise ValueError(f"{op}: scores must be on x's device {x.device}, got {scores.device}")
    _checks.integer(op, "num_protected", num_protected, 0)
    _checks.integer(op, "num_kept", num_kept, num_protected)
    if num_kept > tokens:
        raise ValueError(f"{op}: num_kept must be at most the {tokens} tokens of x, got {num_kept}")
    order = scores[:, num_protected:].argsort(dim=1, descending=True, stable=True) + num_protected
    chosen = order[:, : num_kept - num_protected].sort(1).values
    leading = torch.arange(num_protected, device=x.device).expand(batch, -1)
    index = torch.cat([leading, chosen], 1)
    return x[torch.arange(batch, device=x.device).unsqueeze(1), index], index
