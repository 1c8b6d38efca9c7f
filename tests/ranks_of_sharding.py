"""What each of the two processes of test_sharding.py runs, one after the other; results are saved to a file."""

from __future__ import annotations

import parallel_training
import rank_processes
import sharded_calls
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def work(rank: int, world_size: int, folder: str) -> None:
    rank_processes.join(rank, world_size, folder)
    mesh = init_device_mesh("cpu", (world_size,))
    found = {
        "calls": {
            op: {name: sharded_calls.on_mesh(call, mesh) for name, call in calls.items()}
            for op, calls in sharded_calls.calls().items()
        },
        "DDP": parallel_training.data_parallel(),
        "FSDP2": parallel_training.fully_sharded(mesh),
        "FSDP2 in bfloat16": parallel_training.fully_sharded(mesh, mixed_precision=True),
        **sharded_calls.on_other_meshes(world_size),
    }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
