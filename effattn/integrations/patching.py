"""Makes the attention layers of a model run through effattn, in place, and back."""

from __future__ import annotations

import fnmatch
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .. import _checks
from .._registry import BACKENDS
from .._structured_mask import StructuredMask
from .attention_layers import LAYER, PREFIX, Kind, Layer, apply, changed_class, find
from .trials import difference, layer_difference, outputs, problem_of_mask

_HANDLE = "_effattn_patching"
_NAME = "patch"
_EXACT = "exact"

Rule = str | StructuredMask | Callable | None


class Patching:
    """What :func:`patch` did to a model.

    ``touched`` maps the name of each layer that was changed to what it runs now, in words; ``skipped`` the name of each
    attention layer that was left alone to the reason.
    """

    def __init__(self):
        self.touched: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._model: nn.Module | None = None
        self._classes: list[tuple[nn.Module, type, type]] = []  # module, its class, what was put before that
        self._layers: list[nn.Module] = []
        self._tensors: list[tuple[nn.Module, str]] = []
        self._configurations: list[tuple[object, str | None]] = []

    def revert(self) -> None:
        """As :func:`unpatch`. A model that is no longer patched is left as it is.

        Raises:
            ValueError: something else has changed the class of a layer since.
        """
        for module, original, behaviour in self._classes:
            if type(module) is not changed_class(behaviour, original):
                raise ValueError(
                    f"unpatch: the class of a layer was changed to {type(module).__name__} since it was patched; undo that"
                )
        for module, original, _ in reversed(self._classes):
            module.__class__ = original
        for module, name in self._tensors:
            delattr(module, name)
        for module in self._layers:
            module.__dict__.pop(LAYER, None)
        for configuration, implementation in self._configurations:
            configuration._attn_implementation_internal = implementation
        if self._model is not None:
            self._model.__dict__.pop(_HANDLE, None)
        self.__init__()

    def __str__(self) -> str:
        lines = [f"effattn: {len(self.touched)} layers touched, {len(self.skipped)} left alone"]
        for title, layers in (("touched", self.touched), ("left alone", self.skipped)):
            by_words: dict[str, list[str]] = {}
            for name, words in layers.items():
                by_words.setdefault(words, []).append(name or "(the model)")
            for words, names in by_words.items():
                lines.append(textwrap.fill(f"{title}: {words}", 116, initial_indent="  ", subsequent_indent="      "))
                lines.append(textwrap.fill(", ".join(names), 116, initial_indent=" " * 6, subsequent_indent=" " * 6))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Patching(touched={len(self.touched)}, skipped={len(self.skipped)})"


class _Choice(NamedTuple):
    """What the rules say of one layer."""

    mask: StructuredMask | None
    reason: str  # why it is left alone, or nothing


