"""Linear angular attention with binary queries and keys.

    x^ = x / |x|    b(x) = s 1[x^ > m] (or +-1)    A = b(k)^T V    U = V / 2 + b(q) A / pi    O = U / |U| + conv(V)
    dU = (G - R (R . G)) / |U|,  R = U / |U|       B = b(q)^T dU                      dV = dU / 2 + b(k) B / pi + conv^T(G)
    dq^ = mask dU A^T / pi      dk^ = mask V B^T / pi      dx = (dx^ - x^ (x^ . dx^)) / |x|      mask = x^ >= 0 (+-1: all)
    d weight[h, t] = sum of G[n] . V[n + t - T / 2]

The scale s and the threshold m are statistics of q and of k: shift_add_rows.py. A and B hold plain sums of the rows that bits
select, without s: a bit is a 0 or 1 (or +-1), exact in any dtype. s enters where A and B are rounded to the inputs' dtype.

Kernel             one program owns               in registers             streamed through shared memory
context            a chunk, BLOCK x BLOCK of D D  the sum                  bits and V (or dU), BLOCK_N tokens
mix                BLOCK_M rows of a (b, h)       U, then O, dU or dV      bits, and BLOCK_K rows of A (or B)
query_key_gradient BLOCK_M rows of a (b, h)       dx^, x                   dU (or V), and BLOCK_K columns of A (or B)
tap_gradient       a chunk and a tap              a BLOCK_M x D tile of GV -

Chunks of tokens are summed in a second, ordered stage. Nothing is atomic and no split depends on the chip: runs are bitwise
equal. Forward: q, k and V are read twice (context: once per BLOCK of D), O is written: 7 N D elements, 4 N D^2 FLOPs. Backward:
dU is written once, in the inputs' dtype, and read three times: 16 N D elements, 10 N D^2 FLOPs. A convolution of T taps adds
2 N D T FLOPs forward, 4 backward, and reads its neighbours from cache. N x N exists nowhere.
"""

import math
from collections import namedtuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import shift_add_configurations as tuned
from .shift_add_rows import (
    SIGN,
    bits,
    chunks_of,
    head_of,
    inverse_norm,
    inverse_norms,
    load_tile,
    reduce,
    statistics_of,
    store_tile,
)
from .tiles import matmul, narrow

OUTPUT, OUTPUT_GRADIENT, VALUE_GRADIENT = (tl.constexpr(stage) for stage in range(3))
INVERSE_PI = tl.constexpr(1 / math.pi)

Strides = namedtuple("Strides", "chooser base gradient output")


