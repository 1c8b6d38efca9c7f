"""Scaled dot-product attention with PyTorch's own signature, on our engine where that is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _tuning, reference
from .._checks import autocast
from .._library import Operator
from .._registry import (
    KERNEL_DTYPES,
    REFERENCE,
    Backend,
    Problem,
    always,
    choose,
    cpu_kernel,
    register,
    triton_kernel,
)
from .._tuning_defaults import NEVER

QUERIES = (1, 2, 4, 8, 16)  # the least of each class
SMALLEST_WORK = _tuning.declare(
    _tuning.Choice(
        "attention.smallest_work",
        1,
        "multiply-adds of the scores from which the CPU kernel is faster than torch's",
        {"dtype": KERNEL_DTYPES, "queries": QUERIES},
        lambda value: type(value) is int and value >= 0,
    )
)

attention = Operator(
    "attention",
    family="attention",
    tensors=("query", "key", "value", "?attn_mask"),
    differentiable=("query", "key", "value"),
    linear=("value",),
    options="bool is_causal, float scale",
    axes=dict.fromkeys(("query", "attn_mask", "output", "logsumexp"), "batch heads queries"),
    splits="batch heads queries",
    whole=lambda query, key, value, attn_mask, is_causal, scale: "queries" if is_causal else "",
)


def _worth_it(problem: Problem) -> tuple[bool, str]:
    if problem.work < 0:
        return True, "faster than torch's kernel on CPU"
    queries = length_class(problem.length)
    smallest = _tuning.find(SMALLEST_WORK, problem.dtype, queries).value
    if problem.work >= smallest:
        return True, "faster than torch's kernel on CPU"
    if smallest < NEVER:
        return False, f"{problem.work} multiply-adds: too little work to repay the call"
    served = (n for n in QUERIES if n > queries and _tuning.find(SMALLEST_WORK, problem.dtype, n).value < NEVER)
    dtype, more = str(problem.dtype).removeprefix("torch."), next(served, None)
    return False, f"{dtype}{f' and fewer than {more} queries' if more else ''}: torch's kernel is faster"


def length_class(queries: int) -> int:
    """The class of so many queries, by comparisons, for the number may be symbolic."""
    if queries >= QUERIES[-1]:
        return QUERIES[-1]
    return next((least for least in reversed(QUERIES) if queries >= least), 1)


def _notes(problem: Problem) -> list[str]:
    if problem.device != "cpu" or problem.work < 0 or problem.dtype not in KERNEL_DTYPES:
        return []
    smallest, origin = _tuning.find(SMALLEST_WORK, problem.dtype, length_class(problem.length))
    where = "nowhere" if smallest >= NEVER else f"from {smallest} multiply-adds of the scores"
    return [f"with so many queries the CPU kernel is taken {where} ({origin}); this call has {problem.work}"]


register(
    "scaled_dot_product_attention",
    (
        Backend("cpu", cpu_kernel, _worth_it),
        Backend("torch", always),
        Backend("triton", triton_kernel),
        REFERENCE,
    ),
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""``torch.nn.functional.scaled_dot_product_attention``, signature and semantics, with structured masks.

    .. math:: O = \mathrm{softmax}(s\, Q K^\top + \mathrm{mask}) V

    Our engine serves what it serves faster than torch (on CPU: no mask, boolean and additive masks, causal, grouped
    query heads); every other call goes to torch unchanged. A row with nothing to attend to gives 0.

    Args:
        query: (B, H, N, D).
        key, value: (B, H or H_kv, M, D).
        attn_mask: None; a boolean tensor, True where a key takes part, or a floating one that is added to the scaled
            scores, broadcastable to (B, H, N, M); or a structured mask such as :class:`effattn.GaussianMixtureMask`.
        dropout_p: probability of zeroing an attention weight (torch serves it).
        is_causal: query i sees keys 0..i. Excludes ``attn_mask``.
        scale: factor s of the scores; default D ** -0.5.
        enable_gqa: allow H to be a multiple of H_kv; query head h reads key head h // (H / H_kv).
        backend: "auto", "torch", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, D), query's dtype. Differentiable in query, key and value (and, through torch, attn_mask).

    Raises:
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.
        RuntimeError, ValueError, IndexError: whatever torch's function raises on the same arguments.

    Source:
        torch.nn.functional.scaled_dot_product_attention; "FlashAttention", arXiv 2205.14135.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 1, 2, 10, 16)
        >>> ours = effattn.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> torch.allclose(ours, theirs, atol=1e-5)
        True
    """
    op = "scaled_dot_product_attention"
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if type(dropout_p) is not float:
        dropout_p = _checks.real(op, "dropout_p", dropout_p)
    if scale is not None and type(scale) is not float:
        if not isinstance(scale, (float, int, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: scale must be a number, got {scale!r}")
        scale = _checks.real(op, "scale", scale) if isinstance(scale, int) else scale
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        if not hasattr(attn_mask, "attend"):
            raise TypeError(f"{op}: attn_mask must be a Tensor or a structured mask, got {type(attn_mask).__name__}")
        if is_causal:
            raise ValueError(f"{op}: is_causal must be False with a structured attn_mask")
        if enable_gqa:
            key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        return attn_mask.attend(query, key, value, dropout_p=dropout_p, scale=scale, backend=backend)
    if not (is_causal is True or is_causal is False):
        _checks.boolean(op, "is_causal", is_causal)
    if not (enable_gqa is True or enable_gqa is False):
        _checks.boolean(op, "enable_gqa", enable_gqa)
    if torch._C._len_torch_function_stack():  # a mode, such as replace_sdpa, is to see this call as it sees torch's
        plain = PlainCall(attn_mask, is_causal, enable_gqa, backend)
        return F.scaled_dot_product_attention(query, key, value, plain, dropout_p, scale=scale)
    return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)


class PlainCall:
    """Stands for ``attn_mask`` where :func:`scaled_dot_product_attention` is called as torch's: what else it was given."""

    def __init__(self, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool, backend: str):
        self.attn_mask, self.is_causal, self.enable_gqa, self.backend = attn_mask, is_causal, enable_gqa, backend

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return NotImplemented
        query, key, value, call, dropout_p = args
        return _attend(
            *(query, key, value, call.attn_mask, dropout_p, call.is_causal, kwargs["scale"]),
            enable_gqa=call.enable_gqa,
            backend=call.backend,
        )


def _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend) -> Tensor:
    op = "scaled_dot_product_attention"
    detail = _unserved(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    length = work = -1
    if not detail and not torch.compiler.is_compiling():
        length, work = query.shape[2], query.numel() * key.shape[2]
    dtype, device = query.dtype, query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        query, key, value = autocast(query, key, value)
        dtype = query.dtype
        if isinstance(attn_mask, Tensor):
            (attn_mask,) = autocast(attn_mask) if attn_mask.is_floating_point() else (attn_mask,)
    problem = Problem(device, dtype, query.shape[-1], dropout_p, detail, length, work)
    backend = choose(op, backend, problem, lambda chosen: _notes(problem))
    if backend == "torch":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if backend == "reference":
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal, scale, dropout_p, enable_gqa
        )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    scale = float(query.shape[3]) ** -0.5 if scale is None else float(scale)
    return attention(backend, query, key, value, attn_mask, is_causal, scale)


