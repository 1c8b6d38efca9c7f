"""Attention of CSWin, Swin and HAT blocks: projections around the window operators, on the whole token grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops import cross_shaped_window_attention, window_attention
from ..ops.cross_shaped_window import PADDING
from ..reference import relative_position_index

REST_OF_A_BLOCK = ("norm1", "norm2", "mlp", "conv_block", "attn_mask")


class _GridAttention(nn.Module):
    """The parts that the three share: projections, the grid of a call, loading from the state dict of a block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        resolution,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        padding: str,
        paddings: tuple[str, ...],
        backend: str,
        like: dict,
    ):
        super().__init__()
        name = self._name = type(self).__name__
        _checks.module_options(name, *like.values(), qkv_bias=qkv_bias)
        _checks.integer(name, "dim", dim, 1)
        _checks.integer(name, "num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"{name}: dim {dim} must be a multiple of num_heads {num_heads}")
        if qk_scale is not None:
            qk_scale = _checks.real(name, "qk_scale", qk_scale)
        attn_drop = _checks.probability(name, "attn_drop", attn_drop)
        proj_drop = _checks.probability(name, "proj_drop", proj_drop)
        _checks.one_of(name, "padding", padding, paddings)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5  # as published, 0 means the default too
        self.resolution = None if resolution is None else _pair(name, "resolution", resolution, 1)
        self.padding, self.backend = padding, backend
        self.qkv = nn.Linear(dim, 3 * dim, qkv_bias, **like)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **like)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        grid = self._grid(x, grid)
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        return self.proj_drop(self.proj(self._attend(tokens, grid))).reshape(x.shape)

    def _attend(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        heads = 3, self.num_heads, self.head_dim
        query, key, value = self.qkv(tokens).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        dropout_p = self.attn_drop.p if self.training else 0.0
        return self._operator(query, key, value, grid, dropout_p).transpose(1, 2).flatten(2)

    def _operator(self, query: Tensor, key: Tensor, value: Tensor, grid, dropout_p: float) -> Tensor:
        raise NotImplementedError

    def _grid(self, x: Tensor, grid) -> tuple[int, int]:
        _checks.layer_input(self._name, "x", x, self.qkv)
        if x.dim() not in (3, 4) or x.shape[-1] != self.dim:
            raise ValueError(
                f"{self._name}: x must have shape (batch, h*w, {self.dim}) or (batch, h, w, {self.dim}), "
                f"got {tuple(x.shape)}"
            )
        if grid is not None:
            grid = _checks.pair_of_integers(self._name, "grid", grid, 0)
        if x.dim() == 4:
            if grid not in (None, tuple(x.shape[1:3])):
                raise ValueError(f"{self._name}: grid must be that of x, {tuple(x.shape[1:3])}, or None, got {grid}")
            return x.shape[1], x.shape[2]
        grid = self.resolution if grid is None else grid
        if grid is None:
            raise ValueError(f"{self._name}: grid must be given for x of shape (batch, tokens, channels), got None")
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(
                f"{self._name}: x has {x.shape[1]} tokens, but grid {grid[0]} x {grid[1]} makes {grid[0] * grid[1]}"
            )
        return grid

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Take the attention out of the state dict of a whole block. A subclass that has the other parts loads them."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            part = name[len(prefix) :].split(".")[0]
            if part in REST_OF_A_BLOCK and not hasattr(self, part):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Branch(nn.Module):
    """Depthwise convolution of some heads' values, under its published name."""

    def __init__(self, channels: int, like: dict):
        super().__init__()
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **like)


