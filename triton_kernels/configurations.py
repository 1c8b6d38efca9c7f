"""Tile shapes, warps and pipeline depth of every engine kernel, keyed by chip family, element width and BLOCK_D; never by a length.

Chosen with ahead-of-time compiles: no configuration spills, and each fits its chip's shared memory (tests/test_triton_compile.py).
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton


class Configuration(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


C = Configuration
KERNELS = ("forward", "key_value_gradient", "query_gradient", "parameter_gradient")
BLOCK_DS = (16, 32, 64, 128, 256)
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120", "cdna")

# bytes of shared memory one program may use
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "cdna": 65536}

# Rows: kernel -> configurations for BLOCK_D up to 64, 128 and 256.
_HALF = {  # mma.sync: 16 rows per warp
    "forward": (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(32, 64, 4, 2), C(32, 64, 8, 2), C(32, 32, 8, 1)),
    "query_gradient": (C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 4, 2)),
    "parameter_gradient": (C(32, 32, 2, 1), C(32, 32, 4, 1), C(32, 32, 4, 2)),
}
_SINGLE = {  # plain FMAs, whose operands live in registers: small tiles
    "forward": (C(32, 32, 4, 2), C(16, 32, 8, 1), C(16, 32, 8, 1)),
    "key_value_gradient": (C(32, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 4, 1)),
    "query_gradient": (C(32, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 8, 1)),
    "parameter_gradient": (C(32, 32, 4, 1), C(32, 32, 8, 1), C(32, 32, 8, 1)),
}
_ROWS = {(family, "half"): _HALF for family in FAMILIES} | {(family, "single"): _SINGLE for family in FAMILIES}
_ROWS["sm_90", "half"] = {  # wgmma: 64 rows per warpgroup, and columns worth its while
    "forward": (C(128, 64, 8, 3), C(128, 64, 8, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(64, 64, 4, 2), C(32, 128, 8, 2), C(32, 32, 8, 1)),
    "query_gradient": (C(128, 64, 8, 2), C(64, 32, 4, 2), C(64, 16, 4, 2)),
    "parameter_gradient": (C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 1)),
}
_ROWS["sm_100", "half"] = {  # tcgen05: as wgmma, accumulators in tensor memory
    "forward": (C(128, 64, 8, 2), C(128, 64, 8, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(64, 128, 8, 2), C(32, 128, 8, 2), C(32, 64, 8, 1)),
    "query_gradient": (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 1)),
    "parameter_gradient": (C(64, 64, 8, 2), C(64, 64, 8, 1), C(64, 64, 8, 1)),
}
_ROWS["sm_120", "half"] = _HALF | {"parameter_gradient": (C(32, 32, 2, 1), C(32, 32, 4, 1), C(16, 16, 4, 1))}
_ROWS["cdna", "single"] = {  # has fp32 matrix instructions, and 512 registers a thread at 4 warps
    "forward": (C(32, 32, 4, 2), C(16, 32, 4, 1), C(16, 32, 4, 1)),
    "key_value_gradient": (C(32, 32, 4, 1), C(16, 32, 4, 1), C(16, 16, 4, 1)),
    "query_gradient": (C(32, 32, 4, 1), C(16, 32, 4, 1), C(16, 16, 4, 1)),
    "parameter_gradient": (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
}
_ROWS["cdna", "half"] = _HALF | {
    "key_value_gradient": (C(32, 64, 4, 2), C(32, 64, 8, 1), C(16, 32, 8, 1)),
    "parameter_gradient": (C(64, 64, 8, 1), C(64, 64, 8, 1), C(32, 32, 4, 1)),
}
_INTERPRETED = {  # few programs, since each costs milliseconds, yet more than one tile at 65 tokens
    "forward": (C(64, 32, 4, 1),) * 3,
    "key_value_gradient": (C(32, 64, 4, 1),) * 3,
    "query_gradient": (C(64, 32, 4, 1),) * 3,
    "parameter_gradient": (C(32, 32, 4, 1),) * 3,
}


def _by_block_d(rows):
    return {kernel: dict(zip(BLOCK_DS, (row[0], row[0], *row))) for kernel, row in rows.items()}


_TABLE = {key: _by_block_d(rows) for key, rows in _ROWS.items()}


def configurations():
    """Every tuned choice: {(family, "half" | "single", kernel, BLOCK_D): Configuration}."""
    return {
        (*key, kernel, d): config
        for key, rows in _TABLE.items()
        for kernel, by_d in rows.items()
        for d, config in by_d.items()
    }


def family_of(capability):
    """The row of the table that serves a CUDA compute capability, such as (9, 0)."""
    major, minor = capability
    if major < 8 or (major == 8 and minor in (6, 9)) or major > 10:
        return "sm_120"
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}[major]


@functools.cache
def _family_of_device(index):
    return family_of(torch.cuda.get_device_capability(index))


def architecture(device):
    if device.type == "cuda":
        return "cdna" if torch.version.hip else _family_of_device(device.index)
    return "interpreted"


def block_d(head_dim):
    return max(16, triton.next_power_of_2(head_dim))


def configuration(kernel, query):
    width = "single" if query.dtype == torch.float32 else "half"
    if kernel == "row_delta":
        return C(max(16, 4096 // block_d(query.shape[3])), 0, 4, 1)
    family = architecture(query.device)
    rows = _by_block_d(_INTERPRETED) if family == "interpreted" else _TABLE[family, width]
    return rows[kernel][block_d(query.shape[3])]


def precision(query):
    """fp32 matmuls are true fp32 unless torch's own switch allows TF32; 16-bit operands ignore this."""
    if (
        query.dtype == torch.float32
        and query.is_cuda
        and not torch.version.hip
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
    ):
        return "tf32"
    return "ieee"


def launch(kernel, programs, device, config, *arguments, **constants):
    """Run a kernel on a one-dimensional grid, on the current stream of the tensors' device."""
    if programs == 0:
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](
            *arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )
