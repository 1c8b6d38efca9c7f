"""Attention inside windows of a token grid, in plain PyTorch: the specification.

CSWin Transformer (arXiv 2107.00652), Swin Transformer (arXiv 2103.14030), HAT (arXiv 2205.04437).

In each window, whose keys are those of the window enlarged by `overlap` on every side:
S = scale * Q K^T + bias_table[index] + (-100 where a cyclic shift brought tokens from opposite borders together)
O = softmax(S) V + LePE(V),     LePE: depthwise 3 x 3 convolution over the window, zero padded at its border
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFTED_APART = -100.0


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    overlap: tuple[int, int] = (0, 0),
    bias_table: Tensor | None = None,
    bias_index: str = "swin",
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: str = "error",
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    none = (0, 0)
    padded_query = _roll(_pad(query, grid, window), shift)
    q = _windows(padded_query, window, none)
    k, v = (_windows(_roll(_pad(t, grid, window), shift), window, overlap) for t in (key, value))
    logits = scale * q @ k.transpose(-2, -1)  # (B, H, window row, window column, queries, keys)
    if bias_table is not None:
        index = relative_position_index(window, overlap, bias_index).to(bias_table.device)
        logits = logits + bias_table.to(logits.dtype)[index].permute(2, 0, 1)[:, None, None]
    if shift != none:
        logits = logits + _shifted_apart(padded_query.shape[2:4], window, shift).to(logits)
    if padding == "mask":
        inside = _roll(_pad(query.new_ones(1, 1, grid[0] * grid[1], 1), grid, window), shift)
        logits = logits.masked_fill(_windows(inside, window, overlap).transpose(-2, -1) == 0, float("-inf"))
    output = F.dropout(logits.softmax(-1), dropout_p) @ v
    if lepe_weight is not None:
        output = output + _lepe(v, window, lepe_weight, lepe_bias)
    return _crop(_roll(_grid(output, window), (-shift[0], -shift[1])), grid)


def stripe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    stripe_width: int,
    *,
    orientation: str,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: str = "error",
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    return window_attention(
        *(query, key, value, grid, stripe_window(grid, stripe_width, orientation)),
        lepe_weight=lepe_weight,
        lepe_bias=lepe_bias,
        padding=padding,
        scale=scale,
        dropout_p=dropout_p,
    )


def stripe_window(grid: tuple[int, int], stripe_width: int, orientation: str) -> tuple[int, int]:
    """The grid's full height ("vertical") or full width ("horizontal"); the whole grid where a stripe covers it."""
    height, width = grid
    if stripe_width >= max(height, width):
        return height, width
    return (height, stripe_width) if orientation == "vertical" else (stripe_width, width)


