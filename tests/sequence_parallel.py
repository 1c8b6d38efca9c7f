"""What every process of test_distributed.py runs: all cases, one after the other, results saved to a file."""

from __future__ import annotations

import contextlib
import inspect
from typing import NamedTuple

import rank_processes
import torch
import torch.distributed as dist

import effattn

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 6, 5
LOG_DECAY = torch.tensor([-0.05, -(2.0**-44), float("-inf"), 0.0], dtype=torch.float64)

# torch 2.10 and 2.11 always sort the ranks of a group.
AS_GIVEN = {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}


class Case(NamedTuple):
    slices: tuple[int, ...]
    """Tokens of each rank."""
    ranks: tuple[int, ...] = (0, 1, 2, 3)
    normalize: str = "none"
    initial: bool = False
    state: bool = False
    dtype: torch.dtype = torch.float64
    log_decay: torch.Tensor = LOG_DECAY
    autocast: bool = False


CASES = {
    "even": Case((8, 8, 8, 8)),
    "uneven": Case((5, 1, 17, 3)),
    "with empty slices": Case((0, 7, 0, 4)),
    "the last slices empty": Case((6, 3, 0, 0), initial=True, state=True),
    "nothing at all": Case((0, 0, 0, 0), initial=True, state=True),
    "initial state": Case((5, 1, 17, 3), initial=True),
    "state": Case((5, 1, 17, 3), state=True),
    "initial state and state": Case((5, 0, 17, 3), initial=True, state=True),
    "normalised": Case((5, 1, 17, 3), normalize="retnet"),
    "normalised, initial state and state": Case((4, 9, 0, 6), normalize="retnet", initial=True, state=True),
    "one rank": Case((13,), (2,), normalize="retnet", initial=True, state=True),
    "three ranks that do not begin at 0": Case((6, 2, 9), (1, 2, 3), initial=True, state=True),
    "ranks in pairs": Case((6, 2), (3, 1) if AS_GIVEN else (1, 3), normalize="retnet", state=True),
    "float32": Case((40, 7, 33, 20), normalize="retnet", initial=True, state=True, dtype=torch.float32),
    "bfloat16": Case((40, 7, 33, 20), initial=True, state=True, dtype=torch.bfloat16),
    "under autocast": Case((9, 5, 3, 12), initial=True, state=True, dtype=torch.float32, autocast=True),
}


class Inputs(NamedTuple):
    tensors: dict[str, torch.Tensor]
    """Of the whole sequence: query, key, value, log_decay and, where the case has one, initial_state."""
    grad_output: torch.Tensor
    grad_state: torch.Tensor


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, exact = sum(case.slices), torch.promote_types(case.dtype, torch.float32)
    shape = BATCH, HEADS, KEY_DIM + (case.normalize == "retnet"), VALUE_DIM
    tensors = {name: normal(BATCH, HEADS, tokens, KEY_DIM).to(case.dtype) for name in ("query", "key")}
    tensors["value"] = normal(BATCH, HEADS, tokens, VALUE_DIM).to(case.dtype)
    tensors["log_decay"] = case.log_decay.to(exact)
    if case.initial:
        tensors["initial_state"] = normal(*shape).abs().to(exact)
    return Inputs(tensors, normal(BATCH, HEADS, tokens, VALUE_DIM).to(case.dtype), normal(*shape).to(exact))


def own(tensor: torch.Tensor, case: Case, index: int) -> torch.Tensor:
    return tensor.split(case.slices, 2)[index]


def run_rank(case: Case, index: int, group, batches: list) -> dict[str, torch.Tensor]:
    """Output, state and gradients of rank ``index`` of the case; the state counts index + 1 times in its loss."""
    whole = inputs(case)
    leaves = {
        name: (own(tensor, case, index) if name in ("query", "key", "value") else tensor).clone().requires_grad_()
        for name, tensor in whole.tensors.items()
    }
    del batches[:]
    context = torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext()
    with context:
        results = effattn.distributed.sequence_parallel_retention(
            *(leaves[name] for name in ("query", "key", "value", "log_decay")),
            group=group,
            normalize=case.normalize,
            initial_state=leaves.get("initial_state"),
            return_state=case.state,
        )
    output, state = results if case.state else (results, None)
    found = {"sent forward": list(batches), "output": output.detach()}
    del batches[:]
    loss = (output.double() * own(whole.grad_output, case, index).double()).sum()
    if case.state:
        found["state"] = state.detach()
        loss = loss + (index + 1) * (state * whole.grad_state).sum()
    loss.backward()
    return {**found, "sent backward": list(batches), **{f"d {name}": leaf.grad for name, leaf in leaves.items()}}


def work(rank: int, world_size: int, folder: str) -> None:
    rank_processes.join(rank, world_size, folder)
    batches = []
    batch_isend_irecv = dist.batch_isend_irecv

    def recorded(operations):
        batches.append([(op.op.__name__, op.tensor.numel()) for op in operations])
        return batch_isend_irecv(operations)

    dist.batch_isend_irecv = recorded
    everybody = tuple(range(world_size))
    groups = {ranks: dist.new_group(ranks, **AS_GIVEN) for ranks in {case.ranks for case in CASES.values()}}
    groups[everybody] = None
    found = {
        name: run_rank(case, case.ranks.index(rank), groups[case.ranks], batches)
        for name, case in CASES.items()
        if rank in case.ranks
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
