"""Token merging: matching with the weighted merge (ToMe), attention over merged tokens, and soft merging (LTM, PatchMerger).

Of matching and merging, query is the metric (B, 1, N, d) and key the tokens (B, 1, N, C); of soft merging query is the
tokens and key the logits (B, 1, N, P). `token_merging_peers.py` says what the peers are.
"""

from __future__ import annotations

import torch
from effattn.bench import token_merging_peers as peers
from effattn.bench.cases import OURS, Asked, Call, Case, Contender, Family, Inputs, Operator, Sweep
from effattn.bench.peers import NO_FLEX_BACKWARD, compiled, unmasked_sdpa

import effattn

MERGE, ATTENTION, SOFT = "match and merge", "size_weighted_attention", "soft_merge"
PUBLISHED, COMPILED, EAGER, COPY, PRODUCT = "published", "published, compiled", "eager", "copy", "product alone"
LOG_SIZES = "sdpa + log sizes"


# ---- matching and merging ----


def _merge_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    metric = torch.randn(case.shape, generator=generator)
    x = torch.randn(case.batch, 1, case.tokens, case.outputs, generator=generator)
    unused = torch.zeros(1, 1, 1, 1)
    return Inputs(*(t.to(dtype).to(device) for t in (metric, x, unused)), {}, {})


def _merge_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    metric, x = inputs.query[:, 0], inputs.key[:, 0]
    plan = effattn.bipartite_soft_matching(metric, _merged(case), num_protected=1, backend="reference")
    return plan.merge_weighted(x, backend="reference")[0].unsqueeze(1)


def _merged(case: Case) -> int:
    return case.tokens - case.output_tokens


def _merge(case: Case, inputs: Inputs, training: bool) -> Call:
    metric, x = inputs.query[:, 0], inputs.key[:, 0]

    def call():
        plan = effattn.bipartite_soft_matching(metric, _merged(case), num_protected=1)
        return plan.merge_weighted(x)[0].unsqueeze(1)

    return call


def _merge_flops(case: Case) -> float:
    """A multiply-add for every pair and channel of the metric; two for every token and channel."""
    return case.batch * (2.0 * (case.tokens / 2) ** 2 * case.head_dim + 2.0 * case.tokens * case.outputs)


def _merge_bytes(case: Case, inputs: Inputs) -> float:
    """Metric and tokens read once, merged tokens written once."""
    elements = case.tokens * (case.head_dim + case.outputs) + case.output_tokens * case.outputs
    return float(case.batch * elements * inputs.query.element_size())


# ---- attention over merged tokens ----


def _attention_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 5, (case.batch, case.tokens), generator=generator).float()
    return Inputs(*case.qkv(dtype, device), {}, {"sizes": sizes.to(device)})


def _attention_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    return effattn.reference.size_weighted_attention(
        *(tensor[:, head : head + 1] for tensor in inputs[:3]), inputs.fixed["sizes"]
    )


