"""Runs the kernel benchmark of ShiftAddViT again, by a method that can be believed: ``python -m effattn.bench.shift_add_honesty``.

The published benchmark (``OPs_Speedups/``) synchronises its PyTorch baseline on every call and rebuilds the baseline's
weights inside the timer, while its own kernels are timed back to back on inputs that are all zeros, with masks that are
all ones. Here every contender gets the same random data, its weights are ready before the clock starts, nothing but the
call is timed, weights of the token-by-token shapes come from memory as in a model of many layers, and the contenders
take turns; reported are medians. What a contender computes is checked against float64 first.

Besides time, each line has the bytes of its weights and two estimates of energy: of the arithmetic alone, by the table
of the paper, and with the traffic to and from memory, which the paper's figures for kernels leave out. Both are models,
not measurements: they charge a shift where a CPU or GPU, ours included, multiplies by the expanded power of two.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn import add_matmul, pack_signs, quantize_power_of_two, shift_linear

from . import report
from .load import ForeignLoad
from .runner import FULL, QUICK, Effort, Result, take_turns, warm_up

# Energy of one operation in pJ. float32 and int8: the table of ShiftAddViT (45 nm). float16: M. Horowitz, "Computing's
# energy problem (and what we can do about it)", ISSCC 2014, the same source at 45 nm; used for bfloat16.
ENERGY = {
    "float32": {"multiply": 3.7, "add": 0.9, "shift": 0.13},
    "bfloat16": {"multiply": 1.1, "add": 0.4, "shift": 0.13},
    "int8": {"multiply": 0.2, "add": 0.03, "shift": 0.024},
}
# An assumption, and the kindest one of its source: Horowitz (ISSCC 2014) gives 1.3 to 2.6 nJ for 64 bits from DRAM.
# Every operand is charged once, as if caches were perfect: less traffic than any kernel has.
DRAM_PJ_PER_BYTE = 1300 / 8

MATSHIFT = ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128))  # M, K, N
MATADD = ((1, 3136, 32, 16), (2, 784, 32, 16), (5, 196, 32, 16))  # heads, tokens, width of value, bits
BATCHES = (1, 32)
TOKEN_BY_TOKEN = (1, 4, 16, 64, 256)
TOKEN_WIDTH = 4096
CHECKED_ROWS = 32
COLD_BYTES = 256 << 20  # of copies that a contender goes through; more than the last cache of a server's CPU
GROUP = 128  # weights that share a scale in torch's 4-bit layer


class Contender(NamedTuple):
    """``rival`` is what it must beat; ``answer`` what it should compute on the checked rows, None for a peer that
    rounds its weights in its own way; ``tolerance`` the error allowed, as a share of the largest element."""

    name: str
    call: Callable[[], Tensor]
    weights: int  # bytes
    traffic: int  # bytes, every operand once
    energy: float  # pJ of a multiply-add or what stands for it
    rival: str = ""
    answer: Tensor | None = None
    tolerance: float = 1e-4


class Problem(NamedTuple):
    kind: str  # "MatShift", "token by token" or "MatAdd"
    name: str
    rows: int
    operations: int  # multiply-adds
    prepare: Callable[[str], Iterator[Contender]]


class Line(NamedTuple):
    contender: Contender
    result: Result


# ---- shift layers ----


def matshift(kind: str, rows: int, columns: int, outputs: int, name: str, *, cold: bool = False) -> Problem:
    """y = x w^T. ``cold``: on a CPU every call finds its weights in memory and not in a cache, as in a model of many
    layers; each contender goes through copies of its weights. (On CUDA the runner flushes the cache before each call.)
    """

    def prepare(device: str) -> Iterator[Contender]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, columns, generator=generator).to(device)
        weight = (columns**-0.5 * torch.randn(outputs, columns, generator=generator)).to(device)
        low, half = x.bfloat16(), weight.bfloat16()
        packed, wide = quantize_power_of_two(weight), quantize_power_of_two(weight, bits=5)
        rounded = packed.dequantize()

        def answer(input, weight):
            return input[:CHECKED_ROWS].double() @ weight.double().T

        def contender(name, function, weights, x, energy, rival="", answer=None, tolerance=1e-4):
            size = sum(w.nbytes for w in weights)
            copies = math.ceil(COLD_BYTES / size) if cold and device == "cpu" else 1
            turns = itertools.cycle([weights, *(tuple(w.clone() for w in weights) for _ in range(copies - 1))])
            traffic = size + x.nbytes + rows * outputs * (2 if x.dtype == torch.bfloat16 else 4)
            call = functools.partial(_next_turn, function, x, turns)
            return Contender(name, call, size, traffic, energy, rival, answer, tolerance)

        exact = answer(x, rounded)
        yield contender("shift 4-bit fp32", shift_linear, (packed,), x, _shift_add("float32"), "linear fp32", exact)
        yield contender(
            "shift 5-bit fp32",
            shift_linear,
            (wide,),
            x,
            _shift_add("float32"),
            "linear fp32",
            answer(x, wide.dequantize()),
        )
        yield contender(
            "shift 4-bit bf16",
            shift_linear,
            (packed,),
            low,
            _shift_add("bfloat16"),
            "linear bf16",
            answer(low, rounded),
            2e-2,
        )
        integer = functools.partial(shift_linear, activation="int8")
        yield contender("shift 4-bit int8", integer, (packed,), x, _shift_add("int8"), "int8 product", exact, 3e-2)
        yield contender("linear fp32", F.linear, (weight,), x, _multiply_add("float32"), "", answer(x, weight))
        yield contender("linear bf16", F.linear, (half,), low, _multiply_add("bfloat16"), "", answer(low, half), 2e-2)
        # The product alone: rounding the activations, which "shift 4-bit int8" does within its call, is left out.
        x8, w8 = ((127 * t / t.abs().amax()).round().to(torch.int8) for t in (x, weight))
        yield contender("int8 product", torch._int_mm, (w8.T,), x8, _multiply_add("int8"), "", answer(x8, w8))
        sign = rounded.sign()
        shift = torch.where(sign == 0, 0.0, rounded.abs().log2())
        yield contender("eager shift fp32", _eager_shift, (shift, sign), x, _multiply_add("float32"), "", exact)
        if device == "cpu":
            # torch's own layers with rounded weights, the kernels under torchao; how they round is not ours to check.
            energy = _multiply_add("bfloat16")
            scale = weight.abs().amax(1, keepdim=True) / 127
            levels = (weight / scale).round().to(torch.int8), scale.squeeze(1).bfloat16()
            yield contender("weights int8 bf16", torch._weight_int8pack_mm, levels, low, energy)
            codes = torch.randint(16, (outputs, columns), generator=generator, dtype=torch.int32)
            group = min(GROUP, columns)
            levels = (
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
                torch.rand(columns // group, outputs, 2, generator=generator).bfloat16(),
            )
            yield contender("weights int4 bf16", functools.partial(_weights_int4, group), levels, low, energy)

    return Problem(kind, name, rows, rows * columns * outputs, prepare)


def _next_turn(function, x: Tensor, turns: Iterator[tuple[Tensor, ...]]) -> Tensor:
    return function(x, *next(turns))


def _eager_shift(x: Tensor, shift: Tensor, sign: Tensor) -> Tensor:
    """What a model in PyTorch does: build the weight from shift and sign, then multiply."""
    return F.linear(x, 2**shift * sign)


def _weights_int4(group: int, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)


# ---- additions ----


def matadd(batch: int, heads: int, tokens: int, width: int, bits: int) -> Problem:
    """K^T V of binary keys: each of ``bits`` rows is the sum of the value rows whose bit is set."""

    def prepare(device: str) -> Iterator[Contender]:
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(batch, heads, bits, tokens, generator=generator).to(device)
        value = torch.randn(batch * heads, tokens, width, generator=generator).to(device)
        packed = pack_signs(scores).flatten(0, 1)
        mask = (scores > 0).float().flatten(0, 1)
        low, mask_low = value.bfloat16(), mask.bfloat16()

        def answer(mask, value):
            return mask[:CHECKED_ROWS].double() @ value[:CHECKED_ROWS].double()

        result = batch * heads * bits * width

        def contender(name, call, weights, bytes_each, energy, rival="", answer=None, tolerance=1e-4):
            traffic = weights + bytes_each * (value.numel() + result)
            return Contender(name, call, weights, traffic, energy, rival, answer, tolerance)

        exact, exact_low = answer(mask, value), answer(mask, low)
        yield contender(
            "add fp32",
            lambda: add_matmul(packed, value),
            packed.nbytes,
            4,
            ENERGY["float32"]["add"],
            "matmul fp32",
            exact,
        )
        yield contender(
            "add fp32, packing too",
            lambda: add_matmul(pack_signs(scores).flatten(0, 1), value),
            scores.nbytes,
            4,
            ENERGY["float32"]["add"],
            "matmul fp32",
            exact,
        )
        yield contender(
            "add bf16",
            lambda: add_matmul(packed, low),
            packed.nbytes,
            2,
            ENERGY["bfloat16"]["add"],
            "matmul bf16",
            exact_low,
            2e-2,
        )
        yield contender("matmul fp32", lambda: mask @ value, mask.nbytes, 4, _multiply_add("float32"), answer=exact)
        yield contender(
            "matmul bf16",
            lambda: mask_low @ low,
            mask_low.nbytes,
            2,
            _multiply_add("bfloat16"),
            answer=exact_low,
            tolerance=2e-2,
        )

    name = f"batch {batch}, {heads} x {tokens}, {width} wide, {bits} bits"
    return Problem("MatAdd", name, batch, batch * heads * tokens * width * bits, prepare)


def _multiply_add(kind: str) -> float:
    return ENERGY[kind]["multiply"] + ENERGY[kind]["add"]


def _shift_add(kind: str) -> float:
    return ENERGY[kind]["shift"] + ENERGY[kind]["add"]


# ---- measuring ----


def problems() -> list[Problem]:
    shift = [
        matshift("MatShift", batch * rows, k, n, f"batch {batch}, {rows} x {k} -> {n}")
        for batch in BATCHES
        for rows, k, n in MATSHIFT
    ]
    tokens = [
        matshift(
            "token by token", rows, TOKEN_WIDTH, TOKEN_WIDTH, f"{rows} x {TOKEN_WIDTH} -> {TOKEN_WIDTH}", cold=True
        )
        for rows in TOKEN_BY_TOKEN
    ]
    add = [matadd(batch, *shape) for batch in BATCHES for shape in MATADD]
    return shift + tokens + add


def measure(problem: Problem, effort: Effort, device: str) -> list[Line]:
    """Check every contender against float64, then time all in turns."""
    lines, calls = {}, {}
    with torch.no_grad():
        for contender in problem.prepare(device):
            note, seconds = _admit(contender, device)
            lines[contender.name] = Line(contender, Result(note=note))
            if not note:
                calls[contender.name] = contender.call, seconds
        for name, result in take_turns(calls, effort, device).items():
            lines[name] = Line(lines[name].contender, result)
    return list(lines.values())


def _admit(contender: Contender, device: str) -> tuple[str, float]:
    """(why it is not timed, seconds of its second call)."""
    try:
        output = contender.call()
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", 0.0
    if contender.answer is not None:
        answer = contender.answer
        error = (output[: len(answer)].double() - answer).abs().max().item()
        if not error <= contender.tolerance * answer.abs().max().item():
            return f"wrong by {error:.1e}", 0.0
    begin = time.perf_counter()
    contender.call()
    if device == "cuda":
        torch.cuda.synchronize()
    return "", time.perf_counter() - begin


def ratio(lines: list[Line], line: Line) -> float | None:
    """How many times as long its rival takes, above 1 for a win."""
    rival = next((other.result.ms for other in lines if other.contender.name == line.contender.rival), 0.0)
    return rival / line.result.ms if rival and line.result.ms else None


def energy(problem: Problem, contender: Contender) -> tuple[float, float]:
    """Microjoules of the arithmetic, and with memory."""
    arithmetic = problem.operations * contender.energy * 1e-6
    return arithmetic, arithmetic + contender.traffic * DRAM_PJ_PER_BYTE * 1e-6


def crossovers(found: list[tuple[Problem, list[Line]]]) -> dict[str, int | None]:
    """For each shift layer the first measured number of rows at which its rival is faster; None where none is."""
    first: dict[str, int | None] = {}
    for problem, lines in sorted(found, key=lambda item: item[0].rows):
        if problem.kind != "token by token":
            continue
        for line in lines:
            if (times := ratio(lines, line)) is not None:
                first.setdefault(line.contender.name, None)
                if times < 1 and first[line.contender.name] is None:
                    first[line.contender.name] = problem.rows
    return first


# ---- reporting ----


def table(found: list[tuple[Problem, list[Line]]]) -> str:
    text = []
    for problem, lines in found:
        text.append(f"\n{problem.kind}: {problem.name}")
        text.append(f"  {'':<22}{'ms':>10}{'+-':>6}{'rival/it':>10}{'weights KB':>12}{'uJ':>10}{'uJ + DRAM':>12}")
        for line in lines:
            contender, result = line
            if result.note:
                text.append(f"  {contender.name:<22}{result.note[:70]}")
                continue
            times, (arithmetic, whole) = ratio(lines, line), energy(problem, contender)
            against = f"{times:.2f}" if times is not None else ""
            text.append(
                f"  {contender.name:<22}{result.ms:>10.3f}{result.noise:>6.0%}{against:>10}"
                f"{contender.weights / 1e3:>12.1f}{arithmetic:>10.2f}{whole:>12.1f}"
            )
    sweep = crossovers(found)
    if sweep:
        text.append("\nRows from which a shift layer no longer pays (4096 x 4096, of those measured):")
        rivals = {line.contender.name: line.contender.rival for _, lines in found for line in lines}
        for name, rows in sweep.items():
            text.append(f"  {name:<22}{f'{rows} rows' if rows else 'none':<10} against {rivals[name]}")
    text.append(
        "\nrival/it: how many times as long the rival takes (linear of the same dtype, int8 product, matmul). "
        "uJ: arithmetic by the paper's table, a\nshift or a multiplication and an addition each; + DRAM: every operand "
        f"once at {DRAM_PJ_PER_BYTE} pJ/byte (assumed). Estimates, not measurements: they charge a shift where CPUs and GPUs multiply."
    )
    return "\n".join(text)


def as_json(found, about: dict, foreign: float | None) -> dict:
    def line_as_json(problem, lines, line):
        contender, result = line
        arithmetic, whole = energy(problem, contender)
        return {
            "name": contender.name,
            "ms": result.ms or None,
            "quartiles_ms": list(result.quartiles),
            "samples": result.samples,
            "note": result.note,
            "rival": contender.rival,
            "rival_over_it": ratio(lines, line),
            "weight_bytes": contender.weights,
            "traffic_bytes": contender.traffic,
            "arithmetic_uj": arithmetic,
            "with_dram_uj": whole,
        }

    return {
        "about": about,
        "foreign_cores": foreign,
        "assumptions": {"energy_pj": ENERGY, "dram_pj_per_byte": DRAM_PJ_PER_BYTE},
        "crossover_rows": crossovers(found),
        "problems": [
            {
                "kind": problem.kind,
                "name": problem.name,
                "rows": problem.rows,
                "multiply_adds": problem.operations,
                "contenders": [line_as_json(problem, lines, line) for line in lines],
            }
            for problem, lines in found
        ],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effattn.bench.shift_add_honesty",
        description="ShiftAddViT's kernel benchmark with a correct method: medians of interleaved calls.",
    )
    parser.add_argument("--case", metavar="TEXT", help="only problems whose kind or name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="fewer samples, about two seconds a problem")
    parser.add_argument("--json", metavar="FILE", help="write the results (atomically)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    chosen = [p for p in problems() if not options.case or options.case in f"{p.kind} {p.name}"]
    if not chosen:
        parser.error("no problem fits --case")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    torch.set_num_threads(options.threads)
    about, load = report.machine(options.device, options.threads), ForeignLoad()
    warm_up(options.device)
    found = []
    for problem in chosen:
        print(f"{problem.kind}: {problem.name}", file=sys.stderr)
        found.append((problem, measure(problem, QUICK if options.quick else FULL, options.device)))
    print(table(found))
    foreign = load.say()
    if options.json:
        report.write_json(as_json(found, about, foreign), options.json)
    return 0


if __name__ == "__main__":
    from effattn._files import exit_status

    raise SystemExit(exit_status(main))
