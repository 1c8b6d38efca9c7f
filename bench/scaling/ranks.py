"""What ranks send, counted from the code that sends it, and what sending costs.

``sequence_parallel_retention`` exchanges one state a round (effattn/distributed.py); DistributedDataParallel adds up the
gradients, for which a ring sends 2 (R - 1) / R of their bytes. Batch and heads shard without a message.
"""

from __future__ import annotations

import datetime
import math
import multiprocessing
import statistics
import tempfile
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..cases import FORWARD
from . import model
from .subjects import SEQUENCE_PARALLEL, SUBJECTS, TRAINING
from .units import Size

WORDS = 2  # of the count of tokens that travels with a state
MESSAGES = tuple(1 << bits for bits in (10, 13, 16, 18, 20, 22, 24))  # bytes
SLICES = tuple(Size(1, 8, tokens, 64) for tokens in (512, 1024, 2048, 4096, 8192))
TOGETHER = tuple(Size(1, 8, tokens, 64) for tokens in (768, 3072, 6144))  # of each of two ranks
REPEATS = 9


class Link(NamedTuple):
    """A message of n bytes takes latency + n / bandwidth seconds."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


def rounds(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


def state_bytes(
    batch: int, heads: int, key_dim: int, value_dim: int, *, normalized: bool = False, itemsize: int = 4
) -> int:
    """A message of sequence-parallel retention: the state, in float32 for all but float64, and the count of tokens."""
    return itemsize * (batch * heads * (key_dim + normalized) * value_dim + WORDS)


def sent(rank: int, ranks: int, size: int, *, reverse: bool = False) -> int:
    """Bytes that a rank sends in one pass, of messages of ``size``; the backward pass goes in reverse."""
    place = ranks - 1 - rank if reverse else rank
    return size * sum(place + (1 << step) < ranks for step in range(rounds(ranks)))


def exchange_seconds(links: list[Link], size: int) -> float:
    """Of one pass: the rounds follow each other, each over its link."""
    return sum(link.seconds(size) for link in links)


def all_reduce_seconds(ranks: int, size: float, bandwidth: float, latency: float = 0.0) -> float:
    """A ring: 2 (R - 1) steps, each of a share 1 / R."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


# ---- measured on this machine: two processes of one thread each, over gloo ----


def measure() -> dict:
    """Messages between two ranks, slices on one rank and on two."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [context.Process(target=_work, args=(rank, folder, results), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        found = {}
        for process in processes:
            process.join(300)
        if [process.exitcode for process in processes] != [0, 0]:
            for process in processes:
                process.kill()
            raise RuntimeError("a rank of the measurement failed or hung")
        while not results.empty():
            found |= results.get()
    return found


def _work(rank: int, folder: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        *("gloo", f"file://{folder}/rendezvous", datetime.timedelta(seconds=120)), rank=rank, world_size=2
    )
    alone = [dist.new_group([member]) for member in range(2)][rank]
    found = {
        "messages": {str(size): _exchange(size, rank) for size in MESSAGES},
        "all_reduce": {str(size): _timed(_all_reduce(size)) for size in MESSAGES},
        "whole": {f"{size.tokens} {d}": _whole(size, d) for size in SLICES for d in (FORWARD, TRAINING)},
        "alone": {f"{size.tokens} {d}": _slice(size, d, alone) for size in SLICES for d in (FORWARD, TRAINING)},
        "together": {f"{size.tokens} {d}": _slice(size, d, None) for size in TOGETHER for d in (FORWARD, TRAINING)},
    }
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _exchange(size: int, rank: int) -> float:
    """Seconds until rank 1 has a message of rank 0: half of there and back."""
    buffer = torch.zeros(size // 4)

    def there_and_back() -> None:
        for operation in (dist.isend, dist.irecv) if rank == 0 else (dist.irecv, dist.isend):
            for work in dist.batch_isend_irecv([dist.P2POp(operation, buffer, 1 - rank)]):
                work.wait()

    return _timed(there_and_back) / 2


def _all_reduce(size: int):
    buffer = torch.zeros(size // 4)
    return lambda: dist.all_reduce(buffer)


def _whole(size: Size, direction: str) -> float:
    """One rank with the whole sequence and nothing to send."""
    subject = SUBJECTS["retention"]
    return _timed(subject.call(size, subject.inputs(size, direction), direction))


def _slice(size: Size, direction: str, group) -> float:
    """Of the slower rank, each with a slice of ``size``; in a group of its own a rank does it alone, with the same company."""
    from effattn.distributed import sequence_parallel_retention

    leaves = SUBJECTS[SEQUENCE_PARALLEL].inputs(size, direction)
    upstream = torch.ones_like(leaves.value)

    def call() -> None:
        with torch.set_grad_enabled(direction == TRAINING):
            output = sequence_parallel_retention(*leaves[:3], **leaves.parameters, group=group)
        if direction == TRAINING:
            torch.autograd.grad(output, [*leaves[:3], *leaves.parameters.values()], upstream)

    return _timed(call)


def _timed(call) -> float:
    """Median seconds; ranks begin together, and the slower one counts."""
    call()
    samples = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        call()
        seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        samples.append(seconds.item())
    return float(f"{statistics.median(samples):.4g}")


# ---- the model of two ranks ----


def link(found: dict, which: str = "messages") -> Link:
    """Latency and bandwidth of gloo here."""
    fitted = model.fit(({"call": 1, "bytes": int(size)}, seconds) for size, seconds in found[which].items())
    return Link(fitted.prices.get("call", 0.0), 1 / fitted.prices["bytes"])


def _fit(found: dict, which: str, direction: str) -> model.Fit:
    units = SUBJECTS[SEQUENCE_PARALLEL].units
    return model.fit((units(size), found[which][f"{size.tokens} {direction}"]) for size in SLICES)


def whole(found: dict, direction: str) -> model.Fit:
    """What one rank with the whole sequence computes, on one thread."""
    return _fit(found, "whole", direction)


def slices(found: dict, direction: str) -> model.Fit:
    """What a rank computes on one thread, and how well that and the messages predict two ranks."""
    prices = _fit(found, "alone", direction)
    return prices._replace(
        errors=tuple(
            predicted(found, prices, size, 2, direction) / found["together"][f"{size.tokens} {direction}"] - 1
            for size in TOGETHER
        )
    )


def predicted(found: dict, prices: model.Fit, size: Size, ranks: int, direction: str) -> float:
    """Seconds of ``ranks`` ranks over gloo that hold a slice of ``size`` each."""
    message = state_bytes(size.batch, size.heads, size.head_dim, size.head_dim)
    passes = 2 if direction == TRAINING else 1
    exchanged = exchange_seconds([link(found)] * rounds(ranks), message)
    return prices.seconds(SUBJECTS[SEQUENCE_PARALLEL].units(size)) + passes * exchanged
