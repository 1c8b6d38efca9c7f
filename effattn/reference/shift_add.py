"""Shift-add attention and linear layers in plain PyTorch: the specification (arXiv 2306.06446; DeepShift, 1905.13298).

MatShift   w = s 2^p, s in {-1, 0, 1}, p = clamp(round(log2 |w / scale|), -(2^(bits-1) - 2), 0);   y = scale (x w^T) + bias
MatAdd     b(x) in {0, 1} or {-1, 1}: a product with b is a sum of selected or signed rows
attention  x^ = x / |x|;   U = V / 2 + b(q^) (b(k^)^T V) / pi;   O = U / |U| + depthwise convolution of V over tokens
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NIBBLE_BITS = 4  # codes of up to this many bits are stored two to a byte, wider ones as float8_e5m2
FIXED_ONE, FIXED_LOWEST, FIXED_HIGHEST = 2.0**16, -(2.0**31), (2.0**15 - 1) * 2.0**16


# ---- power-of-two weights ----


def encode(weight: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor | None]:
    """(codes, scale) of a dense (N, K) weight; the scale of a channel is its largest magnitude."""
    exact = weight.detach().double().contiguous()
    scale = None
    if per_channel:
        largest = exact.abs().amax(1) if exact.shape[1] else exact.new_zeros(exact.shape[0])
        scale = torch.where(largest > 0, largest, 1.0).float()
        exact = exact / scale[:, None]
    exponent = exact.abs().log2().round().clamp(-(2 ** (bits - 1) - 2), 0).nan_to_num()
    negative = (exact < 0).to(torch.uint8)
    if bits > NIBBLE_BITS:
        codes = (negative << 7) | ((exponent + 15).to(torch.uint8) << 2)
        return torch.where(exact == 0, 0, codes), scale
    codes = torch.where(exact == 0, 0, (negative << 3) | (exponent + 7).to(torch.uint8))
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale


def decode(codes: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense (N, K) weight without its scale: exact in every floating dtype."""
    if bits > NIBBLE_BITS:
        return codes.view(torch.float8_e5m2).to(dtype)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :columns].int()
    exponent = (nibbles & 7) - 7
    magnitude = torch.where(exponent > -7, torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent), 0.0)
    return torch.where(nibbles > 7, -magnitude, magnitude).to(dtype)


def shift_linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
    activation: str = "float",
) -> Tensor:
    """y = scale (x w^T) + bias; integer activations pass their gradient straight through."""
    weight = decode(codes, bits, input.shape[-1], input.dtype)
    output = input @ weight.T
    if scale is not None:
        output = output * scale.to(output.dtype)
    if bias is not None:
        output = output + bias.to(output.dtype)
    if activation == "float":
        return output
    with torch.no_grad():
        exact = _integer_activations[activation](input, weight, scale, bias).to(output.dtype)
    return exact + (output - output.detach()) if output.requires_grad else exact


def _int8_linear(input: Tensor, weight: Tensor, scale, bias) -> Tensor:
    """Each row in steps of its largest magnitude / 127; the sum is exact."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    step = torch.where(largest > 0, largest / 127, 1.0)
    output = ((x / step).round().double() @ (64 * weight).double().T).to(x.dtype) * (step / 64)
    if scale is not None:
        output = output * scale
    return output if bias is None else output + bias


def _fixed_point_linear(input: Tensor, weight: Tensor, scale, bias) -> Tensor:
    """y = sum_k s (x >> -p) in 16.16 fixed point, 32-bit integers that wrap around."""
    x = _to_fixed_point(input)
    total = x.new_zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float64)
    for shift in range(15):
        chosen = torch.where(weight.abs() == 2.0**-shift, weight.sign(), 0.0).double()
        total += (x >> shift).double() @ chosen.T
    if bias is not None:
        total += _to_fixed_point(bias).double()
    wrapped = (total.long() + 2**31) % 2**32 - 2**31
    return wrapped.to(torch.promote_types(input.dtype, torch.float32)) / FIXED_ONE


def _to_fixed_point(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x * FIXED_ONE).floor().clamp(FIXED_LOWEST, FIXED_HIGHEST).long()


_integer_activations = {"int8": _int8_linear, "fixed16.16": _fixed_point_linear}


# ---- packed bits ----


def pack_signs(x: Tensor) -> Tensor:
    """Bit i of word w is x[32 w + i] > 0; the last word is filled with zeros."""
    bits = F.pad((x > 0).long(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32, device=x.device)).sum(-1)
    return ((words + 2**31) % 2**32 - 2**31).int().view(torch.uint32)


def unpack(packed: Tensor, length: int, values: str, dtype: torch.dtype) -> Tensor:
    """The first ``length`` bits of each row as 0 and 1 ("binary") or -1 and 1 ("sign")."""
    bits = (packed.view(torch.int32)[..., None] >> torch.arange(32, device=packed.device, dtype=torch.int32)) & 1
    bits = bits.flatten(-2)[..., :length].to(dtype)
    return 2 * bits - 1 if values == "sign" else bits


def add_matmul(packed: Tensor, dense: Tensor, values: str = "binary") -> Tensor:
    return unpack(packed, dense.shape[-2], values, dense.dtype) @ dense


def binary_matmul(left: Tensor, right: Tensor, length: int, values: str = "sign") -> Tensor:
    left, right = (unpack(packed, length, values, torch.float32) for packed in (left, right))
    return (left @ right.mT).int()


def hamming_attention(
    query_bits: Tensor,
    key_bits: Tensor,
    value: Tensor,
    head_dim: int,
    values: str = "sign",
    scale: float | None = None,
) -> Tensor:
    """O = softmax(scale * <q, k>) V with q and k of bits."""
    scale = head_dim**-0.5 if scale is None else scale
    scores = binary_matmul(query_bits, key_bits, head_dim, values).to(value.dtype)
    return (scale * scores).softmax(-1) @ value


# ---- linear angular attention with binary queries and keys ----


def binarize(x: Tensor, mode: str) -> Tensor:
    """b(x^) with the gradient of a clamped identity in x^; statistics and thresholds are constants."""
    normalized = _unit(x)
    if mode == "sign":
        hard, soft = torch.where(normalized > 0, 1.0, -1.0).to(x.dtype), normalized.clamp(-1, 1)
    else:
        soft = normalized.clamp(0, 1)
        if mode == "mean_threshold":
            hard = (normalized > normalized.mean()).to(x.dtype)
        else:
            dims = (-2, -1) if mode == "per_head" else None
            hard = (normalized > 0) * normalized.abs().mean(dims, keepdim=True)
    return hard.detach() + (soft - soft.detach())


def shift_add_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    binarize_mode: str = "published",
    residual_weight: Tensor | None = None,
) -> Tensor:
    query, key = binarize(query, binarize_mode), binarize(key, binarize_mode)
    output = _unit(0.5 * value + (query @ (key.mT @ value)) / math.pi)
    if residual_weight is None:
        return output
    if not value.numel():  # which a convolution refuses; the weight keeps its gradient of zeros
        return output + 0 * residual_weight.sum().to(value.dtype)
    weight, taps = residual_weight.to(value.dtype), residual_weight.shape[2]
    return output + F.conv2d(value, weight, padding=(taps // 2, 0), groups=value.shape[1])


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; a zero vector stays zero, and so does its gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm))
