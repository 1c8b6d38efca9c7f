// Windows of a token grid as index arithmetic: which window, image and head a block has, and which token a slot is.
//
// A slot is a place of a window, row-major. Windows tile the padded grid, `top` rows and `left` columns of zeros before
// it; after a shift they tile the rolled grid, of which position Y is padded row (Y + shift) mod padded height. A slot
// outside of the image is a zero key and no query. Heads 0 .. H / 2 - 1 have the windows of half 0, the others those of
// half 1; both are served by one launch.
//
// A block has warps 0 .. kTeams in teams of whole warps. A team has `rows` slots of one window, 16 to a warp; the teams
// of a block have the same slots of consecutive windows of one head, so that they share what belongs to the head.
#pragma once

#include <stdexcept>

#include "tile.h"

namespace effattn::cuda {

inline constexpr int kWarpRows = 16;            // of a matrix instruction
inline constexpr int kWindowWarps = 8;          // at most in a block
inline constexpr int64_t kMostSlots = 1 << 27;  // four times a place in the bias table is an int
inline constexpr int kSmallWindow = 64;         // slots, up to which teams share a block
inline constexpr float kLog2E = 1.4426950408889634f;

// Division of 0 .. 2^31 - 1 without a division.
struct Divisor {
  uint32_t value, multiplier;
  int shift;

  EFFATTN_DEVICE unsigned quotient(unsigned n) const {
    return static_cast<unsigned>(uint64_t{n} * multiplier >> shift);
  }
  EFFATTN_DEVICE unsigned remainder(unsigned n) const { return n - quotient(n) * value; }
};

inline Divisor divisor_of(int64_t value) {
  int log2 = 0;
  while (int64_t{1} << log2 < value) ++log2;
  // rounded up by less than 2^log2 / value, of which n < 2^31 times makes less than 1 / value
  return {static_cast<uint32_t>(value), static_cast<uint32_t>(((uint64_t{1} << (31 + log2)) + value - 1) / value),
      31 + log2};
}

struct WindowHalf {
  int first_head, heads;
  int height, width;  // slots of a window
  int rows, columns;  // windows along the grid
  int top, left;      // zeros before the grid
  Divisor by_width, by_rows, by_columns, by_heads;

  __host__ __device__ int slots() const { return height * width; }
  __host__ __device__ int bias_entries() const { return (2 * height - 1) * (2 * width - 1); }
};

struct WindowGeometry {
  int batch, grid_h, grid_w, shift_h, shift_w;
  WindowHalf half[2];
};

// How the windows of a half are dealt out to blocks.
struct WindowShare {
  int warps;    // of a team
  int teams;    // of a block
  int blocks;   // for all slots of a window
  int chunks;   // of `teams` windows, over grid and batch
  int members;  // those windows
  Divisor by_warps, by_blocks;
};

struct WindowGrid {
  WindowShare share[2];
  int first_blocks;  // of half 0; those of half 1 follow
  int blocks, warps;
};

inline int checked_count(int64_t count) {
  if (count > 0x7fffffff) throw std::invalid_argument("window attention: more than 2^31 - 1 windows or blocks");
  return static_cast<int>(count);
}

inline WindowGeometry geometry_of(const WindowAttention& a) {
  WindowGeometry g = {static_cast<int>(a.query.size[0]), static_cast<int>(a.grid_h), static_cast<int>(a.grid_w),
      static_cast<int>(a.shift_h), static_cast<int>(a.shift_w), {}};
  const int heads = static_cast<int>(a.query.size[1]);
  for (int i = 0; i < 2; ++i) {
    WindowHalf& half = g.half[i];
    half.first_head = i * (heads / 2);
    half.heads = i == 0 ? heads / 2 : heads - heads / 2;
    half.height = static_cast<int>(a.window_h[i]);
    half.width = static_cast<int>(a.window_w[i]);
    half.rows = static_cast<int>(ceil_div(a.grid_h, half.height));
    half.columns = static_cast<int>(ceil_div(a.grid_w, half.width));
    if (a.window_h[i] * a.window_w[i] > kMostSlots)
      throw std::invalid_argument("window attention: more than 2^27 tokens in a window");
    half.top = static_cast<int>((int64_t{half.rows} * half.height - a.grid_h) / 2);
    half.left = static_cast<int>((int64_t{half.columns} * half.width - a.grid_w) / 2);
    half.by_width = divisor_of(half.width);
    half.by_rows = divisor_of(half.rows);
    half.by_columns = divisor_of(half.columns);
    half.by_heads = divisor_of(half.heads > 0 ? half.heads : 1);
  }
  return g;
}

// Small windows share a block of up to four warps, large ones (without `teams` all) are dealt out evenly to blocks of
// up to `most` warps.
inline WindowGrid grid_of(const WindowGeometry& geometry, bool teams = true, int most = kWindowWarps) {
  WindowGrid grid = {};
  int64_t blocks = 0;
  for (int i = 0; i < 2; ++i) {
    const WindowHalf& half = geometry.half[i];
    WindowShare& share = grid.share[i];
    const int tiles = static_cast<int>(ceil_div(half.slots(), kWarpRows));
    const bool small = teams && half.slots() <= kSmallWindow;
    share.blocks = small ? 1 : static_cast<int>(ceil_div(tiles, most));
    share.warps = static_cast<int>(ceil_div(tiles, share.blocks));
    share.teams = small ? 4 / share.warps : 1;
    share.members = checked_count(int64_t{geometry.batch} * half.rows * half.columns);
    share.chunks = static_cast<int>(ceil_div(share.members, share.teams));
    share.by_warps = divisor_of(share.warps);
    share.by_blocks = divisor_of(share.blocks);
    blocks += int64_t{half.heads} * share.blocks * share.chunks;
    if (i == 0) grid.first_blocks = checked_count(blocks);
    if (half.heads > 0 && grid.warps < share.warps * share.teams) grid.warps = share.warps * share.teams;
  }
  grid.blocks = checked_count(blocks);
  return grid;
}

// What a block has: `block` of the share.blocks parts of a window, of chunk's windows, of a head. The head is fastest,
// since tokens usually lie head beside head.
struct WindowPlace {
  int half, head, block, chunk;
};

EFFATTN_DEVICE WindowPlace place_of(const WindowGeometry& geometry, const WindowGrid& grid, unsigned program) {
  WindowPlace place;
  place.half = program >= static_cast<unsigned>(grid.first_blocks);
  if (place.half) program -= grid.first_blocks;
  const WindowHalf& half = geometry.half[place.half];
  const unsigned part = half.by_heads.quotient(program);
  place.head = half.first_head + program - part * half.heads;
  place.chunk = grid.share[place.half].by_blocks.quotient(part);
  place.block = part - place.chunk * grid.share[place.half].blocks;
  return place;
}

// One window of one image: `y` and `x` are the rolled position of its first slot.
struct Window {
  int batch, y, x;
};

EFFATTN_DEVICE Window window_of(const WindowHalf& half, unsigned member) {
  const unsigned row = half.by_columns.quotient(member), batch = half.by_rows.quotient(row);
  return {static_cast<int>(batch), static_cast<int>(row - batch * half.rows) * half.height,
      static_cast<int>(member - row * half.columns) * half.width};
}

struct Slot {
  int y, x;  // in the window
};

EFFATTN_DEVICE Slot slot_of(const WindowHalf& half, unsigned index) {
  const unsigned y = half.by_width.quotient(index);
  return {static_cast<int>(y), static_cast<int>(index - y * half.width)};
}

struct Token {
  int index;   // -1: none, outside of the image
  int region;  // tokens of different regions only the shift has brought together
};

template <bool kShifted>
EFFATTN_DEVICE Token token_at(const WindowGeometry& geometry, const WindowHalf& half, const Window& window, Slot slot) {
  int y = window.y + slot.y, x = window.x + slot.x, region = 0;
  if constexpr (kShifted) {
    const int height = half.rows * half.height, width = half.columns * half.width;
    y += geometry.shift_h;
    x += geometry.shift_w;
    if (y >= height) y -= height, region = 2;
    if (x >= width) x -= width, region |= 1;
  }
  y -= half.top;
  x -= half.left;
  const bool inside = y >= 0 && y < geometry.grid_h && x >= 0 && x < geometry.grid_w;
  return {inside ? y * geometry.grid_w + x : -1, region};
}

// A window with what finds the token of a slot by its number.
template <bool kShifted>
struct Slots {
  const WindowGeometry& geometry;
  WindowHalf half;
  Window window;

