"""Which method of Toeplitz-weighted attention serves a call, what the methods cost, and the structured one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conformance import assert_within_budget, require

import effattn
from effattn import _tuning
from effattn.ops import toeplitz_costs, toeplitz_methods

AUTO, DIRECT, FFT, STRUCTURED = range(4)
FFT_FREE = (1.0, 1e-9, 2e-9, 1.0)


def offsets(tokens):
    return torch.arange(-(tokens - 1), tokens, dtype=torch.float64)


def plan(bias, grid, causal=False, request=AUTO, tolerance=0.0, costs=FFT_FREE, batch=1):
    require("toeplitz_linear_attention", "cpu")
    bias = bias.float().contiguous()
    method, report = toeplitz_methods.plan("cpu", bias, batch, 16, 24, *grid, causal, request, tolerance, *costs)
    return method.item(), dict(zip(toeplitz_methods.REPORT, report.tolist()))


# ---- the planner ----


def amplification(bias, grid, causal):
    """max over rows and heads of ||c||_2 sqrt(N) / C_i, from the N x N matrix."""
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)
    table = np.float64(bias).reshape(len(bias), 2 * height - 1, 2 * width - 1)
    worst = 0.0
    for head in np.exp(table - table.max((1, 2), keepdims=True)):
        seen = head[y[None] - y[:, None] + height - 1, x[None] - x[:, None] + width - 1]
        used = np.ones_like(head, dtype=bool)
        if causal:
            seen = np.tril(seen)
            used[height:] = False
            used[height - 1, width:] = False
        with np.errstate(divide="ignore"):
            worst = max(worst, (np.sqrt((head[used] ** 2).sum() * len(seen)) / seen.sum(1)).max())
    return worst


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 37), (5, 7), (6, 1), (3, 4)], ids=str)
def test_predicted_error_follows_the_worst_row(grid, causal):
    entries = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    generator = torch.Generator().manual_seed(1)
    for spread, gaps in ((0.0, 0.0), (1.0, 0.0), (5.0, 0.3)):
        bias = (spread * torch.randn(2, entries, generator=generator)).float()
        gone = torch.rand(2, entries, generator=generator) < gaps
        gone[:, entries // 2] = False
        bias[gone] = float("-inf")
        flat = torch.zeros(1, entries)
        found = plan(bias, grid, causal)[1]["fft_error"] / plan(flat, grid, causal)[1]["fft_error"]
        wanted = amplification(bias, grid, causal) / amplification(flat, grid, causal)
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_row_without_weight_makes_the_error_infinite():
    bias = torch.zeros(1, 19)
    bias[0, 9:] = float("-inf")  # itself and what follows: nothing is left for the first token
    found = plan(bias, (1, 10), True, AUTO, 1.0)
    assert found[1]["fft_error"] == found[1]["double_fft_error"] == float("inf")
    assert found[0] in (toeplitz_methods.DIRECT, toeplitz_methods.STRUCTURED)
    nan = torch.full((2, 19), float("nan"))
    assert plan(nan, (1, 10), False, AUTO, 1.0)[0] == toeplitz_methods.DIRECT


def test_where_transforms_are_free_accuracy_decides():
    ramp, noise = offsets(200)[None] / 199, 1e-3 * torch.randn(1, 399)

    def chosen(nats, tolerance, request=AUTO):
        return plan(nats / 2 * ramp + noise, (1, 200), False, request, tolerance)[0]

    assert chosen(0, 1e-4) == toeplitz_methods.FFT
    assert chosen(14, 1e-6) == toeplitz_methods.DOUBLE_FFT
    assert chosen(80, 1e-4) == toeplitz_methods.DIRECT
    assert chosen(80, 1e-4, FFT) == 0
    assert chosen(0, 1e-4, DIRECT) == toeplitz_methods.DIRECT
    for dtype, wanted in ((torch.bfloat16, toeplitz_methods.FFT), (torch.float32, toeplitz_methods.DOUBLE_FFT)):
        assert chosen(6, toeplitz_methods.TOLERANCE[dtype]) == wanted
    assert chosen(0, toeplitz_methods.TOLERANCE[torch.float32]) == toeplitz_methods.FFT


def test_time_decides_between_methods_that_are_accurate():
    clipped = offsets(500).clamp(-20, 20)[None]
    for costs, wanted in (((1e-9, 1, 1, 1), DIRECT), ((1, 1, 1, 1e-9), STRUCTURED)):
        kernel = {DIRECT: toeplitz_methods.DIRECT, STRUCTURED: toeplitz_methods.STRUCTURED}[wanted]
        assert plan(clipped, (1, 500), costs=costs)[0] == kernel
    assert plan(torch.randn(1, 999), (1, 500), costs=(1, 1, 1, 1e-9))[0] == toeplitz_methods.DIRECT
    for bias, grid, batch in ((torch.zeros(1, 0), (1, 0), 1), (torch.zeros(0, 5), (1, 3), 1), (clipped, (1, 500), 0)):
        assert plan(bias, grid, request=AUTO, batch=batch)[0] == toeplitz_methods.DIRECT


def test_seconds_are_the_documented_formulas():
    for tokens in (1, 2, 33, 100, 500):
        report = plan(torch.zeros(3, 2 * tokens - 1), (1, tokens), costs=(1, 2, 3, 4))[1]
        wanted = toeplitz_methods.predicted((1, 2, 3, 4), tokens, 16, 24, heads=3)
        assert [report[name] for name in toeplitz_methods.REPORT[:4]] == pytest.approx(wanted)
    smooth = {2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6)}
    for least in range(1, 1000):
        assert toeplitz_methods.transform_length(least) == min(n for n in smooth if n >= least)


TAILS = {
    "constant": (lambda t: 0 * t + 2, 0),
    "alibi": (lambda t: -0.0625 * t.abs(), 0),
    "alibi of 12 heads": (lambda t: -(2 ** -(8 / 12)) * t.abs(), 0),
    "rising": (lambda t: 0.03125 * t.abs(), 0),
    "clipped": (lambda t: t.clamp(-20, 20).sin(), 20),
    "one side farther": (lambda t: torch.where(t > 0, (t.clamp(max=50) ** 2).cos(), -0.5 * t), 50),
    "a window": (lambda t: torch.where(t.abs() < 9, t.cos(), float("-inf")), 9),
    "curved": (lambda t: -((t / 100) ** 2), float("inf")),
    "random": (lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(0)), float("inf")),
    "almost linear": (lambda t: -0.0625 * t.abs() + 1e-5 * t.sin(), float("inf")),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails_are_found(name):
    function, width = TAILS[name]
    bias = torch.stack([function(offsets(300)), torch.zeros(599, dtype=torch.float64)])
    method, report = plan(bias, (1, 300), request=STRUCTURED)
    assert report["tail"] == width
    assert method == (toeplitz_methods.STRUCTURED if np.isfinite(width) else 0)
    assert (report["structured_s"] < float("inf")) == np.isfinite(width)


def test_a_causal_tail_is_on_one_side_and_a_grid_has_one_only_where_it_is_constant():
    bias = torch.where(offsets(300) > 0, torch.randn(599, dtype=torch.float64), 0.0)[None]
    assert plan(bias, (1, 300), True, STRUCTURED)[0] == toeplitz_methods.STRUCTURED
    assert plan(bias, (1, 300), False, STRUCTURED)[0] == 0
    assert plan(torch.full((2, 99), 1.5), (5, 6), False, STRUCTURED)[0] == toeplitz_methods.STRUCTURED
    assert plan(torch.arange(99.0)[None], (5, 6), False, STRUCTURED)[0] == 0


def test_a_bias_that_a_method_cannot_serve_is_refused():
    require("toeplitz_linear_attention", "cpu")
    query, key, value = torch.rand(3, 1, 2, 60, 8)
    options = {"backend": "cpu", "method": "fft"}
    with pytest.raises(ValueError, match=r"method must not be 'fft'.*range of 60\.0 nats.*allowed: 'auto' or 'direct'"):
        effattn.toeplitz_linear_attention(query, key, value, torch.linspace(0, 60, 119).expand(2, -1), **options)
    with pytest.raises(ValueError, match=r"method must not be 'structured'.*allowed: 'auto', 'direct' or 'fft'"):
        effattn.toeplitz_linear_attention(query, key, value, torch.randn(2, 119), backend="cpu", method="structured")


# ---- the structured method ----


@dataclass
class Structured:
    """A call that the accuracy rule can be held against."""

    differentiable: tuple = ("query", "key", "value")

    def __call__(self, tensors, options, backend):
        return effattn.toeplitz_linear_attention(*tensors.values(), **options, method="structured", backend=backend)


def features(seed, tokens, width, value_dim, heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.rand(2, 1, heads, tokens, width, generator=generator).to(dtype)
    value = torch.randn(1, heads, tokens, value_dim, generator=generator).to(dtype)
    return {"query": query, "key": key, "value": value}


BIASES = {
    "constant": lambda t: torch.stack([0 * t, 0 * t + 3]),
    "alibi": lambda t: torch.stack([-0.5 * t.abs(), -(2 ** (-8 / 3)) * t.abs()]),
    "buckets to 7": lambda t: torch.stack([t.clamp(-7, 7).sin(), t.clamp(-7, 7).cos()]),
    "buckets to 128": lambda t: torch.stack([3 * t.clamp(-128, 128).sin(), (t / 8).round().clamp(-16, 16).cos()]),
    "asymmetric": lambda t: torch.stack(
        [
            torch.where(t > 70, -1.0, torch.where(t < -9, 0.25 * t, t.sin())),
            torch.where(t > 0, float("-inf"), 0.125 * t),
        ]
    ),
    "rising": lambda t: torch.stack([0.0078125 * t.abs(), 0.0625 * t.abs()]),
}


def check(tokens, causal, bias, width=6, value_dim=20, dtype=torch.float32, change=lambda tensors: None, heads=2):
    require("toeplitz_linear_attention", "cpu")

    def draw(seed):
        tensors = features(seed, tokens, width, value_dim, heads, dtype)
        change(tensors)
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(tensors["value"].shape, generator=generator).to(dtype)
        return {**tensors, "rpe_bias": bias.float()}, {"is_causal": causal}, grad

    assert_within_budget(Structured(), draw, "cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BIASES)
def test_structured_is_exact(name, causal):
    for tokens in (191, 192, 450):
        check(tokens, causal, BIASES[name](offsets(tokens)))


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128])
def test_structured_on_few_tokens(tokens):
    for causal in (False, True):
        check(tokens, causal, BIASES["alibi"](offsets(tokens)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_structured_in_half_precision(dtype):
    check(300, False, BIASES["buckets to 7"](offsets(300)), 32, 64, dtype)
    check(300, True, BIASES["alibi"](offsets(300)), 33, 7, dtype)


def test_structured_computes_segments_of_states_again():
    check(64 * 34, False, torch.zeros(1, 2 * 64 * 34 - 1), 256, 256, heads=1)  # 64 K floats a state, 31 a segment


def test_structured_with_a_rising_bias_and_keys_that_are_gone():
    def gone(tensors):
        tensors["key"][:, :, :100] = 0.0
        tensors["key"][:, :, -70:] = 0.0

    check(300, False, BIASES["rising"](offsets(300)), change=gone)


def test_structured_on_many_tokens_is_linear_attention():
    require("toeplitz_linear_attention", "cpu")
    tokens = 20001
    query, key, value = features(0, tokens, 8, 8).values()
    got = effattn.toeplitz_linear_attention(
        query, key, value, torch.ones(1, 2 * tokens - 1), method="structured", backend="cpu"
    )
    q, k, v = query.double(), key.double(), value.double()
    wanted = q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)
    assert (got - wanted).abs().max() < 1e-6 * value.abs().max()
    grid = effattn.toeplitz_linear_attention(
        query, key, value, torch.ones(1, 2 * 59 - 1, 2 * 339 - 1), grid=(59, 339), method="structured", backend="cpu"
    )
    assert torch.equal(grid, got)


@pytest.mark.parametrize("causal", [False, True])
def test_structured_does_not_depend_on_threads_or_strides(causal):
    require("toeplitz_linear_attention", "cpu")
    bias = BIASES["asymmetric"](offsets(260)).float()
    tensors = features(0, 260, 12, 20)

    def run(threads, given):
        torch.set_num_threads(threads)
        given = {name: t.requires_grad_() for name, t in given.items()}
        output = Structured()({**given, "rpe_bias": bias}, {"is_causal": causal}, "cpu")
        return output, *torch.autograd.grad(output.cos().sum(), given.values())

    strided = {name: t.mT.contiguous().mT for name, t in tensors.items()}
    assert not strided["query"].is_contiguous()
    wanted = run(1, {name: t.clone() for name, t in tensors.items()})
    for got in (run(2, {name: t.clone() for name, t in tensors.items()}), run(1, strided)):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_structured_gives_rows_without_weight_zero():
    require("toeplitz_linear_attention", "cpu")
    given = {name: t.requires_grad_() for name, t in features(0, 200, 4, 4).items()}
    bias = torch.full((2, 399), float("-inf"))
    bias[1] = 0.0
    output = Structured()({**given, "rpe_bias": bias}, {"eps": 0.0}, "cpu")
    gradients = torch.autograd.grad(output.sum(), given.values())
    assert not output[:, 0].any()
    assert output[:, 1].all()
    assert all(not gradient[:, 0].any() and gradient.isfinite().all() for gradient in gradients)


def test_a_bias_that_is_trained_gets_its_gradient():
    require("toeplitz_linear_attention", "cpu")
    given = list(features(0, 150, 8, 12).values())
    bias = BIASES["buckets to 7"](offsets(150)).float().requires_grad_()
    grads = []
    for backend in ("cpu", "reference"):
        output = effattn.toeplitz_linear_attention(*given, bias, method="structured", backend=backend)
        grads.append(torch.autograd.grad(output.cos().sum(), bias)[0])
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5 * grads[1].abs().max().item())


# ---- costs ----


@pytest.fixture
def pretended(monkeypatch):
    """Calls that take as long as costs of (0.5, 0.25, 0.125, 2) nanoseconds would make them."""
    truth = (0.5, 0.25, 0.125, 2.0)

    def seconds(method):
        at = list(toeplitz_costs.SHAPES).index(method)
        heads = max(2, torch.get_num_threads())
        return toeplitz_methods.predicted(truth, *toeplitz_costs.SHAPES[method], heads=heads)[at]

    monkeypatch.setattr(toeplitz_costs, "_call", lambda method, *shape: lambda: method)
    monkeypatch.setattr(toeplitz_costs, "_seconds", lambda call: seconds(call()))
    return truth


def test_costs_are_found_from_what_calls_take(pretended):
    assert toeplitz_costs.measured() == pytest.approx(pretended)


def test_crossover_is_where_predictions_meet(pretended):
    crossover = toeplitz_costs.crossover(pretended)
    faster = [toeplitz_methods.predicted(pretended, n, 32, 64) for n in (crossover - 1, crossover)]
    assert faster[0][1] >= faster[0][0]
    assert faster[1][1] < faster[1][0]
    assert toeplitz_costs.crossover((1e-9, 1, 1, 1)) is None


def test_tuned_costs_choose_the_method(capsys):
    require("toeplitz_linear_attention", "cpu")
    given = (*features(0, 96, 8, 12).values(), torch.randn(2, 191))
    key = _tuning.key(toeplitz_costs.COSTS, torch.get_num_threads(), ())
    for costs, method in (((1.0, 1e-9, 2e-9, 1.0), "fft"), ((1e-9, 1.0, 1.0, 1.0), "direct")):
        with _tuning.pretend({key: costs}):
            notes = effattn.explain(effattn.toeplitz_linear_attention, *given).notes
        assert notes[-2].startswith(f"method {method}")
        assert notes[-1] == "costs of a unit of work: tuned on trial"
    assert effattn.explain(effattn.toeplitz_linear_attention, *given).notes[-1].endswith("default")
