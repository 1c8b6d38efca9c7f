"""Attention inside windows of a token grid: cross-shaped stripes (CSWin), shifted windows (Swin), overlapping (HAT)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, cuda_kernel, register, triton_kernel
from ..reference.cross_shaped_window import stripe_window

PADDING = ("error", "zero_key", "mask")
BIAS_INDEX = ("swin", "hat_oca")
ORIENTATION = ("vertical", "horizontal")


def _window_flops(query, key, value, grid_h, grid_w, window_h, window_w, second_h, second_w, *rest) -> int:
    """Both products; every query meets all keys of its (enlarged) window, and the prefix tokens."""
    batch, heads, length, head_dim = query
    overlap_h, overlap_w, num_prefix_tokens = rest[2:5]
    first, second = (
        (height + 2 * overlap_h) * (width + 2 * overlap_w) + num_prefix_tokens
        for height, width in ((window_h, window_w), (second_h, second_w))
    )
    return 4 * batch * length * head_dim * (heads // 2 * first + (heads - heads // 2) * second)


def _halves(query, key, value, bias, lepe_weight, lepe_bias, grid_h, grid_w, *sizes) -> str:
    """Which windows a head has depends on its number, unless all have the same."""
    return "" if sizes[:2] == sizes[2:4] else "heads"


window = Operator(
    "window",
    family="cross_shaped_window",
    tensors=("query", "key", "value", "?bias", "?lepe_weight", "?lepe_bias"),
    differentiable=("query", "key", "value", "bias", "lepe_weight", "lepe_bias"),
    parameters=("bias", "lepe_weight", "lepe_bias"),
    linear=("value", "lepe_bias"),
    options="SymInt grid_h, SymInt grid_w, SymInt window_h, SymInt window_w, SymInt second_h, SymInt second_w, "
    "SymInt shift_h, SymInt shift_w, SymInt overlap_h, SymInt overlap_w, SymInt num_prefix_tokens, "
    "bool mask_padding, bool bias_weighs, float scale",
    flops=_window_flops,
    whole=_halves,
)
"""Heads 0 .. H/2 - 1 have windows (window_h, window_w), the others (second_h, second_w).

num_prefix_tokens: tokens before the grid, which all tokens see and which see all; only where one window is the grid.
bias_weighs: the bias multiplies the weights after softmax instead (prefix tokens: 1).

bias: (H, rows, columns) with rows = 2 window_h + 2 overlap_h - 1, columns alike: key minus query, both from the corner
of their own window. lepe_weight: (H, 9, D), lepe_bias: (H, D). All contiguous float32.
"""

CUDA_HEAD_DIM = 64
"""The largest head_dim that the CUDA kernels take."""

CUDA_BIAS_GRADIENT_TOKENS = 1024
"""The most tokens in a window whose bias table gets a gradient from the CUDA kernels."""


def _cuda(problem: Problem) -> tuple[bool, str]:
    if problem.dtype == torch.float32:
        return False, "the CUDA kernels of windows take bfloat16 and float16"
    if problem.head_dim > CUDA_HEAD_DIM:
        return False, f"the CUDA kernels of windows take head_dim up to {CUDA_HEAD_DIM}, got {problem.head_dim}"
    if problem.beyond_cuda:
        return False, problem.beyond_cuda
    return cuda_kernel(problem)


_BACKENDS = (Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), Backend("cuda", _cuda), REFERENCE)
for _name in ("cross_shaped_window_attention", "stripe_attention", "window_attention"):
    register(_name, _BACKENDS)


def cross_shaped_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    stripe_width: int,
    *,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: str = "error",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""CSWin attention: half of the heads attend in vertical stripes of the grid, the other half in horizontal ones.

    .. math:: O = \mathrm{softmax}(s\, Q K^\top) V + \mathrm{LePE}(V) \quad \text{inside each stripe}

    Heads 0 .. H/2 - 1 have stripes (h, ``stripe_width``), heads H/2 .. H - 1 stripes (``stripe_width``, w). Where
    ``stripe_width`` covers the grid (the last stage) every head attends everywhere. Tokens are read where they lie:
    nothing is partitioned or copied.

    Args:
        query, key, value: (B, H, h*w, D), H even, grid tokens in row-major order; float32, bfloat16, float16 or
            float64 (float64: reference only), any strides.
        grid: (h, w), rows and columns of the token grid.
        stripe_width: in tokens.
        lepe_weight: (H*D, 1, 3, 3) with channel = head * D + d, or (D, 1, 3, 3) shared by the heads: depthwise
            convolution of value, zero padded at the border of a stripe; or None.
        lepe_bias: as the first dimension of ``lepe_weight``, or None.
        padding: what to do where stripes do not divide the grid. "error": raise; "zero_key": zero tokens around the
            grid (the smaller half at the top and left) take part in the softmax with score 0, as in the official
            segmentation code; "mask": they do not take part.
        scale: factor s of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "triton", "cuda", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, h*w, D), query's dtype. Differentiable in query, key, value, lepe_weight and lepe_bias.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        CSWin Transformer, arXiv 2107.00652, sections 3.2 and 3.3.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 4, 6 * 4, 16)
        >>> effattn.cross_shaped_window_attention(query, key, value, (6, 4), 2).shape
        torch.Size([2, 4, 24, 16])
    """
    op = "cross_shaped_window_attention"
    grid = _stripes(op, query, key, value, grid, stripe_width)
    heads = query.shape[1]
    if heads % 2:
        raise ValueError(f"{op}: query must have an even number of heads, got {heads}")
    windows = tuple(stripe_window(grid, stripe_width, orientation) for orientation in ORIENTATION)
    return _attend(
        *(op, query, key, value, grid, windows),
        lepe=(lepe_weight, lepe_bias),
        padding=padding,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
        specification=lambda q, k, v, **options: reference.cross_shaped_window_attention(
            q, k, v, grid, stripe_width, **options
        ),
    )


