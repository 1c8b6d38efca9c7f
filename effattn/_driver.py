"""Whether the NVIDIA driver and the GPUs of this machine can run the compiled CUDA kernels; asks neither torch nor the GPU.

A library built with CUDA 13 needs a driver of the 580 branch or newer, one built with CUDA 12 a driver from 525 on
(https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html). Machine code of one compute capability
runs on later minor ones; PTX runs on any later one, but only under a driver as new as the toolkit that wrote it.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # toolkit's generation -> branch of the driver
OLDEST_CAPABILITY = (8, 0)
CUDA_12_WHEEL = "take what is built with CUDA 12: effattn's wheel +cu12 (made by `CUDA=12 make wheel`) and such a torch"

BUILD = Path(__file__).with_name("_build.json")
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


class Driver(NamedTuple):
    version: str  # of the kernel module, "" where only the library is seen
    cuda: tuple[int, int] | None  # the newest CUDA that its library serves; a forward-compatibility package raises it

    @property
    def generation(self) -> int:
        """The newest generation of toolkits whose programs run."""
        if self.cuda is not None:
            return self.cuda[0]
        branch = int(self.version.split(".")[0])
        return max((generation for generation, oldest in OLDEST_DRIVER.items() if oldest <= branch), default=0)


class Build(NamedTuple):
    toolkit: tuple[int, int]
    architectures: tuple[str, ...]  # sm_80, sm_90a, ..., compute_80 for PTX; empty: unknown


def driver() -> Driver | None:
    """The NVIDIA driver here, None where there is none."""
    version, cuda = _kernel_module() or _asked_of_nvidia_smi(), _asked_of_the_library()
    return Driver(version, cuda) if version or cuda else None


def _kernel_module() -> str:
    try:
        first = _KERNEL_MODULE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", first)
    return found[1] if found else ""


def _asked_of_nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.match(r"\d{3,}[.\d]+", said)
    return found[0] if found else ""


def _asked_of_the_library() -> tuple[int, int] | None:
    """cuDriverGetVersion, which needs no GPU and starts nothing."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else (version.value // 1000, version.value % 1000 // 10)


def build(path: Path = BUILD) -> Build | None:
    """What the CUDA library was built with, None where the build left no account."""
    try:
        cuda = json.loads(path.read_text())["cuda"]
        major, minor = re.search(r"(\d+)\.(\d+)", cuda["compiler"]).groups()  # nvcc 13.0.88
        names = [name for entry in cuda["architectures"] for name in _names(entry)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Build((int(major), int(minor)), tuple(names))


def _names(entry: str) -> list[str]:
    """80+PTX -> sm_80, compute_80."""
    number, _, ptx = entry.partition("+")
    return [f"sm_{number}", f"compute_{number}"] if ptx else [f"sm_{number}"]


def driver_problem(driver: Driver | None, toolkit: tuple[int, int], what: str) -> str:
    """Why the driver cannot run ``what``, which was built with ``toolkit``; nothing if it can."""
    needed = OLDEST_DRIVER.get(toolkit[0])
    needs = f"{what} is built with CUDA {_dotted(toolkit)}" + (f" and needs driver {needed} or newer" if needed else "")
    if driver is None:
        return (
            f"there is no NVIDIA driver on this machine (no /proc/driver/nvidia, nvidia-smi or libcuda.so.1); {needs}"
        )
    if driver.generation < toolkit[0]:
        serves = f" serves CUDA {_dotted(driver.cuda)}" if driver.cuda else " is older"
        return f"driver {driver.version or '(version unknown)'}{serves}; {needs}"
    if driver.cuda is None:
        return f"driver {driver.version} is loaded, but its library libcuda.so.1 is not found here; {needs}"
    return ""


def driver_remedy(driver: Driver, toolkit: tuple[int, int]) -> str:
    """What to do about :func:`driver_problem`."""
    if driver.generation >= toolkit[0]:
        return "a container must be given the driver: docker run --gpus all, apptainer exec --nv"
    needed = OLDEST_DRIVER.get(toolkit[0], "of that generation")
    remedy = f"install driver {needed} or newer on the node (for data-centre GPUs NVIDIA's cuda-compat package may do)"
    return f"{remedy}, or {CUDA_12_WHEEL}" if (toolkit[0], driver.generation) == (13, 12) else remedy


def gpu_problem(capability: tuple[int, int], build: Build, driver: Driver | None) -> str:
    """Why the library's kernels do not run on a GPU of this compute capability; nothing if they do."""
    if capability < OLDEST_CAPABILITY:
        return f"its compute capability {_dotted(capability)} is below {_dotted(OLDEST_CAPABILITY)}"
    if not build.architectures or any(_runs(name, capability) for name in build.architectures):
        return ""
    has = f"the library has {', '.join(build.architectures)}"
    if not any(_compiles(name, capability) for name in build.architectures):
        return f"there is neither machine code nor PTX for compute capability {_dotted(capability)}; {has}"
    if driver is not None and driver.cuda is not None and driver.cuda < build.toolkit:
        return (
            f"there is only PTX for compute capability {_dotted(capability)}, written by CUDA {_dotted(build.toolkit)}, "
            f"which a driver of CUDA {_dotted(driver.cuda)} does not compile; {has}"
        )
    return ""


def gpu_problems(capabilities: Collection[tuple[str, tuple[int, int]]], build, driver) -> Iterator[tuple[str, str]]:
    """(problem, remedy) once for each kind of GPU, of ``capabilities``: its name and compute capability."""
    for name, capability in dict.fromkeys(capabilities):
        why = gpu_problem(capability, build, driver)
        if why and capability < OLDEST_CAPABILITY:
            yield f"{name} cannot run the CUDA kernels: {why}", "nothing to install: such a GPU is served by Triton"
        elif why:
            remedy = "a wheel of a newer effattn, or on the node EFFATTN_CUDA=1 with an nvcc that knows the GPU"
            yield f"{name} cannot run the CUDA kernels: {why}", remedy


def _digits(name: str) -> tuple[tuple[int, int], str]:
    """sm_90a -> (9, 0), "a"; sm_120 -> (12, 0), ""."""
    number, suffix = re.fullmatch(r"(?:sm|compute)_(\d+)([af]?)", name).groups()
    return (int(number[:-1]), int(number[-1])), suffix


def _runs(name: str, capability: tuple[int, int]) -> bool:
    if not name.startswith("sm_"):
        return False
    built, suffix = _digits(name)
    return built == capability if suffix == "a" else built[0] == capability[0] and built[1] <= capability[1]


def _compiles(name: str, capability: tuple[int, int]) -> bool:
    if not name.startswith("compute_"):
        return False
    built, suffix = _digits(name)
    return built <= capability if not suffix else built == capability


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
