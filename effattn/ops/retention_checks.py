"""Argument checks of retention, also where a sequence lies on several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

METHODS = ("auto", "parallel", "chunkwise", "recurrent")


def check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """(B, H, N, Dk) twice and (B, H, N, Dv)."""
    tensors = isinstance(query, Tensor) and isinstance(value, Tensor) and query.dim() == value.dim() == 4
    if tensors and value.shape[3] != query.shape[3] and value.shape[3] >= 1:
        _checks.attention_inputs(op, query, key, query)
        query = key = query[..., :1].expand(*query.shape[:3], value.shape[3])
    _checks.attention_inputs(op, query, key, value)


def is_plain(tensor: Tensor) -> bool:
    """Whether its values can be looked at: on the CPU, and neither traced nor mapped over."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_decay(op: str, log_decay: Tensor, query: Tensor) -> None:
    _checks.parameter(op, "log_decay", log_decay, query)
    heads = query.shape[1]
    if tuple(log_decay.shape) != (heads,):
        raise ValueError(f"{op}: log_decay must have shape (H,) with H = {heads}, got {tuple(log_decay.shape)}")
    if heads and is_plain(log_decay):
        for given in log_decay.tolist():  # a few heads: faster than an operation
            if not given <= 0.0:
                raise ValueError(f"{op}: log_decay must be at most 0 (gamma at most 1), got {given}")


def chunk_of(op: str, method: str, chunk_size, is_causal: bool, length):
    """Tokens of a chunk; 0: the backend's choice."""
    _checks.one_of(op, "method", method, METHODS)
    _checks.boolean(op, "is_causal", is_causal)
    if chunk_size is not None:
        _checks.integer(op, "chunk_size", chunk_size, 1)
        if method not in ("auto", "chunkwise"):
            raise ValueError(f"{op}: chunk_size must be None with method={method!r}, got {chunk_size}")
        return chunk_size
    if method == "recurrent":
        if not is_causal:
            raise ValueError(f"{op}: method must not be 'recurrent' where is_causal is False")
        return 1
    return max(length, 1) if method == "parallel" else 0


def check_sequences(op: str, cu_seqlens: Tensor, query: Tensor) -> int:
    """Number of packed sequences."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.layout != torch.strided or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens must be an int32 Tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"{op}: cu_seqlens must be on query's device {query.device}, got {cu_seqlens.device}")
    if query.shape[0] != 1:
        raise ValueError(f"{op}: query must have a batch of 1 with cu_seqlens, got {query.shape[0]}")
    if is_plain(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != query.shape[2] or bounds != sorted(bounds):
            raise ValueError(f"{op}: cu_seqlens must ascend from 0 to N = {query.shape[2]}, got {bounds}")
    return cu_seqlens.shape[0] - 1


def check_state(op: str, name: str, state: Tensor, query: Tensor, value: Tensor, sequences, rows: tuple) -> None:
    _checks.parameter(op, name, state, query)
    wanted = [(sequences, query.shape[1], count, value.shape[3]) for count in rows]
    if tuple(state.shape) not in wanted:
        allowed = " or ".join(map(str, wanted))
        raise ValueError(f"{op}: {name} must have shape {allowed}, got {tuple(state.shape)}")
    exact = torch.promote_types(query.dtype, torch.float32)
    if state.dtype != exact:
        raise TypeError(f"{op}: {name} must be {exact} for query in {query.dtype}, got {state.dtype}")
