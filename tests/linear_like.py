"""What the tests of operators that are no attention share: backends, layouts, the accuracy rule."""

from __future__ import annotations

import torch
from conformance import backends_of
from conformance.rule import FORWARD_FACTOR, GRADIENT_FACTOR
from torch import Tensor

import effattn  # noqa: F401 - fills the registry
from effattn import _registry

KERNELS = {op: [b for b in backends_of(op) if b != "reference"] for op in _registry.operators()}


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got, wanted)


def layouts_of(matrix: Tensor):
    """Views of a (rows, columns) matrix inside NaN-filled storages, and expanded ones."""
    rows, columns = matrix.shape[-2:]
    wide = matrix.new_full((*matrix.shape[:-2], 2 * rows + 1, columns + 3), float("nan"))
    wide[..., 1::2, 2 : 2 + columns] = matrix
    yield wide[..., 1::2, 2 : 2 + columns]
    yield matrix.mT.contiguous().mT
    doubled = matrix.new_full((*matrix.shape[:-1], 2 * columns), float("nan"))
    doubled[..., ::2] = matrix
    yield doubled[..., ::2]
    yield matrix[..., :1, :].expand_as(matrix)
    yield matrix[..., :1].expand_as(matrix)


def assert_close_enough(call, backend: str, *tensors: Tensor) -> None:
    """The accuracy rule for ``call(backend, *tensors)`` and the gradients of those tensors that require one.

    Eager's error is the largest over the tensors and seven shuffles of their elements: of few elements one draw is an accident.
    """

    def run(name: str, inputs):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        wrt = [t for t in inputs if t.requires_grad]
        output = call(name, *inputs)
        if not wrt:
            return [output]
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=generator).to(tensors[0].dtype).to(output)
        return [output.detach(), *torch.autograd.grad(output, wrt, grad)]

    got, factors = run(backend, tensors), [FORWARD_FACTOR] + [GRADIENT_FACTOR] * len(tensors)
    draws = [tensors, *([_shuffled(t, seed) for t in tensors] for seed in range(7))]
    eager, exact = (
        [run("reference", draw) for draw in group] for group in (draws, [[t.double() for t in d] for d in draws])
    )
    for index, (ours, wanted, factor) in enumerate(zip(got, exact[0], factors)):
        assert (ours.shape, ours.dtype) == (eager[0][index].shape, eager[0][index].dtype)
        if not wanted.numel():
            continue
        low = max((e[index].double() - w[index]).abs().max().item() for e, w in zip(eager, exact))
        error = (ours.double() - wanted).abs().max().item()
        budget = factor * low + torch.finfo(ours.dtype).eps * wanted.abs().max().item()
        assert error <= budget, f"result {index}: error {error:.3e}, budget {budget:.3e}"


def _shuffled(tensor: Tensor, seed: int) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    return tensor.detach().flatten()[order].view(tensor.shape).requires_grad_(tensor.requires_grad)
