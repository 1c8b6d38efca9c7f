"""Backward kernels of window attention. The formulas and what each kernel owns are in cross_shaped_window.py."""

from collections import namedtuple

import triton
import triton.language as tl

from .cross_shaped_window_tiles import (
    bias_centre,
    bias_code,
    bias_columns,
    bias_entries,
    bias_sides,
    convolve,
    head_at,
    load_rows,
    locate,
    neighbour_rows,
    own_term,
    shared_term,
    store_rows,
    tap_row,
    token_at,
    weigh,
)
from .tiles import _row_statistics, _weights, matmul, narrow

WindowStrides = namedtuple("WindowStrides", "query key value grad_output grad_query grad_key grad_value")
LepeStrides = namedtuple("LepeStrides", "output value grad_output")
COUNTS = ["batch", "num_heads", "share"]


@triton.jit(do_not_specialize=COUNTS)
def window_gradient(
    query,
    key,
    value,
    grad_output,
    lepe_weight,
    grad_query,
    grad_key,
    grad_value,
    strides,
    geometry,
    batch,
    num_heads,
    share,
    scale_log2,
    gradient_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Windows of one tile without bias and masks: dQ, dK and dV from q, k, v and dO alone."""
    h, _block, chunk, height, width, rows, columns = locate(tl.program_id(0), batch, num_heads, share, geometry, BLOCK)
    slot = tl.arange(0, BLOCK)
    exists = slot < height * width
    ly = slot // width
    lx = slot % width
    for member in range(chunk * share, tl.minimum(chunk * share + share, batch * rows * columns)):
        b = (member // (rows * columns)).to(tl.int64)
        corner_y = member // columns % rows * height
        corner_x = member % columns * width
        token, inside, _region = token_at(corner_y + ly, corner_x + lx, height, width, geometry)
        valid = exists & inside
        q_head = head_at(query, strides.query, b, h, UNIT)
        k_head = head_at(key, strides.key, b, h, UNIT)
        v_head = head_at(value, strides.value, b, h, UNIT)
        do_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
        q = load_rows(q_head, strides.query, token, valid, HEAD_DIM, BLOCK_D, UNIT)
        k = load_rows(k_head, strides.key, token, valid, HEAD_DIM, BLOCK_D, UNIT)
        v = load_rows(v_head, strides.value, token, valid, HEAD_DIM, BLOCK_D, UNIT)
        do = load_rows(do_head, strides.grad_output, token, valid, HEAD_DIM, BLOCK_D, UNIT)
        logits = matmul(q, tl.trans(k), None, PRECISION) * scale_log2
        logits = tl.where(exists[None, :], logits, float("-inf"))
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        dv = matmul(tl.trans(narrow(p, q.dtype)), do, None, PRECISION)
        if lepe_weight is not None:
            dv = convolve(
                *(dv, lepe_weight, h, do_head, strides.grad_output, ly, lx, corner_y, corner_x, height, width),
                *(geometry, -1, HEAD_DIM, BLOCK_D, UNIT),
            )
        dv_head = head_at(grad_value, strides.grad_value, b, h, UNIT)
        store_rows(dv_head, strides.grad_value, dv, token, valid, HEAD_DIM, BLOCK_D, UNIT)
        dp = matmul(do, tl.trans(v), None, PRECISION)
        ds = narrow(p * (dp - tl.sum(p * dp, 1)[:, None]), q.dtype)
        dq = matmul(ds, k, None, PRECISION) * gradient_scale
        dq_head = head_at(grad_query, strides.grad_query, b, h, UNIT)
        store_rows(dq_head, strides.grad_query, dq, token, valid, HEAD_DIM, BLOCK_D, UNIT)
        dk = matmul(tl.trans(ds), q, None, PRECISION) * gradient_scale
        dk_head = head_at(grad_key, strides.grad_key, b, h, UNIT)
        store_rows(dk_head, strides.grad_key, dk, token, valid, HEAD_DIM, BLOCK_D, UNIT)


@triton.jit(do_not_specialize=COUNTS)
def window_key_value_gradient(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    bias,
    lepe_weight,
    grad_key,
    grad_value,
    strides,
    geometry,
    batch,
    num_heads,
    share,
    scale_log2,
    gradient_scale,
    SHIFTED: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, block, member, height, width, rows, columns = locate(
        tl.program_id(0), batch, num_heads, share, geometry, BLOCK_N
    )
    b = (member // (rows * columns)).to(tl.int64)
    row = member // columns % rows
    column = member % columns
    count = height * width
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ly = j // width
    lx = j % width
    token, inside, j_region = token_at(row * height + ly, column * width + lx, height, width, geometry)
    j_valid = inside & (j < count)
    k = load_rows(head_at(key, strides.key, b, h, UNIT), strides.key, token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
    v = load_rows(head_at(value, strides.value, b, h, UNIT), strides.value, token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q_head = head_at(query, strides.query, b, h, UNIT)
    do_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
    statistics = (b * num_heads + h) * geometry.grid_h * geometry.grid_w
    table_columns = bias_columns(width, geometry)
    centre = bias_centre(bias, h, height, width, geometry)
    # The windows that reach these keys: `near` windows away, as far as the overlap goes.
    reach_h = tl.cdiv(geometry.overlap_h, height)
    reach_w = tl.cdiv(geometry.overlap_w, width)
    top = block * BLOCK_N // width
    bottom = tl.minimum(block * BLOCK_N + BLOCK_N, count) - 1
    bottom = bottom // width
    first_row = tl.maximum((top - geometry.overlap_h + reach_h * height) // height - reach_h + row, 0)
    last_row = tl.minimum((bottom + geometry.overlap_h) // height + row, rows - 1)
    first_column = tl.maximum(column - reach_w, 0)
    last_column = tl.minimum(column + reach_w, columns - 1)
    blocks = tl.cdiv(count, BLOCK_M)
    across = last_column - first_column + 1
    for step in range(0, (last_row - first_row + 1) * across * blocks):
        near_row = first_row + step // blocks // across
        near_column = first_column + step // blocks % across
        i = step % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        i_ly = i // width
        i_lx = i % width
        i_token, i_inside, i_region = token_at(
            near_row * height + i_ly, near_column * width + i_lx, height, width, geometry
        )
        i_valid = i_inside & (i < count)
        i_code = bias_code(i_ly, i_lx, i < count, table_columns, geometry)
        ky = ly + (row - near_row) * height + geometry.overlap_h
        kx = lx + (column - near_column) * width + geometry.overlap_w
        reached = (ky >= 0) & (ky < height + 2 * geometry.overlap_h) & (kx >= 0)
        reached = reached & (kx < width + 2 * geometry.overlap_w) & (j < count)
        j_code = bias_code(ky, kx, reached, table_columns, geometry)
        entries = bias_entries(centre, i_code[None, :], j_code[:, None], geometry, WEIGHS)
        term = shared_term(entries, reached[:, None], WEIGHS)
        term = own_term(term, i_region[None, :], j_region[:, None], inside[:, None], SHIFTED, MASKED)
        lse, lse_rest, deltas = _row_statistics(logsumexp + statistics, delta + statistics, i_token, i_valid, k.dtype)
        q = load_rows(q_head, strides.query, i_token, i_valid, HEAD_DIM, BLOCK_D, UNIT)
        logits = matmul(k, tl.trans(q), None, PRECISION) * scale_log2 + term
        p = _weights(logits, lse[None, :], lse_rest[None, :], k.dtype)
        do = load_rows(do_head, strides.grad_output, i_token, i_valid, HEAD_DIM, BLOCK_D, UNIT)
        dv = matmul(narrow(weigh(p, entries, WEIGHS), q.dtype), do, dv, PRECISION)
        dp = weigh(matmul(v, tl.trans(do), None, PRECISION), entries, WEIGHS)
        ds = p * (dp - deltas[None, :])
        dk = matmul(narrow(ds, q.dtype), q, dk, PRECISION)
    if lepe_weight is not None:
        dv = convolve(
            *(dv, lepe_weight, h, do_head, strides.grad_output, ly, lx, row * height, column * width, height, width),
            *(geometry, -1, HEAD_DIM, BLOCK_D, UNIT),
        )
    dk_head = head_at(grad_key, strides.grad_key, b, h, UNIT)
    dv_head = head_at(grad_value, strides.grad_value, b, h, UNIT)
    store_rows(dk_head, strides.grad_key, dk * gradient_scale, token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
    store_rows(dv_head, strides.grad_value, dv, token, j_valid, HEAD_DIM, BLOCK_D, UNIT)


@triton.jit(do_not_specialize=COUNTS)
def window_query_gradient(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    bias,
    grad_query,
    strides,
    geometry,
    batch,
    num_heads,
    share,
    scale_log2,
    gradient_scale,
    SHIFTED: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, block, member, height, width, rows, columns = locate(
        tl.program_id(0), batch, num_heads, share, geometry, BLOCK_M
    )
    b = (member // (rows * columns)).to(tl.int64)
    corner_y = member // columns % rows * height
    corner_x = member % columns * width
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    ly = i // width
    lx = i % width
    token, inside, i_region = token_at(corner_y + ly, corner_x + lx, height, width, geometry)
    i_valid = inside & (i < height * width)
    table_columns = bias_columns(width, geometry)
    i_code = bias_code(ly, lx, i < height * width, table_columns, geometry)
    statistics = (b * num_heads + h) * geometry.grid_h * geometry.grid_w
    lse, lse_rest, deltas = _row_statistics(
        logsumexp + statistics, delta + statistics, token, i_valid, query.dtype.element_ty
    )
    q = load_rows(head_at(query, strides.query, b, h, UNIT), strides.query, token, i_valid, HEAD_DIM, BLOCK_D, UNIT)
    do_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
    do = load_rows(do_head, strides.grad_output, token, i_valid, HEAD_DIM, BLOCK_D, UNIT)
    k_head = head_at(key, strides.key, b, h, UNIT)
    v_head = head_at(value, strides.value, b, h, UNIT)
    centre = bias_centre(bias, h, height, width, geometry)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    key_width = width + 2 * geometry.overlap_w
    keys = (height + 2 * geometry.overlap_h) * key_width
    for start in range(0, keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        ky = j // key_width
        kx = j % key_width
        j_token, j_inside, j_region = token_at(
            corner_y + ky - geometry.overlap_h, corner_x + kx - geometry.overlap_w, height, width, geometry
        )
        j_valid = j_inside & (j < keys)
        j_code = bias_code(ky, kx, j < keys, table_columns, geometry)
        entries = bias_entries(centre, i_code[:, None], j_code[None, :], geometry, WEIGHS)
        term = shared_term(entries, (j < keys)[None, :], WEIGHS)
        term = own_term(term, i_region[:, None], j_region[None, :], j_inside[None, :], SHIFTED, MASKED)
        k = load_rows(k_head, strides.key, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
        v = load_rows(v_head, strides.value, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
        logits = matmul(q, tl.trans(k), None, PRECISION) * scale_log2 + term
        p = _weights(logits, lse[:, None], lse_rest[:, None], q.dtype)
        dp = weigh(matmul(do, tl.trans(v), None, PRECISION), entries, WEIGHS)
        dq = matmul(narrow(p * (dp - deltas[:, None]), k.dtype), k, dq, PRECISION)
    dq_head = head_at(grad_query, strides.grad_query, b, h, UNIT)
    store_rows(dq_head, strides.grad_query, dq * gradient_scale, token, i_valid, HEAD_DIM, BLOCK_D, UNIT)


@triton.jit(do_not_specialize=[*COUNTS, "first_slot", "slots", "first_head", "heads", "splits"])
def window_bias_gradient(
    query,
    key,
    value,
    grad_output,
    logsumexp,
    delta,
    bias,
    partial,
    stride,
    strides,
    geometry,
    batch,
    num_heads,
    share,
    first_slot,
    slots,
    first_head,
    heads,
    splits,
    scale_log2,
    SHIFTED: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a tile of the windows of one head, dZ summed over one split of them; where the bias weighs, P * dO V^T.

    Queries first_slot .. first_slot + slots - 1 only. partial (splits, heads, slots, stride): the keys of a row, filled up to
    a multiple of 16 for wide stores.
    """
    height = geometry.window_h
    width = geometry.window_w
    rows = tl.cdiv(geometry.grid_h, height)
    columns = tl.cdiv(geometry.grid_w, width)
    key_width = width + 2 * geometry.overlap_w
    keys = (height + 2 * geometry.overlap_h) * key_width
    blocks = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(slots, BLOCK_M) * blocks
    program = tl.program_id(0)
    part = (program // tiles).to(tl.int64)  # split * heads + head
    h = first_head + part % heads
    place = program % tiles // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i = first_slot + place
    j = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    ly = i // width
    lx = i % width
    ky = j // key_width
    kx = j % key_width
    table_columns = bias_columns(width, geometry)
    i_code = bias_code(ly, lx, place < slots, table_columns, geometry)
    j_code = bias_code(ky, kx, j < keys, table_columns, geometry)
    centre = bias_centre(bias, h, height, width, geometry)
    entries = bias_entries(centre, i_code[:, None], j_code[None, :], geometry, WEIGHS)
    shared = shared_term(entries, (j < keys)[None, :], WEIGHS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = (part // heads).to(tl.int32) * share
    for member in range(begin, tl.minimum(begin + share, batch * rows * columns)):
        b = (member // (rows * columns)).to(tl.int64)
        corner_y = member // columns % rows * height
        corner_x = member % columns * width
        i_token, i_inside, i_region = token_at(corner_y + ly, corner_x + lx, height, width, geometry)
        j_token, j_inside, j_region = token_at(
            corner_y + ky - geometry.overlap_h, corner_x + kx - geometry.overlap_w, height, width, geometry
        )
        i_valid = i_inside & (place < slots)
        j_valid = j_inside & (j < keys)
        statistics = (b * num_heads + h) * geometry.grid_h * geometry.grid_w
        q = load_rows(
            head_at(query, strides.query, b, h, UNIT), strides.query, i_token, i_valid, HEAD_DIM, BLOCK_D, UNIT
        )
        k = load_rows(head_at(key, strides.key, b, h, UNIT), strides.key, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT)
        lse, lse_rest, deltas = _row_statistics(logsumexp + statistics, delta + statistics, i_token, i_valid, q.dtype)
        term = own_term(shared, i_region[:, None], j_region[None, :], j_inside[None, :], SHIFTED, MASKED)
        logits = matmul(q, tl.trans(k), None, PRECISION) * scale_log2 + term
        p = _weights(logits, lse[:, None], lse_rest[:, None], q.dtype)
        do_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
        do = load_rows(do_head, strides.grad_output, i_token, i_valid, HEAD_DIM, BLOCK_D, UNIT)
        v = load_rows(
            head_at(value, strides.value, b, h, UNIT), strides.value, j_token, j_valid, HEAD_DIM, BLOCK_D, UNIT
        )
        dp = matmul(do, tl.trans(v), None, PRECISION)
        if WEIGHS:  # dW = P * dO V^T: delta is not subtracted
            total += p * dp
        else:
            total += p * (dp - deltas[:, None])
    pointers = partial + (part * slots + place)[:, None] * stride + j[None, :]
    tl.store(pointers, total, mask=(place < slots)[:, None] & (j < stride)[None, :])


@triton.jit(do_not_specialize=["splits", "band_begin", "band", "first_head", "heads"])
def reduce_bias(
    partial,
    stride,
    grad_bias,
    geometry,
    splits,
    band_begin,
    band,
    first_head,
    heads,
    BLOCK_X: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program: LANES entries of a row of a head's table, summed in order over splits and the pairs at that difference.

    partial holds `band` rows of queries from band_begin; every band but the first adds to what is there.
    """
    height, width = bias_sides(geometry.window_h, geometry.window_w, geometry)
    key_height = height + 2 * geometry.overlap_h
    key_width = width + 2 * geometry.overlap_w
    rows = height + key_height - 1
    columns = width + key_width - 1
    blocks = tl.cdiv(columns, LANES)
    program = tl.program_id(0)
    entry = program % blocks * LANES + tl.arange(0, LANES)
    row = program // blocks % rows
    head = (program // blocks // rows).to(tl.int64)
    dy = row - (height - 1)  # key row minus query row
    first = tl.maximum(-dy, band_begin)
    last = tl.maximum(tl.minimum(band_begin + band, key_height - dy), first)
    steps = tl.cdiv(width, BLOCK_X)
    total = tl.zeros((BLOCK_X, LANES), tl.float32)
    for step in range(0, splits * (last - first) * steps):
        x = step % steps * BLOCK_X + tl.arange(0, BLOCK_X)
        y = first + step // steps % (last - first)
        split = step // steps // (last - first)
        key_x = x[:, None] + entry[None, :] - (width - 1)
        query_row = ((split * heads + head) * band + (y - band_begin)) * width
        pointers = partial + (query_row + x)[:, None] * stride + ((y + dy) * key_width + key_x)
        if geometry.prefix is not None:
            pointers += geometry.prefix.tokens
        total += tl.load(pointers, mask=(x < width)[:, None] & (key_x >= 0) & (key_x < key_width), other=0.0)
    destination = grad_bias + ((first_head + head) * rows + row) * columns + entry
    result = tl.sum(total, 0)
    if band_begin > 0:
        result += tl.load(destination, mask=entry < columns, other=0.0)
    tl.store(destination, result, mask=entry < columns)


@triton.jit(do_not_specialize=[*COUNTS, "chunks"])
def lepe_gradient(
    output,
    value,
    grad_output,
    lepe_weight,
    lepe_bias,
    delta,
    partial_weight,
    partial_bias,
    strides,
    geometry,
    batch,
    num_heads,
    share,
    chunks,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: a chunk of `share` blocks of tokens of a head. delta = dO . (O - LePE), and the sums over the chunk.

    partial_weight (chunks, H, 9, D), partial_bias (chunks, H, D); delta may be None.
    """
    h = (tl.program_id(0) % num_heads).to(tl.int64)
    chunk = (tl.program_id(0) // num_heads).to(tl.int64)
    second = h >= num_heads // 2
    height = tl.where(second, geometry.second_h, geometry.window_h)
    width = tl.where(second, geometry.second_w, geometry.window_w)
    padded_h = tl.cdiv(geometry.grid_h, height) * height
    padded_w = tl.cdiv(geometry.grid_w, width) * width
    num_tokens = geometry.grid_h * geometry.grid_w
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    empty = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    totals = (empty, empty, empty, empty, empty, empty, empty, empty, empty)
    bias_total = empty
    begin = chunk.to(tl.int32) * share
    for member in range(begin, tl.minimum(begin + share, batch * blocks)):
        b = (member // blocks).to(tl.int64)
        i = member % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        i_valid = i < num_tokens
        y = i // geometry.grid_w + (padded_h - geometry.grid_h) // 2 - geometry.shift_h
        x = i % geometry.grid_w + (padded_w - geometry.grid_w) // 2 - geometry.shift_w
        y = tl.where(y < 0, y + padded_h, y)
        x = tl.where(x < 0, x + padded_w, x)
        ly = y % height
        lx = x % width
        v_head = head_at(value, strides.value, b, h, UNIT)
        do_head = head_at(grad_output, strides.grad_output, b, h, UNIT)
        do = load_rows(do_head, strides.grad_output, i, i_valid, HEAD_DIM, BLOCK_D, UNIT).to(tl.float32)
        bias_total += do
        convolved = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if delta is not None and lepe_bias is not None:
            convolved += tl.load(lepe_bias + h * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)[None, :]
        sums = ()
        for tap in tl.static_range(9):
            near = neighbour_rows(
                *(
                    v_head,
                    strides.value,
                    ly,
                    lx,
                    y - ly,
                    x - lx,
                    tap,
                    height,
                    width,
                    geometry,
                    1,
                    HEAD_DIM,
                    BLOCK_D,
                    UNIT,
                )
            )
            sums = sums + (totals[tap] + near * do,)
            if delta is not None:
                convolved += near * tap_row(lepe_weight, h, tap, HEAD_DIM, BLOCK_D)[None, :]
        totals = sums
        if delta is not None:
            o_head = head_at(output, strides.output, b, h, UNIT)
            o = load_rows(o_head, strides.output, i, i_valid, HEAD_DIM, BLOCK_D, UNIT).to(tl.float32)
            row = delta + (b * num_heads + h) * num_tokens
            tl.store(row + i, tl.sum(do * (o - convolved), 1), mask=i_valid)
    part = (chunk * num_heads + h) * HEAD_DIM + dims
    for tap in tl.static_range(9):
        destination = partial_weight + (chunk * num_heads + h) * 9 * HEAD_DIM + tap * HEAD_DIM + dims
        tl.store(destination, tl.sum(totals[tap], 0), mask=dims < HEAD_DIM)
    if partial_bias is not None:
        tl.store(partial_bias + part, tl.sum(bias_total, 0), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["count", "size"])
def sum_partials(partial, destination, count, size, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """destination[e] = sum over c of partial[c, e]: every BLOCK-th c in order, then those sums."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros((BLOCK, LANES), tl.float32)
    for start in range(0, count, BLOCK):
        c = start + tl.arange(0, BLOCK)
        pointers = partial + c.to(tl.int64)[:, None] * size + lane[None, :]
        total += tl.load(pointers, mask=(c < count)[:, None] & (lane < size)[None, :], other=0.0)
    tl.store(destination + lane, tl.sum(total, 0), mask=lane < size)
