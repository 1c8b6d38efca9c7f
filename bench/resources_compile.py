"""What the compilers say of every GPU kernel: registers, spills, shared memory. Needs nvcc and a checkout, and no GPU.

Answers are kept in build/resources until a source changes, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "resources"
CHIPS = {"sm_80": "80", "sm_90": "90a"}  # Triton's name -> nvcc's
STARTED_WITH = {
    "window_forward": 256,
    "finish_splits": 256,
    "sum_splits": 256,
}  # most threads where no launch bound says
TRITON_CASES: dict[str, dict[str, tuple[int, ...]]] = {  # family -> operation of tests/triton_compiler.py -> sizes
    "cross_shaped_window": {
        "window_stripes_1": (24, 32),
        "window_stripes_2": (24, 32),
        "window_stripes_7": (24, 32),
        "window_stripes_12": (24, 32),
        "window_whole_14": (32,),
        "window_swin_7": (32,),
        "window_swin_12": (32,),
        "window_hat": (30,),
        "window_overlapping": (30,),
    },
    "manhattan": {
        "manhattan_columns_28": (32,),
        "manhattan_rows_56": (16,),
        "manhattan_whole_7": (32,),
        "manhattan_whole_14": (32,),
        "manhattan_weights_7": (32,),
        "local_enhancement_5": (32,),
    },
    "gaussian_mixture": {"gaussian_mixture": (24, 48, 64), "masked_product": (64,)},
    "attention": {"attention": (64,), "attention_causal": (64,), "size_weighted_attention": (64,)},
    "retention": {"retention": (64, 128), "retention_recurrent": (64,)},
    "toeplitz": {"toeplitz": (64,), "toeplitz_32": (64,), "feature_map": (64,), "urpe": (64,), "urpe_grid": (64,)},
    "token_merging": {
        "token_matching": (64,),
        "token_merge_weighted": (768,),
        "token_unmerge": (768,),
        "soft_merge": (768,),
    },
    "shift_add": {"shift_linear": (64, 25088), "shift_linear_int8": (25088,), "shift_add_per_head": (64,)},
}


class Kernel(NamedTuple):
    """One compiled kernel on one chip."""

    family: str
    name: str
    shape: str  # what it was compiled for
    chip: str
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread, spills and arrays
    shared: int  # bytes a block; of a CUDA kernel what is static
    threads: int  # of a block, at most
    dynamic: bool = False  # takes shared memory that only the launch knows


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")


class Missing(Exception):
    """Nothing is kept of it, and nothing was to be compiled."""


def cuda_kernels(kept_only: bool = False, missing: list[str] | None = None) -> Iterator[Kernel]:
    """Every instance of every kernel in csrc/cuda, on every chip of CHIPS.

    Args:
        kept_only: compile nothing.
        missing: receives the name of what was not compiled therefore.
    """
    folder = ROOT / "csrc" / "cuda"
    headers = [*folder.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
    for source in sorted(folder.glob("*.cu")):
        for chip, number in CHIPS.items():
            compile_ = None if kept_only else lambda s=source, n=number: _nvcc(s, n)
            try:
                for found in _kept(f"cuda-{source.stem}-{chip}", [source, *headers], compile_):
                    yield Kernel(family_of(source.stem), chip=chip, **found)
            except Missing:
                missing.append(f"{source.name} for {chip}")


def family_of(stem: str) -> str:
    """The family that a source of csrc/cuda belongs to, by the beginning of its name."""
    families = {
        "retention": "retention",
        "toeplitz": "toeplitz",
        "feature_map": "toeplitz",
        "token_": "token_merging",
        "cross_shaped_window": "cross_shaped_window",
        "shift_": "shift_add",
        "packed_bits": "shift_add",
        "hamming": "shift_add",
    }
    return next((family for beginning, family in families.items() if stem.startswith(beginning)), stem)


def _nvcc(source: Path, number: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(nvcc()), "-std=c++20", "-O3", "-cubin", "-Xptxas=-v", "-keep", f"-keep-dir={scratch}"]
        command += [f"-arch=sm_{number}", "-o", os.path.join(scratch, "out.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile {source}:\n{done.stderr}")
        ptx = "\n".join(path.read_text() for path in sorted(Path(scratch).glob("*.ptx")))
    return parse_cuda(done.stderr, ptx)


PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
ENTRY = re.compile(r"\.entry (\w+)\([^)]*\)(?P<bounds>[^{]*)\{(?P<body>.*?)\n\}", re.DOTALL)


def parse_cuda(ptxas: str, ptx: str) -> list[dict]:
    """Kernels in what ``ptxas -v`` says, with the threads and the use of launch-time shared memory that the PTX tells."""
    entries = {match[1]: match for match in ENTRY.finditer(ptx)}
    external = re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", ptx)
    found = []
    for said in PTXAS.finditer(ptxas):
        entry = entries[said["name"]]
        bound = re.search(r"\.maxntid (\d+)", entry["bounds"])
        static = re.search(r"(\d+) bytes smem", said["rest"])
        found.append(
            {
                "name": said["name"],
                "shape": "",
                "registers": int(said["registers"]),
                "spilled": int(said["stack"]),
                "shared": int(static[1]) if static else 0,
                "threads": int(bound[1]) if bound else 0,
                "dynamic": any(re.search(rf"\b{name}\b", entry["body"]) for name in external),
            }
        )
    _name_plainly(found)
    for kernel in found:
        kernel["threads"] = kernel["threads"] or STARTED_WITH[kernel["name"]]
    return found


def _name_plainly(kernels: list[dict]) -> None:
    """Takes the parameters and the namespaces out of C++ names, and their template arguments as the shape."""
    mangled = "\n".join(kernel["name"] for kernel in kernels)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    for kernel, name in zip(kernels, names):
        name = re.sub(r"\(anonymous namespace\)::|effattn::cuda::|^void ", "", name)
        plain = re.match(r"([\w:]+)(<.*?>)?\(", name)
        if plain:
            kernel["name"], kernel["shape"] = plain[1], (plain[2] or "").strip("<>")


def triton_kernels(kept_only: bool = False, missing: list[str] | None = None) -> Iterator[Kernel]:
    """The kernels that a forward and backward call of each case of TRITON_CASES starts, on every chip of CHIPS."""
    script = ROOT / "tests" / "triton_compiler.py"
    sources = [script, *(ROOT / "triton_kernels").glob("*.py")]
    for family, operations in TRITON_CASES.items():
        for operation, sizes in operations.items():
            cases = [(operation, chip, "bfloat16", size, None) for chip in CHIPS for size in sizes]
            compile_ = None if kept_only else lambda c=cases: _triton(script, c)
            try:
                for found in _kept(f"triton-{operation}-bfloat16", sources, compile_):
                    yield triton_kernel(family, found)
            except Missing:
                missing.append(operation)


def triton_kernel(family: str, found: dict) -> Kernel:
    """A result of tests/triton_compiler.py."""
    if "error" in found:
        raise RuntimeError(f"{found['operation']} {found['kernel']} on {found['family']}: {found['error']}")
    stage = f" {found['stage']}" if isinstance(found["stage"], str) else ""
    warps, config = found["warps"], found["config"]
    tile = " x ".join(
        str(size) for size in config[: config.index(warps, 2)] if size
    )  # at least two sizes, then the warps
    shape = f"{found['operation']} {found['head_dim']}, tile {tile}"
    spilled, threads = found["stack"] + found["local"], 32 * warps
    return Kernel(
        family, found["kernel"] + stage, shape, found["family"], found["registers"], spilled, found["shared"], threads
    )


def _triton(script: Path, cases: list[tuple]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "cases.json"), Path(scratch, "found.json")
        given.write_text(json.dumps(cases))
        subprocess.run([sys.executable, str(script), str(given), str(found)], env=environment, check=True)
        return json.loads(found.read_text())


def _kept(name: str, sources: list[Path], compile_: Callable[[], list[dict]] | None) -> list[dict]:
    """What ``compile_`` returned when the sources were last as they are now."""
    from effattn._files import write_atomically

    digest = hashlib.sha256()
    for path in sorted(set(sources)):
        digest.update(path.read_bytes())
    kept = BUILD / f"{name}.{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        if compile_ is None:
            raise Missing(name)
        found = compile_()
        for older in BUILD.glob(f"{name}.*.json"):
            older.unlink(missing_ok=True)
        write_atomically(kept, lambda path: Path(path).write_text(json.dumps(found)))
    return json.loads(kept.read_text())
