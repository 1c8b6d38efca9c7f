"""Kernelised attention with a relative position bias (NPRF) in each of its methods, and URPE.

M = 32 positive features of normalised queries and keys, orthogonal directions. `toeplitz_peers.py` says what peers get.
"""

from __future__ import annotations

import math

import torch
from effattn.bench import toeplitz_peers as peers
from effattn.bench.cases import OURS, UNMASKED, Asked, Call, Case, Contender, Family, Inputs, Operator, Sweep
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled, unmasked_sdpa
from effattn.bench.toeplitz_peers import FEATURES

import effattn

KERNELIZED, LONG, QUICK = "kernelized_rpe", "kernelized_rpe long", "kernelized_rpe quick"
CLIPPED, GRID, URPE = "kernelized_rpe clipped", "kernelized_rpe grid", "urpe"
DIRECT, FFT, STRUCTURED = "ours direct", "ours fft", "ours structured"
FORMULA, BIASED, EAGER = "torch.fft", "sdpa + bias", "eager"
DEVIATION = 0.5  # of the bias: a range of about 4 nats
LONGEST_EXACT = 4096  # tokens up to which the specification itself is computed


def _inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    entries = (case.heads, *(2 * extent - 1 for extent in case.grid or (case.tokens,)))
    bias = DEVIATION * torch.randn(entries, generator=generator)
    if case.operator == CLIPPED:  # constant beyond a distance, as a clipped relative position embedding
        reach = _reach(case)
        bias[:, : case.tokens - 1 - reach] = bias[:, case.tokens - 1 - reach, None]
        bias[:, case.tokens + reach :] = bias[:, case.tokens - 1 + reach, None]
    if case.operator == URPE:
        parameters = {"coefficient": 1 + DEVIATION * torch.randn(entries, generator=generator)}
    else:
        parameters = {"projection": effattn.random_features(FEATURES, case.head_dim, generator=generator)}
    parameters["rpe_bias"] = bias
    return Inputs(*case.qkv(dtype, device), {name: tensor.to(device) for name, tensor in parameters.items()}, {})


def _reach(case: Case) -> int:
    return min(128, case.tokens // 4)


def _reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    one = slice(head, head + 1)
    tensors, bias = [tensor[:, one] for tensor in inputs[:3]], inputs.parameters["rpe_bias"][one]
    if case.operator == URPE:
        return effattn.reference.urpe_attention(*tensors, inputs.parameters["coefficient"][one], bias)
    if case.tokens > LONGEST_EXACT:
        return peers.fft_reference(*tensors, bias, inputs.parameters["projection"])
    projection = inputs.parameters["projection"]
    return effattn.reference.kernelized_rpe_attention(*tensors, bias, projection, grid=case.grid or None)


def _kernelized(method: str):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        options = {**inputs.parameters, "method": method, "grid": case.grid or None}
        return lambda: effattn.kernelized_rpe_attention(*inputs[:3], **options)

    return prepare


def _urpe(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: effattn.urpe_attention(*inputs[:3], **inputs.parameters)


def _flops(case: Case) -> float:
    """The method that needs least: tiles, transforms or, where the bias is clipped, tiles near the diagonal and sums."""
    heads, length, head_dim = case.batch * case.heads, case.tokens, case.head_dim
    features = 4.0 * length * FEATURES * head_dim
    pair = 2.0 * (FEATURES + head_dim)
    methods = [length**2 * pair, 10.0 * length * math.log2(2 * length) * FEATURES * (head_dim + 1)]
    if case.operator == CLIPPED:
        methods.append(length * ((2 * _reach(case) + 1) * pair + 8.0 * FEATURES * (head_dim + 1)))
    return heads * (features + min(methods))


METHODS = (Contender(OURS, _kernelized("auto")), Contender(DIRECT, _kernelized("direct")))
METHODS = (*METHODS, Contender(FFT, _kernelized("fft")))
WITH_STRUCTURED = (*METHODS, Contender(STRUCTURED, _kernelized("structured")))
NOT_THE_SAME = "softmax, for comparison of the forward pass"
PEERS = (
    Contender(FORMULA, peers.fft_formula, memory=peers.fft_memory),
    Contender(BIASED, peers.biased_sdpa, trains=False, exact=False, memory=peers.biased_memory, why_not=NOT_THE_SAME),
    unmasked_sdpa,
)
DENSE_PEERS = (
    Contender(EAGER, peers.eager(), memory=peers.dense_memory),
    Contender("torch.compile", peers.eager(compiled), compiles=True, memory=peers.dense_memory),
    Contender("flex", peers.flex_kernelized, trains=False, compiles=True, why_not=NO_FLEX_BACKWARD),
)
URPE_CONTENDERS = (
    Contender(OURS, _urpe),
    Contender(EAGER, peers.eager_urpe(), memory=peers.urpe_memory),
    Contender("torch.compile", peers.eager_urpe(compiled), compiles=True, memory=peers.urpe_memory),
    unmasked_sdpa,
)


def _kernelized_operator(*contenders: Contender) -> Operator:
    return Operator(_inputs, _reference, contenders, flops=_flops)


FAMILY = Family(
    "toeplitz",
    operators={
        KERNELIZED: _kernelized_operator(*METHODS, *PEERS, *DENSE_PEERS),
        LONG: _kernelized_operator(*METHODS, *PEERS),
        CLIPPED: _kernelized_operator(*WITH_STRUCTURED, PEERS[0]),
        GRID: _kernelized_operator(*METHODS, *DENSE_PEERS[:2], unmasked_sdpa),
        URPE: Operator(_inputs, _reference, URPE_CONTENDERS),
        QUICK: _kernelized_operator(METHODS[0], PEERS[0], unmasked_sdpa),
    },
    cases=(
        *(Case(KERNELIZED, 1, 8, length, 64, asked=True) for length in (512, 1024, 4096)),
        Case(LONG, 1, 8, 16384, 64, asked=True),
        Case(LONG, 1, 8, 65536, 64, asked=True, forward_only=True),
        *(Case(CLIPPED, 1, 8, length, 64, asked=True, forward_only=True) for length in (4096, 16384)),
        Case(GRID, 8, 12, 196, 64, "DeiT-B at 224", (14, 14)),
        Case(GRID, 1, 12, 1024, 64, "", (32, 32)),
        *(Case(URPE, 1, 8, length, 64, asked=True) for length in (1024, 4096)),
        Case(QUICK, 1, 2, 4096, 64, quick=True),
    ),
    asked=Asked(
        dtypes=("float32",),
        forward=(OURS, DIRECT, FFT, STRUCTURED, FORMULA, BIASED, UNMASKED),
        backward=(OURS, DIRECT, FFT, FORMULA),
        seconds=3.0,
    ),
    sweeps=(
        Sweep(
            "Kernelised attention with a relative position bias, 8 heads of 64, 32 features",
            (
                *(Case(KERNELIZED, 1, 8, tokens, 64) for tokens in (256, 1024, 4096)),
                *(Case(LONG, 1, 8, tokens, 64) for tokens in (16384, 65536)),
            ),
            eager=FORMULA,
            trained=(256, 1024, 4096, 16384),
            compiled=(1024, 4096),
            without=(DIRECT, FFT),
        ),
    ),
)


def test_toeplitz(timed_call):
    timed_call()
