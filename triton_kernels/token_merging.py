"""Carrying a plan of merging tokens out, and back.

    merge      y_t = sum x_i, their mean or their maximum, over the members i of output t
    weighted   S_t = sum s_i    y_t = sum s_i (x_i + residual_i) / S_t, 0 where S_t = 0
    unmerge    y_i = x_{source_i}
    gradients  dx_i = f_i g_t, t = source_i: f_i is 1, 1 / members, s_i / S_t, or 1 / ties for a member equal to the maximum, else 0
               dresidual_i = dx_i    ds_i = ((x_i + residual_i) - y_t) . g_t / S_t + dS_t

x is (B, N, C) at any strides, outputs are contiguous, gradients are laid out like x. Whoever writes a row owns it, and members
come in ascending order, so nothing is atomic. Sums are float32, and a maximum that sees a NaN is one.

Kernel             one program owns                         in registers                     reads                   FLOPs
merge_rows         BLOCK_R outputs x BLOCK_C channels       their sums or maxima             the rows of members     2 N C
sum_sizes          LANES outputs                            their sums                       sizes of members        N
spread_rows        BLOCK_R inputs, a share of the channels  the sums of ds                   the rows of outputs     N C, 5 N C with ds
share_maxima       BLOCK_R outputs x BLOCK_C channels       y, g, how many members tie       the rows of members     3 N C

A tile is BLOCK_R x BLOCK_C elements. UNROLL members of every output are read at a time, since most outputs have one and a long
group would wait for memory once a member. Bytes an example, at e per element: merge (N + T) C e, with a residual N C e more;
gradients (N + T) C e, with ds 2 N C e and T C e more; a maximum's read x once more for the ties. Plus 12 N of plan.
"""

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from .tiles import narrow

MEAN, SUM, MAX = (tl.constexpr(mode) for mode in range(3))  # as in MODES
WEIGHTED = tl.constexpr(3)
UNROLL = tl.constexpr(2)

# Strides (batch, row, channel) of what each kernel reads and writes.
MergeStrides = namedtuple("MergeStrides", "x residual output")
SpreadStrides = namedtuple("SpreadStrides", "grad grad_sizes x residual output grad_x")
MaximumStrides = namedtuple("MaximumStrides", "grad x output grad_x")


class Configuration(NamedTuple):
    block_r: int
    block_c: int
    num_warps: int
    num_stages: int


C = Configuration
LANES = C(128, 0, 4, 1)


# ---- parts ----


@triton.jit
def pointers_of(tensor, strides, b, rows, channels):
    return (
        tensor + b * strides[0] + rows.to(tl.int64)[:, None] * strides[1] + channels.to(tl.int64)[None, :] * strides[2]
    )


