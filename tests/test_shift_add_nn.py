"""Shift-add modules: what they compute, how they train, what they store. Formulas here are NumPy in float64."""

from __future__ import annotations

import copy
import io
import math
import pickle
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effattn
from effattn.integrations import convert_to_shift_add, freeze_shift_add
from effattn.nn import (
    FrozenShiftLinear,
    MixtureOfPrimitives,
    ShiftAddAttention,
    ShiftLinear,
    balance_loss,
    measure_expert_latency,
)

PARAMETRIZATIONS = ("Q", "PS")
every_parametrization = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
every_scale = pytest.mark.parametrize("scale", ["none", "channel"])


def close(got, wanted, **tolerances):
    torch.testing.assert_close(got, wanted, check_stride=False, **tolerances)


def array(tensor):
    return tensor.detach().double().numpy()


def lowest(bits):
    return -(2 ** (bits - 1) - 2)


def rounded(weight, bits, scale):
    """The nearest signed power of two in log2, row by row in units of the row's largest magnitude if asked."""
    weight = array(weight)
    unit = np.abs(weight).max(1, keepdims=True) if scale == "channel" else np.ones((len(weight), 1))
    unit[unit == 0] = 1
    with np.errstate(divide="ignore"):
        exponent = np.clip(np.round(np.log2(np.abs(weight) / unit)), lowest(bits), 0)
    return np.where(weight == 0, 0.0, np.sign(weight) * 2.0**exponent) * unit


def copies(thing):
    saved = io.BytesIO()
    torch.save(thing, saved)
    saved.seek(0)
    return copy.deepcopy(thing), pickle.loads(pickle.dumps(thing)), torch.load(saved, weights_only=False)


# ---- ShiftLinear: what it computes ----


@given(
    bits=st.integers(2, 5),
    scale=st.sampled_from(["none", "channel"]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    training=st.booleans(),
    seed=st.integers(0, 999),
)
def test_q_multiplies_by_the_nearest_power_of_two(bits, scale, sizes, training, seed):
    torch.manual_seed(seed)
    layer = ShiftLinear(*sizes, bits=bits, scale=scale).double().train(training)
    with torch.no_grad():
        layer.weight.mul_(2.0 ** torch.randint(-8, 3, layer.weight.shape))
        layer.weight[torch.rand(layer.weight.shape) < 0.2] = 0
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    expected = array(x) @ rounded(layer.weight, bits, scale).T + array(layer.bias)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-6, atol=1e-6)  # the scale is kept in float32


@every_scale
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_ps_multiplies_by_sign_and_shift(bits, scale):
    layer = ShiftLinear(7, 5, bits=bits, scale=scale, parametrization="PS").double()
    if scale == "channel":
        layer.scale.uniform_(0.3, 3)
    unit = array(layer.scale)[:, None] if scale == "channel" else 1.0
    sign = np.sign(np.round(array(layer.sign)))
    assert 0 in sign
    weight = unit * sign * 2.0 ** np.round(array(layer.shift))
    x = torch.randn(3, 7, dtype=torch.float64)
    for training in (True, False):
        np.testing.assert_allclose(array(layer.train(training)(x)), array(x) @ weight.T + array(layer.bias), rtol=1e-6)


def test_fixed_point_activations_are_integer_shifts():
    layer = ShiftLinear(9, 4, bits=5, parametrization="PS", activation="fixed16.16")
    x = 3 * torch.randn(6, 9)
    fixed = np.floor(array(x) * 2**16).astype(np.int64)
    shift = -np.round(array(layer.shift)).astype(np.int64)
    sign = np.sign(np.round(array(layer.sign))).astype(np.int64)
    total = (sign * (fixed[:, None] >> shift)).sum(2) + np.floor(array(layer.bias) * 2**16).astype(np.int64)
    np.testing.assert_array_equal(array(layer(x)), (total / 2**16).astype(np.float32))


def test_any_leading_dimensions_and_no_rows():
    layer = ShiftLinear(6, 3)
    x = torch.randn(2, 4, 6)
    close(layer(x), layer(x.flatten(0, 1)).unflatten(0, (2, 4)))
    assert layer(x[0, 0]).shape == (3,)
    out = layer(x[:0])
    out.sum().backward()
    assert out.shape == (0, 4, 3)
    assert not layer.weight.grad.any()


# ---- ShiftLinear: how it trains ----


