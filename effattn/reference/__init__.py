"""The specification: every operator in plain PyTorch, any dtype, differentiable, dense."""

from .attention import scaled_dot_product_attention
from .gaussian_mixture import gaussian_mixture_attention, masked_product_attention, mixture_mask
from .shift_add import add_matmul, binary_matmul, hamming_attention, pack_signs, shift_add_attention, shift_linear

__all__ = [
    "add_matmul",
    "binary_matmul",
    "gaussian_mixture_attention",
    "hamming_attention",
    "masked_product_attention",
    "mixture_mask",
    "pack_signs",
    "scaled_dot_product_attention",
    "shift_add_attention",
    "shift_linear",
]
