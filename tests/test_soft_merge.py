"""Soft merging: the formula, its corners, any size and layout, and what every operator must do under torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import conformance
import numpy as np
import pytest
import torch
from conformance import (
    LAYOUTS,
    Placed,
    RecordedCalls,
    backends_of,
    device_of,
    is_slow,
    launch,
    namespace_of,
    require,
)
from conformance.modes import GuardedAllocations
from conformance.rule import FORWARD_FACTOR, GRADIENT_FACTOR
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import effattn
from effattn import reference, soft_merge

KERNELS = pytest.mark.parametrize("backend", [b for b in backends_of("soft_merge") if b != "reference"])
EVERYWHERE = pytest.mark.parametrize("backend", backends_of("soft_merge"))
BESIDE_MATRIX = pytest.mark.parametrize("backend", [b for b in backends_of("soft_merge") if b != "cpu"])
"""Of features that test_torch_features.py checks on the cpu backend."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ROUNDING = {"cpu": 0.0, "triton": 1e-5}  # of a gradient of logits that is 0: whether x_n g and y g are the same sum
NAMES = ("output", "gradient of tokens", "gradient of logits")
FITTING = tuple(name for name in LAYOUTS if name not in ("token_major", "packed"))
SIZES = (
    (2, 21, 20, 7),
    (1, 1, 1, 1),
    (3, 1, 17, 65),
    (1, 3, 197, 17),
    (2, 17, 3, 197),
    (1, 65, 65, 3),
    (1, 197, 17, 1),
)
LARGE = ((1, 300, 197, 65), (2, 65, 130, 300), (1, 513, 33, 17))  # several blocks of tokens, channels, merged tokens


