"""Bipartite soft matching: which token of b each token of a proposes to merge into, and the plan of the best proposals.

    a_i = x_{2i}    b_j = x_{2j+1}    s_ij = a_i . b_j / (|a_i| |b_j|)    level_ij = s_ij 2^40, rounded half to even
    key_i = max_j level_ij 2^20 + (2^20 - 1 - j): the largest level, and the first j where it stands
    rank_i = how many a have a larger level, or the same and a smaller index    merged_i = rank_i < r and level_i >= limit

The level has to be that of exact arithmetic, yet float64 is slow on many chips. So scores are float32, and float64 is asked only
of the columns that may be the largest: with eps(d) a bound of the error of a score, those of scores >= best - 2 eps. A row
mostly has one such column. If it has more, its program goes through the scores again, and takes the candidates of all its rows
in turn, lowest index first, one of each row at a time.

    u = x / |x| rounded to float32: error 2^-24 |u|. A float32 sum of d products, in any order, with or without fma:
    (d + 2) 2^-24 / (1 - (d + 2) 2^-24) by Cauchy-Schwarz.  eps(d) puts d + 8, which covers 2^-40 and what float64 rounds.

A token that takes no part has a level below every similarity: -2 not a number, -3 absent (size not above 0), -4 protected. A
pair has the lower of its tokens'. These are scores like others, and exact.

Kernel            one program owns                  in registers                       streamed                       FLOPs per image
token_scales      BLOCK_M tokens                    |x|^2 in float64                   BLOCK_K elements of x, twice   3 N d (float64)
best_partners     BLOCK_M rows of a                 their two best scores, where       BLOCK_N x BLOCK_K of units     N N d / 2, float64 N d
rank_proposals    BLOCK_M rows of a                 their ranks                        keys of LANES rows             N N / 4 comparisons
write_plan        BLOCK_M rows of a and of b        their places                       the r merged pairs             N r comparisons

Shared memory holds best_partners' operands only. Bytes per image at e per element: x is read twice (2 N d e), its units, float32,
rows padded with zeros to a multiple of BLOCK_K, written once and read once per BLOCK_M rows (mostly from L2): 4 N d and
4 (N / 2)^2 d / BLOCK_M; 8 N of scales, 8 N of keys and ranks, 12 N of plan. An image whose tokens are all alike costs N N d / 2
FLOPs of float64 more. Every place in a plan is a count of integers, so nothing is atomic and no order matters.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table

STEPS = tl.constexpr(float(2**40))
SHIFT = tl.constexpr(20)
LAST = tl.constexpr(2**20 - 1)
HALF_EVEN = tl.constexpr(1.5 * 2**52)  # added and subtracted: rounds to an integer
NOT_A_NUMBER, ABSENT, PROTECTED, NOTHING = (tl.constexpr(level) for level in (-2.0, -3.0, -4.0, -5.0))
NEVER = tl.constexpr(2**41 - 1)  # the code of a row that is not merged: above every other, and so are its lower 20 bits
EXACT_K = tl.constexpr(16)  # float64 products of a row at a time; with more, registers leave room for one program only
LOWEST = tl.constexpr(-(2**63))


class Configuration(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


C = Configuration
SCALES = C(16, 0, 64, 4, 1)
COUNTS = C(32, 64, 0, 4, 1)
_PARTNERS = {family: C(64, 64, 16, 8, 2) for family in table.FAMILIES}
_PARTNERS["sm_100"] = C(64, 64, 8, 8, 3)  # spills at 16
_INTERPRETED = {"token_scales": C(64, 0, 32, 4, 1), "best_partners": C(32, 32, 32, 4, 1), "counts": C(32, 32, 0, 4, 1)}


# ---- similarities ----


@triton.jit(do_not_specialize=["num_tokens", "dims", "protected_rows", "protected_columns"])
def token_scales(
    metric,
    sizes,
    scales,
    units,
    strides,
    num_tokens,
    dims,
    width,
    protected_rows,
    protected_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scales (B, N) float64: 1 / |x|, 0 of zeros, or the level of a token that takes no part; units (B, N, width)."""
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = n < num_tokens
    rows = metric + b * strides[0] + n.to(tl.int64)[:, None] * strides[1]
    squared = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(0, dims, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (d < dims)[None, :]
        x = tl.load(rows + d.to(tl.int64)[None, :] * strides[2], mask=inside, other=0.0).to(tl.float64)
        squared += tl.sum(x * x, 1)
    positive = squared > 0.0
    scale = tl.where(positive, 1.0 / tl.sqrt(tl.where(positive, squared, 1.0)), 0.0)
    scale = tl.where(squared < float("inf"), scale, NOT_A_NUMBER)
    if sizes is not None:
        scale = tl.where(tl.load(sizes + b * num_tokens + n, mask=valid, other=0.0) > 0.0, scale, ABSENT)
    scale = tl.where(n // 2 < tl.where(n % 2 == 0, protected_rows, protected_columns), PROTECTED, scale)
    tl.store(scales + b * num_tokens + n, scale, mask=valid)
    unit_rows = units + (b * num_tokens + n)[:, None] * width
    for start in range(0, width, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (d < dims)[None, :]
        x = tl.load(rows + d.to(tl.int64)[None, :] * strides[2], mask=inside, other=0.0).to(tl.float64)
        unit = tl.where((scale > 0.0)[:, None], x * scale[:, None], 0.0)
        tl.store(unit_rows + d[None, :], unit.to(tl.float32), mask=valid[:, None] & (d < width)[None, :])


@triton.jit
def scores(units, scales, row_scale, i, j, firsts, seconds, width, BLOCK_M, BLOCK_N, BLOCK_K: tl.constexpr):
    """float32 similarities of rows i of a and j of b, the level of pairs that have none, NOTHING past the columns."""
    k = tl.arange(0, BLOCK_K)
    row_pointers = units + (2 * i).to(tl.int64)[:, None] * width + k[None, :]
    column_pointers = units + (2 * j + 1).to(tl.int64)[None, :] * width + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = tl.load(row_pointers + start, mask=(i < firsts)[:, None], other=0.0)
        right = tl.load(column_pointers + start, mask=(j < seconds)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    column_scale = tl.load(scales + 2 * j + 1, mask=j < seconds, other=NOTHING)
    level = tl.minimum(row_scale.to(tl.float32)[:, None], column_scale.to(tl.float32)[None, :])
    return tl.where(level < 0.0, level, tl.maximum(total, -1.0))


@triton.jit
def exact_keys(metric, scales, strides, row_scale, i, j, valid, dims, BLOCK_M: tl.constexpr):
    """Keys of the pairs (i, j) of tokens that have a similarity."""
    rows = metric + (2 * i).to(tl.int64)[:, None] * strides[1]
    columns = metric + (2 * j + 1).to(tl.int64)[:, None] * strides[1]
    total = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(0, dims, EXACT_K):
        d = start + tl.arange(0, EXACT_K)
        inside = valid[:, None] & (d < dims)[None, :]
        left = tl.load(rows + d.to(tl.int64)[None, :] * strides[2], mask=inside, other=0.0).to(tl.float64)
        right = tl.load(columns + d.to(tl.int64)[None, :] * strides[2], mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(left * right, 1)
    column_scale = tl.load(scales + 2 * j + 1, mask=valid, other=0.0)
    steps = total * row_scale * column_scale * STEPS
    return key_of(tl.where(valid, steps, 0.0), j)


@triton.jit
def key_of(steps, j):
    level = (steps + HALF_EVEN) - HALF_EVEN
    return (level.to(tl.int64) << SHIFT) + (LAST - j)


@triton.jit(do_not_specialize=["num_tokens", "dims"])
def best_partners(
    metric,
    units,
    scales,
    keys,
    strides,
    num_tokens,
    dims,
    width,
    tolerance,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """keys (B, |a|) int64; tolerance: 2 eps(d)"""
    firsts = (num_tokens + 1) // 2
    seconds = num_tokens // 2
    blocks = tl.cdiv(firsts, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    metric += b * strides[0]
    units += b * num_tokens * width
    scales += b * num_tokens
    row_scale = tl.load(scales + 2 * i, mask=i < firsts, other=PROTECTED)
    best = tl.full((BLOCK_M,), NOTHING, tl.float32)
    second = best
    partner = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, seconds, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        score = scores(units, scales, row_scale, i, j, firsts, seconds, width, BLOCK_M, BLOCK_N, BLOCK_K)
        highest = tl.max(score, 1)
        place = tl.min(tl.where(score == highest[:, None], j[None, :], LAST), 1)
        others = tl.max(tl.where(j[None, :] == place[:, None], NOTHING, score), 1)
        second = tl.maximum(tl.maximum(second, others), tl.minimum(best, highest))
        partner = tl.where(highest > best, place, partner)
        best = tl.maximum(best, highest)
    similar = best >= -1.0
    key = exact_keys(metric, scales, strides, row_scale, i, partner, similar, dims, BLOCK_M)
    key = tl.where(similar, key, key_of(best.to(tl.float64) * STEPS, partner))
    # A row of zeros is similar to nothing, exactly.
    doubtful = similar & (row_scale > 0.0) & (second >= tl.maximum(best - tolerance, -1.0))
    if tl.max(doubtful.to(tl.int32), 0) > 0:
        lowest = tl.where(doubtful, tl.maximum(best - tolerance, -1.0), float("inf"))
        for start in range(0, seconds, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            score = scores(units, scales, row_scale, i, j, firsts, seconds, width, BLOCK_M, BLOCK_N, BLOCK_K)
            candidate = tl.where(score >= lowest[:, None], j[None, :], LAST + 1)
            place = tl.min(candidate, 1)
            while tl.min(place, 0) <= LAST:
                found = place <= LAST
                other = exact_keys(metric, scales, strides, row_scale, i, place, found, dims, BLOCK_M)
                key = tl.where(found, tl.maximum(key, other), key)
                candidate = tl.where(candidate == place[:, None], LAST + 1, candidate)
                place = tl.min(candidate, 1)
    tl.store(keys + b * firsts + i, key, mask=i < firsts)


# ---- the plan ----


@triton.jit
def by_index(key, i):
    """The order of proposals: by level, then by the index of a."""
    return (key >> SHIFT << SHIFT) + (LAST - i)


@triton.jit(do_not_specialize=["num_tokens", "num_merged", "limit"])
def rank_proposals(keys, ranks, codes, num_tokens, num_merged, limit, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """ranks (B, |a|), codes (B, r) by rank: partner 2^20 + i of a merged row, or NEVER. limit: the lowest key to merge."""
    firsts = (num_tokens + 1) // 2
    blocks = tl.cdiv(firsts, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    keys += b * firsts
    key = tl.load(keys + i, mask=i < firsts, other=LOWEST)
    own = by_index(key, i)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, firsts, LANES):
        other = start + tl.arange(0, LANES)
        order = by_index(tl.load(keys + other, mask=other < firsts, other=LOWEST), other)
        rank += tl.sum(((order[None, :] > own[:, None]) & (other < firsts)[None, :]).to(tl.int32), 1)
    partner = LAST - (key & LAST)
    code = tl.where(key >= limit, (partner << SHIFT) + i, NEVER)
    tl.store(ranks + b * firsts + i, rank, mask=i < firsts)
    tl.store(codes + b * num_merged + rank, code, mask=(i < firsts) & (rank < num_merged))


@triton.jit
def count_below(codes, bound):
    return tl.sum((codes[None, :] < bound[:, None]).to(tl.int32), 1)


@triton.jit(do_not_specialize=["num_tokens", "num_merged", "num_outputs"])
def write_plan(
    ranks,
    codes,
    source,
    members,
    offsets,
    num_tokens,
    num_merged,
    num_outputs,
    IN_ORDER: tl.constexpr,
    DISTILL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
):
    """The program of k = 0..|a| writes for tokens 2k and 2k + 1, and what follows the last output."""
    firsts = (num_tokens + 1) // 2
    seconds = num_tokens // 2
    blocks = tl.cdiv(firsts + 1, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_first = k < firsts
    is_second = k < seconds
    codes += b * num_merged
    source += b * num_tokens
    members += b * num_tokens
    offsets += b * (num_outputs + 1)
    rank = tl.load(ranks + b * firsts + k, mask=is_first, other=0)
    code = tl.load(codes + rank, mask=is_first & (rank < num_merged), other=NEVER)
    begin = k.to(tl.int64) << SHIFT
    pairs_before = tl.zeros((BLOCK_M,), tl.int32)  # merged pairs of an earlier output, or of the same and an earlier a
    merged_before = pairs_before
    to_earlier = pairs_before
    to_earlier_or_before = pairs_before
    merged = tl.zeros((LANES,), tl.int32)
    for start in range(0, num_merged, LANES):
        lane = start + tl.arange(0, LANES)
        other = tl.load(codes + lane, mask=lane < num_merged, other=NEVER)
        pairs_before += count_below(other, code)
        to_earlier += count_below(other, begin)
        to_earlier_or_before += count_below(other, begin + k + 1)
        merged += (other < NEVER).to(tl.int32)
        if IN_ORDER:
            merged_before += count_below(other & LAST, k)
    num_merges = tl.sum(merged, 0)
    kept = firsts - num_merges
    is_merged = is_first & (code < NEVER)
    partner = (code >> SHIFT).to(tl.int32)
    if IN_ORDER:  # noqa: SIM108 - decided when it is compiled
        position = k - merged_before
    else:
        position = rank - num_merges
    own = kept + k
    first_member = own + to_earlier
    own_member = own + to_earlier_or_before
    if DISTILL:  # the first of b stands right behind the first of a
        position += (position > 0).to(tl.int32)
        own = tl.where(k == 0, 1, own)
        first_member = tl.where(k == 0, 1, first_member)
        own_member = tl.where(k == 0, 1 + to_earlier_or_before, own_member)
    member = tl.where(is_merged, kept + partner + pairs_before + (partner < k).to(tl.int32), position)
    tl.store(source + 2 * k, tl.where(is_merged, kept + partner, position), mask=is_first)
    tl.store(source + 2 * k + 1, own, mask=is_second)
    tl.store(members + member, 2 * k, mask=is_first)
    tl.store(members + own_member, 2 * k + 1, mask=is_second)
    tl.store(offsets + position, position, mask=is_first & (code == NEVER))
    tl.store(offsets + own, first_member, mask=is_second)
    everything = tl.zeros((BLOCK_M,), tl.int32) + num_tokens
    for after in tl.static_range(0, 2):
        output = 2 * k + after
        tl.store(offsets + output, everything, mask=(output >= kept + seconds) & (output <= num_outputs))


# ---- launcher ----


def _configuration(kernel, device):
    """Chosen by ahead-of-time compiles, as in configurations.py."""
    family = table.architecture(device)
    if family == "interpreted":
        return _INTERPRETED[kernel]
    return {"token_scales": SCALES, "best_partners": _PARTNERS[family], "counts": COUNTS}[kernel]


def tolerance(dims):
    """2 eps(d): how far below the best score the largest similarity may score."""
    roundings = (dims + 8) * 2.0**-24
    return 2 * roundings / (1 - roundings) if roundings < 0.5 else 4.0


def bipartite_match(metric, sizes, num_merged, num_protected, distill_token, threshold, padded):
    """(source, members, offsets)"""
    batch, tokens, dims = metric.shape
    device = metric.device
    outputs = tokens if padded else tokens - num_merged
    source, members = (torch.empty((batch, tokens), dtype=torch.int32, device=device) for _ in range(2))
    offsets = torch.empty((batch, outputs + 1), dtype=torch.int32, device=device)
    firsts = (tokens + 1) // 2
    config = _configuration("best_partners", device)
    width = triton.cdiv(dims, config.block_k) * config.block_k
    units = torch.empty((batch, tokens, width), dtype=torch.float32, device=device)
    scales = torch.empty((batch, tokens), dtype=torch.float64, device=device)
    rows = _configuration("token_scales", device)
    table.launch(
        token_scales,
        batch * triton.cdiv(tokens, rows.block_m),
        device,
        rows,
        *(metric, sizes, scales, units, metric.stride(), tokens, dims, width),
        *((num_protected + 1) // 2, max(num_protected // 2, int(distill_token))),
        BLOCK_M=rows.block_m,
        BLOCK_K=rows.block_k,
    )
    keys = torch.empty((batch, firsts), dtype=torch.int64, device=device)
    table.launch(
        best_partners,
        batch * triton.cdiv(firsts, config.block_m),
        device,
        config,
        *(metric, units, scales, keys, metric.stride(), tokens, dims, width, tolerance(dims)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    ranks = torch.empty((batch, firsts), dtype=torch.int32, device=device)
    codes = torch.empty((batch, num_merged), dtype=torch.int64, device=device)
    counts = _configuration("counts", device)
    limit = -(2**63) if threshold < -1 else round(threshold * STEPS.value) << SHIFT.value
    options = {"BLOCK_M": counts.block_m, "LANES": counts.block_n}
    table.launch(
        rank_proposals,
        batch * triton.cdiv(firsts, counts.block_m),
        device,
        counts,
        *(keys, ranks, codes, tokens, num_merged, limit),
        **options,
    )
    table.launch(
        write_plan,
        batch * triton.cdiv(firsts + 1, counts.block_m),
        device,
        counts,
        *(ranks, codes, source, members, offsets, tokens, num_merged, outputs),
        IN_ORDER=num_protected > 0,
        DISTILL=distill_token,
        **options,
    )
    return source, members, offsets