def stripe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    stripe_width: int,
    *,
    orientation: str,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: str = "error",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention inside stripes of the grid, all heads in one orientation: one branch of CSWin attention.

    .. math:: O = \mathrm{softmax}(s\, Q K^\top) V + \mathrm{LePE}(V) \quad \text{inside each stripe}

    Args:
        query, key, value: (B, H, h*w, D), as :func:`cross_shaped_window_attention`; any H.
        grid: (h, w), rows and columns of the token grid.
        stripe_width: in tokens; a stripe that covers the grid makes this full attention.
        orientation: "vertical", stripes (h, ``stripe_width``), or "horizontal", stripes (``stripe_width``, w).
        lepe_weight, lepe_bias, padding, scale, dropout_p, backend: as :func:`cross_shaped_window_attention`.

    Returns:
        Tensor: (B, H, h*w, D), query's dtype. Differentiable in query, key, value, lepe_weight and lepe_bias.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        CSWin Transformer, arXiv 2107.00652, section 3.2.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 3, 6 * 4, 16)
        >>> effattn.stripe_attention(query, key, value, (6, 4), 2, orientation="horizontal").shape
        torch.Size([2, 3, 24, 16])
    """
    op = "stripe_attention"
    grid = _stripes(op, query, key, value, grid, stripe_width)
    _checks.one_of(op, "orientation", orientation, ORIENTATION)
    stripe = stripe_window(grid, stripe_width, orientation)
    return _attend(
        *(op, query, key, value, grid, (stripe, stripe)),
        lepe=(lepe_weight, lepe_bias),
        padding=padding,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
        specification=lambda q, k, v, **options: reference.stripe_attention(
            q, k, v, grid, stripe_width, orientation=orientation, **options
        ),
    )


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    overlap: tuple[int, int] = (0, 0),
    bias_table: Tensor | None = None,
    bias_index: str = "swin",
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: str = "error",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention inside the windows that tile the grid: Swin's, shifted or not, and HAT's overlapping ones.

    .. math:: O = \mathrm{softmax}(s\, Q K^\top + B + M) V + \mathrm{LePE}(V) \quad \text{inside each window}

    B is the relative position bias. M is -100 between tokens that only the cyclic shift brought into one window.
    Tokens are read where they lie: nothing is rolled, partitioned, unfolded or copied.

    Args:
        query, key, value: (B, H, h*w, D), grid tokens in row-major order; float32, bfloat16, float16 or float64
            (float64: reference only), any strides.
        grid: (h, w), rows and columns of the token grid.
        window: (wh, ww), rows and columns of a window.
        shift: (sy, sx), the grid is rolled by (-sy, -sx) before it is tiled; 0 <= sy < wh, 0 <= sx < ww.
        overlap: (oy, ox), keys and values come from the window enlarged by so many tokens on each side. Beyond the
            grid they are zeros that take part (logit = bias), as published; with ``padding="mask"`` they do not.
            Not together with ``shift`` or ``lepe_weight``.
        bias_table: ((2*wh + 2*oy - 1) * (2*ww + 2*ox - 1), H), floating point, one bias per relative position; or
            None.
        bias_index: row of the table for a query and a key. "swin": (dy + wh + oy - 1) * (2*ww + 2*ox - 1) + dx + ww +
            ox - 1 with (dy, dx) the query's position minus the key's; "hat_oca": HAT's, key minus query, which runs
            below 0 and counts from the end of the table there.
        lepe_weight, lepe_bias: as :func:`cross_shaped_window_attention`; after a shift, of the shifted windows.
        padding: what to do where windows do not divide the grid. "error": raise; "zero_key": zero tokens around the
            grid (the smaller half at the top and left) take part in the softmax; "mask": they do not.
        scale: factor s of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "triton", "cuda", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, h*w, D), query's dtype. Differentiable in query, key, value, bias_table, lepe_weight and
        lepe_bias; the gradients of the last three are bitwise repeatable.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Swin Transformer, arXiv 2103.14030, section 3.2; HAT, arXiv 2205.04437, section 3.2 (overlapping windows).

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 3, 8 * 8, 32)
        >>> table = torch.zeros(7 * 7, 3)
        >>> effattn.window_attention(query, key, value, (8, 8), (4, 4), shift=(2, 2), bias_table=table).shape
        torch.Size([2, 3, 64, 32])
    """
    op = "window_attention"
    _checks.attention_inputs(op, query, key, value)
    grid = _checks.grid_of_tokens(op, grid, query.shape[2], 0)
    window = _checks.pair_of_integers(op, "window", window, 1)
    shift = _checks.pair_of_integers(op, "shift", shift, 0)
    overlap = _checks.pair_of_integers(op, "overlap", overlap, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"{op}: shift must be below window {window}, got {shift}")
    if overlap != (0, 0) and shift != (0, 0):
        raise ValueError(f"{op}: overlap must be (0, 0) where shift is not, got overlap={overlap}, shift={shift}")
    if overlap != (0, 0) and lepe_weight is not None:
        raise ValueError(f"{op}: overlap must be (0, 0) where lepe_weight is given, got {overlap}")
    _checks.one_of(op, "bias_index", bias_index, BIAS_INDEX)
    if bias_table is not None:
        _checks.parameter(op, "bias_table", bias_table, query)
        rows, columns = (2 * w + 2 * o - 1 for w, o in zip(window, overlap))
        if tuple(bias_table.shape) != (rows * columns, query.shape[1]):
            raise ValueError(
                f"{op}: bias_table must have shape ({rows} * {columns}, H = {query.shape[1]}) for window {window} "
                f"with overlap {overlap}, got {tuple(bias_table.shape)}"
            )
    return _attend(
        *(op, query, key, value, grid, (window, window)),
        lepe=(lepe_weight, lepe_bias),
        padding=padding,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
        shift=shift,
        overlap=overlap,
        bias=(bias_table, bias_index),
        specification=lambda q, k, v, **options: reference.window_attention(
            *(q, k, v, grid, window),
            shift=shift,
            overlap=overlap,
            bias_table=bias_table,
            bias_index=bias_index,
            **options,
        ),
    )


