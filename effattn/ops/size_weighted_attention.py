"""Softmax attention over tokens that stand for several patches each (proportional attention, ToMe)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, register, triton_kernel
from ..reference.token_merging import log_sizes
from .token_merging_plan import flat_sizes

weighted_attention = Operator(
    "size_weighted_attention",
    family="size_weighted_attention",
    tensors=("query", "key", "value", "log_sizes"),
    differentiable=("query", "key", "value", "log_sizes"),
    linear=("value",),
    options="float scale, bool wants_sizes",
    axes={**dict.fromkeys(("query", "output", "logsumexp"), "batch heads queries"), "log_sizes": "batch"},
    splits="batch heads queries",
)
"""softmax(scale Q K^T + log_sizes_j) V. query (B, H, N, D); key, value (B, H, M, D); log_sizes (B, M) contiguous float32.

A row without keys above -inf gives 0. Without wants_sizes the gradient of log_sizes is zeros.
"""

register("size_weighted_attention", (Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE))


def size_weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention over merged tokens, in which a key that stands for s patches counts s times (proportional attention).

    .. math:: O_i = \frac{\sum_j s_j\, e^{c\, q_i \cdot k_j}\, v_j}{\sum_j s_j\, e^{c\, q_i \cdot k_j}}
              = \mathrm{softmax}(c\, Q K^\top + \log s_j)\, V

    Args:
        query: (B, H, N, D), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        key, value: (B, H, M, D); M may differ from N.
        sizes: (B, M) or (B, M, 1), any real dtype. A key of size 0 (or below) takes no part; a row without keys gives 0.
        scale: factor c of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, D), query's dtype. Differentiable in query, key, value and sizes.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Token Merging: Your ViT But Faster, arXiv 2210.09461, equation 1.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 1, 2, 10, 16)
        >>> out = effattn.size_weighted_attention(query, key, value, torch.ones(1, 10))
        >>> plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        >>> torch.allclose(out, plain, atol=1e-5)
        True
    """
    op = "size_weighted_attention"
    _check_inputs(op, query, key, value)
    flat = flat_sizes(op, sizes, query, (query.shape[0], key.shape[2]), "query")
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    dropout_p = _checks.probability(op, "dropout_p", dropout_p)
    query, key, value = _checks.autocast(query, key, value)
    backend = choose(op, backend, Problem(query.device.type, query.dtype, query.shape[3], dropout_p))
    if backend == "reference":
        flat = flat.to(torch.promote_types(query.dtype, torch.float32))
        return reference.size_weighted_attention(query, key, value, flat, scale, dropout_p)
    wanted = torch.is_grad_enabled() and flat.requires_grad
    flat = flat.float()
    logarithms = (log_sizes(flat) if wanted else flat.clamp(min=0.0).log()).contiguous()  # clamp has no gradient at 0
    return weighted_attention(backend, query, key, value, logarithms, scale, wanted)


def _check_inputs(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """As ``_checks.attention_inputs``, but keys may be another number of tokens."""
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    if not tensors:
        for name, given in (("query", query), ("key", key), ("value", value)):
            _checks.strided(op, name, given)
    if query.shape == key.shape == value.shape or not query.dim() == key.dim() == 4:
        return _checks.attention_inputs(op, query, key, value)
    _checks.floating(op, "query", query)
    like = query if key.shape[2] == query.shape[2] else key
    for name, tensor in (("key", key), ("value", value)):
        _checks.parameter(op, name, tensor, query)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        wanted = (query.shape[0], query.shape[1], key.shape[2], query.shape[3])
        if tensor.shape != wanted:
            raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(tensor.shape)}")
    return _checks.attention_inputs(op, like, like, like)
