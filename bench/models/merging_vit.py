"""ViT-S/16 that merges its tokens: ToMe (arXiv 2210.09461), in every block and with nothing to learn, and LTM
(arXiv 2407.15219), by learned masks between blocks.

The backbone is ``bench/vit.py``, of timm's names. Eager forms materialise the softmax of their attention, as the published
code does: sizes must be added to its scores.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effattn
from effattn.integrations.timm import merge_tokens
from effattn.nn import LearnableTokenMerge

from .. import vit
from ..token_merging_peers import published_attention, published_merge
from . import DIGITS, EAGER, OURS, PUBLISHED, Model

NOT_MERGED = "not merged"
SMALL = vit.Architecture(width=64, depth=2, heads=4, patch=8, image=32, classes=10)
STD = {PUBLISHED: 0.02, DIGITS: 0.15}


class Attention(vit.Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return effattn.scaled_dot_product_attention(query, key, value)


class EagerAttention(vit.Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(2, 3) * self.scale).softmax(-1) @ value


# ---- ToMe ----


class EagerBlocks(nn.Sequential):
    """The blocks of a model, each merging ``num_merged`` tokens as published."""

    def __init__(self, *blocks: vit.Block, num_merged: int):
        super().__init__(*blocks)
        self.num_merged = num_merged

    def forward(self, x: Tensor) -> Tensor:
        sizes = None
        for block in self:
            x, sizes = self._block(block, x, sizes)
        return x

    def _block(self, block: vit.Block, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        attention = block.attn
        packed = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind(0)
        if sizes is None:
            attended = attention.attend(query, key, value)
        else:
            attended = published_attention(query, key, value, sizes.squeeze(2))
        x = x + attention.proj(attended.transpose(1, 2).flatten(2))
        num_merged = min(self.num_merged, (x.shape[1] - 1) // 2)
        if num_merged > 0:
            x, sizes = published_merge(key.mean(1), x, sizes, num_merged)
        return x + block.mlp(block.norm2(x)), sizes


def build_tome(form: str, size: str, architecture: vit.Architecture = vit.SMALL, num_merged: int = 16) -> nn.Module:
    if size == DIGITS:
        architecture, num_merged = SMALL, 3
    model = vit.VisionTransformer(
        architecture, attention=EagerAttention if form == EAGER else vit.Attention, std=STD[size]
    )
    if form == OURS:
        merge_tokens(model, num_merged)
    elif form == EAGER:
        model.blocks = EagerBlocks(*model.blocks, num_merged=num_merged)
    return model


def tome(name: str, architecture: vit.Architecture, num_merged: int = 16, **options) -> Model:
    build = functools.partial(build_tome, architecture=architecture, num_merged=num_merged)
    return Model(name, f"arXiv 2210.09461, r = {num_merged}", build, others=(NOT_MERGED,), **options)


# ---- LTM ----


class Merge(LearnableTokenMerge):
    """One of the sequence of blocks: without the mask, which fits no further merging of fewer tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[0]


class EagerMerge(LearnableTokenMerge):
    """The same formula with its softmax written out."""

    def forward(self, tokens: Tensor) -> Tensor:
        leading, patches = tokens[:, : self.num_protected], tokens[:, self.num_protected :]
        mask = F.linear(self.norm(patches), self.weight) * self.dim**-0.5
        merged = mask.softmax(1).mT @ patches
        mask = mask - self.step_size * self._mask_gradient(patches, mask, merged)
        return torch.cat([leading, mask.softmax(1).mT @ patches], 1)


# Before which blocks 20 % of the patches go. The paper merges inside its blocks, by masks whose code is not public.
MERGES = {PUBLISHED: (3, 6, 9), DIGITS: (1,)}


def build_ltm(form: str, size: str) -> nn.Module:
    architecture = {PUBLISHED: vit.SMALL, DIGITS: SMALL}[size]
    attention, merge = {OURS: (Attention, Merge), EAGER: (EagerAttention, EagerMerge)}[form]
    model = vit.VisionTransformer(architecture, attention=attention, std=STD[size])
    patches, blocks = (architecture.image // architecture.patch) ** 2, []
    for index, block in enumerate(model.blocks):
        if index in MERGES[size]:
            blocks.append(merge(architecture.width, patches, architecture.classes, num_protected=1))
            patches = blocks[-1].num_merged_tokens
        blocks.append(block)
    model.blocks = nn.Sequential(*blocks)
    return model


MODELS = (
    tome("ToMe-ViT-S", vit.SMALL, parameters=22.1),
    Model("LTM-ViT-S", "arXiv 2407.15219; where it merges is our choice", build_ltm),
)
