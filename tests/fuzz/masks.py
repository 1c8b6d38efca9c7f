"""Structured masks, through the stock ``scaled_dot_product_attention``."""

from __future__ import annotations

import inspect
import random

import torch
import torch.nn.functional as F
from conformance.cases import CASES, Case, Shape

import effattn

from .attention import SHAPES, shape_of
from .subject import Subject, defaults

MASKS = {
    "gaussian_mixture_attention": effattn.GaussianMixtureMask,
    "cross_shaped_window_attention": effattn.CrossShapedWindow,
    "window_attention": effattn.Window,
    "shift_add_attention": effattn.ShiftAdd,
    "retention": effattn.RetentionDecay,
    "manhattan_attention": effattn.ManhattanDecay,
    "kernelized_rpe_attention": effattn.KernelizedRPE,
    "urpe_attention": effattn.RelativePositionBias,
    "size_weighted_attention": effattn.TokenSizes,
}
OUTER = {"dropout_p": 0.0, "scale": None, "is_causal_call": False, "enable_gqa": False}


def _subject(case: Case) -> Subject:
    mask = MASKS[case.op]
    optional = defaults(mask.__init__)
    positional = list(inspect.signature(mask).parameters)

    def sample(rng: random.Random) -> dict:
        shape = shape_of(rng, case)
        tensors = case.tensors(shape, dtype=torch.float64, seed=rng.getrandbits(32))
        options = {name: value for name, value in case.options(shape).items() if name != "scale"}
        absent = {name: None for name in positional if name not in optional}
        return {**OUTER, **absent, **optional, **tensors, **options}

    def function(query, key, value, dropout_p, scale, is_causal_call, enable_gqa, backend=None, **arguments):
        structured = mask(**arguments)
        outer = {"dropout_p": dropout_p, "scale": scale, "is_causal": is_causal_call, "enable_gqa": enable_gqa}
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=structured, **outer)
        return effattn.scaled_dot_product_attention(query, key, value, structured, **outer, backend=backend)

    return Subject(
        name=mask.__name__,
        function=function,
        sample=sample,
        differentiable=case.differentiable,
        in_float32=case.in_float32,
        values=("log_decay",),
        shapes=SHAPES.get(case.op, ()),
        also_named=("is_causal", "attn_mask", "heads"),
        discontinuous=bool(case.straight_through),
        selects=bool(case.straight_through) or case.op == "kernelized_rpe_attention",
    )


def _fits(case: Case) -> bool:
    tensors = case.tensors(_ANY)
    taken = defaults(MASKS[case.op].__init__).keys() | {"query", "key", "value", "scale"}
    positional = MASKS[case.op].__init__.__code__.co_varnames
    return all(name in taken or name in positional for name in (*tensors, *case.options(_ANY)))


_ANY = Shape()
SUBJECTS = [_subject(case) for op in MASKS for case in CASES[op] if _fits(case)]
