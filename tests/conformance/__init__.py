"""The family-independent conformance suite: what every registered operator is held to.

A new operator gets all of it by one entry in ``cases.CASES`` and its float64 formula in ``formulas``.
"""

from .backends import (
    SIXTEEN_BITS_ONLY,
    all_cases,
    backends_of,
    case_and_backend,
    case_backend_and,
    device_of,
    is_slow,
    namespace_of,
    require,
    small,
)
from .cases import CASES, ELSEWHERE, UNEVEN, Case, Shape
from .layouts import LAYOUTS, Placed, place
from .modes import GuardedAllocations, RecordedCalls, fresh_compiler, launch, skip_level_of_other_tests
from .rule import Result, assert_same_bits, assert_within_budget, run

__all__ = [
    "CASES",
    "ELSEWHERE",
    "LAYOUTS",
    "SIXTEEN_BITS_ONLY",
    "UNEVEN",
    "Case",
    "GuardedAllocations",
    "Placed",
    "RecordedCalls",
    "Result",
    "Shape",
    "all_cases",
    "assert_same_bits",
    "assert_within_budget",
    "backends_of",
    "case_and_backend",
    "case_backend_and",
    "device_of",
    "fresh_compiler",
    "is_slow",
    "launch",
    "namespace_of",
    "place",
    "require",
    "run",
    "skip_level_of_other_tests",
    "small",
]
