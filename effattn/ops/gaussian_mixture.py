"""Gaussian-mixture-mask attention and its free-mask variant (ELM)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, register, triton_kernel

_QKV = ("query", "key", "value")

gaussian_mixture = Operator(
    "gaussian_mixture",
    family="gaussian_mixture",
    tensors=(*_QKV, "alpha", "sigma"),
    differentiable=(*_QKV, "alpha", "sigma"),
    parameters=("alpha", "sigma"),
    linear=("value",),
    options="SymInt grid_h, SymInt grid_w, SymInt num_prefix_tokens, float eps, float scale",
    axes=dict.fromkeys(("alpha", "sigma"), "gaussians heads"),
)

masked_product = Operator(
    "masked_product",
    family="gaussian_mixture",
    tensors=(*_QKV, "weight"),
    differentiable=(*_QKV, "weight"),
    parameters=("weight",),
    linear=("value",),
    options="float scale",
)

_BACKENDS = (Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE)
register("gaussian_mixture_attention", _BACKENDS)
register("masked_product_attention", _BACKENDS)


def gaussian_mixture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 0,
    eps: float = 1e-5,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention whose logits are multiplied by a learned mixture of Gaussians of the distance on the token grid.

    .. math::
        M_h(i, j) = \sum_k \alpha_{k,h} \exp\frac{-(x_i - x_j)^2 - (y_i - y_j)^2}{2 (\sigma_{k,h}^2 + \epsilon)}
        \qquad
        O = \mathrm{softmax}\left((s\, Q K^\top) \odot M\right) V

    ``M`` is 1 wherever query or key is a prefix (class) token. Where ``M`` goes to 0 the logit goes to 0, not to
    minus infinity: far keys keep their weight. The fused kernels never form an N x N tensor, forward or backward.

    Args:
        query, key, value: (B, H, P + h*w, D), float32, bfloat16, float16 or float64 (float64: reference only), any
            strides. P = ``num_prefix_tokens`` come first, then the grid in row-major order.
        alpha: (K, H), weight of each Gaussian, any sign.
        sigma: (K, H), width of each Gaussian in units of the grid spacing, any sign.
        grid: (h, w), rows and columns of the token grid.
        num_prefix_tokens: P, tokens that stand outside the grid.
        eps: added to ``sigma**2``; must keep ``sigma**2 + eps`` above 0.
        scale: factor s of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, P + h*w, D), query's dtype. Differentiable in query, key, value, alpha and sigma.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        "Toward a Deeper Understanding: RetNet Viewed through Convolution", arXiv 2309.05375, section 4.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 4, 1 + 6 * 5, 16)
        >>> alpha, sigma = 2 * torch.randn(5, 4), 10 + 10 * torch.randn(5, 4)
        >>> effattn.gaussian_mixture_attention(query, key, value, alpha, sigma, (6, 5), num_prefix_tokens=1).shape
        torch.Size([2, 4, 31, 16])
    """
    op = "gaussian_mixture_attention"
    query, key, value, scale, dropout_p, problem = _prepare(op, query, key, value, scale, dropout_p)
    height, width = _checks.grid_of_tokens(op, grid, query.shape[2], num_prefix_tokens)
    for name, tensor in (("alpha", alpha), ("sigma", sigma)):
        _checks.parameter(op, name, tensor, query)
    shape, heads = alpha.shape, query.shape[1]
    if len(shape) != 2 or shape[0] < 1 or shape[1] != heads:
        raise ValueError(f"{op}: alpha must have shape (K, H) with K >= 1 and H = {heads}, got {tuple(shape)}")
    if sigma.shape != shape:
        raise ValueError(f"{op}: sigma must have alpha's shape {tuple(alpha.shape)}, got {tuple(sigma.shape)}")
    eps = _checks.real(op, "eps", eps)
    if eps <= 0.0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    backend = choose(op, backend, problem)
    if backend == "reference":
        return reference.gaussian_mixture_attention(
            query, key, value, alpha, sigma, (height, width), num_prefix_tokens, eps, scale, dropout_p
        )
    alpha, sigma = _as_float32(alpha), _as_float32(sigma)
    return gaussian_mixture(backend, query, key, value, alpha, sigma, height, width, num_prefix_tokens, eps, scale)


def masked_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention whose logits are multiplied by a free matrix: the element-wise learnable mask (ELM).

    .. math:: O = \mathrm{softmax}\left((s\, Q K^\top) \odot W\right) V

    Args:
        query, key, value: (B, H, N, D), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        weight: (H, N, N), or (N, N) shared by all heads, any sign, any floating dtype.
        scale: factor s of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, D), query's dtype. Differentiable in query, key, value and weight.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        "Toward a Deeper Understanding: RetNet Viewed through Convolution", arXiv 2309.05375, section 4 (ELM).

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16)
        >>> uniform = effattn.masked_product_attention(query, key, value, torch.zeros(10, 10))
        >>> torch.allclose(uniform, value.mean(2, keepdim=True).expand_as(value), atol=1e-6)
        True
    """
    op = "masked_product_attention"
    query, key, value, scale, dropout_p, problem = _prepare(op, query, key, value, scale, dropout_p)
    _checks.parameter(op, "weight", weight, query)
    heads, tokens = query.shape[1:3]
    if tuple(weight.shape) not in ((tokens, tokens), (heads, tokens, tokens)):
        raise ValueError(
            f"{op}: weight must have shape (N, N) = {(tokens, tokens)} or (H, N, N) = {(heads, tokens, tokens)}, "
            f"got {tuple(weight.shape)}"
        )
    backend = choose(op, backend, problem)
    if backend == "reference":
        return reference.masked_product_attention(query, key, value, weight, scale, dropout_p)
    if weight.dtype != query.dtype:
        weight = weight.float()
    return masked_product(backend, query, key, value, weight if weight.dim() == 3 else weight[None], scale)


def _as_float32(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.float().contiguous()


def _prepare(op: str, query: Tensor, key: Tensor, value: Tensor, scale, dropout_p):
    _checks.attention_inputs(op, query, key, value)
    dropout_p = _checks.probability(op, "dropout_p", dropout_p)
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    query, key, value = _checks.autocast(query, key, value)
    return query, key, value, scale, dropout_p, Problem(query.device.type, query.dtype, query.shape[3], dropout_p)
