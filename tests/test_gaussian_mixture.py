"""Gaussian-mixture-mask attention (math page): the mask, its degenerate cases by name, the module, the mask for SDPA."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import RecordedCalls, formulas, require
from hypothesis import given
from hypothesis import strategies as st

import effattn
from effattn import GaussianMixtureMask, gaussian_mixture_attention, masked_product_attention
from effattn.nn import GaussianMixtureAttention
from effattn.reference import mixture_mask

BACKENDS = ("cpu", "triton", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _available(request):
    if "backend" in request.fixturenames:
        require("gaussian_mixture_attention", request.getfixturevalue("backend"))


def qkv(batch=2, heads=2, tokens=12, head_dim=8, dtype=torch.float32):
    return torch.randn(3, batch, heads, tokens, head_dim, dtype=dtype)


def mixture(gaussians=3, heads=2, dtype=torch.float32):
    return 2 * torch.randn(gaussians, heads, dtype=dtype), 2 + 3 * torch.randn(gaussians, heads, dtype=dtype)


def close(got, wanted, **tolerances):
    torch.testing.assert_close(got, wanted, check_stride=False, **tolerances)


# ---- the mask ----

_grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(
    grid=_grids,
    prefix=st.integers(0, 3),
    gaussians=st.integers(1, 6),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 1e4]),
    eps=st.sampled_from([1e-5, 0.5]),
    seed=st.integers(0, 999),
)
def test_mask_is_its_formula(grid, prefix, gaussians, spread, eps, seed):
    generator = np.random.default_rng(seed)
    alpha, sigma = 2 * generator.normal(size=(gaussians, 2)), spread * generator.normal(size=(gaussians, 2))
    got = mixture_mask(torch.from_numpy(alpha), torch.from_numpy(sigma), grid, prefix, eps)
    expected = formulas.mixture_mask(alpha, sigma, grid, prefix, eps)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-300)


def test_mask_depends_on_the_squares_of_sigma_and_is_odd_in_alpha():
    alpha, sigma = mixture()
    mask = mixture_mask(alpha, sigma, (3, 4))
    assert torch.equal(mixture_mask(alpha, -sigma, (3, 4)), mask)
    assert torch.equal(mixture_mask(-alpha, sigma, (3, 4)), -mask)


def test_mask_is_symmetric_and_its_diagonal_is_the_sum_of_alpha():
    alpha, sigma = mixture(dtype=torch.float64)
    mask = mixture_mask(alpha, sigma, (3, 4))
    close(mask, mask.mT)
    close(mask.diagonal(dim1=1, dim2=2), alpha.sum(0)[:, None].expand(2, 12))


def test_mask_with_sigma_of_zero_is_decided_by_eps_alone():
    mask = mixture_mask(torch.ones(1, 1), torch.zeros(1, 1), (2, 3), eps=1e-5)
    assert torch.equal(mask[0], torch.eye(6))  # exp(-1 / 2e-5) underflows to an exact 0
    wide = mixture_mask(torch.ones(1, 1), torch.zeros(1, 1), (1, 3), eps=0.5)[0]
    close(wide[0], torch.exp(-torch.tensor([0.0, 1.0, 4.0])))


def test_mask_keeps_far_tokens_where_the_published_code_underflows():
    """exp(-r2) is 0 in float32 for r2 > 103; raised to 1 / (2 sigma^2) afterwards it would stay 0."""
    mask = mixture_mask(torch.ones(1, 1), torch.full((1, 1), 20.0), (32, 32))[0]
    assert mask.min() > 0.05  # the far corner: exp(-2 * 31^2 / 800)
    published = torch.exp(-torch.tensor(2.0 * 31**2)) ** (1 / 800)
    assert published == 0.0


def test_mask_is_one_at_prefix_tokens():
    mask = mixture_mask(*mixture(), (2, 3), num_prefix_tokens=2)
    assert torch.equal(mask[:, :2], torch.ones(2, 2, 8))
    assert torch.equal(mask[:, :, :2], torch.ones(2, 8, 2))
    assert torch.equal(mask[:, 2:, 2:], mixture_mask(*_same_mixture(), (2, 3)))


def _same_mixture():
    torch.manual_seed(0)
    return mixture()


# ---- degenerate cases, on every backend ----


@every_backend
@pytest.mark.parametrize("prefix", [0, 2])
def test_alpha_of_zero_is_uniform_attention(backend, prefix):
    query, key, value = qkv(tokens=prefix + 12)
    _, sigma = mixture()
    out = gaussian_mixture_attention(
        query, key, value, torch.zeros(3, 2), sigma, (3, 4), num_prefix_tokens=prefix, backend=backend
    )
    if prefix == 0:
        close(out, value.mean(2, keepdim=True).expand_as(value))
    else:  # prefix keys keep their scores, the others have score 0
        logits = 8**-0.5 * query @ key.mT
        logits[:, :, prefix:, prefix:] = 0.0
        close(out, logits.softmax(-1) @ value)


@every_backend
def test_alpha_of_zero_gives_no_gradient_to_query_key_and_sigma(backend):
    inputs = [t.requires_grad_() for t in (*qkv(), torch.zeros(3, 2), mixture()[1])]
    out = gaussian_mixture_attention(*inputs, (3, 4), backend=backend)
    query, key, value, alpha, sigma = torch.autograd.grad(out.square().sum(), inputs)
    for gradient in (query, key, sigma):
        assert not gradient.any()
    assert value.any()
    assert alpha.any()  # this is how a mask of zero learns


@every_backend
def test_one_infinitely_wide_gaussian_of_weight_one_is_plain_attention(backend):
    query, key, value = qkv()
    for sigma in (1e6, 1e18, -1e18):
        out = gaussian_mixture_attention(
            query, key, value, torch.ones(1, 2), torch.full((1, 2), sigma), (3, 4), backend=backend
        )
        close(out, F.scaled_dot_product_attention(query, key, value), rtol=1e-5, atol=2e-6)


@every_backend
def test_alpha_of_minus_one_and_infinite_width_prefers_what_plain_attention_avoids(backend):
    query, key, value = qkv()
    out = gaussian_mixture_attention(
        query, key, value, -torch.ones(1, 2), torch.full((1, 2), 1e9), (3, 4), backend=backend
    )
    close(out, F.scaled_dot_product_attention(query, -key, value), rtol=1e-5, atol=2e-6)


@every_backend
def test_sigma_of_zero_leaves_only_each_token_its_own_score(backend):
    query, key, value = qkv()
    alpha = torch.full((1, 2), 1.5)
    out = gaussian_mixture_attention(query, key, value, alpha, torch.zeros(1, 2), (3, 4), backend=backend)
    own = torch.diag_embed(1.5 * 8**-0.5 * (query * key).sum(-1))  # all others have score 0, not -inf
    close(out, own.softmax(-1) @ value)


@every_backend
def test_sigma_of_zero_has_finite_gradients(backend):
    inputs = [t.requires_grad_() for t in (*qkv(), mixture()[0], torch.zeros(3, 2))]
    out = gaussian_mixture_attention(*inputs, (3, 4), backend=backend)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[-1].any()  # M is even in sigma


@every_backend
def test_a_grid_of_one_row_is_the_transposed_grid_of_one_column(backend):
    query, key, value = qkv(tokens=11)
    arguments = (query, key, value, *mixture())
    row = gaussian_mixture_attention(*arguments, (1, 11), backend=backend)
    close(row, gaussian_mixture_attention(*arguments, (11, 1), backend=backend), rtol=1e-5, atol=2e-6)


@every_backend
def test_transposing_the_grid_transposes_the_output(backend):
    height, width = 3, 5
    query, key, value = qkv(tokens=height * width)
    alpha, sigma = mixture()

    def transposed(tokens):
        return tokens.unflatten(2, (height, width)).transpose(2, 3).flatten(2, 3)

    out = gaussian_mixture_attention(query, key, value, alpha, sigma, (height, width), backend=backend)
    other = gaussian_mixture_attention(
        *map(transposed, (query, key, value)), alpha, sigma, (width, height), backend=backend
    )
    close(other, transposed(out), rtol=1e-5, atol=2e-6)


@every_backend
def test_height_and_width_are_not_confused(backend):
    query, key, value = qkv(tokens=15)
    arguments = (query, key, value, *mixture())
    tall = gaussian_mixture_attention(*arguments, (5, 3), backend=backend)
    wide = gaussian_mixture_attention(*arguments, (3, 5), backend=backend)
    assert (tall - wide).abs().max() > 1e-2


@every_backend
def test_only_prefix_tokens_is_plain_attention(backend):
    query, key, value = qkv(tokens=5)
    out = gaussian_mixture_attention(query, key, value, *mixture(), (0, 7), num_prefix_tokens=5, backend=backend)
    close(out, F.scaled_dot_product_attention(query, key, value), rtol=1e-5, atol=2e-6)


@every_backend
def test_splitting_a_gaussian_in_two_halves_changes_nothing(backend):
    query, key, value = qkv()
    alpha, sigma = mixture()
    once = gaussian_mixture_attention(query, key, value, alpha, sigma, (3, 4), backend=backend)
    twice = gaussian_mixture_attention(
        query, key, value, torch.cat([alpha, alpha]) / 2, torch.cat([sigma, sigma]), (3, 4), backend=backend
    )
    close(twice, once, rtol=1e-5, atol=2e-6)


@every_backend
def test_far_tokens_keep_their_weight(backend):
    """M -> 0 makes the logit 0, so a far key weighs exp(0) and may never be skipped."""
    value = torch.zeros(1, 1, 256, 4)
    value[:, :, -1] = 256.0
    query = torch.randn(1, 1, 256, 4)
    out = gaussian_mixture_attention(
        query, query, value, torch.ones(1, 1), torch.full((1, 1), 0.3), (16, 16), scale=0.0, backend=backend
    )
    close(out, torch.ones_like(out))


@every_backend
def test_mixture_equals_the_masked_product_with_its_dense_mask(backend):
    query, key, value = qkv(tokens=14)
    mask = GaussianMixtureMask(*mixture(), (3, 4), num_prefix_tokens=2)
    close(
        gaussian_mixture_attention(
            query, key, value, mask.alpha, mask.sigma, (3, 4), num_prefix_tokens=2, backend=backend
        ),
        masked_product_attention(query, key, value, mask.dense(), backend=backend),
        rtol=1e-5,
        atol=2e-6,
    )


@every_backend
def test_parameters_of_any_floating_dtype(backend):
    query, key, value = qkv()
    alpha, sigma = (t.bfloat16().double().requires_grad_() for t in mixture())
    exact = gaussian_mixture_attention(query, key, value, alpha.float(), sigma.float(), (3, 4), backend=backend)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given_alpha, given_sigma = alpha.detach().to(dtype).requires_grad_(), sigma.detach().to(dtype)
        out = gaussian_mixture_attention(query, key, value, given_alpha, given_sigma, (3, 4), backend=backend)
        close(out, exact, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-2 if dtype == torch.float16 else 2e-6)
        (gradient,) = torch.autograd.grad(out.sum(), given_alpha)
        assert gradient.dtype == dtype


# ---- the free mask (ELM) ----


@every_backend
def test_weight_of_ones_is_plain_attention(backend):
    query, key, value = qkv()
    for weight in (torch.ones(12, 12), torch.ones(2, 12, 12), torch.ones(1, 1).expand(12, 12)):
        out = masked_product_attention(query, key, value, weight, backend=backend)
        close(out, F.scaled_dot_product_attention(query, key, value), rtol=1e-5, atol=2e-6)


@every_backend
def test_weight_shared_by_all_heads_gets_the_sum_of_their_gradients(backend):
    query, key, value = qkv()
    shared = torch.randn(12, 12, requires_grad=True)
    per_head = shared.detach().repeat(2, 1, 1).requires_grad_()
    grad_output = torch.randn_like(query)
    one = torch.autograd.grad(
        masked_product_attention(query, key, value, shared, backend=backend), shared, grad_output
    )[0]
    each = torch.autograd.grad(
        masked_product_attention(query, key, value, per_head, backend=backend), per_head, grad_output
    )[0]
    close(one, each.sum(0), rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded rows", "a slice of a larger table"])
def test_weight_of_any_strides(backend, layout):
    query, key, value = qkv()
    weight = {
        "transposed": torch.randn(2, 12, 12).mT,
        "every other": torch.randn(2, 12, 24)[..., ::2],
        "expanded rows": torch.randn(2, 1, 12).expand(2, 12, 12),
        "a slice of a larger table": torch.randn(5, 20, 20)[1:3, 3:15, 5:17],
    }[layout].requires_grad_()
    contiguous = weight.detach().contiguous().requires_grad_()
    outs = [masked_product_attention(query, key, value, w, backend=backend) for w in (weight, contiguous)]
    close(*outs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), w)[0] for out, w in zip(outs, (weight, contiguous))]
    close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6)], ids=["shared", "per head"])
def test_reference_gradient_of_the_free_mask_is_that_of_finite_differences(shape):
    inputs = [*qkv(1, 2, 6, 3, torch.float64), torch.randn(shape, dtype=torch.float64)]

    def call(query, key, value, weight):
        return masked_product_attention(query, key, value, weight, backend="reference")

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])
    assert torch.autograd.gradgradcheck(call, [t.requires_grad_() for t in inputs])


# ---- the module ----


def published_attention(x, state, grid, num_heads, head_dim):
    """The published module, written from its formula: weights by their published names, one head at a time."""
    batch, tokens, _ = x.shape
    qkv = x @ state["to_qkv.weight"].T
    query, key, value = (
        qkv[:, :, part * num_heads * head_dim : (part + 1) * num_heads * head_dim].reshape(
            batch, tokens, num_heads, head_dim
        )
        for part in range(3)
    )
    heads = []
    for h in range(num_heads):
        factor = torch.zeros(tokens, tokens, dtype=x.dtype)
        for i in range(tokens):
            for j in range(tokens):
                squared = (i // grid[1] - j // grid[1]) ** 2 + (i % grid[1] - j % grid[1]) ** 2
                for alpha, sigma in zip(state["mask.alpha"][:, h, 0, 0], state["mask.sigma"][:, h, 0, 0]):
                    factor[i, j] += alpha * torch.exp(-squared / (2 * (sigma**2 + 1e-5)))
        scores = query[:, :, h] @ key[:, :, h].transpose(1, 2) * head_dim**-0.5
        heads.append((scores * factor).softmax(-1) @ value[:, :, h])
    joined = torch.cat(heads, -1)
    return joined @ state["to_out.0.weight"].T + state["to_out.0.bias"]


def published_state(dim, tokens, num_heads, head_dim, gaussians=5):
    inner = num_heads * head_dim
    return {
        "to_qkv.weight": torch.randn(3 * inner, dim) * dim**-0.5,
        "to_out.0.weight": torch.randn(dim, inner) * inner**-0.5,
        "to_out.0.bias": torch.randn(dim),
        "mask.sigma": 10 + 10 * torch.randn(gaussians, num_heads, 1, 1),
        "mask.alpha": 2 * torch.randn(gaussians, num_heads, 1, 1),
        "mask.mask": torch.randn(1, 1, tokens, tokens),
    }


@every_backend
@pytest.mark.parametrize("grid", [(4, 4), (2, 5)], ids=str)
def test_module_loads_the_published_state_and_computes_its_formula(backend, grid):
    tokens, dim = grid[0] * grid[1], 12
    state = published_state(dim, tokens, num_heads=3, head_dim=8)
    module = GaussianMixtureAttention(dim, grid, num_heads=3, head_dim=8, backend=backend)
    assert module.load_state_dict(dict(state), strict=True) == torch.nn.modules.module._IncompatibleKeys([], [])
    x = torch.randn(2, tokens, dim)
    exact = published_attention(x.double(), {k: v.double() for k, v in state.items()}, grid, 3, 8)
    close(module(x), exact.float(), rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_given_state_as_it_was():
    state = published_state(12, 16, 3, 8)
    before = set(state)
    GaussianMixtureAttention(12, (4, 4), num_heads=3, head_dim=8).load_state_dict(state)
    assert set(state) == before


def test_published_state_inside_a_larger_model_loads_too():
    model = torch.nn.Sequential(torch.nn.LayerNorm(12), GaussianMixtureAttention(12, (4, 4), num_heads=3, head_dim=8))
    state = {f"1.{name}": tensor for name, tensor in published_state(12, 16, 3, 8).items()}
    state |= {f"0.{name}": tensor for name, tensor in torch.nn.LayerNorm(12).state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert torch.equal(model[1].mask.alpha, state["1.mask.alpha"])


def test_module_state_has_the_published_names_and_shapes():
    module = GaussianMixtureAttention(96, (8, 8), num_heads=6, head_dim=16, num_gaussians=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "to_qkv.weight": (288, 96),
        "to_out.0.weight": (96, 96),
        "to_out.0.bias": (96,),
        "mask.sigma": (4, 6, 1, 1),
        "mask.alpha": (4, 6, 1, 1),
    }
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_module_default_is_the_published_mixture_of_five():
    assert GaussianMixtureAttention(64, (4, 4)).mask.alpha.shape[0] == 5


def test_one_head_as_wide_as_the_model_has_no_output_projection():
    module = GaussianMixtureAttention(16, (2, 2), num_heads=1, head_dim=16)
    assert isinstance(module.to_out, torch.nn.Identity)
    module(torch.randn(1, 4, 16))


def test_initialisation_is_as_published():
    module = GaussianMixtureAttention(256, (8, 8), num_heads=64, head_dim=8, num_gaussians=64)
    alpha, sigma, weight = module.mask.alpha, module.mask.sigma, module.to_qkv.weight
    for tensor, mean, std in ((alpha, 0.0, 2.0), (sigma, 10.0, 10.0), (weight, 0.0, (2 / (256 + 3 * 512)) ** 0.5)):
        count = tensor.numel()
        assert abs(tensor.mean() - mean) < 5 * std / count**0.5
        assert abs(tensor.std() - std) < 5 * std / (2 * count) ** 0.5
    assert not module.to_out[0].bias.any()


def test_every_parameter_of_the_module_receives_a_gradient():
    module = GaussianMixtureAttention(12, (3, 4), num_heads=2, head_dim=8, num_prefix_tokens=1)
    module(torch.randn(2, 13, 12)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_module_drops_out_in_training_only():
    module = GaussianMixtureAttention(12, (3, 4), num_heads=2, head_dim=8, dropout=0.5)
    x = torch.randn(1, 12, 12)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def _copies(thing):
    saved = io.BytesIO()
    torch.save(thing, saved)
    saved.seek(0)
    return copy.deepcopy(thing), pickle.loads(pickle.dumps(thing)), torch.load(saved, weights_only=False)


def test_module_can_be_copied_and_pickled():
    module = GaussianMixtureAttention(12, (3, 4), num_heads=2, head_dim=8, num_prefix_tokens=1)
    x = torch.randn(2, 13, 12)
    for other in _copies(module):
        assert torch.equal(other(x), module(x))
        other.mask.alpha.data.zero_()
    assert module.mask.alpha.any()
    assert repr(copy.deepcopy(module)) == repr(module)
    assert "grid=(3, 4)" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_module_moves_to_other_dtypes(dtype):
    module = GaussianMixtureAttention(12, (3, 4), num_heads=2, head_dim=8).to(dtype)
    out = module(torch.randn(2, 12, 12, dtype=dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert module.mask.alpha.grad.dtype == dtype


def test_module_compiles_to_one_graph():
    module = GaussianMixtureAttention(12, (3, 4), num_heads=2, head_dim=8)
    x = torch.randn(2, 12, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x), module(x))


# ---- the mask for stock SDPA ----


@pytest.fixture
def structured():
    alpha, sigma = (t.requires_grad_() for t in mixture())
    return GaussianMixtureMask(alpha, sigma, (3, 4), num_prefix_tokens=1)


def through_the_function(query, key, value, mask, **options):
    return gaussian_mixture_attention(
        query, key, value, mask.alpha, mask.sigma, mask.grid, num_prefix_tokens=mask.num_prefix_tokens, **options
    )


def test_stock_sdpa_takes_the_mask_by_position_and_by_keyword(structured):
    query, key, value = qkv(tokens=13)
    wanted = through_the_function(query, key, value, structured)
    assert torch.equal(F.scaled_dot_product_attention(query, key, value, structured), wanted)
    assert torch.equal(F.scaled_dot_product_attention(query, key, value, attn_mask=structured), wanted)
    assert torch.equal(F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=structured), wanted)
    assert torch.equal(effattn.scaled_dot_product_attention(query, key, value, structured), wanted)


def test_stock_sdpa_hands_scale_and_grouped_heads_on(structured):
    query, key, value = qkv(tokens=13)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=structured, scale=0.7)
    assert torch.equal(got, through_the_function(query, key, value, structured, scale=0.7))
    got = F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], attn_mask=structured, enable_gqa=True)
    repeated = (query, key[:, :1].expand_as(key), value[:, :1].expand_as(value))
    close(got, through_the_function(*repeated, structured))


def test_stock_sdpa_with_the_mask_runs_our_kernel(structured):
    require("gaussian_mixture_attention", "cpu")
    query, key, value = qkv(tokens=13)
    with RecordedCalls() as recorded:
        F.scaled_dot_product_attention(query, key, value, attn_mask=structured)
    assert [str(op) for op, _ in recorded.calls] == ["effattn.gaussian_mixture_fwd.default"]


def test_stock_sdpa_with_the_mask_gives_gradients_to_its_parameters(structured):
    query, key, value = (t.requires_grad_() for t in qkv(tokens=13))
    inputs = (query, key, value, structured.alpha, structured.sigma)
    got = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, structured).square().sum(), inputs)
    wanted = torch.autograd.grad(through_the_function(query, key, value, structured).square().sum(), inputs)
    for one, other in zip(got, wanted):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keyword", [False, True], ids=["by position", "by keyword"])
def test_stock_sdpa_with_the_mask_compiles_to_one_graph(keyword):
    def model(query, key, value, alpha, sigma):
        mask = GaussianMixtureMask(alpha, sigma, (3, 4), num_prefix_tokens=1)
        if keyword:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return F.scaled_dot_product_attention(query, key, value, mask)

    inputs = [t.requires_grad_() for t in (*qkv(tokens=13), *mixture())]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    close(compiled(*inputs), model(*inputs))
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for one, other in zip(got, torch.autograd.grad(model(*inputs).square().sum(), inputs)):
        close(one, other, rtol=1e-4, atol=1e-5)


def test_mask_made_outside_the_compiled_function_compiles_too(structured):
    query, key, value = qkv(tokens=13)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, key, value, structured), fullgraph=True)
    close(compiled(query), F.scaled_dot_product_attention(query, key, value, structured), rtol=1e-5, atol=1e-5)


def test_stock_sdpa_refuses_the_mask_together_with_is_causal(structured):
    with pytest.raises(ValueError, match="is_causal"):
        F.scaled_dot_product_attention(*qkv(tokens=13), attn_mask=structured, is_causal=True)


def test_stock_sdpa_refuses_a_mask_of_another_grid(structured):
    with pytest.raises(ValueError, match="query has 12 tokens, but grid 3 x 4 with num_prefix_tokens=1 makes 13"):
        F.scaled_dot_product_attention(*qkv(), attn_mask=structured)


def test_other_torch_functions_do_not_take_the_mask(structured):
    with pytest.raises(TypeError):
        F.softmax(structured, -1)


def test_dense_is_what_the_mask_means(structured):
    query, key, value = qkv(tokens=13)
    dense = structured.dense()
    assert dense.shape == (2, 13, 13)
    expected = formulas.mixture_mask(
        structured.alpha.detach().double().numpy(), structured.sigma.detach().double().numpy(), (3, 4), 1
    )
    close(dense, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)
    product = (8**-0.5 * query @ key.mT * dense).softmax(-1) @ value
    close(F.scaled_dot_product_attention(query, key, value, attn_mask=structured), product, rtol=1e-5, atol=2e-6)


def test_mask_describes_itself_and_copies(structured):
    assert repr(structured) == "GaussianMixtureMask(gaussians=3, heads=2, grid=(3, 4), num_prefix_tokens=1)"
    query, key, value = qkv(tokens=13)
    wanted = F.scaled_dot_product_attention(query, key, value, structured)
    for other in _copies(structured):
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, other), wanted)
