"""What is particular to random features: their kinds, shifts and masks, and that their products estimate exp(q . k)."""

from __future__ import annotations

import pytest
import torch
from conformance import device_of, is_slow, require
from conformance.rule import FORWARD_FACTOR, GRADIENT_FACTOR

import effattn
from effattn import reference
from effattn.ops.toeplitz import SHIFTS, features
from effattn.reference.toeplitz import feature_map

BACKENDS = pytest.mark.parametrize("backend", ["cpu"])
KINDS = pytest.mark.parametrize("kind", ["positive", "trigonometric"])
NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "rows as they are"])


def kernel(backend, x, projection, kind="positive", normalize=True, shift="none", mask=None):
    require("kernelized_rpe_attention", backend)
    on = device_of(backend)
    mask = None if mask is None else mask.to(on)
    trigonometric = kind == "trigonometric"
    return features(backend, x.to(on), projection.to(on), mask, trigonometric, normalize, SHIFTS.index(shift)).cpu()


def draw(seed, batch=2, heads=2, tokens=61, head_dim=16, directions=24, size=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(batch, heads, tokens, head_dim, generator=generator)
    projection = torch.randn(heads, directions, head_dim, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.3
    return x.to(dtype), projection, mask


def results(function, x, projection, dtype, grad=None):
    """Features and gradients of x and projection."""
    x = x.to(dtype).requires_grad_()
    projection = projection.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = function(x, projection)
    grad = torch.sin(torch.arange(out.numel()) * 1.7).view(out.shape) if grad is None else grad
    gradients = torch.autograd.grad(out, (x, projection), grad.to(out.dtype))
    return [t.detach().double() for t in (out, *gradients)]


def assert_features_within_budget(backend, dtype, seeds, *options, masked=False, **sizes):
    """The accuracy rule, for a pool of draws: where one exponential outweighs all, one rounding is eager's whole error."""
    errors, budgets = torch.zeros(3), torch.zeros(3)
    for seed in seeds:
        x, projection, mask = draw(seed, dtype=dtype, **sizes)
        mask = mask if masked else None
        exact = results(lambda x, w, m=mask: feature_map(x, w, *options, m), x, projection, torch.float64)
        eager = results(lambda x, w, m=mask: feature_map(x, w, *options, m), x, projection, dtype)
        got = results(lambda x, w, m=mask: kernel(backend, x, w, *options, m), x, projection, dtype)
        for i, factor in enumerate((FORWARD_FACTOR, GRADIENT_FACTOR, GRADIENT_FACTOR)):
            assert got[i].isfinite().all()
            assert exact[i].abs().max() > 0
            budget = factor * (eager[i] - exact[i]).abs().max() + torch.finfo(dtype).eps * exact[i].abs().max()
            errors[i] = max(errors[i], (got[i] - exact[i]).abs().max())
            budgets[i] = max(budgets[i], budget)
    assert (errors <= budgets).all(), f"output, x, projection: errors {errors.tolist()}, budgets {budgets.tolist()}"


@BACKENDS
@KINDS
@NORMALIZE
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_features_and_their_gradients_are_the_formula(backend, kind, normalize, shift, masked):
    seeds = range(1 if is_slow(backend) else 3)
    assert_features_within_budget(backend, torch.float32, seeds, kind, normalize, shift, masked=masked)


@BACKENDS
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("head_dim", "directions", "tokens"), [(1, 1, 1), (3, 5, 7), (64, 33, 130), (200, 16, 50)])
def test_any_size_and_dtype(backend, kind, dtype, head_dim, directions, tokens):
    if is_slow(backend) and dtype != torch.float32:
        pytest.skip("the interpreter converts what it loads, which the float32 calls do not differ in")
    sizes = {"head_dim": head_dim, "directions": directions, "tokens": tokens}
    assert_features_within_budget(backend, dtype, range(3), kind, True, "head", masked=tokens > 50, **sizes)


@BACKENDS
@KINDS
def test_a_row_of_zeros_stays_and_has_no_gradient(backend, kind):
    x, projection, _ = draw(0)
    x[:, :, 3] = 0
    out, grad_x, _ = results(lambda x, w: kernel(backend, x, w, kind), x, projection, torch.float32)
    directions = projection.shape[1]
    half = 0.0 if kind == "trigonometric" else 1.0
    expected = torch.cat((torch.full((directions,), half), torch.ones(directions)))[: out.shape[-1]]
    torch.testing.assert_close(out[:, :, 3], (expected * directions**-0.5).double().expand(2, 2, -1))
    assert (grad_x[:, :, 3] == 0).all()
    assert (grad_x[:, :, 4] != 0).any()


@BACKENDS
@KINDS
@pytest.mark.parametrize("shift", ["row", "head"])
def test_huge_rows_overflow_nothing_where_exponents_are_shifted(backend, kind, shift):
    x, projection, _ = draw(0, head_dim=64)
    x = 30 * x / x.norm(dim=-1, keepdim=True)
    out, *gradients = results(lambda x, w: kernel(backend, x, w, kind, False, shift), x, projection, torch.float32)
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert out.abs().max() > 0.05


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_rows_whose_squares_leave_the_range_of_floats_are_unit_rows_all_the_same(size):
    x, projection, _ = draw(0)
    exact = feature_map(x.double(), projection.double())
    torch.testing.assert_close(kernel("cpu", size * x, projection).double(), exact, rtol=1e-5, atol=1e-6)


def test_waves_of_large_angles_are_right():
    angles = torch.cat((torch.linspace(-9e3, 9e3, 4001), torch.tensor([3e4, -1e6, 1e9])))
    x = torch.full((1, 1, 1, 1), 2.0**-40)  # a power of two: the products are exact
    out = kernel("cpu", x, angles.view(1, -1, 1) * 2.0**40, "trigonometric", False)[0, 0, 0].double()
    exact = torch.cat((angles.double().sin(), angles.double().cos())) * len(angles) ** -0.5
    assert (out - exact).abs().max() < 3e-7 * len(angles) ** -0.5


@BACKENDS
@KINDS
@pytest.mark.parametrize("shift", SHIFTS)
def test_masked_rows_give_zeros_whatever_they_hold(backend, kind, shift):
    x, projection, mask = draw(0)
    clean = results(lambda x, w: kernel(backend, x, w, kind, True, shift, mask), x, projection, torch.float32)
    masked = mask[:, None, :, None].expand(x.shape)
    spoilt = x.masked_fill(masked, float("nan"))
    grad = torch.sin(torch.arange(clean[0].numel()) * 1.7).view(clean[0].shape)
    grad = grad.masked_fill(mask[:, None, :, None], float("nan"))
    got = results(lambda x, w: kernel(backend, x, w, kind, True, shift, mask), spoilt, projection, torch.float32, grad)
    assert (got[0][mask[:, None].expand(got[0].shape[:3])] == 0).all()
    assert (got[1][masked] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, clean))


