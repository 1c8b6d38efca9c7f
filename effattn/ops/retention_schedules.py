"""What retention is given beside queries, keys and values: published decays, and rotation by position (xPos)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _checks, reference
from ..reference.retention import xpos_rotation


def rotate_xpos(x: Tensor, *, offset: int = 0, base: float = 10000.0) -> Tensor:
    r"""Turn pairs of neighbouring elements by an angle that grows with the position: the theta shift of RetNet and RMT.

    .. math::
        (x_{2m}, x_{2m+1}) \to (x_{2m} \cos a - x_{2m+1} \sin a,\; x_{2m+1} \cos a + x_{2m} \sin a), \qquad
        a = (\text{offset} + n)\, \text{base}^{-m / (D / 2 - 1)}

    Scores of turned queries and keys depend on the difference of their positions. Angles are computed in float64.

    Args:
        x: (..., N, D), D even, any floating dtype; row n is token n of the (flattened) sequence.
        offset: position of the first token.
        base: 10000 in both papers.

    Returns:
        Tensor: as ``x``, differentiable.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        Retentive Network, arXiv 2307.08621, section 2.1; RMT, arXiv 2309.11523.

    Example:
        >>> import torch, effattn
        >>> x = torch.randn(2, 4, 10, 16)
        >>> torch.allclose(effattn.rotate_xpos(x)[:, :, 3:], effattn.rotate_xpos(x[:, :, 3:], offset=3), atol=1e-6)
        True
    """
    op = "rotate_xpos"
    _checks.floating(op, "x", x)
    if x.dim() < 2 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have shape (..., N, D) with D even and at least 2, got {tuple(x.shape)}")
    _checks.integer(op, "offset", offset, 0)
    base = _checks.real(op, "base", base)
    if base <= 0:
        raise ValueError(f"{op}: base must be above 0, got {base}")
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return reference.rotate_xpos(x, offset, base)
    rotation = _rotation(x.shape[-2], x.shape[-1], int(offset), base, x.device)
    pairs = x.unflatten(-1, (-1, 2))
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # a complex view begins at an even element
    turned = torch.view_as_complex(pairs) * _checks.constant(rotation, x)  # one pass over x, which keeps its layout
    return torch.view_as_real(turned).flatten(-2)


@functools.lru_cache(maxsize=4)
def _rotation(length: int, head_dim: int, offset: int, base: float, device) -> Tensor:
    with torch.inference_mode(False):
        return torch.complex(*xpos_rotation(length, head_dim, offset, base, device)).to(torch.complex64)


def retnet_log_decay(num_heads: int, *, dtype: torch.dtype = torch.float64, device=None) -> Tensor:
    """RetNet's and ViR's decays: log(1 - 2 ** (-5 - h)), (H,), exact to the last bits of float64.

    Args:
        num_heads: H. From h = 20 on, 1 - 2 ** (-5 - h) is 1 in float32; its logarithm is not 0.
        dtype, device: of the result.

    Returns:
        Tensor: (H,).

    Raises:
        TypeError, ValueError: ``num_heads`` is no integer or below 0.

    Source:
        Retentive Network, arXiv 2307.08621, section 2.2; ViR, arXiv 2310.19731.

    Example:
        >>> import effattn
        >>> effattn.retnet_log_decay(2).exp()
        tensor([0.9688, 0.9844], dtype=torch.float64)
    """
    _checks.integer("retnet_log_decay", "num_heads", num_heads, 0)
    _check_factory("retnet_log_decay", dtype, device)
    return _log_decay(5.0 + torch.arange(num_heads, dtype=torch.float64, device=device), dtype)


def rmt_log_decay(
    num_heads: int, initial: float = 2.0, range: float = 4.0, *, dtype: torch.dtype = torch.float64, device=None
) -> Tensor:
    """RMT's decays: log(1 - 2 ** (-initial - range * h / H)), (H,), exact to the last bits of float64.

    Args:
        num_heads: H.
        initial, range: at least 0; published 2, and 4 to 6 by the size of the model.
        dtype, device: of the result.

    Returns:
        Tensor: (H,).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        RMT, arXiv 2309.11523; ``RetNetRelPos2d`` of its code.

    Example:
        >>> import effattn
        >>> effattn.rmt_log_decay(4).exp()
        tensor([0.7500, 0.8750, 0.9375, 0.9688], dtype=torch.float64)
    """
    op = "rmt_log_decay"
    _checks.integer(op, "num_heads", num_heads, 0)
    _check_factory(op, dtype, device)
    initial, range = (_checks.real(op, name, given) for name, given in (("initial", initial), ("range", range)))
    for name, given in (("initial", initial), ("range", range)):
        if given < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {given}")
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    return _log_decay(initial + range * heads / max(num_heads, 1), dtype)


def _check_factory(op: str, dtype, device) -> None:
    if dtype is None:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got None")
    _checks.module_options(op, device, dtype)


def _log_decay(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.log1p(-(2.0**-exponents)).to(dtype)
