"""effattn: fused kernels for efficient attention."""

import importlib

from . import nn, reference
from ._registry import explain
from ._version import __version__
from .masks import GaussianMixtureMask, ShiftAdd, StructuredMask
from .ops import (
    add_matmul,
    binary_matmul,
    gaussian_mixture_attention,
    hamming_attention,
    masked_product_attention,
    pack_signs,
    scaled_dot_product_attention,
    shift_add_attention,
    shift_linear,
)
from .packed import PackedShiftWeight, quantize_power_of_two

__all__ = [
    "GaussianMixtureMask",
    "PackedShiftWeight",
    "ShiftAdd",
    "StructuredMask",
    "__version__",
    "add_matmul",
    "binary_matmul",
    "explain",
    "gaussian_mixture_attention",
    "hamming_attention",
    "integrations",
    "masked_product_attention",
    "nn",
    "pack_signs",
    "quantize_power_of_two",
    "reference",
    "scaled_dot_product_attention",
    "shift_add_attention",
    "shift_linear",
]


def __getattr__(name: str):
    if name == "integrations":  # loaded when it is asked for
        return importlib.import_module(".integrations", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
