"""What sizes of tokens mean in attention: counts of keys; and their gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import RecordedCalls, assert_within_budget

import effattn
from effattn import reference


def draw(queries=45, keys=70, *, batch=2, heads=2, head_dim=16, dtype=torch.float32, seed=0):
    """query, key, value and a gradient of the output"""
    generator = torch.Generator().manual_seed(seed)
    query, grad = torch.randn(2, batch, heads, queries, head_dim, generator=generator)
    key, value = torch.randn(2, batch, heads, keys, head_dim, generator=generator)
    return tuple(t.to(dtype) for t in (query, key, value, grad))


def counts(*shape, least=1, seed=0):
    return torch.randint(least, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def weighted(*tensors, **options):
    with RecordedCalls() as recorded:
        out = effattn.size_weighted_attention(*tensors, **options, backend="cpu")
    assert recorded.calls, "no kernel ran"
    return out


def gradients(function, tensors, grad):
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, grad)


def in_double(*tensors):
    return [t.double() for t in tensors]


def close(got, wanted, tolerance=1e-5):
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=tolerance, atol=tolerance * largest)


# ---- what a size means ----


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (45, 70), (130, 9), (1, 600)])
def test_sizes_of_one_are_plain_attention(queries, keys):
    query, key, value, grad = draw(queries, keys)
    ones = torch.ones(2, keys)
    close(weighted(query, key, value, ones), F.scaled_dot_product_attention(query, key, value))
    got = gradients(lambda *t: weighted(*t, ones), (query, key, value), grad)
    exact = gradients(F.scaled_dot_product_attention, in_double(query, key, value), grad.double())
    for a, b in zip(got, exact):
        close(a, b)


def test_a_size_of_s_is_a_key_that_stands_there_s_times():
    query, key, value, grad = draw(batch=1)
    sizes = counts(1, 70)
    copies = sizes[0].long()

    def repeated(query, key, value):
        return F.scaled_dot_product_attention(
            query, key.repeat_interleave(copies, 2), value.repeat_interleave(copies, 2)
        )

    close(weighted(query, key, value, sizes), repeated(query, key, value))
    got = gradients(lambda *t: weighted(*t, sizes), (query, key, value), grad)
    exact = gradients(repeated, in_double(query, key, value), grad.double())
    for a, b in zip(got, exact):
        close(a, b)


def test_a_size_of_zero_is_a_key_that_is_not_there():
    query, key, value, grad = draw(130, 300, batch=1)
    sizes = counts(1, 300)
    sizes[0, 3::4] = 0
    sizes[0, 40:110] = -1.0  # and so is one below it
    there = sizes[0] > 0
    fewer = (query, key[:, :, there], value[:, :, there], sizes[:, there])
    close(weighted(query, key, value, sizes), weighted(*fewer))
    whole = gradients(weighted, (query, key, value, sizes), grad)
    part = gradients(weighted, fewer, grad)
    close(whole[0], part[0])
    for a, b in zip(whole[1:3], part[1:3]):
        close(a[:, :, there], b)
        assert (a[:, :, ~there] == 0).all()
    close(whole[3][:, there], part[3])
    assert (whole[3][:, ~there] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [9, 70, 600])
def test_an_image_without_keys_gives_zero_and_no_gradient(keys, dtype):
    query, key, value, grad = draw(130, keys, dtype=dtype)
    sizes = counts(2, keys)
    sizes[0] = 0
    out = weighted(query, key, value, sizes)
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()
    for gradient in gradients(weighted, (query, key, value, sizes), grad):
        assert (gradient[0] == 0).all()
        assert gradient.isfinite().all()
        assert (gradient[1] != 0).any()
    _, logsumexp = torch.ops.effattn.size_weighted_attention_fwd(query, key, value, sizes.log(), 0.25, False)
    assert (logsumexp[0] == -torch.inf).all()
    assert logsumexp[1].isfinite().all()


def test_only_the_proportion_of_sizes_counts():
    query, key, value, grad = draw()
    sizes = counts(2, 70, least=0)
    out = weighted(query, key, value, sizes)
    for factor in (2.0**-20, 0.3, 1e6):
        close(weighted(query, key, value, sizes * factor), out)
    *_, grad_sizes = gradients(weighted, (query, key, value, sizes), grad)
    assert grad_sizes.abs().max() > 0.01
    assert (sizes * grad_sizes).sum(1).abs().max() < 1e-5  # its derivative along the sizes


def test_sizes_of_other_dtypes_and_ranks_mean_the_same():
    query, key, value, _ = draw()
    sizes = counts(2, 70, least=0)
    wanted = weighted(query, key, value, sizes)
    for other in (sizes.bfloat16(), sizes.long(), sizes.to(torch.int32), sizes.double(), sizes[..., None]):
        assert torch.equal(weighted(query, key, value, other), wanted), other.dtype
    padded = torch.full((2, 70, 2), torch.nan)
    padded[..., 0] = sizes
    assert torch.equal(weighted(query, key, value, padded[..., 0]), wanted)
    assert torch.equal(weighted(query, key, value, sizes[:1].expand(2, 70)), weighted(query, key, value, sizes[[0, 0]]))


def test_every_image_has_sizes_of_its_own():
    query, key, value, _ = draw(batch=3)
    sizes = counts(3, 70)
    out = weighted(query, key, value, sizes)
    for b in range(3):
        assert torch.equal(out[b], weighted(*(t[b : b + 1] for t in (query, key, value, sizes)))[0])


# ---- the gradient of the sizes ----


class Call:
    differentiable = ("query", "key", "value", "sizes")

    def __call__(self, tensors, options, backend):
        return effattn.size_weighted_attention(**tensors, **options, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "column", "options"),
    [
        (45, 70, False, {}),
        (197, 197, True, {"head_dim": 64}),
        (97, 300, False, {"heads": 3}),  # two blocks of queries, the second of one row; two of keys
        (300, 800, False, {"batch": 1, "heads": 1, "head_dim": 7}),  # several chunks of keys
        (1, 33, True, {"head_dim": 1}),
        (50, 20, True, {"head_dim": 256}),
    ],
)
def test_gradients_are_those_of_the_reference(queries, keys, column, options, dtype):
    def drawn(seed):
        query, key, value, grad = draw(queries, keys, dtype=dtype, seed=seed, **options)
        sizes = 0.5 + counts(query.shape[0], keys, seed=seed)
        sizes[:, 5::7] = 0
        sizes = sizes[..., None] if column else sizes
        return {"query": query, "key": key, "value": value, "sizes": sizes}, {}, grad

    assert_within_budget(Call(), drawn, "cpu")


def test_the_gradient_of_a_column_has_its_shape_and_dtype():
    query, key, value, grad = draw()
    for sizes in (counts(2, 70), counts(2, 70)[..., None], counts(2, 70).bfloat16()):
        *_, grad_sizes = gradients(weighted, (query, key, value, sizes), grad)
        assert (grad_sizes.shape, grad_sizes.dtype) == (sizes.shape, sizes.dtype)


def backward_call(*tensors, grad, wanted):
    with RecordedCalls() as recorded:
        out = effattn.size_weighted_attention(*tensors, backend="cpu")
        got = torch.autograd.grad(out, wanted, grad)
    return recorded.calls[-1], got


def test_sizes_that_require_no_gradient_cost_nothing():
    query, key, value, grad = draw()
    sizes = counts(2, 70)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    (op, args), got = backward_call(*leaves, sizes, grad=grad, wanted=leaves)
    assert op is torch.ops.effattn.size_weighted_attention_bwd.default
    assert args[-1] is False
    *others, zeros = op(*args)
    assert torch.equal(zeros, torch.zeros(2, 70))
    sizes.requires_grad_()
    (op, args), wanted = backward_call(*leaves, sizes, grad=grad, wanted=[*leaves, sizes])
    assert args[-1] is True
    assert (op(*args)[3] != 0).all()
    for a, b, c in zip(got, wanted, others):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_every_number_of_threads_gives_the_same_bits():
    tensors = [*draw(200, 900, batch=1)[:3], counts(1, 900)]
    grad = draw(200, 900, batch=1)[3]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((weighted(*tensors), *gradients(weighted, tensors, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)]
)
def test_nothing_in_gives_nothing_or_zeros(batch, heads, queries, keys):
    query, key, value, grad = draw(queries, keys, batch=batch, heads=heads)
    sizes = torch.ones(batch, keys)
    out = weighted(query, key, value, sizes)
    assert torch.equal(out, torch.zeros_like(query))
    for gradient in gradients(weighted, (query, key, value, sizes), grad):
        assert torch.equal(gradient, torch.zeros_like(gradient))


# ---- the structured mask ----


@pytest.mark.parametrize("column", [False, True])
def test_the_mask_gives_stock_attention_sizes(column):
    query, key, value, grad = draw()
    sizes = counts(2, 70, least=0)
    given = sizes[..., None] if column else sizes

    def through_torch(query, key, value, sizes):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=effattn.TokenSizes(sizes), scale=0.4)

    with RecordedCalls() as recorded:
        out = through_torch(query, key, value, given)
    assert [op._opname for op, _ in recorded.calls] == ["size_weighted_attention_fwd"]
    assert torch.equal(out, weighted(query, key, value, sizes, scale=0.4))
    got = gradients(through_torch, (query, key, value, given), grad)
    wanted = gradients(lambda *t: weighted(*t, scale=0.4), (query, key, value, given), grad)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_the_dense_mask_means_the_same():
    query, key, value, grad = draw()
    sizes = counts(2, 70, least=0).requires_grad_()
    mask = effattn.TokenSizes(sizes)
    dense = mask.dense()
    assert dense.shape == (2, 1, 1, 70)
    assert torch.equal(dense.isinf()[:, 0, 0], sizes == 0)
    close(weighted(query, key, value, sizes), F.scaled_dot_product_attention(query, key, value, attn_mask=dense))
    (through_dense,) = torch.autograd.grad(
        reference.scaled_dot_product_attention(*in_double(query, key, value), dense.double()), sizes, grad.double()
    )
    close(gradients(lambda s: weighted(query, key, value, s), (sizes,), grad)[0], through_dense)


def test_explain_knows_the_mask():
    query, key, value, _ = draw()
    mask = effattn.TokenSizes(counts(2, 70))
    explanation = effattn.explain(F.scaled_dot_product_attention, query, key, value, attn_mask=mask)
    assert explanation.backend == "cpu"
    assert str(explanation).startswith("size_weighted_attention (backend='auto')")


@pytest.mark.parametrize("served_by", ["cpu", "reference"])
def test_not_a_number_of_a_size_is_seen(served_by):
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    sizes = torch.tensor([[1.0, float("nan"), 1, 1, 1]])
    for given in (sizes, sizes.clone().requires_grad_()):
        assert effattn.size_weighted_attention(query, key, key, given, backend=served_by).isnan().all()


def test_value_that_is_no_tensor_is_named_whatever_the_number_of_keys():
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(TypeError, match="value must be a Tensor, got list"):
        effattn.size_weighted_attention(query, key, [1.0], torch.ones(1, 5))
