"""Matrix products with operands of one bit per element (MatAdd)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks, reference
from .._library import Op, _loop, run_backward, signed
from .._registry import MAX_HEAD_DIM, REFERENCE, Backend, Problem, choose, cpu_kernel, cuda_kernel, register

VALUES = ("binary", "sign")
WORD = 32

pack_signs_op = Op(
    "pack_signs(Tensor input) -> Tensor packed",
    lambda input: input.new_empty(*input.shape[:-1], (input.shape[-1] + WORD - 1) // WORD, dtype=torch.uint32),
    family="shift_add",
    axes=dict.fromkeys(("input", "packed"), "first second third"),
    splits="first second third",
)

add_matmul_fwd = Op(
    "add_matmul_fwd(Tensor packed, Tensor dense, int values) -> Tensor output",
    lambda packed, dense, values: dense.new_empty(packed.shape[0], packed.shape[1], dense.shape[2]),
    family="shift_add",
    flops=lambda packed, dense, values, **kwargs: 2 * packed[0] * packed[1] * dense[1] * dense[2],
    axes={"packed": "batch rows", "dense": "batch inner columns", "output": "batch rows columns"},
    splits="batch rows columns",
)

add_matmul_bwd = Op(
    "add_matmul_bwd(Tensor grad_output, Tensor packed, SymInt length, int values) -> Tensor grad_dense",
    lambda grad, packed, length, values: grad.new_empty(grad.shape[0], length, grad.shape[2]),
    family="shift_add",
    flops=lambda grad, packed, length, values, **kwargs: 2 * grad[0] * grad[1] * grad[2] * length,
    axes={"grad_output": "batch rows columns", "packed": "batch rows", "grad_dense": "batch inner columns"},
    splits="batch rows columns",
)

binary_matmul_op = Op(
    "binary_matmul(Tensor left, Tensor right, SymInt length, int values) -> Tensor output",
    lambda left, right, *args: left.new_empty(left.shape[0], left.shape[1], right.shape[1], dtype=torch.int32),
    family="shift_add",
    flops=lambda left, right, length, values, **kwargs: 2 * left[0] * left[1] * right[1] * length,
    axes={"left": "batch rows", "right": "batch columns", "output": "batch rows columns"},
    splits="batch rows columns",
)


def _hamming_flops(batch, heads, queries, keys, head_dim, value_dim) -> int:
    return 2 * batch * heads * queries * keys * (head_dim + value_dim)


_HAMMING_AXES = {
    **dict.fromkeys(("query_bits", "output", "logsumexp", "grad_output"), "batch heads queries"),
    **dict.fromkeys(("key_bits", "value", "grad_value"), "batch heads"),
}

hamming_attention_fwd = Op(
    "hamming_attention_fwd(Tensor query_bits, Tensor key_bits, Tensor value, SymInt head_dim, int values, float scale) "
    "-> (Tensor output, Tensor logsumexp)",
    lambda query_bits, key_bits, value, *args: (
        value.new_empty(*query_bits.shape[:3], value.shape[3]),
        value.new_empty(query_bits.shape[:3], dtype=torch.float32),
    ),
    family="shift_add",
    flops=lambda query, key, value, head_dim, *args, **kwargs: _hamming_flops(*query[:3], key[2], head_dim, value[3]),
    axes=_HAMMING_AXES,
    splits="batch heads queries",
)

hamming_attention_bwd = Op(
    "hamming_attention_bwd(Tensor grad_output, Tensor query_bits, Tensor key_bits, Tensor logsumexp, SymInt head_dim, "
    "int values, float scale) -> Tensor grad_value",
    lambda grad, query_bits, key_bits, *args: grad.new_empty(*key_bits.shape[:3], grad.shape[3]),
    family="shift_add",
    flops=lambda grad, query, key, logsumexp, head_dim, *args, **kwargs: _hamming_flops(
        *query[:3], key[2], head_dim, grad[3]
    ),
    axes=_HAMMING_AXES,
    splits="batch heads queries",
)

_BACKENDS = (Backend("cpu", cpu_kernel), Backend("cuda", cuda_kernel), REFERENCE)
for _name in ("pack_signs", "add_matmul", "binary_matmul", "hamming_attention"):
    register(_name, _BACKENDS)


def pack_signs(x: Tensor, *, backend: str = "auto") -> Tensor:
    r"""One bit per element: 1 where ``x > 0``.

    .. math:: p_w = \sum_{i < 32} 2^i\, [x_{32 w + i} > 0]

    Args:
        x: (..., D), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        backend: "auto", "cuda", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (..., ceil(D / 32)), uint32. Bit i of word w belongs to element 32 w + i; the rest of the last word is 0.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.

    Example:
        >>> import torch, effattn
        >>> effattn.pack_signs(torch.tensor([0.5, -1.0, 0.0, 2.0])).item()
        9
    """
    op = "pack_signs"
    _checks.floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dimension, got {tuple(x.shape)}")
    backend = choose(op, backend, Problem(x.device.type, x.dtype, 1))
    x = x.detach()
    if backend == "reference":
        return reference.pack_signs(x)
    rows = x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 and x.numel() else x[(None,) * (4 - x.dim())]
    if rows.dim() != 4:
        rows = x.reshape(x.shape[:-1].numel(), 1, 1, x.shape[-1])
    return pack_signs_op(backend, rows).reshape(*x.shape[:-1], (x.shape[-1] + WORD - 1) // WORD)


def add_matmul(packed: Tensor, dense: Tensor, *, values: str = "binary", backend: str = "auto") -> Tensor:
    r"""Product of a matrix of bits and a dense one: sums of the rows that the bits select or sign.

    .. math:: Y_{mn} = \sum_k b_{mk} X_{kn},\quad b \in \{0, 1\}\ \text{or}\ \{-1, 1\}

    Args:
        packed: (..., M, ceil(K / 32)), uint32, as :func:`pack_signs` makes it. Bits beyond K are ignored.
        dense: (..., K, N) with the same leading dimensions, float32, bfloat16, float16 or float64 (float64: reference
            only), any strides.
        values: what bits mean: "binary", 0 and 1, or "sign", -1 and 1.
        backend: "auto", "cuda", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (..., M, N), dense's dtype. Differentiable in dense.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.

    Example:
        >>> import torch, effattn
        >>> packed = effattn.pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
        >>> effattn.add_matmul(packed, torch.tensor([[1.0], [2.0], [4.0]]))
        tensor([[5.]])
    """
    op = "add_matmul"
    _checks.floating(op, "dense", dense)
    if dense.dim() < 2:
        raise ValueError(f"{op}: dense must have shape (..., K, N), got {tuple(dense.shape)}")
    length = dense.shape[-2]
    _words(op, "packed", packed, length, dense.device)
    if packed.shape[:-2] != dense.shape[:-2]:
        raise ValueError(
            f"{op}: packed must have dense's leading dimensions {tuple(dense.shape[:-2])}, got {tuple(packed.shape)}"
        )
    _bit_values(op, values)
    (dense,) = _checks.autocast(dense)
    backend = choose(op, backend, Problem(dense.device.type, dense.dtype, 1))
    if backend == "reference":
        return reference.add_matmul(packed, dense, values)
    if forward_ad._current_level >= 0:
        product = _AddMatmulTangent.apply
    else:
        wanted = torch.is_grad_enabled() and dense.requires_grad
        product = _AddMatmul.apply if wanted else add_matmul_fwd
    output = product(backend, _batched(packed), _batched(dense), VALUES.index(values))
    return output.reshape(*packed.shape[:-1], dense.shape[-1])


def binary_matmul(left: Tensor, right: Tensor, length: int, *, values: str = "sign", backend: str = "auto") -> Tensor:
    r"""Inner products of rows of bits, by counting them: q k^T of binary queries and keys.

    .. math:: Y_{mn} = \sum_{k < K} a_{mk} b_{nk} =
        \mathrm{popcount}(a \wedge b)\ \text{("binary")}\quad \text{or}\quad K - 2\, \mathrm{popcount}(a \oplus b)

    Args:
        left: (..., M, ceil(K / 32)), uint32, as :func:`pack_signs` makes it.
        right: (..., N, ceil(K / 32)), uint32, with left's leading dimensions.
        length: K, elements of a row. Bits beyond are ignored.
        values: what bits mean: "sign", -1 and 1, or "binary", 0 and 1.
        backend: "auto", "cuda", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (..., M, N), int32, exact.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.

    Example:
        >>> import torch, effattn
        >>> q, k = effattn.pack_signs(torch.tensor([[1.0, -1.0, 1.0]])), effattn.pack_signs(torch.tensor([[1.0, 1.0, 1.0]]))
        >>> effattn.binary_matmul(q, k, 3)
        tensor([[1]], dtype=torch.int32)
    """
    op = "binary_matmul"
    _checks.integer(op, "length", length, 0)
    _words(op, "left", left, length)
    _words(op, "right", right, length, left.device)
    if left.shape[:-2] != right.shape[:-2]:
        raise ValueError(
            f"{op}: right must have left's leading dimensions {tuple(left.shape[:-2])}, got {tuple(right.shape)}"
        )
    _bit_values(op, values)
    backend = choose(op, backend, Problem(left.device.type, torch.float32, 1))
    if backend == "reference":
        return reference.binary_matmul(left, right, length, values)
    output = binary_matmul_op(backend, _batched(left), _batched(right), length, VALUES.index(values))
    return output.reshape(*left.shape[:-1], right.shape[-2])


def hamming_attention(
    query_bits: Tensor,
    key_bits: Tensor,
    value: Tensor,
    head_dim: int,
    *,
    values: str = "sign",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention whose queries and keys are one bit per element.

    .. math:: O = \mathrm{softmax}(s\, \langle q_i, k_j \rangle) V,\qquad
        \langle q, k \rangle = D - 2\, \mathrm{hamming}(q, k)\ \text{for values "sign"}

    Scores are counted bits. Keys take 1/32 of the bytes of float32.

    Args:
        query_bits: (B, H, N, ceil(D / 32)), uint32, as :func:`pack_signs` makes it.
        key_bits: (B, H, M, ceil(D / 32)), uint32.
        value: (B, H, M, Dv), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        head_dim: D, elements of a query.
        values: what bits mean: "sign", -1 and 1, or "binary", 0 and 1.
        scale: factor s of the scores; default D ** -0.5.
        backend: "auto", "cuda", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, Dv), value's dtype; 0 where there are no keys. Differentiable in value.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4; :func:`shift_add_attention` is its linear form.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 1, 2, 10, 64)
        >>> bits = effattn.pack_signs(query), effattn.pack_signs(key)
        >>> effattn.hamming_attention(*bits, value, 64).shape
        torch.Size([1, 2, 10, 64])
    """
    op = "hamming_attention"
    _checks.integer(op, "head_dim", head_dim, 1)
    _checks.floating(op, "value", value)
    if value.dim() != 4 or value.shape[3] < 1:
        raise ValueError(f"{op}: value must have shape (B, H, M, Dv) with Dv >= 1, got {tuple(value.shape)}")
    for name, bits in (("query_bits", query_bits), ("key_bits", key_bits)):
        _words(op, name, bits, head_dim, value.device)
        if bits.dim() != 4 or bits.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"{op}: {name} must have shape (B, H, tokens, words) with value's B and H {tuple(value.shape[:2])}, "
                f"got {tuple(bits.shape)}"
            )
    if key_bits.shape[2] != value.shape[2]:
        raise ValueError(f"{op}: key_bits must have value's {value.shape[2]} tokens, got {key_bits.shape[2]}")
    _bit_values(op, values)
    scale = _checks.scale_or_default(op, scale, head_dim)
    (value,) = _checks.autocast(value)
    detail = f"head_dim {head_dim} is above {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else ""
    backend = choose(op, backend, Problem(value.device.type, value.dtype, value.shape[3], detail=detail))
    if backend == "reference":
        return reference.hamming_attention(query_bits, key_bits, value, head_dim, values, scale)
    query_bits, key_bits = query_bits.contiguous(), key_bits.contiguous()
    if forward_ad._current_level >= 0:
        attend = _HammingAttentionTangent.apply
    else:
        wanted = torch.is_grad_enabled() and value.requires_grad
        attend = _HammingAttention.apply if wanted else hamming_attention_fwd
    return attend(backend, query_bits, key_bits, value, head_dim, VALUES.index(values), scale)[0]


