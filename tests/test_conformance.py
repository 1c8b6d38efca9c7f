"""Numbers: every operator on every backend against its formula, under every layout, bit for bit repeatable."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from conformance import (
    CASES,
    ELSEWHERE,
    LAYOUTS,
    SIXTEEN_BITS_ONLY,
    GuardedAllocations,
    Placed,
    RecordedCalls,
    Shape,
    all_cases,
    assert_same_bits,
    assert_within_budget,
    case_and_backend,
    case_backend_and,
    device_of,
    is_slow,
    launch,
    require,
    run,
    small,
)
from hypothesis import given
from hypothesis import strategies as st

from effattn import _native, _registry

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 3, 8, 16, 24, 30, 64, 80, 128, 200, 256)
KERNELS = case_and_backend(without=("reference",))
SLOW = "interpreters and emulators are slow, each has its own file of tests"

CORNERS = {
    "one token": Shape(grid=(1, 1), prefix=0),
    "only prefix tokens, no rows": Shape(grid=(0, 4), prefix=5),
    "only prefix tokens, no columns": Shape(grid=(4, 0), prefix=5),
    "no batch": Shape(batch=0),
    "no tokens": Shape(grid=(0, 3), prefix=0),
    "one row": Shape(grid=(1, 13), prefix=0),
    "one column": Shape(grid=(13, 1), prefix=2),
    "tall": Shape(grid=(11, 3), prefix=0),
    "wide": Shape(grid=(3, 11), prefix=3),
    "one head": Shape(heads=1),
    "one Gaussian": Shape(gaussians=1),
    "many Gaussians": Shape(gaussians=67),
    "a class token before a square grid": Shape(batch=1, heads=2, grid=(14, 14), head_dim=64),
    "more than one tile of queries and of keys": Shape(batch=1, heads=1, grid=(23, 29), prefix=0, head_dim=40),
    "fewer keys than queries": Shape(keys=7),
    "more keys than queries": Shape(keys=300),
    "one key": Shape(keys=1),
    "no keys": Shape(keys=0),
}


OVER_BUDGET = {
    (
        "masked_product_attention",
        kernel,
        corner,
    ): f"weight's gradient of 5 tokens uses {used} of its budget: dO . O and dO V^T are summed in different orders"
    for kernel, used in (("triton", 1.15), ("cpu baseline", 1.31))
    for corner in ("only prefix tokens, no rows", "only prefix tokens, no columns")
}
"""Known misses of the accuracy rule, float32, with their cause."""


def dtype_ids(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPE_IDS = {dtype_ids(dtype): dtype for dtype in DTYPES}


def check(case, backend: str, shape: Shape, dtype: torch.dtype, layouts=None, grad_layout=None, seed: int = 0) -> None:
    require(case.op, backend)
    device = device_of(backend)
    options, grad_output = case.options(shape), case.grad_output(shape, dtype, grad_layout, device)
    assert_within_budget(
        case, lambda seed: (case.tensors(shape, dtype, layouts, seed, device), options, grad_output), backend, seed
    )


@functools.cache
def changes(case, shape: Shape) -> bool:
    """Whether the case's arguments differ in more than their numbers from those of an ordinary shape."""

    def arguments(shape: Shape) -> tuple:
        return {name: tensor.shape for name, tensor in case.tensors(shape).items()}, case.options(shape)

    return arguments(shape) != arguments(Shape())


def test_every_registered_operator_has_an_entry():
    assert set(CASES) | set(ELSEWHERE) == set(_registry.operators())
    assert all((Path(__file__).parent / name).exists() for name in (*ELSEWHERE.values(), *SIXTEEN_BITS_ONLY.values()))


def test_backends_that_are_said_to_take_no_float32_take_none():
    for name, op in SIXTEEN_BITS_ONLY:
        predicate = next(b.predicate for b in _registry._table[op] if b.name == name)
        ok, reason = predicate(_registry.Problem(device_of(name), torch.float32, 16))
        assert not ok
        assert "bfloat16 and float16" in reason


def test_every_operator_ends_at_the_reference():
    for op in _registry.operators():
        assert _registry._table[op][-1].name == "reference"


