"""Sequence parallelism: every rank holds a slice of the sequence and sends one state, not its keys and values.

Slice r, of n_r tokens, takes the state before it to the state after it:

    S_{r+1} = gamma^(n_r) S_r + L_r,   L_r = sum_j gamma^(n_r - 1 - j) k_j^T v_j

which is an affine map, and maps compose: (n, L) then (m, M) is (n + m, gamma^m L + M). So all S_r follow from an exclusive
prefix scan over the ranks, after Hillis and Steele: in round t rank r sends to r + 2^t what the 2^t slices up to its own
do and takes the same from r - 2^t. That is ceil(log2(ranks)) rounds, one message each way. Token counts are sent instead
of decays, so that a decay is exp(count * log_decay) and never a product of rounded ones.

The gradient X_r of the state after slice r is the same scan over the ranks in reverse: X_{r-1} = gamma^(n_r) X_r + dS_r.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from .ops.retention import NORMALIZE, retention
from .ops.retention_checks import check_decay, check_state, check_tensors, chunk_of
from .reference.retention import powers

WORD = 1 << 24  # counts below it are exact in float32
BLOCK = 2048  # tokens that are copied to float32 at a time


def sequence_parallel_retention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    normalize: str = "none",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    method: str = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal retention of a sequence whose slices lie on the ranks of a process group, in rank order.

    .. math:: O = \text{retention of the whole sequence}, \text{ of which each rank passes and receives its own tokens}

    The forward and the backward pass each exchange one state of (B, H, Dk, Dv) per round in ceil(log2(ranks)) rounds.
    Every rank must make the call, and run backward if one does, with the same tensors requiring a gradient.

    Args:
        query, key: (B, H, N_r, Dk), this rank's tokens; N_r may differ from rank to rank and be 0.
        value: (B, H, N_r, Dv).
        log_decay: (H,), the same on every rank. Its gradient here is this rank's part; the sum over the ranks is the
            whole. As with every replicated parameter someone has to add it up: DistributedDataParallel does (and takes
            the mean).
        group: the ranks, in the order of the slices; default: the default process group.
        scale, normalize, method, chunk_size, backend: as :func:`effattn.retention`.
        initial_state: state before the whole sequence, as :func:`effattn.retention`. The first rank's is taken and gets
            the whole gradient; that of the others may be given or not, and gets zeros.
        return_state: also return the state after the whole sequence, on every rank: one broadcast more, and an
            all-reduce in the backward pass. It can be given as initial_state to the next call.

    Returns:
        Tensor: (B, H, N_r, Dv), query's dtype; with ``return_state`` (output, state). Differentiable once in query, key,
        value, log_decay and initial_state, through output and state.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. Raised before anything is sent.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Retentive Network, arXiv 2307.08621, equation 7; Hillis and Steele, "Data parallel algorithms", 1986.

    Example:
        >>> import torch, effattn
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> query, key, value = torch.randn(3, 1, 4, 10, 16)  # this rank's slice
        >>> log_decay = effattn.retnet_log_decay(4)
        >>> effattn.distributed.sequence_parallel_retention(query, key, value, log_decay).shape
        torch.Size([1, 4, 10, 16])
        >>> dist.destroy_process_group()
    """
    op = "sequence_parallel_retention"
    check_tensors(op, query, key, value)
    check_decay(op, log_decay, query)
    _checks.one_of(op, "normalize", normalize, NORMALIZE)
    chunk_of(op, method, chunk_size, True, query.shape[2])
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    _checks.boolean(op, "return_state", return_state)
    if not (group is None or isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"{op}: group must be a process group or None, got {type(group).__name__}")
    if query.is_meta:
        raise NotImplementedError(f"{op}: query is on the meta device, and states cannot be sent from it")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: group must contain this rank, got {group}")
    normalized = normalize == "retnet"
    if initial_state is not None:
        rows = query.shape[3] + normalized
        check_state(op, "initial_state", initial_state, query, value, query.shape[0], (rows,))
        if normalized:  # the operator reads the sum of the row before in the first column
            sums = initial_state[:, :, -1:, :1].expand(-1, -1, -1, value.shape[3])
            initial_state = torch.cat((initial_state[:, :, :-1], sums), 2)
    query, key, value = _checks.autocast(query, key, value)
    before, after = _States.apply(key, value, log_decay, initial_state, group, normalized, return_state)
    output = retention(
        *(query, key, value, log_decay),
        scale=scale,
        normalize=normalize,
        initial_state=before,
        method=method,
        chunk_size=chunk_size,
        backend=backend,
    )
    return (output, after) if return_state else output


class _States(torch.autograd.Function):
    """The state before this rank's slice and, where it is wanted, the one after the last slice."""

    @staticmethod
    def forward(ctx, key, value, log_decay, initial, group, normalized, wants_after):
        own = _after_slice(key, value, log_decay, normalized)
        before, after = _scan(key.shape[2], own, initial, log_decay, group)
        if wants_after:
            after = after.contiguous()
            dist.broadcast(after, _global(group, dist.get_world_size(group) - 1), group=group)
        else:
            after = own.new_empty(0)
            ctx.mark_non_differentiable(after)
        ctx.save_for_backward(key, value, log_decay, before)
        ctx.group, ctx.normalized, ctx.wants_after = group, normalized, wants_after
        ctx.has_initial = initial is not None
        return before, after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_before, grad_after):
        key, value, log_decay, before = ctx.saved_tensors
        if ctx.wants_after:
            grad_after = grad_after.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad_after, group=ctx.group)
        else:
            grad_after = None
        later, whole = _scan(key.shape[2], grad_before, grad_after, log_decay, ctx.group, reverse=True)
        gradients = _slice_gradients(key, value, log_decay, before, later, ctx.normalized)
        grad_initial = None
        if ctx.has_initial:
            grad_initial = whole if dist.get_rank(ctx.group) == 0 else torch.zeros_like(whole)
        return *gradients, grad_initial, None, None, None


