"""Retention: linear attention whose memory decays by one factor per token and head (RetNet, ViR)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks, _tuning, reference
from .._library import Op, Operator
from .._registry import (
    KERNEL_DTYPES,
    REFERENCE,
    Backend,
    Problem,
    choose,
    cpu_kernel,
    cuda_kernel,
    register,
    triton_kernel,
)
from ..reference.retention import powers
from .retention_checks import check_decay, check_sequences, check_state, check_tensors, chunk_of

NORMALIZE = ("none", "retnet")
MAX_VALUE_DIM = 512
DEFAULT_CHUNK = 64  # what FLOPs are counted for
CUDA_CHUNK, TRITON_CHUNK = 64, 128  # most tokens of a tile
TRITON_TILE_BYTES = 32768  # most bytes of its keys
CPU_CHUNK = _tuning.declare(
    _tuning.Choice(
        "retention.chunk",
        1,
        "tokens of a chunk on CPU where a call asks for none; fewer tokens than that are one chunk, the parallel form",
        {"dtype": KERNEL_DTYPES, "width": (16, 32, 64, 128, 256, MAX_VALUE_DIM)},
        lambda value: type(value) is int and 2 <= value <= 4096,
    )
)


def _flops(query, key, value, is_causal, chunk_size, *rest) -> int:
    """Scores and output inside chunks, reading and updating the state: 2 c (Dk + Dv) + 4 Dk Dv a token and head."""
    batch, heads, length, key_dim = query
    chunk = min(chunk_size or DEFAULT_CHUNK, length)
    return batch * heads * length * (2 * chunk * (key_dim + value[3]) + 4 * key_dim * value[3])


def _state_shape(query, value, cu_seqlens) -> tuple:
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, query.shape[1], query.shape[3], value.shape[3]


def _like_query(query: Tensor, value_dim) -> Tensor:
    """Of (B, H, N, Dv), laid out as query is."""
    if value_dim == query.shape[3]:
        return torch.empty_like(query)
    order = sorted(range(3), key=query.stride, reverse=True)
    sizes = [query.shape[d] for d in order]
    return query.new_empty((*sizes, value_dim)).permute(*(order.index(d) for d in range(3)), 3)


def _fake(
    query, key, value, log_decay, initial_state, row_scale, cu_seqlens, is_causal, chunk_size, return_state, scale
):
    shape = _state_shape(query, value, cu_seqlens) if return_state else (0,)
    return _like_query(query, value.shape[3]), query.new_empty(shape, dtype=torch.float32)


scan = Operator(
    "retention",
    family="retention",
    tensors=("query", "key", "value", "log_decay", "?initial_state", "?row_scale", "?cu_seqlens"),
    differentiable=("query", "key", "value", "log_decay", "initial_state"),
    parameters=("log_decay",),
    linear=("value", "initial_state"),
    options="bool is_causal, SymInt chunk_size, bool return_state, float scale",
    results=("output", "state"),
    saved={},
    saves_output=False,
    mixes_batch=lambda *args: args[6] is not None,
    fake=_fake,
    flops=_flops,
    axes={"cu_seqlens": ""},
)
"""O_i = row_scale_i ((s Q K^T * G) V + s gamma^(i + 1) q_i S_0)_i and, with return_state, the state after the last token.

