"""Runs a case and says what is wrong with its outcome."""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import mutations
from .mutations import BENIGN, JUNK, VALUES, Mutation
from .subject import FLOATING, Subject

ALLOWED = (ValueError, TypeError, NotImplementedError)
MODERATE = 1e3  # magnitudes up to which results are compared
FACTOR, ROUNDINGS = 4.0, 64.0


class Case:
    """A valid call of a function, and what is done to its arguments."""

    def __init__(self, subjects: list[Subject], seed: int):
        rng = random.Random(seed)
        self.seed = seed
        self.subject = rng.choices(subjects, [s.weight for s in subjects])[0]
        self.dtype = torch.float32
        arguments = self.subject.sample(rng)
        if self.subject.any_dtype:
            self.dtype = rng.choice([torch.float32, torch.float32, *FLOATING])
        self.valid = {name: self._cast(name, value) for name, value in arguments.items()}
        self.mutations: list[Mutation] = mutations.draw(rng, self.subject, self.valid)
        self.on_meta = rng.random() < 0.03
        self.backward = bool(self.subject.differentiable) and rng.random() < 0.3
        self.guarded = rng.random() < 0.1

    def _cast(self, name: str, value):
        if not isinstance(value, Tensor) or not value.is_floating_point() or type(value) is not Tensor:
            return value
        keep = name in self.subject.in_float32 and self.dtype != torch.float64
        return value.to(torch.float32 if keep else self.dtype)

    def arguments(self) -> dict:
        given = {**self.valid, **{m.argument: m.value for m in self.mutations}}
        if self.on_meta:
            given = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in given.items()}
        return given

    def __str__(self) -> str:
        shown = {n: _shown(v) for n, v in self.arguments().items() if n in {m.argument for m in self.mutations} or v is not None}
        done = "; ".join(map(str, self.mutations)) or "nothing"
        flags = [name for name in ("on_meta", "backward", "guarded") if getattr(self, name)]
        return f"case {self.seed} of {self.subject}({', '.join(f'{n}={v}' for n, v in shown.items())}) {flags}, changed: {done}"


def _shown(value) -> str:
    if isinstance(value, Tensor):
        strided = value.layout == torch.strided
        strides = tuple(value.stride()) if strided else value.layout
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}/{strides}"
    return repr(value)[:120]


def run(case: Case) -> str:
    """ "refused" or "answered"; raises AssertionError where the outcome is wrong."""
    try:
        return _run(case)
    except AssertionError as failure:
        raise AssertionError(f"{failure}\n  {_smallest(case, str(failure))}") from failure


def _smallest(case: Case, failure: str) -> Case:
    """Take back every mutation without which the case fails as well."""
    for flag in ("guarded", "on_meta", "backward"):
        if getattr(case, flag):
            setattr(case, flag, False)
            if not _fails(case):
                setattr(case, flag, True)
    for mutation in list(case.mutations):
        rest = [m for m in case.mutations if m is not mutation]
        kept, case.mutations = case.mutations, rest
        if not _fails(case):
            case.mutations = kept
    return case


def _fails(case: Case) -> bool:
    try:
        _run(case)
    except AssertionError:
        return True
    return False


