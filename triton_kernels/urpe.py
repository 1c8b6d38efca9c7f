"""Softmax attention with Toeplitz matrices (URPE), as policies of the tile engine; the gradients of the tables.

    O = W V        W = P * C        P = softmax(scale Q K^T + B)        B_ij = b[p_j - p_i], C_ij = c[p_j - p_i]; causal: j <= i
    dP = C * dO V^T       dS = P * (dP - delta)       delta_i = dO_i . O_i       dV = W^T dO
    dc[t] = sum of P * dO V^T,      db[t] = sum of dS,      over the pairs with p_j - p_i = t, and over the batch

A token of a sequence stands at p_i = i, one of a grid of width w at p_i = i + (i / w)(w - 1), so that the table (2h - 1)(2w - 1)
is read at p_j - p_i + its middle: one subtraction and one gather per element and table, of which a tile touches BLOCK_M +
BLOCK_N - 1 entries (on a grid a few rows of them), L1 hits. A table that is absent is not compiled in.

Tables. Summing the diagonals of every tile would cost a shear, BLOCK^2 elements through shared memory, per tile. Tiles at the
same offset meet the same differences (patches.py), so one program owns (head, offset, split), adds its tiles elementwise in
registers and shears once, at the end; that costs S and dO V^T again (4 D FLOPs an element, on the matrix units), and no tile of
sums ever leaves the chip. Row r of the sheared tile begins at its diagonal: column t holds j - i = t, or t - BLOCK past the end
of the row. On a patch of width w, j - i = t are the differences (t / w, t % w) and, where the column of j is left of i's,
(t / w + 1, t % w - w): with the halves of the shear four sums over rows, DIAGONALS x BLOCK floats per program. The second stage,
one program per LANES entries of a head's table, adds an entry's share of each of at most four offsets, split by split, in order.
Nothing is atomic.

Partial sums take 16 BLOCK bytes per table, head, offset and split: a sequence has 2 N / BLOCK - 1 offsets, which makes 32 N bytes
a split, against the output's N D e for each example of the batch.
FLOPs per (b, h): forward 4 N^2 D, backward 18 N^2 D (14 without tables); causal about half. Bytes are the engine's (tiles.py).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import engine, patches, tiles
from .attention import CAUSAL, PLAIN, plain_score_gradient, scaled_logits
from .tiles import LOG2E

DIAGONALS = tl.constexpr(4)  # (column of j left of i's, past the end of the row)
LANES = tl.constexpr(128)
REDUCE = table.Configuration(LANES.value, 0, 4, 1)


class Relative(NamedTuple):
    """Tables of (H, entries) float32, or None; `pitch`, entries of a row of a grid's table, is None where that is all of it.

    Both numbers are odd, so never a new specialisation.
    """

    coefficient: Any
    bias: Any
    entries: Any
    pitch: Any


# ---- policies ----


@triton.jit
def position(i, pitch):
    if pitch is None:
        return i
    else:
        width = (pitch + 1) // 2
        return i + i // width * (width - 1)


@triton.jit
def read(entries, h, size, entry, default):
    """Entries of head h, or the number `default` without a table."""
    if entries is None:
        return default
    else:
        return tl.load(entries + h * size + entry)


@triton.jit
def relative_term(arguments, b, h, i, j, num_queries, num_keys):
    """(bias, coefficient)"""
    i = position(tl.minimum(i, num_queries - 1), arguments.pitch)
    j = position(tl.minimum(j, num_keys - 1), arguments.pitch)
    entry = j - i + arguments.entries // 2
    return (
        read(arguments.bias, h, arguments.entries, entry, 0.0),
        read(arguments.coefficient, h, arguments.entries, entry, 1.0),
    )


@triton.jit
def biased_logits(score, term, scale_log2):
    return score * scale_log2 + term[0] * LOG2E


@triton.jit
def multiply(p, term):
    return p * term[1]


# ---- gradients of the tables ----


@triton.jit
def relative_members(owner, batch, num_heads, extents):
    """None where causality hides every pair."""
    _, cy, cx, _, _ = patches.offset_of(owner, num_heads, extents)
    hidden = (extents[5] != 0) & ((cy < 0) | ((cy == 0) & (cx < 0) & (extents[3] == 1)))
    return tl.where(hidden, 0, patches.members(owner, batch, num_heads, extents))


@triton.jit
def relative_owner_term(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK: tl.constexpr):
    """(bias, with -inf where causality hides the key; coefficient)"""
    h, dy, dx = patches.differences(owner, num_heads, extents, BLOCK)
    exists = (tl.abs(dy) < extents[0]) & (tl.abs(dx) < extents[1])
    entry = tl.where(exists, arguments.entries // 2 - dy * (2 * extents[1] - 1) - dx, 0)
    h = h.to(tl.int64)
    bias = read(arguments.bias, h, arguments.entries, entry, 0.0)
    hidden = (extents[5] != 0) & ((dy < 0) | ((dy == 0) & (dx < 0)))
    return (
        tl.where(hidden, float("-inf"), bias),
        read(arguments.coefficient, h, arguments.entries, entry, 1.0),
    )


@triton.jit
def store_diagonals(destination, total, width, BLOCK: tl.constexpr):
    """Sums over the rows of the sheared tile, by class; `width`: of the patch."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    past = row + column >= BLOCK
    key = (row + column) % BLOCK
    left = key % width < row % width
    sheared = tl.gather(total, key, 1)
    for LEFT in tl.static_range(2):
        for PAST in tl.static_range(2):
            chosen = (left if LEFT else left == 0) & (past if PAST else past == 0)
            sums = tl.sum(tl.where(chosen, sheared, 0.0), 0)
            tl.store(destination + (2 * LEFT + PAST) * BLOCK + tl.arange(0, BLOCK), sums)


