"""The FFT method of Toeplitz-weighted linear attention on CPU: every length, grid and layout, in float and in double.

The kernels are called by their codes, past the plan that would choose among the methods.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from linear_like import assert_close_enough, layouts_of, same_bits

from effattn import _native, reference
from effattn.ops.toeplitz import toeplitz
from effattn.ops.toeplitz_methods import DOUBLE_FFT, FFT

pytestmark = pytest.mark.skipif(not _native.loaded, reason="no compiled kernels")
METHOD = pytest.mark.parametrize("method", [FFT, DOUBLE_FFT], ids=["float", "double"])
NAMES = ("output", "query", "key", "value", "bias")


def attend(backend, query, key, value, bias, *, method, grid=None, is_causal=False, eps=0.0):
    if backend == "reference":
        table = bias if grid is None else bias.view(-1, 2 * grid[0] - 1, 2 * grid[1] - 1)
        return reference.toeplitz_linear_attention(query, key, value, table, grid, is_causal, None, eps)
    height, width = grid or (1, query.shape[2])
    return toeplitz(backend, query, key, value, bias, None, height, width, is_causal, method, eps, True)


def draw(tokens, *, batch=1, heads=2, features=5, value_dim=7, grid=None, spread=2.0, dtype=torch.float32, seed=0):
    """Features in 0.1 ... 1.1 and a bias that ranges over ``spread`` nats."""
    generator = torch.Generator().manual_seed(seed)
    height, width = grid or (1, tokens)
    query, key = (torch.rand(batch, heads, tokens, features, generator=generator).add(0.1).to(dtype) for _ in range(2))
    value = torch.randn(batch, heads, tokens, value_dim, generator=generator).to(dtype)
    bias = spread * torch.rand(heads, max(2 * height - 1, 0) * max(2 * width - 1, 0), generator=generator)
    return query, key, value, bias


def results(backend, tensors, **options):
    """Output and the gradients of all four tensors."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    output = attend(backend, *inputs, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def check(tensors, tolerance, **options):
    """Every result within ``tolerance`` of the largest of the float64 reference's."""
    got = results("cpu", tensors, **options)
    wanted = results("reference", [t.double() for t in tensors], **options)
    for name, ours, exact in zip(NAMES, got, wanted):
        assert ours.shape == exact.shape
        error, size = (ours.double() - exact).abs().max().item(), exact.abs().max().item()
        assert error <= tolerance * size, f"{name}: error {error / size:.1e} of the largest, allowed {tolerance:.1e}"


def tolerance_of(method, is_causal):
    """Causal rows near the start have few weights, which is what an FFT in float loses."""
    return 1e-3 if method == FFT and is_causal else 3e-6


# ---- lengths and shapes ----


@METHOD
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_agrees_with_the_reference(method, is_causal):
    tolerance = tolerance_of(method, is_causal)
    for tokens in (*range(2, 71), 97, 127, 251):
        check(draw(tokens, seed=tokens, spread=1.0), tolerance, method=method, is_causal=is_causal)


@METHOD
def test_one_token_returns_its_value_and_no_tokens_return_nothing(method):
    query, key, value, bias = draw(1)
    output, *gradients = results("cpu", (query, key, value, bias), method=method)
    torch.testing.assert_close(output, value)
    torch.testing.assert_close(gradients[2], torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    for index in (0, 1, 3):
        assert gradients[index].abs().max() < 1e-4
    for tensors in (draw(0), draw(9, batch=0)):
        output, *gradients = results("cpu", tensors, method=method)
        assert output.shape == tensors[2].shape
        assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, tensors))


@METHOD
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("grid", [(2, 2), (5, 7), (14, 14), (1, 9), (9, 1), (3, 40), (40, 3)])
def test_grids_are_sequences_with_gaps(method, grid, is_causal):
    tolerance = tolerance_of(method, is_causal)
    tensors = draw(grid[0] * grid[1], grid=grid, spread=1.0)
    check(tensors, tolerance, method=method, grid=grid, is_causal=is_causal)


@METHOD
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (1, 40), (40, 1), (17, 33), (33, 64), (2, 100)])
def test_any_number_of_features_and_channels(method, sizes):
    tensors = [t.requires_grad_() for t in draw(45, features=sizes[0], value_dim=sizes[1], batch=2)]
    if sizes[0] == 1:  # the query cancels, and its gradient is 0
        gradient = results("cpu", tensors, method=method)[1]
        assert gradient.abs().max() < 1e-5
        tensors[0].requires_grad_(False)
    assert_close_enough(lambda backend, *t: attend(backend, *t, method=method), "cpu", *tensors)


@METHOD
def test_a_head_that_is_cut_among_units_and_heads_that_are_not(method):
    for batch, heads in ((1, 1), (1, 3), (3, 9)):
        check(draw(50, batch=batch, heads=heads, features=20, value_dim=20), 4e-6, method=method)


# ---- numbers ----


@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [None, (6, 7)])
def test_the_accuracy_rule_holds_for_a_narrow_bias(method, dtype, grid):
    tensors = [t.requires_grad_() for t in draw(42, grid=grid, dtype=dtype, batch=2)]
    assert_close_enough(lambda backend, *t: attend(backend, *t, method=method, grid=grid), "cpu", *tensors)