@every_scale
def test_q_gradients_are_straight_through(scale):
    layer = ShiftLinear(7, 5, scale=scale).double()
    x, g = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    layer(x).backward(g)
    np.testing.assert_allclose(array(layer.weight.grad), array(g).T @ array(x), rtol=1e-12)
    np.testing.assert_allclose(array(layer.bias.grad), array(g).sum(0), rtol=1e-6)
    np.testing.assert_allclose(array(x.grad), array(g) @ rounded(layer.weight, 4, scale), rtol=1e-6, atol=1e-7)


@every_scale
def test_ps_gradients_are_those_of_deepshift_with_the_power_in_the_sign(scale):
    layer = ShiftLinear(7, 5, bits=5, scale=scale, parametrization="PS").double()
    if scale == "channel":
        layer.scale.uniform_(0.3, 3)
    unit = array(layer.scale)[:, None] if scale == "channel" else 1.0
    x, g = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    layer(x).backward(g)
    power = unit * 2.0 ** np.round(array(layer.shift))
    weight = power * np.sign(np.round(array(layer.sign)))
    dense = array(g).T @ array(x)
    np.testing.assert_allclose(array(layer.shift.grad), dense * weight * math.log(2), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(array(layer.sign.grad), dense * power, rtol=1e-6)
    assert (array(layer.sign.grad)[weight == 0] != 0).all()  # a weight that is zero can come back


def test_gradient_of_the_shift_is_that_of_a_power_that_is_not_rounded():
    """At whole shifts d(s 2^p)/dp = w ln 2, as finite differences of the formula without rounding say."""
    layer = ShiftLinear(3, 2, bias=False, bits=5, parametrization="PS").double()
    with torch.no_grad():
        layer.shift.round_()
        layer.sign.copy_(torch.tensor([[1, -1, 1], [-1, 1, -1]]))
    x = torch.randn(4, 3, dtype=torch.float64)
    layer(x).square().sum().backward()

    def loss(shift):
        return ((array(x) @ (array(layer.sign) * 2.0**shift).T) ** 2).sum()

    for index in np.ndindex(2, 3):
        step = np.zeros((2, 3))
        step[index] = 1e-6
        difference = (loss(array(layer.shift) + step) - loss(array(layer.shift) - step)) / 2e-6
        assert layer.shift.grad[index].item() == pytest.approx(difference, rel=1e-5)


def test_training_brings_the_shift_back_into_its_range_and_evaluation_writes_nothing():
    layer = ShiftLinear(4, 2, parametrization="PS")
    layer.shift.data.copy_(torch.tensor([[-9.0, -6.0, 0.0, 2.0]] * 2))
    before, x = layer.shift.detach().clone(), torch.randn(3, 4)
    out = layer.eval()(x)
    assert torch.equal(layer.shift, before)
    close(layer.train()(x), out)
    assert layer.shift.tolist() == [[-6.0, -6.0, 0.0, 0.0]] * 2


@every_parametrization
def test_a_layer_may_be_called_twice_before_the_backward_pass(parametrization):
    layer = ShiftLinear(4, 4, parametrization=parametrization)
    out = layer(layer(torch.randn(3, 4)))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_frozen_parameters_get_no_gradient_and_the_input_still_does():
    layer = ShiftLinear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()
    assert layer.weight.grad is None


def test_initialisation_is_as_published():
    torch.manual_seed(0)
    ps = ShiftLinear(400, 300, bits=5, parametrization="PS")
    assert ps.shift.min() >= -14
    assert ps.shift.max() <= 0
    close(ps.shift.mean(), torch.tensor(-7.0), rtol=0, atol=0.1)
    close(ps.sign.std(), torch.tensor(3**-0.5), rtol=0.02, atol=0)
    q = ShiftLinear(400, 300)
    for bound in (q.weight, q.bias, ps.bias):
        assert bound.abs().max() <= 400**-0.5
        assert bound.abs().max() > 0.9 * 400**-0.5


# ---- ShiftLinear: conversion, storage ----


@every_scale
@every_parametrization
def test_a_converted_layer_is_the_rounded_layer(parametrization, scale):
    linear = nn.Linear(33, 17)
    with torch.no_grad():
        linear.weight[torch.rand(linear.weight.shape) < 0.1] = 0
    layer = ShiftLinear.from_linear(linear, parametrization=parametrization, scale=scale, bits=5)
    got = array(layer.to_linear().weight)
    np.testing.assert_allclose(got, rounded(linear.weight, 5, scale), rtol=1e-6)
    weight = array(linear.weight)
    inside = np.abs(weight) > 2.0**-13
    ratio = np.abs(got[inside] / weight[inside])
    assert ratio.min() > 0.999 * 2**-0.5
    assert ratio.max() < 1.001 * 2**0.5
    close(layer.bias, linear.bias)


@every_parametrization
def test_powers_of_two_survive_conversion_and_back(parametrization):
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-1, 2, (6, 8)) * 2.0 ** torch.randint(-6, 1, (6, 8)))
    back = ShiftLinear.from_linear(linear, parametrization=parametrization).to_linear()
    assert torch.equal(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)


