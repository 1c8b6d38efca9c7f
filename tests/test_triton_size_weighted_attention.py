"""The Triton kernels of attention with sizes, run (by Triton's interpreter where there is no GPU): the gradient of the sizes."""

import pytest
import torch

pytest.importorskip("triton")

from conformance import RecordedCalls, assert_within_budget

import effattn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_empty")]


class Call:
    differentiable = ("query", "key", "value", "sizes")

    def __call__(self, tensors, options, backend):
        return effattn.size_weighted_attention(**tensors, **options, backend=backend)


def draw(queries, keys, *, dtype=torch.float32, batch=2, heads=2, head_dim=6, seed=0):
    """The tensors of a call by name, of which some sizes are 0, and a gradient of its output."""
    generator = torch.Generator().manual_seed(seed)
    query, grad = torch.randn(2, batch, heads, queries, head_dim, generator=generator).to(dtype).to(DEVICE)
    key, value = torch.randn(2, batch, heads, keys, head_dim, generator=generator).to(dtype).to(DEVICE)
    sizes = 0.5 + 4 * torch.rand(batch, keys, generator=generator).to(DEVICE)
    sizes[:, 2::5] = 0
    return {"query": query, "key": key, "value": value, "sizes": sizes}, grad


def run(tensors, grad):
    """{"output": ..., name: gradient}"""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    output = effattn.size_weighted_attention(**leaves, backend="triton")
    return {"output": output, **dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad)))}


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (67, 70, {"heads": 3}),  # several tiles of both, the last ones ragged
        (5, 130, {"batch": 3, "heads": 1, "dtype": torch.bfloat16}),  # more sizes than one program adds up
        (70, 1, {"dtype": torch.float16, "head_dim": 1}),
        (2, 67, {"head_dim": 80, "batch": 1}),
    ],
    ids=["tiles", "keys", "one-key", "head_dim-80"],
)
def test_it_equals_the_reference(queries, keys, options):
    def drawn(seed):
        tensors, grad = draw(queries, keys, seed=seed, **options)
        if keys == 1:
            tensors["sizes"][:] = 2.0
        return tensors, {}, grad

    assert_within_budget(Call(), drawn, "triton")


def test_a_size_of_zero_has_no_gradient_and_an_image_without_keys_gives_zeros():
    tensors, grad = draw(35, 40)
    tensors["sizes"][0] = 0
    found = run(tensors, grad)
    for name, tensor in found.items():
        assert (tensor[0] == 0).all(), name
        assert tensor.isfinite().all(), name
    there = tensors["sizes"][1] > 0
    assert (found["sizes"][1, there] != 0).all()
    for gradient in (found["key"][1], found["value"][1]):
        assert (gradient[:, ~there] == 0).all()


def test_sizes_that_require_no_gradient_cost_nothing():
    tensors, grad = draw(35, 40, batch=1)
    leaves = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
    with RecordedCalls() as recorded:
        out = effattn.size_weighted_attention(*leaves, tensors["sizes"], backend="triton")
        torch.autograd.grad(out, leaves, grad)
    op, args = recorded.calls[-1]
    assert op is torch.ops.effattn_triton.size_weighted_attention_bwd.default
    assert args[-1] is False
    assert torch.equal(op(*args)[3], torch.zeros(1, 40, device=DEVICE))
    assert (op(*args[:-1], True)[3] != 0).any()


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)]
)
def test_empty_inputs(batch, heads, queries, keys):
    tensors, grad = draw(queries, keys, batch=batch, heads=heads)
    for name, tensor in run(tensors, grad).items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name
