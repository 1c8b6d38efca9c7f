"""Starts the processes of a distributed test and joins them in a group."""

from __future__ import annotations

import datetime
import multiprocessing
import time
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


def run(module: ModuleType, ranks: int, folder: Path, seconds: float) -> None:
    """``module.work(rank, ranks, folder)`` in ``ranks`` processes, which end within ``seconds``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module.__name__])  # torch is imported once for all ranks
    processes = [
        context.Process(target=module.work, args=(rank, ranks, str(folder)), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, "a rank failed or hangs"


def join(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
