"""The features of torch, each as a check ``(sample, backend)`` that raises where the operator does not have it.

A check may return a word for its cell of the matrix. Where a feature has no meaning for an operator, or is refused, it
raises `Limit` with the reason, after it has seen for itself that this is so.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from conformance import RecordedCalls, device_of, fresh_compiler, is_slow, namespace_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from .samples import Sample


class Limit(Exception):
    """A feature that an operator does not have, and why. ``mark`` stands in its cell of the matrix."""

    mark = "no"


class NoMeaning(Limit):
    mark = "-"


class NotRun(Limit):
    mark = "not run"


NOT_DIFFERENTIABLE = "its result is bits, counts or indices, which have no derivative"


# ---- calls ----


def assert_same(got: tuple, wanted: tuple, backend: str, close: bool = False) -> None:
    """The same bits where the same kernel ran; compilers and vmap may re-associate plain PyTorch."""
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if other.is_floating_point() and (close or backend == "reference"):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one, other)


def train(sample: Sample, call, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Results and gradients of ``call(tensors)``, for upstream gradients that are a function of the results' shapes."""
    leaves = {n: t.detach().requires_grad_(n in sample.differentiable) for n, t in tensors.items()}
    results = call(leaves)
    wanted = [r for r in results if r.requires_grad]
    upstream = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype, device=r.device).view(r.shape) for r in wanted]
    gradients = torch.autograd.grad(wanted, [leaves[n] for n in sample.differentiable], upstream)
    return (*(r.detach() for r in results), *gradients)


