"""Tile shapes, warps and pipeline depth of every engine kernel: by chip family, element width and BLOCK_D, never by a length.

Chosen by ahead-of-time compiles: none spills, and each fits its chip's shared memory (tests/test_triton_compile.py). None was
timed: `python -m effattn tune` does, and what it kept for the GPU at hand wins over these tables. A chip has two tables. Tiles of the first hold for any policy and any head_dim. Lean policies, whose terms take few registers, get the
larger tiles of the second where head_dim fills BLOCK_D, so that no load needs a mask along it.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton

from .. import _tuning


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
_MMA = {  # mma.sync: 16 rows per warp
    "forward": (C(128, 32, 8, 2), C(64, 16, 4, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(32, 32, 4, 2), C(16, 64, 8, 2), C(32, 32, 8, 1)),
    "query_gradient": (C(64, 16, 4, 2), C(64, 16, 4, 2), C(32, 16, 4, 1)),
    "parameter_gradient": (C(32, 32, 2, 1), C(32, 32, 4, 1), C(16, 16, 4, 1)),
}
_WGMMA = {  # 64 rows per warpgroup, and columns worth its while
    "forward": (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(32, 64, 4, 2), C(16, 64, 8, 2), C(32, 32, 8, 1)),
    "query_gradient": (C(128, 64, 8, 2), C(64, 16, 4, 2), C(32, 16, 4, 2)),
    "parameter_gradient": (C(64, 64, 8, 2), C(64, 64, 8, 2), C(16, 16, 4, 1)),
}
_TCGEN05 = {  # as wgmma, with accumulators in 512 columns of tensor memory
    "forward": (C(64, 64, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(32, 64, 8, 2), C(32, 32, 4, 1), C(32, 32, 8, 1)),
    "query_gradient": (C(128, 32, 8, 2), C(128, 32, 8, 2), C(64, 16, 4, 2)),
    "parameter_gradient": (C(64, 64, 8, 2), C(64, 64, 8, 1), C(16, 16, 4, 1)),
}
_MFMA = {
    "forward": (C(128, 64, 8, 2), C(64, 32, 4, 2), C(64, 32, 8, 2)),
    "key_value_gradient": (C(32, 64, 4, 2), C(32, 32, 4, 1), C(16, 32, 8, 1)),
    "query_gradient": (C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 4, 2)),
    "parameter_gradient": (C(64, 64, 8, 1), C(64, 64, 8, 1), C(32, 32, 4, 1)),
}
_FMA = {  # fp32 on NVIDIA: operands live in registers, so tiles are small
    "forward": (C(32, 32, 4, 2), C(16, 32, 8, 1), C(16, 32, 8, 1)),
    "key_value_gradient": (C(32, 32, 8, 1), C(16, 32, 8, 1), C(16, 16, 4, 1)),
    "query_gradient": (C(32, 32, 8, 1), C(16, 16, 4, 1), C(16, 16, 8, 1)),
    "parameter_gradient": (C(32, 32, 4, 1), C(32, 32, 8, 1), C(32, 32, 8, 1)),
}
_MFMA_SINGLE = {  # 512 registers a thread at 4 warps
    "forward": (C(32, 32, 4, 2), C(16, 32, 4, 1), C(16, 32, 4, 1)),
    "key_value_gradient": (C(32, 32, 4, 1), C(16, 32, 4, 1), C(16, 16, 4, 1)),
    "query_gradient": (C(32, 32, 4, 1), C(16, 32, 4, 1), C(16, 16, 4, 1)),
    "parameter_gradient": (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
}
_ROWS = {(family, "single"): _FMA for family in FAMILIES} | {
    ("sm_80", "half"): _MMA,
    ("sm_90", "half"): _WGMMA,
    ("sm_100", "half"): _TCGEN05,
    ("sm_120", "half"): _MMA,
    ("cdna", "half"): _MFMA,
    ("cdna", "single"): _MFMA_SINGLE,
}
_LEAN = {
    ("sm_80", "half"): {
        "forward": (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 2)),
        "key_value_gradient": (C(32, 64, 4, 2), C(32, 64, 8, 2), C(32, 32, 8, 1)),
        "query_gradient": (C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 4, 2)),
        "parameter_gradient": (C(32, 32, 2, 1), C(32, 32, 4, 1), C(32, 32, 4, 2)),
    },
    ("sm_90", "half"): {
        "forward": (C(128, 64, 8, 3), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        "key_value_gradient": (C(64, 64, 4, 2), C(32, 128, 8, 2), C(32, 32, 8, 1)),
        "query_gradient": (C(128, 64, 8, 2), C(64, 32, 4, 2), C(64, 16, 4, 2)),
        "parameter_gradient": (C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 1)),
    },
    ("sm_100", "half"): {
        "forward": (C(128, 64, 8, 2), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        "key_value_gradient": (C(64, 128, 8, 2), C(32, 128, 8, 2), C(32, 64, 8, 1)),
        "query_gradient": (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 1)),
        "parameter_gradient": (C(64, 64, 8, 2), C(64, 64, 8, 1), C(64, 64, 8, 1)),
    },
    ("sm_120", "half"): {
        "forward": (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 32, 8, 2)),
        "key_value_gradient": (C(32, 64, 4, 2), C(32, 64, 8, 2), C(32, 32, 8, 1)),
        "query_gradient": (C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 4, 2)),
        "parameter_gradient": (C(32, 32, 2, 1), C(32, 32, 4, 1), C(16, 16, 4, 1)),
    },
}
_HEAVY = {  # what spills in the tiles above, by what the policy says
    True: {  # two tables of relative positions
        ("sm_80", "single", "forward", 128): C(16, 32, 8, 2),
        ("cdna", "half", "forward", 64): C(128, 32, 8, 2),
    },
    "columns": {  # a number per column: where a thread owns a row, a register for each
        ("sm_100", "half", "query_gradient", 64): C(128, 32, 8, 2),
        ("sm_100", "half", "query_gradient", 128): C(128, 32, 8, 1),
    },
}
_INTERPRETED = {  # few programs, since each costs milliseconds, yet more than one tile at 65 tokens
    "forward": C(64, 32, 4, 1),
    "key_value_gradient": C(32, 64, 4, 1),
    "query_gradient": C(64, 32, 4, 1),
    "parameter_gradient": C(32, 32, 4, 1),
}


def _by_block_d(rows):
    return {kernel: dict(zip(BLOCK_DS, (row[0], row[0], *row))) for kernel, row in rows.items()}


_TABLE = {(*key, False): _by_block_d(rows) for key, rows in _ROWS.items()}
_TABLE |= {(*key, True): _by_block_d(rows) for key, rows in (_ROWS | _LEAN).items()}


def configurations():
    """Every tuned choice: {(family, "half" | "single", lean, kernel, BLOCK_D): Configuration}."""
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


BLOCKS = (16, 32, 64, 128)
WARPS, STAGES = (1, 2, 4, 8), (1, 2, 3, 4)
FREE = KERNELS[:3]  # a gradient of parameters has square tiles, whose number its partial sums are laid out for


def _is_pair(first, second):
    return lambda value: isinstance(value, tuple) and len(value) == 2 and value[0] in first and value[1] in second


TILE = _tuning.declare(
    _tuning.Choice(
        "triton.tile",
        1,
        "rows and columns of an engine kernel's tile",
        {
            "kernel": tuple(f"{owner}.{kernel}" for owner in ("engine", "toeplitz") for kernel in FREE),
            "width": ("half", "single"),
            "lean": (False, True),
            "heavy": (False, True, "columns"),
            "block_d": BLOCK_DS,
        },
        _is_pair(BLOCKS, BLOCKS),
        "gpu",
    )
)


class _AnyTile:
    """The tiles that the tables hold, and those that tuning made of them; none depends on a length."""

    def __contains__(self, config):
        return all(type(number) in (int, bool) and 0 <= number <= 1024 for number in config)

    def __repr__(self):
        return "numbers up to 1024"


class _AnyKernel:
    def __contains__(self, name):
        return name.isidentifier()


LAUNCH = _tuning.declare(
    _tuning.Choice(
        "triton.launch",
        1,
        "warps of a program and stages of its pipeline, by the configuration that the tables give",
        {
            "kernel": _AnyKernel(),
            "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
            + (torch.int8, torch.uint8, torch.bool, None),
            "config": _AnyTile(),
        },
        _is_pair(WARPS, STAGES),
        "gpu",
    )
)


def candidates(choice, default):
    """A short list of what might be faster than `default`: its neighbours."""
    first, second = default
    doubled = (first // 2, first, first * 2)
    if choice == TILE:
        allowed = BLOCKS, BLOCKS
        pairs = [(m, n) for m in doubled for n in (second // 2, second, second * 2)]
    else:
        allowed = WARPS, STAGES
        pairs = [(warps, stages) for warps in doubled for stages in (second - 1, second, second + 1)]
    return [pair for pair in pairs if pair != default and pair[0] in allowed[0] and pair[1] in allowed[1]]


asked = None
"""While tuning: a dict that collects what was looked up, (choice, features) -> the default."""


def _found(choice, device, default, *features):
    if asked is not None:
        asked[choice, features] = default
    return _tuning.find_on(device, choice, *features).value or default


def configuration(kernel, query, lean=False, heavy=False, owner="engine"):
    """The choice for a kernel of the engine, or of an `owner` that takes its tiles; `lean` and `heavy` are the policy's word
    on its registers."""
    config = _shipped(kernel, query, lean, heavy)
    if kernel not in FREE or query.device.type not in ("cuda", "cpu"):
        return config
    width = "single" if query.dtype == torch.float32 else "half"
    features = f"{owner}.{kernel}", width, bool(lean), heavy, block_d(query.shape[3])
    block_m, block_n = _found(TILE, query.device, config[:2], *features)
    return config._replace(block_m=block_m, block_n=block_n)


def _shipped(kernel, query, lean, heavy):
    width = "single" if query.dtype == torch.float32 else "half"
    head_dim = query.shape[3]
    if kernel == "row_delta":
        return C(max(16, 4096 // block_d(head_dim)), 0, 4, 1)
    family = architecture(query.device)
    if family == "interpreted":
        return _INTERPRETED[kernel]
    columns = block_d(head_dim)
    spilling = _HEAVY.get(heavy, {})
    if (family, width, kernel, columns) in spilling:
        return spilling[family, width, kernel, columns]
    return _TABLE[family, width, lean and head_dim == columns][kernel][columns]


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


def launch(kernel, programs, device, config, *arguments, fuse=True, **constants):
    """Run a kernel on a one-dimensional grid, on the current stream of the tensors' device; `fuse` lets a * b + c round once."""
    if programs == 0:
        return
    default = config.num_warps, config.num_stages
    dtype = next((argument.dtype for argument in arguments if isinstance(argument, torch.Tensor)), None)
    features = kernel.__name__, dtype, tuple(config)
    num_warps, num_stages = _found(LAUNCH, device, default, *features)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse)
