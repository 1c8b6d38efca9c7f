"""Power-of-two weights and the linear layer on them: codes, arithmetic of every activation, gradients, torch."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import device_of, is_slow, require
from hypothesis import given
from hypothesis import strategies as st
from linear_like import KERNELS, assert_close_enough, layouts_of, same_bits

import effattn
from effattn import PackedShiftWeight, quantize_power_of_two, shift_linear
from effattn.ops.shift_linear import shift_linear_ste
from effattn.reference.shift_add import encode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (2, 3, 4, 5)
ALL_BACKENDS = pytest.mark.parametrize("backend", [*KERNELS["shift_linear"], "reference"])
BACKENDS = pytest.mark.parametrize("backend", KERNELS["shift_linear"])

# (M, K, N): every row count that has its own path, odd sizes, and sizes past one tile in each direction
SHAPES = ((1, 64, 48), (1, 257, 33), (3, 31, 5), (5, 128, 130), (17, 100, 7), (64, 66, 70), (70, 300, 65))
EMPTY = ((0, 8, 4), (3, 0, 4), (3, 8, 0), (1, 1, 1))


def draw(rows, columns, outputs, *, bits=4, scale="none", dtype=torch.float32, device="cpu", bias=True, seed=0):
    """(input, packed weight, bias): magnitudes over the whole range of the codes, some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator) * 2.0 ** -torch.randint(
        0, 2 ** (bits - 1), (outputs, columns), generator=generator
    )
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0.0
    packed = quantize_power_of_two(weight, bits=bits, scale=scale).to(device)
    x = torch.randn(rows, columns, generator=generator).to(dtype).to(device)
    return x, packed, torch.randn(outputs, generator=generator).to(device) if bias else None


# ---- codes ----


def power_of_two(weight: float, bits: int) -> float:
    """The definition, one number at a time."""
    if weight == 0.0:
        return 0.0
    exponent = min(max(round(math.log2(abs(weight))), -(2 ** (bits - 1) - 2)), 0)
    return math.copysign(2.0**exponent, weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", ["none", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantised_weight_is_the_definition(bits, scale, dtype):
    weight = (torch.randn(7, 9) * 2.0 ** torch.randint(-20, 5, (7, 9))).to(dtype)
    weight[2, 3] = weight[4] = 0.0
    packed = quantize_power_of_two(weight, bits=bits, scale=scale)
    for row, original in zip(packed.dequantize(torch.float64).tolist(), weight.tolist()):
        largest = (max(map(abs, original)) or 1.0) if scale == "channel" else 1.0
        factor = float(np.float32(largest))
        assert row == [power_of_two(w / factor, bits) * factor for w in original]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_expands_exactly_in_every_dtype(bits):
    exponents = range(-(2 ** (bits - 1) - 2), 1)
    values = torch.tensor([[0.0, *(s * 2.0**p for p in exponents for s in (-1, 1))]])
    packed = quantize_power_of_two(values, bits=bits)
    for dtype in (torch.float64, *DTYPES):
        assert torch.equal(packed.dequantize(dtype).double(), values.double())
    assert torch.equal(quantize_power_of_two(packed.dequantize(), bits=bits).codes, packed.codes)


def test_four_bits_take_half_a_byte_and_five_a_float8():
    weight = torch.tensor([[1.0, -0.5, 0.25]])
    four, five = (quantize_power_of_two(weight, bits=bits) for bits in (4, 5))
    assert four.codes.tolist() == [[7 | (8 | 6) << 4, 5]]
    assert torch.equal(five.codes.view(torch.float8_e5m2).float(), weight)
    assert (four.nbytes, five.nbytes) == (2, 3)


def test_packed_weight_is_a_tensor_of_its_shape():
    packed = quantize_power_of_two(torch.randn(5, 7), scale="channel")
    assert isinstance(packed, torch.Tensor)
    assert (packed.shape, packed.dtype, packed.device.type) == ((5, 7), torch.float32, "cpu")
    assert torch.equal(packed + 1, packed.dequantize() + 1)
    half = packed.to(torch.float16)
    assert isinstance(half, PackedShiftWeight)
    assert torch.equal(half.codes, packed.codes)
    assert torch.equal(half.dequantize(), packed.dequantize(torch.float16))
    assert packed.to("meta").codes.is_meta
    assert "PackedShiftWeight" in repr(packed)
    assert torch.equal(copy.deepcopy(packed).codes, packed.codes)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("scale", ["none", "channel"])
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_packed_weight_goes_through_a_state_dict_and_a_file(bits, scale, kind):
    def module_of(weight):
        module = torch.nn.Module()
        packed = quantize_power_of_two(weight, bits=bits, scale=scale)
        if kind == "buffer":
            module.register_buffer("weight", packed)
        else:
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
        return module

    saved, other = module_of(torch.randn(6, 9)), module_of(torch.randn(6, 9))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded["weight"], PackedShiftWeight)
    other.load_state_dict(loaded)
    assert torch.equal(other.weight.dequantize(), saved.weight.dequantize())
    other.load_state_dict(saved.to(torch.bfloat16).state_dict())
    assert torch.equal(other.weight.codes, saved.weight.codes)


