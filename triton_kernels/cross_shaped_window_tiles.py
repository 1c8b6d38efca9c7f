"""Where the tokens of a window lie, what is added to their scores, and the convolution of LePE: parts of every window kernel.

A slot is a place of a window, row-major. The window covers rolled positions of the padded grid; position Y is padded row
(Y + shift) mod padded height, which is image row y = that - top. A slot outside the image is a zero key and no query.

The term of a tile is what is added to scale_log2 S: log2(e) times bias and mask, -inf at keys that do not exist. A bias that
weighs is no part of it: it multiplies P.

Prefix tokens. Where one window is the whole grid, tokens may come before it. Such a call is, for its geometry, one window of
one row of all tokens; only the place of a slot in the bias table is then found on the true grid, in Prefix.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2E, narrow

SHIFTED_APART = tl.constexpr(-100.0)


class Prefix(NamedTuple):
    """So many tokens before a grid of rows x columns."""

    tokens: Any
    rows: Any
    columns: Any


class Geometry(NamedTuple):
    """Heads 0 .. H // 2 - 1 have windows window_h x window_w, the others second_h x second_w. Triton specialises these."""

    grid_h: Any
    grid_w: Any
    window_h: Any
    window_w: Any
    second_h: Any
    second_w: Any
    shift_h: Any
    shift_w: Any
    overlap_h: Any
    overlap_w: Any
    prefix: Any = None


# ---- rows; UNIT divides every stride but the last, and tells the compiler how wide a load may be ----


@triton.jit
def head_at(pointer, strides, b, h, UNIT: tl.constexpr):
    return pointer + tl.multiple_of(b * strides[0] + h * strides[1], UNIT)