log_decay (H,), initial_state (B or S, H, Dk, Dv), row_scale (B, H, N): contiguous float32. cu_seqlens (S + 1,) int32.
chunk_size: tokens of one chunk, 0 the backend's choice. The state is (0,) without return_state. The gradient of
row_scale is left to `_attach`.
"""


def _step_fake(query, key, value, log_decay, state, scale):
    return _like_query(query, value.shape[3]), torch.empty_like(state)


def _step_flops(query, key, value, *args, **kwargs) -> int:
    return 4 * query[0] * query[1] * query[3] * value[3]


_STEP = "Tensor query, Tensor key, Tensor value, Tensor log_decay"
_STEP_AXES = {**dict.fromkeys(("query", "key", "value", "state", "output"), "batch heads"), "log_decay": "heads"}
step = Op(
    f"retention_step({_STEP}, Tensor state, float scale) -> (Tensor output, Tensor state)",
    _step_fake,
    family="retention",
    flops=_step_flops,
    axes=_STEP_AXES,
    splits="batch heads",
)
step_inplace = Op(
    f"retention_step_({_STEP}, Tensor(a!) state, float scale) -> Tensor output",
    lambda *args: _step_fake(*args)[0],
    family="retention",
    flops=_step_flops,
    axes=_STEP_AXES,
    splits="batch heads",
)
"""One token, (B, H, 1, D); log_decay (H,) and state (B, H, Dk, Dv) contiguous float32."""


def _chunks_up_to(most: int, problem: Problem, kernel) -> tuple[bool, str]:
    ok, reason = kernel(problem)
    if ok and problem.chunk_size > most:
        return False, f"a chunk of {problem.chunk_size} tokens; its tiles hold {most} of head_dim {problem.head_dim}"
    return ok, reason


def _cuda_scan(problem: Problem) -> tuple[bool, str]:
    return _chunks_up_to(CUDA_CHUNK, problem, cuda_kernel)


def _triton_scan(problem: Problem) -> tuple[bool, str]:
    key_bytes = problem.dtype.itemsize * max(64, 1 << (problem.head_dim - 1).bit_length())
    return _chunks_up_to(min(TRITON_CHUNK, TRITON_TILE_BYTES // key_bytes), problem, triton_kernel)


register(
    "retention", (Backend("cpu", cpu_kernel), Backend("cuda", _cuda_scan), Backend("triton", _triton_scan), REFERENCE)
)
register(
    "retention_step",
    (Backend("cpu", cpu_kernel), Backend("cuda", cuda_kernel), Backend("triton", triton_kernel), REFERENCE),
)


def retention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    normalize: str = "none",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    method: str = "auto",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention without softmax whose weights decay with the distance: retention.

    .. math::
        O = (s\, Q K^\top \odot G)\, V, \qquad G_{ij} = \gamma_h^{\,i - j} \text{ for } j \le i, \text{ else } 0,
        \qquad \gamma_h = e^{\text{log\_decay}_h}

    which is also :math:`o_n = s\, q_n S_n` with the state :math:`S_n = \gamma S_{n-1} + k_n^\top v_n`. Three forms of the
    same: parallel (quadratic), recurrent, and chunkwise, which is linear in N and fast. The fused kernels form no N x N
    tensor and keep the state on chip, forward and backward.

    Args:
        query, key: (B, H, N, Dk), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        value: (B, H, N, Dv); Dv may differ from Dk.
        log_decay: (H,), natural logarithm of gamma, at most 0; -inf is gamma = 0. On a GPU the values are not looked at,
            since that would wait for the device.
        is_causal: False: G_ij = gamma^|i - j|; goes neither with a state nor with ``method="recurrent"``.
        scale: factor s of the scores; default Dk ** -0.5.
        normalize: "retnet": row i is divided by sqrt(sum_j G_ij), the same in all forms. "none".
        initial_state: (B, H, Dk, Dv), state before the first token, as an earlier call returned it; float32, float64 for
            float64. With ``normalize="retnet"`` (B, H, Dk + 1, Dv): its last row carries the sum. With ``cu_seqlens``
            one per sequence: (S, H, ...).
        return_state: also return the state after the last token, of initial_state's shape. A sequence split anywhere,
            the state handed on, gives what the whole sequence gives.
        method: "parallel" (one chunk), "chunkwise", "recurrent" (chunks of one token), or "auto".
        chunk_size: tokens of a chunk, for "chunkwise"; default: what suits the kernel. Kernels of a GPU hold a chunk in
            a tile, 64 tokens in CUDA and up to 128 in Triton; a larger one runs on the reference.
        cu_seqlens: (S + 1,) int32, ascending from 0 to N: packs S sequences one after the other, B = 1.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, Dv), query's dtype; with ``return_state`` (output, state). Differentiable in query, key, value,
        log_decay and initial_state, through output and state.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Retentive Network, arXiv 2307.08621, section 2; ViR, arXiv 2310.19731.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 1, 4, 100, 16)
        >>> log_decay = effattn.retnet_log_decay(4)
        >>> whole = effattn.retention(query, key, value, log_decay)
        >>> first, state = effattn.retention(
        ...     query[:, :, :37], key[:, :, :37], value[:, :, :37], log_decay, return_state=True)
        >>> rest = effattn.retention(
        ...     query[:, :, 37:], key[:, :, 37:], value[:, :, 37:], log_decay, initial_state=state)
        >>> torch.allclose(torch.cat((first, rest), 2), whole, atol=1e-4)
        True
    """
    op = "retention"
    check_tensors(op, query, key, value)
    check_decay(op, log_decay, query)
    _checks.one_of(op, "normalize", normalize, NORMALIZE)
    chunk = chunk_of(op, method, chunk_size, is_causal, query.shape[2])
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    sequences = query.shape[0]
    if cu_seqlens is not None:
        sequences = check_sequences(op, cu_seqlens, query)
        cu_seqlens = cu_seqlens.contiguous()
    _checks.boolean(op, "return_state", return_state)
    if not is_causal:
        for name, given in (("initial_state", initial_state is not None), ("return_state", return_state)):
            if given:
                raise ValueError(f"{op}: {name} goes with is_causal=True only: without an order there is no state")
    extra = normalize == "retnet"
    if initial_state is not None:
        check_state(op, "initial_state", initial_state, query, value, sequences, (query.shape[3] + extra,))
    query, key, value = _checks.autocast(query, key, value)
    backend = choose(op, backend, _problem(query, value, chunk), lambda chosen: _notes(chosen, query, value, chunk))
    if backend == "reference":
        if cu_seqlens is not None and cu_seqlens.is_meta:
            raise NotImplementedError(f"{op}: cu_seqlens is on the meta device, and the reference has to read it")
        return reference.retention(
            *(query, key, value, log_decay, is_causal, scale, normalize, initial_state, return_state),
            chunk_size=_reference_chunk(method, chunk, is_causal),
            cu_seqlens=cu_seqlens,
        )
    if backend == "cpu" and method in ("auto", "chunkwise") and chunk_size is None:
        chunk = _tuning.value(CPU_CHUNK, query.dtype, _width(query, value))
    log_decay, state = log_decay.float().contiguous(), initial_state
    row_scale = sums = None
    if extra:
        before = None if state is None else state[:, :, -1, 0]
        row_scale, sums = _row_scale(query, log_decay, before, cu_seqlens, is_causal, return_state)
        if row_scale.requires_grad:
            query, row_scale = _Attach.apply(query, row_scale), row_scale.detach()
        state = None if state is None else state[:, :, :-1]
    state = None if state is None else state.float().contiguous()
    output, state = scan(
        *(backend, query, key, value, log_decay, state, row_scale, cu_seqlens, is_causal, chunk, return_state, scale)
    )
    if not return_state:
        return output
    if extra:
        state = torch.cat((state, sums[..., None, None].expand(-1, -1, 1, value.shape[3])), 2)
    return output, state


