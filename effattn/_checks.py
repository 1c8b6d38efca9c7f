"""Argument checks shared by all operators. Each names the argument, what was given and what is allowed."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
REAL = FLOATING | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool}
LARGEST_INTEGER = 2**31 - 1  # no extent, count or position is larger; products of two of them fit 64 bits


def are_alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether they are what almost every call passes, in as few steps as Python allows."""
    return (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and len(shape := query.shape) == 4
        and shape[3] >= 1
        and key.shape == shape
        and value.shape == shape
        and (dtype := query.dtype) in FLOATING
        and key.dtype == dtype
        and value.dtype == dtype
        and query.layout == key.layout == value.layout == torch.strided
        and key.device == (device := query.device)
        and value.device == device
    )


def attention_inputs(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Require three (B, H, N, D) floating-point tensors of one shape, dtype and device."""
    if are_alike(query, key, value):
        return
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        strided(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{op}: {name} must have shape (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}"
            )
        floating(op, name, tensor)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {tensor.device}")
        if tensor.shape != query.shape:
            raise ValueError(f"{op}: {name} must have query's shape {tuple(query.shape)}, got {tuple(tensor.shape)}")
    raise ValueError(f"{op}: head_dim (last dimension of query) must be at least 1, got {query.shape[3]}")


def real_tensor(op: str, name: str, tensor) -> None:
    strided(op, name, tensor)
    if tensor.dtype not in REAL:
        raise TypeError(f"{op}: {name} must be real, got {tensor.dtype} (allowed: floating point, integers, bool)")


def strided(op: str, name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) Tensor, got one of layout {tensor.layout}")


def floating(op: str, name: str, tensor) -> None:
    strided(op, name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be floating point, got {tensor.dtype} (allowed: float32, bfloat16, float16, float64)"
        )


def layer_input(op: str, name: str, tensor, layer: torch.nn.Module) -> None:
    """Require what a stock ``nn.Linear`` or ``nn.LayerNorm`` can take; another layer in its place decides by itself."""
    floating(op, name, tensor)
    if type(layer) not in (torch.nn.Linear, torch.nn.LayerNorm):
        return
    weight = layer.weight
    if tensor.device != weight.device:
        raise ValueError(f"{op}: {name} must be on the module's device {weight.device}, got {tensor.device}")
    if tensor.dtype != weight.dtype and not (
        tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
    ):
        raise TypeError(f"{op}: {name} must have the module's dtype {weight.dtype}, got {tensor.dtype}")


def parameter(op: str, name: str, tensor: Tensor, query: Tensor, like: str = "query") -> None:
    floating(op, name, tensor)
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} must be on {like}'s device {query.device}, got {tensor.device}")


def integer(op: str, name: str, value, minimum: int) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")
    if not isinstance(value, torch.SymInt) and value > LARGEST_INTEGER:
        raise ValueError(f"{op}: {name} must be at most {LARGEST_INTEGER}, got {value}")


def boolean(op: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")


def pair_of_integers(op: str, name: str, value, minimum: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be a pair (height, width), got {value!r}")
    for side, extent in zip(("height", "width"), value):
        integer(op, f"{name} {side}", extent, minimum)
    return value[0], value[1]


def device(op: str, value) -> None:
    """Require None or what torch.device understands."""
    if value is None:
        return
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{op}: device must be None, a torch.device or the name of one, got {value!r}") from None


def module_options(op: str, given_device, dtype, **switches) -> None:
    """The device and dtype of a module's parameters, and its options that are True or False."""
    device(op, given_device)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATING):
        raise TypeError(f"{op}: dtype must be None, float32, bfloat16, float16 or float64, got {dtype!r}")
    for name, value in switches.items():
        boolean(op, name, value)


def one_of(op: str, name: str, value, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def grid_of_tokens(op: str, grid: tuple[int, int], tokens: int, num_prefix_tokens: int) -> tuple[int, int]:
    """Require ``num_prefix_tokens + h * w == tokens``; returns (h, w)."""
    height, width = pair_of_integers(op, "grid", grid, 0)
    integer(op, "num_prefix_tokens", num_prefix_tokens, 0)
    if num_prefix_tokens + height * width != tokens:
        raise ValueError(
            f"{op}: query has {tokens} tokens, but grid {height} x {width} with num_prefix_tokens={num_prefix_tokens} "
            f"makes {num_prefix_tokens + height * width}"
        )
    return height, width


def real(op: str, name: str, value):
    """Require a finite number; returns it as a float (a traced one as it is)."""
    if type(value) is not float:
        if isinstance(value, (torch.SymFloat, torch.SymInt)):
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} must be finite, got an integer above any float") from None
    if not float("-inf") < value < float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def scale_or_default(op: str, scale, head_dim: int) -> float:
    if scale is None:
        return float(head_dim) ** -0.5
    return float(real(op, "scale", scale))


def interval(op: str, name: str, value, low: float, high: float):
    value = real(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value}")
    return value


def probability(op: str, name: str, value):
    value = real(op, name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")
    return value


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as ``F.scaled_dot_product_attention`` does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def movable(tensor: Tensor) -> Tensor:
    """``tensor``, which can be flipped and rolled from here on: for a DTensor old releases of torch have no rules."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        from . import _sharding  # noqa: F401 - which adds them
    return tensor


def constant(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which every rank computes alike, as an operand beside ``like``: replicated where that is a DTensor."""
    if type(like) in (Tensor, torch.nn.Parameter):
        return tensor
    from ._sharding import replicated

    return replicated(tensor, like)