def run(sample: Sample, call, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """`train` where there is something to train, else the results alone."""
    return train(sample, call, tensors) if sample.differentiable else call(tensors)


def plain(sample: Sample, backend: str, length=None):
    options = sample.options(sample.lengths[0] if length is None else length)
    return lambda tensors: sample(tensors, backend, options)


def require_derivative(sample: Sample, backend: str) -> None:
    if not sample.differentiable:
        tensors = sample.tensors(device=device_of(backend))
        tracked = {n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        assert not any(r.requires_grad or r.is_floating_point() for r in sample(tracked, backend))
        raise NoMeaning(NOT_DIFFERENTIABLE)


def names_of(sample: Sample, backend: str) -> tuple[list[str], list[str]]:
    """The torch ops of a call, of its forward and of all of it, by name."""
    tensors = sample.tensors(device=device_of(backend))
    with RecordedCalls() as forward, torch.no_grad():
        sample(tensors, backend)
    with RecordedCalls() as training:
        run(sample, plain(sample, backend), tensors)
    return [op._opname for op, _ in forward.calls], [op._opname for op, _ in training.calls]


# ---- graphs ----


def compiles(sample: Sample, backend: str) -> None:
    """Inference of fixed shapes as one graph."""
    tensors = sample.tensors(device=device_of(backend))
    with fresh_compiler(), torch.no_grad():
        compiled = torch.compile(plain(sample, backend), fullgraph=True, dynamic=False, backend="aot_eager")
        assert_same(compiled(tensors), sample(tensors, backend), backend)
        assert counters["stats"]["unique_graphs"] == 1


def compiles_for_every_length(sample: Sample, backend: str) -> None:
    """Training at three lengths and two batch sizes as one graph, without a break or a recompilation."""

    def call(tensors, options):
        return sample(tensors, backend, options)

    with fresh_compiler(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for length, batch in zip(sample.lengths[1:], (2, 3, 2)):
            tensors, options = sample.tensors(length, batch, device=device_of(backend)), sample.options(length)
            got = run(sample, partial(compiled, options=options), tensors)
            assert_same(got, run(sample, plain(sample, backend, length), tensors), backend)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


class Module(torch.nn.Module):
    """A sample as a module."""

    def __init__(self, sample: Sample, backend: str):
        super().__init__()
        self.call = plain(sample, backend)

    def forward(self, tensors):
        return self.call(tensors)


def exports(sample: Sample, backend: str) -> None:
    """torch.export with the batch left open; the graph holds the op itself."""
    tensors = sample.tensors(device=device_of(backend))
    batch = torch.export.Dim("batch", min=2, max=64)
    open_batch = {n: None if n in sample.parameters else {0: batch} for n in tensors}
    with torch.no_grad():
        exported = torch.export.export(Module(sample, backend), (tensors,), dynamic_shapes=(open_batch,))
        more = sample.tensors(batch=5, device=device_of(backend))
        assert_same(exported.module()(more), sample(more, backend), backend)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("effattn") for target in targets) == (backend != "reference")


# ---- transforms ----


def autocasts(sample: Sample, backend: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """The call inside autocast is the call on arguments of its dtype; gradients come in the arguments' own."""
    tensors = sample.tensors(device=device_of(backend))
    lower = {n: t.to(dtype) if n in sample.casts else t for n, t in tensors.items()}
    with torch.autocast(device_of(backend), dtype):
        got = run(sample, plain(sample, backend), tensors)
    wanted = run(sample, plain(sample, backend), lower)
    count = len(wanted) - len(sample.differentiable)
    if sample.casts:
        assert got[0].dtype == dtype or not got[0].is_floating_point()
    for index, (one, other) in enumerate(zip(got, wanted)):
        if index >= count:
            assert one.dtype == torch.float32
            other = other.float()
        if backend == "reference":
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)
        else:
            assert torch.equal(one, other)
    return None if sample.casts else "keeps its dtype"


def _stack(sample: Sample, backend: str, count: int = 3):
    """Examples, and the arguments that vmap takes: all stacked but the parameters, which are the first example's."""
    examples = [sample.tensors(seed=seed, device=device_of(backend)) for seed in range(count)]
    shared = {n: examples[0][n] for n in sample.parameters}
    examples = [{**e, **shared} for e in examples]
    stacked = {n: shared[n] if n in shared else torch.stack([e[n] for e in examples]) for n in examples[0]}
    in_dims = {n: None if n in shared else 0 for n in stacked}
    return examples, stacked, in_dims


def vmaps(sample: Sample, backend: str) -> None:
    """vmap is a loop over its examples."""
    examples, stacked, in_dims = _stack(sample, backend)
    got = torch.func.vmap(lambda t: sample(t, backend), in_dims=(in_dims,))(stacked)
    for index, example in enumerate(examples):
        assert_same(tuple(g[index] for g in got), sample(example, backend), backend, close=True)


def gives_per_example_gradients(sample: Sample, backend: str) -> None:
    """vmap of grad: every example keeps its own gradient, those of the shared parameters too."""
    require_derivative(sample, backend)
    examples, stacked, in_dims = _stack(sample, backend, count=2)
    names = sample.differentiable

    def loss(values, others):
        results = [r for r in sample({**others, **values}, backend) if r.is_floating_point()]
        return sum((r * torch.linspace(-1, 1, r.numel(), device=r.device).view(r.shape)).sum() for r in results)

    values, others = ({n: t for n, t in stacked.items() if (n in names) == wanted} for wanted in (True, False))
    dims = tuple({n: in_dims[n] for n in part} for part in (values, others))
    got = torch.func.vmap(torch.func.grad(loss), in_dims=dims)(values, others)
    for index, example in enumerate(examples):
        wanted = train(sample, plain(sample, backend), example)[-len(names) :]
        assert_same(tuple(got[n][index] for n in names), wanted, backend, close=True)


def has_forward_mode(sample: Sample, backend: str) -> str:
    """jvp in the arguments that enter linearly is float64's; in every other it is refused by name, never dropped."""
    require_derivative(sample, backend)
    tensors = sample.tensors(device=device_of(backend))
    double = {n: t.double() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    tangents = sample.tensors(seed=7, device=device_of(backend))

    def derivative(tensors, name, backend):
        def call(value):
            return sample({**tensors, name: value}, backend)

        return torch.func.jvp(call, (tensors[name],), (tangents[name].to(tensors[name].dtype),))[1]

    for name in sample.differentiable:
        exact = derivative(double, name, "reference")
        if name in sample.linear:
            for one, other in zip(derivative(tensors, name, backend), exact):
                torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)
        elif backend != "reference":
            with pytest.raises(NotImplementedError, match=f"to {sample.beneath.get(name, name)}[ ;.].*'reference'"):
                derivative(tensors, name, backend)
    if not sample.linear:
        raise Limit("no argument enters linearly; `backend='reference'` has all tangents")
    return ", ".join(f"`{name}`" for name in sample.linear)


def refuses_second_derivatives(sample: Sample, backend: str) -> None:
    """A second derivative raises; it is never zeros. No operator has one, so this never returns."""
    require_derivative(sample, backend)

    def differentiate_twice(backend: str) -> None:
        tensors = sample.tensors(device=device_of(backend))
        leaves = {n: t.requires_grad_(n in sample.differentiable) for n, t in tensors.items()}
        loss = sum(r.sin().sum() for r in sample(leaves, backend) if r.requires_grad)
        gradients = torch.autograd.grad(loss, [leaves[n] for n in sample.differentiable], create_graph=True)
        sum(g.sin().sum() for g in gradients if g.requires_grad).backward()

    with pytest.raises(NotImplementedError, match="no second derivative; backend='reference' has"):
        differentiate_twice(backend)
    differentiate_twice("reference")
    raise Limit("the kernels compute first derivatives; a second one raises, and `backend='reference'` has it")


# ---- memory, counting, watching ----


def _count(sample: Sample, backend: str, **how) -> tuple[Counter, tuple]:
    """How often each op ran in forward and backward of a checkpointed call, and its results."""
    tensors = sample.tensors(device=device_of(backend))

    def call(leaves):
        def segment(*values):
            return sample(dict(zip(leaves, values)), backend)

        return checkpoint(segment, *leaves.values(), use_reentrant=False, **how)

    with RecordedCalls() as recorded:
        got = train(sample, call, tensors)
    assert_same(got, train(sample, plain(sample, backend), tensors), "the same kernels")
    return Counter(op._opname for op, _ in recorded.calls), got


def checkpoints(sample: Sample, backend: str) -> None:
    """Checkpointing changes no bit."""
    _count(sample, backend)


def checkpoints_selectively(sample: Sample, backend: str) -> None:
    """A policy over op names decides what is recomputed: all of a segment but our ops, or those too."""
    require_derivative(sample, backend)
    names = Counter(names_of(sample, backend)[1])
    forward = {n for n in names if not n.endswith("_bwd")}

    def policy(ctx, op, *args, **kwargs):
        ours = op.namespace == namespace_of(backend) and op._opname in forward
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    recomputed, _ = _count(sample, backend)
    assert recomputed == names + Counter({n: names[n] for n in forward})
    saved, _ = _count(sample, backend, context_fn=partial(create_selective_checkpoint_contexts, policy))
    assert saved == names


def counts_flops(sample: Sample, backend: str) -> None:
    """torch's counter counts what the operator's convention says, forward and backward."""
    tensors = sample.tensors(device=device_of(backend))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sample(tensors, backend)
    if sample.flops is None:
        assert counter.get_total_flops() == 0
        raise NoMeaning("it compares and packs: no multiplication or addition to count")
    forward = sample.flops(sample.lengths[0], 2)
    assert counter.get_total_flops() == forward > 0
    with FlopCounterMode(display=False) as counter:
        run(sample, plain(sample, backend), tensors)
    assert counter.get_total_flops() == (int(forward * sample.training_flops) if sample.differentiable else forward)


def is_named_in_profiles(sample: Sample, backend: str) -> None:
    """A profile shows the op under its name, backward too."""
    _, names = names_of(sample, backend)
    tensors = sample.tensors(device=device_of(backend))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(sample, plain(sample, backend), tensors)
    shown = Counter(event.name for event in profile.events() if event.name.startswith("effattn"))
    for name, times in Counter(names).items():
        assert shown[f"{namespace_of(backend)}::{name}"] == times, (name, shown)


def is_deterministic(sample: Sample, backend: str) -> None:
    """Under torch.use_deterministic_algorithms, which also poisons fresh memory, no error and the same bits twice."""
    tensors = sample.tensors(device=device_of(backend))
    wanted = run(sample, plain(sample, backend), tensors)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            assert_same(run(sample, plain(sample, backend), tensors), wanted, "the same kernels")
    finally:
        torch.use_deterministic_algorithms(False)


def is_captured_in_cuda_graphs(sample: Sample, backend: str) -> None:
    """A captured call, replayed on other numbers in the same place, is the call on those."""
    if device_of(backend) != "cuda" or is_slow(backend):
        raise NotRun("no GPU here: the tests marked `gpu` in `tests/test_torch_features.py`")
    tensors, others = (sample.tensors(seed=seed, device="cuda") for seed in (0, 1))
    wanted = sample(others, backend)  # which also compiles what is compiled at the first call
    sample(tensors, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(tensors, backend)
    for name, tensor in tensors.items():
        tensor.copy_(others[name])
    graph.replay()
    assert_same(captured, wanted, backend)
