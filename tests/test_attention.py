"""effattn.scaled_dot_product_attention against torch's: same signature, same semantics, same gradients."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from conformance import RecordedCalls, require
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import effattn
from effattn import scaled_dot_product_attention

NINF = float("-inf")
every_backend = pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])


@pytest.fixture(autouse=True)
def _available(request):
    if "backend" in request.fixturenames:
        require("scaled_dot_product_attention", request.getfixturevalue("backend"))


def qkv(batch=2, heads=4, queries=9, keys=None, head_dim=8, kv_heads=None, dtype=torch.float32):
    keys, kv_heads = queries if keys is None else keys, heads if kv_heads is None else kv_heads
    query = torch.randn(batch, heads, queries, head_dim, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, keys, head_dim, dtype=dtype)
    return query, key, value


def torch_in_double(query, key, value, attn_mask=None, **options):
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask, **options)


def assert_parity(query, key, value, attn_mask=None, *, backend, **options):
    """Output and gradients equal those of torch's math backend in float64."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[query.dtype]
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    exact_inputs = [t.detach().double().requires_grad_() for t in (query, key, value)]
    out = scaled_dot_product_attention(*inputs, attn_mask, backend=backend, **options)
    exact = torch_in_double(*exact_inputs, attn_mask, **options)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    grad_output = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, grad_output)
    for gradient, wanted in zip(gradients, torch.autograd.grad(exact, exact_inputs, grad_output.double())):
        torch.testing.assert_close(gradient.double(), wanted, rtol=4 * tolerance, atol=4 * tolerance)


def test_signature_is_that_of_torch_plus_backend():
    ours = inspect.signature(scaled_dot_product_attention).parameters
    theirs = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(ours) == [*theirs, "backend"]
    defaults = [ours[name].default for name in theirs[3:]]
    assert defaults == [None, 0.0, False, None, False]
    assert ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_mask(backend, dtype):
    assert_parity(*qkv(dtype=dtype), backend=backend)


@every_backend
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 7), (7, 1)])
def test_causal_is_aligned_to_the_top_left(backend, queries, keys):
    assert_parity(*qkv(queries=queries, keys=keys), backend=backend, is_causal=True)


@every_backend
def test_causal_ignores_the_future_to_the_last_bit(backend):
    query, key, value = qkv(queries=70, batch=1, heads=1)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, backend=backend)
    for changed in (1, 33, 69):
        later_key, later_value = key.clone(), value.clone()
        later_key[:, :, changed:] = 50.0
        later_value[:, :, changed:] = -7.0
        other = scaled_dot_product_attention(query, later_key, later_value, is_causal=True, backend=backend)
        if backend == "reference":
            torch.testing.assert_close(other[:, :, :changed], out[:, :, :changed])
        else:
            assert torch.equal(other[:, :, :changed], out[:, :, :changed])
        assert not torch.equal(other[:, :, changed:], out[:, :, changed:])