def test_packed_weight_cannot_be_written_to_unnoticed():
    packed = quantize_power_of_two(torch.randn(4, 4))
    with pytest.raises(TypeError, match="cannot be changed"):
        packed.mul_(2)
    with pytest.raises(TypeError, match="source must be a PackedShiftWeight"):
        packed.copy_(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="source must be like"):
        packed.copy_(quantize_power_of_two(torch.randn(4, 4), bits=5))


def test_stock_linear_takes_a_packed_weight():
    x, packed, bias = draw(3, 10, 6)
    assert torch.equal(F.linear(x, packed, bias), shift_linear(x, packed, bias))
    assert torch.equal(F.linear(x, weight=packed), shift_linear(x, packed))


# ---- arithmetic ----


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_activations_are_within_the_accuracy_rule(backend, dtype, bits, shape):
    require("shift_linear", backend)
    if (
        backend == "triton"
        and device_of(backend) == "cpu"
        and (shape[0] * shape[1] * shape[2] > 5000 or (bits, dtype) == (3, torch.float16))
    ):
        pytest.skip("slow here; has its own tests")
    for scale in ("none", "channel"):
        x, packed, bias = draw(*shape, bits=bits, scale=scale, dtype=dtype, device=device_of(backend))
        x.requires_grad_()
        bias.requires_grad_()
        assert_close_enough(
            lambda b, x, bias, packed=packed: shift_linear(x, packed, bias, backend=b), backend, x, bias
        )


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_activations_are_the_integers_of_the_definition(backend, dtype, bits, shape):
    require("shift_linear", backend)
    if backend == "triton" and device_of(backend) == "cpu" and shape[0] * shape[1] * shape[2] > 5000:
        pytest.skip("slow here")
    x, packed, bias = draw(*shape, bits=bits, scale="channel", dtype=dtype)
    x[0] = 0.0
    rows, weight = x.float().numpy(), packed.dequantize().numpy() / packed.scale[:, None].numpy()
    largest = np.abs(rows).max(1, keepdims=True)
    step = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    total = np.rint(rows / step).astype(np.int64) @ (64 * weight).astype(np.int64).T
    wanted = total.astype(np.float32) * (step * np.float32(2**-6)) * packed.scale.numpy() + bias.numpy()
    device = device_of(backend)
    got = shift_linear(x.to(device), packed.to(device), bias.to(device), activation="int8", backend=backend)
    # One rounding of the last float32 product and sum may differ; the integers may not.
    tolerance = 2 * np.finfo(np.float32).eps * (np.abs(total * step / 64).max() * 4 + 1)
    if dtype != torch.float32:
        tolerance += torch.finfo(dtype).eps * np.abs(wanted).max()
    assert np.abs(got.cpu().float().numpy() - wanted).max() <= tolerance


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fixed_point_activations_are_bit_exact(backend, dtype, bits, shape):
    """DeepShift's integer layer, in Python's own integers: y += s * (x >> -p), 32 bits."""
    require("shift_linear", backend)
    if backend == "triton" and device_of(backend) == "cpu" and shape[0] * shape[1] * shape[2] > 5000:
        pytest.skip("slow here")
    if is_slow(backend) and bits != 4 and dtype != torch.float32:
        pytest.skip("slow here: every dtype meets one code and every code one dtype")
    x, packed, bias = draw(*shape, bits=bits, dtype=dtype)
    x[0, 0] = 3e4  # sums wrap around
    x[-1, -1] = -7e9  # is clamped
    fixed = np.clip(np.floor(x.double().numpy() * 65536), -(2**31), (2**15 - 1) * 2**16).astype(np.int64)
    total = np.zeros((shape[0], shape[2]), dtype=np.int64)
    weight = packed.dequantize().double().numpy()
    shift = np.where(weight != 0, -np.log2(np.abs(np.where(weight != 0, weight, 1))), 0).astype(np.int64)
    for k in range(shape[1]):
        total += np.sign(weight[:, k]).astype(np.int64) * (fixed[:, k : k + 1] >> shift[:, k])
    total += np.floor(bias.double().numpy() * 65536).astype(np.int64)
    wanted = torch.from_numpy(((total + 2**31) % 2**32 - 2**31).astype(np.float32) / 65536).to(dtype)
    device = device_of(backend)
    got = shift_linear(x.to(device), packed.to(device), bias.to(device), activation="fixed16.16", backend=backend)
    assert torch.equal(got.cpu(), wanted)


