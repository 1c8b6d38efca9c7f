"""Retention in its chunkwise and recurrent forms, and Manhattan attention, full and decomposed.

Decays are RetNet's and RMT's. Ours differentiates them in training, no peer does; `retention_peers.py` says what peers
precompute. Retention gets contiguous tensors, Manhattan attention what separate projections of tokens leave.
"""

from __future__ import annotations

import torch
from effattn.bench import retention_peers as peers
from effattn.bench.cases import OURS, UNMASKED, Asked, Call, Case, Contender, Family, Inputs, Operator, Sweep
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled, unmasked_sdpa
from effattn.bench.retention_peers import BIDIRECTIONAL

import effattn

RETENTION, DOUBLING, STEP = "retention", "doubling", "retention_step"
FULL, DECOMPOSED, WITH_LCE = "manhattan", "manhattan decomposed", "manhattan decomposed, LCE"
CAUSAL, PARALLEL, CHUNKWISE, COMPILED = "sdpa causal", "eager parallel", "eager chunks", "compile chunks"
INPLACE, EAGER, EAGER_INPLACE, PUBLISHED, BIASED = "ours inplace", "eager", "eager inplace", "published", "sdpa + bias"
LENGTHS = (4096, 8192, 16384, 32768)  # each twice the one before
CHUNK = 64  # what FLOPs are counted for
LCE_SIDE = 5


# ---- retention ----


def _inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(device)

    query, key = (normal(*case.shape).to(dtype) for _ in range(2))
    value = normal(*case.output_shape).to(dtype)
    log_decay = effattn.retnet_log_decay(case.heads, dtype=torch.float32, device=device)
    fixed = {}
    if case.operator == STEP:
        fixed["state"] = normal(case.batch, case.heads, case.head_dim, case.output_shape[3])
    return Inputs(query, key, value, {"log_decay": log_decay}, fixed)


def _one_head(inputs: Inputs, head: int) -> list[torch.Tensor]:
    one = slice(head, head + 1)
    return [*(tensor[:, one] for tensor in inputs[:3]), inputs.parameters["log_decay"][one]]


def _reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    if case.operator == STEP:
        state = inputs.fixed["state"][:, head : head + 1]
        return effattn.reference.retention_step(*_one_head(inputs, head), state)[0]
    is_causal = case.operator != BIDIRECTIONAL
    chunk = 256 if is_causal else None
    return effattn.reference.retention(*_one_head(inputs, head), is_causal=is_causal, chunk_size=chunk)


def _retention(case: Case, inputs: Inputs, training: bool) -> Call:
    is_causal = case.operator != BIDIRECTIONAL
    return lambda: effattn.retention(*inputs[:3], **inputs.parameters, is_causal=is_causal)


def _retention_flops(case: Case) -> float:
    """Scores and output inside chunks, reading and updating the state of each direction."""
    values, states = case.output_shape[3], 2 if case.operator == BIDIRECTIONAL else 1
    per_token = 2.0 * min(CHUNK, case.tokens) * (case.head_dim + values) + 4.0 * states * case.head_dim * values
    return case.batch * case.heads * case.tokens * per_token


def _retention_bytes(case: Case, inputs: Inputs) -> float:
    size = inputs.query.element_size()
    return 2.0 * size * case.batch * case.heads * case.tokens * (case.head_dim + case.output_shape[3])


def _step(inplace: bool):
    def prepare(case: Case, inputs: Inputs, training: bool) -> Call:
        state = inputs.fixed["state"].clone() if inplace else inputs.fixed["state"]
        arguments = (*inputs[:3], inputs.parameters["log_decay"].detach(), state)
        return lambda: effattn.retention_step(*arguments, inplace=inplace)[0]

    return prepare


RETENTION_CONTENDERS = (
    Contender(OURS, _retention),
    Contender(PARALLEL, peers.parallel, memory=peers.parallel_memory),
    Contender(CHUNKWISE, peers.chunkwise(), memory=peers.chunkwise_memory),
    Contender(COMPILED, peers.chunkwise(compiled), compiles=True, memory=peers.chunkwise_memory),
)
NO_TRAINING = "a decoder's step"
STEP_CONTENDERS = tuple(
    contender._replace(trains=False, why_not=NO_TRAINING)
    for contender in (
        Contender(OURS, _step(inplace=False)),
        Contender(INPLACE, _step(inplace=True)),
        Contender(EAGER, peers.step()),
        Contender(EAGER_INPLACE, peers.step(inplace=True)),
        Contender("torch.compile", peers.step(compiled), compiles=True),
    )
)


# ---- Manhattan attention ----


def _grid_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(dtype).to(device)

    tokens = (case.batch, case.tokens, case.heads, case.head_dim)
    query, key, value = (normal(*tokens).transpose(1, 2) for _ in range(3))
    parameters = {"log_decay": effattn.rmt_log_decay(case.heads, dtype=torch.float32, device=device)}
    if case.operator == WITH_LCE:
        channels = case.heads * case.head_dim
        parameters["lce_weight"] = normal(channels, 1, LCE_SIDE, LCE_SIDE, size=1 / LCE_SIDE)
        parameters["lce_bias"] = normal(channels, size=0.1)
    return Inputs(query, key, value, parameters, {})


