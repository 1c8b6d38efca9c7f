"""Peers of kernelised attention with a relative position bias and of URPE, written as a good user would.

All get queries, keys, values, bias and projection, and compute features inside the clock, as ours does. What follows from
the bias alone (its matrix, its spectrum) is at hand in inference and derived at every call in training, where it is
learned. The FFT formula goes head by head, which is faster here than all heads at once from a thousand tokens on and
needs an eighth of the memory: its peak is that of one head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.reference.toeplitz import feature_map, relative_weights, toeplitz_matrix, unit

from .cases import Call, Case, Inputs
from .peers import compiled

FEATURES = 32  # M
SHARED_FROM = 16384  # tokens from which a dense bias is one matrix for all heads
Same = Callable[[Callable], Callable]


def uncompiled(function: Callable) -> Callable:
    return function


def _features(query: Tensor, key: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    return feature_map(query, projection), feature_map(key, projection)


def _derived(inputs: Inputs, name: str, training: bool, make: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """``make`` of a parameter: at every call in training, once in inference."""
    if training:
        return lambda: make(inputs.parameters[name])
    with torch.no_grad():
        once = make(inputs.parameters[name])
    return lambda: once


# ---- kernelised attention ----


def _spectrum(weights: Tensor) -> Tensor:
    """rfft of (H, 2N - 1) weights, laid out so that a circular convolution of 2N starts with the wanted N results."""
    length = (weights.shape[-1] + 1) // 2
    kernel = F.pad(weights.flip(-1), (0, 1)).roll(1 - length, -1)
    return torch.fft.rfft(kernel)


def fft_head(query: Tensor, key: Tensor, value: Tensor, spectrum: Tensor, training: bool) -> Tensor:
    """sum_m q_m (c * (k_m [v, 1])), divided; (B, N, M) features and (B, N, D) values of one head."""
    length = key.shape[1]
    columns = torch.cat((value, torch.ones_like(value[..., :1])), -1).mT.contiguous()
    product = torch.fft.rfft(key.mT[:, :, None] * columns[:, None], 2 * length)
    product = product * spectrum if training else product.mul_(spectrum)
    convolved = torch.fft.irfft(product, 2 * length)[..., :length]
    del product
    weight = query.mT[:, :, None]
    summed = (convolved * weight if training else convolved.mul_(weight)).sum(1)
    return (summed[:, :-1] / summed[:, -1:]).mT


def fft_formula(case: Case, inputs: Inputs, training: bool) -> Call:
    def spectra(bias: Tensor) -> Tensor:
        return _spectrum(relative_weights(bias))

    spectrum = _derived(inputs, "rpe_bias", training, spectra)

    def attend():
        exact = torch.promote_types(inputs.query.dtype, torch.float32)  # of lower ones there is no transform
        query, key, value = (tensor.to(exact) for tensor in inputs[:3])
        query, key = _features(query, key, inputs.parameters["projection"])
        of_heads, heads = spectrum().unbind(), range(query.shape[1])
        output = [fft_head(query[:, h], key[:, h], value[:, h], of_heads[h], training) for h in heads]
        return torch.stack(output, 1).to(inputs.query.dtype)

    return attend


def fft_memory(case: Case, training: bool) -> float:
    """Spectrum and transform of one head, in training what every head keeps."""
    per_head = 4.0 * case.batch * case.tokens * FEATURES * (case.head_dim + 1)
    return per_head * (5 + 6 * case.heads if training else 5)


def fft_reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, projection: Tensor) -> Tensor:
    """One head in blocks of features: for lengths at which the specification's matrix does not fit.

    Only in float64, whose transform is exact to 1e-12 of the largest output for biases as narrow as those here.
    """
    query, key = _features(query, key, projection)
    length, spectrum, total = query.shape[2], _spectrum(relative_weights(bias))[0], 0.0
    columns = torch.cat((value, torch.ones_like(value[..., :1])), -1)[:, 0].mT
    for feature in range(key.shape[3]):
        product = torch.fft.rfft(key[:, 0, :, feature, None].mT * columns, 2 * length)
        convolved = torch.fft.irfft(product.mul_(spectrum), 2 * length)[..., :length]
        total = total + convolved * query[:, 0, :, feature, None].mT
    return (total[:, :-1] / total[:, -1:]).mT[:, None]


def eager(how: Same = uncompiled) -> Callable[[Case, Inputs, bool], Call]:
    """(phi(q) phi(k)^T * C) [v, 1], divided; C at hand in inference."""

    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        def weights(bias: Tensor) -> Tensor:
            weights = relative_weights(bias.flatten(1)).view(bias.shape)
            return toeplitz_matrix(weights, case.grid or None).to(inputs.query.dtype)

        matrix = _derived(inputs, "rpe_bias", training, weights)

        def attend(query, key, value, projection, matrix):
            query, key = _features(query, key, projection)
            scores = query @ key.mT
            scores = scores.mul_(matrix) if not training and how is uncompiled else scores * matrix
            return scores @ value / scores.sum(-1, keepdim=True)

        attend = how(attend)
        return lambda: attend(*inputs[:3], inputs.parameters["projection"], matrix())

    return prepare


def dense_memory(case: Case, training: bool) -> float:
    """C, and score-sized tensors alive at once."""
    scores = 4.0 * case.heads * case.tokens**2
    return scores * (1 + case.batch * (4 if training else 1)) + 2 * scores


def flex_kernelized(case: Case, inputs: Inputs, training: bool) -> Call:
    """Features as queries and keys: exp(log(phi(q) . phi(k)) + b) is the weight itself."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(flex_attention)
    bias, last = inputs.parameters["rpe_bias"].detach().float(), case.tokens - 1

    def weighted(score, b, h, i, j):
        return score.log() + bias[h, j - i + last]

    def call():
        query, key = _features(inputs.query, inputs.key, inputs.parameters["projection"])
        return attend(query, key, inputs.value, score_mod=weighted, scale=1.0)

    return call