@triton.jit
def row_pointers(pointer, strides, rows, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    offsets = tl.multiple_of(rows.to(tl.int64)[:, None] * strides[2], (UNIT, UNIT))
    return pointer + (offsets + tl.arange(0, BLOCK_D).to(tl.int64)[None, :] * strides[3])


@triton.jit
def load_rows(pointer, strides, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return tl.load(row_pointers(pointer, strides, rows, UNIT, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, strides, tile, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    pointers = row_pointers(pointer, strides, rows, UNIT, BLOCK_D)
    tl.store(pointers, narrow(tile, pointer.dtype.element_ty), mask=mask)


# ---- places ----


@triton.jit
def locate(program, batch, num_heads, share, geometry, BLOCK: tl.constexpr):
    """Program -> (h, block of BLOCK slots, chunk, rows and columns of a window, windows along the grid).

    A chunk is `share` members: (b, window row, window column), the last fastest. Programs of the first half of the heads
    come first, as many as `launches` says.
    """
    half = num_heads // 2
    first_windows = tl.cdiv(geometry.grid_h, geometry.window_h) * tl.cdiv(geometry.grid_w, geometry.window_w)
    first_blocks = tl.cdiv(geometry.window_h * geometry.window_w, BLOCK)
    first_programs = half * first_blocks * tl.cdiv(batch * first_windows, share)
    second = program >= first_programs
    program = tl.where(second, program - first_programs, program)
    height = tl.where(second, geometry.second_h, geometry.window_h)
    width = tl.where(second, geometry.second_w, geometry.window_w)
    heads = tl.where(second, num_heads - half, half)
    blocks = tl.cdiv(height * width, BLOCK)
    h = program // blocks % heads + tl.where(second, half, 0)
    chunk = program // blocks // heads
    return (
        h.to(tl.int64),
        program % blocks,
        chunk,
        height,
        width,
        tl.cdiv(geometry.grid_h, height),
        tl.cdiv(geometry.grid_w, width),
    )


@triton.jit
def along(position, shift, padded, extent):
    """Rolled position along one side of the grid -> (image coordinate, whether in the image, whether the roll wrapped it)."""
    wrapped = (position >= padded - shift) & (shift > 0)
    coordinate = position + shift - tl.where(wrapped, padded, 0) - (padded - extent) // 2
    return coordinate, (coordinate >= 0) & (coordinate < extent), wrapped


@triton.jit
def token_at(y, x, height, width, geometry):
    """Rolled position -> (token, whether in the image, region); tokens of different regions are shifted apart."""
    y, y_inside, y_wrapped = along(y, geometry.shift_h, tl.cdiv(geometry.grid_h, height) * height, geometry.grid_h)
    x, x_inside, x_wrapped = along(x, geometry.shift_w, tl.cdiv(geometry.grid_w, width) * width, geometry.grid_w)
    return y * geometry.grid_w + x, y_inside & x_inside, y_wrapped.to(tl.int32) * 2 + x_wrapped.to(tl.int32)


# ---- bias and terms ----


@triton.jit
def bias_sides(height, width, geometry):
    """Rows and columns of queries that the table of a window knows."""
    if geometry.prefix is None:
        return height, width
    else:
        return geometry.prefix.rows, geometry.prefix.columns


@triton.jit
def bias_columns(width, geometry):
    _, columns = bias_sides(width, width, geometry)
    return 2 * columns + 2 * geometry.overlap_w - 1


@triton.jit
def bias_centre(bias, h, height, width, geometry):
    """Where difference (0, 0) from the corners lies in the table of head h; None without a bias."""
    if bias is None:
        return None
    else:
        height, width = bias_sides(height, width, geometry)
        columns = 2 * width + 2 * geometry.overlap_w - 1
        rows = 2 * height + 2 * geometry.overlap_h - 1
        return bias + h * rows * columns + (height - 1) * columns + width - 1


@triton.jit
def bias_code(y, x, exists, table_columns, geometry):
    """Codes, row * columns of the table + column, differ by the entry of a pair; negative: a prefix token, which has none."""
    if geometry.prefix is None:
        return tl.where(exists, y * table_columns + x, 0)
    else:
        place = tl.maximum(x - geometry.prefix.tokens, 0)
        code = place // geometry.prefix.columns * table_columns + place % geometry.prefix.columns
        return tl.where(exists & (x >= geometry.prefix.tokens), code, -1)


@triton.jit
def bias_entries(centre, i_code, j_code, geometry, WEIGHS: tl.constexpr):
    """The bias of a tile; None without one."""
    if centre is None:
        return None
    elif geometry.prefix is None:
        return tl.load(centre + (j_code - i_code))
    else:
        return tl.load(centre + (j_code - i_code), mask=(i_code | j_code) >= 0, other=1.0 if WEIGHS else 0.0)


@triton.jit
def shared_term(entries, j_exists, WEIGHS: tl.constexpr):
    """What all windows of a head add alike."""
    if entries is None or WEIGHS:
        return tl.where(j_exists, 0.0, float("-inf"))
    else:
        return tl.where(j_exists, entries * LOG2E, float("-inf"))


@triton.jit
def weigh(p, entries, WEIGHS: tl.constexpr):
    """P, or P * W where the bias weighs; of dO V^T likewise dP."""
    if WEIGHS:
        p = p * entries
    return p


@triton.jit
def own_term(term, i_region, j_region, j_inside, SHIFTED: tl.constexpr, MASKED: tl.constexpr):
    """The term with what one window adds: the mask of the shift, and padding that takes no part."""
    if SHIFTED:
        term = term + tl.where(i_region != j_region, SHIFTED_APART * LOG2E, 0.0)
    if MASKED:
        term = tl.where(j_inside, term, float("-inf"))
    return term


# ---- LePE ----


@triton.jit
def tap_row(weight, h, tap, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    return tl.load(weight + (h * 9 + tap) * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)


@triton.jit
def neighbour_rows(
    pointer,
    strides,
    ly,
    lx,
    corner_y,
    corner_x,
    tap,
    height,
    width,
    geometry,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rows of the slots that lie a tap (or, SIGN = -1, minus a tap) from slots (ly, lx); 0 outside the window and the image."""
    near_y = ly + SIGN * (tap // 3 - 1)
    near_x = lx + SIGN * (tap % 3 - 1)
    token, inside, _ = token_at(corner_y + near_y, corner_x + near_x, height, width, geometry)
    inside = inside & (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
    return load_rows(pointer, strides, token, inside, HEAD_DIM, BLOCK_D, UNIT).to(tl.float32)


@triton.jit
def convolve(
    total,
    weight,
    h,
    pointer,
    strides,
    ly,
    lx,
    corner_y,
    corner_x,
    height,
    width,
    geometry,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """total + the sum over taps of weight[h, tap] times the neighbour at the tap; SIGN = -1: transposed."""
    TAPS: tl.constexpr = 3 if UNIT % 4 == 0 else 1  # at once; narrow loads take more registers
    for row in range(9 // TAPS):
        for column in tl.static_range(TAPS):
            tap = row * TAPS + column
            near = neighbour_rows(
                *(pointer, strides, ly, lx, corner_y, corner_x, tap, height, width, geometry),
                *(SIGN, HEAD_DIM, BLOCK_D, UNIT),
            )
            total += near * tap_row(weight, h, tap, HEAD_DIM, BLOCK_D)[None, :]
    return total
