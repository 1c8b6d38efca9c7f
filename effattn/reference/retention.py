"""Retention and Manhattan attention in plain PyTorch: the specification (RetNet, 2307.08621; ViR; RMT, 2309.11523).

gamma      = exp(log_decay), one per head; G_ij = gamma^(i - j) for j <= i, else 0;  is_causal=False: gamma^|i - j|
parallel     O = (s Q K^T * G) V + s gamma^(i + 1) q_i S_0,    S_N = gamma^N S_0 + sum_j gamma^(N - 1 - j) k_j^T v_j
chunkwise    the parallel form on one chunk after the other, each taking up the state that the last one left
recurrent    chunks of one token:  S_n = gamma S_{n-1} + k_n^T v_n,   o_n = s q_n S_n
normalize="retnet"   row i is divided by sqrt(z_i), z_i = sum_j G_ij; z is carried behind the state, z_n = gamma z_{n-1} + 1

Manhattan    D_ij = |y_i - y_j| + |x_i - x_j|, 0 where i or j is a prefix token
    logits     O = softmax(s Q K^T + log_decay D) V
    weights    O = (softmax(s Q K^T) * gamma^D) V
    decomposed the same along x inside every row of the grid, then along y inside every column of that result
    LCE        + depthwise convolution of V over the grid
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """gamma^n, (H, *exponents.shape); gamma^0 = 1 also where log_decay is -inf."""
    return torch.exp(decay_logits(log_decay, exponents))


def decay_logits(log_decay: Tensor, distances: Tensor) -> Tensor:
    """log_decay n, (H, *distances.shape); 0 at n = 0 also where log_decay is -inf."""
    product = log_decay.view(len(log_decay), *(1,) * distances.dim()) * distances
    return torch.where(distances == 0, 0.0, product)


def row_sums(log_decay: Tensor, length: int, is_causal: bool = True, before: Tensor | float = 0.0) -> Tensor:
    """z_i, (H, N): what row i of G adds up to; ``before``, (..., H): z of the token before the first."""
    steps = torch.arange(length + 1, device=log_decay.device)
    power = powers(log_decay, steps)
    sums = power[:, :-1].cumsum(-1)
    if not is_causal:
        return sums + sums.flip(-1) - 1
    return sums + power[:, 1:] * (before if isinstance(before, float) else before[..., None])


def retention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    is_causal: bool = True,
    scale: float | None = None,
    normalize: str = "none",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
):
    """The parallel form, or the chunkwise one with ``chunk_size`` (1: recurrent)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"is_causal": is_causal, "scale": scale, "normalize": normalize, "chunk_size": chunk_size}
    if cu_seqlens is None:
        output, state = _one_sequence(query, key, value, log_decay, initial_state, **options)
        return (output, state) if return_state else output
    bounds = cu_seqlens.tolist()
    results = []
    for index, end in enumerate(bounds[1:]):
        own = (t[:, :, bounds[index] : end] for t in (query, key, value))
        state = None if initial_state is None else initial_state[index : index + 1]
        results.append(_one_sequence(*own, log_decay, state, **options))
    if not results:  # of no sequence and so of no token: an empty batch
        results = [_one_sequence(query[:0], key[:0], value[:0], log_decay, None, **options)]
        results[0] = (query.new_zeros(value.shape), results[0][1])
    output, state = torch.cat([output for output, _ in results], 2), torch.cat([state for _, state in results])
    return (output, state) if return_state else output


def _one_sequence(query, key, value, log_decay, state, *, is_causal, scale, normalize, chunk_size):
    exact = torch.promote_types(query.dtype, torch.float32)
    log_decay = log_decay.to(torch.promote_types(log_decay.dtype, query.dtype))
    length = query.shape[2]
    rows = (query.shape[0], query.shape[1])
    if state is None:
        extra = normalize == "retnet"
        state = query.new_zeros((*rows, key.shape[3] + extra, value.shape[3]), dtype=exact)
    factor, sums = None, None
    if normalize == "retnet":
        state, before = state[:, :, :-1], state[:, :, -1, 0]
        sums = row_sums(log_decay, length, is_causal, before.to(log_decay.dtype) if is_causal else 0.0)
        factor = sums.rsqrt()
        sums = torch.cat((before[..., None].to(sums.dtype), sums.expand(*rows, length)), -1)[..., -1]
    outputs = []
    for begin in (0,) if chunk_size is None else range(0, max(length, 1), chunk_size):
        chunk = slice(begin, None if chunk_size is None else begin + chunk_size)
        output, state = _one_chunk(
            *(t[:, :, chunk] for t in (query, key, value)),
            *(log_decay, state, None if factor is None else factor[..., chunk], is_causal, scale),
        )
        outputs.append(output)
    if sums is not None:
        state = torch.cat((state, sums[..., None, None].to(state.dtype).expand(*rows, 1, value.shape[3])), 2)
    return torch.cat(outputs, 2), state


