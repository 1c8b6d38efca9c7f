"""What is particular to Toeplitz-weighted linear attention: its exact methods agree, and "auto" stays accurate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conformance import assert_within_budget, backends_of, device_of, formulas, is_slow, require, run

import effattn
from effattn import reference
from effattn.ops import toeplitz_methods

OP = "kernelized_rpe_attention"
BACKENDS = pytest.mark.parametrize("backend", backends_of(OP))
METHODS = ("direct", "fft", "structured")
CALLS = [("cpu", method) for method in METHODS] + [("cuda", "fft"), ("triton", "direct"), ("reference", "direct")]
EVERY_METHOD = pytest.mark.parametrize(("backend", "method"), CALLS)


@dataclass
class Call:
    """A call that the accuracy rule can be held against."""

    function: object = effattn.toeplitz_linear_attention
    differentiable: tuple = ("query", "key", "value", "rpe_bias")

    def __call__(self, tensors, options, backend):
        given = dict(tensors)
        if self.function is effattn.toeplitz_linear_attention:
            given["query_features"], given["key_features"] = given.pop("query"), given.pop("key")
        return self.function(**given, **options, backend=backend)


def draw(backend, seed=0, *, batch=1, heads=2, tokens=40, features=6, value_dim=5, dtype=torch.float32, spread=0.3):
    """Positive features of a few units, and a bias of a narrow range."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, heads, tokens)
    drawn = {
        "query": torch.rand(*size, features, generator=generator) + 0.1,
        "key": torch.rand(*size, features, generator=generator) + 0.1,
        "value": torch.randn(*size, value_dim, generator=generator),
    }
    drawn = {name: tensor.to(dtype) for name, tensor in drawn.items()}
    drawn["rpe_bias"] = spread * torch.randn(heads, max(2 * tokens - 1, 0), generator=generator)
    return {name: tensor.to(device_of(backend)) for name, tensor in drawn.items()}


def sized(backend, **sizes):
    return {"tokens": 9, "heads": 1, "features": 3, "value_dim": 2, **sizes} if is_slow(backend) else sizes


def attend(tensors, backend, **options):
    return Call()(tensors, options, backend)


def in_double(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def alibi(tensors, slope=-0.25):
    heads, entries = tensors["rpe_bias"].shape
    distance = (torch.arange(entries) - entries // 2).abs()
    return {**tensors, "rpe_bias": (slope * distance).expand(heads, -1).to(tensors["rpe_bias"])}


# ---- the formula ----


@EVERY_METHOD
@pytest.mark.parametrize("is_causal", [False, True])
def test_constant_bias_is_linear_attention(backend, method, is_causal):
    require(OP, backend)
    tensors = draw(backend, **sized(backend))
    tensors["rpe_bias"] = torch.full_like(tensors["rpe_bias"], 7.5)
    query, key, value = (tensors[name].double() for name in ("query", "key", "value"))
    if is_causal:
        state, total = (key[..., None] * value[:, :, :, None]).cumsum(2), key.cumsum(2)
        wanted = (query[:, :, :, None] @ state)[:, :, :, 0] / (query * total).sum(-1, keepdim=True)
    else:
        wanted = query @ (key.mT @ value) / (query @ key.sum(2)[..., None])
    got = attend(tensors, backend, method=method, is_causal=is_causal)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 151, 300])
