"""Tunes tiles, warps and stages of the Triton kernels on the GPU at hand: a short list for each, tried in its own operator."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

import effattn

from . import _tuning
from ._registry import KERNEL_DTYPES
from ._tune import Outcome, Times, settle, timer

HEAD_DIMS = (64, 128)
BATCH, HEADS, TOKENS = 2, 8, 1024
SMALL_WINDOW, LARGE_WINDOW = 4, 8


def tune(family: str, seconds: float, settled: set) -> Iterator[Outcome]:
    """Every choice that the operators of ``family`` look up, but for those whose keys are ``settled``."""
    device = torch.device("cuda", torch.cuda.current_device())
    cases = list(itertools.product(CALLS[family], KERNEL_DTYPES, HEAD_DIMS))
    for build, dtype, head_dim in cases:
        times = timer(seconds / len(cases) / 8, "cuda")
        yield from tune_call(build(device, dtype, head_dim, TOKENS), device, times, settled)


def tune_call(call: Callable, device: torch.device, times: Times, settled: set) -> Iterator[Outcome]:
    """``call(backend, dtype)``, results and gradients: first the tiles that it looks up, then how they are launched.

    A candidate that does not run here, or whose error is not that of the shipped one, is left out.
    """
    from .triton_kernels import configurations as table

    exact = call("reference", torch.float64)
    kept: dict[str, object] = {}

    def run(entries=None):
        with _tuning.pretend({**kept, **(entries or {})}):
            return call("triton", None)

    for choice in (table.TILE, table.LAUNCH):
        for features, default in _looked_up(table, run, choice):
            key = _tuning.key(choice, _tuning.gpu(device.index), features)
            if key not in settled:
                settled.add(key)
                outcome = _settled(choice, features, default, device, run, exact, times)
                kept[key] = outcome.kept
                yield outcome


def _settled(choice: str, features: tuple, default: tuple, device, run: Callable, exact, times: Times) -> Outcome:
    """One choice: ``run`` takes entries of the file to pretend."""
    from .triton_kernels import configurations as table

    place = _tuning.gpu(device.index)
    key, before = _tuning.key(choice, place, features), _tuning.find_on(device, choice, *features).value or default
    limits = _limits(run({key: default}), exact)
    calls = {}
    for pair in dict.fromkeys((before, default, *table.candidates(choice, default))):
        call = functools.partial(run, {key: pair})
        if pair == default or _fits(call, exact, limits):
            calls[pair] = call
    seconds = dict(zip(calls, times({str(pair): call for pair, call in calls.items()}).values()))
    before = before if before in calls else default  # what is in force is wrong here
    after = min(seconds, key=seconds.get)

    def again() -> tuple[float, float]:
        return tuple(times({str(pair): calls[pair] for pair in (before, after)}).values())

    return settle(choice, place, features, before, after, (seconds[before], seconds[after]), again)


def _looked_up(table, run: Callable, choice: str) -> list[tuple[tuple, tuple]]:
    table.asked = {}
    try:
        run()
        return [(features, default) for (name, features), default in table.asked.items() if name == choice]
    finally:
        table.asked = None


def _limits(results, exact) -> list[float]:
    """The accuracy rule, with the shipped configuration in the place of plain PyTorch in the same dtype."""
    limits = []
    for result, truth in zip(results, exact):
        rounding = torch.finfo(result.dtype).eps * truth.abs().max().item()
        limits.append(2 * _error(result, truth) + rounding)
    return limits


def _error(result, truth) -> float:
    return (result.double() - truth).abs().max().item()


def _fits(run: Callable, exact, limits) -> bool:
    try:
        results = run()
        return all(_error(result, truth) <= limit for result, truth, limit in zip(results, exact, limits))
    except Exception:  # noqa: BLE001 - it needs more than the chip has, or the compiler gives up: Triton has no one error
        return False


# ---- the operators: each gives call(backend, dtype), where a dtype replaces that of the inputs ----


def _step(operator: Callable, *tensors: torch.Tensor) -> Callable:
    """A training step of ``operator(*tensors, backend=...)``: its output and all gradients."""
    generator = torch.Generator().manual_seed(1)

    def step(backend: str, dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
        output = operator(*leaves, backend=backend)
        grad = torch.randn(output.shape, generator=generator.manual_seed(1)).to(output)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    return step


def _draw(device, dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device, dtype)


def _inputs(device, dtype, head_dim: int, tokens: int) -> tuple[torch.Tensor, ...]:
    return _draw(device, dtype, 3, BATCH, HEADS, tokens, head_dim).unbind(0)


def _attention(device, dtype, head_dim, tokens):
    return _step(effattn.scaled_dot_product_attention, *_inputs(device, dtype, head_dim, tokens))


def _gaussian_mixture(device, dtype, head_dim, tokens):
    alpha, sigma = torch.rand(2, 5, HEADS, generator=torch.Generator().manual_seed(0)).to(device).add(0.5)
    width = max(1, round(tokens**0.5))

    def operator(query, key, value, *, backend):
        parameters = [parameter.to(torch.promote_types(query.dtype, torch.float32)) for parameter in (alpha, sigma)]
        grid = width, query.shape[2] // width
        return effattn.gaussian_mixture_attention(query, key, value, *parameters, grid, backend=backend)

    return _step(operator, *_inputs(device, dtype, head_dim, width * width))


def _windows(device, dtype, head_dim, tokens):
    side = max(LARGE_WINDOW, round(tokens**0.5) // LARGE_WINDOW * LARGE_WINDOW)

    def operator(query, key, value, *, backend):
        return effattn.window_attention(
            query, key, value, (side, side), (LARGE_WINDOW,) * 2, shift=(SMALL_WINDOW,) * 2, backend=backend
        )

    return _step(operator, *_inputs(device, dtype, head_dim, side * side))


def _retention(device, dtype, head_dim, tokens):
    def operator(query, key, value, *, backend):
        log_decay = effattn.retnet_log_decay(query.shape[1], device=query.device)
        log_decay = log_decay.to(torch.promote_types(query.dtype, torch.float32))
        return effattn.retention(query, key, value, log_decay, backend=backend)

    return _step(operator, *_inputs(device, dtype, head_dim, tokens))


def _toeplitz(device, dtype, head_dim, tokens):
    query, key, value = _inputs(device, dtype, head_dim, tokens)

    def operator(query, key, value, *, backend):
        bias = torch.zeros(query.shape[1], 2 * query.shape[2] - 1, device=query.device)
        bias = bias.to(torch.promote_types(query.dtype, torch.float32))
        return effattn.toeplitz_linear_attention(query, key, value, bias, method="direct", backend=backend)

    return _step(operator, query.abs(), key.abs(), value)


def _soft_merge(device, dtype, head_dim, tokens):
    x, logits = (_draw(device, dtype, BATCH, tokens, size) for size in (8 * head_dim, max(tokens // 4, 1)))
    return _step(effattn.soft_merge, x, logits)


def _sized(device, dtype, head_dim, tokens):
    def operator(query, key, value, *, backend):
        sizes = torch.ones(query.shape[0], query.shape[2], device=query.device)
        sizes = sizes.to(torch.promote_types(query.dtype, torch.float32))
        return effattn.size_weighted_attention(query, key, value, sizes, backend=backend)

    return _step(operator, *_inputs(device, dtype, head_dim, tokens))


def _shift_linear(device, dtype, head_dim, tokens):
    weight = effattn.quantize_power_of_two(_draw(device, torch.float32, 8 * head_dim, 8 * head_dim) / 8)

    def operator(x, *, backend):
        return effattn.shift_linear(x, weight, backend=backend)

    return _step(operator, _draw(device, dtype, tokens, 8 * head_dim))


CALLS = {
    "attention": (_attention,),
    "gaussian_mixture": (_gaussian_mixture,),
    "cross_shaped_window": (_windows,),
    "retention": (_retention,),
    "toeplitz": (_toeplitz,),
    "token_merging": (_soft_merge, _sized),
    "shift_add": (_shift_linear,),
}