@every_parametrization
def test_conversion_shares_nothing(parametrization):
    linear = nn.Linear(8, 6).eval()
    before = copy.deepcopy(linear.state_dict())
    layer = ShiftLinear.from_linear(linear, parametrization=parametrization)
    assert not layer.training
    for parameter in layer.parameters():
        parameter.data.fill_(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())


def test_state_has_the_published_names():
    assert set(ShiftLinear(4, 3, parametrization="PS").state_dict()) == {"shift", "sign", "bias"}
    assert set(ShiftLinear(4, 3, bias=False).state_dict()) == {"weight"}
    layer, linear = ShiftLinear(4, 3), nn.Linear(4, 3)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


@every_scale
@every_parametrization
def test_state_goes_into_another_layer(parametrization, scale):
    layer = ShiftLinear.from_linear(nn.Linear(9, 5), parametrization=parametrization, scale=scale)
    other = ShiftLinear(9, 5, parametrization=parametrization, scale=scale).eval()
    x = torch.randn(3, 9)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer.eval()(x))


@every_parametrization
def test_evaluation_packs_once_and_again_after_a_write(parametrization):
    layer = ShiftLinear(9, 5, parametrization=parametrization).eval()
    assert layer.pack() is layer.pack()
    first = layer.pack()
    x = torch.randn(4, 9)
    before = layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).square().sum().backward()
    optimizer.step()
    assert layer.pack() is not first
    with torch.no_grad():
        assert not torch.equal(layer(x), before)
        for parameter in layer._weights():
            parameter.data.zero_()  # torch counts no write here
        close(layer.eval()(x), layer.to_linear()(x))


def test_training_never_uses_a_kept_weight():
    layer = ShiftLinear(9, 5)
    with torch.no_grad():
        layer(torch.randn(2, 9))
        layer.weight.data.zero_()
        close(layer(torch.randn(2, 9)), layer.bias.expand(2, 5))


def test_a_weight_packed_in_inference_mode_serves_autograd_too():
    layer = ShiftLinear(9, 5).eval().requires_grad_(False)
    x = torch.randn(2, 9)
    with torch.inference_mode():
        out = layer(x)
    assert torch.equal(layer(x), out)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()


@every_parametrization
@pytest.mark.parametrize(("bits", "times"), [(4, 8), (5, 4)])
def test_the_frozen_layer_stores_codes_and_computes_the_same(parametrization, bits, times):
    layer = ShiftLinear(64, 32, bits=bits, parametrization=parametrization).eval()
    frozen = layer.freeze()
    x = torch.randn(3, 64)
    assert torch.equal(frozen(x), layer(x))
    state = frozen.state_dict()
    assert set(state) == {"codes", "bias"}
    assert state["codes"].nbytes * times == 64 * 32 * 4
    assert not list(frozen.parameters())
    other = FrozenShiftLinear(64, 32, bits=bits)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    close(frozen.to_linear()(x), layer(x))


def test_a_frozen_layer_keeps_its_values_when_the_layer_goes_on():
    layer = ShiftLinear(8, 4, scale="channel").eval()
    x = torch.randn(3, 8)
    frozen, before = layer.freeze(), layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(frozen(x), before)


def test_a_state_dict_of_codes_is_loaded_with_weights_only():
    saved = io.BytesIO()
    frozen = ShiftLinear(8, 4, scale="channel").freeze()
    torch.save(frozen.state_dict(), saved)
    saved.seek(0)
    other = FrozenShiftLinear(8, 4, scale="channel")
    other.load_state_dict(torch.load(saved, weights_only=True))
    x = torch.randn(3, 8)
    assert torch.equal(other(x), frozen(x))


@pytest.mark.parametrize("make", [lambda layer: layer, lambda layer: layer.freeze()], ids=["trained", "frozen"])
@every_scale
@every_parametrization
def test_layers_can_be_copied_and_pickled(parametrization, scale, make):
    layer = make(ShiftLinear(12, 6, parametrization=parametrization, scale=scale).eval())
    x = torch.randn(2, 12)
    out = layer(x)
    for other in copies(layer):
        assert torch.equal(other(x), out)
        assert repr(other) == repr(layer)
    assert "bits=4" in repr(layer)


