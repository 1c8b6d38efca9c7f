"""Linear layers whose weights are sign * 2^p, multiplied straight from their packed codes.

    Y = (X W^T) scale + bias        W = sign * 2^p, (N, K)        dX = (dY scale) W
    "int8":         t = max|x| / 127 of a row,  q = round(x / t),  Y = (sum q * 64 W) (t / 64) scale + bias,  the sum in int32
    "fixed16.16":   Y = 2^-16 (sum sign * (floor(2^16 x) >> -p) + floor(2^16 bias)),  in wrapping int32

A code holds a sign and a biased exponent, so its value is a matter of placing bits: shifts, ands and a bitcast to X's dtype,
or one shifted 1 for int8. No multiplication, no table, nothing rounded.

Kernel           one program owns      in registers                              streamed through shared memory
linear_forward   BLOCK_N x BLOCK_M     sum, weights as the left operand          X, BLOCK_M x BLOCK_K
linear_backward  BLOCK_M x BLOCK_K     sum, dY                                   weights, BLOCK_N x BLOCK_K
quantise_rows    ROWS rows             maxima, a ROWS x LANES tile, twice        -
fixed_forward    BLOCK_M x BLOCK_N     sum; one column of X and of codes         -

The weights are the left operand, so the product is that of Y^T: a warpgroup multiplies its left operand from registers, where
codes become weights, and its right one from shared memory, where copies of X land untouched. Codes of one byte are neighbours
along K, as are the two 16-bit values of a register.

FLOPs 2 M N K each way. Bytes, at e per element and b of 1/2 (4 bits) or 1 (5 bits) per weight: at least (M K + M N) e + N K b.
Every output has one owner: runs are bitwise equal.
"""

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import shift_add_configurations as tuned
from .tiles import matmul, narrow

INT8, FIXED = 1, 2  # activations; 0 is the input's own dtype
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float below 2^22 added to it is rounded to an integer, ties to even
ROUNDER_BITS = tl.constexpr(0x4B400000)
GROUP = tl.constexpr(8)  # row blocks that walk the column blocks together, so that both operands stay in L2


# ---- codes ----


@triton.jit
def exponent_and_sign(code, BITS: tl.constexpr):
    """(biased exponent, 0 for a weight of 0; sign bit) of codes widened to the type that is wanted."""
    if BITS <= 4:
        return code & 7, (code >> 3) & 1
    else:
        return (code >> 2) & 31, code >> 7


@triton.jit
def expand(code, dtype: tl.constexpr, BITS: tl.constexpr):
    """Codes (uint8, one per element) as weights in dtype; as 64 times the weight in int8."""
    if dtype == tl.int8:
        exponent, sign = exponent_and_sign(code.to(tl.int32), BITS)
        magnitude = (1 << exponent) >> 1
        return ((magnitude ^ -sign) + sign).to(tl.int8)
    else:
        SINGLE: tl.constexpr = dtype == tl.float32
        MANTISSA: tl.constexpr = 23 if SINGLE else (7 if dtype == tl.bfloat16 else 10)
        ONE: tl.constexpr = 7 if BITS <= 4 else 15  # the code's exponent of 2^0
        SHIFT: tl.constexpr = (15 if dtype == tl.float16 else 127) - ONE
        exponent, sign = exponent_and_sign(code.to(tl.uint32 if SINGLE else tl.uint16), BITS)
        bits = (exponent + SHIFT) << MANTISSA
        if SHIFT:
            bits = tl.where(exponent == 0, 0, bits)
        bits |= sign << (31 if SINGLE else 15)
        return bits.to(tl.uint32 if SINGLE else tl.uint16).to(dtype, bitcast=True)