# ---- products ----


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "chunk", "chunks"])
def context(
    chooser,
    inverse,
    value,
    statistics,
    partial,
    chooser_strides,
    value_strides,
    num_heads,
    num_tokens,
    chunk,
    chunks,
    MODE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of the sum of value's rows that each column of the chooser's bits selects, over a chunk."""
    TILES: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    unit, b, h = head_of(tl.program_id(0), chunks * TILES * TILES, num_heads)
    part = unit // (TILES * TILES)
    row = unit // TILES % TILES * BLOCK_D
    column = unit % TILES * BLOCK_D
    head = b * num_heads + h
    threshold = tl.load(statistics + head * 4 + THRESHOLD)
    total = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, num_tokens), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = tokens < num_tokens
        x = load_tile(chooser, chooser_strides, b, h, tokens, valid, row, HEAD_DIM, BLOCK_D)
        v = load_tile(value, value_strides, b, h, tokens, valid, column, HEAD_DIM, BLOCK_D)
        chosen = bits(x, inverse + head * num_tokens, tokens, valid, threshold, MODE)
        total = matmul(tl.trans(chosen), v, total, PRECISION)
    i = row + tl.arange(0, BLOCK_D)
    j = column + tl.arange(0, BLOCK_D)
    pointers = partial + (head * chunks + part) * HEAD_DIM * HEAD_DIM + i[:, None] * HEAD_DIM + j[None, :]
    tl.store(pointers, total, mask=(i < HEAD_DIM)[:, None] & (j < HEAD_DIM)[None, :])


@triton.jit
def scaled(a, scale, dtype: tl.constexpr):
    """Sums times their scale in 16 bits, where sums alone might overflow; fp32 products are scaled after, rounding less."""
    if dtype == tl.float32:
        return a
    else:
        return narrow(a * scale, dtype)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "taps"])
def mix(
    chooser,
    inverse,
    base,
    gradient,
    matrix,
    statistics,
    weight,
    output,
    strides,
    num_heads,
    num_tokens,
    taps,
    MODE: tl.constexpr,
    STAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """U = base / 2 + b(chooser) matrix / pi, and of it O, dU or dV."""
    block, b, h = head_of(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), num_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_tokens
    head = b * num_heads + h
    scale = tl.load(statistics + head * 4) * tl.load(statistics + head * 4 + 2) * INVERSE_PI
    threshold = tl.load(statistics + head * 4 + (3 if STAGE == VALUE_GRADIENT else 1))
    matrix += head * HEAD_DIM * HEAD_DIM
    j = tl.arange(0, BLOCK_D)
    u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_K):
        x = load_tile(chooser, strides.chooser, b, h, rows, valid, start, HEAD_DIM, BLOCK_K)
        chosen = bits(x, inverse + head * num_tokens, rows, valid, threshold, MODE)
        i = start + tl.arange(0, BLOCK_K)
        inside = (i < HEAD_DIM)[:, None] & (j < HEAD_DIM)[None, :]
        a = tl.load(matrix + i[:, None] * HEAD_DIM + j[None, :], mask=inside, other=0.0)
        u = matmul(chosen, scaled(a, scale, x.dtype), u, PRECISION)
    if chooser.dtype.element_ty == tl.float32:
        u *= scale
    u += 0.5 * load_tile(base, strides.base, b, h, rows, valid, 0, HEAD_DIM, BLOCK_D).to(tl.float32)
    if STAGE != VALUE_GRADIENT:
        factor = inverse_norm(u)[:, None]
        u *= factor
    if STAGE == OUTPUT_GRADIENT:
        g = load_tile(gradient, strides.gradient, b, h, rows, valid, 0, HEAD_DIM, BLOCK_D).to(tl.float32)
        u = (g - u * tl.sum(u * g, 1)[:, None]) * factor
    elif weight is not None:
        for tap in range(taps):
            w = tl.load(weight + h * taps + tap)
            if STAGE == OUTPUT:
                source = rows + tap - taps // 2
                there = (source >= 0) & (source < num_tokens)
                v = load_tile(base, strides.base, b, h, source, there, 0, HEAD_DIM, BLOCK_D)
            else:
                source = rows - tap + taps // 2
                there = (source >= 0) & (source < num_tokens)
                v = load_tile(gradient, strides.gradient, b, h, source, there, 0, HEAD_DIM, BLOCK_D)
            u += w * v.to(tl.float32)
    store_tile(output, strides.output, b, h, rows, valid, u, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads", "num_tokens"])
def query_key_gradient(
    input,
    other,
    matrix,
    statistics,
    output,
    strides,
    num_heads,
    num_tokens,
    MODE: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx of dx^ = mask * other matrix^T / pi"""
    block, b, h = head_of(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), num_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_tokens
    head = b * num_heads + h
    scale = tl.load(statistics + head * 4 + SCALE) * INVERSE_PI
    matrix += head * HEAD_DIM * HEAD_DIM
    j = tl.arange(0, BLOCK_D)
    dx = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_K):
        left = load_tile(other, strides.base, b, h, rows, valid, start, HEAD_DIM, BLOCK_K)
        i = start + tl.arange(0, BLOCK_K)
        inside = (j < HEAD_DIM)[:, None] & (i < HEAD_DIM)[None, :]
        a = tl.load(matrix + j[:, None] * HEAD_DIM + i[None, :], mask=inside, other=0.0)
        dx = matmul(left, tl.trans(scaled(a, scale, left.dtype)), dx, PRECISION)
    if other.dtype.element_ty == tl.float32:
        dx *= scale
    x = load_tile(input, strides.chooser, b, h, rows, valid, 0, HEAD_DIM, BLOCK_D).to(tl.float32)
    if MODE != SIGN:
        dx = tl.where(x >= 0.0, dx, 0.0)
    factor = inverse_norm(x)[:, None]
    x *= factor
    dx = (dx - x * tl.sum(x * dx, 1)[:, None]) * factor
    store_tile(output, strides.output, b, h, rows, valid, dx, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "chunk", "chunks", "taps"])
