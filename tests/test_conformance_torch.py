"""torch citizenship: what every operator must do under compile, export, autocast, vmap, checkpointing and the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conformance import (
    CASES,
    RecordedCalls,
    Shape,
    assert_same_bits,
    case_and_backend,
    device_of,
    fresh_compiler,
    is_slow,
    namespace_of,
    require,
    run,
    small,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_features import checks, sample_of

EVERYWHERE = case_and_backend()
BESIDE_MATRIX = case_and_backend(beside_matrix=True)
KERNELS = case_and_backend(without=("reference",))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh_compiler():
        yield


def sample(case, backend, shape=None, dtype=torch.float32):
    require(case.op, backend)
    shape = small(backend) if shape is None else shape
    device = device_of(backend)
    tensors = case.tensors(shape, dtype, device=device)
    return tensors, case.options(shape), case.grad_output(shape, dtype, device=device)


def recorded_calls(case, backend, shape=None):
    tensors, options, grad_output = sample(case, backend, shape)
    with RecordedCalls() as recorded:
        run(case, tensors, options, backend, grad_output)
    return recorded.calls


def assert_agrees(got, wanted, backend: str) -> None:
    """The same bits where the same kernel ran; the reference may be re-associated by the compiler."""
    if backend != "reference":
        assert_same_bits(got, wanted)
        return
    torch.testing.assert_close(got.output, wanted.output)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient, wanted.gradients[name], rtol=1e-4, atol=1e-4)


@KERNELS
def test_each_op_runs_once_forward_and_once_backward(case, backend):
    calls = recorded_calls(case, backend)
    assert [op.namespace for op, _ in calls] == [namespace_of(backend)] * 2 * case.launches
    assert [op._opname.rsplit("_", 1)[1] for op, _ in calls] == ["fwd"] * case.launches + ["bwd"] * case.launches


@KERNELS
def test_opcheck(case, backend):
    if is_slow(backend) and case.op not in ("gaussian_mixture_attention", "retention"):
        pytest.skip(
            "schema, fake kernel and autograd are those of the cpu backend's op, which every operator's is held to"
        )
    for op, args in recorded_calls(case, backend):
        torch.library.opcheck(op, args)


@KERNELS
@pytest.mark.parametrize("shape", [Shape(batch=1, grid=(3, 3)), Shape(batch=0), Shape(grid=(0, 2), prefix=0)], ids=str)
def test_fake_kernels_tell_shapes_strides_and_dtypes(case, backend, shape):
    require(case.op, backend)
    for layout in ("packed",) if is_slow(backend) else ("contiguous", "token_major", "packed", "expanded_heads"):
        tensors = case.tensors(shape, layouts=layout, device=device_of(backend))
        with RecordedCalls() as recorded:
            grad_output = case.grad_output(shape, layout=layout, device=device_of(backend))
            run(case, tensors, case.options(shape), backend, grad_output)
        for op, args in recorded.calls:
            with FakeTensorMode() as mode:
                fakes = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
            for fake, real in zip(fakes, op(*args), strict=True):
                assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
                assert fake.stride() == real.stride() or not real.numel()  # torch's own differ for empty tensors


@case_and_backend(without=("cpu", "reference"))
def test_compiles_to_one_graph_that_serves_every_length(case, backend):
    if case != CASES[case.op][0] or is_slow(backend):
        pytest.skip("once per operator and not in an interpreter; the matrix has the cpu backend")
    require(case.op, backend)
    checks.compiles_for_every_length(sample_of(case, backend), backend)


@case_and_backend(without=("triton", "cuda"), beside_matrix=True)
def test_compiled_without_gradients_is_the_same(case, backend):
    if backend == "reference" and case != CASES[case.op][0]:
        pytest.skip("once per operator: plain PyTorch, where variants are other formulas and not other code of ours")
    require(case.op, backend)
    checks.compiles(sample_of(case, backend), backend)


@case_and_backend(without=("triton", "cuda"))
def test_auto_is_traceable(case, backend):
    if backend != "reference" or case != CASES[case.op][0]:
        pytest.skip("once per operator: a mode of use changes nothing of how a backend is chosen")
    tensors, options, _ = sample(case, backend)
    compiled = torch.compile(lambda: case(tensors, options, "auto"), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(), case(tensors, options, "auto"))


@pytest.mark.slow
@case_and_backend(without=("reference", "triton", *(("cuda",) if is_slow("cuda") else ())))
def test_inductor_runs_the_kernel_inside_its_own_code(case, backend):
    if case.variant or case.op not in ("gaussian_mixture_attention", "retention", "window_attention", "urpe_attention"):
        pytest.skip("six seconds each, and all operators are declared by the same class: parameters, states, options")
    tensors, options, grad_output = sample(case, backend)

    def call(tensors, options, _):
        return torch.nn.functional.silu(case({**tensors, "query": tensors["query"] * 2}, options, backend))

    eager = run(call, tensors, options, backend, grad_output, wrt=case.differentiable)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    got = run(compiled, tensors, options, backend, grad_output, wrt=case.differentiable)
    torch.testing.assert_close(got.output, eager.output)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient, eager.gradients[name], rtol=1e-4, atol=1e-4)


@BESIDE_MATRIX
def test_exports_with_an_open_batch(case, backend):
    require(case.op, backend)
    checks.exports(sample_of(case, backend), backend)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=("bfloat16", "float16"))
def test_autocast_computes_in_its_dtype(case, backend, dtype):
    tensors, options, grad_output = sample(case, backend)
    if dtype == torch.float16 and backend == "triton":
        pytest.skip("the interpreter is slow")
    with torch.autocast(device_of(backend), dtype):
        got = run(case, tensors, options, backend, grad_output.to(dtype))
    kept = (*case.parameters, *case.in_float32, *case.not_autocast)
    lower = {n: t.to(dtype) if n not in kept and t.is_floating_point() else t for n, t in tensors.items()}
    wanted = run(case, lower, options, backend, grad_output.to(dtype))
    assert got.output.dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in got.gradients.values())
    if backend == "reference":
        torch.testing.assert_close(got.output, wanted.output, rtol=0.05, atol=0.05)
        return
    assert torch.equal(got.output, wanted.output)
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, wanted.gradients[name].float())


@BESIDE_MATRIX
def test_checkpointing_changes_nothing(case, backend):
    require(case.op, backend)
    checks.checkpoints(sample_of(case, backend), backend)


@case_and_backend(without=("reference",), beside_matrix=True)
def test_checkpointing_by_a_policy_over_op_names(case, backend):
    require(case.op, backend)
    checks.checkpoints_selectively(sample_of(case, backend), backend)


def _stacked(case, backend, count=3):
    shape, device = small(backend), device_of(backend)
    examples = [case.tensors(shape, seed=seed, device=device) for seed in range(count)]
    return examples, {name: torch.stack([e[name] for e in examples]) for name in examples[0]}, case.options(shape)


@BESIDE_MATRIX
def test_vmap_over_a_batch_is_a_loop(case, backend):
    require(case.op, backend)
    checks.vmaps(sample_of(case, backend), backend)


@case_and_backend(without=("triton",))
def test_vmap_over_another_dimension_and_another_output_dimension(case, backend):
    require(case.op, backend)
    examples, stacked, options = _stacked(case, backend)
    moved = {**stacked, "query": stacked["query"].movedim(0, 3)}
    in_dims = {name: 3 if name == "query" else 0 for name in stacked}
    got = torch.func.vmap(lambda t: case(t, options, backend), in_dims=(in_dims,), out_dims=1)(moved)
    for index, example in enumerate(examples):
        torch.testing.assert_close(got[:, index], case(example, options, backend))


@EVERYWHERE
def test_vmap_over_each_argument_alone_is_a_loop(case, backend):
    require(case.op, backend)
    examples, stacked, options = _stacked(case, backend, count=2)
    first = case(examples[0], options, backend)
    for mapped in stacked:
        in_dims = {name: 0 if name == mapped else None for name in stacked}
        given = {name: stacked[name] if name == mapped else examples[0][name] for name in stacked}
        got = torch.func.vmap(lambda t: case(t, options, backend), in_dims=(in_dims,))(given)
        second = case({**examples[0], mapped: examples[1][mapped]}, options, backend)
        torch.testing.assert_close(got, torch.stack((first, second)))


@BESIDE_MATRIX
def test_per_example_gradients(case, backend):
    """vmap of grad: every example keeps its own gradient, those of the shared parameters too."""
    require(case.op, backend)
    checks.gives_per_example_gradients(sample_of(case, backend), backend)


@BESIDE_MATRIX
def test_forward_mode(case, backend):
    require(case.op, backend)
    if case.op == "shift_add_attention":
        pytest.skip("no argument enters linearly; the matrix has its refusal")
    checks.has_forward_mode(sample_of(case, backend), backend)


@case_and_backend(without=("triton",))
def test_vmap_inside_vmap(case, backend):
    require(case.op, backend)
    shape, device = small(backend), device_of(backend)
    examples, stacked, options = _stacked(case, backend, count=4)
    twice = {name: tensor.unflatten(0, (2, 2)) for name, tensor in stacked.items()}
    got = torch.func.vmap(torch.func.vmap(lambda t: case(t, options, backend)))(twice).flatten(0, 1)
    for index, example in enumerate(examples):
        torch.testing.assert_close(got[index], case(example, options, backend))
    assert got.shape[1:] == case.grad_output(shape, device=device).shape


@case_and_backend(without=("reference",), beside_matrix=True)
def test_flops_are_counted(case, backend):
    require(case.op, backend)
    checks.counts_flops(sample_of(case, backend), backend)


@case_and_backend(without=("reference",), beside_matrix=True)
def test_second_derivatives_are_refused(case, backend):
    require(case.op, backend)
    if is_slow(backend):
        pytest.skip("one class refuses them for every backend")
    with pytest.raises(checks.Limit, match="a second one raises"):
        checks.refuses_second_derivatives(sample_of(case, backend), backend)


@case_and_backend(without=("triton", "cuda"))
def test_calls_from_many_threads_at_once(case, backend):
    jobs = []
    for seed in range(12):
        shape = Shape(batch=1 + seed % 3, grid=(2 + seed % 5, 7), head_dim=8 * (1 + seed % 4))
        require(case.op, backend)
        tensors, grad = case.tensors(shape, seed=seed), case.grad_output(shape)
        jobs.append((tensors, case.options(shape), grad))
    wanted = [run(case, tensors, options, backend, grad) for tensors, options, grad in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda job: run(case, job[0], job[1], backend, job[2]), jobs))
            for one, other in zip(got, wanted):
                assert_agrees(one, other, backend)


@KERNELS
def test_runs_under_inference_mode(case, backend):
    tensors, options, _ = sample(case, backend)
    wanted = case(tensors, options, backend)
    with torch.inference_mode():
        inside = {name: tensor.clone() for name, tensor in tensors.items()}
        assert torch.equal(case(inside, options, backend), wanted)
