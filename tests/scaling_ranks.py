"""What every process of test_scaling.py runs: bytes that it sends in sequence-parallel retention, over 4 ranks and over 2."""

from __future__ import annotations

import json
from pathlib import Path

import rank_processes
import torch
import torch.distributed as dist

from effattn.distributed import sequence_parallel_retention

BATCH, HEADS, KEY_DIM, VALUE_DIM, TOKENS = 2, 3, 8, 12, 5
GROUPS = ((0, 1, 2, 3), (1, 3))


def work(rank: int, world_size: int, folder: str) -> None:
    rank_processes.join(rank, world_size, folder)
    counted = []
    batch_isend_irecv = dist.batch_isend_irecv

    def counting(operations):
        counted.extend(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return batch_isend_irecv(operations)

    dist.batch_isend_irecv = counting
    found = {}
    for members in GROUPS:
        group = dist.new_group(members)
        if rank not in members:
            continue
        for normalize in ("none", "retnet"):
            query, key = torch.randn(2, BATCH, HEADS, TOKENS, KEY_DIM).requires_grad_()
            value = torch.randn(BATCH, HEADS, TOKENS, VALUE_DIM).requires_grad_()
            log_decay = torch.full((HEADS,), -0.1)
            del counted[:]
            output = sequence_parallel_retention(query, key, value, log_decay, group=group, normalize=normalize)
            forward = sum(counted)
            output.sum().backward()
            found[f"{len(members)} {normalize}"] = forward, sum(counted) - forward
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
