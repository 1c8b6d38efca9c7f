"""Attention inside the windows of a token grid, with the tiles of the Triton engine.

    S = Q K^T       Z = scale S + bias[h, key - query] + mask       P = softmax(Z)       O = P V + LePE(V)
    or, where the bias weighs,      Z = scale S + mask       O = (P * bias) V + LePE(V)
    LePE(V)[p] = lepe_bias + sum over 3 x 3 taps t of w[t] V[p + t],   p + t in the window of p
    dP = dO V^T     dZ = P * (dP - delta)     delta_i = sum_j P_ij dP_ij = dO_i . (O - LePE)_i
    dQ = scale dZ K       dK = scale dZ^T Q       dV = P^T dO + sum_t w[t] dO[p - t]
    dbias[h, r, c] = sum of dZ over the pairs at that difference       dw[t] = sum_p dO[p] V[p + t]
    where it weighs: dP = bias * dO V^T, dV = (P * bias)^T dO + ..., dbias sums P * dO V^T; delta is as above

A window is a set of indices: kernels find the token of each slot by arithmetic (cross_shaped_window_tiles.py), so nothing is
rolled, padded, partitioned or copied, and one launch serves both halves of the heads. Tokens before the grid are keys and
queries of its one window, with bias 0 (or weight 1).

Kernel                     one program owns                     in registers                   streamed
window_forward             a query block of `share` windows     O, row maximum and sum         keys and values
window_gradient            `share` windows of one tile each     P, dP, one of dV, dQ, dK       q, k, v, dO, one window each
window_key_value_gradient  BLOCK_N keys of a window             dK, dV                         q, dO of windows that reach them
window_query_gradient      BLOCK_M queries of a window          dQ, lse, delta                 keys and values
window_bias_gradient       a tile of `share` windows            bias, sum of dZ                q, dO, k, v
lepe_gradient              `share` blocks of tokens of a head   9 sums of dO V, sum of dO      dO, V and 8 neighbours (L1, L2)

Small windows. A window whose keys fit one tile is one tile: up to 64 slots in 16 bits (49 and 56 are the published ones), up
to 32 where bias or masks take registers. A program then walks `share` windows of one head, over grid and batch, and keeps
what they share, bias and indices, in registers. Two windows in one tile would be twice the products for the same rows.
Without bias and masks (cross-shaped windows) the backward of such windows is one kernel: five products instead of seven, each
tensor read once, no delta and no log-sum-exp. Prefetch (num_stages 2) costs more registers than these short loops repay in
occupancy, so most tiles have none; that is a choice by compiled registers, not by time.

FLOPs per (b, h), N queries that meet K keys each: forward 4 N K D, backward 10 N K D (one tile), else 14 N K D and 4 more for
a bias. Bytes at e per element: forward 4 N D e, backward 7 N D e (one tile); LePE reads 1 and 3 N D e more where its
neighbours hit the cache. Sums of dZ, (splits, heads, N, K) fp32, are made for so many heads and rows of queries at a time that
they take half of the output's bytes, or 4 MiB (or one row's). Nothing is atomic: sums are added in a second, ordered stage.
"""

import itertools
import math
from collections import namedtuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import cross_shaped_window_configurations as tuned
from . import cross_shaped_window_gradients as gradients
from . import engine
from .cross_shaped_window_tiles import (
    Geometry,
    Prefix,
    bias_centre,
    bias_code,
    bias_columns,
    bias_entries,
    convolve,
    head_at,
    load_rows,
    locate,
    own_term,
    shared_term,
    store_rows,
    token_at,
    weigh,
)
from .tiles import LN2, LOG2E, matmul, narrow

ForwardStrides = namedtuple("ForwardStrides", "query key value output")


@triton.jit
def softmax_step(accumulator, maximum, total, logits, entries, v, WEIGHS: tl.constexpr, PRECISION: tl.constexpr):
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    p = tl.exp2(logits - anchor[:, None])
    decay = tl.exp2(maximum - anchor)
    accumulator = matmul(narrow(weigh(p, entries, WEIGHS), v.dtype), v, accumulator * decay[:, None], PRECISION)
    return accumulator, new_maximum, total * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=gradients.COUNTS)
