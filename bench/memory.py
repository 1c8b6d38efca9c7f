"""Peak extra memory of one call, as the operating system sees it.

On CPU: free heap pages are given back (malloc_trim), the kernel's peak of this process's resident set is reset
(/proc/self/clear_refs), the call runs once, and what counts is how far the peak rose above what was resident before.
That sees every allocation that was touched, from torch, from C++ and from compiled code alike; the call's own results
are part of it. A contender that does not compile is measured on its first call at a shape, so buffers that it keeps
are counted; a compiling one on its second, or the compiler would be measured. On CUDA: torch's allocator peak.

    python -m effattn.bench.memory FAMILY CASE_INDEX DTYPE DIRECTION CONTENDER    one call in a process of its own
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

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


def in_own_process(family: str, case, dtype: str, direction: str, contender: str, threads: int) -> int | None:
    """The same in a fresh process, so that nothing an earlier case left behind can serve this one."""
    from .cases import families

    index = families()[family].cases.index(case)
    command = [sys.executable, "-m", "effattn.bench.memory", family, str(index), dtype, direction, contender]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _main(family_name: str, index: str, dtype: str, direction: str, contender_name: str, threads: str) -> None:
    from .cases import BACKWARD, families
    from .runner import prepare, warm_up

    torch.set_num_threads(int(threads))
    family = families()[family_name]
    case = family.cases[int(index)]
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
