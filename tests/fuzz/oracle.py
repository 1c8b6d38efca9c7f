"""Runs a case and says what is wrong with its outcome."""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import effattn

from . import mutations
from .mutations import BENIGN, JUNK, OTHER, VALUES, Mutation
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
        self.on_meta = rng.random() < 0.03 and self.subject.on_meta
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
            given = {name: _to_meta(v) for name, v in given.items()}
        return given

    def __str__(self) -> str:
        shown = {
            n: _shown(v)
            for n, v in self.arguments().items()
            if n in {m.argument for m in self.mutations} or v is not None
        }
        done = "; ".join(map(str, self.mutations)) or "nothing"
        flags = [name for name in ("on_meta", "backward", "guarded") if getattr(self, name)]
        return f"case {self.seed} of {self.subject}({', '.join(f'{n}={v}' for n, v in shown.items())}) {flags}, changed: {done}"


def _to_meta(value):
    if isinstance(value, (Tensor, effattn.TokenMerge)) and not getattr(value, "is_quantized", False):
        return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), value)
    return value


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
    except Exception as error:  # noqa: BLE001 - whatever it is, it is judged
        _check_refusal(case, error)
        return "refused"
    for name, before in untouched.items():
        assert _same_bits(arguments[name], before), f"{subject.name} wrote to its argument {name}"
    _check_answer(case, arguments, result)
    return "answered"


def _call(case: Case, arguments: dict):
    if arguments.get("inplace") is True:
        arguments = {n: v.clone() if _is_plain(v) else v for n, v in arguments.items()}
    if case.backward:
        arguments = {n: _leaf(v) if n in case.subject.differentiable else v for n, v in arguments.items()}
    result = case.subject.function(**arguments)
    gradients = {}
    if case.backward:
        outputs = [t for t in tensors_of(result) if t.requires_grad]
        inputs = {n: v for n, v in arguments.items() if n in case.subject.differentiable and _needs_gradient(v)}
        if outputs and inputs:
            found = torch.autograd.grad(
                outputs, list(inputs.values()), [_upstream(t) for t in outputs], allow_unused=True
            )
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
    return (
        type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu" and value.numel() < 1e6
    )


def _same_bits(now: Tensor, before: Tensor) -> bool:
    if now.is_quantized or not now.numel():
        return True
    now, before = (t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in (now, before))
    return torch.equal(now.view(torch.uint8), before.view(torch.uint8))


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
    if type(value) in (Tensor, torch.nn.Parameter) and value.is_floating_point() and value.numel() < 1e6:
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
            if isinstance(error, case.subject.also_raises):
                return None
            raise AssertionError(
                f"{case.subject.name} answered, but its reference{' in float64' if exact else ''} raised "
                f"{type(error).__name__}: {str(error)[:300]}"
            ) from error


