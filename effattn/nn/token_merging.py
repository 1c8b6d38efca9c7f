"""Modules that merge N tokens into P by learned weights: PatchMerger, and LTM, whose mask descends on a bound."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops import centroid_probabilities, soft_merge
from ..ops.information_bottleneck import direction, log_joint


def _tokens(name: str, tokens, dim: int, norm: nn.LayerNorm) -> None:
    _checks.layer_input(name, "tokens", tokens, norm)
    if tokens.dim() != 3 or tokens.shape[2] != dim:
        raise ValueError(f"{name}: tokens must have shape (batch, tokens, {dim}), got {tuple(tokens.shape)}")


class PatchMerger(nn.Module):
    r"""Merge any number of tokens into P, each an average weighted by a learned query.

    .. math:: X = \mathrm{norm}(\text{tokens}), \qquad Y = \mathrm{softmax}_N(C^{-1/2} X Q^\top)^\top X

    by :func:`effattn.soft_merge`. Parameters: ``norm.weight`` and ``norm.bias`` (C,), ``queries`` (P, C): a state dict
    of vit-pytorch's ``PatchMerger`` loads as it is.

    Args:
        dim: C.
        num_tokens: P, tokens that come out.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (B, N, C) -> (B, P, C).

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, for tokens of another shape.

    Source:
        Learning to Merge Tokens in Vision Transformers, arXiv 2202.12015. Initialisation as in vit-pytorch:
        queries ~ N(0, 1).

    Example:
        >>> import torch, effattn
        >>> merger = effattn.nn.PatchMerger(64, 8)
        >>> merger(torch.randn(2, 196, 64)).shape
        torch.Size([2, 8, 64])
        >>> sorted(merger.state_dict())
        ['norm.bias', 'norm.weight', 'queries']
    """

    def __init__(self, dim: int, num_tokens: int, *, backend: str = "auto", device=None, dtype=None):
        super().__init__()
        _checks.module_options("PatchMerger", device, dtype)
        for argument, value in (("dim", dim), ("num_tokens", num_tokens)):
            _checks.integer("PatchMerger", argument, value, 1)
        like = {"device": device, "dtype": dtype}
        self.dim, self.num_tokens, self.scale, self.backend = dim, num_tokens, dim**-0.5, backend
        self.norm = nn.LayerNorm(dim, **like)
        self.queries = nn.Parameter(torch.empty(num_tokens, dim, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.normal_(self.queries)

    def forward(self, tokens: Tensor) -> Tensor:
        _tokens("PatchMerger", tokens, self.dim, self.norm)
        tokens = self.norm(tokens)
        logits = F.linear(tokens, self.queries) * self.scale
        return soft_merge(tokens, logits.to(tokens.dtype), backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_tokens={self.num_tokens}"


class LearnableTokenMerge(nn.Module):
    r"""Merge N tokens into P by a mask that takes a step down the information bottleneck (LTM).

    Structure after the paper's figure; the authors' mask module is not public. The step is our design, and nothing is
    claimed about the accuracy that they report.

    With the tokens :math:`Z` (B, N, C) and a mask :math:`G` (B, N, P), of an earlier layer or the initial
    :math:`C^{-1/2}\, \mathrm{norm}(Z)\, \text{weight}^\top`, the merged tokens are :math:`F = W^\top Z`,
    :math:`W = \mathrm{softmax}_N(G)`. Of :func:`effattn.information_bottleneck_bound` only the second term depends on
    F; the class is not known in inference, so it is taken under the module's own belief:

    .. math:: L = -\sum_p \log \sum_y e^{\ell_{py}}, \qquad \ell_{py} = \sum_a \phi(F_p, a) \log Q_{ay}, \qquad
              \phi(F, a) = \mathrm{softmax}_a(2\, u \cdot C_a - |C_a|^2), \qquad u = F / |F|

    Its gradient in closed form, with the belief :math:`\pi_{py} = \mathrm{softmax}_y(\ell_{py})` and
    :math:`m_{pa} = \sum_y \pi_{py} \log Q_{ay}`:

    .. math:: \frac{\partial L}{\partial z_{pa}} = -\phi_{pa} \Big(m_{pa} - \sum_b \phi_{pb} m_{pb}\Big), \qquad
              du_p = 2 \sum_a \frac{\partial L}{\partial z_{pa}} C_a, \qquad
              dF_p = \frac{du_p - (du_p \cdot u_p)\, u_p}{|F_p|}, \qquad
              dG_{np} = W_{np}\, (Z_n - F_p) \cdot dF_p

    and the module returns :math:`\mathrm{softmax}_N(G')^\top Z` and :math:`G' = G - \text{step\_size} \cdot dG`. All of
    it is differentiated by autograd as usual, so the step size, the centroids and the initial mask are learned.

    Parameters: ``weight`` (P, C), ``norm.weight``, ``norm.bias``, ``centroids`` (A, C), ``step_size`` (1,), and the
    buffer ``joint`` Q (A, classes), which is uniform, so that the step is none, until :meth:`update_joint` is called.

    Args:
        dim: C.
        num_tokens: N, tokens to merge, without the protected ones.
        num_classes: of the buffer ``joint``.
        compression_ratio: P = round(compression_ratio * N), in (0, 1].
        num_centroids: A; default one for each class, as published.
        num_protected: leading tokens (class token) that pass through unmerged, in front of the P.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        tokens (B, num_protected + N, C), mask (B, N, P) or None -> merged (B, num_protected + P, C), mask (B, N, P).

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, for tokens or a mask of another shape.

    Source:
        Efficient Visual Transformer by Learnable Token Merging, arXiv 2407.15219: the bound of theorem 3.1 and the
        figure. Initialisation: weight ~ N(0, 1), centroids on the unit sphere, step size 1.

    Example:
        >>> import torch, effattn
        >>> merge = effattn.nn.LearnableTokenMerge(64, 196, 10, num_protected=1)
        >>> tokens = torch.randn(2, 197, 64)
        >>> merged, mask = merge(tokens)
        >>> merged.shape, mask.shape
        (torch.Size([2, 158, 64]), torch.Size([2, 196, 157]))
        >>> merge.update_joint(merged[:, 0], torch.tensor([3, 7]))  # once an epoch, from features and their classes
        >>> merged, mask = merge(tokens, mask)
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        num_classes: int,
        *,
        compression_ratio: float = 0.8,
        num_centroids: int | None = None,
        num_protected: int = 0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "LearnableTokenMerge"
        _checks.module_options(name, device, dtype)
        num_centroids = num_classes if num_centroids is None else num_centroids
        sizes = {"dim": dim, "num_tokens": num_tokens, "num_classes": num_classes, "num_centroids": num_centroids}
        for argument, value in sizes.items():
            _checks.integer(name, argument, value, 1)
        _checks.integer(name, "num_protected", num_protected, 0)
        compression_ratio = _checks.real(name, "compression_ratio", compression_ratio)
        if not 0.0 < compression_ratio <= 1.0:
            raise ValueError(f"{name}: compression_ratio must be in (0, 1], got {compression_ratio}")
        self.dim, self.num_tokens, self.num_merged_tokens = dim, num_tokens, round(compression_ratio * num_tokens)
        if self.num_merged_tokens < 1:
            raise ValueError(f"{name}: compression_ratio {compression_ratio} leaves none of {num_tokens} tokens")
        self.num_protected, self.backend = num_protected, backend
        like = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **like)
        self.weight = nn.Parameter(torch.empty(self.num_merged_tokens, dim, **like))
        self.centroids = nn.Parameter(torch.empty(num_centroids, dim, **like))
        self.step_size = nn.Parameter(torch.empty(1, **like))  # FSDP2 shards no scalar
        self.register_buffer("joint", torch.empty(num_centroids, num_classes, **like))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.normal_(self.weight)
        nn.init.normal_(self.centroids)
        self.centroids.copy_(F.normalize(self.centroids, dim=1))
        nn.init.ones_(self.step_size)
        nn.init.constant_(self.joint, 1.0 / len(self.joint))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        name, protected = "LearnableTokenMerge", self.num_protected
        _tokens(name, tokens, self.dim, self.norm)
        if tokens.shape[1] != protected + self.num_tokens:
            raise ValueError(
                f"{name}: tokens must be {protected} protected and {self.num_tokens} to merge, got {tokens.shape[1]}"
            )
        leading, patches = tokens[:, :protected], tokens[:, protected:]
        if mask is None:
            mask = F.linear(self.norm(patches), self.weight) * self.dim**-0.5
        else:
            shape = (tokens.shape[0], self.num_tokens, self.num_merged_tokens)
            _checks.parameter(name, "mask", mask, tokens, "tokens")
            if mask.shape != shape:
                raise ValueError(f"{name}: mask must have shape {shape}, got {tuple(mask.shape)}")
        mask = mask.to(patches.dtype)
        merged = soft_merge(patches, mask, backend=self.backend)
        mask = mask - self.step_size.to(mask.dtype) * self._mask_gradient(patches, mask, merged)
        merged = soft_merge(patches, mask, backend=self.backend)
        return torch.cat([leading.to(merged.dtype), merged], 1) if protected else merged, mask

    def _mask_gradient(self, tokens: Tensor, mask: Tensor, merged: Tensor) -> Tensor:
        """dG, in mask's dtype: soft_merge's gradient of its logits for the gradient ``dF`` of its output."""
        grad = self.bound_gradient(merged).to(tokens.dtype)
        from_mean = (merged.to(tokens.dtype) * grad).sum(-1)
        return mask.softmax(1) * (tokens @ grad.mT - from_mean.unsqueeze(1)).to(mask.dtype)

    def _log_likelihood(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi (..., A), log Q (A, classes) and ell (..., classes)."""
        phi = centroid_probabilities(features, self.centroids.to(features.dtype))
        logarithms = log_joint(self.joint.to(features.dtype))
        return phi, logarithms, phi @ logarithms

    def bound(self, features: Tensor) -> Tensor:
        """L, the bound's second term under the module's own belief, summed over features (..., C); float32 at least."""
        features, no_autocast = _in_float32(features)
        with no_autocast:
            return -self._log_likelihood(features)[2].logsumexp(-1).sum()

    def bound_gradient(self, features: Tensor) -> Tensor:
        """The gradient of :meth:`bound` in closed form: (..., C), 0 for a feature of zeros; float32 at least."""
        features, no_autocast = _in_float32(features)
        with no_autocast:
            phi, logarithms, likelihood = self._log_likelihood(features)
            expected = likelihood.softmax(-1) @ logarithms.mT
            grad_logits = phi * ((phi * expected).sum(-1, keepdim=True) - expected)
            grad_unit = 2 * grad_logits @ self.centroids.to(features.dtype)
            unit, length, absent = direction(features)
            grad = (grad_unit - (grad_unit * unit).sum(-1, keepdim=True) * unit) / length
            return grad.masked_fill(absent, 0.0)

    @torch.no_grad()
    def update_joint(self, features: Tensor, target: Tensor, *, centroid_steps: int = 0) -> None:
        r"""Estimate ``joint`` from features and their classes, as the paper does once an epoch.

        .. math:: Q_{ay} = \sum_i \phi(F_i, a)\, 1[y_i = y] \,/\, \#\{y_i = y\}

        A class without a feature keeps its column.

        Args:
            features: (n, C), or (n, P, C), of which each of the P counts for the class of its image.
            target: (n,) int64, classes.
            centroid_steps: steps of k-means that the centroids take first, each to the mean of the normalised features
                that are nearest to it. A centroid without features stays.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        name = "update_joint"
        _checks.floating(name, "features", features)
        if features.dim() not in (2, 3) or features.shape[-1] != self.dim:
            raise ValueError(
                f"{name}: features must have shape (n, {self.dim}) or (n, P, {self.dim}), got {tuple(features.shape)}"
            )
        _checks.integer(name, "centroid_steps", centroid_steps, 0)
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            found = getattr(target, "dtype", type(target).__name__)
            raise TypeError(f"{name}: target must be an int64 Tensor, got {found}")
        if target.shape != features.shape[:1] or features.device != self.joint.device:
            raise ValueError(
                f"{name}: target must have shape ({len(features)},), and features be on {self.joint.device}; got "
                f"{tuple(target.shape)} and {features.device}"
            )
        classes = self.joint.shape[1]
        if len(target) and not bool(((target >= 0) & (target < classes)).all()):
            raise ValueError(f"{name}: target must be in 0..{classes - 1}")
        if features.dim() == 3:
            target = target.repeat_interleave(features.shape[1])
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, target = features.reshape(-1, self.dim).to(dtype), target.to(features.device)
        unit = direction(features)[0]
        for _ in range(centroid_steps):
            nearest = centroid_probabilities(features, self.centroids.to(dtype)).argmax(1)
            member = F.one_hot(nearest, len(self.centroids)).to(dtype)
            counts = member.sum(0).unsqueeze(1)
            means = member.mT @ unit / counts.clamp(min=1)
            self.centroids.copy_(torch.where(counts > 0, means, self.centroids.to(dtype)))
        of_class = F.one_hot(target, classes).to(dtype)
        counts = of_class.sum(0)
        sums = centroid_probabilities(features, self.centroids.to(dtype)).mT @ of_class
        self.joint.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), self.joint.to(dtype)))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_tokens} -> {self.num_merged_tokens} tokens, num_protected={self.num_protected}"


def _in_float32(features: Tensor):
    """Features in float32 at least, and a context without autocast: what follows sums logarithms of small numbers."""
    device = features.device.type
    off = contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    return features.to(torch.promote_types(features.dtype, torch.float32)), off


__all__ = ["LearnableTokenMerge", "PatchMerger"]
