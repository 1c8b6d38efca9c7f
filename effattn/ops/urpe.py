"""Softmax attention with Toeplitz matrices: a relative position bias, and URPE's coefficients on the weights."""

from __future__ import annotations

from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, register, triton_kernel
from .toeplitz_checks import check_causal, check_entries, grid_or_line, kernel_entries

relative = Operator(
    "relative",
    family="urpe",
    tensors=("query", "key", "value", "?coefficient", "?bias"),
    differentiable=("query", "key", "value", "coefficient", "bias"),
    parameters=("coefficient", "bias"),
    linear=("value",),
    options="SymInt grid_h, SymInt grid_w, bool is_causal, float scale",
)
"""O = (softmax(scale Q K^T + B) * C) V; coefficient, bias: (H, (2 h - 1)(2 w - 1)) contiguous float32, as in ``toeplitz``."""

register("urpe_attention", (Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE))


def urpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficient: Tensor | None,
    rpe_bias: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention with a relative position bias whose weights are multiplied with a Toeplitz matrix: URPE.

    .. math::
        O = (\mathrm{softmax}(s\, Q K^\top + B) \odot C)\, V, \qquad B_{ij} = b_{j-i},\; C_{ij} = c_{j-i}

    Rows are not normalised again. With ``coefficient`` None it is softmax attention with a bias.

    Args:
        query, key, value: (B, H, N, D), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        coefficient: (H, 2N - 1), c of any sign, entry (j - i) + N - 1 for query i and key j; with ``grid`` (H, 2h - 1,
            2w - 1), entry (dy + h - 1, dx + w - 1) of key minus query. H may be 1: shared. None: ones.
        rpe_bias: b, of the same form, or None: zeros. -inf masks; a row of nothing else gives 0.
        grid: (h, w), rows and columns of the token grid; None: a sequence.
        is_causal: token i sees tokens 0..i only.
        scale: factor s of the scores; default D ** -0.5.
        dropout_p: probability of zeroing an attention weight. Above 0 the reference serves the call.
        backend: "auto", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, D), query's dtype. Differentiable in query, key, value, coefficient and rpe_bias.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Your Transformer May Not be as Powerful as You Expect, arXiv 2205.13401, section 4.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 50, 16)
        >>> out = effattn.urpe_attention(query, key, value, torch.ones(1, 99))
        >>> torch.allclose(out, F.scaled_dot_product_attention(query, key, value), atol=1e-5)
        True
    """
    op = "urpe_attention"
    _checks.attention_inputs(op, query, key, value)
    size = grid_or_line(op, grid, query.shape[2])
    for name, entries in (("coefficient", coefficient), ("rpe_bias", rpe_bias)):
        if entries is not None:
            check_entries(op, name, entries, query, size, grid)
    check_causal(op, is_causal)
    dropout_p = _checks.probability(op, "dropout_p", dropout_p)
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    query, key, value = _checks.autocast(query, key, value)
    backend = choose(op, backend, Problem(query.device.type, query.dtype, query.shape[3], dropout_p))
    if backend == "reference":
        return reference.urpe_attention(query, key, value, coefficient, rpe_bias, grid, is_causal, scale, dropout_p)
    heads = query.shape[1]
    coefficient, rpe_bias = (None if t is None else kernel_entries(t, heads) for t in (coefficient, rpe_bias))
    return relative(backend, query, key, value, coefficient, rpe_bias, *size, is_causal, scale)
