"""The CUDA kernels of Toeplitz-weighted attention by FFT and of random features: lengths of transforms and how they are
split, grids, causality, weights of nothing, gradients, orders of threads.

Without a GPU in the emulator, on tensors that end at a guard page.
"""

from __future__ import annotations

import pytest
import torch
from conformance import LAYOUTS, device_of, place, require

from effattn import _native
from effattn.ops.toeplitz import SHIFTS, features, toeplitz
from effattn.ops.toeplitz_checks import relative_entries
from effattn.ops.toeplitz_methods import DIRECT, DOUBLE_FFT, FFT
from effattn.reference.toeplitz import feature_map, toeplitz_linear_attention

CUDA = pytest.mark.parametrize("backend", ["cuda"])
METHODS = pytest.mark.parametrize("method", [FFT, DOUBLE_FFT], ids=["fft", "double_fft"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NAMES = ("output", "query", "key", "value", "bias")

SMALL_CHIP = 9216
"""Bytes of shared memory that hold a transform of 1024 floats or 512 doubles, and a tile of columns."""

pytestmark = pytest.mark.usefixtures("_kernels")


@pytest.fixture
def _kernels():
    require("toeplitz_linear_attention", "cuda")


@pytest.fixture
def small_chip(monkeypatch):
    if _native.cuda_device == "cuda":
        pytest.skip("the chip is what it is")
    monkeypatch.setenv("EFFATTN_EMULATOR_SHARED", str(SMALL_CHIP))


def draw(shape, dtype=torch.float32, grid=None, seed=0):
    """Positive features, values, a bias of a few nats, and the output's gradient."""
    batch, heads, tokens, count, width = shape
    height, across = grid or (1, tokens)
    entries = (2 * height - 1) * (2 * across - 1) if tokens else 0
    generator = torch.Generator().manual_seed(seed)
    query, key = (0.1 + torch.rand(batch, heads, tokens, count, generator=generator) for _ in range(2))
    value, gradient = torch.randn(2, batch, heads, tokens, width, generator=generator)
    bias = torch.rand(heads, entries, generator=generator)
    return [query.to(dtype), key.to(dtype), value.to(dtype), bias], gradient.to(dtype)


def call(leaves, gradient, method, grid=None, is_causal=False, eps=0.0):
    """Output and gradients by name; with eps the maximum of the bias is subtracted outside of the kernels."""
    leaves = [t.detach().to(device_of("cuda")).requires_grad_() for t in leaves]
    size = grid or (1, leaves[0].shape[2])
    entries = relative_entries(leaves[3], leaves[3].shape[0], eps, False)
    output = toeplitz("cuda", *leaves[:3], entries, None, *size, is_causal, method, eps, True)
    found = torch.autograd.grad(output, leaves, gradient.to(output.device))
    return {name: t.detach().cpu() for name, t in zip(NAMES, (output, *found))}


def exact(leaves, gradient, grid=None, is_causal=False, eps=0.0):
    """The same by the formula in float64."""
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    query, key, value, bias = leaves
    if grid is not None:
        bias = bias.view(-1, 2 * grid[0] - 1, 2 * grid[1] - 1)
    output = toeplitz_linear_attention(query, key, value, bias, grid, is_causal, None, eps)
    found = torch.autograd.grad(output, leaves, gradient.double())
    return dict(zip(NAMES, (output.detach(), *found)))


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check(shape, method, dtype=torch.float32, grid=None, change=None, **options):
    """Results are those of the formula but for a rounding of the dtype, and of the transforms where they are in float."""
    leaves, gradient = draw(shape, dtype, grid)
    if change is not None:
        change(*leaves)
    got = call(leaves, gradient, method, grid, **options)
    wanted = exact(leaves, gradient, grid, **options)
    rounding = 8 * torch.finfo(dtype).eps + (0 if method == DOUBLE_FFT else 1e-4)
    for name, ref in wanted.items():
        assert got[name].shape == ref.shape
        assert got[name].isfinite().all(), name
        # At one token the output does not depend on the weights: what is left is rounding of terms of size 1.
        scale = largest(ref) if shape[2] > 1 else max(largest(ref), 1.0)
        assert largest(got[name] - ref) <= rounding * scale, name
    return got


# ---- Toeplitz attention


@CUDA
@METHODS
@pytest.mark.parametrize(
    "shape", [(2, 2, 7, 2, 3), (1, 1, 1, 2, 3), (1, 2, 33, 3, 4), (1, 1, 65, 4, 1), (1, 1, 100, 2, 5)], ids=str
)
def test_every_innermost_radix_odd_columns_and_one_token(backend, method, shape):
    check(shape, method)


@CUDA
@METHODS
@pytest.mark.parametrize("shape", [(0, 2, 5, 2, 3), (1, 2, 0, 2, 3)], ids=str)
def test_nothing_to_attend_to(backend, method, shape):
    got = check(shape, method)
    assert not got["bias"].any()


@CUDA
@DTYPES
def test_element_types(backend, dtype):
    check((1, 2, 21, 3, 4), DOUBLE_FFT, dtype)


@CUDA
@METHODS
@pytest.mark.parametrize("options", [{"is_causal": True}, {"eps": 0.5}, {"is_causal": True, "eps": 1.0}], ids=str)
def test_causality_and_eps(backend, method, options):
    got = check((2, 1, 20, 3, 4), method, **options)
    if "eps" not in options:
        assert not got["bias"][:, 20:].any()


@CUDA
@METHODS
@pytest.mark.parametrize("grid", [(3, 5), (7, 1), (2, 9)], ids=str)
def test_grids(backend, method, grid):
    check((1, 2, grid[0] * grid[1], 2, 3), method, grid=grid)
    check((1, 1, grid[0] * grid[1], 2, 3), method, grid=grid, is_causal=True)


@CUDA
@METHODS
def test_entries_of_no_weight(backend, method):
    def some(query, key, value, bias):
        bias[0, ::3] = -torch.inf
        bias[0, 29] = 0.0
        key[:, 1, 4:] = 0.0

    got = check((1, 2, 30, 2, 3), method, change=some)
    assert not got["bias"][0, ::3].any()

    def all_of_a_head(query, key, value, bias):
        bias[1] = -torch.inf

    got = check((1, 2, 9, 2, 3), method, change=all_of_a_head)
    assert all(not t[:, 1].any() for name, t in got.items() if name != "bias")
    assert got["output"][:, 0].any()


@CUDA
def test_key_of_zeros_everywhere_gives_zeros(backend):
    def nothing(query, key, value, bias):
        key.zero_()

    got = check((1, 1, 12, 2, 3), DOUBLE_FFT, change=nothing)
    assert not got["output"].any()


@CUDA
@METHODS
@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 1, 513, 2, 2), {}), ((1, 2, 520, 2, 3), {"is_causal": True}), ((1, 1, 528, 2, 1), {"grid": (33, 16)})],
    ids=["one", "causal", "grid"],
)
def test_transforms_longer_than_a_block_holds(backend, method, shape, options, small_chip):
    check(shape, method, **options)