@triton.jit
def load_weights(
    codes,
    n,
    n_valid,
    start,
    row_bytes,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Weights of rows n and the BLOCK columns from `start` on, which is a multiple of BLOCK."""
    PER_BYTE: tl.constexpr = 2 if BITS <= 4 else 1
    column = start // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    valid = n_valid[:, None]
    if CHECK:
        valid = valid & (column < row_bytes)[None, :]
    code = tl.load(codes + n.to(tl.int64)[:, None] * row_bytes + column[None, :], mask=valid, other=0)
    if BITS <= 4:
        code = tl.reshape(tl.join(code & 15, code >> 4), (n.shape[0], BLOCK))
    return expand(code, dtype, BITS)


# ---- products ----


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    if a.dtype == tl.int8:
        return tl.dot(a, b, accumulator, out_dtype=tl.int32)
    else:
        return matmul(a, b, accumulator, PRECISION)


@triton.jit
def block_of(program, rows, columns):
    """Row and column block of a program: GROUP row blocks at a time."""
    group = program // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = program % (GROUP * columns)
    return group * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["M"])
def linear_forward(
    input,
    row_scale,
    codes,
    scale,
    bias,
    output,
    stride_row,
    stride_column,
    M,
    N,
    K,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y; `row_scale` is given if and only if `input` holds int8."""
    row, column = block_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_valid = m < M
    n_valid = n < N
    rows = input + m.to(tl.int64)[None, :] * stride_row
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if row_scale is None else tl.int32)
    full = K // BLOCK_K * BLOCK_K
    for MASKED in tl.static_range(0, 1 + TAIL):
        for start in range(full if MASKED else 0, K if MASKED else full, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            valid = m_valid[None, :]
            if MASKED:
                valid = valid & (k < K)[:, None]
            x = tl.load(rows + k.to(tl.int64)[:, None] * stride_column, mask=valid, other=0)
            w = load_weights(codes, n, n_valid, start, row_bytes, x.dtype, BITS, BLOCK_K, MASKED)
            total = multiply(w, x, total, PRECISION)
    y = total.to(tl.float32)
    if row_scale is not None:
        y *= (tl.load(row_scale + m, mask=m_valid, other=0.0) * 0.015625)[None, :]
    if scale is not None:
        y *= tl.load(scale + n, mask=n_valid, other=0.0)[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=n_valid, other=0.0)[:, None]
    y = tl.trans(narrow(y, output.dtype.element_ty))
    tl.store(output + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=m_valid[:, None] & n_valid[None, :])


@triton.jit(do_not_specialize=["M"])
def linear_backward(
    grad_output,
    codes,
    scale,
    grad_input,
    stride_row,
    stride_column,
    M,
    N,
    K,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, column = block_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K))
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    m_valid = m < M
    rows = grad_output + m.to(tl.int64)[:, None] * stride_row
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_valid = n < N
        g = tl.load(rows + n.to(tl.int64)[None, :] * stride_column, mask=m_valid[:, None] & n_valid[None, :], other=0.0)
        if scale is not None:
            g = narrow(g.to(tl.float32) * tl.load(scale + n, mask=n_valid, other=0.0)[None, :], g.dtype)
        w = load_weights(codes, n, n_valid, column * BLOCK_K, row_bytes, g.dtype, BITS, BLOCK_K, True)
        total = multiply(g, w, total, PRECISION)
    x = narrow(total, grad_input.dtype.element_ty)
    tl.store(grad_input + m.to(tl.int64)[:, None] * K + k[None, :], x, mask=m_valid[:, None] & (k < K)[None, :])


# ---- activations in integers ----


