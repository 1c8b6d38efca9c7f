"""Tile shapes of the retention kernels: by chip family, element width and the state's rows.

Chosen by ahead-of-time compiles, as in configurations.py (tests/test_triton_compile.py). No tile here was timed. Registers
spill in the scan of dQ with 256 or more rows in fp32 and with more than 256 on sm_80 and sm_120, with more than 256 rows in
fp32 everywhere, by a few in fp16 and fp32 with 128 rows, and in chunks above the table's, which a caller may ask for.
"""

from typing import NamedTuple

import torch

from . import configurations as table


class Configuration(NamedTuple):
    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    together: bool = False  # every product of a part of q at once: right where its operand passes through registers


C = Configuration

# Columns: up to 64, 128, 256 and 512 rows of a state. The scan of dQ carries two states.
_MMA = (C(64, 64, 32, 8, 2), C(64, 128, 32, 8, 2), C(32, 256, 32, 8, 2), C(16, 128, 16, 8, 2))
_MMA_TWO = (C(32, 64, 16, 8, 2), C(32, 128, 16, 8, 2), C(32, 256, 16, 8, 2), C(16, 128, 16, 8, 1))
_WGMMA = (C(64, 64, 64, 4, 2), C(64, 128, 64, 4, 2), C(64, 256, 32, 4, 2), C(64, 128, 32, 8, 1))
_WGMMA_TWO = (C(64, 64, 64, 8, 2), C(64, 128, 64, 8, 2), C(64, 256, 32, 8, 2), C(64, 128, 16, 8, 1, True))
_MFMA = (C(32, 64, 32, 4, 1), C(32, 128, 32, 8, 1), C(32, 128, 32, 8, 1), C(16, 128, 16, 8, 1))
_MFMA_TWO = (C(32, 64, 16, 4, 1), C(32, 128, 16, 8, 1), C(16, 128, 16, 8, 1), C(16, 128, 16, 8, 1))
_SINGLE = (C(16, 64, 32, 8, 1, True), C(16, 128, 16, 8, 1, True), C(16, 64, 16, 8, 1, True), C(16, 64, 16, 8, 1, True))
_SINGLE_TWO = (C(16, 64, 16, 8, 1, True), C(16, 128, 16, 8, 1, True), *(C(16, 64, 16, 8, 1, True),) * 2)
_HALF = {
    "sm_80": (_MMA, _MMA_TWO),
    "sm_90": (_WGMMA, _WGMMA_TWO),
    "sm_100": (_WGMMA, _WGMMA_TWO),
    "sm_120": (_MMA, _MMA_TWO),
    "cdna": (_MFMA, _MFMA_TWO),
}
_INTERPRETED = C(16, 64, 64, 4, 1)  # few programs, since each costs milliseconds, yet more than one chunk


def scan(query, value_dim, chunk, two_states):
    """`query`: the scan's, which has a state's rows as head_dim. `chunk`: tokens of a chunk, 0 if that is open."""
    rows = query.shape[3]
    family = table.architecture(query.device)
    column = (rows > 64) + (rows > 128) + (rows > 256)
    if family == "interpreted":
        config = _INTERPRETED
    elif query.dtype == torch.float32:
        config = (_SINGLE_TWO if two_states else _SINGLE)[column]
    else:
        config = _HALF[family][two_states][column]
        if query.dtype == torch.float16 and two_states and column:  # whose states meet their products in 32 bits
            config = config._replace(block_k=64, block_v=min(config.block_v, 32))
    tile = max(16, 1 << (chunk - 1).bit_length()) if chunk else config.chunk
    if tile > config.chunk:  # at the caller's wish
        config = config._replace(block_v=min(config.block_v, 32), num_warps=8, num_stages=1)
    block_k, block_v = min(config.block_k, table.block_d(rows)), min(config.block_v, table.block_d(value_dim))
    return config._replace(chunk=tile, block_k=block_k, block_v=block_v)


def recurrent(key_dim, value_dim):
    rows = table.block_d(key_dim)
    return C(1, rows, min(max(32, 8192 // rows), table.block_d(value_dim)), 8 if rows > 128 else 4, 1)


def precision(query):
    """As configurations.precision; fp16 meets a state, which may pass its range, in TF32."""
    if query.dtype == torch.float16 and table.architecture(query.device).startswith("sm"):
        return "tf32"
    return table.precision(query)
