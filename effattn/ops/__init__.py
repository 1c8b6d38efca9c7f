"""Public operators: argument checks, schema, autograd and backend table; one module per family."""

from .attention import scaled_dot_product_attention
from .cross_shaped_window import cross_shaped_window_attention, stripe_attention, window_attention
from .gaussian_mixture import gaussian_mixture_attention, masked_product_attention
from .information_bottleneck import centroid_probabilities, information_bottleneck_bound
from .manhattan import manhattan_attention
from .packed_bits import add_matmul, binary_matmul, hamming_attention, pack_signs
from .retention import retention, retention_step
from .retention_schedules import retnet_log_decay, rmt_log_decay, rotate_xpos
from .shift_add import shift_add_attention
from .shift_linear import shift_linear
from .size_weighted_attention import size_weighted_attention
from .soft_merge import soft_merge
from .toeplitz import kernelized_rpe_attention, random_features, toeplitz_linear_attention
from .token_merging import bipartite_soft_matching, keep_tokens
from .token_merging_plan import TokenMerge
from .urpe import urpe_attention

__all__ = [
    "TokenMerge",
    "add_matmul",
    "binary_matmul",
    "bipartite_soft_matching",
    "centroid_probabilities",
    "cross_shaped_window_attention",
    "gaussian_mixture_attention",
    "hamming_attention",
    "information_bottleneck_bound",
    "keep_tokens",
    "kernelized_rpe_attention",
    "manhattan_attention",
    "masked_product_attention",
    "pack_signs",
    "random_features",
    "retention",
    "retention_step",
    "retnet_log_decay",
    "rmt_log_decay",
    "rotate_xpos",
    "scaled_dot_product_attention",
    "shift_add_attention",
    "shift_linear",
    "size_weighted_attention",
    "soft_merge",
    "stripe_attention",
    "toeplitz_linear_attention",
    "urpe_attention",
    "window_attention",
]
