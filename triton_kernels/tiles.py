"""The Triton tile engine: flash-style attention whose logits a family's policy decides.

    S = Q K^T        Z = logits(S, term)        P = softmax(Z)        O = P V        (B, H, N, D); keys (B, Hkv, M, D), kv head = h // (H / Hkv)
    dP = dO V^T      dZ = P * (dP - delta)      delta_i = dO_i . O_i
    G = score_gradient(dZ, S, term)             dQ = c G K       dK = c G^T Q       dV = P^T dO      c = gradient_scale
    dterm = term_gradient(dZ, S, term)          summed over every tile that reads the same parameters

Z is a logit in base 2 (log2(e) folded in), so a tile element's only transcendental is exp2. Nothing of size N x M exists.

Kernel               one program owns                          registers                            read per step, through shared memory
forward              BLOCK_M queries of a (b, h)               O tile, row maximum, row sum         BLOCK_N keys and values
query_gradient       BLOCK_M queries of a (b, h)               dQ tile, lse, delta                  BLOCK_N keys and values
key_value_gradient   BLOCK_N keys of a (b, kv head)            dK and dV tiles                      BLOCK_M rows of Q and dO, all heads of the group
parameter_gradient   congruent tiles (same parameters)         term tile, dterm tile                one member tile's rows of Q, dO, K, V
row_delta            BLOCK_M rows                              -                                    O, dO

Per (b, h), e = bytes of an element: forward 4NMD FLOPs, (2N + 2M) D e bytes; key_value_gradient 8NMD; query_gradient 6NMD; parameter_gradient 4NMD.
Shared memory: num_stages of the streamed tiles and the owned operand. Every output has one owner, so no atomics: runs are bitwise equal.

Policy contract. A family is a tiles.Policy of @triton.jit functions, given to the kernels as constexpr:
    term(arguments, b, h, i, j, num_queries, num_keys)  the position term, a tile or scalar; fp32 unless logits expects otherwise. i, j are int32 index
                                           tensors that broadcast to the tile, as (rows, 1) x (1, columns) or transposed; either may run past its
                                           length, where any finite value will do. Called before the matmul, so its loads overlap it.
    logits(score, term, scale_log2)        score = q . k unscaled -> base-2 logit
    score_gradient(grad_logits, score, term)   times gradient_scale, the gradient of q . k
    keep(i, j, num_keys)                   which elements of a masked span take part; must drop j >= num_keys
    key_span(row_begin, row_end, num_keys, BLOCK)          -> (begin, full, end): keys [begin, full) need no keep, [full, end) do; begin and full are multiples of BLOCK
    query_span(column_begin, column_end, num_queries, BLOCK) -> (begin, full): queries [begin, full) need keep, [full, num_queries) do not;
                                           None: no query needs keep
A family with parameters adds a tiles.ParameterPolicy. Tiles are congruent when the same tile of parameters serves them all; an owner is such a class:
    members(owner, batch, num_heads, extents)     how many tiles the owner has
    place(owner, member, batch, num_heads, num_tokens, extents, BLOCK)  -> (b, h, i, j, i_valid, j_valid)
    owner_term(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK)    the term all its members share
    term_gradient(grad_logits, score, term)
    finish(arguments, destination, total, owner, split, splits, num_heads, num_tokens, extents, BLOCK)   store sum of dterm over this split of the members
arguments is a NamedTuple of pointers, strides and floats (Triton specialises its integers); extents are six plain integers (not specialised).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from .configurations import configurations, launch  # noqa: F401

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Policy(NamedTuple):
    term: Any
    logits: Any
    score_gradient: Any
    keep: Any
    key_span: Any
    query_span: Any


class ParameterPolicy(NamedTuple):
    members: Any
    place: Any
    owner_term: Any
    term_gradient: Any
    finish: Any


# ---------------------------------------------------------------- parts that policies share


@triton.jit
def every_key(row_begin, row_end, num_keys, BLOCK: tl.constexpr):
    return 0, num_keys // BLOCK * BLOCK, num_keys


@triton.jit
def keep_in_bounds(i, j, num_keys):
    return j < num_keys


@triton.jit
def product_logits(score, term, scale_log2):
    return score * term


@triton.jit
def product_score_gradient(grad_logits, score, term):
    return grad_logits * term


@triton.jit
def product_term_gradient(grad_logits, score, term):
    return grad_logits * score


# ---------------------------------------------------------------- arithmetic, loads and stores


@triton.jit
def matmul(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:  # triton's interpreter multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round fp32 to nearest even in dtype."""
    if INTERPRETED and dtype == tl.bfloat16:  # where triton's interpreter would truncate
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _rows(pointer, rows, valid, stride_row, stride_dim, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim
    if CHECK and HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(pointer, tile, rows, valid, stride_row, stride_dim, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim
    tl.store(pointers, narrow(tile, pointer.dtype.element_ty), mask=valid[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _row_statistics(logsumexp, delta, rows, valid, dtype: tl.constexpr):
    """Base-2 log-sum-exp and delta; +inf where a row is absent or fully masked, so that its P is 0.

    For fp32 also what rounding to base 2 took from lse, else the largest error of the backward pass."""
    lse = tl.load(logsumexp + rows, mask=valid, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    row_deltas = tl.load(delta + rows, mask=valid, other=0.0)
    if dtype == tl.float32:
        exact = lse.to(tl.float64) * LOG2E
        rounded = exact.to(tl.float32)
        return rounded, tl.where(lse == float("inf"), 0.0, exact - rounded).to(tl.float32), row_deltas
    else:
        return lse * LOG2E, lse, row_deltas


@triton.jit
def _weights(logits, lse, lse_rest, dtype: tl.constexpr):
    if dtype == tl.float32:
        return tl.exp2(logits - lse - lse_rest)
    else:
        return tl.exp2(logits - lse)


# ---------------------------------------------------------------- forward


@triton.jit
def _forward_span(accumulator, maximum, total, query_tile, key, value, arguments, b, h, i, begin, end, num_queries, num_keys, scale_log2,
                  key_strides, value_strides, TERM: tl.constexpr, LOGITS: tl.constexpr, KEEP: tl.constexpr, HEAD_DIM: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        term = TERM(arguments, b, h, i[:, None], j[None, :], num_queries, num_keys)
        key_tile = _rows(key, j, j < num_keys, key_strides[2], key_strides[3], HEAD_DIM, BLOCK_D, MASKED)
        logits = LOGITS(matmul(query_tile, tl.trans(key_tile), None, PRECISION), term, scale_log2)
        if MASKED:
            logits = tl.where(KEEP(i[:, None], j[None, :], num_keys), logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits - anchor[:, None])
        decay = tl.exp2(maximum - anchor)
        total = total * decay + tl.sum(weights, 1)
        maximum = new_maximum
        value_tile = _rows(value, j, j < num_keys, value_strides[2], value_strides[3], HEAD_DIM, BLOCK_D, MASKED)
        accumulator = matmul(narrow(weights, value_tile.dtype), value_tile, accumulator * decay[:, None], PRECISION)
    return accumulator, maximum, total


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def forward(query, key, value, output, logsumexp, arguments, query_strides, key_strides, value_strides, output_strides,
            num_heads, group, num_queries, num_keys, scale_log2,
            TERM: tl.constexpr, LOGITS: tl.constexpr, KEEP: tl.constexpr, KEY_SPAN: tl.constexpr,
            HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    row_begin = (blocks - 1 - program % blocks) * BLOCK_M
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    query += b * query_strides[0] + h * query_strides[1]
    key += b * key_strides[0] + h // group * key_strides[1]
    value += b * value_strides[0] + h // group * value_strides[1]
    i = row_begin + tl.arange(0, BLOCK_M)
    query_tile = _rows(query, i, i < num_queries, query_strides[2], query_strides[3], HEAD_DIM, BLOCK_D, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    begin, full, end = KEY_SPAN(row_begin, row_begin + BLOCK_M, num_keys, BLOCK_N)
    accumulator, maximum, total = _forward_span(
        accumulator, maximum, total, query_tile, key, value, arguments, b, h, i, begin, full, num_queries, num_keys, scale_log2,
        key_strides, value_strides, TERM, LOGITS, KEEP, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, False)
    accumulator, maximum, total = _forward_span(
        accumulator, maximum, total, query_tile, key, value, arguments, b, h, i, full, end, num_queries, num_keys, scale_log2,
        key_strides, value_strides, TERM, LOGITS, KEEP, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, True)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    accumulator = accumulator / total[:, None]
    lse = tl.where(empty, float("-inf"), ((maximum.to(tl.float64) + tl.log2(total)) * LN2).to(tl.float32))
    tl.store(logsumexp + (b * num_heads + h) * num_queries + i, lse, mask=i < num_queries)
    output += b * output_strides[0] + h * output_strides[1]
    _store_rows(output, accumulator, i, i < num_queries, output_strides[2], output_strides[3], HEAD_DIM, BLOCK_D)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["num_heads", "num_queries"])
def row_delta(output, grad_output, delta, output_strides, grad_output_strides, num_heads, num_queries,
              HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    i = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    output += b * output_strides[0] + h * output_strides[1]
    grad_output += b * grad_output_strides[0] + h * grad_output_strides[1]
    o = _rows(output, i, i < num_queries, output_strides[2], output_strides[3], HEAD_DIM, BLOCK_D, True).to(tl.float32)
    do = _rows(grad_output, i, i < num_queries, grad_output_strides[2], grad_output_strides[3], HEAD_DIM, BLOCK_D, True).to(tl.float32)
    tl.store(delta + (b * num_heads + h) * num_queries + i, tl.sum(o * do, 1), mask=i < num_queries)


@triton.jit
def _key_value_span(grad_key_tile, grad_value_tile, key_tile, value_tile, query, grad_output, logsumexp, delta, arguments, b, h, j, begin, end,
                    num_queries, num_keys, scale_log2, query_strides, grad_output_strides, TERM: tl.constexpr, LOGITS: tl.constexpr,
                    SCORE_GRADIENT: tl.constexpr, KEEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                    PRECISION: tl.constexpr, MASKED: tl.constexpr):
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        valid = i < num_queries
        term = TERM(arguments, b, h, i[None, :], j[:, None], num_queries, num_keys)
        lse, lse_rest, row_deltas = _row_statistics(logsumexp, delta, i, valid, query.dtype.element_ty)
        query_tile = _rows(query, i, valid, query_strides[2], query_strides[3], HEAD_DIM, BLOCK_D, True)
        score = matmul(key_tile, tl.trans(query_tile), None, PRECISION)
        weights = _weights(LOGITS(score, term, scale_log2), lse[None, :], lse_rest[None, :], query_tile.dtype)
        if MASKED:
            weights = tl.where(KEEP(i[None, :], j[:, None], num_keys), weights, 0.0)
        grad_output_tile = _rows(grad_output, i, valid, grad_output_strides[2], grad_output_strides[3], HEAD_DIM, BLOCK_D, True)
        grad_value_tile = matmul(narrow(weights, query_tile.dtype), grad_output_tile, grad_value_tile, PRECISION)
        grad_weights = matmul(value_tile, tl.trans(grad_output_tile), None, PRECISION)
        grad_score = SCORE_GRADIENT(weights * (grad_weights - row_deltas[None, :]), score, term)
        grad_key_tile = matmul(narrow(grad_score, query_tile.dtype), query_tile, grad_key_tile, PRECISION)
    return grad_key_tile, grad_value_tile


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def key_value_gradient(query, key, value, grad_output, logsumexp, delta, grad_key, grad_value, arguments, query_strides, key_strides, value_strides,
                       grad_output_strides, grad_key_strides, grad_value_strides, num_heads, group, num_queries, num_keys, scale_log2, gradient_scale,
                       TERM: tl.constexpr, LOGITS: tl.constexpr, SCORE_GRADIENT: tl.constexpr, KEEP: tl.constexpr, QUERY_SPAN: tl.constexpr,
                       HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(num_keys, BLOCK_N)
    program = tl.program_id(0)
    num_key_heads = num_heads // group
    column_begin = program % blocks * BLOCK_N
    b = (program // blocks // num_key_heads).to(tl.int64)
    key_head = (program // blocks % num_key_heads).to(tl.int64)
    j = column_begin + tl.arange(0, BLOCK_N)
    key += b * key_strides[0] + key_head * key_strides[1]
    value += b * value_strides[0] + key_head * value_strides[1]
    key_tile = _rows(key, j, j < num_keys, key_strides[2], key_strides[3], HEAD_DIM, BLOCK_D, True)
    value_tile = _rows(value, j, j < num_keys, value_strides[2], value_strides[3], HEAD_DIM, BLOCK_D, True)
    grad_key_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    full = 0
    if QUERY_SPAN is not None:
        begin, full = QUERY_SPAN(column_begin, column_begin + BLOCK_N, num_queries, BLOCK_M)
    for member in range(0, group):
        h = key_head * group + member
        row = (b * num_heads + h) * num_queries
        query_head = query + b * query_strides[0] + h * query_strides[1]
        grad_output_head = grad_output + b * grad_output_strides[0] + h * grad_output_strides[1]
        if QUERY_SPAN is not None:
            grad_key_tile, grad_value_tile = _key_value_span(
                grad_key_tile, grad_value_tile, key_tile, value_tile, query_head, grad_output_head, logsumexp + row, delta + row, arguments, b, h, j,
                begin, tl.minimum(full, num_queries), num_queries, num_keys, scale_log2, query_strides, grad_output_strides, TERM, LOGITS, SCORE_GRADIENT,
                KEEP, HEAD_DIM, BLOCK_M, BLOCK_D, PRECISION, True)
        grad_key_tile, grad_value_tile = _key_value_span(
            grad_key_tile, grad_value_tile, key_tile, value_tile, query_head, grad_output_head, logsumexp + row, delta + row, arguments, b, h, j,
            full, num_queries, num_queries, num_keys, scale_log2, query_strides, grad_output_strides, TERM, LOGITS, SCORE_GRADIENT, KEEP,
            HEAD_DIM, BLOCK_M, BLOCK_D, PRECISION, False)
    grad_key += b * grad_key_strides[0] + key_head * grad_key_strides[1]
    grad_value += b * grad_value_strides[0] + key_head * grad_value_strides[1]
    _store_rows(grad_key, grad_key_tile * gradient_scale, j, j < num_keys, grad_key_strides[2], grad_key_strides[3], HEAD_DIM, BLOCK_D)
    _store_rows(grad_value, grad_value_tile, j, j < num_keys, grad_value_strides[2], grad_value_strides[3], HEAD_DIM, BLOCK_D)


@triton.jit
def _query_span(grad_query_tile, query_tile, grad_output_tile, lse, lse_rest, row_deltas, key, value, arguments, b, h, i, begin, end, num_queries, num_keys, scale_log2,
                key_strides, value_strides, TERM: tl.constexpr, LOGITS: tl.constexpr, SCORE_GRADIENT: tl.constexpr, KEEP: tl.constexpr,
                HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        term = TERM(arguments, b, h, i[:, None], j[None, :], num_queries, num_keys)
        key_tile = _rows(key, j, j < num_keys, key_strides[2], key_strides[3], HEAD_DIM, BLOCK_D, MASKED)
        value_tile = _rows(value, j, j < num_keys, value_strides[2], value_strides[3], HEAD_DIM, BLOCK_D, MASKED)
        score = matmul(query_tile, tl.trans(key_tile), None, PRECISION)
        weights = _weights(LOGITS(score, term, scale_log2), lse[:, None], lse_rest[:, None], query_tile.dtype)
        grad_weights = matmul(grad_output_tile, tl.trans(value_tile), None, PRECISION)
        if MASKED:
            weights = tl.where(KEEP(i[:, None], j[None, :], num_keys), weights, 0.0)
        grad_score = SCORE_GRADIENT(weights * (grad_weights - row_deltas[:, None]), score, term)
        grad_query_tile = matmul(narrow(grad_score, key_tile.dtype), key_tile, grad_query_tile, PRECISION)
    return grad_query_tile


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def query_gradient(query, key, value, grad_output, logsumexp, delta, grad_query, arguments, query_strides, key_strides, value_strides,
                   grad_output_strides, grad_query_strides, num_heads, group, num_queries, num_keys, scale_log2, gradient_scale,
                   TERM: tl.constexpr, LOGITS: tl.constexpr, SCORE_GRADIENT: tl.constexpr, KEEP: tl.constexpr, KEY_SPAN: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    row_begin = (blocks - 1 - program % blocks) * BLOCK_M
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    query += b * query_strides[0] + h * query_strides[1]
    key += b * key_strides[0] + h // group * key_strides[1]
    value += b * value_strides[0] + h // group * value_strides[1]
    grad_output += b * grad_output_strides[0] + h * grad_output_strides[1]
    i = row_begin + tl.arange(0, BLOCK_M)
    valid = i < num_queries
    row = (b * num_heads + h) * num_queries
    lse, lse_rest, row_deltas = _row_statistics(logsumexp + row, delta + row, i, valid, query.dtype.element_ty)
    query_tile = _rows(query, i, valid, query_strides[2], query_strides[3], HEAD_DIM, BLOCK_D, True)
    grad_output_tile = _rows(grad_output, i, valid, grad_output_strides[2], grad_output_strides[3], HEAD_DIM, BLOCK_D, True)
    grad_query_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, full, end = KEY_SPAN(row_begin, row_begin + BLOCK_M, num_keys, BLOCK_N)
    grad_query_tile = _query_span(
        grad_query_tile, query_tile, grad_output_tile, lse, lse_rest, row_deltas, key, value, arguments, b, h, i, begin, full, num_queries, num_keys, scale_log2,
        key_strides, value_strides, TERM, LOGITS, SCORE_GRADIENT, KEEP, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, False)
    grad_query_tile = _query_span(
        grad_query_tile, query_tile, grad_output_tile, lse, lse_rest, row_deltas, key, value, arguments, b, h, i, full, end, num_queries, num_keys, scale_log2,
        key_strides, value_strides, TERM, LOGITS, SCORE_GRADIENT, KEEP, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION, True)
    grad_query += b * grad_query_strides[0] + h * grad_query_strides[1]
    _store_rows(grad_query, grad_query_tile * gradient_scale, i, valid, grad_query_strides[2], grad_query_strides[3], HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batch", "num_heads", "num_tokens", "splits", "extent0", "extent1", "extent2", "extent3", "extent4", "extent5"])
def parameter_gradient(query, key, value, grad_output, logsumexp, delta, destination, arguments, query_strides, key_strides, value_strides,
                       grad_output_strides, batch, num_heads, num_tokens, splits, extent0, extent1, extent2, extent3, extent4, extent5, scale_log2,
                       MEMBERS: tl.constexpr, PLACE: tl.constexpr, OWNER_TERM: tl.constexpr, LOGITS: tl.constexpr, TERM_GRADIENT: tl.constexpr,
                       FINISH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    extents = (extent0, extent1, extent2, extent3, extent4, extent5)
    owner = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    members = MEMBERS(owner, batch, num_heads, extents)
    share = tl.cdiv(members, splits)
    term = OWNER_TERM(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for member in range(split * share, tl.minimum(split * share + share, members)):
        place_b, place_h, i, j, i_valid, j_valid = PLACE(owner, member, batch, num_heads, num_tokens, extents, BLOCK)
        b = place_b.to(tl.int64)
        h = place_h.to(tl.int64)
        row = (b * num_heads + h) * num_tokens
        lse, lse_rest, row_deltas = _row_statistics(logsumexp + row, delta + row, i, i_valid, query.dtype.element_ty)
        query_tile = _rows(query + b * query_strides[0] + h * query_strides[1], i, i_valid, query_strides[2], query_strides[3], HEAD_DIM, BLOCK_D, True)
        key_tile = _rows(key + b * key_strides[0] + h * key_strides[1], j, j_valid, key_strides[2], key_strides[3], HEAD_DIM, BLOCK_D, True)
        score = matmul(query_tile, tl.trans(key_tile), None, PRECISION)
        weights = _weights(LOGITS(score, term, scale_log2), lse[:, None], lse_rest[:, None], query_tile.dtype)
        grad_output_tile = _rows(grad_output + b * grad_output_strides[0] + h * grad_output_strides[1], i, i_valid, grad_output_strides[2],
                                 grad_output_strides[3], HEAD_DIM, BLOCK_D, True)
        value_tile = _rows(value + b * value_strides[0] + h * value_strides[1], j, j_valid, value_strides[2], value_strides[3], HEAD_DIM, BLOCK_D, True)
        grad_weights = matmul(grad_output_tile, tl.trans(value_tile), None, PRECISION)
        grad_term = TERM_GRADIENT(weights * (grad_weights - row_deltas[:, None]), score, term)
        total += tl.where(j_valid[None, :], grad_term, 0.0)
    FINISH(arguments, destination, total, owner, split, splits, num_heads, num_tokens, extents, BLOCK)


# ---------------------------------------------------------------- launchers that every family shares


def run_forward(policy, query, key, value, arguments, scale_log2):
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    output = torch.empty_like(query)
    logsumexp = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return output, logsumexp
    config = table.configuration("forward", query)
    launch(forward, triton.cdiv(queries, config.block_m) * batch * heads, query.device, config,
           query, key, value, output, logsumexp, arguments, query.stride(), key.stride(), value.stride(), output.stride(),
           heads, heads // max(key_heads, 1), queries, keys, scale_log2,
           TERM=policy.term, LOGITS=policy.logits, KEEP=policy.keep, KEY_SPAN=policy.key_span,
           HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=table.block_d(head_dim), PRECISION=table.precision(query))
    return output, logsumexp


def run_row_delta(output, grad_output):
    batch, heads, queries, head_dim = output.shape
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=output.device)
    if output.numel():
        config = table.configuration("row_delta", output)
        launch(row_delta, triton.cdiv(queries, config.block_m) * batch * heads, output.device, config,
               output, grad_output, delta, output.stride(), grad_output.stride(), heads, queries,
               HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_D=table.block_d(head_dim))
    return delta


def run_backward(policy, grad_output, query, key, value, logsumexp, delta, arguments, scale_log2, gradient_scale):
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    group = heads // max(key_heads, 1)
    shared = dict(TERM=policy.term, LOGITS=policy.logits, SCORE_GRADIENT=policy.score_gradient, KEEP=policy.keep,
                  HEAD_DIM=head_dim, BLOCK_D=table.block_d(head_dim), PRECISION=table.precision(query))
    if key.numel():
        config = table.configuration("key_value_gradient", query)
        launch(key_value_gradient, triton.cdiv(keys, config.block_n) * batch * key_heads, query.device, config,
               query, key, value, grad_output, logsumexp, delta, grad_key, grad_value, arguments, query.stride(), key.stride(), value.stride(),
               grad_output.stride(), grad_key.stride(), grad_value.stride(), heads, group, queries, keys, scale_log2, gradient_scale,
               QUERY_SPAN=policy.query_span, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shared)
    if query.numel():
        config = table.configuration("query_gradient", query)
        launch(query_gradient, triton.cdiv(queries, config.block_m) * batch * heads, query.device, config,
               query, key, value, grad_output, logsumexp, delta, grad_query, arguments, query.stride(), key.stride(), value.stride(),
               grad_output.stride(), grad_query.stride(), heads, group, queries, keys, scale_log2, gradient_scale,
               KEY_SPAN=policy.key_span, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shared)
    return grad_query, grad_key, grad_value


def run_parameter_gradient(policy, parameter_policy, owners, splits, destination, grad_output, query, key, value, logsumexp, delta, arguments, extents,
                           scale_log2):
    config = table.configuration("parameter_gradient", query)
    head_dim = query.shape[3]
    launch(parameter_gradient, owners * splits, query.device, config,
           query, key, value, grad_output, logsumexp, delta, destination, arguments, query.stride(), key.stride(), value.stride(), grad_output.stride(),
           query.shape[0], query.shape[1], query.shape[2], splits, *(tuple(extents) + (0,) * (6 - len(extents))), scale_log2,
           MEMBERS=parameter_policy.members, PLACE=parameter_policy.place, OWNER_TERM=parameter_policy.owner_term, LOGITS=policy.logits,
           TERM_GRADIENT=parameter_policy.term_gradient, FINISH=parameter_policy.finish,
           HEAD_DIM=head_dim, BLOCK=config.block_m, BLOCK_D=table.block_d(head_dim), PRECISION=table.precision(query))
