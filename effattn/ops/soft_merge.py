"""Merging by learned soft assignment (LTM, PatchMerger)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, register, triton_kernel


def _fake(tokens, logits):
    batch, _, outputs = logits.shape
    output = tokens.new_empty((batch, outputs, tokens.shape[2]))
    return output, tokens.new_empty((batch, outputs), dtype=torch.float32)


soft_merge_op = Operator(
    "soft_merge",
    family="soft_merge",
    tensors=("tokens", "logits"),
    differentiable=("tokens", "logits"),
    linear=("tokens",),
    options="",
    saved={"logsumexp": None},
    fake=_fake,
    flops=lambda tokens, logits, *args: 2 * tokens[0] * tokens[1] * tokens[2] * logits[2],
    backward_flops=2,
    axes={
        "tokens": "batch tokens channels",
        "logits": "batch tokens outputs",
        "output": "batch outputs channels",
        "logsumexp": "batch outputs",
    },
    splits="batch outputs channels",
)
"""softmax over N of logits (B, N, P), transposed, times tokens (B, N, C): (B, P, C) contiguous; logsumexp (B, P)."""

register("soft_merge", (Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE))


def soft_merge(tokens: Tensor, logits: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Merge N tokens into P: each is an average of all, weighted by a softmax over the tokens.

    .. math:: Y = W^\top X, \qquad W_{np} = \frac{e^{G_{np}}}{\sum_m e^{G_{mp}}}

    The (N, P) weights are never written, forward or backward.

    Args:
        tokens: X, (B, N, C), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        logits: G, (B, N, P), tokens' dtype, any strides. -inf: a token takes no part; a column of nothing else gives 0.
        backend: "auto", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, P, C), tokens' dtype. Differentiable in tokens and logits.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Efficient Visual Transformer by Learnable Token Merging, arXiv 2407.15219; PatchMerger, arXiv 2202.12015.

    Example:
        >>> import torch, effattn
        >>> tokens, logits = torch.randn(2, 196, 384), torch.randn(2, 196, 157)
        >>> merged = effattn.soft_merge(tokens, logits)
        >>> torch.allclose(merged, logits.softmax(1).mT @ tokens, atol=1e-5)
        True
    """
    op = "soft_merge"
    _checks.floating(op, "tokens", tokens)
    if tokens.dim() != 3 or tokens.shape[2] < 1:
        raise ValueError(
            f"{op}: tokens must have shape (batch, tokens, channels) with at least one channel, got {tuple(tokens.shape)}"
        )
    _checks.parameter(op, "logits", logits, tokens, "tokens")
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape[:2]:
        raise ValueError(
            f"{op}: logits must have shape ({tokens.shape[0]}, {tokens.shape[1]}, merged tokens), got "
            f"{tuple(logits.shape)}"
        )
    tokens, logits = _checks.autocast(tokens, logits)
    if logits.dtype != tokens.dtype:
        raise TypeError(f"{op}: logits must have tokens' dtype {tokens.dtype}, got {logits.dtype}")
    backend = choose(op, backend, Problem(tokens.device.type, tokens.dtype, 1))
    if backend == "reference":
        return reference.soft_merge(tokens, logits)
    return soft_merge_op(backend, tokens, logits)