@triton.jit
def relative_finish(
    arguments, destination, totals, owner, split, splits, num_heads, num_tokens, extents, BLOCK: tl.constexpr
):
    """destination: (present tables, H, offsets * splits, DIAGONALS, BLOCK)"""
    slots = tl.num_programs(0) // num_heads
    slot = (owner % num_heads).to(tl.int64) * slots + owner // num_heads * splits + split
    destination += slot * (DIAGONALS * BLOCK)
    if arguments.coefficient is not None:
        store_diagonals(destination, totals[1], extents[4], BLOCK)
        destination += tl.num_programs(0).to(tl.int64) * (DIAGONALS * BLOCK)
        totals = totals[0]
    if arguments.bias is not None:
        store_diagonals(destination, totals, extents[4], BLOCK)


@triton.jit(do_not_specialize=["entries", "num_heads", "splits", "grid_h", "grid_w", "tile_h", "tile_w"])
def reduce_relative(
    partial,
    grad,
    entries,
    num_heads,
    splits,
    grid_h,
    grid_w,
    tile_h,
    tile_w,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    DIAGONALS: tl.constexpr,
):
    """One program: LANES entries of one head's table. An entry belongs to the offsets on either side of it along each axis."""
    blocks = tl.cdiv(entries, LANES)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    pitch = 2 * grid_w - 1
    patches_y = tl.cdiv(grid_h, tile_h)
    patches_x = tl.cdiv(grid_w, tile_w)
    row = patches_y * tile_h + grid_h - 1 - entry // pitch  # query minus key, and enough to be positive
    column = patches_x * tile_w + grid_w - 1 - entry % pitch
    offsets = (2 * patches_y - 1) * (2 * patches_x - 1)
    total = tl.zeros((LANES,), tl.float32)
    for CORNER in tl.static_range(4):
        cy = row // tile_h - patches_y + CORNER // 2
        cx = column // tile_w - patches_x + CORNER % 2
        dy = tile_h * (CORNER // 2) - row % tile_h  # key minus query, inside the patches
        dx = tile_w * (CORNER % 2) - column % tile_w
        exists = (tl.abs(cy) < patches_y) & (tl.abs(cx) < patches_x) & (dy < tile_h) & (dx < tile_w) & (entry < entries)
        rank = tl.where(cy > 0, 2 * cy - 1, -2 * cy)
        offset = rank * (2 * patches_x - 1) + cx + patches_x - 1
        diagonal = dy * tile_w + dx
        lane = diagonal + tl.where(diagonal < 0, 2 * BLOCK, 0) + tl.where(dx < 0, 2 * BLOCK, 0)
        pointers = partial + (h * offsets + offset) * splits * (DIAGONALS * BLOCK) + lane
        for split in range(splits):
            total += tl.load(pointers + split * (DIAGONALS * BLOCK), mask=exists, other=0.0)
    tl.store(grad + h * entries + entry, total, mask=entry < entries)


# ---- launchers ----


def _policy(coefficient, bias, is_causal):
    return (CAUSAL if is_causal else PLAIN)._replace(
        term=relative_term,
        heavy=coefficient is not None and bias is not None,
        logits=scaled_logits if bias is None else biased_logits,
        weigh=tiles.unweighed if coefficient is None else multiply,
    )


def _arguments(coefficient, bias, grid_h, grid_w):
    pitch = 2 * grid_w - 1
    return Relative(coefficient, bias, (2 * grid_h - 1) * pitch, pitch if min(grid_h, grid_w) > 1 else None)


def relative_fwd(query, key, value, coefficient, bias, grid_h, grid_w, is_causal, scale):
    """(output, logsumexp)"""
    policy, arguments = _policy(coefficient, bias, is_causal), _arguments(coefficient, bias, grid_h, grid_w)
    return engine.run_forward(policy, query, key, value, arguments, scale * LOG2E.value)


def _table_gradients(policy, inputs, arguments, gradients, grid_h, grid_w, is_causal, scale_log2):
    query, gradients = inputs[0], [t for t in gradients if t.numel()]
    batch, heads = query.shape[:2]
    config = table.configuration("parameter_gradient", query, policy.lean, policy.heavy)
    block = config.block_m
    tile_h, tile_w = patches.patch_shape(grid_h, grid_w, block)
    offsets, splits = patches.classes(grid_h, grid_w, tile_h, tile_w, batch, heads)
    partial = query.new_empty((len(gradients), heads, offsets * splits, DIAGONALS.value, block), dtype=torch.float32)
    sums = tiles.ParameterPolicy(
        relative_members,
        patches.place,
        relative_owner_term,
        None if arguments.bias is None else plain_score_gradient,
        relative_finish,
        arguments.coefficient is not None,
    )
    if is_causal:  # the owner's term hides keys
        policy = policy._replace(logits=biased_logits)
    extents = (grid_h, grid_w, 0, tile_h, tile_w, int(is_causal))
    engine.run_parameter_gradient(
        policy, sums, offsets * heads, splits, partial, inputs, arguments, extents, scale_log2
    )
    for part, gradient in zip(partial, gradients):
        table.launch(
            reduce_relative,
            heads * triton.cdiv(arguments.entries, LANES.value),
            query.device,
            REDUCE,
            *(part, gradient, arguments.entries, heads, splits, grid_h, grid_w, tile_h, tile_w),
            BLOCK=block,
            LANES=LANES.value,
            DIAGONALS=DIAGONALS.value,
        )


def relative_bwd(
    grad_output, query, key, value, coefficient, bias, output, logsumexp, grid_h, grid_w, is_causal, scale
):
    """(grad_query, grad_key, grad_value, grad_coefficient, grad_bias); empty for an absent table"""
    policy, arguments = _policy(coefficient, bias, is_causal), _arguments(coefficient, bias, grid_h, grid_w)
    inputs = (query, key, value, grad_output, logsumexp, engine.run_row_delta(output, grad_output))
    gradients = engine.run_backward(policy, inputs, arguments, scale * LOG2E.value, scale)
    tables = [
        torch.empty((0,), dtype=torch.float32, device=query.device) if t is None else torch.zeros_like(t)
        for t in arguments[:2]
    ]
    if query.numel() and (coefficient is not None or bias is not None):
        _table_gradients(policy, inputs, arguments, tables, grid_h, grid_w, is_causal, scale * LOG2E.value)
    return *gradients, *tables
