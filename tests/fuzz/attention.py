"""Attention of query, key and value: the table of the conformance suite at random small shapes."""

from __future__ import annotations

import random

import torch
from conformance.cases import CASES, Case, Shape

from .subject import Subject, defaults, extent

SHAPES = {"retention": ("value",), "kernelized_rpe_attention": ("projection",), "size_weighted_attention": ("query",)}
HEAD_DIMS = (1, 2, 3, 5, 8, 15, 16, 17)


def shape_of(rng: random.Random, case: Case) -> Shape:
    return Shape(
        batch=extent(rng, 2),
        heads=extent(rng, 3),
        grid=(extent(rng, 4), extent(rng, 4)),
        prefix=rng.choice((0, 0, 1, 2)),
        head_dim=rng.choice(HEAD_DIMS),
        gaussians=rng.randint(1, 3),
        keys=extent(rng, 9) if case.op == "size_weighted_attention" and rng.random() < 0.5 else None,
    )


def from_case(case: Case) -> Subject:
    optional = defaults(case.function)

    def sample(rng: random.Random) -> dict:
        shape = shape_of(rng, case)
        tensors = case.tensors(shape, dtype=torch.float64, seed=rng.getrandbits(32))
        return {**optional, **tensors, **case.options(shape), "backend": "auto"}

    straight = case.straight_through
    return Subject(
        name=case.op,
        function=case.function,
        sample=sample,
        differentiable=case.differentiable,
        in_float32=case.in_float32,
        values=("log_decay",),
        shapes=SHAPES.get(case.op, ()),
        discontinuous=bool(straight),
        selects=bool(straight) or case.op == "kernelized_rpe_attention",  # a NaN compares as not above the threshold
    )


SUBJECTS = [
    from_case(case)
    for op, cases in CASES.items()
    for case in cases
    if op not in ("scaled_dot_product_attention", "toeplitz_linear_attention")
]
