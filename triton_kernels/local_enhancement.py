"""Local enhancement: a depthwise convolution of value over the token grid, added to the output of attention (RMT's LCE).

    O[p] = A[p] + bias + sum over T x T taps t of w[t] V[p + t]        p + t in the grid; prefix tokens: O = A
    dV[p] = sum_t w[t] dO[p - t]      dw[t] = sum over batch and p of dO[p] V[p + t]      dbias = sum of dO

Channels are (h, d), and tap t = (y, x) lies (y - T // 2, x - T // 2) away.

Kernel                 one program owns                                  in registers              streamed (L1, L2)
enhance                ROWS tokens of a (b, h)                           their sums                T * T neighbours of V
enhance, transposed    the same of dV                                    the same                  of dO
enhancement_gradient   a chunk of blocks of tokens of a head, TAPS taps  TAPS sums, sum of dO      dO, TAPS neighbours of V

A tile is ROWS x BLOCK_D = 1024 elements, 512 where loads are narrow, on 4 warps; shared memory holds only the last sums.

FLOPs per (b, h), N tokens: 2 T^2 N D each. Bytes at e per element, where neighbours hit the cache: forward 3 N D e, dV 2 N D e,
dw 2 N D e and again from the cache for every further TAPS taps. Partial sums, (chunks, H, D, T * T) fp32, have a fixed
number of chunks and are added in order by a second kernel; nothing is atomic.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import cross_shaped_window as windows
from .cross_shaped_window_tiles import head_at, load_rows, store_rows

EnhanceStrides = namedtuple("EnhanceStrides", "attention value output")
GradientStrides = namedtuple("GradientStrides", "value grad_output")


@triton.jit
def place_of(i, grid_h, grid_w, prefix):
    """Token -> (y, x, whether it is on the grid)."""
    place = tl.maximum(i - prefix, 0)
    return place // grid_w, place % grid_w, (i >= prefix) & (place < grid_h * grid_w)


@triton.jit
def near_rows(
    pointer,
    strides,
    y,
    x,
    on_grid,
    grid_h,
    grid_w,
    prefix,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rows of the tokens at (y, x), zero outside the grid."""
    inside = on_grid & (y >= 0) & (y < grid_h) & (x >= 0) & (x < grid_w)
    return load_rows(pointer, strides, prefix + y * grid_w + x, inside, HEAD_DIM, BLOCK_D, UNIT).to(tl.float32)