def _run(case: Case) -> str:
    subject, arguments = case.subject, case.arguments()
    untouched = {n: v.detach().clone() for n, v in arguments.items() if _is_plain(v)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _call(case, arguments)
    except Exception as error:
        _check_refusal(case, error)
        return "refused"
    for name, before in untouched.items():
        if not (name in ("state",) and arguments.get("inplace")):
            assert _same_bits(arguments[name], before), f"{subject.name} wrote to its argument {name}"
    _check_answer(case, arguments, result)
    return "answered"


def _call(case: Case, arguments: dict):
    if case.backward:
        arguments = {n: _leaf(v) if n in case.subject.differentiable else v for n, v in arguments.items()}
    result = case.subject.function(**arguments)
    gradients = {}
    if case.backward:
        outputs = [t for t in tensors_of(result) if t.requires_grad]
        inputs = {n: v for n, v in arguments.items() if n in case.subject.differentiable and _needs_gradient(v)}
        if outputs and inputs:
            found = torch.autograd.grad(outputs, list(inputs.values()), [_upstream(t) for t in outputs], allow_unused=True)
            gradients = dict(zip(inputs, found))
    return result, gradients


def _upstream(tensor: Tensor) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(tensor.dtype).to(tensor.device)


def _leaf(value):
    if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
        return value.detach().requires_grad_(True)
    return value


def _needs_gradient(value) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_plain(value) -> bool:
    return type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu" and value.numel() < 1e6


def _same_bits(now: Tensor, before: Tensor) -> bool:
    if now.is_quantized or not now.numel():
        return True
    return torch.equal(now.detach().contiguous().view(-1).view(torch.uint8), before.contiguous().view(-1).view(torch.uint8))


# ---- a refusal ----


def _check_refusal(case: Case, error: Exception) -> None:
    subject, text = case.subject, str(error)
    told = f"{subject.name} raised {type(error).__name__}: {text[:600]}"
    if isinstance(error, subject.also_raises):
        return
    assert type(error) in ALLOWED, f"{told}: no exception that it may raise"
    words = set(re.findall(r"\w+", text))
    named = {n for n in (*case.valid, *subject.also_named) if n in words}
    assert named, f"{told}: names no argument"
    harmless = all(m.kind == BENIGN for m in case.mutations)
    assert not harmless, f"{told}: but the call is valid"
    if len(case.mutations) == 1:
        (mutation,) = case.mutations
        if mutation.kind == JUNK:
            assert named & {mutation.argument, *subject.also_named}, f"{told}: does not name {mutation.argument}"
        if mutation.kind == VALUES:
            allowed = mutation.argument in subject.values
            assert allowed, f"{told}: but values of {mutation.argument} are not to be refused"


# ---- an answer ----


def tensors_of(result) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _in_double(value):
    if type(value) in (Tensor, torch.nn.Parameter) and value.is_floating_point():
        return value.detach().double()
    return value


def _reference(case: Case, arguments: dict, exact: bool):
    arguments = {n: _in_double(v) if exact else v for n, v in arguments.items()}
    if "backend" in arguments:
        arguments["backend"] = "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _call(case, arguments)
        except Exception as error:
            raise AssertionError(
                f"{case.subject.name} answered, but its reference{' in float64' if exact else ''} raised "
                f"{type(error).__name__}: {str(error)[:300]}"
            ) from error


def _check_answer(case: Case, arguments: dict, answer) -> None:
    subject = case.subject
    result, gradients = answer
    if any(isinstance(v, Tensor) and v.device.type == "meta" for v in arguments.values()):
        _check_shapes(case, result)
        return
    low, low_gradients = _reference(case, arguments, exact=False)
    ours, eager = tensors_of(result), tensors_of(low)
    found = [(t.shape, t.dtype, t.device) for t in ours]
    wanted = [(t.shape, t.dtype, t.device) for t in eager]
    assert found == wanted, f"{subject.name} returned {found}, not {wanted}"
    if subject.random(arguments):
        return
    exact, exact_gradients = _reference(case, arguments, exact=True)
    finite, moderate = _range(arguments)
    pairs = [(f"result {i}", *three) for i, three in enumerate(zip(ours, eager, tensors_of(exact)))]
    for name, gradient in gradients.items():
        three = gradient, low_gradients.get(name), exact_gradients.get(name)
        assert (three[0] is None) == (three[1] is None), f"{subject.name}: gradient of {name} is {three[0]}, not {three[1]}"
        if three[0] is not None:
            assert three[0].shape == arguments[name].shape, f"{subject.name}: gradient of {name} has shape {three[0].shape}"
            assert three[0].dtype == arguments[name].dtype, f"{subject.name}: gradient of {name} is {three[0].dtype}"
            pairs.append((f"gradient of {name}", *three))
    for what, one, two, three in pairs:
        if not one.is_floating_point():
            if not subject.discontinuous and finite:
                assert torch.equal(one.to(two.dtype), two), f"{subject.name}: {what} differs from the reference's"
            continue
        _compare(case, what, one.detach(), two.detach(), three.detach(), arguments, finite, moderate)


def _compare(case, what, ours, low, exact, arguments, finite: bool, moderate: bool) -> None:
    name = case.subject.name
    ours, low, exact = ours.double(), low.double(), exact.double()
    known = low.isfinite() & exact.isfinite()
    wrong = ours.isnan() & known
    assert not wrong.any() or not moderate and finite, f"{name}: {what} is NaN in {int(wrong.sum())} places where the reference is not"
    if not finite:
        lost = ~(ours.isfinite() | ours.isnan() & ~known) & known
        assert not lost.any(), f"{name}: {what} is infinite where the reference is not"
        swallowed = exact.isnan() & low.isnan() & ours.isfinite()
        assert not swallowed.any(), f"{name}: {what} is finite in {int(swallowed.sum())} places where the reference is NaN"
        return
    if not moderate or not ours.numel() or case.subject.discontinuous and case.dtype in (torch.bfloat16, torch.float16):
        return
    error = (ours - exact)[known].abs()
    if not error.numel():
        return
    largest, eps = exact[known].abs().max().item(), torch.finfo(case.dtype).eps
    eps = max(eps, torch.finfo(torch.float32).eps) if case.dtype != torch.float64 else eps
    terms = 1.0
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            terms *= max(value.detach().abs().double().masked_fill(~value.isfinite(), 0.0).max().item(), 1.0)
    budget = ROUNDINGS * (eps * largest + (1e-15 if case.dtype == torch.float64 else 2e-7) * terms)
    if error.max().item() <= budget:
        return
    budget += FACTOR * (low - exact)[known].abs().max().item()
    assert error.max().item() <= budget, (
        f"{name}: {what} is off by {error.max().item():.3e} of {largest:.3e}, allowed are {budget:.3e}"
    )


def _range(arguments: dict) -> tuple[bool, bool]:
    """Whether every value is finite, and whether every one is of moderate size too."""
    finite = moderate = True
    for value in tensors_of(list(arguments.values())):
        if value.is_floating_point() and value.numel() and value.layout == torch.strided:
            largest = value.detach().double().abs().max().item()
            finite &= largest < float("inf")
            moderate &= largest <= MODERATE
    for value in arguments.values():
        if isinstance(value, (int, float)):
            moderate &= -MODERATE <= value <= MODERATE and not 0 < abs(value) < 1e-20
    return finite, finite and moderate


def _check_shapes(case: Case, result) -> None:
    """A call on the meta device says what the same call would return."""
    if not case.on_meta:
        raise AssertionError(f"{case.subject.name} answered a call with one argument on meta")
    case.on_meta = False
    try:
        real, _ = _call(case, case.arguments())
    except ALLOWED:
        return  # for its values
    finally:
        case.on_meta = True
    found = [(t.shape, t.dtype) for t in tensors_of(result)]
    wanted = [(t.shape, t.dtype) for t in tensors_of(real)]
    assert found == wanted, f"{case.subject.name} returned {found} on meta, not {wanted}"


outcomes: Counter = Counter()
