"""PatchMerger and LearnableTokenMerge: formulas, the closed form of the mask's step, names and training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import effattn
from effattn.nn import LearnableTokenMerge, PatchMerger

BATCH, TOKENS, DIM, CENTROIDS, CLASSES = 2, 10, 6, 5, 4


class PublishedPatchMerger(nn.Module):
    """vit-pytorch's parameters, and its formula with weights in full."""

    def __init__(self, dim, num_tokens_out):
        super().__init__()
        self.norm, self.queries = nn.LayerNorm(dim), nn.Parameter(torch.randn(num_tokens_out, dim))

    def forward(self, x):
        x = self.norm(x)
        weights = (torch.einsum("pc,bnc->bpn", self.queries, x) / x.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("bpn,bnc->bpc", weights, x)


def tokens(protected=0, dtype=torch.float64):
    return torch.randn(BATCH, protected + TOKENS, DIM, dtype=dtype)


def learnable(protected=0, dtype=torch.float64, estimated=True, **options):
    options = {"compression_ratio": 0.4, "num_centroids": CENTROIDS} | options
    module = LearnableTokenMerge(DIM, TOKENS, CLASSES, num_protected=protected, dtype=dtype, **options)
    if estimated:
        module.joint.copy_((3 * torch.randn(module.joint.shape)).softmax(0))
    return module


# ---- PatchMerger ----


def test_patch_merger_is_the_published_formula_and_loads_its_state_dict():
    published, ours = PublishedPatchMerger(DIM, 3), PatchMerger(DIM, 3)
    nn.init.normal_(published.norm.weight)
    nn.init.normal_(published.norm.bias)
    ours.load_state_dict(published.state_dict(), strict=True)
    x = tokens(dtype=torch.float32).requires_grad_()
    torch.testing.assert_close(ours(x), published(x), rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]) for module in (ours, published)
    ]
    expected = dict(zip(["x", *(name for name, _ in published.named_parameters())], gradients[1]))
    found = dict(zip(["x", *(name for name, _ in ours.named_parameters())], gradients[0]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_patch_merger_takes_any_number_of_tokens():
    merger = PatchMerger(DIM, 3)
    for count in (1, 2, 17):
        assert merger(torch.randn(BATCH, count, DIM)).shape == (BATCH, 3, DIM)


def test_patch_merger_starts_from_standard_normal_queries():
    queries = PatchMerger(64, 256).queries
    assert abs(queries.mean()) < 0.05
    assert abs(queries.std() - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_run_in_half_precision(dtype):
    assert PatchMerger(DIM, 3, dtype=dtype)(tokens(dtype=dtype)).dtype == dtype
    module = learnable(1, torch.float32).to(dtype)
    merged, mask = module(tokens(1, dtype))
    assert (merged.dtype, mask.dtype) == (dtype, dtype)
    assert merged.isfinite().all()


def test_modules_run_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = PatchMerger(DIM, 3)(tokens(dtype=torch.float32))
        soft, mask = learnable(1, torch.float32)(tokens(1, torch.float32))
    assert merged.dtype == soft.dtype == torch.bfloat16
    assert soft.isfinite().all()
    assert mask.isfinite().all()


@pytest.mark.parametrize("make", [lambda: PatchMerger(DIM, 3), lambda: learnable(1, torch.float32)])
def test_modules_compile_to_one_graph(make):
    module, x = make(), tokens(1, torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


# ---- LearnableTokenMerge: the step ----


def test_the_gradient_of_the_bound_in_closed_form_is_the_one_of_autograd():
    module, features = learnable(), torch.randn(3, 4, DIM, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(module.bound(features), features)
    torch.testing.assert_close(module.bound_gradient(features), expected)
    assert expected.abs().max() > 1e-3


def test_the_bound_is_the_published_second_term_under_the_belief():
    """With a belief that is certain, it is what information_bottleneck_bound has for that class."""
    module, features = learnable(), torch.randn(3, DIM, dtype=torch.float64)
    module.joint.fill_(1e-300)
    module.joint[:, 2] = torch.rand(CENTROIDS, dtype=torch.float64)
    target = torch.full((3,), 2)
    only = features.new_zeros(3, 1), features.new_zeros(1, 1)  # one centroid of X: the first term is 0
    published = effattn.information_bottleneck_bound(
        only[0], features, only[1], module.centroids.detach(), module.joint, target
    )
    torch.testing.assert_close(module.bound(features).detach(), 3 * published)


def test_the_mask_takes_one_gradient_step():
    module, z = learnable(), tokens()
    module.step_size.data.fill_(0.7)
    start = torch.randn(BATCH, TOKENS, module.num_merged_tokens, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module.bound(start.softmax(1).mT @ z), start)
    merged, mask = module(z, start)
    torch.testing.assert_close(mask, start - 0.7 * gradient)
    torch.testing.assert_close(merged, mask.softmax(1).mT @ z)


def test_a_small_step_lowers_the_bound():
    module, z = learnable(), tokens()
    module.step_size.data.fill_(0.05)
    _, mask = module(z)
    merged, further = module(z, mask)
    assert module.bound(merged) < module.bound(mask.softmax(1).mT @ z)
    assert not torch.equal(mask, further)


def test_the_initial_mask_is_a_projection_of_normalised_tokens():
    module, z = learnable(estimated=False), tokens()
    _, mask = module(z)
    torch.testing.assert_close(mask, nn.functional.layer_norm(z, (DIM,)) @ module.weight.mT / DIM**0.5)


def test_a_uniform_joint_gives_no_step():
    module, z = learnable(estimated=False), tokens()
    start = torch.randn(BATCH, TOKENS, module.num_merged_tokens, dtype=torch.float64)
    torch.testing.assert_close(module(z, start)[1], start, rtol=0, atol=1e-12)


def test_merged_tokens_of_zeros_give_no_step_and_no_nan():
    module, z = learnable(), torch.zeros(BATCH, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    start = torch.randn(BATCH, TOKENS, module.num_merged_tokens, dtype=torch.float64)
    merged, mask = module(z, start)
    torch.testing.assert_close(mask, start)
    (merged.sum() + mask.square().sum()).backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (z, *module.parameters()))


def test_a_token_that_is_masked_out_takes_no_part():
    module, z = learnable(), tokens()
    start = torch.randn(BATCH, TOKENS, module.num_merged_tokens, dtype=torch.float64)
    start[:, 3] = float("-inf")
    other = z.clone()
    other[:, 3] = 100.0
    torch.testing.assert_close(module(z, start), module(other, start))
    assert module(z, start)[0].isfinite().all()


# ---- LearnableTokenMerge: the module ----


def test_protected_tokens_pass_through_in_front():
    module, z = learnable(protected=2), tokens(protected=2)
    plain = learnable(protected=0)
    plain.load_state_dict(module.state_dict())
    merged, mask = module(z)
    assert torch.equal(merged[:, :2], z[:, :2])
    torch.testing.assert_close((merged[:, 2:], mask), plain(z[:, 2:]))


def test_the_published_ratio_makes_157_of_196_tokens():
    assert LearnableTokenMerge(8, 196, 3).num_merged_tokens == 157


def test_parameters_have_their_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in learnable().state_dict().items()}
    assert shapes == {
        "weight": (4, DIM),
        "centroids": (CENTROIDS, DIM),
        "step_size": (1,),
        "joint": (CENTROIDS, CLASSES),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
    }
    assert "joint" not in dict(learnable().named_parameters())
    assert LearnableTokenMerge(DIM, TOKENS, CLASSES).centroids.shape == (CLASSES, DIM)


def test_the_docstring_says_what_is_not_public():
    assert "the authors' mask module is not public" in LearnableTokenMerge.__doc__


def test_every_parameter_learns():
    module, x = learnable(protected=1, dtype=torch.float32), tokens(1, torch.float32)
    target = torch.randn(BATCH, 1 + module.num_merged_tokens, DIM)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append((module(x)[0] - target).square().mean())
        losses[-1].backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01


def test_gradients_of_the_module_are_right():
    module, z = learnable(protected=1), tokens(1).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def call(z, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (z,))

    assert torch.autograd.gradcheck(call, (z, *module.parameters()), fast_mode=True)


def test_checkpointing_gives_the_same_gradients():
    module, x = learnable(1, torch.float32), tokens(1, torch.float32).requires_grad_()
    plain = torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()])
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False)[0].square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(plain, again)


def test_copies_compute_the_same():
    module, x = learnable(1, torch.float32), tokens(1, torch.float32)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


# ---- the estimate of the joint ----


def test_the_joint_is_the_published_estimate():
    module, features = learnable(), torch.randn(30, DIM, dtype=torch.float64)
    target = torch.arange(30) % CLASSES
    module.update_joint(features, target)
    phi = effattn.centroid_probabilities(features, module.centroids).detach().numpy()
    expected = np.stack([phi[target.numpy() == y].mean(0) for y in range(CLASSES)], 1)
    np.testing.assert_allclose(module.joint.numpy(), expected)
    torch.testing.assert_close(module.joint.sum(0), torch.ones(CLASSES, dtype=torch.float64))


def test_a_class_without_features_keeps_its_column():
    module = learnable()
    before = module.joint.clone()
    module.update_joint(torch.randn(4, DIM, dtype=torch.float64), torch.tensor([0, 0, 2, 0]))
    assert torch.equal(module.joint[:, [1, 3]], before[:, [1, 3]])
    assert not torch.equal(module.joint[:, [0, 2]], before[:, [0, 2]])


def test_each_token_of_an_image_counts_for_its_class():
    one, other = learnable(), learnable()
    other.load_state_dict(one.state_dict())
    features, target = torch.randn(4, 3, DIM, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    one.update_joint(features, target)
    other.update_joint(features.flatten(0, 1), target.repeat_interleave(3))
    assert torch.equal(one.joint, other.joint)


def test_centroids_go_to_the_means_of_their_features():
    module = learnable(num_centroids=2)
    directions = torch.eye(DIM, dtype=torch.float64)[:2]
    module.centroids.data.copy_(0.5 * directions + 0.1)
    features = torch.cat([direction * torch.rand(5, 1).double().add(0.5) for direction in directions])
    module.update_joint(features, torch.arange(10) // 5, centroid_steps=1)
    torch.testing.assert_close(module.centroids.detach(), directions)
    assert module.joint[0, 0] > module.joint[0, 1]


def test_a_centroid_without_features_stays():
    module = learnable(num_centroids=2)
    module.centroids.data.copy_(torch.stack([torch.ones(DIM), torch.full((DIM,), -50.0)]))
    module.update_joint(torch.ones(3, DIM, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), centroid_steps=2)
    assert torch.equal(module.centroids[1].detach(), torch.full((DIM,), -50.0, dtype=torch.float64))
    torch.testing.assert_close(module.centroids[0].detach(), torch.full((DIM,), DIM**-0.5, dtype=torch.float64))


def test_an_estimate_tells_the_classes_apart():
    """Tokens of class y lie along axis y: after the estimate the bound is lower for them than for tokens between."""
    module = LearnableTokenMerge(DIM, TOKENS, 3)
    module.centroids.data.copy_(torch.eye(DIM)[:3])
    module.update_joint(torch.eye(DIM)[:3].repeat(4, 1), torch.arange(12) % 3)
    between = torch.ones(1, DIM)
    assert module.bound(torch.eye(DIM)[:1]) < module.bound(between)


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "name", "error"),
    [
        ({"dim": 0}, "dim", ValueError),
        ({"num_tokens": 2.0}, "num_tokens", TypeError),
        ({"num_classes": 0}, "num_classes", ValueError),
        ({"num_centroids": 0}, "num_centroids", ValueError),
        ({"num_protected": -1}, "num_protected", ValueError),
        ({"compression_ratio": 0.0}, "compression_ratio", ValueError),
        ({"compression_ratio": 1.2}, "compression_ratio", ValueError),
        ({"compression_ratio": 0.01}, "compression_ratio", ValueError),
    ],
)
def test_wrong_options_are_named(options, name, error):
    with pytest.raises(error, match=name):
        LearnableTokenMerge(**({"dim": DIM, "num_tokens": TOKENS, "num_classes": CLASSES} | options))


def test_wrong_inputs_are_named():
    module = learnable(1)
    for wrong in (torch.ones(2, 3).double(), torch.ones(1, 1 + TOKENS, DIM + 1).double(), tokens(2), tokens(0)):
        with pytest.raises(ValueError, match="tokens"):
            module(wrong)
    with pytest.raises(ValueError, match="mask"):
        module(tokens(1), torch.ones(BATCH, TOKENS, 3).double())
    with pytest.raises(TypeError, match="mask"):
        module(tokens(1), 3)
    with pytest.raises(ValueError, match="tokens"):
        PatchMerger(DIM, 3)(torch.ones(2, 5, DIM - 1))
    with pytest.raises(TypeError, match="tokens"):
        PatchMerger(DIM, 3)([1])
    with pytest.raises(ValueError, match="num_tokens"):
        PatchMerger(DIM, 0)


@pytest.mark.parametrize(
    ("features", "target", "error", "name"),
    [
        (torch.ones(2, DIM + 1), torch.zeros(2, dtype=torch.int64), ValueError, "features"),
        (torch.ones(2, DIM, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), TypeError, "features"),
        (torch.ones(2, DIM), torch.zeros(2), TypeError, "target"),
        (torch.ones(2, DIM), torch.zeros(3, dtype=torch.int64), ValueError, "target"),
        (torch.ones(2, DIM), torch.tensor([0, CLASSES]), ValueError, "target"),
        (torch.ones(2, DIM), torch.tensor([0, -1]), ValueError, "target"),
    ],
)
def test_wrong_estimates_are_refused(features, target, error, name):
    with pytest.raises(error, match=name):
        learnable().update_joint(features, target)
