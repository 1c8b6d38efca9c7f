"""CSWin-T (arXiv 2107.00652): a pyramid of four stages, attention in stripes of one row or column to whole images.

The published architecture under the published parameter names: the official model's state dict loads in both forms.
Everything outside the attention (projections, MLPs, norms, convolutions) is PyTorch's in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from effattn.nn import CrossShapedWindowAttention

from ..window_peers import published_stripes
from . import DIGITS, EAGER, OURS, PUBLISHED, Model


class Architecture(NamedTuple):
    """Table 1's CSWin-T."""

    width: int = 64
    depths: tuple[int, ...] = (1, 2, 21, 1)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    stripes: tuple[int, ...] = (1, 2, 7, 7)
    classes: int = 1000


ARCHITECTURES = {
    PUBLISHED: Architecture(),
    DIGITS: Architecture(width=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), stripes=(1, 2, 2, 1), classes=10),
}


class Block(CrossShapedWindowAttention):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), under the published block's parameter names."""

    def __init__(self, dim: int, heads: int, stripe: int, last_stage: bool):
        super().__init__(dim, heads, split_size=stripe, last_stage=last_stage)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + super().forward(self.norm1(x), grid)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden)


class EagerBlock(Block):
    """The same parameters; attention by the published sequence of tensor passes."""

    def _operator(self, query, key, value, grid, dropout_p):
        lepe = [(branch.get_v.weight, branch.get_v.bias) for branch in self.attns]
        return published_stripes(query, key, value, grid, self.split_size, self.scale, lepe)


class Merge(nn.Module):
    """Half the resolution, twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, 2 * dim, 3, 2, 1), nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        x = self.conv(x.transpose(1, 2).contiguous().unflatten(2, grid))
        return self.norm(x.flatten(2).transpose(1, 2).contiguous()), tuple(x.shape[2:])


class CSWin(nn.Module):
    def __init__(self, block: type[Block], architecture: Architecture):
        super().__init__()
        width, depths, heads, stripes, classes = architecture
        # The published model has a parameterless rearrangement at index 1.
        self.stage1_conv_embed = nn.Sequential(nn.Conv2d(3, width, 7, 4, 2), _Tokens(), nn.LayerNorm(width))
        for stage in range(4):
            blocks = [block(width << stage, heads[stage], stripes[stage], stage == 3) for _ in range(depths[stage])]
            setattr(self, f"stage{stage + 1}", nn.ModuleList(blocks))
            if stage < 3:
                setattr(self, f"merge{stage + 1}", Merge(width << stage))
        self.norm, self.head = nn.LayerNorm(width << 3), nn.Linear(width << 3, classes)

    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[2] // 4, images.shape[3] // 4
        x = self.stage1_conv_embed(images)
        for stage in range(1, 5):
            for block in getattr(self, f"stage{stage}"):
                x = block(x, grid)
            if stage < 4:
                x, grid = getattr(self, f"merge{stage}")(x, grid)
        return self.head(self.norm(x).mean(1))


class _Tokens(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(2).transpose(1, 2)


def build(form: str, size: str) -> CSWin:
    return CSWin({OURS: Block, EAGER: EagerBlock}[form], ARCHITECTURES[size])


MODELS = (Model("CSWin-T", "arXiv 2107.00652, table 1", build, parameters=23),)