  EFFATTN_DEVICE int count() const { return half.slots(); }
  EFFATTN_DEVICE Token token(int index) const {
    return index < count() ? token_at<kShifted>(geometry, half, window, slot_of(half, index)) : Token{-1, 0};
  }
};

// Codes of the slots of a query and a key differ by the entry of the bias table: key minus query, row-major.
EFFATTN_DEVICE int bias_columns(const WindowHalf& half) { return 2 * half.width - 1; }
EFFATTN_DEVICE int bias_code(const WindowHalf& half, Slot slot) { return slot.y * bias_columns(half) + slot.x; }
EFFATTN_DEVICE const float* bias_centre(const float* bias, const WindowHalf& half, int head) {
  return bias + int64_t{head} * half.bias_entries() + int64_t{half.height - 1} * bias_columns(half) + half.width - 1;
}

// What bias and masks need of a slot: its bias_code and its region. A key that takes no part has -1.
EFFATTN_DEVICE int mask_code(const WindowHalf& half, Slot slot, int region) {
  return bias_code(half, slot) * 4 + region;
}
EFFATTN_DEVICE int query_code(const Slots<true>& slots, int index) {  // past the last slot: of that
  index = min(index, slots.count() - 1);
  return mask_code(slots.half, slot_of(slots.half, index), slots.token(index).region);
}
EFFATTN_DEVICE int key_code(const Slots<true>& slots, int index, bool mask_padding) {
  const Token token = slots.token(index);
  const bool takes_part = index < slots.count() && !(mask_padding && token.index < 0);
  return takes_part ? mask_code(slots.half, slot_of(slots.half, index), token.region) : -1;
}

// A score, to base 2, with the bias of its pair, from bias_centre or null, and the mask. The codes are those above.
EFFATTN_DEVICE float with_bias_and_mask(float score, const float* bias, int query, int key) {
  constexpr float kApart = -100.0f * kLog2E;
  if (bias != nullptr) score = fmaf(bias[max(key, 0) / 4 - query / 4], kLog2E, score);
  return key < 0 ? -INFINITY : (key ^ query) & 3 ? score + kApart : score;
}

EFFATTN_DEVICE bool contains(const WindowHalf& half, int y, int x) {
  return y >= 0 && y < half.height && x >= 0 && x < half.width;
}

// The neighbour of a slot at a tap 0 .. 8 of LePE's 3 x 3 (sign = -1: of its transpose); kOutside outside the window.
inline constexpr Slot kOutside = {-1, -1};
EFFATTN_DEVICE Slot neighbour(const WindowHalf& half, Slot slot, int tap, int sign = 1) {
  const int y = slot.y + sign * (tap / 3 - 1), x = slot.x + sign * (tap % 3 - 1);
  return contains(half, y, x) ? Slot{y, x} : kOutside;
}

}  // namespace effattn::cuda
