"""The retention Triton kernels, run (by Triton's interpreter where there is no GPU) against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from effattn.triton_kernels import retention as kernels

from effattn import reference
from effattn.ops.retention import _like_query

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def decays(*values):
    return torch.tensor(values, device=DEVICE)


def tensors(batch, heads, tokens, key_dim, value_dim, sequences, dtype, log_decay):
    query, key = (random(batch, heads, tokens, key_dim, dtype=dtype) for _ in range(2))
    value, grad_output = (random(batch, heads, tokens, value_dim, dtype=dtype) for _ in range(2))
    states = [random(sequences, heads, key_dim, value_dim) for _ in range(2)] if sequences else ()
    return [query, key, value, log_decay, *states[:1]], (grad_output, *states[1:])


def run(inputs, gradients, is_causal=True, chunk=0, row_scale=None, cu_seqlens=None, scale=0.7):
    """(output, [state], grad_query, grad_key, grad_value, grad_log_decay, [grad_initial_state])"""
    query, key, value, log_decay, *initial = inputs
    grad_output, *grad_state = gradients
    arguments = (query, key, value, log_decay, initial[0] if initial else None, row_scale, cu_seqlens)
    options = (is_causal, chunk, bool(initial), scale)
    output, state = kernels.retention_fwd(*arguments, *options)
    found = kernels.retention_bwd(grad_output, grad_state[0] if initial else None, *arguments, *options)
    return (output, state, *found) if initial else (output, *found[:4])


def errors(shape, sequences, log_decay, dtype, rows, packed, **options):
    """{name: (ours, eager's at the same dtype, largest value)} of the output, the final state and every gradient."""
    inputs, gradients = tensors(*shape, sequences, dtype, log_decay)
    results = []
    for cast in (torch.Tensor.double, lambda t: t):
        leaves = [cast(t).detach().clone().requires_grad_() for t in inputs]
        found = reference.retention(
            *leaves[:4],
            is_causal=options.get("is_causal", True),
            scale=0.7,
            initial_state=leaves[4] if sequences else None,
            return_state=sequences > 0,
            cu_seqlens=packed,
        )
        found = list(found) if sequences else [found]
        if rows is not None:
            found[0] = (found[0] * cast(rows)[..., None]).to(found[0].dtype)
        grads = torch.autograd.grad(found, leaves, [cast(g) for g in gradients])
        results.append([*(t.detach() for t in found), *grads])
    names = ["output", "grad_query", "grad_key", "grad_value", "grad_log_decay"]
    if sequences:
        names = [names[0], "state", *names[1:], "grad_initial_state"]
    ours = run(inputs, gradients, row_scale=rows, cu_seqlens=packed, **options)
    found = {}
    for name, got, exact, low in zip(names, ours, *results):
        assert got.shape == exact.shape, name
        assert got.isfinite().all(), name
        found[name] = tuple(t.abs().max().item() for t in (got.double() - exact, low.double() - exact, exact))
    return found


def check_retention(shape, sequences, log_decay, dtype=torch.float32, row_scale=False, cu_seqlens=None, **options):
    """The accuracy rule. A miss is pooled with more draws, since on few elements the error of the dtype is an accident."""
    rows = random(*shape[:3]).abs() + 0.5 if row_scale else None
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    pool = {}
    for _ in range(8):
        found = errors(shape, sequences, log_decay, dtype, rows, packed, **options)
        pool = {name: tuple(map(max, pool.get(name, (0, 0, 0)), three)) for name, three in found.items()}
        misses = [
            f"{name}: error {error:.3e}, the dtype's {low:.3e}, largest value {largest:.3e}"
            for name, (error, low, largest) in pool.items()
            if not error <= (2 if name in ("output", "state") else 3) * low + torch.finfo(dtype).eps * largest
        ]
        if not misses:
            return
    raise AssertionError("; ".join(misses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_with_a_carried_state_equal_the_reference(dtype):
    check_retention((1, 2, 33, 5, 20), 1, decays(-0.02, -0.4), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_directions_equal_the_reference(dtype):
    check_retention((1, 1, 33, 20, 5), 0, decays(-0.05), dtype, row_scale=True, is_causal=False)


def test_packed_sequences_equal_sequences_one_by_one():
    check_retention((1, 1, 24, 5, 4), 4, decays(-0.1), row_scale=True, cu_seqlens=[0, 0, 19, 20, 24])
    check_retention((1, 1, 20, 3, 4), 0, decays(-0.1), is_causal=False, cu_seqlens=[0, 17, 20])


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunks_of_any_size_equal_the_reference(chunk):
    check_retention((2, 1, 19, 3, 17), 2, decays(-0.05), chunk=chunk, row_scale=True)


@pytest.mark.parametrize("chunk", [0, 1])
def test_extreme_decays_give_neither_nan_nor_drift(chunk):
    check_retention((1, 4, 18, 3, 4), 1, decays(-INF, -100.0, -(2.0**-44), 0.0), chunk=chunk)
    inputs, gradients = tensors(1, 1, 20, 3, 4, 1, torch.float32, decays(-INF))
    inputs[4][:] = 1e30
    output, state, *_, grad_log_decay, grad_initial = run(inputs, gradients, chunk=chunk)
    query, key, value = inputs[:3]
    torch.testing.assert_close(output, 0.7 * (query * key).sum(-1, keepdim=True) * value)
    torch.testing.assert_close(state, key[:, :, -1, :, None] * value[:, :, -1, None])
    assert not grad_log_decay.any()
    assert not grad_initial.any()


def test_decays_near_one_do_not_drift_over_many_chunks():
    """2^-26 a chunk: the fp32 power of gamma is 1, and would leave out 100 2^-26 of the state."""
    tokens, decay = 200, -(2.0**-27)
    query, value = (random(1, 1, tokens, 1) * 2.0**-8 for _ in range(2))
    key, initial = torch.ones(1, 1, tokens, 1, device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)
    _, state = kernels.retention_fwd(query, key, value, decays(decay), initial, None, None, True, 2, True, 1.0)
    powers = (decay * torch.arange(tokens, -1, -1, dtype=torch.float64)).exp()
    expected = powers[0] + (powers[1:] * value[0, 0, :, 0].cpu()).sum()
    assert abs(state.item() - expected.item()) < 2.0**-21


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (2, 1, 0, 3, 4), (0, 2, 5, 3, 4), (2, 0, 5, 3, 4), (1, 1, 3, 1, 130)]
)
def test_any_size(sizes):
    batch, heads, tokens, *_ = sizes
    if batch * heads * tokens:
        return check_retention(sizes, batch, decays(-0.3))
    inputs, gradients = tensors(*sizes, batch, torch.float32, decays(-0.3).expand(heads).contiguous())
    initial = random(batch, heads, *sizes[3:])
    found = run([*inputs[:4], initial], (gradients[0], initial))
    assert [t.shape for t in found] == [t.shape for t in (inputs[2], initial, *inputs[:4], initial)]
    if tokens == 0:
        assert torch.equal(found[1], initial)
        assert torch.equal(found[6], initial)
    assert not found[5].any()


def test_strides_and_neighbours_do_not_matter():
    inputs, gradients = tensors(1, 2, 9, 5, 4, 1, torch.float32, decays(-0.1, -0.2))
    expected = run(inputs, gradients)
    wide = [torch.full((1, 2, 11, 12), INF, device=DEVICE) for _ in range(4)]
    views = [w[:, :, 1:10, 1 : 1 + 2 * t.shape[3] : 2] for w, t in zip(wide, (*inputs[:3], gradients[0]))]
    for view, tensor in zip(views, (*inputs[:3], gradients[0])):
        view.copy_(tensor)
    token_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*inputs[:3], gradients[0])]
    for query, key, value, grad_output in (views, token_major):
        got = run([query, key, value, *inputs[3:]], (grad_output, gradients[1]))
        for a, b in zip(got, expected):
            assert torch.equal(a, b)
        for gradient, like in zip(got[2:5], (query, key, value)):
            assert gradient.stride() == torch.empty_like(like).stride()
    ones = [torch.ones(1, 1, 1, 1, device=DEVICE).expand(1, 2, 9, width) for width in (5, 5, 4, 4)]
    got = run([*ones[:3], *inputs[3:]], (ones[3], gradients[1]))
    dense = [t.contiguous() for t in ones]
    for a, b in zip(got, run([*dense[:3], *inputs[3:]], (dense[3], gradients[1]))):
        assert torch.equal(a, b)


def test_the_output_is_laid_out_like_query():
    query, key = (random(2, 3, 5, 4).transpose(1, 2) for _ in range(2))
    value = random(2, 5, 3, 7)
    arguments = (query, key, value, decays(-0.1).expand(5).contiguous())
    output, _ = kernels.retention_fwd(*arguments, None, None, None, True, 0, False, 1.0)
    fake = _like_query(query, 7)
    assert (output.shape, output.stride()) == (fake.shape, fake.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_a_sequence(dtype):
    inputs, _ = tensors(2, 2, 3, 5, 70, 2, dtype, decays(-0.1, -INF))
    query, key, value, log_decay, state = inputs
    low, ref = (
        reference.retention(
            *(cast(t) for t in (query, key, value, log_decay)), initial_state=cast(state), return_state=True, scale=0.7
        )
        for cast in (lambda t: t, torch.Tensor.double)
    )
    inplace = state.clone()
    outputs = []
    for n in range(3):
        token = [t[:, :, n : n + 1] for t in (query, key, value)]
        output, new = kernels.retention_step(*token, log_decay, state, 0.7)
        same = kernels.retention_step_(*token, log_decay, inplace, 0.7)
        assert new.data_ptr() != state.data_ptr()
        assert torch.equal(output, same)
        assert torch.equal(new, inplace)
        state = new
        outputs.append(output)
    for ours, eager, exact, eps in zip(
        (torch.cat(outputs, 2), state), low, ref, (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    ):
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, eager))
        assert error <= 2 * allowed + eps * exact.abs().max()


def test_a_half_precision_state_beyond_65504_does_not_overflow():
    query, key, value = (torch.ones(1, 1, 40, 2, device=DEVICE, dtype=torch.float16) for _ in range(3))
    initial = torch.full((1, 1, 2, 2), 1e6, device=DEVICE)
    output, _ = kernels.retention_fwd(query, key, value, decays(0.0), initial, None, None, True, 0, False, 2.0**-7)
    expected = 2.0**-6 * (1e6 + torch.arange(1, 41, device=DEVICE))
    torch.testing.assert_close(output[0, 0, :, 0].float(), expected, rtol=2.0**-10, atol=0)


def test_offsets_past_two_to_the_31_elements(tmp_path, monkeypatch):
    """Rows 2^30 elements apart, in a sparse file that is never filled."""
    size = (1 << 32) + 64
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        # the interpreter copies every storage onto itself
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source, *_: self)
    else:
        storage = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    near, gradients = tensors(1, 1, 4, 16, 16, 0, torch.bfloat16, decays(-0.1))
    far = [storage.as_strided((1, 1, 4, 16), (0, 0, 1 << 30, 1), 16 * n) for n in range(4)]
    for view, tensor in zip(far, (*near[:3], gradients[0])):
        view.copy_(tensor)
    for chunk in (0, 1):
        got = run([*far[:3], near[3]], far[3:], chunk=chunk)
        for a, b in zip(got, run(near, gradients, chunk=chunk)):
            assert torch.equal(a, b)


def test_bounds_beyond_the_tensors_are_taken_as_their_ends():
    """The front does not look at the values on a GPU."""
    query, key, value = torch.randn(3, 1, 1, 9, 4, device=DEVICE)
    arguments = (query, key, value, torch.tensor([-0.1], device=DEVICE), None, None)
    results = []
    for bounds in ([-5, 3, 99], [0, 3, 9]):
        packed = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        results.append(kernels.retention_fwd(*arguments, packed, True, 0, True, 0.5))
    for got, wanted in zip(*results):
        assert torch.equal(got, wanted)