BROADCASTABLE = [
    shape for rank in (2, 3, 4) for shape in itertools.product(*[(1, size) for size in (2, 4, 6, 9)[4 - rank :]])
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("shape", BROADCASTABLE, ids=str)
def test_mask_of_every_broadcastable_shape(backend, kind, shape):
    mask = torch.randn(shape)
    mask = mask > -0.5 if kind == "boolean" else mask
    assert_parity(*qkv(queries=6, keys=9), mask, backend=backend)


@every_backend
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_mask_under_tritons_interpreter_too(backend, kind):
    mask = torch.randn(2, 1, 6, 9)
    assert_parity(*qkv(queries=6, keys=9), mask > -0.5 if kind == "boolean" else mask, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["transposed", "every other", "a slice"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_mask_of_any_strides(backend, kind, layout):
    mask = {
        "transposed": torch.randn(2, 4, 9, 6).mT,
        "every other": torch.randn(2, 4, 6, 18)[..., ::2],
        "a slice": torch.randn(4, 8, 20, 30)[1:3, 2:6, 5:11, 7:16],
    }[layout]
    assert_parity(*qkv(queries=6, keys=9), mask > -0.5 if kind == "boolean" else mask, backend=backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_dtype", ["same", "float32"])
def test_additive_mask_of_querys_dtype_or_float32(backend, dtype, mask_dtype):
    mask = torch.randn(6, 9, dtype=dtype if mask_dtype == "same" else torch.float32)
    assert_parity(*qkv(queries=6, keys=9, dtype=dtype), mask, backend=backend)


@every_backend
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_row_with_nothing_to_attend_to_gives_zero(backend, kind):
    mask = torch.rand(2, 4, 6, 9) > 0.3
    mask[0, :, 2] = False
    mask[1, 3] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, NINF)
    query, key, value = (t.requires_grad_() for t in qkv(queries=6, keys=9))
    out = scaled_dot_product_attention(query, key, value, mask, backend=backend)
    assert not out[0, :, 2].any()
    assert not out[1, 3].any()
    gradients = torch.autograd.grad(out.square().sum() + out.sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0, :, 2].any()
    assert not gradients[1][1, 3].any()
    assert not gradients[2][1, 3].any()
    assert_parity(query, key, value, mask, backend=backend)


@every_backend
def test_everything_masked_gives_zero(backend):
    query, key, value = (t.requires_grad_() for t in qkv())
    out = scaled_dot_product_attention(query, key, value, torch.zeros(9, 9, dtype=torch.bool), backend=backend)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


@every_backend
def test_masked_keys_have_no_influence_even_if_they_are_huge(backend):
    query, key, value = qkv(queries=6, keys=70)
    mask = torch.ones(6, 70, dtype=torch.bool)
    mask[:, 40:] = False
    loud_key, loud_value = key.clone(), value.clone()
    loud_key[:, :, 40:], loud_value[:, :, 40:] = 1e4, 1e4
    out = scaled_dot_product_attention(query, loud_key, loud_value, mask, backend=backend)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key[:, :, :40], value[:, :, :40]))


@every_backend
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean"])
def test_grouped_query_heads(backend, kv_heads, mask):
    options = {"is_causal": True} if mask == "causal" else {}
    attn_mask = torch.rand(2, 4, 9, 9) > 0.4 if mask == "boolean" else None
    assert_parity(*qkv(kv_heads=kv_heads), attn_mask, enable_gqa=True, backend=backend, **options)


@every_backend
@pytest.mark.parametrize("scale", [0.0, 0.37, -1.0, 3])
def test_scale(backend, scale):
    assert_parity(*qkv(), scale=scale, backend=backend)


@every_backend
def test_no_keys_give_zero(backend):
    query, key, value = qkv(queries=3, keys=0)
    assert_parity(query, key, value, backend=backend)
    assert not scaled_dot_product_attention(query, key, value, backend=backend).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 80), st.integers(1, 80), st.integers(1, 70)),
    kind=st.sampled_from(["none", "causal", "boolean", "additive"]),
    grouped=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_parity_over_shapes_and_masks(backend, sizes, kind, grouped, seed):
    torch.manual_seed(seed)
    batch, heads, queries, keys, head_dim = sizes
    tensors = qkv(batch, heads, queries, keys, head_dim, kv_heads=1 if grouped else None)
    mask = {"boolean": torch.rand(queries, keys) > 0.5, "additive": torch.randn(batch, 1, queries, keys)}.get(kind)
    assert_parity(*tensors, mask, is_causal=kind == "causal", enable_gqa=grouped, backend=backend)


# ---- what goes to torch, unchanged ----


