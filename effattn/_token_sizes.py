"""The structured mask of merged tokens."""

from __future__ import annotations

from torch import Tensor

from . import ops
from ._structured_mask import StructuredMask
from .ops.token_merging_plan import flat_sizes
from .reference.token_merging import log_sizes


class TokenSizes(StructuredMask):
    """Lets a key that stands for s patches count s times.

    ``F.scaled_dot_product_attention(q, k, v, attn_mask=TokenSizes(sizes))`` equals
    ``size_weighted_attention(q, k, v, sizes)``, which documents the formula.

    Args:
        sizes: (B, M) or (B, M, 1), as ``TokenMerge.merge_weighted`` returns them; they receive gradients.

    Raises:
        TypeError, ValueError: on use, as :func:`effattn.size_weighted_attention`.

    Source:
        Token Merging: Your ViT But Faster, arXiv 2210.09461, equation 1.

    Example:
        >>> import torch, effattn
        >>> import torch.nn.functional as F
        >>> query, key, value = torch.randn(3, 1, 2, 6, 8)
        >>> mask = effattn.TokenSizes(torch.tensor([[1, 1, 3, 1, 2, 1]]))
        >>> out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        >>> dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense())
        >>> torch.allclose(out, dense, atol=1e-5)
        True
    """

    def __init__(self, sizes: Tensor):
        self.sizes = sizes

    def attend(self, query, key, value, *, dropout_p=0.0, scale=None, backend="auto") -> Tensor:
        return ops.size_weighted_attention(
            query, key, value, self.sizes, scale=scale, dropout_p=dropout_p, backend=backend
        )

    def dense(self) -> Tensor:
        """The additive mask of (B, 1, 1, M), float32: log sizes, -inf where a size is 0."""
        flat = flat_sizes("TokenSizes", self.sizes, self.sizes, tuple(self.sizes.shape[:2]), "sizes")
        return log_sizes(flat.float())[:, None, None]

    def __repr__(self) -> str:
        return f"TokenSizes({tuple(self.sizes.shape[:2])})"
