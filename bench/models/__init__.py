"""Whole models, each on our operators and in its own eager form: ``python -m effattn.bench.models``.

A file beside this one defines ``MODELS``, one or more ``Model``; it is found by that. Each is built small enough to read,
from ``effattn.nn``; its eager form has the same modules and parameters and computes attention as the published code does.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..cases import OURS

EAGER = "eager"
PUBLISHED, DIGITS = "published", "digits"
"""Sizes: the paper's at its resolution, and a small one for 32 x 32 images of ten classes that a test trains."""


class Model(NamedTuple):
    """One architecture. A built model maps images (B, 3, pixels, pixels) to logits (B, classes)."""

    name: str  # "CSWin-T"
    source: str  # "arXiv 2107.00652, table 1"
    build: Callable[[str, str], nn.Module]  # (form, size): form OURS, EAGER or one of others; same state-dict names
    others: tuple[str, ...] = ()  # further forms to compare with, such as the model without merging
    exact: bool = True  # whether OURS and EAGER differ by rounding only
    batch: int = 8
    pixels: int = 224
    parameters: float | None = None  # of the published size, in millions, as the source gives them; None: it does not


@functools.cache
def models() -> dict[str, Model]:
    """Every model of every file here."""
    found = {}
    for info in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda info: info.name):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__package__}.{info.name}")
            found.update({model.name: model for model in getattr(module, "MODELS", ())})
    return found


__all__ = ["DIGITS", "EAGER", "OURS", "PUBLISHED", "Model", "models"]
