"""The attention layers that ``effattn.patch`` knows by their attribute names: other classes for the same modules.

A layer keeps its parameters, buffers, submodules and hooks; its class becomes one that computes the attention proper
through effattn and everything around it as before. What else it needs stands in one entry of its ``__dict__``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._structured_mask import StructuredMask
from ..ops import scaled_dot_product_attention, window_attention
from .merging_blocks import LAYER as MERGING
from .merging_blocks import _part
from .multi_head import multi_head_attention
from .timm import _ATTENTION, _ATTENTION_ALSO, _scripted, _unlike

LAYER = "_effattn_attention_layer"
PREFIX = "effattn_"  # of the names that a mask's tensors have in the layer
_BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp")
_WINDOW_PARTS = {"qkv", "attn_drop", "proj", "proj_drop", "softmax"}
_NAMES = ("attn", "attention", "self_attn", "self_attention", "cross_attn", "cross_attention", "encoder_attn")
_TOKENS = 6  # of a trial, where nothing asks for another number


class Layer(NamedTuple):
    """What one layer is to do."""

    mask: StructuredMask | None
    backend: str
    tensors: tuple[str, ...] = ()  # attributes of the mask that the layer holds as parameters and buffers
    untouched: bool = False  # of a transformers model whose other layers are touched

    def mask_of(self, module: nn.Module) -> StructuredMask | None:
        """The mask, with the tensors that the layer holds now: ``model.to()`` and DDP may have put others in place."""
        if not self.tensors:
            return self.mask
        mask = object.__new__(type(self.mask))
        for name, value in vars(self.mask).items():
            setattr(mask, name, value)
        for name in self.tensors:
            setattr(mask, name, getattr(module, PREFIX + name))
        return mask


class Kind(NamedTuple):
    """One kind of layer."""

    words: str  # what it runs with the exact rule
    swap: Callable[[nn.Module], list[tuple[nn.Module, type]]]  # modules and what is to come before their class
    run: Callable[[nn.Module, torch.device, torch.dtype, int | None, int], list[Tensor]]  # on made-up tokens
    takes_masks: bool = True


def _attend(name: str, module: nn.Module, query, key, value, *, attn_mask=None, is_causal=False, **options) -> Tensor:
    layer = getattr(module, LAYER)
    mask = layer.mask_of(module)
    if mask is not None and (attn_mask is not None or is_causal):
        raise NotImplementedError(f"effattn.patch: {name} with a {type(mask).__name__} takes no other mask")
    if mask is not None:
        attn_mask = mask
    return scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, backend=layer.backend, **options
    )


class _VisionAttention:
    """Attention of timm's names, with everything around it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        gate = getattr(self, "gate", None)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = _part(self, "q_norm", query), _part(self, "k_norm", key)
        dropout_p = self.attn_drop.p if self.training and hasattr(self, "attn_drop") else 0.0
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": getattr(self, "scale", None)}
        out = _attend("Attention", self, query, key, value, dropout_p=dropout_p, **options)
        out = _part(self, "norm", out.transpose(1, 2).flatten(2))
        if gate is not None:
            out = out * gate(x).sigmoid()
        return _part(self, "proj_drop", self.proj(out))


class _WindowBlock:
    """A Swin block of timm's names whose windows are read where they lie."""

    def _attn(self, x: Tensor) -> Tensor:
        attention, grid = self.attn, tuple(x.shape[1:3])
        if _window_problem(self, grid) or (self.training and attention.attn_drop.p > 0.0):
            return super()._attn(x)
        heads = attention.qkv(x.flatten(1, 2)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = window_attention(
            *heads.unbind(0),
            *(grid, self.window_size),
            shift=self.shift_size,
            bias_table=attention.relative_position_bias_table,
            scale=attention.scale,
            backend=getattr(self, LAYER).backend,
        )
        return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2))).unflatten(1, grid)


