"""The arithmetic of docs/gpu_resources.md against numbers worked by hand, and its reading of what compilers print."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from effattn.bench import resources, resources_compile
from effattn.bench.resources import EXACT, Tile, occupancy, products, ranked, waste
from effattn.bench.resources_compile import Kernel


def kernel(registers=32, threads=128, shared=0, chip="sm_80", **more):
    return Kernel(
        "attention", "forward", "attention 64, tile 64 x 64", chip, registers, more.pop("spilled", 0), shared, threads
    )


@pytest.mark.parametrize(
    ("compiled", "expected"),
    [
        (kernel(32, 128), 1.0),  # 16 blocks of 4 warps: all 64
        (kernel(128, 128), 0.25),  # 4096 registers a warp, 4 warps a quarter: 16 of 64
        (kernel(129, 128), 0.1875),  # 4352: 3 warps a quarter
        (kernel(255, 256), 0.125),  # 8192: 2 warps a quarter, one block of 8
        (kernel(255, 512), 0.0),  # cannot start: a block needs 4 warps a quarter
        (kernel(32, 32), 0.5),  # 32 blocks of one warp
        (kernel(32, 96), 63 / 64),  # 21 blocks of 3 warps
        (kernel(32, 128, 100 * 1024), 0.0625),  # one block of 101 KB in 164
        (kernel(32, 128, 81 * 1024), 0.125),  # two of 82 KB are 164
        (kernel(32, 128, 81 * 1024 + 1), 0.0625),
        (kernel(32, 128, 100 * 1024, chip="sm_90"), 0.125),  # two in 228
        (kernel(32, 1024), 1.0),
    ],
)
def test_occupancy_is_what_a_hand_computes(compiled, expected):
    assert occupancy(compiled) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "tile", "expected"),
    [
        (64, 64, 64, Tile(64, 64, 0), 0.0),
        (64, 64, 24, Tile(64, 64, 0), 0.25),  # 24 of 32
        (64, 64, 48, Tile(64, 64, 0), 0.25),  # 48 of 64
        (49, 49, 32, Tile(64, 64, 0), 1 - 2401 / 4096),
        (98, 98, 24, Tile(64, 64, 0), 1 - 9604 * 24 / (16384 * 32)),
        (98, 98, 24, Tile(16, 8, 8), 1 - 98 * 98 / (112 * 104)),
        (144, 144, 32, Tile(64, 64, 0), 1 - 144 * 144 / (192 * 192)),
        (197, 197, 30, Tile(16, 8, 8), 1 - 197 * 197 * 30 / (208 * 200 * 32)),
        (49, 49, 8, Tile(16, 16, 0), 1 - 2401 * 8 / (4096 * 16)),  # a head dimension below 16 is 16
    ],
)
def test_waste_is_the_share_of_padding(queries, keys, head_dim, tile, expected):
    assert waste(queries, keys, head_dim, tile) == pytest.approx(expected)


def test_products_round_every_direction_up():
    assert products(49, 50, 24, EXACT) == 64 * 56 * 24
    assert products(49, 50, 24, Tile(64, 32, 0)) == 64 * 64 * 32


def test_families_are_ranked_by_what_exact_tiles_save():
    order = ranked([kernel(255, 256, spilled=16), kernel(32, 128)], has_cuda=["retention"])
    assert [c.ratio for c in order] == sorted((c.ratio for c in order), reverse=True)
    assert {c.family for c in order} == set(resources.PUBLISHED)
    said = {c.family: "; ".join(c.reasons) for c in order}
    assert "lowest occupancy 12%" in said["attention"]
    assert "1 of 2 kernels spill" in said["attention"]
    assert said["retention"].endswith("has CUDA kernels")
    assert said["cross_shaped_window"].endswith("has no CUDA kernel")
    windows = next(c for c in order if c.family == "cross_shaped_window")
    assert windows.ratio > 1.4  # 64 x 128 x 32 products where 64 x 56 x 24 do, for one
    assert windows.shape.head_dim == 24


def test_a_page_shows_both_chips_and_ranges_of_instances():
    triton = [kernel(100, 128, 2048, chip) for chip in ("sm_80", "sm_90")]
    cuda = [Kernel("retention", "scan", "float", chip, registers, 0, 0, 256, True) for chip in ("sm_80", "sm_90") for registers in (60, 128)]  # fmt: skip
    text = resources.page(cuda, triton)
    assert (
        "| forward | attention 64 | 64 x 64 | 128 | 100 | 0 | 2.0 | 25% / 25%" not in text
    )  # agreeing chips are one number
    assert "| forward | attention 64 | 64 x 64 | 128 | 100 | 0 | 2.0 | 25% |" in text
    assert "| retention: scan | 2 | 256 | 60 to 128 | 0 | 0.0 at launch | 25 to 50 % |" in text
    assert "| 49 | " in text


def test_the_committed_page_has_todays_tables_of_waste():
    committed = (resources_compile.ROOT / "docs" / "gpu_resources.md").read_text()
    assert "\n".join(resources.waste_tables()) in committed


def test_what_was_not_compiled_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(resources_compile, "BUILD", tmp_path)
    missing = []
    assert list(resources_compile.triton_kernels(True, missing)) == []
    assert "window_swin_7" in missing
    assert "**Not compiled yet**, so not in what follows: attention, urpe." in resources.page(
        [], [], ["attention", "urpe"]
    )


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4scanPf' for 'sm_80'
ptxas info    : Function properties for _Z4scanPf
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function '_Z10sum_splitsPf' for 'sm_80'
ptxas info    : Function properties for _Z10sum_splitsPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""
PTX = """.extern .shared .align 16 .b8 memory[];
.visible .entry _Z4scanPf(
	.param .u64 a
)
.maxntid 256
.minnctapersm 2
{
	mov.u32 %r1, memory;
	ret;
}
.visible .entry _Z10sum_splitsPf(
	.param .u64 a
)
{
	ret;
}
"""


def test_what_ptxas_and_the_ptx_tell_is_read():
    scan, total = resources_compile.parse_cuda(PTXAS, PTX)
    assert scan == {"name": "scan", "shape": "", "registers": 40, "spilled": 24, "shared": 512, "threads": 256, "dynamic": True}  # fmt: skip
    assert (total["name"], total["registers"], total["spilled"], total["shared"]) == ("sum_splits", 8, 0, 0)
    assert (total["threads"], total["dynamic"]) == (256, False)


def test_threads_that_nothing_tells_are_not_guessed():
    with pytest.raises(KeyError, match="plus"):
        resources_compile.parse_cuda(PTXAS.replace("_Z10sum_splitsPf", "_Z4plusPf"), PTX.replace("_Z10sum_splitsPf", "_Z4plusPf"))  # fmt: skip


def test_a_kernel_that_did_not_compile_stops_the_page():
    with pytest.raises(RuntimeError, match="retention scan on sm_80: no memory"):
        resources_compile.triton_kernel("retention", {"operation": "retention", "kernel": "scan", "family": "sm_80", "error": "no memory"})  # fmt: skip


@pytest.mark.parametrize(
    ("config", "warps", "tile"),
    [([64, 32, 4, 1], 4, "64 x 32"), ([64, 128, 32, 8, 2, False], 8, "64 x 128 x 32"), ([16, 0, 4, 1], 4, "16")],
)
def test_threads_and_tile_are_those_of_the_configuration(config, warps, tile):
    found = {"operation": "retention", "head_dim": 64, "kernel": "scan", "stage": "scan_dv", "family": "sm_80"}
    found |= {"config": config, "warps": warps, "registers": 100, "stack": 8, "local": 0, "shared": 512}
    read = resources_compile.triton_kernel("retention", found)
    assert (read.threads, read.spilled, read.name) == (32 * warps, 8, "scan scan_dv")
    assert read.shape == f"retention 64, tile {tile}"


def test_every_source_has_a_family_and_every_operation_is_known():
    triton_compiler = pytest.importorskip("triton_compiler")
    operations = {operation for cases in resources_compile.TRITON_CASES.values() for operation in cases}
    assert operations <= set(triton_compiler.OPERATIONS)
    families = {
        resources_compile.family_of(path.stem) for path in (resources_compile.ROOT / "csrc" / "cuda").glob("*.cu")
    }
    assert families <= set(resources_compile.TRITON_CASES)


def test_what_was_compiled_is_asked_again_when_a_source_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(resources_compile, "BUILD", tmp_path / "build")
    source, calls = tmp_path / "a.cu", []
    source.write_text("1")

    def compiled():
        calls.append(1)
        return [{"registers": len(calls)}]

    kept = [resources_compile._kept("a", [source], compiled) for _ in range(2)]
    assert kept == [[{"registers": 1}]] * 2
    source.write_text("2")
    assert resources_compile._kept("a", [source], compiled) == [{"registers": 2}]
    assert len(list((tmp_path / "build").iterdir())) == 1