def _after_slice(key: Tensor, value: Tensor, log_decay: Tensor, normalized: bool) -> Tensor:
    """L, (B, H, Dk, Dv), of one slice; normalized: one row more, the sum of the decays."""
    exact = torch.promote_types(key.dtype, torch.float32)
    left = _remaining(log_decay, key.shape[2])[1]
    weights = _normal(left, exact)
    state = key.new_zeros((*key.shape[:2], key.shape[3], value.shape[3]), dtype=exact)
    with torch.autocast(key.device.type, enabled=False):
        for part in _blocks(key.shape[2]):
            weighted = key[:, :, part].to(exact) * weights[:, part, None]
            state += weighted.mT @ value[:, :, part].to(exact)
    if not normalized:
        return state
    sums = left.sum(-1).to(exact)[:, None, None]
    return torch.cat((state, sums.expand(*state.shape[:2], 1, state.shape[3])), 2)


def _slice_gradients(key, value, log_decay, before, later, normalized: bool):
    """Of key, value and log_decay, from the gradient ``later`` of gamma^n before + L."""
    count, (distance, left) = key.shape[2], _remaining(log_decay, key.shape[2])
    through = powers(log_decay.double(), torch.full((), count, device=key.device))
    grad_decay = count * through * (before * later).sum((0, 2, 3), dtype=torch.float64)
    if normalized:
        later, sums = later[:, :, :-1], later[:, :, -1]
        grad_decay = grad_decay + (distance * left).sum(-1) * sums.sum((0, 2), dtype=torch.float64)
    grad_key, grad_value, weights = torch.empty_like(key), torch.empty_like(value), _normal(left, later.dtype)
    with torch.autocast(key.device.type, enabled=False):
        for part in _blocks(count):
            weight, block = weights[:, part, None], key[:, :, part].to(later.dtype)
            by_key = weight * (value[:, :, part].to(later.dtype) @ later.mT)
            grad_key[:, :, part] = by_key
            grad_value[:, :, part] = (weight * block) @ later
            by_token = (block * by_key).sum((0, 3), dtype=torch.float64)
            grad_decay = grad_decay + (distance[part] * by_token).sum(-1)
    return grad_key, grad_value, grad_decay.to(log_decay.dtype)


def _blocks(count: int):
    return (slice(begin, begin + BLOCK) for begin in range(0, count, BLOCK))


def _remaining(log_decay: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens after each token of a slice, (N,), and gamma to that power, (H, N), float64."""
    distance = torch.arange(count - 1, -1, -1, device=log_decay.device)
    return distance, powers(log_decay.double(), distance)


def _normal(decays: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in ``dtype``, 0 for its subnormal numbers: many processors multiply by them in microcode."""
    return decays.where(decays >= torch.finfo(dtype).tiny, 0).to(dtype)


def _scan(count: int, state: Tensor, initial: Tensor | None, log_decay: Tensor, group, reverse: bool = False):
    """x before and after this rank, where each rank maps x to gamma^count x + state, and x starts as ``initial``.

    ``initial`` is the first rank's; ``reverse``: the last rank is the first.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    peers = [_global(group, index) for index in range(ranks)]
    if reverse:
        rank, peers = ranks - 1 - rank, peers[::-1]
    exact = log_decay.double()

    def compose(earlier: Tensor, later: Tensor, count: Tensor) -> Tensor:
        return torch.addcmul(later, powers(exact, count).to(later.dtype)[:, None, None], earlier)

    # Counts stay on the device: nothing here waits for it.
    count, count_before = exact.new_full((), count), exact.new_zeros(())
    before = torch.zeros_like(state)
    if rank == 0 and initial is not None:
        before, state = initial.clone(), compose(initial, state, count)
    step = 1
    while step < ranks:
        target = peers[rank + step] if rank + step < ranks else None
        source = peers[rank - step] if rank >= step else None
        received = _exchange(count, state, target, source, group)
        if received is not None:
            earlier_count, earlier = received
            before, count_before = compose(earlier, before, count_before), count_before + earlier_count
            state, count = compose(earlier, state, count), count + earlier_count
        step *= 2
    return before, state


def _exchange(count: Tensor, state: Tensor, target: int | None, source: int | None, group):
    """One round: (count, state) to rank ``target``, those of rank ``source`` back."""
    operations, size = [], state.numel()
    if target is not None:
        words = torch.stack((count // WORD, count % WORD)).to(state.dtype)
        operations.append(dist.P2POp(dist.isend, torch.cat((state.flatten(), words)), target, group))
    if source is not None:
        message = state.new_empty(size + 2)
        operations.append(dist.P2POp(dist.irecv, message, source, group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    if source is None:
        return None
    high, low = message[size:].double()
    return high * WORD + low, message[:size].view(state.shape)


def _global(group, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


__all__ = ["sequence_parallel_retention"]