@BACKENDS
def test_a_batch_that_is_masked_wholly_gives_zeros(backend):
    x, projection, _ = draw(0)
    mask = torch.tensor([[True], [False]]).expand(2, x.shape[2])
    out = kernel(backend, x, projection, shift="head", mask=mask.contiguous())
    assert (out[0] == 0).all()
    assert (out[1] > 0).any()


@BACKENDS
@KINDS
def test_a_shift_divides_the_features_of_its_row_or_head_by_one_number(backend, kind):
    x, projection, _ = draw(0)
    plain = kernel(backend, x, projection, kind, False).double()
    for shift, over in (("row", (-1,)), ("head", (-2, -1))):
        shifted = kernel(backend, x, projection, kind, False, shift).double()
        size = (plain * shifted).sum(over, keepdim=True) / shifted.square().sum(over, keepdim=True)
        torch.testing.assert_close(shifted * size, plain, rtol=1e-5, atol=1e-6)
        if kind == "positive":
            largest = shifted.amax(over) * projection.shape[1] ** 0.5
            torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-6, atol=0)


@KINDS
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_bit_is_the_same_on_any_number_of_threads(kind, shift):
    x, projection, mask = draw(0, batch=3, tokens=300, head_dim=64, directions=32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(lambda x, w: kernel("cpu", x, w, kind, False, shift, mask), x, projection, torch.float32))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("tensor", ["x", "grad"])
def test_strides_make_no_difference(tensor):
    x, projection, _ = draw(0)
    grad = torch.randn(*x.shape[:3], projection.shape[1])
    wanted = results(lambda x, w: kernel("cpu", x, w, shift="head"), x, projection, torch.float32, grad)

    def strided(t):
        return t.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)

    x, grad = (strided(x), grad) if tensor == "x" else (x, strided(grad))
    assert not (x.is_contiguous() and grad.is_contiguous())
    got = results(lambda x, w: kernel("cpu", x, w, shift="head"), x, projection, torch.float32, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@KINDS
def test_products_of_features_estimate_the_exponential_of_the_product(kind):
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 1, 1, 40, 8, generator=generator)
    projection = effattn.random_features(16384, 8, generator=generator)[None]
    phi_q, phi_k = (kernel("cpu", x, projection, kind) for x in (query, key))
    exact = torch.exp(reference.toeplitz.unit(query) @ reference.toeplitz.unit(key).mT)
    error = (phi_q @ phi_k.mT - exact).abs() / exact
    # One feature's deviation is at most about e times the mean here; 16384 of them bring it below a fiftieth.
    assert error.max() < 0.12
    assert error.mean() < 0.03


@KINDS
@pytest.mark.parametrize("served_by", ["cpu", "reference"])
def test_not_a_number_in_a_row_is_no_row_of_zeros(kind, served_by):
    query, key, value = torch.randn(3, 1, 1, 4, 3)
    query[0, 0, 1, 2] = float("nan")
    bias, projection = torch.zeros(1, 7), torch.randn(5, 3)
    out = effattn.kernelized_rpe_attention(
        query, key, value, bias, projection, feature_map=kind, method="direct", backend=served_by
    )
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, 2, 3]].isfinite().all()
