"""The formulas of the math pages in NumPy float64, one loop over batch and head each: what the reference is tested against."""

from __future__ import annotations

import itertools

import numpy as np


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Rows of nothing but -inf give zeros."""
    highest = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def mixture_mask(alpha, sigma, grid, num_prefix_tokens=0, eps=1e-5) -> np.ndarray:
    """M_h(i, j) = sum_k alpha[k,h] exp(-r2(i, j) / (2 (sigma[k,h]^2 + eps))), 1 where i or j is a prefix token."""
    gaussians, heads = alpha.shape
    height, width = grid
    tokens = num_prefix_tokens + height * width
    mask = np.ones((heads, tokens, tokens))
    for i in range(height * width):
        for j in range(height * width):
            squared_distance = (i // width - j // width) ** 2 + (i % width - j % width) ** 2
            for head in range(heads):
                mask[head, num_prefix_tokens + i, num_prefix_tokens + j] = sum(
                    alpha[k, head] * np.exp(-squared_distance / (2 * (sigma[k, head] ** 2 + eps)))
                    for k in range(gaussians)
                )
    return mask


def masked_product_attention(query, key, value, weight, scale=None) -> np.ndarray:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = np.zeros_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            factor = weight if weight.ndim == 2 else weight[h]
            output[b, h] = _softmax(scale * (query[b, h] @ key[b, h].T) * factor) @ value[b, h]
    return output


def gaussian_mixture_attention(
    query, key, value, alpha, sigma, grid, num_prefix_tokens=0, eps=1e-5, scale=None
) -> np.ndarray:
    mask = mixture_mask(alpha, sigma, grid, num_prefix_tokens, eps)
    return masked_product_attention(query, key, value, mask, scale)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False
) -> np.ndarray:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    added = np.zeros((length, keys))
    if is_causal:
        added = np.where(np.arange(keys) <= np.arange(length)[:, None], 0.0, -np.inf)
    elif attn_mask is not None:
        added = np.where(attn_mask, 0.0, -np.inf) if attn_mask.dtype == bool else attn_mask
    added = np.broadcast_to(added, (batch, heads, length, keys))
    group = heads // key.shape[1]
    output = np.zeros((batch, heads, length, head_dim))
    for b in range(batch):
        for h in range(heads):
            logits = scale * (query[b, h] @ key[b, h // group].T) + added[b, h]
            output[b, h] = _softmax(logits) @ value[b, h // group]
    return output


def _bits(x: np.ndarray, binarize: str) -> np.ndarray:
    """b(x^) of a (B, H, N, D) array, x^ = x / |x|."""
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    if binarize == "sign":
        return np.where(unit > 0, 1.0, -1.0)
    if binarize == "mean_threshold":
        return (unit > unit.mean()).astype(x.dtype) if x.size else unit
    positive = (unit > 0).astype(x.dtype)
    if binarize == "published":
        return positive * np.abs(unit).mean() if x.size else unit
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            positive[b, h] *= np.abs(unit[b, h]).mean() if unit[b, h].size else 0.0
    return positive


def shift_add_attention(query, key, value, binarize, residual_weight=None) -> np.ndarray:
    query, key = _bits(query, binarize), _bits(key, binarize)
    batch, heads, tokens, _ = value.shape
    output = np.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            v = value[b, h]
            for n in range(tokens):
                u = 0.5 * v[n] + (query[b, h, n] @ key[b, h].T) @ v / np.pi  # quadratic order, on purpose
                length = np.sqrt((u * u).sum())
                output[b, h, n] = u / length if length > 0 else 0.0
                taps = 0 if residual_weight is None else residual_weight.shape[2]
                for t in range(taps):
                    if 0 <= n + t - taps // 2 < tokens:
                        output[b, h, n] += residual_weight[h, 0, t, 0] * v[n + t - taps // 2]
    return output


def window_attention(
    query,
    key,
    value,
    grid,
    window,
    shift=(0, 0),
    overlap=(0, 0),
    bias_table=None,
    bias_index="swin",
    lepe_weight=None,
    lepe_bias=None,
    padding="error",
    scale=None,
) -> np.ndarray:
    """Token by token: where it lies after padding and roll, whom it meets there, and its nine neighbours."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    enlarged = [w + 2 * o for w, o in zip(window, overlap)]
    padded = [-(-g // w) * w if w else 0 for g, w in zip(grid, window)]
    before = [(p - g) // 2 for p, g in zip(padded, grid)]

    def token_at(rolled) -> int | None:
        """The token at a rolled position, None where there is only padding."""
        if any(not 0 <= r < p for r, p in zip(rolled, padded)):
            return None
        at = [(r + s) % p - t for r, s, p, t in zip(rolled, shift, padded, before)]
        return at[0] * grid[1] + at[1] if all(0 <= a < g for a, g in zip(at, grid)) else None

    def region(rolled) -> list[int]:
        return [int(r >= p - w) + int(r >= p - s) if s else 0 for r, p, w, s in zip(rolled, padded, window, shift)]

    def table_row(q, k) -> int:
        if bias_index == "swin":
            dy, dx = (a - (b - o) + w + o - 1 for a, b, w, o in zip(q, k, window, overlap))
        else:
            dy, dx = (b - a + w - e + 1 for a, b, w, e in zip(q, k, window, enlarged))
        return (dy * (window[1] + enlarged[1] - 1) + dx) % len(bias_table)

    output = np.zeros_like(query)
    batches, heads, _, head_dim = query.shape
    for token in range(grid[0] * grid[1]):
        rolled = [(c + t - s) % p for c, t, s, p in zip(divmod(token, grid[1]), before, shift, padded)]
        corner = [r // w * w for r, w in zip(rolled, window)]
        place = [r - c for r, c in zip(rolled, corner)]
        for b, h in np.ndindex(batches, heads):
            logits, values = [], []
            for ky, kx in np.ndindex(*enlarged):
                where = (corner[0] + ky - overlap[0], corner[1] + kx - overlap[1])
                other = token_at(where)
                if other is None and padding == "mask":
                    continue
                logit = 0.0 if other is None else scale * query[b, h, token] @ key[b, h, other]
                if bias_table is not None:
                    logit += bias_table[table_row(place, (ky, kx)), h]
                if region(where) != region(rolled):
                    logit -= 100.0
                logits.append(logit)
                values.append(np.zeros(head_dim) if other is None else value[b, h, other])
            output[b, h, token] = _softmax(np.array(logits)) @ np.array(values)
            if lepe_weight is None:
                continue
            channels = slice(h * head_dim, (h + 1) * head_dim) if len(lepe_weight) == heads * head_dim else slice(None)
            for ty, tx in np.ndindex(3, 3):
                near = (place[0] + ty - 1, place[1] + tx - 1)
                other = token_at((corner[0] + near[0], corner[1] + near[1]))
                if other is not None and all(0 <= n < w for n, w in zip(near, window)):
                    output[b, h, token] += lepe_weight[channels, 0, ty, tx] * value[b, h, other]
            if lepe_bias is not None:
                output[b, h, token] += lepe_bias[channels]
    return output


def stripe_attention(query, key, value, grid, stripe_width, orientation, **options) -> np.ndarray:
    window = (grid[0], stripe_width) if orientation == "vertical" else (stripe_width, grid[1])
    return window_attention(query, key, value, grid, grid if stripe_width >= max(grid) else window, **options)


def cross_shaped_window_attention(
    query, key, value, grid, stripe_width, lepe_weight=None, lepe_bias=None, **options
) -> np.ndarray:
    heads, head_dim = query.shape[1], query.shape[3]
    parts = []
    for half, orientation in ((0, "vertical"), (1, "horizontal")):
        own = slice(half * heads // 2, (half + 1) * heads // 2)
        lepe = {"lepe_weight": lepe_weight, "lepe_bias": lepe_bias}
        if lepe_weight is not None and len(lepe_weight) == heads * head_dim:
            channels = slice(own.start * head_dim, own.stop * head_dim)
            lepe = {name: None if t is None else t[channels] for name, t in lepe.items()}
        inputs = (query[:, own], key[:, own], value[:, own])
        parts.append(stripe_attention(*inputs, grid, stripe_width, orientation, **lepe, **options))
    return np.concatenate(parts, 1)


def retention(
    query,
    key,
    value,
    log_decay,
    is_causal=True,
    scale=None,
    normalize="none",
    initial_state=None,
    method="auto",
    chunk_size=None,
    cu_seqlens=None,
) -> np.ndarray:
    """Pair by pair, whatever the method: o_i = sum_j s q_i . k_j gamma^|i - j| v_j, and what a state adds."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, tokens, key_dim = query.shape
    bounds = [0, tokens] if cu_seqlens is None else list(cu_seqlens)
    output = np.zeros((batch, heads, tokens, value.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        gamma = np.exp(log_decay[h])
        for sequence, (begin, end) in enumerate(itertools.pairwise(bounds)):
            state = None if initial_state is None else initial_state[b if cu_seqlens is None else sequence, h]
            for i in range(begin, end):
                row_sum = 0.0
                for j in range(begin, i + 1 if is_causal else end):
                    weight = gamma ** abs(i - j)
                    row_sum += weight
                    output[b, h, i] += scale * (query[b, h, i] @ key[b, h, j]) * weight * value[b, h, j]
                if state is not None:
                    output[b, h, i] += scale * gamma ** (i - begin + 1) * (query[b, h, i] @ state[:key_dim])
                    if normalize == "retnet":
                        row_sum += gamma ** (i - begin + 1) * state[key_dim, 0]
                if normalize == "retnet":
                    output[b, h, i] /= np.sqrt(row_sum)
    return output


def manhattan_attention(
    query,
    key,
    value,
    log_decay,
    grid,
    decomposed=False,
    decay="logits",
    num_prefix_tokens=0,
    lce_weight=None,
    lce_bias=None,
    scale=None,
) -> np.ndarray:
    """Token by token; decomposed: along x with V, then along y with what that gave."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, tokens, head_dim = query.shape
    height, width = grid

    def place(token):
        return None if token < num_prefix_tokens else divmod(token - num_prefix_tokens, width)

    def attend(values, meets):
        output = np.zeros_like(query)
        for b, h in np.ndindex(batch, heads):
            for i in range(tokens):
                keys = [j for j in range(tokens) if meets(place(i), place(j))]
                pairs = [(place(i), place(j)) for j in keys]
                distance = np.array([abs(p[0] - q[0]) + abs(p[1] - q[1]) if p and q else 0 for p, q in pairs])
                logits = scale * key[b, h, keys] @ query[b, h, i]
                if decay == "logits":
                    weights = _softmax(logits + log_decay[h] * distance)
                else:
                    weights = _softmax(logits) * np.exp(log_decay[h] * distance)
                output[b, h, i] = weights @ values[b, h, keys]
        return output

    if decomposed:
        along_x = attend(value, lambda p, q: p[0] == q[0])
        output = attend(along_x, lambda p, q: p[1] == q[1])
    else:
        output = attend(value, lambda p, q: True)
    if lce_weight is None:
        return output
    reach = lce_weight.shape[2] // 2
    for h in range(heads):
        channels = slice(h * head_dim, (h + 1) * head_dim)
        for token in range(num_prefix_tokens, tokens):
            y, x = place(token)
            if lce_bias is not None:
                output[:, h, token] += lce_bias[channels]
            for dy, dx in np.ndindex(2 * reach + 1, 2 * reach + 1):
                near = (y + dy - reach, x + dx - reach)
                if 0 <= near[0] < height and 0 <= near[1] < width:
                    other = num_prefix_tokens + near[0] * width + near[1]
                    output[:, h, token] += lce_weight[channels, 0, dy, dx] * value[:, h, other]
    return output


def _token_places(tokens, grid):
    """Row and column of every token; a sequence is one row."""
    width = tokens if grid is None else grid[1]
    return [divmod(token, width) if width else (0, token) for token in range(tokens)]


def _entry(entries, head, query_place, key_place) -> float:
    """t[j - i + N - 1], or t[dy + h - 1, dx + w - 1], of one pair; entries of one head serve all."""
    own = entries[head if len(entries) > 1 else 0]
    dy, dx = (k - q for q, k in zip(query_place, key_place))
    if own.ndim == 1:
        return own[dx + (len(own) - 1) // 2]
    return own[dy + (own.shape[0] - 1) // 2, dx + (own.shape[1] - 1) // 2]


def features(x, projection, feature_map, normalize_qk) -> np.ndarray:
    """phi of one (N, D) array by (M, D) directions."""
    if feature_map == "identity":
        return x
    if normalize_qk:
        length = np.sqrt((x * x).sum(-1, keepdims=True))
        x = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    square = (x * x).sum(-1, keepdims=True)
    product = x @ projection.T
    if feature_map == "positive":
        return np.exp(product - square / 2) / np.sqrt(len(projection))
    return np.exp(square / 2) * np.concatenate((np.sin(product), np.cos(product)), -1) / np.sqrt(len(projection))


def kernelized_rpe_attention(
    query,
    key,
    value,
    rpe_bias,
    projection=None,
    feature_map="positive",
    normalize_qk=True,
    grid=None,
    is_causal=False,
    key_padding_mask=None,
    method="auto",
    eps=0.0,
) -> np.ndarray:
    """Pair by pair, whatever the method."""
    batch, heads, tokens, _ = query.shape
    places = _token_places(tokens, grid)
    output = np.zeros_like(value)
    for b, h in np.ndindex(batch, heads):
        own = projection if projection is None or projection.ndim == 2 else projection[h]
        phi_q, phi_k = (features(x[b, h], own, feature_map, normalize_qk) for x in (query, key))
        highest = rpe_bias[h if len(rpe_bias) > 1 else 0].max(initial=-np.inf)
        for i in range(tokens):
            total, denominator = np.zeros(value.shape[-1]), eps
            for j in range(i + 1 if is_causal else tokens):
                if key_padding_mask is not None and key_padding_mask[b, j]:
                    continue
                weight = phi_q[i] @ phi_k[j] * np.exp(_entry(rpe_bias, h, places[i], places[j]) - highest)
                total += weight * value[b, h, j]
                denominator += weight
            output[b, h, i] = total / denominator if denominator else 0.0
    return output


def toeplitz_linear_attention(query, key, value, rpe_bias, **options) -> np.ndarray:
    return kernelized_rpe_attention(query, key, value, rpe_bias, feature_map="identity", **options)


def urpe_attention(query, key, value, coefficient, rpe_bias=None, grid=None, is_causal=False, scale=None) -> np.ndarray:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, tokens, _ = query.shape
    places = _token_places(tokens, grid)
    output = np.zeros_like(value)
    for b, h in np.ndindex(batch, heads):
        for i in range(tokens):
            keys = range(i + 1 if is_causal else tokens)
            bias = [0.0 if rpe_bias is None else _entry(rpe_bias, h, places[i], places[j]) for j in keys]
            factor = [1.0 if coefficient is None else _entry(coefficient, h, places[i], places[j]) for j in keys]
            weights = _softmax(scale * key[b, h, : len(keys)] @ query[b, h, i] + np.array(bias)) * np.array(factor)
            output[b, h, i] = weights @ value[b, h, : len(keys)]
    return output


def size_weighted_attention(query, key, value, sizes, scale=None) -> np.ndarray:
    """O_i = sum_j s_j exp(scale q_i . k_j) v_j over the same sum without v_j; 0 where no key has a size."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = np.zeros_like(query)
    for b, h, i in np.ndindex(query.shape[:3]):
        scores = scale * key[b, h] @ query[b, h, i]
        weights = sizes[b].reshape(-1) * np.exp(scores - scores.max(initial=-np.inf))
        if weights.sum() > 0:
            output[b, h, i] = weights @ value[b, h] / weights.sum()
    return output
