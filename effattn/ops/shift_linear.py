"""Linear layers whose weights are signed powers of two (MatShift)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks, reference
from .._library import Op, run_backward, signed, tangent_refusal
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, cuda_kernel, register, triton_kernel
from ..packed import PackedShiftWeight, quantize_power_of_two
from ..reference.shift_add import NIBBLE_BITS

ACTIVATIONS = ("float", "int8", "fixed16.16")

# Against F.linear in the same dtype (2 threads of a Zen 4, 2026-11): most rows at which a shift layer was measured to be
# faster, fewest at which it was not.
MEASURED_ROWS = {torch.float32: (256, 784), torch.bfloat16: (16, 64)}

# Rows up to which one pass over the codes is what a GPU does; above it tensor cores on expanded tiles win.
CUDA_ROWS = 64


def _flops(rows, codes, *args, out_shape=None, **kwargs) -> int:
    """A shift and an addition count as a multiply-add does: two."""
    (_, columns), outputs = rows, codes[0]
    return 2 * rows[0] * columns * outputs


shift_linear_fwd = Op(
    "shift_linear_fwd(Tensor input, Tensor codes, Tensor? scale, Tensor? bias, int bits, int activation) "
    "-> Tensor output",
    lambda input, codes, *args: input.new_empty(input.shape[0], codes.shape[0]),
    family="shift_add",
    flops=_flops,
    axes={"input": "rows", **dict.fromkeys(("codes", "scale", "bias"), "outputs"), "output": "rows outputs"},
    splits="rows outputs",
)

shift_linear_bwd = Op(
    "shift_linear_bwd(Tensor grad_output, Tensor codes, Tensor? scale, SymInt in_features, int bits) "
    "-> Tensor grad_input",
    lambda grad_output, codes, scale, in_features, bits: grad_output.new_empty(grad_output.shape[0], in_features),
    family="shift_add",
    flops=lambda grad, codes, scale, in_features, bits, **kwargs: 2 * grad[0] * grad[1] * in_features,
    axes={"grad_output": "rows outputs", "codes": "outputs", "scale": "outputs", "grad_input": "rows"},
    splits="rows outputs",
)


def _cpu(problem: Problem) -> tuple[bool, str]:
    ok, reason = cpu_kernel(problem)
    if ok and problem.dtype in MEASURED_ROWS:
        pays, stops = MEASURED_ROWS[problem.dtype]
        rows = f"{problem.length} rows: " if problem.length >= 0 else ""
        reason += f"; {rows}faster than a dense layer of this dtype up to {pays} rows, not from {stops} (measured)"
    return ok, reason


def _few_rows(problem: Problem) -> tuple[bool, str]:
    if problem.length > CUDA_ROWS:
        return (
            False,
            f"{problem.length} rows: above {CUDA_ROWS} the Triton kernel's tensor-core tiles are meant to serve",
        )
    return True, "reads each code once for all rows"


register(
    "shift_linear",
    (
        Backend("cpu", _cpu),
        Backend("cuda", cuda_kernel, _few_rows),
        Backend("triton", triton_kernel),
        REFERENCE,
    ),
)


def shift_linear(
    input: Tensor,
    weight: PackedShiftWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "float",
    backend: str = "auto",
) -> Tensor:
    r"""A linear layer whose weights are signed powers of two: a product is a shift of the activation.

    .. math:: y_n = \mathrm{scale}_n \sum_k s_{nk} 2^{p_{nk}} x_k + b_n

    The codes (half a byte a weight) are expanded in registers and never exist as a dense tensor in memory. What that
    buys is memory traffic: few rows (token-by-token inference) run at the speed of reading 4-bit weights; many rows
    with float activations are bound by arithmetic and can at best equal a dense layer. ``explain`` says which it is.

    Args:
        input: (..., K), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        weight: PackedShiftWeight (N, K), from :func:`quantize_power_of_two`.
        bias: (N,), floating point, or None.
        activation: "float"; "int8" (each row of input is rounded to 8 bits in steps of its largest magnitude / 127, the
            sum is exact integer arithmetic; weights of 5 bits: reference only); or "fixed16.16" (input and bias are
            floored to 16.16 fixed point and the layer is 32-bit integer shifts and additions that wrap around,
            bit-exact with DeepShift's; needs a weight without scale and |x| < 2^15).
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (..., N), input's dtype. Differentiable in input and bias; integer activations pass the gradient
        straight through. :class:`effattn.nn.ShiftLinear` trains the weight too.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        DeepShift, arXiv 1905.13298; ShiftAddViT, arXiv 2306.06446, section 4.

    Example:
        >>> import torch, effattn
        >>> weight = effattn.quantize_power_of_two(torch.tensor([[0.5, -0.25], [1.0, 0.0]]))
        >>> effattn.shift_linear(torch.tensor([[4.0, 8.0]]), weight)
        tensor([[0., 4.]])
    """
    op = "shift_linear"
    if not isinstance(weight, PackedShiftWeight):
        raise TypeError(f"{op}: weight must be a PackedShiftWeight, got {type(weight).__name__}")
    return _linear(op, input, weight, None, bias, activation, backend)


def shift_linear_ste(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
    scale: str = "none",
    activation: str = "float",
    backend: str = "auto",
) -> Tensor:
    """:func:`shift_linear` of a dense weight that is quantised on the way and trained straight through: dW = g^T x."""
    packed = quantize_power_of_two(weight.detach(), bits=bits, scale=scale)
    return _linear("shift_linear", input, packed, weight, bias, activation, backend)


def _linear(op: str, input, weight: PackedShiftWeight, dense: Tensor | None, bias, activation, backend) -> Tensor:
    outputs, columns, device = weight.codes.shape[0], weight.columns, weight.codes.device  # the subclass's own are slow
    _checks.floating(op, "input", input)
    if input.dim() < 1 or input.shape[-1] != columns:
        raise ValueError(f"{op}: input must have shape (..., {columns}), got {tuple(input.shape)}")
    if device != input.device:
        raise ValueError(f"{op}: weight must be on input's device {input.device}, got {device}")
    if bias is not None:
        _checks.parameter(op, "bias", bias, input, "input")
        if tuple(bias.shape) != (outputs,):
            raise ValueError(f"{op}: bias must have shape ({outputs},), got {tuple(bias.shape)}")
    _checks.one_of(op, "activation", activation, ACTIVATIONS)
    if activation == "fixed16.16" and weight.scale is not None:
        raise ValueError(f"{op}: activation 'fixed16.16' is integer arithmetic and needs a weight with scale='none'")
    (input,) = _checks.autocast(input)
    rows = input.reshape(-1, columns) if columns else input.reshape(input.shape[:-1].numel(), 0)
    detail = (
        "int8 activations need weights of at most 4 bits" if activation == "int8" and weight.bits > NIBBLE_BITS else ""
    )
    length = -1 if torch.compiler.is_compiling() else rows.shape[0]
    backend = choose(op, backend, Problem(input.device.type, input.dtype, 1, detail=detail, length=length))
    if backend == "reference":
        output = reference.shift_linear(rows, weight.codes, weight.scale, bias, weight.bits, activation)
        if dense is not None:
            output = output + _WeightGradient.apply(rows.detach(), dense, output.dtype)
    else:
        if bias is not None:
            bias = bias.float().contiguous()
        code = ACTIVATIONS.index(activation)
        function = _ShiftLinear if forward_ad._current_level < 0 else _ShiftLinearTangent
        if dense is None and function is _ShiftLinear and not torch.is_grad_enabled():
            output = shift_linear_fwd(backend, rows, weight.codes, weight.scale, bias, weight.bits, code)
        else:
            output = function.apply(backend, rows, weight.codes, weight.scale, bias, dense, weight.bits, code)
    return output.reshape(*input.shape[:-1], outputs)


class _ShiftLinear(torch.autograd.Function):
    """The kernel with gradients for the rows, the bias and, straight through, the dense weight behind the codes."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(backend, rows, codes, scale, bias, dense, bits, activation):
        return shift_linear_fwd(backend, rows, codes, scale, bias, bits, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, rows, codes, scale, _, dense, ctx.bits, _ = inputs
        ctx.in_features = rows.shape[1]
        ctx.dense_dtype = None if dense is None else dense.dtype
        ctx.save_for_backward(codes, scale, None if dense is None else rows)

    @staticmethod
    def backward(ctx, grad_output):
        codes, scale, rows = ctx.saved_tensors
        grad_rows = grad_bias = grad_dense = None
        if ctx.needs_input_grad[1]:
            arguments = (ctx.backend, grad_output, codes, scale, ctx.in_features, ctx.bits)
            grad_rows = run_backward(shift_linear_bwd, *arguments)
        if ctx.needs_input_grad[4]:
            grad_bias = grad_output.float().sum(0)
        if ctx.needs_input_grad[5]:
            grad_dense = (grad_output.mT @ rows).to(ctx.dense_dtype)
        return None, grad_rows, None, None, grad_bias, grad_dense, None, None


class _ShiftLinearTangent(_ShiftLinear):
    """Jointly linear in the rows and the bias. Apart, for torch.compile takes no `jvp`."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _ShiftLinear.setup_context(ctx, inputs, output)
        _, rows, codes, scale, _, dense, _, ctx.activation = inputs
        ctx.save_for_forward(codes, scale, None if dense is None else rows)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = rows.shape, rows.dtype

    @staticmethod
    def jvp(ctx, _backend, rows, _codes, scale, bias, dense, _bits, _activation):
        linear = ("input", "bias") if ACTIVATIONS[ctx.activation] == "float" else ()
        for name, tangent in (("scale", scale), ("weight", dense), ("input", rows), ("bias", bias)):
            if tangent is not None and name not in linear:
                raise NotImplementedError(tangent_refusal("shift_linear", name, linear))
        codes, scale = ctx.saved_tensors[:2]
        if rows is None:
            rows = bias.new_zeros(ctx.shape, dtype=ctx.dtype)
        return _ShiftLinearTangent.apply(ctx.backend, rows, codes, scale, bias, None, ctx.bits, ctx.activation)


class _WeightGradient(torch.autograd.Function):
    """Zero, with the gradient g^T x for a weight whose value went into the sum by another way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, dense, dtype):
        return rows.new_zeros((), dtype=dtype).expand(rows.shape[0], dense.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, dense, _ = inputs
        ctx.dtype = dense.dtype
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, grad_output):
        (rows,) = ctx.saved_tensors
        return None, (grad_output.mT @ rows).to(ctx.dtype), None