@ALL_BACKENDS
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("activation", ["float", "int8", "fixed16.16"])
def test_empty_layers(backend, shape, activation):
    require("shift_linear", backend)
    x, packed, bias = draw(*shape, device=device_of(backend))
    x.requires_grad_()
    output = shift_linear(x, packed, bias, activation=activation, backend=backend)
    assert output.shape == (shape[0], shape[2])
    output.sum().backward()
    assert x.grad.shape == x.shape
    if shape[1] == 0:
        assert torch.allclose(output, bias.expand_as(output), atol=2**-16)


@BACKENDS
@pytest.mark.parametrize("activation", ["float", "int8", "fixed16.16"])
def test_strides_of_the_input_do_not_matter(backend, activation):
    require("shift_linear", backend)
    x, packed, bias = draw(6, 34, 9, device=device_of(backend))
    for view in layouts_of(x):
        got = shift_linear(view, packed, bias, activation=activation, backend=backend)
        assert same_bits(got, shift_linear(view.contiguous(), packed, bias, activation=activation, backend=backend))


@BACKENDS
def test_leading_dimensions_are_rows(backend):
    require("shift_linear", backend)
    x, packed, bias = draw(12, 10, 6, device=device_of(backend))
    wanted = shift_linear(x, packed, bias, backend=backend)
    assert torch.equal(shift_linear(x.view(2, 3, 2, 10), packed, bias, backend=backend), wanted.view(2, 3, 2, 6))
    torch.testing.assert_close(shift_linear(x[0], packed, bias, backend=backend), wanted[0])


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["float", "int8", "fixed16.16"])
def test_same_bits_for_any_number_of_threads(backend, dtype, activation):
    require("shift_linear", backend)
    rows = (1, 9) if is_slow(backend) else (1, 9, 200)
    for m in rows:
        x, packed, bias = draw(m, 64 if is_slow(backend) else 300, 33, dtype=dtype, device=device_of(backend))
        results = []
        for threads in (1, 2) if is_slow(backend) else (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(shift_linear(x, packed, bias, activation=activation, backend=backend))
        assert all(torch.equal(results[0], other) for other in results[1:])


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 150), st.integers(0, 90)),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(["none", "channel"]),
    seed=st.integers(0, 2**16),
)
def test_cpu_kernel_over_shapes(shape, bits, dtype, scale, seed):
    require("shift_linear", "cpu")
    x, packed, bias = draw(*shape, bits=bits, scale=scale, dtype=dtype, seed=seed)
    x.requires_grad_()
    assert_close_enough(lambda b, x: shift_linear(x, packed, bias, backend=b), "cpu", x)


