"""effattn: fused kernels for efficient attention."""

import importlib

from . import nn, reference
from ._registry import explain
from ._version import __version__
from .masks import (
    CrossShapedWindow,
    GaussianMixtureMask,
    KernelizedRPE,
    ManhattanDecay,
    RelativePositionBias,
    RetentionDecay,
    ShiftAdd,
    StructuredMask,
    TokenSizes,
    Window,
)
from .ops import (
    TokenMerge,
    add_matmul,
    binary_matmul,
    bipartite_soft_matching,
    centroid_probabilities,
    cross_shaped_window_attention,
    gaussian_mixture_attention,
    hamming_attention,
    information_bottleneck_bound,
    keep_tokens,
    kernelized_rpe_attention,
    manhattan_attention,
    masked_product_attention,
    pack_signs,
    random_features,
    retention,
    retention_step,
    retnet_log_decay,
    rmt_log_decay,
    rotate_xpos,
    scaled_dot_product_attention,
    shift_add_attention,
    shift_linear,
    size_weighted_attention,
    soft_merge,
    stripe_attention,
    toeplitz_linear_attention,
    urpe_attention,
    window_attention,
)
from .packed import PackedShiftWeight, quantize_power_of_two

__all__ = [
    "CrossShapedWindow",
    "GaussianMixtureMask",
    "KernelizedRPE",
    "ManhattanDecay",
    "PackedShiftWeight",
    "RelativePositionBias",
    "RetentionDecay",
    "ShiftAdd",
    "StructuredMask",
    "TokenMerge",
    "TokenSizes",
    "Window",
    "__version__",
    "add_matmul",
    "binary_matmul",
    "bipartite_soft_matching",
    "centroid_probabilities",
    "cross_shaped_window_attention",
    "distributed",
    "explain",
    "gaussian_mixture_attention",
    "hamming_attention",
    "information_bottleneck_bound",
    "integrations",
    "keep_tokens",
    "kernelized_rpe_attention",
    "manhattan_attention",
    "masked_product_attention",
    "nn",
    "pack_signs",
    "patch",
    "quantize_power_of_two",
    "random_features",
    "reference",
    "replace_sdpa",
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
    "unpatch",
    "urpe_attention",
    "visualize",
    "window_attention",
]


def __getattr__(name: str):
    if name in ("distributed", "integrations", "visualize"):  # loaded when they are asked for
        return importlib.import_module(f".{name}", __name__)
    if name in ("patch", "replace_sdpa", "unpatch"):
        return getattr(importlib.import_module(".integrations", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
