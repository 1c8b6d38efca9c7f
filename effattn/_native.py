"""Loads the compiled libraries that sit beside this file; never raises, never prints, never touches a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

CPU_LIBRARY = Path(__file__).with_name("_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")

loaded = False
problem = ""
cuda_loaded = False
cuda_problem = ""
cuda_device = "cuda"
"""Where the CUDA kernels run: a test's emulator runs them on "cpu"."""


def _load_library(path: Path) -> str:
    """What keeps ``path`` from being loaded, or nothing once it is."""
    if not path.exists():
        return f"the compiled extension effattn/{path.name} is missing"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled extension effattn/{path.name} does not load: {str(error).strip().splitlines()[0]}"
    return ""


def _load() -> None:
    global loaded, problem
    problem = _load_library(CPU_LIBRARY)
    loaded = not problem


def _load_cuda() -> None:
    """Registers the kernels with torch; the CUDA runtime inside starts at the first launch."""
    global cuda_loaded, cuda_problem
    cuda_problem = _load_library(CUDA_LIBRARY) if torch.version.cuda else "this torch is built without CUDA"
    cuda_loaded = not cuda_problem


def isa() -> str:
    """Instruction-set level whose kernels the loaded library chose for this CPU."""
    return torch.ops.effattn.cpu_isa()


_load()
_load_cuda()
