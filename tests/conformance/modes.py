"""Dispatch modes that watch what an operator does underneath, and the state of the process that tests set or ask for."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from effattn import _native


class RecordedCalls(TorchDispatchMode):
    """Collects every call of an effattn torch op, forward or backward, as (op, args). A plan launches nothing."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("effattn") and not func._opname.endswith(("_plan", "_isa")):
            detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            self.calls.append((func, detached))
        return func(*args, **(kwargs or {}))


class GuardedAllocations(TorchDispatchMode):
    """Every allocation is the middle of a larger one filled with NaN; ``assert_intact`` finds writes beside it."""

    GUARD = 256
    ALLOCATORS: ClassVar = {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }

    def __init__(self):
        super().__init__()
        self._wide: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in self.ALLOCATORS or not result.is_floating_point():
            return result
        size = result.untyped_storage().nbytes() // result.element_size()
        wide = torch.full((size + 2 * self.GUARD,), float("nan"), dtype=result.dtype, device=result.device)
        self._wide.append(wide)
        return wide.as_strided(result.shape, result.stride(), self.GUARD)

    def assert_intact(self) -> None:
        assert self._wide, "the kernel allocated nothing"
        for wide in self._wide:
            assert wide[: self.GUARD].isnan().all(), "written before the start of an allocation"
            assert wide[-self.GUARD :].isnan().all(), "written past the end of an allocation"


def launch(op: torch._ops.OpOverload, args: tuple, device: str):
    """Run the op's kernel itself, below autograd and below dispatch modes, so that a mode sees what it allocates."""
    key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
    return op.redispatch(torch._C.DispatchKeySet(key), *args)


@contextlib.contextmanager
def fresh_compiler():
    """Within, torch.compile knows nothing of earlier calls, and its counters are at zero."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        yield
    torch._dynamo.reset()


def skip_level_of_other_tests(level: str) -> None:
    """Skip what other tests of this run do at that level of instruction sets; on Intel bf16 pairs run by name only."""
    pairs_by_name = level == "avx512_bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    if level == _native.isa() and not pairs_by_name:
        pytest.skip("the level of every other test in this run")