def test_mask_that_wants_a_gradient_gets_torchs():
    query, key, value = qkv()
    mask = torch.randn(2, 4, 9, 9, requires_grad=True)
    with RecordedCalls() as recorded:
        out = scaled_dot_product_attention(query, key, value, mask)
    assert not recorded.calls
    exact = mask.detach().double().requires_grad_()
    wanted = torch.autograd.grad(torch_in_double(query, key, value, exact).square().sum(), exact)[0]
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), mask)[0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_dropout_goes_to_torch():
    query, key, value = qkv(queries=40)
    with RecordedCalls() as recorded:
        torch.manual_seed(1)
        got = scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    assert not recorded.calls
    torch.manual_seed(1)
    assert torch.equal(got, F.scaled_dot_product_attention(query, key, value, dropout_p=0.3))


def _handed_over():
    query, key, value = torch.randn(3, 2, 9, 8)
    yield "three-dimensional inputs", (query, key, value), {}
    yield "three-dimensional inputs with a mask", (query, key, value), {"attn_mask": torch.randn(9, 9)}
    yield "two-dimensional inputs", (query[0], key[0], value[0]), {}
    yield "five-dimensional inputs", tuple(t[None, None] for t in (query, key, value)), {"is_causal": True}
    four = tuple(t[None] for t in (query, key, value))
    yield "a value of another head_dim", (*four[:2], torch.randn(1, 2, 9, 5)), {}
    yield "float64", tuple(t.double() for t in four), {"attn_mask": torch.randn(9, 9, dtype=torch.float64)}
    yield "head_dim 300", tuple(torch.randn(3, 1, 2, 9, 300)), {}
    yield "batch of keys broadcast", (four[0].expand(3, -1, -1, -1), *four[1:]), {}
    yield "mask and is_causal", four, {"attn_mask": torch.rand(9, 9) > 0.2, "is_causal": True}
    yield "a mask of one dimension", four, {"attn_mask": torch.randn(9)}


HANDED_OVER = list(_handed_over())


@pytest.mark.parametrize(("inputs", "options"), [h[1:] for h in HANDED_OVER], ids=[h[0] for h in HANDED_OVER])
def test_what_the_engine_does_not_serve_is_torchs_own_call(inputs, options):
    with RecordedCalls() as recorded:
        got = _outcome(scaled_dot_product_attention, inputs, options)
    assert not recorded.calls
    wanted = _outcome(F.scaled_dot_product_attention, inputs, options)
    assert torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted
    with pytest.raises(NotImplementedError, match="backend='cpu' cannot serve this call"):
        scaled_dot_product_attention(*inputs, **options, backend="cpu")


def _outcome(function, inputs, options):
    try:
        return function(*inputs, **options)
    except (RuntimeError, IndexError) as error:
        return type(error), str(error)


BAD = {
    "another head_dim": lambda q, k, v: ((q, k[..., 1:], v), {}),
    "heads without enable_gqa": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {}),
    "heads that do not divide": lambda q, k, v: ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
    "a mask that does not broadcast": lambda q, k, v: ((q, k, v, torch.zeros(5, 5)), {}),
    "an integer mask": lambda q, k, v: ((q, k, v, torch.zeros(9, 9, dtype=torch.int)), {}),
    "mixed dtypes": lambda q, k, v: ((q, k.half(), v), {}),
    "dropout above one": lambda q, k, v: ((q, k, v), {"dropout_p": 1.5}),
}


@pytest.mark.parametrize("why", BAD)
def test_what_torch_refuses_is_refused_in_its_words(why):
    arguments, options = BAD[why](*qkv())
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever torch raises
        F.scaled_dot_product_attention(*arguments, **options)
    with pytest.raises(theirs.type) as ours:
        scaled_dot_product_attention(*arguments, **options)
    assert str(ours.value) == str(theirs.value)


def test_small_calls_are_left_to_torch_and_large_ones_are_not():
    require("scaled_dot_product_attention", "cpu")
    query, key, value = qkv(1, 1, 16, 16, 16)
    with RecordedCalls() as recorded:
        scaled_dot_product_attention(query, key, value)
    assert not recorded.calls
    query, key, value = qkv(1, 2, 256, 256, 64)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.randn(256, 256)}):
        with RecordedCalls() as recorded:
            scaled_dot_product_attention(query, key, value, **options)
        assert [str(op) for op, _ in recorded.calls] == ["effattn.attention_fwd.default"]
    assert effattn.explain(scaled_dot_product_attention, query, key, value).backend == "cpu"


def test_backend_torch_is_torch():
    query, key, value = qkv(1, 2, 256, 256, 64)
    with RecordedCalls() as recorded:
        got = scaled_dot_product_attention(query, key, value, backend="torch")
    assert not recorded.calls
    assert torch.equal(got, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("served_by", ["auto", "cpu", "reference"])
def test_no_heads_may_be_grouped(served_by):
    query, key = torch.randn(2, 0, 3, 4), torch.randn(2, 0, 5, 4)
    given = effattn.scaled_dot_product_attention(query, key, key, enable_gqa=True, backend=served_by)
    assert given.shape == query.shape


def test_grouped_heads_of_a_structured_mask_need_four_dimensions():
    query = torch.randn(1, 4, 6, 8)
    mask = effattn.RelativePositionBias(torch.zeros(1, 11))
    with pytest.raises(ValueError, match="value must have shape"):
        F.scaled_dot_product_attention(query, query, torch.randn(24), attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("wrong", [None, 3, ["cpu"], b"cpu"])
def test_backend_that_is_no_string_is_refused_by_name(wrong):
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(TypeError, match="backend must be a str"):
        effattn.scaled_dot_product_attention(query, query, query, backend=wrong)


def test_number_beyond_any_float_is_refused_by_name():
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="scale must be finite"):
        effattn.masked_product_attention(query, query, query, torch.ones(2, 2), scale=10**400)


def test_sparse_and_eight_bit_tensors_are_refused_by_name():
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(TypeError, match="key must be a dense"):
        effattn.masked_product_attention(query, query.to_sparse(), query, torch.ones(2, 2))
    with pytest.raises(TypeError, match="weight must be floating point"):
        effattn.masked_product_attention(query, query, query, torch.ones(2, 2).to(torch.float8_e5m2))
