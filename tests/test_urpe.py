"""What is particular to URPE: what its coefficients and biases mean, which keys they hide, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conformance import RecordedCalls

import effattn
from effattn import reference
from effattn.reference.toeplitz import toeplitz_matrix


def draw(tokens=75, heads=2, batch=2, head_dim=16, seed=0, grid=None, table_heads=None):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, tokens, head_dim, generator=generator)
    shape = (2 * tokens - 1,) if grid is None else (2 * grid[0] - 1, 2 * grid[1] - 1)
    shape = (heads if table_heads is None else table_heads, *shape)
    coefficient, bias = torch.randn(2, *shape, generator=generator)
    return query, key, value, coefficient, bias


def urpe(*tensors, **options):
    with RecordedCalls() as recorded:
        out = effattn.urpe_attention(*tensors, **options, backend="cpu")
    assert recorded.calls, "no kernel ran"
    return out


def gradients(function, tensors, grad):
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, grad)


def distances(tokens):
    return torch.arange(1 - tokens, tokens)


def close(got, wanted, tolerance=2e-5):
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=tolerance, atol=tolerance * wanted.abs().max().item())


# ---- what the tables mean ----


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_coefficient_of_one_is_attention_with_a_bias(is_causal):
    query, key, value, coefficient, bias = draw()
    mask = toeplitz_matrix(bias)
    if is_causal:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -math.inf)
    wanted = F.scaled_dot_product_attention(query, key, value, mask)
    close(urpe(query, key, value, torch.ones_like(coefficient), bias, is_causal=is_causal), wanted)
    close(urpe(query, key, value, None, bias, is_causal=is_causal), wanted)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_given_is_attention(is_causal):
    query, key, value, *_ = draw(tokens=300)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    close(urpe(query, key, value, None, is_causal=is_causal), wanted)
    grad = torch.randn_like(query)
    got = gradients(lambda *t: urpe(*t, None, is_causal=is_causal), (query, key, value), grad)
    exact = gradients(
        lambda *t: F.scaled_dot_product_attention(*t, is_causal=is_causal),
        [t.double() for t in (query, key, value)],
        grad.double(),
    )
    for a, b in zip(got, exact):
        close(a, b)


def test_a_constant_coefficient_scales_the_output():
    query, key, value, coefficient, bias = draw()
    plain = urpe(query, key, value, None, bias)
    close(urpe(query, key, value, torch.full_like(coefficient, -2.5), bias), -2.5 * plain)


def test_coefficients_of_zero_beyond_a_distance_drop_weights_and_the_rest_is_not_normalised_again():
    query, key, value, coefficient, _ = draw()
    near = distances(query.shape[2]).abs() <= 7
    out = urpe(query, key, value, near.float().expand_as(coefficient))
    weights = torch.softmax(query @ key.mT * query.shape[3] ** -0.5, -1)
    kept = weights * toeplitz_matrix(near.float()[None])
    close(out, kept @ value)
    assert (kept.sum(-1) < 0.9).all()


def test_the_sign_of_the_coefficients_is_the_sign_of_the_output():
    query, key, value, coefficient, bias = draw()
    assert (coefficient < 0).any()
    assert torch.equal(urpe(query, key, value, -coefficient, bias), -urpe(query, key, value, coefficient, bias))


# ---- -inf ----


def test_a_band_of_minus_infinity_is_a_mask():
    query, key, value, coefficient, bias = draw(tokens=290)
    near = distances(query.shape[2]).abs() <= 5
    band = bias.masked_fill(~near, -math.inf)
    grad = torch.randn_like(query)
    mask = toeplitz_matrix(band)
    close(urpe(query, key, value, None, band), F.scaled_dot_product_attention(query, key, value, mask))
    got = gradients(lambda *t: urpe(*t, band), (query, key, value, coefficient), grad)
    exact = gradients(
        lambda q, k, v, c: reference.urpe_attention(q, k, v, c, band.double()),
        [t.double() for t in (query, key, value, coefficient)],
        grad.double(),
    )
    for a, b in zip(got, exact):
        close(a, b)
    assert (got[3][:, ~near] == 0).all()
    assert (got[3][:, near] != 0).all()


@pytest.mark.parametrize("grid", [None, (6, 20)])
def test_a_row_of_nothing_but_minus_infinity_gives_zero_and_no_gradient(grid):
    query, key, value, coefficient, bias = draw(tokens=120, grid=grid)
    bias = bias.clone()
    bias[0] = -math.inf
    if grid is None:
        bias[1, distances(120) > -3] = -math.inf  # tokens 0, 1 and 2 see no key
    out = urpe(query, key, value, coefficient, bias, grid=grid)
    assert (out[:, 0] == 0).all()
    assert out.isfinite().all()
    assert (out[:, 1, 3:] != 0).any()
    tensors = (query, key, value, coefficient, bias)
    got = gradients(lambda *t: urpe(*t, grid=grid), tensors, torch.randn_like(query))
    assert all(g.isfinite().all() for g in got)
    for g in (got[0][:, 0], got[1][:, 0], got[2][:, 0], got[3][0], got[4][0]):
        assert (g == 0).all()
    if grid is None:
        assert (out[:, 1, :3] == 0).all()
        assert (got[0][:, 1, :3] == 0).all()
        assert (got[4][1] != 0).any()


# ---- grids: of every way in which rows of the tables are reached; those of 3 x 150 are staged (urpe_policy.h) ----

GRIDS = pytest.mark.parametrize(
    "grid",
    [(1, 40), (40, 1), (5, 7), (14, 14), (9, 40), (24, 24), (70, 3), (3, 150)],
    ids=lambda grid: f"{grid[0]}x{grid[1]}",
)


@GRIDS
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_grid_is_the_dense_block_toeplitz_matrix(grid, is_causal):
    tensors = draw(tokens=grid[0] * grid[1], grid=grid, batch=1)
    grad = torch.randn_like(tensors[0])
    options = {"grid": grid, "is_causal": is_causal}

    def dense(q, k, v, c, b):
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1) if is_causal else torch.zeros(1).bool()
        weights = (q @ k.mT / q.shape[3] ** 0.5 + toeplitz_matrix(b, grid)).masked_fill(hidden, -math.inf).softmax(-1)
        return (weights * toeplitz_matrix(c, grid)) @ v

    exact = [t.double() for t in tensors]
    close(urpe(*tensors, **options), dense(*exact))
    got = gradients(lambda *t: urpe(*t, **options), tensors, grad)
    for name, a, b in zip(
        ("query", "key", "value", "coefficient", "bias"), got, gradients(dense, exact, grad.double())
    ):
        assert b.abs().max() > 0, name
        close(a, b)


def test_a_sequence_is_a_grid_of_one_row():
    query, key, value, coefficient, bias = draw()
    on_grid = urpe(query, key, value, coefficient[:, None], bias[:, None], grid=(1, query.shape[2]))
    assert torch.equal(urpe(query, key, value, coefficient, bias), on_grid)


# ---- gradients ----


@pytest.mark.parametrize("which", ["both", "coefficient", "bias"])
@pytest.mark.parametrize("tokens", [1, 6, 203, 500])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_the_tables_are_sums_over_their_diagonals(which, tokens, is_causal):
    query, key, value, coefficient, bias = draw(tokens=tokens, head_dim=8)
    tables = {"both": (coefficient, bias), "coefficient": (coefficient,), "bias": (bias,)}[which]
    grad = torch.randn_like(query)

    def call(function):
        def of(q, k, v, *given):
            both = (None, *given) if which == "bias" else (*given, None)[:2]
            return function(q, k, v, *both, is_causal=is_causal)

        return of

    got = gradients(call(urpe), (query, key, value, *tables), grad)
    exact = gradients(call(reference.urpe_attention), [t.double() for t in (query, key, value, *tables)], grad.double())
    for a, b in zip(got, exact):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=3e-5 * max(b.abs().max().item(), 0.1))
    if is_causal and tokens > 1:
        assert all((g[:, tokens:] == 0).all() and (g[:, :tokens] != 0).any() for g in got[3:])


def test_tables_that_the_heads_share_get_the_sum_of_their_gradients():
    tensors = draw(table_heads=1, heads=3)
    query, key, value, coefficient, bias = tensors
    grad = torch.randn_like(query)
    shared = gradients(urpe, tensors, grad)
    own = gradients(urpe, (query, key, value, coefficient.expand(3, -1), bias.expand(3, -1)), grad)
    assert shared[3].shape == coefficient.shape
    close(shared[3], own[3].sum(0, keepdim=True), 1e-6)
    close(shared[4], own[4].sum(0, keepdim=True), 1e-6)


# ---- causality, threads, dropout ----


@pytest.mark.parametrize("grid", [None, (15, 20)])
def test_no_token_sees_a_later_one_bit_for_bit(grid):
    query, key, value, coefficient, bias = draw(tokens=300, batch=1, grid=grid)
    before = urpe(query, key, value, coefficient, bias, grid=grid, is_causal=True)
    changed = [t.clone() for t in (query, key, value)]
    for t in changed:
        t[:, :, 137:] = torch.randn_like(t[:, :, 137:])
    for table in (coefficient, bias):
        table.flatten(1)[:, table[0].numel() // 2 + 1 :] = math.nan  # entries of later keys
    after = urpe(*changed, coefficient, bias, grid=grid, is_causal=True)
    assert torch.equal(before[:, :, :137], after[:, :, :137])
    assert not torch.equal(before[:, :, 137:], after[:, :, 137:])
    assert after.isfinite().all()


@pytest.mark.parametrize("grid", [None, (15, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_the_same_on_any_number_of_threads(grid, dtype):
    *qkv, coefficient, bias = draw(tokens=300, batch=3, grid=grid)
    tensors = (*(t.to(dtype) for t in qkv), coefficient, bias)
    grad, found = torch.randn_like(tensors[0]), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((urpe(*tensors, grid=grid), *gradients(lambda *t: urpe(*t, grid=grid), tensors, grad)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_dropout_goes_to_the_reference():
    tensors = draw()
    torch.manual_seed(5)
    got = effattn.urpe_attention(*tensors, dropout_p=0.4)
    torch.manual_seed(5)
    assert torch.equal(got, reference.urpe_attention(*tensors, dropout_p=0.4))
    with pytest.raises(NotImplementedError, match="dropout"):
        effattn.urpe_attention(*tensors, dropout_p=0.4, backend="cpu")
