"""Run by test_threads_and_fork.py in a process of its own: every operator in children of a process that has run them.

Prints what went wrong, or that nothing did, in a child of a process with one thread, of one with two, and in workers of a
DataLoader.
"""

from __future__ import annotations

import os
import time

import sharded_calls
import torch
from test_threads_and_fork import SHAPES, bits, same
from torch.utils.data import DataLoader, Dataset

CALLS = sharded_calls.every_operator(SHAPES[0])
SECONDS = 20


class Calls(Dataset):
    """Calls operators in its workers, as a data set that augments with attention would."""

    def __len__(self):
        return len(CALLS)

    def __getitem__(self, index):
        return bits(list(CALLS.values())[index])


def wait_for(child: int) -> str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return "" if status == 0 else f"the child ended with status {status}"
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "the child hangs"


def fork(threads: int) -> str:
    torch.set_num_threads(threads)
    wanted = {op: bits(call) for op, call in CALLS.items()}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            wrong = [op for op, call in CALLS.items() if not same(bits(call), wanted[op])]
            if wrong:
                print("in the child:", *wrong, flush=True)
            status = len(wrong)
        finally:
            os._exit(status)
    return wait_for(child)


def workers() -> str:
    torch.set_num_threads(2)
    wanted = [bits(call) for call in CALLS.values()]
    loader = DataLoader(
        Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS, collate_fn=None
    )
    wrong = [op for op, got, want in zip(CALLS, loader, wanted) if not same(got, want)]
    return f"in a worker: {wrong}" if wrong else ""


if __name__ == "__main__":
    print("one thread:", fork(1) or "right", flush=True)
    print("two threads:", fork(2) or "right", flush=True)
    print("workers:", workers() or "right", flush=True)
