"""The Triton kernels of token matching and merging, run (by Triton's interpreter where there is no GPU) against the reference:
plans index for index, merges by the accuracy rule."""

import pytest
import torch

pytest.importorskip("triton")

from effattn.triton_kernels import token_matching, token_merging

from effattn.reference import token_merging as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
MEAN, SUM, MAX = range(3)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


# ---- matching ----


def plan_of(metric, num_merged, num_protected=0, distill_token=False, sizes=None, threshold=None):
    limit = -2.0 if threshold is None else threshold
    return token_matching.bipartite_match(
        metric, sizes, num_merged, num_protected, distill_token, limit, threshold is not None
    )


def check(metric, num_merged, *options, **named):
    """Equal to the reference; gives the plan."""
    found = plan_of(metric, num_merged, *options, **named)
    wanted = reference.bipartite_soft_matching(metric, num_merged, *options, **named)
    for name, ours, theirs in zip(("source", "members", "offsets"), found, wanted):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert ours.is_contiguous(), name
        assert torch.equal(ours, theirs), (name, metric.shape, num_merged, options, named)
    return found


@pytest.mark.parametrize(
    ("tokens", "dims", "dtype"), [(131, 70, torch.float32), (67, 3, torch.bfloat16), (66, 33, torch.float16)]
)
def test_plans_of_several_tiles_equal_the_reference(tokens, dims, dtype):
    check(random(1, tokens, dims, dtype=dtype), tokens // 3, 1)


def test_examples_of_a_batch_do_not_meet():
    metric = random(3, 20, 5)
    together = check(metric, 6)
    for index in range(3):
        for alone, part in zip(plan_of(metric[index : index + 1], 6), together):
            assert torch.equal(alone[0], part[index])


@pytest.mark.parametrize("tokens", [3, 4, 9])
@pytest.mark.parametrize(("num_protected", "distill_token"), [(0, False), (0, True), (1, False), (2, True), (3, False)])
def test_every_kind_of_plan_equals_the_reference(tokens, num_protected, distill_token):
    """As many pairs as there are, which leaves no token or one of a, and some of them."""
    pairs = (tokens - max(num_protected, 2 * distill_token * (num_protected > 0), int(distill_token))) // 2
    if pairs:
        metric = random(2, tokens, 2)
        check(metric, pairs, num_protected, distill_token)
        check(metric, pairs, num_protected, distill_token, threshold=0.6)


@pytest.mark.parametrize(("num_protected", "distill_token", "threshold"), [(0, True, None), (3, False, 0.6)])
def test_every_kind_of_plan_of_several_tiles_equals_the_reference(num_protected, distill_token, threshold):
    check(random(1, 69, 3), 29, num_protected, distill_token, threshold=threshold)


def test_two_tokens_become_one():
    source, members, offsets = check(random(2, 2, 1), 1)
    assert source.tolist() == [[0, 0]] * 2
    assert members.tolist() == [[0, 1]] * 2
    assert offsets.tolist() == [[0, 2]] * 2


@pytest.mark.parametrize(("threshold", "merges"), [(-1.0, 20), (1.0, 0)])
def test_a_threshold_may_allow_everything_or_nothing(threshold, merges):
    _, _, offsets = check(random(1, 40, 5), 20, threshold=threshold)
    assert (offsets.diff() == 0).sum() == merges


def test_ties_in_every_block_go_to_the_lowest_index():
    prototypes = torch.randint(-2, 3, (15, 40)).float()
    check(prototypes[torch.randint(0, 15, (1, 136))].to(DEVICE), 50)


def test_a_constant_image_merges_into_its_first_token_of_b():
    source, members, offsets = check(torch.full((1, 66, 3), 0.3, device=DEVICE), 30)
    assert (source[0, :60:2] == source[0, 1]).all()
    assert members[0, :6].tolist() == [60, 62, 64, 0, 1, 2]
    assert offsets[0, 3:6].tolist() == [3, 34, 35]


@pytest.mark.parametrize(("gap", "wins"), [(1e-7, True), (1e-10, True), (0.0, False)])
def test_similarities_differ_down_to_the_fortieth_bit(gap, wins):
    """Column 2 and the last one, in another block, are a tie in float32. The last is nearer by `gap`, if that is above 2^-40."""
    metric = random(1, 76, 3)
    metric[:, ::2] = torch.tensor([1.0, 0, 0], device=DEVICE)
    metric[:, 1::2, 0] = -1
    metric[:, 5] = torch.tensor([1, 1e-3, 0], device=DEVICE)
    nearer = (1e-6 - 2 * gap) ** 0.5 if wins else 1e-3
    metric[:, 75] = torch.tensor([1, nearer, 0], device=DEVICE) * 3  # of which float64 rounds another multiple
    source, _, _ = check(metric, 30)
    merged = source[0, :60:2]
    assert (merged == source[0, 75 if wins else 5]).all()


def test_columns_that_single_precision_takes_for_the_best_may_not_be():
    metric = random(1, 1, 300) + 2e-4 * random(1, 36, 300)
    units = torch.nn.functional.normalize(metric, dim=2)
    single = (units[:, ::2] @ units[:, 1::2].mT).argmax(2)
    units = torch.nn.functional.normalize(metric.double(), dim=2)
    assert (single != (units[:, ::2] @ units[:, 1::2].mT).argmax(2)).sum() > 5
    check(metric, 12)


@pytest.mark.parametrize("dims", [1, 64, 1000, 2**23, 2**24])
def test_the_tolerance_covers_the_rounding_of_scores(dims):
    """Each of the d products and sums may round by 2^-24, and both factors."""
    unit = 2.0**-24
    assert token_matching.tolerance(dims) >= min(4.0, 2 * ((1 + unit) ** (dims + 2) - 1 + 2.0**-40))


def test_tokens_of_zeros_nan_and_infinity_and_absent_ones_are_merged_last():
    metric = random(3, 70, 5)
    metric[0, 3:60:7] = 0
    metric[0, 6:60:7] = 0
    metric[1, 5::9, 2] = NAN
    metric[1, 2::9, 1] = INF
    metric[2, 20:] = 0
    check(metric, 34, 1)
    sizes = (torch.rand(3, 70) - 0.3).to(DEVICE)
    sizes[0, 4] = NAN
    check(metric, 33, 3, True, sizes, -0.5)
    metric[1] = NAN
    sizes[2] = 0
    check(metric, 20, sizes=sizes)


@pytest.mark.parametrize("size", [1e-42, 3e37])
def test_the_size_of_a_metric_does_not_matter(size):
    metric = torch.randint(-3, 4, (1, 30, 6)).float()
    source, _, _ = check((metric * size).to(DEVICE), 12)
    assert torch.equal(source, plan_of(metric.to(DEVICE), 12)[0])


def test_strides_of_a_metric_do_not_matter():
    metric = random(1, 20, 6)
    expected = plan_of(metric, 7)
    wide = torch.full((2, 22, 14), INF, device=DEVICE)
    wide[:, 1:21, 1:13:2] = metric
    for view in (wide[:, 1:21, 1:13:2], metric.mT.contiguous().mT.expand(2, -1, -1)):
        for ours, wanted in zip(plan_of(view, 7), expected):
            assert torch.equal(ours, wanted.expand(2, -1))
    ones = torch.ones(1, 1, 1, device=DEVICE)
    for ours, wanted in zip(plan_of(ones.expand(1, 12, 6), 3), plan_of(ones.repeat(1, 12, 6), 3)):
        assert torch.equal(ours, wanted)


def test_a_batch_without_examples_has_a_plan():
    assert [t.shape for t in plan_of(random(0, 10, 3), 4)] == [(0, 10), (0, 10), (0, 7)]


# ---- merging ----


def groups(batch, tokens, outputs, skip=0):
    """A plan of groups at random; the last `skip` outputs are empty."""
    source = torch.randint(0, max(1, outputs - skip), (batch, tokens))
    return [t.to(DEVICE) for t in reference.group(source, outputs)]


def assert_accurate(draw, dtype, names):
    """The accuracy rule. A miss is pooled with more draws, since on few elements the error of the dtype is an accident."""
    pool = {}
    for _ in range(8):
        for name, ours, low, exact in zip(names, *draw()):
            assert (ours.shape, ours.dtype) == (exact.shape, low.dtype), name
            assert ours.isfinite().all(), name
            found = tuple(t.abs().max().item() for t in (ours.double() - exact, low.double() - exact, exact))
            pool[name] = tuple(map(max, pool.get(name, (0, 0, 0)), found))
        misses = [
            f"{name}: error {error:.3e}, the dtype's {low:.3e}, largest value {largest:.3e}"
            for name, (error, low, largest) in pool.items()
            if not error <= (3 if name.startswith("grad") else 2) * low + torch.finfo(dtype).eps * largest
        ]
        if not misses:
            return
    raise AssertionError("; ".join(misses))


def check_merge(batch, tokens, outputs, channels, mode, dtype=torch.float32, skip=0):
    def draw():
        plan = groups(batch, tokens, outputs, skip)
        x, grad = random(batch, tokens, channels, dtype=dtype), random(batch, outputs, channels, dtype=dtype)
        output = token_merging.token_merge_fwd(x, *plan, mode)
        results = [(output, token_merging.token_merge_bwd(grad, x, *plan, output, mode))]
        for cast in (lambda t: t, torch.Tensor.double):
            leaf = cast(x).clone().requires_grad_()
            merged = reference.token_merge(leaf, plan[0], plan[2], reference.MODES[mode])
            results.append((merged.detach(), *torch.autograd.grad(merged, leaf, cast(grad))))
        return results

    assert_accurate(draw, dtype, ("output", "grad_x"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [MEAN, SUM, MAX], ids=reference.MODES)
def test_merges_of_several_tiles_equal_the_reference(mode, dtype):
    check_merge(2, 30, 19, 37, mode, dtype, skip=2)


@pytest.mark.parametrize("mode", [MEAN, SUM, MAX], ids=reference.MODES)
def test_groups_of_many_members_equal_the_reference(mode):
    check_merge(1, 61, 2, 5, mode)


def weigh(x, plan, residual, sizes, grad, grad_sizes, wants_sizes=True):
    """(output, merged_sizes, grad_x, grad_sizes)"""
    output, merged = token_merging.token_merge_weighted_fwd(x, *plan, residual, sizes, wants_sizes)
    gradients = token_merging.token_merge_weighted_bwd(grad, grad_sizes, x, *plan, residual, sizes, output, wants_sizes)
    return output, merged, *gradients


def check_weighted(batch, tokens, outputs, channels, dtype=torch.float32, has_residual=True, has_sizes=True, skip=0):
    def draw():
        plan = groups(batch, tokens, outputs, skip)
        x, residual = (random(batch, tokens, channels, dtype=dtype) for _ in range(2))
        residual = residual if has_residual else None
        sizes = (torch.rand(batch, tokens) + 0.5).to(DEVICE) if has_sizes else None
        grad, grad_sizes = random(batch, outputs, channels, dtype=dtype), random(batch, outputs)
        ours = weigh(x, plan, residual, sizes, grad, grad_sizes if has_sizes else None)
        results = [ours if has_sizes else ours[:3]]
        for cast in (lambda t: t, torch.Tensor.double):
            leaf = cast(x).clone().requires_grad_()
            weights = None
            if has_sizes:
                weights = (sizes.double() if cast is torch.Tensor.double else sizes.clone()).requires_grad_()
            merged = reference.token_merge_weighted(
                leaf, plan[0], plan[2], residual if residual is None else cast(residual), weights
            )
            wanted, upstream = ([leaf, weights], [cast(grad), grad_sizes]) if has_sizes else ([leaf], [cast(grad)])
            outputs_wanted = merged if has_sizes else merged[:1]
            upstream = [u.to(m.dtype) for u, m in zip(upstream, outputs_wanted)]
            gradients = torch.autograd.grad(outputs_wanted, wanted, upstream)
            results.append((*(t.detach() for t in merged), *gradients))
        return results

    assert_accurate(draw, dtype, ("output", "merged_sizes", "grad_x", "grad_sizes"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("has_residual", "has_sizes"), [(True, True), (False, True), (True, False)])
def test_weighted_merges_of_several_tiles_equal_the_reference(has_residual, has_sizes, dtype):
    check_weighted(2, 30, 19, 37, dtype, has_residual, has_sizes, skip=2)


def test_weighted_groups_of_many_members_equal_the_reference():
    check_weighted(1, 61, 2, 5)


def test_an_output_whose_sizes_are_zero_is_zero():
    plan = groups(1, 12, 3, skip=1)
    sizes = torch.ones(1, 12, device=DEVICE)
    sizes[plan[0] == 1] = 0
    x, grad, grad_sizes = random(1, 12, 5), random(1, 3, 5), random(1, 3)
    output, merged, grad_x, slopes = weigh(x, plan, None, sizes, grad, grad_sizes)
    assert not output[:, 1:].any()
    assert not merged[:, 1:].any()
    assert output[:, 0].all()
    empty = plan[0] == 1
    assert not grad_x[empty].any()
    assert (slopes[empty] == grad_sizes[0, 1]).all()
    assert not weigh(x, plan, None, sizes, grad, None)[3][empty].any()


def test_a_gradient_of_sizes_that_is_not_wanted_is_zero():
    plan, x, grad = groups(2, 12, 5), random(2, 12, 37), random(2, 5, 37)
    sizes = torch.rand(2, 12, device=DEVICE)
    *expected, _ = weigh(x, plan, x, sizes, grad, None)
    *found, slopes = weigh(x, plan, x, sizes, grad, None, wants_sizes=False)
    for ours, wanted in zip(found, expected):
        assert torch.equal(ours, wanted)
    assert slopes.shape == sizes.shape
    assert not slopes.any()
    assert weigh(x, plan, x, None, grad, None, wants_sizes=False)[3].shape == (0,)


def test_a_maximum_shares_its_gradient_evenly_among_ties():
    source = torch.tensor([[0, 1, 0, 0, 0, 0, 1]])
    plan = [t.to(DEVICE) for t in reference.group(source, 3)]
    x = torch.tensor([1.0, -INF, 2, 2, 0, 2, -INF], device=DEVICE).reshape(1, 7, 1)
    grad = torch.tensor([6.0, 1, 5], device=DEVICE).reshape(1, 3, 1)
    output = token_merging.token_merge_fwd(x, *plan, MAX)
    assert output.flatten().tolist() == [2, -INF, 0]
    found = token_merging.token_merge_bwd(grad, x, *plan, output, MAX)
    assert found.flatten().tolist() == [0, 0.5, 2, 2, 0, 2, 0.5]


def test_a_maximum_of_nan_is_nan():
    plan, x = groups(1, 20, 3), random(1, 20, 3)
    x[0, 4, 1] = NAN
    output = token_merging.token_merge_fwd(x, *plan, MAX)
    assert output.isnan().nonzero().tolist() == [[0, plan[0][0, 4].item(), 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_copies_rows_and_adds_up_their_gradients(dtype):
    plan = groups(2, 40, 19, skip=1)
    x, grad = random(2, 19, 37, dtype=dtype), random(2, 40, 37, dtype=dtype)
    assert torch.equal(token_merging.token_unmerge_fwd(x, *plan), reference.token_unmerge(x, plan[0]))
    found = token_merging.token_unmerge_bwd(grad, x, *plan)
    assert torch.equal(found, token_merging.token_merge_fwd(grad, *plan, SUM))


def everything(plan, sizes, x, residual, grad, grad_sizes):
    """(results, gradients of x, gradient of unmerge's x)"""
    output, merged, grad_x, slopes = weigh(x, plan, residual, sizes, grad, grad_sizes)
    outputs, gradients = [output, merged, slopes, token_merging.token_unmerge_fwd(grad, *plan)], [grad_x]
    for mode in (MEAN, MAX):
        outputs.append(token_merging.token_merge_fwd(x, *plan, mode))
        gradients.append(token_merging.token_merge_bwd(grad, x, *plan, outputs[-1], mode))
    return outputs, gradients, token_merging.token_unmerge_bwd(x, grad, *plan)


def test_strides_and_neighbours_of_rows_do_not_matter():
    plan, sizes = groups(2, 12, 5), torch.rand(2, 12, device=DEVICE)
    x, residual, grad, grad_sizes = random(2, 12, 6), random(2, 12, 6), random(2, 5, 6), random(2, 5)

    def surrounded(tensor):
        wide = torch.full((2, tensor.shape[1] + 2, 14), INF, device=DEVICE)
        view = wide[:, 1:-1, 1:13:2]
        view.copy_(tensor)
        return view

    expected = everything(plan, sizes, x, residual, grad, grad_sizes)
    transposed = [t.mT.contiguous().mT for t in (x, residual, grad, grad_sizes)]
    for given in ((*map(surrounded, (x, residual, grad)), transposed[3]), transposed):
        outputs, gradients, grad_rows = everything(plan, sizes, *given)
        for ours, wanted in zip((*outputs, *gradients, grad_rows), (*expected[0], *expected[1], expected[2])):
            assert torch.equal(ours, wanted)
        assert all(t.is_contiguous() for t in outputs)
        assert {t.stride() for t in gradients} == {torch.empty_like(given[0]).stride()}
        assert grad_rows.stride() == torch.empty_like(given[2]).stride()


def test_expanded_rows_are_rows():
    plan, sizes = groups(2, 12, 5), torch.rand(2, 12, device=DEVICE)
    one = torch.ones(1, 1, 1, device=DEVICE)
    expanded = (one.expand(2, 12, 6), one.expand(2, 12, 6), one.expand(2, 5, 6), one[0].expand(2, 5))
    found, expected = (everything(plan, sizes, *given) for given in (expanded, [t.contiguous() for t in expanded]))
    for ours, wanted in zip((*found[0], *found[1], found[2]), (*expected[0], *expected[1], expected[2])):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("sizes", [(0, 6, 3), (2, 6, 0), (1, 1, 1)])
def test_any_size(sizes):
    batch, tokens, channels = sizes
    plan = groups(batch, tokens, 1)
    x, grad = random(*sizes), random(batch, 1, channels)
    weights = torch.full((batch, tokens), 2.0, device=DEVICE)
    output, merged, grad_x, grad_sizes = weigh(x, plan, None, weights, grad, torch.ones_like(weights[:, :1]))
    assert [t.shape for t in (output, merged, grad_x, grad_sizes)] == [grad.shape, (batch, 1), x.shape, weights.shape]
    assert (merged == 2 * tokens).all()
    if not channels:
        assert (grad_sizes == 1).all()
    for mode in (MEAN, SUM, MAX):
        output = token_merging.token_merge_fwd(x, *plan, mode)
        assert output.shape == grad.shape
        assert token_merging.token_merge_bwd(grad, x, *plan, output, mode).shape == x.shape
    assert token_merging.token_unmerge_fwd(grad, *plan).shape == x.shape
    assert token_merging.token_unmerge_bwd(x, grad, *plan).shape == grad.shape


def test_offsets_past_two_to_the_31_elements(tmp_path, monkeypatch):
    """Rows 2^30 elements apart, in a sparse file that is never filled."""
    size = (1 << 32) + (1 << 31)
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        # the interpreter copies every storage onto itself
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source, *_: self)
    else:
        storage = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    near = random(1, 6, 8, dtype=torch.bfloat16)
    far = storage.as_strided(near.shape, (0, 1 << 30, 1), 0)
    far.copy_(near)
    for ours, wanted in zip(plan_of(far, 2), plan_of(near, 2)):
        assert torch.equal(ours, wanted)
    plan = plan_of(near, 2)
    for mode in (MEAN, MAX):
        output = token_merging.token_merge_fwd(far, *plan, mode)
        assert torch.equal(output, token_merging.token_merge_fwd(near, *plan, mode))
        found = token_merging.token_merge_bwd(output, far, *plan, output, mode)
        assert torch.equal(found, token_merging.token_merge_bwd(output, near, *plan, output, mode))
    sizes = torch.rand(1, 6, device=DEVICE)
    for ours, wanted in zip(
        weigh(far, plan, far, sizes, far[:, :4], None), weigh(near, plan, near, sizes, near[:, :4], None)
    ):
        assert torch.equal(ours, wanted)