@pytest.mark.parametrize("is_causal", [False, True])
def test_double_serves_a_bias_that_float_does_not(is_causal):
    tensors = [t.requires_grad_() for t in draw(200)[:3]]
    ramp = torch.linspace(12, -12, 399).expand(2, -1).clone().requires_grad_()
    call = lambda backend, *t: attend(backend, *t, method=DOUBLE_FFT, is_causal=is_causal)  # noqa: E731
    assert_close_enough(call, "cpu", *tensors, ramp)
    exact = attend("reference", *(t.detach().double() for t in (*tensors, ramp)), method=FFT, is_causal=is_causal)
    rough = attend("cpu", *(t.detach() for t in (*tensors, ramp)), method=FFT, is_causal=is_causal)
    assert (rough - exact).abs().max() > 1e-4


@METHOD
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_without_weight_give_zeros(method, is_causal):
    """A query or keys of zeros, and keys that a bias of -inf hides."""
    query, key, value, bias = draw(60, heads=3)
    query[0, 0, 7] = 0
    key[0, 1, :25] = 0
    bias[1, 59 + 20 :] = float("-inf")
    bias[2] = float("-inf")
    options = {"method": method, "is_causal": is_causal}
    output, *gradients = results("cpu", (query, key, value, bias), **options)
    wanted, *exact = results("reference", [t.double() for t in (query, key, value, bias)], **options)
    empty = (wanted == 0).all(-1)
    assert empty[0, 0, 7]
    assert empty[0, 1, :5].all()
    assert empty[0, 2].all()
    assert not empty[0, 1, 30:].any()
    assert not output[empty].any()
    assert not gradients[0][empty].any()
    assert all(torch.isfinite(g).all() for g in (output, *gradients))
    for ours, reference_gives in zip((output, *gradients), (wanted, *exact)):
        reference_gives = reference_gives.nan_to_num()
        assert (ours - reference_gives).abs().max() <= 1e-3 * reference_gives.abs().max()


@METHOD
def test_eps_is_part_of_the_normalizer(method):
    tensors = draw(33)
    tensors = [t.requires_grad_() for t in tensors[:3]] + [tensors[3]]  # the reference's largest entry of bias has one
    assert_close_enough(lambda backend, *t: attend(backend, *t, method=method, eps=5.0), "cpu", *tensors)
    query, key, value, bias = (t.detach() for t in tensors)
    assert not attend("cpu", query, torch.zeros_like(key), value, bias, method=method, eps=1e-6).any()


@METHOD
def test_entries_of_minus_infinity_weigh_nothing(method):
    tensors = draw(40)
    tensors[3][:, ::3] = float("-inf")
    output, *gradients = results("cpu", tensors, method=method)
    assert not gradients[3][:, ::3].any()
    check((*tensors[:3], tensors[3].clamp_min(-1e4)), 4e-6, method=method)
    clamped = attend("cpu", *tensors[:3], tensors[3].clamp_min(-1e4), method=method)
    assert same_bits(output, clamped)


# ---- memory ----


@METHOD
def test_any_layout_gives_the_same_numbers(method):
    query, key, value, bias = draw(19, heads=1)
    wanted = attend("cpu", query, key, value, bias, method=method)
    for q, k, v in zip(*(list(layouts_of(t))[:3] for t in (query, key, value))):
        assert same_bits(attend("cpu", q, k, v, bias, method=method), wanted)
    for k in list(layouts_of(key))[3:]:
        expanded = results("cpu", (query, k, value, bias), method=method)
        contiguous = results("cpu", (query, k.contiguous(), value, bias), method=method)
        assert all(map(same_bits, expanded, contiguous))


@METHOD
@pytest.mark.parametrize("sizes", [{"heads": 1, "features": 32}, {"heads": 12}, {"batch": 3, "heads": 2}])
def test_threads_do_not_change_a_bit(method, sizes):
    tensors = draw(300, value_dim=21, **sizes)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results("cpu", tensors, method=method))
    for other in found[1:]:
        assert all(map(same_bits, other, found[0]))


@METHOD
def test_memory_that_is_not_initialised_is_not_read(method, poisoned_empty):
    for grid in (None, (5, 8)):
        check(draw(40, grid=grid, heads=1), 4e-6, method=method, grid=grid)


PEAK = """
import resource, sys, torch
from effattn.ops.toeplitz import toeplitz
torch.set_num_threads(2)
tokens, features, value_dim, heads = 16384, 32, 64, 2
query, key, value = (torch.ones(1, heads, tokens, d) for d in (features, features, value_dim))
bias = torch.zeros(heads, 2 * tokens - 1)
toeplitz("cpu", *(t[:, :, :64].contiguous() for t in (query, key, value)), bias[:, :127].contiguous(), None, 1, 64,
         False, 2, 0.0, False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
output = toeplitz("cpu", query, key, value, bias, None, 1, tokens, False, 2, 0.0, False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - output.nbytes)
"""


def test_memory_is_a_small_part_of_what_the_outer_product_takes():
    """Of the padded complex spectrum of (N, M D) of one head, which the formula in plain torch writes."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=300)
    spectrum = 16384 * 2 * 32 * 65 * 4
    assert int(done.stdout) < spectrum / 10
