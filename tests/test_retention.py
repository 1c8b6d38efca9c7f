"""What is particular to retention: its forms agree, states carry over, decays from 0 to 1 - 2^-44, packed sequences."""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conformance import RecordedCalls, assert_within_budget, backends_of, device_of, formulas, is_slow, require, run

import effattn
from effattn import reference

BACKENDS = pytest.mark.parametrize("backend", backends_of("retention"))
NORMALIZE = pytest.mark.parametrize("normalize", ["none", "retnet"])
FORMS = {"parallel": {"method": "parallel"}, "chunkwise": {"chunk_size": 16}, "recurrent": {"method": "recurrent"}}


def draw(backend, seed=0, *, batch=1, heads=2, tokens=40, key_dim=8, value_dim=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    value_dim = key_dim if value_dim is None else value_dim
    sizes = (key_dim, key_dim, value_dim)
    drawn = [torch.randn(batch, heads, tokens, size, generator=generator).to(dtype) for size in sizes]
    log_decay = -torch.exp2(-1 - 5 * torch.rand(heads, generator=generator))
    names = ("query", "key", "value", "log_decay")
    return {name: t.to(device_of(backend)) for name, t in zip(names, (*drawn, log_decay))}


def served(backend, tensors, **options):
    """Skip where the backend says that it does not serve the call."""
    require("retention", backend)
    try:
        with RecordedCalls():
            return effattn.retention(**tensors, **options, backend=backend)
    except NotImplementedError as error:
        pytest.skip(str(error).partition(". Others")[0])


@dataclass
class Call:
    """A call that the accuracy rule can be held against; ``results`` makes one tensor of (output, state)."""

    function: object
    differentiable: tuple = ("query", "key", "value", "log_decay")

    def __call__(self, tensors, options, backend):
        return self.function(**tensors, **options, backend=backend)


def check(backend, options, grad_shape=None, differentiable=("query", "key", "value", "log_decay"), **sizes):
    def sample(seed):
        tensors = draw(backend, seed, **sizes)
        grad = torch.randn(tensors["value"].shape, generator=torch.Generator().manual_seed(seed))
        return tensors, options, grad.to(tensors["value"])

    served(backend, sample(0)[0], **options)
    assert_within_budget(Call(effattn.retention, differentiable), sample, backend)


def part(tensors, begin, end):
    return {n: t if n == "log_decay" else t[:, :, begin:end] for n, t in tensors.items()}


# ---- the forms ----


@BACKENDS
@NORMALIZE
def test_parallel_chunkwise_and_recurrent_forms_agree_forward_and_backward(backend, normalize):
    require("retention", backend)
    results, tensors = {}, draw(backend)
    grad = torch.randn_like(tensors["value"])
    for name, form in FORMS.items():
        if backend in ("triton", "cuda") and name != "chunkwise":  # which need not have all three
            with contextlib.suppress(NotImplementedError):
                results[name] = run(Call(effattn.retention), tensors, {"normalize": normalize, **form}, backend, grad)
        else:
            results[name] = run(Call(effattn.retention), tensors, {"normalize": normalize, **form}, backend, grad)
    exact = {n: t.double() for n, t in tensors.items()}
    wanted = run(Call(effattn.retention), exact, {"normalize": normalize}, "reference", grad.double())
    for got in results.values():
        torch.testing.assert_close(got.output.double(), wanted.output, rtol=1e-4, atol=1e-5)
        for name, gradient in got.gradients.items():
            torch.testing.assert_close(gradient.double(), wanted.gradients[name], rtol=1e-4, atol=1e-4)


@BACKENDS
@NORMALIZE
@pytest.mark.parametrize("form", FORMS)
def test_splitting_a_sequence_and_carrying_the_state_changes_nothing(backend, normalize, form):
    tensors, options = draw(backend), {"normalize": normalize, "return_state": True, **FORMS[form]}
    whole, state = served(backend, tensors, **options)
    exact = effattn.retention(**{n: t.double() for n, t in tensors.items()}, normalize=normalize, return_state=True)
    splits = (1, 16, 37) if is_slow(backend) else range(1, 40)
    for split in splits:
        first, carried = effattn.retention(**part(tensors, 0, split), **options, backend=backend)
        rest, final = effattn.retention(**part(tensors, split, 40), **options, initial_state=carried, backend=backend)
        torch.testing.assert_close(torch.cat((first, rest), 2).double(), exact[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(final.double(), exact[1], rtol=1e-4, atol=1e-5)
        own_order = form == "recurrent" or (form == "chunkwise" and split % 16 == 0)
        if own_order and normalize == "none":
            assert torch.equal(final, state)
            assert torch.equal(torch.cat((first, rest), 2), whole)


@BACKENDS
def test_normalisation_is_the_row_sum_of_the_decays(backend):
    tensors = draw(backend)
    plain, normalized = (served(backend, tensors, normalize=n) for n in ("none", "retnet"))
    sums = reference.row_sums(tensors["log_decay"].double(), 40)
    expected = [[sum(math.exp(d) ** m for m in range(n + 1)) for n in range(40)] for d in tensors["log_decay"].tolist()]
    torch.testing.assert_close(sums.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    torch.testing.assert_close(normalized, plain * sums.rsqrt()[..., None].float(), rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("normalize", ["none", "retnet"])
def test_bidirectional_is_both_directions_without_the_diagonal_twice(backend, normalize):
    tensors = draw(backend)
    options = {"is_causal": False}
    got = served(backend, tensors, **options, normalize=normalize).double()
    exact = {n: t.double() for n, t in tensors.items()}
    flipped = {n: t if n == "log_decay" else t.flip(2) for n, t in exact.items()}
    scores = (exact["query"] * exact["key"]).sum(-1, keepdim=True) * 8**-0.5
    wanted = effattn.retention(**exact) + effattn.retention(**flipped).flip(2) - scores * exact["value"]
    if normalize == "retnet":
        wanted = wanted * reference.row_sums(exact["log_decay"], 40, is_causal=False).rsqrt()[..., None]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# ---- decays ----


@BACKENDS
def test_decay_of_zero_is_linear_attention(backend):
    tensors = {**draw(backend), "log_decay": torch.zeros(2, device=device_of(backend))}
    got = served(backend, tensors, scale=1.0)
    query, key, value = (tensors[n].double() for n in ("query", "key", "value"))
    torch.testing.assert_close(got.double(), (query @ key.mT).tril() @ value, rtol=1e-4, atol=1e-4)
    both = served(backend, tensors, scale=1.0, is_causal=False)
    torch.testing.assert_close(both.double(), query @ (key.mT @ value), rtol=1e-4, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize("is_causal", [True, False])
def test_decay_of_minus_infinity_is_the_diagonal(backend, is_causal):
    tensors = {**draw(backend), "log_decay": torch.full((2,), -math.inf, device=device_of(backend))}
    served(backend, tensors, is_causal=is_causal)
    grad = torch.randn_like(tensors["value"])
    got = run(Call(effattn.retention), tensors, {"is_causal": is_causal, "scale": 1.0}, backend, grad)
    query, key, value = (tensors[n] for n in ("query", "key", "value"))
    torch.testing.assert_close(got.output, (query * key).sum(-1, keepdim=True) * value, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.gradients["log_decay"], torch.zeros(2, device=device_of(backend)))
    torch.testing.assert_close(got.gradients["query"], (grad * value).sum(-1, keepdim=True) * key, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_forty_heads_whose_gamma_is_one_in_float32_still_forget(backend):
    """Of constant scores and values the output is the row sum (1 - gamma^n) / (1 - gamma): n - n^2 / 2 (1 - gamma) ..."""
    heads, tokens = (4, 300) if is_slow(backend) else (40, 4000)
    log_decay = effattn.retnet_log_decay(40)[-heads:].to(device_of(backend))
    assert (log_decay.float().exp() == 1).sum() >= min(heads, 19)
    assert (log_decay < 0).all()
    ones = torch.ones(1, heads, tokens, 4, device=device_of(backend))
    tensors = {"query": ones, "key": ones, "value": ones, "log_decay": log_decay}
    got = served(backend, tensors, scale=0.25)[0, :, :, 0].double()
    wanted = torch.expm1(tokens * log_decay) / torch.expm1(log_decay)
    torch.testing.assert_close(got[:, -1], wanted, rtol=2e-6, atol=0)


@BACKENDS
def test_every_head_of_forty_is_within_the_rule(backend):
    if is_slow(backend):
        pytest.skip("interpreters and emulators are slow")
    check(backend, {}, heads=40, tokens=200)


@BACKENDS
def test_long_memories_do_not_amplify_the_gradient_of_the_decay(backend):
    """Far down a sequence, where a sum over token indices would have lost its digits."""
    if is_slow(backend):
        pytest.skip("interpreters and emulators are slow")
    check(backend, {}, tokens=3000, key_dim=16)


@BACKENDS
def test_64k_tokens_stay_finite_in_bfloat16(backend):
    if is_slow(backend) or backend == "reference":
        pytest.skip("the interpreter and the reference are slow")
    tensors = draw(backend, heads=2, tokens=65536, key_dim=16, dtype=torch.bfloat16)
    tensors["log_decay"] = effattn.retnet_log_decay(40)[[0, 39]].to(device_of(backend))
    served(backend, part(tensors, 0, 64))
    got = run(Call(effattn.retention), tensors, {}, backend, torch.randn_like(tensors["value"]))
    assert got.output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


def test_gradients_take_memory_linear_in_the_length():
    require("retention", "cpu")
    tensors = draw("cpu", heads=1, tokens=65536, key_dim=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(Call(effattn.retention), tensors, {}, "cpu", torch.randn_like(tensors["value"]))
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra < 40 * tensors["query"].numel() * 4  # an N x N matrix is 8192 times it


def test_published_schedules_are_exact():
    expected = np.log1p(-(2.0 ** (-5.0 - np.arange(40))))
    assert np.array_equal(effattn.retnet_log_decay(40).numpy(), expected)
    assert effattn.retnet_log_decay(40, dtype=torch.float32).dtype == torch.float32
    np.testing.assert_allclose(
        effattn.rmt_log_decay(7, 2, 6).numpy(), np.log(1 - 2.0 ** (-2 - 6 * np.arange(7) / 7)), rtol=1e-14
    )
    for bad in ({"num_heads": -1}, {"num_heads": 4, "initial": -1.0}, {"num_heads": 4, "range": math.nan}):
        with pytest.raises(ValueError, match="rmt_log_decay: "):
            effattn.rmt_log_decay(**bad)


# ---- sizes ----


@BACKENDS
@pytest.mark.parametrize("dims", [(5, 3), (16, 40), (256, 432), (1, 1), (70, 512)], ids=str)
def test_values_may_be_wider_or_narrower_than_keys(backend, dims):
    if is_slow(backend) and dims != (5, 3):
        pytest.skip("interpreters and emulators are slow")
    for dtype in (torch.float32, torch.bfloat16)[: 1 if is_slow(backend) else 2]:
        check(backend, {}, tokens=20 if is_slow(backend) else 70, key_dim=dims[0], value_dim=dims[1], dtype=dtype)
    check(backend, {"is_causal": False}, tokens=20, key_dim=dims[0], value_dim=dims[1])


@BACKENDS
def test_output_of_wide_values_is_laid_out_like_query(backend):
    tensors = draw(backend, batch=2, heads=3, key_dim=8, value_dim=12)
    tensors["query"] = tensors["query"].transpose(1, 2).contiguous().transpose(1, 2)
    output = served(backend, tensors)
    if backend != "reference":
        assert output.transpose(1, 2).is_contiguous()


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 65, 129])
def test_every_length_around_a_chunk(backend, form, tokens):
    if is_slow(backend) and tokens not in (1, 17):
        pytest.skip("interpreters and emulators are slow")
    check(backend, FORMS[form], tokens=tokens)


# ---- states ----


@BACKENDS
def test_gradients_flow_through_the_state_alone_and_beside_the_output(backend):
    tensors = draw(backend, key_dim=6, value_dim=10)
    served(backend, tensors)
    state = torch.randn(1, 2, 6, 10, device=device_of(backend))

    def gradients(backend, tensors, uses):
        inputs = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        results = effattn.retention(**inputs, return_state=True, backend=backend)
        loss = sum((t.double() * torch.linspace(-1, 1, t.numel()).to(t).view_as(t)).sum() for t in results[uses])
        return torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)

    tensors["initial_state"] = state
    exact = {n: t.double() for n, t in tensors.items()}
    for uses in (slice(0, 1), slice(1, 2), slice(0, 2)):
        for name, ours, theirs in zip(tensors, gradients(backend, tensors, uses), gradients("reference", exact, uses)):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@BACKENDS
@NORMALIZE
def test_packed_sequences_are_separate_calls(backend, normalize):
    tensors = draw(backend, tokens=40)
    bounds = [0, 7, 7, 23, 40]
    packed = torch.tensor(bounds, dtype=torch.int32, device=device_of(backend))
    rows = 8 + (normalize == "retnet")
    states = torch.randn(4, 2, rows, 8, device=device_of(backend))
    states[:, :, 8:] = 1.5
    options = {"normalize": normalize, "return_state": True}
    output, final = served(backend, tensors, **options, cu_seqlens=packed, initial_state=states)
    assert final.shape == states.shape
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone, state = effattn.retention(
            **part(tensors, begin, end), **options, initial_state=states[index : index + 1], backend=backend
        )
        torch.testing.assert_close(output[:, :, begin:end], alone)
        torch.testing.assert_close(final[index : index + 1], state)
    check(backend, {"cu_seqlens": packed, "normalize": normalize})
    if normalize == "none":
        check(backend, {"cu_seqlens": packed, "is_causal": False})


@BACKENDS
def test_packing_no_sequence_and_empty_sequences(backend):
    require("retention", backend)
    tensors = draw(backend, tokens=0)
    for bounds in ([0], [0, 0], [0, 0, 0]):
        packed = torch.tensor(bounds, dtype=torch.int32, device=device_of(backend))
        output, state = effattn.retention(**tensors, cu_seqlens=packed, return_state=True, backend=backend)
        assert output.shape == tensors["value"].shape
        assert torch.equal(state, torch.zeros(len(bounds) - 1, 2, 8, 8, device=state.device))


@BACKENDS
def test_an_empty_sequence_hands_its_state_on(backend):
    require("retention", backend)
    state = torch.randn(1, 2, 8, 8, device=device_of(backend))
    output, final = effattn.retention(
        **draw(backend, tokens=0), initial_state=state, return_state=True, backend=backend
    )
    assert output.shape[2] == 0
    assert torch.equal(final, state)


@pytest.mark.parametrize("bounds", [[0, 50, 40], [1, 40], [0, 41], [0, -1, 40]], ids=str)
def test_bad_bounds_of_packed_sequences_are_refused(bounds):
    packed = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="retention: cu_seqlens must ascend from 0 to N = 40"):
        effattn.retention(**draw("cpu"), cu_seqlens=packed)


@BACKENDS
def test_state_and_packing_compile_into_one_graph(backend):
    if is_slow(backend):
        pytest.skip("tracing runs no kernel")
    tensors = draw(backend)
    served(backend, tensors)
    packed = torch.tensor([0, 11, 40], dtype=torch.int32)

    def call(tensors):
        first, state = effattn.retention(**tensors, return_state=True, normalize="retnet", backend=backend)
        second = effattn.retention(**tensors, initial_state=state, normalize="retnet", backend=backend)
        if backend == "reference":  # whose packing reads the bounds
            return first + second
        return first + second + effattn.retention(**tensors, cu_seqlens=packed, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tensors), call(tensors))


@BACKENDS
def test_ops_with_states_and_packing_pass_opcheck(backend):
    if backend == "reference":
        pytest.skip("no op")
    tensors = draw(backend, tokens=20, key_dim=4, value_dim=6)
    served(backend, tensors)
    inputs = {n: t.requires_grad_() for n, t in tensors.items()}
    packed = torch.tensor([0, 11, 20], dtype=torch.int32, device=device_of(backend))
    with RecordedCalls() as recorded:
        output, state = effattn.retention(**inputs, cu_seqlens=packed, return_state=True, backend=backend)
        (output.sum() + state.sum()).backward()
        with torch.no_grad():
            one, begin = part(inputs, 0, 1), torch.zeros(1, 2, 4, 6, device=device_of(backend))
            effattn.retention_step(**one, state=begin, backend=backend)
            effattn.retention_step(**one, state=begin, inplace=True, backend=backend)
    names = [op._opname for op, _ in recorded.calls]
    assert names == ["retention_fwd", "retention_bwd", "retention_step", "retention_step_"]
    for op, args in recorded.calls:
        torch.library.opcheck(op, args)


# ---- one token at a time ----


@BACKENDS
@NORMALIZE
@pytest.mark.parametrize("inplace", [False, True])
def test_steps_are_the_recurrent_form(backend, normalize, inplace):
    tensors = draw(backend, batch=2, tokens=7, key_dim=6, value_dim=10)
    whole, final = served(backend, tensors, normalize=normalize, return_state=True)
    state = torch.zeros(2, 2, 6 + (normalize == "retnet"), 10, device=device_of(backend))
    start, outputs = state, []
    for n in range(7):
        output, state = effattn.retention_step(**part(tensors, n, n + 1), state=state, inplace=inplace, backend=backend)
        outputs.append(output)
        assert (state.data_ptr() == start.data_ptr()) == inplace
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(256, 432), (5, 3), (1, 1), (64, 33)], ids=str)
def test_step_is_its_formula(backend, dtype, dims):
    require("retention_step", backend)
    if is_slow(backend) and max(dims) > 100:
        pytest.skip("interpreters and emulators are slow")
    tensors = draw(backend, batch=2, heads=3, tokens=1, key_dim=dims[0], value_dim=dims[1], dtype=dtype)
    tensors["query"] = tensors["query"].expand(2, 3, 1, -1)[..., ::1]
    state = torch.randn(2, 3, *dims, device=device_of(backend))
    output, new = effattn.retention_step(**tensors, state=state, scale=0.5, backend=backend)
    exact = {n: t.double() for n, t in tensors.items()}
    wanted_state = exact["log_decay"].exp()[:, None, None] * state.double() + exact["key"].mT @ exact["value"]
    wanted = 0.5 * exact["query"] @ wanted_state
    assert (output.dtype, new.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(new.double(), wanted_state, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), wanted, rtol=2 * eps, atol=8 * eps * wanted.abs().max().item())


@BACKENDS
def test_step_with_gamma_of_zero_forgets_even_an_infinite_state(backend):
    require("retention_step", backend)
    tensors = draw(backend, tokens=1)
    tensors["log_decay"][:] = -math.inf
    state = torch.randn(1, 2, 8, 8, device=device_of(backend))
    output, new = effattn.retention_step(**tensors, state=state, backend=backend)
    torch.testing.assert_close(new, tensors["key"].mT @ tensors["value"])
    assert output.isfinite().all()


@BACKENDS
def test_step_is_differentiable(backend):
    require("retention_step", backend)
    tensors = {**draw(backend, tokens=1), "state": torch.randn(1, 2, 8, 8, device=device_of(backend))}
    grads = []
    for where, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        inputs = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        output, state = effattn.retention_step(**inputs, backend=where)
        grads.append(torch.autograd.grad(output.sin().sum() + state.square().sum(), list(inputs.values())))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_step_refuses_what_it_cannot_do():
    tensors, state = draw("cpu", tokens=1), torch.zeros(1, 2, 8, 8)
    bad = (
        (
            {"query": draw("cpu", tokens=2)["query"], "key": draw("cpu", tokens=2)["key"]},
            ValueError,
            "one token|query's",
        ),
        ({"state": state[:, :1]}, ValueError, "state must have shape"),
        ({"state": state.half()}, TypeError, "state must be torch.float32"),
        ({"state": None}, TypeError, "state must be a Tensor"),
        ({"log_decay": tensors["log_decay"].neg()}, ValueError, "log_decay must be at most 0"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"inplace": True, "state": state.requires_grad_()}, ValueError, "inplace must be False"),
    )
    for change, exception, message in bad:
        with pytest.raises(exception, match=f"retention_step: .*{message}"):
            effattn.retention_step(**{**tensors, "state": state, **change})
    strided = torch.zeros(1, 2, 8, 16)[..., ::2]
    with pytest.raises(ValueError, match="contiguous float32"):
        effattn.retention_step(**tensors, state=strided, inplace=True, backend="cpu")


