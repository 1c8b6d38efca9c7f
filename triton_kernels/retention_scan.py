"""Retention as one pass over chunks, for the output and, with the roles exchanged, for every gradient.

    O_i = f_i (sum over j <= i of gamma^(i - j) (q_i . k_j) v_j + gamma^(i + 1) q_i S_0),   f_i = scale * row_scale_i

A chunk of n tokens, i and j counted from its first (reversed: the chunks and their tokens in descending order, j >= i):

    P = (Q K^T) * f * gamma^|i - j|      O = P V + read * (Q S)      S = gamma^n S + K^T (update * V)
    forward    read_i = f_i gamma^(i + 1)    update_j = gamma^(n - 1 - j)
    reversed   read_i = gamma^(n - 1 - i)    update_j = f_j gamma^(j + 1)       f belongs to the tokens of the op's query

    output  (q, k, v) forward from S_0            dV  (k, q, dO) reversed from dS_N, which ends as dS_0
    dQ      (dO, v, k) forward from S_0^T         dK  (v, dO, q) reversed from dS_N^T
    both ways  a forward scan, then a reversed one of j > i that adds its rows to the first one's, which are kept in fp32

d log_decay counts by how many powers of gamma a token's value travelled: (i - j) P dP inside a chunk, the exponents of `read`
(in the scan of dQ), those of `update` (as the exponents of `read` in the scan of dV), and whole chunks. For the last the scan
of dQ carries L = dS / d log_decay over whole chunks, L = gamma^n (L + n S), and reads it as it reads S. No exponent is
counted from the first token of the sequence, so that nothing cancels.

One program owns BLOCK_V columns of the state of a (sequence, head). In registers: the state (and L), Dk x BLOCK_V of fp32 in
parts of BLOCK_K rows, over all chunks; P; a chunk's rows of O. Through shared memory: a chunk's rows of Q, K and V, and the state
rounded to bf16 for the product Q S (fp16: TF32, whose range a state does not pass). Nothing is kept per chunk, no sum is
atomic. Per token and head, with T = Dv / BLOCK_V: 2 C (T Dk + Dv) + 4 Dk Dv FLOPs, e (2 T Dk + 2 Dv) bytes, of which all but
2 Dk + 2 Dv elements should come from L2; the scan of dQ does 2 C Dk + 2 Dk Dv more for d log_decay.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .shift_add_rows import head_of, load_tile, tile_pointers
from .tiles import LOG2E, matmul, narrow

NOTHING, READS, EVERYTHING = (tl.constexpr(measure) for measure in range(3))  # of d log_decay

Strides = namedtuple("Strides", "query key value partner addend output entering leaving exit_gradient")


@triton.jit
def load_decay(log_decay, h):
    """log gamma, finite: below -200 every power but the first is 0 in fp32 anyway."""
    return tl.maximum(tl.load(log_decay + h), -200.0)


@triton.jit
def power(decay, n):
    """gamma^n"""
    return tl.exp2(decay * LOG2E * n)


@triton.jit
def split_power(decay, n):
    """(1, gamma^n - 1), or (0, gamma^n) where that is the smaller: near 1 an fp32 power would round alike in every chunk."""
    exact = tl.exp(decay.to(tl.float64) * n)
    whole = tl.where(exact > 0.5, 1.0, 0.0)
    return whole, (exact - whole).to(tl.float32)


@triton.jit
def read_state(q, state, result, PRECISION: tl.constexpr):
    if q.dtype == tl.float16:
        return matmul(q.to(tl.float32), state, result, PRECISION)
    else:
        return matmul(q, narrow(state, q.dtype), result, PRECISION)


@triton.jit
def read_parts(q, states, result, PRECISION: tl.constexpr):
    for n in tl.static_range(len(states)):
        result = read_state(q[n], states[n], result, PRECISION)
    return result


@triton.jit
def load_parts(tensor, strides, b, h, rows, valid, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    parts = ()
    for n in tl.static_range((HEAD_DIM + BLOCK - 1) // BLOCK):
        parts += (load_tile(tensor, strides, b, h, rows, valid, n * BLOCK, HEAD_DIM, BLOCK),)
    return parts


@triton.jit
def state_pointers(state, strides, s, h, rows, columns):
    origin = state + s * strides[0] + h * strides[1]
    return origin + rows.to(tl.int64)[:, None] * strides[2] + columns.to(tl.int64)[None, :] * strides[3]


@triton.jit
def load_state(
    state, strides, s, h, start, columns, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = start + tl.arange(0, BLOCK_K)
    inside = (rows < KEY_DIM)[:, None] & (columns < VALUE_DIM)[None, :]
    return tl.load(state_pointers(state, strides, s, h, rows, columns), mask=inside, other=0.0)


@triton.jit
def bounds_of(bounds, s, num_tokens):
    """(b, first token, tokens) of sequence s, inside the tensors whatever the bounds are."""
    if bounds is None:
        return s, 0, num_tokens
    else:
        first = tl.minimum(tl.maximum(tl.load(bounds + s), 0), num_tokens)
        end = tl.minimum(tl.load(bounds + s + 1), num_tokens)
        return s * 0, first, tl.maximum(end - first, 0)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "chunk"])
def scan(
    query,
    key,
    value,
    log_decay,
    row_scale,
    bounds,
    addend,
    output,
    entering,
    leaving,
    partner,
    exit_gradient,
    partial,
    strides,
    num_heads,
    num_tokens,
    chunk,
    scale,
    REVERSED: tl.constexpr,
    STRICT: tl.constexpr,
    SCALES_COLUMNS: tl.constexpr,
    MEASURE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`partner`: the tensor whose gradient the output is, where d log_decay is measured into `partial`."""
    PARTS: tl.constexpr = (KEY_DIM + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    tile, s, h = head_of(tl.program_id(0), TILES, num_heads)
    column = tile * BLOCK_V
    b, first, length = bounds_of(bounds, s, num_tokens)
    chunks = tl.cdiv(length, chunk)
    decay = load_decay(log_decay, h)
    whole, part = split_power(decay, chunk)
    last_whole, last_part = split_power(decay, length - (chunks - 1) * chunk)

    i = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, BLOCK_V)
    states = ()
    lags = ()
    for n in tl.static_range(PARTS):
        lags += (tl.zeros((BLOCK_K, BLOCK_V), tl.float32),)
        if entering is not None:
            states += (load_state(entering, strides.entering, s, h, n * BLOCK_K, columns, KEY_DIM, VALUE_DIM, BLOCK_K),)
        else:
            states += (tl.zeros((BLOCK_K, BLOCK_V), tl.float32),)
    total = tl.zeros((CHUNK,), tl.float64)

    for step in tl.range(chunks, disable_licm=True):  # an invariant tile would be kept in registers
        start = (chunks - 1 - step if REVERSED else step) * chunk
        count = tl.minimum(length - start, chunk)
        valid = i < count
        rows = first + start + i
        q = load_parts(query, strides.query, b, h, rows, valid, KEY_DIM, BLOCK_K)
        k = load_parts(key, strides.key, b, h, rows, valid, KEY_DIM, BLOCK_K)
        v = load_tile(value, strides.value, b, h, rows, valid, column, VALUE_DIM, BLOCK_V)
        factor = tl.zeros((CHUNK,), tl.float32) + scale
        if row_scale is not None:
            factor *= tl.load(row_scale + (b * num_heads + h) * num_tokens + rows, mask=valid, other=0.0)
        to_end = tl.maximum(count - 1 - i, 0)
        exponent = to_end if REVERSED else i + 1
        read = power(decay, exponent)
        update = power(decay, i + 1 if REVERSED else to_end)
        # of to_end, not of i, which is invariant too
        distance = to_end[:, None] - to_end[None, :] if REVERSED else to_end[None, :] - to_end[:, None]
        weights = tl.where(distance >= (1 if STRICT else 0), power(decay, tl.maximum(distance, 0)), 0.0)
        if SCALES_COLUMNS:
            weights *= factor[None, :]
            update *= factor
        else:
            weights *= factor[:, None]
            read *= factor
        scores = tl.zeros((CHUNK, CHUNK), tl.float32)
        result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        lagged = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        for n in tl.static_range(PARTS):
            scores = matmul(q[n], tl.trans(k[n]), scores, PRECISION)
            if TOGETHER:
                result = read_state(q[n], states[n], result, PRECISION)
                if MEASURE == EVERYTHING:
                    lagged = read_state(q[n], lags[n], lagged, PRECISION)
        scores *= weights
        if MEASURE != NOTHING:
            p = load_tile(partner, strides.partner, b, h, rows, valid, column, VALUE_DIM, BLOCK_V)
        if MEASURE == EVERYTHING:
            inner = matmul(p, tl.trans(v), None, PRECISION) * scores
            total += tl.sum(inner * distance.to(tl.float32), 1).to(tl.float64)
            if not TOGETHER:
                lagged = read_parts(q, lags, lagged, PRECISION)
            total += (tl.sum(lagged * p.to(tl.float32), 1) * read).to(tl.float64)
        scores = narrow(scores, v.dtype)
        if not TOGETHER:
            result = read_parts(q, states, result, PRECISION)
        result *= read[:, None]
        if MEASURE != NOTHING:
            total += (tl.sum(result * p.to(tl.float32), 1) * exponent.to(tl.float32)).to(tl.float64)
        result = matmul(scores, v, result, PRECISION)
        if addend is not None:
            result += load_tile(addend, strides.addend, b, h, rows, valid, column, VALUE_DIM, BLOCK_V)
        tl.store(
            tile_pointers(output, strides.output, b, h, rows, columns),
            narrow(result, output.dtype.element_ty),
            mask=valid[:, None] & (columns < VALUE_DIM)[None, :],
        )
        w = tl.where(count == chunk, whole, last_whole)
        e = tl.where(count == chunk, part, last_part)
        moved = narrow(v.to(tl.float32) * update[:, None], v.dtype)
        before = states
        states = ()
        for n in tl.static_range(PARTS):
            if v.dtype == tl.float32:
                states += (w * before[n] + matmul(tl.trans(k[n]), moved, e * before[n], PRECISION),)
            else:
                states += (matmul(tl.trans(k[n]), moved, w * before[n] + e * before[n], PRECISION),)
        if MEASURE == EVERYTHING:
            lags_before = lags
            lags = ()
            for n in tl.static_range(PARTS):
                lag = lags_before[n] + count.to(tl.float32) * before[n]
                lags += (w * lag + e * lag,)

    if leaving is not None:
        for n in tl.static_range(PARTS):
            rows = n * BLOCK_K + tl.arange(0, BLOCK_K)
            tl.store(
                state_pointers(leaving, strides.leaving, s, h, rows, columns),
                states[n],
                mask=(rows < KEY_DIM)[:, None] & (columns < VALUE_DIM)[None, :],
            )
    if MEASURE != NOTHING:
        moment = tl.sum(total)
        if exit_gradient is not None:
            for n in tl.static_range(PARTS):
                gradient = load_state(
                    exit_gradient, strides.exit_gradient, s, h, n * BLOCK_K, columns, KEY_DIM, VALUE_DIM, BLOCK_K
                )
                moment += tl.sum(tl.sum(gradient * lags[n], 1).to(tl.float64))
        tl.store(partial + (s * TILES + tile) * num_heads + h, moment)