def test_the_three_methods_agree_forward_and_backward(tokens, is_causal):
    require(OP, "cpu")
    tensors = alibi(draw("cpu", tokens=tokens, batch=2), slope=-0.02)
    grad = torch.randn_like(tensors["value"])
    wanted = run(Call(), in_double(tensors), {"is_causal": is_causal}, "reference", grad.double())
    for method in METHODS:
        got = run(Call(), tensors, {"is_causal": is_causal, "method": method}, "cpu", grad)
        torch.testing.assert_close(got.output.double(), wanted.output, rtol=1e-5, atol=1e-5)
        for name, gradient in got.gradients.items():
            torch.testing.assert_close(gradient.double(), wanted.gradients[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("backend", "method"), [call for call in CALLS if call[1] != "structured"])
@pytest.mark.parametrize("grid", [(2, 4), (5, 7), (1, 6), (6, 1)])
def test_two_dimensional_bias_is_the_formula_on_the_flattened_block_toeplitz_matrix(backend, method, grid):
    require(OP, backend)
    if is_slow(backend) and grid[0] * grid[1] > 9:
        pytest.skip("interpreters and emulators are slow")
    height, width = grid
    tensors = draw(backend, **sized(backend, tokens=height * width))
    generator = torch.Generator().manual_seed(5)
    tensors["rpe_bias"] = torch.randn(tensors["rpe_bias"].shape[0], 2 * height - 1, 2 * width - 1, generator=generator)
    bias = tensors["rpe_bias"].double().numpy()
    got = attend({**tensors, "rpe_bias": tensors["rpe_bias"].to(tensors["value"])}, backend, method=method, grid=grid)
    query, key, value = (tensors[name].double().cpu().numpy() for name in ("query", "key", "value"))
    y, x = np.divmod(np.arange(height * width), width)
    for h in range(bias.shape[0]):
        block = bias[h][y - y[:, None] + height - 1, x - x[:, None] + width - 1]
        weights = query[0, h] @ key[0, h].T * np.exp(block - bias[h].max())
        wanted = weights @ value[0, h] / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(got[0, h].double().cpu().numpy(), wanted, rtol=1e-4, atol=1e-5)


@EVERY_METHOD
def test_multiplying_features_by_a_constant_changes_nothing(backend, method):
    require(OP, backend)
    tensors = alibi(draw(backend, **sized(backend)))
    scaled = {**tensors, "query": tensors["query"] * 2.0**10, "key": tensors["key"] * 2.0**-12}
    got, wanted = (attend(t, backend, method=method) for t in (scaled, tensors))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@EVERY_METHOD
def test_adding_a_constant_to_the_bias_changes_nothing(backend, method):
    require(OP, backend)
    tensors = alibi(draw(backend, **sized(backend)))
    shifted = {**tensors, "rpe_bias": tensors["rpe_bias"] + 64.0}
    got, wanted = (attend(t, backend, method=method) for t in (shifted, tensors))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@EVERY_METHOD
def test_causal_ignores_the_future(backend, method):
    """The direct and structured methods to the last bit, an FFT within its rounding."""
    require(OP, backend)
    tensors = alibi(draw(backend, **sized(backend)))
    tokens = tensors["value"].shape[2]
    for cut in (1, tokens // 2, tokens - 1):
        changed = {name: t.clone() for name, t in tensors.items()}
        changed["key"][:, :, cut:] *= 1.7
        changed["value"][:, :, cut:] += 3.0
        got, before = (attend(t, backend, method=method, is_causal=True) for t in (changed, tensors))
        assert not torch.equal(got[:, :, cut:], before[:, :, cut:])
        if method == "fft":
            torch.testing.assert_close(got[:, :, :cut], before[:, :, :cut], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got[:, :, :cut], before[:, :, :cut])


@EVERY_METHOD
def test_bias_of_a_future_that_no_token_sees_does_not_matter(backend, method):
    """However large: the maximum that weights are relative to is that of the past."""
    require(OP, backend)
    tensors = alibi(draw(backend, **sized(backend)))
    future = {**tensors, "rpe_bias": tensors["rpe_bias"].clone()}
    future["rpe_bias"][:, tensors["value"].shape[2] :] += 200.0
    grad = torch.randn_like(tensors["value"])
    options = {"method": method, "is_causal": True}
    got, wanted = (run(Call(), t, options, backend, grad) for t in (future, tensors))
    if backend == "reference":
        pytest.skip("takes the maximum as it is written")
    torch.testing.assert_close(got.output, wanted.output, rtol=1e-5, atol=1e-6)
    assert (got.gradients["rpe_bias"][:, tensors["value"].shape[2] :] == 0).all()


@EVERY_METHOD
def test_first_causal_token_sees_itself_alone(backend, method):
    require(OP, backend)
    tensors = alibi(draw(backend, **sized(backend)))
    got = attend(tensors, backend, method=method, is_causal=True)
    torch.testing.assert_close(got[:, :, 0], tensors["value"][:, :, 0], rtol=1e-5, atol=1e-5)


def test_gradient_of_the_reference_is_its_derivative():
    tensors = in_double(draw("cpu", tokens=4, features=3, value_dim=2))
    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: reference.toeplitz_linear_attention(*t, is_causal=True, eps=0.1), inputs)
    query, key = torch.randn(2, 1, 2, 4, 3, dtype=torch.float64)
    inputs = [query, key, *inputs[2:], torch.randn(5, 3, dtype=torch.float64)]
    for kind in ("positive", "trigonometric"):
        inputs = [t.detach().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(
            lambda *t, kind=kind: reference.kernelized_rpe_attention(*t, kind, eps=0.0), inputs
        )


@EVERY_METHOD
def test_gradient_of_the_bias_is_that_of_autograd_in_float64(backend, method):
    require(OP, backend)
    if backend == "reference":
        pytest.skip("is the formula")
    tensors = alibi(draw(backend, **sized(backend)))
    grad = torch.randn_like(tensors["value"])
    wanted = run(Call(), in_double(tensors), {}, "reference", grad.double()).gradients["rpe_bias"]
    got = run(Call(), tensors, {"method": method}, backend, grad).gradients["rpe_bias"]
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)
    assert got.sum(-1).abs().max() < 1e-4  # a constant in the bias changes nothing


@BACKENDS
def test_padding_is_the_sequence_without_those_keys(backend):
    require(OP, backend)
    tensors = draw(backend, batch=2, **sized(backend))
    tokens = tensors["value"].shape[2]
    mask = torch.zeros(2, tokens, dtype=torch.bool, device=tensors["value"].device)
    mask[0, tokens - 3 :] = True
    tensors["key"][0, :, tokens - 3 :] = float("nan")  # padding may hold anything
    got = attend({**tensors, "key_padding_mask": mask}, backend)
    short = {name: t[:1, :, : tokens - 3] for name, t in tensors.items() if name != "rpe_bias"}
    short["rpe_bias"] = tensors["rpe_bias"][:, 3:-3]
    torch.testing.assert_close(got[:1, :, : tokens - 3], attend(short, backend), rtol=1e-4, atol=1e-5)
    assert got.isfinite().all()


@EVERY_METHOD
def test_rows_that_see_nothing_give_zeros_and_no_gradient(backend, method):
    require(OP, backend)
    if method != "direct":
        pytest.skip("a bias of weight 0 beyond some distance is the direct method's")
    tensors = draw(backend, **sized(backend))
    tokens = tensors["value"].shape[2]
    tensors["key"][:, :, : tokens // 2] = 0.0  # and these are all that the first rows see
    grad = torch.randn_like(tensors["value"])
    got = run(Call(), tensors, {"is_causal": True, "method": method}, backend, grad)
    assert (got.output[:, :, : tokens // 2] == 0).all()
    for gradient in got.gradients.values():
        assert gradient.isfinite().all()
    assert (got.gradients["query"][:, :, : tokens // 2] == 0).all()


@BACKENDS
def test_eps_is_added_to_the_denominator_as_written(backend):
    require(OP, backend)
    sizes = sized(backend)
    query, key = torch.randn(2, 1, 1, sizes.get("tokens", 40), 4)
    value, bias = torch.randn_like(query), torch.randn(1, 2 * query.shape[2] - 1)
    projection = effattn.random_features(6, 4)
    got = effattn.kernelized_rpe_attention(query, key, value, bias, projection, eps=3.0, backend=backend)
    arrays = (t.double().numpy() for t in (query, key, value, bias, projection))
    wanted = formulas.kernelized_rpe_attention(*arrays, eps=3.0)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_gradient_of_the_largest_bias_knows_that_eps_is_not_scaled_with_it(backend):
    require(OP, backend)
    tensors = draw(backend, **sized(backend))
    grad = torch.randn_like(tensors["value"])
    wanted = run(Call(), in_double(tensors), {"eps": 5.0}, "reference", grad.double()).gradients["rpe_bias"]
    got = run(Call(), tensors, {"eps": 5.0}, backend, grad).gradients["rpe_bias"]
    assert wanted.amin() < -1e-3 or wanted.amax() > 1e-3
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize("length", [0.0, 1e-3, 30.0])
def test_queries_of_any_length_give_numbers(backend, length):
    """exp(-|x|^2 / 2) of |x| = 30 is 0 in every dtype; the shift that cancels keeps it in range."""
    require(OP, backend)
    tokens = sized(backend).get("tokens", 40)
    query, key = length * torch.nn.functional.normalize(torch.randn(2, 1, 2, tokens, 8), dim=-1)
    value, bias, projection = (
        torch.randn(1, 2, tokens, 8),
        torch.randn(2, 2 * tokens - 1),
        effattn.random_features(16, 8),
    )
    options = {"projection": projection, "normalize_qk": False}
    got = effattn.kernelized_rpe_attention(query, key, value, bias, **options, backend=backend)
    exact = {"projection": projection.double(), "normalize_qk": False, "backend": "reference"}
    wanted = effattn.kernelized_rpe_attention(*(t.double() for t in (query, key, value, bias)), **exact)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(130, 33, 17), (67, 5, 64), (1, 9, 1)], ids=str)
def test_every_method_keeps_the_accuracy_rule(method, dtype, sizes):
    require(OP, "cpu")
    tokens, features, value_dim = sizes

    def sample(seed):
        drawn = draw("cpu", seed, batch=2, tokens=tokens, features=features, value_dim=value_dim, dtype=dtype)
        return alibi(drawn, -0.01), {"method": method}, torch.randn(drawn["value"].shape).to(dtype)

    assert_within_budget(Call(), sample, "cpu")


# ---- what "auto" does ----


def _random_bias(generator, tokens, span) -> torch.Tensor:
    """Of one of six kinds, ranging over ``span`` nats."""
    entries = 2 * tokens - 1
    position = torch.linspace(-1, 1, entries)
    kind = int(torch.randint(6, (), generator=generator))
    shape = {
        0: lambda: torch.rand(entries, generator=generator),
        1: lambda: position,
        2: lambda: -position.abs(),
        3: lambda: position.abs(),
        4: lambda: torch.randn(entries, generator=generator).cumsum(0),
        5: lambda: torch.cos(position * (3 + 20 * torch.rand((), generator=generator))),
    }[kind]()
    extent = shape.max() - shape.min()
    return (shape * (span / extent if extent > 0 else 0.0))[None]


def test_auto_meets_the_accuracy_rule_for_a_thousand_random_biases(monkeypatch):
    """With an FFT that costs nothing, so that only its accuracy speaks for another method."""
    require(OP, "cpu")
    monkeypatch.setattr(toeplitz_methods, "costs", lambda: (1.0, 1e-9, 2e-9, 1.0))
    generator, taken, misses = torch.Generator().manual_seed(0), Counter(), []
    for index in range(1000):
        tokens = int(torch.randint(8, 200, (), generator=generator))
        span = 60.0 * float(torch.rand((), generator=generator)) ** 3  # half of them below 8 nats
        options = {"is_causal": bool(index % 2)}
        bias = _random_bias(generator, tokens, span)

        def sample(seed, tokens=tokens, bias=bias, options=options):
            drawn = draw("cpu", seed, heads=1, tokens=tokens, features=8, value_dim=4)
            return {**drawn, "rpe_bias": bias}, options, torch.randn(drawn["value"].shape)

        tensors, _, grad = sample(index)
        plan, _ = toeplitz_methods.planned(
            bias, tensors["query"], tensors["value"], (1, tokens), options["is_causal"], "auto"
        )
        taken[toeplitz_methods.NAMES[plan.item()]] += 1
        grad = grad if index % 10 == 0 else None
        # In a wide bias a row has all its weight on one key, and b's gradient is what is left of two equal numbers: eager's
        # cancel by accident to the last bit, ours within the rounding of the output that one of them is made of.
        wrt = ("query", "key", "value", *(("rpe_bias",) if span < 20 else ()))
        try:
            assert_within_budget(
                Call(differentiable=wrt), lambda s, draw=sample, grad=grad: (*draw(s)[:2], grad), "cpu", index
            )
        except AssertionError as error:
            misses.append(f"{index}: {tokens} tokens, {span:.1f} nats, {options}: {error}")
    assert not misses, "\n".join(misses[:10]) + f"\n{len(misses)} in all; {taken}"
    assert min(taken["direct"], taken["fft in float64"], taken["fft"]) > 50, taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_meets_the_accuracy_rule_in_half_precision(dtype, monkeypatch):
    require(OP, "cpu")
    monkeypatch.setattr(toeplitz_methods, "costs", lambda: (1.0, 1e-9, 2e-9, 1.0))
    generator, taken = torch.Generator().manual_seed(1), Counter()
    for index in range(60):
        tokens = int(torch.randint(2, 200, (), generator=generator))
        bias = _random_bias(generator, tokens, 8.0 * float(torch.rand((), generator=generator)))

        def sample(seed, tokens=tokens, bias=bias, is_causal=bool(index % 2)):
            drawn = draw("cpu", seed, heads=1, tokens=tokens, features=8, value_dim=4, dtype=dtype)
            return (
                {**drawn, "rpe_bias": bias},
                {"is_causal": is_causal},
                torch.randn(drawn["value"].shape).to(dtype),
            )

        tensors, options, _ = sample(index)
        plan, _ = toeplitz_methods.planned(
            bias, tensors["query"], tensors["value"], (1, tokens), options["is_causal"], "auto"
        )
        taken[toeplitz_methods.NAMES[plan.item()]] += 1
        assert_within_budget(Call(), sample, "cpu", index)
    assert taken["fft"] > 10, taken


def test_a_bias_too_wide_for_any_fft_is_refused_by_name(monkeypatch):
    require(OP, "cpu")
    tensors = draw("cpu", tokens=200)
    tensors["rpe_bias"] = torch.linspace(-30, 30, 399).expand(2, -1)
    with pytest.raises(ValueError, match=r"method must not be 'fft' for this rpe_bias: its range of 60\.0 nats"):
        attend(tensors, "cpu", method="fft")
    got = attend(tensors, "cpu")
    wanted = attend(in_double(tensors), "reference")
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_without_structure_is_refused_by_name():
    require(OP, "cpu")
    with pytest.raises(ValueError, match="method must not be 'structured' for this rpe_bias"):
        attend(draw("cpu"), "cpu", method="structured")


def test_auto_takes_the_direct_method_of_a_short_sequence_and_another_of_a_long_one():
    require(OP, "cpu")

    def chosen(tokens):
        query = torch.ones(1, 1, 1, 1).expand(1, 8, tokens, 32)
        value = torch.ones(1, 1, 1, 1).expand(1, 8, tokens, 64)
        bias = torch.randn(8, 2 * tokens - 1)
        plan, _ = toeplitz_methods.planned(bias, query, value, (1, tokens), False, "auto")
        return toeplitz_methods.NAMES[plan.item()]

    assert chosen(256) == "direct"
    assert chosen(65536).startswith("fft")


def test_auto_leaves_the_structured_method_out_where_the_bias_is_trained():
    require(OP, "cpu")
    tensors = alibi(draw("cpu", tokens=2000, features=32, value_dim=32))
    for trained in (False, True):
        bias = tensors["rpe_bias"].requires_grad_(trained) * 0.01
        plan, _ = toeplitz_methods.planned(bias, tensors["query"], tensors["value"], (1, 2000), False, "auto")
        assert (plan.item() == toeplitz_methods.STRUCTURED) != trained


def test_explain_states_the_method_its_reason_and_the_cost_of_each(capsys):
    require(OP, "cpu")
    tensors = draw("cpu")
    given = (tensors["query"], tensors["key"], tensors["value"], tensors["rpe_bias"])
    explanation = effattn.explain(effattn.toeplitz_linear_attention, *given)
    printed = capsys.readouterr().out
    assert "method -> direct" in printed
    assert printed.count("predicted") == 3  # structured does not apply
    assert "does not apply" in printed
    assert "the fastest accurate one; the bias ranges over" in printed
    assert all(note in printed for note in explanation.notes)
    asked = effattn.explain(effattn.toeplitz_linear_attention, *given, method="fft")
    assert any("as asked: 'fft'" in note for note in asked.notes)


def test_auto_under_compile_looks_at_the_bias_at_run_time():
    require(OP, "cpu")
    tensors = draw("cpu", tokens=64)
    compiled = torch.compile(lambda t: attend(t, "cpu"), fullgraph=True, backend="aot_eager")
    wide = {**tensors, "rpe_bias": torch.linspace(-30, 30, 127).expand(2, -1).contiguous()}
    for given in (tensors, wide):
        assert torch.equal(compiled(given), attend(given, "cpu"))


# ---- features ----


def test_orthogonal_features_are_orthogonal_and_as_long_as_gaussian_vectors():
    generator = torch.Generator().manual_seed(3)
    directions = effattn.random_features(40, 16, generator=generator)
    assert directions.shape == (40, 16)
    for block in directions.split(16):
        gram = block @ block.mT
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-4)
    lengths = effattn.random_features(20000, 16, generator=generator).square().sum(-1)
    assert abs(lengths.mean() - 16) < 0.2
    assert abs(lengths.var() - 32) < 3
    independent = effattn.random_features(40, 16, orthogonal=False, generator=generator)
    assert (independent[:16] @ independent[:16].mT).triu(1).abs().max() > 0.5


def test_features_are_drawn_again_and_the_same_from_the_same_seed():
    first, second = (effattn.random_features(8, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(effattn.random_features(8, 4), effattn.random_features(8, 4))


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_features_estimate_the_exponential_kernel(kind):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.nn.functional.normalize(torch.randn(1, 1, 12, 8, generator=generator), dim=-1) for _ in "qk")
    projection = effattn.random_features(20000, 8, generator=generator)
    phi_q, phi_k = (reference.feature_map(x, projection, kind) for x in (query, key))
    torch.testing.assert_close(phi_q @ phi_k.mT, (query @ key.mT).exp(), rtol=0.15, atol=0.03)


# ---- bad arguments that the conformance suite does not know ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query_features must be a Tensor"),
        ({"query": torch.ones(2, 40, 6)}, ValueError, "query_features must have shape"),
        ({"key": torch.ones(1, 2, 40, 6).int()}, TypeError, "key_features must be floating point"),
        ({"key": torch.ones(1, 2, 40, 6).half()}, TypeError, "key_features must have query_features' dtype"),
        ({"key": torch.ones(1, 2, 40, 7)}, ValueError, "key_features must have query_features' shape"),
        ({"value": torch.ones(1, 2, 41, 5)}, ValueError, "value must have shape"),
        ({"value": torch.ones(1, 2, 40, 5, device="meta")}, ValueError, "value must be on query_features' device"),
        ({"rpe_bias": torch.ones(2, 40)}, ValueError, "rpe_bias must have shape"),
    ],
)
def test_wrong_features_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        attend({**draw("cpu"), **change}, "auto")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "num_features must be at least 1"),
        ((4, 2.5), TypeError, "head_dim must be an int"),
    ],
)
def test_wrong_numbers_of_features_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        effattn.random_features(*arguments)


@pytest.mark.parametrize(("backend", "method"), [("triton", "fft"), ("triton", "structured"), ("cuda", "direct")])
def test_method_that_a_backend_lacks_is_refused_and_not_replaced(backend, method):
    require(OP, backend)
    with pytest.raises(NotImplementedError, match=f"cannot serve this call: .* asks for '{method}'"):
        attend(draw(backend), backend, method=method)
