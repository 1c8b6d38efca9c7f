"""The Triton kernels of window attention, run (by Triton's interpreter where there is no GPU) against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from effattn.triton_kernels import cross_shaped_window as windows

import effattn
from effattn import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def draw(operation, grid, batch, heads, head_dim, dtype, options, bias=False, lepe=None):
    """query, key, value and the parameters of a call, by name; lepe: None, "weight", "bias" or "shared"."""
    tensors = {n: random(batch, heads, grid[0] * grid[1], head_dim, dtype=dtype) for n in ("query", "key", "value")}
    if bias:
        overlap = options.get("overlap", (0, 0))
        rows, columns = (2 * w + 2 * o - 1 for w, o in zip(options["window"], overlap))
        tensors["bias_table"] = random(rows * columns, heads)
    if lepe:
        channels = head_dim if lepe == "shared" else heads * head_dim
        tensors["lepe_weight"] = random(channels, 1, 3, 3)
        if lepe != "weight":
            tensors["lepe_bias"] = random(channels)
    return tensors


def call(module, operation, tensors, grid, options, **more):
    return getattr(module, operation)(**tensors, grid=grid, **options, **more)


def differentiate(module, operation, tensors, grid, options, grad_output, cast=lambda t: t, **more):
    """{name: gradient}, and the output"""
    leaves = {name: cast(t).detach().clone().requires_grad_() for name, t in tensors.items()}
    output = call(module, operation, leaves, grid, options, **more)
    gradients = torch.autograd.grad(output, list(leaves.values()), cast(grad_output))
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def check(operation, grid, dtype, batch=1, heads=2, head_dim=7, bias=False, lepe=None, **options):
    """The accuracy rule, for the output and every gradient. A miss is pooled with more draws, since on few elements the error
    of the dtype is an accident."""
    pool, misses = {}, []
    for _ in range(8):
        tensors = draw(operation, grid, batch, heads, head_dim, dtype, options, bias, lepe)
        grad_output = random(*tensors["query"].shape, dtype=dtype)
        arguments = (operation, tensors, grid, options, grad_output)
        ours = differentiate(effattn, *arguments, backend="triton")
        exact = differentiate(reference, *arguments, torch.Tensor.double)
        low = differentiate(reference, *arguments)
        for name, got in ours.items():
            assert got.shape == exact[name].shape, name
            assert got.isfinite().all(), name
            errors = (got.double() - exact[name], low[name].double() - exact[name], exact[name])
            pool[name] = tuple(map(max, pool.get(name, (0, 0, 0)), (t.abs().max().item() for t in errors)))
        eps = torch.finfo(dtype).eps
        misses = [
            f"{name}: error {error:.3e}, the dtype's {low:.3e}, largest value {largest:.3e}"
            for name, (error, low, largest) in pool.items()
            if not error <= (2 if name == "output" else 3) * low + eps * largest
        ]
        if not misses:
            return
    raise AssertionError("; ".join(misses))


@pytest.mark.parametrize(
    ("dtype", "grid", "heads", "options"),
    [
        (torch.bfloat16, (8, 6), 3, {"window": (4, 6), "shift": (2, 3)}),
        (torch.float32, (12, 7), 1, {"window": (6, 7), "shift": (0, 3)}),  # several tiles
        (torch.float32, (5, 6), 1, {"window": (4, 4), "shift": (1, 2), "padding": "zero_key", "lepe": "bias"}),
        (torch.bfloat16, (7, 5), 1, {"window": (7, 6), "shift": (2, 0), "padding": "mask", "lepe": "weight"}),
        (torch.float16, (2, 3), 2, {"window": (2, 3)}),
    ],
    ids=["shifted", "tiles", "zero_key", "mask", "whole"],
)
def test_windows_with_bias_equal_the_reference(dtype, grid, heads, options):
    check("window_attention", grid, dtype, heads=heads, bias=True, **options)


@pytest.mark.parametrize(
    ("dtype", "grid", "options"),
    [
        (torch.float32, (4, 16), {"window": (4, 8), "overlap": (1, 2), "bias_index": "hat_oca"}),
        (torch.bfloat16, (5, 9), {"window": (4, 8), "overlap": (1, 2), "padding": "mask"}),
        (torch.float32, (3, 4), {"window": (2, 2), "overlap": (3, 1), "padding": "zero_key"}),
        (torch.bfloat16, (4, 4), {"window": (2, 2), "overlap": (0, 1), "bias": False}),
    ],
    ids=["hat", "mask", "far", "no-bias"],
)
def test_overlapping_windows_equal_the_reference(dtype, grid, options):
    check("window_attention", grid, dtype, **{"heads": 1, "head_dim": 6, "bias": True, **options})


@pytest.mark.parametrize(
    ("dtype", "grid", "options"),
    [
        (torch.float32, (4, 6), {"stripe_width": 2, "lepe": "bias", "batch": 2}),
        (torch.bfloat16, (3, 5), {"stripe_width": 1, "lepe": "shared", "head_dim": 24}),
        (torch.bfloat16, (4, 5), {"stripe_width": 3, "lepe": "bias", "padding": "zero_key"}),
        (torch.float32, (5, 4), {"stripe_width": 3, "padding": "mask"}),
        (torch.bfloat16, (5, 7), {"stripe_width": 7, "lepe": "weight"}),  # one window of several tiles
    ],
    ids=["one-tile", "width-1", "zero_key", "mask", "whole"],
)
def test_cross_shaped_windows_equal_the_reference(dtype, grid, options):
    check("cross_shaped_window_attention", grid, dtype, **options)


def test_halves_of_the_heads_may_need_different_tiles():
    check("cross_shaped_window_attention", (33, 1), torch.float32, stripe_width=1, head_dim=5)


# ---------------------------------------------------------------- how the work is divided

BIASED = ("window_attention", (4, 6), {"window": (2, 3), "shift": (1, 1)})
STRIPED = ("cross_shaped_window_attention", (4, 6), {"stripe_width": 3, "padding": "zero_key"})


def run_of(case, bias, lepe, batch=1, heads=2):
    operation, grid, options = case
    tensors = draw(operation, grid, batch, heads, 8, torch.float32, options, bias, lepe)
    grad_output = random(*tensors["query"].shape)
    return lambda: differentiate(effattn, operation, tensors, grid, options, grad_output, backend="triton")


@pytest.mark.parametrize(("case", "bias", "lepe"), [(BIASED, True, None), (STRIPED, False, "bias")])
def test_a_program_may_walk_any_number_of_windows(case, bias, lepe, monkeypatch):
    run = run_of(case, bias, lepe)
    expected = run()
    monkeypatch.setattr(windows, "TARGET_PROGRAMS", 3)
    monkeypatch.setattr(windows, "LEPE_CHUNKS", 1)
    walked = run()
    for name, tensor in expected.items():
        if name in ("output", "query", "key", "value"):
            assert torch.equal(walked[name], tensor), name
        torch.testing.assert_close(walked[name], tensor)


def test_bands_groups_and_splits_of_the_bias_gradient_agree(monkeypatch):
    run = run_of(BIASED, True, None, heads=3)
    monkeypatch.setattr(windows, "_sums", lambda *_: (2, 3, 1))
    expected = run()["bias_table"]
    monkeypatch.setattr(windows, "_sums", lambda *_: (1, 2, 3))
    torch.testing.assert_close(run()["bias_table"], expected)


def test_sums_of_the_bias_gradient_take_at_most_half_of_the_output_or_4_mebibytes():
    for batch, head_dim in ((1, 8), (8, 32), (64, 64)):
        query = torch.empty(batch, 4, 56 * 56, head_dim, dtype=torch.bfloat16, device="meta")
        for size in (7, 56):
            geometry = windows.Geometry(56, 56, size, size, size, size, 3, 3, 0, 0)
            band, group, splits = windows._sums(query, geometry, windows.tuned.C(64, 32, 4, 1))
            assert 1 <= band <= size
            assert 1 <= group <= 4
            held = 4 * band * size * windows._row_stride(geometry) * group * splits
            assert held <= max(query.nbytes // 2, 1 << 22)


# ---------------------------------------------------------------- layouts and degenerate shapes


def test_strides_do_not_matter_and_neighbours_are_not_touched():
    """A layout of its own for each tensor: token-major, strided along head_dim amid NaN, expanded."""
    operation, grid, options = STRIPED
    tensors = draw(operation, grid, 2, 2, 8, torch.bfloat16, options, False, "bias")
    grad_output = random(2, 2, 24, 8, dtype=torch.bfloat16)
    parameters = {name: t for name, t in tensors.items() if "lepe" in name}
    rows = {name: t for name, t in tensors.items() if "lepe" not in name} | {"grad_output": grad_output}
    for name in ("query", "grad_output"):
        rows[name] = rows[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = rows["key"].new_full((2, 2, 26, 17), float("nan"))
    wide[:, :, 1:-1, 1::2] = rows["key"]
    rows["key"] = wide[:, :, 1:-1, 1::2]
    rows["value"] = rows["value"][:1, :, :1].expand_as(rows["value"])
    results = []
    for copy in (torch.Tensor.contiguous, lambda t: t):
        leaves = {name: copy(t).detach().requires_grad_() for name, t in rows.items() if name != "grad_output"}
        output = call(effattn, operation, leaves | parameters, grid, options, backend="triton")
        results.append((output, *torch.autograd.grad(output, list(leaves.values()), copy(rows["grad_output"]))))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 2, (4, 4)), (1, 2, (0, 4)), (1, 0, (4, 4))])
def test_empty_inputs(shape):
    batch, heads, grid = shape
    tensors = draw("", grid, batch, heads, 8, torch.float32, {"window": (2, 2)}, True, "bias")
    grad_output = torch.zeros_like(tensors["query"])
    got = differentiate(effattn, "window_attention", tensors, grid, {"window": (2, 2)}, grad_output, backend="triton")
    for name, tensor in tensors.items():
        assert torch.equal(got[name], torch.zeros_like(tensor))


def test_a_window_of_one_token_is_its_value():
    tensors = draw("", (2, 3), 1, 2, 5, torch.float32, {"window": (1, 1)}, True)
    grad_output = random(1, 2, 6, 5)
    got = differentiate(effattn, "window_attention", tensors, (2, 3), {"window": (1, 1)}, grad_output, backend="triton")
    torch.testing.assert_close(got["output"], tensors["value"])
    torch.testing.assert_close(got["value"], grad_output)
    for name in ("query", "key", "bias_table"):
        torch.testing.assert_close(got[name], torch.zeros_like(got[name]), atol=1e-5, rtol=0)


def test_offsets_past_two_to_the_31_elements(tmp_path, monkeypatch):
    """Rows 2^30 elements apart, in a sparse file that is never filled."""
    size = (1 << 32) + 64
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        monkeypatch.setattr(
            torch.UntypedStorage, "copy_", lambda self, source, *_: self
        )  # the interpreter copies every storage onto itself
    else:
        storage = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    near = [random(1, 1, 4, 16, dtype=torch.bfloat16) for _ in range(4)]
    far = [storage.as_strided((1, 1, 4, 16), (0, 0, 1 << 30, 1), 16 * n) for n in range(4)]
    for view, tensor in zip(far, near):
        view.copy_(tensor)
    weight = random(1, 9, 16)
    for bias in (None, random(1, 3, 3)):
        results = []
        for query, key, value, grad_output in (far, near):
            tensors = (query, key, value, bias, weight, None)
            options = (2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, False, False, 0.25)
            saved = windows.window_fwd(*tensors, *options)
            results.append((*saved, *windows.window_bwd(grad_output, *tensors, *saved, *options)))
        for got, expected in zip(*results):
            assert torch.equal(got, expected)
