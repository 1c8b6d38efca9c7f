"""torch citizenship: what every operator must do under compile, export, autocast, vmap, checkpointing and the rest."""

from __future__ import annotations

import warnings
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
    is_slow,
    namespace_of,
    require,
    run,
    small,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

EVERYWHERE = case_and_backend()
KERNELS = case_and_backend(without=("reference",))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        yield
    torch._dynamo.reset()


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


@EVERYWHERE
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_to_one_graph_that_serves_every_length(case, backend):
    if case != CASES[case.op][0]:
        pytest.skip("once per operator; test_compiled_without_gradients_is_the_same has every mode of use")
    if backend != "cpu" and (is_slow(backend) or backend == "reference"):
        pytest.skip("interpreters are slow; test_auto_is_traceable compiles plain PyTorch")

    def call(tensors, options):
        return case(tensors, options, backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid, batch in zip(case.grids, (2, 3, 2)):
        shape = small(backend).with_(grid=grid, batch=batch, prefix=2)
        tensors, options, grad_output = sample(case, backend, shape)
        eager = run(case, tensors, options, backend, grad_output)
        got = run(lambda t, o, _: compiled(t, o), tensors, options, backend, grad_output, wrt=case.differentiable)
        assert_agrees(got, eager, backend)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@case_and_backend(without=("triton", "cuda"))
def test_compiled_without_gradients_is_the_same(case, backend):
    tensors, options, _ = sample(case, backend)
    compiled = torch.compile(lambda t, o: case(t, o, backend), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tensors, options), case(tensors, options, backend))


@case_and_backend(without=("triton", "cuda"))
def test_auto_is_traceable(case, backend):
    if backend != "reference" or case != CASES[case.op][0]:
        pytest.skip("once per operator: a mode of use changes nothing of how a backend is chosen")
    tensors, options, grad_output = sample(case, backend)
    compiled = torch.compile(lambda t, o, _: case(t, o, "auto"), fullgraph=True, dynamic=True, backend="aot_eager")
    got = run(compiled, tensors, options, "auto", grad_output, wrt=case.differentiable)
    assert_agrees(got, run(case, tensors, options, "auto", grad_output), "reference")


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


@EVERYWHERE
def test_exports(case, backend):
    tensors, options, _ = sample(case, backend)

    class Call(torch.nn.Module):
        def forward(self, tensors):
            return case(tensors, options, backend)

    exported = torch.export.export(Call(), (tensors,))
    torch.testing.assert_close(exported.module()(tensors), case(tensors, options, backend))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("effattn") for target in targets) == (backend != "reference")


@case_and_backend(without=("triton",))
def test_export_leaves_the_batch_open(case, backend):
    tensors, options, _ = sample(case, backend)

    class Call(torch.nn.Module):
        def forward(self, tensors):
            return case(tensors, options, backend)

    batch = torch.export.Dim("batch", min=2, max=64)
    open_batch = {n: None if n in case.parameters else {0: batch} for n in tensors}
    exported = torch.export.export(Call(), (tensors,), dynamic_shapes=(open_batch,))
    larger, _, _ = sample(case, backend, small(backend).with_(batch=5))
    torch.testing.assert_close(exported.module()(larger), case(larger, options, backend))


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


@EVERYWHERE
def test_checkpointing_changes_nothing(case, backend):
    tensors, options, grad_output = sample(case, backend)

    def checkpointed(tensors, options, _):
        names = list(tensors)

        def segment(*values):
            return case(dict(zip(names, values)), options, backend)

        return checkpoint(segment, *tensors.values(), use_reentrant=False)

    got = run(checkpointed, tensors, options, backend, grad_output, wrt=case.differentiable)
    assert_same_bits(got, run(case, tensors, options, backend, grad_output))


def _stacked(case, backend, count=3):
    shape, device = small(backend), device_of(backend)
    examples = [case.tensors(shape, seed=seed, device=device) for seed in range(count)]
    return examples, {name: torch.stack([e[name] for e in examples]) for name in examples[0]}, case.options(shape)


@EVERYWHERE
def test_vmap_over_a_batch_is_a_loop(case, backend):
    require(case.op, backend)
    examples, stacked, options = _stacked(case, backend)
    in_dims = {name: None if name in case.parameters else 0 for name in stacked}
    shared = {name: examples[0][name] if name in case.parameters else stacked[name] for name in stacked}
    got = torch.func.vmap(lambda t: case(t, options, backend), in_dims=(in_dims,))(shared)
    for index, example in enumerate(examples):
        wanted = case({**example, **{name: shared[name] for name in case.parameters}}, options, backend)
        torch.testing.assert_close(got[index], wanted)


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


@EVERYWHERE
def test_per_example_gradients(case, backend):
    """vmap of grad: every example keeps its own gradient, those of the shared parameters too."""
    require(case.op, backend)
    examples, stacked, options = _stacked(case, backend, count=2)
    shared = {name: examples[0][name] if name in case.parameters else stacked[name] for name in stacked}
    in_dims = {name: None if name in case.parameters else 0 for name in stacked}
    grad_output = case.grad_output(small(backend), device=device_of(backend))
    names = case.differentiable

    def loss(values, others):
        return (case({**others, **values}, options, backend) * grad_output).sum()

    values, others = ({n: shared[n] for n in shared if (n in names) == wanted} for wanted in (True, False))
    got = torch.func.vmap(
        torch.func.grad(loss), in_dims=({n: in_dims[n] for n in values}, {n: in_dims[n] for n in others})
    )(values, others)
    for index, example in enumerate(examples):
        example = {**example, **{name: shared[name] for name in case.parameters}}
        wanted = run(case, example, options, backend, grad_output).gradients
        for name in names:
            torch.testing.assert_close(got[name][index], wanted[name], rtol=1e-4, atol=1e-4)


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


@KERNELS
def test_flops_are_counted(case, backend):
    tensors, options, grad_output = sample(case, backend)
    forward = case.flops(small(backend))
    with FlopCounterMode(display=False) as counter:
        case(tensors, options, backend)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        run(case, tensors, options, backend, grad_output)
    assert counter.get_total_flops() == forward + forward * 5 // 2


@KERNELS
def test_second_derivatives_are_refused(case, backend):
    tensors, options, _ = sample(case, backend)
    query = tensors["query"].requires_grad_()
    output = case(tensors, options, backend)
    (gradient,) = torch.autograd.grad(output.sin().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), query)


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


@pytest.mark.gpu
@case_and_backend(without=("reference", "cpu"))
def test_captured_in_a_cuda_graph(case, backend):
    tensors, options, _ = sample(case, backend)
    wanted = case(tensors, options, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case(tensors, options, backend)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)
