"""The Triton tile engine: flash-style attention whose logits a family's policy decides.

    S = Q K^T               Z = logits(S, term)      P = softmax(Z)      O = W V        W = weigh(P, term)
    dP = weigh(dW, term)    dW = dO V^T              dZ = P * (dP - delta)              delta_i = dO_i . O_i
    G = score_gradient(dZ, S, term)             dQ = c G K       dK = c G^T Q       dV = W^T dO      c = gradient_scale
    dterm = term_gradient(dZ, S, term)          summed over every tile that reads the same parameters
    dweigh = P * dW                             likewise, where the weights have parameters

Queries are (B, H, N, D), keys and values (B, Hkv, M, D), and head h reads key head h // (H / Hkv). Z is a logit in base 2
(log2(e) folded in), so a tile element's only transcendental is exp2. Nothing of size N x M exists.

Kernel               one program owns              in registers             streamed through shared memory
forward              BLOCK_M queries of a (b, h)   O, row maximum and sum   BLOCK_N keys and values
query_gradient       BLOCK_M queries of a (b, h)   dQ, lse, delta           BLOCK_N keys and values
key_value_gradient   BLOCK_N keys of a (b, kv h)   dK, dV                   BLOCK_M rows of Q, dO, for each head of the group
parameter_gradient   congruent BLOCK x BLOCK tiles term, sum of dterm       one member tile's rows of Q, dO, K, V
row_delta            BLOCK_M rows of a (b, h)      O, dO                    -

FLOPs per (b, h): forward 4 N M D, key_value_gradient 8 N M D, query_gradient 6 N M D, parameter_gradient 4 N M D. Bytes, at
e per element: forward (2 N + 2 M) D e, each gradient kernel (3 N + 3 M) D e. Tile shapes are in configurations.py. Shared
memory holds the owned operand and num_stages of the streamed ones. Every output has one owner and no sum is atomic, so runs
are bitwise equal.

A family is a Policy of @triton.jit functions, handed to the kernels as constexpr:

    term(arguments, b, h, i, j, num_queries, num_keys)
        The position term: a tile or a scalar, in whatever type `logits` expects. i and j are int32 index tensors that broadcast
        to the tile, rows by columns or transposed. Either may run past its length, where any finite value will do. It comes
        before the matmul, so that its loads overlap it.
    logits(score, term, scale_log2)              score = q . k, unscaled -> logit in base 2
    score_gradient(grad_logits, score, term)     times gradient_scale, the gradient of q . k
    keep(i, j, num_keys)                         which elements of a masked span take part; drops j >= num_keys
    key_span(row_begin, row_end, num_keys, BLOCK) -> (begin, full, end)
        Keys [begin, full) all take part, [full, end) need `keep`. begin and full are multiples of BLOCK.
    query_span(column_begin, column_end, num_queries, BLOCK) -> (begin, full), or None in its place if no query needs `keep`
        Queries [begin, full) need `keep`, [full, num_queries) do not. begin and full are multiples of BLOCK.
    weigh(p, term)                               p times what its weight is multiplied with after the softmax

A family with parameters adds a ParameterPolicy. Tiles are congruent when one tile of parameters serves them all; the program
that owns such a class sums dterm over it, or over one split of it:

    members(owner, batch, num_heads, extents)    how many tiles the class has
    place(owner, member, batch, num_heads, num_tokens, extents, BLOCK) -> (b, h, i, j, i_valid, j_valid)
    owner_term(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK)      the term that all members share
    term_gradient(grad_logits, score, term), or None
    weigh_gradient: whether P * dW is summed too; `total` is then (sum of term_gradient, sum of P * dW)
    finish(arguments, destination, total, owner, split, splits, num_heads, num_tokens, extents, BLOCK)     stores the sum

A term of the key alone needs none: key_value_gradient, which owns keys, stores dZ summed over the queries of its (b, kv h) in
`grad_key_term` (B, Hkv, M), if that is not None.

`arguments` is a NamedTuple of pointers, strides and floats, whose integers Triton specialises; `extents` are six integers
that it does not.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .configurations import configurations as configurations

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def unweighed(p, term):
    return p


class Policy(NamedTuple):
    term: Any
    logits: Any
    score_gradient: Any
    keep: Any
    key_span: Any
    query_span: Any
    lean: bool = False  # takes few registers: see configurations.py
    heavy: Any = False  # takes many: True, or "columns" where they are one per column
    weigh: Any = unweighed


class ParameterPolicy(NamedTuple):
    members: Any
    place: Any
    owner_term: Any
    term_gradient: Any
    finish: Any
    weigh_gradient: bool = False


# Strides (batch, head, row, head_dim) of what each kernel reads and writes.
ForwardStrides = namedtuple("ForwardStrides", "query key value output")
DeltaStrides = namedtuple("DeltaStrides", "output grad_output")
KeyValueStrides = namedtuple("KeyValueStrides", "query key value grad_output grad_key grad_value")
QueryStrides = namedtuple("QueryStrides", "query key value grad_output grad_query")
ParameterStrides = namedtuple("ParameterStrides", "query key value grad_output")


# ---- parts that policies share ----


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


# ---- arithmetic, loads and stores ----


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
        x = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _locate(pointer, strides, b, h):
    return pointer + b * strides[0] + h * strides[1]


@triton.jit
def _rows(pointer, strides, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    pointers = pointer + rows.to(tl.int64)[:, None] * strides[2] + dims.to(tl.int64)[None, :] * strides[3]
    if CHECK and HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(pointer, strides, tile, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    pointers = pointer + rows.to(tl.int64)[:, None] * strides[2] + dims.to(tl.int64)[None, :] * strides[3]
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


# ---- forward ----


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def forward(
    query,
    key,
    value,
    output,
    logsumexp,
    arguments,
    strides,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale_log2,
    TERM: tl.constexpr,
    LOGITS: tl.constexpr,
    WEIGH: tl.constexpr,
    KEEP: tl.constexpr,
    KEY_SPAN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    row_begin = (blocks - 1 - program % blocks) * BLOCK_M
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    key = _locate(key, strides.key, b, h // group)
    value = _locate(value, strides.value, b, h // group)
    i = row_begin + tl.arange(0, BLOCK_M)
    i_valid = i < num_queries
    q = _rows(_locate(query, strides.query, b, h), strides.query, i, i_valid, HEAD_DIM, BLOCK_D, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    begin, full, end = KEY_SPAN(row_begin, row_begin + BLOCK_M, num_keys, BLOCK_N)
    for MASKED in tl.static_range(0, 2):
        for start in range(full if MASKED else begin, end if MASKED else full, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            term = TERM(arguments, b, h, i[:, None], j[None, :], num_queries, num_keys)
            k = _rows(key, strides.key, j, j < num_keys, HEAD_DIM, BLOCK_D, MASKED)
            logits = LOGITS(matmul(q, tl.trans(k), None, PRECISION), term, scale_log2)
            if MASKED:
                logits = tl.where(KEEP(i[:, None], j[None, :], num_keys), logits, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(logits, 1))
            anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            p = tl.exp2(logits - anchor[:, None])
            decay = tl.exp2(maximum - anchor)
            total = total * decay + tl.sum(p, 1)
            maximum = new_maximum
            v = _rows(value, strides.value, j, j < num_keys, HEAD_DIM, BLOCK_D, MASKED)
            accumulator = matmul(narrow(WEIGH(p, term), v.dtype), v, accumulator * decay[:, None], PRECISION)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    # in fp64, so that lse is rounded once
    lse = tl.where(empty, float("-inf"), ((maximum.to(tl.float64) + tl.log2(total)) * LN2).to(tl.float32))
    tl.store(logsumexp + (b * num_heads + h) * num_queries + i, lse, mask=i_valid)
    output = _locate(output, strides.output, b, h)
    _store_rows(output, strides.output, accumulator / total[:, None], i, i_valid, HEAD_DIM, BLOCK_D)


# ---- backward ----


@triton.jit(do_not_specialize=["num_heads", "num_queries"])
def row_delta(
    output,
    grad_output,
    delta,
    strides,
    num_heads,
    num_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    i = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_valid = i < num_queries
    o = _rows(_locate(output, strides.output, b, h), strides.output, i, i_valid, HEAD_DIM, BLOCK_D, True)
    grad_output = _locate(grad_output, strides.grad_output, b, h)
    do = _rows(grad_output, strides.grad_output, i, i_valid, HEAD_DIM, BLOCK_D, True)
    row = delta + (b * num_heads + h) * num_queries
    tl.store(row + i, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=i_valid)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def key_value_gradient(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    grad_key_term,
    arguments,
    strides,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale_log2,
    gradient_scale,
    TERM: tl.constexpr,
    LOGITS: tl.constexpr,
    WEIGH: tl.constexpr,
    SCORE_GRADIENT: tl.constexpr,
    KEEP: tl.constexpr,
    QUERY_SPAN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(num_keys, BLOCK_N)
    program = tl.program_id(0)
    num_key_heads = num_heads // group
    column_begin = program % blocks * BLOCK_N
    b = (program // blocks // num_key_heads).to(tl.int64)
    key_head = (program // blocks % num_key_heads).to(tl.int64)
    j = column_begin + tl.arange(0, BLOCK_N)
    j_valid = j < num_keys
    k = _rows(_locate(key, strides.key, b, key_head), strides.key, j, j_valid, HEAD_DIM, BLOCK_D, True)
    v = _rows(_locate(value, strides.value, b, key_head), strides.value, j, j_valid, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    key_total = tl.zeros((BLOCK_N,), tl.float32)
    begin = 0
    full = 0
    if QUERY_SPAN is not None:
        begin, full = QUERY_SPAN(column_begin, column_begin + BLOCK_N, num_queries, BLOCK_M)
    for member in range(0, group):
        h = key_head * group + member
        row = (b * num_heads + h) * num_queries
        query_head = _locate(query, strides.query, b, h)
        grad_output_head = _locate(grad_output, strides.grad_output, b, h)
        for FULL in tl.static_range(1 if QUERY_SPAN is None else 0, 2):
            for start in range(
                full if FULL else begin, num_queries if FULL else tl.minimum(full, num_queries), BLOCK_M
            ):
                i = start + tl.arange(0, BLOCK_M)
                i_valid = i < num_queries
                term = TERM(arguments, b, h, i[None, :], j[:, None], num_queries, num_keys)
                lse, lse_rest, deltas = _row_statistics(logsumexp + row, delta + row, i, i_valid, k.dtype)
                q = _rows(query_head, strides.query, i, i_valid, HEAD_DIM, BLOCK_D, True)
                score = matmul(k, tl.trans(q), None, PRECISION)
                p = _weights(LOGITS(score, term, scale_log2), lse[None, :], lse_rest[None, :], k.dtype)
                if not FULL:
                    p = tl.where(KEEP(i[None, :], j[:, None], num_keys), p, 0.0)
                do = _rows(grad_output_head, strides.grad_output, i, i_valid, HEAD_DIM, BLOCK_D, True)
                dv = matmul(narrow(WEIGH(p, term), q.dtype), do, dv, PRECISION)
                dp = WEIGH(matmul(v, tl.trans(do), None, PRECISION), term)
                grad_logits = p * (dp - deltas[None, :])
                if grad_key_term is not None:
                    key_total += tl.sum(grad_logits, 1)
                ds = SCORE_GRADIENT(grad_logits, score, term)
                dk = matmul(narrow(ds, q.dtype), q, dk, PRECISION)
    grad_key = _locate(grad_key, strides.grad_key, b, key_head)
    grad_value = _locate(grad_value, strides.grad_value, b, key_head)
    _store_rows(grad_key, strides.grad_key, dk * gradient_scale, j, j_valid, HEAD_DIM, BLOCK_D)
    _store_rows(grad_value, strides.grad_value, dv, j, j_valid, HEAD_DIM, BLOCK_D)
    if grad_key_term is not None:
        tl.store(grad_key_term + (b * num_key_heads + key_head) * num_keys + j, key_total, mask=j_valid)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def query_gradient(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    grad_query,
    arguments,
    strides,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale_log2,
    gradient_scale,
    TERM: tl.constexpr,
    LOGITS: tl.constexpr,
    WEIGH: tl.constexpr,
    SCORE_GRADIENT: tl.constexpr,
    KEEP: tl.constexpr,
    KEY_SPAN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    row_begin = (blocks - 1 - program % blocks) * BLOCK_M
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    key = _locate(key, strides.key, b, h // group)
    value = _locate(value, strides.value, b, h // group)
    grad_output = _locate(grad_output, strides.grad_output, b, h)
    i = row_begin + tl.arange(0, BLOCK_M)
    i_valid = i < num_queries
    row = (b * num_heads + h) * num_queries
    q = _rows(_locate(query, strides.query, b, h), strides.query, i, i_valid, HEAD_DIM, BLOCK_D, True)
    do = _rows(grad_output, strides.grad_output, i, i_valid, HEAD_DIM, BLOCK_D, True)
    lse, lse_rest, deltas = _row_statistics(logsumexp + row, delta + row, i, i_valid, q.dtype)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, full, end = KEY_SPAN(row_begin, row_begin + BLOCK_M, num_keys, BLOCK_N)
    for MASKED in tl.static_range(0, 2):
        for start in range(full if MASKED else begin, end if MASKED else full, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            term = TERM(arguments, b, h, i[:, None], j[None, :], num_queries, num_keys)
            k = _rows(key, strides.key, j, j < num_keys, HEAD_DIM, BLOCK_D, MASKED)
            v = _rows(value, strides.value, j, j < num_keys, HEAD_DIM, BLOCK_D, MASKED)
            score = matmul(q, tl.trans(k), None, PRECISION)
            p = _weights(LOGITS(score, term, scale_log2), lse[:, None], lse_rest[:, None], q.dtype)
            dp = WEIGH(matmul(do, tl.trans(v), None, PRECISION), term)
            if MASKED:
                p = tl.where(KEEP(i[:, None], j[None, :], num_keys), p, 0.0)
            ds = SCORE_GRADIENT(p * (dp - deltas[:, None]), score, term)
            dq = matmul(narrow(ds, k.dtype), k, dq, PRECISION)
    grad_query = _locate(grad_query, strides.grad_query, b, h)
    _store_rows(grad_query, strides.grad_query, dq * gradient_scale, i, i_valid, HEAD_DIM, BLOCK_D)


_EXTENTS = [f"extent{n}" for n in range(6)]


@triton.jit(do_not_specialize=["batch", "num_heads", "num_tokens", "splits", *_EXTENTS])
def parameter_gradient(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    destination,
    arguments,
    strides,
    batch,
    num_heads,
    num_tokens,
    splits,
    extent0,
    extent1,
    extent2,
    extent3,
    extent4,
    extent5,
    scale_log2,
    MEMBERS: tl.constexpr,
    PLACE: tl.constexpr,
    OWNER_TERM: tl.constexpr,
    LOGITS: tl.constexpr,
    WEIGH: tl.constexpr,
    TERM_GRADIENT: tl.constexpr,
    WEIGH_GRADIENT: tl.constexpr,
    FINISH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    extents = (extent0, extent1, extent2, extent3, extent4, extent5)
    owner = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    members = MEMBERS(owner, batch, num_heads, extents)
    share = tl.cdiv(members, splits)
    term = OWNER_TERM(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    weigh_total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for member in range(split * share, tl.minimum(split * share + share, members)):
        place_b, place_h, i, j, i_valid, j_valid = PLACE(owner, member, batch, num_heads, num_tokens, extents, BLOCK)
        b = place_b.to(tl.int64)
        h = place_h.to(tl.int64)
        row = (b * num_heads + h) * num_tokens
        q = _rows(_locate(query, strides.query, b, h), strides.query, i, i_valid, HEAD_DIM, BLOCK_D, True)
        k = _rows(_locate(key, strides.key, b, h), strides.key, j, j_valid, HEAD_DIM, BLOCK_D, True)
        lse, lse_rest, deltas = _row_statistics(logsumexp + row, delta + row, i, i_valid, q.dtype)
        score = matmul(q, tl.trans(k), None, PRECISION)
        p = _weights(LOGITS(score, term, scale_log2), lse[:, None], lse_rest[:, None], q.dtype)
        grad_output_head = _locate(grad_output, strides.grad_output, b, h)
        do = _rows(grad_output_head, strides.grad_output, i, i_valid, HEAD_DIM, BLOCK_D, True)
        v = _rows(_locate(value, strides.value, b, h), strides.value, j, j_valid, HEAD_DIM, BLOCK_D, True)
        dw = matmul(do, tl.trans(v), None, PRECISION)
        if WEIGH_GRADIENT:
            weigh_total += tl.where(j_valid[None, :], p * dw, 0.0)
        if TERM_GRADIENT is not None:
            grad_logits = p * (WEIGH(dw, term) - deltas[:, None])
            total += tl.where(j_valid[None, :], TERM_GRADIENT(grad_logits, score, term), 0.0)
    if WEIGH_GRADIENT:  # noqa: SIM108 - decided when it is compiled
        sums = (total, weigh_total)
    else:
        sums = total
    FINISH(arguments, destination, sums, owner, split, splits, num_heads, num_tokens, extents, BLOCK)
