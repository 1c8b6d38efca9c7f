"""Loads the compiled libraries that sit beside this file; never raises, never prints, never touches CUDA."""

from __future__ import annotations

from pathlib import Path

import torch

CPU_LIBRARY = Path(__file__).with_name("_cpu.so")

loaded = False
problem = ""


def _load() -> None:
    global loaded, problem
    if not CPU_LIBRARY.exists():
        problem = "the compiled extension effattn/_cpu.so is missing"
        return
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        problem = f"the compiled extension effattn/_cpu.so does not load: {str(error).strip().splitlines()[0]}"
    else:
        loaded = True


def isa() -> str:
    """Instruction-set level whose kernels the loaded library chose for this CPU."""
    return torch.ops.effattn.cpu_isa()


_load()
