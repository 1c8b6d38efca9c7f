"""Gaussian-mixture-mask attention and its element-wise learnable form, as policies of the tile engine.

    O = softmax((scale Q K^T) * M) V
    gaussian_mixture   M[h, i, j] = sum_k alpha[k, h] exp(-r2 / (2 (sigma[k, h]^2 + eps))),  r2 = dx^2 + dy^2 on the grid; 1 at prefix tokens
    masked_product     M[h, i, j] = weight[h or 0, i, j]

Gaussian mixtures. M depends on (dy, dx) only, so a small kernel writes one table per head of (2h-1)(2w-1) entries, scale log2(e) folded in, and one
code per token, code(y, x) = y (2w-1) + x: the entry of a pair is table[code_i - code_j + centre]. One subtraction, one minimum and one gather (L1 hits:
a 64-wide tile touches a few table rows) make an element's M; no division, no exp. Prefix tokens carry a code so large that the minimum lands on the
table's last entry, M = 1, and tokens past the end do the same.

Parameters. dM = scale * dZ * S is wanted summed against G_k and G_k r2. Pairs of patches of the grid with the same offset (patches.py) see the same
BLOCK x BLOCK piece of the table. One program owns (head, offset, split), keeps that piece and the sum of dM over batch and pairs in registers (4 D
FLOPs and one multiply-add an element), and contracts with the K Gaussians once, at the end: exact for any K at K exps per program. The partial sums (H, K, 2, programs) are then added in order by one program per (k, h).

masked_product. One program owns a BLOCK x BLOCK tile of the weight and walks the batch (and the heads, if they share it).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import engine, patches, tiles
from .tiles import LN2, LOG2E

PREFIX_CODE = tl.constexpr(1 << 29)
LANES = tl.constexpr(256)
SMALL = table.Configuration(LANES.value, 0, 4, 1)


class Mixture(NamedTuple):
    """One table of `table_stride` floats per head: entries 0..last-1 by offset, entry `last` (always odd, so never a new specialisation) for prefix tokens."""

    table: Any
    codes: Any
    table_stride: Any
    last: Any
    alpha: Any
    sigma: Any
    eps: Any


# ---- tables ----


@triton.jit
def decay(sigma, eps):
    """c with exp(-r2 / (2 (sigma^2 + eps))) = exp2(c r2), rounded once."""
    s = sigma.to(tl.float64)
    return (-0.5 / (s * s + eps) * LOG2E).to(tl.float32)


@triton.jit(do_not_specialize=["grid_h", "grid_w", "num_prefix", "num_tokens", "num_heads", "num_gaussians"])
def build_table(
    arguments, grid_h, grid_w, num_prefix, num_tokens, num_heads, num_gaussians, scale_log2, LANES: tl.constexpr
):
    """One program: LANES entries of one head's table; head 0 also writes the token codes."""
    blocks = tl.cdiv(tl.maximum(arguments.table_stride, num_tokens), LANES)
    h = tl.program_id(0) // blocks
    entry = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    width = 2 * grid_w - 1
    dy = (entry // width - (grid_h - 1)).to(tl.float32)
    dx = (entry % width - (grid_w - 1)).to(tl.float32)
    r2 = dy * dy + dx * dx
    mixture = tl.zeros((LANES,), tl.float32)
    for k in range(num_gaussians):
        alpha = tl.load(arguments.alpha + k * num_heads + h)
        sigma = tl.load(arguments.sigma + k * num_heads + h)
        mixture += alpha * tl.exp2(r2 * decay(sigma, arguments.eps))
    table = arguments.table + h.to(tl.int64) * arguments.table_stride
    tl.store(table + entry, tl.where(entry == arguments.last, 1.0, mixture) * scale_log2, mask=entry <= arguments.last)
    cell = entry - num_prefix
    code = tl.where(cell < 0, PREFIX_CODE, cell // grid_w * width + cell % grid_w)
    tl.store(arguments.codes + entry, code, mask=entry < tl.where(h == 0, num_tokens, 0))


# ---- policies ----


@triton.jit
def mixture_term(arguments, b, h, i, j, num_queries, num_keys):
    row = tl.load(arguments.codes + i, mask=i < num_queries, other=PREFIX_CODE)
    column = tl.load(arguments.codes + j, mask=j < num_keys, other=PREFIX_CODE)
    column = tl.where(column == PREFIX_CODE, -PREFIX_CODE, column)
    entry = tl.minimum(row - column + arguments.last // 2, arguments.last)
    return tl.load(arguments.table + h * arguments.table_stride + entry)


@triton.jit
def mixture_owner_term(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK: tl.constexpr):
    h, dy, dx = patches.differences(owner, num_heads, extents, BLOCK)
    entry = dy * (2 * extents[1] - 1) + dx + arguments.last // 2
    exists = (tl.abs(dy) < extents[0]) & (tl.abs(dx) < extents[1])
    return tl.load(arguments.table + h.to(tl.int64) * arguments.table_stride + entry, mask=exists, other=0.0)


@triton.jit
def mixture_finish(
    arguments, destination, total, owner, split, splits, num_heads, num_tokens, extents, BLOCK: tl.constexpr
):
    h, dy, dx = patches.differences(owner, num_heads, extents, BLOCK)
    r2 = (dy * dy + dx * dx).to(tl.float32)
    slots = tl.num_programs(0) // num_heads
    slot = owner // num_heads * splits + split
    for k in range(extents[5]):
        sigma = tl.load(arguments.sigma + k * num_heads + h)
        weighted = total * tl.exp2(r2 * decay(sigma, arguments.eps))
        row = destination + ((h * extents[5] + k) * 2).to(tl.int64) * slots
        tl.store(row + slot, tl.sum(weighted))
        tl.store(row + slots + slot, tl.sum(weighted * r2))


@triton.jit(do_not_specialize=["slots", "num_heads", "num_gaussians"])
def reduce_mixture(
    partial, arguments, grad_alpha, grad_sigma, slots, num_heads, num_gaussians, scale, LANES: tl.constexpr
):
    """Second stage, one program per (h, k): the partial sums in order, then the factors of dalpha and dsigma."""
    program = tl.program_id(0)
    parameter = program % num_gaussians * num_heads + program // num_gaussians
    row = partial + program.to(tl.int64) * 2 * slots
    first = tl.zeros((LANES,), tl.float32)
    second = tl.zeros((LANES,), tl.float32)
    for start in range(0, slots, LANES):
        slot = start + tl.arange(0, LANES)
        first += tl.load(row + slot, mask=slot < slots, other=0.0)
        second += tl.load(row + slots + slot, mask=slot < slots, other=0.0)
    alpha = tl.load(arguments.alpha + parameter)
    sigma = tl.load(arguments.sigma + parameter)
    variance = sigma * sigma + arguments.eps
    tl.store(grad_alpha + parameter, tl.sum(first) * scale)
    tl.store(grad_sigma + parameter, tl.sum(second) * (scale * alpha * (sigma / variance / variance)))


MIXTURE = tiles.Policy(
    mixture_term,
    tiles.product_logits,
    tiles.product_score_gradient,
    tiles.keep_in_bounds,
    tiles.every_key,
    None,
    lean=True,
)
MIXTURE_PARAMETERS = tiles.ParameterPolicy(
    patches.members, patches.place, mixture_owner_term, tiles.product_term_gradient, mixture_finish
)


class Weight(NamedTuple):
    weight: Any
    stride_head: Any
    stride_row: Any
    stride_column: Any
    grad_stride_head: Any
    grad_stride_row: Any
    grad_stride_column: Any
    scale_log2: Any
    scale: Any


@triton.jit
def weight_term(arguments, b, h, i, j, num_queries, num_keys):
    pointers = (
        arguments.weight
        + h * arguments.stride_head
        + i.to(tl.int64) * arguments.stride_row
        + j.to(tl.int64) * arguments.stride_column
    )
    return tl.load(pointers, mask=(i < num_queries) & (j < num_keys), other=0.0).to(tl.float32) * arguments.scale_log2


@triton.jit
def weight_members(owner, batch, num_heads, extents):
    return batch * (num_heads // extents[0])


@triton.jit
def weight_rows(owner, num_tokens, extents, BLOCK: tl.constexpr):
    blocks = tl.cdiv(num_tokens, BLOCK)
    local = tl.arange(0, BLOCK)
    return owner // blocks // blocks, owner // blocks % blocks * BLOCK + local, owner % blocks * BLOCK + local


@triton.jit
def weight_place(owner, member, batch, num_heads, num_tokens, extents, BLOCK: tl.constexpr):
    weight_head, i, j = weight_rows(owner, num_tokens, extents, BLOCK)
    return member % batch, weight_head + member // batch, i, j, i < num_tokens, j < num_tokens


@triton.jit
def weight_owner_term(arguments, owner, num_heads, num_tokens, scale_log2, extents, BLOCK: tl.constexpr):
    weight_head, i, j = weight_rows(owner, num_tokens, extents, BLOCK)
    return weight_term(arguments, 0, weight_head.to(tl.int64), i[:, None], j[None, :], num_tokens, num_tokens)


@triton.jit
def weight_finish(
    arguments, destination, total, owner, split, splits, num_heads, num_tokens, extents, BLOCK: tl.constexpr
):
    weight_head, i, j = weight_rows(owner, num_tokens, extents, BLOCK)
    pointers = (
        destination
        + weight_head.to(tl.int64) * arguments.grad_stride_head
        + i.to(tl.int64)[:, None] * arguments.grad_stride_row
        + j.to(tl.int64)[None, :] * arguments.grad_stride_column
    )
    tl.store(
        pointers,
        tiles.narrow(total * arguments.scale, destination.dtype.element_ty),
        mask=(i < num_tokens)[:, None] & (j < num_tokens)[None, :],
    )


WEIGHT = tiles.Policy(
    weight_term, tiles.product_logits, tiles.product_score_gradient, tiles.keep_in_bounds, tiles.every_key, None
)
WEIGHT_PARAMETERS = tiles.ParameterPolicy(
    weight_members, weight_place, weight_owner_term, tiles.product_term_gradient, weight_finish
)


# ---- launchers ----


def _mixture(alpha, sigma, grid_h, grid_w, num_prefix, eps, scale_log2):
    heads = alpha.shape[1]
    tokens = num_prefix + grid_h * grid_w
    grid_h, grid_w = max(grid_h, 1), max(grid_w, 1)
    last = (2 * grid_h - 1) * (2 * grid_w - 1)
    stride = triton.cdiv(last + 1, 16) * 16
    entries = torch.empty((heads, stride), dtype=torch.float32, device=alpha.device)
    codes = torch.empty((tokens,), dtype=torch.int32, device=alpha.device)
    arguments = Mixture(entries, codes, stride, last, alpha, sigma, eps)
    table.launch(
        build_table,
        triton.cdiv(max(stride, tokens), LANES.value) * heads,
        alpha.device,
        SMALL,
        *(arguments, grid_h, grid_w, num_prefix, tokens, heads, alpha.shape[0], scale_log2),
        LANES=LANES.value,
    )
    return arguments


def _mixture_parameter_gradients(inputs, arguments, grid_h, grid_w, num_prefix, scale):
    query = inputs[0]
    grad_alpha, grad_sigma = torch.empty_like(arguments.alpha), torch.empty_like(arguments.sigma)
    gaussians, heads = arguments.alpha.shape
    empty = query.shape[0] * grid_h * grid_w == 0
    grid_h, grid_w = max(grid_h, 1), max(grid_w, 1)
    config = table.configuration("parameter_gradient", query, MIXTURE.lean)
    tile_h, tile_w = patches.patch_shape(grid_h, grid_w, config.block_m)
    offsets, splits = patches.classes(grid_h, grid_w, tile_h, tile_w, query.shape[0], heads)
    splits = 0 if empty else splits
    slots = offsets * splits
    partial = torch.empty((heads, gaussians, 2, slots), dtype=torch.float32, device=query.device)
    extents = (grid_h, grid_w, num_prefix, tile_h, tile_w, gaussians)
    owners, scale_log2 = offsets * heads, scale * LOG2E.value
    engine.run_parameter_gradient(
        MIXTURE, MIXTURE_PARAMETERS, owners, splits, partial, inputs, arguments, extents, scale_log2
    )
    table.launch(
        reduce_mixture,
        heads * gaussians,
        query.device,
        SMALL,
        *(partial, arguments, grad_alpha, grad_sigma, slots, heads, gaussians, scale),
        LANES=LANES.value,
    )
    return grad_alpha, grad_sigma


def gaussian_mixture_fwd(query, key, value, alpha, sigma, grid_h, grid_w, num_prefix_tokens, eps, scale):
    scale_log2 = scale * LOG2E.value
    arguments = _mixture(alpha, sigma, grid_h, grid_w, num_prefix_tokens, eps, scale_log2)
    return engine.run_forward(MIXTURE, query, key, value, arguments, scale_log2)


def gaussian_mixture_bwd(
    grad_output, query, key, value, alpha, sigma, output, logsumexp, grid_h, grid_w, num_prefix_tokens, eps, scale
):
    scale_log2 = scale * LOG2E.value
    arguments = _mixture(alpha, sigma, grid_h, grid_w, num_prefix_tokens, eps, scale_log2)
    inputs = (query, key, value, grad_output, logsumexp, engine.run_row_delta(output, grad_output))
    gradients = engine.run_backward(MIXTURE, inputs, arguments, scale_log2, LN2.value)
    return *gradients, *_mixture_parameter_gradients(inputs, arguments, grid_h, grid_w, num_prefix_tokens, scale)


def _weight(weight, grad_weight, scale):
    head, grad_head = (t.stride(0) if t.shape[0] > 1 else 0 for t in (weight, grad_weight))
    strides = (head, *weight.stride()[1:], grad_head, *grad_weight.stride()[1:])
    return Weight(weight, *strides, scale * LOG2E.value, scale)


def masked_product_fwd(query, key, value, weight, scale):
    scale_log2 = scale * LOG2E.value
    return engine.run_forward(WEIGHT, query, key, value, _weight(weight, weight, scale), scale_log2)


def masked_product_bwd(grad_output, query, key, value, weight, output, logsumexp, scale):
    scale_log2 = scale * LOG2E.value
    grad_weight = torch.empty_like(weight)
    arguments = _weight(weight, grad_weight, scale)
    inputs = (query, key, value, grad_output, logsumexp, engine.run_row_delta(output, grad_output))
    gradients = engine.run_backward(WEIGHT, inputs, arguments, scale_log2, LN2.value)
    heads = weight.shape[0]
    config = table.configuration("parameter_gradient", query, WEIGHT.lean)
    owners = heads * triton.cdiv(query.shape[2], config.block_m) ** 2
    engine.run_parameter_gradient(
        WEIGHT, WEIGHT_PARAMETERS, owners, 1, grad_weight, inputs, arguments, (heads,), scale_log2
    )
    return *gradients, grad_weight
