"""The soft_merge Triton kernels, run (by Triton's interpreter where there is no GPU) against the reference."""

import mmap
import sys

import pytest
import torch

pytest.importorskip("triton")

from conformance import GuardedAllocations, Placed
from effattn.triton_kernels import soft_merge as kernels
from linear_like import assert_close_enough
from torch.utils._python_dispatch import TorchDispatchMode

import effattn
from effattn import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (2, 41, 35, 70)  # batch, tokens, outputs, channels: several blocks of each, the last one not full

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned_empty")]


def draw(shape, dtype=torch.float32, seed=0):
    """(tokens, logits, a gradient of the output)"""
    batch, tokens, outputs, channels = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, tokens, channels), (batch, tokens, outputs), (batch, outputs, channels))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE) for size in sizes]


def differentiate(function, tokens, logits, grad_output, **options):
    """(output, grad_tokens, grad_logits)"""
    tokens, logits = (t.detach().requires_grad_() for t in (tokens, logits))
    output = function(tokens, logits, **options)
    return output.detach(), *torch.autograd.grad(output, (tokens, logits), grad_output)


class SizesOfAllocations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in GuardedAllocations.ALLOCATORS:
            self.sizes.append(result.numel())
        return result


def run(tokens, logits, grad_output):
    return differentiate(effattn.soft_merge, tokens, logits, grad_output, backend="triton")


def check(tokens, logits):
    """The accuracy rule for the output and both gradients."""

    def call(backend, tokens, logits):
        return effattn.soft_merge(tokens, logits, backend=backend)

    assert_close_enough(call, "triton", tokens.requires_grad_(), logits.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_the_reference_over_several_blocks(dtype):
    check(*draw(RAGGED, dtype)[:2])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 2, 33, 1), (1, 65, 1, 33), (1, 33, 8, 65), (1, 32, 32, 64), (1, 5, 17, 130)]
)
def test_any_shape(shape):
    check(*draw(shape)[:2])


def test_the_logarithm_of_the_normalizer_is_saved():
    tokens, logits, _ = draw(RAGGED)
    logits[:, :, 3] = -INF
    logits[:, 32:, 4] = -INF  # a whole block of its tokens
    _, logsumexp = kernels.soft_merge_fwd(tokens, logits)
    torch.testing.assert_close(logsumexp, logits.logsumexp(1))


