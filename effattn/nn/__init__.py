"""Modules with the published parameter names, shapes and initialisation."""

from .cross_shaped_window import CrossShapedWindowAttention, OverlappingCrossAttention, WindowAttention
from .gaussian_mixture import GaussianMixtureAttention
from .manhattan import ManhattanAttention
from .mixture_of_primitives import MixtureOfPrimitives, balance_loss, measure_expert_latency
from .retention import MultiScaleRetention, VisionRetention
from .shift_add import ShiftAddAttention
from .shift_linear import FrozenShiftLinear, ShiftLinear
from .toeplitz import KernelizedRPEAttention, URPEAttention
from .token_merging import LearnableTokenMerge, PatchMerger

__all__ = [
    "CrossShapedWindowAttention",
    "FrozenShiftLinear",
    "GaussianMixtureAttention",
    "KernelizedRPEAttention",
    "LearnableTokenMerge",
    "ManhattanAttention",
    "MixtureOfPrimitives",
    "MultiScaleRetention",
    "OverlappingCrossAttention",
    "PatchMerger",
    "ShiftAddAttention",
    "ShiftLinear",
    "URPEAttention",
    "VisionRetention",
    "WindowAttention",
    "balance_loss",
    "measure_expert_latency",
]
