"""NPRF-DeiT: DeiT-B whose attention is kernelised, with a bias over relative positions.

The class token is a token of the sequence: relative positions are differences of indices among all 197 tokens. Positive
random features of normalised queries and keys, 32 of them. Names of parameters are timm's: the state dict of a DeiT loads
with ``strict=False`` and leaves the tables and random directions.

There is no official code. The eager form is the paper's algorithm, products with a Toeplitz matrix by FFT, head by head,
which is faster here than all heads at once and needs an eighth of the memory; "dense" is the quadratic form of the same sum,
which a user would write at 197 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.nn import KernelizedRPEAttention
from effattn.reference.toeplitz import relative_weights, toeplitz_matrix

from ..toeplitz_peers import FEATURES, _features, _spectrum, fft_head
from ..vit import BASE, Architecture, VisionTransformer
from . import DIGITS, EAGER, OURS, PUBLISHED, Model

DENSE = "dense"
SMALL = Architecture(width=64, depth=2, heads=4, patch=8, image=32, classes=10)
SIZES = {PUBLISHED: BASE, DIGITS: SMALL}


class EagerAttention(KernelizedRPEAttention):
    """sum_m q_m (c * (k_m [v, 1])), divided; * is a convolution, by FFT."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, _ = self._project(x)
        query, key = _features(query, key, self.projection)
        spectra = _spectrum(relative_weights(self.rpe_bias))
        heads = zip(query.unbind(1), key.unbind(1), value.unbind(1), spectra)
        training = torch.is_grad_enabled()
        return self._finish(torch.stack([fft_head(*head, training) for head in heads], 1), x)


class DenseAttention(KernelizedRPEAttention):
    """(q k^T * C) [v, 1], divided, with the whole of C."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, _ = self._project(x)
        query, key = _features(query, key, self.projection)
        scores = query @ key.mT * toeplitz_matrix(relative_weights(self.rpe_bias))
        return self._finish(scores @ value / scores.sum(-1, keepdim=True), x)


ATTENTION = {OURS: KernelizedRPEAttention, EAGER: EagerAttention, DENSE: DenseAttention}


def _build(form: str, size: str) -> VisionTransformer:
    """The plain model, its attention replaced."""
    model, architecture = VisionTransformer(SIZES[size]), SIZES[size]
    tokens = model.pos_embed.shape[1]
    for block in model.blocks:
        block.attn = ATTENTION[form](architecture.width, architecture.heads, num_features=FEATURES, num_tokens=tokens)
    if architecture is SMALL:  # of 64 channels, 0.02 is nothing to start from
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(50.0 if name == "pos_embed" else 7.0)
    return model


MODELS = (
    Model(
        "NPRF-DeiT-B", "arXiv 2106.12566; DeiT-B, arXiv 2012.12877, table 1", _build, (DENSE,), batch=2, parameters=86.0
    ),
)
