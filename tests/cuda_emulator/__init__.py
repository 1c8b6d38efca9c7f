"""Builds the CUDA kernels for the CPU, with tests/cuda_emulator in place of CUDA, and loads them.

`load()` registers the operators of csrc/bindings/cuda under `torch.ops.effattn_emulator`, dispatch key CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulator"
KERNELS = HERE / "kernels"

# -g1: the lines of faults. initial-exec: the current thread is looked up in every access of shared memory.
FLAGS = (
    "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ftls-model=initial-exec -Wall -Wextra -Wno-unknown-pragmas"
    " -DEFFATTN_CUDA_EMULATED -DEFFATTN_CUDA_NAMESPACE=effattn_emulator -DEFFATTN_CUDA_KEY=CPU"
)


def _compiler():
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), "g++")


def _ninja():
    """That of this Python first: another version takes every command for changed, and some tests have other PATHs."""
    return shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja") or "ninja"


def _escaped(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file():
    """Two libraries: the kernels of csrc with their bindings, and the kernels on which the emulator is tested."""
    torch_directory = Path(torch.__file__).parent
    emulator = [HERE / "emulator.cpp", HERE / "shared_memory.cpp", HERE / "guard_pages.cpp"]
    libraries = {
        "kernels.so": [*emulator, *sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("bindings/cuda/*.cpp"))],
        "self_test.so": [*emulator, *sorted(KERNELS.glob("*.cu"))],
    }
    includes = " ".join(f"-I{shlex.quote(str(path))}" for path in (HERE, CSRC / "cuda"))
    lines = [
        f"cxx = {_compiler()}",
        f"flags = {FLAGS} {includes} -isystem {shlex.quote(str(torch_directory / 'include'))}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out -pthread -L{shlex.quote(str(torch_directory / 'lib'))}"
        " -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10",
    ]
    objects = {}
    for source in dict.fromkeys(source for sources in libraries.values() for source in sources):
        objects[source] = "_".join(source.relative_to(ROOT).parts) + ".o"
        lines.append(f"build {objects[source]}: compile {_escaped(source)}")
        if CSRC in source.parents:  # the stable ABI, as in the real build
            lines.append("  extra = -DTORCH_TARGET_VERSION=0x020a000000000000")
    for library, sources in libraries.items():
        lines.append(f"build {library}: link {' '.join(objects[source] for source in sources)}")
    return "\n".join([*lines, ""])


@functools.cache
def _build(library):
    """The library's path, after ninja has made it; one process at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        description = _ninja_file()
        file = BUILD / "build.ninja"
        if not file.exists() or file.read_text() != description:
            file.write_text(description)
        made = subprocess.run(
            [_ninja(), "-C", str(BUILD), library],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if made.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile for the emulator:\n{made.stdout}")
    return BUILD / library


@functools.cache
def load() -> Path:
    """Build what has changed, load the kernels of csrc/cuda as torch.ops.effattn_emulator, and return their library."""
    library = _build("kernels.so")
    torch.ops.load_library(library)
    return library


def self_test_library() -> Path:
    """The library of the kernels in tests/cuda_emulator/kernels."""
    return _build("self_test.so")


@functools.cache
def self_test() -> ctypes.CDLL:
    return ctypes.CDLL(str(self_test_library()))


@contextlib.contextmanager
def guard_pages(library: Path | None = None):
    """Within, every CPU tensor ends at an unmapped page, and holds NaN until it is written.

    A kernel that reads or writes past it raises RuntimeError; a write in front of it, or into the few bytes of padding
    behind it, raises on leaving.
    """
    functions = ctypes.CDLL(str(library or load()))
    functions.effattn_guard_page_damage.restype = ctypes.c_char_p
    functions.effattn_guard_pages(True)
    try:
        yield
    finally:
        functions.effattn_guard_pages(False)
        damage = functions.effattn_guard_page_damage().decode()
    if damage:
        raise RuntimeError(f"CUDA emulator: written {damage.removesuffix('; ')}")


@contextlib.contextmanager
def seed(value: int):
    """Within, threads and blocks run in the order of this seed."""
    before = os.environ.get("EFFATTN_EMULATOR_SEED")
    os.environ["EFFATTN_EMULATOR_SEED"] = str(value)
    try:
        yield
    finally:
        if before is None:
            del os.environ["EFFATTN_EMULATOR_SEED"]
        else:
            os.environ["EFFATTN_EMULATOR_SEED"] = before
