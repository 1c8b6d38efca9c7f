"""Congruent tiles of a token grid, for parameters that depend on the difference of two tokens.

The grid is split into patches of tile_h x tile_w tokens, at most BLOCK. Pairs of patches with the same offset (cy, cx), query
patch minus key patch, meet the same differences: they are one class of the engine's parameter gradient. `extents` begin with
grid_h, grid_w, num_prefix, tile_h, tile_w.
"""

import triton
import triton.language as tl


@triton.jit
def offset_of(owner, num_heads, extents):
    """Owner -> (head, cy, cx, patches_y, patches_x). Offsets near zero, which have the most pairs, come first."""
    patches_y = tl.cdiv(extents[0], extents[3])
    patches_x = tl.cdiv(extents[1], extents[4])
    offset = owner // num_heads
    rank = offset // (2 * patches_x - 1)
    cy = tl.where(rank % 2 == 0, -(rank // 2), (rank + 1) // 2)
    return owner % num_heads, cy, offset % (2 * patches_x - 1) - (patches_x - 1), patches_y, patches_x


@triton.jit
def members(owner, batch, num_heads, extents):
    _, cy, cx, patches_y, patches_x = offset_of(owner, num_heads, extents)
    return batch * (patches_y - tl.abs(cy)) * (patches_x - tl.abs(cx))


@triton.jit
def place(owner, member, batch, num_heads, num_tokens, extents, BLOCK: tl.constexpr):
    h, cy, cx, _, patches_x = offset_of(owner, num_heads, extents)
    pair = member // batch
    pairs_x = patches_x - tl.abs(cx)
    patch_y = pair // pairs_x + tl.maximum(cy, 0)
    patch_x = pair % pairs_x + tl.maximum(cx, 0)
    local = tl.arange(0, BLOCK)
    local_y = local // extents[4]
    local_x = local % extents[4]
    inside = local_y < extents[3]
    query_y = patch_y * extents[3] + local_y
    query_x = patch_x * extents[4] + local_x
    key_y = query_y - cy * extents[3]
    key_x = query_x - cx * extents[4]
    i = extents[2] + query_y * extents[1] + query_x
    j = extents[2] + key_y * extents[1] + key_x
    return (
        member % batch,
        h,
        i,
        j,
        inside & (query_y < extents[0]) & (query_x < extents[1]),
        inside & (key_y < extents[0]) & (key_x < extents[1]),
    )


@triton.jit
def differences(owner, num_heads, extents, BLOCK: tl.constexpr):
    """Owner -> (head, dy, dx): query minus key, for every element of its tile."""
    h, cy, cx, _, _ = offset_of(owner, num_heads, extents)
    local = tl.arange(0, BLOCK)
    local_y = local // extents[4]
    local_x = local % extents[4]
    dy = cy * extents[3] + local_y[:, None] - local_y[None, :]
    dx = cx * extents[4] + local_x[:, None] - local_x[None, :]
    return h, dy, dx


def patch_shape(grid_h, grid_w, block):
    """Largest patch of at most `block` tokens, evened out so that the last of a row or column is not a sliver."""
    tile_w = triton.cdiv(grid_w, triton.cdiv(grid_w, block))
    tile_h = min(grid_h, block // tile_w)
    return triton.cdiv(grid_h, triton.cdiv(grid_h, tile_h)), tile_w


TARGET_PROGRAMS = 1024  # several waves of the largest chip; fixed, so that sums do not depend on the device


def classes(grid_h, grid_w, tile_h, tile_w, batch, heads):
    """(offsets, splits): classes per head, and in how many parts each is summed."""
    patches_y, patches_x = triton.cdiv(grid_h, tile_h), triton.cdiv(grid_w, tile_w)
    offsets = (2 * patches_y - 1) * (2 * patches_x - 1)
    most = batch * patches_y * patches_x // 4
    return offsets, max(1, min(TARGET_PROGRAMS // (offsets * heads), most))
