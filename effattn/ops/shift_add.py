"""Linear angular attention with binary queries and keys (MatAdd attention of ShiftAddViT)."""

from __future__ import annotations

from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, cuda_kernel, register, triton_kernel

BINARIZE = ("published", "mean_threshold", "per_head", "sign")
_WHOLE_TENSOR = 2  # the first modes take their statistics over the whole tensor


def _linear_flops(query, key, value, *options) -> int:
    """k^T v and q (k^T v); an addition that a bit selects counts as a multiply-add does: two."""
    batch, heads, length, head_dim = query
    return 4 * batch * heads * length * head_dim * head_dim


shift_add = Operator(
    "shift_add_attention",
    family="shift_add",
    tensors=("query", "key", "value", "?residual_weight"),
    differentiable=("query", "key", "value", "residual_weight"),
    parameters=("residual_weight",),
    options="int binarize",
    saved={
        "context": lambda batch, heads, length, head_dim: (batch, heads, head_dim, head_dim),
        "statistics": lambda batch, heads, length, head_dim: (batch, heads, 4),
    },
    saves_output=False,
    mixes_batch=lambda *args: args[-1] < _WHOLE_TENSOR,
    flops=_linear_flops,
    whole=lambda *args: "heads" if args[-1] < _WHOLE_TENSOR else "",
)

register(
    "shift_add_attention",
    (Backend("cpu", cpu_kernel), Backend("cuda", cuda_kernel), Backend("triton", triton_kernel), REFERENCE),
)


def shift_add_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    binarize: str = "published",
    residual_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Linear angular attention with binary queries and keys: its products are sums of selected rows.

    .. math::
        U = \tfrac{1}{2} V + \tfrac{1}{\pi}\, b(\hat q)\, (b(\hat k)^\top V), \qquad
        O_n = \frac{U_n}{|U_n|} + \sum_t w_t V_{n + t - T / 2}, \qquad \hat x = \frac{x}{|x|}

    Cost is linear in the number of tokens. Gradients of query and key pass straight through the binarisation where
    x^ lies in [0, 1] ([-1, 1] for "sign"); statistics and thresholds are constants. A zero row counts as zero.

    Args:
        query, key, value: (B, H, N, D), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        binarize: what b is. "published": 1[x > 0] times the mean of |x^| over the whole tensor; "mean_threshold":
            1[x^ > the mean of x^ over the whole tensor]; both make a sample depend on its batch. "per_head": as
            "published" with the mean per sample and head. "sign": -1 or 1.
        residual_weight: (H, 1, T, 1), T odd (published: 9), floating point: a depthwise convolution of value over the
            tokens, zero padded, that is added to the output; or None.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, D), query's dtype. Differentiable in query, key, value and residual_weight.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4; Castling-ViT, arXiv 2211.10526 (the angular form).

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 4, 49, 32)
        >>> effattn.shift_add_attention(query, key, value, binarize="per_head").norm(dim=-1).mean()
        tensor(1.)
    """
    op = "shift_add_attention"
    _checks.attention_inputs(op, query, key, value)
    _checks.one_of(op, "binarize", binarize, BINARIZE)
    heads = query.shape[1]
    if residual_weight is not None:
        _checks.parameter(op, "residual_weight", residual_weight, query)
        shape = residual_weight.shape
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (heads, 1, 1) or shape[2] % 2 == 0:
            raise ValueError(
                f"{op}: residual_weight must have shape (H, 1, T, 1) with H = {heads} and T odd, got {tuple(shape)}"
            )
    query, key, value = _checks.autocast(query, key, value)
    backend = choose(op, backend, Problem(query.device.type, query.dtype, query.shape[3]))
    if backend == "reference":
        return reference.shift_add_attention(query, key, value, binarize, residual_weight)
    if residual_weight is not None:
        residual_weight = residual_weight[:, 0, :, 0].float().contiguous()
    return shift_add(backend, query, key, value, residual_weight, BINARIZE.index(binarize))