def patch(
    model: nn.Module,
    rules: Rule | Mapping[str, Rule] | Iterable[tuple[str | Callable, Rule]] = _EXACT,
    *,
    example: Tensor | tuple | dict | None = None,
    check: bool = True,
    backend: str = "auto",
) -> Patching:
    """Make the attention layers of ``model`` run through effattn, in place; :func:`unpatch` undoes it.

    Known layers are timm's ViT and DeiT ``Attention`` and Swin (v1) blocks, by their attribute names;
    ``nn.MultiheadAttention``; and every layer of a Hugging Face transformers model that goes through its
    ``AttentionInterface``. They keep parameters, buffers, submodules and hooks, and have another class meanwhile (in
    transformers: another ``attn_implementation``). A layer that is no known one is never changed by guess.

    A patched model trains, is checkpointed, compiled in one graph, copied with ``copy.deepcopy`` and pickled as the
    model was. Patch first and compile, wrap (DDP, FSDP) or make the optimizer then.

    Args:
        model: any module; changed in place.
        rules: what becomes of the layers. "exact": each computes the same function as before. A structured mask such as
            :class:`effattn.GaussianMixtureMask`: each attends with it from now on, which is another function. A function
            of (name, module) that returns a mask or None, so that each layer can have parameters of its own. None: left
            alone. Or several of these: a mapping of name patterns (as ``"blocks.0.*"``, of :mod:`fnmatch`) to rules, or
            pairs of a pattern or a predicate of (name, module) and a rule. The first that matches a layer counts, and a
            layer that none matches is left alone. Tensors of a mask become parameters and buffers of the layer, called
            ``effattn_<attribute>``: they move, train and are saved with it.
        example: inputs of the model, a tensor, a tuple or a dict of keyword arguments, with which it is called before
            and after, in evaluation mode and without gradients.
        check: compare outputs where the rule is "exact": of each layer, before and after, on a few made-up tokens in
            float32, and with ``example`` of the whole model. A layer that computes something else than it is expected to
            is left alone; a model whose outputs differ beyond rounding is reverted. Masks are tried: shapes must fit and
            outputs be finite. False: names decide alone.
        backend: passed to the operators.

    Returns:
        Patching: ``touched``, ``skipped``, ``revert()``; ``print`` it for a report.

    Raises:
        TypeError, ValueError: an argument is wrong; a pattern or a predicate matches no attention layer; a mask does not
            fit its layer; the model is patched already.
        RuntimeError: the outputs of the whole model changed; it is reverted.
        NotImplementedError: in a call of a layer with a mask that is given another mask, or is asked for weights.

    Example:
        >>> import torch, effattn
        >>> from effattn.bench import vit
        >>> model, images = vit.VisionTransformer(vit.TINY).eval(), torch.randn(2, 3, 24, 24)
        >>> print(effattn.patch(model, example=images))
        effattn: 3 layers touched, 0 left alone
          touched: effattn.scaled_dot_product_attention
              blocks.0.attn, blocks.1.attn, blocks.2.attn
        >>> effattn.unpatch(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(check, bool):
        raise TypeError(f"{_NAME}: check must be True or False, got {check!r}")
    _checks.one_of(_NAME, "backend", backend, ("auto", "torch", *BACKENDS))
    if example is not None and not isinstance(example, (Tensor, tuple, dict)):
        raise TypeError(f"{_NAME}: example must be a tensor, a tuple or a dict, got {type(example).__name__}")
    if _HANDLE in vars(model):
        raise ValueError(f"{_NAME}: model is patched already; unpatch(model) first")
    owners = _transformers_models(model)
    layers = find(model)
    if owners:
        from . import transformers

        layers = transformers.add_layers(model, owners, layers)
    choices = _choose(rules, layers)
    before = None
    if check and example is not None:
        try:
            before = outputs(model, example)
        except Exception as error:
            raise ValueError(f"{_NAME}: the model does not run on example: {error}") from error

    done = Patching()
    done._model = model
    try:
        for name, (module, kind, reason) in layers.items():
            choice = choices[name]
            if reason or choice.reason:
                done.skipped[name] = choice.reason or reason
            else:
                _change(done, name, module, kind, choice.mask, check, backend)
        if owners:
            transformers.set_implementation(done, owners, layers)
        object.__setattr__(model, _HANDLE, done)
        if before is not None:
            exact = all(choices[name].mask is None for name in done.touched)
            different = difference(before, outputs(model, example), exact)
            if different:
                raise RuntimeError(f"{_NAME}: the model was reverted, for with example {different}")
    except BaseException:
        done.revert()
        raise
    return done


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: classes, state dict and outputs are what they were. Parameters keep what they learned.

    Args:
        model: what :func:`patch` was called with, or a copy of it.

    Raises:
        ValueError: ``model`` is not patched, or something else has changed the class of a layer since.

    Example:
        >>> import torch, effattn
        >>> model = torch.nn.TransformerDecoderLayer(16, 2)
        >>> effattn.patch(model)
        Patching(touched=2, skipped=0)
        >>> effattn.unpatch(model)
        >>> type(model.self_attn).__name__
        'MultiheadAttention'
    """
    handle = vars(model).get(_HANDLE) if isinstance(model, nn.Module) else None
    if handle is None:
        raise ValueError("unpatch: model is not one that patch has changed")
    handle.revert()