def draw(seed=0, batch=2, tokens=21, channels=20, merged=7, dtype=torch.float32, spread=1.0):
    """tokens, logits and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, tokens, channels), (batch, tokens, merged), (batch, merged, channels))
    x, logits, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return x.to(dtype), (spread * logits).to(dtype), grad.to(dtype)


def results(backend, x, logits, grad):
    """Output and both gradients, where the backend is tested."""
    require("soft_merge", backend)
    x, logits, grad = (t.detach().to(device_of(backend)) for t in (x, logits, grad))
    x.requires_grad_()
    logits.requires_grad_()
    output = soft_merge(x, logits, backend=backend)
    return tuple(t.detach().cpu() for t in (output, *torch.autograd.grad(output, (x, logits), grad)))


def in_numpy(x, logits, grad):
    """The formula and its derivative by hand, in float64, one column at a time."""
    x, logits, grad = (t.double().numpy() for t in (x, logits, grad))
    output, grad_x, grad_logits = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(logits.shape)
    for b, p in np.ndindex(logits.shape[0], logits.shape[2]):
        column = logits[b, :, p]
        if not np.isfinite(column).any():
            continue
        weights = np.exp(column - column.max())
        weights /= weights.sum()
        output[b, p] = sum(w * token for w, token in zip(weights, x[b]))
        grad_x[b] += np.outer(weights, grad[b, p])
        slopes = x[b] @ grad[b, p]
        grad_logits[b, :, p] = weights * (slopes - weights @ slopes)
    return output, grad_x, grad_logits


def assert_accurate(backend, dtype=torch.float32, draws=None, **sizes):
    """The accuracy rule. A call that misses it is pooled with seven more: eager is then right by accident."""
    draws = draws or (lambda seed: draw(seed, dtype=dtype, **sizes))
    errors, low_errors, largest = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    factors = torch.tensor([FORWARD_FACTOR, GRADIENT_FACTOR, GRADIENT_FACTOR])
    for seed in range(8):
        arguments = draws(seed)
        exact = results("reference", *(t.double() for t in arguments))
        for i, (got, low, wanted) in enumerate(
            zip(results(backend, *arguments), results("reference", *arguments), exact)
        ):
            assert (got.shape, got.dtype) == (wanted.shape, dtype), NAMES[i]
            assert got.isfinite().all(), NAMES[i]
            errors[i] = max(errors[i], (got.double() - wanted).abs().max())
            low_errors[i] = max(low_errors[i], (low.double() - wanted).abs().max())
            largest[i] = max(largest[i], wanted.abs().max())
        budgets = factors * low_errors + torch.finfo(dtype).eps * largest
        if budgets[2] == 0:  # of one token, whose weight is 1
            budgets[2] = ROUNDING.get(backend, 0.0)
        if (errors <= budgets).all():
            return
    pytest.fail(f"errors {errors.tolist()}, budgets {budgets.tolist()}")


def assert_same(got, wanted):
    for name, ours, other in zip(NAMES, got, wanted):
        assert torch.equal(ours, other), name


# ---- the formula ----


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_the_formula(size):
    batch, tokens, channels, merged = size
    arguments = draw(batch=batch, tokens=tokens, channels=channels, merged=merged, dtype=torch.float64)
    arguments[1][:, ::2, 0] = float("-inf")
    for got, wanted in zip(results("reference", *arguments), in_numpy(*arguments)):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-10, atol=1e-12)


def test_reference_passes_gradcheck():
    x, logits, _ = draw(tokens=5, channels=3, merged=4, dtype=torch.float64)
    logits[0, 2, 1] = float("-inf")
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x, g: soft_merge(x, g, backend="reference"), (x, logits.requires_grad_()))


def test_reference_has_second_derivatives():
    x, logits, _ = (t.requires_grad_() for t in draw(tokens=4, channels=3, merged=2, dtype=torch.float64))
    torch.autograd.gradgradcheck(lambda x, g: soft_merge(x, g, backend="reference"), (x, logits))


@KERNELS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_are_the_formula(backend, size):
    batch, tokens, channels, merged = size
    arguments = draw(batch=batch, tokens=tokens, channels=channels, merged=merged)
    for got, wanted in zip(results(backend, *arguments), in_numpy(*arguments)):
        np.testing.assert_allclose(got.double().numpy(), wanted, rtol=1e-4, atol=1e-5)


@KERNELS
def test_saved_logsumexp_is_natural(backend):
    require("soft_merge", backend)
    x, logits, _ = (t.to(device_of(backend)) for t in draw(spread=3.0))
    logits[1, :, 2] = float("-inf")
    _, saved = sys.modules["effattn.ops.soft_merge"].soft_merge_op.forward(backend, x, logits)
    assert (saved.shape, saved.dtype) == ((2, 7), torch.float32)
    torch.testing.assert_close(saved, logits.logsumexp(1), rtol=1e-6, atol=1e-6)


# ---- accuracy ----


@KERNELS
@DTYPES
@pytest.mark.parametrize("size", SIZES + LARGE, ids=str)
def test_accuracy_rule_at_any_size(backend, dtype, size):
    if is_slow(backend) and (size in LARGE or dtype != torch.float32):
        pytest.skip("the interpreter is slow")
    batch, tokens, channels, merged = size
    assert_accurate(backend, dtype, batch=batch, tokens=tokens, channels=channels, merged=merged)


@KERNELS
@DTYPES
@pytest.mark.parametrize("spread", [0.1, 10.0, 50.0])
def test_accuracy_rule_for_flat_and_for_peaked_weights(backend, dtype, spread):
    if is_slow(backend) and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    tokens, channels, merged = (40, 16, 9) if is_slow(backend) else (197, 48, 65)
    assert_accurate(backend, dtype, tokens=tokens, channels=channels, merged=merged, spread=spread)


@KERNELS
@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_accuracy_does_not_suffer_from_logits_far_from_zero(backend, offset):
    def far(seed):
        x, logits, grad = draw(seed, tokens=65)
        return x, logits + offset, grad

    assert_accurate(backend, draws=far)


# ---- corners ----


@KERNELS
@DTYPES
@pytest.mark.parametrize("low", [-1e4, float("-inf")])
def test_one_hot_logits_gather(backend, dtype, low):
    x, _, grad = draw(dtype=dtype)
    chosen = torch.tensor([[3, 20, 0, 7, 7, 19, 1], [0, 1, 2, 3, 4, 5, 20]])
    logits = torch.full((2, 21, 7), low).scatter_(1, chosen[:, None], 0.0).to(dtype)
    output, grad_x, grad_logits = results(backend, x, logits, grad)
    index = chosen[..., None].expand(-1, -1, 20)
    assert torch.equal(output, x.gather(1, index))
    torch.testing.assert_close(grad_x, torch.zeros_like(x).scatter_add(1, index, grad), rtol=1e-2, atol=1e-2)
    assert (grad_logits.abs() <= ROUNDING[backend]).all()


@KERNELS
@DTYPES
def test_uniform_logits_average(backend, dtype):
    x, logits, grad = draw(dtype=dtype)
    output, grad_x, _ = results(backend, x, torch.full_like(logits, 3.0), grad)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(output.double(), x.double().mean(1, keepdim=True).expand(-1, 7, -1), **tolerance)
    torch.testing.assert_close(grad_x.double(), (grad.double().sum(1, keepdim=True) / 21).expand_as(x), **tolerance)


@KERNELS
@DTYPES
def test_columns_of_minus_infinity_give_zeros_and_no_gradient(backend, dtype):
    x, logits, grad = draw(dtype=dtype)
    empty = torch.zeros(2, 7, dtype=torch.bool)
    empty[0, 0] = empty[1, 3] = empty[1, 6] = True
    masked = logits.masked_fill(empty[:, None], float("-inf"))
    output, grad_x, grad_logits = results(backend, x, masked, grad)
    assert (output[empty] == 0).all()
    assert (grad_logits.mT[empty] == 0).all()
    clean = results(backend, x, logits, grad.masked_fill(empty[..., None], 0.0))
    torch.testing.assert_close(grad_x, clean[1])
    assert torch.equal(output[~empty], clean[0][~empty])


@KERNELS
def test_tokens_of_minus_infinity_take_no_part(backend):
    x, logits, grad = draw()
    logits[:, 5:9] = float("-inf")
    got = results(backend, x, logits, grad)
    kept = [n for n in range(21) if not 5 <= n < 9]
    rest = results(backend, x[:, kept], logits[:, kept], grad)
    torch.testing.assert_close(got[0], rest[0])
    assert (got[1][:, 5:9] == 0).all()
    assert (got[2][:, 5:9] == 0).all()
    torch.testing.assert_close(got[2][:, kept], rest[2], rtol=1e-4, atol=1e-6)


@KERNELS
@DTYPES
def test_large_logits_stay_finite(backend, dtype):
    x, logits, grad = draw(dtype=dtype)
    got = results(backend, x, (logits.sign() * 1e4).to(dtype), grad)
    assert all(t.isfinite().all() for t in got)
    wanted = results("reference", x.double(), (logits.sign() * 1e4).to(dtype).double(), grad.double())
    for ours, exact in zip(got, wanted):
        scale = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


@EVERYWHERE
@pytest.mark.parametrize(("batch", "tokens", "merged"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (2, 0, 0), (0, 0, 0)])
def test_empty_tensors(backend, batch, tokens, merged):
    output, grad_x, grad_logits = results(backend, *draw(batch=batch, tokens=tokens, channels=5, merged=merged))
    assert output.shape == (batch, merged, 5)
    assert grad_x.shape == (batch, tokens, 5)
    assert grad_logits.shape == (batch, tokens, merged)
    assert tokens > 0 or (output == 0).all()
    assert merged > 0 or (grad_x == 0).all()


# ---- memory ----


@KERNELS
@DTYPES
@pytest.mark.parametrize("layout", FITTING)
def test_strides_make_no_difference_and_inputs_are_not_written(backend, dtype, layout):
    require("soft_merge", backend)
    if is_slow(backend) and (dtype != torch.float32 or layout not in ("transposed", "sliced", "expanded_everywhere")):
        pytest.skip("the interpreter is slow")
    drawn = draw(tokens=37, channels=33, merged=18, dtype=dtype)
    for changed in range(3):
        given = [t.to(device_of(backend)) for t in drawn]
        placed = Placed(given[changed], layout)
        plain = given.copy()
        given[changed], plain[changed] = placed.tensor, placed.tensor.contiguous()
        assert_same(results(backend, *given), results(backend, *plain))
        assert placed.is_untouched()


@KERNELS
@DTYPES
@pytest.mark.parametrize("layout", FITTING)
def test_accuracy_rule_in_any_layout(backend, dtype, layout):
    if is_slow(backend) and (dtype != torch.float32 or layout != "sliced"):
        pytest.skip("the interpreter is slow")
    columns = (
        (0, 1, 2) if "expanded" not in layout else (1, 2)
    )  # tokens that are all one have no gradient to be held to

    def laid_out(seed):
        drawn = [t.to(device_of(backend)) for t in draw(seed, dtype=dtype)]
        return [Placed(t, layout).tensor if i in columns else t for i, t in enumerate(drawn)]

    if layout == "expanded_heads":  # equal logits along the tokens; a gradient of the output that is one row
        columns = (2,)
    assert_accurate(backend, dtype, laid_out)


@KERNELS
def test_nothing_but_the_results_is_written_and_all_of_them(backend, poisoned_empty):
    require("soft_merge", backend)
    with RecordedCalls() as recorded:
        results(backend, *draw(tokens=50, channels=33, merged=18))
    for op, arguments in recorded.calls:
        with GuardedAllocations() as guarded:
            found = launch(op, arguments, device_of(backend))
        if backend != "cpu":  # whose allocations torch does not see: the sanitizers watch them
            guarded.assert_intact()
        assert all(t.isfinite().all() for t in found)


@KERNELS
def test_gradients_of_a_subset_are_those_of_all(backend):
    require("soft_merge", backend)
    x, logits, grad = (t.to(device_of(backend)) for t in draw())
    every = results(backend, x, logits, grad)
    for index, (with_x, with_logits) in enumerate(((True, False), (False, True))):
        given = (x.detach().requires_grad_(with_x), logits.detach().requires_grad_(with_logits))
        (one,) = torch.autograd.grad(soft_merge(*given, backend=backend), given[index], grad)
        assert torch.equal(one.cpu(), every[1 + index])


# ---- determinism ----


@DTYPES
@pytest.mark.parametrize("size", [(3, 200, 64, 65), (1, 300, 200, 300)], ids=str)
def test_every_bit_is_the_same_on_any_number_of_threads(dtype, size):
    batch, tokens, channels, merged = size
    arguments = draw(batch=batch, tokens=tokens, channels=channels, merged=merged, dtype=dtype)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(results("cpu", *arguments))
    for other in found[1:]:
        assert_same(other, found[0])


@KERNELS
def test_every_bit_is_the_same_from_run_to_run_and_alone_or_in_a_batch(backend):
    arguments = draw(batch=3)
    first = results(backend, *arguments)
    assert_same(results(backend, *arguments), first)
    assert_same(results(backend, *(t[1:2] for t in arguments)), [t[1:2] for t in first])


LEVELS = """
import torch, test_soft_merge as own
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for batch, tokens, channels, merged in own.SIZES[1:5] + own.LARGE[:1]:
        own.assert_accurate("cpu", dtype, batch=batch, tokens=tokens, channels=channels, merged=merged)
