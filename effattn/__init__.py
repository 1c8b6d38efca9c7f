"""effattn: fused kernels for efficient attention."""

from . import nn, reference
from ._registry import explain
from ._version import __version__
from .masks import GaussianMixtureMask, StructuredMask
from .ops import gaussian_mixture_attention, masked_product_attention, scaled_dot_product_attention

__all__ = [
    "GaussianMixtureMask",
    "StructuredMask",
    "__version__",
    "explain",
    "gaussian_mixture_attention",
    "masked_product_attention",
    "nn",
    "reference",
    "scaled_dot_product_attention",
]
