"""What the methods of Toeplitz-weighted attention cost on this machine, in nanoseconds of one thread."""

from __future__ import annotations

import functools

DEFAULTS = (0.012, 0.03, 0.06, 0.02)
"""direct_ns, fft_ns, double_fft_ns, scan_ns of ``toeplitz_methods.plan``."""


@functools.cache
def costs() -> tuple[float, float, float, float]:
    return DEFAULTS
