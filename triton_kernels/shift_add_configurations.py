"""Tile shapes of the shift-add kernels: by chip family, element width and shape.

Chosen by ahead-of-time compiles, as in configurations.py: none spills and each fits its chip (tests/test_triton_compile.py).
"""

from typing import NamedTuple

import torch
import triton

from . import configurations as table


class Configuration(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


C = Configuration

# ---- linear layers: tiles from the largest to the one for a few rows ----

FILLED = 128  # programs that occupy a chip; fixed, so that results do not depend on the device
_MMA = {
    "forward": (C(128, 128, 64, 8, 3), C(64, 64, 64, 4, 3), C(16, 64, 128, 4, 3)),
    "backward": (C(128, 64, 128, 8, 2), C(64, 64, 64, 4, 3), C(16, 64, 128, 4, 2)),
}
_WGMMA = {  # wide tiles: a weight expanded once is multiplied by every row of the tile
    "forward": (C(256, 128, 64, 8, 3), C(128, 128, 64, 8, 3), C(64, 64, 64, 4, 4), C(16, 64, 128, 4, 4)),
    "backward": (C(128, 64, 128, 8, 3), C(64, 64, 64, 4, 3), C(16, 64, 128, 4, 3)),
}
_SINGLE = {
    "forward": (C(64, 64, 32, 8, 2), C(16, 64, 32, 4, 2)),
    "backward": (C(64, 32, 64, 8, 2), C(16, 32, 64, 4, 2)),
}
_BYTE = {"forward": (C(128, 128, 64, 8, 3), C(64, 64, 128, 4, 3), C(16, 64, 128, 4, 3))}
_LOOSE = {  # rows whose length is not a multiple of 16: loaded element by element, through registers
    "forward": (C(128, 64, 32, 8, 1), C(64, 64, 32, 8, 1), C(16, 64, 32, 4, 1)),
    "backward": (C(64, 32, 64, 8, 1), C(16, 32, 64, 4, 1)),
}
_MFMA = {
    "forward": (C(128, 128, 64, 8, 2), C(64, 64, 64, 4, 2), C(16, 64, 128, 4, 2)),
    "backward": (C(128, 64, 128, 8, 2), C(64, 64, 64, 4, 2), C(16, 64, 128, 4, 2)),
}
_LINEAR = {(family, "half"): _MMA for family in table.FAMILIES}
_LINEAR |= {("sm_90", "half"): _WGMMA, ("sm_100", "half"): _WGMMA, ("cdna", "half"): _MFMA}
_LINEAR |= {(family, "single"): _SINGLE for family in table.FAMILIES}
_LINEAR |= {(family, "byte"): _BYTE for family in table.FAMILIES}

ROWS = C(8, 0, 128, 4, 1)  # quantise_rows: block_m rows, block_k elements at a time
FIXED = C(32, 64, 0, 4, 1)

# ---- attention: rows by BLOCK_D up to 64, 128 and 256; context's tile is block_m squared, over block_k tokens ----

_ROWS = (C(64, 0, 64, 4, 2), C(64, 0, 64, 8, 2), C(64, 0, 32, 8, 2))
_ROWS_SINGLE = (C(32, 0, 32, 4, 1), C(32, 0, 32, 8, 1), C(16, 0, 32, 8, 1))
_ATTENTION = {
    "half": {
        "context": (C(64, 0, 64, 4, 3),) * 3,
        "mix": _ROWS,
        "query_key_gradient": _ROWS,
    },
    "single": {
        "context": (C(64, 0, 32, 8, 2),) * 3,
        "mix": _ROWS_SINGLE,
        "query_key_gradient": _ROWS_SINGLE,
    },
}
LANES = C(0, 0, 256, 4, 1)  # reductions of partial sums

_INTERPRETED = C(
    32, 32, 32, 4, 1
)  # few programs, since each costs milliseconds, yet more than one tile on small shapes


def _tiles(family, operand, aligned):
    width = {4: "single", 2: "half", 1: "byte"}[operand.element_size()]
    return _LINEAR[family, width] if aligned or width == "single" else _LOOSE


def linear(kernel, operand, codes, columns):
    """The tile of a linear kernel: the largest that is filled and whose programs fill a chip; else the smallest that is filled."""
    family = table.architecture(operand.device)
    if family == "interpreted":
        return _INTERPRETED
    rows = operand.shape[0]
    aligned = operand.stride(1) == 1 and operand.stride(0) % 16 == 0 and codes.shape[1] % 16 == 0
    *large, few = _tiles(family, operand, aligned)[kernel]
    large = [tile for tile in large if tile.block_m < 2 * rows]
    for tile in large:
        width = tile.block_n if kernel == "forward" else tile.block_k
        if triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, width) >= FILLED:
            return tile
    return large[-1] if large else few


def attention(kernel, query):
    """The tile of an attention kernel. Its rows divide a chunk of tokens."""
    block_d = table.block_d(query.shape[3])
    if table.architecture(query.device) == "interpreted":
        config = _INTERPRETED
    elif kernel == "row_statistics":
        config = C(max(8, 2048 // block_d), 0, 0, 4, 1)
    else:
        by_d = _ATTENTION["single" if query.dtype == torch.float32 else "half"][kernel]
        config = by_d[(block_d > 64) + (block_d > 128)]
    return config._replace(block_m=min(config.block_m, block_d)) if kernel == "context" else config