@every_scale
@every_parametrization
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers_move_to_other_dtypes_and_the_scale_stays(parametrization, scale, dtype):
    layer = ShiftLinear.from_linear(nn.Linear(12, 6), parametrization=parametrization, scale=scale)
    frozen = layer.freeze().to(dtype)
    layer.to(dtype)
    x = torch.randn(4, 12, dtype=dtype)
    out = layer(x)
    out.sum().backward()
    assert out.dtype == dtype
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())
    assert frozen(x).dtype == dtype
    for module in (layer, frozen):
        assert getattr(module, "scale", None) is None or module.scale.dtype == torch.float32


def test_layers_are_made_on_the_meta_device():
    for module in (ShiftLinear(12, 6, device="meta"), FrozenShiftLinear(12, 6, device="meta")):
        assert module(torch.empty(3, 12, device="meta")).shape == (3, 6)
        with torch.no_grad():
            loaded = module.to_empty(device="cpu")
        assert loaded(torch.randn(3, 12)).shape == (3, 6)


def test_autocast_computes_in_its_dtype_and_trains_the_parameters_in_theirs():
    layer = ShiftLinear(12, 6, parametrization="PS")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(4, 12))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.shift.grad.dtype == layer.sign.grad.dtype == torch.float32


@every_parametrization
def test_a_training_step_compiles_to_one_graph(parametrization):
    layer = ShiftLinear(12, 6, parametrization=parametrization)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    other(x).square().sum().backward()
    for (name, got), wanted in zip(layer.named_parameters(), other.parameters()):
        close(got.grad, wanted.grad, msg=name)


def test_the_frozen_layer_compiles_to_one_graph():
    frozen = ShiftLinear(12, 6, scale="channel").freeze()
    x = torch.randn(4, 12)
    close(torch.compile(frozen, fullgraph=True, backend="aot_eager")(x), frozen(x))


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"bits": 6}, ValueError, "bits"),
        ({"bits": 1}, ValueError, "bits"),
        ({"bits": 4.0}, TypeError, "bits"),
        ({"scale": "row"}, ValueError, "scale"),
        ({"parametrization": "P"}, ValueError, "parametrization"),
        ({"activation": "int4"}, ValueError, "activation"),
        ({"activation": "fixed16.16", "scale": "channel"}, ValueError, "scale"),
    ],
)
def test_layer_refuses_what_it_cannot_be(options, error, names):
    with pytest.raises(error, match=f"ShiftLinear: .*{names}"):
        ShiftLinear(4, 3, **options)


def test_layer_refuses_what_it_cannot_take():
    with pytest.raises(TypeError, match="in_features"):
        ShiftLinear("4", 3)
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear"):
        ShiftLinear.from_linear(nn.Conv1d(4, 3, 1))
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\)"):
        ShiftLinear(4, 3)(torch.randn(2, 5))


# ---- ShiftAddAttention ----


def attend(module, x):
    """The module in NumPy: published formula, statistics of each sample and head."""
    state = {name: array(tensor) for name, tensor in module.state_dict().items()}
    batch, tokens, _ = x.shape
    heads, width = module.num_heads, module.head_dim

    def project(name, parts):
        out = array(x) @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)
        return out.reshape(batch, tokens, parts, heads, width)

    if module.fused_qkv:
        q, k, v = project("qkv", 3).transpose(2, 0, 3, 1, 4)
    else:
        (q,), (k, v) = project("q", 1).transpose(2, 0, 3, 1, 4), project("kv", 2).transpose(2, 0, 3, 1, 4)
    out = np.empty((batch, tokens, heads, width))
    for b, h in np.ndindex(batch, heads):
        qh, kh = (t[b, h] / np.linalg.norm(t[b, h], axis=-1, keepdims=True) for t in (q, k))
        bq, bk = ((t > 0) * np.abs(t).mean() for t in (qh, kh))
        u = 0.5 * v[b, h] + bq @ (bk.T @ v[b, h]) / np.pi
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        if module.dconv is not None:
            for c in range(width):
                u[:, c] += np.convolve(v[b, h, :, c], state["dconv.weight"][h, 0, ::-1, 0], "same")
        out[b, :, h] = u
    return out.reshape(batch, tokens, -1) @ state["proj.weight"].T + state["proj.bias"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kernel", [0, 1, 9])
def test_attention_is_its_formula(fused, kernel):
    module = ShiftAddAttention(24, 3, qkv_bias=True, fused_qkv=fused, residual_kernel=kernel).double()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    np.testing.assert_allclose(array(module(x)), attend(module, x), rtol=1e-9, atol=1e-12)


def test_attention_has_the_published_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in ShiftAddAttention(24, 3).state_dict().items()}
    assert shapes == {
        "q.weight": (24, 24),
        "kv.weight": (48, 24),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
        "dconv.weight": (3, 1, 9, 1),
    }
    assert "qkv.weight" in ShiftAddAttention(24, 3, fused_qkv=True).state_dict()


