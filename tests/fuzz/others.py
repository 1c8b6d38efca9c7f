"""Entry points around the operators: pictures, one-rank sequence parallelism, conversions of models, explain."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random

import torch
from effattn.bench import vit

import effattn
import effattn.distributed
import effattn.visualize
from effattn.integrations import convert_to_shift_add, freeze_shift_add
from effattn.integrations.timm import merge_tokens, restore

from .subject import Subject, defaults, extent, normal


def _picture(rng: random.Random) -> dict:
    grid = rng.randint(1, 4), rng.randint(1, 4)
    prefix = rng.choice([0, 1])
    tokens = prefix + grid[0] * grid[1]
    shape = [3, grid[0] * 2 + 1, grid[1] * 3]
    image = torch.rand(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    plan = effattn.bipartite_soft_matching(normal(rng, 2, tokens, 3).float(), rng.randint(0, 5), num_protected=prefix)
    return {
        "image": image,
        "plan": plan if rng.random() < 0.5 else plan.source_map(),
        "grid": grid,
        "num_prefix_tokens": prefix,
        "example": rng.choice([0, 1]),
        "border": rng.choice([None, (255, 0, 3)]),
    }


def _parallel(rng: random.Random) -> dict:
    batch, heads, tokens, width, value_dim = extent(rng, 2), extent(rng, 2), extent(rng, 6), rng.choice((1, 2, 8)), 3
    normalize = rng.choice(["none", "retnet"])
    return {
        "query": normal(rng, batch, heads, tokens, width),
        "key": normal(rng, batch, heads, tokens, width),
        "value": normal(rng, batch, heads, tokens, value_dim),
        "log_decay": -normal(rng, heads).abs(),
        **defaults(effattn.distributed.sequence_parallel_retention),
        "normalize": normalize,
        "return_state": rng.random() < 0.3,
    }


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.fc, model.act, model.out = torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)
    return model


def _conversion(rng: random.Random) -> dict:
    return {"model": _model(), **defaults(convert_to_shift_add)}


def _convert(model, **options):
    model = copy.deepcopy(model)
    done = convert_to_shift_add(model, **options)
    freeze_shift_add(model)
    return done.converted


_VIT = functools.cache(lambda: vit.VisionTransformer(vit.TINY).eval())


def _merging(rng: random.Random) -> dict:
    return {"model": _VIT(), "r": rng.choice([4, [1, 2, 3], (4, 0.5), (4, -1.0)]), **defaults(merge_tokens)}


def _merged(model, **options):
    try:
        done = merge_tokens(model, **options)
        return done.merged, done.skipped
    finally:
        if hasattr(model, "modules") and _is_patched(model):
            restore(model)


def _is_patched(model) -> bool:
    return any(type(module).__name__ == "MergingBlock" for module in model.modules())


def _layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()


def _patching(rng: random.Random) -> dict:
    example = None if rng.random() < 0.5 else tuple(normal(rng, 3, 1, 4, 8).float())
    rules = rng.choice(["exact", {"*": None}, {"*": effattn.ManhattanDecay(effattn.rmt_log_decay(2), (2, 2))}])
    return {"model": _layer(), **defaults(effattn.patch), "rules": rules, "example": example}


def _patched(model, **options):
    done = effattn.patch(model, **options)
    touched = dict(done.touched)
    effattn.unpatch(model)
    return touched


def _unpatched(model):
    if isinstance(model, torch.nn.Module):
        effattn.patch(model)
    effattn.unpatch(model)


def _replacing(rng: random.Random) -> dict:
    mask = effattn.ManhattanDecay(effattn.rmt_log_decay(2), (2, 2))
    return {"mask_or_fn": mask, **defaults(effattn.replace_sdpa), "query": normal(rng, 1, 2, 4, 8).float()}


def _replaced(mask_or_fn, query, **options):
    block = effattn.replace_sdpa(mask_or_fn, **options)
    if not isinstance(query, torch.Tensor) or callable(mask_or_fn):
        return None
    with block:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)


def _explained(rng: random.Random) -> dict:
    query = normal(rng, 1, 2, 4, 8).float()
    return {"fn": effattn.gaussian_mixture_attention, "query": query, "grid": (2, 2)}


def _explain(fn, query, grid):
    with contextlib.redirect_stdout(io.StringIO()):
        effattn.explain(fn, query, query, query, torch.ones(1, 2), torch.ones(1, 2), grid=grid)


SUBJECTS = [
    Subject(
        "merged_tokens",
        effattn.visualize.merged_tokens,
        _picture,
        any_dtype=False,
        shapes=("image",),
        values=("image", "plan"),
        on_meta=False,
        discontinuous=True,
        weight=3,
    ),
    Subject(
        "sequence_parallel_retention",
        effattn.distributed.sequence_parallel_retention,
        _parallel,
        differentiable=("query", "key", "value", "log_decay"),
        in_float32=("log_decay",),
        shapes=("value",),
        values=("log_decay",),
        on_meta=False,
        weight=3,
    ),
    Subject("convert_to_shift_add", _convert, _conversion, any_dtype=False, sizes=("residual_kernel",), weight=0.4),
    Subject("patch", _patched, _patching, any_dtype=False, weight=0.2),
    Subject("unpatch", _unpatched, lambda rng: {"model": _layer()}, any_dtype=False, weight=0.1),
    Subject("replace_sdpa", _replaced, _replacing, any_dtype=False, on_meta=False, weight=0.3),
    Subject("merge_tokens", _merged, _merging, any_dtype=False, also_named=("inflection",), weight=0.2),
    Subject(
        "explain",
        _explain,
        _explained,
        any_dtype=False,
        also_named=("key", "alpha"),
        on_meta=False,
        also_raises=(TypeError,),
        weight=0.5,
    ),
]
