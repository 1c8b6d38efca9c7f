"""Tensors that reach past 2**31 elements: every offset is 64 bits wide."""

from __future__ import annotations

import pytest
import torch
from conformance import Shape, case_and_backend, device_of, require, run

BEYOND = 2**31


def _free_gigabytes() -> float:
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":") for line in file)
    return int(facts["MemAvailable"].split()[0]) / 2**20


@pytest.fixture(scope="module")
def ocean():
    """Over 2**31 bfloat16 numbers of which few pages are ever touched."""
    try:
        free = _free_gigabytes()
    except OSError:
        pytest.skip("no /proc/meminfo to ask for free memory")
    if free < 8:
        pytest.skip(f"{free:.1f} GB of free memory, 8 wanted")
    return torch.empty(BEYOND + 2**27, dtype=torch.bfloat16)


STRIDES = {  # of a (1, 2, 5, 8) tensor
    "batch and heads": lambda: (1, BEYOND + 64, 16, 1),
    "tokens": lambda: (0, 8, BEYOND // 4 + 64, 1),
    "channels": lambda: (0, 8 * 5, 8, BEYOND // 7 + 64),
}


@case_and_backend(without=("reference",))
@pytest.mark.parametrize("which", STRIDES)
def test_strides_past_two_to_the_31_elements(case, backend, which, ocean):
    require(case.op, backend)
    if device_of(backend) != "cpu":
        pytest.skip("the ocean is on the CPU")
    shape = Shape(batch=1, heads=2, grid=(2, 2), prefix=1, head_dim=8, gaussians=2)
    tensors, options = case.tensors(shape, torch.bfloat16), case.options(shape)
    grad_output = case.grad_output(shape, torch.bfloat16)
    far = dict(tensors)
    for offset, name in enumerate(("query", "key", "value")):
        stride = STRIDES[which]()
        view = ocean.as_strided(tensors[name].shape, stride, 4096 * offset)
        last = 4096 * offset + sum((size - 1) * step for size, step in zip(view.shape, stride))
        assert last >= BEYOND or tensors[name].shape[1] == 1  # one key head has no second to lie far away
        far[name] = view.copy_(tensors[name])
    got, wanted = (run(case, given, options, backend, grad_output) for given in (far, tensors))
    assert torch.equal(got.output, wanted.output)
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, wanted.gradients[name]), name


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_weight_past_two_to_the_31_elements(backend, ocean):
    import effattn

    require("masked_product_attention", backend)
    if device_of(backend) != "cpu":
        pytest.skip("the ocean is on the CPU")
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.bfloat16)
    weight = torch.randn(2, 5, 5, dtype=torch.bfloat16)
    far = ocean.as_strided((2, 5, 5), (BEYOND + 1000, 100, 1)).copy_(weight)
    got, wanted = (effattn.masked_product_attention(query, key, value, w, backend=backend) for w in (far, weight))
    assert torch.equal(got, wanted)
