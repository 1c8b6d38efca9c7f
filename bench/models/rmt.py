"""RMT: a pyramid of four stages whose attention decays with the Manhattan distance on the token grid.

Names of parameters are the official code's: a published state dict loads but for its buffers ``Relpos.*``, which follow
from the architecture. Without stochastic depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effattn.nn import ManhattanAttention

from . import DIGITS, EAGER, OURS, PUBLISHED, Model


class Architecture(NamedTuple):
    """RMT-S: 27 M parameters."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 4, 18, 4)
    heads: tuple[int, ...] = (4, 4, 8, 16)
    heads_range: tuple[float, ...] = (4.0, 4.0, 6.0, 6.0)
    mlp_ratios: tuple[int, ...] = (4, 4, 3, 3)
    decomposed: tuple[bool, ...] = (True, True, True, False)
    projection: int = 1024
    classes: int = 1000


S = Architecture()
# 14 M parameters. The official code attends to the whole grid in the third stage too, where RMT-S decomposes.
T3 = S._replace(depths=(2, 2, 8, 2), mlp_ratios=(3, 3, 3, 3), decomposed=(True, True, False, False))
SMALL = Architecture((16, 32, 32, 32), (1, 1, 1, 1), (2, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), projection=64, classes=10)
SIZES = {("RMT-T3", PUBLISHED): T3, ("RMT-S", PUBLISHED): S, ("RMT-T3", DIGITS): SMALL, ("RMT-S", DIGITS): SMALL}


class EagerAttention(ManhattanAttention):
    """The same parameters; attention by the published sequence of tensor passes."""

    def positions(self, height: int, width: int) -> tuple[Tensor, ...]:
        """sin, cos and the masks that are added to scores; as published, anew in every forward pass."""
        log_decay = self.log_decay[:, None, None]

        def line(length: int) -> Tensor:
            index = torch.arange(length).to(log_decay)
            return (index[:, None] - index).abs()

        frequency = 10000 ** -torch.linspace(0, 1, self.key_dim // 2)
        angle = torch.arange(height * width)[:, None] * frequency.repeat_interleave(2)
        angle = angle.view(height, width, self.key_dim)
        if self.decomposed:
            return angle.sin(), angle.cos(), line(height) * log_decay, line(width) * log_decay
        distance = line(height)[:, None, :, None] + line(width)[:, None]
        return angle.sin(), angle.cos(), distance.reshape(height * width, -1) * log_decay

    def forward(self, x: Tensor, rel_pos=None) -> Tensor:
        sin, cos, *masks = rel_pos or self.positions(*x.shape[1:3])
        heads = self.num_heads, self.key_dim
        value = self.v_proj(x)
        enhanced = self.lepe.conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        query = self.q_proj(x).unflatten(3, heads).permute(0, 3, 1, 2, 4)  # (B, H, h, w, D)
        key = (self.k_proj(x) * self.key_dim**-0.5).unflatten(3, heads).permute(0, 3, 1, 2, 4)
        query, key = (t * cos + _every_two(t) * sin for t in (query, key))
        if self.decomposed:
            output = self._lines(query, key, value.unflatten(3, heads), *masks)
        else:
            value = value.unflatten(3, heads).permute(0, 3, 1, 2, 4).flatten(2, 3)
            output = _attend(query.flatten(2, 3), key.flatten(2, 3), value, *masks).transpose(1, 2)
        return self.out_proj(output.reshape(x.shape) + enhanced)

    @staticmethod
    def _lines(query: Tensor, key: Tensor, value: Tensor, mask_h: Tensor, mask_w: Tensor) -> Tensor:
        """Along x in every row, then along y in every column."""
        value = value.permute(0, 1, 3, 2, 4)  # (B, h, H, w, D)
        value = _attend(query.transpose(1, 2), key.transpose(1, 2), value, mask_w)
        columns = (t.permute(0, 3, 1, 2, 4) for t in (query, key))  # (B, w, H, h, D)
        return _attend(*columns, value.permute(0, 3, 2, 1, 4), mask_h).permute(0, 3, 1, 2, 4)


def _every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return (query @ key.mT + mask).softmax(-1) @ value


class Depthwise(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Linear(width, hidden), nn.Linear(hidden, width), Depthwise(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    def __init__(self, retention: nn.Module, width: int, hidden: int):
        super().__init__()
        self.retention_layer_norm, self.retention = nn.LayerNorm(width, eps=1e-6), retention
        self.final_layer_norm, self.ffn = nn.LayerNorm(width, eps=1e-6), FeedForward(width, hidden)
        self.pos = Depthwise(width)

    def forward(self, x: Tensor, rel_pos) -> Tensor:
        x = x + self.pos(x)
        x = x + self.retention(self.retention_layer_norm(x), rel_pos)
        return x + self.ffn(self.final_layer_norm(x))


class Downsample(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.reduction, self.norm = nn.Conv2d(width, outputs, 3, 2, 1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Stage(nn.Module):
    def __init__(self, architecture: Architecture, attention: type[ManhattanAttention], index: int):
        super().__init__()
        width, hidden = architecture.widths[index], architecture.mlp_ratios[index] * architecture.widths[index]
        options = {"decomposed": architecture.decomposed[index], "heads_range": architecture.heads_range[index]}
        self.blocks = nn.ModuleList(
            Block(attention(width, architecture.heads[index], **options), width, hidden)
            for _ in range(architecture.depths[index])
        )
        self.downsample = Downsample(width, architecture.widths[index + 1]) if index < 3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0].retention
        rel_pos = first.positions(*x.shape[1:3]) if isinstance(first, EagerAttention) else None
        for block in self.blocks:
            x = block(x, rel_pos)
        return self.downsample(x)


class Stem(nn.Module):
    """A quarter of the resolution."""

    def __init__(self, width: int):
        super().__init__()
        half, layers = width // 2, []
        for inputs, outputs, stride in ((3, half, 2), (half, half, 1), (half, width, 2), (width, width, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class RMT(nn.Module):
    def __init__(self, architecture: Architecture = S, attention: type[ManhattanAttention] = ManhattanAttention):
        super().__init__()
        self.patch_embed = Stem(architecture.widths[0])
        self.layers = nn.Sequential(*(Stage(architecture, attention, index) for index in range(4)))
        self.proj = nn.Linear(architecture.widths[-1], architecture.projection)
        self.norm = nn.BatchNorm2d(architecture.projection)
        self.head = nn.Linear(architecture.projection, architecture.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(self.layers(self.patch_embed(images)))
        x = F.silu(self.norm(x.permute(0, 3, 1, 2)))
        return self.head(x.mean((2, 3)))


def _model(name: str, parameters: float) -> Model:
    def build(form: str, size: str) -> RMT:
        return RMT(SIZES[name, size], {OURS: ManhattanAttention, EAGER: EagerAttention}[form])

    return Model(name, "arXiv 2309.11523, RMT.py and README of qhfan/RMT", build, parameters=parameters)


MODELS = (_model("RMT-T3", 14.0), _model("RMT-S", 27.0))
