"""The accuracy rule of the architecture page, section 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


class Result(NamedTuple):
    output: Tensor
    gradients: dict[str, Tensor]


def run(case, tensors: dict[str, Tensor], options: dict, backend: str, grad_output=None, wrt=None) -> Result:
    """Forward, and backward with ``grad_output`` for the arguments ``wrt`` (default: all that have a gradient)."""
    wrt = case.differentiable if wrt is None else wrt
    inputs = {name: t.detach().requires_grad_(grad_output is not None and name in wrt) for name, t in tensors.items()}
    output = case(inputs, options, backend)
    if grad_output is None or not wrt:
        return Result(output.detach(), {})
    gradients = torch.autograd.grad(output, [inputs[name] for name in wrt], grad_output)
    return Result(output.detach(), dict(zip(wrt, gradients)))


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


class Measured(NamedTuple):
    """Largest errors of one quantity against float64: ours, eager's at the same dtype, and the largest value itself."""

    error: float
    low: float
    largest: float
    floor: float

    def pooled_with(self, other: Measured) -> Measured:
        return Measured(*map(max, self, other))

    def budget(self, factor: float, dtype: torch.dtype) -> float:
        return factor * self.low + torch.finfo(dtype).eps * self.largest + self.floor


def measure(case, tensors: dict[str, Tensor], options: dict, backend: str, grad_output=None) -> dict[str, Measured]:
    """The output and every gradient. ref is the float64 reference of the same (rounded) inputs."""
    got = run(case, tensors, options, backend, grad_output)
    low = run(case, tensors, options, "reference", grad_output)
    exact_grad = None if grad_output is None else grad_output.double()
    ref = run(case, in_double(tensors), options, "reference", exact_grad)
    one_key = tensors["key"].shape[2] == 1
    terms = 0.0 if exact_grad is None else _cancelling_terms(in_double(tensors), exact_grad)

    def compare(what, ours, eager, exact, like):
        assert (ours.shape, ours.dtype) == (exact.shape, like.dtype), what
        assert not ours.isnan().any(), f"{what} has NaN"
        largest = _largest(exact)
        cancels = what != "output" and (one_key or largest <= 1e-12 * terms)
        floor = torch.finfo(torch.float32).eps * terms if cancels else 0.0
        return Measured(_largest(ours.double() - exact), _largest(eager.double() - exact), largest, floor)

    found = {"output": compare("output", got.output, low.output, ref.output, tensors["query"])}
    for name, gradient in got.gradients.items():
        found[f"gradient of {name}"] = compare(name, gradient, low.gradients[name], ref.gradients[name], tensors[name])
    return found


def assert_within_budget(case, draw: Callable[[int], tuple], backend: str, seed: int = 0) -> None:
    """max|got - ref| <= factor * max|low - ref| + eps(dtype) * max|ref| for the output and every gradient.

    ``draw(seed)`` gives (tensors, options, grad_output). In a small call max|low - ref| is the rounding of one or two
    elements, an accident of eager's order of summation; a call that misses its budget is therefore pooled with seven
    more draws, and the rule holds for the pool. The first draw stays in the pool, so a wrong value stays wrong.
    """
    tensors, options, grad_output = draw(seed)
    dtype = tensors["query"].dtype
    pool = measure(case, tensors, options, backend, grad_output)
    if not _over_budget(pool, dtype):
        return
    for other in range(seed + 1, seed + 8):
        again = measure(case, *draw(other)[:2], backend, grad_output)
        pool = {what: pool[what].pooled_with(again[what]) for what in pool}
    assert not _over_budget(pool, dtype), "; ".join(_over_budget(pool, dtype))


def _over_budget(found: dict[str, Measured], dtype: torch.dtype) -> list[str]:
    messages = []
    for what, measured in found.items():
        budget = measured.budget(FORWARD_FACTOR if what == "output" else GRADIENT_FACTOR, dtype)
        if not measured.error <= budget:
            messages.append(
                f"{what}: error {measured.error:.3e} exceeds its budget {budget:.3e} "
                f"(eager's error {measured.low:.3e}, largest value {measured.largest:.3e})"
            )
    return messages


def _cancelling_terms(tensors: dict[str, Tensor], grad_output: Tensor) -> float:
    """Size of the terms whose difference dO V^T - dO . O makes a gradient through the logits.

    With a single key, or keys that all hold the same value, that difference and so the gradient vanishes identically.
    Eager's may then be exact, its single weight exactly 1; a kernel that recomputes is left with float32 rounding.
    """
    batch, _, tokens, head_dim = tensors["query"].shape
    if not grad_output.numel() or not tensors["key"].numel():
        return 0.0
    terms = grad_output.abs().sum(-1).max() * tensors["value"].abs().max() * head_dim**-0.5
    for name, tensor in tensors.items():
        if name not in ("value", "attn_mask") and tensor.is_floating_point():
            terms = terms * tensor.abs().max().clamp_min(1.0)
    return (batch * tokens) ** 0.5 * terms.item()


def assert_same_bits(got: Result, wanted: Result) -> None:
    assert torch.equal(got.output, wanted.output), "outputs differ"
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, wanted.gradients[name]), f"gradients of {name} differ"