def _grid_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    lce = {n: t.unflatten(0, (case.heads, -1))[head] for n, t in inputs.parameters.items() if n.startswith("lce")}
    decomposed = peers.is_decomposed(case)
    return effattn.reference.manhattan_attention(*_one_head(inputs, head), case.grid, decomposed=decomposed, **lce)


def _manhattan(case: Case, inputs: Inputs, training: bool) -> Call:
    options = {**inputs.parameters, "grid": case.grid, "decomposed": peers.is_decomposed(case)}
    return lambda: effattn.manhattan_attention(*inputs[:3], **options)


def _grid_flops(case: Case) -> float:
    keys = sum(case.grid) if peers.is_decomposed(case) else case.tokens
    per_channel = 4.0 * keys + (2.0 * LCE_SIDE**2 if case.operator == WITH_LCE else 0.0)
    return per_channel * case.batch * case.heads * case.tokens * case.head_dim


GRID_CONTENDERS = (
    Contender(OURS, _manhattan),
    Contender(PUBLISHED, peers.published()),
    Contender("torch.compile", peers.published(compiled), compiles=True),
)
FULL_CONTENDERS = (
    *GRID_CONTENDERS,
    Contender(BIASED, peers.dense_bias_sdpa),
    Contender("flex", peers.flex_manhattan, trains=False, compiles=True, why_not=NO_FLEX_BACKWARD),
    unmasked_sdpa,
)


def _rmt() -> list[Case]:
    """RMT-T3 and RMT-S at 224: heads and width of the four stages, the last one not decomposed."""
    cases = []
    for stage, (heads, head_dim, side) in enumerate(((4, 16, 56), (4, 32, 28), (8, 32, 14), (16, 32, 7)), 1):
        shape = (8, heads, side * side, head_dim, f"RMT stage {stage}", (side, side))
        if stage == 4:
            cases.append(Case(FULL, *shape))
            continue
        cases += [Case(DECOMPOSED, *shape, asked=stage == 1), Case(WITH_LCE, *shape)]
    return cases


def _whole(contenders: tuple[Contender, ...], inputs=_inputs) -> Operator:
    return Operator(inputs, _reference, contenders, flops=_retention_flops, bytes=_retention_bytes)


FAMILY = Family(
    "retention",
    operators={
        RETENTION: _whole((*RETENTION_CONTENDERS, Contender(CAUSAL, peers.causal_sdpa, exact=False))),
        BIDIRECTIONAL: _whole((*RETENTION_CONTENDERS, unmasked_sdpa)),
        DOUBLING: _whole(RETENTION_CONTENDERS[:1]),
        STEP: Operator(
            _inputs,
            _reference,
            STEP_CONTENDERS,
            flops=lambda case: 4.0 * case.batch * case.heads * case.head_dim * case.output_shape[3],
            bytes=lambda case, inputs: 2.0 * inputs.fixed["state"].numel() * inputs.fixed["state"].element_size(),
        ),
        FULL: Operator(_grid_inputs, _grid_reference, FULL_CONTENDERS, flops=_grid_flops),
        DECOMPOSED: Operator(_grid_inputs, _grid_reference, GRID_CONTENDERS, flops=_grid_flops),
        WITH_LCE: Operator(_grid_inputs, _grid_reference, GRID_CONTENDERS, flops=_grid_flops),
    },
    cases=(
        Case(RETENTION, 1, 8, 1024, 64, quick=True),
        Case(RETENTION, 1, 8, 4096, 64, asked=True),
        Case(RETENTION, 1, 8, 2048, 256, "Dv 432", outputs=432),
        Case(RETENTION, 64, 12, 196, 64, "ViR"),
        Case(BIDIRECTIONAL, 1, 8, 1024, 64),
        Case(BIDIRECTIONAL, 1, 8, 4096, 64),
        *(Case(DOUBLING, 1, 8, length, 64, asked=True) for length in LENGTHS),
        Case(STEP, 64, 16, 1, 256, "Dv 432", outputs=432, asked=True),
        Case(STEP, 1, 16, 1, 256, "Dv 432", outputs=432),
        Case(FULL, 32, 16, 49, 32, "7x7", (7, 7), asked=True),
        Case(FULL, 8, 16, 196, 32, "14x14", (14, 14), asked=True),
        *_rmt(),
    ),
    asked=Asked(
        dtypes=("float32",),
        forward=(OURS, CAUSAL, PARALLEL, CHUNKWISE, INPLACE, UNMASKED, PUBLISHED),
        backward=(OURS, CHUNKWISE, PUBLISHED),
        seconds=3.0,
    ),
    sweeps=(
        Sweep(
            "Retention, causal, 8 heads of 64",
            tuple(Case(RETENTION, 1, 8, tokens, 64) for tokens in (256, 1024, 4096, 16384, 65536)),
            eager=CHUNKWISE,
            trained=(256, 1024, 4096, 16384),
            compiled=(1024, 4096),
        ),
        Sweep(
            "Manhattan attention decomposed, batch 8, 4 heads of 32",
            tuple(
                Case(DECOMPOSED, 8, 4, side * side, 32, f"{side}x{side}", (side, side)) for side in (14, 28, 56, 112)
            ),
            eager=PUBLISHED,
            trained=(196, 784, 3136),
            compiled=(784,),
            axis="tokens of a square grid",
        ),
    ),
)


def test_retention(timed_call):
    timed_call()
