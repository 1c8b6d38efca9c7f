"""Linear angular attention with binary queries and keys: gradients by hand, degenerate rows, traps, the SDPA mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import backends_of, device_of, formulas, is_slow, require

import effattn
from effattn import ShiftAdd, shift_add_attention

MODES = ("published", "mean_threshold", "per_head", "sign")
BACKENDS = pytest.mark.parametrize("backend", backends_of("shift_add_attention"))
KERNELS = pytest.mark.parametrize("backend", [b for b in backends_of("shift_add_attention") if b != "reference"])


def normalised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0), norm


def gradients_by_hand(query, key, value, weight, grad, mode) -> dict[str, np.ndarray]:
    """The straight-through gradients, written out one (batch, head) at a time in NumPy."""
    bits_q, bits_k = (formulas._bits(x, mode) for x in (query, key))
    out = {"query": np.zeros_like(query), "key": np.zeros_like(query), "value": np.zeros_like(query)}
    out["weight"] = np.zeros_like(weight)
    taps, tokens = weight.shape[2], query.shape[2]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            v, g, bq, bk = value[b, h], grad[b, h], bits_q[b, h], bits_k[b, h]
            u = 0.5 * v + bq @ (bk.T @ v) / np.pi
            r, length = normalised(u)
            du = np.divide(g - r * (r * g).sum(-1, keepdims=True), length, out=np.zeros_like(g), where=length > 0)
            out["value"][b, h] = 0.5 * du + bk @ (bq.T @ du) / np.pi
            for t in range(taps):
                for n in range(tokens):
                    m = n + t - taps // 2
                    if 0 <= m < tokens:
                        out["value"][b, h, m] += weight[h, 0, t, 0] * g[n]
                        out["weight"][h, 0, t, 0] += g[n] @ v[m]
            for name, x, d_unit in (
                ("query", query[b, h], du @ (bk.T @ v).T / np.pi),
                ("key", key[b, h], v @ (bq.T @ du).T / np.pi),
            ):
                unit, norm = normalised(x)
                d_unit = d_unit * (unit >= (-1.0 if mode == "sign" else 0.0))
                tangent = d_unit - unit * (unit * d_unit).sum(-1, keepdims=True)
                out[name][b, h] = np.divide(tangent, norm, out=np.zeros_like(tangent), where=norm > 0)
    return out


@BACKENDS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3, 13, 8), (1, 1, 70, 33)], ids=str)
def test_gradients_are_those_of_the_straight_through_rule(backend, mode, shape):
    require("shift_add_attention", backend)
    if is_slow(backend) and shape[2] > 20 and mode != "per_head":
        pytest.skip("slow here")
    query, key, value, grad = np.random.default_rng(0).standard_normal((4, *shape))
    query[0, 0, 2] = key[0, 0, 3] = 0.0
    weight = np.random.default_rng(1).standard_normal((shape[1], 1, 5, 1))
    dtype = torch.float64 if backend == "reference" else torch.float32
    device = device_of(backend)
    leaves = [torch.from_numpy(x).to(dtype).to(device).requires_grad_() for x in (query, key, value, weight)]
    output = shift_add_attention(*leaves[:3], binarize=mode, residual_weight=leaves[3], backend=backend)
    np.testing.assert_allclose(
        output.detach().cpu().numpy(), formulas.shift_add_attention(query, key, value, mode, weight), atol=1e-5
    )
    got = torch.autograd.grad(output, leaves, torch.from_numpy(grad).to(dtype).to(device))
    wanted = gradients_by_hand(query, key, value, weight, grad, mode)
    tolerance = 1e-10 if backend == "reference" else 2e-4
    for gradient, (name, by_hand) in zip(got, wanted.items()):
        error = np.abs(gradient.cpu().numpy() - by_hand).max()
        assert error <= tolerance * max(1.0, np.abs(by_hand).max()), (name, error)


@BACKENDS
@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_give_numbers_and_no_gradient(backend, mode):
    require("shift_add_attention", backend)
    query, key, value = (t.requires_grad_() for t in torch.zeros(3, 1, 2, 6, 8, device=device_of(backend)))
    output = shift_add_attention(query, key, value, binarize=mode, backend=backend)
    assert torch.equal(output, torch.zeros_like(output))
    for gradient in torch.autograd.grad(output, (query, key, value), torch.ones_like(output)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@KERNELS
@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e12, 1e18])
def test_size_of_queries_and_keys_does_not_matter(backend, size):
    require("shift_add_attention", backend)
    query, key, value = torch.randn(3, 1, 2, 9, 8, device=device_of(backend))
    for mode in MODES[:1] if is_slow(backend) else MODES:
        got = shift_add_attention(query * size, key * size, value, binarize=mode, backend=backend)
        torch.testing.assert_close(got, shift_add_attention(query, key, value, binarize=mode, backend=backend))


@BACKENDS
def test_published_statistics_depend_on_the_batch_and_per_head_ones_do_not(backend):
    """The trap of the published code: the mean is taken over the whole tensor."""
    require("shift_add_attention", backend)
    query, key, value = torch.randn(3, 2, 2, 9, 8, device=device_of(backend))
    query[1] = query[1].exp()  # other statistics than the first sample
    for mode, mixed in zip(MODES, (True, True, False, False)):
        together = shift_add_attention(query, key, value, binarize=mode, backend=backend)[:1]
        alone = shift_add_attention(query[:1], key[:1], value[:1], binarize=mode, backend=backend)
        assert torch.allclose(together, alone, atol=1e-6) != mixed, mode


def test_published_formula_as_its_authors_write_it():
    """Their code in float64, whose only differences are NaN for zero rows and rounding in b - c + c."""
    query, key, value = torch.randn(3, 2, 3, 12, 16, dtype=torch.float64)
    weight = torch.randn(3, 1, 9, 1, dtype=torch.float64)

    def bits(x):
        x = x / x.norm(dim=-1, keepdim=True)
        return torch.gt(x, 0) * (x.norm(p=1) / x.nelement())

    total = 0.5 * value + 1.0 / np.pi * bits(query) @ (bits(key).transpose(-2, -1) @ value)
    wanted = total / total.norm(dim=-1, keepdim=True) + F.conv2d(value, weight, padding=(4, 0), groups=3)
    torch.testing.assert_close(shift_add_attention(query, key, value, residual_weight=weight), wanted)


@BACKENDS
def test_residual_is_a_depthwise_convolution_over_tokens(backend):
    require("shift_add_attention", backend)
    query, key, value = torch.randn(3, 2, 3, 7, 4, device=device_of(backend))
    plain = shift_add_attention(query, key, value, backend=backend)
    for taps in (1, 3, 9, 15):  # the last is longer than the sequence
        weight = torch.randn(3, 1, taps, 1, device=value.device)
        got = shift_add_attention(query, key, value, residual_weight=weight, backend=backend)
        torch.testing.assert_close(got - plain, F.conv2d(value, weight, padding=(taps // 2, 0), groups=3))


@BACKENDS
def test_mask_runs_in_the_stock_function(backend, monkeypatch):
    require("shift_add_attention", backend)
    monkeypatch.setenv("EFFATTN_BACKEND", backend)
    query, key, value = torch.randn(3, 1, 2, 6, 8, device=device_of(backend))
    weight = torch.randn(2, 1, 3, 1, device=value.device, requires_grad=True)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=ShiftAdd("sign", weight))
    assert torch.equal(got, shift_add_attention(query, key, value, binarize="sign", residual_weight=weight))
    got.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_mask_refuses_what_has_nothing_to_act_on():
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=ShiftAdd(), dropout_p=0.5)
    with pytest.raises(ValueError, match="scale must be None"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=ShiftAdd(), scale=1.0)
    with pytest.raises(ValueError, match="binarize must be one of"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=ShiftAdd("ternary"))
    with pytest.raises(NotImplementedError, match="no dense form"):
        ShiftAdd().dense()
    assert repr(ShiftAdd("sign", torch.ones(2, 1, 9, 1))) == "ShiftAdd(binarize='sign', residual_weight=(2, 1, 9, 1))"


def test_explain_names_the_backends():
    query = torch.randn(1, 2, 6, 8)
    explanation = effattn.explain(F.scaled_dot_product_attention, query, query, query, attn_mask=ShiftAdd())
    assert [v.backend for v in explanation.verdicts] == ["cpu", "cuda", "triton", "reference"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_not_a_number_in_a_key_is_no_zero_in_the_output(backend):
    query, key, value = torch.randn(3, 1, 2, 3, 4)
    key[0, 0, 1, 2] = float("nan")
    given = effattn.shift_add_attention(query, key, value, binarize="per_head", backend=backend)
    assert given[0, 0].isnan().all()
    assert given[0, 1].isfinite().all()
