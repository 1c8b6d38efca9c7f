"""The specification: every operator in plain PyTorch, any dtype, differentiable, dense."""

from .attention import scaled_dot_product_attention
from .cross_shaped_window import (
    cross_shaped_window_attention,
    relative_position_index,
    stripe_attention,
    window_attention,
    window_mask,
)
from .gaussian_mixture import gaussian_mixture_attention, masked_product_attention, mixture_mask
from .retention import (
    local_enhancement,
    manhattan_attention,
    manhattan_distance,
    retention,
    retention_step,
    rotate_xpos,
    row_sums,
)
from .shift_add import add_matmul, binary_matmul, hamming_attention, pack_signs, shift_add_attention, shift_linear
from .toeplitz import (
    feature_map,
    kernelized_rpe_attention,
    toeplitz_linear_attention,
    toeplitz_matrix,
    urpe_attention,
)
from .token_merging import (
    bipartite_soft_matching,
    size_weighted_attention,
    soft_merge,
    token_merge,
    token_merge_weighted,
    token_unmerge,
)

__all__ = [
    "add_matmul",
    "binary_matmul",
    "bipartite_soft_matching",
    "cross_shaped_window_attention",
    "feature_map",
    "gaussian_mixture_attention",
    "hamming_attention",
    "kernelized_rpe_attention",
    "local_enhancement",
    "manhattan_attention",
    "manhattan_distance",
    "masked_product_attention",
    "mixture_mask",
    "pack_signs",
    "relative_position_index",
    "retention",
    "retention_step",
    "rotate_xpos",
    "row_sums",
    "scaled_dot_product_attention",
    "shift_add_attention",
    "shift_linear",
    "size_weighted_attention",
    "soft_merge",
    "stripe_attention",
    "toeplitz_linear_attention",
    "toeplitz_matrix",
    "token_merge",
    "token_merge_weighted",
    "token_unmerge",
    "urpe_attention",
    "window_attention",
    "window_mask",
]