def test_a_sample_depends_on_its_batch_as_published_and_not_by_default():
    x = torch.randn(2, 10, 24)
    x[1] *= torch.rand(10, 24)
    for binarize, alike in (("per_head", True), ("published", False), ("mean_threshold", False), ("sign", True)):
        module = ShiftAddAttention(24, 3, binarize=binarize)
        assert torch.allclose(module(x)[:1], module(x[:1]), atol=1e-5) == alike, binarize


@pytest.mark.parametrize("linear", ["dense", "shift"])
def test_every_parameter_of_attention_receives_a_gradient(linear):
    options = {"parametrization": "PS"} if linear == "shift" else None
    module = ShiftAddAttention(24, 3, qkv_bias=True, linear=linear, linear_options=options)
    module(torch.randn(2, 10, 24)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.any(), name
    assert isinstance(module.q, ShiftLinear) == (linear == "shift")


def test_sparse_term_is_softmax_attention_above_the_threshold():
    torch.manual_seed(0)
    module = ShiftAddAttention(8, 1, sparse_reg=True, residual_kernel=0).double()
    with torch.no_grad():
        module.q.weight.mul_(6)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    q = array(x[0]) @ array(module.q.weight).T
    k, v = np.split(array(x[0]) @ array(module.kv.weight).T, 2, axis=1)
    a = np.exp(q @ k.T / 8**0.5)
    a /= a.sum(1, keepdims=True)
    assert 0 < (a > 0.02).mean() < 1
    qn, kn = (t / np.linalg.norm(t, axis=-1, keepdims=True) for t in (q, k))
    bq, bk = ((t > 0) * np.abs(t).mean() for t in (qn, kn))
    u = (a * (a > 0.02)) @ v + 0.5 * v + bq @ (bk.T @ v) / np.pi
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    expected = u @ array(module.proj.weight).T + array(module.proj.bias)
    np.testing.assert_allclose(array(module(x)[0]), expected, rtol=1e-9)


def test_sparse_term_is_absent_in_evaluation_and_where_attention_is_spread_thin():
    plain, sparse = (ShiftAddAttention(24, 3, sparse_reg=on) for on in (False, True))
    sparse.load_state_dict(plain.state_dict())
    x = torch.randn(2, 20, 24)
    assert not torch.allclose(sparse(x), plain(x), atol=1e-3)
    assert torch.equal(sparse.eval()(x), plain(x))
    with torch.no_grad():
        for module in (plain, sparse):
            module.q.weight.mul_(1e-4)  # 64 tokens of weight 1/64
    close(sparse.train()(torch.ones(1, 64, 24)), plain(torch.ones(1, 64, 24)), rtol=1e-4, atol=1e-4)


def test_attention_drops_out_in_training_only():
    module = ShiftAddAttention(24, 3, proj_drop=0.5)
    x = torch.randn(1, 10, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_attention_copies_pickles_and_compiles():
    module = ShiftAddAttention(24, 3, linear="shift").eval()
    x = torch.randn(2, 10, 24)
    out = module(x)
    for other in copies(module):
        assert torch.equal(other(x), out)
    close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), out)


def test_attention_takes_the_published_call_and_refuses_masks():
    module, x = ShiftAddAttention(24, 3), torch.randn(1, 12, 24)
    assert torch.equal(module(x, 3, 4), module(x))
    for arguments in ({"attn_mask": torch.ones(12, 12)}, {"is_causal": True}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            module(x, **arguments)
    with pytest.raises(ValueError, match="attn_mask"):
        module(x, torch.ones(12, 12))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"residual_kernel": 4}, "residual_kernel"),
        ({"binarize": "mean"}, "binarize"),
        ({"linear": "int8"}, "linear"),
        ({"linear_options": {"bits": 4}}, "linear_options"),
        ({"proj_drop": 1.5}, "proj_drop"),
    ],
)
def test_attention_refuses_what_it_cannot_be(options, names):
    with pytest.raises(ValueError, match=names):
        ShiftAddAttention(24, **{"num_heads": 3, **options})


# ---- MixtureOfPrimitives ----


def mixture(dim=6, **options):
    return MixtureOfPrimitives(dim, (nn.Linear(dim, 4), ShiftLinear(dim, 4)), **{"noise": None, **options})


