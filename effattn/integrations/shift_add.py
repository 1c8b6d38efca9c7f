"""Turns a trained vision transformer into a shift-add one, in place, and back."""

from __future__ import annotations

import copy
import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks
from ..nn import FrozenShiftLinear, MixtureOfPrimitives, ShiftAddAttention, ShiftLinear

HEADS = ("head", "heads", "head_dist", "classifier", "fc", "lm_head", "score")  # where models keep their classifier
MLP = ("shift", "mixture", "dense")
_HANDLE = "_effattn_shift_add"

# What a module may consist of to be the attention that ShiftAddAttention replaces. Anything else (rotary tables,
# relative biases, spatial reduction, gates) means another function, which is left alone.
_ALWAYS = {"proj", "proj_drop", "attn_drop", "q_norm", "k_norm", "norm"}
_PROJECTIONS = ({"qkv"}, {"q", "kv"})


class _Replacement(NamedTuple):
    parent: nn.Module
    attribute: str
    original: nn.Module
    replacement: nn.Module


class ShiftAddConversion:
    """What :func:`convert_to_shift_add` did to a model.

    ``converted`` maps the name of each replaced module to the class it has now, ``skipped`` the name of each candidate
    that was left alone to the reason. The original modules are kept here, unchanged, and with them their memory.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.
    """

    def __init__(self):
        self.converted: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._replacements: list[_Replacement] = []

    def revert(self) -> None:
        """Put every original module back where it was, on the device where its replacement is.

        What the replacements have learned is dropped.
        """
        for parent, attribute, original, replacement in reversed(self._replacements):
            if parent._modules.get(attribute) is replacement:
                device = next(replacement.parameters()).device
                parent._modules[attribute] = original.train(replacement.training).to(device)
        self._replacements.clear()
        self.converted = {}

    def __repr__(self) -> str:
        return f"ShiftAddConversion(converted={len(self.converted)}, skipped={len(self.skipped)})"


