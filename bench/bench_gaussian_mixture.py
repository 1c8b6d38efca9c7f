"""Gaussian-mixture-mask attention and its free-mask variant against every peer.

    O = softmax((scale * Q K^T) * M) V

No stock attention multiplies logits, so the dense peers are the published formula with M materialised ("eager"), the
same with the scale folded into M and the scores multiplied in place ("eager tuned"), torch.compile, and FlexAttention
with a score_mod. In inference M does not change: every peer gets it precomputed, while ours derives it from alpha and
sigma at each call. In training all have to derive it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effattn.bench.cases import OURS, Call, Case, Contender, Family, Inputs, Operator, Sweep
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled, flex, scores, unmasked_sdpa

import effattn
from effattn.reference import mixture_mask

GAUSSIANS, EPS = 5, 1e-5  # K and epsilon, the published defaults
LONGEST_FORMULA = 4096  # tokens up to which the specification's K x N x N intermediates of a head fit most machines


def _mixture_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    published = {
        "alpha": 2 * torch.randn(GAUSSIANS, case.heads, generator=generator),
        "sigma": 10 + 10 * torch.randn(GAUSSIANS, case.heads, generator=generator),
    }
    parameters = {name: tensor.to(device) for name, tensor in published.items()}
    return Inputs(*case.qkv(dtype, device), parameters, {})


def _free_mask_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(case.heads, case.tokens, case.tokens, generator=generator).to(dtype).to(device)
    return Inputs(*case.qkv(dtype, device), {"weight": weight}, {})


def _mask(case: Case, inputs: Inputs) -> torch.Tensor:
    """M in float32 from alpha and sigma, (H, N, N), or the free mask as it is; differentiable."""
    if case.operator == "masked_product":
        return inputs.parameters["weight"]
    alpha, sigma = inputs.parameters["alpha"], inputs.parameters["sigma"]
    return mixture_mask(alpha, sigma, case.grid, case.num_prefix_tokens)


def _head(case: Case, inputs: Inputs, head: int) -> Inputs:
    """One head's inputs: the formula's K x H x N x N intermediates do not fit every machine."""
    one = slice(head, head + 1)
    if case.operator == "masked_product":
        parameters = {"weight": inputs.parameters["weight"][one]}
    else:
        parameters = {name: tensor[:, one] for name, tensor in inputs.parameters.items()}
    return Inputs(*(tensor[:, one] for tensor in inputs[:3]), parameters, {})


@torch.no_grad()
def _precomputed_mask(case: Case, inputs: Inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """M by looking up distances, for its K x H x N x N formula takes longer than all else that is measured."""
    if case.operator == "masked_product":
        return inputs.parameters["weight"]
    height, width = case.grid
    alpha, sigma = (inputs.parameters[name].double()[..., None, None] for name in ("alpha", "sigma"))
    down, right = (torch.arange(n, device=alpha.device) for n in (height, width))
    squared_distance = down[:, None] ** 2 + right**2
    table = (alpha * torch.exp(-squared_distance / (2 * (sigma**2 + EPS)))).sum(0).to(dtype)
    y, x = down.repeat_interleave(width), right.repeat(height)
    mask = table[:, (y[:, None] - y).abs(), (x[:, None] - x).abs()]
    return F.pad(mask, (case.num_prefix_tokens, 0, case.num_prefix_tokens, 0), value=1.0)


def _reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    q, k, v, parameters, _ = _head(case, inputs, head)
    if case.operator == "masked_product":
        return effattn.reference.masked_product_attention(q, k, v, **parameters)
    if case.tokens > LONGEST_FORMULA:
        mask = _precomputed_mask(case, Inputs(q, k, v, parameters, {}), q.dtype)
        return effattn.reference.masked_product_attention(q, k, v, mask)
    return effattn.reference.gaussian_mixture_attention(
        q, k, v, **parameters, grid=case.grid, num_prefix_tokens=case.num_prefix_tokens
    )


def _ours(case: Case, inputs: Inputs, training: bool) -> Call:
    q, k, v, parameters, _ = inputs
    if case.operator == "masked_product":
        return lambda: effattn.masked_product_attention(q, k, v, parameters["weight"])
    alpha, sigma, prefix = parameters["alpha"], parameters["sigma"], case.num_prefix_tokens
    return lambda: effattn.gaussian_mixture_attention(q, k, v, alpha, sigma, case.grid, num_prefix_tokens=prefix)


def _formula(case: Case, inputs: Inputs):
    """The training step's forward: M from its parameters, nothing in place."""
    scale = case.head_dim**-0.5

    def attend(query, key, value):
        mask = (scale * _mask(case, inputs)).to(query.dtype)
        return (scores(query, key) * mask).softmax(-1) @ value

    return attend


