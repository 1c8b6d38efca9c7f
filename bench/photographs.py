"""Tokens of real photographs: scikit-learn's two sample images, patchified as ViT-B/16 does.

Neighbouring patches of a photograph resemble each other and random tokens do not, so softmax rows, exponents and cache
behaviour are those of a model at work. The layout is a model's too: query, key and value are views of one packed
(B, N, 3, H, D) tensor, not three contiguous ones.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 16


def missing() -> str:
    """Why there are no photographs here, or nothing."""
    absent = [name for name, module in (("scikit-learn", "sklearn"), ("pillow", "PIL")) if not _installed(module)]
    return f"{' and '.join(absent)} not installed" if absent else ""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _images() -> Tensor:
    """china.jpg and flower.jpg as (2, 3, 427, 640), normalised to [-1, 1] as ViT does."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def images(batch: int, size: tuple[int, int]) -> Tensor:
    """(batch, 3, height, width): centre crops of the two photographs by turns, each pair mirrored relative to the last."""
    images, (height, width) = _images(), size
    zoom = max(height / images.shape[2], width / images.shape[3])
    size = (max(height, round(images.shape[2] * zoom)), max(width, round(images.shape[3] * zoom)))
    resized = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    crops = resized[:, :, top : top + height, left : left + width]
    return torch.stack([crops[i % 2].flip(-1) if (i // 2) % 2 else crops[i % 2] for i in range(batch)])


def patches(batch: int, grid: tuple[int, int]) -> Tensor:
    """(batch, h*w, 768)"""
    return F.unfold(images(batch, (grid[0] * PATCH, grid[1] * PATCH)), PATCH, stride=PATCH).transpose(1, 2)


def query_key_value(
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, layer-normalised and taken through one fixed random projection to 3*H*D; prefix tokens are random."""
    if missing():
        raise RuntimeError(f"no photographs: {missing()}")
    embedded = patches(batch, grid)
    prefix = torch.randn(1, num_prefix_tokens, embedded.shape[2], generator=generator).expand(batch, -1, -1)
    embedded = F.layer_norm(torch.cat([prefix, embedded], 1), embedded.shape[2:])
    projection = torch.randn(embedded.shape[2], 3 * heads * head_dim, generator=generator) * embedded.shape[2] ** -0.5
    packed = (embedded @ projection).to(dtype).to(device)
    assert packed.shape[1] == tokens, f"grid {grid} and {num_prefix_tokens} prefix tokens do not make {tokens} tokens"
    return packed.unflatten(2, (3, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
