"""Figures of hardware that others published and efficiencies that are assumed: nothing in this file was measured here."""

from __future__ import annotations

from typing import NamedTuple

from .ranks import Link, rounds


class Figure(NamedTuple):
    what: str
    value: float
    unit: str
    source: str


DATASHEET = "NVIDIA, H200 Tensor Core GPU datasheet (H200 SXM)"
NCCL = "NVIDIA, NCCL, src/graph/tuning.cc at 01afd20: the latencies that it chooses its algorithms by"

MEMORY = Figure("memory", 141e9, "bytes", DATASHEET)
MEMORY_BANDWIDTH = Figure("memory bandwidth", 4.8e12, "bytes/s", DATASHEET)
BF16_PEAK = Figure(
    "bfloat16 peak, dense", 989e12, "FLOP/s", f"{DATASHEET}: 1,979 TFLOPS with sparsity, half of it without"
)
FP32_PEAK = Figure("float32 peak", 67e12, "FLOP/s", DATASHEET)
NVLINK = Figure("NVLink, each way", 450e9, "bytes/s", f"{DATASHEET}: 900 GB/s, both ways together")
INFINIBAND = Figure(
    "InfiniBand for each GPU, each way",
    50e9,
    "bytes/s",
    "NVIDIA, DGX H200 datasheet: 8 ConnectX-7 of 400 Gb/s for 8 GPUs",
)
NVLINK_LATENCY = Figure("a message over NVLink", 11.8e-6, "s", f"{NCCL} (ring, Simple: 8.4 us and 3.4 us)")
NETWORK_LATENCY = Figure("a message over the network", 18.0e-6, "s", f"{NCCL} (ring, Simple: 8.4 us and 9.6 us)")
FIGURES = (
    MEMORY,
    MEMORY_BANDWIDTH,
    BF16_PEAK,
    FP32_PEAK,
    NVLINK,
    INFINIBAND,
    NVLINK_LATENCY,
    NETWORK_LATENCY,
)


def shown(figure: Figure) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G")):
        if figure.value >= scale:
            return f"{figure.value / scale:g} {prefix}{figure.unit.replace('bytes', 'B')}"
    return f"{figure.value * 1e6:g} us"


USABLE = 0.95
"""Assumed share of the memory that tensors may have; the CUDA context and the allocator's gaps take the rest."""

GPUS_A_NODE = 8


class Efficiency(NamedTuple):
    """Assumed shares of what is published."""

    arithmetic: float
    memory: float
    link: float
    operation: float  # seconds that PyTorch needs to start one operation
    overlap: bool  # whether the sum of gradients is hidden behind the backward pass


LOW = Efficiency(0.2, 0.5, 0.6, 10e-6, False)
HIGH = Efficiency(0.5, 0.85, 0.9, 4e-6, True)

MACHINES = (LOW, HIGH)


class Model(NamedTuple):
    """A published model whose attention is retention."""

    name: str
    source: str
    parameters: float
    layers: int
    heads: int
    key_dim: int
    value_dim: int


RETNET = Model("RetNet, 1.3 B", "arXiv 2307.08621, table of sizes", 1.3e9, 24, 8, 256, 512)


def link(across_nodes: bool, efficiency: Efficiency) -> Link:
    latency, bandwidth = (NETWORK_LATENCY, INFINIBAND) if across_nodes else (NVLINK_LATENCY, NVLINK)
    return Link(latency.value, bandwidth.value * efficiency.link)


def links(ranks: int, efficiency: Efficiency) -> list[Link]:
    """Of the rounds of a scan over ranks that fill node after node: some pair crosses nodes in each, and the slowest counts."""
    return [link(ranks > GPUS_A_NODE, efficiency)] * rounds(ranks)