x, logits, grad = own.draw()
logits[:, :, 0] = float("-inf")
assert (own.results("cpu", x, logits, grad)[0][:, 0] == 0).all()
print(own.effattn._native.isa())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_narrow_levels_keep_the_accuracy_rule(level):
    require("soft_merge", "cpu")
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "EFFATTN_CPU_ISA": level, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    ran = subprocess.run([sys.executable, "-c", LEVELS], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if ran.stdout.strip() != level:
        pytest.skip(f"this processor runs {ran.stdout.strip()} where {level} is asked for")


# ---- torch ----


@pytest.fixture
def fresh_compiler():
    with conformance.fresh_compiler():
        yield


def on_device(backend, *tensors):
    require("soft_merge", backend)
    return [t.to(device_of(backend)) for t in tensors]


@KERNELS
def test_one_op_forward_and_one_backward(backend):
    require("soft_merge", backend)
    with RecordedCalls() as recorded:
        results(backend, *draw())
    ops = [op for op, _ in recorded.calls]
    assert [op.namespace for op in ops] == [namespace_of(backend)] * 2
    assert [op._opname for op in ops] == ["soft_merge_fwd", "soft_merge_bwd"]


@KERNELS
def test_opcheck(backend):
    require("soft_merge", backend)
    with RecordedCalls() as recorded:
        results(backend, *draw())
    for op, arguments in recorded.calls:
        torch.library.opcheck(op, arguments)


@KERNELS
def test_fake_kernels_tell_shapes_strides_and_dtypes(backend):
    require("soft_merge", backend)
    for layout in ("contiguous", "transposed"):
        given = [Placed(t, layout).tensor for t in on_device(backend, *draw(dtype=torch.bfloat16))]
        with RecordedCalls() as recorded:
            results(backend, *given)
        for op, arguments in recorded.calls:
            with FakeTensorMode() as mode:
                fakes = op(*(mode.from_tensor(a) for a in arguments))
            for fake, real in zip(fakes, op(*arguments), strict=True):
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@BESIDE_MATRIX
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(backend, dynamic, fresh_compiler):
    require("soft_merge", backend)

    def call(x, logits):
        return soft_merge(x, logits, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens, merged in ((21, 7), (33, 9), (12, 5)) if dynamic else ((21, 7),):
        x, logits, grad = on_device(backend, *draw(tokens=tokens, merged=merged))
        found = []
        for function in (compiled, call):
            given = [t.detach().requires_grad_() for t in (x, logits)]
            output = function(*given)
            found.append((output.detach(), *torch.autograd.grad(output, given, grad)))
        for got, wanted in zip(*found):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@BESIDE_MATRIX
def test_exports_with_an_open_batch(backend):
    x, logits, _ = on_device(backend, *draw())

    class Merge(torch.nn.Module):
        def forward(self, x, logits):
            return soft_merge(x, logits, backend=backend)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Merge(), (x, logits), dynamic_shapes=({0: batch}, {0: batch}))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("effattn") for target in targets) == (backend != "reference")
    x, logits, _ = on_device(backend, *draw(batch=5))
    torch.testing.assert_close(exported.module()(x, logits), soft_merge(x, logits, backend=backend))


