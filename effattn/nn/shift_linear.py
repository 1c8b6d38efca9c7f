"""Linear layers whose weights are signed powers of two: trained, with DeepShift's parameters, and frozen to codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.shift_linear import ACTIVATIONS, shift_linear, shift_linear_ste
from ..packed import SCALES, PackedShiftWeight, quantize_power_of_two
from ..reference.shift_add import NIBBLE_BITS

PARAMETRIZATIONS = ("Q", "PS")


class _SignedPowerOfTwo(torch.autograd.Function):
    """w = scale * sign(round(sign)) * 2^round(shift); dshift = dw * w * ln 2, dsign = dw * scale * 2^round(shift)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(shift, sign, scale, lowest):
        return _sign(sign) * _magnitude(shift, scale, lowest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        shift, sign, scale, ctx.lowest = inputs
        ctx.save_for_backward(shift, sign, scale)

    @staticmethod
    def backward(ctx, grad_weight):
        shift, sign, scale = ctx.saved_tensors
        grad_sign = grad_weight * _magnitude(shift, scale, ctx.lowest)
        return math.log(2) * _sign(sign) * grad_sign, grad_sign, None, None


def _sign(sign: Tensor) -> Tensor:
    return sign.round().sign()


def _magnitude(shift: Tensor, scale: Tensor | None, lowest: int) -> Tensor:
    exponent = shift.round().clamp(lowest, 0).int()
    if shift.dtype == torch.float32:  # its bits, quicker than ldexp
        magnitude = ((exponent + 127) << 23).view(torch.float32)
    else:
        magnitude = torch.ldexp(torch.ones_like(shift), exponent)
    return magnitude if scale is None else magnitude * scale.to(magnitude.dtype).unsqueeze(1)


class ShiftLinear(nn.Module):
    r"""A trainable linear layer whose weights are signed powers of two.

    y = x w^T + bias with w = scale * s * 2^p, s in {-1, 0, 1} and p an integer in [-(2^(bits-1) - 2), 0], computed by
    :func:`effattn.shift_linear` on packed codes. With g = dL/dy and dw = g^T x, the gradients are straight-through:

    * ``"Q"``: one parameter ``weight``; w is weight rounded to the nearest power of two in log2; dweight = dw. Loads the
      state dict of an ``nn.Linear`` and of DeepShift's ``LinearShiftQ``.
    * ``"PS"``: parameters ``shift`` and ``sign``, as DeepShift's ``LinearShift``; s = sign(round(sign)), p = round(shift);
      dshift = dw * w * ln 2 and dsign = dw * scale * 2^p. DeepShift's own code passes dw to sign without the factor
      2^p. As published, a training call first clamps ``shift`` into its range, in place.

    In evaluation mode the packed weight is kept as long as the parameters are not written to; torch does not see a
    write through ``.data``, call ``eval()`` after one. A training call packs anew.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        bits: 2 to 5; 4 bits hold p in [-6, 0], the published 5 bits p in [-14, 0] (stored in a byte).
        scale: "none" (published) or "channel". With "Q" the scale of a channel is the largest magnitude of its weights
            at that moment, with "PS" it is the buffer ``scale`` (N,), 1 unless :meth:`from_linear` sets it. Neither
            receives a gradient.
        parametrization: "Q" or "PS".
        activation: "float", "int8" or "fixed16.16", as in :func:`effattn.shift_linear`.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (..., K) -> (..., N).

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.shift_linear`.

    Source:
        DeepShift, arXiv 1905.13298; initialisation as published: "PS" shift ~ U(-(2^(bits-1) - 2), 0), sign ~ U(-1, 1);
        "Q" and the bias as ``nn.Linear``. The usual start is a trained layer: :meth:`from_linear`.

    Example:
        >>> import torch, effattn
        >>> layer = effattn.nn.ShiftLinear.from_linear(torch.nn.Linear(64, 32), parametrization="PS")
        >>> layer(torch.randn(10, 64)).shape
        torch.Size([10, 32])
        >>> sorted(layer.state_dict())
        ['bias', 'shift', 'sign']
        >>> layer.pack().codes.shape  # two weights in a byte
        torch.Size([32, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        scale: str = "none",
        parametrization: str = "Q",
        activation: str = "float",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.module_options(type(self).__name__, device, dtype, bias=bias)
        _check_options(type(self).__name__, in_features, out_features, bits, scale, activation)
        if not isinstance(parametrization, str) or parametrization not in PARAMETRIZATIONS:
            raise ValueError(f'ShiftLinear: parametrization must be "Q" or "PS", got {parametrization!r}')
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.scale_mode, self.parametrization = bits, scale, parametrization
        self.activation, self.backend = activation, backend
        like = {"device": device, "dtype": dtype}
        shape = out_features, in_features
        for name in ("weight",) if parametrization == "Q" else ("shift", "sign"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **like)))
        if parametrization == "PS" and scale == "channel":
            self.register_buffer("scale", torch.ones(out_features, device=device, dtype=torch.float32))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **like)) if bias else None)
        self._cached: tuple[list, PackedShiftWeight] | None = None
        self.reset_parameters()

    @property
    def shift_range(self) -> tuple[int, int]:
        """Least and greatest p."""
        return 2 - 2 ** (self.bits - 1), 0

    def reset_parameters(self) -> None:
        if self.parametrization == "Q":
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.uniform_(self.shift, *self.shift_range)
            nn.init.uniform_(self.sign, -1, 1)
        if self.bias is not None:
            bound = self.in_features**-0.5 if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> ShiftLinear:
        """A ShiftLinear that starts from a trained layer: its rounded weights and a copy of its bias.

        ``options`` are those of the constructor, without the sizes. "PS": shift = log2|w / scale|, clamped, and sign =
        sign(w). Nothing is shared with ``linear``. A weight below the least power of two is rounded up to it, only an
        exact zero stays zero.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"ShiftLinear.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        options.setdefault("device", linear.weight.device)
        options.setdefault("dtype", linear.weight.dtype)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        with torch.no_grad():
            if layer.parametrization == "Q":
                layer.weight.copy_(linear.weight)
            else:
                layer._set_shift_and_sign(linear.weight.to(layer.shift.device))
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def _set_shift_and_sign(self, weight: Tensor) -> None:
        magnitude = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
        if self.scale_mode == "channel" and weight.numel():
            largest = magnitude.amax(1)
            self.scale.copy_(torch.where(largest > 0, largest, 1.0))
            magnitude = magnitude / self.scale.unsqueeze(1)
        self.shift.copy_(magnitude.log2().clamp(*self.shift_range))
        self.sign.copy_(weight.sign())

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self._weights())):
            return shift_linear(input, self.pack(), self.bias, activation=self.activation, backend=self.backend)
        if self.training and self.parametrization == "PS":
            self.shift.data.clamp_(*self.shift_range)
        return shift_linear_ste(
            input,
            self._dense(),
            self.bias,
            bits=self.bits,
            scale=self.scale_mode,
            activation=self.activation,
            backend=self.backend,
        )

    def _weights(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,) if self.parametrization == "Q" else (self.shift, self.sign)

    def _dense(self) -> Tensor:
        """What is rounded to w: for "PS" it is w already."""
        if self.parametrization == "Q":
            return self.weight
        return _SignedPowerOfTwo.apply(self.shift, self.sign, getattr(self, "scale", None), self.shift_range[0])

    def pack(self) -> PackedShiftWeight:
        """The weight as codes, without gradient."""
        if self.training or torch.compiler.is_compiling():
            return self._quantise()
        tensors = self._weights() if self._buffers.get("scale") is None else (*self._weights(), self.scale)
        if self._cached is not None:
            written, packed = self._cached
            if written == [(id(t), t._version, t.data_ptr()) for t in tensors]:
                return packed
        with torch.inference_mode(False):  # a later call with autograd can save what is kept
            packed = self._quantise()
        if not any(t.is_inference() or t.is_meta for t in tensors):
            self._cached = [(id(t), t._version, t.data_ptr()) for t in tensors], packed
        return packed

    def _quantise(self) -> PackedShiftWeight:
        with torch.no_grad():
            return quantize_power_of_two(self._dense().detach(), bits=self.bits, scale=self.scale_mode)

    def freeze(self) -> FrozenShiftLinear:
        """An inference-only module that holds only codes, scale and bias."""
        layer = FrozenShiftLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            bits=self.bits,
            scale=self.scale_mode,
            activation=self.activation,
            backend=self.backend,
            device="meta",
        )
        packed = self.pack()
        layer.codes = packed.codes.clone()
        layer.scale = None if packed.scale is None else packed.scale.clone()
        layer.bias = None if self.bias is None else self.bias.detach().clone()
        return layer.eval()

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the rounded weight."""
        return _dense_linear(self.pack(), self.bias, self._weights()[0].dtype, self.training)

    def train(self, mode: bool = True) -> ShiftLinear:
        self._cached = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._cached = None
        return _apply_but_keep_scale(self, super()._apply, fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, scale={self.scale_mode!r}, parametrization={self.parametrization!r}, "
            f"activation={self.activation!r}"
        )


class FrozenShiftLinear(nn.Module):
    """A shift layer for inference: its state dict holds the codes, half a byte per weight up to 4 bits.

    y = x w^T + bias by :func:`effattn.shift_linear`, where w = scale * s * 2^p is stored as ``codes``, (N, ceil(K / 2))
    uint8 up to 4 bits and (N, K) with 5, ``scale``, (N,) float32 with scale "channel", and ``bias``. All are buffers:
    nothing here is trained. Made by :meth:`ShiftLinear.freeze`, or empty, to load a state dict into.

    Args:
        in_features, out_features, bias, bits, scale, activation, backend: as :class:`ShiftLinear`.
        device, dtype: of the buffers; dtype is the bias's.

    Shape:
        (..., K) -> (..., N).

    Raises:
        TypeError, ValueError: as :class:`ShiftLinear`.

    Source:
        DeepShift, arXiv 1905.13298; the packed storage is this library's.

    Example:
        >>> import torch, effattn
        >>> layer = effattn.nn.ShiftLinear(64, 32).eval()
        >>> frozen = effattn.nn.FrozenShiftLinear(64, 32)
        >>> _ = frozen.load_state_dict(layer.freeze().state_dict())
        >>> x = torch.randn(10, 64)
        >>> torch.equal(frozen(x), layer(x))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        scale: str = "none",
        activation: str = "float",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.module_options(type(self).__name__, device, dtype, bias=bias)
        _check_options(type(self).__name__, in_features, out_features, bits, scale, activation)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.scale_mode, self.activation, self.backend = bits, scale, activation, backend
        columns = (in_features + 1) // 2 if bits <= NIBBLE_BITS else in_features
        self.register_buffer("codes", torch.zeros(out_features, columns, dtype=torch.uint8, device=device))
        has_scale = scale == "channel"
        self.register_buffer(
            "scale", torch.ones(out_features, dtype=torch.float32, device=device) if has_scale else None
        )
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

        self._packed: PackedShiftWeight | None = None

    def pack(self) -> PackedShiftWeight:
        """The codes as one tensor; it shares their memory."""
        codes, scale, packed = self.codes, self.scale, self._packed
        if packed is None or packed.codes is not codes or packed.scale is not scale:
            packed = PackedShiftWeight(codes, scale, self.bits, self.in_features)
            if not torch.compiler.is_compiling():
                self._packed = packed
        return packed

    def forward(self, input: Tensor) -> Tensor:
        return shift_linear(input, self.pack(), self.bias, activation=self.activation, backend=self.backend)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, in the bias's dtype (float32 without a bias)."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return _dense_linear(self.pack(), self.bias, dtype, self.training)

    def _apply(self, fn, recurse=True):
        self._packed = None
        return _apply_but_keep_scale(self, super()._apply, fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, scale={self.scale_mode!r}, activation={self.activation!r}"
        )