def _stripes(op: str, query: Tensor, key: Tensor, value: Tensor, grid, stripe_width) -> tuple[int, int]:
    _checks.attention_inputs(op, query, key, value)
    grid = _checks.grid_of_tokens(op, grid, query.shape[2], 0)
    _checks.integer(op, "stripe_width", stripe_width, 1)
    return grid


def _attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    windows: tuple[tuple[int, int], tuple[int, int]],
    *,
    lepe: tuple[Tensor | None, Tensor | None],
    padding: str,
    scale: float | None,
    dropout_p: float,
    backend: str,
    specification,
    shift: tuple[int, int] = (0, 0),
    overlap: tuple[int, int] = (0, 0),
    bias: tuple[Tensor | None, str] = (None, "swin"),
) -> Tensor:
    dropout_p = _checks.probability(op, "dropout_p", dropout_p)
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    _checks.one_of(op, "padding", padding, PADDING)
    if padding == "error":
        _check_divides(op, grid, windows)
    _check_lepe(op, query, *lepe)
    query, key, value = _checks.autocast(query, key, value)
    beyond_cuda = _beyond_cuda((query, key, value, bias[0], *lepe), windows[0], overlap, bias[0])
    problem = Problem(query.device.type, query.dtype, query.shape[3], dropout_p, beyond_cuda=beyond_cuda)
    backend = choose(op, backend, problem)
    if backend == "reference":
        return specification(
            *(query, key, value),
            lepe_weight=lepe[0],
            lepe_bias=lepe[1],
            padding=padding,
            scale=scale,
            dropout_p=dropout_p,
        )
    return window(
        *(backend, query, key, value, _relative_bias(*bias, windows[0], overlap), *_taps(query, *lepe)),
        *(*grid, *windows[0], *windows[1], *shift, *overlap, 0, padding == "mask", False, scale),
    )