# ---- rotation ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_is_the_published_one_and_makes_scores_relative(dtype):
    x = torch.randn(2, 3, 50, 8, dtype=dtype)
    got = effattn.rotate_xpos(x, offset=5).double().numpy()
    angle = np.arange(5, 55)[:, None] * 10000.0 ** -np.linspace(0, 1, 4)
    pairs = x.double().numpy().reshape(2, 3, 50, 4, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    wanted = np.stack((turned.real, turned.imag), -1).reshape(got.shape)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=max(1e-13, 8 * torch.finfo(dtype).eps))
    here, there = (effattn.rotate_xpos(x.double(), offset=o) for o in (0, 12345))
    torch.testing.assert_close(here @ here.mT, there @ there.mT)


def test_rotation_of_far_tokens_keeps_its_angle_in_float32():
    x = torch.ones(1, 1, 4)
    far, exact = effattn.rotate_xpos(x, offset=10**6), effattn.rotate_xpos(x.double(), offset=10**6)
    torch.testing.assert_close(far.double(), exact, rtol=0, atol=1e-6)


def test_rotation_is_differentiable_compiles_and_refuses_bad_input():
    x = torch.randn(1, 2, 5, 6, requires_grad=True)
    grad = torch.randn(1, 2, 5, 6)
    (got,) = torch.autograd.grad(effattn.rotate_xpos(x), x, grad)
    (wanted,) = torch.autograd.grad(reference.rotate_xpos(x), x, grad)
    torch.testing.assert_close(got, wanted)
    compiled = torch.compile(effattn.rotate_xpos, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), effattn.rotate_xpos(x))
    for bad, error, message in (
        ((torch.ones(4, 5),), ValueError, "D even"),
        ((torch.ones(4, 4).int(),), TypeError, "floating point"),
        (([1.0],), TypeError, "must be a Tensor"),
    ):
        with pytest.raises(error, match=f"rotate_xpos: .*{message}"):
            effattn.rotate_xpos(*bad)
    with pytest.raises(ValueError, match="offset must be at least 0"):
        effattn.rotate_xpos(x, offset=-1)
    with pytest.raises(ValueError, match="base must be above 0"):
        effattn.rotate_xpos(x, base=0.0)


