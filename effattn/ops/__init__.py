"""Public operators: argument checks, schema, autograd and backend table; one module per family."""

from .attention import scaled_dot_product_attention
from .gaussian_mixture import gaussian_mixture_attention, masked_product_attention

__all__ = ["gaussian_mixture_attention", "masked_product_attention", "scaled_dot_product_attention"]
