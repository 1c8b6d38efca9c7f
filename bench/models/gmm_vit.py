"""GMM-ViT (arXiv 2309.05375): a ViT for small images, its scores multiplied by a learned mixture of Gaussians.

The published variant of ViT: no class token, the head reads the mean over patches, 9 blocks of 12 heads of 16 channels,
twice the width in the MLP. The eager form multiplies materialised scores by the materialised mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from effattn.nn import GaussianMixtureAttention
from effattn.reference.gaussian_mixture import mixture_mask

from . import DIGITS, EAGER, OURS, PUBLISHED, Model


class Architecture(NamedTuple):
    """Tiny-ImageNet's, of the authors' code."""

    image: int = 64
    patch: int = 8
    width: int = 192
    depth: int = 9
    heads: int = 12
    classes: int = 200


SMALL = Architecture(image=32, patch=8, width=48, depth=2, heads=3, classes=10)
TINY_IMAGENET = {PUBLISHED: Architecture(), DIGITS: SMALL}
IMAGENET = {PUBLISHED: Architecture(image=224, patch=16, classes=1000), DIGITS: SMALL}


class EagerAttention(GaussianMixtureAttention):
    """The same parameters; scores, mask and weights written out. The published code makes the mask anew in every call;
    here it is kept in inference, as long as its parameters stay what they are."""

    _kept: tuple = (None, None)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5
        weights = (scores * self._mask()).softmax(-1)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))

    def _mask(self) -> Tensor:
        alpha, sigma = self.mask.alpha, self.mask.sigma
        if torch.is_grad_enabled():
            return mixture_mask(alpha.flatten(1), sigma.flatten(1), self.grid, self.num_prefix_tokens)
        versions = alpha._version, sigma._version
        if self._kept[0] != versions:
            self._kept = versions, mixture_mask(alpha.flatten(1), sigma.flatten(1), self.grid, self.num_prefix_tokens)
        return self._kept[1]


class Block(nn.Module):
    def __init__(self, attention: type[GaussianMixtureAttention], dim: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention(dim, grid, num_heads=heads, head_dim=dim // heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GMMViT(nn.Module):
    def __init__(self, attention: type[GaussianMixtureAttention], architecture: Architecture):
        super().__init__()
        image, patch, width, depth, heads, classes = architecture
        grid = image // patch, image // patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, grid[0] * grid[1], width))
        self.blocks = nn.Sequential(*(Block(attention, width, heads, grid) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens).mean(1)))


def build(form: str, size: str, architectures: dict[str, Architecture] = TINY_IMAGENET) -> GMMViT:
    return GMMViT({OURS: GaussianMixtureAttention, EAGER: EagerAttention}[form], architectures[size])


def build_for_imagenet(form: str, size: str) -> GMMViT:
    """The same blocks on the 14 x 14 patches of a DeiT, which the paper does not have."""
    return build(form, size, IMAGENET)


MODELS = (
    Model("GMM-ViT", "arXiv 2309.05375, the authors' vit.py", build, batch=64, pixels=64, parameters=2.7),
    Model("GMM-ViT-224", "the same blocks on DeiT's patches, arXiv 2012.12877", build_for_imagenet),
)
