"""Which backend serves a call, and why: one table, one predicate per backend.

The same predicates choose the backend, word the error of an explicit choice, feed the log, ``explain()``, the support
table in the documentation and the conformance tests.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import _native

logger = logging.getLogger("effattn")

BACKENDS = ("cuda", "triton", "cpu", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
OLDEST_GPU = 8  # compute capability that the CUDA kernels are compiled for


class Problem(NamedTuple):
    """What a predicate may look at: the features of a call that decide who can serve it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    dropout_p: float = 0.0
    detail: str = ""  # a feature of this call that no kernel serves, in words
    length: int = -1  # queries, -1 unknown (under torch.compile, where a comparison would make the graph recompile)
    work: int = -1  # multiply-adds of the score matrix, likewise
    chunk_size: int = 0  # tokens per chunk that the call asks for, 0: the backend's choice
    method: str = "auto"  # of the exact methods of an operator, the one that the call asks for
    beyond_cuda: str = ""  # a feature of this call that the operator's CUDA kernels do not serve, in words


class Verdict(NamedTuple):
    backend: str
    ok: bool
    reason: str


Predicate = Callable[[Problem], tuple[bool, str]]


class Backend(NamedTuple):
    name: str
    predicate: Predicate  # can it serve the call
    worthwhile: Predicate | None = None  # and would `auto` want it to

    def verdict(self, problem: Problem, auto: bool) -> Verdict:
        ok, reason = self.predicate(problem)
        if ok and auto and self.worthwhile is not None:
            ok, reason = self.worthwhile(problem)
        return Verdict(self.name, ok, reason)


_table: dict[str, tuple[Backend, ...]] = {}
_logged: set[tuple[str, str]] = set()


class _Explaining(threading.local):
    active = False


_explaining = _Explaining()


class _Explained(Exception):
    """Carries the verdicts out of a call that `explain` stopped before its launch."""

    def __init__(self, op: str, requested: str, verdicts: list[Verdict], chosen: str | None, notes: Sequence[str]):
        self.op, self.requested, self.verdicts, self.chosen, self.notes = op, requested, verdicts, chosen, notes


def register(op: str, backends: Sequence[Backend]) -> None:
    """Enter ``op`` in the table; ``auto`` tries its backends in the order given."""
    _table[op] = tuple(backends)


def operators() -> tuple[str, ...]:
    """Names of every registered public operator."""
    return tuple(_table)


def verdicts(op: str, problem: Problem, auto: bool = True) -> list[Verdict]:
    """What every backend of ``op`` says of ``problem``, in the order that ``auto`` tries them."""
    return [backend.verdict(problem, auto) for backend in _table[op]]


def choose(op: str, requested: str, problem: Problem, notes: Callable[[str], Sequence[str]] | None = None) -> str:
    """Name of the backend that serves ``problem``.

    ``notes``: what ``explain`` adds about the chosen backend, a line each.

    Raises:
        TypeError, ValueError: ``requested`` is no backend's name.
        NotImplementedError: ``requested`` is one backend and cannot serve this call. It is never replaced by another.
    """
    if not isinstance(requested, str):
        raise TypeError(f"{op}: backend must be a str, got {requested!r}")
    if requested == "auto" and "EFFATTN_BACKEND" in os.environ:
        requested = os.environ["EFFATTN_BACKEND"] or "auto"
    if _explaining.active:
        raise _explain_choice(op, requested, problem, notes)
    if requested == "auto":
        for backend in _table[op]:
            if backend.predicate(problem)[0] and (backend.worthwhile is None or backend.worthwhile(problem)[0]):
                if backend.name == "reference" and not torch.compiler.is_compiling():
                    _log_fallback(op, problem)
                return backend.name
    else:
        for backend in _table[op]:
            if backend.name == requested and backend.predicate(problem)[0]:
                return requested
        _refuse(op, requested, problem)
    raise AssertionError(f"{op}: no backend, not even the reference, took {problem}")


def _refuse(op: str, requested: str, problem: Problem) -> None:
    found = verdicts(op, problem, auto=False)
    names = dict.fromkeys(("auto", *BACKENDS, *(v.backend for v in found)))
    if requested not in names:
        raise ValueError(f"{op}: backend must be one of {', '.join(names)}, got {requested!r}")
    reasons = {v.backend: v.reason for v in found}
    why = reasons.get(requested, f"effattn has no {requested} kernel for this operator")
    others = "; ".join(f"{v.backend}: {'ok' if v.ok else v.reason}" for v in found if v.backend != requested)
    raise NotImplementedError(f"{op}: backend={requested!r} cannot serve this call: {why}. Others: {others}")


def _log_fallback(op: str, problem: Problem) -> None:
    reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts(op, problem) if not v.ok)
    if (op, reasons) not in _logged:
        _logged.add((op, reasons))
        level = logging.INFO if _native.loaded else logging.WARNING  # a broken installation should be seen
        logger.log(level, "%s runs on the reference (plain PyTorch): %s", op, reasons)