def softmax(scores):
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_each_token_goes_through_its_likelier_expert_times_its_probability():
    module = mixture().double().eval()
    x = torch.randn(3, 10, 6, dtype=torch.float64)
    flat = array(x).reshape(-1, 6)
    gate = softmax(flat @ array(module.router.weight).T + array(module.router.bias))
    both = np.stack([array(expert(x.flatten(0, 1))) for expert in module.experts])
    choice = gate.argmax(1)
    assert 0 < choice.mean() < 1
    expected = gate.max(1)[:, None] * both[choice, np.arange(30)]
    np.testing.assert_allclose(array(module(x)).reshape(30, 4), expected, rtol=1e-12)
    np.testing.assert_allclose(array(module.shares), [1 - choice.mean(), choice.mean()], rtol=1e-6)


@pytest.mark.parametrize("wins", [0, 1])
def test_an_expert_without_tokens_is_fine(wins):
    module = mixture()
    with torch.no_grad():
        module.router.bias[wins] = 1e3
    x = torch.randn(5, 6)
    out = module(x)
    close(out, module.experts[wins](x))
    out.sum().backward()
    idle = module.experts[1 - wins]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in idle.parameters())
    assert module.shares[wins] == 1


def test_no_tokens_at_all():
    module = mixture()
    out, loss = module(torch.randn(0, 6), return_loss=True)
    assert out.shape == (0, 4)
    assert loss == 0


def test_each_expert_sees_only_its_tokens():
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    module = MixtureOfPrimitives(6, (Counting(6, 6), Counting(6, 6)), noise=None)
    module(torch.randn(40, 6))
    assert sum(seen) == 40
    assert len(seen) == 2


def test_the_router_has_the_gradient_of_finite_differences():
    """The published top-1 gate is the constant 1, whose router learns nothing from the task."""
    module = mixture().double()
    x = torch.randn(20, 6, dtype=torch.float64)
    target = torch.randn(20, 4, dtype=torch.float64)

    def loss():
        return (module(x) * target).sum()

    loss().backward()
    for parameter in module.router.parameters():
        assert parameter.grad.any()
        for index in np.ndindex(tuple(parameter.shape)):
            with torch.no_grad():
                parameter[index] += 1e-6
                above = loss().item()
                parameter[index] -= 2e-6
                below = loss().item()
                parameter[index] += 1e-6
            assert parameter.grad[index].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-7)


def test_a_straight_through_gate_leaves_the_experts_outputs_and_the_gradient():
    module = mixture(gate="straight_through")
    scaled = copy.deepcopy(module)
    scaled.gate = "probability"
    x, g = torch.randn(20, 6), torch.randn(20, 4)
    gate = module.router(x).softmax(-1).amax(-1, keepdim=True)
    close(scaled(x), module(x) * gate)
    module(x).backward(g)
    scaled(x).backward(g)
    assert module.router.weight.grad.any()
    close(module.router.weight.grad, scaled.router.weight.grad)


@pytest.mark.parametrize("latencies", [(1.0, 1.0), (6.0, 4.0), (1e-3, 5e-3)])
def test_balance_loss_is_its_formula_without_noise(latencies):
    module = mixture(latencies=latencies).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    out, loss = module(x, return_loss=True)
    scores = array(module.router(x))
    weights = np.array(latencies) / sum(latencies)

    def variation(amounts):
        return amounts.var(ddof=1) / amounts.mean() ** 2

    expected = variation(weights * softmax(scores).sum(0))
    expected += variation(weights * np.bincount(scores.argmax(1), minlength=2))
    assert out.shape == (50, 4)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert loss is module.balance_loss


def test_balance_loss_with_noise_counts_the_chance_of_being_chosen():
    module = mixture(noise="learned", latencies=(3, 2)).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.manual_seed(3)
    loss = module(x, return_loss=True)[1]
    torch.manual_seed(3)
    clean = array(module.router(x))
    deviation = np.log1p(np.exp(array(x) @ array(module.w_noise))) + 0.01
    noisy = clean + deviation * array(torch.randn(50, 2, dtype=torch.float64))
    chance = np.vectorize(lambda z: 0.5 * math.erfc(-z / 2**0.5))((clean - noisy[:, ::-1]) / deviation)
    weights = np.array([0.6, 0.4])
    parts = weights * softmax(clean).sum(0), weights * chance.sum(0)
    expected = sum(part.var(ddof=1) / part.mean() ** 2 for part in parts)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert module.w_noise.grad.any()


