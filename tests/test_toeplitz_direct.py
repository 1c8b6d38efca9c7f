"""The direct method of Toeplitz-weighted linear attention on the CPU: tiles of every size, exact sums, no order that depends on threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import assert_same_bits, assert_within_budget, require, run
from conformance.layouts import place

import effattn
from effattn import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
KINDS = {
    "sequence": {},
    "causal": {"is_causal": True},
    "grid": {"grid": True},
    "causal grid": {"is_causal": True, "grid": True},
}
SIDES = {1: (1, 1), 37: (37, 1), 60: (4, 15), 196: (14, 14), 306: (9, 34), 572: (26, 22)}


class Call:
    """A call of the direct method that the accuracy rule can be held against."""

    differentiable = ("query", "key", "value", "rpe_bias")

    def __call__(self, tensors, options, backend):
        if backend == "reference":
            return reference.toeplitz_linear_attention(*tensors.values(), **options)
        require("toeplitz_linear_attention", backend)
        return effattn.toeplitz_linear_attention(*tensors.values(), **options, method="direct", backend=backend)


def draw(seed=0, *, batch=1, heads=2, tokens=37, features=9, value_dim=17, grid=None, dtype=torch.float32, spread=1.0):
    """Positive features; a bias of ``spread`` nats about its mean."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = ((0.5 * normal(batch, heads, tokens, features)).exp().to(dtype) for _ in range(2))
    sides = (tokens,) if grid is None else grid
    bias = spread * normal(heads, *(max(2 * side - 1, 0) for side in sides))
    return {"query": query, "key": key, "value": normal(batch, heads, tokens, value_dim).to(dtype), "rpe_bias": bias}


def upstream(tensors, seed=0):
    return torch.randn(tensors["value"].shape, generator=torch.Generator().manual_seed(seed)).to(tensors["value"])


def options_of(kind, tokens, eps=0.0):
    options = {**KINDS[kind], "eps": eps}
    if options.pop("grid", False):
        options["grid"] = SIDES[tokens]
    return options


def check(kind, tokens, eps=0.0, change=None, **sizes):
    options = options_of(kind, tokens, eps)

    def sample(seed):
        tensors = draw(seed, tokens=tokens, grid=options.get("grid"), **sizes)
        if change:
            change(tensors)
        return tensors, options, upstream(tensors, seed)

    assert_within_budget(Call(), sample, "cpu")


def results(tensors, **options):
    return run(Call(), tensors, options, "cpu", upstream(tensors))


# ---- accuracy ----


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [37, 306, 572])
def test_every_kind_of_positions_keeps_the_accuracy_rule(kind, tokens, dtype):
    check(kind, tokens, batch=2 if tokens < 100 else 1, features=9, value_dim=17, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("features", "value_dim"), [(5, 1), (33, 64), (9, 256), (256, 17), (1, 64)], ids=str)
def test_sizes_of_features_and_values_are_independent(features, value_dim, dtype):
    check("sequence", 60, features=features, value_dim=value_dim, dtype=dtype)
    check("causal grid", 60, features=features, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 2, 47, 48, 49, 95, 96, 97, 191, 193, 256, 257, 449])
def test_blocks_of_every_length_meet(tokens):
    check("sequence", tokens, heads=1, features=5, value_dim=17)
    check("causal", tokens, heads=1, features=5, value_dim=17)


@pytest.mark.parametrize(
    "grid", [(1, 40), (40, 1), (2, 130), (130, 2), (7, 3), (5, 16), (3, 17), (4, 33), (1, 1)], ids=str
)
def test_grids_of_every_shape(grid):
    def sample(seed):
        tensors = draw(seed, tokens=grid[0] * grid[1], grid=grid, features=5, value_dim=9)
        return tensors, {"grid": grid}, upstream(tensors, seed)

    assert_within_budget(Call(), sample, "cpu")


@DTYPES
def test_one_token_gives_its_value(dtype):
    tensors = draw(tokens=1, batch=3, value_dim=64, dtype=dtype)
    torch.testing.assert_close(results(tensors).output, tensors["value"], rtol=2e-7, atol=0)
    for seed in range(10):
        assert_within_budget(Call(), lambda s: (t := draw(s, tokens=1, dtype=dtype), {}, upstream(t, s)), "cpu", seed)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-3, 20.0])
def test_eps_counts_and_so_does_the_largest_entry(kind, eps, dtype):
    """c = exp(b - max b) changes with the largest entry alone, which eps does not let cancel."""
    check(kind, 60, eps, dtype=dtype)


def test_largest_entries_share_what_eps_gives_them():
    check("sequence", 37, 0.5, change=lambda t: t["rpe_bias"].clamp_(max=0.5))


@DTYPES
def test_long_sums_stay_exact(dtype):
    check("sequence", 2100, heads=1, features=5, value_dim=9, dtype=dtype)


def test_bias_that_spans_many_orders_of_magnitude():
    def steep(tensors):
        tensors["rpe_bias"].copy_(torch.linspace(-40, 0, tensors["rpe_bias"].shape[-1]))

    check("sequence", 306, change=steep)
    check("causal", 306, change=steep)


