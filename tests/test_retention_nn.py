"""Modules of RetNet and ViR and the mask of retention: what they compute, what they carry, what state dicts they load."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conformance import backends_of, require
from published_retention import RetNetRetention, ViRRetention, retnet_gammas

import effattn
from effattn.nn import MultiScaleRetention, VisionRetention

FORMS = {
    "parallel": {"method": "parallel"},
    "chunkwise": {"method": "chunkwise", "chunk_size": 3},
    "recurrent": {"method": "recurrent"},
}
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
every_form = pytest.mark.parametrize("form", FORMS)
DIM, VALUE_DIM, HEADS = 16, 24, 4


@pytest.fixture(autouse=True)
def _available(request):
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        for op in ("retention", "retention_step"):
            if backend not in backends_of(op):
                pytest.skip(f"{op} has no backend {backend}")
            require(op, backend)


def close(got, wanted, tolerance=1e-12):
    scale = max(wanted.abs().max().item(), 1.0) if wanted.numel() else 1.0
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * scale)


def retnet(eps=0.0, gate="swish", published=RetNetRetention, **options):
    """The published module with weights that matter, and ours that loaded its state dict."""
    theirs = published(DIM, VALUE_DIM, HEADS, {"swish": F.silu, "gelu": F.gelu}[gate], eps).double()
    options = {"value_dim": VALUE_DIM, "gate_fn": gate, "eps": eps, "backend": "reference", **options}
    ours = MultiScaleRetention(DIM, HEADS, **options).double()
    assert not any(ours.load_state_dict(theirs.state_dict(), strict=True))
    return theirs, ours


def results(module, x, grad, **options):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, **options)
    out.backward(grad)
    return {"output": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def decode(module, x, state=None, **options):
    """Token by token."""
    outputs = []
    for token in x.split(1, 1):
        output, state = module(token, state, return_state=True, **options)
        outputs.append(output)
    return torch.cat(outputs, 1), state


def doubled(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- RetNet ----


@every_form
@pytest.mark.parametrize("theirs", ["parallel", "chunkwise", "recurrent"])
def test_after_the_norm_every_form_is_every_published_form(form, theirs):
    published, ours = retnet(**FORMS[form])
    x, grad = doubled(2, 2, 12, DIM)
    wanted, got = results(published, x, grad, form=theirs), results(ours, x, grad)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        close(got[name], tensor)


def test_the_published_forms_differ_before_the_norm_and_so_with_eps_above_0():
    """Why equality needs eps 0: torchscale divides each row by another scale in each form."""
    published, ours = retnet(eps=1.0)
    x = doubled(2, 12, DIM)
    forms = [published(x, form) for form in ("parallel", "chunkwise", "recurrent")]
    assert not torch.allclose(forms[0], forms[1])
    torch.testing.assert_close(ours(x), forms[2])  # the recurrent form has no such scale


def test_the_gate_may_be_gelu():
    published, ours = retnet(gate="gelu", eps=1e-6)
    x = doubled(1, 7, DIM)
    close(ours(x), published(x, "recurrent"))
    assert not torch.allclose(ours(x), retnet()[1](x))


def assert_as_exact(got, low, exact, grad):
    """Two roundings more than the operator has are allowed, those of two projections."""
    for name, ref in exact.items():
        eps = torch.finfo(got[name].dtype).eps * max(ref.abs().max().item(), grad.abs().max().item())
        factor = 2 if name == "output" else 3
        assert (got[name] - ref).abs().max() <= factor * (low[name] - ref).abs().max() + 4 * eps, name


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_lower_precision_the_module_is_as_exact_as_the_published_one(dtype, backend):
    published, ours = retnet(eps=1e-2, backend=backend)
    published, ours = published.to(dtype), ours.to(dtype)
    x, grad = torch.randn(2, 2, 12, DIM).to(dtype)
    low, got = results(published, x, grad, form="recurrent"), results(ours, x, grad)
    exact = results(published.double(), x.double(), grad.double(), form="recurrent")
    assert_as_exact(got, low, exact, grad)


@every_backend
def test_in_float32_decoding_is_as_exact_as_the_published_recurrence(backend):
    published, ours = retnet(eps=1e-3, backend=backend)
    x = torch.randn(2, 40, DIM)
    exact = published(x.double(), "recurrent")
    low = published.float()(x, "recurrent")
    ours.float()
    with torch.no_grad():
        prefix, state = ours(x[:, :9], return_state=True)
        middle, state = ours(x[:, 9:20], state, return_state=True)
        rest, _ = decode(ours, x[:, 20:], state, inplace=True)
    assert_as_exact({"output": torch.cat((prefix, middle, rest), 1)}, {"output": low}, {"output": exact}, exact)


def test_value_is_twice_as_wide_by_default():
    module = MultiScaleRetention(32, 4)
    assert (module.value_dim, module.key_dim, module.head_dim) == (64, 8, 16)
    assert module(torch.randn(1, 3, 32)).shape == (1, 3, 32)


@every_form
def test_a_sequence_in_pieces_is_the_whole_sequence(form):
    _, ours = retnet(eps=1e-3, **FORMS[form])
    x, grad = doubled(2, 2, 14, DIM)
    wanted = results(ours, x, grad)

    class InPieces(torch.nn.Module):
        def forward(self, x):
            outputs, state = [], None
            for piece in x.split([5, 1, 1, 0, 7], 1):
                output, state = ours(piece, state, return_state=True)
                outputs.append(output)
            assert state.position == x.shape[1]
            return torch.cat(outputs, 1)

    ours.zero_grad()
    leaf = x.clone().requires_grad_()
    out = InPieces()(leaf)
    out.backward(grad)
    got = {"output": out.detach(), "x": leaf.grad, **{name: p.grad for name, p in ours.named_parameters()}}
    for name, tensor in wanted.items():
        close(got[name], tensor)


def test_decoding_runs_one_step_a_token_in_memory_that_does_not_grow(monkeypatch):
    import effattn.nn.retention as module

    published, ours = retnet(eps=1e-6)
    x = doubled(2, 20, DIM)
    steps, whole = [], []
    step, retention = module.retention_step, module.retention
    monkeypatch.setattr(module, "retention_step", lambda *a, **k: steps.append(1) or step(*a, **k))
    monkeypatch.setattr(module, "retention", lambda *a, **k: whole.append(1) or retention(*a, **k))
    with torch.no_grad():
        prefix, state = ours(x[:, :8], return_state=True)
        storage = state.memory.data_ptr()
        rest, last = decode(ours, x[:, 8:], state, inplace=True)
    assert (len(steps), len(whole)) == (12, 1)
    assert last.memory.data_ptr() == storage
    assert last.memory.is_contiguous()
    assert last.memory.shape == (2, HEADS, DIM // HEADS, VALUE_DIM // HEADS)
    assert last.position == 20
    close(torch.cat((prefix, rest), 1), published(x, "recurrent"))


def test_without_inplace_the_given_state_stays_as_it_was():
    _, ours = retnet()
    x = doubled(1, 3, DIM)
    with torch.no_grad():
        _, state = ours(x[:, :2], return_state=True)
        before = state.memory.clone()
        once, twice = (ours(x[:, 2:], state) for _ in range(2))
    assert torch.equal(state.memory, before)
    assert torch.equal(once, twice)


def test_the_sum_of_decays_follows_from_the_position_also_where_gamma_is_almost_1():
    module = MultiScaleRetention(80, 40, dtype=torch.float64)
    exact = module.log_decay
    assert exact[-1] == -(2.0**-44) - 2.0**-89
    torch.testing.assert_close(module._row_sums(777), effattn.reference.row_sums(exact, 777)[:, -1], rtol=1e-13, atol=0)
    assert not module._row_sums(0).any()
    million = module._row_sums(10**6)
    torch.testing.assert_close(million[-1].item(), 10**6 - 10**12 / 2 * 2.0**-44, rtol=1e-12, atol=0)
    torch.testing.assert_close(million[0].item(), 32.0, rtol=1e-12, atol=0)
    module._log_decay = torch.tensor([0.0, float("-inf")], dtype=torch.float64)
    assert module._row_sums(5).tolist() == [5.0, 1.0]


def test_packed_sequences_do_not_see_each_other():
    _, ours = retnet(eps=1e-3)
    first, second = doubled(1, 5, DIM), doubled(1, 8, DIM)
    packed = ours(torch.cat((first, second), 1), cu_seqlens=torch.tensor([0, 5, 13], dtype=torch.int32))
    close(packed, torch.cat((ours(first), ours(second)), 1))


def test_retnet_is_initialised_as_published():
    module = MultiScaleRetention(256, 4)
    for name, parameter in module.named_parameters():
        gain = 2**-1 if name == "out_proj.weight" else 2**-2.5
        bound = gain * math.sqrt(6 / sum(parameter.shape))
        assert parameter.abs().max() <= bound
        assert abs(parameter.std().item() / (bound / math.sqrt(3)) - 1) < 0.02, name


# ---- ViR ----


@every_form
@pytest.mark.parametrize("norm", [True, False])
def test_vision_retention_is_the_formula_of_the_paper(form, norm):
    published = ViRRetention(DIM, HEADS, norm).double()
    ours = VisionRetention(DIM, HEADS, norm=norm, backend="reference", **FORMS[form]).double()
    assert not any(ours.load_state_dict(published.state_dict(), strict=True))
    assert ours.state_dict().keys() == published.state_dict().keys()
    x, grad = doubled(2, 2, 3 * 4 + 1, DIM)
    wanted, got = results(published, x, grad), results(ours, x, grad)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        close(got[name], tensor)


def test_a_class_token_sees_the_image_only_as_the_last_token():
    ours = VisionRetention(DIM, HEADS, backend="reference")
    x = torch.randn(1, 10, DIM, requires_grad=True)
    out = ours(x)
    (seen,) = torch.autograd.grad(out[0, -1].sum(), x, retain_graph=True)
    assert (seen[0] != 0).any(-1).all()
    (seen,) = torch.autograd.grad(out[0, 0].sum(), x)
    assert (seen[0] != 0).any(-1).tolist() == [True] + [False] * 9


def test_an_image_is_its_tokens_in_raster_order_and_may_come_in_pieces():
    ours = VisionRetention(DIM, HEADS, backend="reference").double()
    image = doubled(2, 4, 3, DIM)
    out = ours(image)
    assert out.shape == image.shape
    assert torch.equal(out.flatten(1, 2), ours(image.flatten(1, 2)))
    above, state = ours(image[:, :3], return_state=True)
    below, state = ours(image[:, 3:], state, return_state=True)
    assert state.shape == (2, HEADS, DIM // HEADS, DIM // HEADS)
    close(torch.cat((above, below), 1), out)


def test_vision_retention_is_initialised_as_a_vision_transformer():
    module = VisionRetention(256, 8)
    assert abs(module.qkv.weight.std() / 0.02 - 1) < 0.02
    assert abs(module.proj.weight.std() / 0.02 - 1) < 0.02
    assert not module.qkv.bias.any()
    assert VisionRetention(16, 2, qkv_bias=False).qkv.bias is None


def test_dropout_is_of_training_only():
    module = VisionRetention(DIM, HEADS, proj_drop=0.5, backend="reference")
    x = torch.randn(2, 9, DIM)
    assert not torch.equal(module(x), module(x))
    plain = VisionRetention(DIM, HEADS, backend="reference")
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), plain(x))


# ---- decays ----

MAKERS = {
    "retnet": lambda **options: MultiScaleRetention(DIM, HEADS, **{"backend": "reference", **options}),
    "vir": lambda **options: VisionRetention(DIM, HEADS, **{"backend": "reference", **options}),
}
every_module = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_module
def test_fixed_decays_are_exact_through_casts_and_not_in_the_state_dict(make):
    exact = retnet_gammas(HEADS).log()
    module = make()
    assert not any("decay" in name or "rate" in name for name in module.state_dict())
    for changed in (module, module.bfloat16(), module.half(), module.to("meta").to_empty(device="cpu")):
        assert changed.log_decay.dtype == torch.float32
        torch.testing.assert_close(changed.log_decay, exact.float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(module.double().log_decay, exact, rtol=1e-15, atol=0)
    assert make(dtype=torch.bfloat16).log_decay.dtype == torch.float32
    assert not module.log_decay.requires_grad


@every_module
def test_learnable_decays_start_as_published_get_the_gradient_and_stay_below_1(make):
    module, fixed = make(learnable_decay=True).double(), make().double()
    module.reset_parameters()
    torch.testing.assert_close(module.log_decay, retnet_gammas(HEADS).log())
    assert not any(module.load_state_dict(fixed.state_dict(), strict=True))
    x = doubled(2, 9, DIM)
    torch.testing.assert_close(module(x), fixed(x))
    module(x).square().sum().backward()
    step = 1e-6
    gradient, moved = module.log_rate.grad.clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            module.log_rate[1] += sign * step
            moved.append(module(x).square().sum().item())
            module.log_rate[1] -= sign * step
    torch.testing.assert_close(gradient[1].item(), (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        module.log_rate += 100 * torch.randn(HEADS)
    assert (module.log_decay <= 0).all()
    assert module(x).isfinite().all()


def test_learnable_decays_are_saved_and_loaded_and_a_fixed_module_refuses_them():
    module = MAKERS["retnet"](learnable_decay=True)
    with torch.no_grad():
        module.log_rate.normal_()
    again = MAKERS["retnet"](learnable_decay=True)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.log_rate, module.log_rate)
    with pytest.raises(RuntimeError, match=r"Unexpected.*log_rate"):
        MAKERS["retnet"]().load_state_dict(module.state_dict())


def test_decoding_and_prefill_train_the_decay_alike():
    module = MAKERS["retnet"](learnable_decay=True).double()
    x, gradients = doubled(1, 6, DIM), []
    for call in (lambda: module(x), lambda: decode(module, x)[0]):
        module.zero_grad()
        call().square().sum().backward()
        gradients.append(module.log_rate.grad.clone())
    assert gradients[0].all()
    close(gradients[1], gradients[0])


# ---- how they run ----


@every_module
def test_modules_copy_and_pickle(make):
    module, x = make(), torch.randn(1, 6, DIM)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)
    assert "num_heads=4" in repr(module)
    assert "learnable_decay=False" in repr(module)


@every_module
def test_modules_run_on_the_meta_device_in_half_precision_and_on_empty_batches(make):
    assert make(device="meta")(torch.empty(2, 5, DIM, device="meta")).shape == (2, 5, DIM)
    module = make(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    x = torch.randn(2, 5, DIM, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    for shape in ((0, 5, DIM), (2, 0, DIM)):
        out, state = module(torch.zeros(shape, dtype=torch.bfloat16), return_state=True)
        assert out.shape == shape
        assert not (state if isinstance(state, torch.Tensor) else state.memory).any()
    out, state = module(x[:, :4], return_state=True)
    assert module(x[:, 4:], state).dtype == torch.bfloat16


@every_module
def test_autocast_computes_in_bfloat16_and_trains_the_parameters_in_float32(make):
    module, x = make(learnable_decay=True), torch.randn(2, 9, DIM)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in module.parameters())
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


@every_backend
@every_module
def test_a_training_step_compiles_to_one_graph(make, backend):
    torch._dynamo.reset()
    module = make(learnable_decay=True, backend=backend)
    x, grad = torch.randn(2, 2, 9, DIM)
    wanted = results(module, x, grad)
    got = results(torch.compile(module, fullgraph=True, backend="aot_eager"), x, grad)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got.get(name, got.get(f"_orig_mod.{name}")), tensor, rtol=1e-4, atol=1e-5)


@every_backend
def test_a_decoding_step_compiles_once_for_all_positions(backend):
    torch._dynamo.reset()
    module, x = MAKERS["retnet"](backend=backend).eval(), torch.randn(2, 12, DIM)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        prefix, state = module(x[:, :4], return_state=True)
        rest, _ = decode(compiled, x[:, 4:], state)
        torch.testing.assert_close(torch.cat((prefix, rest), 1), module(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# ---- the mask ----


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": False}, {"normalize": "retnet"}, {"method": "chunkwise", "chunk_size": 4}], ids=str
)
def test_stock_sdpa_takes_the_mask(options):
    query, key = torch.randn(2, 1, 2, 10, 8)
    value, log_decay = torch.randn(1, 2, 10, 5), effattn.retnet_log_decay(2).requires_grad_()
    mask = effattn.RetentionDecay(log_decay, **options)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    wanted = effattn.retention(query, key, value, log_decay, scale=0.3, **options)
    assert torch.equal(got, wanted)
    (gradient,) = torch.autograd.grad(got.sum(), log_decay)
    assert gradient.any()


def test_the_mask_packs_sequences_and_repeats_heads():
    query, key = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    bounds, log_decay = torch.tensor([0, 3, 10], dtype=torch.int32), effattn.retnet_log_decay(4)
    mask = effattn.RetentionDecay(log_decay, cu_seqlens=bounds)
    got = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    repeated = key.repeat_interleave(2, 1)
    assert torch.equal(got, effattn.retention(query, repeated, repeated, log_decay, cu_seqlens=bounds))


def test_the_mask_refuses_what_retention_has_not():
    query, mask = torch.randn(1, 2, 5, 8), effattn.RetentionDecay(effattn.retnet_log_decay(2))
    with pytest.raises(ValueError, match="RetentionDecay: dropout_p must be 0"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.5)
    with pytest.raises(ValueError, match="is_causal must be False with a structured attn_mask"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=True)
    with pytest.raises(NotImplementedError, match="no dense form"):
        mask.dense()
    assert repr(mask) == "RetentionDecay(heads=2, is_causal=True, normalize='none', method='auto')"
    explanation = effattn.explain(F.scaled_dot_product_attention, query, query, query, attn_mask=mask)
    assert explanation.op == "retention"


# ---- what they refuse ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MultiScaleRetention(12, 4), ValueError, "embed_dim 12 must be a multiple of 2 . num_heads"),
        (lambda: MultiScaleRetention(16, 4, value_dim=18), ValueError, "value_dim 18 must be a multiple"),
        (lambda: MultiScaleRetention(16, 0), ValueError, "num_heads must be at least 1"),
        (lambda: MultiScaleRetention(16.0, 4), TypeError, "embed_dim must be an int"),
        (lambda: MultiScaleRetention(16, 4, gate_fn="relu"), ValueError, "gate_fn must be one of swish, gelu"),
        (lambda: MultiScaleRetention(16, 4, eps=-1.0), ValueError, "eps must be at least 0"),
        (lambda: MultiScaleRetention(16, 4, method="ring"), ValueError, "method must be one of"),
        (lambda: MultiScaleRetention(16, 4, method="parallel", chunk_size=4), ValueError, "chunk_size must be None"),
        (lambda: VisionRetention(10, 4), ValueError, "dim 10 must be a multiple of num_heads 4"),
        (lambda: VisionRetention(8, 2, proj_drop=1.0), ValueError, "proj_drop"),
        (lambda: VisionRetention(8, 2, eps="1"), TypeError, "eps must be a number"),
        (lambda: VisionRetention(8, 2, chunk_size=0), ValueError, "chunk_size must be at least 1"),
    ],
)
def test_modules_refuse_what_they_cannot_be(make, error, message):
    with pytest.raises(error, match=f"(MultiScale|Vision)Retention: {message}"):
        make()


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a Tensor"),
        (torch.zeros(1, 5, 9), {}, ValueError, r"x must have shape \(batch, tokens, 16\)"),
        (torch.zeros(5, 16), {}, ValueError, "x must have shape"),
        (torch.zeros(1, 5, 16), {"state": torch.zeros(1)}, TypeError, r"state must be \(memory, position\)"),
        (torch.zeros(1, 5, 16), {"state": (torch.zeros(1, 4, 4, 9), 3)}, ValueError, "state memory must have shape"),
        (torch.zeros(1, 5, 16), {"state": (torch.zeros(1, 4, 4, 8), -1)}, ValueError, "state position"),
        (
            torch.zeros(1, 5, 16),
            {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "return_state": True},
            ValueError,
            "return_state must be left out where cu_seqlens is given",
        ),
    ],
)
def test_retnet_refuses_what_it_cannot_take(x, options, error, message):
    with pytest.raises(error, match=f"MultiScaleRetention: {message}"):
        MultiScaleRetention(DIM, HEADS)(x, **options)


def test_vision_retention_refuses_what_it_cannot_take():
    module = VisionRetention(DIM, HEADS)
    with pytest.raises(ValueError, match=r"VisionRetention: x must have shape \(batch, tokens, 16\) or \(batch, h, w"):
        module(torch.zeros(5, DIM))
    with pytest.raises(ValueError, match="VisionRetention: state must have shape"):
        module(torch.zeros(1, 5, DIM), torch.zeros(1, HEADS, 3, 3))
