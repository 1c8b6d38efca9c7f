"""Carrying out a plan of merging tokens: merge, merge_weighted and unmerge on every backend, and their gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import Placed, device_of, is_slow, place, require
from conformance.rule import FORWARD_FACTOR, GRADIENT_FACTOR
from linear_like import KERNELS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effattn import TokenMerge, bipartite_soft_matching
from effattn.ops.token_merging_plan import merge_op, unmerge_op, weighted_op
from effattn.reference.token_merging import MODES, group, token_merge, token_merge_weighted, token_unmerge

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", KERNELS["TokenMerge.merge"])
LAYOUTS = ("contiguous", "transposed", "sliced", "every_other", "expanded_batch", "expanded_everywhere")

# (N, T, C): odd and even columns, tails of every vector, a single one, more outputs than one block of work
SHAPES = ((2, 1, 1), (9, 5, 7), (20, 1, 33), (31, 40, 64), (200, 90, 130), (50, 20, 320))


def on(plan: TokenMerge, device: str) -> TokenMerge:
    sizes = None if plan.sizes is None else plan.sizes.to(device)
    return TokenMerge(plan.source.to(device), plan.members.to(device), plan.offsets.to(device), sizes, plan.padded)


def random_plan(tokens: int, outputs: int, batch: int = 2, seed: int = 0, device: str = "cpu") -> TokenMerge:
    """Groups of any number of members, in any order; some are empty, which makes it a padded plan."""
    generator = torch.Generator().manual_seed(seed)
    return on(
        TokenMerge(*group(torch.randint(outputs, (batch, tokens), generator=generator), outputs), None, True), device
    )


def pairs_plan(tokens: int, merged: int, batch: int = 2, device: str = "cpu", **options) -> TokenMerge:
    metric = torch.randn(batch, tokens, 8, generator=torch.Generator().manual_seed(1))
    return on(bipartite_soft_matching(metric, merged, backend="reference", **options), device)


def shapes_of(backend: str):
    return SHAPES[1:4] if is_slow(backend) else SHAPES


def draw(*shape: int, dtype=torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def results(call, tensors: list[Tensor], upstream: list[Tensor | None]) -> list[Tensor]:
    """Outputs of ``call``, then gradients of all ``tensors``; an upstream gradient of None leaves its output out."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = call(*tensors)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    used = [(o, g) for o, g in zip(outputs, upstream) if g is not None]
    gradients = torch.autograd.grad([o for o, _ in used], tensors, [g for _, g in used])
    return [*(o.detach() for o in outputs), *gradients]


def assert_rule(call, backend: str, tensors: list[Tensor], upstream: list[Tensor | None]) -> None:
    """max|ours - ref64| <= factor * max|eager - ref64| + eps * max|ref64| for every output and gradient."""
    got = results(lambda *t: call(backend, *t), tensors, upstream)
    low = results(lambda *t: call("reference", *t), tensors, upstream)
    exact_upstream = [None if g is None else g.double() for g in upstream]
    exact = results(lambda *t: call("reference", *t), [t.double() for t in tensors], exact_upstream)
    dtype = tensors[0].dtype
    for index, (ours, eager, wanted) in enumerate(zip(got, low, exact)):
        assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype)
        if not wanted.numel():
            continue
        error, budget = ((t.double() - wanted).abs().max().item() for t in (ours, eager))
        factor = FORWARD_FACTOR if index < len(upstream) else GRADIENT_FACTOR
        budget = factor * budget + torch.finfo(dtype).eps * wanted.abs().max().item()
        assert error <= budget, f"result {index}: error {error:.3e}, budget {budget:.3e}"


# ---- the accuracy rule ----


