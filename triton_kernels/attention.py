"""Scaled dot-product attention as policies of the tile engine: no mask, boolean mask, additive mask, causal; grouped heads in each.

    O = softmax(scale Q K^T + mask) V;  boolean: -inf where False;  causal: j <= i, top-left aligned.  A row with nothing to attend to gives 0.

Additive and boolean masks are read a BLOCK_M x BLOCK_N tile at a time through their strides (0 where expanded): N M more elements read per pass.
Causal tiles above the diagonal are not visited. The mask gets no gradient.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import engine, tiles
from .tiles import LOG2E


class Mask(NamedTuple):
    mask: Any = None
    stride_batch: Any = None
    stride_head: Any = None
    stride_row: Any = None
    stride_column: Any = None


@triton.jit
def no_term(arguments, b, h, i, j, num_queries, num_keys):
    return 0.0


@triton.jit
def mask_term(arguments, b, h, i, j, num_queries, num_keys):
    pointers = (
        arguments.mask
        + b * arguments.stride_batch
        + h * arguments.stride_head
        + i.to(tl.int64) * arguments.stride_row
        + j.to(tl.int64) * arguments.stride_column
    )
    return tl.load(pointers, mask=(i < num_queries) & (j < num_keys), other=0)


@triton.jit
def scaled_logits(score, term, scale_log2):
    return score * scale_log2


@triton.jit
def additive_logits(score, term, scale_log2):
    return score * scale_log2 + term.to(tl.float32) * LOG2E


@triton.jit
def boolean_logits(score, term, scale_log2):
    return tl.where(term != 0, score * scale_log2, float("-inf"))


@triton.jit
def plain_score_gradient(grad_logits, score, term):
    return grad_logits


@triton.jit
def keep_causal(i, j, num_keys):
    return (j <= i) & (j < num_keys)


@triton.jit
def causal_keys(row_begin, row_end, num_keys, BLOCK: tl.constexpr):
    return 0, tl.minimum(row_begin + 1, num_keys) // BLOCK * BLOCK, tl.minimum(row_end, num_keys)


@triton.jit
def causal_queries(column_begin, column_end, num_queries, BLOCK: tl.constexpr):
    return column_begin // BLOCK * BLOCK, tl.cdiv(column_end - 1, BLOCK) * BLOCK


PLAIN = tiles.Policy(no_term, scaled_logits, plain_score_gradient, tiles.keep_in_bounds, tiles.every_key, None)
CAUSAL = PLAIN._replace(keep=keep_causal, key_span=causal_keys, query_span=causal_queries)
ADDITIVE = PLAIN._replace(term=mask_term, logits=additive_logits)
BOOLEAN = PLAIN._replace(term=mask_term, logits=boolean_logits)


def _policy(attn_mask, is_causal):
    if is_causal:
        return CAUSAL, Mask()
    if attn_mask is None:
        return PLAIN, Mask()
    if attn_mask.dtype == torch.bool:
        return BOOLEAN, Mask(attn_mask.view(torch.uint8), *attn_mask.stride())
    return ADDITIVE, Mask(attn_mask, *attn_mask.stride())


def attention_fwd(query, key, value, attn_mask, is_causal, scale):
    policy, arguments = _policy(attn_mask, is_causal)
    return engine.run_forward(policy, query, key, value, arguments, scale * LOG2E.value)


def attention_bwd(grad_output, query, key, value, attn_mask, output, logsumexp, is_causal, scale):
    policy, arguments = _policy(attn_mask, is_causal)
    inputs = (query, key, value, grad_output, logsumexp, engine.run_row_delta(output, grad_output))
    return engine.run_backward(policy, inputs, arguments, scale * LOG2E.value, scale)
