"""Writes docs/support.md from the registry: python docs/support.py [--check]

The table holds what the predicates of effattn._registry answer, word for word. They are asked as on a machine that has
everything (compiled libraries, triton), so the page is the same wherever it is made; --check exits 1 if the committed
page differs.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import operator
import os
import sys
from pathlib import Path
from unittest import mock

import torch

os.environ["EFFATTN_TUNING"] = "0"  # the shipped choices, on a machine that was tuned too

import effattn
from effattn import _native, _registry
from effattn._registry import Problem

PAGE = Path(__file__).with_name("support.md")
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BEYOND_ANY_MODEL = 1 << 16

HEADER = """\
<!-- Made by `python docs/support.py` from effattn/_registry.py. Do not edit. -->

# Support table

What each backend serves when it is installed. `python -m effattn info` says what this machine has, and
`effattn.explain(function, *arguments)` says what one call gets and why. The reasons below are the predicates' own: the same
text is in the error of an explicit `backend=`, in the log and in `explain()`.

All backends take any strides (the kernels do not copy query, key or value to make them contiguous), any batch size and any number
of tokens; the number of tokens need not be a multiple of anything. Device `cuda` means a GPU, NVIDIA or AMD, as torch names it. With
`TRITON_INTERPRET=1` the `triton` backend serves CPU tensors in Triton's interpreter, for tests. The
[limits](../README.md#limits) say how the GPU kernels have been checked so far.
"""


@contextlib.contextmanager
def everything_installed():
    """Ask the predicates as on a machine that lacks nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(_native, loaded=True, cuda_loaded=True, cuda_device="cuda"))
        stack.enter_context(mock.patch.object(_registry, "_gpu_generation", return_value=_registry.OLDEST_GPU))
        stack.enter_context(mock.patch.object(_registry, "has_triton", return_value=True))
        stack.enter_context(mock.patch.dict(os.environ))
        for name in ("TRITON_INTERPRET", "EFFATTN_BACKEND"):
            os.environ.pop(name, None)
        yield


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def largest_head_dim(backend: _registry.Backend, device: str) -> str:
    """The largest head_dim that the predicate takes (0 if none), by bisection: what it takes, it takes from 1 up."""

    def served(head_dim: int) -> bool:
        return any(backend.predicate(Problem(device, dtype, head_dim))[0] for dtype in DTYPES)

    if served(BEYOND_ANY_MODEL):
        return "any"
    low, high = 0, BEYOND_ANY_MODEL
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if served(middle) else (low, middle)
    return f"1 to {low}"


def operator_section(op: str) -> list[str]:
    lines = [f"\n## {op}\n"]
    takes = inspect.signature(operator.attrgetter(op)(effattn)).parameters
    heads = ["backend", "device", *map(name_of, DTYPES), "head_dim", "dropout"]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    backends = _registry._table[op]
    for backend in backends:
        for device in DEVICES:
            served = [dtype for dtype in DTYPES if backend.predicate(Problem(device, dtype, 64))[0]]
            if not served:
                continue
            cells = ["yes" if dtype in served else "no" for dtype in DTYPES]
            dropout, head_dim = "-", "any size"
            if "dropout_p" in takes:
                dropout = "yes" if backend.predicate(Problem(device, served[0], 64, 0.1))[0] else "no"
            if "query" in takes or "head_dim" in takes:
                head_dim = largest_head_dim(backend, device)
            row = [f"`{backend.name}`", device, *cells, head_dim, dropout]
            lines.append("| " + " | ".join(row) + " |")
    order = ", ".join(f"`{b.name}`" for b in backends)
    lines.append(f"\n`auto` tries {order}, in this order, and takes the first that can serve the call.")
    for backend in backends:
        if backend.worthwhile is not None:
            lines.append(
                f"It also passes over `{backend.name}` for calls that this backend can serve but another serves faster."
            )
    return lines


