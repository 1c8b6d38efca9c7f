"""Shift-add: linear layers of powers of two, linear angular attention with binary queries and keys, popcount products.

A linear layer is a case of shape 1 x 1 x M x K with N ``outputs``: query is its input, key its dense (N, K) weight. What
a user does once, packing the weight or computing 2^p s for the eager peer, is not timed in inference; in training every
step has to quantise anew. Peers in another dtype (F.linear in bfloat16) get their inputs converted beforehand.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from effattn.bench.cases import OURS, Call, Case, Contender, Family, Inputs, Operator, Sweep
from effattn.bench.peers import compiled, unmasked_sdpa

import effattn
from effattn.ops.shift_linear import shift_linear_ste

INT8, LINEAR, LINEAR_BF16, MATMUL = "effattn int8", "F.linear", "F.linear bf16", "matmul"


# ---- linear layers ----


def _linear_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, case.tokens, case.head_dim, generator=generator)
    weight = torch.randn(1, 1, case.outputs, case.head_dim, generator=generator) * case.head_dim**-0.5
    # Weights that float32 and float64 round to different powers of two would make the eager peer look wrong.
    fraction = weight.double().abs().log2().frac().abs()
    weight = torch.where((fraction - 0.5).abs() < 1e-5, 1.01 * weight, weight)
    unused = torch.zeros(1, 1, 1, 1)
    return Inputs(*(t.to(dtype).to(device) for t in (x, weight, unused)), {}, {})


def _packed(inputs: Inputs) -> effattn.PackedShiftWeight:
    return effattn.quantize_power_of_two(inputs.key.detach()[0, 0])


def _linear_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    packed = _packed(inputs)
    return effattn.reference.shift_linear(inputs.query, packed.codes, None, None, packed.bits)


def _linear_bytes(case: Case, inputs: Inputs) -> float:
    """Half a byte a weight; input and output once."""
    size = inputs.query.element_size()
    return 0.5 * case.outputs * case.head_dim + size * case.tokens * (case.head_dim + case.outputs)


def _ours(activation: str):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        if training:
            return lambda: shift_linear_ste(inputs.query, inputs.key[0, 0], activation=activation)
        packed = _packed(inputs)
        return lambda: effattn.shift_linear(inputs.query, packed, activation=activation)

    return prepare


def _straight_through(weight: torch.Tensor) -> torch.Tensor:
    """2^p s of a dense weight, as the eager layer computes it, differentiable."""
    rounded = 2.0 ** weight.abs().log2().round().clamp(-6, 0) * weight.sign()
    return rounded.detach() + (weight - weight.detach())


def _eager_shift(case: Case, inputs: Inputs, training: bool) -> Call:
    if training:
        return lambda: F.linear(inputs.query, _straight_through(inputs.key[0, 0]))
    shift = inputs.key.detach()[0, 0].abs().log2().round().clamp(-6, 0)
    sign = inputs.key.detach()[0, 0].sign()
    return lambda: F.linear(inputs.query, 2.0**shift * sign)


def _compiled_shift(case: Case, inputs: Inputs, training: bool) -> Call:
    if training:
        layer = compiled(lambda x, weight: F.linear(x, _straight_through(weight)))
        return lambda: layer(inputs.query, inputs.key[0, 0])
    shift = inputs.key.detach()[0, 0].abs().log2().round().clamp(-6, 0).to(torch.int8)
    sign = inputs.key.detach()[0, 0].sign().to(torch.int8)
    layer = compiled(lambda x, p, s: F.linear(x, torch.exp2(p.to(x.dtype)) * s))
    return lambda: layer(inputs.query, shift, sign)


def _dense(dtype: torch.dtype | None):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        x = inputs.query if dtype is None else inputs.query.detach().to(dtype)
        if training:
            return lambda: F.linear(x, inputs.key[0, 0])
        weight = _packed(inputs).dequantize(x.dtype)
        return lambda: F.linear(x, weight)

    return prepare


def _int_mm(case: Case, inputs: Inputs, training: bool) -> Call:
    """Weights in int8, activations quantised per row: what torch offers, composed as torchao composes it."""
    weight = (64 * _packed(inputs).dequantize(torch.float32)).to(torch.int8).T.contiguous()
    x = inputs.query[0, 0]

    def layer():
        step = x.abs().amax(1, keepdim=True) / 127
        product = torch._int_mm((x / step).round().to(torch.int8), weight)
        return (product * (step / 64)).to(x.dtype)[None, None]

    return layer


LINEAR_CONTENDERS = (
    Contender(OURS, _ours("float")),
    Contender(INT8, _ours("int8"), exact=False),
    Contender(LINEAR, _dense(None), exact=False),
    Contender(LINEAR_BF16, _dense(torch.bfloat16), trains=False, exact=False, why_not="inference only"),
    Contender("eager shift", _eager_shift),
    Contender("torch.compile", _compiled_shift, compiles=True),
    Contender("torch int8", _int_mm, trains=False, exact=False, why_not="inference only"),
)


# ---- attention ----


def _attention_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """Query of one projection and key and value of another, permuted views, as the published model leaves them."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, head_dim = case.shape
    query = torch.randn(batch, tokens, heads, head_dim, generator=generator)
    key_value = torch.randn(batch, tokens, 2, heads, head_dim, generator=generator)
    weight = torch.randn(heads, 1, 9, 1, generator=generator) / 3
    query, key_value, weight = (t.to(dtype).to(device) for t in (query, key_value, weight))
    key, value = key_value.permute(2, 0, 3, 1, 4)
    return Inputs(query.permute(0, 2, 1, 3), key, value, {"residual_weight": weight}, {})