def _check_answer(case: Case, arguments: dict, answer) -> None:
    subject = case.subject
    result, gradients = answer
    places = {v.device.type for v in tensors_of(list(arguments.values()))}
    if "meta" in places:
        assert places == {"meta"} or subject.lenient(arguments), (
            f"{subject.name} answered a call of tensors on {places}"
        )
        _check_shapes(case, result)
        return
    reference = _reference(case, arguments, exact=False)
    if reference is None:  # the answer is torch's, who takes what the reference does not
        return
    low, low_gradients = reference
    ours, eager = tensors_of(result), tensors_of(low)
    finite, moderate = _range(arguments)
    changed = any(m.kind == OTHER or arguments.get("backend") != "cpu" for m in case.mutations)
    if subject.lenient(arguments) and (changed or not finite):  # torch leaves memory unwritten where a query overlaps
        return
    found = [(t.shape, t.dtype, t.device) for t in ours]
    wanted = [(t.shape, t.dtype, t.device) for t in eager]
    assert found == wanted, f"{subject.name} returned {found}, not {wanted}"
    if subject.random(arguments):
        return
    exact, exact_gradients = _reference(case, arguments, exact=True)
    pairs = [(f"result {i}", *three) for i, three in enumerate(zip(ours, eager, tensors_of(exact)))]
    for name, gradient in gradients.items():
        three = gradient, low_gradients.get(name), exact_gradients.get(name)
        if three[1] is None and three[0] is not None and not three[0].any():
            continue  # of a result that does not depend on it
        assert (three[0] is None) == (three[1] is None), (
            f"{subject.name}: gradient of {name} is {three[0]}, not {three[1]}"
        )
        if three[0] is not None:
            assert three[0].shape == arguments[name].shape, (
                f"{subject.name}: gradient of {name} has shape {three[0].shape}"
            )
            assert three[0].dtype == arguments[name].dtype, f"{subject.name}: gradient of {name} is {three[0].dtype}"
            pairs.append((f"gradient of {name}", *three))
    for what, one, two, three in pairs:
        if not one.is_floating_point():
            if not subject.discontinuous and finite:
                assert _equal(one, two), f"{subject.name}: {what} differs from the reference's"
            continue
        _compare(case, what, one.detach(), two.detach(), three.detach(), arguments, finite, moderate)


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.is_complex():
        one, two = one.to(torch.complex128), two.to(torch.complex128)
    return torch.equal(one, two)


def _compare(case, what, ours, low, exact, arguments, finite: bool, moderate: bool) -> None:
    name = case.subject.name
    ours, low, exact = ours.double(), low.double(), exact.double()
    known = low.isfinite() & exact.isfinite()
    wrong = ~ours.isfinite() & known
    if not finite and what.startswith("gradient"):
        return  # infinities cancel in another place than in autograd's formula
    told = f"{name}: {what} is {ours[wrong].flatten()[:1].tolist()} in {int(wrong.sum())} places where the reference is not"
    assert not wrong.any() or not moderate, told
    if not finite:
        causal = arguments.get("is_causal") is True  # what no query sees is not looked at
        nans = any(t.isnan().any() for t in tensors_of(list(arguments.values())) if t.is_floating_point())
        if case.subject.selects or causal or not moderate or not nans:  # a row of nothing but -inf gives 0
            return
        swallowed = exact.isnan() & low.isnan() & ours.isfinite() & (ours != 0)
        assert not swallowed.any(), (
            f"{name}: {what} is finite in {int(swallowed.sum())} places where the reference is NaN"
        )
        return
    if (
        not moderate
        or not ours.numel()
        or (case.subject.discontinuous and case.dtype in (torch.bfloat16, torch.float16))
    ):
        return
    error = (ours - exact)[known].abs()
    if not error.numel():
        return
    largest, eps = exact[known].abs().max().item(), torch.finfo(case.dtype).eps
    eps = max(eps, torch.finfo(torch.float32).eps) if case.dtype != torch.float64 else eps
    terms = 1.0
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            terms *= max(value.detach().double().abs().max().item(), 1.0)
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
            value = value.detach().double().abs()
            finite &= value.max().item() < float("inf")
            moderate &= value.nan_to_num(0.0, 0.0, 0.0).max().item() <= MODERATE
    for value in arguments.values():
        if isinstance(value, (int, float)):
            moderate &= -MODERATE <= value <= MODERATE and not 0 < abs(value) < 1e-20
    return finite, moderate


def _check_shapes(case: Case, result) -> None:
    """A call on the meta device says what the same call would return."""
    if not case.on_meta:
        return
    case.on_meta = False
    try:
        real, _ = _call(case, case.arguments())
    except (*ALLOWED, *case.subject.also_raises):
        return  # for its values
    finally:
        case.on_meta = True
    found = [(t.shape, t.dtype) for t in tensors_of(result)]
    wanted = [(t.shape, t.dtype) for t in tensors_of(real)]
    assert found == wanted, f"{case.subject.name} returned {found} on meta, not {wanted}"


outcomes: Counter = Counter()
