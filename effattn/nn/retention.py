"""Retention of RetNet and ViR: projections around the retention operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops import retention, retention_step, retnet_log_decay, rotate_xpos
from ..ops.retention_checks import METHODS, check_state

GATES = {"swish": F.silu, "gelu": F.gelu}


class RetentionState(NamedTuple):
    """What :class:`MultiScaleRetention` carries from call to call."""

    memory: Tensor
    """(B, H, Dk, Dv), sum_j gamma^(n - 1 - j) k_j^T v_j; float32, float64 of a float64 module."""
    position: int
    """n, tokens seen."""


class Decaying(nn.Module):
    """A module whose heads decay: as published by a fixed schedule, or by a parameter that starts there."""

    num_heads: int

    def _register_decay(self, learnable: bool, dtype, device) -> None:
        self.learnable_decay = learnable
        if learnable:
            self.log_rate = nn.Parameter(torch.empty(self.num_heads, dtype=dtype, device=device))
        else:
            exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            self.register_buffer("_log_decay", self._schedule(exact, device), persistent=False)

    def _schedule(self, dtype: torch.dtype, device) -> Tensor:
        """The published log_decay, (H,)."""
        raise NotImplementedError

    def _reset_decay(self) -> None:
        if self.learnable_decay:
            with torch.no_grad():
                self.log_rate.copy_(self._schedule(torch.float64, self.log_rate.device).neg().log())

    @property
    def log_decay(self) -> Tensor:
        """(H,), at most 0; float32 or float64, also of a module in half precision."""
        if not self.learnable_decay:
            return self._log_decay
        return -self.log_rate.to(torch.promote_types(self.log_rate.dtype, torch.float32)).exp()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.learnable_decay:  # a cast rounds it, to_empty() leaves anything in it
            exact = torch.promote_types(self._log_decay.dtype, torch.float32)
            self._log_decay = self._schedule(exact, self._log_decay.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.learnable_decay:  # which published state dicts do not hold
            state_dict.setdefault(f"{prefix}log_rate", self.log_rate.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


class MultiScaleRetention(Decaying):
    """Retention of a RetNet layer: projections around :func:`effattn.retention`, a norm of every head and a gate.

        y = out_proj(gate(g_proj(x)) * RMSNorm(R)),   R = retention(rotate_xpos(q), rotate_xpos(k), v, normalize="retnet")

    With eps 0 this is torchscale's module in all its forms. That one also divides each row of R by the clamped sum of its
    scores, another one in each form; the norm takes it away, and only eps above 0 sees a difference.

    A sequence may come in pieces: a call returns its state with ``return_state`` and the next one takes it. One token
    with a state runs :func:`effattn.retention_step`, in memory that does not grow with the position.
    ``attention.load_state_dict(published.state_dict())`` works with torchscale's names.

    Args:
        embed_dim: channels of the input and output.
        num_heads: H.
        value_dim: channels of value and gate; default 2 * embed_dim, as in the paper.
        gate_fn: "swish" or "gelu".
        eps: of the norm.
        learnable_decay: gamma_h = exp(-exp(log_rate_h)), where the parameter ``log_rate`` starts at the published decays
            and state dicts without it leave it. Default: they are fixed, 1 - 2 ** (-5 - h), and not in the state dict.
        method, chunk_size: form of the computation, as :func:`effattn.retention`.
        backend: passed to the operators.
        device, dtype: of the parameters.

    Shape:
        (B, N, embed_dim) -> the same; with ``return_state`` also the state ``(memory, position)``: (B, H, Dk, Dv) and the
        tokens seen. The call's options: ``state``; ``return_state``; ``inplace``, to write the memory of the state after
        one token over the given one (without gradients); ``cu_seqlens``, to pack sequences with B = 1 (without state).

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.retention`.

    Source:
        Retentive Network, arXiv 2307.08621, section 2; ``MultiScaleRetention`` and ``RetNetRelPos`` of torchscale.
        Initialisation as published: Xavier uniform, gain 2 ** -2.5, of ``out_proj`` 2 ** -1.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.MultiScaleRetention(64, num_heads=2).eval()
        >>> x = torch.randn(3, 10, 64)
        >>> prefix, state = attention(x[:, :9], return_state=True)
        >>> last, state = attention(x[:, 9:], state, return_state=True)
        >>> torch.allclose(torch.cat((prefix, last), 1), attention(x), atol=1e-5), state.position
        (True, 10)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        value_dim: int | None = None,
        gate_fn: str = "swish",
        eps: float = 1e-6,
        learnable_decay: bool = False,
        method: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "MultiScaleRetention"
        _checks.module_options(name, device, dtype, learnable_decay=learnable_decay)
        _checks.integer(name, "embed_dim", embed_dim, 1)
        value_dim = 2 * embed_dim if value_dim is None else value_dim
        for argument, given in (("embed_dim", embed_dim), ("num_heads", num_heads), ("value_dim", value_dim)):
            _checks.integer(name, argument, given, 1)
        if embed_dim % (2 * num_heads):
            raise ValueError(f"{name}: embed_dim {embed_dim} must be a multiple of 2 * num_heads, {2 * num_heads}")
        if value_dim % num_heads:
            raise ValueError(f"{name}: value_dim {value_dim} must be a multiple of num_heads {num_heads}")
        _checks.one_of(name, "gate_fn", gate_fn, tuple(GATES))
        eps = _checks.real(name, "eps", eps)
        if eps < 0:
            raise ValueError(f"{name}: eps must be at least 0, got {eps}")
        check_form(name, method, chunk_size)
        self.embed_dim, self.value_dim, self.num_heads = embed_dim, value_dim, num_heads
        self.key_dim, self.head_dim = embed_dim // num_heads, value_dim // num_heads
        self.gate_fn, self.method, self.chunk_size, self.backend = gate_fn, method, chunk_size, backend
        like = {"device": device, "dtype": dtype, "bias": False}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **like)
        self.k_proj = nn.Linear(embed_dim, embed_dim, **like)
        self.v_proj = nn.Linear(embed_dim, value_dim, **like)
        self.g_proj = nn.Linear(embed_dim, value_dim, **like)
        self.out_proj = nn.Linear(value_dim, embed_dim, **like)
        self.group_norm = nn.RMSNorm(self.head_dim, eps, elementwise_affine=False)
        self._register_decay(learnable_decay, dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        self._reset_decay()

    def _schedule(self, dtype, device):
        return retnet_log_decay(self.num_heads, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        state: RetentionState | None = None,
        *,
        return_state: bool = False,
        inplace: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RetentionState]:
        name = "MultiScaleRetention"
        check_tokens(name, x, self.embed_dim, self.q_proj)
        if cu_seqlens is not None:
            for argument, given in (("state", state is not None), ("return_state", return_state)):
                if given:
                    raise ValueError(f"{name}: {argument} must be left out where cu_seqlens is given")
        memory, position = (None, 0) if state is None else self._checked(state, x)
        heads = self.num_heads, -1
        query, key, value = (
            proj(x).unflatten(-1, heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_xpos(query, offset=position), rotate_xpos(key, offset=position)
        if memory is not None and x.shape[1] == 1:
            output, memory = retention_step(
                *(query, key, value, self.log_decay, memory),
                inplace=inplace,
                backend=self.backend,
            )
            output = output * self._row_sums(position + 1).rsqrt().to(output.dtype)[:, None, None]
        else:
            output, memory = self._scan(query, key, value, memory, position, return_state, cu_seqlens)
        output = self.group_norm(output.transpose(1, 2)).flatten(2)
        output = self.out_proj(GATES[self.gate_fn](self.g_proj(x)) * output)
        return (output, RetentionState(memory, position + x.shape[1])) if return_state else output

    def _scan(self, query, key, value, memory, position: int, return_state: bool, cu_seqlens):
        if memory is not None:  # the operator carries the sum of the row before behind the state
            before = self._row_sums(position).to(memory.dtype)[:, None, None]
            memory = torch.cat((memory, before.expand(*memory.shape[:2], 1, memory.shape[3])), 2)
        results = retention(
            *(query, key, value, self.log_decay),
            normalize="retnet",
            initial_state=memory,
            return_state=return_state,
            method=self.method,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return (results[0], results[1][:, :, :-1].contiguous()) if return_state else (results, None)

    def _row_sums(self, tokens: int) -> Tensor:
        """1 + gamma + ... + gamma^(tokens - 1), (H,), float64."""
        log_decay = self.log_decay.double().clamp(max=-torch.finfo(torch.float64).tiny)  # gamma = 1 too
        return torch.expm1(tokens * log_decay) / torch.expm1(log_decay)

    def _checked(self, state, x: Tensor) -> tuple[Tensor, int]:
        if not isinstance(state, tuple) or len(state) != 2 or not isinstance(state[0], Tensor):
            raise TypeError(
                f"MultiScaleRetention: state must be (memory, position) of an earlier call, got {type(state).__name__}"
            )
        memory, position = state
        _checks.integer("MultiScaleRetention", "state position", position, 0)
        wanted = (x.shape[0], self.num_heads, self.key_dim, self.head_dim)
        if tuple(memory.shape) != wanted:
            raise ValueError(f"MultiScaleRetention: state memory must have shape {wanted}, got {tuple(memory.shape)}")
        return memory, position

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, gate_fn={self.gate_fn!r}, learnable_decay={self.learnable_decay}, "
            f"method={self.method!r}"
        )


class VisionRetention(Decaying):
    """Retention of a ViR block: what takes the place of attention in a vision transformer.

        y = proj(LayerNorm(R)),   R_i = sum_{j <= i} gamma_h^(i - j) s (q_i . k_j) v_j,   q, k, v = qkv(x)

    Tokens are in raster order and a class token comes last, since a token sees those before it. A larger image may come
    in pieces: a call returns its state with ``return_state`` and the next one takes it.

    Args:
        dim: channels of the input and output.
        num_heads: H.
        qkv_bias: whether ``qkv`` has a bias.
        norm: whether there is the LayerNorm, ``norm``, over all channels.
        eps: of the norm.
        proj_drop: probability of zeroing an element of the output.
        learnable_decay: gamma_h = exp(-exp(log_rate_h)), where the parameter ``log_rate`` starts at the published decays
            and state dicts without it leave it. Default: they are fixed, 1 - 2 ** (-5 - h), and not in the state dict.
        method, chunk_size: form of the computation, as :func:`effattn.retention`.
        backend: passed to the operators.
        device, dtype: of the parameters.

    Shape:
        (B, N, dim), or (B, h, w, dim) without class token -> the same; with ``return_state`` also the state,
        (B, H, D, D).

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.retention`.

    Source:
        ViR, arXiv 2310.19731. There is no official code; names and initialisation (truncated normal with deviation 0.02,
        biases 0) are those of timm's attention, whose state dict loads where ``norm`` is False.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.VisionRetention(64, num_heads=2)
        >>> attention(torch.randn(3, 14 * 14 + 1, 64)).shape
        torch.Size([3, 197, 64])
        >>> sorted(attention.state_dict())
        ['norm.bias', 'norm.weight', 'proj.bias', 'proj.weight', 'qkv.bias', 'qkv.weight']
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        norm: bool = True,
        eps: float = 1e-6,
        proj_drop: float = 0.0,
        learnable_decay: bool = False,
        method: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "VisionRetention"
        _checks.module_options(name, device, dtype, qkv_bias=qkv_bias, norm=norm, learnable_decay=learnable_decay)
        _checks.integer(name, "dim", dim, 1)
        _checks.integer(name, "num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"{name}: dim {dim} must be a multiple of num_heads {num_heads}")
        eps = _checks.real(name, "eps", eps)
        proj_drop = _checks.probability(name, "proj_drop", proj_drop)
        check_form(name, method, chunk_size)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.method, self.chunk_size, self.backend = method, chunk_size, backend
        like = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, qkv_bias, **like)
        self.norm = nn.LayerNorm(dim, eps, **like) if norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, **like)
        self.proj_drop = nn.Dropout(proj_drop)
        self._register_decay(learnable_decay, dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()
        self._reset_decay()

    def _schedule(self, dtype, device):
        return retnet_log_decay(self.num_heads, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tokens("VisionRetention", x, self.dim, self.qkv, (3, 4))
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        heads = 3, self.num_heads, self.head_dim
        query, key, value = self.qkv(tokens).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        if state is not None:
            check_state("VisionRetention", "state", state, query, value, len(query), (self.head_dim,))
        results = retention(
            *(query, key, value, self.log_decay),
            initial_state=state,
            return_state=return_state,
            method=self.method,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        output, state = results if return_state else (results, None)
        output = self.proj_drop(self.proj(self.norm(output.transpose(1, 2).flatten(2)))).reshape(x.shape)
        return (output, state) if return_state else output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, learnable_decay={self.learnable_decay}, method={self.method!r}"


def check_form(name: str, method: str, chunk_size) -> None:
    _checks.one_of(name, "method", method, METHODS)
    if chunk_size is not None:
        _checks.integer(name, "chunk_size", chunk_size, 1)
        if method not in ("auto", "chunkwise"):
            raise ValueError(f"{name}: chunk_size must be None with method={method!r}, got {chunk_size}")


def check_tokens(name: str, x: Tensor, channels: int, layer: nn.Module, dims: tuple[int, ...] = (3,)) -> None:
    _checks.layer_input(name, "x", x, layer)
    if x.dim() not in dims or x.shape[-1] != channels:
        shapes = {3: f"(batch, tokens, {channels})", 4: f"(batch, h, w, {channels})"}
        allowed = " or ".join(shapes[dim] for dim in dims)
        raise ValueError(f"{name}: x must have shape {allowed}, got {tuple(x.shape)}")
