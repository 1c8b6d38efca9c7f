"""Retention one token after the other: a decoder's step, and the recurrent form of a sequence.

    S = gamma S + k^T v        o = scale * row_scale * q S

One program owns BLOCK_V columns of the state of a (sequence, head), BLOCK_K x BLOCK_V of fp32 in registers; a token's q, k and v
pass through. Everything is fp32. 4 Dk Dv FLOPs a token and head. The state is read and written once: 8 Dk Dv bytes a head,
which is all that a step costs.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .retention_scan import bounds_of, load_decay, split_power, state_pointers
from .shift_add_rows import head_of
from .tiles import narrow

Strides = namedtuple("Strides", "query key value output entering leaving")


@triton.jit
def load_row(tensor, strides, b, h, row, dims, HEAD_DIM: tl.constexpr):
    pointers = tensor + b * strides[0] + h * strides[1] + row.to(tl.int64) * strides[2] + dims.to(tl.int64) * strides[3]
    return tl.load(pointers, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_heads", "num_tokens"])
def recurrent(
    query,
    key,
    value,
    log_decay,
    row_scale,
    bounds,
    output,
    entering,
    leaving,
    strides,
    num_heads,
    num_tokens,
    scale,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """`leaving` may be `entering`."""
    TILES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    tile, s, h = head_of(tl.program_id(0), TILES, num_heads)
    b, first, length = bounds_of(bounds, s, num_tokens)
    whole, part = split_power(load_decay(log_decay, h), 1)
    i = tl.arange(0, BLOCK_K)
    j = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < KEY_DIM)[:, None] & (j < VALUE_DIM)[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if entering is not None:
        state = tl.load(state_pointers(entering, strides.entering, s, h, i, j), mask=inside, other=0.0)
    for token in range(length):
        row = first + token
        q = load_row(query, strides.query, b, h, row, i, KEY_DIM)
        k = load_row(key, strides.key, b, h, row, i, KEY_DIM)
        v = load_row(value, strides.value, b, h, row, j, VALUE_DIM)
        factor = scale
        if row_scale is not None:
            factor *= tl.load(row_scale + (b * num_heads + h) * num_tokens + row)
        state = whole * state + (part * state + k[:, None] * v[None, :])
        o = tl.sum(q[:, None] * state, 0) * factor
        pointers = output + b * strides.output[0] + h * strides.output[1]
        pointers += row.to(tl.int64) * strides.output[2] + j.to(tl.int64) * strides.output[3]
        tl.store(pointers, narrow(o, output.dtype.element_ty), mask=j < VALUE_DIM)
    if leaving is not None:
        tl.store(state_pointers(leaving, strides.leaving, s, h, i, j), state, mask=inside)
