"""Strided views inside NaN-filled storages: the same values under every memory layout, with a guard around them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GUARD = 64


def _contiguous(shape):
    return shape, lambda s: s


def _transposed(shape):
    return (*shape[:-2], shape[-1], shape[-2]), lambda s: s.mT


def _token_major(shape):
    batch, heads, tokens, dim = shape
    return (batch, tokens, heads, dim), lambda s: s.transpose(1, 2)


def _packed(shape):
    """One of three projections that share a storage, as ``to_qkv(x).unflatten(...)`` leaves them."""
    batch, heads, tokens, dim = shape
    return (batch, tokens, 3, heads, dim), lambda s: s[:, :, 1].transpose(1, 2)


def _sliced(shape):
    *rest, tokens, dim = shape
    return (*rest, 2 * tokens + 1, dim + 3), lambda s: s[..., 1::2, 2 : 2 + dim]


def _every_other(shape):
    return (*shape[:-1], 2 * shape[-1]), lambda s: s[..., ::2]


def _expanded(*dims):
    def layout(shape):
        storage = tuple(1 if i in dims or i - len(shape) in dims else size for i, size in enumerate(shape))
        return storage, lambda s: s.expand(shape)

    return layout


LAYOUTS: dict[str, Callable] = {
    "contiguous": _contiguous,
    "token_major": _token_major,
    "packed": _packed,
    "transposed": _transposed,
    "sliced": _sliced,
    "every_other": _every_other,
    "expanded_batch": _expanded(0),
    "expanded_heads": _expanded(1),
    "expanded_tokens": _expanded(2),
    "expanded_everywhere": _expanded(0, 1, 2, 3),
}
"""Layouts of a (batch, heads, tokens, head_dim) tensor; all but the two with four named dims fit any tensor of two or more."""


class Placed:
    """``tensor`` is the view; its storage is NaN (True for booleans) wherever the view does not reach."""

    def __init__(self, values: Tensor, layout: str):
        storage_shape, view = LAYOUTS[layout](tuple(values.shape))
        size = math.prod(storage_shape)
        fill = float("nan") if values.is_floating_point() else 1
        self._flat = torch.full((size + 2 * GUARD,), fill, dtype=values.dtype, device=values.device)
        inside = self._flat[GUARD : GUARD + size].view(storage_shape)
        for source, target in ((values, view(inside)),):
            # Where the view repeats an element (stride 0) the first of its values stands for all.
            keep = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in target.stride())
            target[keep].copy_(source[keep])
        self.tensor = view(inside).detach()
        self._before = self._flat.clone()

    def is_untouched(self) -> bool:
        """No bit of the storage, inside or outside of the view, has changed."""
        as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self._flat.element_size()]
        return torch.equal(self._flat.view(as_bits), self._before.view(as_bits))


def place(values: Tensor, layout: str) -> Tensor:
    return Placed(values, layout).tensor
