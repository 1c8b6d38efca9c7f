"""The launchers of retention: the chunk scan for every length, the token loop for chunks of one token and a decoder's step."""

import torch

from . import configurations as table
from . import retention_configurations as tuned
from .retention_recurrent import Strides as RecurrentStrides
from .retention_recurrent import recurrent
from .retention_scan import EVERYTHING, NOTHING, READS, Strides, scan


def _strides(kind, **tensors):
    return kind(*(tensors[name].stride() if tensors.get(name) is not None else None for name in kind._fields))


def _like(query, value_dim):
    """(B, H, N, value_dim) in query's layout."""
    if value_dim == query.shape[3]:
        return torch.empty_like(query)
    order = sorted(range(3), key=query.stride, reverse=True)
    sizes = [query.shape[d] for d in order]
    return query.new_empty((*sizes, value_dim)).permute(*(order.index(d) for d in range(3)), 3)


def _transposed(state):
    return None if state is None else state.mT


class _Call:
    """What all scans of one call share."""

    def __init__(self, query, log_decay, row_scale, cu_seqlens, is_causal, chunk_size, scale):
        self.log_decay, self.row_scale, self.cu_seqlens, self.scale = log_decay, row_scale, cu_seqlens, scale
        self.is_causal, self.chunk_size = is_causal, chunk_size
        self.heads = query.shape[1]
        self.sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.moments = []  # of d log_decay: partial sums (programs of a head, H)

    def recurrent(self, query, key, value, output, entering, leaving):
        config = tuned.recurrent(query.shape[3], value.shape[3])
        tensors = {"query": query, "key": key, "value": value, "output": output}
        table.launch(
            recurrent,
            self.sequences * self.heads * -(-value.shape[3] // config.block_v),
            query.device,
            config,
            *(query, key, value, self.log_decay, self.row_scale, self.cu_seqlens, output, entering, leaving),
            _strides(RecurrentStrides, **tensors, entering=entering, leaving=leaving),
            *(self.heads, query.shape[2], self.scale),
            KEY_DIM=query.shape[3],
            VALUE_DIM=value.shape[3],
            BLOCK_K=config.block_k,
            BLOCK_V=config.block_v,
        )

    def scan(self, output, query, key, value, *, backwards, scales_columns=False, measures=NOTHING, **tensors):
        """`backwards`: the scan's direction where there is only one. Without an order there are two scans, forward first."""
        if self.is_causal:
            return self._scan(output, query, key, value, backwards, False, scales_columns, measures, **tensors)
        batch, heads, tokens, _ = output.shape
        kept = output.new_empty((batch, heads, tokens, output.shape[3]), dtype=torch.float32)
        self._scan(kept, query, key, value, False, False, scales_columns, measures, **tensors)
        self._scan(output, query, key, value, True, True, scales_columns, measures, addend=kept, **tensors)

    def _scan(self, output, query, key, value, backwards, strict, scales_columns, measures, **tensors):
        key_dim, value_dim = query.shape[3], value.shape[3]
        config = tuned.scan(query, value_dim, self.chunk_size, measures is EVERYTHING)
        tiles = -(-value_dim // config.block_v)
        if measures is not NOTHING:
            shape = (self.sequences * tiles, self.heads)
            self.moments.append(torch.empty(shape, dtype=torch.float64, device=query.device))
        tensors |= {"query": query, "key": key, "value": value, "output": output}
        names = ("addend", "output", "entering", "leaving", "partner", "exit_gradient")
        table.launch(
            scan,
            self.sequences * self.heads * tiles,
            query.device,
            config,
            *(query, key, value, self.log_decay, self.row_scale, self.cu_seqlens),
            *(tensors.get(name) for name in names),
            None if measures is NOTHING else self.moments[-1],
            _strides(Strides, **tensors),
            *(self.heads, query.shape[2], self.chunk_size or config.chunk, self.scale),
            REVERSED=backwards,
            STRICT=strict,
            SCALES_COLUMNS=scales_columns,
            MEASURE=measures.value,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            CHUNK=config.chunk,
            BLOCK_K=config.block_k,
            BLOCK_V=config.block_v,
            TOGETHER=config.together,
            PRECISION=tuned.precision(query),
        )


def retention_fwd(
    query, key, value, log_decay, initial_state, row_scale, cu_seqlens, is_causal, chunk_size, return_state, scale
):
    """(output, state)"""
    call = _Call(query, log_decay, row_scale, cu_seqlens, is_causal, chunk_size, scale)
    output = _like(query, value.shape[3])
    shape = (call.sequences, call.heads, query.shape[3], value.shape[3]) if return_state else (0,)
    state = query.new_empty(shape, dtype=torch.float32)
    leaving = state if return_state else None
    if is_causal and (chunk_size == 1 or query.shape[2] == 1):
        call.recurrent(query, key, value, output, initial_state, leaving)
    else:
        call.scan(output, query, key, value, backwards=False, entering=initial_state, leaving=leaving)
    return output, state


def retention_bwd(
    grad_output,
    grad_state,
    query,
    key,
    value,
    log_decay,
    initial_state,
    row_scale,
    cu_seqlens,
    is_causal,
    chunk_size,
    return_state,
    scale,
):
    """(grad_query, grad_key, grad_value, grad_log_decay, grad_initial_state). `chunk_size` is the forward's; its chunks are the kernel's own."""
    call = _Call(query, log_decay, row_scale, cu_seqlens, is_causal, 0, scale)
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    absent = query.new_empty((0,), dtype=torch.float32)
    grad_state = grad_state if return_state else None  # a compiled graph passes zeros like the empty state
    grad_initial = absent if initial_state is None else torch.empty_like(initial_state)
    call.scan(
        *(grad_query, grad_output, value, key),
        backwards=False,
        measures=EVERYTHING,
        partner=query,
        entering=_transposed(initial_state),
        exit_gradient=_transposed(grad_state),
    )
    call.scan(
        *(grad_value, key, query, grad_output),
        backwards=True,
        scales_columns=True,
        measures=READS,
        partner=value,
        entering=grad_state,
        leaving=None if initial_state is None else grad_initial,
    )
    call.scan(
        *(grad_key, value, grad_output, query), backwards=True, scales_columns=True, entering=_transposed(grad_state)
    )
    grad_log_decay = torch.cat(call.moments).sum(0).float()
    return grad_query, grad_key, grad_value, grad_log_decay, grad_initial


def _step(query, key, value, log_decay, state, scale, new_state):
    output = _like(query, value.shape[3])
    call = _Call(query, log_decay, None, None, True, 1, scale)
    call.recurrent(query, key, value, output, state, new_state)
    return output


def retention_step(query, key, value, log_decay, state, scale):
    """(output, state)"""
    new_state = torch.empty_like(state)
    return _step(query, key, value, log_decay, state, scale, new_state), new_state


def retention_step_(query, key, value, log_decay, state, scale):
    """The output; state is overwritten."""
    return _step(query, key, value, log_decay, state, scale, state)