@triton.jit(do_not_specialize=["M"])
def quantise_rows(
    input,
    quantised,
    row_scale,
    stride_row,
    stride_column,
    M,
    K,
    stride_quantised,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_valid = m < M
    rows = input + m.to(tl.int64)[:, None] * stride_row
    largest = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, K, LANES):
        k = start + tl.arange(0, LANES)
        valid = m_valid[:, None] & (k < K)[None, :]
        x = tl.load(rows + k.to(tl.int64)[None, :] * stride_column, mask=valid, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    step = tl.div_rn(tl.max(largest, 1), 127.0)
    step = tl.where(step == 0.0, 1.0, step)
    tl.store(row_scale + m, step, mask=m_valid)
    for start in range(0, K, LANES):
        k = start + tl.arange(0, LANES)
        valid = m_valid[:, None] & (k < K)[None, :]
        x = tl.load(rows + k.to(tl.int64)[None, :] * stride_column, mask=valid, other=0.0)
        steps = tl.div_rn(x.to(tl.float32), tl.broadcast_to(step[:, None], (ROWS, LANES)))
        q = ((steps + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS).to(tl.int8)
        tl.store(quantised + m.to(tl.int64)[:, None] * stride_quantised + k[None, :], q, mask=valid)


@triton.jit
def fixed_point(x):
    """floor(2^16 x) as int32, clamped to what the published code clamps to."""
    return tl.clamp(tl.floor(x.to(tl.float32) * 65536.0), -2147483648.0, 2147418112.0).to(tl.int32)


@triton.jit(do_not_specialize=["M", "N", "K"])
def fixed_forward(
    input,
    codes,
    bias,
    output,
    stride_row,
    stride_column,
    M,
    N,
    K,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 2 if BITS <= 4 else 1
    ONE: tl.constexpr = 7 if BITS <= 4 else 15
    row, column = block_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_valid = m < M
    n_valid = n < N
    lengths = tl.where(m_valid, K, 0)
    x_pointers = input + m.to(tl.int64) * stride_row
    weights = codes + n.to(tl.int64) * row_bytes
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for byte in range(0, row_bytes):
        code = tl.load(weights + byte, mask=n_valid, other=0).to(tl.int32)
        for PART in tl.static_range(0, PER_BYTE):
            x = fixed_point(tl.load(x_pointers, mask=byte * PER_BYTE + PART < lengths, other=0.0))
            x_pointers += stride_column
            exponent, negative = exponent_and_sign(code >> 4 * PART & 15 if BITS <= 4 else code, BITS)
            sign = tl.where(exponent == 0, 0, 1 - 2 * negative)
            total += sign[None, :] * (x[:, None] >> (ONE - exponent)[None, :])
    if bias is not None:
        total += fixed_point(tl.load(bias + n, mask=n_valid, other=0.0))[None, :]
    y = narrow(total.to(tl.float32) * 0.0000152587890625, output.dtype.element_ty)
    tl.store(output + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=m_valid[:, None] & n_valid[None, :])


# ---- launchers ----


def _blocks(config):
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def _quantise(input):
    """(int8 rows, padded so that each is aligned; what one of their steps is worth)"""
    rows, columns = input.shape
    quantised = torch.empty((rows, triton.cdiv(columns, 16) * 16), dtype=torch.int8, device=input.device)
    row_scale = torch.empty((rows,), dtype=torch.float32, device=input.device)
    config = tuned.ROWS
    table.launch(
        quantise_rows,
        triton.cdiv(rows, config.block_m),
        input.device,
        config,
        *(input, quantised, row_scale, *input.stride(), rows, columns, quantised.stride(0)),
        ROWS=config.block_m,
        LANES=config.block_k,
    )
    return quantised, row_scale


def shift_linear_fwd(input, codes, scale, bias, bits, activation):
    (rows, length), columns, row_bytes = input.shape, *codes.shape
    output = torch.empty((rows, columns), dtype=input.dtype, device=input.device)
    if output.numel() == 0:
        return output
    if activation == FIXED:
        config = tuned.FIXED
        table.launch(
            fixed_forward,
            triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),
            input.device,
            config,
            *(input, codes, bias, output, *input.stride(), rows, columns, length, row_bytes),
            BITS=bits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        )
        return output
    operand, row_scale = _quantise(input) if activation == INT8 else (input, None)
    config = tuned.linear("forward", operand, codes, columns)
    table.launch(
        linear_forward,
        triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),
        input.device,
        config,
        *(operand, row_scale, codes, scale, bias, output, *operand.stride(), rows, columns, length, row_bytes),
        fuse=row_scale is None,  # int8 results are compared bit for bit
        BITS=bits,
        TAIL=length % config.block_k != 0,
        PRECISION=table.precision(input),
        **_blocks(config),
    )
    return output


def shift_linear_bwd(grad_output, codes, scale, in_features, bits):
    rows, columns = grad_output.shape
    grad_input = torch.empty((rows, in_features), dtype=grad_output.dtype, device=grad_output.device)
    if grad_input.numel() == 0:
        return grad_input
    config = tuned.linear("backward", grad_output, codes, in_features)
    table.launch(
        linear_backward,
        triton.cdiv(rows, config.block_m) * triton.cdiv(in_features, config.block_k),
        grad_output.device,
        config,
        *(grad_output, codes, scale, grad_input, *grad_output.stride(), rows, columns, in_features, codes.shape[1]),
        BITS=bits,
        PRECISION=table.precision(grad_output),
        **_blocks(config),
    )
    return grad_input
