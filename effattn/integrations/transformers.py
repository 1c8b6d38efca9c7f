"""Attention of Hugging Face transformers models: importing this registers the implementation "effattn".

    import effattn.integrations.transformers
    model = AutoModel.from_config(config, attn_implementation="effattn")  # or model.set_attn_implementation("effattn")

It computes what transformers' "sdpa" computes, from the same masks. A structured mask is either a rule of
:func:`effattn.patch`, or an entry ``effattn_mask`` of the configuration, which is saved with it: see
:func:`mask_config`.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import masks
from .._structured_mask import StructuredMask
from ..ops import scaled_dot_product_attention
from .attention_layers import LAYER, Kind, Layer

NAME = "effattn"
CONFIG = "effattn_mask"
_PAIRS = ("grid", "window", "shift", "overlap")
_CHANGES_SCORES = {
    "softcap": "caps the scores",
    "s_aux": "adds attention sinks",
    "sinks": "adds attention sinks",
    "block_indices": "chooses blocks of keys",
    "indices": "chooses keys",
}
_MASKS = {
    name: (getattr(masks, name), tuple(inspect.signature(getattr(masks, name)).parameters))
    for name in masks.__all__
    if name != "StructuredMask"
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls for ``attn_implementation="effattn"``.

    Args:
        module: the attention layer.
        query: (B, H, N, D).
        key, value: (B, H_kv, M, D), H a multiple of H_kv.
        attention_mask: None, or what ``sdpa_mask`` made: boolean, True where a key takes part; or an additive one.
        dropout, scaling, is_causal, position_bias: as transformers passes them.
        **kwargs: what transformers' own "sdpa" ignores is ignored, and what changes the scores is refused.

    Returns:
        tuple[Tensor, None]: (B, N, H, D).

    Raises:
        NotImplementedError: an option that no kernel serves; or a structured mask where the call needs another mask too.

    Example:
        >>> import torch
        >>> from effattn.integrations.transformers import attention
        >>> query = torch.randn(1, 4, 5, 8)
        >>> key = value = torch.randn(1, 2, 5, 8)
        >>> attention(torch.nn.Module(), query, key, value, None, is_causal=True)[0].shape
        torch.Size([1, 5, 4, 8])
    """
    for name, what in _CHANGES_SCORES.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'attn_implementation="effattn": {name} {what}; use "eager" for this model')
    if kwargs.get("output_attentions"):
        raise NotImplementedError('attn_implementation="effattn" returns no weights; use "eager" for output_attentions')
    layer = getattr(module, LAYER, None)
    if layer is not None and layer.untouched:
        options = {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **options, **kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and bool(causal)
    if key.shape[1] != query.shape[1] and query.shape[1] % key.shape[1]:
        raise NotImplementedError(
            f'attn_implementation="effattn": {query.shape[1]} heads are no multiple of {key.shape[1]} key heads'
        )
    options = {"dropout_p": dropout, "scale": scaling, "backend": "auto" if layer is None else layer.backend}
    mask = _structured(module, layer, query.device)
    if mask is not None:
        _refuse_other_masks(mask, query, key, attention_mask if position_bias is None else position_bias, causal)
        options["attn_mask"] = mask
    else:
        if causal and key.shape[2] > query.shape[2]:  # an empty static cache: further keys are seen by no query
            key, value = (tensor[:, :, : query.shape[2]] for tensor in (key, value))
        if position_bias is not None:
            position_bias = position_bias[..., : key.shape[2]]
            attention_mask, causal = _with_bias(position_bias, attention_mask, causal, query, key), False
        options |= {"attn_mask": attention_mask, "is_causal": causal}
    out = scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] != query.shape[1], **options)
    return out.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    lowest = torch.finfo(key.dtype).min
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else bias + mask


