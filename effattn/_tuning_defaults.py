"""What the package ships: the choices for a CPU that was not tuned, by the instruction-set level of its kernels.

Measured on two cores of an AMD EPYC (Zen 4), torch 2.13, 2 threads. A level without a row takes the one below it that has one,
and the lowest row if there is none; vendors are not told apart, since only one was measured.

Shapes of tiles on a GPU are no part of this table. They stand in triton_kernels/*configurations.py by chip family, which
``family_of`` derives from the compute capability; they were chosen by ahead-of-time compiles and were not measured on a GPU.
"""

from __future__ import annotations

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
NEVER = 1 << 62
TILES = "triton_kernels/*configurations.py, by chip family, not measured on a GPU"

# attention.smallest_work: multiply-adds from which our kernel is faster than torch's; rows float32, bfloat16, float16;
#   columns 1, 2 to 3, 4 to 7, 8 to 15, 16 and more queries. Below, a call is all overhead, and torch's C++ front end has
#   less of it; and a block of few queries wastes our float32 row tiles.
# retention.chunk: tokens of a chunk; rows as above; columns the larger of Dk and Dv up to 16, 32, 64, 128, 256, 512.
# toeplitz.costs: direct_ns, fft_ns, double_fft_ns, scan_ns of ops/toeplitz_methods.py.
CPU = {
    "avx512_bf16": {
        "attention.smallest_work": (
            (NEVER, NEVER, 1 << 19, 1 << 19, 1 << 19),
            (1 << 16,) * 5,
            (1 << 16,) * 5,
        ),
        "retention.chunk": ((64,) * 6,) * 3,
        "toeplitz.costs": (0.0105, 0.053, 0.091, 0.052),
    },
}


def shipped(choice: str, isa: str):
    """The rows of ``choice`` for kernels of level ``isa``."""
    below = LEVELS[: LEVELS.index(isa) + 1] if isa in LEVELS else ()
    for level in (*reversed(below), *LEVELS):
        if choice in CPU.get(level, {}):
            return CPU[level][choice]
    raise KeyError(f"no default of {choice}")
