"""The CUDA scan and step of retention: tile and chunk edges, states, packed sequences, decays, orders of threads.

Without a GPU in the emulator, on tensors that end at a guard page.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from conformance import LAYOUTS, device_of, place, require
from conformance.rule import FORWARD_FACTOR, GRADIENT_FACTOR, Measured

from effattn import _library, _native, retention, retention_step

CUDA = pytest.mark.parametrize("backend", ["cuda"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LEAVES = ("query", "key", "value", "log_decay", "initial_state")

pytestmark = pytest.mark.usefixtures("_kernels")


@pytest.fixture
def _kernels():
    require("retention", "cuda")
    require("retention_step", "cuda")


def draw(shape, dtype, *, states=None, normalize="none", seed=0):
    """Leaves by name, and gradients of the output and the state. ``states``: the number of carried states, 0: none."""
    batch, heads, tokens, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    qkv = [normal(batch, heads, tokens, dim).to(dtype) for dim in (key_dim, key_dim, value_dim)]
    log_decay = -torch.exp2(1 - 8 * torch.rand(heads, generator=generator))
    grad_output = normal(batch, heads, tokens, value_dim).to(dtype)
    leaves = dict(zip(LEAVES, (*qkv, log_decay)))
    sequences = batch if states is None else states
    if not sequences and states is not None:
        return leaves, (grad_output,)
    extra = normalize == "retnet"
    state = normal(sequences, heads, key_dim + extra, value_dim).float()
    if extra:
        state[:, :, -1] = 1.5
    leaves["initial_state"] = state
    return leaves, (grad_output, normal(*state.shape).float())


def call(leaves, gradients, backend, **options):
    """Results and gradients by name."""
    device = device_of(backend)
    leaves = {name: tensor.detach().to(device).requires_grad_() for name, tensor in leaves.items()}
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    results = retention(**leaves, **options, return_state=len(gradients) == 2, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    gradients = [g.to(r) for g, r in zip(gradients, results)]
    found = dict(zip(("output", "state"), (r.detach() for r in results)))
    wanted = torch.autograd.grad(results, list(leaves.values()), gradients)
    return {name: t.cpu() for name, t in {**found, **dict(zip(leaves, wanted))}.items()}


def largest(tensor):
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def over_budget(shape, dtype, seeds, *, states=None, **options):
    pool = {}
    normalize = options.get("normalize", "none")
    for seed in seeds:
        leaves, gradients = draw(shape, dtype, states=states, normalize=normalize, seed=seed)
        got = call(leaves, gradients, "cuda", **options)
        low = call(leaves, gradients, "reference", **options)
        exact = call({n: t.double() for n, t in leaves.items()}, gradients, "reference", **options)
        assert got.keys() == exact.keys()
        for name, ref in exact.items():
            assert got[name].shape == ref.shape
            assert got[name].isfinite().all(), name
            here = Measured(largest(got[name] - ref), largest(low[name] - ref), largest(ref), 0.0)
            pool[name] = pool[name].pooled_with(here) if name in pool else here
    factors = {name: FORWARD_FACTOR if name in ("output", "state") else GRADIENT_FACTOR for name in pool}
    return {n: m for n, m in pool.items() if not m.error <= m.budget(factors[n], dtype)}


def check(shape, dtype, **options):
    """The accuracy rule for the results and all gradients, pooled as conformance/rule.py does."""
    if over_budget(shape, dtype, [0], **options):
        assert not over_budget(shape, dtype, range(8), **options)


def cu_seqlens(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


@contextlib.contextmanager
def chip(shared_memory, monkeypatch):
    """Within, the emulated chip has this many bytes of shared memory for a block."""
    monkeypatch.setenv("EFFATTN_EMULATOR_SHARED", str(shared_memory))
    yield
    monkeypatch.delenv("EFFATTN_EMULATOR_SHARED")


# ---- The scan


@CUDA
@DTYPES
@pytest.mark.parametrize(
    "shape", [(2, 2, 65, 8, 24), (1, 1, 66, 65, 40), (1, 2, 1, 3, 1), (1, 1, 0, 4, 4), (0, 2, 5, 4, 4)], ids=str
)
def test_edges_of_chunks_and_tiles(backend, dtype, shape):
    check(shape, dtype)


@CUDA
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2, 66, 256, 34), torch.bfloat16),
        ((1, 1, 66, 130, 36), torch.float32),
        ((1, 1, 3, 20, 300), torch.float32),
        ((1, 1, 66, 20, 512), torch.float16),
    ],
    ids=str,
)
def test_wide_heads(backend, shape, dtype):
    check(shape, dtype)


@CUDA
@pytest.mark.skipif(_native.cuda_device == "cuda", reason="the chip is what it is")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chip_with_more_shared_memory_takes_wider_tiles_and_gives_the_same(backend, dtype, monkeypatch):
    leaves, gradients = draw((1, 1, 65, 130, 70), dtype)
    small = call(leaves, gradients, "cuda")
    with chip(232448, monkeypatch):
        large = call(leaves, gradients, "cuda")
    for name in small:
        if name == "log_decay":  # the sum of another number of tiles
            torch.testing.assert_close(small[name], large[name])
        else:
            assert torch.equal(small[name], large[name]), name


@CUDA
@DTYPES
def test_bidirectional_retention(backend, dtype):
    check((1, 2, 70, 12, 33), dtype, states=0, is_causal=False)


@CUDA
@pytest.mark.parametrize(
    "options",
    [
        {"method": "recurrent"},
        {"chunk_size": 3, "normalize": "retnet"},
        {"method": "parallel"},
        {"chunk_size": 64, "scale": 2.0},
    ],
    ids=str,
)
def test_every_method_and_chunk_size_that_it_says_it_serves(backend, options):
    check((1, 2, 5, 5, 9), torch.float32, **options)
    check((1, 2, 5, 16, 32), torch.bfloat16, **options)


@CUDA
def test_longer_chunks_are_refused_with_the_reason(backend):
    query = torch.randn(1, 1, 65, 4, device=device_of(backend))
    log_decay = torch.zeros(1, device=query.device)
    for options in ({"method": "parallel"}, {"chunk_size": 65}):
        with pytest.raises(NotImplementedError, match="a chunk of 65 tokens; its tiles hold 64"):
            retention(query, query, query, log_decay, backend=backend, **options)


@CUDA
@pytest.mark.parametrize(
    ("options", "states", "dtype"),
    [
        ({}, 4, torch.float32),
        ({"normalize": "retnet"}, 4, torch.bfloat16),
        ({"normalize": "retnet"}, 0, torch.float16),
        ({"is_causal": False}, 0, torch.float32),
    ],
    ids=str,
)
def test_packed_sequences(backend, options, states, dtype):
    check((1, 2, 71, 6, 10), dtype, states=states, cu_seqlens=cu_seqlens(0, 3, 3, 69, 71), **options)


@CUDA
@pytest.mark.parametrize("bounds", [(0, 40, 2, 9), (0, -5, 100, 9), (7, 3, 2**31 - 1, 0)], ids=str)
def test_bounds_that_are_no_bounds_touch_no_foreign_memory(backend, bounds):
    query = torch.randn(1, 1, 9, 4, device=device_of(backend))
    arguments = (query, query, query, torch.zeros(1, device=query.device), None, None)
    output, state = _library._operators["retention"].forward(
        "cuda", *arguments, cu_seqlens(*bounds).to(query.device), True, 0, True, 1.0
    )
    assert output.shape == query.shape
    assert state.shape == (3, 1, 4, 4)


@CUDA
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    leaves, gradients = draw((2, 2, 5, 8, 16), torch.bfloat16)
    expected = call(leaves, gradients, "reference")
    device = device_of(backend)
    placed = {n: place(t, layout).to(device) if n in LEAVES[:3] else t.to(device) for n, t in leaves.items()}
    copied = {n: t.contiguous().cpu() for n, t in placed.items()}
    if any(not torch.equal(copied[n], leaves[n]) for n in LEAVES[:3]):  # expanded: other values
        expected = call(copied, gradients, "reference")
    leaves = {n: t.detach().requires_grad_() for n, t in placed.items()}
    results = retention(**leaves, return_state=True, backend=backend)
    found = torch.autograd.grad(results, list(leaves.values()), [g.to(device) for g in gradients])
    for name, tensor in zip(("output", "state", *leaves), (*results, *found)):
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=0.05, atol=0.05 * largest(expected[name]))


@CUDA
@pytest.mark.parametrize("log_decay", [float("-inf"), -200.0, -(2.0**-44), 0.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decays_from_nothing_to_all(backend, log_decay, dtype):
    leaves, gradients = draw((1, 2, 67, 4, 4), dtype)
    leaves["log_decay"][1] = log_decay
    got = call(leaves, gradients, "cuda")
    exact = call({n: t.double() for n, t in leaves.items()}, gradients, "reference")
    tolerance = 30 * torch.finfo(dtype).eps
    for name, ref in exact.items():
        assert largest(got[name] - ref) <= tolerance * largest(ref), name


@CUDA
def test_a_decay_near_one_does_not_drift_over_many_chunks(backend):
    """A state that only decays, 300 times by a gamma that is halfway between two of float32."""
    log_decay = torch.tensor([-100.5 * 2.0**-24], device=device_of(backend))
    rounded, exact = log_decay.exp().double(), log_decay.double().exp()
    query = torch.zeros(1, 1, 300, 32, device=log_decay.device)
    state = 1 + torch.rand(1, 1, 32, 32, device=log_decay.device)
    options = {"initial_state": state, "return_state": True, "method": "recurrent", "backend": backend}
    _, last = retention(query, query, query, log_decay, **options)
    drift = (last.double() / (state.double() * exact**300) - 1).mean().abs().item()
    assert (rounded**300 / exact**300 - 1).abs().item() > 60 * 2.0**-23
    assert drift < 10 * 2.0**-23


@CUDA
def test_a_state_beyond_float16_is_read_right(backend):
    device = device_of(backend)
    query, key, value = (torch.full((1, 1, 130, 8), x, device=device, dtype=torch.float16) for x in (1e-3, 30.0, 60.0))
    log_decay = torch.zeros(1, device=device)
    output, state = retention(query, key, value, log_decay, return_state=True, backend=backend)
    assert state.max() > 2 * torch.finfo(torch.float16).max
    exact = retention(query.double(), key.double(), value.double(), log_decay, backend="reference")
    torch.testing.assert_close(output.double(), exact, rtol=2e-3, atol=0)


@CUDA
@DTYPES
@pytest.mark.parametrize("is_causal", [True, False])
def test_same_bits_in_every_order_of_threads(backend, dtype, is_causal, monkeypatch):
    leaves, gradients = draw((1, 1, 67, 9, 10), dtype, states=None if is_causal else 0)
    results = []
    for seed in range(3):
        monkeypatch.setenv("EFFATTN_EMULATOR_SEED", str(seed))
        results.append(call(leaves, gradients, "cuda", is_causal=is_causal))
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


# ---- The step


def step_arguments(shape, dtype, device, seed=0):
    batch, heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, 1, dim, generator=generator).to(dtype) for dim in (key_dim, key_dim, value_dim)
    )
    state = torch.randn(batch, heads, key_dim, value_dim, generator=generator)
    log_decay = -torch.exp2(1 - 8 * torch.rand(heads, generator=generator))
    return [t.to(device) for t in (query, key, value, log_decay, state)]


@CUDA
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (1, 2, 64, 64), (1, 1, 256, 432), (1, 1, 3, 511), (2, 1, 1, 1), (0, 2, 4, 4), (33, 17, 2, 36)],
    ids=str,
)
def test_step_in_and_out_of_place(backend, dtype, shape):
    arguments = step_arguments(shape, dtype, device_of(backend))
    before = arguments[4].clone()
    output, state = retention_step(*arguments, backend=backend)
    assert torch.equal(arguments[4], before)
    exact, exact_state = retention_step(*(t.double() for t in arguments), backend="reference")
    low, low_state = retention_step(*arguments, backend="reference")
    for got, eager, ref in ((output, low, exact), (state, low_state, exact_state)):
        assert got.dtype == eager.dtype
        budget = FORWARD_FACTOR * largest(eager - ref) + torch.finfo(got.dtype).eps * largest(ref)
        assert largest(got - ref) <= budget
    in_place, same = retention_step(*arguments, inplace=True, backend=backend)
    assert same is arguments[4]
    assert torch.equal(in_place, output)
    assert torch.equal(same, state)


@CUDA
def test_step_of_a_state_at_an_odd_address(backend):
    query, key, value, log_decay, state = step_arguments((1, 2, 4, 8), torch.float32, device_of(backend))
    apart = torch.empty(state.numel() + 1, device=state.device)[1:].view(state.shape).copy_(state)
    expected = retention_step(query, key, value, log_decay, state, backend=backend)
    for got, wanted in zip(retention_step(query, key, value, log_decay, apart, backend=backend), expected):
        torch.testing.assert_close(got, wanted)


@CUDA
@pytest.mark.parametrize("layout", ["token_major", "every_other", "expanded_heads", "expanded_everywhere"])
def test_step_of_strided_tokens(backend, layout):
    *tokens, log_decay, state = step_arguments((2, 3, 4, 6), torch.float32, device_of(backend))
    placed = [place(t.cpu(), layout).to(state.device) for t in tokens]
    got = retention_step(*placed, log_decay, state, backend=backend)
    expected = retention_step(*(t.contiguous() for t in placed), log_decay, state, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@CUDA
def test_steps_and_a_scan_agree(backend):
    leaves, _ = draw((2, 2, 5, 4, 6), torch.float32, states=0)
    query, key, value, log_decay = (t.to(device_of(backend)) for t in leaves.values())
    whole, last = retention(query, key, value, log_decay, return_state=True, backend=backend)
    state = torch.zeros_like(last)
    for n in range(5):
        token = slice(n, n + 1)
        output, state = retention_step(
            query[:, :, token], key[:, :, token], value[:, :, token], log_decay, state, backend=backend
        )
        torch.testing.assert_close(output, whole[:, :, token])
    torch.testing.assert_close(state, last)


@CUDA
@pytest.mark.parametrize("seed", range(3))
def test_step_gives_the_same_bits_in_every_order_of_threads(backend, seed, monkeypatch):
    arguments = step_arguments((1, 1, 70, 36), torch.bfloat16, device_of(backend))
    expected = retention_step(*arguments, backend=backend)
    monkeypatch.setitem(os.environ, "EFFATTN_EMULATOR_SEED", str(seed + 100))
    assert all(torch.equal(a, b) for a, b in zip(retention_step(*arguments, backend=backend), expected))


@CUDA
@pytest.mark.parametrize("rows", [4, 5], ids=["plain", "normalised"])
def test_step_has_gradients_and_normalises(backend, rows):
    query, key, value, log_decay, state = step_arguments((1, 2, 4, 6), torch.float32, "cpu")
    state = torch.cat((state, torch.full((1, 2, rows - 4, 6), 1.5)), 2)
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [t.to(device_of(name), dtype).requires_grad_() for t in (query, key, value, log_decay, state)]
        results = retention_step(*leaves, backend=name)
        gradients = torch.autograd.grad([r.square().sum() for r in results], leaves)
        found.append([t.detach().cpu().double() for t in (*results, *gradients)])
    for got, exact in zip(*found):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