@pytest.mark.parametrize(("latencies", "share"), [((1, 1), 0.5), ((3, 1), 0.25), ((1, 4), 0.8)])
def test_balancing_gives_each_expert_tokens_in_proportion_to_its_speed(latencies, share):
    torch.manual_seed(0)
    module = MixtureOfPrimitives(8, (nn.Identity(), nn.Identity()), latencies=latencies, noise=0.5)
    with torch.no_grad():
        module.router.bias.copy_(torch.tensor([1.0, -1.0]))
    optimizer = torch.optim.Adam(module.router.parameters(), lr=0.05)
    x = torch.randn(512, 8)
    for _ in range(150):
        loss = module(x, return_loss=True)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module(x)
    assert module.shares[0].item() == pytest.approx(share, abs=0.08)


def test_noise_is_for_training_only():
    module = mixture(noise=2.0)
    x = torch.randn(40, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    assert module.balance_loss is None


def test_balance_losses_of_a_model_add_up_and_need_no_changed_call():
    model = nn.Sequential(MixtureOfPrimitives(6), nn.ReLU(), MixtureOfPrimitives(6))
    assert balance_loss(model) == 0
    model(torch.randn(30, 6))
    close(balance_loss(model), model[0].balance_loss + model[2].balance_loss)
    balance_loss(model).backward()
    assert model[0].router.weight.grad.any()


def test_a_mixture_can_be_copied_and_pickled_after_a_training_call():
    module = mixture(noise="learned", latencies=(2, 1))
    module(torch.randn(10, 6))
    x = torch.randn(10, 6)
    out = module.eval()(x)
    module.train()(x)
    for other in copies(module):
        assert torch.equal(other.eval()(x), out)
        assert other.latencies.tolist() == [2, 1]


def test_a_mixture_loads_the_published_router():
    module = mixture()
    state = {(f"gate.gate.{k[7:]}" if k.startswith("router.") else k): v for k, v in module.state_dict().items()}
    kept = dict(state)
    other = mixture()
    other.load_state_dict(state)
    assert torch.equal(other.router.weight, module.router.weight)
    assert state.keys() == kept.keys()


def test_a_mixture_runs_under_compile_and_autocast():
    module = mixture().eval()
    x = torch.randn(16, 6)
    close(torch.compile(module, backend="aot_eager")(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_latency_tells_a_slow_expert_from_a_fast_one_and_leaves_the_module_alone():
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.003)
            return super().forward(x)

    module = MixtureOfPrimitives(6, (Slow(6, 6), nn.Linear(6, 6)))
    slow, fast = measure_expert_latency(module, torch.randn(4, 6), repeats=3)
    assert slow >= 0.003
    assert 0 < fast < slow
    assert module.training
    assert module.latencies.tolist() == [1, 1]
    module.set_latencies((slow, fast))
    close(module.latencies, torch.tensor([slow, fast]))
    assert len(measure_expert_latency([nn.Identity()] * 3, torch.randn(4, 6), repeats=1)) == 3


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: MixtureOfPrimitives(0), ValueError, "dim"),
        (lambda: mixture(gate="hard"), ValueError, "gate"),
        (lambda: mixture(noise="fixed"), ValueError, "noise"),
        (lambda: mixture(noise=-1), ValueError, "noise"),
        (lambda: mixture(latencies=(1, 0)), ValueError, "latencies"),
        (lambda: mixture(latencies=3), TypeError, "latencies"),
        (lambda: MixtureOfPrimitives(4, (nn.Linear(4, 4),)), ValueError, "experts"),
        (lambda: MixtureOfPrimitives(4, (torch.relu, nn.Identity())), TypeError, "experts"),
        (lambda: mixture()(torch.randn(2, 7)), ValueError, "6 channels"),
        (lambda: mixture()([1.0]), TypeError, "x must be a Tensor"),
        (lambda: measure_expert_latency([], torch.ones(1)), ValueError, "experts"),
        (lambda: measure_expert_latency([nn.Identity()], 3), TypeError, "example_input"),
        (lambda: measure_expert_latency([nn.Identity()], torch.ones(1), repeats=0), ValueError, "repeats"),
    ],
)
def test_mixture_refuses_what_it_cannot_be_or_take(call, error, names):
    with pytest.raises(error, match=names):
        call()


# ---- they learn ----


def spirals(count, generator):
    """Two interleaved spirals: no linear layer separates them."""
    t = 1 + 6 * torch.rand(count, generator=generator)
    label = torch.randint(2, (count,), generator=generator)
    angle = t + math.pi * label
    points = torch.stack((t * angle.cos(), t * angle.sin()), 1) / 7
    return points + 0.01 * torch.randn(points.shape, generator=generator), label


