// Softmax attention with Toeplitz matrices as a policy of the tile engine.
//
//   S = scale * Q K^T + b[j - i],  O = (softmax(S) * c[j - i]) V
//
// The entry of (i, j) is p_j - p_i + middle (api.h, Relative), so a row's entries are as far apart as the places of its
// keys. Per head the tables are copied with room for whole vectors, the bias times log2 e; a score then costs one
// unaligned load for each:
//
//   line       a sequence, or a grid of one column: the entries of consecutive keys are consecutive
//
//   expanded   grids whose [x of the query][2 h - 1][w] is small: the same, once per head
//
//   staged     larger grids: rows of a score block, copied in pieces of one grid row (48 x 256 floats for each table)
//
// Keys after the query are never looked at where causal: their entries count as 0, whatever they hold.
#pragma once

#include "forward.h"

namespace effattn::EFFATTN_ISA {

// Where the entries of a grid lie.
struct RelativeGrid {
  explicit RelativeGrid(const Relative& relative, int64_t tokens)
      : h(relative.grid_h),
        w(relative.grid_w),
        columns(2 * w - 1),
        entries(tokens > 0 ? (2 * h - 1) * columns : 0),
        is_line(h <= 1 || w <= 1) {}
  int64_t h, w, columns, entries;
  bool is_line;

  // Of key 0 and this query; key (y, x) is y * columns + x further on.
  int64_t first_entry(int64_t query) const { return entries / 2 - query / w * columns - query % w; }
};

template <bool kBias, bool kWeights>
class RelativePolicy : public WholeSequence {
  static constexpr int64_t kExpandedBytes = 320 << 10;
  static constexpr int64_t kStagedPitch = kKeyBlock + kLanes;

 public:
  using Arguments = Relative;
  static constexpr bool kReweighs = kWeights;

  RelativePolicy(const AttentionForward& attention, const Relative& relative)
      : WholeSequence(attention),
        relative_(relative),
        grid_(relative, attention.query.size[2]),
        tokens_(attention.query.size[2]),
        factor_(attention.scale * kLog2E) {
    if constexpr (!kBias && !kWeights) return;
    static thread_local Buffer floats, offsets;
    const int64_t expanded = grid_.w * (2 * grid_.h - 1) * grid_.w, table = grid_.entries + kTileColumns;
    is_expanded_ = !grid_.is_line && expanded * int64_t{sizeof(float)} <= kExpandedBytes;
    is_staged_ = !grid_.is_line && !is_expanded_;
    const int64_t rows = is_staged_ ? kQueryBlock * kStagedPitch : is_expanded_ ? expanded + kTileColumns : 0;
    float* memory = floats.reserve<float>((kBias + kWeights) * (table + rows) + 1);
    offset_ = offsets.reserve<int64_t>(tokens_ + 1);
    for (Table* one : {&bias_, &weights_}) {
      if (!(one == &bias_ ? kBias : kWeights)) continue;
      one->entries = memory;
      one->rows = grid_.is_line ? memory : memory + table;
      memory += table + rows;
    }
    if (!is_staged_) address_rows();
  }

  int64_t rotation() const { return 0; }
  int64_t key_limit(int64_t row) const { return relative_.is_causal ? smaller(row + 1, tokens_) : tokens_; }
  int64_t plain_keys(int64_t row) const { return key_limit(row); }

  void enter(int64_t, int64_t head) {
    if (head == head_) return;
    head_ = head;
    if constexpr (kBias) load_table(bias_, relative_.bias + head * grid_.entries, kLog2E);
    if constexpr (kWeights) load_table(weights_, relative_.coefficient + head * grid_.entries, 1.f);
  }

  void stage(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    last_row_ = row + rows - 1;
    if (!is_staged_) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = grid_.first_entry(row + r);
      offset_[row + r] = r * kStagedPitch - key;
      if constexpr (kBias) copy_row(bias_, r, first, key, keys);
      if constexpr (kWeights) copy_row(weights_, r, first, key, keys);
    }
  }

  template <bool kPlain>
  struct Tile {
    const float* bias[kTileRows];
    float factor;
    EFFATTN_INLINE Vec transform(Vec score, int r, int v) const {
      if constexpr (kBias)
        return fma(score, broadcast(factor), load(bias[r] + v * kLanes));
      else
        return score * broadcast(factor);
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t row, int64_t key) const {
    Tile<kPlain> tile;
    if constexpr (kBias) {
      EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) tile.bias[r] =
          bias_.rows + offset_[smaller(row + r, last_row_)] + key;
    }
    tile.factor = factor_;
    return tile;
  }

  EFFATTN_INLINE const float* multipliers(int64_t row) const {
    return weights_.rows + offset_[smaller(row, last_row_)];
  }

  const RelativeGrid& grid() const { return grid_; }

 private:
  struct Table {
    float* entries = nullptr;
    float* rows = nullptr;  // the entries of row i and key j are at offset_[i] + j
  };

  void load_table(const Table& table, const float* from, float factor) {
    const int64_t live = relative_.is_causal ? grid_.entries / 2 + 1 : grid_.entries;
    for (int64_t i = 0; i < live; ++i) table.entries[i] = from[i] * factor;
    for (int64_t i = live; i < grid_.entries + kTileColumns; ++i) table.entries[i] = 0.f;
    if (!is_expanded_) return;
    float* to = table.rows;
    for (int64_t x = 0; x < grid_.w; ++x)
      for (int64_t y = 0; y < 2 * grid_.h - 1; ++y, to += grid_.w)
        memcpy(to, table.entries + y * grid_.columns + grid_.w - 1 - x, grid_.w * sizeof(float));
    memset(to, 0, kTileColumns * sizeof(float));
  }

  void address_rows() {
    for (int64_t i = 0; i < tokens_; ++i)
      offset_[i] = grid_.is_line ? grid_.first_entry(i)
                                 : (i % grid_.w * (2 * grid_.h - 1) + grid_.h - 1 - i / grid_.w) * grid_.w;
  }

  // Whole vectors: what a piece writes past its end the next one overwrites.
  void copy_row(const Table& table, int64_t r, int64_t first, int64_t key, int64_t keys) const {
    float* to = table.rows + r * kStagedPitch;
    store(to + (keys - 1) / kLanes * kLanes, Vec{});
    int64_t x = key % grid_.w;
    const float* from = table.entries + first + key / grid_.w * grid_.columns;
    for (int64_t c = 0; c < keys; from += grid_.columns, x = 0) {
      const int64_t count = smaller(grid_.w - x, keys - c);
      for (int64_t i = 0; i < count; i += kLanes) store(to + c + i, load(from + x + i));
      c += count;
    }
  }

  const Relative& relative_;
  const RelativeGrid grid_;
  const int64_t tokens_;
  const float factor_;
  bool is_expanded_ = false, is_staged_ = false;
  int64_t head_ = -1, last_row_ = 0;
  Table bias_, weights_;
  int64_t* offset_ = nullptr;
};

}  // namespace effattn::EFFATTN_ISA
