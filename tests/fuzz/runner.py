"""Runs a share of the cases, and looks for what they leave behind."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import warnings
from collections import Counter

import torch
from conformance.modes import GuardedAllocations, RecordedCalls, launch
from hypothesis import given, settings
from hypothesis import strategies as st

from .oracle import Case, run

SHARES = {
    **{"attention": 6000, "masks": 2000, "linear": 3500, "merging": 2800, "bits": 2600},
    **{"modules": 1800, "others": 1300},
}
"""Cases of each group in CI."""
assert sum(SHARES.values()) == 20_000
LONGER = 50 if os.environ.get("HYPOTHESIS_PROFILE") == "search" else 1
SEEDS = st.integers(0, 2**48)


def fuzz(group: str, subjects: list) -> Counter:
    """As many cases as the group's share says; what became of them."""
    outcomes: Counter = Counter()
    wanted = SHARES[group] * LONGER

    @settings(max_examples=wanted)
    @given(SEEDS)
    def one(seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes[run(Case(subjects, seed))] += 1

    one()
    return outcomes


def guarded(subjects: list, count: int) -> Counter:
    """Launch again, inside guarded allocations, every op that answered calls make; the kernels of the CPU alone."""
    outcomes: Counter = Counter()
    for seed in range(count):
        case = Case(subjects, seed)
        case.backward = bool(case.subject.differentiable)
        with warnings.catch_warnings(), RecordedCalls() as recorded:
            warnings.simplefilter("ignore")
            run(case)
        for op, args in recorded.calls:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if any(t.device.type != "cpu" or t.numel() > 1e6 for t in tensors) or op.namespace != "effattn":
                continue
            with GuardedAllocations() as allocations:
                try:
                    launch(op, args, "cpu")
                except RuntimeError:
                    outcomes["refused"] += 1
                    continue
            if allocations._wide:
                allocations.assert_intact()
                outcomes["watched"] += 1
    return outcomes


def held() -> tuple[int, int]:
    """Bytes that malloc has handed out, and tensors that are alive."""
    gc.collect()
    tensors = sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)
    return _mallinfo(), tensors


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def _mallinfo() -> int:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):  # glibc before 2.33, or no glibc
        return 0
    library.mallinfo2.restype = _Mallinfo
    info = library.mallinfo2()
    return info.uordblks + info.hblkhd


def repeat(subjects: list, cases: int) -> None:
    """The same mixed calls, good and bad."""
    for seed in random.Random(0).sample(range(10**6), cases):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(Case(subjects, seed))
