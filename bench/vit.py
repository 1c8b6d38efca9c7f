"""A plain vision transformer with timm's attribute names and random weights: what token merging is tried and timed on.

ViT-S/16 and ViT-B/16 load timm's state dicts of the same models. Attention is ``F.scaled_dot_product_attention``, as in
timm. Class, distillation and register tokens are those of timm's ``VisionTransformer`` and DeiT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Architecture(NamedTuple):
    """ViT-S/16 at 224 x 224."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    image: int = 224
    classes: int = 1000


SMALL, BASE = Architecture(), Architecture(width=768, heads=12)
TINY = Architecture(width=24, depth=3, heads=3, patch=4, image=24, classes=5)  # for tests: 36 patches


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.attend(self.q_norm(query), self.k_norm(key), value)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout_p = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, attention: type[Attention] = Attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attention(dim, num_heads), Mlp(dim)
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """(B, 3, image, image) -> (B, classes).

    Args:
        architecture: sizes; ``SMALL`` or ``BASE``.
        attention: its class in every block.
        class_token, distilled, registers: which tokens stand before the patches, in this order.
        global_pool: what the head reads: "token" (the class token, with ``distilled`` the mean of both heads) or "avg".
        std: of the weights, 0.02 as published; small models learn from larger ones.
        seed: of the weights.
    """

    def __init__(
        self,
        architecture: Architecture = SMALL,
        *,
        attention: type[Attention] = Attention,
        class_token: bool = True,
        distilled: bool = False,
        registers: int = 0,
        global_pool: str = "token",
        std: float = 0.02,
        seed: int = 0,
    ):
        super().__init__()
        dim, self.global_pool, self.grad_checkpointing = architecture.width, global_pool, False
        self.num_prefix_tokens = class_token + distilled + registers
        patches = (architecture.image // architecture.patch) ** 2
        self.patch_embed = PatchEmbed(dim, architecture.patch)
        for name, count in (("cls_token", class_token), ("dist_token", distilled), ("reg_token", registers)):
            self.register_parameter(name, nn.Parameter(torch.empty(1, int(count), dim)) if count else None)
        self.pos_embed = nn.Parameter(torch.empty(1, patches + self.num_prefix_tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, architecture.heads, attention) for _ in range(architecture.depth)))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, architecture.classes)
        self.head_dist = nn.Linear(dim, architecture.classes) if distilled else None
        self._initialise(std, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, std: float, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                nn.init.trunc_normal_(parameter, std=std, generator=generator)

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], 1) + self.pos_embed
        if self.grad_checkpointing:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        x = self.forward_features(images)
        if self.global_pool == "avg":
            return self.head(x[:, self.num_prefix_tokens :].mean(1))
        if self.head_dist is not None:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])
