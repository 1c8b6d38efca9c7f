"""Manhattan attention of RMT: projections around the operator, on the whole token grid."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks
from ..ops import manhattan_attention, rmt_log_decay, rotate_xpos
from ..ops.manhattan import DECAY
from .retention import Decaying, check_tokens


class _Depthwise(nn.Module):
    """Local context enhancement, under its published name."""

    def __init__(self, channels: int, like: dict):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, **like)


class ManhattanAttention(Decaying):
    """Attention of an RMT block: projections around :func:`effattn.manhattan_attention`.

        y = out_proj(A V + LCE(V)),   A = softmax(s rotate_xpos(Q) rotate_xpos(K)^T + log_decay D)

    with D the Manhattan distance of two tokens, or decomposed into rows and columns. Rotation is by the index of the token
    in the flattened grid. LCE is the depthwise 5 x 5 convolution ``lepe.conv``.

    ``attention.load_state_dict(published.state_dict())`` takes the state dict of RMT's ``VisionRetentionAll`` and, with
    ``decomposed``, of ``VisionRetentionChunk``. Of a whole model the buffers ``Relpos.angle`` and ``Relpos.decay`` are
    left, which follow from the arguments here. In a published block it takes the place of ``retention``: the rest of that
    call is accepted and not used.

    Args:
        embed_dim: channels of the input and output.
        num_heads: H.
        decomposed: attend along rows and then along columns (published stages 1 to 3).
        decay: "logits", as in the official code, or "weights", as in the paper.
        initial, heads_range: gamma_h = 1 - 2 ** (-initial - heads_range * h / H); as published 2 and 4, 5 or 6.
        learnable_decay: gamma_h = exp(-exp(log_rate_h)), where the parameter ``log_rate`` starts at these decays and
            state dicts without it leave it. Default: they are fixed and not in the state dict.
        backend: passed to the operator.
        device, dtype: of the parameters.

    Shape:
        (B, h, w, embed_dim) -> the same.

    Raises:
        TypeError, ValueError: for an argument out of its range; in the call, as :func:`effattn.manhattan_attention`.

    Source:
        RMT, arXiv 2309.11523, section 3; ``VisionRetentionAll``, ``VisionRetentionChunk`` and ``RetNetRelPos2d`` of
        ``RMT.py``. Initialisation as published: Xavier normal, gain 2 ** -2.5, of ``out_proj`` 1 and its bias 0.

    Example:
        >>> import torch, effattn
        >>> attention = effattn.nn.ManhattanAttention(64, num_heads=4, decomposed=True)
        >>> attention(torch.randn(2, 7, 5, 64)).shape
        torch.Size([2, 7, 5, 64])
        >>> attention.log_decay.exp()
        tensor([0.7500, 0.8750, 0.9375, 0.9688])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        decomposed: bool = False,
        decay: str = "logits",
        initial: float = 2.0,
        heads_range: float = 4.0,
        learnable_decay: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        name = "ManhattanAttention"
        _checks.module_options(name, device, dtype, decomposed=decomposed, learnable_decay=learnable_decay)
        _checks.integer(name, "embed_dim", embed_dim, 1)
        _checks.integer(name, "num_heads", num_heads, 1)
        if embed_dim % (2 * num_heads):
            raise ValueError(f"{name}: embed_dim {embed_dim} must be a multiple of 2 * num_heads, {2 * num_heads}")
        _checks.one_of(name, "decay", decay, DECAY)
        initial, heads_range = _checks.real(name, "initial", initial), _checks.real(name, "heads_range", heads_range)
        for argument, given in (("initial", initial), ("heads_range", heads_range)):
            if given < 0:
                raise ValueError(f"{name}: {argument} must be at least 0, got {given}")
        self.embed_dim, self.num_heads, self.key_dim = embed_dim, num_heads, embed_dim // num_heads
        self.decomposed, self.decay, self.backend = decomposed, decay, backend
        self.initial, self.heads_range = initial, heads_range
        like = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **like)
        self.k_proj = nn.Linear(embed_dim, embed_dim, **like)
        self.v_proj = nn.Linear(embed_dim, embed_dim, **like)
        self.lepe = _Depthwise(embed_dim, like)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **like)
        self._register_decay(learnable_decay, dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            linear.reset_parameters()  # of the biases, as torch does
            nn.init.xavier_normal_(linear.weight, gain=2**-2.5)
        nn.init.xavier_normal_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        self.lepe.conv.reset_parameters()
        self._reset_decay()

    def _schedule(self, dtype, device):
        return rmt_log_decay(self.num_heads, self.initial, self.heads_range, dtype=dtype, device=device)

    def forward(self, x: Tensor, rel_pos=None, chunkwise_recurrent=None, incremental_state=None) -> Tensor:
        check_tokens("ManhattanAttention", x, self.embed_dim, self.q_proj, (4,))
        tokens, heads = x.flatten(1, 2), (self.num_heads, self.key_dim)
        query, key, value = (
            proj(tokens).unflatten(-1, heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = manhattan_attention(
            *(rotate_xpos(query), rotate_xpos(key), value, self.log_decay, (x.shape[1], x.shape[2])),
            decomposed=self.decomposed,
            decay=self.decay,
            lce_weight=self.lepe.conv.weight,
            lce_bias=self.lepe.conv.bias,
            backend=self.backend,
        )
        return self.out_proj(output.transpose(1, 2).flatten(2)).reshape(x.shape)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, decomposed={self.decomposed}, decay={self.decay!r}, "
            f"initial={self.initial}, heads_range={self.heads_range}, learnable_decay={self.learnable_decay}"
        )
