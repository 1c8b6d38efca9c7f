"""Linear attention weighted by a Toeplitz matrix, the direct method: every pair of a query and a key, in tiles.

    c = exp(b - max b)    W_ij = (q_i . k_j) c_{j-i}    n_i = sum_j W_ij + eps    O_i = sum_j W_ij v_j / n_i
    delta_i = g_i . o_i    D_ij = (g_i . v_j - delta_i) / n_i    g the gradient of O
    dv_j = sum_i W_ij g_i / n_i    dk_j = sum_i c D_ij q_i    dq_i = sum_j c D_ij k_j
    db_t = c_t sum over the diagonal of (q_i . k_j) D_ij

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

import torch
import triton

from . import configurations as table
from . import engine, patches, tiles
from . import toeplitz_kernels as kernels
from .cross_shaped_window import unit_of

LANES = 256
SMALL = table.Configuration(LANES, 0, 4, 1)


def _configuration(kernel, query, value):
    key_dim, value_dim, chip = query.shape[3], value.shape[3], table.architecture(query.device)
    fills = key_dim == table.block_d(key_dim) and value_dim == table.block_d(value_dim)
    if kernel == "forward" and query.dtype == torch.float16 and max(key_dim, value_dim) > 64:
        fills = False  # operands of TF32 take twice the registers
    if (kernel, chip, table.block_d(max(key_dim, value_dim))) == ("key_value_gradient", "sm_100", 128):
        fills = False  # the larger tile spills
    config = table.configuration(kernel, query if key_dim >= value_dim else value, lean=fills, owner="toeplitz")
    if kernel == "parameter_gradient" and not fills and config.block_m == 32:  # pointers of narrow loads are many
        if chip == "sm_120" and max(key_dim, value_dim) > 64:
            return config._replace(block_m=16, block_n=16)
        return config._replace(num_warps=8)
    return config


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
    table.launch(kernels.relative_weights, programs, bias.device, SMALL, *arguments, LANES=LANES)
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
        kernels.toeplitz_forward,
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
        kernels.toeplitz_key_value_gradient,
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
        kernels.toeplitz_query_gradient,
        triton.cdiv(tokens, config.block_m) * batch * heads,
        query.device,
        config,
        *(key, value, grad_output, weights, *saved, grad_query),
        kernels.QueryStrides(*read[1:], grad_query.stride()),
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
        kernels.toeplitz_bias_gradient,
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
        kernels.reduce_diagonals,
        heads * triton.cdiv(weights.shape[1], LANES),
        query.device,
        SMALL,
        *(partial, weights, grad_bias, heads, weights.shape[1], grid_h, grid_w, *tile, splits),
        BLOCK=config.block_m,
        LANES=LANES,
    )
    return grad_bias
