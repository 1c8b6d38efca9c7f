"""Token merging: plans, what is done by them, soft merging, dropping, the bound."""

from __future__ import annotations

import random

import torch

import effattn

from .subject import Subject, extent, normal

CHANNELS = (1, 2, 3, 8, 17)


def _sizes(rng: random.Random, batch: int, tokens: int):
    if rng.random() < 0.4:
        return None
    sizes = (3 * normal(rng, batch, tokens).abs()).round()
    sizes = sizes.long() if rng.random() < 0.3 else sizes
    return sizes.unsqueeze(-1) if rng.random() < 0.4 else sizes


def _matching(rng: random.Random) -> dict:
    batch, tokens = extent(rng, 2), extent(rng, 12)
    return {
        "metric": normal(rng, batch, tokens, rng.choice(CHANNELS)),
        "num_merged": rng.randint(0, 7),
        "num_protected": rng.choice([0, 0, 1, 2]),
        "distill_token": rng.random() < 0.2,
        "sizes": _sizes(rng, batch, tokens),
        "threshold": rng.choice([None, None, 0.0, 0.5]),
        "backend": "auto",
    }


def _plan(rng: random.Random) -> effattn.TokenMerge:
    metric = normal(rng, extent(rng, 2), extent(rng, 12), 4).float()
    sizes = _sizes(rng, *metric.shape[:2])
    threshold = rng.choice([None, 0.0])
    return effattn.bipartite_soft_matching(metric, rng.randint(0, 6), sizes=sizes, threshold=threshold)


def _merge(rng: random.Random) -> dict:
    plan = _plan(rng)
    x = normal(rng, *plan.source.shape, rng.choice(CHANNELS))
    return {"plan": plan, "x": x, "mode": rng.choice(["mean", "sum", "max"]), "backend": "auto"}


def _merge_weighted(rng: random.Random) -> dict:
    plan = _plan(rng)
    x = normal(rng, *plan.source.shape, rng.choice(CHANNELS))
    residual = normal(rng, *x.shape) if rng.random() < 0.4 else None
    return {"plan": plan, "x": x, "sizes": _sizes(rng, *x.shape[:2]), "residual": residual, "backend": "auto"}


def _unmerge(rng: random.Random) -> dict:
    plan = _plan(rng)
    x = normal(rng, plan.source.shape[0], plan.num_tokens, rng.choice(CHANNELS))
    return {"plan": plan, "x": x, "backend": "auto"}


def _method(name: str):
    def call(plan, **arguments):
        if not isinstance(plan, effattn.TokenMerge):
            raise TypeError("plan is no TokenMerge")  # there is no method to call
        return getattr(plan, name)(**arguments)

    return call


def _handmade(rng: random.Random) -> dict:
    """A plan that nobody checked, as ``TokenMerge(...)`` takes it, and a call by it."""
    plan = _plan(rng)
    return {
        "source": plan.source,
        "members": plan.members,
        "offsets": plan.offsets,
        "padded": plan.padded,
        "x": normal(rng, *plan.source.shape, rng.choice(CHANNELS)),
        "mode": rng.choice(["mean", "sum", "max"]),
        "backend": "auto",
    }


def _by_hand(source, members, offsets, padded, **arguments):
    return effattn.TokenMerge(source, members, offsets, None, padded).merge(**arguments)


def _soft(rng: random.Random) -> dict:
    batch, tokens = extent(rng, 2), extent(rng, 9)
    logits = normal(rng, batch, tokens, extent(rng, 5))
    return {"tokens": normal(rng, batch, tokens, rng.choice(CHANNELS)), "logits": logits, "backend": "auto"}


def _kept(rng: random.Random) -> dict:
    batch, tokens = extent(rng, 2), extent(rng, 9)
    protected = rng.randint(0, min(2, tokens))
    return {
        "x": normal(rng, batch, tokens, rng.choice(CHANNELS)),
        "scores": normal(rng, batch, tokens),
        "num_kept": rng.randint(protected, tokens),
        "num_protected": protected,
    }


def _probabilities(rng: random.Random) -> dict:
    width = rng.choice(CHANNELS)
    leading = [extent(rng, 3) for _ in range(rng.randint(0, 2))]
    return {"features": normal(rng, *leading, width), "centroids": normal(rng, rng.randint(1, 4), width)}


def _bound(rng: random.Random) -> dict:
    count, inside, outside, classes = extent(rng, 4), rng.choice(CHANNELS), rng.choice(CHANNELS), rng.randint(1, 4)
    centroids = rng.randint(1, 4)
    return {
        "features_in": normal(rng, count, inside),
        "features_out": normal(rng, count, outside),
        "centroids_in": normal(rng, rng.randint(1, 4), inside),
        "centroids_out": normal(rng, centroids, outside),
        "joint": normal(rng, centroids, classes).softmax(1),
        "target": torch.tensor([rng.randrange(classes) for _ in range(count)], dtype=torch.int64),
    }


def _subject(name: str, function, sample, differentiable, **options) -> Subject:
    shapes = (
        "x",
        "tokens",
        "logits",
        "features",
        "centroids",
        "features_in",
        "features_out",
        "joint",
        "offsets",
        "metric",
        "centroids_in",
        "centroids_out",
    )
    return Subject(name, function, sample, differentiable=differentiable, shapes=shapes, **options)


SUBJECTS = [
    _subject(
        "bipartite_soft_matching",
        effattn.bipartite_soft_matching,
        _matching,
        (),
        values=("sizes",),
        discontinuous=True,
        weight=2,
    ),
    _subject("TokenMerge.merge", _method("merge"), _merge, ("x",)),
    _subject(
        "TokenMerge.merge_weighted", _method("merge_weighted"), _merge_weighted, ("x", "sizes", "residual"), weight=2
    ),
    _subject("TokenMerge.unmerge", _method("unmerge"), _unmerge, ("x",)),
    _subject("TokenMerge", _by_hand, _handmade, ("x",), values=("source", "members", "offsets"), weight=2),
    _subject("soft_merge", effattn.soft_merge, _soft, ("tokens", "logits"), weight=2),
    _subject("keep_tokens", effattn.keep_tokens, _kept, ("x",), values=("scores",)),
    _subject("centroid_probabilities", effattn.centroid_probabilities, _probabilities, ("features", "centroids")),
    _subject(
        "information_bottleneck_bound",
        effattn.information_bottleneck_bound,
        _bound,
        ("features_in", "features_out", "centroids_in", "centroids_out", "joint"),
        values=("target",),
        also_raises=(IndexError,),
    ),
]
