"""Cross-compiles the CPU library for aarch64 and runs its kernels in qemu: python packaging/aarch64.py

Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: apt-get install g++-aarch64-linux-gnu qemu-user). The library is
linked against the torch for aarch64 that pip downloads. The wheel is left in dist/; its kernels' own object files are
then linked with tests/sanitizer/kernels.cpp, which compares every family with plain loops in double, and run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import elf

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "aarch64"
TORCH = "2.10.0"  # the oldest that the package takes
COMPILER = "aarch64-linux-gnu-g++"
SYSTEM = "/usr/aarch64-linux-gnu"
SYSTEM_LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-aarch64.so.1")


def run(*command, **options) -> subprocess.CompletedProcess:
    """``command``, whose failure ends the program."""
    print("+", *command, flush=True)
    return subprocess.run([str(word) for word in command], check=True, **options)


def torch_of_aarch64() -> Path:
    """The folder that holds the ``torch`` package for aarch64; its headers are the same, its libraries are not."""
    folder = BUILD / f"torch-{TORCH}"
    if not (folder / "torch" / "lib" / "libtorch_cpu.so").exists():
        platform = ("--platform", "manylinux_2_28_aarch64", "--only-binary", ":all:", "--no-deps")
        run(sys.executable, "-m", "pip", "install", "--quiet", *platform, "--target", folder, f"torch=={TORCH}")
    return folder


def copy_of_the_sources() -> Path:
    """The tracked files in a folder of their own: objects for two machines must not share one."""
    folder = BUILD / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        to = folder / name
        if name.startswith(("docs/", "tests/")) or not (ROOT / name).is_file() or (ROOT / name).is_symlink():
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to)  # with its time, so that ninja compiles what changed
    return folder


def built_wheel(source: Path, torch: Path) -> Path:
    """The wheel for aarch64, in dist/."""
    environment = {
        **os.environ,
        "CXX": f"ccache {COMPILER}" if shutil.which("ccache") else COMPILER,
        "EFFATTN_CUDA": "0",
        "PYTHONPATH": str(torch),
    }
    command = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", BUILD / "wheel", ".")
    shutil.rmtree(BUILD / "wheel", ignore_errors=True)
    run(sys.executable, *command, cwd=source, env=environment)
    (wheel,) = (BUILD / "wheel").glob("*.whl")
    if not wheel.name.endswith("-py3-none-linux_aarch64.whl"):
        sys.exit(f"the wheel is called {wheel.name}")
    (ROOT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy2(wheel, ROOT / "dist"))


def check_library(wheel: Path, torch: Path) -> None:
    """It is for aarch64, and torch for aarch64 or the system has every symbol that it wants."""
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("effattn/_cpu.so", BUILD))
    header = run("aarch64-linux-gnu-readelf", "--file-header", library, capture_output=True, text=True).stdout
    if not re.search(r"Machine:\s+AArch64", header):
        sys.exit(f"{library} is not for aarch64:\n{header}")
    wanted = set(elf.undefined(library))
    ours = {symbol for name in ("libtorch_cpu.so", "libc10.so") for symbol in elf.exported(torch / "torch/lib" / name)}
    system = {symbol for name in SYSTEM_LIBRARIES for symbol in elf.exported(Path(SYSTEM, "lib", name))}
    if lacking := sorted(wanted - ours - system):
        sys.exit(f"nothing defines {', '.join(lacking)}")
    print(f"{library.name}: AArch64; {len(wanted - system)} symbols of torch {TORCH}, all there")


def run_kernels(source: Path) -> None:
    """The object files of the wheel under the program that compares them with plain loops."""
    objects = sorted((source / "build" / "effattn._cpu").glob("baseline.*.o"))
    if len(objects) != len(list((ROOT / "csrc" / "cpu").glob("*.cpp"))) - 1:  # dispatch.cpp has no level
        sys.exit(f"{len(objects)} objects of kernels: remove {BUILD} and try again")
    program, harness = BUILD / "kernels", ROOT / "tests" / "sanitizer" / "kernels.cpp"
    flags = ("-std=c++20", "-O2", "-w", "-DEFFATTN_ISA=baseline", f"-I{ROOT / 'csrc' / 'cpu'}", "-pthread")
    run(COMPILER, *flags, harness, *objects, "-o", program)
    run("qemu-aarch64", "-L", SYSTEM, program)


def main() -> int:
    for program in (COMPILER, "qemu-aarch64"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing. To change that: apt-get install g++-aarch64-linux-gnu qemu-user")
    torch, source = torch_of_aarch64(), copy_of_the_sources()
    wheel = built_wheel(source, torch)
    check_library(wheel, torch)
    run_kernels(source)
    print(f"{wheel.relative_to(ROOT)} is built, and its kernels compute in qemu what plain loops do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