def retention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""One token of recurrent retention: what a decoder calls per token.

    .. math:: S = \gamma_h\, S_{\text{state}} + k^\top v, \qquad o = s\, q\, S

    Args:
        query, key: (B, H, 1, Dk), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        value: (B, H, 1, Dv).
        log_decay: (H,), natural logarithm of gamma, at most 0.
        state: (B, H, Dk, Dv), float32 (float64 for float64); zeros before the first token. With Dk + 1 rows, as
            ``retention(normalize="retnet")`` returns it, the step normalises too.
        scale: factor s of the scores; default Dk ** -0.5.
        inplace: write the new state over ``state``, which halves the memory of decoding. Not differentiable.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        (Tensor, Tensor): output (B, H, 1, Dv) in query's dtype, and the new state. Differentiable in all tensors.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Retentive Network, arXiv 2307.08621, equation 6.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 2, 4, 1, 16)
        >>> state = torch.zeros(2, 4, 16, 16)
        >>> output, state = effattn.retention_step(query, key, value, effattn.retnet_log_decay(4), state)
        >>> output.shape, state.shape
        (torch.Size([2, 4, 1, 16]), torch.Size([2, 4, 16, 16]))
    """
    op = "retention_step"
    check_tensors(op, query, key, value)
    if query.shape[2] != 1:
        raise ValueError(f"{op}: query must hold one token, (B, H, 1, Dk), got {tuple(query.shape)}")
    check_decay(op, log_decay, query)
    scale = _checks.scale_or_default(op, scale, query.shape[3])
    key_dim = query.shape[3]
    check_state(op, "state", state, query, value, query.shape[0], (key_dim, key_dim + 1))
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, log_decay, state))
    _checks.boolean(op, "inplace", inplace)
    if inplace and differentiable:
        raise ValueError(f"{op}: inplace must be False where a gradient is wanted (use torch.no_grad())")
    query, key, value = _checks.autocast(query, key, value)
    backend = choose(op, backend, _problem(query, value, 1))
    if backend == "reference":
        output, new = reference.retention_step(query, key, value, log_decay, state, scale)
        return output, state.copy_(new) if inplace else new
    if differentiable or forward_ad._current_level >= 0 or state.shape[2] != key_dim:
        normalize = "none" if state.shape[2] == key_dim else "retnet"
        output, new = retention(
            *(query, key, value, log_decay),
            scale=scale,
            normalize=normalize,
            initial_state=state,
            return_state=True,
            method="recurrent",
            backend=backend,
        )
        return output, state.copy_(new) if inplace else new
    log_decay = log_decay.float().contiguous()
    if not inplace:
        return step(backend, query, key, value, log_decay, state.float().contiguous(), scale)
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"{op}: state must be contiguous float32 to be written in place, got {state.dtype}")
    return step_inplace(backend, query, key, value, log_decay, state, scale), state


# ---- the registry's and the reference's view of a call ----


def _problem(query: Tensor, value: Tensor, chunk) -> Problem:
    detail = f"value's head_dim {value.shape[3]} is above {MAX_VALUE_DIM}" if value.shape[3] > MAX_VALUE_DIM else ""
    return Problem(query.device.type, query.dtype, query.shape[3], detail=detail, chunk_size=chunk)


def _width(query: Tensor, value: Tensor) -> int:
    """The class of a state's sides."""
    return max(*(_tuning.power_of_two(tensor.shape[3], 16, MAX_VALUE_DIM) for tensor in (query, value)))


