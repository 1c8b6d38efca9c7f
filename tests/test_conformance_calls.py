"""How a call travels: what it refuses and in which words, which backend serves it, what explain and the log say."""

from __future__ import annotations

import re

import pytest
import torch
from conformance import CASES, RecordedCalls, all_cases, case_and_backend, device_of, namespace_of, require, run, small

import effattn
from effattn import _registry, reference
from effattn._registry import BACKENDS

PLAIN = [cases[0] for cases in CASES.values()]
"""One case of every operator, where the mode of use does not matter."""


def arguments(case, backend="auto", shape=None, dtype=torch.float32) -> dict:
    shape = small(backend) if shape is None else shape
    tensors = case.tensors(shape, dtype, device=device_of(backend))
    return {**tensors, **case.options(shape), "backend": backend}


@pytest.fixture
def no_reference(monkeypatch):
    """Any call of the reference fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the reference was called")

    for name in reference.__all__:
        monkeypatch.setattr(reference, name, refuse)


def bad_calls():
    for case in all_cases():
        for why, change, exception, message in case.bad:
            yield pytest.param(case, change, exception, message, id=f"{case}-{why}")


@pytest.mark.parametrize(("case", "change", "exception", "message"), bad_calls())
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_bad_argument_is_named_before_anything_runs(case, change, exception, message, backend):
    if backend != "auto":
        require(case.op, backend)
    call = change({**arguments(case), "backend": backend})
    if backend != "auto" and call["backend"] == "tpu" and backend != "cpu":
        pytest.skip("the backend is the bad argument")
    with RecordedCalls() as recorded, pytest.raises(exception, match=message):
        case.function(**call)
    assert not recorded.calls


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_operator_has_bad_arguments_to_refuse(case):
    assert len(case.bad) >= 5


@case_and_backend()
def test_explicit_backend_is_the_one_that_runs(case, backend, request):
    require(case.op, backend)
    if backend != "reference":
        request.getfixturevalue("no_reference")
    with RecordedCalls() as recorded:
        case.function(**arguments(case, backend))
    wanted = [] if backend == "reference" else [namespace_of(backend)] * case.launches
    assert [op.namespace for op, _ in recorded.calls] == wanted


UNSERVED = {
    "float64": (
        lambda a: {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in a.items()},
        "float64",
    ),
    "head_dim 257": (
        lambda a: {
            **{
                n: v for n, v in a.items() if not n.startswith(("lepe", "lce", "initial"))
            },  # whose shapes have head_dim
            **{n: a[n].new_zeros((*a[n].shape[:-1], 257)) for n in ("query", "key", "value", "projection") if n in a},
        },
        "head_dim 257 is above 256",
    ),
    "dropout": (lambda a: {**a, "dropout_p": 0.5}, "no kernel for attention dropout"),
    "meta tensors": (lambda a: {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in a.items()}, "meta"),
}


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("feature", UNSERVED)
def test_explicit_backend_never_falls_back(case, backend, feature, no_reference):
    require(case.op, backend)
    if feature == "dropout" and not case.takes_dropout:
        pytest.skip("has no dropout_p")
    change, reason = UNSERVED[feature]
    call = change(arguments(case, backend))
    with RecordedCalls() as recorded, pytest.raises(NotImplementedError) as refused:
        case.function(**call)
    assert not recorded.calls
    message = str(refused.value)
    assert message.startswith(f"{case.op}: backend={backend!r} cannot serve this call: ")
    assert reason in message
    for other in _registry._table[case.op]:  # every other backend with its verdict
        if other.name != backend:
            assert f"{other.name}: " in message.partition("Others:")[2]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_backend_without_a_kernel_for_the_operator_says_so(case):
    absent = set(BACKENDS) - {b.name for b in _registry._table[case.op]}
    for backend in absent:
        with pytest.raises(NotImplementedError, match=f"effattn has no {backend} kernel for this operator"):
            case.function(**{**arguments(case), "backend": backend})


@pytest.mark.parametrize("case", all_cases(), ids=str)
@pytest.mark.parametrize("feature", ["float64", "head_dim 257"])
def test_auto_serves_what_no_kernel_serves(case, feature):
    call = UNSERVED[feature][0](arguments(case))
    if "attn_mask" in call:
        call["attn_mask"] = (
            call["attn_mask"].to(torch.bool) if call["attn_mask"].dtype == torch.bool else call["attn_mask"]
        )
    torch.testing.assert_close(case.function(**call), case.function(**{**call, "backend": "reference"}))


@case_and_backend()
def test_environment_overrides_auto_and_nothing_else(case, backend, monkeypatch):
    require(case.op, backend)
    monkeypatch.setenv("EFFATTN_BACKEND", backend)
    with RecordedCalls() as forced:
        case.function(**{**arguments(case, backend), "backend": "auto"})
    with RecordedCalls() as explicit:
        case.function(**arguments(case, backend))
    assert [op for op, _ in forced.calls] == [op for op, _ in explicit.calls]
    with RecordedCalls() as reference_asked:
        case.function(**{**arguments(case), "backend": "reference"})
    assert not reference_asked.calls


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_environment_that_cannot_serve_raises(case, monkeypatch):
    monkeypatch.setenv("EFFATTN_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="backend='cuda' cannot serve this call"):
        case.function(**arguments(case, dtype=torch.float64))
    monkeypatch.setenv("EFFATTN_BACKEND", "tpu")
    with pytest.raises(ValueError, match="'tpu'"):
        case.function(**arguments(case))
    monkeypatch.setenv("EFFATTN_BACKEND", "")
    case.function(**arguments(case))


# ---- explain ----


@case_and_backend()
def test_explain_prints_every_backend_and_launches_nothing(case, backend, capsys, monkeypatch):
    require(case.op, backend)
    for name in reference.__all__:
        monkeypatch.setattr(reference, name, None)
    call = arguments(case, backend)
    with RecordedCalls() as recorded:
        explanation = effattn.explain(case.function, **call)
    assert not recorded.calls
    printed = capsys.readouterr().out
    assert explanation.backend == backend
    assert printed.rstrip("\n") == str(explanation)
    lines = printed.splitlines()
    assert lines[0] == f"{case.op} (backend={backend!r})"
    verdicts = lines[1 : 1 + len(_registry._table[case.op])]
    assert [line[4:].split()[0] for line in verdicts] == [b.name for b in _registry._table[case.op]]
    assert [line.startswith(" -> ") for line in lines[1:]].count(True) == 1
    assert re.search(rf"^ -> {backend} +ok ", printed, re.MULTILINE)
    for line, verdict in zip(verdicts, explanation.verdicts):
        assert verdict.reason
        assert line.endswith(verdict.reason)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_explain_tells_what_auto_does(case, no_reference, monkeypatch):
    monkeypatch.setattr(_registry._native, "loaded", True)
    monkeypatch.setattr(_registry._native, "problem", "")
    big = arguments(case, shape=small("auto").with_(grid=(16, 16), prefix=0, head_dim=64))
    assert effattn.explain(case.function, **big).backend == "cpu"


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_explain_tells_that_a_call_would_raise(case, capsys):
    explanation = effattn.explain(case.function, **{**arguments(case, dtype=torch.float64), "backend": "cpu"})
    assert explanation.backend is None
    assert "would raise NotImplementedError" in capsys.readouterr().out


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_explain_checks_arguments_and_leaves_no_trace(case):
    why, change, exception, message = next(bad for bad in case.bad if bad[2] is TypeError)
    with pytest.raises(exception, match=message):
        effattn.explain(case.function, **change(arguments(case)))
    assert isinstance(case.function(**arguments(case)), torch.Tensor), why


def test_explain_of_something_else_is_refused():
    with pytest.raises(ValueError, match="made no call of an effattn operator"):
        effattn.explain(torch.nn.functional.softmax, torch.zeros(3), dim=0)


def test_explain_sees_through_modules():
    module = effattn.nn.GaussianMixtureAttention(8, (3, 4), num_heads=2, head_dim=4, backend="reference")
    explanation = effattn.explain(module, torch.zeros(1, 12, 8))
    assert (explanation.op, explanation.backend) == ("gaussian_mixture_attention", "reference")


# ---- the log ----


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(_registry._native, "loaded", False)
    monkeypatch.setattr(_registry._native, "problem", "the compiled extension is gone")
    monkeypatch.setattr(_registry._native, "cuda_loaded", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("case", [c for c in PLAIN if "torch" not in {b.name for b in _registry._table[c.op]}], ids=str)
def test_fallback_of_auto_is_logged_once_with_its_reasons(case, without_kernels, fresh_log):
    for _ in range(3):
        case.function(**arguments(case))
    messages = [r.getMessage() for r in fresh_log.records if r.name == "effattn"]
    assert len(messages) == 1
    assert fresh_log.records[0].levelname == "WARNING"
    assert messages[0].startswith(f"{case.op} runs on the reference")
    assert "the compiled extension is gone" in messages[0]
    assert "triton: tensors are on cpu" in messages[0]


def test_fallback_of_a_sound_installation_is_logged_as_information(fresh_log):
    query, key, value = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64)
    effattn.gaussian_mixture_attention(query, key, value, torch.ones(1, 2), torch.ones(1, 2), (3, 4))
    (record,) = (r for r in fresh_log.records if r.name == "effattn")
    assert record.levelname == "INFO"
    assert "no kernel for torch.float64" in record.getMessage()


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_calls_that_are_served_as_asked_log_nothing(case, fresh_log):
    case.function(**{**arguments(case), "backend": "reference"})
    if _registry._native.loaded:
        case.function(**{**arguments(case), "backend": "cpu"})
    assert not fresh_log.records


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_library_without_kernels_still_computes_and_differentiates(case, without_kernels):
    shape = small("reference")
    tensors, options, grad = case.tensors(shape), case.options(shape), case.grad_output(shape)
    got, wanted = (run(case, tensors, options, backend, grad) for backend in ("auto", "reference"))
    torch.testing.assert_close(got.output, wanted.output)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient, wanted.gradients[name])


# ---- dropout is the reference's ----


@pytest.mark.parametrize("case", [case for case in PLAIN if case.takes_dropout], ids=str)
def test_dropout_keeps_the_mean_and_drops_at_random(case):
    shape = small("reference").with_(batch=1, heads=2)
    call = {**arguments(case, shape=shape), "dropout_p": 0.4}
    draws = torch.stack([case.function(**call) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    exact = case.function(**{**call, "dropout_p": 0.0})
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 20 + 1e-6)
    assert error.max() < 6  # standard errors
    torch.manual_seed(3)
    first = case.function(**call)
    torch.manual_seed(3)
    assert torch.equal(first, case.function(**call))