@pytest.mark.parametrize("case", all_cases(), ids=str)
@pytest.mark.parametrize("shape", [Shape(), *CORNERS.values()], ids=["usual", *CORNERS])
def test_reference_is_the_formula(case, shape):
    if shape.tokens > 300:
        pytest.skip("the NumPy loops are for small shapes")
    tensors, options = case.tensors(shape, torch.float64), case.options(shape)
    expected = case.formula(**{name: t.numpy() for name, t in tensors.items()}, **options)
    torch.testing.assert_close(
        run(case, tensors, options, "reference").output, torch.from_numpy(expected), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_reference_gradients_are_those_of_finite_differences(case):
    shape = Shape(batch=1, heads=2, grid=(2, 3), head_dim=3, gaussians=2)
    tensors, options = case.tensors(shape, torch.float64), case.options(shape)
    names = [name for name in case.differentiable if name not in case.straight_through]

    def call(*values):
        return case({**tensors, **dict(zip(names, values))}, options, "reference")

    assert torch.autograd.gradcheck(call, [tensors[name].requires_grad_() for name in names])


def _reached_at_head_dims(case, backend, dtype, head_dim) -> bool:
    """Interpreters and emulators take two head_dims, of variants the first."""
    first, second = (dtype, head_dim) == (torch.float32, 3), (dtype, head_dim) == (torch.bfloat16, 64)
    if not is_slow(backend):
        return True
    return (first and not (case.variant and case.same_kernels)) or (second and not case.variant)


@case_backend_and(
    _reached_at_head_dims, every_variant=True, dtype=DTYPE_IDS, head_dim={str(size): size for size in HEAD_DIMS}
)
def test_accuracy_at_every_head_dim(case, backend, dtype, head_dim):
    check(case, backend, small(backend).with_(head_dim=head_dim, heads=2), dtype)


def _reached_in_corners(case, backend, corner, dtype) -> bool:
    shape = CORNERS[corner]
    if is_slow(backend) and (shape.tokens * shape.key_tokens > 700 or shape.gaussians > 9 or dtype != torch.float32):
        return False
    if is_slow(backend) and corner in ("tall", "wide", "one row", "one head", "only prefix tokens, no columns"):
        return False
    if dtype == torch.float16 and shape.head_dim == 16 and shape.tokens > 1:
        return False  # float16 takes bfloat16's way through these corners
    return changes(case, shape)  # else this operator does not look at what the corner changes: an ordinary call


@case_backend_and(_reached_in_corners, corner={name: name for name in CORNERS}, dtype=DTYPE_IDS)
def test_accuracy_in_corner_cases(case, backend, dtype, corner, request):
    kernel = f"cpu {_native.isa()}" if backend == "cpu" else backend
    if dtype == torch.float32 and (case.op, kernel, corner) in OVER_BUDGET:
        reason = OVER_BUDGET[case.op, kernel, corner]
        request.applymarker(pytest.mark.xfail(raises=AssertionError, strict=False, reason=reason))
    check(case, backend, CORNERS[corner], dtype)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_under_every_layout(case, backend, dtype, layout):
    if is_slow(backend) and (dtype != torch.float32 or layout not in ("packed", "every_other", "expanded_tokens")):
        pytest.skip(SLOW)
    check(case, backend, small(backend), dtype, layout, layout)


_layouts = st.sampled_from(sorted(LAYOUTS))


@KERNELS
@given(
    shape=st.builds(
        Shape,
        batch=st.integers(1, 3),
        heads=st.integers(1, 4),
        grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        prefix=st.integers(0, 3),
        head_dim=st.integers(1, 100),
        gaussians=st.integers(1, 8),
        keys=st.none() | st.integers(1, 90),
    ),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(_layouts, _layouts, _layouts),
    grad_layout=_layouts,
    seed=st.integers(0, 2**16),
)
def test_accuracy_over_shapes_layouts_and_dtypes(case, backend, shape, dtype, layouts, grad_layout, seed):
    if is_slow(backend):
        pytest.skip(SLOW)
    check(case, backend, shape, dtype, layouts, grad_layout, seed)


@case_and_backend()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_ids)
def test_output_is_laid_out_like_query(case, backend, dtype):
    require(case.op, backend)
    shape, device = small(backend), device_of(backend)
    tensors = case.tensors(shape, dtype, device=device)
    for name in ("query", "value"):  # which of them decides is the operator's: here both say the same
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    got = run(case, tensors, case.options(shape), backend, case.grad_output(shape, dtype, device=device))
    if backend != "reference":
        assert got.output.stride() == tensors["query"].stride()
        assert got.gradients["query"].stride() == tensors["query"].stride()
    assert got.output.dtype == got.gradients["query"].dtype == dtype


