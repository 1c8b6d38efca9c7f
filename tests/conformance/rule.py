"""The accuracy rule of the architecture page, section 4."""

from __future__ import annotations

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


def assert_within_budget(case, tensors: dict[str, Tensor], options: dict, backend: str, grad_output=None) -> None:
    """max|got - ref| <= factor * max|low - ref| + eps(dtype) * max|ref| for the output and every gradient.

    ref is the float64 reference of the same (rounded) inputs, low the same-dtype eager formula.
    """
    got = run(case, tensors, options, backend, grad_output)
    low = run(case, tensors, options, "reference", grad_output)
    exact_grad = None if grad_output is None else grad_output.double()
    ref = run(case, in_double(tensors), options, "reference", exact_grad)
    query = tensors["query"]
    assert got.output.shape == query.shape and got.output.dtype == query.dtype
    assert_close("output", got.output, ref.output, low.output, FORWARD_FACTOR, query.dtype)
    for name, gradient in got.gradients.items():
        given = tensors[name]
        assert gradient.shape == given.shape and gradient.dtype == given.dtype, name
        floor = _rounding_of_one_key(in_double(tensors), exact_grad) if tensors["key"].shape[2] == 1 else 0.0
        factor, what = GRADIENT_FACTOR, f"gradient of {name}"
        assert_close(what, gradient, ref.gradients[name], low.gradients[name], factor, query.dtype, floor)


def assert_close(what: str, got: Tensor, ref: Tensor, low: Tensor, factor: float, dtype, floor: float = 0.0) -> None:
    got, low = got.double(), low.double()
    assert not got.isnan().any(), f"{what} has NaN"
    budget = factor * _largest(low - ref) + torch.finfo(dtype).eps * _largest(ref) + floor
    error = _largest(got - ref)
    assert error <= budget, f"{what}: error {error:.3e} exceeds its budget {budget:.3e} (largest value {_largest(ref):.3e})"


def _rounding_of_one_key(tensors: dict[str, Tensor], grad_output: Tensor) -> float:
    """With one key the weight is 1 whatever the logit, so gradients through the logit vanish identically.

    Eager's are exactly 0; a kernel that recomputes dO V^T - dO . O is left with the float32 rounding of that difference.
    """
    batch, _, _, head_dim = tensors["query"].shape
    if not grad_output.numel():
        return 0.0
    terms = grad_output.abs().sum(-1).max() * tensors["value"].abs().max() * head_dim**-0.5
    for name, tensor in tensors.items():
        if name not in ("value", "attn_mask"):
            terms = terms * tensor.abs().max().clamp_min(1.0)
    return batch * torch.finfo(torch.float32).eps * terms.item()


def assert_same_bits(got: Result, wanted: Result) -> None:
    assert torch.equal(got.output, wanted.output), "outputs differ"
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, wanted.gradients[name]), f"gradients of {name} differ"