def _beyond_cuda(tensors, size, overlap, bias_table) -> str:
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if trains and bias_table is not None and size[0] * size[1] > CUDA_BIAS_GRADIENT_TOKENS:
        return (
            "the CUDA kernels of windows have a backward with a bias table for windows of up to "
            f"{CUDA_BIAS_GRADIENT_TOKENS} tokens, got {size[0] * size[1]}"
        )
    if overlap != (0, 0):
        return "the CUDA kernels of windows have no overlap"
    return ""


def _check_divides(op: str, grid, windows) -> None:
    for size in windows:
        for extent, by, side in zip(grid, size, ("height", "width")):
            if by and extent % by:
                raise ValueError(
                    f"{op}: windows of {size[0]} x {size[1]} do not divide the grid of {grid[0]} x {grid[1]} ({side} "
                    f"{extent} is no multiple of {by}); padding='zero_key' or 'mask' allows it"
                )


def _check_lepe(op: str, query: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    heads, head_dim = query.shape[1], query.shape[3]
    if weight is None:
        if bias is not None:
            raise ValueError(f"{op}: lepe_bias must be None where lepe_weight is, got {type(bias).__name__}")
        return
    _checks.parameter(op, "lepe_weight", weight, query)
    channels = weight.shape[0] if weight.dim() == 4 else 0
    if channels not in (heads * head_dim, head_dim) or tuple(weight.shape[1:]) != (1, 3, 3):
        raise ValueError(
            f"{op}: lepe_weight must have shape (H*D, 1, 3, 3) or (D, 1, 3, 3) with H = {heads} and D = {head_dim}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        _checks.parameter(op, "lepe_bias", bias, query)
        if tuple(bias.shape) != (channels,):
            raise ValueError(f"{op}: lepe_bias must have shape ({channels},) as lepe_weight, got {tuple(bias.shape)}")


def _relative_bias(table: Tensor | None, bias_index: str, size, overlap) -> Tensor | None:
    """The table as the kernels read it: by head, then by key minus query, row-major.

    Both published indices are affine in that difference, so one is the table backwards and the other the table rolled.
    """
    if table is None:
        return None
    rows, columns = (2 * w + 2 * o - 1 for w, o in zip(size, overlap))
    if bias_index == "swin":
        ordered = _checks.movable(table).flip(0)
    else:
        lowest = (2 - size[0] - 2 * overlap[0]) * columns + 2 - size[1] - 2 * overlap[1]
        ordered = _checks.movable(table).roll(-lowest, 0)
    return ordered.t().float().contiguous().view(-1, rows, columns)


def _taps(query: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight as (H, 9, D) and bias as (H, D)."""
    if weight is None:
        return None, None
    heads, head_dim = query.shape[1], query.shape[3]
    taps = weight.reshape(-1, head_dim, 9).transpose(1, 2).float()
    if bias is not None:
        bias = bias.reshape(-1, head_dim).float().expand(heads, head_dim).contiguous()
    return taps.expand(heads, 9, head_dim).contiguous(), bias
