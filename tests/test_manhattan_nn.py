"""The module of RMT and the mask of Manhattan attention: what they compute and what state dicts they load."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conformance import backends_of, require
from published_retention import RMTRetention

import effattn
from effattn.nn import ManhattanAttention

DIM, HEADS = 24, 3
GRIDS = [(4, 5), (6, 3), (1, 7), (7, 1)]
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
every_form = pytest.mark.parametrize("decomposed", [False, True], ids=["full", "decomposed"])


@pytest.fixture(autouse=True)
def _available(request):
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if backend not in backends_of("manhattan_attention"):
            pytest.skip(f"manhattan_attention has no backend {backend}")
        require("manhattan_attention", backend)


def both(decomposed, initial=2.0, heads_range=4.0, backend="reference", **options):
    """The published module with weights that matter, and ours that loaded its state dict."""
    published = RMTRetention(DIM, HEADS, decomposed, initial, heads_range)
    ours = ManhattanAttention(
        DIM, HEADS, decomposed=decomposed, initial=initial, heads_range=heads_range, backend=backend, **options
    )
    assert not any(ours.load_state_dict(published.state_dict(), strict=True))
    assert ours.state_dict().keys() == published.state_dict().keys()
    return published, ours


def results(module, x, grad):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(grad)
    return {"output": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def largest(*tensors):
    return max(tensor.abs().max().item() for tensor in tensors)


@every_form
@pytest.mark.parametrize("grid", GRIDS)
def test_in_float64_the_module_is_the_published_one(grid, decomposed):
    published, ours = both(decomposed)
    x, grad = torch.randn(2, 2, *grid, DIM, dtype=torch.float64)
    wanted, got = results(published.double(), x, grad), results(ours.double(), x, grad)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-12 * largest(tensor, grad))


@every_backend
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_lower_precision_the_module_is_as_exact_as_the_published_one(dtype, decomposed, backend):
    published, ours = (module.to(dtype) for module in both(decomposed, backend=backend))
    x, grad = torch.randn(2, 2, 4, 5, DIM).to(dtype)
    low, got = (results(module, x, grad) for module in (published, ours))
    for name, ref in results(published.double(), x.double(), grad.double()).items():
        eps = torch.finfo(dtype).eps * largest(ref, grad)
        allowed = (2 if name == "output" else 3) * largest(low[name] - ref) + 4 * eps
        assert largest(got[name] - ref) <= allowed, name


def test_other_published_decays():
    published, ours = both(False, initial=2, heads_range=6)
    x = torch.randn(1, 4, 4, DIM)
    torch.testing.assert_close(ours(x), published(x))
    torch.testing.assert_close(ours.log_decay.exp().tolist(), [1 - 2.0 ** -(2 + 6 * h / HEADS) for h in range(HEADS)])


def test_decay_on_the_weights_is_the_formula_of_the_paper():
    _, ours = both(False, decay="weights")
    ours.double()
    x = torch.randn(1, 3, 4, DIM, dtype=torch.float64)
    query, key, value = (
        proj(x).view(1, 12, HEADS, -1).transpose(1, 2) for proj in (ours.q_proj, ours.k_proj, ours.v_proj)
    )
    query, key = effattn.rotate_xpos(query), effattn.rotate_xpos(key)
    weights = (query @ key.mT * (DIM // HEADS) ** -0.5).softmax(-1)
    weights = weights * ours.log_decay.exp()[:, None, None] ** effattn.reference.manhattan_distance((3, 4))
    enhanced = ours.lepe.conv(ours.v_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours(x), ours.out_proj((weights @ value).transpose(1, 2).reshape(x.shape) + enhanced))


def test_the_rest_of_the_published_call_is_not_used():
    _, ours = both(True)
    x = torch.randn(1, 3, 4, DIM)
    assert torch.equal(ours(x, (None, None), True, None), ours(x))


def test_published_initialisation():
    module = ManhattanAttention(256, 8)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linear = getattr(module, name)
        gain = 1.0 if name == "out_proj" else 2**-2.5
        assert abs(linear.weight.std().item() / (gain * math.sqrt(2 / 512)) - 1) < 0.02, name
        assert linear.bias.any() == (name != "out_proj")
        assert linear.bias.abs().max() <= 1 / 16
    assert module.lepe.conv.weight.abs().max() <= 1 / 5


def test_a_state_dict_of_another_shape_or_with_other_names_is_refused():
    state = RMTRetention(DIM, HEADS, True).state_dict()
    module = ManhattanAttention(DIM, HEADS)
    with pytest.raises(RuntimeError, match=r"Unexpected.*surprise"):
        module.load_state_dict({**state, "surprise": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing.*lepe\.conv\.weight"):
        module.load_state_dict({name: t for name, t in state.items() if name != "lepe.conv.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({name: t[1:] for name, t in state.items()})


@every_form
def test_learnable_decays_start_as_published_and_get_the_gradient(decomposed):
    published, ours = both(decomposed)
    module = ManhattanAttention(DIM, HEADS, decomposed=decomposed, learnable_decay=True, backend="reference")
    assert not any(module.load_state_dict(published.state_dict(), strict=True))
    x = torch.randn(2, 3, 4, DIM)
    torch.testing.assert_close(module(x), ours(x))
    module(x).square().sum().backward()
    log_decay = ours.log_decay.requires_grad_()
    ours(x).square().sum().backward()
    torch.testing.assert_close(module.log_rate.grad, log_decay.grad * log_decay.detach())
    assert module.log_rate.grad.all()


def test_fixed_decays_are_exact_through_casts():
    module = ManhattanAttention(DIM, HEADS)
    wanted = effattn.rmt_log_decay(HEADS)
    for changed in (module.bfloat16(), module.half(), module.to("meta").to_empty(device="cpu")):
        assert changed.log_decay.dtype == torch.float32
        torch.testing.assert_close(changed.log_decay, wanted.float(), rtol=1e-7, atol=0)
    assert torch.equal(module.double().log_decay, wanted)


# ---- how it runs ----


def test_the_module_copies_and_pickles():
    _, module = both(True)
    x = torch.randn(1, 3, 4, DIM)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)
    assert "decomposed=True" in repr(module)


@every_form
def test_the_module_runs_on_the_meta_device_in_half_precision_and_on_empty_batches(decomposed):
    module = ManhattanAttention(DIM, HEADS, decomposed=decomposed, device="meta")
    assert module(torch.empty(2, 3, 4, DIM, device="meta")).shape == (2, 3, 4, DIM)
    module = ManhattanAttention(DIM, HEADS, decomposed=decomposed, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module(torch.randn(2, 3, 4, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for shape in ((0, 3, 4, DIM), (2, 0, 4, DIM)):
        assert module(torch.zeros(shape, dtype=torch.bfloat16)).shape == shape


def test_autocast_computes_in_bfloat16_and_trains_the_parameters_in_float32():
    _, module = both(True)
    x = torch.randn(1, 4, 5, DIM)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in module.parameters())
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


@every_backend
@every_form
def test_a_training_step_compiles_to_one_graph(decomposed, backend):
    torch._dynamo.reset()
    module = ManhattanAttention(DIM, HEADS, decomposed=decomposed, learnable_decay=True, backend=backend)
    x, grad = torch.randn(2, 2, 3, 4, DIM)
    wanted = results(module, x, grad)
    got = results(torch.compile(module, fullgraph=True, backend="aot_eager"), x, grad)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got.get(name, got.get(f"_orig_mod.{name}")), tensor, rtol=1e-4, atol=1e-5)


# ---- the mask ----


@pytest.mark.parametrize("num_prefix_tokens", [0, 2])
def test_the_dense_form_of_the_mask_says_the_same(num_prefix_tokens):
    query, key, value = torch.randn(3, 2, 2, 12 + num_prefix_tokens, 8, dtype=torch.float64)
    mask = effattn.ManhattanDecay(effattn.rmt_log_decay(2), (3, 4), num_prefix_tokens=num_prefix_tokens)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4)
    torch.testing.assert_close(
        got, F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense(), scale=0.4)
    )
    assert mask.dense().shape == (2, *query.shape[2:3] * 2)


@pytest.mark.parametrize(
    "options",
    [{"decomposed": True}, {"decay": "weights"}, {"lce_weight": torch.ones(16, 1, 5, 5), "lce_bias": torch.ones(16)}],
    ids=["decomposed", "weights", "lce"],
)
def test_stock_sdpa_takes_the_mask_where_no_dense_one_says_the_same(options):
    query, key, value = torch.randn(3, 1, 2, 12, 8)
    log_decay = effattn.rmt_log_decay(2).requires_grad_()
    mask = effattn.ManhattanDecay(log_decay, (3, 4), **options)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(got, effattn.manhattan_attention(query, key, value, log_decay, (3, 4), **options))
    assert torch.autograd.grad(got.square().sum(), log_decay)[0].any()
    with pytest.raises(NotImplementedError, match="no dense mask is the same"):
        mask.dense()


def test_the_mask_passes_dropout_and_shows_what_it_is():
    query = torch.randn(1, 2, 12, 8)
    mask = effattn.ManhattanDecay(effattn.rmt_log_decay(2), (3, 4))
    dropped = F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.5)
    assert not torch.equal(dropped, F.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    with pytest.raises(ValueError, match="is_causal must be False"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=True)
    assert repr(mask) == (
        "ManhattanDecay(heads=2, grid=(3, 4), decomposed=False, decay='logits', num_prefix_tokens=0, lce=False)"
    )


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 8}, ValueError, "embed_dim 24 must be a multiple of 2 . num_heads, 16"),
        ({"num_heads": "3"}, TypeError, "num_heads must be an int"),
        ({"decay": "scores"}, ValueError, "decay must be one of logits, weights"),
        ({"initial": -1.0}, ValueError, "initial must be at least 0"),
        ({"heads_range": None}, TypeError, "heads_range must be a number"),
    ],
)
def test_the_module_refuses_what_it_cannot_be(options, error, message):
    with pytest.raises(error, match=f"ManhattanAttention: {message}"):
        ManhattanAttention(DIM, **{"num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("x", "error"), [([1.0], TypeError), (torch.zeros(1, 12, DIM), ValueError), (torch.zeros(1, 3, 4, 8), ValueError)]
)
def test_the_module_refuses_what_it_cannot_take(x, error):
    with pytest.raises(error, match="ManhattanAttention: x must"):
        ManhattanAttention(DIM, HEADS)(x)
