"""Windows of a token grid: CSWin's cross-shaped stripes with LePE, Swin's shifted windows, HAT's shifted and overlapping.

Every contender gets the qkv projection's packed output (B, N, 3, H, D). Ours reads strided views of it; what the
published modules do instead (transpose, partition, roll, unfold, merge, each a copy) is theirs to pay. Swin and HAT
partition before they project; `window_peers.py` says how their clock is kept fair.
"""

from __future__ import annotations

import torch
from effattn.bench import window_peers as peers
from effattn.bench.cases import (
    OURS,
    UNMASKED,
    Asked,
    Call,
    Case,
    Contender,
    Family,
    Inputs,
    Operator,
    Sweep,
)
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled
from effattn.bench.window_peers import CROSS, ON_WINDOWS, OVERLAPPING, SHIFTED, overlap, shift, stripes

import effattn

BATCH = 8
SIDES = (14, 28, 56, 112, 224)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """Biases and taps of the size that training leaves, in the model's dtype."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(dtype).to(device)

    if case.photograph:
        query, key, value = case.qkv(dtype, device)
    else:
        packed = normal(case.batch, case.tokens, 3, case.heads, case.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    channels = case.heads * case.head_dim
    if case.operator == CROSS:
        parameters = {"lepe_weight": normal(channels, 1, 3, 3, size=1 / 3), "lepe_bias": normal(channels, size=0.1)}
    else:
        side = 2 * case.window - 1 + (2 * overlap(case) if case.operator == OVERLAPPING else 0)
        parameters = {"bias_table": normal(side * side, case.heads, size=0.5)}
    return Inputs(query, key, value, parameters, {})


def _window_options(case: Case) -> dict:
    options = {"grid": case.grid, "window": (case.window, case.window)}
    if case.operator == OVERLAPPING:
        return {**options, "overlap": (overlap(case), overlap(case)), "bias_index": "hat_oca"}
    return {**options, "shift": (shift(case), shift(case))}


def _reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    one = slice(head, head + 1)
    q, k, v = (tensor[:, one] for tensor in inputs[:3])
    if case.operator != CROSS:
        table = inputs.parameters["bias_table"][:, one]
        return effattn.reference.window_attention(q, k, v, bias_table=table, **_window_options(case))
    window = stripes(case)[0 if head < case.heads // 2 else 1]
    lepe = {name: t.unflatten(0, (case.heads, -1))[head] for name, t in inputs.parameters.items()}
    return effattn.reference.window_attention(q, k, v, case.grid, window, **lepe)


def _ours(case: Case, inputs: Inputs, training: bool) -> Call:
    q, k, v, parameters, _ = inputs
    if case.operator == CROSS:
        return lambda: effattn.cross_shaped_window_attention(q, k, v, case.grid, case.window, **parameters)
    options = _window_options(case)
    return lambda: effattn.window_attention(q, k, v, **options, **parameters)


def _keys(case: Case) -> int:
    """That a query meets."""
    if case.operator == CROSS:
        (height, width), _ = stripes(case)
        return height * width
    return (case.window + (2 * overlap(case) if case.operator == OVERLAPPING else 0)) ** 2


def _flops(case: Case) -> float:
    """Both products, and the nine taps."""
    per_channel = 4.0 * _keys(case) + (18 if case.operator == CROSS else 0)
    return per_channel * case.batch * case.heads * case.tokens * case.head_dim


def _score_memory(case: Case, training: bool) -> float:
    """Score-sized tensors alive at once."""
    return 4.0 * (6 if training else 4) * case.batch * case.heads * case.tokens * _keys(case)


CONTENDERS = (
    Contender(OURS, _ours),
    Contender("eager", peers.published(), memory=_score_memory),
    Contender("torch.compile", peers.published(compiled), compiles=True, memory=_score_memory),
    Contender(ON_WINDOWS, peers.on_windows, memory=_score_memory),
    Contender(
        "flex",
        peers.flex_windows,
        trains=False,
        compiles=True,
        why_not=NO_FLEX_BACKWARD,
        memory=lambda case, training: 40.0 * case.heads * case.tokens**2,  # its block mask is made from a dense one
    ),
    Contender(UNMASKED, peers.unmasked, exact=False),
)


def _cswin(model: str, head_dim: int, heads: int, pixels: int, quick: int = 0, **marks) -> list[Case]:
    """The four stages, of which ``quick`` is in the quick set; the last stage's stripe is its grid."""
    sides = [pixels // 4 >> stage for stage in range(4)]
    label = "photographs" if marks.get("photograph") else f"{model}/{pixels}"
    return [
        Case(
            *(CROSS, BATCH, heads << stage, side * side, head_dim, f"{label} stage {stage + 1}", (side, side)),
            window=width,
            quick=stage + 1 == quick,
            **marks,
        )
        for stage, (side, width) in enumerate(zip(sides, (1, 2, sides[3], sides[3])))
    ]


def _swin(quick: int) -> list[Case]:
    """Swin-T at 224: the last stage's window is its grid, which is not shifted."""
    return [
        Case(
            *(SHIFTED, BATCH, 3 << stage, side * side, 32, f"Swin-T/224 stage {stage + 1}", (side, side)),
            window=7,
            asked=True,
            quick=stage + 1 == quick,
        )
        for stage, side in enumerate((56, 28, 14, 7))
    ]


def _hat(operator: str, side: int) -> Case:
    label = f"HAT {side}x{side}" + (" OCA" if operator == OVERLAPPING else "")
    return Case(operator, 1, 6, side * side, 30, label, (side, side), window=16, asked=True)


FAMILY = Family(
    "cross_shaped_window",
    operators={name: Operator(_inputs, _reference, CONTENDERS, flops=_flops) for name in (CROSS, SHIFTED, OVERLAPPING)},
    cases=(
        *_cswin("CSWin-T", 32, 2, 224, quick=3, asked=True),
        *_cswin("CSWin-T", 32, 2, 384, asked=True),
        *_cswin("CSWin-B", 24, 4, 224, asked=True),
        *_cswin("CSWin-B", 24, 4, 384, asked=True),
        *_cswin("CSWin-T", 32, 2, 224, photograph=True),
        *_swin(quick=2),
        *(_hat(operator, side) for operator in (SHIFTED, OVERLAPPING) for side in (64, 256)),
    ),
    asked=Asked(
        dtypes=("float32",),
        forward=(OURS, "eager", "torch.compile", ON_WINDOWS),
        backward=(OURS, "eager"),
        seconds=1.5,
    ),
    sweeps=(
        Sweep(
            "Cross-shaped windows with LePE, stripes of 7, 4 heads of 32",
            tuple(Case(CROSS, 1, 4, side * side, 32, f"{side}x{side}", (side, side), window=7) for side in SIDES),
            trained=(784, 3136, 12544),
            compiled=(784, 12544),
            axis="tokens of a square grid",
        ),
    ),
)


def test_cross_shaped_window(timed_call):
    timed_call()