def convert_to_shift_add(
    model: nn.Module,
    *,
    linear: bool = True,
    attention: bool = False,
    mlp: str = "shift",
    bits: int = 4,
    scale: str = "none",
    parametrization: str = "Q",
    activation: str = "float",
    binarize: str = "per_head",
    residual_kernel: int = 9,
    skip: Callable[[str, nn.Module], bool] | str | Iterable[str] | None = None,
    backend: str = "auto",
) -> ShiftAddConversion:
    """Replace the linear layers, and if asked the attention and the MLPs, of ``model`` by shift-add modules, in place.

    Each new module starts from the trained weights and shares nothing with the old one. Linear layers become
    :class:`effattn.nn.ShiftLinear` (y = x w^T + bias, w the nearest signed power of two). An attention module with
    timm's or the published attribute names (``qkv`` or ``q`` and ``kv``, ``proj``, ``num_heads``) becomes
    :class:`effattn.nn.ShiftAddAttention`; that is another function, to be trained on, and only its residual convolution
    is new. With ``mlp="mixture"`` a module with ``fc1`` and ``fc2`` becomes :class:`effattn.nn.MixtureOfPrimitives` of
    itself and its shift version, whose gate value is 1 ("straight_through").

    Convert before the optimizer is made: the parameters of the converted model are new tensors, and an optimizer made
    before goes on updating the old ones. The state dict of a converted model has the new modules' names; with
    ``parametrization="Q"`` and nothing but linear layers converted, they are the old names.

    Args:
        model: any module; changed in place. It must not be a linear layer itself.
        linear: convert every ``nn.Linear`` that is not skipped, those inside attention and MLPs included.
        attention: convert attention modules.
        mlp: "shift" (their linear layers as all others), "mixture" or "dense" (left alone).
        bits, scale, parametrization, activation: as :class:`effattn.nn.ShiftLinear`.
        binarize, residual_kernel: as :class:`effattn.nn.ShiftAddAttention`.
        skip: which modules to leave alone, with all they contain: a function of (name, module), or names or patterns
            as ``"blocks.0.*"``. Default: the classifier head, as published, which is what ``model.get_classifier()``
            returns or a top-level module called head, heads, head_dist, classifier, fc, lm_head or score. ``()`` skips
            nothing.
        backend: passed to the operators.

    Returns:
        ShiftAddConversion: what was converted, what was not and why, and ``revert()``.

    Raises:
        TypeError, ValueError: for an argument out of its range, and for a model that is converted already.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4: reparameterisation of a pre-trained model.

    Example:
        >>> import torch, effattn
        >>> from effattn.integrations import convert_to_shift_add, revert_shift_add
        >>> model = torch.nn.Sequential()
        >>> model.hidden, model.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
        >>> convert_to_shift_add(model).converted
        {'hidden': 'ShiftLinear'}
        >>> revert_shift_add(model)
        >>> model.hidden
        Linear(in_features=8, out_features=8, bias=True)
    """
    name = "convert_to_shift_add"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
    if type(model) is nn.Linear:
        raise ValueError(f"{name}: model must not be a linear layer itself; use ShiftLinear.from_linear")
    if hasattr(model, _HANDLE):
        raise ValueError(f"{name}: model is converted already; revert_shift_add(model) first")
    if mlp not in MLP:
        raise ValueError(f"{name}: mlp must be one of {', '.join(MLP)}, got {mlp!r}")
    for option, value in (("linear", linear), ("attention", attention)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {option} must be True or False, got {value!r}")
    _checks.integer(name, "residual_kernel", residual_kernel, 0)
    linear_options = {
        "bits": bits,
        "scale": scale,
        "parametrization": parametrization,
        "activation": activation,
        "backend": backend,
    }
    attention_options = {"binarize": binarize, "residual_kernel": residual_kernel, "backend": backend}
    # Wrong options must show before anything is replaced.
    ShiftLinear(1, 1, device="meta", **linear_options)
    ShiftAddAttention(1, 1, device="meta", **attention_options)
    converter = _Converter(model, _skipper(skip, model), linear, attention, mlp, linear_options, attention_options)
    converter.walk(model, "")
    object.__setattr__(model, _HANDLE, converter.done)
    return converter.done


def revert_shift_add(model: nn.Module) -> None:
    """Put back the original modules of a converted model: its outputs are bit for bit what they were.

    Args:
        model: what :func:`convert_to_shift_add` was called with, or a copy of it.

    Raises:
        ValueError: if ``model`` is not a converted model.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4, of which this is the inverse.

    Example:
        >>> import torch
        >>> from effattn.integrations import convert_to_shift_add, revert_shift_add
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), torch.randn(2, 8)
        >>> before = model(x)
        >>> _ = convert_to_shift_add(model)
        >>> revert_shift_add(model)
        >>> torch.equal(model(x), before)
        True
    """
    handle = getattr(model, _HANDLE, None)
    if handle is None:
        raise ValueError("revert_shift_add: model is not one that convert_to_shift_add has converted")
    handle.revert()
    object.__delattr__(model, _HANDLE)


def freeze_shift_add(model: nn.Module) -> int:
    """Replace every :class:`effattn.nn.ShiftLinear` in ``model`` by its frozen form, for inference and small files.

    The state dict then holds codes: half a byte per weight up to 4 bits. A conversion that was kept for
    :func:`revert_shift_add` is forgotten, and its original modules with it.

    Args:
        model: any module that is not a ShiftLinear itself; changed in place.

    Returns:
        The number of layers that were frozen.

    Raises:
        TypeError, ValueError: if ``model`` is not a module, or is a ShiftLinear.

    Source:
        The packed storage is this library's.

    Example:
        >>> import torch, effattn
        >>> from effattn.integrations import freeze_shift_add
        >>> model = torch.nn.Sequential(effattn.nn.ShiftLinear(8, 4), torch.nn.ReLU())
        >>> freeze_shift_add(model), sorted(model.state_dict())
        (1, ['0.bias', '0.codes'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze_shift_add: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, ShiftLinear):
        raise ValueError("freeze_shift_add: model must not be a ShiftLinear itself; use its freeze()")
    frozen: dict[nn.Module, FrozenShiftLinear] = {}
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if isinstance(child, ShiftLinear):
                if child not in frozen:
                    frozen[child] = child.freeze().train(child.training)
                parent._modules[attribute] = frozen[child]
    if hasattr(model, _HANDLE):
        object.__delattr__(model, _HANDLE)
    return len(frozen)


class _Converter:
    def __init__(self, model, skip, linear, attention, mlp, linear_options, attention_options):
        self.skip, self.linear, self.attention, self.mlp = skip, linear, attention, mlp
        self.linear_options, self.attention_options = linear_options, attention_options
        self.done = ShiftAddConversion()
        self.new: dict[nn.Module, nn.Module] = {}  # a module that is used twice is converted once
        self.shared = _shared_parameters(model)

    def walk(self, parent: nn.Module, prefix: str) -> None:
        for attribute, child in list(parent._modules.items()):
            if child is None:
                continue
            name = f"{prefix}{attribute}"
            if self.skip(name, child):
                self.done.skipped[name] = "skip"
            elif self.linear and type(child) is nn.Linear and _reads_weight(type(parent), attribute):
                self.done.skipped[name] = f"{type(parent).__name__} reads its weight without calling it"
            else:
                self.visit(parent, attribute, child, name)

    def visit(self, parent: nn.Module, attribute: str, child: nn.Module, name: str) -> None:
        converted = self.convert(child, name)
        if converted is not None:
            self.done._replacements.append(_Replacement(parent, attribute, child, converted))
            self.done.converted[name] = type(converted).__name__
            parent._modules[attribute] = converted
            if isinstance(converted, ShiftAddAttention) and self.linear:
                self.walk(converted, f"{name}.")
        elif not (self.mlp == "dense" and _is_mlp(child)):
            self.walk(child, f"{name}.")
        elif self.linear:
            self.done.skipped[name] = 'mlp="dense"'

    def convert(self, module: nn.Module, name: str) -> nn.Module | None:
        """The replacement of ``module``, or None where it stays (and its children are looked at)."""
        if module in self.new:
            return self.new[module]
        if type(module) is nn.Linear:
            converted = self.convert_linear(module, name) if self.linear else None
        elif self.attention and _is_attention(module):
            converted = self.convert_attention(module, name)
        elif self.mlp == "mixture" and _is_mlp(module):
            converted = self.convert_mlp(module, name)
        else:
            converted = None
        if converted is not None:
            self.new[module] = converted.train(module.training)
        return converted

    def convert_linear(self, module: nn.Linear, name: str) -> nn.Module | None:
        reason = self.why_not(module)
        if reason:
            self.done.skipped[name] = reason
            return None
        layer = ShiftLinear.from_linear(module, **self.linear_options)
        for parameter in layer._weights():
            parameter.requires_grad_(module.weight.requires_grad)
        if module.bias is not None:
            layer.bias.requires_grad_(module.bias.requires_grad)
        return layer

    def why_not(self, module: nn.Module) -> str:
        if parametrize.is_parametrized(module):
            return "it is parametrized"
        if any(id(parameter) in self.shared for parameter in module.parameters()):
            return "it shares a parameter with another module"
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            return "its parameters are not initialised yet"
        return ""

    def convert_attention(self, module: nn.Module, name: str) -> nn.Module | None:
        reason = _not_plain(module) or self.why_not(module)
        if reason:
            self.done.skipped[name] = reason
            return None
        fused = hasattr(module, "qkv")
        inner = module.proj.in_features
        reads = module.qkv if fused else module.q
        converted = ShiftAddAttention(
            reads.in_features,
            module.num_heads,
            head_dim=inner // module.num_heads,
            fused_qkv=fused,
            **self.attention_options,
            device=reads.weight.device,
            dtype=reads.weight.dtype,
        )
        for part in ("qkv", "q", "kv", "q_norm", "k_norm", "norm", "proj", "proj_drop"):
            if isinstance(getattr(module, part, None), nn.Module):
                setattr(converted, part, copy.deepcopy(getattr(module, part)))
        return converted

    def convert_mlp(self, module: nn.Module, name: str) -> nn.Module | None:
        reason = self.why_not(module)
        if reason:
            self.done.skipped[name] = reason
            return None
        multiplication, shift = copy.deepcopy(module), copy.deepcopy(module)
        for part in ("fc1", "fc2"):
            setattr(shift, part, self.convert_linear(getattr(module, part), f"{name}.{part}"))
        like = {"device": module.fc1.weight.device, "dtype": module.fc1.weight.dtype}
        return MixtureOfPrimitives(module.fc1.in_features, (multiplication, shift), gate="straight_through", **like)


def _is_mlp(module: nn.Module) -> bool:
    """Whether it holds two linear layers, at most a norm and nothing else (a whole decoder layer may have fc1 and fc2)."""
    holds = {name.partition(".")[0] for name, _ in module.named_parameters()}
    return holds <= {"fc1", "fc2", "norm"} and all(type(getattr(module, p, None)) is nn.Linear for p in ("fc1", "fc2"))


def _is_attention(module: nn.Module) -> bool:
    """Whether it looks like the attention of a vision transformer; ``_not_plain`` says whether it is one we know."""
    projections = hasattr(module, "qkv") or (hasattr(module, "q") and hasattr(module, "kv"))
    return projections and hasattr(module, "proj") and hasattr(module, "num_heads")


def _not_plain(module: nn.Module) -> str:
    """Why this attention computes something else than softmax(q k^T) v, or nothing."""
    parts = {name for name, child in module.named_children() if child is not None}
    projections = next((names for names in _PROJECTIONS if names <= parts), None)
    if projections is None:
        return f"its projections are not {' or '.join(' and '.join(sorted(names)) for names in _PROJECTIONS)}"
    more = parts - projections - _ALWAYS
    if more:
        return f"it has {', '.join(sorted(more))}"
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if own:
        return f"it has parameters or buffers of its own: {', '.join(own)}"
    if any(type(getattr(module, part)) is not nn.Linear for part in (*projections, "proj")):
        return "its projections are not nn.Linear"
    inner = module.proj.in_features
    widths = {"qkv": 3 * inner, "q": inner, "kv": 2 * inner}
    if inner % module.num_heads or any(getattr(module, part).out_features != widths[part] for part in projections):
        return "query, key and value do not have the width that proj takes"
    if getattr(module, "sr_ratio", 1) != 1:
        return "it reduces keys and values spatially"
    return ""


@functools.cache
def _reads_weight(kind: type, attribute: str) -> bool:
    """Whether a method of the class mentions ``self.<attribute>.weight``: it may go past the layer's forward."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if callable(method) and "init" not in name and "reset" not in name:
                try:
                    source = inspect.getsource(method)
                except (OSError, TypeError):  # made at run time
                    continue
                if f"self.{attribute}.weight" in source:
                    return True
    return False


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that belong to more than one module."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _skipper(skip, model: nn.Module) -> Callable[[str, nn.Module], bool]:
    if skip is None:
        return _head_of(model)
    if callable(skip):
        return lambda name, module: bool(skip(name, module))
    many = isinstance(skip, Iterable) and not isinstance(skip, (bytes, Tensor))
    patterns = [skip] if isinstance(skip, str) else list(skip) if many else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"convert_to_shift_add: skip must be a function, a name or names, got {skip!r}")
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"convert_to_shift_add: skip names {pattern!r}, which no module of the model matches")
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _head_of(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    found = model.get_classifier() if callable(getattr(model, "get_classifier", None)) else None
    heads = [found] if isinstance(found, nn.Module) else list(found) if isinstance(found, (tuple, list)) else []
    heads += [module for name, module in model.named_children() if name in HEADS]
    return lambda name, module: any(module is head for head in heads)


__all__ = ["ShiftAddConversion", "convert_to_shift_add", "freeze_shift_add", "revert_shift_add"]
