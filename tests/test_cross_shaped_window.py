"""Windows: what takes part in the softmax, how the published tables are indexed, where LePE ends, real shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import (
    CASES,
    Shape,
    assert_same_bits,
    assert_within_budget,
    backends_of,
    device_of,
    is_slow,
    require,
    run,
)

import effattn
from effattn import cross_shaped_window_attention, stripe_attention, window_attention

BACKENDS = pytest.mark.parametrize("backend", backends_of("window_attention"))
KERNELS = pytest.mark.parametrize("backend", [b for b in backends_of("window_attention") if b != "reference"])


def normal(*size, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)


def inputs(backend: str, *size) -> tuple[torch.Tensor, ...]:
    require("window_attention", backend)
    return tuple(normal(*size, seed=seed, device=device_of(backend)) for seed in range(3))


def close(got, wanted) -> None:
    torch.testing.assert_close(got.cpu(), wanted.cpu(), rtol=1e-4, atol=1e-5)


def mean_of_places(value: torch.Tensor, grid, rows: slice, columns: slice) -> torch.Tensor:
    return value.unflatten(2, grid)[:, :, rows, columns].mean((2, 3))


# ---- who attends to whom ----


@BACKENDS
def test_first_half_of_the_heads_is_vertical_and_the_second_horizontal(backend):
    _, _, value = inputs(backend, 2, 4, 3 * 5, 8)
    flat = torch.zeros_like(value)  # equal scores: every token gets the mean of its stripe
    out = cross_shaped_window_attention(flat, flat, value, (3, 5), 1, backend=backend).unflatten(2, (3, 5))
    grid = value.unflatten(2, (3, 5))
    close(out[:, :2], grid[:, :2].mean(2, keepdim=True).expand_as(grid[:, :2]))
    close(out[:, 2:], grid[:, 2:].mean(3, keepdim=True).expand_as(grid[:, 2:]))


@BACKENDS
def test_halves_are_the_two_stripe_attentions(backend):
    query, key, value = inputs(backend, 1, 2, 6 * 4, 8)
    both = cross_shaped_window_attention(query, key, value, (6, 4), 2, backend=backend)
    for head, orientation in enumerate(("vertical", "horizontal")):
        one = (t[:, head : head + 1] for t in (query, key, value))
        close(
            both[:, head : head + 1],
            stripe_attention(*one, (6, 4), 2, orientation=orientation, backend=backend),
        )


@BACKENDS
@pytest.mark.parametrize("stripe_width", [4, 7])
def test_last_stage_is_one_full_window_for_every_head(backend, stripe_width):
    query, key, value = inputs(backend, 1, 2, 4 * 3, 8)
    out = cross_shaped_window_attention(query, key, value, (4, 3), stripe_width, backend=backend)
    close(out, F.scaled_dot_product_attention(query, key, value))
    out = stripe_attention(query, key, value, (4, 3), stripe_width, orientation="vertical", backend=backend)
    close(out, F.scaled_dot_product_attention(query, key, value))


def test_odd_heads_are_refused_and_both_numbers_of_a_misfit_are_named():
    odd = torch.zeros(1, 3, 16, 8)
    with pytest.raises(ValueError, match="even number of heads, got 3"):
        cross_shaped_window_attention(odd, odd, odd, (4, 4), 2)
    even = torch.zeros(1, 2, 15, 8)
    with pytest.raises(ValueError, match=r"3 x 2 do not divide the grid of 3 x 5 \(width 5 is no multiple of 2"):
        cross_shaped_window_attention(even, even, even, (3, 5), 2)


# ---- padding ----


@BACKENDS
def test_zero_keys_take_part_in_the_softmax_and_masked_ones_do_not(backend):
    _, _, value = inputs(backend, 1, 2, 3 * 3, 8)
    flat = torch.zeros_like(value)
    published, masked = (
        window_attention(flat, flat, value, (3, 3), (2, 2), padding=padding, backend=backend)
        for padding in ("zero_key", "mask")
    )
    # One row and one column are missing, and go to the bottom and to the right: (m // 2 = 0 before).
    corner = mean_of_places(value, (3, 3), slice(2, 3), slice(2, 3))
    close(published[:, :, 8], corner / 4)
    close(masked[:, :, 8], corner)
    close(published[:, :, 0], mean_of_places(value, (3, 3), slice(0, 2), slice(0, 2)))


@BACKENDS
def test_padding_is_split_between_both_sides(backend):
    _, _, value = inputs(backend, 1, 1, 1 * 5, 8)
    flat = torch.zeros_like(value)
    out = window_attention(flat, flat, value, (1, 5), (1, 4), padding="mask", backend=backend)
    # 3 columns are missing: 1 before and 2 after, so the windows hold tokens 0-2 and 3-4.
    close(out[:, :, 0], value[:, :, :3].mean(2))
    close(out[:, :, 4], value[:, :, 3:].mean(2))


@BACKENDS
def test_overlap_beyond_the_image_is_zeros_that_take_part(backend):
    _, _, value = inputs(backend, 1, 1, 2 * 2, 8)
    flat = torch.zeros_like(value)
    out = window_attention(flat, flat, value, (2, 2), (2, 2), overlap=(1, 1), backend=backend)
    close(out, (value.sum(2, keepdim=True) / 16).expand_as(out))
    out = window_attention(flat, flat, value, (2, 2), (2, 2), overlap=(1, 1), padding="mask", backend=backend)
    close(out, value.mean(2, keepdim=True).expand_as(out))


# ---- the published tables ----


def test_hat_index_runs_below_zero_and_relies_on_wrapping():
    index = effattn.reference.relative_position_index((16, 16), (4, 4), "hat_oca")
    assert (index.min(), index.max()) == (0, 39 * 39 - 1)
    first = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    second = torch.cartesian_prod(torch.arange(24), torch.arange(24))
    down, right = (second[None, :] - first[:, None] - 7).unbind(-1)
    published = 39 * down + right
    assert (published.min(), published.max()) == (-880, 640)
    table = torch.arange(39 * 39)
    assert torch.equal(table[published], table[index])


def test_swin_index_is_query_minus_key():
    index = effattn.reference.relative_position_index((2, 3), (0, 0), "swin")
    assert index[0, 0] == (2 - 1) * 5 + 3 - 1
    assert index[5, 0] == 14
    assert index[0, 5] == 0


@BACKENDS
@pytest.mark.parametrize("bias_index", ["swin", "hat_oca"])
@pytest.mark.parametrize("overlap", [(0, 0), (1, 2)], ids=str)
def test_bias_of_every_pair_is_the_published_entry(backend, bias_index, overlap):
    _, _, value = inputs(backend, 1, 2, 2 * 3, 8)
    rows, columns = 2 * 2 + 2 * overlap[0] - 1, 2 * 3 + 2 * overlap[1] - 1
    table = normal(rows * columns, 2, seed=5).to(value)
    flat = torch.zeros_like(value)
    options = {"overlap": overlap, "bias_table": table, "bias_index": bias_index}
    out = window_attention(flat, flat, value, (2, 3), (2, 3), **options, backend=backend)
    index = effattn.reference.relative_position_index((2, 3), overlap, bias_index).to(table.device)
    keys = F.pad(value.unflatten(2, (2, 3)), (0, 0, overlap[1], overlap[1], overlap[0], overlap[0])).flatten(2, 3)
    close(out, table[index].permute(2, 0, 1).softmax(-1) @ keys)


@BACKENDS
def test_regions_are_kept_apart_by_100_and_not_by_infinity(backend):
    # One window, rolled by one column: token 0 is in another region than tokens 1 and 2.
    query, key, value = inputs(backend, 1, 1, 3, 8)
    query, key = torch.zeros_like(query), torch.zeros_like(key)
    query[0, 0, 1, 0], key[0, 0, 0, 0] = 1.0, 100.5
    out = window_attention(query, key, value, (1, 3), (1, 3), shift=(0, 1), scale=1.0, backend=backend)
    weight = torch.tensor([0.5, 0.0, 0.0]).softmax(0).to(value)
    close(out[0, 0, 1], weight @ value[0, 0])
    close(out[0, 0, 2], value[0, 0, 1:].mean(0))


# ---- LePE ----


@BACKENDS
def test_lepe_never_looks_across_a_window_border(backend):
    _, _, value = inputs(backend, 1, 2, 4 * 4, 8)
    value = value.unflatten(2, (4, 4)).clone()
    value[:, 0, :, 2:] = 0.0  # vertical stripes of two: only the first one holds anything
    value[:, 1, 2:] = 0.0
    value = value.flatten(2, 3)
    weight, bias = normal(16, 1, 3, 3, seed=7).to(value), normal(16, seed=8).to(value)
    flat = torch.zeros_like(value)
    out = cross_shaped_window_attention(
        flat, flat, value, (4, 4), 2, lepe_weight=weight, lepe_bias=bias, backend=backend
    ).unflatten(2, (4, 4))
    close(out[0, 0, :, 2:], bias[:8].expand(4, 2, 8))
    close(out[0, 1, 2:], bias[8:].expand(2, 4, 8))
    plain = cross_shaped_window_attention(flat, flat, value, (4, 4), 2, backend=backend).unflatten(2, (4, 4))
    stripe = value.unflatten(2, (4, 4))[0, 0, :, :2].permute(2, 0, 1)
    close((out - plain)[0, 0, :, :2].permute(2, 0, 1), F.conv2d(stripe, weight[:8], bias[:8], padding=1, groups=8))


@BACKENDS
def test_parameters_of_any_strides(backend):
    query, key, value = inputs(backend, 1, 2, 4 * 4, 8)
    weight, bias = normal(16, 1, 3, 3, seed=7).to(value).transpose(2, 3), normal(32, seed=8).to(value)[::2]
    table = normal(2, 9, seed=9).to(value).t()
    strided, plain = (
        window_attention(
            *(query, key, value, (4, 4), (2, 2)),
            lepe_weight=layout(weight),
            lepe_bias=layout(bias),
            bias_table=layout(table),
            backend=backend,
        )
        for layout in (lambda t: t, torch.Tensor.contiguous)
    )
    assert torch.equal(strided, plain)


# ---- real shapes ----


@KERNELS
@pytest.mark.parametrize("head_dim", [24, 30, 46, 53, 77, 122])
def test_head_dims_of_real_models(backend, head_dim):
    case = CASES["window_attention"][0]
    require(case.op, backend)
    if is_slow(backend) and head_dim != 53:
        pytest.skip("slow here")
    shape = Shape(batch=1, heads=2, grid=(3, 4) if is_slow(backend) else (12, 10), prefix=0, head_dim=head_dim)
    options, grad_output = case.options(shape), case.grad_output(shape, device=device_of(backend))
    assert_within_budget(
        case, lambda seed: (case.tensors(shape, seed=seed, device=device_of(backend)), options, grad_output), backend
    )


REAL = {
    "CSWin stage 1 at 224": ("cross_shaped_window_attention", (56, 56), 32, {"stripe_width": 1}),
    "CSWin stage 2 at 384": ("cross_shaped_window_attention", (48, 48), 24, {"stripe_width": 2}),
    "CSWin stage 3 at 224": ("cross_shaped_window_attention", (14, 14), 32, {"stripe_width": 7}),
    "CSWin stage 3 at 384": ("cross_shaped_window_attention", (24, 24), 24, {"stripe_width": 12}),
    "CSWin stage 4 at 384": ("cross_shaped_window_attention", (12, 12), 32, {"stripe_width": 12}),
    "CSWin segmentation": ("cross_shaped_window_attention", (40, 50), 32, {"stripe_width": 7, "padding": "zero_key"}),
    "Swin stage 2": ("window_attention", (28, 28), 32, {"window": (7, 7), "shift": (3, 3)}),
    "Swin detection": ("window_attention", (25, 34), 32, {"window": (7, 7), "shift": (3, 3), "padding": "mask"}),
    "HAT": ("window_attention", (48, 32), 30, {"window": (16, 16), "shift": (8, 8)}),
    "HAT OCA": ("window_attention", (48, 32), 30, {"window": (16, 16), "overlap": (4, 4), "bias_index": "hat_oca"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", REAL)
def test_published_shapes(model, dtype):
    op, grid, head_dim, options = REAL[model]
    require(op, "cpu")
    case = CASES[op][0]
    shape = Shape(batch=2, heads=2, grid=grid, prefix=0, head_dim=head_dim)

    def draw(seed: int):
        packed = normal(2, grid[0] * grid[1], 3, 2, head_dim, seed=seed).to(dtype)  # as a qkv projection leaves it
        tensors = dict(zip(("query", "key", "value"), packed.permute(2, 0, 3, 1, 4)))
        if "window" in options:
            entries = [2 * w + 2 * o - 1 for w, o in zip(options["window"], options.get("overlap", (0, 0)))]
            tensors["bias_table"] = normal(entries[0] * entries[1], 2, seed=seed + 10)
        else:
            tensors["lepe_weight"] = normal(2 * head_dim, 1, 3, 3, seed=seed + 10) / 3
            tensors["lepe_bias"] = normal(2 * head_dim, seed=seed + 20)
        return tensors, {"grid": grid, **options}, case.grad_output(shape, dtype)

    wrt = tuple(draw(0)[0])
    assert_within_budget(case.with_(differentiable=wrt), draw, "cpu")


def test_parameter_gradients_are_the_same_bits_on_any_number_of_threads():
    require("window_attention", "cpu")
    case = CASES["window_attention"][0]
    shape = Shape(batch=4, heads=3, grid=(28, 28), prefix=0, head_dim=32)
    tensors, grad_output = case.tensors(shape), case.grad_output(shape)
    options = {"grid": (28, 28), "window": (2, 3), "shift": (1, 1), "padding": "zero_key"}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, tensors, options, "cpu", grad_output))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


# ---- structured masks ----


MASKS = {
    "stripes": (effattn.CrossShapedWindow((4, 6), 2), {"heads": 2}),
    "stripes with padding": (effattn.CrossShapedWindow((4, 6), 5, padding="mask"), {"heads": 2}),
    "windows": (effattn.Window((4, 6), (2, 3)), {}),
    "shifted": (effattn.Window((4, 6), (2, 3), shift=(1, 2), bias_table=normal(15, 2)), {}),
    "padded": (effattn.Window((4, 6), (3, 4), padding="mask", bias_table=normal(35, 2)), {}),
    "overlapping": (
        effattn.Window((4, 6), (2, 3), overlap=(1, 1), padding="mask", bias_table=normal(35, 2), bias_index="hat_oca"),
        {},
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_stock_sdpa_takes_the_mask_and_its_dense_form_says_the_same(name):
    mask, arguments = MASKS[name]
    query, key, value = (normal(2, 2, 24, 16, seed=seed).double() for seed in range(3))
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    dense = mask.dense(**arguments).double()
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, attn_mask=dense))


@pytest.mark.parametrize(
    "mask",
    [
        effattn.Window((4, 6), (2, 4), padding="zero_key"),
        effattn.Window((4, 6), (2, 2), overlap=(1, 1)),
        effattn.Window((4, 6), (2, 2), lepe_weight=torch.ones(8, 1, 3, 3)),
        effattn.CrossShapedWindow((4, 6), 2, lepe_weight=torch.ones(8, 1, 3, 3)),
    ],
    ids=repr,
)
def test_no_dense_form_where_zero_keys_take_part_or_lepe_is_added(mask):
    with pytest.raises(NotImplementedError, match="no dense mask is the same"):
        mask.dense()


def test_masks_carry_parameters_and_their_gradients():
    table, weight = normal(9, 2).requires_grad_(), normal(8, 1, 3, 3).requires_grad_()
    query = normal(1, 2, 16, 8)
    F.scaled_dot_product_attention(
        query, query, query, attn_mask=effattn.Window((4, 4), (2, 2), bias_table=table, lepe_weight=weight)
    ).square().sum().backward()
    assert table.grad.abs().sum() > 0
    assert weight.grad.abs().sum() > 0


# ---- refusals ----


def test_combinations_that_mean_nothing_are_refused():
    x = torch.zeros(1, 2, 16, 8)
    with pytest.raises(ValueError, match=r"overlap must be \(0, 0\) where lepe_weight is given"):
        window_attention(x, x, x, (4, 4), (2, 2), overlap=(1, 1), lepe_weight=torch.ones(8, 1, 3, 3))
    with pytest.raises(ValueError, match="lepe_bias must be None where lepe_weight is"):
        window_attention(x, x, x, (4, 4), (2, 2), lepe_bias=torch.ones(8))
    with pytest.raises(ValueError, match="overlap height must be at least 0"):
        window_attention(x, x, x, (4, 4), (2, 2), overlap=(-1, 0))