def test_weights_of_either_sign():
    def signed(tensors):
        tensors["key"][..., ::2] *= -0.3

    check("sequence", 306, change=signed)
    check("grid", 306, change=signed)


# ---- nothing to attend to ----


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_minus_infinity_are_weights_of_zero(kind):
    def cut(tensors):
        flat = tensors["rpe_bias"].flatten(1)
        flat[0, ::3] = -math.inf
        flat[1, : flat.shape[1] // 2] = -math.inf

    check(kind, 60, change=cut)
    check(kind, 60, 0.5, change=cut)


@DTYPES
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_rows_without_weight_give_zero_and_no_gradient(eps, dtype):
    tensors = draw(tokens=60, dtype=dtype)
    tensors["query"][0, 0, 7] = 0
    tensors["rpe_bias"][1] = -math.inf
    got = results(tensors, eps=eps)
    assert not got.output[0, 0, 7].any() and not got.output[0, 1].any()
    assert got.output[0, 0, 6].all()
    for gradient in got.gradients.values():
        assert gradient.isfinite().all()
    for name in ("query", "key", "value"):
        assert not got.gradients[name][0, 1].any()
    assert not got.gradients["rpe_bias"][1].any() and got.gradients["rpe_bias"][0].all()
    if eps == 0:
        assert not got.gradients["query"][0, 0, 7].any()
    check(
        "sequence",
        60,
        eps,
        dtype=dtype,
        change=lambda t: (t["query"][0, 0, 7].zero_(), t["rpe_bias"][1].fill_(-math.inf)),
    )


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(0, 2, 60), (2, 2, 0), (2, 0, 60), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty_calls(batch, heads, tokens, is_causal):
    tensors = draw(batch=batch, heads=heads, tokens=tokens)
    got = results(tensors, is_causal=is_causal)
    assert got.output.shape == tensors["value"].shape
    for name, gradient in got.gradients.items():
        assert gradient.shape == tensors[name].shape
        assert not gradient.any()


# ---- what changes no bit ----


@DTYPES
@pytest.mark.parametrize("grid", [None, (26, 22)], ids=str)
def test_causal_outputs_do_not_see_later_tokens(grid, dtype):
    tensors = draw(tokens=572, heads=1, grid=grid, dtype=dtype)
    options = {"grid": grid, "is_causal": True}
    own = Call()(tensors, options, "cpu")
    for cut in (1, 47, 255, 300, 571):
        later = {n: t.clone() for n, t in tensors.items()}
        for name in ("query", "key", "value"):
            later[name][:, :, cut:] = draw(1, tokens=572, heads=1, dtype=dtype)[name][:, :, cut:] * 3 - 1
        got = Call()(later, options, "cpu")
        assert torch.equal(got[:, :, :cut], own[:, :, :cut])
        assert not torch.equal(got[:, :, cut], own[:, :, cut])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3), (5, 4)], ids=str)
def test_number_of_threads_changes_no_bit(kind, batch, heads):
    tensors = draw(batch=batch, heads=heads, tokens=572, features=33, grid=options_of(kind, 572).get("grid"))
    options, before, found = options_of(kind, 572, 0.1), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(tensors, **options))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize(
    "layout", ["token_major", "transposed", "sliced", "every_other", "expanded_batch", "expanded_everywhere"]
)
@DTYPES
def test_memory_layout_changes_no_bit(layout, dtype):
    tensors = draw(batch=2, tokens=60, dtype=dtype)
    tensors = {n: t if n == "rpe_bias" else place(t, layout) for n, t in tensors.items()}
    grad = place(upstream(tensors), layout)
    dense = {n: t.contiguous() for n, t in tensors.items()}
    got = run(Call(), tensors, {"is_causal": True}, "cpu", grad)
    assert_same_bits(got, run(Call(), dense, {"is_causal": True}, "cpu", grad.contiguous()))


def test_a_bias_shared_by_heads_gets_the_gradient_of_all():
    tensors = draw(tokens=60, heads=3)
    shared = {**tensors, "rpe_bias": tensors["rpe_bias"][:1]}
    every = {**tensors, "rpe_bias": tensors["rpe_bias"][:1].expand(3, -1).contiguous()}
    got, wanted = results(shared), results(every)
    assert torch.equal(got.output, wanted.output)
    torch.testing.assert_close(got.gradients["rpe_bias"][0], wanted.gradients["rpe_bias"].sum(0), rtol=1e-5, atol=1e-6)


# ---- levels ----

SMALL = """
import torch, test_toeplitz_direct as own
for kind in own.KINDS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own.check(kind, 306, 0.1, features=9, value_dim=33, heads=1, dtype=dtype)
print(own.effattn._native.isa())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_narrow_levels_keep_the_accuracy_rule(level):
    require("toeplitz_linear_attention", "cpu")
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "EFFATTN_CPU_ISA": level, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    ran = subprocess.run([sys.executable, "-c", SMALL], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if ran.stdout.strip() != level:
        pytest.skip(f"this processor runs {ran.stdout.strip()} where {level} is asked for")
