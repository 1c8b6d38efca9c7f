"""Tuned Triton configurations, compiled ahead of time for every target, and what their binaries say: no spills, within the
chip's memories, on its matrix units.

The compiler runs in a subprocess: under TRITON_INTERPRET, which the other tests set, nothing compiles. By default every 16-bit
configuration of the tile engine is compiled for sm_90 at the largest head_dim that takes it (lean ones with the Gaussian
mixture, the others with the masked product; what both take, once), and a sample of the rest.
`EFFATTN_COMPILE=all` compiles every operation for every chip, at head_dims that fill their block and that do not: about an
hour on two cores.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton_compiler
from effattn.triton_kernels import configurations

SCRIPT = Path(__file__).with_name("triton_compiler.py")
CUDA = ("sm_80", "sm_90", "sm_100", "sm_120")
ALL = os.environ.get("EFFATTN_COMPILE") == "all"
WHOLLY = CUDA if ALL else ("sm_90",)  # every 16-bit configuration of the engine
HEAD_DIMS = (64, 128, 256)  # a smaller head_dim takes the configuration of 64 and needs less of everything
ENGINE = configurations.KERNELS
SHIFT_ADD = ("linear_forward", "linear_backward", "context", "mix", "query_key_gradient")
WINDOWS = (*(f"window_{kernel}" for kernel in ENGINE[:3]), "window_bias_gradient", "window_gradient")
TOEPLITZ = (*(f"toeplitz_{kernel}" for kernel in ENGINE[:3]), "toeplitz_bias_gradient")
FEATURES = ("map_features", "head_maxima", "feature_gradient", "direction_gradient")
SOFT_MERGE = ("soft_merge_forward", "logit_gradient", "token_gradient")
PRODUCTS = (*ENGINE, *SHIFT_ADD, *WINDOWS, "scan", *TOEPLITZ, *FEATURES, *SOFT_MERGE)
COLUMNS_FIRST = (
    "key_value_gradient",
    "linear_forward",
    "direction_gradient",
    *SOFT_MERGE[1:],
)  # the second number is the product's rows
ROWS = (16, 64, 512, 25088)  # of shift_linear: one for each of its tiles
OTHERS = (
    "masked_product",
    "attention",
    "attention_causal",
    "attention_boolean",
    "attention_additive",
    "size_weighted_attention",
)


def cases():
    """(operation, family, dtype, head_dim, kernels or None for all)"""
    if ALL:
        return (
            [
                (operation, family, dtype, head_dim, None)
                for operation in ("gaussian_mixture", *OTHERS)
                for family in configurations.FAMILIES
                for dtype in ("bfloat16", "float32")
                for head_dim in (16, 48, 64, 80, 128, 160, 256)
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in triton_compiler.OPERATIONS
                if operation.startswith("shift")
                for family in configurations.FAMILIES
                for dtype in ("bfloat16", "float32")
                for size in (ROWS if "linear" in operation else (16, 17, 64, 100, 128, 160, 256))
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in triton_compiler.WINDOWS
                for family in CUDA
                for dtype in ("bfloat16", "float32")
                for size in (
                    (24, 30, 32, 46, 53, 77, 122) if operation in ("window_hat", "window_overlapping") else (24, 30, 32)
                )
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in (*triton_compiler.MANHATTAN, *triton_compiler.ENHANCEMENTS)
                for family in CUDA
                for dtype in ("bfloat16", "float32")
                for size in ((16,) if operation.endswith("_56") else (16, 30, 32))
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in ("retention", "retention_bidirectional", "retention_recurrent")
                for family in configurations.FAMILIES
                for dtype, sizes in (("bfloat16", (64, 100, 128)), ("float32", (64, 100)))
                for size in sizes
            ]
            + [
                (operation, family, dtype, head_dim, None)
                for operation in triton_compiler.URPE
                for family in CUDA
                for dtype in ("bfloat16", "float32")
                for head_dim in (16, 64, 80, 128, 160, 256)
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in (*triton_compiler.TOEPLITZ, *triton_compiler.FEATURE_MAPS)
                for family in CUDA
                for dtype in ("bfloat16", "float16", "float32")
                for size in (64, 100, 128, 200, 256)
            ]
            + [
                (operation, family, dtype, channels, None)
                for operation in triton_compiler.SOFT_MERGE
                for family in configurations.FAMILIES
                for dtype in ("bfloat16", "float32")
                for channels in (64, 100, 768)
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in triton_compiler.MATCHINGS
                for family in configurations.FAMILIES
                for dtype in ("bfloat16", "float32")
                for size in (64, 77)
            ]
            + [
                (operation, family, dtype, size, None)
                for operation in triton_compiler.MERGES
                for family in configurations.FAMILIES
                for dtype in ("bfloat16", "float32")
                for size in (768, 197)
            ]
            + [("urpe_grid_causal", "cdna", "bfloat16", 64, None)]
        )
    chosen = [
        (operation, family, "bfloat16", head_dim, _largest_with_its_configuration(family, "half", lean, head_dim))
        for operation, lean in (("gaussian_mixture", True), ("masked_product", False))
        for family in WHOLLY
        for head_dim in HEAD_DIMS
    ]
    chosen += [
        ("gaussian_mixture", "sm_80", "float32", 64, ENGINE),
        ("masked_product", "sm_80", "bfloat16", 128, ENGINE),
    ]
    chosen += [("gaussian_mixture", family, "bfloat16", 128, ENGINE[:2]) for family in CUDA[2:]]
    chosen += [("gaussian_mixture", "cdna", "bfloat16", 64, ("forward", "key_value_gradient"))]
    chosen += [
        ("gaussian_mixture", "sm_90", "bfloat16", 64, ("build_table", "row_delta", "reduce_mixture")),
        ("gaussian_mixture", "sm_90", "tf32", 64, ("forward", "key_value_gradient")),
        ("gaussian_mixture", "sm_90", "float16", 80, ("forward",)),
        ("attention_causal", "sm_90", "bfloat16", 64, ("key_value_gradient",)),
        ("attention_boolean", "sm_90", "bfloat16", 64, ("forward",)),
        ("attention_additive", "sm_80", "float16", 64, ("forward",)),
        ("attention", "sm_120", "bfloat16", 64, ("key_value_gradient",)),
        ("size_weighted_attention", "sm_90", "bfloat16", 128, ("key_value_gradient", "sum_heads")),
    ]
    linear = ("linear_forward", "linear_backward")
    chosen += [("shift_linear", family, "bfloat16", 25088, linear) for family in CUDA[1:3]]
    chosen += [("shift_linear", "sm_90", "bfloat16", 16, ("linear_forward",))]
    chosen += [("shift_linear_int8", "sm_90", "bfloat16", 25088, ("linear_forward",))]
    chosen += [
        ("shift_linear", "sm_90", "bfloat16", 64, ("linear_backward",)),
        ("shift_linear", "sm_80", "float32", 25088, ("linear_forward",)),
        ("shift_linear_odd", "sm_90", "float16", 25088, ("linear_forward",)),
        ("shift_linear_5bit", "sm_120", "bfloat16", 64, ("linear_forward",)),
        ("shift_linear_int8", "sm_90", "bfloat16", 64, ("quantise_rows",)),
        ("shift_linear_fixed", "sm_80", "bfloat16", 64, ("fixed_forward",)),
        ("shift_add_mean_threshold", "sm_90", "bfloat16", 64, None),
        ("shift_add_published", "sm_80", "bfloat16", 256, ("query_key_gradient",)),
        ("shift_add_published", "sm_100", "bfloat16", 256, ("query_key_gradient",)),
        ("shift_add_sign", "sm_120", "float16", 128, ("context", "query_key_gradient")),
        ("shift_add_per_head", "sm_80", "float32", 256, ("query_key_gradient",)),
        ("window_swin_7", "sm_90", "bfloat16", 32, WINDOWS),
        ("window_overlapping", "sm_100", "bfloat16", 30, WINDOWS),
        ("window_stripes_1", "sm_90", "bfloat16", 24, None),
        ("window_stripes_7", "sm_80", "bfloat16", 24, WINDOWS),
        ("window_hat", "sm_120", "bfloat16", 53, ("window_key_value_gradient", "window_bias_gradient", "reduce_bias")),
        ("window_stripes_12", "sm_80", "float32", 32, WINDOWS),
        ("manhattan_weights_56", "sm_80", "bfloat16", 16, ("window_query_gradient", "window_bias_gradient")),
        ("manhattan_weights_prefix_14", "sm_90", "bfloat16", 32, ("window_forward", "window_key_value_gradient")),
        ("manhattan_prefix_14", "sm_120", "float16", 32, ("reduce_bias",)),
        ("local_enhancement_5", "sm_100", "bfloat16", 32, ("enhance", "enhancement_gradient")),
        ("retention", "sm_90", "bfloat16", 128, ("scan_dv", "scan_dq")),
        ("retention", "sm_120", "float32", 64, ("scan_dq",)),
        ("retention_recurrent", "sm_90", "bfloat16", 256, ("recurrent",)),
        ("urpe_grid_causal", "sm_90", "bfloat16", 64, ("forward", "parameter_gradient", "reduce_relative")),
        ("urpe_causal", "sm_80", "bfloat16", 128, ("key_value_gradient",)),
        ("urpe_grid_causal", "sm_80", "float32", 128, ("forward",)),
        ("urpe_grid", "sm_100", "bfloat16", 64, ("query_gradient",)),
        ("urpe_coefficient", "sm_120", "float16", 64, ("parameter_gradient",)),
        ("toeplitz", "sm_90", "bfloat16", 64, ("toeplitz_forward", "toeplitz_key_value_gradient")),
        ("toeplitz_32", "sm_100", "bfloat16", 64, ("toeplitz_query_gradient",)),
        ("toeplitz_causal", "sm_120", "bfloat16", 100, ("toeplitz_bias_gradient",)),
        ("feature_map", "sm_90", "bfloat16", 64, ("map_features", "direction_gradient")),
        ("feature_map_256", "sm_80", "bfloat16", 256, ("feature_gradient",)),
        ("soft_merge_odd", "sm_90", "bfloat16", 768, SOFT_MERGE),
        ("soft_merge", "sm_90", "float16", 768, ("output_statistics",)),
        ("soft_merge_odd", "sm_100", "bfloat16", 768, ("logit_gradient",)),
        ("soft_merge", "sm_80", "bfloat16", 100, ("token_gradient",)),
        ("soft_merge_transposed", "sm_80", "bfloat16", 768, ("soft_merge_forward",)),
        ("soft_merge_few", "sm_120", "bfloat16", 768, ("soft_merge_forward",)),
        ("token_matching", "sm_90", "bfloat16", 64, None),
        ("token_matching", "sm_80", "float32", 77, ("best_partners",)),
        ("token_matching", "sm_100", "float16", 77, ("best_partners",)),
        ("token_matching", "sm_120", "bfloat16", 64, ("best_partners",)),
        ("token_merge_weighted", "sm_90", "bfloat16", 768, None),
        ("token_merge_max", "sm_80", "float32", 197, None),
    ]
    return chosen


def _largest_with_its_configuration(family, width, lean, head_dim, among=(False, True)):
    """The engine's kernels whose configuration no larger head_dim takes, nor at the same one the tiles for any policy."""
    table = configurations.configurations()

    def outdone(kernel):
        return any(
            table[family, width, other, kernel, d] == table[family, width, lean, kernel, head_dim]
            for other in among
            for d in HEAD_DIMS
            if (d, not other) > (head_dim, not lean)
        )

    return tuple(kernel for kernel in ENGINE if not outdone(kernel))