def _transformers_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside ``model``, by name."""
    library = sys.modules.get("transformers.modeling_utils")  # a model of it exists only where that was imported
    kind = getattr(library, "PreTrainedModel", None)
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules() if isinstance(kind, type) else ():
        inside = any(name.startswith(f"{owner}.") or not owner for owner in owners)
        if isinstance(module, kind) and not inside:
            owners[name] = module
    return owners


# ---- rules ----


def _choose(rules, layers: dict[str, tuple]) -> dict[str, _Choice]:
    if (
        rules is None
        or isinstance(rules, (str, StructuredMask))
        or (callable(rules) and not isinstance(rules, Mapping))
    ):
        if isinstance(rules, str) and rules != _EXACT:
            raise ValueError(f"{_NAME}: rules must be {_EXACT!r}, a mask, a function or a mapping, got {rules!r}")
        return {name: _apply_rule(rules, name, *layer) for name, layer in layers.items()}
    first: dict[str, Rule] = {}
    for pattern, rule in rules.items() if isinstance(rules, Mapping) else _pairs(rules):
        if isinstance(pattern, str):
            matched = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
        else:
            matched = [name for name, (module, *_) in layers.items() if pattern(name, module)]
        if not matched:
            shown = ", ".join(list(layers)[:4]) + (", ..." if len(layers) > 4 else "")
            raise ValueError(
                f"{_NAME}: rules: {pattern!r} matches no attention layer of the model, which has {shown or 'none'}"
            )
        for name in matched:
            first.setdefault(name, rule)
    missing = _Choice(None, "no rule matches it")
    return {
        name: _apply_rule(first[name], name, *layer) if name in first else missing for name, layer in layers.items()
    }


def _pairs(rules) -> list:
    pairs = list(rules) if isinstance(rules, Iterable) else None
    if pairs is None or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"{_NAME}: rules must be a rule, a mapping or pairs, got {rules!r}")
    for pattern, _ in pairs:
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(f"{_NAME}: rules: a pattern must be a str or a predicate, got {pattern!r}")
    return pairs


def _apply_rule(rule, name: str, module: nn.Module, kind: Kind | None, reason: str) -> _Choice:
    if reason:
        return _Choice(None, reason)
    if isinstance(rule, str) and rule == _EXACT:
        return _Choice(None, "")
    if rule is not None and not isinstance(rule, StructuredMask):
        if not callable(rule):
            raise TypeError(f"{_NAME}: a rule must be {_EXACT!r}, a mask, a function or None, got {rule!r}")
        rule = rule(name, module)
        if rule is not None and not isinstance(rule, StructuredMask):
            raise TypeError(f"{_NAME}: the rule of {name} must return a structured mask or None, got {rule!r}")
    if rule is None:
        return _Choice(None, "its rule is None")
    if not kind.takes_masks:
        raise ValueError(
            f"{_NAME}: rules: {name} attends in windows with a bias, and takes {_EXACT!r} or None, not a "
            f"{type(rule).__name__}"
        )
    return _Choice(rule, "")


# ---- one layer ----


def _change(
    done: Patching, name: str, module: nn.Module, kind: Kind, mask: StructuredMask | None, check: bool, backend: str
) -> None:
    layer = Layer(mask, backend)
    if check:
        problem = problem_of_mask(module, kind, layer) if mask is not None else layer_difference(module, kind, layer)
        if problem and mask is not None:
            raise ValueError(f"{_NAME}: {name} does not run with {mask!r}: {problem}")
        if problem:
            done.skipped[name] = problem
            return
    if mask is not None:
        layer = layer._replace(tensors=_hold(done, module, mask))
    done._layers.append(module)
    done._classes += apply(module, kind, layer)
    done.touched[name] = kind.words if mask is None else f"{type(mask).__name__}, another function than before"


def _hold(done: Patching, module: nn.Module, mask: StructuredMask) -> tuple[str, ...]:
    """Make the tensors of a mask parameters and buffers of its layer."""
    like = next(module.parameters())
    tensors = {name: value for name, value in vars(mask).items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if hasattr(module, PREFIX + name):
            raise ValueError(f"{_NAME}: the layer has an attribute {PREFIX}{name} of its own")
        if isinstance(value, nn.Parameter):
            module.register_parameter(PREFIX + name, value)
        else:
            module.register_buffer(PREFIX + name, value.to(like.device))
        done._tensors.append((module, PREFIX + name))
    return tuple(tensors)


__all__ = ["Patching", "patch", "unpatch"]