# ---- gradients ----


@ALL_BACKENDS
@pytest.mark.parametrize("activation", ["float", "int8", "fixed16.16"])
def test_gradients_pass_straight_through_the_activation(backend, activation):
    require("shift_linear", backend)
    x, packed, bias = draw(5, 34, 6, device=device_of(backend))
    x.requires_grad_()
    bias.requires_grad_()
    output = shift_linear(x, packed, bias, activation=activation, backend=backend)
    grad = torch.randn_like(output)
    output.backward(grad)
    torch.testing.assert_close(x.grad, grad @ packed.dequantize())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@ALL_BACKENDS
def test_dense_weight_behind_the_codes_gets_its_gradient_straight_through(backend):
    require("shift_linear", backend)
    x, _, bias = draw(5, 34, 6, device=device_of(backend))
    weight = torch.randn(6, 34, device=x.device, requires_grad=True)
    output = shift_linear_ste(x.view(1, 5, 34), weight, bias, bits=4, scale="channel", backend=backend)
    packed = quantize_power_of_two(weight.detach(), scale="channel")
    torch.testing.assert_close(output[0], F.linear(x, packed.dequantize(), bias))
    grad = torch.randn_like(output)
    output.backward(grad)
    torch.testing.assert_close(weight.grad, grad[0].T @ x)


@BACKENDS
def test_second_derivatives_are_refused(backend):
    require("shift_linear", backend)
    x, packed, _ = draw(3, 8, 4, device=device_of(backend))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(shift_linear(x, packed, backend=backend).sin().sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(gradient.sum(), x)


# ---- torch ----


@BACKENDS
@pytest.mark.parametrize("activation", range(3))
def test_opcheck(backend, activation):
    require("shift_linear", backend)
    x, packed, bias = draw(3, 9, 4, device=device_of(backend))
    op = module_op("shift_linear_fwd").overload(backend)
    torch.library.opcheck(op, (x, packed.codes, packed.scale, bias, 4, activation))
    back = module_op("shift_linear_bwd").overload(backend)
    torch.library.opcheck(back, (torch.randn(3, 4, device=x.device), packed.codes, packed.scale, 9, 4))


def module_op(name: str):
    import sys

    return getattr(sys.modules["effattn.ops.shift_linear"], name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_exports_and_autocasts(backend):
    require("shift_linear", backend)
    x, packed, bias = draw(3, 10, 6)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", packed)

        def forward(self, x):
            return shift_linear(x, self.weight, bias, backend=backend)

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 10, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(rows, 10))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    mapped = torch.func.vmap(layer)(torch.randn(2, 3, 10))
    assert mapped.shape == (2, 3, 6)


# ---- calls ----

GOOD = draw(3, 10, 6)
BAD = (
    ("input that is no tensor", {"input": [1.0]}, TypeError, "input must be a Tensor"),
    ("integer input", {"input": GOOD[0].int()}, TypeError, "input must be floating point"),
    ("input of another width", {"input": GOOD[0][:, 1:]}, ValueError, r"input must have shape \(\.\.\., 10\)"),
    ("scalar input", {"input": torch.tensor(1.0)}, ValueError, "input must have shape"),
    ("dense weight", {"weight": torch.randn(6, 10)}, TypeError, "weight must be a PackedShiftWeight"),
    ("weight elsewhere", {"weight": GOOD[1].to("meta")}, ValueError, "weight must be on input's device"),
    ("bias that is no tensor", {"bias": 1.0}, TypeError, "bias must be a Tensor"),
    ("bias of another length", {"bias": GOOD[2][1:]}, ValueError, r"bias must have shape \(6,\)"),
    ("bias elsewhere", {"bias": GOOD[2].to("meta")}, ValueError, "bias must be on input's device"),
    ("unknown activation", {"activation": "int4"}, ValueError, "activation must be one of .*'int4'"),
    ("unknown backend", {"backend": "tpu"}, ValueError, "backend must be one of .*'tpu'"),
    (
        "scale with fixed point",
        {"activation": "fixed16.16", "weight": quantize_power_of_two(torch.randn(6, 10), scale="channel")},
        ValueError,
        "needs a weight with scale='none'",
    ),
)


@pytest.mark.parametrize(("why", "change", "exception", "message"), BAD, ids=[bad[0] for bad in BAD])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_bad_argument_is_named(why, change, exception, message, backend):
    call = {"input": GOOD[0], "weight": GOOD[1], "bias": GOOD[2], "backend": backend, **change}
    with pytest.raises(exception, match=message):
        shift_linear(**call)


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"weight": [1.0]}, TypeError, "weight must be a Tensor"),
        ({"weight": torch.ones(2, 2).int()}, TypeError, "weight must be floating point"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(N, K\)"),
        ({"bits": 6}, ValueError, r"bits must be in 2\.\.5, got 6"),
        ({"bits": 4.0}, TypeError, "bits must be an int"),
        ({"scale": "row"}, ValueError, "scale must be one of none, channel"),
    ],
)
def test_bad_quantisation_is_refused(change, exception, message):
    with pytest.raises(exception, match=message):
        quantize_power_of_two(**{"weight": torch.ones(2, 2), **change})