# ---------------------------------------------------------------- logits far from zero


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, 1e4), (torch.float32, -1e4), (torch.bfloat16, 1e4), (torch.bfloat16, -1e6), (torch.float16, 3e4)],
)
def test_an_offset_costs_no_accuracy(dtype, offset):
    """At 1e4 the logsumexp is off by 5e-4, at 1e6 by 3e-2, which neither weights nor gradients may be."""
    tokens, logits, _ = draw((1, 41, 19, 40), dtype)
    logits += offset
    check(tokens, logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_spread_over_ten_thousand_pick_one_token(dtype):
    tokens, logits, grad_output = draw((1, 40, 19, 33), dtype)
    index = torch.arange(19, device=DEVICE) * 2
    logits = logits.clamp(-1, 1) * 1e4
    logits[0, index, torch.arange(19, device=DEVICE)] = 2e4
    output, grad_tokens, grad_logits = run(tokens, logits, grad_output)
    assert torch.equal(output, tokens[:, index])
    assert torch.equal(grad_tokens, torch.zeros_like(tokens).index_add(1, index, grad_output))
    assert grad_logits.abs().max() < 1e-4


def test_one_hot_logits_gather():
    tokens, logits, grad_output = draw(RAGGED)
    index = torch.randint(RAGGED[1], (RAGGED[0], RAGGED[2]), device=DEVICE)
    logits = torch.full_like(logits, -INF).scatter_(1, index[:, None], 3.0)
    wide = index[:, :, None].expand_as(grad_output)
    output, grad_tokens, grad_logits = run(tokens, logits, grad_output)
    assert torch.equal(output, tokens.gather(1, wide))
    torch.testing.assert_close(grad_tokens, torch.zeros_like(tokens).scatter_add(1, wide, grad_output))
    assert grad_logits.abs().max() < 1e-4


# ---------------------------------------------------------------- logits of -inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_of_nothing_but_minus_infinity_gives_zeros(dtype):
    tokens, logits, grad_output = draw((2, 35, 35, 33), dtype)
    logits[0, :, 5] = -INF
    logits[:, :, 32:] = -INF  # a whole block of outputs
    logits[:, ::3, 2] = -INF  # and a column that is not empty
    results = run(tokens, logits, grad_output)
    for result, expected in zip(results, differentiate(reference.soft_merge, tokens, logits, grad_output)):
        torch.testing.assert_close(result, expected, atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    output, _, grad_logits = results
    for empty in (output[0, 5], output[:, 32:], grad_logits[logits == -INF]):
        assert torch.equal(empty, torch.zeros_like(empty))


# ---------------------------------------------------------------- layouts and memory


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every_other", "expanded_batch", "expanded_everywhere"])
def test_strides_do_not_matter_and_neighbours_are_not_touched(layout):
    placed = [Placed(t, layout) for t in draw((2, 37, 19, 9), torch.bfloat16)]
    strided = [t.tensor for t in placed]
    results = run(*strided)
    tolerance = (
        0.0 if DEVICE == "cpu" else 2 * torch.finfo(torch.bfloat16).eps
    )  # compiled, strides decide who adds what
    for result, wanted in zip(results, run(*(t.contiguous() for t in strided))):
        torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)
    for t in placed:
        assert t.is_untouched()
    for gradient, like in zip(results[1:], strided):
        assert gradient.stride() == torch.empty_like(like).stride()
    assert results[0].is_contiguous()


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="the memory is that of a Linux host")
def test_strides_past_two_to_the_31_elements():
    beyond = 2**31
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # of these 4 GB few pages are ever touched
    ocean = torch.frombuffer(mmap.mmap(-1, 2 * (beyond + 2**20), flags=private), dtype=torch.bfloat16)
    drawn = draw((2, 5, 3, 4), torch.bfloat16)
    strides = ((16, beyond // 4 + 64, 1), (8, 16, beyond // 2 + 64), (beyond + 64, 4, 1))
    far = [ocean.as_strided(t.shape, s, 2**12 * n).copy_(t) for n, (t, s) in enumerate(zip(drawn, strides))]
    for result, wanted in zip(run(*far), run(*drawn)):
        assert torch.equal(result, wanted)


def test_kernels_write_only_inside_their_outputs():
    tokens, logits, grad_output = draw((2, 37, 19, 33))
    with GuardedAllocations() as guarded:
        saved = kernels.soft_merge_fwd(tokens, logits)
        gradients = kernels.soft_merge_bwd(grad_output, tokens, logits, *saved)
    guarded.assert_intact()
    for result, wanted in zip((saved[0], *gradients), run(tokens, logits, grad_output)):
        assert torch.equal(result, wanted)


def test_nothing_of_the_size_of_the_logits_is_allocated_but_their_gradient():
    tokens, logits, grad_output = draw((1, 67, 35, 5))
    with SizesOfAllocations() as forward:
        saved = kernels.soft_merge_fwd(tokens, logits)
    with SizesOfAllocations() as backward:
        kernels.soft_merge_bwd(grad_output, tokens, logits, *saved)
    assert max(forward.sizes) == saved[0].numel()
    assert [size for size in backward.sizes if size > tokens.numel()] == [logits.numel()]


def test_runs_are_bitwise_equal():
    drawn = draw(RAGGED, torch.float16)
    for first, second in zip(run(*drawn), run(*drawn)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 7, 3, 4), (2, 0, 3, 4), (2, 7, 0, 4), (0, 0, 0, 1)])
def test_empty_inputs(shape):
    drawn = draw(shape)
    for result, like in zip(run(*drawn), (drawn[2], *drawn[:2])):
        assert torch.equal(result, torch.zeros_like(like))
    _, logsumexp = kernels.soft_merge_fwd(*drawn[:2])
    assert torch.equal(logsumexp, torch.full((shape[0], shape[2]), -INF, device=DEVICE))
