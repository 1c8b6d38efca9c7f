"""Checks of the arguments of attention with Toeplitz matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks


def grid_or_line(op: str, grid, tokens: int) -> tuple[int, int]:
    """(h, w) of the tokens; a sequence is a grid of one row."""
    if grid is None:
        return 1, tokens
    height, width = _checks.pair_of_integers(op, "grid", grid, 0)
    if height * width != tokens:
        raise ValueError(f"{op}: query has {tokens} tokens, but grid {height} x {width} makes {height * width}")
    return height, width


def check_entries(op: str, name: str, entries: Tensor, query: Tensor, grid, given_grid) -> None:
    """Require (H or 1, 2N - 1), or with a grid (H or 1, 2h - 1, 2w - 1)."""
    _checks.parameter(op, name, entries, query)
    heads = query.shape[1]
    sizes = (2 * query.shape[2] - 1,) if given_grid is None else (2 * grid[0] - 1, 2 * grid[1] - 1)
    sizes = tuple(max(size, 0) for size in sizes)
    shape = tuple(entries.shape)
    if len(shape) != 1 + len(sizes) or shape[0] not in (1, heads) or shape[1:] != sizes:
        form = "(H, 2N - 1)" if given_grid is None else "(H, 2h - 1, 2w - 1)"
        raise ValueError(f"{op}: {name} must have shape {form} = {(heads, *sizes)}, or 1 for H, got {shape}")


def kernel_entries(entries: Tensor, heads: int) -> Tensor:
    """(H, entries) contiguous float32."""
    return entries.float().flatten(1).expand(heads, -1).contiguous()


def relative_entries(bias: Tensor, heads: int, eps: float, is_causal: bool) -> Tensor:
    """``kernel_entries`` of a bias that kernels take relative to its maximum, as if that were a constant.

    It cancels where eps is 0, so that it may leave out what no query sees. Otherwise it counts, and is subtracted here,
    where autograd sees it.
    """
    entries = kernel_entries(bias, heads)
    if not entries.shape[1]:
        return entries
    if eps == 0:
        if not is_causal:
            return entries
        future = torch.arange(entries.shape[1], device=entries.device) > entries.shape[1] // 2
        return entries.masked_fill(_checks.constant(future, entries), float("-inf"))
    highest = entries.amax(1, keepdim=True)
    return entries - torch.where(highest == float("-inf"), 0.0, highest)


def check_padding_mask(op: str, mask: Tensor | None, query: Tensor) -> None:
    if mask is None:
        return
    name, wanted = "key_padding_mask", (query.shape[0], query.shape[2])
    _checks.strided(op, name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be torch.bool (True: a key that takes no part), got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {mask.device}")
    if tuple(mask.shape) != wanted:
        raise ValueError(f"{op}: {name} must have shape (batch, tokens) = {wanted}, got {tuple(mask.shape)}")


def check_causal(op: str, is_causal) -> None:
    _checks.boolean(op, "is_causal", is_causal)


def check_eps(op: str, eps) -> float:
    eps = _checks.real(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    return eps