@BACKENDS
@DTYPES
@pytest.mark.parametrize("mode", MODES)
def test_merge_keeps_the_accuracy_rule(backend, dtype, mode):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    for tokens, outputs, channels in shapes_of(backend):
        plan = random_plan(tokens, outputs, device=device)
        x = draw(2, tokens, channels, dtype=dtype, device=device)
        grad = draw(2, outputs, channels, dtype=dtype, device=device, seed=1)
        assert_rule(lambda b, t, plan=plan: plan.merge(t, mode, backend=b), backend, [x], [grad])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("has_sizes", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_weighted_merge_keeps_the_accuracy_rule(backend, dtype, has_sizes, has_residual):
    require("TokenMerge.merge_weighted", backend)
    device = device_of(backend)
    for tokens, outputs, channels in shapes_of(backend):
        plan = random_plan(tokens, outputs, device=device)
        tensors = [draw(2, tokens, channels, dtype=dtype, device=device)]
        if has_residual:
            tensors.append(draw(2, tokens, channels, dtype=dtype, device=device, seed=2))
        if has_sizes:
            tensors.append(draw(2, tokens, device=device, seed=3).abs() + 0.5)
        grads = [draw(2, outputs, channels, dtype=dtype, device=device, seed=4)]
        grads.append(draw(2, outputs, device=device, seed=5) if has_sizes else None)

        def call(b, x, *rest, plan=plan):
            rest = list(rest)
            residual = rest.pop(0) if has_residual else None
            sizes = rest.pop(0) if has_sizes else None
            merged, totals = plan.merge_weighted(x, sizes, residual=residual, backend=b)
            return (
                (merged, totals)
                if has_sizes
                else (merged, totals.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
            )

        assert_rule(call, backend, tensors, grads)


@BACKENDS
@DTYPES
def test_unmerge_keeps_the_accuracy_rule(backend, dtype):
    require("TokenMerge.unmerge", backend)
    device = device_of(backend)
    for tokens, outputs, channels in shapes_of(backend):
        plan = random_plan(tokens, outputs, device=device)
        y = draw(2, outputs, channels, dtype=dtype, device=device)
        grad = draw(2, tokens, channels, dtype=dtype, device=device, seed=1)
        assert_rule(lambda b, t, plan=plan: plan.unmerge(t, backend=b), backend, [y], [grad])
        assert torch.equal(plan.unmerge(y, backend=backend), token_unmerge(y, plan.source))


@BACKENDS
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_no_bit_and_inputs_are_not_written(backend, dtype, layout):
    require("TokenMerge.merge", backend)
    if is_slow(backend) and dtype != torch.float32:
        pytest.skip("strides are elements: the same for every dtype")
    device = device_of(backend)
    plan = random_plan(21, 10, device=device)
    values = draw(4, 2, 21, 37, dtype=dtype, device=device)
    placed = [Placed(v, layout) for v in values]
    x, residual, grad_in, y = (p.tensor for p in placed)
    grad, y, grad_in = grad_in[:, :10], y[:, :10], residual
    sizes = draw(2, 21, device=device).abs() + 0.5
    calls = (
        *((lambda t, mode=mode: plan.merge(t, mode, backend=backend), [x], [grad]) for mode in MODES),
        (lambda t: plan.unmerge(t, backend=backend), [y], [grad_in]),
        (
            lambda t, r, s: plan.merge_weighted(t, s, residual=r, backend=backend),
            [x, residual, sizes],
            [grad, draw(2, 10, device=device)],
        ),
    )
    for call, tensors, upstream in calls:
        got = results(call, tensors, upstream)
        wanted = results(call, [t.contiguous() for t in tensors], [g.contiguous() for g in upstream])
        for index, (ours, dense) in enumerate(zip(got, wanted)):
            assert torch.equal(ours, dense), f"result {index}"
    assert all(p.is_untouched() for p in placed)


@BACKENDS
@DTYPES
def test_results_past_the_caches_are_those_of_few_rows(backend, dtype):
    """From 8 MB on the CPU writes whole lines past its caches."""
    require("TokenMerge.merge", backend)
    if is_slow(backend):
        pytest.skip("slow here")
    device = device_of(backend)
    channels = 512 if dtype == torch.float32 else 1024
    many = pairs_plan(1500, 300, batch=4, device=device)
    x = draw(4, 1500, channels, dtype=dtype, device=device)
    sizes = draw(4, 1500, device=device).abs() + 0.5
    grads = draw(4, 1200, channels, dtype=dtype, device=device), draw(4, 1200, device=device)

    def weighted(plan):
        return lambda t, s: plan.merge_weighted(t, s, backend=backend)

    whole = results(weighted(many), [x, sizes], [*grads])
    largest = results(lambda t: many.merge(t, "max", backend=backend), [x], [grads[0]])
    for b in range(4):
        one = TokenMerge(many.source[b : b + 1], many.members[b : b + 1], many.offsets[b : b + 1])
        part = results(weighted(one), [x[b : b + 1], sizes[b : b + 1]], [g[b : b + 1] for g in grads])
        assert all(torch.equal(w[b : b + 1], p) for w, p in zip(whole, part))
        part = results(lambda t, one=one: one.merge(t, "max", backend=backend), [x[b : b + 1]], [grads[0][b : b + 1]])
        assert all(torch.equal(w[b : b + 1], p) for w, p in zip(largest, part))


# ---- what a plan does ----


def test_tokens_alone_are_copied_bit_by_bit_on_the_cpu():
    require("TokenMerge.merge", "cpu")
    plan = pairs_plan(24, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = draw(2, 24, 19, dtype=dtype)
        x[:, :, 0], x[:, :, 1] = -0.0, 6e-8 if dtype == torch.float16 else 1e-40
        sizes = draw(2, 24).abs() + 0.1
        alone = plan.offsets.diff().gather(1, plan.source.long()) == 1
        averages = (plan.merge_weighted(x, sizes, backend="cpu")[0], plan.merge_weighted(x, backend="cpu")[0])
        for merged in (*(plan.merge(x, m, backend="cpu") for m in MODES), *averages):
            back = plan.unmerge(merged, backend="cpu")
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(back[alone].view(bits), x[alone].view(bits))
            assert not torch.equal(back, x)


@BACKENDS
@DTYPES
def test_unmerging_restores_tokens_that_were_alone(backend, dtype):
    require("TokenMerge.unmerge", backend)
    device = device_of(backend)
    plan, x = pairs_plan(24, 5, device=device), draw(2, 24, 19, dtype=dtype, device=device)
    alone = plan.offsets.diff().gather(1, plan.source.long()) == 1
    assert alone.sum() >= 2 * (24 - 2 * 5)
    for merged in (*(plan.merge(x, m, backend=backend) for m in MODES), plan.merge_weighted(x, backend=backend)[0]):
        back = plan.unmerge(merged, backend=backend)
        assert torch.equal(back[alone], x[alone])
        assert not torch.equal(back, x)


@BACKENDS
def test_sum_of_ones_counts_members(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    for plan in (random_plan(40, 17, device=device), pairs_plan(40, 11, device=device)):
        ones = torch.ones(2, 40, 3, device=device)
        assert torch.equal(plan.merge(ones, "sum", backend=backend)[:, :, 1], plan.offsets.diff().float())
        sizes = plan.merge_weighted(ones, backend=backend)[1]
        assert torch.equal(sizes.squeeze(-1), plan.offsets.diff().float())


@BACKENDS
@pytest.mark.parametrize("mode", MODES)
def test_outputs_without_members_are_zero(backend, mode):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = on(TokenMerge(*group(torch.tensor([[4, 1, 4], [0, 0, 0]]), 6), None, True), device)
    x = draw(2, 3, 5, device=device).requires_grad_()
    for merged in (plan.merge(x, mode, backend=backend), *plan.merge_weighted(x, backend=backend)):
        assert not merged[~plan.valid].any()
        assert merged[plan.valid].all()
    (grad,) = torch.autograd.grad(plan.merge(x, mode, backend=backend).sum(), x)
    assert torch.equal(
        grad.sum((1, 2)),
        torch.tensor([2.0, 1.0], device=device) * 5 if mode != "sum" else torch.tensor([15.0, 15.0], device=device),
    )


@BACKENDS
def test_tokens_need_no_order(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    order = torch.tensor([[3, 0, 2, 1, 4]])
    plan = on(TokenMerge(*group(order, 5), None, True), device)
    x = draw(1, 5, 4, device=device)
    merged = plan.merge(x, backend=backend)
    assert torch.equal(merged[0, order[0].to(device)], x[0])
    assert torch.equal(plan.unmerge(merged, backend=backend), x)


@BACKENDS
def test_a_maximum_s_gradient_is_shared_by_those_that_attain_it(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = on(TokenMerge(*group(torch.tensor([[0, 0, 0, 1, 1]]), 2), None, True), device)
    x = torch.tensor(
        [[[1.0, 5.0], [1.0, 2.0], [0.0, 5.0], [-3.0, 0.0], [-3.0, 0.0]]], device=device, requires_grad=True
    )
    grad = torch.tensor([[[6.0, 8.0], [4.0, 2.0]]], device=device)
    (got,) = torch.autograd.grad(plan.merge(x, "max", backend=backend), x, grad)
    wanted = torch.tensor([[[3.0, 4.0], [3.0, 0.0], [0.0, 4.0], [2.0, 1.0], [2.0, 1.0]]], device=device)
    assert torch.equal(got, wanted)


@BACKENDS
@DTYPES
def test_ties_of_a_maximum_share_as_autograd_does(backend, dtype):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = random_plan(30, 8, device=device)
    x = (draw(2, 30, 9, device=device).mul(1.5).round() + 10).to(dtype)  # not 0, which torch's own zeros attain too
    grad = draw(2, 8, 9, dtype=dtype, device=device)
    assert_rule(lambda b, t: plan.merge(t, "max", backend=b), backend, [x], [grad])


@BACKENDS
def test_a_maximum_shows_nan(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = on(TokenMerge(*group(torch.tensor([[0, 0, 1, 1, 2]]), 3)), device)
    for place_of_nan in (0, 1, 4):
        x = draw(1, 5, 20, device=device)
        x[0, place_of_nan, 3] = float("nan")
        got = plan.merge(x, "max", backend=backend)
        wanted = token_merge(x, plan.source, plan.offsets, "max")
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        assert got.isnan().sum() == 1


@BACKENDS
def test_groups_of_size_zero_give_zero_and_no_gradient(backend):
    require("TokenMerge.merge_weighted", backend)
    device = device_of(backend)
    plan = on(TokenMerge(*group(torch.tensor([[0, 0, 1, 2, 2]]), 3)), device)
    x = draw(1, 5, 6, device=device).requires_grad_()
    sizes = torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0]], device=device, requires_grad=True)
    merged, totals = plan.merge_weighted(x, sizes, backend=backend)
    assert totals.tolist() == [[0.0, 0.0, 2.0]]
    assert not merged[0, :2].any()
    assert torch.equal(merged[0, 2], x[0, 4])
    of_totals = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    grad_x, grad_sizes = torch.autograd.grad((merged, totals), (x, sizes), (torch.ones_like(merged), of_totals))
    assert not grad_x[0, :4].any()
    assert torch.equal(grad_x[0, 4], torch.ones(6, device=device))
    assert grad_sizes[0, :3].tolist() == [1.0, 1.0, 2.0]
    wanted = 3 + (x[0, 3] - x[0, 4]).sum() / 2
    torch.testing.assert_close(grad_sizes[0, 3], wanted)
    assert grad_sizes[0, 4] == 3


@BACKENDS
def test_padding_of_an_earlier_plan_merges_as_in_the_reference(backend):
    require("TokenMerge.merge_weighted", backend)
    device = device_of(backend)
    first, second = random_plan(20, 20, device=device), random_plan(20, 9, seed=3, device=device)
    x = draw(2, 20, 5, device=device)
    padded, sizes = first.merge_weighted(x, backend="reference")
    assert not sizes.all()
    grads = [draw(2, 9, 5, device=device), draw(2, 9, 1, device=device)]
    assert_rule(lambda b, t, s: second.merge_weighted(t, s, backend=b), backend, [padded, sizes], grads)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_sizes_come_back_as_they_were_given(backend, dtype, rank):
    require("TokenMerge.merge_weighted", backend)
    device = device_of(backend)
    sizes = torch.arange(1, 11).expand(2, 10).to(dtype).to(device)
    sizes = sizes.unsqueeze(-1) if rank == 3 else sizes
    x = draw(2, 10, 6, device=device)
    for plan, given in (
        (random_plan(10, 4, device=device), sizes),
        (pairs_plan(10, 3, device=device, sizes=sizes.cpu()), None),
    ):
        merged, totals = plan.merge_weighted(x, given, backend=backend)
        flat = sizes.reshape(2, 10).float()
        wanted, wanted_totals = token_merge_weighted(x, plan.source, plan.offsets, None, flat)
        torch.testing.assert_close(merged, wanted)
        assert totals.dtype == dtype
        assert torch.equal(totals, wanted_totals.to(dtype).reshape(2, -1, *sizes.shape[2:]))


@BACKENDS
def test_gradient_of_only_the_sizes_or_only_the_tokens(backend):
    require("TokenMerge.merge_weighted", backend)
    device = device_of(backend)
    plan = random_plan(15, 6, device=device)
    x, sizes = draw(2, 15, 7, device=device), draw(2, 15, device=device).abs() + 0.5
    alone = sizes.clone().requires_grad_()
    plan.merge_weighted(x, alone, backend=backend)[1].square().sum().backward()
    wanted = sizes.clone().requires_grad_()
    plan.merge_weighted(x, wanted, backend="reference")[1].square().sum().backward()
    torch.testing.assert_close(alone.grad, wanted.grad)
    for tensors in (("x",), ("sizes",), ("x", "sizes")):
        found = []
        for b in (backend, "reference"):
            given = {"x": x.clone(), "sizes": sizes.clone()}
            for name in tensors:
                given[name].requires_grad_()
            plan.merge_weighted(given["x"], given["sizes"], backend=b)[0].square().sum().backward()
            found.append([given[name].grad for name in tensors])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_upstream_gradients_may_be_expanded(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = random_plan(15, 6, device=device)
    found = []
    for b in (backend, "reference"):
        x, y = draw(2, 15, 7, device=device).requires_grad_(), draw(2, 6, 7, device=device).requires_grad_()
        sizes = (draw(2, 15, device=device).abs() + 0.5).requires_grad_()
        merged, totals = plan.merge_weighted(x, sizes, backend=b)
        parts = (plan.merge(x, m, backend=b) for m in MODES)
        (merged.sum() + totals.sum() + plan.unmerge(y, backend=b).sum() + sum(p.sum() for p in parts)).backward()
        found.append((x.grad, y.grad, sizes.grad))
    torch.testing.assert_close(*found)


@BACKENDS
def test_identity_plan_returns_its_input(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    for tokens in (1, 4):
        plan = pairs_plan(tokens, 0, device=device)
        x = draw(2, tokens, 3, device=device)
        assert plan.merge(x, "max", backend=backend) is x
        assert plan.unmerge(x, backend=backend) is x
        merged, sizes = plan.merge_weighted(x, backend=backend)
        assert merged is x
        assert torch.equal(sizes, torch.ones(2, tokens, 1, device=device))
        assert torch.equal(plan.merge_weighted(x, residual=x, backend=backend)[0], x + x)


@BACKENDS
@pytest.mark.parametrize(
    ("batch", "tokens", "outputs", "channels"), [(0, 6, 3, 4), (2, 6, 3, 0), (2, 0, 3, 4), (0, 0, 0, 0)]
)
def test_empty_calls(backend, batch, tokens, outputs, channels):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    source = torch.arange(tokens).expand(batch, -1) % max(outputs, 1)
    plan = on(TokenMerge(*group(source, outputs), None, True), device)
    x, sizes = draw(batch, tokens, channels, device=device), torch.ones(batch, tokens, device=device)
    for mode in MODES:
        output, grad = results(
            lambda t, m=mode: plan.merge(t, m, backend=backend), [x], [draw(batch, outputs, channels, device=device)]
        )
        assert output.shape == (batch, outputs, channels)
        assert not output.any() or tokens > 0
        assert grad.shape == x.shape
    merged, totals, *grads = results(
        lambda t, s: plan.merge_weighted(t, s, backend=backend),
        [x, sizes],
        [draw(batch, outputs, channels, device=device), torch.ones(batch, outputs, device=device)],
    )
    assert torch.equal(totals, plan.offsets.diff().float())
    assert torch.equal(grads[1], sizes)
    assert plan.unmerge(merged, backend=backend).shape == x.shape


# ---- torch ----


@BACKENDS
def test_same_bits_from_run_to_run(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    tokens, channels = (20, 9) if is_slow(backend) else (197, 768)
    plan = random_plan(tokens, tokens // 2, batch=2, device=device)
    tensors = [draw(2, tokens, channels, device=device), draw(2, tokens, device=device).abs() + 0.5]
    grads = [draw(2, tokens // 2, channels, device=device), draw(2, tokens // 2, device=device)]
    found = [
        results(lambda t, s: plan.merge_weighted(t, s, backend=backend), tensors, grads)
        + results(lambda t: plan.merge(t, "max", backend=backend), tensors[:1], grads[:1])
        for _ in range(2 if is_slow(backend) else 4)
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_number_of_threads_changes_no_bit():
    require("TokenMerge.merge", "cpu")
    plan = random_plan(500, 230, batch=3)
    tensors = [draw(3, 500, 300), draw(3, 500, 300, seed=1), draw(3, 500).abs() + 0.5]
    grads = [draw(3, 230, 300), draw(3, 230)]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(lambda t, r, s: plan.merge_weighted(t, s, residual=r, backend="cpu"), tensors, grads))
        for mode in MODES:
            found[-1] += results(lambda t, m=mode: plan.merge(t, m, backend="cpu"), tensors[:1], grads[:1])
        found[-1] += results(lambda t: plan.unmerge(t, backend="cpu"), [grads[0]], [tensors[0]])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


LEVEL = """
import effattn, torch, test_token_merging as own
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for mode in own.MODES:
        own.test_merge_keeps_the_accuracy_rule("cpu", dtype, mode)
    for flag in (True, False):
        own.test_weighted_merge_keeps_the_accuracy_rule("cpu", dtype, flag, not flag)
        own.test_weighted_merge_keeps_the_accuracy_rule("cpu", dtype, flag, flag)
    own.test_unmerge_keeps_the_accuracy_rule("cpu", dtype)
    own.test_memory_layout_changes_no_bit_and_inputs_are_not_written("cpu", dtype, "every_other")
    own.test_results_past_the_caches_are_those_of_few_rows("cpu", dtype)
own.test_tokens_alone_are_copied_bit_by_bit_on_the_cpu()
own.test_a_maximum_shows_nan("cpu")
print(effattn._native.isa())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_instruction_set_keeps_the_accuracy_rule(level):
    require("TokenMerge.merge", "cpu")
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "EFFATTN_CPU_ISA": level, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    ran = subprocess.run([sys.executable, "-c", LEVEL], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if ran.stdout.strip() != level:
        pytest.skip(f"this processor runs {ran.stdout.strip()} where {level} is asked for")


def test_references_are_differentiable_in_double():
    plan = random_plan(7, 4)
    x, y = draw(2, 7, 3).double().requires_grad_(), draw(2, 4, 3).double().requires_grad_()
    residual, sizes = (
        draw(2, 7, 3, seed=1).double().requires_grad_(),
        (draw(2, 7).double().abs() + 0.5).requires_grad_(),
    )
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda t, m=mode: token_merge(t, plan.source, plan.offsets, m), (x,))
    assert torch.autograd.gradcheck(
        lambda t, r, s: token_merge_weighted(t, plan.source, plan.offsets, r, s), (x, residual, sizes)
    )
    assert torch.autograd.gradcheck(lambda t: token_unmerge(t, plan.source), (y,))


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(backend, layout):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = random_plan(9, 4, device=device)
    x, residual = (place(draw(2, 9, 5, device=device, seed=s), layout) for s in (0, 1))
    sizes = draw(2, 9, device=device).abs() + 0.5
    indices = (plan.source, plan.members, plan.offsets)
    y, totals = plan.merge_weighted(x, sizes, backend=backend)
    for op, arguments in (
        (merge_op.forward, (x, *indices, 2)),
        (merge_op.backward, (y, x, *indices, plan.merge(x, "max", backend=backend), 2)),
        (weighted_op.forward, (x, *indices, residual, sizes, True)),
        (weighted_op.forward, (x, *indices, None, None, False)),
        (weighted_op.backward, (y, totals, x, *indices, residual, sizes, y, True)),
        (weighted_op.backward, (y, None, x, *indices, None, None, y, False)),
        (unmerge_op.forward, (y, *indices)),
        (unmerge_op.backward, (x, y, *indices)),
    ):
        if layout == "contiguous" or op in (merge_op.forward, weighted_op.forward, unmerge_op.forward):
            torch.library.opcheck(op.overload(backend), arguments)


def block(x, plan):
    merged, sizes = plan.merge_weighted(x, residual=2 * x)
    return plan.unmerge(merged * sizes) + plan.unmerge(plan.merge(x, "max"))


def planned_block(x):
    """The plan is of the reference, so that nothing but carrying it out depends on kernels."""
    return block(x, bipartite_soft_matching(x, 3, backend="reference"))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_compiles_as_one_graph_with_the_plan_inside_or_passed_in(layout):
    require("TokenMerge.merge", "cpu")
    x = place(draw(2, 12, 6), layout)
    plan = pairs_plan(12, 3)
    for function, arguments in ((planned_block, ()), (block, (plan,))):
        found = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaf = x.detach().requires_grad_()
            output = run(leaf, *arguments)
            output.square().sum().backward()
            found.append((output.detach(), leaf.grad))
        torch.testing.assert_close(*found)


def test_exports():
    require("TokenMerge.merge", "cpu")

    class Block(torch.nn.Module):
        def forward(self, x):
            return planned_block(x)

    x = draw(2, 12, 6)
    exported = torch.export.export(Block(), (x,))
    torch.testing.assert_close(exported.module()(x), planned_block(x))
    assert any("token_merge_weighted" in str(node.target) for node in exported.graph.nodes)


@BACKENDS
def test_vmap_is_a_loop(backend):
    require("TokenMerge.merge", backend)
    device = device_of(backend)
    plan = random_plan(9, 4, device=device)
    x, y = draw(3, 2, 9, 5, device=device), draw(3, 2, 4, 5, device=device)
    sizes = draw(3, 2, 9, device=device).abs() + 0.5

    def every(x, sizes, y):
        merged, totals = plan.merge_weighted(x, sizes, residual=x, backend=backend)
        return merged, totals, plan.merge(x, "max", backend=backend), plan.unmerge(y, backend=backend)

    def gradients(x, sizes, y):
        return torch.func.grad(lambda *a: sum(t.square().sum() for t in every(*a)), argnums=(0, 1, 2))(x, sizes, y)

    for function in (every, gradients):
        mapped = torch.func.vmap(function)(x, sizes, y)
        looped = [torch.stack(parts) for parts in zip(*(function(*a) for a in zip(x, sizes, y)))]
        for got, wanted in zip(mapped, looped):
            torch.testing.assert_close(got, wanted)


def test_autocast_leaves_the_dtype_of_the_tokens():
    require("TokenMerge.merge", "cpu")
    plan, x = pairs_plan(12, 3), draw(2, 12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        merged, sizes = plan.merge_weighted(x, backend="cpu")
        half, _ = plan.merge_weighted(x.bfloat16(), backend="cpu")
    assert (merged.dtype, sizes.dtype, half.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert torch.equal(merged, plan.merge_weighted(x, backend="cpu")[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(use_reentrant):
    require("TokenMerge.merge", "cpu")
    plan, found = pairs_plan(12, 3), []
    for run in (block, lambda *a: checkpoint(block, *a, use_reentrant=use_reentrant)):
        x = draw(2, 12, 6).requires_grad_()
        run(x, plan).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


# ---- errors ----


@pytest.mark.parametrize(
    ("which", "value"),
    [("source", 4), ("source", -1), ("members", 9), ("members", -1), ("offsets", 10), ("offsets", -1)],
)
def test_plan_whose_indices_are_out_of_range_is_refused(which, value):
    require("TokenMerge.merge", "cpu")
    plan = random_plan(9, 4)
    indices = {name: getattr(plan, name).clone() for name in ("source", "members", "offsets")}
    indices[which][1, 2] = value
    broken = TokenMerge(**indices)
    x, y = torch.ones(2, 9, 3), torch.ones(2, 4, 3)
    for call in (
        lambda: broken.merge(x, backend="cpu"),
        lambda: broken.merge_weighted(x, backend="cpu"),
        lambda: broken.unmerge(y, backend="cpu"),
    ):
        with pytest.raises(ValueError, match=f"{which} must be "):
            call()
    with pytest.raises(RuntimeError, match="indices must lie in its ranges"):  # of the kernel's own binding
        merge_op("cpu", x, *indices.values(), MODES.index("sum"))


X, Y, S = torch.ones(2, 9, 3), torch.ones(2, 4, 3), torch.ones(2, 9)
BAD = (
    ("merge", ([1.0],), {}, TypeError, "TokenMerge.merge: x must be a Tensor, got list"),
    ("merge", (X.int(),), {}, TypeError, "TokenMerge.merge: x must be floating point, got torch.int32"),
    ("merge", (X[0],), {}, ValueError, r"x must have shape \(2, 9, channels\), as this plan has, got \(9, 3\)"),
    ("merge", (X[:1],), {}, ValueError, r"x must have shape \(2, 9, channels\)"),
    ("merge", (Y,), {}, ValueError, r"x must have shape \(2, 9, channels\)"),
    ("merge", (X.to("meta"),), {}, ValueError, "x must be on the plan's device cpu, got meta"),
    ("merge", (X, "median"), {}, ValueError, "mode must be one of mean, sum, max, got 'median'"),
    ("merge", (X,), {"backend": "tpu"}, ValueError, "backend must be one of"),
    ("merge_weighted", ([1.0],), {}, TypeError, "TokenMerge.merge_weighted: x must be a Tensor"),
    ("merge_weighted", (X[:, :4],), {}, ValueError, r"x must have shape \(2, 9, channels\)"),
    ("merge_weighted", (X, 2.0), {}, TypeError, "sizes must be a Tensor, got float"),
    ("merge_weighted", (X, S[:, :4]), {}, ValueError, r"sizes must have shape \(2, 9\) or \(2, 9, 1\), got \(2, 4\)"),
    ("merge_weighted", (X, S[:, :, None, None]), {}, ValueError, "sizes must have shape"),
    ("merge_weighted", (X, S + 0j), {}, TypeError, "sizes must be real, got torch.complex64"),
    ("merge_weighted", (X, S.to("meta")), {}, ValueError, "sizes must be on x's device cpu, got meta"),
    ("merge_weighted", (X,), {"residual": 1.0}, TypeError, "residual must be a Tensor"),
    ("merge_weighted", (X,), {"residual": X[:1]}, ValueError, r"residual must have x's shape \(2, 9, 3\)"),
    ("merge_weighted", (X,), {"residual": X.half()}, ValueError, "residual must have .* dtype torch.float32"),
    ("merge_weighted", (X,), {"residual": X.to("meta")}, ValueError, "residual must be on x's device cpu"),
    ("merge_weighted", (X,), {"backend": "tpu"}, ValueError, "backend must be one of"),
    ("unmerge", ([1.0],), {}, TypeError, "TokenMerge.unmerge: x must be a Tensor"),
    ("unmerge", (Y.long(),), {}, TypeError, "TokenMerge.unmerge: x must be floating point"),
    ("unmerge", (X,), {}, ValueError, r"x must have shape \(2, 4, channels\), as this plan has, got \(2, 9, 3\)"),
    ("unmerge", (Y.to("meta"),), {}, ValueError, "x must be on the plan's device"),
    ("unmerge", (Y,), {"backend": "tpu"}, ValueError, "backend must be one of"),
)


@pytest.mark.parametrize(("method", "arguments", "options", "exception", "message"), BAD)
def test_bad_argument_is_named(method, arguments, options, exception, message):
    with pytest.raises(exception, match=message):
        getattr(random_plan(9, 4), method)(*arguments, **options)


@pytest.mark.parametrize("method", ["merge", "merge_weighted", "unmerge"])
def test_float64_is_left_to_the_reference(method):
    require("TokenMerge.merge", "cpu")
    tensor = (Y if method == "unmerge" else X).double()
    with pytest.raises(NotImplementedError, match=f"TokenMerge.{method}.*float64"):
        getattr(random_plan(9, 4), method)(tensor, backend="cpu")
    result = getattr(random_plan(9, 4), method)(tensor)
    assert (result[0] if isinstance(result, tuple) else result).dtype == torch.float64


def _plan_by_hand(**changes):
    made = bipartite_soft_matching(torch.randn(2, 6, 4), 2)
    given = {"source": made.source, "members": made.members, "offsets": made.offsets}
    return TokenMerge(**{**given, **{name: change(given[name]) for name, change in changes.items()}})


def test_plan_by_hand_may_be_strided():
    torch.manual_seed(0)
    x, wanted = torch.randn(2, 6, 3), _plan_by_hand()
    torch.manual_seed(0)
    torch.randn(2, 6, 3)
    strided = _plan_by_hand(source=lambda t: torch.stack((t, t), -1)[..., 0], members=lambda t: t.t().contiguous().t())
    assert torch.equal(strided.merge(x), wanted.merge(x))


@pytest.mark.parametrize("served_by", ["auto", "reference"])
@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"source": lambda t: "plan"}, TypeError, "source must be a Tensor"),
        ({"members": lambda t: t.long()}, TypeError, "members must be int32"),
        ({"source": lambda t: t[0]}, ValueError, "source must have shape"),
        ({"members": lambda t: t[:, 1:]}, ValueError, "members must have source's shape"),
        ({"offsets": lambda t: t[:1]}, ValueError, "offsets must have shape"),
        ({"offsets": lambda t: t.to("meta")}, ValueError, "offsets must be on source's device"),
        ({"source": lambda t: t - 1}, ValueError, "source must be in 0"),
        ({"source": lambda t: t + 2**30}, ValueError, "source must be in 0"),
        ({"members": lambda t: t.flip(1)}, ValueError, "members must be that of source"),
        ({"offsets": lambda t: t + 1}, ValueError, "offsets must be that of source"),
    ],
)
def test_plan_by_hand_that_is_none_is_refused_by_name(changes, exception, message, served_by):
    with pytest.raises(exception, match=message):
        _plan_by_hand(**changes).merge(torch.randn(2, 6, 3), backend=served_by)
