"""What this machine can do at most, measured by the native probe: the rows of the benchmark are fractions of it.

The probe is a pybind11 module, built once with ninja into torch's extension cache. Without a compiler there are no
ceilings and the benchmark runs without that column.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

KINDS = ("fp32", "bf16", "int8")
EXPONENTIALS = ("exp2", "exp2_bf16")
COPY_BYTES = 256 << 20  # far beyond any last-level cache of the machines we run on
REPEATS = 9


class Ceilings(NamedTuple):
    """Best of a few repeats on ``threads`` threads; 0 where the machine (or the probe) has none."""

    threads: int
    copy: float  # bytes read + written per second
    fp32: float  # operations per second, a multiply-add is two
    bf16: float
    int8: float
    instructions: dict[str, str]
    problem: str = ""  # why there are none
    exp2: float = 0.0  # softmax's 2^(x - c) per second, as accurate as float32 asks for, and
    exp2_bf16: float = 0.0  # as bfloat16 does; 0 in files of before it was measured

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second that a kernel for ``dtype`` may hope for (float16 computes in float32 on CPU)."""
        return self.bf16 if dtype == torch.bfloat16 and self.bf16 else self.fp32

    def floor(self, flops: float, bytes_moved: float, dtype: torch.dtype) -> float:
        """Least seconds in which the machine could do this much, whichever of the two limits binds. 0: unknown."""
        if not (self.peak(dtype) and self.copy):
            return 0.0
        return max(flops / self.peak(dtype), bytes_moved / self.copy)

    def __str__(self) -> str:
        if self.problem:
            return f"no ceilings: {self.problem}"
        peaks = ", ".join(
            f"{kind} {getattr(self, kind) / 1e9:.0f} G{'' if kind == 'int8' else 'FL'}OP/s ({self.instructions[kind]})"
            if self.instructions[kind]
            else f"{kind}: no instruction"
            for kind in KINDS
        )
        return f"ceilings of {self.threads} threads: copy {self.copy / 1e9:.1f} GB/s, {peaks}"


@functools.cache
def probe():
    """The native module. First use on a machine compiles it (some seconds)."""
    from torch.utils import cpp_extension

    # cpp_extension looks for ninja on PATH; a virtual environment that is not activated has it beside python.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    return cpp_extension.load(
        name="effattn_bench_probe",
        sources=[str(Path(__file__).with_name("probe.cpp"))],
        extra_cflags=["-O2", "-pthread"],
        extra_ldflags=["-pthread"],
        with_cuda=False,
    )


@functools.cache
def measure(threads: int) -> Ceilings:
    """The ceilings on ``threads`` threads; measured once per process, in about two seconds once the probe is built."""
    return _measure(threads)


def better(first: Ceilings) -> Ceilings:
    """Measure again and keep the higher of each: what disturbed the machine lowered a ceiling, nothing raises one."""
    if first.problem:
        return first
    again = _measure(first.threads)
    return first._replace(
        **{name: max(getattr(first, name), getattr(again, name)) for name in ("copy", *KINDS, *EXPONENTIALS)}
    )


def none(threads: int, reason: str) -> Ceilings:
    return Ceilings(threads, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(KINDS, ""), reason)


def _measure(threads: int) -> Ceilings:
    try:
        native = probe()
    except Exception as error:  # noqa: BLE001 - whatever a missing compiler, ninja or header makes torch raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return none(threads, f"the native probe does not build: {reason}")
    source = numpy.ones(COPY_BYTES, dtype=numpy.uint8)
    copy = native.copy_bandwidth(numpy.zeros_like(source), source, threads, REPEATS).max()
    instructions = {kind: native.instruction(kind) for kind in KINDS}
    peaks = {k: float(native.peak(k, threads, REPEATS).max()) if instructions[k] else 0.0 for k in KINDS}
    peaks |= {k: float(native.peak(k, threads, REPEATS).max()) if native.instruction(k) else 0.0 for k in EXPONENTIALS}
    return Ceilings(threads, float(copy), **peaks, instructions=instructions)


if __name__ == "__main__":
    print(measure(min(2, os.cpu_count() or 1)))
