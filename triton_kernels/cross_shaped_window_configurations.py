"""Tile shapes of the window kernels: by element width, BLOCK_D, and the number of slots rounded up to a power of two.

Chosen by ahead-of-time compiles, as in configurations.py, at head_dim 24, 30 and 32 and the published windows
(tests/test_triton_compile.py). No tile here was timed.
A call is lean without bias and masks, biased or weighs where a bias is all it has, else rich (shift, overlap, padding mask).
"""

import torch
import triton

from . import configurations as table
from .configurations import Configuration as C

# Columns: BLOCK_D up to 32, 64, 128 and 256.
_ONE_TILE = {"half": (64, 64, 32, 16), "single": (32, 16, 16, 0)}  # most slots of a window whose backward is one tile
_HALF = {
    "window_forward": (C(64, 64, 4, 1), C(64, 32, 8, 1), C(32, 32, 8, 1), C(32, 32, 8, 1)),
    "window_key_value_gradient": (C(32, 64, 4, 1), C(32, 64, 8, 1), C(16, 32, 8, 1), C(32, 32, 8, 1)),
    "window_query_gradient": (C(64, 64, 4, 2), C(64, 32, 4, 2), C(32, 32, 8, 1), C(32, 16, 4, 1)),
    "window_bias_gradient": (C(64, 32, 4, 1), C(32, 32, 4, 1), C(16, 16, 8, 1), C(16, 16, 4, 1)),
}
_HALF_RICH = _HALF | {
    "window_forward": (C(64, 32, 4, 1), C(64, 32, 8, 1), C(32, 32, 8, 1), C(32, 32, 8, 1)),
    "window_query_gradient": (C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 8, 1), C(32, 16, 4, 1)),
}
_SINGLE = {
    "window_forward": (C(16, 32, 4, 1), C(16, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 8, 1)),
    "window_key_value_gradient": (C(32, 32, 4, 1), C(32, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 4, 1)),
    "window_query_gradient": (C(32, 32, 4, 1), C(32, 32, 8, 1), C(16, 16, 4, 1), C(16, 16, 8, 1)),
    "window_bias_gradient": (C(32, 32, 4, 1), C(32, 32, 8, 1), C(16, 16, 8, 1), C(16, 16, 4, 1)),
}
_TABLE = {("half", True): _HALF, ("half", False): _HALF_RICH, ("single", True): _SINGLE, ("single", False): _SINGLE}
_ALL_BIASED = ("biased", "weighs", "rich")
_EXCEPTIONS = {  # where ptxas would rather spill two registers than give up an occupancy step
    (family, width, kind, kernel, column): config
    for family, width, kinds, kernel, column, config in (
        ("sm_80", "half", ("lean", *_ALL_BIASED), "window_key_value_gradient", 0, C(32, 64, 8, 1)),
        ("sm_80", "half", ("biased", "weighs"), "window_forward", 0, C(64, 16, 4, 1)),
        ("sm_80", "half", ("weighs",), "window_bias_gradient", 0, C(64, 32, 4, 2)),
        *((f, "single", ("weighs",), "window_key_value_gradient", 0, C(32, 32, 8, 1)) for f in table.FAMILIES[:4]),
        ("sm_100", "half", ("lean", "biased"), "window_key_value_gradient", 0, C(32, 64, 4, 2)),
        ("sm_100", "half", _ALL_BIASED, "window_forward", 0, C(64, 16, 4, 1)),
        ("sm_120", "half", _ALL_BIASED, "window_forward", 0, C(64, 16, 4, 1)),
    )
    for kind in kinds
}
_INTERPRETED = C(32, 32, 4, 1)


def _row(query):
    """(interpreted, width, column)"""
    block_d = table.block_d(query.shape[3])
    column = (block_d > 32) + (block_d > 64) + (block_d > 128)
    width = "single" if query.dtype == torch.float32 else "half"
    return table.architecture(query.device) == "interpreted", width, column


def _rounded(count):
    return max(16, triton.next_power_of_2(count))


def tile(kernel, query, kind, unit):
    """Rows that are read by few elements at a time (unit) take more registers: no prefetch, and a smaller tile."""
    interpreted, width, column = _row(query)
    if interpreted:
        return _INTERPRETED
    column += unit == 1 and column < 2
    family = table.architecture(query.device)
    usual = _TABLE[width, kind == "lean"][kernel][column]
    config = _EXCEPTIONS.get((family, width, kind, kernel, column), usual)
    return config if unit >= 4 else config._replace(num_stages=1)


def fitted(kernel, query, slots, keys, kind, unit):
    """Windows that need no whole tile get a smaller one."""
    config = tile(kernel, query, kind, unit)
    rows, columns = (slots, keys) if kernel != "window_key_value_gradient" else (slots, slots)
    block_m, block_n = min(config.block_m, _rounded(rows)), min(config.block_n, _rounded(columns))
    owned = block_m / config.block_m
    if kernel != "window_forward":
        owned *= block_n / config.block_n
    fewest = (
        2 if query.dtype == torch.float32 and kernel != "window_forward" else 1
    )  # for the registers of fp32 operands
    return C(block_m, block_n, max(fewest, int(config.num_warps * owned)), config.num_stages)


def one_tile(query, slots):
    """The backward's tile for windows of one tile, else None."""
    interpreted, width, column = _row(query)
    if slots > (_INTERPRETED.block_m if interpreted else _ONE_TILE[width][column]):
        return None
    block = _rounded(slots)
    return C(block, block, max(1, block // (16 if width == "half" else 8)), 1)


def lepe(value, unit):
    rows = (1024 if unit > 1 else 512) // table.block_d(value.shape[3])
    return C(max(4, rows), 0, 4, 1)
