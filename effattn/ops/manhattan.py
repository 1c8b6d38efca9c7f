"""Attention whose weights decay with the Manhattan distance on the token grid (RMT)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, register, triton_kernel
from .cross_shaped_window import window
from .retention_checks import check_decay

DECAY = ("logits", "weights")
LOWEST = -1e30  # for a log_decay of -inf, whose product with a distance of 0 would be NaN


def _convolution_flops(attention, value, weight, *options) -> int:
    batch, heads, length, head_dim = value
    return 2 * batch * heads * length * head_dim * weight[2]


local_enhancement = Operator(
    "local_enhancement",
    family="local_enhancement",
    tensors=("attention", "value", "weight", "?bias"),
    differentiable=("value", "weight", "bias"),
    parameters=("weight", "bias"),
    options="SymInt grid_h, SymInt grid_w, SymInt num_prefix_tokens, SymInt size",
    passes="attention",
    linear=("attention", "value", "bias"),
    saved={},
    saves_output=False,
    flops=_convolution_flops,
)
"""attention + depthwise convolution of value over the grid, zero padded; prefix tokens keep their attention.

weight: (H, D, size * size), tap (y, x) at y * size + x; bias: (H, D); contiguous float32.
"""

register("manhattan_attention", (Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE))


def manhattan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    grid: tuple[int, int],
    *,
    decomposed: bool = False,
    decay: str = "logits",
    num_prefix_tokens: int = 0,
    lce_weight: Tensor | None = None,
    lce_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention that decays with the Manhattan distance of two tokens on their grid.

    .. math::
        D_{ij} = |y_i - y_j| + |x_i - x_j|, \qquad
        O = \mathrm{softmax}(s\, Q K^\top + \text{log\_decay}_h D)\, V + \mathrm{LCE}(V)

    and with ``decay="weights"`` :math:`O = (\mathrm{softmax}(s\, Q K^\top) \odot \gamma_h^D)\, V + \mathrm{LCE}(V)`, not
    renormalised.

    Args:
        query, key, value: (B, H, P + h*w, D), float32, bfloat16, float16 or float64 (float64: reference only), any
            strides. P = ``num_prefix_tokens`` come first, then the grid in row-major order.
        log_decay: (H,), natural logarithm of gamma, at most 0. On a GPU the values are not looked at.
        grid: (h, w), rows and columns of the token grid.
        decomposed: attend along x inside every row, with the decay of |dx|, then along y inside every column of that
            result, with the decay of |dy|: O(N ** 1.5) instead of O(N ** 2). Not with prefix tokens.
        decay: "logits", as in the official code, or "weights", as in the paper.
        num_prefix_tokens: P, tokens that stand outside the grid: at distance 0 from all, without LCE.
        lce_weight: (H*D, 1, T, T), T odd (published: 5), channel = head * D + d: depthwise convolution of value over the
            whole grid, zero padded, that is added to the output (local context enhancement); or None.
        lce_bias: (H*D,), or None.
        scale: factor s of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, P + h*w, D), query's dtype. Differentiable in query, key, value, log_decay, lce_weight and
        lce_bias.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        RMT: Retentive Networks Meet Vision Transformers, arXiv 2309.11523, section 3.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 4, 6 * 5, 16)
        >>> log_decay = effattn.rmt_log_decay(4)
        >>> effattn.manhattan_attention(query, key, value, log_decay, (6, 5), decomposed=True).shape
        torch.Size([2, 4, 30, 16])
    """
    op = "manhattan_attention"
    _checks.attention_inputs(op, query, key, value)
    check_decay(op, log_decay, query)
    height, width = _checks.grid_of_tokens(op, grid, query.shape[2], num_prefix_tokens)
    _checks.one_of(op, "decay", decay, DECAY)
    _checks.boolean(op, "decomposed", decomposed)
    if decomposed and num_prefix_tokens:
        raise ValueError(f"{op}: num_prefix_tokens must be 0 where decomposed is True, got {num_prefix_tokens}")
    _check_lce(op, query, lce_weight, lce_bias)
    dropout_p = _checks.probability(op, "dropout_p", dropout_p)
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    query, key, value = _checks.autocast(query, key, value)
    backend = choose(op, backend, Problem(query.device.type, query.dtype, query.shape[3], dropout_p))
    if backend == "reference":
        return reference.manhattan_attention(
            *(query, key, value, log_decay, (height, width), decomposed, decay, num_prefix_tokens),
            *(lce_weight, lce_bias, scale, dropout_p),
        )

    def attend(value: Tensor, size: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        whole = (height, width)
        if not height * width:  # prefix tokens only, all of them at distance 0
            whole, size, num_prefix_tokens = (num_prefix_tokens, 1), (max(num_prefix_tokens, 1), 1), 0
            table = _table(log_decay, size, decay, 0)
        else:
            table = _table(log_decay, size, decay, 1)
        return window(
            *(backend, query, key, value, table, None, None, *whole, *size, *size, 0, 0, 0, 0),
            *(num_prefix_tokens, False, decay == "weights", scale),
        )

    if decomposed:
        output = attend(attend(value, (1, width), 0), (height, 1), 0)
    else:
        output = attend(value, (height, width), num_prefix_tokens)
    if lce_weight is None:
        return output
    heads, head_dim = query.shape[1], query.shape[3]
    weight = lce_weight.reshape(heads, head_dim, lce_weight.shape[2] ** 2).float().contiguous()
    bias = None if lce_bias is None else lce_bias.reshape(heads, head_dim).float().contiguous()
    return local_enhancement(
        *(backend, output, value, weight, bias, height, width, num_prefix_tokens, lce_weight.shape[2])
    )


def _table(log_decay: Tensor, size: tuple[int, int], decay: str, unit: int) -> Tensor:
    """log_decay D by (dy, dx), or gamma^D: (H, 2 h - 1, 2 w - 1) float32; ``unit``: distance of neighbours."""
    plain = not torch.compiler.is_compiling() and type(log_decay) in (Tensor, torch.nn.Parameter)
    distances = (_kept_distances if plain else _distances)(*size, unit, log_decay.device)
    table = log_decay.float().clamp(min=LOWEST).view(-1, 1, 1) * _checks.constant(distances, log_decay)
    return table.exp() if decay == "weights" else table


def _distances(height: int, width: int, unit: int, device: torch.device) -> Tensor:
    dy, dx = (torch.arange(1 - extent, extent, device=device, dtype=torch.float32).abs() for extent in (height, width))
    return (dy[:, None] + dx) * unit


@functools.lru_cache(maxsize=64)  # of the sizes of a model: eight small tensor operations cost more than a small call
def _kept_distances(height: int, width: int, unit: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.utils._python_dispatch._disable_current_modes():
        return _distances(height, width, unit, device)


def _check_lce(op: str, query: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    channels = query.shape[1] * query.shape[3]
    if weight is None:
        if bias is not None:
            raise ValueError(f"{op}: lce_bias must be None where lce_weight is, got {type(bias).__name__}")
        return
    _checks.parameter(op, "lce_weight", weight, query)
    shape = tuple(weight.shape)
    if len(shape) != 4 or shape[:2] != (channels, 1) or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(
            f"{op}: lce_weight must have shape (H*D, 1, T, T) with H*D = {channels} and T odd, got {shape}"
        )
    if bias is not None:
        _checks.parameter(op, "lce_bias", bias, query)
        if tuple(bias.shape) != (channels,):
            raise ValueError(f"{op}: lce_bias must have shape (H*D,) = ({channels},), got {tuple(bias.shape)}")