def tap_gradient(
    grad_output,
    value,
    partial,
    grad_output_strides,
    value_strides,
    num_heads,
    num_tokens,
    chunk,
    chunks,
    taps,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over a chunk of G[n] . V[n + tap - taps / 2]"""
    unit, b, h = head_of(tl.program_id(0), chunks * taps, num_heads)
    part = unit // taps
    tap = unit % taps
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, num_tokens), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        source = rows + tap - taps // 2
        there = (source >= 0) & (source < num_tokens)
        g = load_tile(grad_output, grad_output_strides, b, h, rows, rows < num_tokens, 0, HEAD_DIM, BLOCK_D)
        v = load_tile(value, value_strides, b, h, source, there, 0, HEAD_DIM, BLOCK_D)
        total += g.to(tl.float32) * v.to(tl.float32)
    tl.store(partial + ((b * chunks + part) * num_heads + h) * taps + tap, tl.sum(total))


# ---- launchers ----


def _context(chooser, inverse, value, statistics, mode, threshold):
    batch, heads, tokens, head_dim = value.shape
    config = tuned.attention("context", value)
    tiles = triton.cdiv(head_dim, config.block_m) ** 2
    chunk, chunks = chunks_of(tokens, batch * heads * tiles)
    shape = (batch, heads, head_dim, head_dim)
    result = torch.empty(shape, dtype=torch.float32, device=value.device)
    partial = result if chunks == 1 else result.new_empty((batch, heads, chunks, head_dim, head_dim))
    table.launch(
        context,
        batch * heads * chunks * tiles,
        value.device,
        config,
        *(chooser, inverse, value, statistics, partial, chooser.stride(), value.stride(), heads, tokens, chunk, chunks),
        MODE=mode,
        THRESHOLD=threshold,
        HEAD_DIM=head_dim,
        BLOCK_N=config.block_k,
        BLOCK_D=config.block_m,
        PRECISION=table.precision(value),
    )
    if chunks > 1:
        reduce(partial, result, batch * heads, chunks, head_dim * head_dim)
    return result


def _options(config, tensor):
    head_dim = tensor.shape[3]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_K": min(config.block_k, table.block_d(head_dim)),
        "BLOCK_D": table.block_d(head_dim),
        "PRECISION": table.precision(tensor),
    }


def _mix(stage, chooser, inverse, base, gradient, matrix, statistics, weight, mode):
    batch, heads, tokens, _ = base.shape
    output = torch.empty_like(chooser if stage is OUTPUT else base)
    config = tuned.attention("mix", base)
    strides = Strides(*(None if t is None else t.stride() for t in (chooser, base, gradient, output)))
    table.launch(
        mix,
        batch * heads * triton.cdiv(tokens, config.block_m),
        base.device,
        config,
        *(chooser, inverse, base, gradient, matrix, statistics, weight, output, strides, heads, tokens),
        0 if weight is None else weight.shape[1],
        MODE=mode,
        STAGE=stage.value,
        **_options(config, base),
    )
    return output


def _query_key_gradient(input, other, matrix, statistics, mode, scale):
    batch, heads, tokens, _ = input.shape
    output = torch.empty_like(input)
    config = tuned.attention("query_key_gradient", input)
    table.launch(
        query_key_gradient,
        batch * heads * triton.cdiv(tokens, config.block_m),
        input.device,
        config,
        *(input, other, matrix, statistics, output),
        Strides(input.stride(), other.stride(), None, output.stride()),
        *(heads, tokens),
        MODE=mode,
        SCALE=scale,
        **_options(config, input),
    )
    return output


def _tap_gradient(grad_output, value, weight):
    result = torch.zeros_like(weight)
    if value.numel() == 0:
        return result
    batch, heads, tokens, head_dim = value.shape
    taps = weight.shape[1]
    chunk, chunks = chunks_of(tokens, batch * heads * taps)
    partial = result.new_empty((batch, chunks, heads, taps))
    config = tuned.attention("row_statistics", value)
    table.launch(
        tap_gradient,
        batch * heads * chunks * taps,
        value.device,
        config,
        *(grad_output, value, partial, grad_output.stride(), value.stride(), heads, tokens, chunk, chunks, taps),
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=table.block_d(head_dim),
    )
    reduce(partial, result, 1, batch * chunks, heads * taps)
    return result


def shift_add_attention_fwd(query, key, value, residual_weight, binarize):
    """(output, context, statistics)"""
    statistics, inverse = statistics_of((query, key), binarize)
    if query.numel() == 0:
        shape = (*query.shape[:2], query.shape[3], query.shape[3])
        return torch.empty_like(query), statistics.new_zeros(shape), statistics
    sums = _context(key, inverse[1], value, statistics, binarize, 3)
    output = _mix(OUTPUT, query, inverse[0], value, None, sums, statistics, residual_weight, binarize)
    return output, sums, statistics


def shift_add_attention_bwd(grad_output, query, key, value, residual_weight, context, statistics, binarize):
    """(grad_query, grad_key, grad_value, grad_residual_weight)"""
    grad_weight = torch.zeros((0,), dtype=torch.float32, device=query.device)
    if residual_weight is not None:
        grad_weight = _tap_gradient(grad_output, value, residual_weight)
    if query.numel() == 0:
        return *map(torch.empty_like, (query, key, value)), grad_weight
    inverse = inverse_norms((query, key), statistics, binarize)
    grad_mixed = _mix(OUTPUT_GRADIENT, query, inverse[0], value, grad_output, context, statistics, None, binarize)
    grad_context = _context(query, inverse[0], grad_mixed, statistics, binarize, 1)
    grad_query = _query_key_gradient(query, grad_mixed, context, statistics, binarize, 2)
    grad_key = _query_key_gradient(key, value, grad_context, statistics, binarize, 0)
    grad_value = _mix(
        VALUE_GRADIENT, key, inverse[1], grad_mixed, grad_output, grad_context, statistics, residual_weight, binarize
    )
    return grad_query, grad_key, grad_value, grad_weight