def compile_all(cases, directory):
    given, found = directory / "cases.json", directory / "results.json"
    given.write_text(json.dumps(cases))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, str(SCRIPT), str(given), str(found)], env=environment, check=True)
    return json.loads(found.read_text())


def problems(result):
    """What is wrong with one compiled kernel; empty if nothing is."""
    if "error" in result:
        return [result["error"]]
    wrong = []
    family = result["family"]
    if result["spills"] or result.get("local") or result.get("stack"):
        wrong.append(f"{result['spills']} spills, {result.get('stack', 0)} bytes of stack")
    if result["shared"] > configurations.SHARED_MEMORY[family]:
        wrong.append(f"{result['shared']} bytes of shared memory, {family} has {configurations.SHARED_MEMORY[family]}")
    if result.get("tensor_memory", 0) > 512:
        wrong.append(f"{result['tensor_memory']} columns of tensor memory, the chip has 512")
    if result["kernel"] in PRODUCTS and not any(result["matrix"].values()):
        wrong.append("no arithmetic: the compiler gave the kernel up")
    if result["kernel"] in PRODUCTS and result["dtype"] in ("bfloat16", "float16") and family in CUDA:
        kernel = result["kernel"].removeprefix("window_").removeprefix("toeplitz_")
        rows = result["config"][kernel in COLUMNS_FIRST]
        wanted = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(family, "HMMA") if rows >= 64 else "HMMA"
        if result["operation"].endswith("int8") and result["kernel"] == "linear_forward":
            wanted = wanted.replace("H", "I", 1) if family != "sm_100" else "UTCIMMA"
        if not result["matrix"][wanted]:
            wrong.append(f"no {wanted} instruction: {result['matrix']}")
    return wrong


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Compiled once for all processes of a run: pytest-xdist may give the tests of this file to two."""
    directory = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a process of pytest-xdist, whose own folder this is
        directory = directory.parent
    with open(directory / "triton.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = directory / "results.json"
        return json.loads(found.read_text()) if found.exists() else compile_all(cases(), directory)


def describe(result):
    return "{operation} {kernel} {dtype} head_dim {head_dim} on {family}, tile {config}".format(**result)


def test_every_configuration_compiles_without_spills_within_memory_on_matrix_units(results):
    wrong = [f"{describe(r)}: {problem}" for r in results for problem in problems(r)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_sixteen_bit_configuration_was_compiled_for_its_cuda_chip(results):
    compiled = {(r["family"], r["kernel"], tuple(r["config"])) for r in results}
    tuned = {
        (family, kernel, tuple(config))
        for (family, width, _, kernel, _), config in configurations.configurations().items()
        if width == "half" and family in WHOLLY
    }
    assert tuned <= compiled


@pytest.mark.skipif(not ALL, reason="EFFATTN_COMPILE=all compiles them")
def test_every_single_precision_configuration_was_compiled(results):
    compiled = {(r["kernel"], tuple(r["config"])) for r in results if r["dtype"] == "float32"}
    tuned = {
        (kernel, tuple(config))
        for (family, width, _, kernel, _), config in configurations.configurations().items()
        if width == "single" and family in CUDA
    }
    assert tuned <= compiled


def test_hopper_multiplies_shift_add_tiles_with_warpgroups(results):
    kernels = set()
    for result in results:
        if result["family"] == "sm_90" and result["operation"].startswith("shift") and result["kernel"] in PRODUCTS:
            kernels.add(result["kernel"])
            assert result["matrix"]["HGMMA"] or result["matrix"]["IGMMA"], describe(result)
    assert kernels == set(SHIFT_ADD)


def test_scores_of_token_matching_are_true_single_precision(results):
    """What tensor cores round is not within the bound by which candidates are chosen."""
    found = [r for r in results if r["kernel"] == "best_partners" and r["family"] in CUDA]
    assert {r["family"] for r in found} == set(CUDA)
    for result in found:
        used = {name for name, count in result["matrix"].items() if count}
        assert used == {"FFMA"}, describe(result)


def test_hopper_multiplies_tiles_with_warpgroups_up_to_head_dim_128(results):
    for result in results:
        if (
            result["family"] == "sm_90"
            and result["dtype"] == "bfloat16"
            and result["kernel"] in ENGINE
            and result["head_dim"] <= 128
        ):
            assert result["matrix"]["HGMMA"], describe(result)


@pytest.fixture(scope="module")
def oversized(tmp_path_factory):
    """Deliberately bad configurations, of which the checks must complain."""
    cases = [
        ("gaussian_mixture", "sm_90", "bfloat16", 128, ("forward",), (128, 128, 4, 2)),
        ("gaussian_mixture", "sm_120", "bfloat16", 256, ("forward",), (128, 64, 8, 3)),
        ("gaussian_mixture", "sm_90", "float32", 64, ("query_gradient",), (64, 64, 8, 1)),
        ("gaussian_mixture", "sm_100", "bfloat16", 256, ("key_value_gradient",), (32, 128, 8, 1)),
    ]
    return sorted(compile_all(cases, tmp_path_factory.mktemp("oversized")), key=lambda r: (r["family"], r["dtype"]))


def test_the_checks_see_spills_and_memory_overruns(oversized):
    tensor_memory, shared, spills, scalar = (" ".join(problems(r)) for r in oversized)
    assert "tensor memory" in tensor_memory
    assert "bytes of shared memory" in shared
    assert "spills" in spills
    assert "spills" in scalar
    unmatched = next(r for r in oversized if r["dtype"] == "float32")
    assert any("HGMMA" in problem for problem in problems({**unmatched, "dtype": "bfloat16"}))


def test_configurations_do_not_depend_on_a_length():
    assert configurations.configurations().keys() == {
        (family, width, lean, kernel, block_d)
        for family in configurations.FAMILIES
        for width in ("half", "single")
        for lean in (False, True)
        for kernel in ENGINE
        for block_d in configurations.BLOCK_DS
    }
    assert {key[0] for key in configurations.configurations()} == set(configurations.FAMILIES)


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_120"),
        ((8, 9), "sm_120"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((7, 5), "sm_120"),
    ],
)
def test_every_chip_takes_a_row_that_its_shared_memory_can_hold(capability, family):
    assert configurations.family_of(capability) == family
