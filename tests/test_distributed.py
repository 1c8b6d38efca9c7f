"""Sequence parallelism: what ranks compute together is what one process computes."""

from __future__ import annotations

import math

import pytest
import rank_processes
import sequence_parallel
import torch
import torch.distributed as dist
from sequence_parallel import CASES

import effattn
from effattn.distributed import sequence_parallel_retention

RANKS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> results of each rank, in the order of its slices."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.run(sequence_parallel, RANKS, folder, seconds=90)
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [by_rank[rank][name] for rank in case.ranks] for name, case in CASES.items()}


def one_process(case, dtype=None):
    """What the ranks should have found together: everything in one process; the loss counts the state 1 + 2 + ... times."""
    whole = sequence_parallel.inputs(case)
    exact = dtype == torch.float64
    leaves = {
        name: t.to(torch.float64 if exact else t.dtype, copy=True).requires_grad_() for name, t in whole.tensors.items()
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast and not exact):
        output, state = effattn.retention(
            *(leaves[name] for name in ("query", "key", "value", "log_decay")),
            normalize=case.normalize,
            initial_state=leaves.get("initial_state"),
            return_state=True,
            backend="reference",
        )
    loss = (output.double() * whole.grad_output.double()).sum()
    if case.state:
        ranks = len(case.slices)
        loss = loss + ranks * (ranks + 1) / 2 * (state * whole.grad_state).sum()
    loss.backward()
    gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), **({"state": state.detach()} if case.state else {}), **gradients}


def together(parts):
    """One result of all ranks: tokens one after the other, the rest added up."""
    joined = {name: torch.cat([part[name] for part in parts], 2) for name in ("output", "d query", "d key", "d value")}
    if "state" in parts[0]:
        joined["state"] = parts[0]["state"]
    for name in ("d log_decay", "d initial_state"):
        if name in parts[0]:
            joined[name] = sum(part[name] for part in parts)
    return joined


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_in_float64_the_ranks_compute_what_one_process_does(found, name):
    got, wanted = together(found[name]), one_process(CASES[name])
    assert got.keys() == wanted.keys()
    for part, tensor in wanted.items():
        torch.testing.assert_close(
            got[part], tensor, rtol=0, atol=1e-13 * max(largest(tensor), 1.0), msg=lambda m, p=part: f"{p}: {m}"
        )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != torch.float64])
def test_in_lower_precision_the_ranks_are_as_exact_as_one_process(found, name):
    case = CASES[name]
    got, low, exact = together(found[name]), one_process(case), one_process(case, torch.float64)
    dtype = torch.bfloat16 if case.autocast else case.dtype
    for part, ref in exact.items():
        error, budget = largest(got[part].double() - ref), largest(low[part].double() - ref)
        factor = 2 if part in ("output", "state") else 3
        assert error <= factor * budget + torch.finfo(dtype).eps * largest(ref), part


def test_the_state_is_exact_under_autocast(found):
    case = CASES["under autocast"]
    tensors = {
        name: t.bfloat16().double() if name in ("query", "key", "value") else t.double()
        for name, t in sequence_parallel.inputs(case).tensors.items()
    }
    initial = tensors.pop("initial_state")
    wanted = effattn.retention(*tensors.values(), initial_state=initial, return_state=True, backend="reference")[1]
    got = found["under autocast"][0]["state"]
    assert got.dtype == torch.float32
    assert largest(got - wanted) <= 1e-6 * largest(wanted)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.state])
def test_every_rank_has_the_same_state(found, name):
    for part in found[name][1:]:
        assert torch.equal(part["state"], found[name][0]["state"])


def test_the_first_rank_gets_the_gradient_of_the_initial_state(found):
    first, *others = (part["d initial_state"] for part in found["initial state"])
    assert first.any()
    assert not any(other.any() for other in others)


def test_each_rank_has_its_own_part_of_the_gradient_of_the_decay(found):
    """Not the whole on every rank, which an all-reduce would count ranks times."""
    parts = torch.stack([part["d log_decay"] for part in found["uneven"]])
    whole = parts.sum(0)
    assert (parts[:, 0] != 0).all()
    assert not (parts[:, 0] == whole[0]).any()


