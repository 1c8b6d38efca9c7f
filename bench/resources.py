"""The page of GPU resources: registers, spills, shared memory and occupancy of every kernel, and what tiles waste.

    python -m effattn.bench.resources [--output docs/gpu_resources.md] [--kept]

Everything is read from binaries that compilers made for sm_80 and sm_90a; nothing is timed, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .resources_compile import CHIPS, ROOT, TRITON_CASES, Kernel, cuda_kernels, family_of, nvcc, triton_kernels


class Chip(NamedTuple):
    """A multiprocessor, from the tables of compute capabilities in the CUDA programming guide."""

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that the system takes from each block


MULTIPROCESSORS = {
    "sm_80": Chip(65536, 64, 32, 164 * 1024, 1024),
    "sm_90": Chip(65536, 64, 32, 228 * 1024, 1024),
}
QUARTERS = 4  # of a multiprocessor, each with its registers and warps
REGISTER_UNIT, SHARED_UNIT = 256, 128  # registers of a warp and bytes of a block are given out in these


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(kernel: Kernel) -> float:
    """Share of a multiprocessor's warps that blocks of the kernel can fill; of one that takes shared memory at launch, at most."""
    chip = MULTIPROCESSORS[kernel.chip]
    warps = -(-kernel.threads // 32)
    limits = [chip.blocks, chip.warps // warps]
    if kernel.registers:
        a_warp = _up(kernel.registers * 32, REGISTER_UNIT)
        limits.append(chip.registers // QUARTERS // a_warp * QUARTERS // warps)
    limits.append(chip.shared // _up(kernel.shared + chip.reserved, SHARED_UNIT))
    return min(limits) * warps / chip.warps


class Tile(NamedTuple):
    """What rows of queries, columns of keys and the head dimension are rounded up to."""

    rows: int
    columns: int
    depth: int  # 0: the next power of two, at least 16


EXACT = Tile(16, 8, 8)  # mma.sync: m16 of rows, n8 of columns, and k8 or n8 of the head dimension


def products(queries: int, keys: int, head_dim: int, tile: Tile) -> int:
    """Multiply-adds of Q K^T, or of P V, with everything rounded up to the tile."""
    depth = _up(head_dim, tile.depth) if tile.depth else max(16, 1 << (head_dim - 1).bit_length())
    return _up(queries, tile.rows) * _up(keys, tile.columns) * depth


def waste(queries: int, keys: int, head_dim: int, tile: Tile) -> float:
    """Share of the tile's products that padding takes."""
    return 1 - queries * keys * head_dim / products(queries, keys, head_dim, tile)


class Shape(NamedTuple):
    """A published problem of a family."""

    model: str
    queries: int
    keys: int
    head_dim: int


PUBLISHED = {
    "cross_shaped_window": (
        Shape("CSWin-T, stripes of 1 on 56 x 56", 56, 56, 32),
        Shape("CSWin-B, stripes of 1 on 56 x 56", 56, 56, 24),
        Shape("CSWin-B, stripes of 7 on 14 x 14", 98, 98, 24),
        Shape("Swin, windows of 7 x 7", 49, 49, 32),
        Shape("Swin, windows of 12 x 12", 144, 144, 32),
        Shape("HAT, windows of 16 x 16", 256, 256, 30),
        Shape("HAT, overlapping", 256, 576, 30),
    ),
    "manhattan": (
        Shape("RMT, rows of 56", 56, 56, 16),
        Shape("RMT, 14 x 14", 196, 196, 32),
        Shape("RMT, 7 x 7", 49, 49, 32),
    ),
    "gaussian_mixture": (Shape("GMM-ViT", 197, 197, 64),),
    "attention": (Shape("DeiT", 197, 197, 64), Shape("1024 tokens", 1024, 1024, 64)),
    "retention": (Shape("RetNet, a chunk of 64", 64, 64, 256), Shape("ViR, a chunk of 64", 64, 64, 64)),
    "toeplitz": (Shape("NPRF-DeiT, direct tiles (CUDA has the FFT only)", 197, 197, 64),),
}
"""Families whose kernels multiply tiles of queries by keys, at the shapes of their papers."""

WINDOWS, HEAD_DIMS = (49, 56, 64, 98, 144, 197), (24, 30, 32, 48, 64)


def triton_tile(family: str, head_dim: int) -> Tile:
    """Rows and columns of the forward kernel that ships for sm_90 and 16-bit elements."""
    from effattn.triton_kernels import configurations, cross_shaped_window_configurations

    depth = configurations.block_d(head_dim)
    if family in ("cross_shaped_window", "manhattan"):
        column = (depth > 32) + (depth > 64) + (depth > 128)
        config = cross_shaped_window_configurations._HALF["window_forward"][column]
    elif family == "retention":
        return Tile(64, 64, 0)
    else:
        config = configurations.configurations()["sm_90", "half", True, "forward", max(64, depth)]
    return Tile(config[0], config[1], 0)


class Candidate(NamedTuple):
    """What a CUDA kernel with exact tiles would save a family at its worst published shape."""

    family: str
    ratio: float  # products of Triton's tile over those of the exact one
    shape: Shape
    reasons: tuple[str, ...]


def ranked(kernels: Iterable[Kernel], has_cuda: Iterable[str]) -> list[Candidate]:
    """Families by how many products exact tiles would save, then by the lowest occupancy of their Triton kernels."""
    kernels, found = list(kernels), []
    for family, shapes in PUBLISHED.items():
        ours = [kernel for kernel in kernels if kernel.family == family]

        def ratio(shape, family=family):
            size = shape.queries, shape.keys, shape.head_dim
            return products(*size, triton_tile(family, shape.head_dim)) / products(*size, EXACT)

        worst = max(shapes, key=ratio)
        share = waste(worst.queries, worst.keys, worst.head_dim, triton_tile(family, worst.head_dim))
        exact = waste(worst.queries, worst.keys, worst.head_dim, EXACT)
        reasons = [f"{worst.model}: {share:.0%} of the products are padding, {exact:.0%} with exact tiles"]
        low = min(ours, key=occupancy, default=None)
        if low:
            reasons.append(f"lowest occupancy {occupancy(low):.0%} ({low.name}, {low.shape}, {low.chip})")
            spilled = [kernel for kernel in ours if kernel.spilled]
            reasons.append(f"{len(spilled)} of {len(ours)} kernels spill" if spilled else "no kernel spills")
        reasons.append("has CUDA kernels" if family in has_cuda else "has no CUDA kernel")
        found.append((Candidate(family, ratio(worst), worst, tuple(reasons)), occupancy(low) if low else 1.0))
    found.sort(key=lambda pair: (-round(pair[0].ratio, 2), pair[1]))
    return [candidate for candidate, _ in found]


HEAD = """# GPU resources

Written by `python -m effattn.bench.resources`, which compiles the kernels for compute capabilities 8.0 and 9.0 (nvcc for `sm_80` and `sm_90a`, Triton ahead of time) and reads the
binaries. **Nothing here was timed**; no GPU was at hand. Occupancy is the share of a multiprocessor's warps that blocks can fill given registers, threads and shared memory: low is not slow by itself (a kernel on
warp-group instructions needs few warps), but it leaves little to hide latency with. Spilled is local memory a thread in bytes.
"""


def page(cuda: list[Kernel], triton: list[Kernel], missing: Iterable[str] = ()) -> str:
    """The whole page; ``missing`` was not compiled, and the page says so."""
    with_cuda = {family_of(path.stem) for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    lines = [HEAD, *waste_tables(), *_ranking(triton, with_cuda)]
    if missing:
        lines += [f"**Not compiled yet**, so not in what follows: {', '.join(missing)}.", ""]
    lines += _triton_tables(triton) + _cuda_tables(cuda)
    return "\n".join(lines).rstrip() + "\n"


def waste_tables() -> list[str]:
    """The section that needs no compiler."""
    lines = [
        "## What tiles waste",
        "",
        "Share of the multiply-adds of Q K^T and P V that padding takes, in the forward window kernel's tile of Triton (a power of two in every direction) and, after the stroke, in tiles of `mma.sync`: 16 queries, 8 keys, 8 of",
        "the head dimension. Every token of a window is query and key.",
        "",
        "| tokens | " + " | ".join(f"D = {head_dim}" for head_dim in HEAD_DIMS) + " |",
        "| --: |" + " --: |" * len(HEAD_DIMS),
    ]
    for tokens in WINDOWS:
        cells = []
        for head_dim in HEAD_DIMS:
            tile = triton_tile("cross_shaped_window", head_dim)
            pair = (waste(tokens, tokens, head_dim, each) for each in (tile, EXACT))
            cells.append(" / ".join(f"{share:.0%}" for share in pair))
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ranking(triton: list[Kernel], has_cuda: set[str]) -> list[str]:
    lines = [
        "## Where a CUDA kernel would win over Triton",
        "",
        "By products of Triton's tile over products of exact ones, at the worst published shape; then by the lowest occupancy. Kernels of these families are bound by more than products (softmax, traffic), so the ratio is a",
        "ceiling of the gain. Shift-add, token merging and the feature maps multiply no tiles of queries by keys and are not ranked.",
        "",
    ]
    for place, candidate in enumerate(ranked(triton, has_cuda), 1):
        lines.append(f"{place}. **{candidate.family}**, {candidate.ratio:.2f} times. {'; '.join(candidate.reasons)}.")
    return [*lines, ""]


def _triton_tables(kernels: list[Kernel]) -> list[str]:
    lines = ["## Triton", "", "bfloat16, with the tile that ships. Numbers are of 8.0 / 9.0.", ""]
    for family in TRITON_CASES:
        rows = collections.defaultdict(dict)
        for kernel in (kernel for kernel in kernels if kernel.family == family):
            rows[kernel.name, kernel.shape.partition(",")[0]][kernel.chip] = kernel
        if not rows:
            continue
        lines += [
            f"### {family}",
            "",
            "| kernel | compiled for | tile | threads | registers | spilled | shared, KB | occupancy |",
        ]
        lines.append("| --- | --- | --- | --: | --: | --: | --: | --: |")
        for (name, shape), chips in rows.items():
            each = [chips[chip] for chip in CHIPS if chip in chips]
            cells = [
                _both(each, lambda kernel: kernel.shape.partition("tile ")[2]),
                _both(each, lambda kernel: str(kernel.threads)),
                *_numbers(each),
            ]
            lines.append(f"| {name} | {shape} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _cuda_tables(kernels: list[Kernel]) -> list[str]:
    if not kernels:
        return []
    lines = [
        "## CUDA",
        "",
        "Instances of a template in one row: of each number the range over them, of 8.0 / 9.0. *at launch*: the kernel takes shared memory that depends on the call, which the occupancy leaves out.",
        "",
        "| kernel | instances | threads | registers | spilled | shared, KB | occupancy |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    rows = collections.defaultdict(lambda: collections.defaultdict(list))
    for kernel in kernels:
        rows[kernel.family, kernel.name][kernel.chip].append(kernel)
    for (family, name), chips in sorted(rows.items()):
        each = [chips[chip] for chip in CHIPS if chip in chips]
        at_launch = " at launch" if any(kernel.dynamic for kernel in each[0]) else ""
        cells = [
            _both(each, lambda of: _range([kernel.threads for kernel in of])),
            _both(each, lambda of: _range([kernel.registers for kernel in of])),
            _both(each, lambda of: _range([kernel.spilled for kernel in of])),
            _both(each, lambda of: _range([round(kernel.shared / 1024, 1) for kernel in of])) + at_launch,
            _both(each, lambda of: _range([round(100 * occupancy(kernel)) for kernel in of]) + " %"),
        ]
        lines.append(f"| {family}: {name} | {len(each[0])} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _numbers(each: list[Kernel]) -> list[str]:
    return [
        _both(each, lambda kernel: str(kernel.registers)),
        _both(each, lambda kernel: str(kernel.spilled)),
        _both(each, lambda kernel: f"{kernel.shared / 1024:.1f}"),
        _both(each, lambda kernel: f"{occupancy(kernel):.0%}"),
    ]


def _both(each: list, text) -> str:
    """One text where all chips agree."""
    return " / ".join(dict.fromkeys(map(text, each))) if len(set(map(text, each))) == 1 else " / ".join(map(text, each))


def _range(values: list) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def main() -> int:
    from effattn._files import write_atomically

    parser = argparse.ArgumentParser(
        prog="python -m effattn.bench.resources", description="Write the page of GPU resources."
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu_resources.md")
    parser.add_argument("--kept", action="store_true", help="compile nothing: the page names what is missing")
    options = parser.parse_args()
    if nvcc() is None and not options.kept:
        parser.error("no nvcc on PATH or in CUDA_HOME")
    missing: list[str] = []
    kernels = (list(of(options.kept, missing)) for of in (cuda_kernels, triton_kernels))
    text = page(*kernels, missing)
    write_atomically(options.output, lambda name: Path(name).write_text(text))
    print(f"{options.output}: {text.count(chr(10))} lines")
    return 0


if __name__ == "__main__":
    from effattn._files import exit_status

    raise SystemExit(exit_status(main))