def test_reference_of_packed_sequences_is_the_formula():
    tensors = {n: t.double() for n, t in draw("reference", tokens=12, key_dim=3, value_dim=5).items()}
    packed = torch.tensor([0, 4, 12], dtype=torch.int32)
    states = torch.rand(2, 2, 4, 5, dtype=torch.float64)
    states[:, :, 3:] = 0.7
    options = {"normalize": "retnet", "cu_seqlens": packed, "initial_state": states}
    wanted = formulas.retention(
        **{n: t.numpy() for n, t in tensors.items()},
        **{**options, "cu_seqlens": [0, 4, 12], "initial_state": states.numpy()},
    )
    torch.testing.assert_close(
        effattn.retention(**tensors, **options), torch.from_numpy(wanted), rtol=1e-12, atol=1e-12
    )


def test_rotation_takes_a_view_that_begins_at_an_odd_element():
    flat = torch.randn(1 + 3 * 4)
    x = flat[1:].view(1, 3, 4)
    assert torch.equal(effattn.rotate_xpos(x), effattn.rotate_xpos(x.clone()))


def test_sequence_bounds_may_be_strided():
    query, key, value = torch.randn(3, 1, 2, 7, 4)
    log_decay = effattn.retnet_log_decay(2)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    strided = torch.stack((bounds, -bounds), 1)[:, 0]
    given = effattn.retention(query, key, value, log_decay, cu_seqlens=strided)
    assert torch.equal(given, effattn.retention(query, key, value, log_decay, cu_seqlens=bounds))


def test_sequence_bounds_without_values_are_refused():
    query = torch.randn(1, 2, 7, 4, device="meta")
    bounds = torch.zeros(3, dtype=torch.int32, device="meta")
    with pytest.raises(NotImplementedError, match="cu_seqlens is on the meta device"):
        effattn.retention(query, query, query, torch.zeros(2, device="meta"), cu_seqlens=bounds)


def test_state_of_vision_retention_is_refused_by_its_name():
    with pytest.raises(TypeError, match="VisionRetention: state must be a Tensor, got str"):
        effattn.nn.VisionRetention(4, 2)(torch.randn(1, 3, 4), state="zeros")
