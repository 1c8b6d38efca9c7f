"""Modules: their constructors and their calls."""

from __future__ import annotations

import random

import torch

import effattn

from .subject import Subject, extent, normal


def _built(kind, inputs: tuple[str, ...], outer: tuple[str, ...] = ()):
    """A function that builds the module, always with the same parameters, and calls it."""

    def call(**arguments):
        given = {name: arguments.pop(name) for name in inputs}
        options = {name: arguments.pop(name) for name in outer}
        torch.manual_seed(0)
        module = kind(**arguments).eval()
        if any(isinstance(v, torch.Tensor) and v.is_meta for v in given.values()):
            module = module.to("meta")
        if any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in given.values()):
            module = module.double()
        return module(**given, **options)

    return call


def _grid(rng: random.Random, most: int = 4) -> tuple[int, int]:
    return rng.randint(1, most), rng.randint(1, most)


def _tokens(rng: random.Random, grid: tuple[int, int], channels: int) -> torch.Tensor:
    return normal(rng, extent(rng, 2), grid[0] * grid[1], channels)


COMMON = {"device": None, "dtype": None, "backend": "auto"}


def _gaussian(rng: random.Random) -> dict:
    dim, grid = rng.choice((4, 6)), _grid(rng)
    return {
        "dim": dim,
        "grid": grid,
        "num_heads": rng.randint(1, 3),
        "head_dim": rng.choice((2, 4)),
        "num_gaussians": rng.randint(1, 3),
        "num_prefix_tokens": 0,
        "dropout": 0.0,
        "backend": "auto",
        "x": _tokens(rng, grid, dim),
    }


def _window_common(rng: random.Random, grid) -> dict:
    return {"resolution": rng.choice([None, None, grid]), "qkv_bias": rng.random() < 0.5, "qk_scale": None, **COMMON}


def _cswin(rng: random.Random) -> dict:
    grid = _grid(rng)
    return {
        "dim": 8,
        "num_heads": 2,
        "split_size": rng.randint(1, 3),
        "last_stage": rng.random() < 0.3,
        **_window_common(rng, grid),
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "padding": rng.choice(["zero_key", "mask"]),
        "x": _tokens(rng, grid, 8),
        "grid": grid,
    }


def _swin(rng: random.Random) -> dict:
    grid = _grid(rng)
    return {
        "dim": 6,
        "window": rng.choice([2, 3, (2, 3)]),
        "num_heads": rng.choice([1, 2, 3]),
        "shift": rng.choice([0, 1]),
        **_window_common(rng, grid),
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "padding": rng.choice(["zero_key", "mask", "input"]),
        "index_buffer": False,
        "x": _tokens(rng, grid, 6),
        "grid": grid,
    }


def _hat(rng: random.Random) -> dict:
    grid = _grid(rng)
    return {
        "dim": 6,
        "window": rng.choice([2, 4]),
        "num_heads": rng.choice([1, 2, 3]),
        "overlap_ratio": rng.choice([0.0, 1.0]),
        **_window_common(rng, grid),
        "padding": rng.choice(["zero_key", "mask"]),
        "x": _tokens(rng, grid, 6),
        "grid": grid,
    }


def _manhattan(rng: random.Random) -> dict:
    height, width = _grid(rng)
    return {
        "embed_dim": 8,
        "num_heads": rng.choice([1, 2, 4]),
        "decomposed": rng.random() < 0.5,
        "decay": rng.choice(["logits", "weights"]),
        "initial": 2.0,
        "heads_range": 4.0,
        "learnable_decay": rng.random() < 0.3,
        **COMMON,
        "x": normal(rng, extent(rng, 2), height, width, 8),
    }


def _retnet(rng: random.Random) -> dict:
    return {
        "embed_dim": 8,
        "num_heads": rng.choice([1, 2]),
        "value_dim": rng.choice([None, 4, 8]),
        "gate_fn": rng.choice(["swish", "gelu"]),
        "eps": 1e-6,
        "learnable_decay": rng.random() < 0.3,
        "method": rng.choice(["auto", "parallel", "chunkwise", "recurrent"]),
        "chunk_size": None,
        **COMMON,
        "x": normal(rng, extent(rng, 2), extent(rng, 7), 8),
        "state": None,
        "return_state": rng.random() < 0.3,
        "inplace": False,
        "cu_seqlens": None,
    }


def _vir(rng: random.Random) -> dict:
    return {
        "dim": 6,
        "num_heads": rng.choice([1, 2, 3]),
        "qkv_bias": True,
        "norm": rng.random() < 0.7,
        "eps": 1e-6,
        "proj_drop": 0.0,
        "learnable_decay": False,
        "method": "auto",
        "chunk_size": None,
        **COMMON,
        "x": normal(rng, extent(rng, 2), extent(rng, 7), 6),
        "state": None,
        "return_state": rng.random() < 0.3,
    }


def _shift_add(rng: random.Random) -> dict:
    return {
        "dim": 6,
        "num_heads": rng.choice([1, 2, 3]),
        "qkv_bias": rng.random() < 0.5,
        "head_dim": rng.choice([None, 4]),
        "proj_bias": True,
        "fused_qkv": rng.random() < 0.5,
        "binarize": rng.choice(["per_head", "published", "sign"]),
        "residual_kernel": rng.choice([0, 3, 9]),
        "linear": rng.choice(["dense", "shift"]),
        "linear_options": None,
        "sparse_reg": False,
        "proj_drop": 0.0,
        **COMMON,
        "x": normal(rng, extent(rng, 2), extent(rng, 7), 6),
        "attn_mask": None,
        "is_causal": False,
    }