@triton.jit(do_not_specialize=["num_heads", "grid_h", "grid_w", "prefix"])
def enhance(
    attention,
    value,
    weight,
    bias,
    output,
    strides,
    num_heads,
    grid_h,
    grid_w,
    prefix,
    SIZE: tl.constexpr,
    SIGN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """SIGN = -1: transposed. attention, bias: None where there is nothing to add. AT_ONCE taps of a row are unrolled."""
    tokens = prefix + grid_h * grid_w
    blocks = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0)
    h = (program // blocks % num_heads).to(tl.int64)
    b = (program // blocks // num_heads).to(tl.int64)
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    y, x, on_grid = place_of(i, grid_h, grid_w, prefix)
    dims = tl.arange(0, BLOCK_D)
    v_head = head_at(value, strides.value, b, h, UNIT)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if bias is not None:
        row = tl.load(bias + h * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        total += tl.where(on_grid[:, None], row[None, :], 0.0)
    taps = weight + (h * HEAD_DIM + dims) * (SIZE * SIZE)
    for step in range(SIZE * SIZE // AT_ONCE):
        for n in tl.static_range(AT_ONCE):
            tap = step * AT_ONCE + n
            near = near_rows(
                *(v_head, strides.value, y + SIGN * (tap // SIZE - SIZE // 2), x + SIGN * (tap % SIZE - SIZE // 2)),
                *(on_grid, grid_h, grid_w, prefix, HEAD_DIM, BLOCK_D, UNIT),
            )
            total += near * tl.load(taps + tap, mask=dims < HEAD_DIM, other=0.0)[None, :]
    if attention is not None:
        a_head = head_at(attention, strides.attention, b, h, UNIT)
        total += load_rows(a_head, strides.attention, i, i < tokens, HEAD_DIM, BLOCK_D, UNIT).to(tl.float32)
    o_head = head_at(output, strides.output, b, h, UNIT)
    store_rows(o_head, strides.output, total, i, i < tokens, HEAD_DIM, BLOCK_D, UNIT)


@triton.jit(do_not_specialize=["batch", "num_heads", "share", "chunks", "grid_h", "grid_w", "prefix"])
def enhancement_gradient(
    value,
    grad_output,
    partial_weight,
    partial_bias,
    strides,
    batch,
    num_heads,
    share,
    chunks,
    grid_h,
    grid_w,
    prefix,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: TAPS taps of a head, summed over a chunk of `share` blocks of tokens; those of the first taps, also dO."""
    groups: tl.constexpr = (SIZE * SIZE + TAPS - 1) // TAPS
    program = tl.program_id(0)
    first = program % groups * TAPS
    h = (program // groups % num_heads).to(tl.int64)
    chunk = program // groups // num_heads
    blocks = tl.cdiv(grid_h * grid_w, ROWS)
    dims = tl.arange(0, BLOCK_D)
    empty = tl.zeros((ROWS, BLOCK_D), tl.float32)
    totals = ()
    for _ in tl.static_range(TAPS):
        totals = totals + (empty,)
    bias_total = empty
    for member in range(chunk * share, tl.minimum(chunk * share + share, batch * blocks)):
        b = (member // blocks).to(tl.int64)
        i = prefix + member % blocks * ROWS + tl.arange(0, ROWS)
        y, x, on_grid = place_of(i, grid_h, grid_w, prefix)
        v_head = head_at(value, strides.value, b, h, UNIT)
        do_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
        do = load_rows(do_head, strides.grad_output, i, on_grid, HEAD_DIM, BLOCK_D, UNIT).to(tl.float32)
        if partial_bias is not None:
            bias_total += do
        sums = ()
        for n in tl.static_range(TAPS):
            near = near_rows(
                *(v_head, strides.value, y + (first + n) // SIZE - SIZE // 2, x + (first + n) % SIZE - SIZE // 2),
                *(on_grid, grid_h, grid_w, prefix, HEAD_DIM, BLOCK_D, UNIT),
            )
            sums = sums + (totals[n] + near * do,)
        totals = sums
    channel = (chunk.to(tl.int64) * num_heads + h) * HEAD_DIM + dims
    for n in tl.static_range(TAPS):
        tap = first + n
        destination = partial_weight + channel * (SIZE * SIZE) + tap
        tl.store(destination, tl.sum(totals[n], 0), mask=dims < tl.where(tap < SIZE * SIZE, HEAD_DIM, 0))
    if partial_bias is not None:
        tl.store(partial_bias + channel, tl.sum(bias_total, 0), mask=dims < tl.where(first == 0, HEAD_DIM, 0))


# ---- launchers ----

CHUNKS = 512  # programs of a tap group's sums, over all heads; fixed, so that sums do not depend on the device
MOST_TAPS = 7


def _configuration(value, unit):
    rows = (1024 if unit > 1 else 512) // table.block_d(value.shape[3])
    return table.Configuration(max(4, rows), 0, 4, 1)


def _options(value, size, unit, config):
    return {
        "SIZE": size,
        "HEAD_DIM": value.shape[3],
        "ROWS": config.block_m,
        "BLOCK_D": table.block_d(value.shape[3]),
        "UNIT": unit,
    }


def _enhance(attention, value, weight, bias, output, grid_h, grid_w, num_prefix_tokens, size, sign):
    batch, heads, tokens, _ = value.shape
    present = [t for t in (attention, value, output) if t is not None]
    unit = windows.unit_of(*present)
    config = _configuration(value, unit)
    table.launch(
        enhance,
        triton.cdiv(tokens, config.block_m) * batch * heads,
        value.device,
        config,
        *(attention, value, weight, bias, output),
        EnhanceStrides(*(None if t is None else t.stride() for t in (attention, value, output))),
        *(heads, grid_h, max(grid_w, 1), num_prefix_tokens),
        SIGN=sign,
        AT_ONCE=size if size <= MOST_TAPS else 1,
        **_options(value, size, unit, config),
    )


def local_enhancement_fwd(attention, value, weight, bias, grid_h, grid_w, num_prefix_tokens, size):
    """The output, laid out like attention."""
    output = torch.empty_like(attention)
    if output.numel():
        _enhance(attention, value, weight, bias, output, grid_h, grid_w, num_prefix_tokens, size, 1)
    return output


def local_enhancement_bwd(grad_output, attention, value, weight, bias, grid_h, grid_w, num_prefix_tokens, size):
    """(grad_value, grad_weight, grad_bias)"""
    grad_value, grad_weight = torch.empty_like(value), torch.zeros_like(weight)
    grad_bias = weight.new_zeros((0,)) if bias is None else torch.zeros_like(bias)
    batch, heads = value.shape[:2]
    if value.numel():
        _enhance(None, grad_output, weight, None, grad_value, grid_h, grid_w, num_prefix_tokens, size, -1)
    if not value.numel() or not grid_h * grid_w:
        return grad_value, grad_weight, grad_bias
    unit = windows.unit_of(value, grad_output)
    config = _configuration(value, unit)
    taps = min(size, MOST_TAPS)
    blocks = batch * triton.cdiv(grid_h * grid_w, config.block_m)
    share = triton.cdiv(blocks, max(1, CHUNKS // heads))
    chunks = triton.cdiv(blocks, share)
    partial_weight = weight.new_empty((chunks, *weight.shape))
    partial_bias = None if bias is None else bias.new_empty((chunks, *bias.shape))
    table.launch(
        enhancement_gradient,
        triton.cdiv(size * size, taps) * heads * chunks,
        value.device,
        config,
        *(value, grad_output, partial_weight, partial_bias),
        GradientStrides(value.stride(), grad_output.stride()),
        *(batch, heads, share, chunks, grid_h, grid_w, num_prefix_tokens),
        TAPS=taps,
        **_options(value, size, unit, config),
    )
    windows.sum_over_chunks(partial_weight, grad_weight)
    if bias is not None:
        windows.sum_over_chunks(partial_bias, grad_bias)
    return grad_value, grad_weight, grad_bias
