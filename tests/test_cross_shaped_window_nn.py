"""Modules of CSWin, Swin and HAT: what they compute, what state dicts they load, how they run."""

from __future__ import annotations

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from conformance import RecordedCalls, require
from published_windows import Block, CSWinBlock, HATOverlappingBlock, SwinBlock
from torch import nn

import effattn
from effattn.nn import CrossShapedWindowAttention, OverlappingCrossAttention, WindowAttention
from effattn.ops.cross_shaped_window import PADDING

every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.fixture(autouse=True)
def _available(request):
    if "backend" in request.fixturenames:
        for op in ("cross_shaped_window_attention", "window_attention"):
            require(op, request.getfixturevalue("backend"))


# ---- the modules compute what the blocks do ----


class Case(NamedTuple):
    published: object
    ours: object
    grid: tuple[int, int]
    dim: int


def cswin(grid, split_size, dim=24, heads=4, padding="error", **options):
    options = {"split_size": split_size, **options}
    return Case(
        lambda: CSWinBlock(dim, heads, **options),
        lambda **more: CrossShapedWindowAttention(dim, heads, padding=padding, **options, **more),
        *(grid, dim),
    )


def swin(grid, window, shift=(0, 0), dim=24, heads=3, padding="error", index_buffer=True):
    return Case(
        lambda: SwinBlock(dim, window, heads, shift, index_buffer=index_buffer),
        lambda **more: WindowAttention(dim, window, heads, shift=shift, padding=padding, **more),
        *(grid, dim),
    )


def overlapping(grid, window, overlap_ratio, dim=20, heads=2):
    return Case(
        lambda: HATOverlappingBlock(dim, window, heads, overlap_ratio),
        lambda **more: OverlappingCrossAttention(dim, window, heads, overlap_ratio=overlap_ratio, **more),
        *(grid, dim),
    )