def _eager(case: Case, inputs: Inputs, training: bool) -> Call:
    q, k, v = inputs[:3]
    if training:
        attend = _formula(case, inputs)
        return lambda: attend(q, k, v)
    mask, scale = _precomputed_mask(case, inputs).to(q.dtype), case.head_dim**-0.5
    return lambda: (scale * scores(q, k) * mask).softmax(-1) @ v


def _eager_tuned(case: Case, inputs: Inputs, training: bool) -> Call:
    q, k, v = inputs[:3]
    mask = (case.head_dim**-0.5 * _precomputed_mask(case, inputs)).to(q.dtype)
    return lambda: scores(q, k).mul_(mask).softmax(-1) @ v


def _compiled(case: Case, inputs: Inputs, training: bool) -> Call:
    q, k, v = inputs[:3]
    if training:
        attend = compiled(_formula(case, inputs))
        return lambda: attend(q, k, v)
    mask = (case.head_dim**-0.5 * _precomputed_mask(case, inputs)).to(q.dtype)
    attend = compiled(lambda query, key, value, mask: (scores(query, key) * mask).softmax(-1) @ value)
    return lambda: attend(q, k, v, mask)


def _flex(case: Case, inputs: Inputs, training: bool) -> Call:
    # Reading M is faster than computing the mixture inside score_mod, and M in float32 as fast as in bfloat16.
    def multiplied(mask: torch.Tensor):
        return lambda score, b, h, i, j: score * mask[h, i, j]

    if training:
        return flex(inputs, lambda: multiplied(_mask(case, inputs).float()))
    multiply = multiplied(_precomputed_mask(case, inputs).float())
    return flex(inputs, lambda: multiply)


def _dense_memory(case: Case, training: bool) -> float:
    """Score-sized tensors alive at once; training keeps every Gaussian of the mixture, a few times."""
    mixture = 4 * GAUSSIANS * case.heads if training and case.operator == "gaussian_mixture" else 0
    return 4.0 * case.tokens**2 * (mixture + 5 * case.batch * case.heads)


NOT_TUNED_TRAINING = "in training no mask is precomputed and no score overwritten"

CONTENDERS = (
    Contender(OURS, _ours),
    Contender("eager", _eager, memory=_dense_memory),
    Contender("eager tuned", _eager_tuned, trains=False, memory=_dense_memory, why_not=NOT_TUNED_TRAINING),
    Contender("torch.compile", _compiled, compiles=True, memory=_dense_memory),
    Contender("flex", _flex, trains=False, compiles=True, why_not=NO_FLEX_BACKWARD),
    unmasked_sdpa,
)


def _square(side: int) -> Case:
    label = "1024 pixels" if side == 64 else ""
    return Case("gaussian_mixture", 1, 8, side * side, 64, label, (side, side))


FAMILY = Family(
    "gaussian_mixture",
    operators={
        "gaussian_mixture": Operator(_mixture_inputs, _reference, CONTENDERS),
        "masked_product": Operator(_free_mask_inputs, _reference, CONTENDERS),
    },
    cases=(
        Case("gaussian_mixture", 8, 12, 197, 64, "ViT-B/16 at 224", (14, 14), 1, asked=True, quick=True, trained=True),
        Case("gaussian_mixture", 1, 12, 1024, 64, "", (32, 32), asked=True, quick=True),
        Case("gaussian_mixture", 1, 8, 4096, 64, "1024 pixels", (64, 64), asked=True, quick=True),
        Case("gaussian_mixture", 8, 12, 197, 64, "photographs", (14, 14), 1, photograph=True, quick=True),
        Case("gaussian_mixture", 1, 12, 1024, 64, "photographs", (32, 32), photograph=True),
        Case("gaussian_mixture", 1, 8, 4096, 64, "photographs", (64, 64), photograph=True),
        Case("gaussian_mixture", 4, 12, 577, 64, "ViT-B/16 at 384", (24, 24), 1),
        Case("gaussian_mixture", 64, 12, 64, 16, "Tiny-ImageNet", (8, 8)),
        Case("masked_product", 8, 12, 197, 64, "", quick=True),
        Case("masked_product", 1, 12, 1024, 64),
    ),
    sweeps=(
        Sweep(
            "Gaussian-mixture attention, 8 heads of 64",
            tuple(_square(side) for side in (16, 32, 48, 64, 96)),
            trained=(256, 1024, 4096),
            compiled=(1024, 4096),
        ),
    ),
)


def test_gaussian_mixture(timed_call):
    timed_call()
