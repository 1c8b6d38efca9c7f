"""Products with operands of one bit per element: packing, MatAdd, popcount products, Hamming attention."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conformance import device_of, is_slow, require
from hypothesis import given
from hypothesis import strategies as st
from linear_like import KERNELS, assert_close_enough, layouts_of

import effattn
from effattn import add_matmul, binary_matmul, hamming_attention, pack_signs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = ("binary", "sign")


def everywhere(op: str, reference: bool = True):
    return pytest.mark.parametrize("backend", [*KERNELS[op], *(["reference"] if reference else [])])


def op_of(name: str):
    module = sys.modules["effattn.ops.packed_bits"]
    return getattr(module, f"{name}_op", None) or getattr(module, name)


def random_bits(*shape: int, seed: int = 0, garbage: bool = True) -> tuple[torch.Tensor, np.ndarray]:
    """(packed words, 0/1 array); the bits beyond the last element are random, for nobody may look at them."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2, shape)
    *rows, length = shape
    words = (length + 31) // 32
    filled = generator.integers(0, 2 if garbage else 1, (*rows, 32 * words))
    filled[..., :length] = bits
    packed = (filled.reshape(*rows, words, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
    return torch.from_numpy(packed.astype(np.uint32)), bits


def as_values(bits: np.ndarray, values: str) -> np.ndarray:
    return 2 * bits - 1 if values == "sign" else bits


# ---- packing ----


@everywhere("pack_signs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5,), (3, 32), (2, 3, 4, 33), (2, 1, 3, 2, 64), (1, 257), (0, 40), (3, 0), (70, 1)], ids=str
)
def test_bit_i_of_word_w_is_the_sign_of_an_element(backend, dtype, shape):
    require("pack_signs", backend)
    x = torch.randn(shape).to(dtype)
    if x.numel() > 3:
        x.view(-1)[:4] = torch.tensor([0.0, -0.0, float("nan"), 1e-7]).to(dtype)
    packed = pack_signs(x.to(device_of(backend)), backend=backend).cpu()
    assert packed.dtype == torch.uint32
    assert packed.shape == (*shape[:-1], (shape[-1] + 31) // 32)
    words = packed.numpy()
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    bits = bits.reshape(*shape[:-1], 32 * words.shape[-1])
    assert (bits[..., : shape[-1]] == (x.float().numpy() > 0)).all()
    assert not bits[..., shape[-1] :].any()


@everywhere("pack_signs", reference=False)
def test_packing_takes_any_strides(backend):
    require("pack_signs", backend)
    x = torch.randn(2, 3, 6, 40, device=device_of(backend))
    for view in (x.transpose(1, 2), x.mT, x[..., 1::2], x[:, :1].expand(2, 4, 6, 40), *layouts_of(x)):
        assert torch.equal(pack_signs(view, backend=backend), pack_signs(view.contiguous(), backend="reference"))


# ---- MatAdd ----

MATRICES = (
    ((), 3, 5, 4),
    ((), 1, 64, 33),
    ((2,), 9, 100, 17),
    ((2, 3), 40, 33, 8),
    ((), 70, 257, 65),
    ((1,), 8, 31, 130),
)


@everywhere("add_matmul")
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_add_matmul_sums_the_rows_that_bits_select(backend, values, shape):
    require("add_matmul", backend)
    batch, m, k, n = shape
    packed, bits = random_bits(*batch, m, k)
    dense = torch.randn(*batch, k, n)
    device = device_of(backend)
    got = add_matmul(packed.to(device), dense.to(device), values=values, backend=backend).cpu()
    wanted = as_values(bits, values).astype(float) @ dense.double().numpy()
    np.testing.assert_allclose(got.double().numpy(), wanted, rtol=1e-5, atol=1e-4)


@everywhere("add_matmul", reference=False)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_add_matmul_keeps_the_accuracy_rule(backend, dtype, values):
    require("add_matmul", backend)
    for batch, m, k, n in MATRICES[1:4] if is_slow(backend) else MATRICES:
        packed, _ = random_bits(*batch, m, k)
        packed = packed.to(device_of(backend))
        dense = torch.randn(*batch, k, n).to(dtype).to(packed.device).requires_grad_()
        assert_close_enough(lambda b, x, p=packed: add_matmul(p, x, values=values, backend=b), backend, dense)


@everywhere("add_matmul", reference=False)
def test_add_matmul_takes_any_strides(backend):
    require("add_matmul", backend)
    packed, _ = random_bits(2, 6, 40)
    packed = packed.to(device_of(backend))
    dense = torch.randn(2, 40, 12, device=packed.device)
    for view in (*layouts_of(dense), dense[:1].expand(2, 40, 12)):
        got = add_matmul(packed, view, backend=backend)
        assert torch.equal(got, add_matmul(packed, view.contiguous(), backend=backend))
    every_other = packed.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(add_matmul(every_other, dense, backend=backend), add_matmul(packed, dense, backend=backend))


@everywhere("add_matmul")
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1)], ids=str)
def test_add_matmul_of_empty_matrices(backend, shape):
    require("add_matmul", backend)
    m, k, n = shape
    packed, _ = random_bits(m, k)
    device = device_of(backend)
    dense = torch.randn(k, n, device=device, requires_grad=True)
    output = add_matmul(packed.to(device), dense, backend=backend)
    assert output.shape == (m, n)
    if k == 0:
        assert (output == 0).all()
    output.sum().backward()
    assert dense.grad.shape == (k, n)


