"""Whether a layer, or a whole model, computes after patching what it computed before."""

from __future__ import annotations

import collections
import contextlib

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .._structured_mask import StructuredMask
from .attention_layers import Kind, Layer, apply

_LAYER_ROUNDING = 256  # times the dtype's eps and the largest output: measured differences are below 10
_MODEL_ROUNDING = 2000  # of float32 and float64 through many layers
_MODEL_ROUNDING_16 = 16  # of the 16-bit types, whose own rounding is as large


def layer_difference(module: nn.Module, kind: Kind, layer: Layer) -> str:
    """Why the layer is not what its names promise: it is run as it is and patched, on a few made-up tokens."""
    shadow = _shadow(module)
    like = _like(shadow)
    if like is None or like.is_meta:
        return ""
    arguments = (like.device, like.dtype, None, 2)
    with _trial(like.device):
        try:
            before = kind.run(shadow, *arguments)
            apply(shadow, kind, layer, alone=True)
            after = kind.run(shadow, *arguments)
        except Exception as error:  # noqa: BLE001  (whatever a foreign module raises)
            return f"does not run on a few tokens: {type(error).__name__}: {error}"
    for old, new in zip(before, after):
        if old.shape != new.shape or _largest(old, new) > _LAYER_ROUNDING * torch.finfo(old.dtype).eps * _size(old):
            return "computes something else than softmax attention of these parts"
    return ""


def problem_of_mask(module: nn.Module, kind: Kind, layer: Layer) -> str:
    """Why the layer does not run with its mask, or nothing."""
    shadow = _shadow(module)
    like = _like(shadow)
    tokens, batch = _tokens_of(layer.mask)
    if like is None or like.is_meta or tokens is None:
        return ""
    with _trial(like.device):
        try:
            mask = object.__new__(type(layer.mask))
            for name, value in vars(layer.mask).items():
                setattr(mask, name, value.detach().to(like.device) if isinstance(value, Tensor) else value)
            apply(shadow, kind, layer._replace(mask=mask), alone=True)
            outputs = kind.run(shadow, like.device, like.dtype, tokens, batch)
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            return str(error)
    if not all(bool(out.isfinite().all()) for out in outputs):
        return "its outputs are not finite"
    return ""


def outputs(model: nn.Module, example: Tensor | tuple | dict) -> list[Tensor]:
    """Every tensor that ``model`` returns, in evaluation mode; modes, buffers and random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    like = _like(model)
    try:
        for module in modes:
            module.training = False
        with _trial(like.device if like is not None else torch.device("cpu"), autocast=True):
            if isinstance(example, dict):
                returned = model(**example)
            else:
                returned = model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
    tensors = [leaf for leaf in _pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"patch: example: the model returned a {type(returned).__name__} without tensors")
    return tensors


def difference(before: list[Tensor], after: list[Tensor], exact: bool) -> str:
    """How outputs of the whole model differ, or nothing. Where rules are not exact they must be finite."""
    if [tuple(t.shape) for t in before] != [tuple(t.shape) for t in after]:
        return "it returns tensors of other shapes"
    for index, (old, new) in enumerate(zip(before, after)):
        if not old.is_floating_point():
            if exact and not torch.equal(old, new):
                return f"output {index} ({old.dtype}) is another"
            continue
        if not exact:
            if bool(old.isfinite().all()) and not bool(new.isfinite().all()):
                return f"output {index} is not finite"
            continue
        eps = torch.finfo(old.dtype).eps
        allowed = (_MODEL_ROUNDING if eps < 1e-5 else _MODEL_ROUNDING_16) * eps * _size(old)
        largest = _largest(old, new)
        if not largest <= allowed:
            return f"output {index} differs by {largest:.3g}, and {allowed:.3g} would be rounding"
    return ""


@contextlib.contextmanager
def _trial(device: torch.device, autocast: bool = False):
    devices = [device.index or 0] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        if not autocast and device.type != "meta":
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _like(module: nn.Module) -> Tensor | None:
    floating = (parameter for parameter in module.parameters() if parameter.is_floating_point())
    return next(floating, None)


def _size(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _largest(before: Tensor, after: Tensor) -> float:
    """The largest difference; none where both are the same infinity or both not a number."""
    before, after = before.double(), after.double()
    same = (before == after) | (before.isnan() & after.isnan())
    return float((before - after).abs().masked_fill(same, 0.0).max()) if before.numel() else 0.0


def _tokens_of(mask: StructuredMask) -> tuple[int | None, int]:
    """With how many tokens and in which batch a mask can be tried; None where it does not say."""
    grid, sizes = getattr(mask, "grid", None), getattr(mask, "sizes", None)
    if isinstance(sizes, Tensor):
        return sizes.shape[1], sizes.shape[0]
    if isinstance(grid, (tuple, list)) and len(grid) == 2:
        return grid[0] * grid[1] + getattr(mask, "num_prefix_tokens", 0), 2
    for table in (getattr(mask, name, None) for name in ("rpe_bias", "coefficient")):
        if isinstance(table, Tensor):
            return (table.shape[-1] + 1) // 2, 2
    known = type(mask).__module__.startswith("effattn.") and getattr(mask, "cu_seqlens", None) is None
    return (6 if known and getattr(mask, "residual_weight", None) is None else None), 2


def _shadow(module: nn.Module) -> nn.Module:
    """The same module in evaluation mode without hooks: parameters shared, or in float32 where they have 16 bits."""
    shadow = module.__new__(type(module))
    shadow.__dict__.update(vars(module), training=False)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        shadow.__dict__[hooks] = collections.OrderedDict()
    shadow.__dict__["_modules"] = {
        name: None if child is None else _shadow(child) for name, child in module._modules.items()
    }
    parameters = {}
    for name, parameter in module._parameters.items():
        sixteen = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
        parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False) if sixteen else parameter
    shadow.__dict__["_parameters"] = parameters
    buffers = {}
    for name, buffer in module._buffers.items():
        sixteen = buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16)
        buffers[name] = None if buffer is None else buffer.float() if sixteen else buffer.clone()
    shadow.__dict__["_buffers"] = buffers
    return shadow