CASES = {
    "cswin": cswin((8, 8), 2),
    "cswin-width-1-not-square": cswin((3, 5), 1),
    "cswin-last-stage": cswin((7, 7), 7, last_stage=True),
    "cswin-last-stage-not-square": cswin((3, 6), 7, dim=30, heads=2, last_stage=True),
    "cswin-without-qkv-bias-own-scale": cswin((6, 4), 2, heads=2, qkv_bias=False, qk_scale=0.7),
    "cswin-segmentation": cswin((9, 7), 4, padding="zero_key"),
    "cswin-segmentation-one-padded-side": cswin((4, 9), 3, dim=48, heads=2, padding="zero_key"),
    "swin": swin((6, 9), (3, 3)),
    "swin-shifted": swin((9, 6), (3, 3), (1, 1)),
    "swin-shifted-window-not-square": swin((8, 6), (4, 3), (2, 1)),
    "swin-detection": swin((7, 8), (3, 3), padding="input"),
    "swin-detection-shifted": swin((10, 5), (4, 4), (2, 2), padding="input"),
    "swin-detection-smaller-than-a-window": swin((3, 2), (4, 4), (2, 2), padding="input"),
    "hat": swin((8, 8), (4, 4), (2, 2), dim=60, heads=2, index_buffer=False),
    "hat-overlapping": overlapping((8, 12), 4, 0.5),
    "hat-overlapping-wraps": overlapping((4, 4), 4, 1.0),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def both(case, backend="reference", **options):
    """A published block with weights that matter, and our module that loaded its state dict."""
    block = case.published()
    with torch.no_grad():
        block_qkv = block.attn.qkv if hasattr(block, "attn") else block.qkv
        block_qkv.weight.normal_(std=1.5 * case.dim**-0.5)
    attention = case.ours(backend=backend, **options)
    attention.load_state_dict(block.state_dict(), strict=True)
    return block, attention


def results(module, x, grid, grad_output):
    """Output and all gradients, by name; the attention's own names also for a block."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, grid)
    out.backward(grad_output)
    found = {"output": out.detach(), "x": x.grad}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("attn.")] = parameter.grad
    return found


@every_case
def test_in_float64_the_module_is_the_published_block(case):
    block, attention = both(case)
    x, grad = torch.randn(2, 2, case.grid[0] * case.grid[1], case.dim, dtype=torch.float64)
    wanted = results(block.double(), x, case.grid, grad)
    got = results(attention.double(), x, case.grid, grad)
    assert set(got) == set(wanted) == {"output", "x", *(name for name, _ in attention.named_parameters())}
    for name in got:
        scale = max(tensor.abs().max() for tensor in (wanted[name], grad)).item()
        torch.testing.assert_close(
            got[name], wanted[name], rtol=0, atol=1e-13 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_backend
@every_case
def test_in_float32_the_module_is_as_exact_as_the_published_block(case, backend):
    block, attention = both(case, backend)
    x, grad = torch.randn(2, 2, case.grid[0] * case.grid[1], case.dim)
    low, got = (results(module, x, case.grid, grad) for module in (block, attention))
    exact = results(block.double(), x.double(), case.grid, grad.double())
    assert set(got) == set(exact)
    for name, ref in exact.items():
        eps = torch.finfo(torch.float32).eps * max(ref.abs().max(), grad.abs().max())
        allowed = (2 if name == "output" else 3) * (low[name] - ref).abs().max() + 4 * eps  # two projections round too
        assert (got[name] - ref).abs().max() <= allowed, name


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cswin-segmentation", "cswin-last-stage", "swin-shifted", "hat-overlapping"])
def test_in_half_precision_the_module_is_as_exact_as_the_published_block(name, dtype, backend):
    case = CASES[name]
    block, attention = both(case, backend)
    block, attention = block.to(dtype), attention.to(dtype)
    x, grad = torch.randn(2, 2, case.grid[0] * case.grid[1], case.dim).to(dtype)
    low, got = (results(module, x, case.grid, grad) for module in (block, attention))
    exact = results(block.double(), x.double(), case.grid, grad.double())
    for part, ref in exact.items():
        assert got[part].dtype == dtype
        allowed = (2 if part == "output" else 3) * (low[part] - ref).abs().max() + torch.finfo(
            dtype
        ).eps * ref.abs().max()
        assert (got[part] - ref).abs().max() <= allowed, part


@every_backend
@every_case
def test_a_grid_of_images_is_the_same_as_its_tokens(case, backend):
    attention = case.ours(backend=backend)
    x = torch.randn(2, *case.grid, case.dim)
    out = attention(x)
    assert out.shape == x.shape
    assert torch.equal(out, attention(x, case.grid))
    assert torch.equal(out.flatten(1, 2), attention(x.flatten(1, 2), grid=case.grid))


# ---- traps of the published code ----


def test_zero_keys_of_the_segmentation_code_count_and_masked_ones_do_not():
    attention = {
        p: CrossShapedWindowAttention(8, 2, split_size=4, padding=p, backend="reference")
        for p in ("zero_key", "mask", "error")
    }
    for module in attention.values():
        module.load_state_dict(attention["mask"].state_dict())
    x = torch.randn(1, 6 * 6, 8)
    assert not torch.allclose(attention["zero_key"](x, (6, 6)), attention["mask"](x, (6, 6)))
    with pytest.raises(ValueError, match="padding"):
        attention["error"](x, (6, 6))


def test_a_stripe_that_covers_the_grid_is_the_grid_and_not_padded():
    """The segmentation code would pad it up to the stripe."""
    attention = {p: CrossShapedWindowAttention(8, 2, split_size=7, padding=p, backend="reference") for p in PADDING}
    for module in attention.values():
        module.load_state_dict(attention["mask"].state_dict())
    x = torch.randn(1, 5, 6, 8)
    for module in attention.values():
        assert torch.equal(module(x), attention["mask"](x))


def test_padding_of_the_detection_code_has_the_bias_of_qkv_for_keys_and_lies_below_and_right():
    modules = {p: WindowAttention(8, 4, 2, padding=p, backend="reference") for p in ("input", "zero_key", "mask")}
    with torch.no_grad():
        for module in modules.values():
            module.load_state_dict(modules["input"].state_dict())
    x = torch.randn(1, 4 * 4 + 4, 8)  # one more row than a window

    def outs():
        return [module(x, (5, 4)) for module in modules.values()]

    given, zero_key, _ = outs()
    assert not torch.allclose(given[:, :16], zero_key[:, :16])  # padded above too: the first window is not whole
    torch.testing.assert_close(given[:, :16], modules["input"](x[:, :16], (4, 4)))
    with torch.no_grad():
        modules["input"].qkv.bias.normal_()
    assert not torch.allclose(given[:, 16:], outs()[0][:, 16:])


def test_a_grid_not_larger_than_the_window_is_one_window_without_shift():
    attention = WindowAttention(12, 7, 3, shift=3, resolution=(7, 7))
    assert (attention.window, attention.shift) == ((7, 7), (0, 0))
    attention = WindowAttention(12, 7, 3, shift=3, resolution=(4, 8))
    assert (attention.window, attention.shift) == ((4, 4), (0, 0))
    assert attention.relative_position_bias_table.shape == (49, 3)
    assert attention(torch.randn(1, 32, 12)).shape == (1, 32, 12)
    attention = WindowAttention(12, 7, 3, shift=3, resolution=14)
    assert (attention.window, attention.shift) == ((7, 7), (3, 3))
    assert WindowAttention(12, 7, 3, shift=3).shift == (3, 3)


def test_a_resolution_of_one_stripe_is_the_last_stage_as_published():
    assert len(CrossShapedWindowAttention(8, 2, split_size=12, resolution=12).attns) == 1
    assert len(CrossShapedWindowAttention(8, 2, split_size=12, resolution=24).attns) == 2
    assert len(CrossShapedWindowAttention(8, 2, split_size=12, resolution=(12, 24)).attns) == 2


def test_a_scale_of_zero_is_the_default_as_published():
    for module in (
        CrossShapedWindowAttention(8, 2, qk_scale=0.0),
        WindowAttention(8, 2, 2, qk_scale=None),
        OverlappingCrossAttention(8, 2, 2, overlap_ratio=1.0, qk_scale=0.0),
    ):
        assert module.scale == 4**-0.5


def test_published_initialisation():
    modules = (
        CrossShapedWindowAttention(256, 8),
        WindowAttention(256, 16, 8),
        OverlappingCrossAttention(256, 16, 8, overlap_ratio=0.5),
    )
    for module in modules:
        for name, parameter in module.named_parameters():
            if "get_v" in name:
                assert parameter.abs().max() <= 1 / 3  # torch's default for nine inputs
                assert parameter.std() > 0.15
            elif name.endswith("bias"):
                assert not parameter.any()
            else:
                assert abs(parameter.std() / 0.02 - 1) < 0.05, name


# ---- state dicts ----


@every_case
def test_the_state_dict_of_a_block_loads_unchanged_and_stays_as_it_was(case):
    block, attention = case.published(), case.ours()
    state = block.state_dict()
    before = list(state)
    assert not any(attention.load_state_dict(state, strict=True))
    assert list(state) == before
    for name, tensor in attention.state_dict().items():
        assert torch.equal(tensor, state.get(name, state.get(f"attn.{name}"))), name


@pytest.mark.parametrize("name", ["cswin", "cswin-last-stage", "swin-shifted", "hat", "hat-overlapping"])
def test_a_block_of_another_shape_or_with_other_names_is_refused(name):
    state = CASES[name].published().state_dict()
    attention = CASES[name].ours()
    with pytest.raises(RuntimeError, match=r"Unexpected.*surprise"):
        attention.load_state_dict({**state, "surprise": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing.*qkv\.weight"):
        attention.load_state_dict({n: t for n, t in state.items() if not n.endswith("qkv.weight")})
    with pytest.raises(RuntimeError, match="size mismatch"):
        attention.load_state_dict({n: t[1:] for n, t in state.items()})


def test_both_branches_of_cswin_keep_their_own_convolution():
    state = CASES["cswin"].published().state_dict()
    with pytest.raises(RuntimeError, match=r"attns\.1"):
        CrossShapedWindowAttention(24, 4, last_stage=True).load_state_dict(state)


@pytest.mark.parametrize("name", ["swin-shifted", "hat"])
def test_the_state_dict_goes_back_to_the_published_attention(name):
    case = CASES[name]
    block, _ = both(case)
    attention = case.ours(index_buffer=name != "hat")
    attention.load_state_dict(block.attn.state_dict(), strict=True)
    state = attention.state_dict()
    assert set(state) == set(block.attn.state_dict())
    assert all(torch.equal(tensor, block.attn.state_dict()[name]) for name, tensor in state.items())
    assert not any(block.attn.load_state_dict(state, strict=True))
    assert not any(case.ours().load_state_dict(state, strict=True))


def test_a_block_that_inherits_has_the_published_names():
    class Ours(CrossShapedWindowAttention):
        def __init__(self, dim, heads, split_size):
            super().__init__(dim, heads, split_size=split_size)
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.mlp = nn.Sequential()
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

        def forward(self, x, grid):
            x = x + super().forward(self.norm1(x), grid)
            return x + self.mlp(self.norm2(x))

    published = nn.Sequential(*(CASES["cswin"].published() for _ in range(2)))
    model = nn.Sequential(*(Ours(24, 4, 2) for _ in range(2)))
    assert not any(model.load_state_dict(published.state_dict(), strict=True))
    assert set(model.state_dict()) == set(published.state_dict())
    assert torch.equal(model[1].mlp.fc1.weight, published[1].mlp.fc1.weight)
    assert model[0](torch.randn(1, 64, 24), (8, 8)).shape == (1, 64, 24)


def test_inside_a_larger_model_the_attention_of_a_block_loads():
    published = nn.ModuleDict({"layer": CASES["swin-shifted"].published()})
    ours = nn.ModuleDict({"layer": Block(24)})
    ours["layer"].attn = WindowAttention(24, 3, 3, shift=1)
    left = ours.load_state_dict(published.state_dict(), strict=False)
    assert left == ([], ["layer.attn_mask"])
    published["layer"].attn.relative_position_bias_table.data.zero_()
    assert ours["layer"].attn.relative_position_bias_table.any()


# ---- how they run ----


@pytest.mark.parametrize("case", [CASES["cswin"], CASES["cswin-last-stage"], CASES["swin-shifted"]])
def test_one_operator_reads_q_k_and_v_where_the_projection_wrote_them(case):
    require("window_attention", "cpu")
    attention = case.ours(backend="cpu")
    x = torch.randn(2, case.grid[0] * case.grid[1], case.dim)
    with torch.no_grad(), RecordedCalls() as recorded:
        attention(x, case.grid)
    ((_, (query, key, value, *_)),) = recorded.calls
    assert len({tensor.untyped_storage().data_ptr() for tensor in (query, key, value)}) == 1
    tokens = case.grid[0] * case.grid[1]
    assert query.stride() == (tokens * 3 * case.dim, query.shape[3], 3 * case.dim, 1)


@every_backend
@pytest.mark.parametrize("name", ["cswin-segmentation", "swin-detection-shifted", "hat-overlapping"])
def test_autocast_computes_in_bfloat16_and_trains_the_parameters_in_float32(name, backend):
    case = CASES[name]
    _, attention = both(case, backend)
    x = torch.randn(1, case.grid[0] * case.grid[1], case.dim)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, case.grid)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in attention.parameters())
    assert all(parameter.grad.any() for parameter in attention.parameters())
    exact = attention(x, case.grid)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("cswin-segmentation", "reference"),
        ("cswin", "cpu"),
        ("swin-detection-shifted", "cpu"),
        ("hat-overlapping", "cpu"),
    ],
)
def test_a_training_step_compiles_to_one_graph(name, backend):
    torch._dynamo.reset()
    case = CASES[name]
    _, attention = both(case, backend)
    x, grad = torch.randn(2, 2, case.grid[0] * case.grid[1], case.dim)
    wanted = results(attention, x, case.grid, grad)
    got = results(torch.compile(attention, fullgraph=True, backend="aot_eager"), x, case.grid, grad)
    for part, tensor in wanted.items():
        torch.testing.assert_close(got.get(part, got.get(f"_orig_mod.{part}")), tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [CrossShapedWindowAttention, WindowAttention])
def test_dropout_is_of_training_only(make):
    options = {
        "num_heads": 2,
        "backend": "reference",
        "split_size" if make is CrossShapedWindowAttention else "window": 2,
    }
    x = torch.randn(2, 16, 8)
    for option in ("attn_drop", "proj_drop"):
        module = make(8, **options, **{option: 0.5})
        torch.nn.init.normal_(module.proj.weight)
        assert not torch.equal(module(x, (4, 4)), module(x, (4, 4)))
        plain = make(8, **options)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module.eval()(x, (4, 4)), plain(x, (4, 4)))


def test_an_explicit_kernel_refuses_dropout_in_training_and_serves_evaluation():
    require("window_attention", "cpu")
    module = WindowAttention(8, 2, 2, attn_drop=0.1, backend="cpu")
    x = torch.randn(1, 16, 8)
    with pytest.raises(NotImplementedError, match="dropout"):
        module(x, (4, 4))
    assert module.eval()(x, (4, 4)).shape == x.shape


@every_case
def test_modules_copy_pickle_and_explain(case):
    attention = case.ours(backend="reference").eval()
    x = torch.randn(1, case.grid[0] * case.grid[1], case.dim)
    out = attention(x, case.grid)
    saved = io.BytesIO()
    torch.save(attention, saved)
    saved.seek(0)
    others = copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), torch.load(saved, weights_only=False)
    for other in others:
        assert torch.equal(other(x, case.grid), out)
        assert repr(other) == repr(attention)
    assert effattn.explain(attention, x, case.grid).backend == "reference"


@every_case
def test_modules_are_made_on_the_meta_device_and_in_half_precision(case):
    module = case.ours(device="meta")
    assert module(torch.empty(2, *case.grid, case.dim, device="meta")).shape == (2, *case.grid, case.dim)
    assert {parameter.dtype for parameter in case.ours(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@every_case
def test_an_empty_batch(case):
    attention = case.ours(backend="reference")
    out = attention(torch.randn(0, *case.grid, case.dim))
    out.sum().backward()
    assert out.shape == (0, *case.grid, case.dim)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in attention.parameters())


# ---- what they refuse ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CrossShapedWindowAttention(10, 4), ValueError, "dim 10 must be a multiple of num_heads 4"),
        (lambda: CrossShapedWindowAttention(9, 3), ValueError, "num_heads must be even"),
        (lambda: CrossShapedWindowAttention(8, 2, split_size=0), ValueError, "split_size must be at least 1"),
        (lambda: CrossShapedWindowAttention(8, 2, padding="input"), ValueError, "padding must be one of"),
        (lambda: CrossShapedWindowAttention(8, 2, attn_drop=1.0), ValueError, "attn_drop"),
        (lambda: CrossShapedWindowAttention(8, 2, qk_scale="1"), TypeError, "qk_scale"),
        (lambda: WindowAttention(8, "7", 2), TypeError, "window"),
        (lambda: WindowAttention(8, 7, 2, shift=7), ValueError, "shift must be below window"),
        (lambda: WindowAttention(8, 7, 2, padding="bottom"), ValueError, "input"),
        (lambda: WindowAttention(8, 7, 2, resolution=(7,)), TypeError, "resolution"),
        (lambda: OverlappingCrossAttention(8, 7, 2, overlap_ratio=0.5), ValueError, "overlap_ratio .* even"),
        (lambda: OverlappingCrossAttention(8, 4, 2, overlap_ratio=-1.0), ValueError, "overlap_ratio"),
    ],
)
def test_modules_refuse_what_they_cannot_be(make, error, message):
    with pytest.raises(error, match=f"(CrossShapedWindow|Window|OverlappingCross)Attention: .*{message}"):
        make()


@pytest.mark.parametrize(
    ("x", "grid", "error", "message"),
    [
        (torch.zeros(1, 16, 9), (4, 4), ValueError, r"h\*w, 8"),
        (torch.zeros(16, 8), (4, 4), ValueError, "x must have shape"),
        (torch.zeros(1, 16, 8), None, ValueError, "grid must be given"),
        (torch.zeros(1, 16, 8), (3, 4), ValueError, "16 tokens, but grid 3 x 4"),
        (torch.zeros(1, 4, 4, 8), (2, 8), ValueError, "grid must be that of x"),
        (torch.zeros(1, 16, 8), 4, TypeError, "grid"),
        ([1.0], (4, 4), TypeError, "x must be a Tensor"),
    ],
)
def test_modules_refuse_what_they_cannot_take(x, grid, error, message):
    for module in (CrossShapedWindowAttention(8, 2, split_size=2), WindowAttention(8, 2, 2)):
        with pytest.raises(error, match=message):
            module(x, grid)
