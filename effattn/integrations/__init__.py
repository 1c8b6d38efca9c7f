"""Conversion of whole models, in place and back."""

from . import timm
from .shift_add import ShiftAddConversion, convert_to_shift_add, freeze_shift_add, revert_shift_add

__all__ = ["ShiftAddConversion", "convert_to_shift_add", "freeze_shift_add", "revert_shift_add", "timm"]
