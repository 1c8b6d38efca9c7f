"""Peak extra memory of one call, as the operating system sees it.

On CPU: free heap pages are given back (malloc_trim), the kernel's peak of this process's resident set is reset
(/proc/self/clear_refs), the call runs once, and what counts is how far the peak rose above what was resident before.
That sees every allocation that was touched, from torch, from C++ and from compiled code alike; the call's own results
are part of it. A contender that does not compile is measured on its first call at a shape, so buffers that it keeps
are counted; a compiling one on its second, or the compiler would be measured. On CUDA: torch's allocator peak.

    python -m effattn.bench.memory FAMILY CASE_INDEX SIDE DTYPE DIRECTION CONTENDER THREADS    one call in a process
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import BACKWARD, Case, families

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024


def peak_extra(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which one ``call`` raised the peak above what was in use before; None where this cannot be told."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or no such right
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def in_own_process(
    family: str, case: Case, side: int, dtype: str, direction: str, contender: str, threads: int
) -> int | None:
    """The same in a fresh process, so that nothing an earlier case left behind can serve this one.

    ``case`` is measured on a grid of ``side`` x ``side`` tokens; as it is where ``side`` is 0.
    """
    arguments = [family, families()[family].cases.index(case), side, dtype, direction, contender, threads]
    command = [sys.executable, "-m", "effattn.bench.memory", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _main(family_name, index, side, dtype, direction, contender_name, threads) -> None:
    from .runner import prepare, warm_up

    torch.set_num_threads(int(threads))
    family = families()[family_name]
    case = family.cases[int(index)]
    side = int(side)
    if side:
        case = dataclasses.replace(case, grid=(side, side), tokens=case.num_prefix_tokens + side * side)
    operator = family.operators[case.operator]
    contender = next(c for c in operator.contenders if c.name == contender_name)
    warm_up("cpu")
    inputs = operator.inputs(case, getattr(torch, dtype), "cpu").leaves(gradients=direction == BACKWARD)
    call = prepare(contender, case, inputs, direction)
    if contender.compiles:
        call()
    print(json.dumps(peak_extra(call)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