@CUDA
def test_two_passes_in_global_memory(backend, small_chip):
    check((1, 1, 2100, 2, 1), DOUBLE_FFT)


@CUDA
def test_more_transforms_than_scratch_memory_holds(backend, small_chip):
    """72 doubles' transforms of length 1024 fit into the scratch memory of the small chip: 90 do not."""
    check((1, 2, 257, 15, 5), DOUBLE_FFT)


@CUDA
def test_a_large_batch_goes_through_in_parts(backend, small_chip):
    """2.4 MB for columns hold 74 planes of 198 numbers a token forward, and 49 of 296 backward."""
    check((38, 2, 40, 1, 97), FFT, eps=0.5)


@CUDA
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    leaves, gradient = draw((2, 2, 6, 3, 4))
    placed = [place(t, layout) for t in leaves[:3]]
    got = call([*placed, leaves[3]], place(gradient, layout), DOUBLE_FFT)
    wanted = exact([*placed, leaves[3]], place(gradient, layout))
    for name, ref in wanted.items():
        torch.testing.assert_close(got[name].double(), ref, rtol=1e-5, atol=1e-6, msg=name)


@CUDA
def test_a_bias_that_needs_no_gradient_gets_zeros_and_changes_nothing_else(backend):
    leaves, gradient = draw((1, 2, 10, 2, 3))
    wanted = call(leaves, gradient, DOUBLE_FFT)
    leaves = [t.to(device_of(backend)).requires_grad_() for t in leaves]
    output = toeplitz("cuda", *leaves, None, 1, 10, False, DOUBLE_FFT, 0.0, False)
    found = torch.autograd.grad(output, leaves, gradient.to(output.device))
    assert all(torch.equal(t.cpu(), wanted[name]) for name, t in zip(NAMES[1:4], found))
    assert not found[3].any()


