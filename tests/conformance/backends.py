"""On which backend and device an operator is tested, and tests over cases and backends."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from effattn import _library, _native, _registry
from effattn._registry import Problem

from .cases import CASES, Case, Shape

REQUIRED = tuple(filter(None, os.environ.get("EFFATTN_REQUIRE_BACKENDS", "").split(",")))
"""Backends whose absence is a failure and no reason to skip (set in continuous integration)."""


def device_of(backend: str) -> str:
    """Where a backend is tested: kernels of the GPU on one if it is there, else interpreted or emulated."""
    if backend == "cuda":
        return _native.cuda_device
    return "cuda" if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def is_slow(backend: str) -> bool:
    """Triton's interpreter takes its time over every tile, the CUDA emulator over every thread."""
    return backend in ("cuda", "triton") and device_of(backend) == "cpu"


def namespace_of(backend: str) -> str:
    """Where torch finds the backend's ops."""
    return _library.NAMESPACES[backend]


def small(backend: str) -> Shape:
    """The shape for tests that are not about shapes."""
    return Shape(batch=2, heads=1, grid=(2, 4)) if is_slow(backend) else Shape()


SIXTEEN_BITS_ONLY = {
    ("cuda", op): "test_cuda_windows.py"
    for op in ("cross_shaped_window_attention", "stripe_attention", "window_attention")
}
"""Backends of an operator that take no float32, in which most of the suite runs: the file that holds them to the rule."""


def backends_of(op: str) -> tuple[str, ...]:
    return tuple(b.name for b in _registry._table[op] if b.name != "torch" and (b.name, op) not in SIXTEEN_BITS_ONLY)


def require(op: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip, with the registry's own reason, where ``backend`` cannot serve a plain call of ``op`` on this machine."""
    problem = Problem(device_of(backend), dtype, 16)
    ok, reason = next(b.predicate(problem) for b in _registry._table[op] if b.name == backend)
    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        ok, reason = False, "no CUDA GPU"
    if not ok:
        (pytest.fail if backend in REQUIRED else pytest.skip)(f"{backend}: {reason}")


def all_cases() -> list[Case]:
    return [case for op in _registry.operators() for case in CASES.get(op, ())]


def case_and_backend(
    *, without: tuple[str, ...] = (), every_variant: bool = False, beside_matrix: bool = False
) -> pytest.MarkDecorator:
    """Parametrise over every case of every registered operator x every backend in its row of the registry.

    Slow backends take the first variant of each operator unless ``every_variant``. ``beside_matrix``: not the first variant
    on the cpu backend, which test_torch_features.py holds to the same check.
    """
    return pytest.mark.parametrize(("case", "backend"), list(_pairs(without, every_variant, beside_matrix)))


def case_backend_and(
    wanted: Callable[..., bool], *, every_variant: bool = False, **axes: dict[str, object]
) -> pytest.MarkDecorator:
    """Parametrise over every case x every backend but the reference x the ``axes``, given as {name in test ids: value},
    where ``wanted(case, backend, **values)``. To leave out is quicker than to collect and skip.
    """
    found = []
    for chosen in itertools.product(*(axis.items() for axis in axes.values())):
        for pair in _pairs(("reference",), every_variant, False):
            if wanted(*pair.values, **{axis: value for axis, (_, value) in zip(axes, chosen)}):
                values, names = [value for _, value in chosen], [name for name, _ in chosen]
                found.append(pytest.param(*pair.values, *values, id="-".join((*names, pair.id)), marks=pair.marks))
    return pytest.mark.parametrize(("case", "backend", *axes), found)


def _pairs(without: tuple[str, ...], every_variant: bool, beside_matrix: bool) -> Iterator:
    for case in all_cases():
        for backend in backends_of(case.op):
            if backend in without or (is_slow(backend) and case != CASES[case.op][0] and not every_variant):
                continue
            if is_slow(backend) and case.same_kernels:
                continue
            if beside_matrix and backend == "cpu" and case == CASES[case.op][0]:
                continue
            marks = [pytest.mark.gpu] if device_of(backend) == "cuda" else []
            yield pytest.param(case, backend, id=f"{case}-{backend}", marks=marks)
