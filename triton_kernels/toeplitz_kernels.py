"""Kernels of Toeplitz-weighted linear attention. The formulas and what each kernel owns are in toeplitz.py."""

from collections import namedtuple

import triton
import triton.language as tl

from . import patches
from .attention import causal_keys, causal_queries
from .cross_shaped_window_tiles import head_at, row_pointers, store_rows
from .tiles import every_key, matmul, narrow

# Strides (batch, head, row, column) of what query_gradient reads and writes.
QueryStrides = namedtuple("QueryStrides", "key value grad_output grad_query")


# ---- parts ----


@triton.jit
def position(token, num_tokens, width):
    """p of a token; past the end that of the last one, so that every pair has an entry."""
    token = tl.minimum(token, num_tokens - 1)
    return token + token // width * (width - 1)


@triton.jit
def load_rows(
    pointer, strides, rows, valid, DIM: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, CHECK: tl.constexpr
):
    """Rows of a head; without CHECK all of them exist. UNIT divides every stride but the last."""
    pointers = row_pointers(pointer, strides, rows, UNIT, BLOCK)
    inside = tl.arange(0, BLOCK) < DIM
    if CHECK and DIM != BLOCK:
        return tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    elif DIM != BLOCK:
        return tl.load(pointers, mask=inside[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def weigh(weights, x, accumulator, PRECISION: tl.constexpr):
    """accumulator + weights @ x for weights that may leave the range of fp16."""
    if x.dtype == tl.float16:
        bits = weights.to(tl.uint32, bitcast=True)
        bits = (bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000  # to nearest; the matrix units truncate
        return matmul(bits.to(tl.float32, bitcast=True), x.to(tl.float32), accumulator, PRECISION)
    else:
        return matmul(narrow(weights, x.dtype), x, accumulator, PRECISION)


@triton.jit
def inverse_normalizer(normalizer, rows, valid):
    """1 / n; 0 where a row is absent or has no weight."""
    n = tl.load(normalizer + rows, mask=valid, other=0.0)
    return tl.where(n == 0.0, 0.0, 1.0 / tl.where(n == 0.0, 1.0, n))


@triton.jit(do_not_specialize=["entries"])
def relative_weights(bias, highest, weights, entries, LANES: tl.constexpr):
    """exp(b - max b), LANES entries of a head; of nothing but -inf: zeros."""
    blocks = tl.cdiv(entries, LANES)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    most = tl.load(highest + h)
    b = tl.load(bias + h * entries + entry, mask=entry < entries, other=0.0)
    c = tl.exp(b - tl.where(most == float("-inf"), 0.0, most))
    tl.store(weights + h * entries + entry, c, mask=entry < entries)


# ---- forward ----

SIZES = ["num_heads", "num_tokens", "entries", "width"]


@triton.jit(do_not_specialize=SIZES)
def toeplitz_forward(
    query,
    key,
    value,
    weights,
    output,
    normalizer,
    strides,
    num_heads,
    num_tokens,
    entries,
    width,
    eps,
    CAUSAL: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    program = tl.program_id(0)
    row_begin = (blocks - 1 - program % blocks) * BLOCK_M
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    key = head_at(key, strides.key, b, h, UNIT)
    value = head_at(value, strides.value, b, h, UNIT)
    i = row_begin + tl.arange(0, BLOCK_M)
    i_valid = i < num_tokens
    weights += h * entries
    first = position(num_tokens - 1, num_tokens, width) - position(i, num_tokens, width)
    q = load_rows(head_at(query, strides.query, b, h, UNIT), strides.query, i, i_valid, KEY_DIM, BLOCK_K, UNIT, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if CAUSAL:
        begin, full, end = causal_keys(row_begin, row_begin + BLOCK_M, num_tokens, BLOCK_N)
    else:
        begin, full, end = every_key(row_begin, row_begin + BLOCK_M, num_tokens, BLOCK_N)
    for MASKED in tl.static_range(0, 2):
        for start in range(full if MASKED else begin, end if MASKED else full, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            c = tl.load(weights + (position(j, num_tokens, width)[None, :] + first[:, None]))
            k = load_rows(key, strides.key, j, j < num_tokens, KEY_DIM, BLOCK_K, UNIT, MASKED)
            w = matmul(q, tl.trans(k), None, PRECISION) * c
            if MASKED and CAUSAL:
                w = tl.where(j[None, :] <= i[:, None], w, 0.0)
            total += tl.sum(w, 1)
            v = load_rows(value, strides.value, j, j < num_tokens, VALUE_DIM, BLOCK_V, UNIT, MASKED)
            accumulator = weigh(w, v, accumulator, WEIGHT_PRECISION)
    total += eps
    tl.store(normalizer + (b * num_heads + h) * num_tokens + i, total, mask=i_valid)
    empty = total == 0.0
    out = tl.where(empty[:, None], 0.0, accumulator / tl.where(empty, 1.0, total)[:, None])
    output = head_at(output, strides.output, b, h, UNIT)
    store_rows(output, strides.output, out, i, i_valid, VALUE_DIM, BLOCK_V, UNIT)


# ---- backward ----


@triton.jit(do_not_specialize=SIZES)
def toeplitz_key_value_gradient(
    query,
    key,
    value,
    grad_output,
    weights,
    normalizer,
    delta,
    grad_key,
    grad_value,
    strides,
    num_heads,
    num_tokens,
    entries,
    width,
    CAUSAL: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    program = tl.program_id(0)
    column_begin = program % blocks * BLOCK_N
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    query = head_at(query, strides.query, b, h, UNIT)
    grad_output = head_at(grad_output, strides.grad_output, b, h, UNIT)
    row = (b * num_heads + h) * num_tokens
    j = column_begin + tl.arange(0, BLOCK_N)
    j_valid = j < num_tokens
    weights += h * entries
    last = position(num_tokens - 1, num_tokens, width) + position(j, num_tokens, width)
    k = load_rows(head_at(key, strides.key, b, h, UNIT), strides.key, j, j_valid, KEY_DIM, BLOCK_K, UNIT, True)
    v = load_rows(head_at(value, strides.value, b, h, UNIT), strides.value, j, j_valid, VALUE_DIM, BLOCK_V, UNIT, True)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    begin = 0
    full = 0
    if CAUSAL:
        begin, full = causal_queries(column_begin, column_begin + BLOCK_N, num_tokens, BLOCK_M)
    for FULL in tl.static_range(0 if CAUSAL else 1, 2):
        for start in range(full if FULL else begin, num_tokens if FULL else tl.minimum(full, num_tokens), BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            i_valid = i < num_tokens
            c = tl.load(weights + (last[:, None] - position(i, num_tokens, width)[None, :]))
            c = c * inverse_normalizer(normalizer + row, i, i_valid)[None, :]
            if not FULL:
                c = tl.where(j[:, None] <= i[None, :], c, 0.0)
            q = load_rows(query, strides.query, i, i_valid, KEY_DIM, BLOCK_K, UNIT, True)
            w = matmul(k, tl.trans(q), None, PRECISION) * c
            do = load_rows(grad_output, strides.grad_output, i, i_valid, VALUE_DIM, BLOCK_V, UNIT, True)
            dv = weigh(w, do, dv, WEIGHT_PRECISION)
            deltas = tl.load(delta + row + i, mask=i_valid, other=0.0)
            ds = (matmul(v, tl.trans(do), None, PRECISION) - deltas[None, :]) * c
            dk = weigh(ds, q, dk, WEIGHT_PRECISION)
    grad_key = head_at(grad_key, strides.grad_key, b, h, UNIT)
    grad_value = head_at(grad_value, strides.grad_value, b, h, UNIT)
    store_rows(grad_key, strides.grad_key, dk, j, j_valid, KEY_DIM, BLOCK_K, UNIT)
    store_rows(grad_value, strides.grad_value, dv, j, j_valid, VALUE_DIM, BLOCK_V, UNIT)


@triton.jit(do_not_specialize=SIZES)
def toeplitz_query_gradient(
    key,
    value,
    grad_output,
    weights,
    normalizer,
    delta,
    grad_query,
    strides,
    num_heads,
    num_tokens,
    entries,
    width,
    CAUSAL: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    program = tl.program_id(0)
    row_begin = (blocks - 1 - program % blocks) * BLOCK_M
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    key = head_at(key, strides.key, b, h, UNIT)
    value = head_at(value, strides.value, b, h, UNIT)
    grad_output = head_at(grad_output, strides.grad_output, b, h, UNIT)
    i = row_begin + tl.arange(0, BLOCK_M)
    i_valid = i < num_tokens
    row = (b * num_heads + h) * num_tokens
    weights += h * entries
    first = position(num_tokens - 1, num_tokens, width) - position(i, num_tokens, width)
    do = load_rows(grad_output, strides.grad_output, i, i_valid, VALUE_DIM, BLOCK_V, UNIT, True)
    deltas = tl.load(delta + row + i, mask=i_valid, other=0.0)
    inverse = inverse_normalizer(normalizer + row, i, i_valid)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if CAUSAL:
        begin, full, end = causal_keys(row_begin, row_begin + BLOCK_M, num_tokens, BLOCK_N)
    else:
        begin, full, end = every_key(row_begin, row_begin + BLOCK_M, num_tokens, BLOCK_N)
    for MASKED in tl.static_range(0, 2):
        for start in range(full if MASKED else begin, end if MASKED else full, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            c = tl.load(weights + (position(j, num_tokens, width)[None, :] + first[:, None])) * inverse[:, None]
            v = load_rows(value, strides.value, j, j < num_tokens, VALUE_DIM, BLOCK_V, UNIT, MASKED)
            ds = (matmul(do, tl.trans(v), None, PRECISION) - deltas[:, None]) * c
            if MASKED and CAUSAL:
                ds = tl.where(j[None, :] <= i[:, None], ds, 0.0)
            k = load_rows(key, strides.key, j, j < num_tokens, KEY_DIM, BLOCK_K, UNIT, MASKED)
            dq = weigh(ds, k, dq, WEIGHT_PRECISION)
    grad_query = head_at(grad_query, strides.grad_query, b, h, UNIT)
    store_rows(grad_query, strides.grad_query, dq, i, i_valid, KEY_DIM, BLOCK_K, UNIT)


@triton.jit(do_not_specialize=["batch", "num_heads", "num_tokens", "height", "width", "tile_h", "tile_w", "splits"])
def toeplitz_bias_gradient(
    query,
    key,
    value,
    grad_output,
    normalizer,
    delta,
    partial,
    strides,
    batch,
    num_heads,
    num_tokens,
    height,
    width,
    tile_h,
    tile_w,
    splits,
    CAUSAL: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (distances, H, splits, 4, BLOCK): sums along the diagonals; of the 4, bit 1 and bit 0 say whether y and x run on."""
    extents = (height, width, 0, tile_h, tile_w)
    owner = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    members = patches.members(owner, batch, num_heads, extents)
    if CAUSAL:
        _, cy, cx, _, _ = patches.offset_of(owner, num_heads, extents)
        members = tl.where((cy < 0) | ((cy == 0) & (cx < 0) & (tile_h == 1)), 0, members)
    share = tl.cdiv(members, splits)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for member in range(split * share, tl.minimum(split * share + share, members)):
        place_b, place_h, i, j, i_valid, j_valid = patches.place(
            owner, member, batch, num_heads, num_tokens, extents, BLOCK
        )
        b = place_b.to(tl.int64)
        h = place_h.to(tl.int64)
        row = (b * num_heads + h) * num_tokens
        q = load_rows(
            head_at(query, strides.query, b, h, UNIT), strides.query, i, i_valid, KEY_DIM, BLOCK_K, UNIT, True
        )
        k = load_rows(head_at(key, strides.key, b, h, UNIT), strides.key, j, j_valid, KEY_DIM, BLOCK_K, UNIT, True)
        score = matmul(q, tl.trans(k), None, PRECISION)
        grad_output_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
        do = load_rows(grad_output_head, strides.grad_output, i, i_valid, VALUE_DIM, BLOCK_V, UNIT, True)
        v = load_rows(
            head_at(value, strides.value, b, h, UNIT), strides.value, j, j_valid, VALUE_DIM, BLOCK_V, UNIT, True
        )
        deltas = tl.load(delta + row + i, mask=i_valid, other=0.0)
        inverse = inverse_normalizer(normalizer + row, i, i_valid)
        d = (matmul(do, tl.trans(v), None, PRECISION) - deltas[:, None]) * inverse[:, None]
        if CAUSAL:
            d = tl.where(j[None, :] <= i[:, None], d, 0.0)
        total += score * d
    local = tl.arange(0, BLOCK)
    y = local[:, None] // tile_w + local[None, :] // tile_w
    x = local[:, None] % tile_w + local[None, :] % tile_w
    wraps = tl.where(y >= tile_h, 2, 0) + tl.where(x >= tile_w, 1, 0)
    inside = local < tile_h * tile_w
    column = tl.where(y >= tile_h, y - tile_h, y) * tile_w + tl.where(x >= tile_w, x - tile_w, x)
    exists = inside[:, None] & inside[None, :]
    diagonals = tl.gather(total, tl.where(exists, column, 0), 1)
    destination = partial + tl.program_id(0).to(tl.int64) * 4 * BLOCK + local
    for kind in tl.static_range(4):
        tl.store(destination + kind * BLOCK, tl.sum(tl.where(exists & (wraps == kind), diagonals, 0.0), 0))


@triton.jit(do_not_specialize=["num_heads", "entries", "height", "width", "tile_h", "tile_w", "splits"])
def reduce_diagonals(
    partial,
    weights,
    grad_bias,
    num_heads,
    entries,
    height,
    width,
    tile_h,
    tile_w,
    splits,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """grad_bias, LANES entries of a head: what bias_gradient left of their diagonals, in order, times c."""
    blocks = tl.cdiv(entries, LANES)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    patches_y = tl.cdiv(height, tile_h)
    patches_x = tl.cdiv(width, tile_w)
    y = entry // (2 * width - 1) - (height - 1) + patches_y * tile_h  # key minus query, made positive
    x = entry % (2 * width - 1) - (width - 1) + patches_x * tile_w
    lane = y % tile_h * tile_w + x % tile_w
    total = tl.zeros((LANES,), tl.float32)
    for kind in tl.static_range(4):
        cy = y // tile_h - patches_y + kind // 2  # key patch minus query patch
        cx = x // tile_w - patches_x + kind % 2
        exists = (entry < entries) & (tl.abs(cy) < patches_y) & (tl.abs(cx) < patches_x)
        rank = tl.where(cy < 0, -2 * cy - 1, 2 * cy)
        owner = (rank * (2 * patches_x - 1) + patches_x - 1 - cx) * num_heads + h
        source = partial + (owner * splits * 4 + kind) * BLOCK + lane
        for split in range(0, splits):
            total += tl.load(source + split * 4 * BLOCK, mask=exists, other=0.0)
    c = tl.load(weights + h * entries + entry, mask=entry < entries, other=0.0)
    tl.store(grad_bias + h * entries + entry, total * c, mask=entry < entries)
