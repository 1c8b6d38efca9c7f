"""What is done to the arguments of a valid call."""

from __future__ import annotations

import random
from fractions import Fraction
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BENIGN, VALUES, OTHER, JUNK = "benign", "values", "other", "junk"
"""The call stays valid; values that may be refused; a change that may be valid or not; no value of any argument."""

DTYPES = tuple(
    getattr(torch, name)
    for name in (
        *("float64", "bfloat16", "float16", "float32", "int64", "int32", "int16", "int8", "uint8", "uint32", "bool"),
        *("complex64", "complex128", "complex32", "float8_e4m3fn", "float8_e5m2"),
    )
    if hasattr(torch, name)
)
FAR = 2**33  # an extent that costs no memory where its stride is 0


class Mutation(NamedTuple):
    argument: str
    what: str
    kind: str
    value: object

    def __str__(self) -> str:
        return f"{self.argument}: {self.what}"


def _junk(rng: random.Random) -> tuple[str, object]:
    value = rng.choice(
        [
            *(
                None,
                "junk",
                b"bytes",
                [],
                [1.0],
                {},
                (),
                object(),
                1.5,
                3,
                True,
                1 + 2j,
                Ellipsis,
                range(3),
                [[1.0, 2.0]],
            ),
            *(
                np.ones((2, 2), np.float32),
                np.float32(1.0),
                np.int64(2),
                torch.Size((1, 2)),
                torch.float32,
                Fraction(1, 2),
            ),
            *(torch.ones(2), torch.tensor(1.0), torch.tensor(1), torch.ones(2, dtype=torch.bool)),
        ]
    )
    return f"{type(value).__name__} {value!r}", value


def _number(rng: random.Random, value, small: bool) -> tuple[str, object]:
    near = [0, 1, 2, -1, 3, 5, 7, value + 1, value - 1, 2 * value, -value, value + 0.5]
    real = [float("nan"), float("inf"), -float("inf"), 1e-320, -0.0, 0.0, 0.5, -0.3, np.float64(0.5), Fraction(1, 3)]
    far = [10**30, -(10**30), 10**400, 2**63, -(2**63), 2**64, -(2**31)]
    large = [] if small else [2**31, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 1e308, 1e30]
    given = rng.choice([*near, *real, *far, *large, True, False, np.int32(2), np.int64(1)])
    return f"{type(given).__name__} {given!r}", given


def _pair(rng: random.Random, value: tuple) -> tuple[str, object]:
    first, second = value[0], value[-1]
    given = rng.choice(
        [
            *((second, first), [first, second], torch.Size(max(v, 0) for v in value), (first,), (first, second, 1)),
            *((first + 1, second), (first, 0), (0, 0), (-first, -second), (first, -1), (first, 1), (1, first * second)),
            *(
                (first, float(second)),
                (True, second),
                (first, None),
                (first, "2"),
                (first, 10**30),
                (2**62, 4),
                (2**63, 1),
            ),
            *((2**32, 2**32), (first, float("nan")), (np.int64(first), np.int32(second)), np.array(value), first),
            *(f"{first}x{second}", (first, 2**31), (2**31, second), torch.tensor(value)),
        ]
    )
    return repr(given), given


def _resized(rng: random.Random, tensor: Tensor, far: bool) -> tuple[str, Tensor]:
    if not tensor.dim():
        return "one dimension more", tensor.unsqueeze(0)
    dim = rng.randrange(tensor.dim())
    size = tensor.shape[dim]
    choice = rng.randrange(9)
    if choice == 0:
        return f"dimension {dim} of 0", tensor.narrow(dim, 0, 0)
    if choice == 1 and size > 1:
        return f"dimension {dim} of 1", tensor.narrow(dim, 0, 1)
    if choice == 2 and size:
        return f"dimension {dim} one less", tensor.narrow(dim, 1, size - 1)
    if choice == 3 and size:
        return f"dimension {dim} one more", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    if choice == 4:
        return "one dimension more", tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    if choice == 5:
        return "flattened", tensor.flatten()
    if choice == 6 and size:
        return f"dimension {dim} taken away", tensor.select(dim, 0)
    if choice == 7 and far and size:
        shape = [1 if d == dim else s for d, s in enumerate(tensor.shape)]
        one = tensor.narrow(dim, 0, 1).reshape(shape)
        shape[dim] = FAR
        return f"dimension {dim} of 2^33 at stride 0", one.expand(shape)
    return "first and last dimension swapped", tensor.transpose(0, -1)