def _attention_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    """The published statistics are the whole tensor's: all heads, of which one is returned."""
    weight = inputs.parameters["residual_weight"]
    output = effattn.reference.shift_add_attention(*inputs[:3], "published", weight)
    return output[:, head : head + 1]


def _shift_add(case: Case, inputs: Inputs, training: bool) -> Call:
    weight = inputs.parameters["residual_weight"]
    return lambda: effattn.shift_add_attention(*inputs[:3], residual_weight=weight)


def _published(query, key, value, weight):
    """The formula of the published model, straight through as it does it."""

    def bits(x):
        x = x / x.norm(dim=-1, keepdim=True)
        mean = x.norm(p=1) / x.nelement()
        hard, soft = torch.gt(x, 0).to(x.dtype) * mean, x.clamp(0, 1)
        return hard.detach() - soft.detach() + soft

    context = bits(key).transpose(-2, -1) @ value
    output = 0.5 * value + (1.0 / math.pi) * (bits(query) @ context)
    output = output / output.norm(dim=-1, keepdim=True)
    return output + F.conv2d(value, weight, padding=(4, 0), groups=value.shape[1])


def _eager(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: _published(*inputs[:3], inputs.parameters["residual_weight"])


def _compiled(case: Case, inputs: Inputs, training: bool) -> Call:
    attend = compiled(_published)
    return lambda: attend(*inputs[:3], inputs.parameters["residual_weight"])


ATTENTION_CONTENDERS = (
    Contender(OURS, _shift_add),
    Contender("eager", _eager),
    Contender("torch.compile", _compiled, compiles=True),
    unmasked_sdpa,
)


# ---- q k^T of bits ----


def _bits_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    query, key, value = case.qkv(dtype, device)
    return Inputs(query, key, value, {}, {})


def _signs(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def _bits_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    query, key = (_signs(x[:, head : head + 1]) for x in inputs[:2])
    return query @ key.mT


def _bits_bytes(case: Case, inputs: Inputs) -> float:
    heads = case.batch * case.heads
    return heads * (2.0 * case.tokens * case.head_dim / 8 + 4.0 * case.tokens**2)


def _popcount(case: Case, inputs: Inputs, training: bool) -> Call:
    query, key = effattn.pack_signs(inputs.query), effattn.pack_signs(inputs.key)
    return lambda: effattn.binary_matmul(query, key, case.head_dim)


def _matmul(case: Case, inputs: Inputs, training: bool) -> Call:
    query, key = _signs(inputs.query), _signs(inputs.key)
    return lambda: query @ key.mT


NOT_DIFFERENTIABLE = "counts of bits have no gradient"
BITS_CONTENDERS = (
    Contender(OURS, _popcount, trains=False, why_not=NOT_DIFFERENTIABLE),
    Contender(MATMUL, _matmul, trains=False, why_not=NOT_DIFFERENTIABLE),
)


def _linear(rows, columns, outputs, **marks) -> Case:
    return Case("linear", 1, 1, rows, columns, f"-> {outputs}", outputs=outputs, **marks)


def _scores(batch, heads, tokens, head_dim, **marks) -> Case:
    return Case("binary_matmul", batch, heads, tokens, head_dim, outputs=tokens, **marks)


FAMILY = Family(
    "shift_add",
    operators={
        "linear": Operator(
            _linear_inputs,
            _linear_reference,
            LINEAR_CONTENDERS,
            flops=lambda case: 2.0 * case.tokens * case.head_dim * case.outputs,
            bytes=_linear_bytes,
        ),
        "attention": Operator(
            _attention_inputs,
            _attention_reference,
            ATTENTION_CONTENDERS,
            flops=lambda case: 4.0 * case.batch * case.heads * case.tokens * case.head_dim**2,
        ),
        "binary_matmul": Operator(
            _bits_inputs,
            _bits_reference,
            BITS_CONTENDERS,
            flops=lambda case: 2.0 * case.batch * case.heads * case.tokens**2 * case.head_dim,
            bytes=_bits_bytes,
        ),
    },
    cases=(
        _linear(1, 4096, 4096, asked=True, quick=True),
        _linear(16, 4096, 4096),
        _linear(256, 4096, 4096),
        _linear(3136, 64, 512, asked=True),
        _linear(3136, 512, 64, asked=True),
        _linear(784, 128, 1024, asked=True),
        _linear(784, 1024, 128, asked=True, quick=True),
        _linear(32 * 784, 128, 1024),
        Case("attention", 32, 1, 3136, 64, asked=True),
        Case("attention", 32, 5, 196, 64, asked=True, quick=True, trained=True),
        Case("attention", 32, 2, 784, 64),
        Case("attention", 1, 1, 3136, 64),
        _scores(32, 5, 196, 64, asked=True),
        _scores(1, 1, 3136, 64, asked=True),
    ),
    sweeps=(
        Sweep(
            "Shift layer, 4096 to 4096 channels",
            tuple(_linear(rows, 4096, 4096) for rows in (1, 4, 16, 64, 256, 1024)),
            eager="eager shift",
            compiled=(1, 64),
            rivals=(LINEAR,),
            axis="rows of the input",
        ),
        Sweep(
            "Shift-add attention, batch 8, 1 head of 64",
            tuple(Case("attention", 8, 1, tokens, 64) for tokens in (196, 784, 3136, 12544)),
            trained=(196, 784, 3136),
            compiled=(784, 3136),
        ),
    ),
)


def test_shift_add(timed_call):
    timed_call()
