"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction-set level that this machine runs."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
REQUIRED_FLAGS = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx512_bf16", "avx512_vnni", "avx512_vpopcntdq"),
}
FLOAT_LEVELS = ("baseline", "avx2", "avx512")
LANGUAGE = "-std=c++20 -fno-math-errno -ffp-contract=fast -w"
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# A third of the compiler's time, for what AddressSanitizer finds as soon as such a pointer is used.
COSTLY = "-fno-sanitize=null,object-size,pointer-overflow"
# Checks of memory as calls, not inline: half of the compiler's time. An option of g++.
OUTLINE = "--param asan-instrumentation-with-call-threshold=0"


@pytest.fixture(scope="module")
def levels():
    """Compiler flags per level, from the same table that builds the library."""
    source = (ROOT / "setup.py").read_text().split("\nlacking = ")[0]
    namespace = {"__file__": str(ROOT / "setup.py"), "__name__": "effattn_setup"}
    exec(compile(source, "setup.py", "exec"), namespace)
    return namespace["LEVELS"]


def processor_flags():
    cpuinfo = Path("/proc/cpuinfo")
    line = (
        next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
        if cpuinfo.exists()
        else ""
    )
    return set(line.split())


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None, reason="no ninja")
@pytest.mark.parametrize("level", REQUIRED_FLAGS)
def test_kernels_touch_no_memory_but_their_tensors(level, levels, tmp_path):
    if level not in levels or not set(REQUIRED_FLAGS[level]) <= processor_flags():
        pytest.skip(f"this processor has no {level}")
    higher = [other for other in FLOAT_LEVELS[FLOAT_LEVELS.index(level) + 1 :]] if level in FLOAT_LEVELS else None
    is_best = higher is not None and not any(set(REQUIRED_FLAGS[other]) <= processor_flags() for other in higher)
    if not is_best and os.environ.get("EFFATTN_COMPILE") != "all":
        pytest.skip(
            "two minutes: EFFATTN_COMPILE=all runs it, the widest float level of this processor is always watched"
        )
    build = ROOT / "build" / "sanitizer" / level
    build.mkdir(parents=True, exist_ok=True)
    sources = [path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if path.stem != "dispatch"]
    objects = " ".join(f"{path.stem}.o" for path in sources)
    without = "" if os.environ.get("EFFATTN_COMPILE") == "all" else COSTLY
    outline = OUTLINE if "g++" in Path(COMPILER).name else ""
    lines = [
        f"flags = {LANGUAGE} -DEFFATTN_ISA={level} {levels[level]} -I{ROOT / 'csrc' / 'cpu'}",
        "rule compile",
        f"  command = {COMPILER} $how $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} {SANITIZE} $in -o $out -pthread",
        *(f"build {path.stem}.o: compile {path}\n  how = {SANITIZE} {without} {outline}" for path in sources),
        # What calls the kernels and compares is not under test. Its heap blocks are AddressSanitizer's all the same.
        f"build harness.o: compile {ROOT / 'tests' / 'sanitizer' / 'kernels.cpp'}\n  how = -O2",
        f"build kernels: link {objects} harness.o",
    ]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    made = subprocess.run([ninja, "-C", str(build), "kernels"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-4000:]
    ran = subprocess.run([str(build / "kernels")], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
