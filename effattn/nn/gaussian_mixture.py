"""Multi-head self-attention with a Gaussian-mixture mask, as in GMM-ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops import gaussian_mixture_attention


class GaussianMixture(nn.Module):
    """Learned parameters of the mask, in the published layout: ``alpha`` and ``sigma`` are (K, H, 1, 1)."""

    def __init__(self, num_gaussians: int, num_heads: int):
        super().__init__()
        self.sigma = nn.Parameter(torch.empty(num_gaussians, num_heads, 1, 1))
        self.alpha = nn.Parameter(torch.empty(num_gaussians, num_heads, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.sigma, mean=10.0, std=10.0)
        nn.init.normal_(self.alpha, mean=0.0, std=2.0)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The published module also stores exp(-r2 / 2) as a frozen (1, 1, N, N) parameter; ours derives it.
        state_dict.pop(f"{prefix}mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GaussianMixtureAttention(nn.Module):
    """Multi-head self-attention of GMM-ViT: projections around :func:`effattn.gaussian_mixture_attention`.

    Loads the state dict of the published ``Attention`` module (names ``to_qkv``, ``to_out``, ``mask``).

    Args:
        dim: channels of the input and output.
        grid: (h, w), rows and columns of the token grid.
        num_heads: H.
        head_dim: channels of one head.
        num_gaussians: K, Gaussians in the mixture.
        num_prefix_tokens: tokens before the grid (class tokens).
        dropout: probability of zeroing an element of the output.
        backend: passed to the operator.

    Shape:
        (B, num_prefix_tokens + h*w, dim) -> the same.

    Raises:
        TypeError, ValueError: in the call, as :func:`effattn.gaussian_mixture_attention`.

    Source:
        arXiv 2309.05375; initialisation as published: alpha ~ 2 N(0, 1), sigma ~ 10 + 10 N(0, 1), Xavier-normal
        projections, zero bias.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.GaussianMixtureAttention(96, grid=(8, 8), num_heads=6, head_dim=16)
        >>> attention(torch.randn(2, 64, 96)).shape
        torch.Size([2, 64, 96])
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        num_gaussians: int = 5,
        num_prefix_tokens: int = 0,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        name, sizes = "GaussianMixtureAttention", (("num_heads", num_heads), ("head_dim", head_dim))
        for argument, given in (("dim", dim), *sizes, ("num_gaussians", num_gaussians)):
            _checks.integer(name, argument, given, 1)
        _checks.integer(name, "num_prefix_tokens", num_prefix_tokens, 0)
        dropout = _checks.probability(name, "dropout", dropout)
        self.dim = dim
        self.grid, self.num_prefix_tokens = _checks.pair_of_integers(name, "grid", grid, 0), num_prefix_tokens
        self.num_heads, self.head_dim, self.backend = num_heads, head_dim, backend
        inner = num_heads * head_dim
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        if num_heads == 1 and head_dim == dim:
            self.to_out = nn.Identity()
        else:
            self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))
        self.mask = GaussianMixture(num_gaussians, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.to_qkv.weight)
        if isinstance(self.to_out, nn.Sequential):
            nn.init.xavier_normal_(self.to_out[0].weight)
            nn.init.zeros_(self.to_out[0].bias)
        self.mask.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        name = "GaussianMixtureAttention"
        _checks.layer_input(name, "x", x, self.to_qkv)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"{name}: x must have shape (batch, tokens, {self.dim}), got {tuple(x.shape)}")
        query, key, value = self.to_qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = gaussian_mixture_attention(
            query,
            key,
            value,
            self.mask.alpha.flatten(1),
            self.mask.sigma.flatten(1),
            self.grid,
            num_prefix_tokens=self.num_prefix_tokens,
            backend=self.backend,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}"