def biased_sdpa(case: Case, inputs: Inputs, training: bool) -> Call:
    """What a user would call instead: softmax of q.k + b, of which kernelised attention is an estimate.

    The dense bias has a matrix for each head, (1, H, N, N). From 16k tokens on that is 8.6 GB, and one matrix serves all
    heads, (1, 1, N, N): less than what the call replaces, and faster to read.
    """
    bias = inputs.parameters["rpe_bias"].detach()
    bias = bias[:1] if case.tokens >= SHARED_FROM else bias
    mask = toeplitz_matrix(bias.to(inputs.query.dtype))[None]

    def attend():
        query, key = unit(inputs.query), unit(inputs.key)
        return F.scaled_dot_product_attention(query, key, inputs.value, attn_mask=mask, scale=1.0)

    return attend


def biased_memory(case: Case, training: bool) -> float:
    """The bias, and the indices that made it."""
    matrices = 1 if case.tokens >= SHARED_FROM else case.heads
    return case.tokens**2 * (4.0 * matrices + 16.0)


# ---- URPE ----


def eager_urpe(how: Same = uncompiled) -> Callable[[Case, Inputs, bool], Call]:
    """The published formula, with both matrices at hand in inference."""

    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        scale, dtype = case.head_dim**-0.5, inputs.query.dtype
        tables = (
            _derived(inputs, name, training, lambda entries: toeplitz_matrix(entries).to(dtype))
            for name in ("coefficient", "rpe_bias")
        )
        coefficient, bias = tables
        in_place = not training and how is uncompiled

        def attend(query, key, value, coefficient, bias):
            scores = (scale * query) @ key.mT
            if in_place:
                return scores.add_(bias).softmax(-1).mul_(coefficient) @ value
            return ((scores + bias).softmax(-1) * coefficient) @ value

        attend = how(attend)
        return lambda: attend(*inputs[:3], coefficient(), bias())

    return prepare


def urpe_memory(case: Case, training: bool) -> float:
    return dense_memory(case, training) + 4.0 * case.heads * case.tokens**2