@case_and_backend()
def test_inputs_are_not_written(case, backend):
    require(case.op, backend)
    shape, device = small(backend), device_of(backend)
    options = case.options(shape)
    for layout in ("packed", "expanded_heads", *(() if is_slow(backend) else ("contiguous", "sliced"))):
        tensors, placed = case.tensors(shape, device=device), {}
        for name, tensor in tensors.items():
            placed[name] = Placed(tensor, layout if name in ("query", "key", "value") else "contiguous")
        grad = Placed(case.grad_output(shape, device=device), layout)
        result = run(case, {name: p.tensor for name, p in placed.items()}, options, backend, grad.tensor)
        assert result.output.isfinite().all()
        for name, p in {**placed, "grad_output": grad}.items():
            assert p.is_untouched(), f"{name} was written ({layout})"


@case_and_backend(without=("reference", "cpu"))  # C++ allocates below any mode; tests/test_sanitizer.py watches it
@pytest.mark.parametrize("head_dim", [5, 64])
def test_kernels_write_only_inside_their_outputs(case, backend, head_dim):
    require(case.op, backend)
    if backend == "cuda":
        pytest.skip("C++ allocates below any mode; the emulator's guard pages and compute-sanitizer watch it")
    if is_slow(backend) and head_dim == 64:
        pytest.skip(SLOW)
    shape, device = small(backend).with_(head_dim=head_dim), device_of(backend)
    with RecordedCalls() as recorded:
        run(
            case,
            case.tensors(shape, device=device),
            case.options(shape),
            backend,
            case.grad_output(shape, device=device),
        )
    names = [str(op).split("_")[-1] for op, _ in recorded.calls]
    assert names == ["fwd.default"] * case.launches + ["bwd.default"] * case.launches
    for op, args in recorded.calls:
        with GuardedAllocations() as guarded:
            results = launch(op, args, device)
        guarded.assert_intact()
        for result, wanted in zip(results, op(*args)):
            assert torch.equal(result, wanted)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_ids)
def test_same_bits_run_to_run_and_for_any_number_of_threads(case, backend, dtype):
    require(case.op, backend)
    if is_slow(backend) and dtype != torch.float32:
        pytest.skip(SLOW)
    device = device_of(backend)
    shape = small(backend) if is_slow(backend) else Shape(batch=3, heads=3, grid=(12, 13), head_dim=32)
    tensors, options = case.tensors(shape, dtype, device=device), case.options(shape)
    grad_output = case.grad_output(shape, dtype, device=device)
    first = run(case, tensors, options, backend, grad_output)
    for threads in (1, 2, 1, 2) if backend == "cpu" else (1, 2):
        torch.set_num_threads(threads)
        assert_same_bits(run(case, tensors, options, backend, grad_output), first)


@case_and_backend()
def test_gradients_of_a_subset_are_those_of_all(case, backend):
    require(case.op, backend)
    shape, device = small(backend), device_of(backend)
    tensors, options = case.tensors(shape, device=device), case.options(shape)
    grad_output = case.grad_output(shape, device=device)
    everything = run(case, tensors, options, backend, grad_output)
    names = case.differentiable
    subsets = (names[::2], names[1::2]) if is_slow(backend) else [(name,) for name in names]
    for subset in subsets:
        some = run(case, tensors, options, backend, grad_output, wrt=subset)
        for name in subset:
            assert torch.equal(some.gradients[name], everything.gradients[name])
    with torch.no_grad():
        assert not case(tensors, options, backend).requires_grad


@case_and_backend()
def test_examples_of_a_batch_do_not_touch_each_other(case, backend):
    require(case.op, backend)
    if case.mixes_batch:
        pytest.skip("by its definition they do")
    shape, device = small(backend).with_(batch=3), device_of(backend)
    tensors, options = case.tensors(shape, device=device), case.options(shape)
    together = case(tensors, options, backend)
    for index in range(3):
        one = {n: t if n in case.parameters else t[index : index + 1] for n, t in tensors.items()}
        alone = case(one, options, backend)
        if backend == "reference":
            torch.testing.assert_close(alone, together[index : index + 1])
        else:
            assert torch.equal(alone, together[index : index + 1])


@KERNELS
def test_large_scores_do_not_overflow(case, backend):
    require(case.op, backend)
    shape, device = small(backend), device_of(backend)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.tensors(shape, dtype, device=device)
        tensors = {**tensors, "query": tensors["query"] * 60, "key": tensors["key"] * 60}
        got = run(case, tensors, case.options(shape), backend, case.grad_output(shape, dtype, device=device))
        assert got.output.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in got.gradients.values())
