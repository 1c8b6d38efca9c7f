"""Token merging as a whole: parity with the published algorithm, and what merging means through the layers of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published_token_merging import PublishedMerge

import effattn

RANDOM_CASES = 500
BACKENDS = ("reference", "auto")


def plan_of(metric, num_merged, class_token=False, distill_token=False, **options) -> effattn.TokenMerge:
    protected = int(class_token) + int(class_token and distill_token)
    return effattn.bipartite_soft_matching(
        metric, num_merged, num_protected=protected, distill_token=distill_token, **options
    )


def test_five_hundred_random_cases_are_those_of_the_published_algorithm():
    """Indices exactly, sizes exactly, outputs to rounding; r from below 0 to beyond N / 2, both kinds of special tokens."""
    draw = np.random.default_rng(0)
    for seed in range(RANDOM_CASES):
        batch, tokens, width, channels = (int(n) for n in draw.integers(1, (4, 70, 40, 20)))
        special = bool(draw.integers(2)), bool(draw.integers(2))
        num_merged = int(draw.integers(-1, tokens // 2 + 4))
        generator = torch.Generator().manual_seed(seed)
        metric = torch.randn(batch, tokens, width, generator=generator)
        x = torch.randn(batch, tokens, channels, generator=generator)
        sizes = torch.randint(1, 9, (batch, tokens), generator=generator).float()

        published, exact = PublishedMerge(metric.numpy(), num_merged, *special), x.double().numpy()
        source, averages = published.source_map(), published.merge_weighted(exact, sizes.numpy())
        reductions = {mode: published.merge(exact, mode) for mode in ("mean", "sum", "max")}
        for backend in BACKENDS:
            plan = plan_of(metric, num_merged, *special, backend=backend)
            np.testing.assert_array_equal(plan.source_map().numpy(), source, err_msg=f"case {seed}, {backend}")
            for mode, expected in reductions.items():
                merged = plan.merge(x, mode, backend=backend)
                np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-5)
            merged, merged_sizes = plan.merge_weighted(x, sizes, backend=backend)
            np.testing.assert_allclose(merged.numpy(), averages[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(merged_sizes.numpy(), averages[1])
            back = plan.unmerge(merged, backend=backend)
            np.testing.assert_array_equal(back.numpy(), published.unmerge(merged.numpy()))


@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 50])
@pytest.mark.parametrize(("class_token", "distill_token"), [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("num_merged", [-3, 0, 1, 3, 25, 1000])
def test_no_more_than_half_of_the_unprotected_tokens_are_merged(tokens, class_token, distill_token, num_merged):
    plan = plan_of(torch.randn(2, tokens, 8), num_merged, bool(class_token), bool(distill_token))
    expected = max(0, min(num_merged, (tokens - class_token - distill_token) // 2))
    assert plan.num_tokens == tokens - expected
    for protected in range(class_token + distill_token if expected else 0):
        assert (plan.source_map()[:, protected] == protected).all()
        assert ((plan.source_map() == protected).sum(1) == 1).all()


def test_unmerge_after_merge_restores_kept_tokens():
    metric, x = torch.randn(3, 51, 16), torch.randn(3, 51, 24)
    plan = effattn.bipartite_soft_matching(metric, 11, num_protected=1)
    back = plan.unmerge(plan.merge(x))
    source = plan.source_map()
    alone = torch.zeros_like(source).scatter_add(1, source, torch.ones_like(source)).gather(1, source) == 1
    assert 51 * 3 > alone.sum() >= 3 * (51 - 22)
    assert torch.equal(back[alone], x[alone])
    for image, output in ((0, int(source[0, ~alone[0]][0])), (2, int(source[2, ~alone[2]][0]))):
        members = source[image] == output
        torch.testing.assert_close(back[image, members], x[image, members].mean(0).expand(members.sum(), -1))


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_sizes_sum_to_n_through_twelve_layers(threshold):
    x, sizes = torch.randn(2, 197, 32), None
    for _ in range(12):
        plan = effattn.bipartite_soft_matching(x, 16, num_protected=1, sizes=sizes, threshold=threshold)
        x, sizes = plan.merge_weighted(x)
        assert torch.equal(sizes.sum(1), torch.full((2, 1), 197.0))
        assert (sizes[:, 0] == 1).all()
        x = x + 0.1 * torch.randn_like(x)
    assert (sizes.count_nonzero(1) < 150).all()
    assert threshold is not None or sizes.shape[1] == 11  # at most half of the tokens at a time


def test_padding_of_an_earlier_plan_never_becomes_part_of_a_token():
    x = torch.randn(2, 40, 8)
    first = effattn.bipartite_soft_matching(x, 20, threshold=0.2)
    merged, sizes = first.merge_weighted(x)
    assert (~first.valid).any()
    noisy = merged + torch.randn_like(merged) * (sizes == 0)  # a layer writes into padding, too
    plans = [effattn.bipartite_soft_matching(t, 4, sizes=sizes) for t in (merged, noisy)]
    (a, a_sizes), (b, b_sizes) = (plan.merge_weighted(t) for plan, t in zip(plans, (merged, noisy)))
    assert torch.equal(a_sizes.sort(1).values, b_sizes.sort(1).values)
    rows = [t[s.squeeze(-1) > 0].sum(0) for t, s in ((a, a_sizes), (b, b_sizes))]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.35, 1.0])
def test_a_threshold_merges_the_similar_pairs_only(threshold):
    metric = torch.randn(3, 41, 8)
    metric[:, 7] = 2 * metric[:, 4]  # parallel: a similarity of 1
    plan = effattn.bipartite_soft_matching(metric, 100, threshold=threshold)
    unit = F.normalize(metric.double(), dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).amax(2)
    merges = torch.minimum((best >= threshold - 1e-12).sum(1), torch.tensor(20))
    assert plan.num_tokens == 41
    assert torch.equal(plan.valid.sum(1), 41 - merges)
    assert (plan.valid.int().diff(dim=1) <= 0).all()  # padding stands at the end
    merged, sizes = plan.merge_weighted(metric)
    assert torch.equal(sizes.squeeze(-1) > 0, plan.valid)
    assert (merged[~plan.valid] == 0).all()


def test_a_threshold_below_everything_is_the_plan_without_one_padded():
    metric = torch.randn(2, 30, 8)
    plain = effattn.bipartite_soft_matching(metric, 9, num_protected=1)
    padded = effattn.bipartite_soft_matching(metric, 9, num_protected=1, threshold=-1.0)
    assert torch.equal(plain.source_map(), padded.source_map())
    assert plain.valid is None
    assert padded.valid.sum(1).tolist() == [21, 21]


def test_merging_a_constant_image_takes_the_first_tokens():
    plan = effattn.bipartite_soft_matching(torch.ones(1, 9, 4), 2, num_protected=1)
    # all tie: of a = 0, 2, 4, 6, 8 the first unprotected two merge, each into the first of b
    assert plan.source_map().tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


def test_attention_before_merging_equals_size_weighted_attention_after_merging_equal_tokens():
    """Tokens 2 j and 2 j + 1 are equal: merging them and counting them twice changes nothing."""
    tokens = torch.randn(1, 6, 16).repeat_interleave(2, dim=1)
    query = torch.randn(1, 2, 5, 8)
    heads = lambda x: x.unflatten(-1, (2, 8)).transpose(1, 2)  # noqa: E731
    plan = effattn.bipartite_soft_matching(tokens, 6)
    merged, sizes = plan.merge_weighted(tokens)
    assert merged.shape[1] == 6
    before = F.scaled_dot_product_attention(query, heads(tokens), heads(tokens))
    after = effattn.size_weighted_attention(query, heads(merged), heads(merged), sizes)
    torch.testing.assert_close(after, before)


def test_gradients_reach_every_token_through_merge_and_unmerge():
    metric, x = torch.randn(2, 21, 8), torch.randn(2, 21, 12, requires_grad=True)
    plan = effattn.bipartite_soft_matching(metric, 5)
    plan.unmerge(plan.merge(x, "sum")).sum().backward()
    counts = torch.zeros(2, 16).scatter_add(1, plan.source_map(), torch.ones(2, 21)).gather(1, plan.source_map())
    torch.testing.assert_close(x.grad, counts.unsqueeze(-1).expand_as(x))


def test_the_matching_has_no_gradient():
    metric = torch.randn(2, 21, 8, requires_grad=True)
    plan = effattn.bipartite_soft_matching(metric, 5)
    merged, _ = plan.merge_weighted(metric)
    merged.square().sum().backward()  # through the tokens alone
    detached = metric.detach().requires_grad_()
    effattn.bipartite_soft_matching(metric.detach(), 5).merge_weighted(detached)[0].square().sum().backward()
    assert torch.equal(metric.grad, detached.grad)


def test_keeping_tokens_is_a_gather_in_order():
    x, scores = torch.randn(3, 20, 6, requires_grad=True), torch.randn(3, 20)
    kept, index = effattn.keep_tokens(x, scores, 8, num_protected=2)
    for image in range(3):
        best = sorted(range(2, 20), key=lambda i: -scores[image, i])[:6]
        assert index[image].tolist() == [0, 1, *sorted(best)]
        assert torch.equal(kept[image], x[image, index[image]])
    kept.sum().backward()
    assert torch.equal(x.grad[..., 0], torch.zeros(3, 20).scatter(1, index, 1.0))


def test_of_equal_scores_the_first_tokens_are_kept():
    assert effattn.keep_tokens(torch.zeros(1, 6, 1), torch.ones(1, 6), 3)[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1, 3), 1), TypeError, "x must be a Tensor"),
        ((torch.zeros(3, 2), torch.zeros(1, 3), 1), ValueError, "x must have shape"),
        ((torch.zeros(1, 3, 2), None, 1), TypeError, "scores must be a Tensor"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 4), 1), ValueError, "scores must have shape"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.complex64), 1), TypeError, "scores must be real"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3, device="meta"), 1), ValueError, "scores must be on"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3), 4), ValueError, "num_kept must be at most"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3), -1), ValueError, "num_kept must be at least"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3), 1.0), TypeError, "num_kept must be an int"),
    ],
)
def test_keep_tokens_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        effattn.keep_tokens(*arguments)


def test_explain_names_the_backend_of_every_step(capsys):
    plan = effattn.bipartite_soft_matching(torch.randn(1, 9, 4), 2)
    x = torch.randn(1, 9, 3)
    calls = {
        "bipartite_soft_matching": (effattn.bipartite_soft_matching, x, 2),
        "TokenMerge.merge": (plan.merge, x),
        "TokenMerge.merge_weighted": (plan.merge_weighted, x),
        "TokenMerge.unmerge": (plan.unmerge, plan.merge(x)),
        "soft_merge": (effattn.soft_merge, x, x),
    }
    for op, (function, *arguments) in calls.items():
        assert effattn.explain(function, *arguments).op == op
        assert op in capsys.readouterr().out
