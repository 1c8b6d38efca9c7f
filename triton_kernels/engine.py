"""Launches the tile engine for any family: allocates outputs, sizes grids, never synchronises."""

from __future__ import annotations

import torch
import triton

from . import configurations as table
from . import tiles
from .tiles import ParameterPolicy, Policy


def _strides(*tensors) -> tuple:
    return tuple(tensor.stride() for tensor in tensors)


def _block_options(query, config) -> dict:
    return {
        "HEAD_DIM": query.shape[3],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": table.block_d(query.shape[3]),
        "PRECISION": table.precision(query),
    }


def run_forward(policy: Policy, query, key, value, arguments, scale_log2):
    """(output, logsumexp)"""
    batch, heads, queries, _ = query.shape
    output = torch.empty_like(query)
    logsumexp = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return output, logsumexp
    strides = tiles.ForwardStrides(*_strides(query, key, value, output))
    sizes = (heads, heads // key.shape[1], queries, key.shape[2])
    config = table.configuration("forward", query, policy.lean, policy.heavy)
    table.launch(
        tiles.forward,
        triton.cdiv(queries, config.block_m) * batch * heads,
        query.device,
        config,
        *(query, key, value, output, logsumexp, arguments, strides, *sizes, scale_log2),
        TERM=policy.term,
        LOGITS=policy.logits,
        WEIGH=policy.weigh,
        KEEP=policy.keep,
        KEY_SPAN=policy.key_span,
        **_block_options(query, config),
    )
    return output, logsumexp


def run_row_delta(output, grad_output):
    batch, heads, queries, head_dim = output.shape
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=output.device)
    if output.numel():
        config = table.configuration("row_delta", output)
        strides = tiles.DeltaStrides(*_strides(output, grad_output))
        table.launch(
            tiles.row_delta,
            triton.cdiv(queries, config.block_m) * batch * heads,
            output.device,
            config,
            *(output, grad_output, delta, strides, heads, queries),
            HEAD_DIM=head_dim,
            BLOCK_M=config.block_m,
            BLOCK_D=table.block_d(head_dim),
        )
    return delta


def run_backward(policy: Policy, inputs, arguments, scale_log2, gradient_scale, grad_key_term=None):
    """(grad_query, grad_key, grad_value); `inputs`: query, key, value, grad_output, logsumexp, delta.

    `grad_key_term`: (B, Hkv, M) float32 to write the gradient of a term of the key alone to."""
    query, key, value = inputs[:3]
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    read = _strides(*inputs[:4])
    sizes = (heads, heads // max(key_heads, 1), queries, keys, scale_log2, gradient_scale)
    functions = {
        "TERM": policy.term,
        "LOGITS": policy.logits,
        "WEIGH": policy.weigh,
        "SCORE_GRADIENT": policy.score_gradient,
        "KEEP": policy.keep,
    }
    if key.numel():
        config = table.configuration("key_value_gradient", query, policy.lean, policy.heavy)
        strides = tiles.KeyValueStrides(*read, *_strides(grad_key, grad_value))
        table.launch(
            tiles.key_value_gradient,
            triton.cdiv(keys, config.block_n) * batch * key_heads,
            query.device,
            config,
            *(*inputs, grad_key, grad_value, grad_key_term, arguments, strides, *sizes),
            QUERY_SPAN=policy.query_span,
            **functions,
            **_block_options(query, config),
        )
    if query.numel():
        config = table.configuration("query_gradient", query, policy.lean, policy.heavy)
        strides = tiles.QueryStrides(*read, *_strides(grad_query))
        table.launch(
            tiles.query_gradient,
            triton.cdiv(queries, config.block_m) * batch * heads,
            query.device,
            config,
            *(*inputs, grad_query, arguments, strides, *sizes),
            KEY_SPAN=policy.key_span,
            **functions,
            **_block_options(query, config),
        )
    return grad_query, grad_key, grad_value


def run_parameter_gradient(
    policy: Policy,
    parameter_policy: ParameterPolicy,
    owners: int,
    splits: int,
    destination,
    inputs,
    arguments,
    extents,
    scale_log2,
):
    """`inputs`: query, key, value, grad_output, logsumexp, delta."""
    query = inputs[0]
    config = table.configuration("parameter_gradient", query, policy.lean, policy.heavy)
    strides = tiles.ParameterStrides(*_strides(*inputs[:4]))
    extents = (*extents, *(0,) * (6 - len(extents)))
    table.launch(
        tiles.parameter_gradient,
        owners * splits,
        query.device,
        config,
        *(*inputs, destination, arguments, strides, *query.shape[:3], splits, *extents, scale_log2),
        MEMBERS=parameter_policy.members,
        PLACE=parameter_policy.place,
        OWNER_TERM=parameter_policy.owner_term,
        LOGITS=policy.logits,
        WEIGH=policy.weigh,
        TERM_GRADIENT=parameter_policy.term_gradient,
        WEIGH_GRADIENT=parameter_policy.weigh_gradient,
        FINISH=parameter_policy.finish,
        HEAD_DIM=query.shape[3],
        BLOCK=config.block_m,
        BLOCK_D=table.block_d(query.shape[3]),
        PRECISION=table.precision(query),
    )