class _MultiheadAttention:
    """nn.MultiheadAttention that runs effattn where no weights are asked for."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        problem = "need_weights=True" if need_weights else ""
        if not problem and (query.is_nested or key.is_nested or value.is_nested):
            problem = "nested tensors"
        if not problem and not _fits(self, query, key, value, key_padding_mask, attn_mask):
            problem = "tokens without a batch, or of other shapes than the masks"
        if problem:
            mask = getattr(self, LAYER).mask
            if mask is not None:
                raise NotImplementedError(
                    f"effattn.patch: nn.MultiheadAttention does not take {problem} where rules gave it a {type(mask).__name__}"
                )
            options = {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
        separate = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        out = multi_head_attention(
            *(query, key, value, self.num_heads),
            weights=self.in_proj_weight if self._qkv_same_embed_dim else separate,
            bias=self.in_proj_bias,
            out_weight=self.out_proj.weight,
            out_bias=self.out_proj.bias,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            batch_first=self.batch_first,
            attend=functools.partial(_attend, "nn.MultiheadAttention", self),
        )
        return out, None


class _EncoderLayer:
    """nn.TransformerEncoderLayer without its inference path, which would go past the mask of its attention."""

    activation_relu_or_gelu = property(lambda self: 0)  # one of the conditions of that path, and of no other


def _fits(module, query, key, value, key_padding_mask, attn_mask) -> bool:
    """Whether these are batched tokens and masks that belong to them; nn.MultiheadAttention words the errors."""
    if not (query.dim() == key.dim() == value.dim() == 3 and key.shape[:2] == value.shape[:2]):
        return False
    batch, tokens = (0, 1) if module.batch_first else (1, 0)
    if query.shape[batch] != key.shape[batch]:
        return False
    if (query.shape[2], key.shape[2], value.shape[2]) != (module.embed_dim, module.kdim, module.vdim):
        return False
    count, length, keys = query.shape[batch], query.shape[tokens], key.shape[tokens]
    for mask, shapes in (
        (key_padding_mask, ((count, keys),)),
        (attn_mask, ((length, keys), (count * module.num_heads, length, keys))),
    ):
        if mask is not None and (
            tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point())
        ):
            return False
    return True


def _window_problem(block: nn.Module, grid: tuple[int, int]) -> str:
    """Why windows of this grid are left to the block's own code, or nothing."""
    if any(extent % size for extent, size in zip(grid, block.window_size)):
        return "its windows do not divide its grid: it pads tokens, which then take part with the bias of qkv"
    if not any(block.shift_size) or getattr(block, "dynamic_mask", False):
        return ""
    if block.attn_mask is None or grid != tuple(block.input_resolution):
        return "its mask of shifted windows was made for another grid"
    return ""


# ---- which layers are known ----


def find(model: nn.Module) -> dict[str, tuple[nn.Module, Kind | None, str]]:
    """The attention layers of ``model`` by name: the module to change, its kind, or why it has none."""
    found: dict[str, tuple[nn.Module, Kind | None, str]] = {}
    taken: set[int] = set()
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    for name, module in model.named_modules():
        if id(module) in taken:
            continue
        if _is_window_block(module):
            taken.add(id(module.attn))
            found[f"{name}.attn" if name else "attn"] = (module, *_judge(module, _WINDOWS, _not_window_block))
        elif isinstance(module, nn.MultiheadAttention):
            taken.add(id(module.out_proj))
            kind = _MULTI_HEAD._replace(swap=functools.partial(_swap_multi_head, parents.get(id(module))))
            found[name] = (module, *_judge(module, kind, _not_multi_head))
        elif _looks_like_attention(name, module):
            found[name] = (module, *_judge(module, _VISION, _not_vision))
    return {
        name: entry
        for name, entry in found.items()
        if entry[1] is not None or not any(other.startswith(f"{name}.") or not name for other in found if other != name)
    }


def _judge(module: nn.Module, kind: Kind, why_not: Callable[[nn.Module], str]) -> tuple[Kind | None, str]:
    reason = _never(module) or why_not(module)
    return (None, reason) if reason else (kind, "")


def _never(module: nn.Module) -> str:
    if LAYER in vars(module):
        return "is patched already, as a part of another model"
    if any(MERGING in vars(part) for part in (module, getattr(module, "attn", module))):
        return "merges tokens (effattn.integrations.timm.merge_tokens), and runs effattn already"
    if any(base.__module__.startswith("effattn.nn.") for base in type(module).__mro__):
        return "is a module of effattn already"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if _scripted(module) or "forward" in vars(module):
        return "is scripted, or its forward was replaced"
    return ""


def _looks_like_attention(name: str, module: nn.Module) -> bool:
    own = any(True for _ in module.parameters())
    called = "attention" in type(module).__name__.lower() or name.rpartition(".")[2] in _NAMES
    return own and not isinstance(module, (nn.Linear, nn.ModuleList)) and called


def _not_vision(module: nn.Module) -> str:
    if any(not isinstance(getattr(module, part, None), nn.Module) for part in _ATTENTION):
        return f"is an attention of a kind that effattn does not know ({type(module).__name__})"
    reason = _unlike(module, _ATTENTION, _ATTENTION_ALSO, {"attn_mask", "is_causal"})
    if not reason and not isinstance(getattr(module, "num_heads", None), int):
        reason = "has no num_heads"
    if not reason and getattr(module.qkv, "in_features", None) is None:
        reason = "has a qkv that is not a linear layer"
    return reason


def _is_window_block(module: nn.Module) -> bool:
    inside = getattr(module, "attn", None)
    return isinstance(inside, nn.Module) and hasattr(module, "window_size") and hasattr(module, "shift_size")