@given(
    batch=st.integers(1, 3), m=st.integers(0, 50), k=st.integers(0, 140), n=st.integers(0, 80),
    values=st.sampled_from(VALUES), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_add_matmul_on_the_cpu_over_shapes(batch, m, k, n, values, dtype, seed):
    require("add_matmul", "cpu")
    packed, _ = random_bits(batch, m, k, seed=seed)
    dense = torch.randn(batch, k, n, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    assert_close_enough(lambda b, x: add_matmul(packed, x, values=values, backend=b), "cpu", dense)


# ---- both operands of bits ----


@everywhere("binary_matmul")
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    "shape", [((), 3, 4, 5), ((2,), 17, 9, 64), ((2, 3), 5, 33, 100), ((), 70, 66, 257), ((), 1, 1, 1)], ids=str
)
def test_binary_matmul_counts_exactly(backend, values, shape):
    require("binary_matmul", backend)
    batch, m, n, length = shape
    (left, a), (right, b) = random_bits(*batch, m, length), random_bits(*batch, n, length, seed=1)
    device = device_of(backend)
    got = binary_matmul(left.to(device), right.to(device), length, values=values, backend=backend)
    assert got.dtype == torch.int32
    assert (got.cpu().numpy() == as_values(a, values) @ as_values(b, values).swapaxes(-1, -2)).all()


@everywhere("binary_matmul")
@pytest.mark.parametrize("shape", [(0, 3, 40), (3, 0, 40), (3, 4, 0)], ids=str)
def test_binary_matmul_of_empty_matrices(backend, shape):
    require("binary_matmul", backend)
    m, n, length = shape
    (left, _), (right, _) = random_bits(m, length), random_bits(n, length)
    device = device_of(backend)
    got = binary_matmul(left.to(device), right.to(device), length, backend=backend)
    assert got.shape == (m, n)
    assert (got == 0).all()


@given(
    m=st.integers(0, 90), n=st.integers(0, 90), length=st.integers(0, 300), values=st.sampled_from(VALUES),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_binary_matmul_on_the_cpu_over_shapes(m, n, length, values, seed):
    require("binary_matmul", "cpu")
    (left, a), (right, b) = random_bits(m, length, seed=seed), random_bits(n, length, seed=seed + 1)
    got = binary_matmul(left, right, length, values=values, backend="cpu")
    assert (got.numpy() == as_values(a, values) @ as_values(b, values).T).all()


# ---- Hamming attention ----


def softmax_attention(q: np.ndarray, k: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    output = np.zeros((*q.shape[:3], value.shape[3]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = scale * (q[b, h] @ k[b, h].T)
            if logits.shape[1]:
                weights = np.exp(logits - logits.max(1, keepdims=True))
                output[b, h] = weights / weights.sum(1, keepdims=True) @ value[b, h]
    return output


HAMMING = (
    (2, 3, 9, 21, 16, 8),
    (1, 2, 33, 17, 64, 64),
    (1, 1, 5, 70, 100, 3),
    (1, 1, 1, 1, 1, 1),
    (1, 1, 20, 300, 256, 80),
)


@everywhere("hamming_attention")
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", [*HAMMING, (1, 1, 4, 0, 32, 8), (1, 1, 0, 4, 32, 8), (0, 1, 4, 4, 32, 8)], ids=str)
def test_hamming_attention_is_the_formula(backend, values, shape):
    require("hamming_attention", backend)
    if is_slow(backend) and shape[2] * shape[3] > 2000:
        pytest.skip("slow here")
    batch, heads, n, m, head_dim, value_dim = shape
    (q, a), (k, b) = random_bits(batch, heads, n, head_dim), random_bits(batch, heads, m, head_dim, seed=1)
    value = torch.randn(batch, heads, m, value_dim)
    for scale in (None, 0.5, -1.0, 3.0):
        wanted = softmax_attention(
            as_values(a, values),
            as_values(b, values),
            value.double().numpy(),
            head_dim**-0.5 if scale is None else scale,
        )
        device = device_of(backend)
        got = hamming_attention(
            q.to(device), k.to(device), value.to(device), head_dim, values=values, scale=scale, backend=backend
        )
        np.testing.assert_allclose(got.cpu().double().numpy(), wanted, rtol=1e-4, atol=2e-6)


@everywhere("hamming_attention", reference=False)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hamming_attention_keeps_the_accuracy_rule(backend, dtype):
    require("hamming_attention", backend)
    for batch, heads, n, m, head_dim, value_dim in HAMMING[:3] if is_slow(backend) else HAMMING:
        q, k = (random_bits(batch, heads, t, head_dim, seed=t)[0].to(device_of(backend)) for t in (n, m))
        value = torch.randn(batch, heads, m, value_dim).to(dtype).to(q.device).requires_grad_()
        assert_close_enough(lambda b, v, q=q, k=k, d=head_dim: hamming_attention(q, k, v, d, backend=b), backend, value)


@everywhere("hamming_attention", reference=False)
def test_hamming_attention_of_packed_signs_is_attention_of_signs(backend):
    require("hamming_attention", backend)
    query, key, value = torch.randn(3, 1, 2, 11, 40, device=device_of(backend))
    got = hamming_attention(
        pack_signs(query, backend=backend),
        pack_signs(key, backend=backend),
        value.mT.contiguous().mT,
        40,
        backend=backend,
    )
    signs = [torch.where(t > 0, 1.0, -1.0) for t in (query, key)]
    torch.testing.assert_close(got, torch.nn.functional.scaled_dot_product_attention(*signs, value))


# ---- torch and calls ----


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_opcheck(backend):
    require("add_matmul", backend)
    device = device_of(backend)
    q, k = (random_bits(2, 5, 40)[0].to(device) for _ in range(2))
    dense = torch.randn(2, 40, 3, device=device)
    grad = torch.randn(2, 5, 3, device=device)
    calls = {
        "pack_signs": (torch.randn(1, 2, 3, 40, device=device),),
        "add_matmul_fwd": (q, dense, 1),
        "add_matmul_bwd": (grad, q, 40, 0),
        "binary_matmul": (q, k, 40, 1),
        "hamming_attention_fwd": (q[None], k[None], torch.randn(1, 2, 5, 8, device=device), 40, 1, 0.2),
        "hamming_attention_bwd": (
            torch.randn(1, 2, 5, 8, device=device), q[None], k[None], torch.ones(1, 2, 5, device=device), 40, 1, 0.2
        ),
    }  # fmt: skip
    for name, arguments in calls.items():
        torch.library.opcheck(op_of(name).overload(backend), arguments)


def test_compiles_and_batches_as_one_graph():
    require("hamming_attention", "cpu")

    def attend(query, key, value):
        return hamming_attention(pack_signs(query), pack_signs(key), value, 24)

    query, key, value = torch.randn(3, 2, 3, 10, 24)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))
    mapped = torch.func.vmap(attend)(*torch.randn(3, 4, 2, 3, 10, 24))
    assert mapped.shape == (4, 2, 3, 10, 24)


@pytest.mark.parametrize("values", VALUES)
def test_same_bits_for_any_number_of_threads(values):
    require("hamming_attention", "cpu")
    q, k = random_bits(2, 3, 200, 64)[0], random_bits(2, 3, 150, 64)[0]
    value = torch.randn(2, 3, 150, 32, requires_grad=True)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        output = hamming_attention(q, k, value, 64, values=values, backend="cpu")
        (grad,) = torch.autograd.grad(output.square().sum(), value)
        product = add_matmul(q, torch.randn(2, 3, 64, 50, generator=torch.Generator().manual_seed(0)), backend="cpu")
        results.append((output, grad, product))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


Q, K = random_bits(1, 2, 5, 40)[0], random_bits(1, 2, 6, 40)[0]
V = torch.randn(1, 2, 6, 8)
BAD = (
    (pack_signs, ([1.0],), TypeError, "x must be a Tensor"),
    (pack_signs, (torch.ones(3).int(),), TypeError, "x must be floating point"),
    (pack_signs, (torch.tensor(1.0),), ValueError, "x must have at least one dimension"),
    (add_matmul, (Q, [1.0]), TypeError, "dense must be a Tensor"),
    (add_matmul, (Q.view(torch.int32), torch.ones(1, 2, 40, 3)), TypeError, "packed must be a uint32 Tensor"),
    (add_matmul, (Q, torch.ones(1, 2, 40, 3).int()), TypeError, "dense must be floating point"),
    (add_matmul, (Q, torch.ones(40)), ValueError, "dense must have shape"),
    (add_matmul, (Q, torch.ones(1, 2, 65, 3)), ValueError, "packed must have shape .* for 65 elements"),
    (add_matmul, (Q, torch.ones(2, 40, 3)), ValueError, "leading dimensions"),
    (add_matmul, (Q, torch.ones(1, 2, 40, 3, device="meta")), ValueError, "packed must be on meta"),
    (binary_matmul, (Q, K, 40.0), TypeError, "length must be an int"),
    (binary_matmul, (Q, K, -1), ValueError, "length must be at least 0"),
    (binary_matmul, (Q, K, 65), ValueError, "left must have shape"),
    (binary_matmul, (Q, K[0], 40), ValueError, "leading dimensions"),
    (hamming_attention, (Q, K, [1.0], 40), TypeError, "value must be a Tensor"),
    (hamming_attention, (Q, K, V.int(), 40), TypeError, "value must be floating point"),
    (hamming_attention, (Q, K, V[0], 40), ValueError, "value must have shape"),
    (hamming_attention, (Q, K, V, 0), ValueError, "head_dim must be at least 1"),
    (hamming_attention, (Q[0], K, V, 40), ValueError, "query_bits must have shape"),
    (hamming_attention, (Q, K[:, :, 1:], V, 40), ValueError, "key_bits must have value's 6 tokens"),
)


@pytest.mark.parametrize(("function", "arguments", "exception", "message"), BAD)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_argument_is_named(function, arguments, exception, message, backend):
    with pytest.raises(exception, match=message):
        function(*arguments, backend=backend)


@pytest.mark.parametrize("function", [add_matmul, binary_matmul, hamming_attention])
def test_bad_values_and_backends_are_named(function):
    arguments = {
        add_matmul: (Q, torch.ones(1, 2, 40, 3)), binary_matmul: (Q, K, 40), hamming_attention: (Q, K, V, 40)
    }[function]  # fmt: skip
    with pytest.raises(ValueError, match="values must be one of binary, sign, got 'ternary'"):
        function(*arguments, values="ternary")
    with pytest.raises(ValueError, match="backend must be one of"):
        function(*arguments, backend="tpu")
    with pytest.raises(NotImplementedError, match="effattn has no triton kernel"):
        function(*arguments, backend="triton")
    with pytest.raises(ValueError, match="made no call"):
        effattn.explain(lambda: None)
    assert effattn.explain(function, *arguments, backend="reference").backend == "reference"
