"""``python -m effattn doctor --gpu``: every GPU of this node computes what its CPU computes, about as fast as its neighbours.

Each GPU has processes of its own, all at once: one that hangs or crashes is told from the others and killed at the deadline.
A GPU's operators are divided among its processes, for what takes the time where no cache is filled is Triton's compiler.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from . import _driver, _files
from ._version import __version__

SLOW = 0.85  # of the node's median; clocks of good GPUs differ by a few per cent
MOST_PARTS = 4  # processes of a GPU; each takes half a gigabyte of its memory
NO_GPU = 2
FIGURES = {"copy_gb_per_s": "GB/s copied", "matmul_tflop_per_s": "TFLOP/s bfloat16"}


def check_node(seconds: float, report: Path | None, known: Iterable[str] = ()) -> int:
    """Check every visible GPU and print a line for each; ``known`` problems of the installation count too.

    Returns:
        0: all is well; 1: something is wrong; 2: there is no GPU.
    """
    begin = time.monotonic()
    gpus = _found(torch.cuda.device_count(), begin + seconds)
    problems = [f"GPU {gpu['index']}: {failure}" for gpu in gpus for failure in gpu["failures"]] + outliers(gpus)
    if not gpus:
        problems.append(f"no GPU: {_why_none()}")
    for line in [*map(_line, gpus), *(f"problem: {problem}" for problem in problems)]:
        print(line)
    problems = [*known, *problems]
    status = NO_GPU if not gpus else int(bool(problems))
    taken = time.monotonic() - begin
    verdict = {0: "ok", 1: f"{len(problems)} problems", NO_GPU: "no GPU"}[status]
    print(f"{platform.node()}: {len(gpus)} GPUs checked in {taken:.0f} s: {verdict}")
    if report is not None:
        _write(report, gpus, problems, status, taken)
    return status


def outliers(gpus: list[dict]) -> list[str]:
    """GPUs that are slower than others of their name on this node."""
    found = []
    for figure, unit in FIGURES.items():
        for gpu in gpus:
            alike = [other[figure] for other in gpus if other.get(figure) and other["name"] == gpu.get("name")]
            typical = statistics.median_high(alike) if gpu.get(figure) else 0.0
            if gpu.get(figure) and gpu[figure] < SLOW * typical:
                found.append(
                    f"GPU {gpu['index']}: {gpu[figure]:.0f} {unit} where the node's GPUs have {typical:.0f}; "
                    "another process on it, its temperature (nvidia-smi -q -d PERFORMANCE) or the GPU"
                )
    return found


def _command(index: int, count: int, part: int, parts: int, deadline: float) -> list[str]:
    return [sys.executable, "-m", "effattn._node_gpu", *map(str, (index, count, part, parts, deadline))]


def _found(count: int, deadline: float) -> list[dict]:
    """What the processes of every GPU found, or what became of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = max(1, min(MOST_PARTS, cores // max(1, count)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes: list[list[subprocess.Popen]] = []
    try:
        for index in range(count):
            processes.append([])
            for part in range(parts):
                processes[-1].append(subprocess.Popen(_command(index, count, part, parts, deadline), **pipes))
        return [_together(index, [_result(p, deadline) for p in of_gpu]) for index, of_gpu in enumerate(processes)]
    finally:
        for process in (process for of_gpu in processes for process in of_gpu):
            process.kill()  # of one that has ended, nothing
            process.wait()


def _result(process: subprocess.Popen, deadline: float) -> dict:
    try:
        said, complained = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return {
            "failures": ["no answer before the deadline: it hangs (see dmesg and nvidia-smi), or needs more --seconds"]
        }
    try:
        return json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        last = (complained.strip().splitlines() or ["and said nothing"])[-1]
        return {"failures": [f"its process ended with status {process.returncode}: {last}"]}


def _together(index: int, parts: list[dict]) -> dict:
    gpu = {"index": index}
    for part in parts:
        gpu |= part
    gpu["agreed"] = sum(part.get("agreed", 0) for part in parts)
    gpu["seconds"] = max(part.get("seconds", 0.0) for part in parts)
    gpu["failures"] = list(dict.fromkeys(failure for part in parts for failure in part["failures"]))
    return gpu


def _why_none() -> str:
    driver = _driver.driver()
    if torch.version.hip:
        return "torch (HIP) sees none"
    if torch.version.cuda is None:
        return "this torch is built without CUDA" + (f", and driver {driver.version} is here" if driver else "")
    toolkit = tuple(map(int, torch.version.cuda.split(".")[:2]))
    return _driver.driver_problem(driver, toolkit, f"torch {torch.__version__}") or (
        "torch sees none: CUDA_VISIBLE_DEVICES hides them, or the job was given none (nvidia-smi -L)"
    )


def _line(gpu: dict) -> str:
    if "name" not in gpu:
        return f"GPU {gpu['index']}: no result"
    figures = ", ".join(f"{gpu[figure]:.0f} {unit}" for figure, unit in FIGURES.items() if gpu.get(figure))
    bad = f", {len(gpu['failures'])} FAILED" if gpu["failures"] else ""
    return (
        f"GPU {gpu['index']}: {gpu['name']} ({gpu['capability']}) {gpu['uuid']}: "
        f"{gpu['agreed']} results agree{bad}; {figures or 'speed not measured'}; {gpu['seconds']:.0f} s"
    )


def _write(report: Path, gpus: list[dict], problems: list[str], status: int, seconds: float) -> None:
    driver = _driver.driver()
    content = {
        "node": platform.node(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "effattn": __version__,
        "torch": torch.__version__,
        "driver": driver.version if driver else None,
        "status": status,
        "seconds": round(seconds, 1),
        "problems": problems,
        "gpus": gpus,
    }
    _files.write_atomically(report, lambda name: Path(name).write_text(json.dumps(content, indent=1) + "\n"))