def refusals_section() -> list[str]:
    """Each kernel backend's answer to what it cannot serve."""
    lines = ["\n## Why a backend turns a call down\n", "| call | backend | its answer |", "| --- | --- | --- |"]
    predicates = {"cpu": _registry.cpu_kernel, "cuda": _registry.cuda_kernel, "triton": _registry.triton_kernel}
    native = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
    for name, predicate in predicates.items():
        device = native[name]
        elsewhere = "cuda" if device == "cpu" else "cpu"
        head_dim = _registry.MAX_HEAD_DIM + 1
        calls = [
            (f"tensors on {elsewhere}", Problem(elsewhere, torch.float32, 64)),
            ("float64", Problem(device, torch.float64, 64)),
            (f"head_dim {head_dim}", Problem(device, torch.float32, head_dim)),
            ("dropout_p 0.1", Problem(device, torch.float32, 64, 0.1)),
        ]
        lines += [f"| {call} | `{name}` | {_refusal(predicate, problem)} |" for call, problem in calls]
    with mock.patch.multiple(_native, loaded=False, problem="", CPU_LIBRARY=Path("absent/_cpu.so")):
        _native._load()
        answer = _refusal(_registry.cpu_kernel, Problem("cpu", torch.float32, 64))
    lines.append(f"| no compiled library | `cpu` | {answer} |")
    with mock.patch.multiple(_native, cuda_loaded=False, cuda_problem="", CUDA_LIBRARY=Path("absent/_cuda.so")):
        _native.cuda_problem = _native._load_library(_native.CUDA_LIBRARY)
        answer = _refusal(_registry.cuda_kernel, Problem("cuda", torch.float32, 64))
    lines.append(f"| no compiled CUDA library | `cuda` | {answer} |")
    with mock.patch.object(_registry, "_gpu_generation", return_value=_registry.OLDEST_GPU - 1):
        answer = _refusal(_registry.cuda_kernel, Problem("cuda", torch.float32, 64))
    lines.append(f"| an older GPU | `cuda` | {answer} |")
    with mock.patch.object(_registry, "has_triton", return_value=False):
        answer = _refusal(_registry.triton_kernel, Problem("cuda", torch.float32, 64))
    lines.append(f"| no triton | `triton` | {answer} |")
    return lines


def _refusal(predicate: _registry.Predicate, problem: Problem) -> str:
    ok, reason = predicate(problem)
    if ok:
        raise AssertionError(f"expected a refusal of {problem}, got {reason!r}: bring docs/support.py up to date")
    return reason


def sdpa_section() -> list[str]:
    """Who serves which form of scaled_dot_product_attention, from real calls stopped before their launch."""
    q = torch.empty(2, 8, 128, 64)
    grouped = torch.empty(2, 2, 128, 64)
    wide = torch.empty(2, 8, 128, 32)
    bias = torch.empty(8, 128, 128)
    boolean = torch.empty(128, 128, dtype=torch.bool)
    mask = effattn.GaussianMixtureMask(torch.empty(5, 8), torch.empty(5, 8), grid=(8, 16))
    small = torch.empty(1, 1, 16, 16)
    one, long = torch.empty(2, 8, 1, 64), torch.empty(2, 8, 1024, 64)
    calls = [
        ("no mask", (q, q, q), {}),
        ("`is_causal=True`", (q, q, q), {"is_causal": True}),
        ("boolean `attn_mask`", (q, q, q, boolean), {}),
        ("floating `attn_mask`, added", (q, q, q, bias), {}),
        ("`enable_gqa=True`, 8 query and 2 key heads", (q, grouped, grouped), {"enable_gqa": True}),
        ("structured `attn_mask`", (q, q, q, mask), {}),
        ("a very small call: 16 tokens, 1 head", (small, small, small), {}),
        ("one query and 1024 keys, as in decoding", (one, long, long), {}),
        ("`attn_mask` that requires a gradient", (q, q, q, bias.clone().requires_grad_()), {}),
        ("`dropout_p=0.1`", (q, q, q), {"dropout_p": 0.1}),
        ("float64", (q.double(), q.double(), q.double()), {}),
        ("value with another head_dim", (q, q, wide), {}),
        ("3-dimensional tensors", (q[0], q[0], q[0]), {}),
    ]
    lines = [
        "\n## Forms of scaled_dot_product_attention, on CPU\n",
        "| call | operator | `auto` takes | the `cpu` backend says |",
    ]
    lines.append("| --- | --- | --- | --- |")
    for name, args, kwargs in calls:
        with contextlib.redirect_stdout(io.StringIO()):
            why = effattn.explain(effattn.scaled_dot_product_attention, *args, **kwargs)
        said = next(verdict.reason for verdict in why.verdicts if verdict.backend == "cpu")
        lines.append(f"| {name} | {why.op} | `{why.backend}` | {said} |")
    return lines


def page() -> str:
    with everything_installed():
        lines = [HEADER.rstrip("\n")]
        for op in sorted(_registry.operators()):
            lines += operator_section(op)
        lines += sdpa_section()
        lines += refusals_section()
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/support.md from the registry.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the committed page is stale")
    wanted = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(wanted)
        return 0
    if not PAGE.exists() or PAGE.read_text() != wanted:
        print(f"{PAGE} is stale; run: python docs/support.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