def _check_options(name: str, in_features, out_features, bits, scale, activation) -> None:
    _checks.integer(name, "in_features", in_features, 0)
    _checks.integer(name, "out_features", out_features, 0)
    _checks.integer(name, "bits", bits, 2)
    if bits > 5:
        raise ValueError(f"{name}: bits must be 2 to 5, got {bits}")
    if not isinstance(scale, str) or scale not in SCALES:
        raise ValueError(f'{name}: scale must be "none" or "channel", got {scale!r}')
    _checks.one_of(name, "activation", activation, ACTIVATIONS)
    if activation == "fixed16.16" and scale != "none":
        raise ValueError(f'{name}: activation "fixed16.16" is integer arithmetic and needs scale="none"')


def _apply_but_keep_scale(module: nn.Module, apply, fn, recurse):
    """``.half()`` and the like convert what is trained; the scale stays float32 and only moves."""
    scale = getattr(module, "scale", None)
    apply(fn, recurse)
    if scale is not None and module.scale.dtype != scale.dtype:
        module.scale = scale.to(module.scale.device)
    return module


def _dense_linear(packed: PackedShiftWeight, bias: Tensor | None, dtype: torch.dtype, training: bool) -> nn.Linear:
    outputs, columns = packed.shape
    linear = nn.Linear(columns, outputs, bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(packed.dequantize(dtype))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear.train(training)


__all__ = ["FrozenShiftLinear", "ShiftLinear"]
