"""The Triton kernels of Manhattan attention, run (by Triton's interpreter where there is no GPU) against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from conformance import assert_within_budget
from effattn.triton_kernels import cross_shaped_window as windows
from effattn.triton_kernels import local_enhancement

import effattn
from effattn import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_empty")]


class Call:
    """A call as the accuracy rule runs it."""

    def __init__(self, differentiable):
        self.differentiable = tuple(differentiable)

    def __call__(self, tensors, options, backend):
        return effattn.manhattan_attention(**tensors, **options, backend=backend)


def draw(grid, seed=0, *, dtype=torch.float32, batch=1, heads=2, head_dim=6, prefix=0, taps=0, bias=True):
    """The tensors of a call, by name, and a gradient of its output."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    size = (batch, heads, prefix + grid[0] * grid[1], head_dim)
    tensors = {name: random(*size, dtype=dtype) for name in ("query", "key", "value")}
    tensors["log_decay"] = -random(heads).abs()
    if taps:
        tensors["lce_weight"] = random(heads * head_dim, 1, taps, taps) / taps
        if bias:
            tensors["lce_bias"] = random(heads * head_dim)
    return tensors, random(*size, dtype=dtype)


def differentiate(call, tensors, options, grad_output):
    """{"output": ..., name: gradient}"""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    output = call(**leaves, **options)
    return {
        "output": output.detach(),
        **dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad_output))),
    }


def run(tensors, grad_output, **options):
    return differentiate(effattn.manhattan_attention, tensors, {"backend": "triton", **options}, grad_output)


@pytest.mark.parametrize(
    ("grid", "sizes", "options"),
    [
        ((3, 5), {"batch": 2, "prefix": 2, "taps": 3}, {}),
        ((3, 11), {"dtype": torch.bfloat16, "heads": 1, "taps": 5, "prefix": 1}, {"decay": "weights"}),  # several tiles
        ((5, 3), {"dtype": torch.float16, "head_dim": 17, "taps": 1, "bias": False}, {"scale": 0.4}),
        ((1, 7), {"dtype": torch.bfloat16, "prefix": 3}, {}),
        ((3, 2), {"dtype": torch.bfloat16, "heads": 1, "taps": 5}, {"decomposed": True}),
        ((1, 3), {"heads": 1, "taps": 3, "bias": False}, {"decomposed": True, "decay": "weights"}),
    ],
    ids=["prefix", "weights-prefix-tiles", "whole", "one-row", "decomposed", "decomposed-weights"],
)
def test_it_equals_the_reference(grid, sizes, options):
    options = {"grid": grid, "num_prefix_tokens": sizes.get("prefix", 0), **options}

    def drawn(seed):
        tensors, grad_output = draw(grid, seed, **sizes)
        return tensors, options, grad_output

    assert_within_budget(Call(drawn(0)[0]), drawn, "triton")


@pytest.mark.parametrize("decay", ["logits", "weights"])
def test_a_memory_of_nothing_leaves_each_grid_token_to_itself(decay):
    grid, heads = (2, 3), 2
    tensors, grad_output = draw(grid, heads=heads)
    tensors["log_decay"] = torch.full((heads,), float("-inf"), device=DEVICE)
    got = run(tensors, grad_output, grid=grid, decay=decay)
    if decay == "logits":
        own = torch.ones_like(tensors["value"][..., :1])
    else:
        scores = tensors["query"] @ tensors["key"].mT * tensors["query"].shape[3] ** -0.5
        own = scores.softmax(-1).diagonal(dim1=-2, dim2=-1)[..., None]
    torch.testing.assert_close(got["output"], own * tensors["value"])
    torch.testing.assert_close(got["value"], own * grad_output)
    assert torch.equal(got["log_decay"], torch.zeros(heads, device=DEVICE))
    assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("decay", ["logits", "weights"])
def test_without_a_grid_the_prefix_tokens_attend_to_each_other(decay):
    tensors, grad_output = draw((0, 4), prefix=3, taps=3)
    options = {"grid": (0, 4), "num_prefix_tokens": 3, "decay": decay}
    got = run(tensors, grad_output, **options)
    expected = differentiate(reference.manhattan_attention, tensors, options, grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- how the work is divided


def test_sums_of_the_decay_gradient_may_be_made_a_few_rows_and_heads_at_a_time(monkeypatch):
    grid, prefix = (4, 2), 2
    tensors, grad_output = draw(grid, heads=3, prefix=prefix)
    options = {"grid": grid, "num_prefix_tokens": prefix}
    expected = run(tensors, grad_output, **options)
    sums = []
    monkeypatch.setattr(windows, "_sums", lambda *_: sums.append((3, 2, 1)) or sums[-1])
    got = run(tensors, grad_output, **options)
    assert sums
    torch.testing.assert_close(got["log_decay"], expected["log_decay"])


def test_sums_of_the_decay_gradient_of_a_large_grid_take_less_than_the_output():
    query = torch.empty(8, 4, 1 + 128 * 128, 32, dtype=torch.bfloat16, device="meta")
    geometry = windows._geometry(*(128,) * 6, 0, 0, 0, 0, 1)
    band, group, splits = windows._sums(query, geometry, windows.tuned.C(64, 64, 4, 1))
    assert 4 * band * group * splits * 128 * windows._row_stride(geometry) <= query.nbytes // 2
    assert 1 <= band < 128


# ---------------------------------------------------------------- local enhancement


def enhance(value, weight, bias, attention, grid, prefix):
    from effattn.ops.manhattan import local_enhancement as operator

    heads, head_dim = value.shape[1::2]
    taps = weight.reshape(heads, head_dim, -1)
    bias = None if bias is None else bias.view(heads, head_dim)
    return operator("triton", attention, value, taps, bias, *grid, prefix, weight.shape[2])


@pytest.mark.parametrize(
    ("taps", "grid", "prefix", "chunks"), [(9, (2, 3), 1, 512), (5, (6, 7), 0, 512), (3, (9, 11), 2, 2)]
)
def test_any_odd_window_and_any_strides_of_the_convolution(taps, grid, prefix, chunks, monkeypatch):
    monkeypatch.setattr(local_enhancement, "CHUNKS", chunks)
    tensors, grad_output = draw(grid, batch=2 if taps == 3 else 1, heads=1, head_dim=16, prefix=prefix, taps=taps)
    value, attention = tensors["value"].transpose(1, 2).contiguous().transpose(1, 2), tensors["query"]
    leaves = {"value": value, "weight": tensors["lce_weight"], "bias": tensors["lce_bias"], "attention": attention}
    options = {"grid": grid, "prefix": prefix}
    grad_output = grad_output[:1, :, :1].expand_as(grad_output)
    got = differentiate(enhance, leaves, options, grad_output)

    def specification(value, weight, bias, attention, grid, prefix):
        return attention + reference.local_enhancement(value, grid, prefix, weight, bias)

    expected = differentiate(specification, {n: t.double() for n, t in leaves.items()}, options, grad_output.double())
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor, atol=2e-5, rtol=2e-5)
