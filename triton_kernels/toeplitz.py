"""Linear attention weighted by a Toeplitz matrix, the direct method: every pair of a query and a key, in tiles.

    c = exp(b - max b)    W_ij = (q_i . k_j) c_{j-i}    n_i = sum_j W_ij + eps    O_i = sum_j W_ij v_j / n_i
    delta_i = g_i . o_i    D_ij = (g_i . v_j - delta_i) / n_i                       g the gradient of O
    dv_j = sum_i W_ij g_i / n_i    dk_j = sum_i c D_ij q_i    dq_i = sum_j c D_ij k_j    db_t = c_t sum over the diagonal of (q_i . k_j) D_ij

q and k are features (B, H, N, M), v is (B, H, N, D). Token i of an (h, w) grid stands at p_i = i + (i // w)(w - 1), and the pair's
entry of the flattened (2h - 1)(2w - 1) table is p_j - p_i + p_{N-1}: a vector of positions a tile, one subtraction and one gather an
element (a tile touches a few table rows, so L1 serves it), no transcendental and no running maximum. A sequence is a grid (1, N).

Kernel               one program owns              in registers           streamed through shared memory   FLOPs per (b, h)
forward              BLOCK_M queries of a (b, h)   O, n                   BLOCK_N keys and values          2 N N (M + D)
key_value_gradient   BLOCK_N keys of a (b, h)      dK, dV                 BLOCK_M rows of q and g          4 N N (M + D)
query_gradient       BLOCK_M queries of a (b, h)   dQ                     BLOCK_N keys and values          2 N N (M + D)
bias_gradient        congruent BLOCK x BLOCK tiles sum of (q . k) D       one tile's rows of q, g, k, v    2 N N (M + D)
reduce_diagonals     LANES entries of a head       their sums             -                                -

Causal calls do half of each. Bytes, at e per element: forward (N M + N D) e and (N M + N D) e per BLOCK_M queries, the others alike;
keys and values of a head mostly come from L2. The tiles are the engine's (configurations.py) for the wider of M and D.

db. The grid falls into patches of at most BLOCK tokens, and pairs of patches at the same distance see the same piece of the table
(patches.py). One program owns (head, distance, split): it sums (q . k) D over batch and pairs where the tile lies, so that
its loop reads no table at all, and adds along the diagonals once, at the end: rows of the sum are rotated until a diagonal stands in
a column. It writes 4 BLOCK numbers, since in each axis a diagonal either stays in the key patch or runs on into the next. That
recomputes two products, but partial tables from the tiles of dK or dQ would need the diagonals of every tile, and a table for each.
reduce_diagonals adds at most 4 numbers a split to an entry, in order.

fp16. c may be far below what fp16 holds in every key of a row, and D far above, so W and c D meet their operand in TF32, which has
fp16's precision and fp32's range; elsewhere they are rounded to the operand's type.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import engine, patches, tiles
from .attention import causal_keys, causal_queries
from .cross_shaped_window import unit_of
from .cross_shaped_window_tiles import head_at, row_pointers, store_rows
from .tiles import every_key, matmul, narrow

LANES = 256
SMALL = table.Configuration(LANES, 0, 4, 1)

# Strides (batch, head, row, column) of what query_gradient reads and writes.
QueryStrides = namedtuple("QueryStrides", "key value grad_output grad_query")


# ---- parts ----


@triton.jit
def position(token, num_tokens, width):
    """p of a token; past the end that of the last one, so that every pair has an entry."""
    token = tl.minimum(token, num_tokens - 1)
    return token + token // width * (width - 1)


@triton.jit
def load_rows(pointer, strides, rows, valid, DIM: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
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


# ---- launchers ----


def _configuration(kernel, query, value):
    key_dim, value_dim = query.shape[3], value.shape[3]
    fills = key_dim == table.block_d(key_dim) and value_dim == table.block_d(value_dim)
    if kernel == "forward" and query.dtype == torch.float16 and max(key_dim, value_dim) > 64:
        fills = False  # operands of TF32 take twice the registers
    return table.configuration(kernel, query if key_dim >= value_dim else value, lean=fills)


def _options(query, value, is_causal, *tensors) -> dict:
    key_dim, value_dim = query.shape[3], value.shape[3]
    return {
        "CAUSAL": is_causal,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": table.block_d(key_dim),
        "BLOCK_V": table.block_d(value_dim),
        "UNIT": unit_of(query, value, *tensors),
        "PRECISION": table.precision(query),
    }


def _weight_precision(query):
    """As configurations.precision; fp16 multiplies weights in TF32, which holds them."""
    if query.dtype == torch.float16 and table.architecture(query.device).startswith("sm"):
        return "tf32"
    return table.precision(query)


def _relative_weights(bias):
    """c"""
    weights, highest = torch.empty_like(bias), bias.amax(1, keepdim=True)
    programs = bias.shape[0] * triton.cdiv(bias.shape[1], LANES)
    arguments = (bias, highest, weights, bias.shape[1])
    table.launch(relative_weights, programs, bias.device, SMALL, *arguments, LANES=LANES)
    return weights


def toeplitz_fwd(query, key, value, bias, plan, grid_h, grid_w, is_causal, method, eps, wants_bias_gradient=True):
    """(output, normalizer). `plan` and `method`: the direct one is all there is."""
    batch, heads, tokens, _ = query.shape
    output = torch.empty_like(value)
    normalizer = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, normalizer
    weights = _relative_weights(bias)
    config = _configuration("forward", query, value)
    table.launch(
        toeplitz_forward,
        triton.cdiv(tokens, config.block_m) * batch * heads,
        query.device,
        config,
        *(query, key, value, weights, output, normalizer),
        tiles.ForwardStrides(query.stride(), key.stride(), value.stride(), output.stride()),
        *(heads, tokens, bias.shape[1], grid_w, eps),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WEIGHT_PRECISION=_weight_precision(query),
        **_options(query, value, is_causal, key, output),
    )
    return output, normalizer


def toeplitz_bwd(
    grad_output,
    query,
    key,
    value,
    bias,
    plan,
    output,
    normalizer,
    grid_h,
    grid_w,
    is_causal,
    method,
    eps,
    wants_bias_gradient=True,
):
    """(grad_query, grad_key, grad_value, grad_bias)"""
    batch, heads, tokens, _ = query.shape
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    if value.numel() == 0:
        return grad_query, grad_key, grad_value, torch.zeros_like(bias)
    weights = _relative_weights(bias)
    delta = engine.run_row_delta(output, grad_output)
    saved = (normalizer, delta)
    sizes = (heads, tokens, bias.shape[1], grid_w)
    gradients = grad_query, grad_key, grad_value
    options = _options(query, value, is_causal, key, grad_output, *gradients)
    precisions = {"WEIGHT_PRECISION": _weight_precision(query)}
    read = tuple(tensor.stride() for tensor in (query, key, value, grad_output))
    config = _configuration("key_value_gradient", query, value)
    table.launch(
        toeplitz_key_value_gradient,
        triton.cdiv(tokens, config.block_n) * batch * heads,
        query.device,
        config,
        *(query, key, value, grad_output, weights, *saved, grad_key, grad_value),
        tiles.KeyValueStrides(*read, grad_key.stride(), grad_value.stride()),
        *sizes,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **options,
        **precisions,
    )
    config = _configuration("query_gradient", query, value)
    table.launch(
        toeplitz_query_gradient,
        triton.cdiv(tokens, config.block_m) * batch * heads,
        query.device,
        config,
        *(key, value, grad_output, weights, *saved, grad_query),
        QueryStrides(*read[1:], grad_query.stride()),
        *sizes,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **options,
        **precisions,
    )
    if not wants_bias_gradient:
        return grad_query, grad_key, grad_value, torch.zeros_like(bias)
    inputs = (query, key, value, grad_output, *saved)
    grad_bias = _bias_gradient(inputs, read, weights, grid_h, grid_w, options)
    return grad_query, grad_key, grad_value, grad_bias


def _bias_gradient(inputs, strides, weights, grid_h, grid_w, options):
    query, _, value, *_ = inputs
    batch, heads, tokens, _ = query.shape
    config = _configuration("parameter_gradient", query, value)
    tile = patches.patch_shape(grid_h, grid_w, config.block_m)
    distances, splits = patches.classes(grid_h, grid_w, *tile, batch, heads)
    partial = torch.empty((distances, heads, splits, 4, config.block_m), dtype=torch.float32, device=query.device)
    table.launch(
        toeplitz_bias_gradient,
        distances * heads * splits,
        query.device,
        config,
        *(*inputs, partial, tiles.ParameterStrides(*strides)),
        *(batch, heads, tokens, grid_h, grid_w, *tile, splits),
        BLOCK=config.block_m,
        **options,
    )
    grad_bias = torch.empty_like(weights)
    table.launch(
        reduce_diagonals,
        heads * triton.cdiv(weights.shape[1], LANES),
        query.device,
        SMALL,
        *(partial, weights, grad_bias, heads, weights.shape[1], grid_h, grid_w, *tile, splits),
        BLOCK=config.block_m,
        LANES=LANES,
    )
    return grad_bias