def window_forward(
    query,
    key,
    value,
    output,
    logsumexp,
    bias,
    lepe_weight,
    lepe_bias,
    strides,
    geometry,
    batch,
    num_heads,
    share,
    scale_log2,
    ONE_TILE: tl.constexpr,
    SHIFTED: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ONE_TILE: all keys of a window fit BLOCK_N."""
    h, block, chunk, height, width, rows, columns = locate(tl.program_id(0), batch, num_heads, share, geometry, BLOCK_M)
    key_width = width + 2 * geometry.overlap_w
    keys = (height + 2 * geometry.overlap_h) * key_width
    table_columns = bias_columns(width, geometry)
    centre = bias_centre(bias, h, height, width, geometry)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    ly = i // width
    lx = i % width
    i_code = bias_code(ly, lx, i < height * width, table_columns, geometry)
    j = tl.arange(0, BLOCK_N)
    ky = j // key_width
    kx = j % key_width
    if ONE_TILE:
        j_code = bias_code(ky, kx, j < keys, table_columns, geometry)
        entries = bias_entries(centre, i_code[:, None], j_code[None, :], geometry, WEIGHS)
        shared = shared_term(entries, (j < keys)[None, :], WEIGHS)
    for member in range(chunk * share, tl.minimum(chunk * share + share, batch * rows * columns)):
        b = (member // (rows * columns)).to(tl.int64)
        corner_y = member // columns % rows * height
        corner_x = member % columns * width
        i_token, i_inside, i_region = token_at(corner_y + ly, corner_x + lx, height, width, geometry)
        i_valid = i_inside & (i < height * width)
        q = load_rows(
            head_at(query, strides.query, b, h, UNIT), strides.query, i_token, i_valid, HEAD_DIM, BLOCK_D, UNIT
        )
        k_head = head_at(key, strides.key, b, h, UNIT)
        v_head = head_at(value, strides.value, b, h, UNIT)
        if ONE_TILE:
            j_token, j_inside, j_region = token_at(
                corner_y + ky - geometry.overlap_h, corner_x + kx - geometry.overlap_w, height, width, geometry
            )
            j_valid = j_inside & (j < keys)
            k = load_rows(k_head, strides.key, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
            v = load_rows(v_head, strides.value, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
            term = own_term(shared, i_region[:, None], j_region[None, :], j_inside[None, :], SHIFTED, MASKED)
            logits = matmul(q, tl.trans(k), None, PRECISION) * scale_log2 + term
            maximum = tl.max(logits, 1)
            p = tl.exp2(logits - maximum[:, None])
            total = tl.sum(p, 1)
            accumulator = matmul(narrow(weigh(p, entries, WEIGHS), v.dtype), v, None, PRECISION)
        else:
            accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, keys, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                ky = j // key_width
                kx = j % key_width
                j_token, j_inside, j_region = token_at(
                    corner_y + ky - geometry.overlap_h, corner_x + kx - geometry.overlap_w, height, width, geometry
                )
                j_valid = j_inside & (j < keys)
                j_code = bias_code(ky, kx, j < keys, table_columns, geometry)
                weights = bias_entries(centre, i_code[:, None], j_code[None, :], geometry, WEIGHS)
                term = shared_term(weights, (j < keys)[None, :], WEIGHS)
                term = own_term(term, i_region[:, None], j_region[None, :], j_inside[None, :], SHIFTED, MASKED)
                k = load_rows(k_head, strides.key, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
                v = load_rows(v_head, strides.value, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
                logits = matmul(q, tl.trans(k), None, PRECISION) * scale_log2 + term
                accumulator, maximum, total = softmax_step(
                    accumulator, maximum, total, logits, weights, v, WEIGHS, PRECISION
                )
        # in fp64, so that lse is rounded once
        lse = ((maximum.to(tl.float64) + tl.log2(total)) * LN2).to(tl.float32)
        row = logsumexp + (b * num_heads + h) * geometry.grid_h * geometry.grid_w
        tl.store(row + i_token, lse, mask=i_valid)
        result = accumulator / total[:, None]
        if lepe_bias is not None:
            dims = tl.arange(0, BLOCK_D)
            result += tl.load(lepe_bias + h * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)[None, :]
        if lepe_weight is not None:
            result = convolve(
                *(result, lepe_weight, h, v_head, strides.value, ly, lx, corner_y, corner_x, height, width),
                *(geometry, 1, HEAD_DIM, BLOCK_D, UNIT),
            )
        o_head = head_at(output, strides.output, b, h, UNIT)
        store_rows(o_head, strides.output, result, i_token, i_valid, HEAD_DIM, BLOCK_D, UNIT)


# ---- launchers ----

TARGET_PROGRAMS = 2048  # several waves of the largest chip; fixed, so that sums do not depend on the device
LEPE_CHUNKS = 512
SMALL_SUMS = 1 << 22  # bytes that the sums of dZ may always take
REDUCE = table.Configuration(16, 64, 4, 1)


def _windows(geometry):
    """Slots of a window and windows of the grid, per half of the heads."""
    sizes = (geometry.window_h, geometry.window_w), (geometry.second_h, geometry.second_w)
    return [(h * w, triton.cdiv(geometry.grid_h, h) * triton.cdiv(geometry.grid_w, w)) for h, w in sizes]


def _launches(geometry, batch, heads, share, block):
    """Programs of a kernel that finds its place with `locate`."""
    return sum(
        part * triton.cdiv(slots, block) * triton.cdiv(batch * windows, share)
        for part, (slots, windows) in zip((heads // 2, heads - heads // 2), _windows(geometry))
    )


def _share(geometry, batch, heads, block, target=TARGET_PROGRAMS):
    """How many windows a program walks, so that about `target` programs, or half as many, remain."""
    return max(1, _launches(geometry, batch, heads, 1, block) // target)


def _keys(geometry):
    margin_h, margin_w = 2 * geometry.overlap_h, 2 * geometry.overlap_w
    return max(
        (geometry.window_h + margin_h) * (geometry.window_w + margin_w),
        (geometry.second_h + margin_h) * (geometry.second_w + margin_w),
    )


def unit_of(*tensors):
    """The largest power of two, up to 16 bytes, that divides every stride but that of head_dim."""
    strides = (stride for t in tensors for stride, size in zip(t.stride()[:3], t.shape) if size > 1)
    return math.gcd(16 // tensors[0].element_size(), *strides)


def _geometry(grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h, overlap_w, prefix):
    """With prefix tokens the one window, which is the grid, becomes one row of all tokens."""
    if not prefix:
        return Geometry(
            *(grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h, overlap_w)
        )
    tokens = prefix + grid_h * grid_w
    return Geometry(*(1, tokens) * 3, 0, 0, 0, 0, Prefix(prefix, grid_h, grid_w))


def _options(query, bias, geometry, mask_padding, bias_weighs):
    """mask_padding is only worth a mask where there is padding."""
    padded = geometry.overlap_h + geometry.overlap_w > 0 or any(
        slots * windows > query.shape[2] for slots, windows in _windows(geometry)
    )
    return {
        "SHIFTED": geometry.shift_h + geometry.shift_w > 0,
        "MASKED": mask_padding and padded,
        "WEIGHS": bias_weighs and bias is not None,
        "HEAD_DIM": query.shape[3],
        "BLOCK_D": table.block_d(query.shape[3]),
        "PRECISION": table.precision(query),
    }


def _kind(bias, geometry, options):
    """What the term of a tile holds: see cross_shaped_window_configurations.py."""
    if geometry.overlap_h + geometry.overlap_w > 0 or options["SHIFTED"] or options["MASKED"]:
        return "rich"
    if bias is None:
        return "lean"
    return "weighs" if options["WEIGHS"] else "biased"


def _blocks(config):
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}


def window_fwd(query, key, value, bias, lepe_weight, lepe_bias, *options):
    """(output, logsumexp)"""
    *geometry, mask_padding, bias_weighs, scale = options
    geometry = _geometry(*geometry)
    batch, heads, tokens, _ = query.shape
    output = torch.empty_like(query)
    logsumexp = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return output, logsumexp
    options = _options(query, bias, geometry, mask_padding, bias_weighs)
    slots = max(slots for slots, _ in _windows(geometry))
    unit = unit_of(query, key, value, output)
    config = tuned.fitted("window_forward", query, slots, _keys(geometry), _kind(bias, geometry, options), unit)
    one_tile = _keys(geometry) <= config.block_n
    share = _share(geometry, batch, heads, config.block_m) if one_tile else 1
    strides = ForwardStrides(*(t.stride() for t in (query, key, value, output)))
    table.launch(
        window_forward,
        _launches(geometry, batch, heads, share, config.block_m),
        query.device,
        config,
        *(query, key, value, output, logsumexp, bias, lepe_weight, lepe_bias, strides, geometry),
        *(batch, heads, share, scale * LOG2E.value),
        ONE_TILE=one_tile,
        UNIT=unit,
        **_blocks(config),
        **options,
    )
    return output, logsumexp


def _row_stride(geometry):
    return triton.cdiv(_keys(geometry), 16) * 16


def _query_sides(geometry):
    """Rows and columns of queries that the bias table knows."""
    return geometry.prefix[1:] if geometry.prefix else (geometry.window_h, geometry.window_w)


def _sums(query, geometry, config):
    """How much of the sums of dZ is held at once: (rows of queries, heads, splits of the windows). Their bytes are at most half
    of the output's, SMALL_SUMS, or one row's."""
    batch, heads = query.shape[:2]
    rows, columns = _query_sides(geometry)
    bytes_of_row = 4 * columns * _row_stride(geometry)
    budget = max(query.numel() * query.element_size() // 2, SMALL_SUMS) // bytes_of_row
    band = max(1, min(rows, budget))
    group = max(1, min(heads, budget // band))
    owners = triton.cdiv(band * columns, config.block_m) * triton.cdiv(_keys(geometry), config.block_n)
    windows = _windows(geometry)[0][1]
    splits = max(1, min(budget // (band * group), batch * windows, TARGET_PROGRAMS // (owners * group)))
    return band, group, triton.cdiv(batch * windows, triton.cdiv(batch * windows, splits))


def _bias_backward(inputs, statistics, bias, strides, grad_bias, geometry, scale_log2, config, options):
    query = inputs[0]
    batch, heads = query.shape[:2]
    rows, columns = _query_sides(geometry)
    band, group, splits = _sums(query, geometry, config)
    share = triton.cdiv(batch * _windows(geometry)[0][1], splits)
    stride = _row_stride(geometry)
    partial = torch.empty((splits, group, band * columns, stride), dtype=torch.float32, device=query.device)
    before = geometry.prefix.tokens if geometry.prefix else 0
    for head, row in itertools.product(range(0, heads, group), range(0, rows, band)):
        some_heads, some_rows = min(group, heads - head), min(band, rows - row)
        slots = some_rows * columns
        tiles = triton.cdiv(slots, config.block_m) * triton.cdiv(_keys(geometry), config.block_n)
        table.launch(
            gradients.window_bias_gradient,
            tiles * some_heads * splits,
            query.device,
            config,
            *(*inputs, *statistics, bias, partial, stride, strides, geometry),
            *(batch, heads, share, before + row * columns, slots, head, some_heads, splits, scale_log2),
            **_blocks(config),
            **options,
        )
        table.launch(
            gradients.reduce_bias,
            some_heads * grad_bias.shape[1] * triton.cdiv(grad_bias.shape[2], REDUCE.block_n),
            query.device,
            REDUCE,
            *(partial, stride, grad_bias, geometry, splits, row, some_rows, head, some_heads),
            BLOCK_X=REDUCE.block_m,
            LANES=REDUCE.block_n,
        )


def _one_tile_backward(config, inputs, lepe_weight, grads, geometry, scale):
    """grad_query, grad_key and grad_value of windows that are one tile, without bias and masks."""
    query = inputs[0]
    batch, heads = query.shape[:2]
    share = _share(geometry, batch, heads, config.block_m)
    table.launch(
        gradients.window_gradient,
        _launches(geometry, batch, heads, share, config.block_m),
        query.device,
        config,
        *(*inputs, lepe_weight, *grads[:3]),
        gradients.WindowStrides(*(t.stride() for t in (*inputs, *grads[:3]))),
        *(geometry, batch, heads, share, scale * LOG2E.value, scale),
        HEAD_DIM=query.shape[3],
        BLOCK=config.block_m,
        BLOCK_D=table.block_d(query.shape[3]),
        UNIT=unit_of(*inputs, *grads[:3]),
        PRECISION=table.precision(query),
    )


def _backward(inputs, statistics, bias, lepe_weight, grads, geometry, scale, options):
    """grad_query, grad_key, grad_value and grad_bias of any windows."""
    query = inputs[0]
    batch, heads = query.shape[:2]
    strides = gradients.WindowStrides(*(t.stride() for t in (*inputs, *grads[:3])))
    scales = (scale * LOG2E.value, scale)
    unit = unit_of(*inputs, *grads[:3])
    shape = (max(slots for slots, _ in _windows(geometry)), _keys(geometry), _kind(bias, geometry, options), unit)
    config = tuned.fitted("window_key_value_gradient", query, *shape)
    table.launch(
        gradients.window_key_value_gradient,
        _launches(geometry, batch, heads, 1, config.block_n),
        query.device,
        config,
        *(*inputs, *statistics, bias, lepe_weight, *grads[1:3], strides, geometry, batch, heads, 1, *scales),
        UNIT=unit,
        **_blocks(config),
        **options,
    )
    config = tuned.fitted("window_query_gradient", query, *shape)
    table.launch(
        gradients.window_query_gradient,
        _launches(geometry, batch, heads, 1, config.block_m),
        query.device,
        config,
        *(*inputs, *statistics, bias, grads[0], strides, geometry, batch, heads, 1, *scales),
        UNIT=unit,
        **_blocks(config),
        **options,
    )
    if bias is None:
        return
    config = tuned.fitted("window_bias_gradient", query, *shape)
    options = {**options, "UNIT": unit}
    _bias_backward(inputs, statistics, bias, strides, grads[3], geometry, scales[0], config, options)


def sum_over_chunks(partial, destination):
    count, size = partial.shape[0], destination.numel()
    table.launch(
        gradients.sum_partials,
        triton.cdiv(size, REDUCE.block_n),
        partial.device,
        REDUCE,
        *(partial, destination, count, size),
        BLOCK=REDUCE.block_m,
        LANES=REDUCE.block_n,
    )


def _lepe_backward(grad_output, value, output, lepe_weight, lepe_bias, delta, grads, geometry):
    """grad_lepe_weight and grad_lepe_bias; fills delta, where given, with that of the softmax part."""
    batch, heads, tokens, head_dim = value.shape
    unit = unit_of(output, value, grad_output)
    config = tuned.lepe(value, unit)
    blocks = batch * triton.cdiv(tokens, config.block_m)
    share = triton.cdiv(blocks, max(1, LEPE_CHUNKS // heads))
    chunks = triton.cdiv(blocks, share)
    partial_weight = grads[4].new_empty((chunks, heads, 9, head_dim))
    partial_bias = None if lepe_bias is None else grads[5].new_empty((chunks, heads, head_dim))
    table.launch(
        gradients.lepe_gradient,
        heads * chunks,
        value.device,
        config,
        *(output, value, grad_output, lepe_weight, lepe_bias, delta, partial_weight, partial_bias),
        gradients.LepeStrides(output.stride(), value.stride(), grad_output.stride()),
        *(geometry, batch, heads, share, chunks),
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=table.block_d(head_dim),
        UNIT=unit,
    )
    sum_over_chunks(partial_weight, grads[4])
    if lepe_bias is not None:
        sum_over_chunks(partial_bias, grads[5])


def window_bwd(grad_output, query, key, value, bias, lepe_weight, lepe_bias, output, logsumexp, *options):
    """(grad_query, grad_key, grad_value, grad_bias, grad_lepe_weight, grad_lepe_bias); empty for an absent parameter"""
    *geometry, mask_padding, bias_weighs, scale = options
    geometry = _geometry(*geometry)
    parameters = (bias, lepe_weight, lepe_bias)
    absent = torch.empty((0,), dtype=torch.float32, device=query.device)
    grads = [torch.empty_like(t) for t in (query, key, value)]
    grads += [absent.clone() if t is None else torch.zeros_like(t) for t in parameters]
    if query.numel() == 0:
        return tuple(grads)
    options = _options(query, bias, geometry, mask_padding, bias_weighs)
    config = tuned.one_tile(query, _keys(geometry)) if _kind(bias, geometry, options) == "lean" else None
    delta = None if config else torch.empty_like(logsumexp)
    if lepe_weight is not None:
        _lepe_backward(grad_output, value, output, lepe_weight, lepe_bias, delta, grads, geometry)
    elif not config:
        delta = engine.run_row_delta(output, grad_output)
    inputs = (query, key, value, grad_output)
    if config:
        _one_tile_backward(config, inputs, lepe_weight, grads, geometry, scale)
    else:
        _backward(inputs, (logsumexp, delta), bias, lepe_weight, grads, geometry, scale, options)
    return tuple(grads)
