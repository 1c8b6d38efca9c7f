"""Builds the wheel of a release into dist/: compiled, audited, and tagged by the oldest C library that it runs with.

    make wheel               CUDA kernels for every GPU of a release, with the nvcc in CUDA_HOME or on PATH
    CUDA=12 make wheel       the same, and fails if that nvcc is not of CUDA 12; the version becomes 0.1.0+cu12
    CUDA=0 make wheel        no CUDA kernels; 0.1.0+cpu

Run by the Python that has torch and the tools of constraints.txt.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

import build_info
import cuda_toolkit
import elf

ROOT = build_info.ROOT
DIST = ROOT / "dist"
RELEASE_CUDA = "13"  # its wheel has no local version
BYTES = 60_000_000
OLDEST_TORCH = (2, 10)
# A wheel uses its user's torch. Anything else that a library needs and the platform lacks is an error here, not a copy in the wheel.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def settings(cuda):
    """Environment of the build; ``cuda`` is what CUDA was set to."""
    found = dict(os.environ)
    date = build_info.source()["date"]
    if "SOURCE_DATE_EPOCH" not in found:
        if date is None:
            sys.exit("effattn: git does not tell the date of the commit; set SOURCE_DATE_EPOCH to the seconds of it")
        found["SOURCE_DATE_EPOCH"] = str(date)
    found["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), found["PATH"]])
    if cuda == "0":
        return found | {"EFFATTN_CUDA": "0", "EFFATTN_LOCAL_VERSION": "cpu"}
    compiler = cuda_toolkit.nvcc()
    if compiler is None:
        sys.exit("effattn: no nvcc in CUDA_HOME or on PATH; CUDA=0 builds a wheel without CUDA kernels")
    version = cuda_toolkit.version(compiler)
    major = version.split(".")[0]
    if cuda and cuda != major:
        sys.exit(
            f"effattn: CUDA={cuda}, but {compiler} is of CUDA {version}. Set CUDA_HOME to a CUDA {cuda} toolkit "
            "(PyPI's nvidia-cuda-nvcc-cu12 has ptxas and headers, but not nvcc, cicc, cudafe++ and fatbinary)"
        )
    local = "" if major == RELEASE_CUDA else f"cu{major}"
    found.setdefault("EFFATTN_CUDA_ARCHITECTURES", "release")
    return found | {"EFFATTN_CUDA": "1", "EFFATTN_LOCAL_VERSION": local}


def built(environment, directory):
    """The wheel as setup.py leaves it. Objects of an earlier build are used again, its copies of Python files are not."""
    for stale in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
        shutil.rmtree(stale)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    if subprocess.run([*command, "--wheel-dir", str(directory), str(ROOT)], env=environment, check=False).returncode:
        sys.exit("effattn: the build failed")
    (wheel,) = directory.glob("*.whl")
    return wheel


def repaired(wheel, environment, directory):
    """The wheel with the tag of the oldest platform that has every symbol it needs."""
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--plat",
        "auto",
        "--wheel-dir",
        str(directory),
        str(wheel),
    ]
    excluded = [f"--exclude={name}" for name in TORCH_LIBRARIES]
    done = subprocess.run([*command, *excluded], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"effattn: auditwheel refuses the wheel:\n{done.stdout}{done.stderr}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def problems(wheel):
    """Prints what binds each library, yields what a wheel may not have."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        yield from (f"auditwheel copied {name} into the wheel" for name in names if ".libs/" in name)
        if not any(name.endswith("/licenses/LICENSE") for name in names):
            yield "no licence inside"
        for name in [name for name in names if name.endswith(".so")]:
            library = archive.extract(name, scratch)
            print(f"  {name}, {os.path.getsize(library) / 1e6:.1f} MB, needs")
            for version, symbols in elf.newest_versions(library).items():
                print(
                    f"    {version} for {len(symbols)} symbols: {', '.join(symbols[:3])}{', ...' * (len(symbols) > 3)}"
                )
            yield from (
                f"{name} needs {symbol}, which is not of torch's stable ABI" for symbol in elf.unstable(library)
            )
            yield from (f"{name} exports {symbol}" for symbol in elf.exported(library))
            if "libtorch.so" not in elf.needed(library):
                yield f"{name} is not linked with libtorch.so, which brings libtorch_cuda.so"
            yield from _second_opinion(library)
    if wheel.stat().st_size >= BYTES:
        yield f"{wheel.stat().st_size} bytes, the limit is {BYTES}"
    if "manylinux" not in wheel.name:
        yield f"{wheel.name} is no manylinux wheel"


def _second_opinion(library):
    if importlib.util.find_spec("torch_abi_audit") is None:
        print("    torch-abi-audit is not installed (it needs Python 3.11): not asked")
        return
    asked = subprocess.run(
        [sys.executable, "-m", "torch_abi_audit.cli", "--json", library], capture_output=True, text=True, check=True
    )
    (verdict,) = json.loads(asked.stdout)["bundled_libs"]
    found = verdict["torch"]
    print(f"    torch {found['min_torch_version']} for {found['stable_shim_count']} symbols (torch-abi-audit)")
    oldest = tuple(int(part) for part in found["min_torch_version"].split(".")[:2])
    if not found["stable"] or found["unknown_shim_symbols"] or oldest > OLDEST_TORCH:
        yield f"torch-abi-audit: {found}"


def main():
    os.umask(0o022)
    begin = time.perf_counter()
    environment = settings(os.environ.get("CUDA", ""))
    with tempfile.TemporaryDirectory() as scratch:
        raw, ready = Path(scratch, "raw"), Path(scratch, "ready")
        wheel = repaired(built(environment, raw), environment, ready)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - begin:.0f} s")
        if found := list(problems(wheel)):
            sys.exit("effattn: this wheel is not fit for release:\n" + "\n".join(f"  {problem}" for problem in found))
        DIST.mkdir(exist_ok=True)
        shutil.copy(wheel, DIST)
    print(f"  {DIST / wheel.name}")


if __name__ == "__main__":
    main()
