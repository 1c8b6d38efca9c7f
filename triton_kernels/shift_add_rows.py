"""Rows of queries and keys: loads and stores, norms, bits, and the statistics that decide the bits.

    x^ = x / |x|    m = mean |x^| or mean x^, over the whole tensor or each head    b(x) = s 1[x^ > threshold], or +-1

A row's sum is float32, all above it float64, in two ordered stages: a chunk of tokens of a (b, h), then the chunks of the head
or of the tensor. One program owns a chunk, with a BLOCK_M x BLOCK_D tile in registers: N D elements read, 4 N D FLOPs.
"""

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import shift_add_configurations as tuned
from .tiles import narrow

PUBLISHED, MEAN_THRESHOLD, PER_HEAD, SIGN = (tl.constexpr(mode) for mode in range(4))
CHUNK = 256  # tokens of one partial sum, at least
TARGET_PROGRAMS = 1024  # several waves of the largest chip; fixed, so that sums do not depend on the device


@triton.jit
def head_of(program, blocks, num_heads):
    """(block, b, h) of a program; b and h in 64 bits."""
    return (
        program % blocks,
        (program // blocks // num_heads).to(tl.int64),
        (program // blocks % num_heads).to(tl.int64),
    )


@triton.jit
def tile_pointers(tensor, strides, b, h, rows, dims):
    origin = tensor + b * strides[0] + h * strides[1]
    return origin + rows.to(tl.int64)[:, None] * strides[2] + dims.to(tl.int64)[None, :] * strides[3]


@triton.jit
def load_tile(tensor, strides, b, h, rows, valid, start, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows by BLOCK columns from `start` on; 0 outside."""
    dims = start + tl.arange(0, BLOCK)
    pointers = tile_pointers(tensor, strides, b, h, rows, dims)
    if HEAD_DIM % BLOCK == 0:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_tile(tensor, strides, b, h, rows, valid, tile, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    pointers = tile_pointers(tensor, strides, b, h, rows, dims)
    tl.store(pointers, narrow(tile, tensor.dtype.element_ty), mask=valid[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def inverse_norm(x):
    """1 / |x| of each row, 0 of a zero row."""
    squared = tl.sum(x * x, 1)
    return tl.where(squared > 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(squared > 0.0, squared, 1.0))), 0.0)


@triton.jit
def bits(x, inverse, rows, valid, threshold, MODE: tl.constexpr):
    """1[x^ > threshold], or +-1, in x's dtype. `inverse`: 1 / |x| of every row, which only a threshold needs."""
    if MODE == MEAN_THRESHOLD:
        chosen = x.to(tl.float32) * tl.load(inverse + rows, mask=valid, other=0.0)[:, None] > threshold
    else:
        chosen = x.to(tl.float32) > 0.0
    return tl.where(chosen, 1.0, -1.0 if MODE == SIGN else 0.0).to(x.dtype)


# ---- statistics ----


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "chunk", "chunks"])
def row_statistics(
    input,
    inverse,
    partial,
    strides,
    num_heads,
    num_tokens,
    chunk,
    chunks,
    MODE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of |x^| or x^ over a chunk; 1 / |x| of its rows if a threshold will ask for it."""
    part, b, h = head_of(tl.program_id(0), chunks, num_heads)
    head = b * num_heads + h
    sums = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, num_tokens), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        valid = rows < num_tokens
        x = load_tile(input, strides, b, h, rows, valid, 0, HEAD_DIM, BLOCK_D).to(tl.float32)
        factor = inverse_norm(x)
        if MODE == MEAN_THRESHOLD:
            tl.store(inverse + head * num_tokens + rows, factor, mask=valid)
            sums += tl.sum(x * factor[:, None], 1).to(tl.float64)
        else:
            sums += (tl.sum(tl.abs(x), 1) * factor).to(tl.float64)
    tl.store(partial + head * chunks + part, tl.sum(sums))


@triton.jit(do_not_specialize=["group", "partials", "count"])
def reduce_statistics(partial, statistics, group, partials, count, MODE: tl.constexpr, LANES: tl.constexpr):
    """Of q (even programs) or of k: the mean over `group` heads, in order, written as the scale or the threshold of each of them."""
    which = tl.program_id(0) % 2
    first = (tl.program_id(0) // 2).to(tl.int64) * group
    row = partial + (which * (tl.num_programs(0) // 2) * group + first) * (partials // group)
    sums = tl.zeros((LANES,), tl.float64)
    for start in range(0, partials, LANES):
        lane = start + tl.arange(0, LANES)
        sums += tl.load(row + lane, mask=lane < partials, other=0.0)
    mean = (tl.sum(sums) / count).to(tl.float32)
    for start in range(0, group, LANES):
        head = start + tl.arange(0, LANES)
        entry = statistics + (first + head) * 4 + which * 2 + (1 if MODE == MEAN_THRESHOLD else 0)
        tl.store(entry, tl.zeros((LANES,), tl.float32) + mean, mask=head < group)


@triton.jit(do_not_specialize=["count", "size"])
def reduce_partials(partial, destination, count, size, LANES: tl.constexpr):
    """destination[g, e] = sum over c, in order, of partial[g, c, e]"""
    blocks = tl.cdiv(size, LANES)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    pointers = partial + group * count * size + lane
    total = tl.zeros((LANES,), tl.float32)
    for _ in range(count):
        total += tl.load(pointers, mask=lane < size, other=0.0)
        pointers += size
    tl.store(destination + group * size + lane, total, mask=lane < size)


# ---- launchers ----


def chunks_of(tokens, owners):
    """(tokens of a chunk, chunks) that give about TARGET_PROGRAMS programs to so many owners of a chunk."""
    wanted = max(1, TARGET_PROGRAMS // max(owners, 1))
    chunk = CHUNK * triton.cdiv(max(tokens, 1), CHUNK * wanted)
    return chunk, triton.cdiv(tokens, chunk)


def reduce(partial, destination, groups, count, size):
    config = tuned.LANES
    programs = groups * triton.cdiv(size, config.block_k)
    table.launch(
        reduce_partials, programs, partial.device, config, *(partial, destination, count, size), LANES=config.block_k
    )


def _sum_rows(tensors, mode):
    """(partial sums (2, B, H, chunks) of query and key; 1 / |x| of their rows, in the mode that needs it)"""
    batch, heads, tokens, head_dim = tensors[0].shape
    device = tensors[0].device
    chunk, chunks = chunks_of(tokens, batch * heads)
    partial = torch.empty((2, batch, heads, chunks), dtype=torch.float64, device=device)
    kept = tokens if mode == MEAN_THRESHOLD.value else 0
    inverse = torch.empty((2, batch, heads, kept), dtype=torch.float32, device=device)
    config = tuned.attention("row_statistics", tensors[0])
    for tensor, sums, norms in zip(tensors, partial, inverse):
        table.launch(
            row_statistics,
            batch * heads * chunks,
            device,
            config,
            *(tensor, norms, sums, tensor.stride(), heads, tokens, chunk, chunks),
            MODE=mode,
            HEAD_DIM=head_dim,
            BLOCK_M=config.block_m,
            BLOCK_D=table.block_d(head_dim),
        )
    return partial, inverse


def inverse_norms(tensors, statistics, mode):
    """1 / |x| of query's and of key's rows, in the mode that asks for it; else any tensor, which nobody reads."""
    return _sum_rows(tensors, mode)[1] if mode == MEAN_THRESHOLD.value else (statistics, statistics)


def statistics_of(tensors, mode):
    """(scale and threshold of query and of key (B, H, 4), inverse_norms)"""
    batch, heads, tokens, head_dim = tensors[0].shape
    statistics = torch.zeros((batch, heads, 4), dtype=torch.float32, device=tensors[0].device)
    if mode in (MEAN_THRESHOLD.value, SIGN.value):
        statistics[..., 0::2] = 1
    if mode == SIGN.value or tensors[0].numel() == 0:
        return statistics, (statistics, statistics)
    partial, inverse = _sum_rows(tensors, mode)
    group = 1 if mode == PER_HEAD.value else batch * heads
    config = tuned.LANES
    table.launch(
        reduce_statistics,
        2 * (batch * heads // group),
        statistics.device,
        config,
        *(partial, statistics, group, group * partial.shape[3], group * tokens * head_dim),
        MODE=mode,
        LANES=config.block_k,
    )
    return statistics, inverse
