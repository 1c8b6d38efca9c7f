"""The specification: every operator in plain PyTorch, any dtype, differentiable, dense."""

from .attention import scaled_dot_product_attention
from .gaussian_mixture import gaussian_mixture_attention, masked_product_attention, mixture_mask

__all__ = ["gaussian_mixture_attention", "masked_product_attention", "mixture_mask", "scaled_dot_product_attention"]