@triton.jit
def load_rows(tensor, strides, b, rows, channels, mask):
    return tl.load(pointers_of(tensor, strides, b, rows, channels), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def span(offsets, b, t, num_outputs):
    """(first member, members) of outputs t; none past the last."""
    row = offsets + b * (num_outputs + 1)
    valid = t < num_outputs
    first = tl.load(row + t, mask=valid, other=0)
    return first, tl.load(row + t + 1, mask=valid, other=0) - first


@triton.jit
def program_of(num_rows, num_parts, BLOCK: tl.constexpr):
    """(b, block of rows, part of the channels) of this program; parts of the same rows lie side by side."""
    blocks = tl.cdiv(num_rows, BLOCK)
    program = tl.program_id(0)
    b = (program // num_parts // blocks).to(tl.int64)
    return b, program // num_parts % blocks * BLOCK + tl.arange(0, BLOCK), program % num_parts


# ---- many rows to one ----


@triton.jit(do_not_specialize=["num_tokens", "num_outputs", "num_channels", "num_parts"])
def merge_rows(
    x,
    residual,
    sizes,
    members,
    offsets,
    output,
    merged_sizes,
    strides,
    num_tokens,
    num_outputs,
    num_channels,
    num_parts,
    MODE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, t, part = program_of(num_outputs, num_parts, BLOCK_R)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    first, count = span(offsets, b, t, num_outputs)
    total = tl.full((BLOCK_R, BLOCK_C), float("-inf") if MODE == MAX else 0.0, tl.float32)
    weight = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, tl.max(count, 0), UNROLL):
        for ahead in tl.static_range(0, UNROLL):
            member = start + ahead
            exists = member < count
            i = tl.load(members + b * num_tokens + first + member, mask=exists, other=0)
            mask = exists[:, None] & (c < num_channels)[None, :]
            row = load_rows(x, strides.x, b, i, c, mask)
            if residual is not None:
                row += load_rows(residual, strides.residual, b, i, c, mask)
            if MODE == MAX:
                total = tl.where(mask & ((row > total) | (row != row)), row, total)
            elif sizes is not None:
                size = tl.load(sizes + b * num_tokens + i, mask=exists, other=0.0)
                total += row * size[:, None]
                weight += size
            else:
                total += row
    if MODE == MAX:
        total = tl.where((count > 0)[:, None], total, 0.0)
    elif MODE != SUM:
        if sizes is None:
            weight = count.to(tl.float32)
        total = tl.where((weight != 0.0)[:, None], total / tl.where(weight != 0.0, weight, 1.0)[:, None], 0.0)
    valid = t < num_outputs
    place = pointers_of(output, strides.output, b, t, c)
    tl.store(place, narrow(total, output.dtype.element_ty), mask=valid[:, None] & (c < num_channels)[None, :])
    if MODE == WEIGHTED:  # noqa: SIM102 - decided when it is compiled
        if part == 0:
            tl.store(merged_sizes + b * num_outputs + t, weight, mask=valid)


@triton.jit(do_not_specialize=["num_tokens", "num_outputs"])
def sum_sizes(sizes, members, offsets, merged_sizes, num_tokens, num_outputs, LANES: tl.constexpr):
    """S of every output"""
    b, t, _ = program_of(num_outputs, 1, LANES)
    first, count = span(offsets, b, t, num_outputs)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, tl.max(count, 0), UNROLL):
        for ahead in tl.static_range(0, UNROLL):
            exists = start + ahead < count
            i = tl.load(members + b * num_tokens + first + start + ahead, mask=exists, other=0)
            total += tl.load(sizes + b * num_tokens + i, mask=exists, other=0.0)
    tl.store(merged_sizes + b * num_outputs + t, total, mask=t < num_outputs)


# ---- one row to many ----


@triton.jit(do_not_specialize=["num_tokens", "num_outputs", "num_channels", "num_parts"])
def spread_rows(
    grad,
    grad_merged_sizes,
    x,
    residual,
    output,
    sizes,
    merged_sizes,
    source,
    offsets,
    grad_x,
    grad_sizes,
    strides,
    num_tokens,
    num_outputs,
    num_channels,
    num_parts,
    MODE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x; and grad_sizes, unless it is None, where num_parts is 1."""
    b, i, part = program_of(num_tokens, num_parts, BLOCK_R)
    valid = i < num_tokens
    t = tl.load(source + b * num_tokens + i, mask=valid, other=0)
    factor = tl.full((BLOCK_R,), 1.0, tl.float32)
    inverse = factor
    if sizes is not None:
        total = tl.load(merged_sizes + b * num_outputs + t, mask=valid, other=0.0)
        inverse = tl.where(total != 0.0, 1.0 / tl.where(total != 0.0, total, 1.0), 0.0)
        size = tl.load(sizes + b * num_tokens + i, mask=valid, other=0.0)
        factor = tl.where(total != 0.0, size / tl.where(total != 0.0, total, 1.0), 0.0)
    elif MODE != SUM:
        row = offsets + b * (num_outputs + 1) + t
        count = tl.load(row + 1, mask=valid, other=1) - tl.load(row, mask=valid, other=0)
        factor = 1.0 / count.to(tl.float32)
    products = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(part * BLOCK_C, num_channels, num_parts * BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (c < num_channels)[None, :]
        g = load_rows(grad, strides.grad, b, t, c, mask)
        place = pointers_of(grad_x, strides.grad_x, b, i, c)
        # a member of weight 0 has no part in its output, whatever that output's gradient is
        share = tl.where((factor != 0.0)[:, None], g * factor[:, None], 0.0)
        tl.store(place, narrow(share, grad_x.dtype.element_ty), mask=mask)
        if grad_sizes is not None:
            difference = load_rows(x, strides.x, b, i, c, mask)
            if residual is not None:
                difference += load_rows(residual, strides.residual, b, i, c, mask)
            difference -= load_rows(output, strides.output, b, t, c, mask)
            products += tl.sum(difference * g, 1)
    if grad_sizes is not None:
        slope = tl.where(inverse != 0.0, products * inverse, 0.0)
        if grad_merged_sizes is not None:
            upstream = grad_merged_sizes + b * strides.grad_sizes[0] + t.to(tl.int64) * strides.grad_sizes[1]
            slope += tl.load(upstream, mask=valid, other=0.0)
        tl.store(grad_sizes + b * num_tokens + i, slope, mask=valid)


@triton.jit(do_not_specialize=["num_tokens", "num_outputs", "num_channels", "num_parts"])
def share_maxima(
    grad,
    x,
    output,
    members,
    offsets,
    grad_x,
    strides,
    num_tokens,
    num_outputs,
    num_channels,
    num_parts,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x of a maximum: g / ties for the members that attain it."""
    b, t, part = program_of(num_outputs, num_parts, BLOCK_R)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    first, count = span(offsets, b, t, num_outputs)
    inside = (t < num_outputs)[:, None] & (c < num_channels)[None, :]
    highest = load_rows(output, strides.output, b, t, c, inside)
    g = load_rows(grad, strides.grad, b, t, c, inside)
    ties = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    most = tl.max(count, 0)
    for WRITES in tl.static_range(0, 2):
        for start in range(0, most, UNROLL):
            for ahead in tl.static_range(0, UNROLL):
                exists = start + ahead < count
                i = tl.load(members + b * num_tokens + first + start + ahead, mask=exists, other=0)
                mask = exists[:, None] & (c < num_channels)[None, :]
                row = load_rows(x, strides.x, b, i, c, mask)
                attains = mask & ((row == highest) | ((row != row) & (highest != highest)))
                if WRITES:
                    place = pointers_of(grad_x, strides.grad_x, b, i, c)
                    share = tl.where(attains, g / tl.maximum(ties, 1.0), 0.0)
                    tl.store(place, narrow(share, grad_x.dtype.element_ty), mask=mask)
                else:
                    ties += attains.to(tl.float32)


# ---- launchers ----


def _configuration(x):
    """Chosen by ahead-of-time compiles: with 8 rows, or 4 members at a time, odd channels spill."""
    return C(16, 32, 4, 1) if table.architecture(x.device) == "interpreted" else C(4, 256, 4, 1)


def _parts(channels, config):
    return max(1, triton.cdiv(channels, config.block_c))


def _merge(x, residual, sizes, members, offsets, output, merged_sizes, mode):
    batch, outputs, channels = output.shape
    config = _configuration(x)
    parts = _parts(channels, config)
    table.launch(
        merge_rows,
        batch * triton.cdiv(outputs, config.block_r) * parts,
        x.device,
        config,
        *(x, residual, sizes, members, offsets, output, merged_sizes),
        MergeStrides(x.stride(), (x if residual is None else residual).stride(), output.stride()),
        *(members.shape[1], outputs, channels, parts),
        MODE=mode,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
    )
    return output


def _spread(grad, source, offsets, grad_x, mode, sizes=None, merged_sizes=None, slopes=None):
    """slopes: (grad_merged_sizes, x, residual, output, grad_sizes), where the gradient of sizes is wanted."""
    batch, tokens, channels = grad_x.shape
    *read, grad_sizes = slopes or (None,) * 5
    config = _configuration(grad)
    parts = 1 if slopes else _parts(channels, config)
    table.launch(
        spread_rows,
        batch * triton.cdiv(tokens, config.block_r) * parts,
        grad.device,
        config,
        *(grad, *read, sizes, merged_sizes, source, offsets, grad_x, grad_sizes),
        SpreadStrides(
            grad.stride(), *((grad if tensor is None else tensor).stride() for tensor in read), grad_x.stride()
        ),
        *(tokens, offsets.shape[1] - 1, channels, parts),
        MODE=mode,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
    )
    return grad_x


def _outputs(x, offsets):
    return torch.empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]), dtype=x.dtype, device=x.device)