def _shift_linear(rng: random.Random) -> dict:
    inputs = extent(rng, 9)
    activation = rng.choice(["float", "int8", "fixed16.16"])
    return {
        "in_features": inputs,
        "out_features": extent(rng, 6),
        "bias": rng.random() < 0.5,
        "bits": rng.randint(2, 5),
        "scale": "none" if activation == "fixed16.16" else rng.choice(["none", "channel"]),
        "parametrization": rng.choice(["Q", "PS"]),
        "activation": activation,
        **COMMON,
        "input": normal(rng, extent(rng, 3), inputs),
    }


def _frozen(rng: random.Random) -> dict:
    arguments = _shift_linear(rng)
    del arguments["parametrization"]
    return arguments


def _relative(rng: random.Random) -> tuple[dict, tuple[int, int]]:
    grid = _grid(rng, 3)
    on_grid = rng.random() < 0.5
    places = {"num_tokens": None, "grid": grid} if on_grid else {"num_tokens": grid[0] * grid[1] + 2, "grid": None}
    common = {"embed_dim": 6, "num_heads": rng.choice([1, 2, 3]), **places}
    return {**common, "is_causal": rng.random() < 0.3, "qkv_bias": True, "proj_drop": 0.0, **COMMON}, grid


def _kernelized(rng: random.Random) -> dict:
    common, grid = _relative(rng)
    return {
        **common,
        "num_features": rng.randint(1, 5),
        "feature_map": "positive",
        "normalize_qk": rng.random() < 0.7,
        "orthogonal": True,
        "eps": rng.choice([0.0, 1e-3]),
        "method": "auto",
        "x": _tokens(rng, grid, 6),
        "key_padding_mask": None,
    }


def _urpe(rng: random.Random) -> dict:
    common, grid = _relative(rng)
    return {**common, "rpe_bias": rng.random() < 0.5, "attn_drop": 0.0, "x": _tokens(rng, grid, 6)}


def _merger(rng: random.Random) -> dict:
    return {
        "dim": 5,
        "num_tokens": rng.randint(1, 4),
        **COMMON,
        "tokens": normal(rng, extent(rng, 2), extent(rng, 7), 5),
    }


def _ltm(rng: random.Random) -> dict:
    tokens, protected = rng.randint(2, 6), rng.choice([0, 1])
    return {
        "dim": 5,
        "num_tokens": tokens,
        "num_classes": rng.randint(1, 4),
        "compression_ratio": rng.choice([0.5, 0.8, 1.0]),
        "num_centroids": None,
        "num_protected": protected,
        **COMMON,
        "tokens": normal(rng, extent(rng, 2), protected + tokens, 5),
        "mask": None,
    }


def _mixture(rng: random.Random) -> dict:
    return {
        "dim": 4,
        "experts": None,
        "latencies": (1.0, 2.0),
        "noise": rng.choice([None, 0.1, "learned"]),
        "gate": rng.choice(["probability", "straight_through"]),
        "device": None,
        "dtype": None,
        "x": normal(rng, extent(rng, 3), 4),
        "return_loss": rng.random() < 0.3,
    }


SIZES = (
    *("dim", "embed_dim", "num_heads", "head_dim", "value_dim", "num_gaussians", "num_features", "num_tokens", "grid"),
    *("window", "resolution", "in_features", "out_features", "residual_kernel", "num_classes", "num_centroids"),
    *("overlap_ratio",),
)
KINDS = (
    (effattn.nn.GaussianMixtureAttention, _gaussian, ("x",)),
    (effattn.nn.CrossShapedWindowAttention, _cswin, ("x", "grid")),
    (effattn.nn.WindowAttention, _swin, ("x", "grid")),
    (effattn.nn.OverlappingCrossAttention, _hat, ("x", "grid")),
    (effattn.nn.ManhattanAttention, _manhattan, ("x",)),
    (effattn.nn.MultiScaleRetention, _retnet, ("x", "state", "return_state", "inplace", "cu_seqlens")),
    (effattn.nn.VisionRetention, _vir, ("x", "state", "return_state")),
    (effattn.nn.ShiftAddAttention, _shift_add, ("x", "attn_mask", "is_causal")),
    (effattn.nn.ShiftLinear, _shift_linear, ("input",)),
    (effattn.nn.FrozenShiftLinear, _frozen, ("input",)),
    (effattn.nn.KernelizedRPEAttention, _kernelized, ("x", "key_padding_mask")),
    (effattn.nn.URPEAttention, _urpe, ("x",)),
    (effattn.nn.PatchMerger, _merger, ("tokens",)),
    (effattn.nn.LearnableTokenMerge, _ltm, ("tokens", "mask")),
    (effattn.nn.MixtureOfPrimitives, _mixture, ("x", "return_loss")),
)


def _subject(kind, sample, inputs) -> Subject:
    first = inputs[0]
    return Subject(
        name=kind.__name__,
        function=_built(kind, inputs),
        sample=sample,
        differentiable=(first,),
        any_dtype=False,
        sizes=SIZES,
        shapes=(first,),
        on_meta=kind is not effattn.nn.MixtureOfPrimitives,
        also_named=("parameters", "query"),
        discontinuous=kind in (effattn.nn.ShiftAddAttention, *LAYERS, effattn.nn.MixtureOfPrimitives),
        selects=kind in (effattn.nn.ShiftAddAttention, *LAYERS),
    )


LAYERS = (effattn.nn.ShiftLinear, effattn.nn.FrozenShiftLinear)
SUBJECTS = [_subject(*kind) for kind in KINDS]
