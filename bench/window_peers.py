"""Peers of window attention: the published modules' tensor passes, and SDPA on windows cut out by hand.

CSWin (arXiv 2107.00652) and HAT's overlapping attention (arXiv 2205.04437) project to queries, keys and values first
and partition those. Swin (arXiv 2103.14030) and HAT roll and partition their input, which is a third as wide, and
project then; so for them the clock sees that narrow roll and partition, while the projection between them and the
attention is not measured: its results, already in window order, are given (`_NotMeasured`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.reference import relative_position_index

from .cases import Call, Case, Inputs
from .peers import compiled

CROSS, SHIFTED, OVERLAPPING = "cross_shaped_window", "shifted_window", "overlapping_window"
SHIFTED_APART = -100.0
ON_WINDOWS = "sdpa on windows"
Window = tuple[int, int]
Same = Callable[[Callable], Callable]


def stripes(case: Case) -> tuple[Window, Window]:
    """Windows of the first and of the second half of the heads."""
    height, width = case.grid
    if case.window >= max(case.grid):
        return case.grid, case.grid
    return (height, case.window), (case.window, width)


def shift(case: Case) -> int:
    return 0 if case.window >= min(case.grid) else case.window // 2


def overlap(case: Case) -> int:
    return case.window // 4


def uncompiled(function: Callable) -> Callable:
    return function


class _NotMeasured(torch.autograd.Function):
    """A layer that is not measured: its results are given, and so is the gradient that it passes on."""

    @staticmethod
    def forward(ctx, results, gradient, *sources):
        ctx.gradients = gradient, *(None for _ in sources[1:])
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *ctx.gradients


def _as_tokens(tensor: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D); a view where the storage is that of a model."""
    return tensor.transpose(1, 2).flatten(2)


def _as_heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


# ---- CSWin ----


def _lepe_branch(query, key, value, weight, bias, grid: Window, window: Window, scale: float) -> Tensor:
    """One orientation as published: (B, H, N, D) to (B, N, H*D)."""
    heads = query.shape[1]
    tiles = grid[0] // window[0], window[0], grid[1] // window[1], window[1]

    def image(tensor):
        tokens = _as_tokens(tensor)
        return tokens.transpose(1, 2).contiguous().unflatten(2, tiles)

    def by_window(tensor):
        windows = image(tensor).permute(0, 2, 4, 3, 5, 1).contiguous().flatten(0, 2).flatten(1, 2)
        return windows.unflatten(2, (heads, -1)).permute(0, 2, 1, 3).contiguous()

    def channels_last(tensor):
        return tensor.flatten(2).unflatten(1, (heads, -1)).permute(0, 1, 3, 2).contiguous()

    q, k = by_window(query), by_window(key)
    v_images = image(value).permute(0, 2, 4, 1, 3, 5).contiguous().flatten(0, 2)
    lepe = channels_last(F.conv2d(v_images, weight, bias, padding=1, groups=weight.shape[0]))
    v = channels_last(v_images)
    weights = (q * scale @ k.transpose(-2, -1)).softmax(-1)
    output = (weights @ v + lepe).transpose(1, 2).flatten(2)
    output = output.unflatten(1, window).unflatten(0, (-1, tiles[0], tiles[2]))
    return output.permute(0, 1, 3, 2, 4, 5).contiguous().flatten(1, 4)


def published_stripes(query, key, value, grid: Window, width: int, scale: float, lepe) -> Tensor:
    """(B, H, N, D) to the same. ``lepe``: (weight, bias) of each branch; of one branch every head has the whole grid."""
    if len(lepe) == 1:
        return _as_heads(_lepe_branch(query, key, value, *lepe[0], grid, grid, scale), query.shape[1])
    half, branches = query.shape[1] // 2, []
    for part, window, parameters in zip(
        (slice(0, half), slice(half, None)), ((grid[0], width), (width, grid[1])), lepe
    ):
        q, k, v = (tensor[:, part] for tensor in (query, key, value))
        branches.append(_lepe_branch(q, k, v, *parameters, grid, window, scale))
    return _as_heads(torch.cat(branches, 2), query.shape[1])


def _published_cross(case: Case) -> Callable:
    def attend(query, key, value, weight, bias):
        parts = 1 if case.window >= max(case.grid) else 2
        lepe = list(zip(weight.chunk(parts), bias.chunk(parts)))
        return published_stripes(query, key, value, case.grid, case.window, case.head_dim**-0.5, lepe)

    return attend


