"""What hostile calls leave behind: nothing outside their tensors, no memory; and that the fuzz sees what is wrong."""

import importlib

import pytest
import torch

import effattn
from fuzz import oracle
from fuzz.runner import SHARES, guarded, held, repeat
from fuzz.subject import Subject

SUBJECTS = [subject for group in SHARES for subject in importlib.import_module(f"fuzz.{group}").SUBJECTS]


@pytest.mark.slow
def test_kernels_write_only_to_what_they_allocate():
    outcomes = guarded([s for s in SUBJECTS if s.differentiable], 1000)
    assert outcomes["watched"] > 80


@pytest.mark.slow
def test_refused_and_answered_calls_leave_no_memory_behind():
    sizes = []
    for _ in range(4):
        repeat(SUBJECTS, 300)
        sizes.append(held())
    (bytes_before, tensors_before), (bytes_after, tensors_after) = sizes[1], sizes[3]
    assert tensors_after <= tensors_before
    assert bytes_after - bytes_before < 64 * 1024


def test_every_public_callable_is_fuzzed():
    fuzzed = {subject.name.split(".")[0] for subject in SUBJECTS}
    public = {name for name in effattn.__all__ if callable(getattr(effattn, name))}
    public |= {name for name in effattn.nn.__all__ if isinstance(getattr(effattn.nn, name), type)}
    assert public - fuzzed == {"StructuredMask"}  # what masks derive from


def _case(function, value: torch.Tensor) -> oracle.Case:
    subject = Subject("broken", function, lambda rng: {"x": value, "backend": "auto"}, any_dtype=False)
    case = oracle.Case([subject], 0)
    case.mutations, case.on_meta = [], False
    return case


def _raises(error):
    def function(x, backend):
        raise error

    return function


def _in_place(x, backend):
    x[0] = 5.0
    return x.clone()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_raises(RuntimeError("x is bad")), "no exception that it may raise"),
        (_raises(ValueError("something is bad")), "names no argument"),
        (_raises(ValueError("broken: x is bad")), "but the call is valid"),
        (_in_place, "wrote to its argument x"),
        (lambda x, backend: x / (1.0 if backend == "reference" else 0.0), "places where the reference is not"),
        (lambda x, backend: x * (1.0 if backend == "reference" else 1.001), "is off by"),
        (lambda x, backend: x[: 3 if backend == "reference" else 2], "returned"),
    ],
)
def test_oracle_finds_what_is_wrong(function, message):
    with pytest.raises(AssertionError, match=message):
        oracle.run(_case(function, torch.ones(3)))
