"""Modules with the published parameter names, shapes and initialisation."""

from .cross_shaped_window import CrossShapedWindowAttention, OverlappingCrossAttention, WindowAttention
from .gaussian_mixture import GaussianMixtureAttention
from .mixture_of_primitives import MixtureOfPrimitives, balance_loss, measure_expert_latency
from .shift_add import ShiftAddAttention
from .shift_linear import FrozenShiftLinear, ShiftLinear

__all__ = [
    "CrossShapedWindowAttention",
    "FrozenShiftLinear",
    "GaussianMixtureAttention",
    "MixtureOfPrimitives",
    "OverlappingCrossAttention",
    "ShiftAddAttention",
    "ShiftLinear",
    "WindowAttention",
    "balance_loss",
    "measure_expert_latency",
]
