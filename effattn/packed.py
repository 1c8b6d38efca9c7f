"""Power-of-two weights in 4 bits (or 8): a tensor that holds codes and expands them on demand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from . import _checks
from .reference.shift_add import NIBBLE_BITS, decode, encode

SMALLEST_BITS, LARGEST_BITS = 2, 5
SCALES = ("none", "channel")


class PackedShiftWeight(Tensor):
    r"""An (N, K) weight of signed powers of two, stored as codes: w = scale * s * 2^p.

    To torch it is a tensor of shape (N, K) whose storage is two small tensors. It goes into a state dict, ``torch.save``
    and ``.to()`` as any tensor does (another dtype changes what ``dequantize()`` gives, not the codes), ``F.linear``
    with it runs :func:`effattn.shift_linear`, and any other operation sees ``dequantize()``. It cannot be written to,
    except by ``copy_`` from another one.

    Args:
        codes: uint8. Up to 4 bits: (N, ceil(K / 2)), two codes to a byte, the even column in the low half; a code is
            sign << 3 | e with value 2^(e - 7), and 0 is zero. 5 bits: (N, K), the bit pattern of float8_e5m2.
        scale: float32 (N,), a factor per output channel, or None.
        bits: 2 to 5; p lies in [-(2^(bits - 1) - 2), 0].
        columns: K.
        dtype: what it is to torch, floating point.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        DeepShift, arXiv 1905.13298, section 3; ShiftAddViT, arXiv 2306.06446, section 4.

    Example:
        >>> import torch, effattn
        >>> packed = effattn.quantize_power_of_two(torch.tensor([[1.0, -0.3, 0.0, 0.06]]))
        >>> packed.dequantize()
        tensor([[ 1.0000, -0.2500,  0.0000,  0.0625]])
        >>> packed.codes.shape, packed.nbytes
        (torch.Size([1, 2]), 2)
    """

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor | None, bits: int, columns: int, dtype: torch.dtype = torch.float32):
        _check(codes, scale, bits, columns)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"PackedShiftWeight: dtype must be floating point, got {dtype!r}")
        return Tensor._make_wrapper_subclass(cls, (codes.shape[0], columns), dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, bits, columns, dtype=torch.float32):
        self.codes, self.scale, self.bits, self.columns = codes, scale, bits, columns

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor: exact where there is no scale, else rounded once."""
        dtype = self.dtype if dtype is None else dtype
        if self.scale is None:
            return decode(self.codes, self.bits, self.columns, dtype)
        return (decode(self.codes, self.bits, self.columns) * self.scale[:, None]).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __repr__(self, *, tensor_contents=None) -> str:
        scale = "none" if self.scale is None else "channel"
        return f"PackedShiftWeight(shape={tuple(self.shape)}, bits={self.bits}, scale={scale!r}, device={self.device})"

    def __tensor_flatten__(self):
        return ["codes"] if self.scale is None else ["codes", "scale"], (self.bits, self.columns, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, outer_size, outer_stride):
        return cls(tensors["codes"], tensors.get("scale"), *context)

    def __reduce_ex__(self, protocol):
        return PackedShiftWeight, (self.codes, self.scale, self.bits, self.columns, self.dtype)

    def __deepcopy__(self, memo):
        return self._map(torch.clone)

    def _map(self, function, dtype: torch.dtype | None = None) -> PackedShiftWeight:
        scale = None if self.scale is None else function(self.scale)
        return PackedShiftWeight(function(self.codes), scale, self.bits, self.columns, dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            from .ops import shift_linear

            input, weight, bias = _linear_arguments(*args, **(kwargs or {}))
            if isinstance(weight, PackedShiftWeight) and not isinstance(input, PackedShiftWeight):
                return shift_linear(input, weight, bias)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._map(lambda t: t)
        if func is aten.clone.default:
            return args[0]._map(torch.clone)
        if func is aten._to_copy.default:
            moving = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking")}
            return args[0]._map(lambda t: t.to(**moving, copy=True), kwargs.get("dtype"))
        if func is aten.empty_like.default:
            device = kwargs.get("device")
            return args[0]._map(lambda t: torch.empty_like(t, device=device), kwargs.get("dtype"))
        if func is aten.copy_.default and isinstance(args[0], PackedShiftWeight):
            return args[0]._copy(args[1])
        if func._schema.is_mutable:
            raise TypeError(f"PackedShiftWeight cannot be changed by {func}; copy_ from another one can")
        return func(*tree_map(_expand, args), **tree_map(_expand, kwargs))

    def _copy(self, source: Tensor) -> PackedShiftWeight:
        if not isinstance(source, PackedShiftWeight):
            raise TypeError(f"PackedShiftWeight.copy_: source must be a PackedShiftWeight, got {type(source).__name__}")
        same = (self.shape, self.bits, self.scale is None) == (source.shape, source.bits, source.scale is None)
        if not same:
            raise ValueError(f"PackedShiftWeight.copy_: source must be like {self}, got {source}")
        self.codes.copy_(source.codes)
        if self.scale is not None:
            self.scale.copy_(source.scale)
        return self


torch.serialization.add_safe_globals([PackedShiftWeight])  # torch.load(weights_only=True) may build it


def quantize_power_of_two(weight: Tensor, *, bits: int = 4, scale: str = "none") -> PackedShiftWeight:
    r"""Round a weight to signed powers of two and pack it.

    .. math:: w = s\, 2^p,\quad s = \mathrm{sign}(W),\quad
        p = \mathrm{clamp}(\mathrm{round}(\log_2 |W / \mathrm{scale}|),\, -(2^{bits - 1} - 2),\, 0)

    Only an exact 0 becomes 0; what is too small becomes the smallest power.

    Args:
        weight: (N, K), floating point.
        bits: 2 to 5. 4 (p in [-6, 0]) is stored in half a byte a weight, 5 (the published range, [-14, 0]) in one.
        scale: "none" (published: magnitudes above 1 become 1) or "channel" (each row is divided by its largest
            magnitude, which is kept in float32).

    Returns:
        PackedShiftWeight: (N, K), on weight's device. Not differentiable; :class:`effattn.nn.ShiftLinear` trains.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        DeepShift, arXiv 1905.13298, section 3.

    Example:
        >>> import torch, effattn
        >>> effattn.quantize_power_of_two(torch.tensor([[3.0, 0.7]]), scale="channel").dequantize()
        tensor([[3.0000, 0.7500]])
    """
    op = "quantize_power_of_two"
    _checks.floating(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have shape (N, K), got {tuple(weight.shape)}")
    _check_bits(op, bits)
    _checks.one_of(op, "scale", scale, SCALES)
    if weight.dtype == torch.float32 and scale == "none":
        codes, factors = _encode_bits(weight.detach(), bits), None
    else:
        codes, factors = encode(weight, bits, scale == "channel")
    return PackedShiftWeight(codes, factors, bits, weight.shape[1])


def _encode_bits(weight: Tensor, bits: int) -> Tensor:
    """What ``encode`` gives, from the bits of float32: the exponent, one more from sqrt(2) of it on."""
    negative = (weight < 0).int()
    magnitude = (weight.view(torch.int32) & 0x7FFFFFFF).clamp_(max=0x7F800000)  # NaN counts as infinity
    lowest = 2 - 2 ** (bits - 1)
    exponent = magnitude.add_(0x4AFB0C).bitwise_right_shift_(23).sub_(127).clamp_(lowest, 0)
    if bits > NIBBLE_BITS:
        codes = (exponent.add_(15).bitwise_left_shift_(2) | (negative << 7)).to(torch.uint8)
        return codes.masked_fill_(weight == 0, 0).contiguous()
    codes = (exponent.add_(7) | (negative << 3)).to(torch.uint8).masked_fill_(weight == 0, 0)
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _linear_arguments(input, weight, bias=None):
    return input, weight, bias


def _expand(argument):
    return argument.dequantize() if isinstance(argument, PackedShiftWeight) else argument


def _check_bits(op: str, bits) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{op}: bits must be an int, got {bits!r}")
    if not SMALLEST_BITS <= bits <= LARGEST_BITS:
        raise ValueError(f"{op}: bits must be in {SMALLEST_BITS}..{LARGEST_BITS}, got {bits}")


def _check(codes, scale, bits, columns) -> None:
    op = "PackedShiftWeight"
    _check_bits(op, bits)
    _checks.integer(op, "columns", columns, 0)
    if not isinstance(codes, Tensor) or codes.layout != torch.strided or codes.dtype != torch.uint8:
        raise TypeError(f"{op}: codes must be a uint8 Tensor, got {getattr(codes, 'dtype', type(codes))}")
    width = columns if bits > NIBBLE_BITS else (columns + 1) // 2
    if codes.dim() != 2 or codes.shape[1] != width or not codes.is_contiguous():
        raise ValueError(f"{op}: codes must be contiguous with shape (N, {width}), got {tuple(codes.shape)}")
    if scale is None:
        return
    if not isinstance(scale, Tensor) or scale.layout != torch.strided or scale.dtype != torch.float32:
        raise TypeError(f"{op}: scale must be a float32 Tensor or None, got {getattr(scale, 'dtype', type(scale))}")
    if scale.shape != codes.shape[:1] or scale.device != codes.device or not scale.is_contiguous():
        raise ValueError(f"{op}: scale must be contiguous with shape ({codes.shape[0]},) on codes' device")
