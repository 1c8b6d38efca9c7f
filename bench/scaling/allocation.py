"""Counts the bytes that a call allocates, from the tensors themselves: exact, without memory or time at any size.

The call runs on fake tensors, which have shapes and storages but no data, and a dispatch mode watches storages come and go.
What a CPU kernel takes beside tensors (packed operands of each thread, given back or at most 16 MB a buffer) is not among
them; ``peak_extra`` of the benchmark, which asks the operating system, sees it. With ``backend="triton"`` the Triton launchers
run too, up to the launch, so that their work space is counted.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effattn import _library
from effattn.ops import toeplitz_methods

GPU = "sm_90"  # whose tiles the launchers take
MAPPED, KEPT = 32 << 20, 64 << 20
"""glibc maps blocks from 32 MB (its largest M_MMAP_THRESHOLD) where its heap has no room, and of what is freed at the end of
the heap it keeps less than 64 MB (M_TRIM_THRESHOLD): in a call that allocates more, every page of such blocks faults anew."""


class Allocations(TorchDispatchMode):
    """Bytes of all storages that were made in it and are alive, the most that were at once, those of all that were made
    and are large enough to be mapped, and what made or wrote any."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.mapped = self.operations = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = _library._ops.get(func._schema.name.partition("::")[2]) if func.namespace == "effattn_triton" else None
        if op is None:
            results = func(*args, **(kwargs or {}))
        else:
            with self:
                results = _library._triton_launcher(op._family, op.name)(*args)
        tensors = [tensor for tensor in tree_leaves(results) if isinstance(tensor, torch.Tensor)]
        new = [self._saw(tensor.untyped_storage()) for tensor in tensors]
        self.operations += any(new) or func._schema.is_mutable
        return results

    def _saw(self, storage) -> bool:
        identity = storage._cdata
        if identity in self._sizes:
            return False
        self._sizes[identity] = storage.nbytes()
        weakref.finalize(storage, self._gone, identity)
        self.live += self._sizes[identity]
        self.mapped += storage.nbytes() if storage.nbytes() >= MAPPED else 0
        self.peak = max(self.peak, self.live)
        return True

    def _gone(self, identity: int) -> None:
        self.live -= self._sizes.pop(identity)


class Bytes(NamedTuple):
    """``held``: inputs, parameters and the gradient of the output. ``extra``: the call's own peak, results included.

    ``fresh``: of all that it makes, the bytes in blocks from ``MAPPED``, if ``extra`` is ``KEPT`` or more.
    ``operations``: of PyTorch in the call, views left out."""

    held: int
    extra: int
    fresh: int = 0
    operations: int = 0

    @property
    def total(self) -> int:
        return self.held + self.extra


def count(make: Callable[[], tuple[object, Callable[[], object]]], *, backend: str = "cpu") -> Bytes:
    """Of ``make``, which returns inputs and a call of them."""
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(_launching_nothing())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # A plan that has no data cannot be looked at; the kernels take it as it is, as under torch.compile.
        stack.enter_context(mock.patch.object(toeplitz_methods, "known", return_value=None))
        allocations = stack.enter_context(Allocations())
        inputs, call = make()
        held = allocations.peak = allocations.live
        allocations.mapped = allocations.operations = 0
        call()
        del inputs
        extra = allocations.peak - held
        return Bytes(held, extra, allocations.mapped if extra >= KEPT else 0, allocations.operations)


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    """Every call goes to the Triton launchers, on tensors of any device, and they start no kernel."""
    from effattn.triton_kernels import configurations

    environment = {"EFFATTN_BACKEND": "triton", "TRITON_INTERPRET": "1"}  # the latter: "triton" serves CPU tensors too
    with (
        mock.patch.object(configurations, "launch", _start_nothing),  # a Mock would keep tensors alive
        mock.patch.object(configurations, "architecture", return_value=GPU),
        mock.patch.dict(os.environ, environment),
    ):
        yield


def _start_nothing(kernel, programs, device, config, *arguments, fuse=True, **constants) -> None:
    """In place of ``configurations.launch``."""