def cross_shaped_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    stripe_width: int,
    *,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: str = "error",
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Vertical stripes for the first half of the heads, horizontal ones for the second."""
    heads, head_dim = query.shape[1], query.shape[3]
    half = heads // 2

    def of_half(parameter: Tensor | None, part: slice) -> Tensor | None:
        if parameter is None or parameter.shape[0] != heads * head_dim:
            return parameter
        return parameter.unflatten(0, (heads, head_dim))[part].flatten(0, 1)

    return torch.cat(
        [
            stripe_attention(
                *(tensor[:, part] for tensor in (query, key, value)),
                grid,
                stripe_width,
                orientation=orientation,
                lepe_weight=of_half(lepe_weight, part),
                lepe_bias=of_half(lepe_bias, part),
                padding=padding,
                scale=scale,
                dropout_p=dropout_p,
            )
            for orientation, part in (("vertical", slice(0, half)), ("horizontal", slice(half, heads)))
        ],
        1,
    )


def relative_position_index(window: tuple[int, int], overlap: tuple[int, int], bias_index: str) -> Tensor:
    """Row of the bias table for every query and key of a window, (queries, keys), as published.

    "swin": query minus key, shifted to start from 0. "hat_oca": key of the enlarged window minus query, shifted by
    window - enlarged + 1; its negative entries count from the end of the table.
    """
    enlarged = tuple(w + 2 * o for w, o in zip(window, overlap))
    first = torch.cartesian_prod(*(torch.arange(w) for w in window)).view(-1, 1, 2)
    second = torch.cartesian_prod(*(torch.arange(e) for e in enlarged)).view(1, -1, 2)
    columns = window[1] + enlarged[1] - 1
    if bias_index == "swin":
        difference = first - (second - torch.tensor(overlap)) + torch.tensor(enlarged) - torch.tensor(overlap) - 1
    else:
        difference = second - first + torch.tensor(window) - torch.tensor(enlarged) + 1
    return (difference[..., 0] * columns + difference[..., 1]) % ((window[0] + enlarged[0] - 1) * columns)


def window_mask(
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    overlap: tuple[int, int] = (0, 0),
    bias_table: Tensor | None = None,
    bias_index: str = "swin",
) -> Tensor:
    """What is added to the scores, dense: (h*w, h*w), or (H, h*w, h*w) with a bias table; -inf outside a window."""
    tokens = torch.arange(1, grid[0] * grid[1] + 1).view(1, 1, -1, 1)  # 0 is padding
    padded = _roll(_pad(tokens, grid, window), shift)
    queries, keys = (_windows(padded, window, o)[0, 0, ..., 0] for o in ((0, 0), overlap))
    rows, columns = torch.broadcast_tensors(queries[..., :, None], keys[..., None, :])
    added = torch.zeros(rows.shape)
    if bias_table is not None:
        index = relative_position_index(window, overlap, bias_index).to(bias_table.device)
        added = bias_table[index].permute(2, 0, 1)[:, None, None].expand(-1, *rows.shape)
    if tuple(shift) != (0, 0):
        added = added + _shifted_apart(padded.shape[2:4], window, shift).to(added)
    dense = added.new_full((*added.shape[: added.dim() - 4], tokens.numel() + 1, tokens.numel() + 1), float("-inf"))
    dense[..., rows, columns] = added
    return dense[..., 1:, 1:]


def _padding(grid, window) -> list[tuple[int, int]]:
    """(before, after) per dimension: what is missing to whole windows, half of it, rounded down, before."""
    missing = [-extent % size if size else 0 for extent, size in zip(grid, window)]
    return [(m // 2, m - m // 2) for m in missing]


def _pad(tensor: Tensor, grid, window) -> Tensor:
    """(B, H, h*w, D) -> (B, H, padded h, padded w, D)."""
    (top, bottom), (left, right) = _padding(grid, window)
    return F.pad(tensor.unflatten(2, grid), (0, 0, left, right, top, bottom))


def _crop(tensor: Tensor, grid) -> Tensor:
    top, left = ((padded - extent) // 2 for padded, extent in zip(tensor.shape[2:4], grid))
    return tensor[:, :, top : top + grid[0], left : left + grid[1]].flatten(2, 3)


def _roll(tensor: Tensor, shift) -> Tensor:
    return tensor if tuple(shift) == (0, 0) else tensor.roll((-shift[0], -shift[1]), (2, 3))


def _windows(tensor: Tensor, window, overlap) -> Tensor:
    """(B, H, h, w, D) -> (B, H, h / wh, w / ww, keys of a window, D); zeros beyond the border of the grid."""
    enlarged = F.pad(tensor, (0, 0, overlap[1], overlap[1], overlap[0], overlap[0]))

    def positions(extent: int, size: int, more: int) -> Tensor:
        corners = torch.arange(extent // size if size else 0, device=tensor.device) * size
        return corners[:, None] + torch.arange(size + 2 * more, device=tensor.device)

    rows, columns = map(positions, tensor.shape[2:4], window, overlap)
    return enlarged[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4, 5)


def _grid(windows: Tensor, window) -> Tensor:
    """The inverse of `_windows` without overlap."""
    batch, heads, rows, columns, _, head_dim = windows.shape
    tiles = windows.reshape(batch, heads, rows, columns, *window, head_dim).transpose(3, 4)
    return tiles.reshape(batch, heads, rows * window[0], columns * window[1], head_dim)


def _shifted_apart(padded, window, shift) -> Tensor:
    """(window row, window column, queries, keys): -100 between regions that only the roll made neighbours."""

    def regions(extent: int, size: int, by: int) -> Tensor:
        position = torch.arange(extent)
        return (position >= extent - size).long() + (position >= extent - by).long() if by else 0 * position

    region = 3 * regions(padded[0], window[0], shift[0])[:, None] + regions(padded[1], window[1], shift[1])
    region = _windows(region[None, None, ..., None], window, (0, 0))[0, 0, ..., 0]
    return SHIFTED_APART * (region[..., :, None] != region[..., None, :])


def _lepe(value: Tensor, window, weight: Tensor, bias: Tensor | None) -> Tensor:
    if value.numel() == 0:  # conv2d takes no empty image; the parameters still get their gradient, zero
        return value + weight.sum().to(value.dtype) + (0 if bias is None else bias.sum().to(value.dtype))
    batch, heads, rows, columns, _, head_dim = value.shape
    repeat = heads * head_dim // weight.shape[0]  # (D, 1, 3, 3) serves all heads
    image = value.permute(0, 2, 3, 1, 5, 4).reshape(-1, heads * head_dim, *window)
    weight = weight.to(value.dtype).repeat(repeat, 1, 1, 1)
    bias = None if bias is None else bias.to(value.dtype).repeat(repeat)
    convolved = F.conv2d(image, weight, bias, padding=1, groups=heads * head_dim)
    return convolved.view(batch, rows, columns, heads, head_dim, -1).permute(0, 3, 1, 2, 5, 4)