def _unserved(query, key, value, attn_mask, is_causal, scale, enable_gqa) -> str:
    """Why only torch can serve this call (or explain what is wrong with it), or nothing."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        return "query, key and value are not all 4-dimensional"
    batch, heads, length, head_dim = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_dim:
        return "value has another shape than key, or batch or head_dim differ"
    if not query.layout == key.layout == value.layout == torch.strided:
        return "query, key and value are not all dense"
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        return "dtypes or devices differ"
    if key.shape[1] != heads and not (enable_gqa and key.shape[1] > 0 and heads % key.shape[1] == 0):
        return "numbers of heads differ"
    if scale is not None and not (isinstance(scale, (int, float)) and abs(scale) < float("inf")):
        return "scale is not a finite number"
    if attn_mask is not None:
        if is_causal:
            return "both attn_mask and is_causal are given"
        if attn_mask.requires_grad:
            return "attn_mask requires a gradient"
        if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32) or attn_mask.device != query.device:
            return f"attn_mask has dtype {attn_mask.dtype} on {attn_mask.device}"
        target = (batch, heads, length, key.shape[2])
        if attn_mask.dim() not in (2, 3, 4) or any(
            size != 1 and size != wanted for size, wanted in zip(reversed(attn_mask.shape), reversed(target))
        ):
            return f"attn_mask {tuple(attn_mask.shape)} does not broadcast to {target}"
    return ""


def _repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    if not (isinstance(tensor, Tensor) and query.dim() == tensor.dim() == 4):
        return tensor  # which the operator refuses
    heads, kv_heads = query.shape[1], tensor.shape[1]
    if heads != kv_heads and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"scaled_dot_product_attention: query's {heads} heads are no multiple of key's {kv_heads}")
    return tensor if heads == kv_heads else tensor.repeat_interleave(heads // kv_heads, 1)
