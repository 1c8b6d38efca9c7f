"""The bound that learnable token merging descends on, against the published formula written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import effattn

COUNT, DIM_IN, DIM_OUT, INSIDE, OUTSIDE, CLASSES = 6, 5, 4, 3, 7, 2


def published_phi(features, centroids):
    """softmax_a(-|F/|F| - C_a|^2), one feature after the other."""
    rows = []
    for feature in features:
        unit = feature / np.sqrt((feature**2).sum())
        weights = np.exp([-((unit - centroid) ** 2).sum() for centroid in centroids])
        rows.append(weights / weights.sum())
    return np.array(rows)


def published_bound(features_in, features_out, centroids_in, centroids_out, joint, target):
    inside, outside = published_phi(features_in, centroids_in), published_phi(features_out, centroids_out)
    total = 0.0
    for i in range(len(target)):
        for a in range(len(centroids_out)):
            for b in range(len(centroids_in)):
                total += outside[i, a] * inside[i, b] * np.log(inside[i, b])
            total -= outside[i, a] * np.log(joint[a, target[i]])
    return total / len(target)


def arguments(dtype=torch.float64, requires_grad=False):
    shapes = [(COUNT, DIM_IN), (COUNT, DIM_OUT), (INSIDE, DIM_IN), (OUTSIDE, DIM_OUT)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors.append(torch.rand(OUTSIDE, CLASSES, dtype=torch.float64).softmax(0))
    tensors = [tensor.to(dtype).requires_grad_(requires_grad) for tensor in tensors]
    return *tensors, torch.randint(CLASSES, (COUNT,))


def with_argument(name, value):
    names = ("features_in", "features_out", "centroids_in", "centroids_out", "joint", "target")
    return dict(zip(names, arguments())) | {name: value}


def test_the_bound_is_the_published_formula():
    given = arguments()
    expected = published_bound(*(tensor.numpy() for tensor in given))
    assert effattn.information_bottleneck_bound(*given).item() == pytest.approx(expected, rel=1e-12)


def test_probabilities_are_the_published_formula():
    features, centroids = torch.randn(COUNT, DIM_OUT), 2 * torch.randn(OUTSIDE, DIM_OUT)
    phi = effattn.centroid_probabilities(features, centroids)
    np.testing.assert_allclose(phi, published_phi(features.numpy(), centroids.numpy()), rtol=1e-5)


def test_probabilities_do_not_depend_on_the_length_of_a_feature():
    features, centroids = torch.randn(2, 3, DIM_OUT).double(), torch.randn(OUTSIDE, DIM_OUT).double()
    phi = effattn.centroid_probabilities(features, centroids)
    torch.testing.assert_close(effattn.centroid_probabilities(1000 * features, centroids), phi)
    torch.testing.assert_close(phi.sum(-1), torch.ones(2, 3).double())


def test_a_feature_of_zeros_has_no_direction_and_no_gradient():
    features, centroids = torch.zeros(2, DIM_OUT, requires_grad=True), torch.randn(OUTSIDE, DIM_OUT)
    phi = effattn.centroid_probabilities(features, centroids)
    torch.testing.assert_close(phi[0], (-centroids.square().sum(1)).softmax(0))
    phi[:, 0].sum().backward()
    assert not features.grad.any()


def test_large_half_precision_features_do_not_overflow():
    features = torch.full((1, DIM_OUT), 2000.0, dtype=torch.float16)  # squares are beyond float16
    phi = effattn.centroid_probabilities(features, torch.eye(DIM_OUT, dtype=torch.float16))
    torch.testing.assert_close(phi, torch.full_like(phi, 1 / DIM_OUT))


def test_the_first_term_has_no_gradient_in_what_leaves_the_network():
    features_in, features_out, centroids_in, centroids_out, joint, target = arguments(requires_grad=True)
    bound = effattn.information_bottleneck_bound
    (gradient,) = torch.autograd.grad(
        bound(features_in, features_out, centroids_in, centroids_out, joint, target), features_out
    )
    other = torch.randn_like(features_in)
    (again,) = torch.autograd.grad(
        bound(other, features_out, 3 * centroids_in, centroids_out, joint, target), features_out
    )
    second = -(effattn.centroid_probabilities(features_out, centroids_out) * joint.log().mT[target]).sum(1).mean()
    (alone,) = torch.autograd.grad(second, features_out)
    torch.testing.assert_close(gradient, again)
    torch.testing.assert_close(gradient, alone)
    assert gradient.abs().max() > 1e-3


def test_gradients_of_all_arguments_are_right():
    given = arguments(requires_grad=True)
    assert torch.autograd.gradcheck(effattn.information_bottleneck_bound, given)


def test_an_entry_of_zero_in_the_joint_counts_as_the_smallest_number():
    *given, joint, target = arguments(torch.float32)
    joint = joint.clone()
    joint[0] = 0.0
    joint.requires_grad_()
    out = effattn.information_bottleneck_bound(*given, joint, target)
    tiny = torch.finfo(torch.float32).tiny
    expected = effattn.information_bottleneck_bound(*given, joint.detach().clamp(min=tiny), target)
    assert out.isfinite()
    assert out == expected
    out.backward()
    assert joint.grad.isfinite().all()


def test_an_empty_batch_has_a_bound_of_zero():
    features_in, features_out, centroids_in, centroids_out, joint, target = arguments()
    out = effattn.information_bottleneck_bound(
        features_in[:0], features_out[:0], centroids_in, centroids_out, joint, target[:0]
    )
    assert out.item() == 0.0


def test_half_precision_stays_near_double():
    given = arguments()
    low = effattn.information_bottleneck_bound(*(t.bfloat16() for t in given[:-1]), given[-1])
    assert low.dtype == torch.bfloat16
    assert low.item() == pytest.approx(effattn.information_bottleneck_bound(*given).item(), rel=0.05)


def test_the_bound_compiles_to_one_graph():
    given = arguments(requires_grad=True)
    compiled = torch.compile(effattn.information_bottleneck_bound, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), effattn.information_bottleneck_bound(*given))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features_in", torch.ones(COUNT, DIM_IN, dtype=torch.int64), TypeError),
        ("features_in", torch.ones(COUNT, 1, DIM_IN).double(), ValueError),
        ("features_out", torch.ones(COUNT + 1, DIM_OUT).double(), ValueError),
        ("features_out", torch.ones(COUNT, DIM_OUT), TypeError),
        ("centroids_in", torch.ones(INSIDE, DIM_OUT).double(), ValueError),
        ("centroids_in", torch.ones(INSIDE, DIM_IN), TypeError),
        ("centroids_out", torch.ones(0, DIM_OUT).double(), ValueError),
        ("centroids_out", 3, TypeError),
        ("joint", torch.ones(OUTSIDE + 1, CLASSES).double(), ValueError),
        ("joint", torch.ones(OUTSIDE, CLASSES), TypeError),
        ("target", torch.zeros(COUNT), TypeError),
        ("target", torch.zeros(COUNT - 1, dtype=torch.int64), ValueError),
        ("target", [0] * COUNT, TypeError),
    ],
)
def test_wrong_arguments_are_named(name, value, error):
    with pytest.raises(error, match=name):
        effattn.information_bottleneck_bound(**with_argument(name, value))


@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_a_target_that_is_no_class_is_refused(wrong):
    with pytest.raises(IndexError):
        effattn.information_bottleneck_bound(**with_argument("target", torch.full((COUNT,), wrong)))


def test_probabilities_refuse_centroids_of_another_width_or_dtype():
    with pytest.raises(ValueError, match="centroids"):
        effattn.centroid_probabilities(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeError, match="centroids"):
        effattn.centroid_probabilities(torch.ones(2, 3), torch.ones(4, 3).double())
