"""nvcc takes every CUDA source for every chip, with no warning, and no kernel of it spills registers or needs a stack.

Needs nvcc and no GPU. By default for one chip; `EFFATTN_COMPILE=all` for all of them. What nvcc says is kept in
build/cuda_compile until a CUDA source changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SELF_TEST = sorted((ROOT / "tests" / "cuda_emulator" / "kernels").glob("*.cu"))
ALL = os.environ.get("EFFATTN_COMPILE") == "all"
CHIPS = ("80", "90a", "100", "120") if ALL else ("90a",)

NVCC = shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin")) or shutil.which("nvcc")
FLAGS = (
    "-std=c++20 -O3 -fatbin -Xptxas=-v -Werror=all-warnings "
    f"-I{ROOT / 'csrc' / 'cuda'} -I{ROOT / 'tests' / 'cuda_emulator' / 'kernels'}"
).split()

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in CUDA_HOME")

KERNEL = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)


def compiled(source, chip):
    """What nvcc and ptxas say of a source."""
    headers = [path for path in source.parent.iterdir() if path.suffix == ".h"]
    headers += (ROOT / "csrc").rglob("cuda/*.h")
    headers += (ROOT / "csrc").glob("*.h")
    digest = hashlib.sha256(" ".join([NVCC, *FLAGS]).encode())
    for path in [source, *sorted(set(headers))]:
        digest.update(path.read_bytes())
    log = ROOT / "build" / "cuda_compile" / f"{source.stem}.sm_{chip}.{digest.hexdigest()[:16]}"
    if not log.exists():
        gpu = f"-gencode=arch=compute_{chip},code=sm_{chip}"
        made = subprocess.run(
            [NVCC, *FLAGS, gpu, str(source), "-o", os.devnull],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert made.returncode == 0, made.stdout
        log.parent.mkdir(parents=True, exist_ok=True)
        for older in log.parent.glob(f"{source.stem}.sm_{chip}.*"):
            older.unlink(missing_ok=True)
        log.write_text(made.stdout)
    return log.read_text()


def problems(said):
    kernels = list(KERNEL.finditer(said))
    assert kernels, f"no kernel in\n{said}"
    return [
        kernel.group()
        for kernel in kernels
        if kernel["stack"] != "0" or kernel["stores"] != "0" or kernel["loads"] != "0"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source, chip):
    wrong = problems(compiled(source, chip))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", SELF_TEST, ids=lambda path: path.stem)
def test_what_the_emulator_is_tested_on_is_cuda(source):
    assert not problems(compiled(source, "90a"))


def test_spills_and_stacks_are_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text("""
        __global__ void stack(float* x, int i) {
          float values[64] = {};
          for (int k = 0; k < i; ++k) values[static_cast<int>(x[k]) % 64] += x[k];
          x[0] = values[i];
        }
        __global__ void __launch_bounds__(1024, 2) spill(float* x) {
          float values[64];
        #pragma unroll
          for (int k = 0; k < 64; ++k) values[k] = x[k * 1024 + threadIdx.x];
          __syncthreads();
        #pragma unroll
          for (int k = 0; k < 64; ++k) x[(k * 1024 + threadIdx.x) * 3] = values[k];
        }
    """)
    wrong = "\n".join(problems(compiled(source, "80")))
    assert re.search("stack\\S*\n? +256 bytes stack frame", wrong)
    assert re.search("spill\\S*\n? +[1-9]\\d* bytes stack frame, [1-9]", wrong)


def test_an_error_fails_with_what_nvcc_says(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { no_such_function(); }")
    with pytest.raises(AssertionError, match='identifier "no_such_function" is undefined'):
        compiled(source, "80")