def _cut(tensor: Tensor, grid: Window, window: Window) -> Tensor:
    """(B, H, N, D) -> (B * windows, H, keys, D) in one copy that keeps a token's heads together."""
    tiles = tensor.transpose(1, 2).unflatten(1, (grid[0] // window[0], window[0], grid[1] // window[1], window[1]))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def _uncut(windows: Tensor, grid: Window, window: Window) -> Tensor:
    """(B * windows, H, keys, D) -> (B, N, H*D) in one copy."""
    tiles = _as_tokens(windows).unflatten(1, window).unflatten(0, (-1, grid[0] // window[0], grid[1] // window[1]))
    return tiles.transpose(2, 3).flatten(1, 4)


def _lepe(value: Tensor, weight: Tensor, bias: Tensor, window: Window) -> Tensor:
    """Of windows (B * windows, H, keys, D), channels last: faster here than the published channels first."""
    images = _as_tokens(value).unflatten(1, window).permute(0, 3, 1, 2)
    convolved = F.conv2d(images, weight, bias, padding=1, groups=weight.shape[0])
    return _as_heads(convolved.permute(0, 2, 3, 1).flatten(1, 2), value.shape[1])


def _sdpa_branch(query, key, value, weight, bias, grid: Window, window: Window) -> Tensor:
    q, k, v = (_cut(tensor, grid, window) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(q, k, v) + _lepe(v, weight, bias, window)
    return _uncut(output, grid, window)


def _sdpa_cross(case: Case) -> Callable:
    first, second = stripes(case)
    windows = (first,) if first == second else (first, second)

    def attend(query, key, value, weight, bias):
        parts = len(windows)
        halves = zip(
            *(tensor.chunk(parts, 1) for tensor in (query, key, value)), weight.chunk(parts), bias.chunk(parts)
        )
        branches = [_sdpa_branch(*half, case.grid, window) for half, window in zip(halves, windows)]
        return _as_heads(branches[0] if parts == 1 else torch.cat(branches, 2), case.heads)

    return attend


# ---- Swin and HAT's shifted windows ----


def partition(tokens: Tensor, case: Case) -> Tensor:
    """(B, N, C) -> (B * windows, keys, C), rolled before where windows are shifted."""
    image, by = tokens.unflatten(1, case.grid), shift(case)
    if by:
        image = image.roll((-by, -by), (1, 2))
    size = case.window
    tiles = image.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return tiles.transpose(2, 3).contiguous().flatten(0, 2).flatten(1, 2)


def _merge(windows: Tensor, case: Case) -> Tensor:
    size, by = case.window, shift(case)
    tiles = windows.unflatten(1, (size, size)).unflatten(0, (-1, case.grid[0] // size, case.grid[1] // size))
    image = tiles.transpose(2, 3).contiguous().flatten(3, 4).flatten(1, 2)
    if by:
        image = image.roll((by, by), (1, 2))
    return image.flatten(1, 2)


def _apart(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(windows, keys, keys): -100 between tokens that only the roll made neighbours."""
    by, size = shift(case), case.window
    if not by:
        return None
    region = [(torch.arange(n) >= n - size).int() + (torch.arange(n) >= n - by).int() for n in case.grid]
    region = 3 * region[0][:, None] + region[1]
    tiles = region.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return (SHIFTED_APART * (tiles[:, :, None] != tiles[:, None, :])).to(dtype).to(device)


def _bias(table: Tensor, index: Tensor) -> Tensor:
    """(H, queries, keys), gathered anew in every call as the published modules do."""
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()


def _published_windows(case: Case, index: Tensor, apart: Tensor | None) -> Callable:
    scale = case.head_dim**-0.5

    def attend(query, key, value, table):
        logits = query * scale @ key.transpose(-2, -1)
        logits = logits + _bias(table, index)[None]
        if apart is not None:
            logits = (logits.unflatten(0, (-1, apart.shape[0])) + apart[:, None]).flatten(0, 1)
        output = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return _as_heads(_merge(output, case), case.heads)

    return attend


def _sdpa_windows(case: Case, index: Tensor, apart: Tensor | None, precomputed: Tensor | None) -> Callable:
    def attend(query, key, value, table):
        mask = precomputed
        if mask is None:
            mask = _dense_mask(table, index, apart, query.shape[0])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return _as_heads(_merge(output, case), case.heads)

    return attend


def _dense_mask(table: Tensor, index: Tensor, apart: Tensor | None, count: int) -> Tensor:
    """(count, H, queries, keys)."""
    bias = _bias(table, index)[None]
    if apart is None:
        return bias.expand(count, -1, -1, -1)
    return (bias + apart[:, None]).repeat(count // apart.shape[0], 1, 1, 1)


# ---- HAT's overlapping windows ----


def _published_overlapping(case: Case, index: Tensor) -> Callable:
    scale, size, over = case.head_dim**-0.5, case.window, overlap(case)
    large = size + 2 * over

    def attend(query, key, value, table):
        heads = query.shape[1]
        image = _as_tokens(query).unflatten(1, case.grid)
        tiles = image.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        q = tiles.transpose(2, 3).contiguous().flatten(0, 2).flatten(1, 2)
        both = torch.cat([_as_tokens(t).unflatten(1, case.grid).permute(0, 3, 1, 2) for t in (key, value)], 1)
        columns = F.unfold(both, large, stride=size, padding=over)
        windows = columns.unflatten(1, (2, -1, large * large)).permute(1, 0, 4, 3, 2).contiguous().flatten(1, 2)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, *windows))
        logits = q * scale @ k.transpose(-2, -1)
        logits = logits + _bias(table, index)[None]
        output = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        tiles = output.unflatten(1, (size, size)).unflatten(0, (-1, case.grid[0] // size, case.grid[1] // size))
        return _as_heads(tiles.transpose(2, 3).contiguous().flatten(1, 4), heads)

    return attend


def enlarged(tensor: Tensor, case: Case) -> Tensor:
    """(B, H, N, D) -> (B * windows, H, keys of the enlarged window, D) in one copy after zero padding."""
    size, over = case.window, overlap(case)
    image = F.pad(tensor.transpose(1, 2).unflatten(1, case.grid), (0, 0, 0, 0, over, over, over, over))
    tiles = image.unfold(1, size + 2 * over, size).unfold(2, size + 2 * over, size)  # B, rows, columns, H, D, y, x
    return tiles.permute(0, 1, 2, 5, 6, 3, 4).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def _sdpa_overlapping(case: Case, index: Tensor, precomputed: Tensor | None) -> Callable:
    size = case.window

    def attend(query, key, value, table):
        mask = _bias(table, index)[None] if precomputed is None else precomputed
        q, k, v = _cut(query, case.grid, (size, size)), enlarged(key, case), enlarged(value, case)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return _as_heads(_uncut(output, case.grid, (size, size)), case.heads)

    return attend


# ---- contenders ----


def index_of(case: Case, device: torch.device) -> Tensor:
    over = overlap(case) if case.operator == OVERLAPPING else 0
    rule = "hat_oca" if case.operator == OVERLAPPING else "swin"
    return relative_position_index((case.window, case.window), (over, over), rule).to(device)


def published(how: Same = uncompiled) -> Callable[[Case, Inputs, bool], Call]:
    """The published module's attention part, every function of it through ``how``."""

    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        tensors = *inputs[:3], *inputs.parameters.values()
        if case.operator == CROSS:
            attend = how(_published_cross(case))
            return lambda: attend(*tensors)
        index = index_of(case, inputs.query.device)
        if case.operator == OVERLAPPING:
            attend = how(_published_overlapping(case, index))
            return lambda: attend(*tensors)
        apart = _apart(case, inputs.query.dtype, inputs.query.device)
        return _in_window_order(case, inputs, how, _published_windows(case, index, apart))

    return prepare


def on_windows(case: Case, inputs: Inputs, training: bool) -> Call:
    """SDPA on windows that are cut out by hand; in inference its dense mask is there already."""
    tensors = *inputs[:3], *inputs.parameters.values()
    if case.operator == CROSS:
        attend = _sdpa_cross(case)
        return lambda: attend(*tensors)
    index = index_of(case, inputs.query.device)
    table = inputs.parameters["bias_table"].detach()
    if case.operator == OVERLAPPING:
        attend = _sdpa_overlapping(case, index, None if training else _bias(table, index)[None])
        return lambda: attend(*tensors)
    apart = _apart(case, inputs.query.dtype, inputs.query.device)
    count = case.batch * case.tokens // case.window**2
    dense = None if training else _dense_mask(table, index, apart, count)
    return _in_window_order(case, inputs, uncompiled, _sdpa_windows(case, index, apart, dense))


def _in_window_order(case: Case, inputs: Inputs, how: Same, attend: Callable) -> Call:
    """Roll and partition the narrow input, then ``attend`` to the given projection of it."""
    with torch.no_grad():
        packed = torch.stack([_as_tokens(tensor) for tensor in inputs[:3]], 2)
        windows = partition(packed.flatten(2), case).unflatten(2, (3, case.heads, -1))
        projected = windows.permute(2, 0, 3, 1, 4).unbind(0)
        narrow = packed[:, :, 2].contiguous()
        gradient = partition(narrow, case)
    enter, attend, table = how(lambda tokens: partition(tokens, case)), how(attend), inputs.parameters["bias_table"]

    def call():
        (tokens,) = _NotMeasured.apply((narrow,), None, *inputs[:3])
        query, key, value = _NotMeasured.apply(projected, gradient, enter(tokens))
        return attend(query, key, value, table)

    return call


def unmasked(case: Case, inputs: Inputs, training: bool) -> Call:
    """Stock attention without bias, mask and LePE, one call on windows that are there already; of a square grid."""

    def flat(tensor: Tensor, window: Window) -> Tensor:
        return _cut(tensor, case.grid, window).flatten(0, 1)[:, None]

    with torch.no_grad():
        if case.operator == CROSS:
            half, (first, second) = case.heads // 2, stripes(case)
            parts = [torch.cat([flat(t[:, :half], first), flat(t[:, half:], second)]) for t in inputs[:3]]
        elif case.operator == OVERLAPPING:
            query = flat(inputs.query, (case.window, case.window))
            parts = [query, *(enlarged(t, case).flatten(0, 1)[:, None] for t in (inputs.key, inputs.value))]
        else:
            parts = [flat(tensor, (case.window, case.window)) for tensor in inputs[:3]]

    def call():
        query, key, value = _NotMeasured.apply(parts, None, *inputs[:3])
        return F.scaled_dot_product_attention(query, key, value).view(case.output_shape)

    return call


def flex_windows(case: Case, inputs: Inputs, training: bool) -> Call:
    """FlexAttention over the whole grid, its block mask the windows; LePE beside it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.operator == OVERLAPPING:
        raise NotImplementedError("keys beyond the grid take part, which no mask can express")
    (height, width), size, half = case.grid, case.window, case.heads // 2
    by = shift(case) if case.operator == SHIFTED else 0

    def rolled(token):
        return (token // width - by) % height, (token % width - by) % width

    def stripe_mask(b, h, i, j):
        vertical = (i % width) // size == (j % width) // size
        return torch.where(h < half, vertical, i // width // size == j // width // size)

    def window_mask(b, h, i, j):
        (y, x), (v, u) = rolled(i), rolled(j)
        return (y // size == v // size) & (x // size == u // size)

    attend = compiled(flex_attention)
    q, k, v = inputs[:3]
    arguments = case.heads if case.operator == CROSS else None, case.tokens, case.tokens, q.device.type
    if case.operator == CROSS:
        weight, bias = inputs.parameters.values()
        block_mask = create_block_mask(stripe_mask, None, *arguments)
        lepe = _lepe_of_grid(case, weight, bias)
        return lambda: attend(q, k, v, block_mask=block_mask) + lepe(v)
    table = inputs.parameters["bias_table"].float()
    block_mask = create_block_mask(window_mask, None, *arguments)

    def score(logit, b, h, i, j):
        (y, x), (t, u) = rolled(i), rolled(j)
        down, right = y % size - t % size + size - 1, x % size - u % size + size - 1
        bias = table[down * (2 * size - 1) + right, h]
        if not by:
            return logit + bias
        apart = ((y >= height - by) != (t >= height - by)) | ((x >= width - by) != (u >= width - by))
        return logit + bias + torch.where(apart, SHIFTED_APART, 0.0)

    return lambda: attend(q, k, v, score_mod=score, block_mask=block_mask)


def _lepe_of_grid(case: Case, weight: Tensor, bias: Tensor) -> Callable:
    """(B, H, N, D) -> the same, in the windows of both halves of the heads."""
    first, second = stripes(case)
    groups = (
        [(slice(None), first)]
        if first == second
        else [(slice(0, case.heads // 2), first), (slice(case.heads // 2, None), second)]
    )

    def lepe(value):
        found = []
        for part, window in groups:
            v = _cut(value[:, part], case.grid, window)
            w, b = (t.unflatten(0, (case.heads, -1))[part].flatten(0, 1) for t in (weight, bias))
            found.append(_uncut(_lepe(v, w, b, window), case.grid, window))
        return _as_heads(torch.cat(found, 2), case.heads)

    return lepe
