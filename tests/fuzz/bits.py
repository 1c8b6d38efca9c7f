"""Products with one bit per element, and layers of signed powers of two."""

from __future__ import annotations

import random

import torch

import effattn

from .subject import Subject, extent, normal

LENGTHS = (1, 2, 31, 32, 33, 40)


def _bits(rng: random.Random, *size: int) -> torch.Tensor:
    return effattn.pack_signs(normal(rng, *size).float())


def _pack(rng: random.Random) -> dict:
    leading = [extent(rng, 3) for _ in range(rng.randint(0, 5))]
    return {"x": normal(rng, *leading, rng.choice((0, *LENGTHS))), "backend": "auto"}


def _add(rng: random.Random) -> dict:
    leading = [extent(rng, 3) for _ in range(rng.randint(0, 3))]
    length = rng.choice((0, *LENGTHS))
    return {
        "packed": _bits(rng, *leading, extent(rng, 4), length),
        "dense": normal(rng, *leading, length, extent(rng, 5)),
        "values": rng.choice(["binary", "sign"]),
        "backend": "auto",
    }


def _binary(rng: random.Random) -> dict:
    leading = [extent(rng, 3) for _ in range(rng.randint(0, 3))]
    length = rng.choice((0, *LENGTHS))
    return {
        "left": _bits(rng, *leading, extent(rng, 4), length),
        "right": _bits(rng, *leading, extent(rng, 4), length),
        "length": length,
        "values": rng.choice(["binary", "sign"]),
        "backend": "auto",
    }


def _hamming(rng: random.Random) -> dict:
    batch, heads, queries, keys, length = (
        extent(rng, 2),
        extent(rng, 3),
        extent(rng, 6),
        extent(rng, 6),
        rng.choice(LENGTHS),
    )
    return {
        "query_bits": _bits(rng, batch, heads, queries, length),
        "key_bits": _bits(rng, batch, heads, keys, length),
        "value": normal(rng, batch, heads, keys, rng.randint(1, 9)),
        "head_dim": length,
        "values": rng.choice(["binary", "sign"]),
        "scale": rng.choice([None, 0.3]),
        "backend": "auto",
    }


def _quantised(rng: random.Random) -> dict:
    weight = normal(rng, extent(rng, 5), extent(rng, 9))
    return {"weight": weight, "bits": rng.randint(2, 5), "scale": rng.choice(["none", "channel"])}


def _quantise(**arguments):
    packed = effattn.quantize_power_of_two(**arguments)
    return packed.codes, packed.scale, packed.dequantize()


def _linear(rng: random.Random) -> dict:
    activation = rng.choice(["float", "float", "int8", "fixed16.16"])
    scale = rng.choice(["none", "channel"]) if activation != "fixed16.16" else "none"
    outputs, inputs = extent(rng, 6), extent(rng, 9)
    weight = effattn.quantize_power_of_two(normal(rng, outputs, inputs).float(), bits=rng.randint(2, 5), scale=scale)
    leading = [extent(rng, 3) for _ in range(rng.randint(0, 3))]
    return {
        "input": normal(rng, *leading, inputs),
        "weight": weight,
        "bias": normal(rng, outputs) if rng.random() < 0.5 else None,
        "activation": activation,
        "backend": "auto",
    }


def _packed(rng: random.Random) -> dict:
    bits, columns = rng.randint(2, 5), extent(rng, 7)
    weight = effattn.quantize_power_of_two(normal(rng, extent(rng, 4), columns).float(), bits=bits, scale="channel")
    return {"codes": weight.codes, "scale": weight.scale, "bits": bits, "columns": columns, "dtype": torch.float32}


def _unpack(scale, **arguments):
    if isinstance(scale, torch.Tensor) and scale.dtype == torch.float64:
        scale = scale.float()  # the reference in float64
    return effattn.PackedShiftWeight(scale=scale, **arguments).dequantize()


SUBJECTS = [
    Subject("pack_signs", effattn.pack_signs, _pack, shapes=("x",), discontinuous=True),
    Subject(
        "add_matmul",
        effattn.add_matmul,
        _add,
        differentiable=("dense",),
        shapes=("packed", "dense"),
        selects=True,
        weight=2,
    ),
    Subject("binary_matmul", effattn.binary_matmul, _binary, shapes=("left", "right")),
    Subject(
        "hamming_attention",
        effattn.hamming_attention,
        _hamming,
        differentiable=("value",),
        shapes=("query_bits", "value"),
        weight=2,
    ),
    Subject(
        "quantize_power_of_two",
        _quantise,
        _quantised,
        shapes=("weight",),
        discontinuous=True,
    ),
    Subject(
        "shift_linear",
        effattn.shift_linear,
        _linear,
        differentiable=("input", "bias"),
        shapes=("input",),
        discontinuous=True,
        selects=True,
        weight=3,
    ),
    Subject(
        "PackedShiftWeight",
        _unpack,
        _packed,
        in_float32=("scale",),
        any_dtype=False,
        shapes=("codes",),
        sizes=("columns",),
        values=("codes", "scale"),
    ),
]