def token_merge_fwd(x, source, members, offsets, mode):
    return _merge(x, None, None, members, offsets, _outputs(x, offsets), None, mode)


def token_merge_bwd(grad_output, x, source, members, offsets, output, mode):
    """grad_x"""
    grad_x = torch.empty_like(x)
    if mode != MAX.value:
        return _spread(grad_output, source, offsets, grad_x, mode)
    batch, tokens, channels = x.shape
    outputs = offsets.shape[1] - 1
    config = _configuration(x)
    parts = _parts(channels, config)
    table.launch(
        share_maxima,
        batch * triton.cdiv(outputs, config.block_r) * parts,
        x.device,
        config,
        *(grad_output, x, output, members, offsets, grad_x),
        MaximumStrides(grad_output.stride(), x.stride(), output.stride(), grad_x.stride()),
        *(tokens, outputs, channels, parts),
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
    )
    return grad_x


def token_merge_weighted_fwd(x, source, members, offsets, residual, sizes, wants_sizes):
    """(output, merged_sizes)"""
    output = _outputs(x, offsets)
    merged_sizes = torch.empty(output.shape[:2], dtype=torch.float32, device=x.device)
    return _merge(x, residual, sizes, members, offsets, output, merged_sizes, WEIGHTED.value), merged_sizes


def token_merge_weighted_bwd(
    grad_output, grad_merged_sizes, x, source, members, offsets, residual, sizes, output, wants_sizes
):
    """(grad_x, grad_sizes)"""
    arguments = (grad_output, source, offsets, torch.empty_like(x))
    if sizes is None:
        return _spread(*arguments, MEAN.value), torch.empty((0,), dtype=torch.float32, device=x.device)
    batch, outputs, _ = grad_output.shape
    merged_sizes = torch.empty((batch, outputs), dtype=torch.float32, device=x.device)
    table.launch(
        sum_sizes,
        batch * triton.cdiv(outputs, LANES.block_r),
        x.device,
        LANES,
        *(sizes, members, offsets, merged_sizes, members.shape[1], outputs),
        LANES=LANES.block_r,
    )
    arguments += (WEIGHTED.value, sizes, merged_sizes)
    if not wants_sizes:
        return _spread(*arguments), torch.zeros_like(sizes)
    grad_sizes = torch.empty_like(sizes)
    return _spread(*arguments, (grad_merged_sizes, x, residual, output, grad_sizes)), grad_sizes


def token_unmerge_fwd(x, source, members, offsets):
    rows = torch.empty((*source.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    return _spread(x, source, offsets, rows, SUM.value)


def token_unmerge_bwd(grad_output, x, source, members, offsets):
    """grad_x"""
    return _merge(grad_output, None, None, members, offsets, torch.empty_like(x), None, SUM.value)
