"""Blocks of CSWin, Swin and HAT in eager PyTorch, which pad, roll, partition, attend with a mask and merge.

Parameter names are the published ones, so that a block's state dict is what a published checkpoint holds of it. The call
is the attention part alone: (B, h*w, C) and (h, w) -> (B, h*w, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def partition(image, window):
    """(B, h, w, C) -> (windows of all images, tokens of a window, C)."""
    batch, height, width, channels = image.shape
    tiles = image.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return tiles.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def merge(windows, window, grid):
    tiles = windows.view(-1, grid[0] // window[0], grid[1] // window[1], *window, windows.shape[-1])
    return tiles.transpose(2, 3).reshape(-1, *grid, windows.shape[-1])


def heads_of(windows, heads):
    return windows.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query, key, value, scale, added=0.0):
    return (((query * scale) @ key.mT + added).softmax(-1) @ value).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)


class CSWinBranch(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, qkv, heads, window, scale):
        """Three (B, h, w, C) -> one; symmetric padding, as the published segmentation code."""
        height, width = qkv[0].shape[1:3]
        down, right = -height % window[0], -width % window[1]
        top, left = down // 2, right // 2
        qkv = [F.pad(t, (0, 0, left, right - left, top, down - top)) for t in qkv]
        grid = qkv[0].shape[1:3]
        query, key, value = (partition(t, window) for t in qkv)
        images = value.unflatten(1, window).permute(0, 3, 1, 2)
        lepe = self.get_v(images).flatten(2).mT
        out = attend(*(heads_of(t, heads) for t in (query, key, value)), scale) + lepe
        return merge(out, window, grid)[:, top : top + height, left : left + width]


class CSWinBlock(Block):
    def __init__(self, dim, heads, split_size, last_stage=False, qkv_bias=True, qk_scale=None):
        super().__init__(dim)
        branches = 1 if last_stage else 2
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        self.attns = nn.ModuleList(CSWinBranch(dim // branches) for _ in range(branches))
        self.heads, self.split_size, self.scale = heads // branches, split_size, qk_scale or (dim // heads) ** -0.5

    def forward(self, x, grid):
        windows = [grid]
        if len(self.attns) == 2:
            windows = [(grid[0], self.split_size), (self.split_size, grid[1])]
        branches = [t.chunk(len(self.attns), -1) for t in self.qkv(x.unflatten(1, grid)).chunk(3, -1)]
        outs = [
            branch(qkv, self.heads, window, self.scale)
            for branch, qkv, window in zip(self.attns, zip(*branches), windows)
        ]
        return self.proj(torch.cat(outs, -1).flatten(1, 2))


class SwinAttention(nn.Module):
    def __init__(self, dim, window, heads, index_buffer=True, qkv_bias=True):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        rows, columns = 2 * window[0] - 1, 2 * window[1] - 1
        self.relative_position_bias_table = nn.Parameter(torch.randn(rows * columns, heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        tokens = [(y, x) for y in range(window[0]) for x in range(window[1])]
        index = [
            [(a - c + window[0] - 1) * columns + b - d + window[1] - 1 for c, d in tokens]  # query minus key
            for a, b in tokens
        ]
        self.register_buffer("relative_position_index", torch.tensor(index), persistent=index_buffer)

    def forward(self, windows, mask):
        query, key, value = (heads_of(t, self.heads) for t in self.qkv(windows).chunk(3, -1))
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(windows) // len(mask), 1, 1, 1)
        return self.proj(attend(query, key, value, self.scale, bias))


class SwinBlock(Block):
    """Of the detection code, which pads the input; on a grid of whole windows the same as that for classification."""

    def __init__(self, dim, window, heads, shift=(0, 0), **options):
        super().__init__(dim)
        self.attn = SwinAttention(dim, window, heads, **options)
        self.window, self.shift = window, shift
        if shift != (0, 0):
            self.register_buffer("attn_mask", torch.zeros(1))

    def forward(self, x, grid):
        image = F.pad(x.unflatten(1, grid), (0, 0, 0, -grid[1] % self.window[1], 0, -grid[0] % self.window[0]))
        padded, mask = image.shape[1:3], None
        if self.shift != (0, 0):
            image = image.roll((-self.shift[0], -self.shift[1]), (1, 2))
            region = torch.zeros(1, *padded, 1)
            slices = [(slice(-w), slice(-w, -s), slice(-s, None)) for w, s in zip(self.window, self.shift)]
            for number, (rows, columns) in enumerate((r, c) for r in slices[0] for c in slices[1]):
                region[:, rows, columns] = number
            region = partition(region, self.window)
            mask = torch.where(region == region.mT, 0.0, -100.0).to(x)
        out = merge(self.attn(partition(image, self.window), mask), self.window, padded)
        return out.roll(self.shift, (1, 2))[:, : grid[0], : grid[1]].flatten(1, 2)


class HATOverlappingBlock(Block):
    def __init__(self, dim, window, heads, overlap_ratio):
        super().__init__(dim)
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.enlarged = window + int(window * overlap_ratio)
        side = window + self.enlarged - 1
        self.relative_position_bias_table = nn.Parameter(torch.randn(side * side, heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        own, all_keys = ([(y, x) for y in range(s) for x in range(s)] for s in (window, self.enlarged))
        first = window - self.enlarged + 1
        self.index = torch.tensor([[(c - a + first) * side + d - b + first for c, d in all_keys] for a, b in own])

    def forward(self, x, grid):
        query, key, value = self.qkv(x.unflatten(1, grid)).chunk(3, -1)
        patches = [
            F.unfold(
                t.permute(0, 3, 1, 2), self.enlarged, padding=(self.enlarged - self.window) // 2, stride=self.window
            )
            .unflatten(1, (x.shape[-1], -1))
            .permute(0, 3, 2, 1)
            .flatten(0, 1)
            for t in (key, value)
        ]
        windows = (partition(query, (self.window, self.window)), *patches)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        out = attend(*(heads_of(t, self.heads) for t in windows), self.scale, bias)
        return self.proj(merge(out, (self.window, self.window), grid).flatten(1, 2))