def _notes(chosen: str, query: Tensor, value: Tensor, chunk) -> list[str]:
    if chosen != "cpu" or chunk:
        return []
    tokens, origin = _tuning.find(CPU_CHUNK, query.dtype, _width(query, value))
    return [f"chunks of {tokens} tokens ({origin})"]


def _reference_chunk(method: str, chunk, is_causal: bool):
    """The parallel form where a graph is traced: a loop over chunks would hold for one length only."""
    if method == "parallel" or not is_causal:
        return None
    return chunk or (None if torch.compiler.is_compiling() else DEFAULT_CHUNK)


# ---- normalisation ----


def _row_scale(query, log_decay, before, cu_seqlens, is_causal: bool, wants_last: bool):
    """(B, H, N) 1 / sqrt(z_i), and (B or S, H) z after the last token of every sequence; float32."""
    length, device = query.shape[2], query.device
    exact = log_decay.double()
    position = _checks.constant(torch.arange(length, device=device), log_decay)
    powers_below = powers(exact, position)
    geometric = torch.cat((powers_below.new_zeros(len(exact), 1), powers_below.cumsum(-1)), -1)  # of the first n powers
    if cu_seqlens is None:
        rows, lengths = geometric[:, 1:], position.new_full((1,), length)
    else:
        sequence = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
        position, lengths = position - cu_seqlens[sequence], cu_seqlens.diff().long()
        rows = geometric[:, position + 1]
    if not is_causal:
        rows = rows + (rows.flip(-1) if cu_seqlens is None else geometric[:, lengths[sequence] - position]) - 1
    elif before is not None:
        by_token = before[..., None] if cu_seqlens is None else before[sequence].t()
        rows = rows + powers(exact, position + 1) * by_token
    row_scale = rows.rsqrt().float().expand(query.shape[0], -1, -1).contiguous()
    if not wants_last:
        return row_scale, None
    last = (geometric[:, -1:] if cu_seqlens is None else geometric[:, lengths]).t()
    if before is not None:
        last = last + powers(exact, lengths).t() * before
    return row_scale, last.float().expand(query.shape[0] if cu_seqlens is None else -1, -1)


class _Attach(torch.autograd.Function):
    """The identity on query. Scores are linear in it, so q . dq is also z dL / dz of a factor z of its row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, row_scale):
        return query.view_as(query)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_query):
        query, row_scale = ctx.saved_tensors
        return grad_query, (query.float() * grad_query.float()).sum(-1) / row_scale