def _attention(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: effattn.size_weighted_attention(*inputs[:3], inputs.fixed["sizes"])


# ---- soft merging ----


def _soft_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(case.shape, generator=generator)
    logits = torch.randn(case.batch, 1, case.tokens, case.output_tokens, generator=generator)
    unused = torch.zeros(1, 1, 1, 1)
    return Inputs(*(t.to(dtype).to(device) for t in (tokens, logits, unused)), {}, {})


def _soft_reference(case: Case, inputs: Inputs, head: int) -> torch.Tensor:
    return effattn.reference.soft_merge(inputs.query[:, 0], inputs.key[:, 0]).unsqueeze(1)


def _soft_merge(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: effattn.soft_merge(inputs.query[:, 0], inputs.key[:, 0]).unsqueeze(1)


def _soft_flops(case: Case) -> float:
    return 2.0 * case.batch * case.tokens * case.head_dim * case.output_tokens


def _halved(tokens: int) -> Case:
    """The class token is never merged."""
    label, kept = f"C=320 r={tokens // 2}", tokens // 2 + 1
    return Case(MERGE, 4, 1, tokens, 64, label, outputs=320, output_tokens=kept, forward_only=True)


FAMILY = Family(
    "token_merging",
    operators={
        MERGE: Operator(
            _merge_inputs,
            _merge_reference,
            (
                Contender(OURS, _merge),
                Contender(PUBLISHED, peers.eager_merge(), memory=peers.similarity_memory),
                Contender(COMPILED, peers.eager_merge(compiled), compiles=True, memory=peers.similarity_memory),
                Contender(COPY, peers.copy, exact=False),
            ),
            flops=_merge_flops,
            bytes=_merge_bytes,
        ),
        ATTENTION: Operator(
            _attention_inputs,
            _attention_reference,
            (
                Contender(OURS, _attention),
                Contender(EAGER, peers.eager_attention(), memory=peers.dense_memory),
                Contender("torch.compile", peers.eager_attention(compiled), compiles=True, memory=peers.dense_memory),
                Contender(LOG_SIZES, peers.sdpa_with_log_sizes),
                Contender("flex", peers.flex_attention, trains=False, compiles=True, why_not=NO_FLEX_BACKWARD),
                unmasked_sdpa,
            ),
        ),
        SOFT: Operator(
            _soft_inputs,
            _soft_reference,
            (
                Contender(OURS, _soft_merge),
                Contender(EAGER, peers.eager_soft_merge()),
                Contender("torch.compile", peers.eager_soft_merge(compiled), compiles=True),
                Contender(PRODUCT, peers.product_alone, trains=False, exact=False, why_not="no gradient of the logits"),
            ),
            flops=_soft_flops,
            training=3.0,
        ),
    },
    cases=(
        Case(MERGE, 32, 1, 197, 64, "C=768 r=16", outputs=768, output_tokens=181, asked=True, forward_only=True),
        Case(MERGE, 4, 1, 4096, 64, "C=320 r=2048", outputs=320, output_tokens=2049, asked=True, forward_only=True),
        Case(MERGE, 8, 1, 1025, 64, "C=1024 r=64", outputs=1024, output_tokens=961, forward_only=True),
        Case(MERGE, 8, 1, 197, 64, "C=768 r=16", outputs=768, output_tokens=181, quick=True, forward_only=True),
        *(
            Case(ATTENTION, *shape, label, asked=True)
            for *shape, label in (
                (8, 6, 197, 64, "ViT-S"),
                (8, 12, 197, 64, "ViT-B"),
                (8, 12, 101, 64, "ViT-B, merged"),
                (1, 16, 1025, 64, "ViT-L@512"),
            )
        ),
        Case(ATTENTION, 1, 8, 4096, 40, "64x64 latents"),
        Case(ATTENTION, 2, 12, 197, 64, quick=True, trained=True),
        Case(SOFT, 8, 1, 1024, 768, "P=256", output_tokens=256, asked=True),
        Case(SOFT, 32, 1, 196, 768, "P=157, LTM ViT-B", output_tokens=157),
        Case(SOFT, 32, 1, 256, 144, "P=205, LTM MobileViT-S", output_tokens=205),
        Case(SOFT, 2, 1, 196, 384, "P=157", output_tokens=157, quick=True, trained=True),
    ),
    asked=Asked(dtypes=("float32",), seconds=4.0),
    sweeps=(
        Sweep(
            "Matching and merging, half of the tokens, batch 4, 320 channels",
            tuple(_halved(tokens) for tokens in (256, 1024, 4096, 16384)),
            eager=PUBLISHED,
            compiled=(1024, 4096),
        ),
        Sweep(
            "Attention over merged tokens, 8 heads of 64",
            tuple(Case(ATTENTION, 1, 8, tokens, 64) for tokens in (256, 1024, 4096)),
            trained=(256, 1024, 4096),
            compiled=(1024,),
        ),
    ),
)


def test_token_merging(timed_call):
    timed_call()