@pytest.mark.parametrize("name", ["uneven", "three ranks that do not begin at 0", "ranks in pairs", "one rank"])
def test_a_pass_takes_as_many_rounds_as_the_ranks_have_binary_digits(found, name):
    case = CASES[name]
    ranks = len(case.ranks)
    rounds = [1 << t for t in range(math.ceil(math.log2(ranks)))]
    sent = {"sent forward": range(ranks), "sent backward": range(ranks - 1, -1, -1)}
    rows = sequence_parallel.KEY_DIM + (case.normalize == "retnet")
    numbers = sequence_parallel.BATCH * sequence_parallel.HEADS * rows * sequence_parallel.VALUE_DIM + 2
    for direction, order in sent.items():
        for place, index in enumerate(order):
            wanted = [
                [("isend", numbers)] * (place + step < ranks) + [("irecv", numbers)] * (place >= step)
                for step in rounds
            ]
            assert found[name][index][direction] == [batch for batch in wanted if batch], (direction, index)


# ---- one process ----


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tokens_beyond_what_float32_counts_exactly_are_counted(alone, monkeypatch):
    """Rank 1 of two, whose predecessor says that it has seen 2 ** 30 + 1 tokens."""
    from effattn import distributed

    count = (1 << 30) + 1
    log_decay, state = torch.tensor([-(2.0**-30)], dtype=torch.float64), torch.ones(1, 1, 2, 2)
    sent = []

    def loopback(operations):
        for operation in operations:
            if operation.op is dist.isend:
                sent.append(operation.tensor.clone())
            else:
                operation.tensor.copy_(sent.pop())
        return []

    monkeypatch.setattr(dist, "batch_isend_irecv", loopback)
    got, tensor = distributed._exchange(torch.tensor(count, dtype=torch.float64), state, 0, 0, None)
    assert got.item() == count
    assert torch.equal(tensor, state)
    assert log_decay.mul(got).exp().item() == math.exp(-count * 2.0**-30)


def test_backward_of_calls_in_a_row_and_of_only_the_state(alone, monkeypatch):
    """The state of one call is the initial state of the next; each slice is several blocks."""
    monkeypatch.setattr(effattn.distributed, "BLOCK", 4)
    query, key, value = torch.randn(3, 1, 2, 10, 4, dtype=torch.float64).requires_grad_()
    log_decay = effattn.retnet_log_decay(2).requires_grad_()
    options = {"backend": "reference", "return_state": True}
    first, second = ([t[:, :, part] for t in (query, key, value)] for part in (slice(6), slice(6, None)))
    _, state = sequence_parallel_retention(*first, log_decay, **options)
    output, state = sequence_parallel_retention(*second, log_decay, initial_state=state, **options)
    whole, last = effattn.retention(query, key, value, log_decay, **options)
    torch.testing.assert_close(output, whole[:, :, 6:])
    torch.testing.assert_close(state, last)
    got = torch.autograd.grad(state.square().sum(), (key, value, log_decay))
    wanted = torch.autograd.grad(last.square().sum(), (key, value, log_decay))
    for ours, theirs in zip(got, wanted):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalize": "softmax"}, ValueError, "normalize must be one of none, retnet"),
        ({"method": "ring"}, ValueError, "method must be one of"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"initial_state": torch.zeros(1, 2, 5, 4)}, ValueError, r"initial_state must have shape \(1, 2, 4, 4\)"),
        ({"initial_state": torch.zeros(1, 2, 4, 4).double()}, TypeError, "initial_state must be torch.float32"),
        ({"backend": "torch"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(alone, monkeypatch, options, error, message):
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: pytest.fail("sent"))
    x, log_decay = torch.zeros(1, 2, 3, 4), effattn.retnet_log_decay(2)
    with pytest.raises(error, match=message):
        sequence_parallel_retention(x, x, x, log_decay, **options)
    with pytest.raises(ValueError, match="sequence_parallel_retention: log_decay must have shape"):
        sequence_parallel_retention(x, x, x, log_decay[:1])


def test_without_a_process_group_torch_says_so():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="process group"):
        sequence_parallel_retention(x, x, x, effattn.retnet_log_decay(2))