def _laid_out(rng: random.Random, tensor: Tensor) -> tuple[str, Tensor, str]:
    """The same values in another layout, or other values where elements share memory."""
    if not tensor.dim():
        return "requires_grad", _with_gradient(tensor), BENIGN
    dim = rng.randrange(tensor.dim())
    choice = rng.randrange(7)
    if choice == 0:
        order = list(range(tensor.dim()))
        rng.shuffle(order)
        back = [order.index(d) for d in range(tensor.dim())]
        return f"laid out in the order {order}", tensor.permute(order).contiguous().permute(back), BENIGN
    if choice == 1:
        wide = torch.zeros((*tensor.shape, 3), dtype=tensor.dtype)
        wide[..., 1] = tensor
        return "every third element", wide[..., 1], BENIGN
    if choice == 2:
        offset = rng.choice([1, 3, 5])
        flat = torch.zeros(tensor.numel() + offset + 1, dtype=tensor.dtype)
        moved = flat[offset : offset + tensor.numel()].view(tensor.shape)
        moved.copy_(tensor)
        return f"at an offset of {offset}", moved, BENIGN
    if choice == 3 and tensor.shape[dim]:
        return f"expanded along {dim}", tensor.narrow(dim, 0, 1).expand(tensor.shape), BENIGN
    if choice == 4 and tensor.numel():
        flat = tensor.contiguous().flatten()
        strides = [rng.choice([0, 1, 1, 2]) for _ in tensor.shape]
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides)) + 1
        flat = flat.repeat(-(-reach // len(flat)))
        return f"overlapping, strides {strides}", flat.as_strided(tensor.shape, strides), BENIGN
    if choice == 5:
        return "a Parameter", torch.nn.Parameter(tensor, tensor.is_floating_point()), BENIGN
    return "requires_grad", _with_gradient(tensor), BENIGN


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(True) if tensor.is_floating_point() else tensor


def _spoiled(rng: random.Random, tensor: Tensor) -> tuple[str, Tensor, str]:
    if not tensor.numel() or tensor.dtype == torch.bool:
        return "the same", tensor, BENIGN
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    flat, count = tensor.view(-1), rng.choice([1, 2, tensor.numel()])
    if not tensor.is_floating_point():
        value = rng.choice(
            [0, 1, 2**31 - 1, 2**15] if tensor.dtype in (torch.uint8, torch.uint32) else [0, -1, 99, -(2**31)]
        )
        value = value % 256 if tensor.dtype == torch.uint8 else value
    else:
        info = torch.finfo(tensor.dtype)
        value = rng.choice(
            [
                float("nan"),
                float("inf"),
                -float("inf"),
                info.smallest_normal / 4,
                info.max,
                -info.max,
                info.max**0.5,
                0.0,
            ]
        )
    for place in rng.sample(range(tensor.numel()), min(count, tensor.numel(), 8)):
        flat[place] = value
    return f"{value} in {min(count, tensor.numel(), 8)} places", tensor, VALUES


def _tensor(rng: random.Random, tensor: Tensor, far: bool) -> tuple[str, object, str]:
    choice = rng.random()
    if choice < 0.34:
        return _laid_out(rng, tensor)
    if choice < 0.54:
        return _spoiled(rng, tensor)
    if choice < 0.76:
        return *_resized(rng, tensor, far), OTHER
    if choice < 0.88:
        dtype = rng.choice(DTYPES)
        return str(dtype), tensor.to(torch.float32).to(dtype), OTHER
    if choice < 0.92:
        return "on meta", tensor.to("meta"), OTHER
    if choice < 0.93 and tensor.dtype == torch.float32:
        return "quantised", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), OTHER
    if choice < 0.94 and tensor.dim() and tensor.dtype != torch.uint32:
        return "sparse", tensor.to_sparse(), OTHER
    if choice < 0.95:
        return "a NumPy array", tensor.float().numpy(), JUNK
    if choice < 0.96:
        return "a list", tensor.tolist(), JUNK
    return *_junk(rng), JUNK


def mutate(rng: random.Random, subject, arguments: dict, name: str) -> Mutation:
    value = arguments[name]
    if name == "backend":
        given = rng.choice(
            ["cpu", "cpu", "reference", "reference", "tpu", "", "CPU", None, 3, ["cpu"], "torch", b"cpu"]
        )
        return Mutation(name, repr(given), OTHER, given)
    if isinstance(value, Tensor) and type(value) is Tensor:
        what, given, kind = _tensor(rng, value, name not in subject.shapes)
        kind = VALUES if kind == BENIGN and name in subject.values else kind
        return Mutation(name, what, OTHER if kind == JUNK and isinstance(given, Tensor) else kind, given)
    if rng.random() < 0.25 or value is None:
        what, given = _junk(rng)
        alike = (isinstance(value, Number) and isinstance(given, (Number, Tensor))) or isinstance(given, type(value))
        return Mutation(name, what, OTHER if alike or value is None or given is None else JUNK, given)
    if isinstance(value, bool):
        given = rng.choice([not value, int(value), "yes", torch.tensor(value), np.bool_(value), None])
        return Mutation(name, repr(given), OTHER, given)
    if isinstance(value, (int, float)):
        what, given = _number(rng, value, name in subject.sizes)
        return Mutation(name, what, OTHER, given)
    if (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(v) is int for v in value)
        and name not in subject.sizes
    ):
        what, given = _pair(rng, value)
        return Mutation(name, what, OTHER, given)
    if isinstance(value, str):
        given = rng.choice(["nothing", "", value.upper(), [value], None, b"auto", 0, (value,)])
        return Mutation(name, repr(given), OTHER, given)
    what, given = _junk(rng)
    return Mutation(name, what, JUNK, given)


def draw(rng: random.Random, subject, arguments: dict) -> list[Mutation]:
    count = rng.choices([0, 1, 2, 3], [0.12, 0.5, 0.26, 0.12])[0]
    names = rng.sample(sorted(arguments), min(count, len(arguments)))
    return [mutate(rng, subject, arguments, name) for name in names]
