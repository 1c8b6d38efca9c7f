"""Merges tokens inside a vision transformer of timm, in place, and back (ToMe). timm itself is not imported."""

from __future__ import annotations

import collections
import inspect

import torch
from torch import Tensor, nn

from .. import _checks
from .merging_blocks import LAYER, Layer, TokenStream, Trace, patch, unpatch

_HANDLE = "_effattn_token_merging"
_NAME = "merge_tokens"
_GRID_READER = "forward_intermediates"

# What a block and its attention may consist of. Anything else means another function, which is not patched.
_BLOCK = ("norm1", "attn", "norm2", "mlp")
_BLOCK_ALSO = {"ls1", "ls2", "drop_path", "drop_path1", "drop_path2"}
_ATTENTION = ("qkv", "proj")
_ATTENTION_ALSO = {"q_norm", "k_norm", "attn_drop", "norm", "gate", "proj_drop"}
_PROBE_TOKENS = 5
_SHOWN = 3  # unsupported layers that an error names


class TokenMerging:
    """What :func:`merge_tokens` did to a model.

    ``merged`` maps the name of each block that merges to the number of pairs, ``skipped`` the name of each block that
    does not to the reason. The blocks and their attention have other classes meanwhile; parameters, buffers, hooks and
    submodules are untouched.

    Source:
        Token Merging: Your ViT But Faster, arXiv 2210.09461.
    """

    def __init__(self):
        self.merged: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self._trace: Trace | None = None
        self._schedule: tuple[int, ...] = ()
        self._prefix, self._padded = 0, False
        self._model: nn.Module | None = None
        self._classes: list[tuple[nn.Module, type]] = []

    def num_tokens(self, tokens: int) -> list[int]:
        """How many tokens leave each block if ``tokens`` enter the first, prefix tokens among them."""
        counts = []
        for r in self._schedule:
            tokens -= 0 if self._padded else max(0, min(r, (tokens - self._prefix) // 2))
            counts.append(tokens)
        return counts

    def source_map(self) -> Tensor:
        """(B, N) int64: which token of the last layer each token of the first went to, in the model's last call.

        ``effattn.visualize.merged_tokens`` paints it.

        Raises:
            RuntimeError: the model was not called yet, or ``trace_source`` is False.
        """
        if self._trace is None:
            raise RuntimeError("source_map: the sources are not traced; merge_tokens(model, r, trace_source=True) does")
        if self._trace.source is None:
            raise RuntimeError("source_map: the model was not called since it merges tokens")
        return self._trace.source

    def revert(self) -> None:
        """As :func:`restore`."""
        if self._model is None:
            return
        for module, original in self._classes:
            unpatch(module, original)
        for attribute in (_HANDLE, _GRID_READER):
            self._model.__dict__.pop(attribute, None)
        self.__init__()

    def __repr__(self) -> str:
        return f"TokenMerging(merged={self.merged})"


def merge_tokens(
    model: nn.Module,
    r: int | list[int] | tuple[int, float],
    *,
    threshold: float | None = None,
    trace_source: bool = False,
    size_weighted: bool = True,
    unmerge: bool | None = None,
    backend: str = "auto",
) -> TokenMerging:
    """Make the blocks of a vision transformer merge similar tokens, in place: fewer tokens in every further block.

    In each block, between attention and MLP, the r pairs of the most similar tokens become one token each, by
    :func:`effattn.bipartite_soft_matching` of the mean of the keys over the heads. The average is weighted by how many
    patches a token stands for, and so is attention (:func:`effattn.size_weighted_attention`), which stays fused; until
    the first merge it is plain. Class, distillation and register tokens are never merged and stay in front.

    It needs no training, and can be trained with. ``torch.compile(model, fullgraph=True)`` takes the patched model:
    patch first, compile then. Checkpointing must be torch's non-reentrant one, timm's default. Hooks stay; on a block
    they see a ``TokenStream``, on an attention its output and the keys. A merging model gets the new options.

    Args:
        model: a ViT or DeiT of timm or of its attribute names: ``blocks``, a sequence of blocks of ``norm1``, ``attn``
            (``qkv``, ``proj``, ``num_heads``), ``norm2`` and ``mlp``, with their layer scales, drop paths, query and
            key norms and gates. Each block is tried before anything is patched: it must compute what is expected of it.
        r: pairs to merge: an int for every block, a list with one int per block, or (r, inflection) as published: r on
            average, block i of L merging ``int(low + (high - low) * i / (L - 1))`` with
            ``low = int(r * (1 - inflection))`` and ``high = 2 * r - low``: inflection 0 is constant, -1 decreasing, 1
            increasing. At most half of the patches merge.
        threshold: in [-1, 1]: of the r pairs only those of at least this cosine similarity are merged. The number of
            tokens then stays the same, padding takes their place: this shows what merging costs and saves no time.
        trace_source: keep which token each patch went to: ``TokenMerging.source_map()``.
        size_weighted: whether attention counts a token as often as it stands for patches. Published advice: True for a
            model that was trained without merging, False for one that is trained with it.
        unmerge: whether each patch gets the row of its token after the last block, so that the model returns as many
            tokens as it took, and a mean over patches is one over patches. Default: unless the head reads the class
            token alone (``global_pool="token"``).
        backend: passed to the operators.

    Returns:
        TokenMerging: which blocks merge how many pairs, the source map, and ``revert()``.

    Raises:
        TypeError, ValueError: an argument is wrong; or the model is not supported: the message names layers and why.
        NotImplementedError: in a call of the patched model with an ``attn_mask`` or ``is_causal``, or of
            ``forward_intermediates``, whose features are on the grid of patches.

    Source:
        Token Merging: Your ViT But Faster (ToMe), arXiv 2210.09461; schedules as in its published code.

    Example:
        >>> import torch
        >>> from effattn.bench import vit
        >>> from effattn.integrations.timm import merge_tokens, restore
        >>> model, images = vit.VisionTransformer(vit.TINY).eval(), torch.randn(2, 3, 24, 24)
        >>> before = model(images)
        >>> merging = merge_tokens(model, 8)
        >>> merging.merged, merging.num_tokens(1 + 36)
        ({'blocks.0': 8, 'blocks.1': 8, 'blocks.2': 8}, [29, 21, 13])
        >>> model(images).shape
        torch.Size([2, 5])
        >>> restore(model)
        >>> torch.equal(model(images), before)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be an nn.Module, got {type(model).__name__}")
    for option, value in (("trace_source", trace_source), ("size_weighted", size_weighted)):
        if not isinstance(value, bool):
            raise TypeError(f"{_NAME}: {option} must be True or False, got {value!r}")
    if unmerge is not None and not isinstance(unmerge, bool):
        raise TypeError(f"{_NAME}: unmerge must be True, False or None, got {unmerge!r}")
    if threshold is not None:
        threshold = _checks.interval(_NAME, "threshold", threshold, -1.0, 1.0)
    blocks = model.blocks._modules if _HANDLE in vars(model) else _blocks(model)
    schedule = _schedule(r, len(blocks))
    prefix, distilled = _prefix(model)
    unmerge = _reads_patches(model, prefix) if unmerge is None else unmerge
    if _HANDLE in vars(model):
        restore(model)

    done = TokenMerging()
    done._schedule, done._prefix, done._padded, done._model = schedule, prefix, threshold is not None, model
    done._trace = Trace() if trace_source else None
    keeps_source = trace_source or unmerge
    common = (prefix, distilled, threshold, size_weighted, keeps_source, unmerge, done._trace)
    for index, (name, block) in enumerate(blocks.items()):
        layer = Layer(schedule[index], *common, last=index == len(blocks) - 1, backend=backend)
        done._classes += patch(block, layer)
        if layer.num_merged:
            done.merged[f"blocks.{name}"] = layer.num_merged
        else:
            done.skipped[f"blocks.{name}"] = "its r is 0"
    object.__setattr__(model, _HANDLE, done)
    if hasattr(model, _GRID_READER):
        object.__setattr__(model, _GRID_READER, _no_grid)
    return done


def restore(model: nn.Module) -> None:
    """Undo :func:`merge_tokens`: the model is what it was, bit for bit.

    Args:
        model: what :func:`merge_tokens` was called with, or a copy of it.

    Raises:
        ValueError: if ``model`` merges no tokens.

    Source:
        Token Merging: Your ViT But Faster, arXiv 2210.09461, of whose patch this is the inverse.

    Example:
        >>> from effattn.bench import vit
        >>> from effattn.integrations.timm import merge_tokens, restore
        >>> model = vit.VisionTransformer(vit.TINY)
        >>> _ = merge_tokens(model, 4)
        >>> type(model.blocks[0]).__name__
        'MergingBlock'
        >>> restore(model)
        >>> type(model.blocks[0]).__name__
        'Block'
    """
    handle = getattr(model, _HANDLE, None)
    if handle is None:
        raise ValueError("restore: model is not one that merge_tokens has patched")
    handle.revert()


def _no_grid(*args, **kwargs):
    raise NotImplementedError(f"{_GRID_READER}: merged tokens are not on the grid of patches; restore(model) first")


def _schedule(r, layers: int) -> tuple[int, ...]:
    if isinstance(r, list):
        if len(r) != layers:
            raise ValueError(f"{_NAME}: r must have one number for each of the {layers} blocks, got {len(r)}")
        for number in r:
            _checks.integer(_NAME, "r", number, 0)
        return tuple(int(number) for number in r)
    inflection = 0.0
    if isinstance(r, tuple):
        if len(r) != 2:
            raise ValueError(f"{_NAME}: r as a tuple must be (r, inflection), got {r!r}; a list has one r per block")
        r, inflection = r
        inflection = _checks.interval(_NAME, "inflection", inflection, -1.0, 1.0)
    _checks.integer(_NAME, "r", r, 0)
    low = int(r * (1.0 - inflection))
    step = (2 * r - 2 * low) / max(layers - 1, 1)
    return (int(r),) if layers == 1 else tuple(int(low + step * index) for index in range(layers))


def _prefix(model: nn.Module) -> tuple[int, bool]:
    """How many tokens stand before the patches, and whether the second is a distillation token."""
    present = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    distilled = present[1] is not None
    count = getattr(model, "num_prefix_tokens", None)
    if count is None:
        count = sum(token.shape[1] for token in present if token is not None)
    return int(count), distilled


def _reads_patches(model: nn.Module, prefix: int) -> bool:
    return prefix == 0 or getattr(model, "global_pool", "token") != "token"


# ---- which models are supported ----


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name; a ValueError that names the layers where one cannot be patched."""
    blocks, reasons = getattr(model, "blocks", None), {}
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) and not _scripted(model):
        for name, block in blocks._modules.items():
            twice = sum(other is block for other in blocks) > 1
            reason = "it stands in the model more than once" if twice else _why_not(block)
            if reason:
                reasons[f"blocks.{name}"] = f"({type(block).__name__}) {reason}"
        if not reasons:
            return dict(blocks._modules)
    else:
        for name, module in model.named_modules():
            if isinstance(getattr(module, "attn", None), nn.Module):
                reason = _why_not(module) or "the model does not keep its blocks in one sequence named blocks"
                reasons[name] = f"({type(module).__name__}) {reason}"
    if not reasons:
        reasons["it"] = f"has no sequence named blocks of modules with {', '.join(_BLOCK)}"
    shown = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:_SHOWN])
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise ValueError(f"{_NAME}: {type(model).__name__} is not supported: {shown}{more}")