def _refuse_other_masks(mask: StructuredMask, query: Tensor, key: Tensor, other: Tensor | None, causal: bool) -> None:
    name = type(mask).__name__
    if other is not None:
        raise NotImplementedError(
            f"effattn: {name} does not combine with the mask or bias that this call has (padding, a cache, a sliding "
            "window, a position bias); pass batches without padding and no attention_mask"
        )
    if causal and not getattr(mask, "is_causal", False):
        raise NotImplementedError(f"effattn: this layer is causal, and {mask!r} is not")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"effattn: {name} needs as many keys as queries, got {key.shape[2]} and {query.shape[2]}: pass use_cache=False"
        )


def _structured(module: nn.Module, layer: Layer | None, device: torch.device) -> StructuredMask | None:
    if layer is not None and layer.mask is not None:
        return layer.mask_of(module)
    given = getattr(getattr(module, "config", None), CONFIG, None)
    if isinstance(given, list):
        index = getattr(module, "layer_idx", None)
        if index is None or index >= len(given):
            raise ValueError(
                f"config.{CONFIG}: a list needs one entry for each layer with a layer_idx, got {len(given)}"
            )
        given = given[index]
    return None if given is None else mask_from_config(given, device)


def mask_from_config(config: dict, device: torch.device | str | None = None) -> StructuredMask:
    """The structured mask that an entry ``effattn_mask`` of a configuration describes.

    Args:
        config: ``{"type": name of a mask, **its arguments}`` with lists for tensors and pairs.
        device: of its tensors, which are float32.

    Returns:
        StructuredMask.

    Raises:
        TypeError, ValueError: there is no such mask or argument.

    Example:
        >>> from effattn.integrations.transformers import mask_from_config
        >>> mask_from_config({"type": "RetentionDecay", "log_decay": [-0.1, -0.2]})
        RetentionDecay(heads=2, is_causal=True, normalize='none', method='auto')
    """
    if not isinstance(config, dict):
        raise TypeError(f"config.{CONFIG}: must be a dict, or a list of them and None, got {type(config).__name__}")
    if config.get("type") not in _MASKS:
        raise ValueError(f"config.{CONFIG}: type must be one of {', '.join(_MASKS)}, got {config.get('type')!r}")
    kind, allowed = _MASKS[config["type"]]
    arguments = {}
    for name, value in config.items():
        if name == "type":
            continue
        if name not in allowed:
            raise ValueError(f"config.{CONFIG}: {config['type']} takes {', '.join(allowed)}, got {name!r}")
        if name in _PAIRS:
            value = None if value is None else tuple(value)
        elif isinstance(value, (list, tuple)):
            value = torch.tensor(value, dtype=torch.float32, device=device)
        arguments[name] = value
    return kind(**arguments)


def mask_config(mask: StructuredMask) -> dict:
    """A structured mask as an entry ``effattn_mask`` of a configuration: plain numbers, which are not trained.

    ``config.effattn_mask = mask_config(mask)`` makes every layer of a model with ``attn_implementation="effattn"``
    attend with it, a list of such entries and None each layer by its ``layer_idx``. It survives ``to_dict``,
    ``from_dict`` and ``save_pretrained``. For parameters that are trained, use :func:`effattn.patch` with a rule.

    Args:
        mask: one of effattn's masks, without integer or boolean tensors.

    Returns:
        dict: for :func:`mask_from_config`.

    Raises:
        TypeError, ValueError: it cannot be written so.

    Example:
        >>> import effattn
        >>> from effattn.integrations.transformers import mask_config
        >>> mask_config(effattn.CrossShapedWindow((4, 4), 2))
        {'type': 'CrossShapedWindow', 'grid': [4, 4], 'stripe_width': 2}
    """
    name = type(mask).__name__
    if name not in _MASKS or type(mask) is not _MASKS[name][0]:
        raise TypeError(f"mask_config: mask must be one of {', '.join(_MASKS)}, got {name}")
    written = {"type": name}
    for argument, parameter in inspect.signature(type(mask)).parameters.items():
        value = getattr(mask, argument)
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise ValueError(f"mask_config: {argument} must be floating point, got {value.dtype}")
            value = value.detach().float().tolist()
        elif value is parameter.default or value == parameter.default:
            continue
        written[argument] = list(value) if isinstance(value, tuple) else value
    return written


# ---- for effattn.patch ----


def _unchanged(module: nn.Module) -> list:
    return []


