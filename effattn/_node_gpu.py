"""One process of ``doctor --gpu``: ``python -m effattn._node_gpu INDEX COUNT PART PARTS DEADLINE`` prints a line of JSON.

It checks part PART of PARTS of the operators on GPU INDEX of COUNT. GPUs begin at different operators, so that what one has
compiled the others find in Triton's cache.

Results are compared with the float64 reference on the CPU, by the rule and on the inputs of the accuracy table; what is made
of bits must be equal. The CUDA kernels come first and Triton's, which are compiled where no cache has them, in the time left.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import effattn

from . import _diagnostics, _driver, _registry

DTYPES = (torch.float32, torch.bfloat16)
MARGIN = 10.0  # seconds before the deadline in which no check is begun: the last one must still end
COPIED, MULTIPLIED = (
    2**30,
    8192,
)  # bytes, and rows of a square matrix: beyond every cache, and enough for every multiprocessor
_BACKENDS = ("cuda", "triton")


def check_gpu(index: int, count: int, part: int, parts: int, deadline: float) -> dict:
    """Check one part of the operators on one visible GPU until ``deadline``, of ``time.monotonic()``; part 0 measures its speed too."""
    begin = time.monotonic()
    torch.cuda.set_device(index)
    gpu = torch.cuda.get_device_properties(index)
    found = {"name": gpu.name, "uuid": f"GPU-{gpu.uuid}", "capability": f"{gpu.major}.{gpu.minor}"}
    if part == 0:
        found |= speed(torch.device("cuda", index))
    found |= check_results("cuda", deadline - MARGIN, share(_registry.operators(), index, count, part, parts))
    found["failures"] += code_problems(gpu.name, (gpu.major, gpu.minor))
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def code_problems(name: str, capability: tuple[int, int]) -> list[str]:
    """Why the CUDA kernels have no code for such a GPU."""
    build = _diagnostics.cuda_build() if torch.version.cuda else None
    found = _driver.gpu_problems([(name, capability)], build, _driver.driver()) if build else ()
    return [what for what, _ in found]


def share(operators: tuple[str, ...], index: int, count: int, part: int, parts: int) -> tuple[str, ...]:
    """The operators of a part, beginning where no other GPU begins."""
    mine = operators[part::parts]
    first = len(mine) * index // count
    return mine[first:] + mine[:first]


def check_results(device: str, deadline: float, operators: tuple[str, ...]) -> dict:
    """These operators on every GPU backend that serves them, forward and backward.

    Args:
        device: where the backends are asked to run: "cuda", or "cpu" for an emulator and Triton's interpreter.
        deadline: of ``time.monotonic()``, after which nothing is begun.
        operators: their names in the registry.
    """
    agreed, failures, late = 0, [], []
    for backend in _BACKENDS:
        for op in operators:
            if backend not in _served(op, device):
                continue
            if time.monotonic() > deadline:
                late.append(f"{op} on {backend}")
                continue
            try:
                wrong = list(disagreements(op, backend))
            except Exception as error:  # noqa: BLE001 - whatever a broken GPU, driver or compiler raises is the finding
                wrong = [f"{op} on {backend} fails: {_first_line(error)}"]
                if "CUDA error" in str(error):  # every later call of this process would fail alike
                    return {"agreed": agreed, "failures": [*failures, *wrong]}
            failures += wrong
            agreed += not wrong
    if late:
        failures.append(
            f"{len(late)} not checked for lack of time ({', '.join(late[:3])}{', ...' if late[3:] else ''}): once more "
            "with Triton's cache filled by this run, or --seconds"
        )
    if not agreed and not failures:
        failures.append("no CUDA or Triton kernel serves it")
    return {"agreed": agreed, "failures": failures}


def _served(op: str, device: str) -> set[str]:
    problem = _registry.Problem(device, torch.float32, 16)
    return {verdict.backend for verdict in _registry.verdicts(op, problem, auto=False) if verdict.ok}


def disagreements(op: str, backend: str) -> Iterator[str]:
    """What ``backend`` computes otherwise than the CPU's reference, in words."""
    if op in EXACT:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for got, expected in zip(EXACT[op](device, backend), EXACT[op]("cpu", "reference")):
            if not torch.equal(got.cpu(), expected):
                yield f"{op} on {backend}: {(got.cpu() != expected).sum()} of {expected.numel()} numbers differ"
        return
    for dtype in DTYPES:
        for entry in _entries(op, backend, dtype):
            if entry.used > 1:
                what = f"{op} on {backend}, {str(dtype).removeprefix('torch.')}, {entry.tensor}"
                yield f"{what}: error {entry.error:.1e}, allowed {entry.budget:.1e}"


def _entries(op: str, backend: str, dtype: torch.dtype) -> list:
    """Errors on the smallest problem of the accuracy table that the backend serves."""
    from effattn.bench.accuracy import PROBLEMS, measure

    problems = sorted(
        (problem for problem in PROBLEMS if problem.operator == op), key=lambda problem: not problem.small
    )
    for problem in problems:
        try:
            entries = measure(backend, dtypes=(dtype,), problems=(problem,))
        except NotImplementedError:
            continue
        if entries:
            return entries
    raise LookupError(f"the accuracy table has no problem that {backend} serves")


def _packed(device: str, backend: str) -> tuple[Tensor, ...]:
    x = torch.randn(2, 37, 45, generator=torch.Generator().manual_seed(0)).to(device)
    return (effattn.pack_signs(x, backend=backend),)


def _multiplied(device: str, backend: str) -> tuple[Tensor, ...]:
    (bits,) = _packed("cpu", "reference")
    bits = bits.to(device)
    return (effattn.binary_matmul(bits, bits[:, :21], 45, backend=backend),)


def _matched(device: str, backend: str) -> tuple[Tensor, ...]:
    metric = torch.randn(2, 77, 40, generator=torch.Generator().manual_seed(0)).to(device)
    plan = effattn.bipartite_soft_matching(metric, 25, num_protected=1, backend=backend)
    return plan.source, plan.members, plan.offsets


EXACT: dict[str, Callable[[str, str], tuple[Tensor, ...]]] = {
    "pack_signs": _packed,
    "binary_matmul": _multiplied,
    "bipartite_soft_matching": _matched,
}
"""Operators whose results are bits or indices: (device, backend) -> what must be equal everywhere."""


def speed(device: torch.device, copied: int = COPIED, multiplied: int = MULTIPLIED) -> dict[str, float]:
    """Bandwidth of a copy and rate of a bfloat16 product; nothing where another process has taken the memory."""
    try:
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        copy = _fastest(functools.partial(torch.empty_like(source).copy_, source), device)
        a = torch.randn(multiplied, multiplied, dtype=torch.bfloat16, device=device)
        product = _fastest(functools.partial(torch.mm, a, a), device)
    except torch.OutOfMemoryError:
        return {}
    return {"copy_gb_per_s": 2 * copied / copy / 1e9, "matmul_tflop_per_s": 2 * multiplied**3 / product / 1e12}


def _fastest(call: Callable[[], object], device: torch.device, count: int = 20) -> float:
    """Seconds of the fastest of ``count`` calls, after as many that warm up."""
    taken = []
    for _ in range(2 * count):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken[count:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    *which, deadline = sys.argv[1:]  # the clock is the system's, the same in every process
    print(json.dumps(check_gpu(*map(int, which), float(deadline))), flush=True)
