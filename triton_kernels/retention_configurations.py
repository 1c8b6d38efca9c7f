"""Tile shapes of the retention kernels: by chip family, element width and the state's rows BLOCK_K.

Chosen by ahead-of-time compiles, as in configurations.py: none spills and each fits its chip (tests/test_triton_compile.py).
No tile here was timed.
"""

from typing import NamedTuple

import torch

from . import configurations as table

MAX_CHUNK = 128  # tokens of a chunk that the tiles hold


class Configuration(NamedTuple):
    chunk: int
    block_v: int
    num_warps: int
    num_stages: int


C = Configuration
_HALF = (C(64, 64, 4, 2), C(64, 64, 4, 2), C(64, 64, 8, 2), C(64, 32, 8, 1))
_SINGLE = (C(32, 32, 8, 1), C(32, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 8, 1))
_INTERPRETED = C(16, 64, 4, 1)  # few programs, since each costs milliseconds, yet more than one chunk


def scan(query, value_dim, chunk, measures):
    """`query`, (B, H, N, rows of the state): the scan's, which may be the op's gradient or value. `chunk`: 0 if it is open."""
    block_k = table.block_d(query.shape[3])
    family = table.architecture(query.device)
    row = _SINGLE if query.dtype == torch.float32 else _HALF
    config = _INTERPRETED if family == "interpreted" else row[(block_k > 64) + (block_k > 128) + (block_k > 256)]
    tile = max(16, 1 << (chunk - 1).bit_length()) if chunk else config.chunk
    return config._replace(chunk=tile, block_v=min(config.block_v, table.block_d(value_dim)))


def recurrent(key_dim, value_dim):
    block_k = table.block_d(key_dim)
    return C(1, min(max(32, 8192 // block_k), table.block_d(value_dim)), 8 if block_k > 128 else 4, 1)


def precision(query):
    """As configurations.precision; of 16-bit floats, how they meet a state that is kept in float32."""
    if query.dtype == torch.float16 and table.architecture(query.device).startswith("sm"):
        return "tf32"
    return table.precision(query)