@EVERYWHERE
@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_vmap_is_a_loop(backend, mapped):
    x, logits, _ = on_device(backend, *draw(batch=6))
    x, logits = x.unflatten(0, (3, 2)), logits.unflatten(0, (3, 2))
    given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((x, logits), mapped)]
    got = torch.func.vmap(lambda x, g: soft_merge(x, g, backend=backend), in_dims=mapped)(*given)
    for i in range(3):
        pair = [t[0 if dim is None else i] for t, dim in zip((x, logits), mapped)]
        torch.testing.assert_close(got[i], soft_merge(*pair, backend=backend))


@BESIDE_MATRIX
def test_per_example_gradients(backend):
    x, logits, grad = on_device(backend, *draw(batch=4))
    wanted = results(backend, x, logits, grad)
    x, logits, grad = (t.unflatten(0, (2, 2)) for t in (x, logits, grad))

    def loss(x, logits, grad):
        return (soft_merge(x, logits, backend=backend) * grad).sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, logits, grad)
    for got, exact in zip(found, wanted[1:]):
        torch.testing.assert_close(got.flatten(0, 1).cpu(), exact, rtol=1e-5, atol=1e-6)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_computes_in_its_dtype(backend, dtype):
    x, logits, _ = on_device(backend, *draw())
    x.requires_grad_()
    with torch.autocast(device_of(backend), dtype):
        output = soft_merge(x, logits, backend=backend)
    assert output.dtype == dtype
    assert torch.equal(output, soft_merge(x.to(dtype), logits.to(dtype), backend=backend))
    assert torch.autograd.grad(output.sum(), x)[0].dtype == torch.float32