class _AddMatmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(backend, packed, dense, values):
        return add_matmul_fwd(backend, packed, dense, values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, packed, dense, ctx.values = inputs
        ctx.length = dense.shape[1]
        ctx.save_for_backward(packed)

    @staticmethod
    def backward(ctx, grad_output):
        arguments = (ctx.backend, grad_output, *ctx.saved_tensors, ctx.length, ctx.values)
        return None, None, run_backward(add_matmul_bwd, *arguments), None


class _AddMatmulTangent(_AddMatmul):
    """Linear in dense: a tangent goes through the same product. Apart, for torch.compile takes no `jvp`."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _AddMatmul.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, _backend, _packed, tangent, _values):
        return _AddMatmulTangent.apply(ctx.backend, *ctx.saved_tensors, tangent, ctx.values)


class _HammingAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(backend, query_bits, key_bits, value, head_dim, values, scale):
        return hamming_attention_fwd(backend, query_bits, key_bits, value, head_dim, values, scale)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, query_bits, key_bits, _, *ctx.options = inputs
        ctx.save_for_backward(query_bits, key_bits, outputs[1])
        ctx.mark_non_differentiable(outputs[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        arguments = (ctx.backend, grad_output, *ctx.saved_tensors, *ctx.options)
        return None, None, None, run_backward(hamming_attention_bwd, *arguments), None, None, None


class _HammingAttentionTangent(_HammingAttention):
    """Linear in value, as _AddMatmulTangent in dense."""

    generate_vmap_rule = False  # torch's own rule loses count of the tangents of several outputs

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop(_HammingAttentionTangent.apply)(info, in_dims, *args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _HammingAttention.setup_context(ctx, inputs, outputs)
        ctx.save_for_forward(*inputs[1:3], outputs[1])

    @staticmethod
    def jvp(ctx, _backend, _query_bits, _key_bits, tangent, *_options):
        bits = ctx.saved_tensors[:2]
        return _HammingAttentionTangent.apply(ctx.backend, *bits, tangent, *ctx.options)[0], None


def _batched(tensor: Tensor) -> Tensor:
    """(..., M, N) as (B, M, N); a view where it can be. Words are made contiguous."""
    tensor = tensor.contiguous() if tensor.dtype == torch.uint32 else tensor
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(tensor.shape[:-2].numel(), *tensor.shape[-2:])


def _words(op: str, name: str, bits, length: int, device=None) -> None:
    if not isinstance(bits, Tensor) or bits.layout != torch.strided or bits.dtype != torch.uint32:
        raise TypeError(f"{op}: {name} must be a uint32 Tensor, got {getattr(bits, 'dtype', type(bits).__name__)}")
    words = (length + WORD - 1) // WORD
    if bits.dim() < 2 or bits.shape[-1] != words:
        raise ValueError(
            f"{op}: {name} must have shape (..., rows, {words}) for {length} elements, got {tuple(bits.shape)}"
        )
    if device is not None and bits.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {bits.device}")


def _bit_values(op: str, values) -> None:
    _checks.one_of(op, "values", values, VALUES)