def _explain_choice(op: str, requested: str, problem: Problem, notes) -> _Explained:
    found = verdicts(op, problem, auto=requested == "auto")
    chosen = next((v.backend for v in found if v.ok and requested in ("auto", v.backend)), None)
    further = list(notes(chosen)) if notes is not None and chosen is not None else []
    if chosen == "triton":
        from . import _tuning

        further.append(_tuning.tiles())
    return _Explained(op, requested, found, chosen, further)


class Explanation:
    """The outcome of :func:`explain`: ``backend`` is the one taken (None if the call would raise)."""

    def __init__(self, explained: _Explained):
        self.op = explained.op
        self.requested = explained.requested
        self.backend = explained.chosen
        self.verdicts = tuple(explained.verdicts)
        self.notes = tuple(explained.notes)

    def __str__(self) -> str:
        lines = [f"{self.op} (backend={self.requested!r})"]
        for verdict in self.verdicts:
            mark = "->" if verdict.backend == self.backend else "  "
            lines.append(f" {mark} {verdict.backend:<9} {'ok' if verdict.ok else 'no'}   {verdict.reason}")
        lines += [f"    {note}" for note in self.notes]
        if self.backend is None:
            lines.append(f"    the call would raise NotImplementedError: backend={self.requested!r} cannot serve it")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Explanation(op={self.op!r}, backend={self.backend!r})"


def explain(fn: Callable, *args, **kwargs) -> Explanation:
    """Print every backend of the call ``fn(*args, **kwargs)`` with why it was taken or turned down.

    Arguments are checked as in a real call; nothing is launched.

    Args:
        fn: a public function of effattn, ``torch.nn.functional.scaled_dot_product_attention`` with a structured mask,
            or a module or function that makes such a call (its first one is explained).
        *args, **kwargs: what the call would be given.

    Returns:
        Explanation: also carries ``backend``, ``verdicts`` and ``notes``, lines about the choice inside the backend.

    Raises:
        ValueError: the call reaches no operator of effattn, or its arguments are bad.
        TypeError: the arguments are bad.

    Example:
        >>> import torch, effattn
        >>> q = torch.randn(1, 2, 16, 8)
        >>> mask = effattn.GaussianMixtureMask(torch.ones(3, 2), torch.ones(3, 2), grid=(4, 4))
        >>> why = effattn.explain(torch.nn.functional.scaled_dot_product_attention, q, q, q, attn_mask=mask,
        ...                       )  # doctest: +ELLIPSIS
        gaussian_mixture_attention (backend='auto')
        ...
        >>> why.backend in ("cpu", "reference")
        True
    """
    if not callable(fn):
        raise TypeError(f"explain: fn must be callable, got {type(fn).__name__}")
    _explaining.active = True
    try:
        fn(*args, **kwargs)
    except _Explained as explained:
        explanation = Explanation(explained)
    else:
        raise ValueError(f"explain: {getattr(fn, '__name__', fn)!r} made no call of an effattn operator")
    finally:
        _explaining.active = False
    print(explanation)
    return explanation


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernel_limits(problem: Problem) -> tuple[bool, str]:
    if problem.detail:
        return False, problem.detail
    if problem.dtype not in KERNEL_DTYPES:
        return False, f"no kernel for {problem.dtype}"
    if problem.head_dim > MAX_HEAD_DIM:
        return False, f"head_dim {problem.head_dim} is above {MAX_HEAD_DIM}"
    if problem.dropout_p > 0.0:
        return False, "no kernel for attention dropout"
    return True, "fused kernel"


def cpu_kernel(problem: Problem) -> tuple[bool, str]:
    """C++ kernels of ``effattn/_cpu.so``."""
    if problem.device != "cpu":
        return False, f"tensors are on {problem.device}"
    if not _native.loaded:
        return False, f"{_native.problem} (python -m effattn doctor)"
    return _kernel_limits(problem)


def _gpu_generation() -> int:
    return torch.cuda.get_device_properties(0).major


def cuda_kernel(problem: Problem) -> tuple[bool, str]:
    """CUDA C++ kernels of ``effattn/_cuda.so``."""
    if problem.device != _native.cuda_device:
        return False, f"tensors are on {problem.device}"
    if not _native.cuda_loaded:
        return False, f"{_native.cuda_problem} (python -m effattn doctor)"
    if problem.device == "cuda" and _gpu_generation() < OLDEST_GPU:
        return False, f"the GPU's compute capability is below {OLDEST_GPU}.0"
    return _kernel_limits(problem)


def triton_kernel(problem: Problem) -> tuple[bool, str]:
    """Triton kernels on an NVIDIA or AMD GPU, or anywhere under Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device != "cuda" and not (interpreted and problem.device == "cpu"):
        return False, f"tensors are on {problem.device}"
    if not has_triton():
        return False, "triton is not installed (pip install triton)"
    return _kernel_limits(problem)


def always(problem: Problem) -> tuple[bool, str]:
    return True, "plain PyTorch"


REFERENCE = Backend("reference", always)
"""Every operator's last resort: the specification itself."""