def _scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _why_not(block: nn.Module) -> str:
    """Why this block cannot merge tokens, or nothing."""
    attention = getattr(block, "attn", None)
    for module in (block, attention):
        if getattr(module, "window_size", None):
            return "has a window_size: its attention needs its tokens on a grid"
    reason = _unlike(block, _BLOCK, _BLOCK_ALSO, {"attn_mask", "is_causal"})
    if reason:
        return reason
    if LAYER in vars(block):
        return "is patched already, as a part of another model"
    reason = _unlike(attention, _ATTENTION, _ATTENTION_ALSO, {"attn_mask", "is_causal"})
    if not reason and not isinstance(getattr(attention, "num_heads", None), int):
        reason = "has no num_heads"
    return f"has an attention that {reason}" if reason else _difference(block)


def _unlike(module: nn.Module, needed: tuple[str, ...], also: set[str], arguments: set[str]) -> str:
    children = {name for name, child in module.named_children() if child is not None}
    missing = [name for name in needed if name not in children]
    if missing:
        return f"has no {', '.join(missing)}"
    more = children - set(needed) - also
    if more:
        return f"has {', '.join(sorted(more))}"
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if own:
        return f"has parameters or buffers of its own: {', '.join(own)}"
    if _scripted(module) or "forward" in vars(module):
        return "is scripted, or its forward was replaced"
    takes = set(list(inspect.signature(type(module).forward).parameters)[2:]) - arguments
    return f"takes {', '.join(sorted(takes))}" if takes else ""


