"""The information-bottleneck bound that learnable token merging descends on (LTM)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

LEAST_LENGTH = 1e-12  # a shorter feature has no direction


def centroid_probabilities(features: Tensor, centroids: Tensor) -> Tensor:
    r"""How much each feature belongs to each centroid: softmax over centroids of minus the squared distance.

    .. math:: \phi(F, a) = \mathrm{softmax}_a(-|F / |F| - C_a|^2)

    Args:
        features: F, (..., D), floating point; a feature of zeros stays zeros.
        centroids: C, (A, D), features' dtype.

    Returns:
        Tensor: (..., A). Differentiable in both.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        arXiv 2407.15219, section 3.

    Example:
        >>> import torch, effattn
        >>> phi = effattn.centroid_probabilities(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        >>> phi.argmax().item()
        0
    """
    op = "centroid_probabilities"
    _checks.floating(op, "features", features)
    _checks.parameter(op, "centroids", centroids, features, "features")
    if centroids.dim() != 2 or features.dim() < 1 or centroids.shape[1] != features.shape[-1] or not len(centroids):
        raise ValueError(
            f"{op}: centroids must have shape (A, D) with A at least 1 and features' D, got {tuple(centroids.shape)} "
            f"and features {tuple(features.shape)}"
        )
    _same_dtype(op, "centroids", centroids, "features", features)
    return _log_probabilities(features, centroids).exp()


def direction(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(F / |F|, |F|, whether F counts as zero); such a feature has direction 0, length 1 and no gradient."""
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    absent = length <= LEAST_LENGTH
    length = length.masked_fill(absent, 1.0)
    return (features / length).masked_fill(absent, 0.0), length, absent


def _log_probabilities(features: Tensor, centroids: Tensor) -> Tensor:
    # |u - c|^2 without |u|^2, which is the same for every centroid
    return (2 * direction(features)[0] @ centroids.mT - centroids.square().sum(-1)).log_softmax(-1)


def log_joint(joint: Tensor) -> Tensor:
    """log Q; 0 counts as the smallest positive number."""
    return joint.clamp(min=torch.finfo(joint.dtype).tiny).log()


def _same_dtype(op: str, name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {like}, {other.dtype}, got {tensor.dtype}")


def information_bottleneck_bound(
    features_in: Tensor,
    features_out: Tensor,
    centroids_in: Tensor,
    centroids_out: Tensor,
    joint: Tensor,
    target: Tensor,
) -> Tensor:
    r"""Upper bound of the information bottleneck I(F, X) - I(F, Y) over a batch: LTM's training loss.

    .. math::
        \frac{1}{n} \sum_i \Big[ \sum_{ab} \phi(F_i, a)\, \phi(X_i, b) \log \phi(X_i, b)
            - \sum_a \phi(F_i, a) \log Q_{a y_i} \Big], \qquad \phi(F, a) = \mathrm{softmax}_a(-|F / |F| - C_a|^2)

    X is what enters the network and F what leaves it. Since the :math:`\phi(F, a)` sum to 1, the first term does not
    depend on F: only the second has a gradient with respect to ``features_out``.

    Args:
        features_in: X, (n, D_in).
        features_out: F, (n, D_out), dtype and device of ``features_in``.
        centroids_in: (B, D_in), centroids b of X, their dtype.
        centroids_out: (A, D_out), centroids a of F, their dtype.
        joint: Q, (A, classes), :math:`Q_{ay} = \sum_i \phi(F_i, a)\, 1[y_i = y] / \#\{y_i = y\}`, in practice over the
            last epoch. An entry of 0 counts as the smallest positive number of its dtype.
        target: y, (n,) int64, classes.

    Returns:
        Tensor: scalar, 0 for an empty batch. Differentiable in all floating arguments.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        IndexError: on the CPU, if a target is no class.

    Source:
        Efficient Visual Transformer by Learnable Token Merging, arXiv 2407.15219, theorem 3.1.

    Example:
        >>> import torch, effattn
        >>> features = torch.eye(2)
        >>> joint = effattn.centroid_probabilities(features, features).mT  # class i is feature i
        >>> right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
        >>> bound = effattn.information_bottleneck_bound
        >>> (bound(features, features, features, features, joint, right)
        ...     < bound(features, features, features, features, joint, wrong)).item()
        True
    """
    op = "information_bottleneck_bound"
    pairs = (
        ("features_in", features_in, "centroids_in", centroids_in),
        ("features_out", features_out, "centroids_out", centroids_out),
    )
    for name, features, like, centroids in pairs:
        _checks.floating(op, name, features)
        if features.dim() != 2:
            raise ValueError(f"{op}: {name} must have shape (n, D), got {tuple(features.shape)}")
        _checks.parameter(op, like, centroids, features, name)
        _same_dtype(op, like, centroids, name, features)
        if centroids.dim() != 2 or centroids.shape[1] != features.shape[1] or len(centroids) < 1:
            raise ValueError(f"{op}: {like} must have shape (A, {features.shape[1]}), got {tuple(centroids.shape)}")
    count = len(features_in)
    if len(features_out) != count or features_out.device != features_in.device:
        raise ValueError(
            f"{op}: features_out must have the {count} rows and the device of features_in, got "
            f"{tuple(features_out.shape)} on {features_out.device}"
        )
    _same_dtype(op, "features_out", features_out, "features_in", features_in)
    _checks.parameter(op, "joint", joint, features_out, "features_out")
    _same_dtype(op, "joint", joint, "features_in", features_in)
    if joint.dim() != 2 or len(joint) != len(centroids_out) or joint.shape[1] < 1:
        raise ValueError(f"{op}: joint must have shape ({len(centroids_out)}, classes), got {tuple(joint.shape)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be an int64 Tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != (count,) or target.device != features_in.device:
        raise ValueError(f"{op}: target must have shape ({count},) on {features_in.device}, got {tuple(target.shape)}")
    inside = _log_probabilities(features_in, centroids_in)
    outside = _log_probabilities(features_out, centroids_out).exp()
    first = outside.sum(-1) * (inside.exp() * inside).sum(-1)
    likelihood = log_joint(joint).mT.index_select(0, target)  # refuses what indexing would count from the end
    return (first - (outside * likelihood).sum(-1)).sum() / max(count, 1)
