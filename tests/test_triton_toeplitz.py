"""The Triton kernels of Toeplitz-weighted linear attention and of random features, run (by Triton's interpreter where there is
no GPU) against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from effattn.triton_kernels import feature_map as feature_kernels
from effattn.triton_kernels import toeplitz as kernels

from effattn import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
SHIFTS = ("none", "row", "head")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def assert_accurate(draw, dtype, names):
    """The accuracy rule. A miss is pooled with more draws, since on few elements the error of the dtype is an accident."""
    pool = {}
    for _ in range(8):
        for name, ours, low, exact in zip(names, *draw()):
            assert ours.shape == exact.shape, name
            assert ours.isfinite().all(), name
            found = tuple(t.abs().max().item() for t in (ours.double() - exact, low.double() - exact, exact))
            pool[name] = tuple(map(max, pool.get(name, (0, 0, 0)), found))
        misses = [
            f"{name}: error {error:.3e}, the dtype's {low:.3e}, largest value {largest:.3e}"
            for name, (error, low, largest) in pool.items()
            if not error <= (2 if name == "output" else 3) * low + torch.finfo(dtype).eps * largest
        ]
        if not misses:
            return
    raise AssertionError("; ".join(misses))


# ---- Toeplitz-weighted attention ----

RESULTS = ("output", "grad_query", "grad_key", "grad_value", "grad_bias")


def tensors(batch, heads, tokens, features, value_dim, grid=None, dtype=torch.float32):
    """query, key, value, bias, grad_output"""
    height, width = grid or (1, tokens)
    query, key = (random(batch, heads, tokens, features, dtype=dtype).abs() + 0.1 for _ in range(2))
    value, grad_output = (random(batch, heads, tokens, value_dim, dtype=dtype) for _ in range(2))
    return query, key, value, random(heads, (2 * height - 1) * (2 * width - 1)), grad_output


def run(query, key, value, bias, grad_output, grid=None, is_causal=False, eps=0.0):
    inputs, options = (query, key, value, bias, None), (*(grid or (1, query.shape[2])), is_causal, 1, eps)
    saved = kernels.toeplitz_fwd(*inputs, *options)
    return saved[0], *kernels.toeplitz_bwd(grad_output, *inputs, *saved, *options)


def specified(cast, query, key, value, bias, grad_output, grid=None, is_causal=False, eps=0.0):
    leaves = [cast(t).detach().clone().requires_grad_() for t in (query, key, value)]
    leaves.append((bias.double() if leaves[0].dtype == torch.float64 else bias.clone()).requires_grad_())
    height, width = grid or (1, query.shape[2])
    entries = leaves[3].view(-1, 2 * height - 1, 2 * width - 1)
    output = reference.toeplitz_linear_attention(*leaves[:3], entries, (height, width), is_causal, None, eps)
    return output.detach(), *torch.autograd.grad(output, leaves, cast(grad_output))


def check_toeplitz(*shape, dtype=torch.float32, grid=None, change=None, **options):
    def draw():
        drawn = tensors(*shape, grid, dtype)
        if change:
            change(*drawn)
        options["grid"] = grid
        low = specified(lambda t: t, *drawn, **options)
        return run(*drawn, **options), low, specified(torch.Tensor.double, *drawn, **options)

    assert_accurate(draw, dtype, RESULTS)


@pytest.mark.parametrize(
    ("dtype", "batch", "tokens"), [(torch.float32, 4, 40), (torch.bfloat16, 1, 70), (torch.float16, 1, 70)]
)
def test_several_tiles_equal_the_reference(dtype, batch, tokens):
    """A batch of four splits the sums of the bias gradient."""
    check_toeplitz(batch, 1, tokens, 5, 20, dtype=dtype)


def test_causal_attention_equals_the_reference():
    check_toeplitz(1, 2, 70, 17, 33, is_causal=True)


@pytest.mark.parametrize(("grid", "is_causal"), [((5, 14), False), ((11, 7), True), ((3, 41), True)])
def test_grids_of_several_patches_equal_the_reference(grid, is_causal):
    check_toeplitz(1, 1, grid[0] * grid[1], 3, 4, grid=grid, is_causal=is_causal)


def test_entries_of_minus_infinity_are_weights_of_zero():
    def forbid(query, key, value, bias, grad_output):
        bias[0, ::2] = -INF
        bias[1] = -INF
        query[:, 0, 5] = 0

    check_toeplitz(1, 2, 35, 3, 4, grid=(5, 7), change=forbid)
    drawn = tensors(1, 2, 35, 3, 4, (5, 7))
    forbid(*drawn)
    output, grad_query, grad_key, grad_value, grad_bias = run(*drawn, grid=(5, 7))
    assert not output[:, 1].any()
    assert not output[:, 0, 5].any()
    assert not grad_query[:, 0, 5].any()
    assert not any(t[:, 1].any() for t in (grad_query, grad_key, grad_value))
    assert not grad_bias[1].any()
    assert not grad_bias[0, ::2].any()
    assert output[:, 0, 6].all()


def test_a_half_precision_row_may_have_tiny_weights_only():
    """c = exp(-30) wherever a causal row may look: fp16 holds neither that nor 1 / n."""
    query, key, value, bias, grad_output = tensors(1, 1, 20, 3, 4, dtype=torch.float16)
    bias[:] = 0
    expected = run(query, key, value, bias, grad_output, is_causal=True)
    bias[:, 20:] = 30
    got = run(query, key, value, bias, grad_output, is_causal=True)
    for ours, wanted in zip(got, expected):
        torch.testing.assert_close(ours, wanted, rtol=2**-9, atol=2**-10)
    assert got[0].any()


@pytest.mark.parametrize("sizes", [(0, 2, 5), (1, 0, 5), (1, 1, 0), (1, 1, 1)])
def test_any_size(sizes):
    drawn = list(tensors(*sizes, 3, 4) if sizes[2] else tensors(*sizes[:2], 1, 3, 4))
    if not sizes[2]:
        drawn = [t[..., :0] if t.dim() == 2 else t[:, :, :0] for t in drawn]
    found = run(*drawn)
    assert [t.shape for t in found] == [t.shape for t in (drawn[2], *drawn[:4])]
    torch.testing.assert_close(found[4], torch.zeros_like(drawn[3]))  # one pair at most: its weight cancels
    if all(sizes):
        torch.testing.assert_close(found[0], drawn[2])


def test_a_bias_gradient_that_is_not_wanted_is_zero():
    query, key, value, bias, grad_output = tensors(1, 1, 9, 3, 4)
    options = (1, 9, False, 1, 0.0, False)
    saved = kernels.toeplitz_fwd(query, key, value, bias, None, *options)
    found = kernels.toeplitz_bwd(grad_output, query, key, value, bias, None, *saved, *options)
    for ours, wanted in zip(found[:3], run(query, key, value, bias, grad_output)[1:]):
        assert torch.equal(ours, wanted)
    assert not found[3].any()


def test_strides_and_neighbours_do_not_matter():
    query, key, value, bias, grad_output = given = tensors(1, 2, 9, 4, 5)
    expected = run(*given)
    rows = (query, key, value, grad_output)
    wide = [torch.full((1, 2, 11, 12), INF, device=DEVICE) for _ in rows]
    views = [w[:, :, 1:10, 1 : 1 + 2 * t.shape[3] : 2] for w, t in zip(wide, rows)]
    for view, tensor in zip(views, rows):
        view.copy_(tensor)
    token_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in rows]
    for query, key, value, grad_output in (views, token_major):
        got = run(query, key, value, bias, grad_output)
        for a, b in zip(got, expected):
            assert torch.equal(a, b)
        for gradient, like in zip(got, (value, query, key, value)):
            assert gradient.stride() == torch.empty_like(like).stride()
    ones = [torch.ones(1, 1, 1, 1, device=DEVICE).expand(1, 2, 9, width) for width in (4, 4, 5, 5)]
    dense = [t.contiguous() for t in ones]
    for a, b in zip(run(*ones[:3], bias, ones[3]), run(*dense[:3], bias, dense[3])):
        assert torch.equal(a, b)


def test_offsets_past_two_to_the_31_elements(tmp_path, monkeypatch):
    """Rows 2^30 elements apart, in a sparse file that is never filled."""
    size = (1 << 32) + 64
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        # the interpreter copies every storage onto itself
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source, *_: self)
    else:
        storage = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    query, key, value, bias, grad_output = tensors(1, 1, 4, 16, 16, dtype=torch.bfloat16)
    rows = (query, key, value, grad_output)
    far = [storage.as_strided((1, 1, 4, 16), (0, 0, 1 << 30, 1), 16 * n) for n in range(4)]
    for view, tensor in zip(far, rows):
        view.copy_(tensor)
    for a, b in zip(run(*far[:3], bias, far[3]), run(query, key, value, bias, grad_output)):
        assert torch.equal(a, b)
    directions = random(1, 5, 16)
    for a, b in zip(mapped(far[0], directions, None, None), mapped(query, directions, None, None)):
        assert torch.equal(a, b)


# ---- random features ----


def mapped(x, directions, mask, grad, trigonometric=False, normalize=True, shift="row"):
    options = (trigonometric, normalize, SHIFTS.index(shift))
    features = feature_kernels.feature_map_fwd(x, directions, mask, *options)
    grad = features if grad is None else grad
    return features, *feature_kernels.feature_map_bwd(grad, x, directions, mask, features, *options)


def check_features(batch, tokens, head_dim, count, dtype=torch.float32, masked=False, length=1.0, **options):
    def draw():
        x, directions = random(batch, 2, tokens, head_dim) * length, random(2, count, head_dim)
        x[:, :, ::5] = 0
        x = x.to(dtype)
        mask = torch.rand(batch, tokens, device=DEVICE) > 0.5 if masked else None
        if masked:
            mask[-1] = True
        grad = random(batch, 2, tokens, count * (2 if options.get("trigonometric") else 1), dtype=dtype)
        names = {"normalize": options.get("normalize", True), "shift": options.get("shift", "row"), "mask": mask}
        kind = "trigonometric" if options.get("trigonometric") else "positive"
        results = []
        for cast in (lambda t: t, torch.Tensor.double):
            leaves = [cast(x).clone().requires_grad_(), cast(directions).clone().requires_grad_()]
            features = reference.feature_map(*leaves, kind, **names)
            results.append((features.detach(), *torch.autograd.grad(features, leaves, cast(grad))))
        return mapped(x, directions, mask, grad, **options), *results

    assert_accurate(draw, dtype, ("output", "grad_x", "grad_projection"))


@pytest.mark.parametrize("trigonometric", [False, True], ids=["positive", "trigonometric"])
@pytest.mark.parametrize(
    ("normalize", "shift", "masked"),
    [(True, "row", False), (True, "head", True), (False, "none", True), (False, "row", True), (False, "head", False)],
)
def test_features_equal_the_reference(trigonometric, normalize, shift, masked):
    length = 1.0 if normalize else 0.5
    options = {"trigonometric": trigonometric, "normalize": normalize, "shift": shift}
    check_features(2, 11, 5, 6, masked=masked, length=length, **options)


@pytest.mark.parametrize(
    ("dtype", "trigonometric"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_features_of_several_tiles_equal_the_reference(dtype, trigonometric):
    check_features(2, 100, 40, 70, dtype, masked=True, trigonometric=trigonometric, shift="head")


def test_rows_of_zeros_and_masked_heads_have_no_gradient():
    x, directions, mask = torch.zeros(2, 1, 5, 4, device=DEVICE), random(1, 3, 4), torch.zeros(2, 5, dtype=torch.bool)
    mask[1] = True
    mask = mask.to(DEVICE)
    features, grad_x, grad_directions = mapped(x, directions, mask, random(2, 1, 5, 3), shift="head")
    torch.testing.assert_close(features[0], torch.full_like(features[0], 3**-0.5))
    assert not features[1].any()
    assert not grad_x.any()
    assert not grad_directions.any()


@pytest.mark.parametrize("sizes", [(0, 2, 5), (1, 0, 5), (1, 2, 0)])
def test_features_of_nothing(sizes):
    found = mapped(random(*sizes, 4), random(sizes[1], 3, 4), None, None)
    assert [t.shape for t in found] == [(*sizes, 3), (*sizes, 4), (sizes[1], 3, 4)]
    assert not found[2].any()


@triton.jit
def waves(x, sines, cosines, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    sine, cosine = feature_kernels.sine_and_cosine(tl.load(x + lane))
    tl.store(sines + lane, sine)
    tl.store(cosines + lane, cosine)


@pytest.mark.parametrize("largest", [1.0, 30.0, 1e4])
def test_sine_and_cosine_hold_float32(largest):
    x = torch.linspace(-largest, largest, 2048, device=DEVICE)
    sines, cosines = torch.empty_like(x), torch.empty_like(x)
    waves[(1,)](x, sines, cosines, SIZE=2048)
    assert (sines.double() - x.double().sin()).abs().max() < 1e-7
    assert (cosines.double() - x.double().cos()).abs().max() < 1e-7
