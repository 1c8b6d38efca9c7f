"""Attention over tokens that stand for several each, as a policy of the tile engine; the gradient of their sizes.

    O = softmax(scale Q K^T + l_j) V        l_j = log size_j, shared by the heads; -inf: the key takes no part
    dS = P * (dP - delta)        dl_j = sum of dS_ij over heads and queries        a row without keys gives 0 and no gradient

Queries are (B, H, N, D), keys (B, H, M, D), l (B, M). The term is BLOCK_N numbers a tile, in base 2: beyond plain attention an
element costs the addition that is fused into its scale, and a tile 4 BLOCK_N bytes, which all heads find in L2.

Gradient of l. The program that owns a block of keys sums its tiles' dS over the queries in registers, BLOCK_N numbers, and
writes 4 M bytes per (b, h); the second stage, one program per LANES entries of (B, M), adds the heads in order. Nothing is
atomic, and where the gradient is not wanted it is not compiled in. FLOPs and bytes are otherwise the engine's (tiles.py).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from . import engine
from .attention import PLAIN
from .tiles import LOG2E

LANES = tl.constexpr(256)
SMALL = table.Configuration(LANES.value, 0, 4, 1)


class Sizes(NamedTuple):
    log_sizes: Any


@triton.jit
def size_term(arguments, b, h, i, j, num_queries, num_keys):
    return tl.load(arguments.log_sizes + b * num_keys + j, mask=j < num_keys, other=float("-inf")) * LOG2E


@triton.jit
def sized_logits(score, term, scale_log2):
    return score * scale_log2 + term


@triton.jit(do_not_specialize=["entries", "num_heads", "num_keys"])
def sum_heads(partial, grad, entries, num_heads, num_keys, LANES: tl.constexpr):
    """One program: LANES entries of (B, M), from (B, H, M)."""
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    exists = entry < entries
    pointers = partial + entry // num_keys * num_heads * num_keys + entry % num_keys
    total = tl.zeros((LANES,), tl.float32)
    for h in range(num_heads):
        total += tl.load(pointers + h * num_keys, mask=exists, other=0.0)
    tl.store(grad + entry, total, mask=exists)


SIZED = PLAIN._replace(term=size_term, logits=sized_logits, lean=True, heavy="columns")


def size_weighted_attention_fwd(query, key, value, log_sizes, scale, wants_sizes):
    """(output, logsumexp)"""
    return engine.run_forward(SIZED, query, key, value, Sizes(log_sizes), scale * LOG2E.value)


def size_weighted_attention_bwd(grad_output, query, key, value, log_sizes, output, logsumexp, scale, wants_sizes):
    """(grad_query, grad_key, grad_value, grad_log_sizes); the last is 0 unless wanted"""
    inputs = (query, key, value, grad_output, logsumexp, engine.run_row_delta(output, grad_output))
    arguments, scale_log2 = Sizes(log_sizes), scale * LOG2E.value
    if not wants_sizes:
        return *engine.run_backward(SIZED, inputs, arguments, scale_log2, scale), torch.zeros_like(log_sizes)
    batch, heads, keys = key.shape[:3]
    partial = torch.empty((batch, heads, keys), dtype=torch.float32, device=key.device)
    gradients = engine.run_backward(SIZED, inputs, arguments, scale_log2, scale, partial)
    grad_log_sizes = torch.empty_like(log_sizes)
    table.launch(
        sum_heads,
        triton.cdiv(batch * keys, LANES.value),
        key.device,
        SMALL,
        *(partial, grad_log_sizes, batch * keys, heads, keys),
        LANES=LANES.value,
    )
    return *gradients, grad_log_sizes