def _one_chunk(query, key, value, log_decay, state, factor, is_causal, scale):
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    weights = powers(log_decay, distance.abs())
    carry = powers(log_decay, position + 1)
    if is_causal:
        weights = weights.where(distance >= 0, 0.0)
    if factor is not None:
        weights, carry = weights * factor[..., None], carry * factor
    scores = scale * query @ key.mT * weights.to(query.dtype)
    output = scores @ value
    if is_causal:
        entering = scale * query.to(state.dtype) * carry[..., None].to(state.dtype)
        output = output + (entering @ state).to(output.dtype)
    left = powers(log_decay, query.shape[2] - 1 - position)[..., None].to(state.dtype)
    whole = powers(log_decay, torch.tensor(query.shape[2], device=query.device))[:, None, None].to(state.dtype)
    return output, whole * state + (left * key.to(state.dtype)).mT @ value.to(state.dtype)


def retention_step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    normalize = "retnet" if state.shape[2] == key.shape[3] + 1 else "none"
    return retention(
        *(query, key, value, log_decay),
        scale=scale,
        normalize=normalize,
        initial_state=state,
        return_state=True,
        chunk_size=1,
    )


def rotate_xpos(x: Tensor, offset: int = 0, base: float = 10000.0) -> Tensor:
    """(x_2m, x_2m+1) turned by the angle (offset + n) base^(-m / (D / 2 - 1)) at token n."""
    exact = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = (t.to(exact) for t in xpos_rotation(x.shape[-2], x.shape[-1], offset, base, x.device))
    even, odd = x[..., 0::2].to(exact), x[..., 1::2].to(exact)
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2).to(x.dtype)


def xpos_rotation(length: int, head_dim: int, offset: int, base: float, device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, float64, (N, D / 2)."""
    rate = torch.linspace(0, 1, head_dim // 2, dtype=torch.float64, device=device) * -math.log(base)
    angle = torch.arange(offset, offset + length, dtype=torch.float64, device=device)[:, None] * rate.exp()
    return angle.cos(), angle.sin()


# ---- Manhattan attention ----


def manhattan_distance(grid: tuple[int, int], num_prefix_tokens: int = 0, device=None) -> Tensor:
    """D, (N, N)."""
    height, width = grid
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
    return F.pad(distance, (num_prefix_tokens, 0, num_prefix_tokens, 0))


def manhattan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    grid: tuple[int, int],
    decomposed: bool = False,
    decay: str = "logits",
    num_prefix_tokens: int = 0,
    lce_weight: Tensor | None = None,
    lce_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    log_decay = log_decay.to(torch.promote_types(log_decay.dtype, torch.promote_types(query.dtype, torch.float32)))

    def attend(query, key, value, distance):
        """Over the last two dimensions; heads are dimension 1."""
        logits = scale * query @ key.mT
        heads = (len(log_decay), *(1,) * (query.dim() - 4), *distance.shape)
        if decay == "logits":
            logits = logits + decay_logits(log_decay, distance).view(heads).to(logits.dtype)
        weights = F.dropout(logits.softmax(-1), dropout_p)
        if decay == "weights":
            weights = weights * powers(log_decay, distance).view(heads).to(weights.dtype)
        return weights @ value

    if not decomposed:
        output = attend(query, key, value, manhattan_distance(grid, num_prefix_tokens, query.device))
    else:
        rows = [t.unflatten(2, grid) for t in (query, key, value)]
        along_x = attend(*rows, _line_distance(grid[1], query.device))
        columns = [t.transpose(2, 3) for t in (*rows[:2], along_x)]
        output = attend(*columns, _line_distance(grid[0], query.device)).transpose(2, 3).flatten(2, 3)
    if lce_weight is None:
        return output
    return output + local_enhancement(value, grid, num_prefix_tokens, lce_weight, lce_bias)


def _line_distance(length: int, device) -> Tensor:
    position = torch.arange(length, device=device)
    return (position[:, None] - position).abs()


def local_enhancement(
    value: Tensor, grid: tuple[int, int], num_prefix_tokens: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """LCE: depthwise convolution of V over the grid, zero padded; 0 at prefix tokens. Channel h D + d is value[h, d]."""
    batch, heads, _, head_dim = value.shape
    weight = weight.to(value.dtype)
    bias = None if bias is None else bias.to(value.dtype)
    on_grid = value[:, :, num_prefix_tokens:]
    if not on_grid.numel():  # which a convolution refuses; the parameters keep their gradients of zeros
        return 0 * (value + weight.sum() + (0 if bias is None else bias.sum()))
    images = on_grid.mT.reshape(batch, heads * head_dim, *grid)
    out = F.conv2d(images, weight, bias, padding=weight.shape[2] // 2, groups=heads * head_dim)
    return F.pad(out.view(batch, heads, head_dim, -1).mT, (0, 0, num_prefix_tokens, 0))
