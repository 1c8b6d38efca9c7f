"""Merging by learned soft assignment (LTM, PatchMerger): a softmax over the tokens and the product with them, in one pass.

    W_np = exp(G_np - lse_p)           lse_p = log sum_n exp(G_np)           Y = W^T X
    dX = W dY                          dG_np = W_np (X_n . dY_p - delta_p)   delta_p = Y_p . dY_p

Tokens X are (B, N, C), logits G (B, N, P). A column of nothing but -inf has W = 0, Y = 0 and lse = -inf.

Kernel              one program owns          in registers                      streamed through shared memory   FLOPs
soft_merge_forward  BLOCK_P x BLOCK_C of Y    Y, maxima or sums of a G tile     BLOCK_N tokens, their logits     2 B N P C
output_statistics   BLOCK_P outputs           delta, sums of a G tile           -                                2 B P C
logit_gradient      BLOCK_N x BLOCK_P of dG   X dY^T                            BLOCK_C columns of X and of dY   2 B N P C
token_gradient      BLOCK_N x BLOCK_C of dX   dX                                BLOCK_P rows of dY, the logits   2 B N P C

The forward needs the maximum of a column before it needs its exponentials. It takes them in a loop of its own, and so every
block of C anew, instead of a running maximum: logits are the small operand and come from L1 or L2, and the loop of products is
left with no reduction and no rescaling of Y. Maxima and sums are kept per element of the tile and reduced over the tokens once,
behind the loop. A kernel that made lse first would be one launch more and save no exponential.

W is recomputed in the backward, as exp(G - lse) times a factor: logits are exact, but an lse of 1e4 in float32 is off by 5e-4,
and so would be W. output_statistics sums exp(G - lse) where lse is large enough for that to show; in float32 always.

Bytes, at e per element: forward B (P / BLOCK_P N C + 2 C / BLOCK_C N P + P C) e; logit_gradient
B (P / BLOCK_P N C + N / BLOCK_N P C + 2 N P) e; token_gradient B (N / BLOCK_N P C + C / BLOCK_C N P + N C) e; of an image's
operands all but the first reading hits L2. Every output has one owner and no sum is atomic, so runs are bitwise equal.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from .tiles import LOG2E, matmul, narrow


class Configuration(NamedTuple):
    block_p: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int


C = Configuration
FEW = 16  # outputs, as a PatchMerger has: the smallest tile of the matrix units holds them
NARROW = 64  # channels
LARGE = (64.0, 0.0)  # an lse whose rounding shows in 16 bits, in float32


# ---- parts ----


@triton.jit
def tile(pointer, strides, rows, columns, num_rows, num_columns, other):
    """Elements rows x columns, which broadcast, of the matrix at `pointer`; `other` outside of it."""
    pointers = pointer + rows.to(tl.int64) * strides[1] + columns.to(tl.int64) * strides[2]
    return tl.load(pointers, mask=(rows < num_rows) & (columns < num_columns), other=other)


@triton.jit
def store(pointer, strides, rows, columns, num_rows, num_columns, values):
    pointers = pointer + rows.to(tl.int64) * strides[1] + columns.to(tl.int64) * strides[2]
    tl.store(pointers, narrow(values, pointer.dtype.element_ty), mask=(rows < num_rows) & (columns < num_columns))


@triton.jit
def logit_tile(logits, strides, n, p, num_tokens, num_outputs):
    return tile(logits, strides, n, p, num_tokens, num_outputs, float("-inf")).to(tl.float32)


@triton.jit
def power(difference):
    return tl.exp2(difference * LOG2E)


@triton.jit
def log_normalizer(logsumexp, p, num_outputs):
    """lse, +inf where an output is absent or has no token, so that its W is 0."""
    lse = tl.load(logsumexp + p, mask=p < num_outputs, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


# ---- forward ----


@triton.jit(do_not_specialize=["num_tokens"])
def soft_merge_forward(
    tokens,
    logits,
    output,
    logsumexp,
    strides,
    num_tokens,
    num_outputs,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_p = tl.cdiv(num_outputs, BLOCK_P)
    program = tl.program_id(0)
    block_c = program % blocks_c
    b = (program // blocks_c // blocks_p).to(tl.int64)
    p = program // blocks_c % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens += b * strides[0][0]
    logits += b * strides[1][0]
    output += b * strides[2][0]
    highest = tl.full((BLOCK_P, BLOCK_N), float("-inf"), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        highest = tl.maximum(highest, logit_tile(logits, strides[1], n[None, :], p[:, None], num_tokens, num_outputs))
    maximum = tl.max(highest, 1)
    anchor = tl.where(maximum == float("-inf"), 0.0, maximum)[:, None]
    merged = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        w = power(logit_tile(logits, strides[1], n[None, :], p[:, None], num_tokens, num_outputs) - anchor)
        sums += w
        x = tile(tokens, strides[0], n[:, None], c[None, :], num_tokens, channels, 0.0)
        merged = matmul(narrow(w, x.dtype), x, merged, PRECISION)
    total = tl.sum(sums, 1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store(output, strides[2], p[:, None], c[None, :], num_outputs, channels, merged / total[:, None])
    if block_c == 0:
        lse = tl.where(empty, float("-inf"), maximum + tl.log(total))
        tl.store(logsumexp + b * num_outputs + p, lse, mask=p < num_outputs)


# ---- backward ----


@triton.jit(do_not_specialize=["num_tokens"])
def output_statistics(
    grad_output,
    logits,
    output,
    logsumexp,
    factor,
    delta,
    strides,
    num_tokens,
    num_outputs,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LARGE: tl.constexpr,
):
    """delta, and factor: what W lacks once lse has been rounded, where lse reaches LARGE; elsewhere 1."""
    blocks_p = tl.cdiv(num_outputs, BLOCK_P)
    b = (tl.program_id(0) // blocks_p).to(tl.int64)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = p < num_outputs
    grad_output += b * strides[0][0]
    logits += b * strides[1][0]
    output += b * strides[2][0]
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        g = tile(grad_output, strides[0], p[:, None], c[None, :], num_outputs, channels, 0.0)
        y = tile(output, strides[2], p[:, None], c[None, :], num_outputs, channels, 0.0)
        products += y.to(tl.float32) * g.to(tl.float32)
    tl.store(delta + b * num_outputs + p, tl.sum(products, 1), mask=valid)
    lse = log_normalizer(logsumexp + b * num_outputs, p, num_outputs)
    large = (tl.abs(lse) >= LARGE) & (lse != float("inf"))
    sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, tl.where(tl.max(large.to(tl.int32), 0) == 1, num_tokens, 0), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        sums += power(logit_tile(logits, strides[1], n[None, :], p[:, None], num_tokens, num_outputs) - lse[:, None])
    tl.store(factor + b * num_outputs + p, 1.0 / tl.where(large, tl.sum(sums, 1), 1.0), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def logit_gradient(
    grad_output,
    tokens,
    logits,
    logsumexp,
    factor,
    delta,
    grad_logits,
    strides,
    num_tokens,
    num_outputs,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_p = tl.cdiv(num_outputs, BLOCK_P)
    blocks_n = tl.cdiv(num_tokens, BLOCK_N)
    program = tl.program_id(0)
    b = (program // blocks_p // blocks_n).to(tl.int64)
    n = program // blocks_p % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    grad_output += b * strides[0][0]
    tokens += b * strides[1][0]
    logits += b * strides[2][0]
    grad_logits += b * strides[3][0]
    row = b * num_outputs
    product = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = tile(tokens, strides[1], n[:, None], c[None, :], num_tokens, channels, 0.0)
        g = tile(grad_output, strides[0], p[:, None], c[None, :], num_outputs, channels, 0.0)
        product = matmul(x, tl.trans(g), product, PRECISION)
    valid = p < num_outputs
    lse = log_normalizer(logsumexp + row, p, num_outputs)
    scale = tl.load(factor + row + p, mask=valid, other=0.0)
    deltas = tl.load(delta + row + p, mask=valid, other=0.0)
    w = power(logit_tile(logits, strides[2], n[:, None], p[None, :], num_tokens, num_outputs) - lse[None, :])
    gradient = w * scale[None, :] * (product - deltas[None, :])
    store(grad_logits, strides[3], n[:, None], p[None, :], num_tokens, num_outputs, gradient)


@triton.jit(do_not_specialize=["num_tokens"])
def token_gradient(
    grad_output,
    logits,
    logsumexp,
    factor,
    grad_tokens,
    strides,
    num_tokens,
    num_outputs,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_n = tl.cdiv(num_tokens, BLOCK_N)
    program = tl.program_id(0)
    b = (program // blocks_c // blocks_n).to(tl.int64)
    n = program // blocks_c % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_output += b * strides[0][0]
    logits += b * strides[1][0]
    grad_tokens += b * strides[2][0]
    row = b * num_outputs
    gradient = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, num_outputs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        lse = log_normalizer(logsumexp + row, p, num_outputs)
        scale = tl.load(factor + row + p, mask=p < num_outputs, other=0.0)
        w = power(logit_tile(logits, strides[1], n[:, None], p[None, :], num_tokens, num_outputs) - lse[None, :])
        g = tile(grad_output, strides[0], p[:, None], c[None, :], num_outputs, channels, 0.0)
        gradient = matmul(narrow(w * scale[None, :], g.dtype), g, gradient, PRECISION)
    store(grad_tokens, strides[2], n[:, None], c[None, :], num_tokens, channels, gradient)


# ---- launchers ----


def _configuration(kernel, tokens, logits, *others):
    """Chosen by ahead-of-time compiles, as in configurations.py. `others`: what else of C channels is streamed."""
    family = table.architecture(tokens.device)
    few, wide = logits.shape[2] <= FEW, tokens.shape[2] > NARROW
    loose = not all(_aligned(tensor) for tensor in (tokens, *others))
    if family == "interpreted":
        return C(32, 32, 64, 4, 1)
    if kernel is output_statistics:
        return C(16, 32, 64, 4, 1)
    if tokens.dtype == torch.float32:
        return C(16 if few else 32, 32, 64 if wide and kernel is not logit_gradient else 32, 4, 1)
    if kernel is logit_gradient:
        return C(16 if few else 32, 64, 32, 4, 1) if loose else C(16 if few else 64, 64, 64, 4, 3)
    # Element by element, pointers take the registers.
    summed = 32 if loose or family in ("sm_80", "sm_120") or logits.stride(2) != 1 else 64
    channels, stages = (64, 1) if loose else (128 if wide else 64, 3)
    if kernel is token_gradient:
        return C(16 if few or loose else summed, 64, channels, 4, stages)
    return C(16 if few else 64, summed, channels, 4, stages)


def _aligned(tensor):
    """Whether rows are read in vectors; else element by element, through registers."""
    return tensor.stride(2) == 1 and tensor.stride(1) % 16 == 0 and tensor.shape[2] % 16 == 0


def _launch(kernel, owners, config, tokens, num_outputs, *arguments, **options):
    """`owners`: of which of outputs, tokens and channels a program has one block."""
    batch, num_tokens, channels = tokens.shape
    sizes = {"p": (num_outputs, config.block_p), "n": (num_tokens, config.block_n), "c": (channels, config.block_c)}
    table.launch(
        kernel,
        batch * math.prod(triton.cdiv(*sizes[owner]) for owner in owners),
        tokens.device,
        config,
        *(*arguments, num_tokens, num_outputs, channels),
        BLOCK_P=config.block_p,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        **options,
    )


def _strides(*tensors):
    return tuple(tensor.stride() for tensor in tensors)


def soft_merge_fwd(tokens, logits):
    """(output, logsumexp)"""
    (batch, _, channels), num_outputs = tokens.shape, logits.shape[2]
    output = torch.empty((batch, num_outputs, channels), dtype=tokens.dtype, device=tokens.device)
    logsumexp = torch.empty((batch, num_outputs), dtype=torch.float32, device=tokens.device)
    _launch(
        soft_merge_forward,
        "pc",
        _configuration(soft_merge_forward, tokens, logits),
        tokens,
        num_outputs,
        *(tokens, logits, output, logsumexp, _strides(tokens, logits, output)),
        PRECISION=table.precision(tokens),
    )
    return output, logsumexp


def soft_merge_bwd(grad_output, tokens, logits, output, logsumexp):
    """(grad_tokens, grad_logits)"""
    grad_tokens, grad_logits = torch.empty_like(tokens), torch.empty_like(logits)
    factor, delta = torch.empty_like(logsumexp), torch.empty_like(logsumexp)

    def launch(kernel, owners, *arguments, **options):
        config = _configuration(kernel, tokens, logits, grad_output)
        _launch(kernel, owners, config, tokens, logits.shape[2], grad_output, *arguments, **options)

    launch(
        output_statistics,
        "p",
        *(logits, output, logsumexp, factor, delta, _strides(grad_output, logits, output)),
        LARGE=LARGE[tokens.dtype == torch.float32],
    )
    launch(
        logit_gradient,
        "np",
        *(tokens, logits, logsumexp, factor, delta, grad_logits),
        _strides(grad_output, tokens, logits, grad_logits),
        PRECISION=table.precision(tokens),
    )
    launch(
        token_gradient,
        "nc",
        *(logits, logsumexp, factor, grad_tokens, _strides(grad_output, logits, grad_tokens)),
        PRECISION=table.precision(tokens),
    )
    return grad_tokens, grad_logits
