"""The Triton kernels of URPE, run (by Triton's interpreter where there is no GPU) against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from conformance import Placed, assert_within_budget
from effattn.triton_kernels import patches, urpe

import effattn
from effattn import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = ("coefficient", "rpe_bias")

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_empty")]


class Call:
    """A call as the accuracy rule runs it."""

    def __init__(self, tensors):
        self.differentiable = tuple(tensors)

    def __call__(self, tensors, options, backend):
        return effattn.urpe_attention(**{"coefficient": None, **tensors}, **options, backend=backend)


def draw(size, seed=0, *, tables=TABLES, dtype=torch.float32, batch=1, heads=2, head_dim=6):
    """The tensors of a call, by name, and a gradient of its output; `size`: tokens, or a grid."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    grid = (1, size) if isinstance(size, int) else size
    rows = (batch, heads, grid[0] * grid[1], head_dim)
    entries = (2 * size - 1,) if isinstance(size, int) else [2 * side - 1 for side in size]
    tensors = {name: random(*rows, dtype=dtype) for name in ("query", "key", "value")}
    tensors |= {name: random(heads, *entries) for name in tables}
    return tensors, random(*rows, dtype=dtype)


def differentiate(function, tensors, grad_output, **options):
    """{"output": ..., name: gradient}"""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    output = function(**{"coefficient": None, **leaves}, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def run(tensors, grad_output, **options):
    return differentiate(effattn.urpe_attention, tensors, grad_output, backend="triton", **options)


@pytest.mark.parametrize(
    ("size", "sizes", "options"),
    [
        (67, {"heads": 1}, {}),  # several tiles, the last one ragged
        (67, {"heads": 1}, {"is_causal": True}),
        (37, {"dtype": torch.bfloat16, "heads": 1, "head_dim": 80}, {"is_causal": True, "scale": 0.2}),
        ((5, 7), {"dtype": torch.float16, "batch": 2}, {}),
        ((5, 13), {"heads": 1}, {"is_causal": True}),  # patches of two rows and more, evened out
        ((3, 37), {"heads": 1, "dtype": torch.bfloat16}, {"is_causal": True}),  # rows of two patches
        ((40, 2), {"heads": 1, "tables": ("coefficient",)}, {}),
        ((41, 1), {"tables": ("rpe_bias",), "dtype": torch.bfloat16}, {"is_causal": True}),
        (33, {"tables": ("coefficient",), "head_dim": 1}, {"is_causal": True}),
        (33, {"tables": ("rpe_bias",), "head_dim": 1, "dtype": torch.float16}, {}),
        (35, {"tables": ()}, {"is_causal": True}),
        (2, {"batch": 3}, {}),
    ],
    ids=[
        "tiles",
        "tiles-causal",
        "head_dim-80",
        "grid",
        "grid-causal",
        "wide-grid",
        "tall-grid-coefficient",
        "column-bias",
        "coefficient",
        "bias",
        "neither",
        "two-tokens",
    ],
)
def test_it_equals_the_reference(size, sizes, options):
    if not isinstance(size, int):
        options = {"grid": size, **options}

    def drawn(seed):
        tensors, grad_output = draw(size, seed, **sizes)
        return tensors, options, grad_output

    assert_within_budget(Call(drawn(0)[0]), drawn, "triton")


# ---------------------------------------------------------------- entries of -inf


@pytest.mark.parametrize("tables", [TABLES, ("rpe_bias",)], ids=["both", "bias"])
def test_a_row_that_sees_nothing_is_zero(tables):
    tokens, near = 37, 5
    tensors, grad_output = draw(tokens, tables=tables)
    tensors["rpe_bias"][:, tokens - near : tokens] = float("-inf")  # nothing sees itself and the near ones before it
    tensors["rpe_bias"][1, ::3] = float("-inf")
    got = run(tensors, grad_output, is_causal=True)
    expected = differentiate(reference.urpe_attention, tensors, grad_output, is_causal=True)
    assert torch.equal(got["output"][:, :, :near], torch.zeros_like(got["output"][:, :, :near]))
    assert torch.equal(got["query"][:, :, :near], torch.zeros_like(got["query"][:, :, :near]))
    assert got["output"][:, :, near:].abs().amin((0, 1, 3)).max() > 0
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(got[name], tensor, atol=2e-5, rtol=2e-5)
    hidden = tensors["rpe_bias"] == float("-inf")
    assert all((got[name][hidden] == 0).all() for name in tables)


def test_a_bias_of_nothing_but_minus_infinity_gives_zeros():
    grid = (3, 12)
    tensors, grad_output = draw(grid, dtype=torch.bfloat16)
    tensors["rpe_bias"].fill_(float("-inf"))
    for name, tensor in run(tensors, grad_output, grid=grid).items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name
    rows = [tensors[name] for name in ("query", "key", "value")]
    _, logsumexp = urpe.relative_fwd(*rows, None, tensors["rpe_bias"].flatten(1), *grid, False, 1.0)
    assert (logsumexp == float("-inf")).all()


# ---------------------------------------------------------------- how the work is divided


def test_splits_of_the_sums_agree_and_runs_are_bitwise_equal(monkeypatch):
    grid = (2, 17)
    tensors, grad_output = draw(grid, batch=4, heads=1)
    results = []
    for target in (1, 4096, 4096):
        monkeypatch.setattr(patches, "TARGET_PROGRAMS", target)
        results.append(run(tensors, grad_output, grid=grid))
    for name in results[0]:
        assert torch.equal(results[1][name], results[2][name]), name
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-4, rtol=1e-4)
    assert not all(torch.equal(results[0][name], results[1][name]) for name in TABLES)  # the order did change


def test_an_absent_table_has_an_empty_gradient():
    tensors, grad_output = draw(9, tables=())
    arguments = (*tensors.values(), None, None)
    saved = urpe.relative_fwd(*arguments, 1, 9, False, 0.5)
    gradients = urpe.relative_bwd(grad_output, *arguments, *saved, 1, 9, False, 0.5)
    assert [tuple(t.shape) for t in gradients[3:]] == [(0,), (0,)]


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["packed", "sliced", "expanded_everywhere"])
def test_strides_do_not_matter_and_neighbours_are_not_touched(layout):
    grid = (2, 5)
    tensors, grad_output = draw(grid, dtype=torch.bfloat16, batch=2)
    rows = [*(tensors[name] for name in ("query", "key", "value")), grad_output]
    results = []
    placed = [Placed(t, layout) for t in rows]
    for copy in (lambda t: t, torch.Tensor.contiguous):
        query, key, value, grad = (copy(t.tensor) for t in placed)
        results.append(run(tensors | {"query": query, "key": key, "value": value}, grad, grid=grid, is_causal=True))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
    for t in placed:
        assert t.is_untouched()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (2, 0)])
def test_empty_inputs(batch, tokens):
    rows = (batch, 2, tokens, 4)
    tensors = {name: torch.ones(rows, device=DEVICE) for name in ("query", "key", "value")}
    tensors |= {name: torch.ones((2, max(2 * tokens - 1, 0)), device=DEVICE) for name in TABLES}
    for name, tensor in run(tensors, torch.ones(rows, device=DEVICE)).items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name
