"""Pictures of what token merging did."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _checks
from .ops import TokenMerge

_OP = "merged_tokens"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def merged_tokens(
    image,
    plan: TokenMerge | Tensor,
    grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 0,
    example: int = 0,
    border: tuple[int, int, int] | None = (255, 255, 255),
) -> Tensor:
    """Paint which patches of an image merged: every merged group in its mean colour, with a line around each token.

    Patches that merged with none stay as they are in the image. A group may lie in several places: one colour, apart.

    Args:
        image: (3, H, W) or (H, W, 3), a torch tensor or NumPy array, floating point in [0, 1] or uint8. One of
            (3, H, 3) counts as (3, H, W).
        plan: a TokenMerge, or a source map of it or of several layers: (N,) or (B, N) integers, the token that each
            patch went to, as ``TokenMerge.source_map()`` and the ``TokenMerging.source_map()`` of a patched model give.
        grid: (h, w), patches down and across, at most H and W.
        num_prefix_tokens: tokens before the patches (class token), not painted: N = num_prefix_tokens + h * w.
        example: which example of the batch the image is.
        border: colour of the lines, 0 to 255 each; None draws none.

    Returns:
        Tensor: (H, W, 3) uint8 on the CPU.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        After the figures of Token Merging: Your ViT But Faster, arXiv 2210.09461.

    Example:
        >>> import torch, effattn
        >>> image = torch.rand(3, 32, 32)
        >>> patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(1, 16, -1)
        >>> plan = effattn.bipartite_soft_matching(patches, 6)
        >>> effattn.visualize.merged_tokens(image, plan, (4, 4)).shape
        torch.Size([32, 32, 3])
    """
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    rows, columns = _checks.pair_of_integers(_OP, "grid", grid, 1)
    if rows > height or columns > width:
        raise ValueError(f"{_OP}: grid must be at most the image's {height} x {width} pixels, got {rows} x {columns}")
    if border is not None and (
        not isinstance(border, (tuple, list)) or len(border) != 3 or any(not 0 <= value <= 255 for value in border)
    ):
        raise ValueError(f"{_OP}: border must be three numbers in 0..255 or None, got {border!r}")
    source = _source(plan, example)
    _checks.integer(_OP, "num_prefix_tokens", num_prefix_tokens, 0)
    if len(source) != num_prefix_tokens + rows * columns:
        raise ValueError(
            f"{_OP}: plan has {len(source)} tokens, but grid {rows} x {columns} with "
            f"num_prefix_tokens={num_prefix_tokens} makes {num_prefix_tokens + rows * columns}"
        )
    _, groups = source[num_prefix_tokens:].unique(return_inverse=True)
    down, across = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    groups = groups.view(rows, columns)[down][:, across]  # of each pixel
    patches = torch.arange(rows * columns).view(rows, columns)[down][:, across]

    flat = groups.flatten()
    counts = flat.bincount().unsqueeze(1)
    sums = torch.zeros(len(counts), 3, dtype=torch.float64).index_add_(0, flat, pixels.flatten(0, 1))
    alone = _alone(groups, patches)
    painted = torch.where(alone.unsqueeze(2), pixels, (sums / counts)[groups])
    if border is not None:
        painted[_edges(groups)] = torch.tensor(border, dtype=torch.float64)
    return painted.round().clamp(0, 255).to(torch.uint8)


def _pixels(image) -> Tensor:
    """(H, W, 3) float64 in 0..255."""
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"{_OP}: image must be a Tensor or a NumPy array, got {type(image).__name__}")
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "fu":
            raise TypeError(f"{_OP}: image must be floating point or uint8, got {image.dtype}")
        image = torch.from_numpy(np.array(image))
    pixels = _on_cpu("image", image)
    if pixels.dim() != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise ValueError(f"{_OP}: image must have shape (3, H, W) or (H, W, 3), got {tuple(pixels.shape)}")
    if pixels.shape[0] == 3:
        pixels = pixels.permute(1, 2, 0)
    if pixels.dtype == torch.uint8:
        return pixels.double()
    if pixels.dtype not in _checks.FLOATING:
        raise TypeError(f"{_OP}: image must be floating point or uint8, got {pixels.dtype}")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(f"{_OP}: image must be in [0, 1] where it is floating point; undo the model's normalisation")
    return pixels.double() * 255


def _source(plan, example: int) -> Tensor:
    """(N,) int64."""
    source = plan.source_map() if isinstance(plan, TokenMerge) else plan
    if not isinstance(source, Tensor) or source.dtype not in INTEGERS:
        found = getattr(source, "dtype", type(source).__name__)
        raise TypeError(f"{_OP}: plan must be a TokenMerge or a Tensor of integers, got {found}")
    source = source.unsqueeze(0) if source.dim() == 1 else source
    if source.dim() != 2:
        raise ValueError(f"{_OP}: plan must have shape (N,) or (B, N), got {tuple(source.shape)}")
    _checks.integer(_OP, "example", example, 0)
    if example >= len(source):
        raise ValueError(f"{_OP}: example must be below the plan's batch of {len(source)}, got {example}")
    return _on_cpu("plan", source)[example].long()


def _on_cpu(name: str, tensor: Tensor) -> Tensor:
    _checks.strided(_OP, name, tensor)
    if tensor.is_meta:
        raise ValueError(f"{_OP}: {name} must have values, got a tensor on the meta device")
    return tensor.detach().cpu()


def _alone(groups: Tensor, patches: Tensor) -> Tensor:
    """Whether the group of a pixel has but one patch."""
    pairs = torch.stack([groups.flatten(), patches.flatten()], 1).unique(dim=0)
    return (pairs[:, 0].bincount() == 1)[groups]


def _edges(groups: Tensor) -> Tensor:
    """Pixels above or to the left of a pixel of another group."""
    edges = torch.zeros_like(groups, dtype=torch.bool)
    edges[:-1] |= groups[:-1] != groups[1:]
    edges[:, :-1] |= groups[:, :-1] != groups[:, 1:]
    return edges


__all__ = ["merged_tokens"]
