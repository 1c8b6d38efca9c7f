"""Argument checks shared by all operators. Each names the argument, what was given and what is allowed."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor


def attention_inputs(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Require three (B, H, N, D) floating-point tensors of one shape, dtype and device."""
    if (  # what almost every call passes, in as few steps as Python allows
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and len(shape := query.shape) == 4
        and shape[3] >= 1
        and key.shape == shape
        and value.shape == shape
        and query.is_floating_point()
        and key.dtype == (dtype := query.dtype)
        and value.dtype == dtype
        and key.device == (device := query.device)
        and value.device == device
    ):
        return
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{op}: {name} must have shape (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {tensor.device}")
        if tensor.shape != query.shape:
            raise ValueError(f"{op}: {name} must have query's shape {tuple(query.shape)}, got {tuple(tensor.shape)}")
    raise ValueError(f"{op}: head_dim (last dimension of query) must be at least 1, got {query.shape[3]}")


def floating(op: str, name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def parameter(op: str, name: str, tensor: Tensor, query: Tensor, like: str = "query") -> None:
    floating(op, name, tensor)
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} must be on {like}'s device {query.device}, got {tensor.device}")


def integer(op: str, name: str, value, minimum: int) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")


def pair_of_integers(op: str, name: str, value, minimum: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be a pair (height, width), got {value!r}")
    for side, extent in zip(("height", "width"), value):
        integer(op, f"{name} {side}", extent, minimum)
    return value[0], value[1]


def one_of(op: str, name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
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


def real(op: str, name: str, value) -> None:
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt))
    ):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not float("-inf") < value < float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def scale_or_default(op: str, scale, head_dim: int) -> float:
    if scale is None:
        return float(head_dim) ** -0.5
    real(op, "scale", scale)
    return float(scale)


def interval(op: str, name: str, value, low: float, high: float) -> None:
    real(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value}")


def probability(op: str, name: str, value) -> None:
    real(op, name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as ``F.scaled_dot_product_attention`` does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def constant(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which every rank computes alike, as an operand beside ``like``: replicated where that is a DTensor."""
    if type(like) in (Tensor, torch.nn.Parameter):
        return tensor
    from ._sharding import replicated

    return replicated(tensor, like)
