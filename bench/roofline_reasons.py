"""Why rows of ours stay below half of the ceiling, and what was tried: one reason per class of operators and shapes.

The first reason that holds for a row is its own. Each has to rest on a measurement: docs/cpu_engine.md, the family's page,
or the profiles that the page names. tests/test_roofline.py fails if a low row has none, and if a reason has no low row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

NOTHING = "No attempt."
QUANTISING = (
    "Since the rows were recorded codes are made from the bits of float32 and not from logarithms: 589 to 249 ms of one thread "
    "for 4096 x 4096, on the machine of the profiles; not measured again."
)
SHORT = 64  # keys of a window up to which scores stay in registers
WINDOWS = ("cross_shaped_window", "shifted_window", "overlapping_window", "manhattan", "manhattan decomposed")
LCE = "manhattan decomposed, LCE"
TRAINING = "forward+backward"


class Reason(NamedTuple):
    what: str
    holds: Callable[..., bool]  # of a roofline.Point
    why: str
    tried: str


def _is(point, *operators: str, training: bool | None = None, dtype: str = "") -> bool:
    row = point.row
    return (
        row["operator"] in operators
        and (training is None or training == (row["direction"] == TRAINING))
        and dtype in row["dtype"]
    )


def _mixture_at_1024(point) -> bool:
    return _is(point, "gaussian_mixture", dtype="bfloat16") and point.row["shape"][2] == 1024


REASONS_OF_WINDOWS = (
    Reason(
        f"windows of at most {SHORT} keys, forward",
        lambda p: _is(p, *WINDOWS, training=False) and p.keys <= SHORT,
        "A query's row costs bias, maximum, exponential and packing beside products of few keys and channels: a line of 56 queries, 56 keys and 16 channels takes 4 us, its multiply-adds 1.7 at peak. "
        "And rows of a window are 64 to 128 bytes of one head, apart in memory: profiles have 21 to 39 % of the kernel in fetching them, and contiguous tensors "
        "instead of views of one qkv projection save 20 to 27 %.",
        "Weights made in registers, rows fetched ahead, logarithms in vectors: Swin's 7 x 7 went from 3.74 to 2.93 ms of one thread, decomposed 56 x 56 from "
        "19.0 to 16.3 ([notes](cpu_engine.md#short-windows)). CSWin's and Swin's rows were recorded before.",
    ),
    Reason(
        f"windows of at most {SHORT} keys, forward + backward",
        lambda p: _is(p, *WINDOWS, training=True) and p.keys <= SHORT,
        "Fetching rows, packing them and storing gradients take 33 to 39 % of the kernel in profiles of Swin's and CSWin-B's second stages and decomposed 14 x 14; and gradients of "
        "scores are made in a pass of their own between the products.",
        NOTHING,
    ),
    Reason(
        f"windows of more than {SHORT} keys and head_dim up to 32",
        lambda p: _is(p, *WINDOWS) and p.keys > SHORT,
        "A score has 4 D FLOPs but bias, maximum, exponential and sum whatever D is, which weigh two to three times as much as at D = 64; and the product with "
        "values has 2 vectors of columns at D = 24 to 32, 12 multiply-adds for 8 loads a step where D = 64 has 24 for 10.",
        "Half a register for the last 8 columns, so that D = 24 computes no padding (`half_tail` in `csrc/cpu/gemm.h`).",
    ),
    Reason(
        "decomposed Manhattan attention with LCE",
        lambda p: _is(p, LCE),
        "Two passes of windows of at most 56 keys, which are below half themselves, and a convolution that reads value again: in a profile of stage 3 it is 30 % of the kernels' time.",
        NOTHING,
    ),
)

BELOW = (
    *REASONS_OF_WINDOWS,
    Reason(
        "Gaussian mixture, bfloat16, 1024 tokens",
        _mixture_at_1024,
        "Not explained: 16.5 ms in two runs, where the engine's notes have 9.2 ms and training, which contains it, runs at 68 % of the ceiling.",
        "Since the row was recorded copies around the kernel are gone; not measured again.",
    ),
    Reason(
        "plain attention, 197 tokens, bfloat16, training",
        lambda p: _is(p, "plain", training=True, dtype="bfloat16") and p.row["shape"][2] == 197,
        "Not explained, and disturbed: 24.9 ms with quartiles 20 % apart, where the engine's notes have 11.9 ms and the Gaussian mixture, which does more, takes 14.8 ms.",
        NOTHING,
    ),
    Reason(
        "Gaussian mixture and free masks, 197 tokens",
        lambda p: _is(p, "gaussian_mixture", "masked_product") and p.row["shape"][2] == 197,
        "What is outside of the products' tiles, packing above all, is paid per head for 197 queries: a third of a float32 profile, a tenth at 1024 tokens, and no less where "
        "bfloat16 halves the products. A dense weight is read once per batch element and head.",
        "Mask rows fetched ahead (282 to 238 ms in bfloat16 with a float32 mask at 4096); rows of bfloat16 copied by vectors: nothing measurable "
        "([notes](cpu_engine.md#forward)).",
    ),
    Reason(
        "size-weighted attention, 101 tokens",
        lambda p: _is(p, "size_weighted_attention"),
        "What is outside of the products' tiles, packing above all, is paid per head for 101 queries: half of a profile, a tenth of plain attention's at 1024 tokens.",
        NOTHING,
    ),
    Reason(
        "retention, bidirectional",
        lambda p: _is(p, "bidirectional"),
        "FLOPs are counted as of the causal form; two directions keep two states, and reading and updating them is 1.5 times as much. A profile has 57 % of the forward there.",
        NOTHING,
    ),
    Reason(
        "retention, results of 32 MB and more",
        lambda p: _is(p, "retention") and p.row["shape"][2] >= 16384,
        "Results of that size are mapped anew at every call and the system clears their pages first: with an allocator that keeps them (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`) "
        "the forward of 65536 tokens took 77 ms instead of 222, of 16384 tokens 20 instead of 65, in one run each.",
        "Streaming stores, in the one-token step, which has the same cause: nothing ([notes](cpu_engine.md#retention)).",
    ),
    Reason(
        "retention, training, on two fp32 units",
        lambda p: _is(p, "retention", training=True),
        "The peak is twice that of the other machine, the traffic is not: by the prices of [its fit](../bench/results/intel-xeon-family-6-model-167-2-cores/scaling.json) rows are read and gradients written in 1.3 of 4.1 ms at 1024 tokens, 0.6 are per token "
        "and per call, products the rest.",
        NOTHING,
    ),
    Reason(
        "Gaussian mixture, 256 tokens, training",
        lambda p: _is(p, "gaussian_mixture", training=True) and p.row["shape"][2] == 256,
        "By the prices of its fit 0.9 of 2.5 ms are per call, per token and per channel: packing, and parameters' gradients.",
        NOTHING,
    ),
    Reason(
        "shift-add attention, float32",
        lambda p: _is(p, "attention", dtype="float32"),
        "By the prices of its fit a token costs 34 ns (110 in training) beside its products: 0.21 of 0.51 ms at 784 tokens, 0.69 of 2.75 in training, on a machine whose peak is twice that of the other.",
        NOTHING,
    ),
    Reason(
        "match and merge, up to 1024 tokens",
        lambda p: _is(p, "match and merge") and p.row["shape"][2] <= 1024,
        "Merging, which moves rows, is 39 % of the time of one thread at 256 tokens and 25 % at 1024, where the ceiling counts the products of matching alone.",
        "Matching by the fp32 kernels on Intel, whose products of bf16 pairs are slower: 1.17 to 0.79 ms at 1024 tokens, 169 to 118 at 16384.",
    ),
    Reason(
        "shift-add attention, bfloat16",
        lambda p: _is(p, "attention", dtype="bfloat16"),
        "Sums of selected rows are computed in float32, at half the peak that the ceiling is taken from; a profile has another 17 % in turning rows to float32. The forward of 32 x 5 x 196 is not explained: "
        "7.2 ms where float32 takes 3.0, while on the machine of the profiles bfloat16 was the faster one.",
        NOTHING,
    ),
    Reason(
        "shift linear layer, training one row",
        lambda p: _is(p, "linear", training=True) and p.row["shape"][2] == 1,
        "Nearly all of it is quantising the dense weight anew, 16.8 million elements in tensor operations, for one row of input.",
        QUANTISING,
    ),
    Reason(
        "shift linear layer, training many rows",
        lambda p: _is(p, "linear", training=True) and p.row["shape"][2] > 1,
        "The weight is quantised anew by PyTorch's tensor operations: about half of the time in a profile of 784 x 128 -> 1024.",
        QUANTISING,
    ),
    Reason(
        "shift linear layer, many rows",
        lambda p: _is(p, "linear", training=False) and p.row["shape"][2] > 1,
        "Not explained: the layers of as many FLOPs beside it are above half, and this row is noisy, quartiles 41 % apart.",
        NOTHING,
    ),
    Reason(
        "product of bits",
        lambda p: _is(p, "binary_matmul"),
        "Bound by writing 4 bytes a score into a new tensor, whose pages the system clears first: in a profile 62 % of the time is the system's.",
        "Streaming stores, in the one-token step of retention, which has the same cause: nothing ([notes](cpu_engine.md#retention)).",
    ),
    Reason(
        "kernelised attention by transforms",
        lambda p: _is(p, "kernelized_rpe", "kernelized_rpe long") and p.row["shape"][2] > 1024,
        "A transform is additions and multiplications that mostly do not fuse: 30 % of those in its compiled code are multiply-adds, so its mix of instructions "
        "does 1.3 FLOPs where the peak does 2.",
        "The last step, the product of spectra and the first step back meet in registers; halves that are zero are not computed ([tour](tours/fft.md)).",
    ),
    Reason(
        "kernelised attention, 512 tokens",
        lambda p: _is(p, "kernelized_rpe") and p.row["shape"][2] <= 1024,
        "Features of queries and keys are 8 % of the FLOPs and 22 % of a profile: rows are loaded, exponentials taken, features stored. With twice the tokens, four times the "
        "tiles, it is 71 %.",
        NOTHING,
    ),
    Reason(
        "kernelised attention, clipped bias",
        lambda p: _is(p, "kernelized_rpe clipped"),
        "In a profile tiles near the diagonal are 40 % and states 12 %; loading rows and making features takes 32 %, though features are 11 % of the FLOPs.",
        NOTHING,
    ),
)

ABOVE = (
    Reason(
        "match and merge, 4096 tokens",
        lambda p: _is(p, "match and merge"),
        "similarities are computed in low precision, with a proven bound on the error, at a higher peak than float32's",
        "",
    ),
    Reason(
        "retention_step, one sequence",
        lambda p: _is(p, "retention_step"),
        "its state of 7 MB stays in the cache, copying does not",
        "",
    ),
    Reason(
        "shift-add attention",
        lambda p: _is(p, "attention"),
        "tables of sums of four rows leave a quarter of the counted additions",
        "",
    ),
)
