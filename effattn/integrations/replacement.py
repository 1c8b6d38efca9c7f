"""Replaces ``F.scaled_dot_product_attention`` inside a context, for code that cannot be given a mask."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._structured_mask import StructuredMask
from ..ops import scaled_dot_product_attention
from ..ops.attention import PlainCall
from .multi_head import multi_head_attention

MASKED = ("error", "keep")
_NAME = "replace_sdpa"
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class replace_sdpa(contextlib.ContextDecorator, TorchFunctionMode):
    """Inside this context every call of ``F.scaled_dot_product_attention`` gets a structured mask, or goes to a function.

    A context manager and a decorator. Calls are seen however the caller imported the function, and so are those of
    :func:`effattn.scaled_dot_product_attention` (hence of models that :func:`effattn.patch` changed) and of
    ``nn.MultiheadAttention`` with ``need_weights=False``. Attention that is written out with products and a softmax is
    no such call. Calls that carry a structured mask of their own keep it.

    Contexts nest: the innermost decides, and calls that a function makes reach the next one out. It holds for the
    thread that entered it only, and until it is left, by an exception too. ``torch.compile(fullgraph=True)`` takes it
    inside the compiled function as around its call. What is recomputed by activation checkpointing is computed in
    ``backward()``: call that inside the context too.

    Args:
        mask_or_fn: a structured mask, or a function called as ``fn(query, key, value, **kwargs)`` with the options that
            the call gave, by name, whatever they are.
        masked: for a mask: what becomes of a call that has an ``attn_mask`` or ``is_causal=True`` of its own. "error":
            ValueError; "keep": it is left as it is.

    Raises:
        TypeError, ValueError: an argument is wrong; within, whatever the mask's operator raises.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 12, 8)
        >>> mask = effattn.ManhattanDecay(effattn.rmt_log_decay(2), (3, 4))
        >>> with effattn.replace_sdpa(mask):
        ...     out = F.scaled_dot_product_attention(query, key, value)
        >>> torch.equal(out, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        True
    """

    def __init__(self, mask_or_fn: StructuredMask | Callable, *, masked: str = "error"):
        super().__init__()
        if not isinstance(mask_or_fn, StructuredMask) and not callable(mask_or_fn):
            raise TypeError(
                f"{_NAME}: mask_or_fn must be a structured mask or a function, got {type(mask_or_fn).__name__}"
            )
        if masked not in MASKED:
            raise ValueError(f"{_NAME}: masked must be one of {', '.join(MASKED)}, got {masked!r}")
        self._with, self._keeps = mask_or_fn, masked == "keep"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._replace(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        return func(*args, **kwargs)

    def _replace(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        given = dict(zip(_POSITIONAL, args)) | kwargs
        query, key, value = (given.pop(name) for name in _POSITIONAL[:3])
        mask = given.get("attn_mask")
        if isinstance(mask, PlainCall):  # a call of ours
            del given["attn_mask"]
            if mask.attn_mask is not None:
                given["attn_mask"] = mask.attn_mask
            given |= {"is_causal": mask.is_causal, "enable_gqa": mask.enable_gqa}
        elif isinstance(mask, StructuredMask):
            return func(*args, **kwargs)
        if not isinstance(self._with, StructuredMask):
            return self._with(query, key, value, **given)
        if given.pop("attn_mask", None) is not None or given.pop("is_causal", False):
            if self._keeps:
                return func(*args, **kwargs)
            raise ValueError(
                f"{_NAME}: a call inside has an attn_mask or is_causal=True of its own, which a structured mask does "
                'not combine with; masked="keep" leaves such calls as they are'
            )
        return scaled_dot_product_attention(query, key, value, self._with, **given)

    def _multi_head(self, func: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        """torch hands us the whole of nn.MultiheadAttention, and would not show us the call inside it."""
        call = _MULTI_HEAD.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given["need_weights"]:
            return func(*args, **kwargs)
        extra = [name for name in ("bias_k", "bias_v", "static_k", "static_v") if given[name] is not None]
        if extra or given["add_zero_attn"] or given["query"].dim() != 3:
            raise NotImplementedError(
                f"{_NAME}: a call inside is of nn.MultiheadAttention with bias_kv, zero attention, static keys or "
                "without a batch, which it does not take apart"
            )

        def attend(query, key, value, **options):
            return self._replace(F.scaled_dot_product_attention, (query, key, value), options)

        separate = [given[f"{name}_proj_weight"] for name in "qkv"]
        out = multi_head_attention(
            *(given["query"], given["key"], given["value"], given["num_heads"]),
            weights=separate if given["use_separate_proj_weight"] else given["in_proj_weight"],
            bias=given["in_proj_bias"],
            out_weight=given["out_proj_weight"],
            out_bias=given["out_proj_bias"],
            key_padding_mask=given["key_padding_mask"],
            attn_mask=given["attn_mask"],
            is_causal=given["is_causal"],
            dropout_p=given["dropout_p"] if given["training"] else 0.0,
            batch_first=False,
            attend=attend,
        )
        return out, None


__all__ = ["replace_sdpa"]