@BESIDE_MATRIX
def test_checkpointing_changes_nothing(backend):
    x, logits, grad = on_device(backend, *draw())
    given = [t.detach().requires_grad_() for t in (x, logits)]
    output = checkpoint(lambda *t: soft_merge(*t, backend=backend), *given, use_reentrant=False)
    found = (output, *torch.autograd.grad(output, given, grad))
    assert_same([t.detach().cpu() for t in found], results(backend, x, logits, grad))


@pytest.mark.parametrize("backend", ["triton"])
def test_flops_are_counted(backend):
    x, logits, grad = on_device(backend, *draw())
    forward = 2 * 2 * 21 * 20 * 7
    with FlopCounterMode(display=False) as counter:
        soft_merge(x, logits, backend=backend)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        results(backend, x, logits, grad)
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("backend", ["triton"])
def test_second_derivatives_are_refused(backend):
    x, logits, _ = on_device(backend, *draw())
    output = soft_merge(x.requires_grad_(), logits, backend=backend)
    (gradient,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), x)


# ---- arguments ----

X, G = torch.ones(2, 5, 4), torch.ones(2, 5, 3)
BAD = (
    ("tokens that are no tensor", ([1.0], G), TypeError, "tokens must be a Tensor"),
    ("integer tokens", (X.int(), G), TypeError, "tokens must be floating point"),
    ("flat tokens", (X[0], G), ValueError, "tokens must have shape"),
    ("no channels", (X[..., :0], G), ValueError, "at least one channel"),
    ("logits that are no tensor", (X, None), TypeError, "logits must be a Tensor"),
    ("integer logits", (X, G.int()), TypeError, "logits must be floating point"),
    ("flat logits", (X, G[0]), ValueError, "logits must have shape"),
    ("logits of other tokens", (X, G[:, 1:]), ValueError, r"logits must have shape \(2, 5, merged tokens\)"),
    ("logits of another batch", (X, G[:1]), ValueError, r"logits must have shape \(2, 5, merged tokens\)"),
    ("logits of another dtype", (X, G.half()), TypeError, "logits must have tokens' dtype"),
    ("logits elsewhere", (X, G.to("meta")), ValueError, "logits must be on tokens"),
)


@pytest.mark.parametrize(("why", "arguments", "exception", "message"), BAD, ids=[bad[0] for bad in BAD])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_argument_is_named(why, arguments, exception, message, backend):
    with pytest.raises(exception, match=message):
        soft_merge(*arguments, backend=backend)


def test_bad_backends_are_named():
    with pytest.raises(ValueError, match=r"backend must be one of .*'tpu'"):
        soft_merge(X, G, backend="tpu")
    with pytest.raises(NotImplementedError, match="cuda"):
        soft_merge(X, G, backend="cuda")


@KERNELS
def test_float64_is_for_the_reference(backend):
    require("soft_merge", backend)
    with pytest.raises(NotImplementedError, match="float64"):
        soft_merge(X.double(), G.double(), backend=backend)
    assert torch.equal(soft_merge(X.double(), G.double()), reference.soft_merge(X.double(), G.double()))


def test_auto_takes_the_kernel():
    require("soft_merge", "cpu")
    assert effattn.explain(soft_merge, X, G).backend == "cpu"
