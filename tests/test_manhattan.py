"""What is particular to Manhattan attention: its degenerate decays, the decomposed form, LCE, prefix tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conformance import assert_within_budget, backends_of, device_of, is_slow, require, run
from test_retention import Call

import effattn
from effattn import reference

BACKENDS = pytest.mark.parametrize("backend", backends_of("manhattan_attention"))
DECAY = pytest.mark.parametrize("decay", ["logits", "weights"])
GRID = (4, 5)


def draw(backend, seed=0, *, batch=2, heads=2, grid=GRID, prefix=0, head_dim=8, dtype=torch.float32):
    require("manhattan_attention", backend)
    generator = torch.Generator().manual_seed(seed)
    size = (batch, heads, prefix + grid[0] * grid[1], head_dim)
    tensors = {n: torch.randn(size, generator=generator).to(dtype) for n in ("query", "key", "value")}
    tensors["log_decay"] = -torch.exp2(-3 * torch.rand(heads, generator=generator))
    return {n: t.to(device_of(backend)) for n, t in tensors.items()}


def gradients(backend, tensors, options, grad=None):
    call = Call(effattn.manhattan_attention, tuple(tensors))
    return run(call, tensors, options, backend, torch.ones_like(tensors["value"]) if grad is None else grad)


@BACKENDS
@DECAY
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_decay_of_zero_is_plain_attention(backend, decay, prefix):
    tensors = {**draw(backend, prefix=prefix), "log_decay": torch.zeros(2, device=device_of(backend))}
    got = effattn.manhattan_attention(**tensors, grid=GRID, decay=decay, num_prefix_tokens=prefix, backend=backend)
    wanted = F.scaled_dot_product_attention(*(tensors[n] for n in ("query", "key", "value")))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("decomposed", [False, True])
def test_decay_of_minus_infinity_leaves_the_token_itself(backend, decomposed):
    if is_slow(backend) and decomposed:
        pytest.skip("interpreters are slow")
    tensors = {**draw(backend), "log_decay": torch.full((2,), -math.inf, device=device_of(backend))}
    got = gradients(backend, tensors, {"grid": GRID, "decomposed": decomposed})
    torch.testing.assert_close(got.output, tensors["value"])
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())
    assert torch.equal(got.gradients["log_decay"], torch.zeros(2, device=device_of(backend)))
    weighed = gradients(backend, tensors, {"grid": GRID, "decomposed": decomposed, "decay": "weights"})
    assert weighed.output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in weighed.gradients.values())


@BACKENDS
@DECAY
def test_decomposed_is_the_composition_of_two_one_dimensional_calls(backend, decay):
    if is_slow(backend) and decay == "weights":
        pytest.skip("interpreters are slow")
    tensors, (height, width) = draw(backend), GRID
    got = effattn.manhattan_attention(**tensors, grid=GRID, decomposed=True, decay=decay, backend=backend)

    def along(values, transposed):
        """Every row, or column, of the grid is a batch element of one line of tokens."""

        def lines(t):
            t = t.unflatten(2, GRID)
            return (t.transpose(2, 3) if transposed else t).permute(0, 2, 1, 3, 4).flatten(0, 1)

        length, count = (height, width) if transposed else (width, height)
        out = effattn.manhattan_attention(
            *(lines(t) for t in (tensors["query"], tensors["key"], values)),
            tensors["log_decay"],
            (1, length),
            decay=decay,
            backend=backend,
        )
        out = out.unflatten(0, (-1, count)).permute(0, 2, 1, 3, 4)
        return (out.transpose(2, 3) if transposed else out).flatten(2, 3)

    torch.testing.assert_close(got, along(along(tensors["value"], False), True), rtol=1e-5, atol=1e-6)


@BACKENDS
def test_full_decay_on_logits_is_a_dense_mask_of_stock_attention(backend):
    tensors = draw(backend, prefix=1)
    mask = tensors["log_decay"][:, None, None] * reference.manhattan_distance(GRID, 1, device_of(backend))
    got = effattn.manhattan_attention(**tensors, grid=GRID, num_prefix_tokens=1, backend=backend)
    wanted = F.scaled_dot_product_attention(*(tensors[n] for n in ("query", "key", "value")), attn_mask=mask)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_decay_of_weights_does_not_renormalise(backend):
    tensors = draw(backend)
    tensors["value"] = torch.ones_like(tensors["value"])
    got = effattn.manhattan_attention(**tensors, grid=GRID, decay="weights", backend=backend)
    assert (got < 1).all()
    assert (got.amax() - got.amin()) > 0.05


@BACKENDS
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("prefix", [0, 2])
def test_enhancement_is_the_depthwise_convolution_of_the_grid(backend, size, prefix):
    if is_slow(backend) and size > 3:
        pytest.skip("interpreters are slow")
    tensors = draw(backend, prefix=prefix)
    weight, bias = torch.randn(16, 1, size, size), torch.randn(16)
    weight, bias = weight.to(device_of(backend)), bias.to(device_of(backend))
    options = {"grid": GRID, "num_prefix_tokens": prefix, "backend": backend}
    without = effattn.manhattan_attention(**tensors, **options)
    got = effattn.manhattan_attention(**tensors, **options, lce_weight=weight, lce_bias=bias) - without
    images = tensors["value"][:, :, prefix:].mT.reshape(2, 16, *GRID)
    wanted = F.conv2d(images, weight, bias, padding=size // 2, groups=16).view(2, 2, 8, -1).mT
    torch.testing.assert_close(got[:, :, prefix:], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[:, :, :prefix], torch.zeros_like(got[:, :, :prefix]))


CASES = {
    "full, prefix, LCE": {"prefix": 2, "lce": 5},
    "full, weights": {"decay": "weights", "prefix": 1},
    "decomposed, LCE of 3": {"decomposed": True, "lce": 3},
    "decomposed, weights": {"decomposed": True, "decay": "weights"},
    "one row": {"grid": (1, 17), "decomposed": True},
    "one column": {"grid": (17, 1), "lce": 5},
    "wide": {"grid": (3, 40), "decomposed": True, "lce": 5},
    "stage 4 of RMT": {"grid": (7, 7), "lce": 5, "head_dim": 32},
    "stage 1 of RMT": {"grid": (28, 28), "decomposed": True, "lce": 5, "head_dim": 16, "batch": 1},
    "detection": {"grid": (25, 42), "head_dim": 32, "batch": 1},
}


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient_are_within_the_rule(backend, dtype, name):
    case = {"grid": GRID, "prefix": 0, "lce": 0, "head_dim": 8, "batch": 2, **CASES[name]}
    if is_slow(backend):
        pytest.skip("interpreters are slow, and have tests/test_triton_manhattan.py")
    sizes = {n: case.pop(n) for n in ("prefix", "head_dim", "batch")}
    lce, options = case.pop("lce"), {**case, **({"num_prefix_tokens": sizes["prefix"]} if sizes["prefix"] else {})}

    def sample(seed):
        tensors = draw(backend, seed, grid=case["grid"], dtype=dtype, **sizes)
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(tensors["value"].shape, generator=generator).to(tensors["value"])
        if lce:
            channels = 2 * sizes["head_dim"]
            parameters = {"lce_weight": torch.randn(channels, 1, lce, lce, generator=generator) / lce}
            parameters["lce_bias"] = torch.randn(channels, generator=generator)
            tensors |= {n: t.to(device_of(backend)) for n, t in parameters.items()}
        return tensors, options, grad

    call = Call(effattn.manhattan_attention, tuple(sample(0)[0]))
    assert_within_budget(call, sample, backend)


@BACKENDS
def test_only_enhancement_trains_when_nothing_else_does(backend):
    tensors = draw(backend)
    weight = torch.randn(16, 1, 5, 5, device=device_of(backend), requires_grad=True)
    out = effattn.manhattan_attention(**tensors, grid=GRID, lce_weight=weight, backend=backend)
    (got,) = torch.autograd.grad(out.sum(), weight)
    images = tensors["value"].mT.reshape(2, 16, *GRID)
    wanted = torch.autograd.grad(F.conv2d(images, weight, padding=2, groups=16).sum(), weight)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_local_enhancement_of_no_heads():
    query = torch.randn(2, 0, 4, 3)
    weight, log_decay = torch.randn(0, 1, 5, 5), torch.zeros(0)
    given = effattn.manhattan_attention(query, query, query, log_decay, (2, 2), lce_weight=weight, backend="cpu")
    assert given.shape == query.shape