def fit(model, batches, *, lr=1e-2, steps=300, extra=0.0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        x, label = batches()
        loss = F.cross_entropy(model(x), label) + extra * balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model, x, label):
    with torch.no_grad():
        return (model(x).argmax(-1) == label).float().mean().item()


@every_parametrization
def test_shift_layers_learn_spirals_from_a_random_start_and_stay_right_when_frozen(parametrization):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    norm = nn.LayerNorm(64, elementwise_affine=False)
    layers = [ShiftLinear(a, b, bits=5, parametrization=parametrization) for a, b in ((2, 64), (64, 64), (64, 2))]
    model = nn.Sequential(layers[0], norm, nn.ReLU(), layers[1], norm, nn.ReLU(), layers[2])  # nothing else to train
    model = fit(model, lambda: spirals(256, generator))
    x, label = spirals(1000, generator)
    assert accuracy(model, x, label) > 0.97
    assert freeze_shift_add(model) == 3
    assert accuracy(model, x, label) > 0.97


def test_attention_learns_to_say_which_token_is_there():
    """Whether a marked token occurs anywhere: no layer but attention mixes tokens."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    mark = torch.randn(16, generator=generator)

    def batch(count=64):
        x = torch.randn(count, 12, 16, generator=generator)
        label = torch.randint(2, (count,), generator=generator)
        where = torch.randint(11, (count,), generator=generator) + 1
        x[torch.arange(count), where] += 2 * label[:, None] * mark
        return x, label

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(16, 32)
            self.attention = ShiftAddAttention(32, 4, linear="shift", residual_kernel=3)
            self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 2))

        def forward(self, x):
            x = F.gelu(self.embed(x))
            return self.mlp((x + self.attention(x))[:, 0])  # the first token is never the marked one

    model = fit(Model(), batch, lr=5e-3)
    x, label = batch(500)
    assert accuracy(model, x, label) > 0.85


def test_a_mixture_learns_and_uses_the_cheaper_expert_more():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def expert(kind):
        return nn.Sequential(kind(16, 64), nn.LayerNorm(64), nn.ReLU(), kind(64, 16))

    mixed = MixtureOfPrimitives(16, (expert(nn.Linear), expert(ShiftLinear)), latencies=(2, 1))
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), mixed, nn.LayerNorm(16), nn.Linear(16, 2))
    model = fit(model, lambda: spirals(256, generator), extra=0.05, steps=200)
    x, label = spirals(1000, generator)
    assert accuracy(model, x, label) > 0.95
    assert 0.15 < mixed.shares[0] < 0.5  # the multiplication expert is said to take twice as long


def test_a_trained_network_survives_conversion_and_a_little_more_training():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    fit(model, lambda: spirals(256, generator), steps=400)
    x, label = spirals(1000, generator)
    dense = accuracy(model, x, label)
    assert dense > 0.97
    convert_to_shift_add(model, skip="4", scale="channel")
    fit(model, lambda: spirals(256, generator), steps=100, lr=3e-3)
    assert accuracy(model, x, label) > dense - 0.03


def test_mixture_takes_a_single_token():
    mixture = effattn.nn.MixtureOfPrimitives(4).eval()
    x = torch.randn(4)
    assert torch.equal(mixture(x), mixture(x[None])[0])


@pytest.mark.parametrize(
    ("kind", "arguments", "exception", "message"),
    [
        (effattn.nn.ShiftLinear, {"in_features": 2, "out_features": 2, "bias": 1}, TypeError, "bias must be a bool"),
        (effattn.nn.PatchMerger, {"dim": 2, "num_tokens": 2, "device": "moon"}, ValueError, "device must be"),
        (effattn.nn.PatchMerger, {"dim": 2, "num_tokens": 2, "dtype": torch.int32}, TypeError, "dtype must be"),
        (effattn.nn.GaussianMixtureAttention, {"dim": 0, "grid": (2, 2)}, ValueError, "dim must be at least 1"),
        (effattn.nn.GaussianMixtureAttention, {"dim": 4, "grid": 2}, TypeError, "grid must be a pair"),
    ],
)
def test_wrong_options_of_a_module_are_refused_by_name(kind, arguments, exception, message):
    with pytest.raises(exception, match=message):
        kind(**arguments)


def test_module_in_another_dtype_is_told_so():
    with pytest.raises(TypeError, match=r"x must have the module's dtype torch\.float32, got torch\.float64"):
        effattn.nn.URPEAttention(4, 2, num_tokens=3)(torch.randn(1, 3, 4, dtype=torch.float64))
