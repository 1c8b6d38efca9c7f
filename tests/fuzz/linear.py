"""Torch's own signature, Toeplitz-weighted linear attention of given features, the recurrent step, and what draws tables."""

from __future__ import annotations

import random

import torch

import effattn

from .subject import Subject, defaults, extent, normal

WIDTHS = (1, 2, 3, 8, 9, 16, 17)


def _sdpa(rng: random.Random) -> dict:
    batch, heads, queries, keys = extent(rng, 2), extent(rng, 4), extent(rng, 9), extent(rng, 9)
    grouped = rng.random() < 0.2 and heads == 4
    width = rng.choice(WIDTHS)
    key_size = batch, 2 if grouped else heads, keys, width
    mask = None
    if rng.random() < 0.4:
        mask = normal(
            rng, *rng.choice([(queries, keys), (1, keys), (batch, 1, queries, keys), (batch, heads, queries, keys)])
        )
        mask = mask > 0 if rng.random() < 0.5 else mask
    return {
        "query": normal(rng, batch, heads, queries, width),
        "key": normal(rng, *key_size),
        "value": normal(rng, *key_size),
        "attn_mask": mask,
        "dropout_p": 0.0,
        "is_causal": mask is None and rng.random() < 0.3,
        "scale": rng.choice([None, 0.5]),
        "enable_gqa": grouped,
        "backend": rng.choice(["auto", "auto", "cpu"]),
    }


def _features(rng: random.Random) -> dict:
    batch, heads, width, value_dim = extent(rng, 2), extent(rng, 3), rng.choice(WIDTHS), rng.choice(WIDTHS)
    grid = (extent(rng, 3), extent(rng, 4)) if rng.random() < 0.4 else None
    tokens = extent(rng, 12) if grid is None else grid[0] * grid[1]
    sizes = (2 * tokens - 1,) if grid is None else (2 * grid[0] - 1, 2 * grid[1] - 1)
    return {
        "query_features": normal(rng, batch, heads, tokens, width).abs() + 0.1,
        "key_features": normal(rng, batch, heads, tokens, width).abs() + 0.1,
        "value": normal(rng, batch, heads, tokens, value_dim),
        "rpe_bias": normal(rng, rng.choice([1, heads]), *(max(size, 0) for size in sizes)),
        "grid": grid,
        "is_causal": rng.random() < 0.3,
        "key_padding_mask": normal(rng, batch, tokens) > 0.5 if rng.random() < 0.3 else None,
        "method": rng.choice(["auto", "auto", "direct"]),
        "eps": rng.choice([0.0, 1e-3]),
        "backend": "auto",
    }


def _step(rng: random.Random) -> dict:
    batch, heads, key_dim, value_dim = extent(rng, 2), extent(rng, 3), rng.choice(WIDTHS), rng.choice(WIDTHS)
    state = normal(rng, batch, heads, key_dim + rng.choice([0, 1]), value_dim)
    if state.shape[2] > key_dim:
        state[:, :, -1] = 1.5
    return {
        "query": normal(rng, batch, heads, 1, key_dim),
        "key": normal(rng, batch, heads, 1, key_dim),
        "value": normal(rng, batch, heads, 1, value_dim),
        "log_decay": -normal(rng, heads).abs(),
        "state": state,
        **defaults(effattn.retention_step),
    }


def _packed(rng: random.Random) -> dict:
    heads, lengths = extent(rng, 2), [rng.randint(0, 5) for _ in range(rng.randint(0, 4))]
    tokens, width = sum(lengths), rng.choice(WIDTHS)
    bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    return {
        **{name: normal(rng, 1, heads, tokens, width) for name in ("query", "key", "value")},
        "log_decay": -normal(rng, heads).abs(),
        **defaults(effattn.retention),
        "normalize": rng.choice(["none", "retnet"]),
        "is_causal": rng.random() < 0.7,
        "return_state": False,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
    }


def _rotated(rng: random.Random) -> dict:
    size = [extent(rng, 3) for _ in range(rng.randint(0, 2))]
    return {"x": normal(rng, *size, extent(rng, 6), rng.choice([2, 4, 6])), "offset": rng.choice([0, 5]), "base": 1e4}


def _log_decay(rng: random.Random) -> dict:
    return {"num_heads": rng.randint(0, 20), "dtype": rng.choice([torch.float64, torch.float32]), "device": None}


def _rmt(rng: random.Random) -> dict:
    return {**_log_decay(rng), "initial": 2.0, "range": rng.choice([4.0, 5, 6.0])}


def _directions(rng: random.Random) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "num_features": rng.randint(1, 9),
        "head_dim": rng.randint(1, 5),
        "orthogonal": True,
        "generator": generator,
    }


QKV = ("query", "key", "value")

SUBJECTS = [
    Subject(
        "scaled_dot_product_attention",
        effattn.scaled_dot_product_attention,
        _sdpa,
        differentiable=QKV,
        shapes=("query", "key", "value"),
        also_raises=(RuntimeError, ValueError, IndexError),
        lenient=lambda arguments: True,
        also_named=("mask", "heads"),
        weight=3,
    ),
    Subject(
        "toeplitz_linear_attention",
        effattn.toeplitz_linear_attention,
        _features,
        differentiable=("query_features", "key_features", "value", "rpe_bias"),
        in_float32=("rpe_bias",),
        shapes=("value",),
        selects=True,
        also_named=("query", "key"),
        weight=3,
    ),
    Subject(
        "retention_step",
        effattn.retention_step,
        _step,
        differentiable=(*QKV, "log_decay", "state"),
        in_float32=("state", "log_decay"),
        shapes=("value",),
        values=("log_decay",),
        weight=3,
    ),
    Subject(
        "retention",
        effattn.retention,
        _packed,
        differentiable=(*QKV, "log_decay"),
        in_float32=("log_decay",),
        shapes=("value", "cu_seqlens"),
        values=("log_decay", "cu_seqlens"),
        on_meta=False,
        weight=3,
    ),
    Subject("rotate_xpos", effattn.rotate_xpos, _rotated, differentiable=("x",), shapes=("x",)),
    Subject("retnet_log_decay", effattn.retnet_log_decay, _log_decay, sizes=("num_heads",), weight=0.5),
    Subject("rmt_log_decay", effattn.rmt_log_decay, _rmt, sizes=("num_heads",), weight=0.5),
    Subject(
        "random_features",
        effattn.random_features,
        _directions,
        sizes=("num_features", "head_dim"),
        random=lambda arguments: True,
        weight=0.5,
    ),
]
