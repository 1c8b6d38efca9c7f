"""ShiftAddViT in the shape of PVT-v2-B0: attention of additions, projections of shifts, MLPs that choose for each token.

As published (``pvt_v2.py``, ``fmoe_fc.py``): attention with binary queries and keys, linear in the tokens, in the first
three stages and softmax attention in the last; no spatial reduction; both layers of an MLP are a mixture of a dense and a
shift layer, with a depthwise convolution between them; shift layers have a shift and a sign (DeepShift's "PS") of 5 bits.
What differs: activations are not rounded to fixed point, and the router has the gradient of a straight-through gate. Both
hold for both forms. No stochastic depth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effattn.nn import MixtureOfPrimitives, ShiftAddAttention, ShiftLinear

from . import DIGITS, EAGER, OURS, PUBLISHED, Model


class Architecture(NamedTuple):
    """PVT-v2-B0."""

    widths: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    classes: int = 1000


SIZES = {
    PUBLISHED: Architecture(),
    DIGITS: Architecture((16, 16, 32, 32), (1, 1, 1, 1), (1, 1, 2, 2), (2, 2, 2, 2), 10),
}


# ---- the eager form ----


class _StraightThrough(torch.autograd.Function):
    """f(x), whose gradient is x's."""

    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class EagerShiftLinear(ShiftLinear):
    """The same parameters; a dense weight is made of them in every call, as DeepShift's layer does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shift.data.clamp_(*self.shift_range)
        power = 2.0 ** _StraightThrough.apply(self.shift, torch.round)
        sign = _StraightThrough.apply(self.sign, lambda sign: sign.round().sign())
        return F.linear(x, power * sign, self.bias)


class EagerAttention(ShiftAddAttention):
    """The same parameters; attention by the published sequence of tensor passes."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = _binary(query), _binary(key)
        output = 0.5 * value + 1.0 / math.pi * (query @ (key.mT @ value))
        output = output / output.norm(dim=-1, keepdim=True) + self.dconv(value)
        return self.proj(output.transpose(1, 2).reshape(x.shape))


def _binary(x: Tensor) -> Tensor:
    x = x / x.norm(dim=-1, keepdim=True)
    hard, soft = torch.gt(x - x.mean(), 0).type(x.dtype), x.clamp(0, 1)
    return hard.detach() - soft.detach() + soft


class EagerMixture(MixtureOfPrimitives):
    """The same parameters; tokens sorted by expert and added up again as the published dispatcher does.

    Without its detour: it combines through exp and log.
    """

    def _dispatch(self, tokens: Tensor, gate: Tensor | None, choice: Tensor) -> Tensor:
        gate = tokens.new_ones(len(tokens)) if gate is None else gate
        gates = torch.zeros(len(tokens), 2, dtype=gate.dtype).scatter(1, choice[:, None], gate[:, None])
        sorted_experts, order = gates.nonzero().sort(0)
        index = gates.nonzero()[order[:, 1], 0]
        groups = tokens[index].split((gates > 0).sum(0).tolist())
        outputs = torch.cat([expert(group) for expert, group in zip(self.experts, groups)])
        weighted = outputs * gates[index].gather(1, sorted_experts[:, 1:])
        return torch.zeros_like(weighted).scatter(0, index[:, None].expand_as(weighted), weighted)


class Kind(NamedTuple):
    attention: type[ShiftAddAttention]
    shift: type[ShiftLinear]
    mixture: type[MixtureOfPrimitives]


KINDS = {
    OURS: Kind(ShiftAddAttention, ShiftLinear, MixtureOfPrimitives),
    EAGER: Kind(EagerAttention, EagerShiftLinear, EagerMixture),
}


# ---- the model ----


def _dense(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _shift(kind: Kind, inputs: int, outputs: int) -> ShiftLinear:
    """A dense layer's weights, rounded: the published model is made of a trained dense one."""
    return kind.shift.from_linear(_dense(inputs, outputs), bits=5, parametrization="PS")


def _mixture(kind: Kind, inputs: int, outputs: int) -> MixtureOfPrimitives:
    experts = _dense(inputs, outputs), _shift(kind, inputs, outputs)
    return kind.mixture(inputs, experts, noise=None, gate="straight_through")


def _additive_attention(kind: Kind, width: int, heads: int) -> ShiftAddAttention:
    attention = kind.attention(width, heads, True, fused_qkv=True, binarize="mean_threshold")
    attention.qkv, attention.proj = _shift(kind, width, 3 * width), _shift(kind, width, width)
    return attention


class SoftmaxAttention(nn.Module):
    """Of the last stage."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, _dense(width, 3 * width), _dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value)
        return self.proj(output.transpose(1, 2).flatten(2))


class Depthwise(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.dwconv(x.mT.unflatten(2, grid)).flatten(2).mT


class Mlp(nn.Module):
    def __init__(self, kind: Kind, width: int, hidden: int):
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = (
            _mixture(kind, width, hidden),
            Depthwise(hidden),
            _mixture(kind, hidden, width),
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))


class Block(nn.Module):
    def __init__(self, kind: Kind, attention: nn.Module, width: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), attention
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(kind, width, hidden)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x), grid)


class PatchEmbed(nn.Module):
    """Overlapping patches."""

    def __init__(self, inputs: int, width: int, patch: int, stride: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, width, patch, stride, patch // 2), nn.LayerNorm(width)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        image = self.proj(image)
        return self.norm(image.flatten(2).mT), image.shape[2:]


class ShiftAddViT(nn.Module):
    def __init__(self, architecture: Architecture, kind: Kind):
        super().__init__()
        inputs = 3
        for stage, (width, depth, heads) in enumerate(zip(*architecture[:3])):
            blocks = nn.ModuleList()
            for _ in range(depth):
                attention = SoftmaxAttention(width, heads) if stage == 3 else _additive_attention(kind, width, heads)
                blocks.append(Block(kind, attention, width, architecture.mlp_ratios[stage] * width))
            patch = (7, 4) if stage == 0 else (3, 2)
            setattr(self, f"patch_embed{stage + 1}", PatchEmbed(inputs, width, *patch))
            setattr(self, f"block{stage + 1}", blocks)
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(width, eps=1e-6))
            inputs = width
        self.head = _dense(inputs, architecture.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        image = images
        for stage in range(1, 5):
            x, grid = getattr(self, f"patch_embed{stage}")(image)
            for block in getattr(self, f"block{stage}"):
                x = block(x, grid)
            x = getattr(self, f"norm{stage}")(x)
            image = x.mT.unflatten(2, grid)
        return self.head(x.mean(1))


def _build(form: str, size: str) -> ShiftAddViT:
    return ShiftAddViT(SIZES[size], KINDS[form])


MODELS = (Model("ShiftAddViT", "arXiv 2306.06446, pvt_v2_b0 of GATECH-EIC/ShiftAddViT", _build),)
