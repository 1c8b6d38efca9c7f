"""RetNet's, ViR's and RMT's retention modules in eager PyTorch, with masks of N x N and the published parameter names.

RetNet's has its three forms, each with the row scale that torchscale divides by there. Decays and angles are float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def angles(positions, dim):
    rates = 10000 ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64)
    return positions[:, None].double() * rates


def turn(x, positions):
    """Pairs (a, b) as complex numbers a + ib times e^(i angle); x: (..., N, D)."""
    turned = torch.polar(torch.ones((), dtype=torch.float64), angles(positions, x.shape[-1]))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turned.real.to(x.dtype), turned.imag.to(x.dtype)
    return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1).flatten(-2)


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def retnet_gammas(heads):
    return 1 - 2.0 ** -(5 + torch.arange(heads, dtype=torch.float64))


def causal_powers(gammas, length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return torch.where(distance >= 0, gammas[:, None, None] ** distance.clamp(min=0), 0.0)


class RetNetRetention(nn.Module):
    def __init__(self, dim, value_dim, heads, gate=F.silu, eps=0.0):
        super().__init__()
        self.heads, self.gate, self.eps = heads, gate, eps
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.g_proj = nn.Linear(dim, value_dim, bias=False), nn.Linear(dim, value_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, dim, bias=False)

    def forward(self, x, form="parallel", chunk=4):
        positions, heads = torch.arange(x.shape[1]), self.heads
        query, key, value = (heads_of(proj(x), heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        key = key * key.shape[-1] ** -0.5
        query, key = turn(query, positions), turn(key, positions)
        gammas = retnet_gammas(heads)
        if form == "parallel":
            retained = self.parallel(query, key, value, gammas)
        elif form == "chunkwise":
            retained = self.chunkwise(query, key, value, gammas, chunk)
        else:
            retained = self.recurrent(query, key, value, gammas)
        normed = retained * (retained.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.out_proj(self.gate(self.g_proj(x)) * normed.transpose(1, 2).flatten(2))

    def parallel(self, query, key, value, gammas):
        mask = causal_powers(gammas, query.shape[2])
        mask = (mask / mask.sum(-1, keepdim=True).sqrt()).to(query.dtype)
        scores = query @ key.mT * mask
        return scores / scores.detach().abs().sum(-1, keepdim=True).clamp(1, 5e4) @ value

    def chunkwise(self, query, key, value, gammas, chunk):
        mask = causal_powers(gammas, chunk)
        sums = mask.sum(-1, keepdim=True)
        last = mask[:, -1:].mT / sums[:, -1:]  # decay to the end of the chunk, adding up to 1
        entering = gammas[:, None, None] ** torch.arange(1, chunk + 1)[:, None] * sums[:, -1:] / sums.sqrt()
        whole = gammas[:, None, None] ** chunk
        inner, last, entering, whole = (t.to(query.dtype) for t in (mask / sums.sqrt(), last, entering, whole))
        state, state_scale, out = 0, query.new_ones(()), []
        for q, k, v in zip(*(t.split(chunk, 2) for t in (query, key, value))):
            scores = q @ k.mT * inner
            score_scale = scores.detach().abs().sum(-1, keepdim=True).clamp(min=1)
            carried = (q * entering) @ (state / state_scale) if torch.is_tensor(state) else 0
            scale = torch.maximum(score_scale, state_scale)
            out.append(scores @ v / scale + carried * state_scale / scale)
            state = state * whole + k.mT @ (v * last)
            state_scale = state.detach().abs().sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1)
        return torch.cat(out, 2)

    def recurrent(self, query, key, value, gammas):
        gammas, state, scale, out = gammas[:, None, None].to(query.dtype), 0, 0, []
        for q, k, v in zip(*(t.unbind(2) for t in (query, key, value))):
            before, scale = scale, scale * gammas + 1
            state = state * (before**0.5 * gammas / scale.sqrt()) + k[..., None] * v[..., None, :] / scale.sqrt()
            out.append((q[..., None, :] @ state)[..., 0, :])
        return torch.stack(out, 2)


class ViRRetention(nn.Module):
    """The formula of the paper; names of timm's attention."""

    def __init__(self, dim, heads, norm=True):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, 1e-6) if norm else nn.Identity()

    def forward(self, x):
        query, key, value = (heads_of(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        mask = causal_powers(retnet_gammas(self.heads), x.shape[1]).to(x.dtype)
        retained = (query @ key.mT / math.sqrt(query.shape[-1]) * mask) @ value
        return self.proj(self.norm(retained.transpose(1, 2).flatten(2)))


class RMTRetention(nn.Module):
    """``VisionRetentionAll``, and ``VisionRetentionChunk`` with ``decomposed``."""

    def __init__(self, dim, heads, decomposed, initial=2.0, heads_range=4.0):
        super().__init__()
        self.heads, self.decomposed, self.initial, self.heads_range = heads, decomposed, initial, heads_range
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.lepe = nn.Sequential()
        self.lepe.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, height, width, dim = x.shape
        values = self.v_proj(x)
        lepe = self.lepe.conv(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        query, key, value = (heads_of(t.flatten(1, 2), self.heads) for t in (self.q_proj(x), self.k_proj(x), values))
        key = key * key.shape[-1] ** -0.5
        positions = torch.arange(height * width)
        query, key = turn(query, positions), turn(key, positions)
        exponents = self.initial + self.heads_range * torch.arange(self.heads, dtype=torch.float64) / self.heads
        decay = torch.log(1 - 2.0**-exponents)[:, None, None]
        y, x_ = positions // width, positions % width
        if self.decomposed:
            query, key, value = (t.unflatten(2, (height, width)) for t in (query, key, value))
            rows, columns = torch.arange(width), torch.arange(height)
            out = self.attend(query, key, value, decay[:, None] * (rows[:, None] - rows).abs())
            query, key, out = (t.transpose(2, 3) for t in (query, key, out))
            out = self.attend(query, key, out, decay[:, None] * (columns[:, None] - columns).abs())
            out = out.transpose(2, 3).flatten(2, 3)
        else:
            distance = (y[:, None] - y).abs() + (x_[:, None] - x_).abs()
            out = self.attend(query, key, value, decay * distance)
        return self.out_proj(out.transpose(1, 2).reshape(batch, height, width, dim) + lepe)

    @staticmethod
    def attend(query, key, value, added):
        return (query @ key.mT + added.to(query.dtype)).softmax(-1) @ value