@torch.no_grad()
def _difference(block: nn.Module) -> str:
    """Runs a few tokens through a shadow of the block, as it is and patched without merging."""
    shared = [*block.parameters(), *block.buffers()]
    width = getattr(block.attn.qkv, "in_features", None)
    if not shared or width is None:
        return "has an attention whose qkv is not a linear layer"
    like = next((tensor for tensor in shared if tensor.is_floating_point()), shared[0])
    if like.is_meta:
        return ""
    tried = _shadow(block)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    probe = (0.7 * torch.arange(2 * _PROBE_TOKENS * width, dtype=torch.float64)).sin().view(2, _PROBE_TOKENS, width)
    probe = probe.to(like.device, dtype)
    try:
        with torch.autocast(probe.device.type, enabled=False):
            plain = tried.attn(tried.norm1(probe)), tried(probe) - probe
            patch(tried, Layer(0, 0, False, None, True, False, False, None, last=True, backend="auto"))
            patched = tried.attn(tried.norm1(probe))[0], tried(probe) - probe
        rounding = 64 * torch.finfo(dtype).eps
        for what, before, after in zip(("attention", "block"), plain, patched):
            allowed = rounding * (before.abs().max() + (probe.abs().max() if what == "block" else 0))
            if before.shape != after.shape or not (before - after).abs().max() <= allowed:
                return f"computes something else than a pre-norm {what} of these parts"
    except Exception as error:  # noqa: BLE001  (whatever a foreign module raises)
        return f"does not run on {_PROBE_TOKENS} tokens: {type(error).__name__}: {error}"
    return ""


def _shadow(module: nn.Module) -> nn.Module:
    """The same module in evaluation mode, its parameters and buffers shared, without hooks."""
    shadow = module.__new__(type(module))
    shadow.__dict__.update(vars(module), training=False)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        shadow.__dict__[hooks] = collections.OrderedDict()
    children = {name: None if child is None else _shadow(child) for name, child in module._modules.items()}
    shadow.__dict__["_modules"] = children
    return shadow


__all__ = ["TokenMerging", "TokenStream", "merge_tokens", "restore"]