def _not_window_block(block: nn.Module) -> str:
    attention = block.attn
    missing = [part for part in _BLOCK_PARTS if not isinstance(getattr(block, part, None), nn.Module)]
    parts = {name for name, child in attention.named_children() if child is not None}
    own = [name for name, _ in attention.named_parameters(recurse=False)]
    if missing or not hasattr(block, "_attn") or not hasattr(block, "input_resolution"):
        return f"is in a {type(block).__name__} that has not the parts of timm's SwinTransformerBlock"
    if parts != _WINDOW_PARTS or own != ["relative_position_bias_table"]:
        return f"is a {type(attention).__name__} of other parts than timm's WindowAttention (Swin v2, or another)"
    if parametrize.is_parametrized(attention):
        return "is parametrized"
    if any(getattr(attention, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
        return "has hooks, which would see no call"
    return _window_problem(block, tuple(block.input_resolution))


def _not_multi_head(module: nn.MultiheadAttention) -> str:
    if type(module) is not nn.MultiheadAttention:
        return f"is a {type(module).__name__}, of which nn.MultiheadAttention is only the base"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "has add_bias_kv or add_zero_attn"
    return ""


# ---- how a trial runs one, and what is changed ----


def _tokens(width: int, count: int, batch: int, device, dtype) -> Tensor:
    probe = (0.7 * torch.arange(batch * count * width, dtype=torch.float64)).sin()
    return probe.view(batch, count, width).to(device, dtype)


def _run_vision(module, device, dtype, tokens, batch) -> list[Tensor]:
    return [module(_tokens(module.qkv.in_features, tokens or _TOKENS, batch, device, dtype))]


def _run_windows(block, device, dtype, tokens, batch) -> list[Tensor]:
    height, width = block.input_resolution
    x = _tokens(block.attn.qkv.in_features, height * width, 1, device, dtype)
    return [block._attn(x.view(1, height, width, -1))]


def _run_multi_head(module, device, dtype, tokens, batch) -> list[Tensor]:
    masked = getattr(module, LAYER, Layer(None, "auto")).mask is not None or tokens is not None
    count = tokens or _TOKENS
    widths = (module.embed_dim, module.kdim, module.vdim)
    query, key, value = (_tokens(width, count, batch, device, dtype) for width in widths)
    padding = torch.zeros(batch, count, dtype=torch.bool, device=device)
    padding[-1, -2:] = True
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    calls = [(query, key, value, None)] if masked else [(query, key, value, None), (query, key, value, padding)]
    if widths == (widths[0],) * 3 and not masked:
        calls.append((query, query, query, None))
    return [module(q, k, v, key_padding_mask=mask, need_weights=False)[0] for q, k, v, mask in calls]


def _swap_multi_head(parent: nn.Module | None, module: nn.Module) -> list[tuple[nn.Module, type]]:
    swapped = [(module, _MultiheadAttention)]
    if getattr(module, LAYER).mask is not None and isinstance(parent, nn.TransformerEncoderLayer):
        swapped.append((parent, _EncoderLayer))
    return swapped


_VISION = Kind("effattn.scaled_dot_product_attention", lambda module: [(module, _VisionAttention)], _run_vision)
_WINDOWS = Kind(
    "effattn.window_attention, shift and bias in the kernel; grids that windows do not divide, and dropout of weights in "
    "training, run the original",
    lambda block: [(block, _WindowBlock)],
    _run_windows,
    takes_masks=False,
)
_MULTI_HEAD = Kind(
    "effattn.scaled_dot_product_attention; calls with need_weights=True, and the inference path of "
    "nn.TransformerEncoderLayer, run the original",
    lambda module: [(module, _MultiheadAttention)],
    _run_multi_head,
)


def apply(module: nn.Module, kind: Kind, layer: Layer, alone: bool = False) -> list[tuple[nn.Module, type, type]]:
    """Change the classes; returns each module that was changed (``alone``: not its parent), its class, and what is new."""
    object.__setattr__(module, LAYER, layer)
    swapped = kind.swap(module)[: 1 if alone else None]
    changes = [(changed, type(changed), behaviour) for changed, behaviour in swapped]
    for changed, original, behaviour in changes:
        changed.__class__ = changed_class(behaviour, original)
    return changes


@functools.cache
def changed_class(behaviour: type, original: type) -> type:
    def reduce(self, protocol):
        return _empty, (behaviour, original), vars(self)

    return type(
        f"Patched{original.__name__}",
        (behaviour, original),
        {"__reduce_ex__": reduce, "__module__": __name__, "__doc__": behaviour.__doc__},
    )


def _empty(behaviour: type, original: type) -> nn.Module:
    """A module without attributes: how copies and pickles begin."""
    changed = changed_class(behaviour, original)
    return changed.__new__(changed)