class CrossShapedWindowAttention(_GridAttention):
    """Attention of a CSWin block: projections around :func:`effattn.cross_shaped_window_attention`.

        y = proj(softmax(s Q K^T) V + LePE(V)),   Q, K, V = qkv(x),   inside each stripe

    The first half of the heads has stripes of ``split_size`` columns, the second half of ``split_size`` rows; at the
    last stage every head has the whole grid. LePE is a depthwise 3 x 3 convolution, ``attns.0.get_v`` for the first half
    and ``attns.1.get_v`` for the second (at the last stage ``attns.0.get_v`` for all). q, k and v are read where qkv
    wrote them.

    ``attention.load_state_dict(block.state_dict())`` takes the attention out of the state dict of a published block and
    leaves ``norm1``, ``norm2`` and ``mlp``; other names that do not fit raise as usual. A block that *inherits* from
    this class and adds ``norm1``, ``norm2`` and ``mlp`` has the names of the published block, and a model of such blocks
    loads a published checkpoint. Norms, residual and drop path belong to the block.

    Args:
        dim: channels of the input and output.
        num_heads: H, even.
        split_size: stripe width in tokens.
        last_stage: one branch on the whole grid. As published, also where ``resolution`` is ``split_size``.
        resolution: side of a square grid or (h, w): the grid of calls that name none.
        qkv_bias: whether ``qkv`` has a bias; every published model has it.
        qk_scale: factor s of the scores; default and 0: head_dim ** -0.5.
        attn_drop: probability of zeroing an attention weight; above 0 training runs on the reference.
        proj_drop: probability of zeroing an element of the output. The published block takes it and never applies it.
        padding: where stripes do not divide the grid, "error", "zero_key" (as the official segmentation code) or "mask",
            as :func:`effattn.cross_shaped_window_attention`. One difference: where ``split_size`` is not below the larger
            side, each head here attends in the whole grid; the segmentation code pads that grid up to ``split_size``.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (B, h*w, dim) and ``grid=(h, w)``, or (B, h, w, dim) -> the same.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as
            :func:`effattn.cross_shaped_window_attention`.

    Source:
        CSWin Transformer, arXiv 2107.00652, sections 3.2 and 3.3; ``CSWinBlock`` and ``LePEAttention`` of
        ``models/cswin.py`` and ``segmentation/backbone/cswin_transformer.py``. Initialisation as published: linear
        weights truncated normal with deviation 0.02, their biases 0, convolutions torch's default.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.CrossShapedWindowAttention(64, num_heads=2, split_size=2)
        >>> attention(torch.randn(3, 8 * 6, 64), grid=(8, 6)).shape
        torch.Size([3, 48, 64])
        >>> sorted(name for name in attention.state_dict() if name.startswith("attns"))
        ['attns.0.get_v.bias', 'attns.0.get_v.weight', 'attns.1.get_v.bias', 'attns.1.get_v.weight']
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        split_size: int = 7,
        last_stage: bool = False,
        resolution: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        padding: str = "error",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        like = {"device": device, "dtype": dtype}
        super().__init__(
            *(dim, num_heads),
            resolution=resolution,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            padding=padding,
            paddings=PADDING,
            backend=backend,
            like=like,
        )
        if num_heads % 2:
            raise ValueError(f"{self._name}: num_heads must be even, got {num_heads}")
        _checks.integer(self._name, "split_size", split_size, 1)
        _checks.boolean(self._name, "last_stage", last_stage)
        self.split_size = split_size
        self.last_stage = last_stage or self.resolution == (split_size, split_size)
        branches = 1 if self.last_stage else 2
        self.attns = nn.ModuleList(_Branch(dim // branches, like) for _ in range(branches))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for branch in self.attns:
            branch.get_v.reset_parameters()

    def _operator(self, query, key, value, grid, dropout_p):
        weights, biases = zip(*((branch.get_v.weight, branch.get_v.bias) for branch in self.attns))
        return cross_shaped_window_attention(
            *(query, key, value, grid, max(*grid, 1) if self.last_stage else self.split_size),
            lepe_weight=weights[0] if self.last_stage else torch.cat(weights),
            lepe_bias=biases[0] if self.last_stage else torch.cat(biases),
            padding=self.padding,
            scale=self.scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, split_size={self.split_size}, last_stage={self.last_stage}, "
            f"padding={self.padding!r}"
        )


class WindowAttention(_GridAttention):
    """Attention of a Swin block or a HAT hybrid attention block: projections around :func:`effattn.window_attention`.

        y = proj(softmax(s Q K^T + B + M) V),   Q, K, V = qkv(x),   inside each window

    B is ``relative_position_bias_table`` at the relative position of query and key, M is -100 between tokens that only
    the cyclic shift brought together. The input is the whole grid: where the published block rolls, partitions, calls its
    attention with a mask, merges and rolls back, call this module alone.

    ``attention.load_state_dict(block.state_dict())`` takes the attention out of the state dict of a published block
    (``attn.*``; ``norm1``, ``norm2``, ``mlp``, ``conv_block`` and ``attn_mask`` are left), and that of a published
    attention module loads as well. Swin's holds the buffer ``relative_position_index`` too, which follows from the
    window; HAT's does not.

    Args:
        dim: channels of the input and output.
        window: side of a square window or (wh, ww).
        num_heads: H.
        shift: (sy, sx) or one number for both: the grid is rolled by so much before it is tiled; in published models
            0 and half a window in turn.
        resolution: side of a square grid or (h, w): the grid of calls that name none. As published, where its smaller
            side is not above the window, the window becomes that side and the shift 0. The shape of the bias table
            follows. A model for images of any size has none: the window stays.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor s of the scores; default and 0: head_dim ** -0.5.
        attn_drop: probability of zeroing an attention weight; above 0 training runs on the reference.
        proj_drop: probability of zeroing an element of the output.
        padding: where windows do not divide the grid. "error", "zero_key" or "mask" as :func:`effattn.window_attention`,
            or "input", as the official detection and segmentation code: zero tokens are added to the input at the bottom
            and right, so that their keys and values are the bias of ``qkv``. The two differ: "zero_key" adds zero keys
            and values on all four sides. Published dense-prediction checkpoints need "input"; it copies the input where
            it pads.
        index_buffer: whether the module's own state dict holds ``relative_position_index``, for going back to Swin's
            module. It is computed when it is saved and never kept.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (B, h*w, dim) and ``grid=(h, w)``, or (B, h, w, dim) -> the same.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.window_attention`.

    Source:
        Swin Transformer, arXiv 2103.14030, section 3.2; HAT, arXiv 2205.04437, section 3.2. ``WindowAttention`` and
        ``SwinTransformerBlock`` of ``models/swin_transformer.py``, ``WindowAttention`` and ``HAB`` of ``hat_arch.py``.
        Initialisation as published: table and linear weights truncated normal with deviation 0.02, biases 0.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.WindowAttention(96, window=7, num_heads=3, shift=3)
        >>> attention(torch.randn(2, 14 * 21, 96), grid=(14, 21)).shape
        torch.Size([2, 294, 96])
        >>> attention.relative_position_bias_table.shape
        torch.Size([169, 3])
    """

    def __init__(
        self,
        dim: int,
        window: int | tuple[int, int],
        num_heads: int,
        *,
        shift: int | tuple[int, int] = 0,
        resolution: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        padding: str = "error",
        index_buffer: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        like = {"device": device, "dtype": dtype}
        super().__init__(
            *(dim, num_heads),
            resolution=resolution,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            padding=padding,
            paddings=(*PADDING, "input"),
            backend=backend,
            like=like,
        )
        window = _pair(self._name, "window", window, 1)
        shift = _pair(self._name, "shift", shift, 0)
        if self.resolution is not None and (side := min(self.resolution)) <= min(window):
            window, shift = (side, side), (0, 0)
        if shift[0] >= window[0] or shift[1] >= window[1]:
            raise ValueError(f"{self._name}: shift must be below window {window}, got {shift}")
        _checks.boolean(self._name, "index_buffer", index_buffer)
        self.window, self.shift, self.index_buffer = window, shift, index_buffer
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _attend(self, tokens, grid):
        bottom, right = (-extent % size for extent, size in zip(grid, self.window))
        if self.padding != "input" or (bottom, right) == (0, 0):
            return super()._attend(tokens, grid)
        (height, width), padded = grid, (grid[0] + bottom, grid[1] + right)
        image = F.pad(tokens.unflatten(1, grid), (0, 0, 0, right, 0, bottom))
        return super()._attend(image.flatten(1, 2), padded).unflatten(1, padded)[:, :height, :width].flatten(1, 2)

    def _operator(self, query, key, value, grid, dropout_p):
        return window_attention(
            *(query, key, value, grid, self.window),
            shift=self.shift,
            bias_table=self.relative_position_bias_table,
            padding="error" if self.padding == "input" else self.padding,
            scale=self.scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        inner = f"{prefix}attn."  # its name in a block
        for name in [name for name in state_dict if name.startswith(inner) and not hasattr(self, "attn")]:
            state_dict[prefix + name[len(inner) :]] = state_dict.pop(name)
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.index_buffer:
            index = relative_position_index(self.window, (0, 0), "swin")
            destination[f"{prefix}relative_position_index"] = index.to(self.proj.weight.device)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, shift={self.shift}, padding={self.padding!r}"


class OverlappingCrossAttention(_GridAttention):
    """Attention of HAT's overlapping cross-attention block: projections around :func:`effattn.window_attention`.

        y = proj(softmax(s Q K^T + B) V),   Q, K, V = qkv(x)

    Queries of a window of M x M tokens meet the keys of the window enlarged to Mo = M + int(M * overlap_ratio). Beyond
    the grid keys and values are zeros that take part, with their bias. Rows of the bias table, (M + Mo - 1)^2 of them,
    are counted as published: the index of a query and a key goes below 0 and there counts from the end of the table.

    ``attention.load_state_dict(block.state_dict())`` takes the attention out of the state dict of a published block and
    leaves ``norm1``, ``norm2`` and ``mlp``. A block that inherits from this class and adds them has the published names.

    Args:
        dim: channels of the input and output.
        window: M, or (rows, columns) of a window.
        num_heads: H.
        overlap_ratio: enlargement relative to the window; int(M * overlap_ratio) must be even.
        resolution: side of a square grid or (h, w): the grid of calls that name none.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor s of the scores; default and 0: head_dim ** -0.5.
        padding: where windows do not divide the grid, as :func:`effattn.window_attention`; the published models pad the
            image and need "error" alone. "mask" also leaves out the zeros beyond the grid.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (B, h*w, dim) and ``grid=(h, w)``, or (B, h, w, dim) -> the same.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.window_attention`.

    Source:
        HAT, arXiv 2205.04437, section 3.2; ``OCAB`` of ``hat_arch.py``. Initialisation as published: table and linear
        weights truncated normal with deviation 0.02, biases 0.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.OverlappingCrossAttention(60, window=4, num_heads=2, overlap_ratio=0.5)
        >>> attention(torch.randn(2, 8 * 12, 60), grid=(8, 12)).shape
        torch.Size([2, 96, 60])
        >>> attention.relative_position_bias_table.shape
        torch.Size([81, 2])
    """

    def __init__(
        self,
        dim: int,
        window: int | tuple[int, int],
        num_heads: int,
        *,
        overlap_ratio: float = 0.5,
        resolution: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        padding: str = "error",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        like = {"device": device, "dtype": dtype}
        super().__init__(
            *(dim, num_heads),
            resolution=resolution,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=0.0,
            proj_drop=0.0,
            padding=padding,
            paddings=PADDING,
            backend=backend,
            like=like,
        )
        self.window = _pair(self._name, "window", window, 1)
        overlap_ratio = _checks.real(self._name, "overlap_ratio", overlap_ratio)
        extra = [int(size * overlap_ratio) for size in self.window]
        if any(pixels < 0 or pixels % 2 or pixels > _checks.LARGEST_INTEGER for pixels in extra):
            raise ValueError(
                f"{self._name}: overlap_ratio must enlarge window {self.window} by an even number of tokens, got "
                f"{overlap_ratio}, which adds {tuple(extra)}"
            )
        self.overlap = extra[0] // 2, extra[1] // 2
        rows = [2 * size + pixels - 1 for size, pixels in zip(self.window, extra)]
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows[0] * rows[1], num_heads, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _operator(self, query, key, value, grid, dropout_p):
        return window_attention(
            *(query, key, value, grid, self.window),
            overlap=self.overlap,
            bias_table=self.relative_position_bias_table,
            bias_index="hat_oca",
            padding=self.padding,
            scale=self.scale,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, overlap={self.overlap}, padding={self.padding!r}"


def _pair(op: str, name: str, value, minimum: int) -> tuple[int, int]:
    """(rows, columns) of one number for both or a pair."""
    if isinstance(value, (tuple, list)):
        return _checks.pair_of_integers(op, name, value, minimum)
    _checks.integer(op, name, value, minimum)
    return value, value


__all__ = ["CrossShapedWindowAttention", "OverlappingCrossAttention", "WindowAttention"]
