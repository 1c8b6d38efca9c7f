"""Changes to whole models, in place and back."""

from . import timm
from .patching import Patching, patch, unpatch
from .replacement import replace_sdpa
from .shift_add import ShiftAddConversion, convert_to_shift_add, freeze_shift_add, revert_shift_add

__all__ = [
    "Patching",
    "ShiftAddConversion",
    "convert_to_shift_add",
    "freeze_shift_add",
    "patch",
    "replace_sdpa",
    "revert_shift_add",
    "timm",
    "unpatch",
]
