"""Compiles, with no GPU, exactly the kernels that a launcher would start: run as a script, in a process without TRITON_INTERPRET.

    python triton_compiler.py CASES.json RESULTS.json

A case names an operation, an architecture, a dtype and a head_dim (of shift_linear: the rows; of token merging: the channels). The launcher runs on meta tensors with `launch` replaced by a recorder; each
recorded launch is specialised as Triton's own launcher would do it and compiled for the case's target.
"""

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from effattn.triton_kernels import (
    attention,
    configurations,
    cross_shaped_window,
    feature_map,
    gaussian_mixture,
    local_enhancement,
    retention,
    shift_add,
    size_weighted_attention,
    soft_merge,
    toeplitz,
    token_matching,
    token_merging,
    urpe,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "cdna": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATIONS = (
    "gaussian_mixture",
    "masked_product",
    "attention",
    "attention_causal",
    "attention_boolean",
    "attention_additive",
    "size_weighted_attention",
    "shift_linear",
    "shift_linear_5bit",
    "shift_linear_int8",
    "shift_linear_fixed",
    "shift_linear_odd",
    "shift_add_published",
    "shift_add_mean_threshold",
    "shift_add_per_head",
    "shift_add_sign",
)
WINDOWS = {  # operation -> grid, window, second window, shift, overlap, mask_padding, bias, LePE
    "window_swin_7": (56, (7, 7), (7, 7), 3, 0, False, True, False),  # 49 slots
    "window_swin_12": (48, (12, 12), (12, 12), 6, 0, False, True, False),  # 144
    "window_masked": (50, (7, 7), (7, 7), 3, 0, True, True, True),  # all that a small window may have
    "window_masked_16": (50, (16, 16), (16, 16), 8, 0, True, True, True),  # all that a large one may have
    "window_hat": (64, (16, 16), (16, 16), 8, 0, False, True, False),  # 256
    "window_overlapping": (64, (16, 16), (16, 16), 0, 4, False, True, False),  # 256 queries, 576 keys
    "window_stripes_1": (56, (56, 1), (1, 56), 0, 0, False, False, True),  # 56
    "window_stripes_2": (48, (48, 2), (2, 48), 0, 0, False, False, True),  # 96
    "window_stripes_7": (14, (14, 7), (7, 14), 0, 0, False, False, True),  # 98
    "window_stripes_12": (24, (24, 12), (12, 24), 0, 0, False, False, True),  # 288
    "window_whole_14": (14, (14, 14), (14, 14), 0, 0, False, False, True),  # 196
}
MANHATTAN = {  # operation -> grid, window, prefix tokens, whether the bias weighs
    "manhattan_rows_56": (56, (1, 56), 0, False),
    "manhattan_columns_28": (28, (28, 1), 0, False),
    "manhattan_rows_14": (14, (1, 14), 0, False),
    "manhattan_whole_7": (7, (7, 7), 0, False),
    "manhattan_whole_14": (14, (14, 14), 0, False),
    "manhattan_prefix_14": (14, (14, 14), 1, False),
    "manhattan_weights_56": (56, (56, 1), 0, True),
    "manhattan_weights_7": (7, (7, 7), 0, True),
    "manhattan_weights_prefix_14": (14, (14, 14), 1, True),
}
ENHANCEMENTS = ("local_enhancement_3", "local_enhancement_5", "local_enhancement_9")
RETENTION = {  # operation -> head_dim of value for one of query, is_causal, chunk_size
    "retention": (lambda head_dim: head_dim, True, 0),
    "retention_wide": (lambda head_dim: 2 * head_dim, True, 0),
    "retention_bidirectional": (lambda head_dim: head_dim, False, 0),
    "retention_recurrent": (lambda head_dim: 2 * head_dim, True, 1),
}
OPERATIONS += (*WINDOWS, *MANHATTAN, *ENHANCEMENTS, *RETENTION)
TOEPLITZ = {  # operation -> features for a head_dim, grid, is_causal
    "toeplitz": (lambda head_dim: head_dim, (1, 1024), False),
    "toeplitz_32": (lambda head_dim: 32, (32, 32), False),
    "toeplitz_causal": (lambda head_dim: head_dim, (1, 1000), True),
}

URPE = {  # operation -> grid, coefficient, bias, is_causal
    "urpe": ((1, 1024), True, True, False),
    "urpe_causal": ((1, 1024), True, True, True),
    "urpe_grid": ((32, 32), True, True, False),
    "urpe_grid_causal": ((32, 32), True, True, True),
    "urpe_coefficient": ((1, 1024), True, False, False),
    "urpe_bias": ((1, 1024), False, True, False),
}
FEATURE_MAPS = {  # operation -> directions, trigonometric, normalize, shift
    "feature_map": (64, False, True, 1),
    "feature_map_256": (256, False, False, 2),
    "feature_map_trigonometric": (128, True, False, 0),
}
SOFT_MERGE = {"soft_merge": 160, "soft_merge_odd": 157, "soft_merge_few": 8, "soft_merge_transposed": 157}  # -> outputs
OPERATIONS += (*TOEPLITZ, *FEATURE_MAPS, *URPE, *SOFT_MERGE)
MATCHINGS = {  # operation -> whether sizes, protected tokens, distill_token, padded
    "token_matching": (True, 1, False, True),
    "token_matching_published": (False, 0, False, False),
    "token_matching_distill": (False, 2, True, False),
}
MERGES = ("token_merge_mean", "token_merge_max", "token_merge_weighted", "token_unmerge")
OPERATIONS += (*TOEPLITZ, *FEATURE_MAPS, *URPE, *MATCHINGS, *MERGES)
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "IGMMA", "IMMA", "UTCIMMA", "FFMA")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def make(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _run_linear(operation, dtype, rows):
    """shift_linear's launchers on meta tensors of so many rows, 1024 -> 4096 features (odd: 1021 -> 4093)."""
    kind = operation.rpartition("_")[2]
    bits, activation = 5 if kind == "5bit" else 4, {"int8": 1, "fixed": 2}.get(kind, 0)
    features, outputs = (1021, 4093) if kind == "odd" else (1024, 4096)
    codes = make(outputs, -(-features // (1 if bits == 5 else 2)), dtype=torch.uint8)
    bias = make(outputs, dtype=torch.float32)
    scale = None if kind == "fixed" else bias
    shift_add.shift_linear_fwd(make(rows, features, dtype=dtype), codes, scale, bias, bits, activation)
    shift_add.shift_linear_bwd(make(rows, outputs, dtype=dtype), codes, scale, features, bits)


def _run_windows(operation, dtype, head_dim):
    """Forward and backward launchers of window attention at its published shape, batch 8 and 4 heads."""
    if operation in MANHATTAN:
        grid, window, prefix, weighs = MANHATTAN[operation]
        second, shift, overlap, mask_padding, has_bias, has_lepe = window, 0, 0, False, True, False
    else:
        grid, window, second, shift, overlap, mask_padding, has_bias, has_lepe = WINDOWS[operation]
        prefix, weighs = 0, False
    batch, heads = 8, 4
    query, key, value, grad_output = (make(batch, heads, prefix + grid * grid, head_dim, dtype=dtype) for _ in range(4))
    rows, columns = (2 * size + 2 * overlap - 1 for size in window)
    bias = make(heads, rows, columns, dtype=torch.float32) if has_bias else None
    weight = make(heads, 9, head_dim, dtype=torch.float32) if has_lepe else None
    lepe_bias = make(heads, head_dim, dtype=torch.float32) if has_lepe else None
    tensors = (query, key, value, bias, weight, lepe_bias)
    options = (
        grid,
        grid,
        *window,
        *second,
        shift,
        shift,
        overlap,
        overlap,
        prefix,
        mask_padding,
        weighs,
        head_dim**-0.5,
    )
    saved = cross_shaped_window.window_fwd(*tensors, *options)
    cross_shaped_window.window_bwd(grad_output, *tensors, *saved, *options)


def _run_enhancement(operation, dtype, head_dim):
    """local_enhancement's launchers on a grid of 56 x 56 after a class token."""
    size = int(operation.rpartition("_")[2])
    attention, value, grad_output = (make(8, 4, 1 + 56 * 56, head_dim, dtype=dtype) for _ in range(3))
    weight, bias = make(4, head_dim, size * size, dtype=torch.float32), make(4, head_dim, dtype=torch.float32)
    options = (56, 56, 1, size)
    local_enhancement.local_enhancement_fwd(attention, value, weight, bias, *options)
    local_enhancement.local_enhancement_bwd(grad_output, attention, value, weight, bias, *options)


def _run_retention(operation, dtype, head_dim):
    """Forward and backward launchers of (2, 4, 1024, head_dim); with states, or packed and with a row scale if there are none."""
    value_dim, is_causal, chunk = RETENTION[operation]
    value_dim = value_dim(head_dim)
    batch, heads, tokens = 2 if is_causal else 1, 4, 1024
    query, key = (make(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(2))
    value, grad_output = (make(batch, heads, tokens, value_dim, dtype=dtype) for _ in range(2))
    state = rows = bounds = None
    if is_causal:
        state = make(batch, heads, head_dim, value_dim, dtype=torch.float32)
    else:
        rows, bounds = make(batch, heads, tokens, dtype=torch.float32), make(3, dtype=torch.int32)
    arguments = (query, key, value, make(heads, dtype=torch.float32), state, rows, bounds)
    options = (is_causal, chunk, is_causal, head_dim**-0.5)
    retention.retention_fwd(*arguments, *options)
    retention.retention_bwd(grad_output, state, *arguments, *options)


def _run_toeplitz(operation, dtype, head_dim):
    """Forward and backward launchers of (2, 4, h w, head_dim)."""
    features, grid, is_causal = TOEPLITZ[operation]
    tokens = grid[0] * grid[1]
    query, key = (make(2, 4, tokens, features(head_dim), dtype=dtype) for _ in range(2))
    value, grad_output = (make(2, 4, tokens, head_dim, dtype=dtype) for _ in range(2))
    bias = make(4, (2 * grid[0] - 1) * (2 * grid[1] - 1), dtype=torch.float32)
    arguments, options = (query, key, value, bias, None), (*grid, is_causal, 1, 0.0)
    saved = toeplitz.toeplitz_fwd(*arguments, *options)
    toeplitz.toeplitz_bwd(grad_output, *arguments, *saved, *options)


def _run_urpe(operation, dtype, head_dim):
    """Forward and backward launchers of (2, 4, 1024, head_dim)."""
    (grid_h, grid_w), *present, is_causal = URPE[operation]
    query, key, value, grad_output = (make(2, 4, grid_h * grid_w, head_dim, dtype=dtype) for _ in range(4))
    entries = make(4, (2 * grid_h - 1) * (2 * grid_w - 1), dtype=torch.float32)
    tensors = (query, key, value, *(entries if given else None for given in present))
    options = (grid_h, grid_w, is_causal, head_dim**-0.5)
    urpe.relative_bwd(grad_output, *tensors, *urpe.relative_fwd(*tensors, *options), *options)


def _run_features(operation, dtype, head_dim):
    """Forward and backward launchers of feature_map, (2, 4, 1024, head_dim), masked."""
    directions, trigonometric, normalize, shift = FEATURE_MAPS[operation]
    x, projection = make(2, 4, 1024, head_dim, dtype=dtype), make(4, directions, head_dim, dtype=torch.float32)
    arguments, options = (x, projection, make(2, 1024, dtype=torch.bool)), (trigonometric, normalize, shift)
    features = feature_map.feature_map_fwd(*arguments, *options)
    feature_map.feature_map_bwd(torch.empty_like(features), *arguments, features, *options)


def _run_soft_merge(operation, dtype, channels):
    """Forward and backward launchers of soft_merge, 197 tokens; transposed: logits whose tokens are neighbours."""
    outputs = SOFT_MERGE[operation]
    tokens, logits = make(8, 197, channels, dtype=dtype), make(8, 197, outputs, dtype=dtype)
    if operation == "soft_merge_transposed":
        logits = make(8, outputs, 197, dtype=dtype).mT
    saved = soft_merge.soft_merge_fwd(tokens, logits)
    soft_merge.soft_merge_bwd(torch.empty_like(saved[0]), tokens, logits, *saved)


def _run_matching(operation, dtype, dims):
    """The launcher of bipartite_match at ViT-S: 197 tokens, of which 16 pairs are merged."""
    has_sizes, num_protected, distill_token, padded = MATCHINGS[operation]
    metric, sizes = make(8, 197, dims, dtype=dtype), make(8, 197, dtype=torch.float32) if has_sizes else None
    options = (16, num_protected, distill_token, 0.5 if padded else -2.0, padded)
    token_matching.bipartite_match(metric, sizes, *options)


def _run_merges(operation, dtype, channels):
    """Forward and backward launchers, from 197 tokens to 181."""
    x, grad, output = (make(8, tokens, channels, dtype=dtype) for tokens in (197, 181, 181))
    plan = [make(8, count, dtype=torch.int32) for count in (197, 197, 182)]
    if operation == "token_unmerge":
        token_merging.token_unmerge_fwd(grad, *plan)
        token_merging.token_unmerge_bwd(x, grad, *plan)
    elif operation == "token_merge_weighted":
        sizes, merged_sizes = (make(8, tokens, dtype=torch.float32) for tokens in (197, 181))
        token_merging.token_merge_weighted_fwd(x, *plan, x, sizes, True)
        token_merging.token_merge_weighted_bwd(grad, merged_sizes, x, *plan, x, sizes, output, True)
    else:
        mode = 2 if operation == "token_merge_max" else 0
        token_merging.token_merge_fwd(x, *plan, mode)
        token_merging.token_merge_bwd(grad, x, *plan, output, mode)


def _run(operation, dtype, head_dim):
    """The operation's forward and backward launchers on (2, 4, 197, head_dim) meta tensors."""
    if operation.startswith("shift_linear"):
        return _run_linear(operation, dtype, head_dim)
    if operation in ENHANCEMENTS:
        return _run_enhancement(operation, dtype, head_dim)
    if operation in WINDOWS or operation in MANHATTAN:
        return _run_windows(operation, dtype, head_dim)
    if operation in RETENTION:
        return _run_retention(operation, dtype, head_dim)
    if operation in TOEPLITZ:
        return _run_toeplitz(operation, dtype, head_dim)
    if operation in URPE:
        return _run_urpe(operation, dtype, head_dim)
    if operation in FEATURE_MAPS:
        return _run_features(operation, dtype, head_dim)
    if operation in SOFT_MERGE:
        return _run_soft_merge(operation, dtype, head_dim)
    if operation in MATCHINGS:
        return _run_matching(operation, dtype, head_dim)
    if operation in MERGES:
        return _run_merges(operation, dtype, head_dim)

    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, heads, grid, prefix = 2, 4, 14, 1
    tokens = prefix + grid * grid
    query, key, value, grad_output, output = (make(batch, heads, tokens, head_dim) for _ in range(5))
    logsumexp = make(batch, heads, tokens, dtype=torch.float32)
    scale = head_dim**-0.5
    if operation.startswith("shift_add"):
        mode = ("published", "mean_threshold", "per_head", "sign").index(operation.removeprefix("shift_add_"))
        weight = make(heads, 9, dtype=torch.float32)
        _, *saved = shift_add.shift_add_attention_fwd(query, key, value, weight, mode)
        shift_add.shift_add_attention_bwd(grad_output, query, key, value, weight, *saved, mode)
    elif operation == "gaussian_mixture":
        alpha, sigma = make(5, heads, dtype=torch.float32), make(5, heads, dtype=torch.float32)
        gaussian_mixture.gaussian_mixture_fwd(query, key, value, alpha, sigma, grid, grid, prefix, 1e-5, scale)
        gaussian_mixture.gaussian_mixture_bwd(
            grad_output, query, key, value, alpha, sigma, output, logsumexp, grid, grid, prefix, 1e-5, scale
        )
    elif operation == "masked_product":
        weight = make(heads, tokens, tokens, dtype=torch.float32)
        gaussian_mixture.masked_product_fwd(query, key, value, weight, scale)
        gaussian_mixture.masked_product_bwd(grad_output, query, key, value, weight, output, logsumexp, scale)
    elif operation == "size_weighted_attention":
        log_sizes = make(batch, tokens, dtype=torch.float32)
        size_weighted_attention.size_weighted_attention_fwd(query, key, value, log_sizes, scale, True)
        size_weighted_attention.size_weighted_attention_bwd(
            grad_output, query, key, value, log_sizes, output, logsumexp, scale, True
        )
    else:
        key, value = make(batch, heads // 2, tokens, head_dim), make(batch, heads // 2, tokens, head_dim)
        kind = operation.partition("_")[2]
        mask = {
            "boolean": make(batch, heads, tokens, tokens, dtype=torch.bool),
            "additive": make(batch, heads, tokens, tokens),
        }.get(kind)
        attention.attention_fwd(query, key, value, mask, kind == "causal", scale)
        attention.attention_bwd(grad_output, query, key, value, mask, output, logsumexp, kind == "causal", scale)


def record(operation, family, dtype, head_dim):
    """[(kernel, arguments by name, configuration)] that the launchers of `operation` would start on a chip of `family`."""
    launches = []

    def recorder(kernel, programs, device, config, *arguments, fuse=True, **constants):
        bound = dict(zip((p.name for p in kernel.params), arguments)) | constants
        launches.append((kernel, bound, config))

    originals = configurations.launch, configurations.architecture, configurations.precision
    configurations.launch, configurations.architecture = recorder, lambda device: family
    configurations.precision = lambda query: "tf32" if dtype == "tf32" else "ieee"
    try:
        _run(operation, DTYPES[dtype], head_dim)
    finally:
        configurations.launch, configurations.architecture, configurations.precision = originals
    return launches


def _specialise(path, argument, generic, constants, attributes):
    """Type of an argument, as triton.runtime.jit gives it; compile-time values and alignments go into the dictionaries."""
    if isinstance(argument, tuple):
        types = [_specialise((*path, n), a, False, constants, attributes) for n, a in enumerate(argument)]
        return type(argument)(*types) if hasattr(argument, "_fields") else tuple(types)
    if isinstance(argument, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return (
            "*"
            + {
                torch.float32: "fp32",
                torch.bfloat16: "bf16",
                torch.float16: "fp16",
                torch.int32: "i32",
                torch.int64: "i64",
                torch.float64: "fp64",
                torch.uint8: "u8",
                torch.int8: "i8",
            }[argument.dtype]
        )
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int) and not (argument == 1 and not generic):
        if argument % 16 == 0 and not generic:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    constants[path] = argument
    return "constexpr"


def compile_launch(kernel, bound, config, family):
    constants, attributes, signature = {}, {}, {}
    for n, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            constants[(n,)], signature[parameter.name] = bound[parameter.name], "constexpr"
        else:
            signature[parameter.name] = _specialise(
                (n,), bound[parameter.name], parameter.do_not_specialize, constants, attributes
            )
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[family], options=options)


def inspect(compiled, family):
    """Registers, local memory, shared memory and the matrix instructions of a compiled kernel, read from the binary."""
    if family == "cdna":
        assembly = compiled.asm["amdgcn"]
        number = {
            name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)
        }  # scalar registers spill into vector ones
        return {
            "registers": number["vgpr_count"],
            "spills": number["vgpr_spill_count"],
            "local": number["private_segment_fixed_size"],
            "shared": compiled.metadata.shared,
            "matrix": {"mfma": len(re.findall(r"v_mfma", assembly))},
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {
        "registers": number["REG"],
        "spills": local,
        "stack": number["STACK"],
        "local": number["LOCAL"],
        "shared": max(number["SHARED"], compiled.metadata.shared),
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "matrix": {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX},
    }


def _stage(bound):
    """What tells apart the launches of one kernel: its STAGE, or the role of a scan of retention."""
    if "REVERSED" not in bound:
        return bound.get("STAGE")
    role = ("scan", "scan_dv", "scan_dq")[bound["MEASURE"]]
    return "scan_dk" if bound["SCALES_COLUMNS"] and role == "scan" else role + "_reversed" * bound["STRICT"]


def work(case):
    """Compile the launches of a case: operation, family, dtype, head_dim, the kernels wanted (None: all), and a configuration to force on them."""
    operation, family, dtype, head_dim, wanted, *forced = case
    if forced:
        width = "single" if DTYPES[dtype] == torch.float32 else "half"
        for kernel in wanted:
            for lean in (False, True):
                rows = configurations._TABLE[family, width, lean][kernel]
                rows[configurations.block_d(head_dim)] = configurations.Configuration(*forced[0])
    results = []
    seen = set()
    for kernel, bound, config in record(operation, family, dtype, head_dim):
        stage = _stage(bound)
        if (wanted and not {kernel.__name__, stage} & set(wanted)) or (kernel.__name__, stage) in seen:
            continue
        seen.add((kernel.__name__, stage))
        start = time.perf_counter()
        try:
            found = inspect(compile_launch(kernel, bound, config, family), family)
        except Exception as error:  # noqa: BLE001 - reported per case, the test fails on it
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        results.append(
            {
                "operation": operation,
                "family": family,
                "dtype": dtype,
                "head_dim": head_dim,
                "kernel": kernel.__name__,
                "stage": stage,
                "config": list(config),
                "warps": config.num_warps,
                "seconds": time.perf_counter() - start,
                **found,
            }
        )
    return results


def _prepare(cases):
    """What every process would do again: hash Triton's library of 500 MB, ask ptxas for its version, import what torch needs."""
    triton_key()
    for family in {case[1] for case in cases}:
        make_backend(TARGETS[family]).hash()
    record(*cases[0][:4])


def compile_cases(cases, processes=2):
    _prepare(cases)
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        return [result for results in pool.imap_unordered(work, cases, chunksize=1) for result in results]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compile_cases(json.loads(Path(sys.argv[1]).read_text()))))
