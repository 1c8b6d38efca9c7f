// The windows of a token grid as index sets: which tokens meet in a window, and where in it they lie.
//
// The grid is padded to whole windows (the smaller half before it), rolled by -shift and tiled. A window's queries are
// its tokens inside the grid, its keys the positions of the window enlarged by `overlap` on each side. Positions
// outside the grid are zero keys, or no keys at all with mask_padding. Prefix tokens, where one window is the grid,
// come last in it.
#pragma once

#include "policy.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {

// Tiling of one dimension.
struct WindowAxis {
  int64_t extent, size, shift, overlap, before, padded;

  WindowAxis(int64_t extent, int64_t size, int64_t shift, int64_t overlap)
      : extent(extent), size(size), shift(shift), overlap(overlap) {
    padded = size == 0 ? 0 : round_up(extent, size);
    before = (padded - extent) / 2;
  }
  int64_t windows() const { return size == 0 ? 0 : padded / size; }
  int64_t enlarged() const { return size + 2 * overlap; }
  // The coordinate in the grid of a rolled position, -1 outside.
  int64_t coordinate(int64_t position) const {
    if (position < 0 || position >= padded) return -1;
    const int64_t rolled = position + shift;
    const int64_t coordinate = (rolled < padded ? rolled : rolled - padded) - before;
    return coordinate >= 0 && coordinate < extent ? coordinate : -1;
  }
  // Positions of different regions became neighbours only by the roll.
  int32_t region(int64_t position) const {
    return shift == 0 ? 0 : (position >= padded - size) + (position >= padded - shift);
  }
};

struct WindowTiling {
  WindowAxis y, x;
  int64_t prefix;

  WindowTiling(const Windows& windows, int half)
      : y(windows.grid_h, windows.window_h[half], windows.shift_h, windows.overlap_h),
        x(windows.grid_w, windows.window_w[half], windows.shift_w, windows.overlap_w),
        prefix(windows.num_prefix_tokens) {}
  int64_t windows() const { return y.windows() * x.windows(); }
  int64_t grid_keys() const { return y.enlarged() * x.enlarged(); }
  int64_t queries() const { return y.size * x.size + prefix; }
  int64_t keys() const { return grid_keys() + prefix; }
  int64_t bias_columns() const { return x.size + x.enlarged() - 1; }
  int64_t bias_entries() const { return (y.size + y.enlarged() - 1) * bias_columns(); }
  // Where the entries of the query at a place begin in the bias table; -1 for a prefix token.
  int64_t first_entry(int64_t place) const {
    if (place >= y.size * x.size) return -1;
    return (y.size - 1 - place / x.size) * bias_columns() + x.size - 1 - place % x.size;
  }
};

// The rows of one window at a time.
class WindowRows {
 public:
  explicit WindowRows(const Windows& windows)
      : tilings_{{windows, 0}, {windows, 1}}, mask_padding_(windows.mask_padding) {
    const int64_t queries = larger(tilings_[0].queries(), tilings_[1].queries());
    const int64_t keys = larger(tilings_[0].keys(), tilings_[1].keys());
    largest_ = {queries, keys, nullptr, nullptr};
    static thread_local Buffer tokens, places;
    query_tokens_ = tokens.reserve<int64_t>(queries + keys);
    key_tokens_ = query_tokens_ + queries;
    query_place_ = places.reserve<int32_t>(2 * (queries + keys) + queries + round_up(keys, kTileColumns));
    key_at_ = query_place_ + queries;
    query_bias_ = key_at_ + keys;
    key_bias_ = query_bias_ + queries;
    query_region_ = key_bias_ + keys;
    key_region_ = query_region_ + queries;
  }

  const WindowTiling& tiling(int half) const { return tilings_[half]; }
  IndexSet largest() const { return largest_; }

  const IndexSet& enter(int half, int64_t window) {
    if (half == half_ && window == window_) return rows_;
    half_ = half;
    window_ = window;
    const WindowAxis &y = tilings_[half].y, &x = tilings_[half].x;
    const int64_t columns = tilings_[half].bias_columns(), prefix = tilings_[half].prefix;
    const int64_t top = window / x.windows() * y.size, left = window % x.windows() * x.size;
    int64_t queries = 0, keys = 0, place = 0;
    for (int64_t i = 0; i < y.enlarged(); ++i) {
      const int64_t row = y.coordinate(top + i - y.overlap);
      for (int64_t j = 0; j < x.enlarged(); ++j, ++place) {
        const int64_t column = x.coordinate(left + j - x.overlap);
        const bool inside = row >= 0 && column >= 0;
        const bool listed = inside || !mask_padding_;
        key_at_[place] = listed ? static_cast<int32_t>(keys) : -1;
        if (!listed) continue;
        key_tokens_[keys] = inside ? prefix + row * x.extent + column : kZeroToken;
        key_bias_[keys] = static_cast<int32_t>(i * columns + j);
        key_region_[keys++] = 3 * y.region(top + i) + x.region(left + j);
      }
    }
    for (int64_t i = 0; i < y.size; ++i) {
      const int64_t row = y.coordinate(top + i);
      for (int64_t j = 0; j < x.size; ++j) {
        const int64_t column = x.coordinate(left + j);
        if (row < 0 || column < 0) continue;
        query_tokens_[queries] = prefix + row * x.extent + column;
        query_place_[queries] = static_cast<int32_t>(i * x.size + j);
        query_bias_[queries] = static_cast<int32_t>(tilings_[half].first_entry(i * x.size + j));
        query_region_[queries++] = 3 * y.region(top + i) + x.region(left + j);
      }
    }
    for (int64_t token = 0; token < prefix; ++token) {
      key_tokens_[keys++] = query_tokens_[queries] = token;
      query_place_[queries] = static_cast<int32_t>(queries);
      query_bias_[queries++] = -1;
    }
    mixed_ = (y.shift > 0 && top + y.size == y.padded) || (x.shift > 0 && left + x.size == x.padded);
    rows_ = {queries, keys, query_tokens_, key_tokens_};
    return rows_;
  }

  // Of the entered window:
  bool mixed() const { return mixed_; }  // holds tokens of more than one region
  bool whole() const { return rows_.queries == tilings_[half_].queries(); }
  const int32_t* query_place() const { return query_place_; }    // y * width + x in the window
  const int32_t* key_at() const { return key_at_; }              // key at a place of the enlarged window, or -1
  const int32_t* query_bias() const { return query_bias_; }      // query_bias[i] + key_bias[j]: entry of the bias
  const int32_t* key_bias() const { return key_bias_; }          //   table of the head; -1 for a prefix token
  const int32_t* query_region() const { return query_region_; }  // tokens of different regions are kept apart
  const int32_t* key_region() const { return key_region_; }      // readable up to a whole tile

 private:
  const WindowTiling tilings_[2];
  const bool mask_padding_;
  int half_ = -1;
  int64_t window_ = -1;
  bool mixed_ = false;
  IndexSet largest_, rows_;
  int64_t* query_tokens_;
  int64_t* key_tokens_;
  int32_t* query_place_;
  int32_t* key_at_;
  int32_t* query_bias_;
  int32_t* key_bias_;
  int32_t* query_region_;
  int32_t* key_region_;
};

}  // namespace effattn::EFFATTN_ISA