def test_bad_codes_are_refused():
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    for arguments, exception in (
        ((codes.int(), None, 4, 4), TypeError),
        ((codes, None, 4, 7), ValueError),
        ((codes.T, None, 4, 5), ValueError),
        ((codes, torch.ones(2), 4, 4), ValueError),
        ((codes, torch.ones(3).double(), 4, 4), TypeError),
    ):
        with pytest.raises(exception, match="PackedShiftWeight"):
            PackedShiftWeight(*arguments)


def test_five_bits_with_int8_activations_are_the_reference_s():
    x, packed, bias = draw(3, 10, 6, bits=5)
    explanation = effattn.explain(shift_linear, x, packed, bias, activation="int8")
    assert explanation.backend == "reference"
    with pytest.raises(NotImplementedError, match="at most 4 bits"):
        shift_linear(x, packed, bias, activation="int8", backend="cpu")


def test_float64_is_the_reference_s(fresh_log):
    x, packed, bias = draw(3, 10, 6)
    output = shift_linear(x.double(), packed, bias)
    torch.testing.assert_close(output, F.linear(x.double(), packed.dequantize(torch.float64), bias.double()))
    assert "no kernel for torch.float64" in fresh_log.records[0].getMessage()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_explain_says_how_many_rows_pay(dtype, capsys):
    require("shift_linear", "cpu")
    x, packed, bias = draw(3, 10, 6, dtype=dtype)
    effattn.explain(shift_linear, x, packed, bias)
    measured = dtype in (torch.float32, torch.bfloat16)
    assert ("3 rows: faster than a dense layer" in capsys.readouterr().out) == measured


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_codes_made_from_the_bits_of_float32_are_those_of_the_formula(bits):
    around = (torch.arange(-50, 50) + 0x3FB504F3).int().view(torch.float32)  # the square root of 2
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, math.inf, -math.inf, math.nan, -0.7])
    weight = torch.cat((around, -around / 16, torch.randn(391), special)).view(-1, 6)
    assert torch.equal(effattn.quantize_power_of_two(weight, bits=bits).codes, encode(weight, bits, False)[0])


@pytest.mark.parametrize("bits", [4, 5])
def test_transposed_weight_is_quantised_as_its_copy(bits):
    weight = torch.randn(5, 3).t()
    given, wanted = (effattn.quantize_power_of_two(w, bits=bits) for w in (weight, weight.contiguous()))
    assert torch.equal(given.codes, wanted.codes)