@CUDA
@METHODS
def test_same_bits_in_every_order_of_threads(backend, method, monkeypatch):
    leaves, gradient = draw((2, 1, 35, 3, 4))
    results = []
    for seed in range(3):
        monkeypatch.setenv("EFFATTN_EMULATOR_SEED", str(seed))
        results.append(call(leaves, gradient, method))
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


@CUDA
def test_a_method_that_cuda_has_not_is_refused(backend):
    leaves, gradient = draw((1, 1, 4, 2, 2))
    with pytest.raises(RuntimeError, match="the CUDA kernels have method 'fft' only"):
        call(leaves, gradient, DIRECT)


# ---- Random features


def feature_results(run, x, projection, gradient):
    x, projection = x.detach().requires_grad_(), projection.detach().requires_grad_()
    out = run(x, projection)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, (x, projection), gradient.to(out)))]


def check_features(shape, directions, trigonometric, normalize, shift, masked=False, dtype=torch.float32, scale=1.0):
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(shape, generator=generator)).to(dtype)
    if tokens > 2:
        x[:, :, 1] = 0
    projection = torch.randn(heads, directions, width, generator=generator)
    count = directions * (2 if trigonometric else 1)
    gradient = torch.randn(batch, heads, tokens, count, generator=generator).to(dtype)
    mask = torch.rand(batch, tokens, generator=generator) < 0.3 if masked else None
    device = device_of("cuda")
    on_device = None if mask is None else mask.to(device)

    def kernel(x, w):
        return features("cuda", x, w, on_device, trigonometric, normalize, SHIFTS.index(shift))

    def formula(x, w):
        kind = "trigonometric" if trigonometric else "positive"
        return feature_map(x, w, kind, normalize, shift, mask)

    got = feature_results(kernel, x.to(device), projection.to(device), gradient)
    wanted = feature_results(formula, x.double(), projection.double(), gradient)
    for t, ref in zip(got, wanted):
        assert t.shape == ref.shape
        assert t.isfinite().all()
        assert largest(t - ref) <= (4 * torch.finfo(dtype).eps + 2e-6) * max(largest(ref), 1e-6)
    return got


@CUDA
@pytest.mark.parametrize("trigonometric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shift", SHIFTS)
def test_features(backend, trigonometric, normalize, shift):
    check_features((2, 2, 37, 5), 7, trigonometric, normalize, shift, masked=shift != "row")


@CUDA
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 3, 256), (1, 2, 33, 40), (1, 1, 1, 1)], ids=str)
def test_features_of_wide_heads_many_directions_and_element_types(backend, dtype, shape):
    check_features(shape, 33, shape[3] == 40, True, "row", dtype=dtype)


@CUDA
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (1, 2, 0, 3)], ids=str)
def test_features_of_nothing(backend, shape):
    assert not check_features(shape, 4, False, True, "head")[2].any()


@CUDA
def test_a_shift_keeps_large_exponents_finite(backend):
    check_features((1, 1, 5, 4), 3, False, False, "head", scale=20.0)
    check_features((1, 1, 5, 4), 3, True, False, "row", scale=3.0)


@CUDA
def test_features_have_the_same_bits_in_every_order_of_threads(backend, monkeypatch):
    results = []
    for seed in range(2):
        monkeypatch.setenv("EFFATTN_EMULATOR_SEED", str(seed))
        results.append(check_features((2, 1, 40, 6), 9, True, True, "head", masked=True))
    assert all(torch.equal(a, b) for a, b in zip(*results))