def _run(module: nn.Module, device, dtype, tokens: int | None, batch: int) -> list[Tensor]:
    """The attention function of the layer, not the layer: each of them takes other arguments."""
    config = getattr(module, "config", None)
    heads = getattr(config, "num_attention_heads", 4)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None) or 16
    layer, tokens = getattr(module, LAYER, None), tokens or 6
    shapes = ((heads, 0.7), (kv_heads, 0.3), (kv_heads, 0.9))
    query, key, value = (
        (step * torch.arange(batch * count * tokens * head_dim, dtype=torch.float64))
        .sin()
        .view(batch, count, tokens, head_dim)
        .to(device, dtype)
        for count, step in shapes
    )
    function = sdpa_attention_forward if layer is None else attention
    options = {"scaling": getattr(module, "scaling", None), "is_causal": bool(getattr(module, "is_causal", False))}
    calls = [None]
    if layer is None or layer.mask is None:
        calls.append(torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=device).tril())
    else:
        options["is_causal"] = False if not options["is_causal"] else getattr(layer.mask, "is_causal", False)
    return [function(module, query, key, value, mask, **options)[0] for mask in calls]


_LAYER = Kind(
    'effattn.scaled_dot_product_attention, as attn_implementation="effattn" of transformers', _unchanged, _run
)


def add_layers(model: nn.Module, owners: dict[str, nn.Module], layers: dict) -> dict:
    """``layers`` with those of the transformers models in place of what they look like."""
    added = {}
    for owner_name, owner in owners.items():
        for name, module in owner.named_modules():
            if _calls_interface(type(module)):
                full = ".".join(part for part in (owner_name, name) if part)
                added[full] = (module, *_judge(owner, module))
    kept = {
        name: entry
        for name, entry in layers.items()
        if name not in added
        and not any(other.startswith(f"{name}.") or name.startswith(f"{other}.") or not name for other in added)
    }
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return dict(sorted((kept | added).items(), key=lambda item: order.get(item[0], len(order))))


def _calls_interface(kind: type) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _judge(owner: nn.Module, module: nn.Module) -> tuple[Kind | None, str]:
    if LAYER in vars(module):
        return None, "is patched already, as a part of another model"
    if not owner._can_set_attn_implementation():
        return None, f"is in a {type(owner).__name__}, whose attention implementation cannot be set"
    if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME:
        return None, 'runs attn_implementation="effattn" already'
    return _LAYER, ""


def set_implementation(done, owners: dict[str, nn.Module], layers: dict) -> None:
    """Make each transformers model with a touched layer call us, and say in ``done`` what it called before."""
    for owner_name, owner in owners.items():
        inside = {
            name: module
            for name, (module, kind, _) in layers.items()
            if kind is _LAYER and (name.startswith(f"{owner_name}.") or not owner_name or name == owner_name)
        }
        touched = [name for name in inside if name in done.touched]
        if not touched:
            continue
        configurations = _configurations(owner)
        done._configurations += [(config, config._attn_implementation_internal) for config in configurations]
        before = {config._attn_implementation_internal for config in configurations} - {NAME}
        if len(touched) < len(inside):
            if before != {"sdpa"}:
                raise ValueError(
                    f"patch: rules leave layers of a transformers model alone, which can stay beside touched ones where "
                    f"its attn_implementation is 'sdpa', but it is {', '.join(map(repr, sorted(map(str, before))))}"
                )
            for name, module in inside.items():
                if name not in done.touched:
                    object.__setattr__(module, LAYER, Layer(None, "auto", untouched=True))
                    done._layers.append(module)
        owner.set_attn_implementation(NAME)
        for name in touched:
            configured = getattr(getattr(inside[name], "config", None), CONFIG, None)
            if configured is not None and getattr(inside[name], LAYER).mask is None:
                done.touched[name] = f"the mask of config.{CONFIG}, another function than before"


def _configurations(owner: nn.Module) -> list:
    found: dict[int, object] = {}
    waiting = [module.config for module in owner.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

__all__ = ["attention", "mask_config", "mask_from_config"]
