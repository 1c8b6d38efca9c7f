// A table by (key - query) of a window as scores meet it, and the sum of its gradient.
//
//   value[i][j] = factor * table[key j - query i], the neutral value where i or j is a prefix token
//
//   table      expanded per head into (queries x keys) in key order, while that is small and the keys of the windows
//              stay the same; a larger one per block of queries. A score costs one load.
//
//   gradient   small windows: dense[query][key] += while the tiles pass, folded onto the table at the end of the task.
//              Large ones, and those with keys left out: folded six rows at a time, a row of keys in one piece.
#pragma once

#include "windows.h"

namespace effattn::EFFATTN_ISA {

class WindowTable {
  static constexpr int64_t kLargest = 1 << 16;  // floats of an expanded table

 public:
  WindowTable(const WindowRows& rows, float factor, float neutral)
      : rows_(rows),
        factor_(factor),
        neutral_(neutral),
        places_(rows.largest().queries),
        pitch_(round_up(rows.largest().keys, kLanes)),
        staged_(places_ * pitch_ > kLargest) {}

  int64_t floats() const { return (staged_ ? kQueryBlock : places_) * pitch_; }
  void place(float* memory) { expanded_ = memory; }

  // The entered window of a head with these entries.
  void enter(const float* table, int64_t head, int64_t window, const IndexSet& set) {
    const WindowTiling& tiling = rows_.tiling(0);  // a table goes with one window for all heads
    table_ = table;
    all_keys_ = set.keys == tiling.keys();
    if (staged_ || (head == head_ && (all_keys_ ? -1 : window) == window_)) return;
    head_ = head;
    window_ = all_keys_ ? -1 : window;
    if (all_keys_) {
      for (int64_t place = 0; place < places_; ++place)
        expand_row(expanded_ + place * pitch_, tiling.first_entry(place), 0, set.keys);
    } else {
      for (int64_t r = 0; r < set.queries; ++r)
        expand_row(expanded_ + rows_.query_place()[r] * pitch_, rows_.query_bias()[r], 0, set.keys);
    }
  }

  void stage(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    if (!staged_) return;
    first_row_ = row;
    last_row_ = row + rows - 1;
    for (int64_t r = row; r < row + rows; ++r)
      expand_row(expanded_ + (r - row) * pitch_, rows_.query_bias()[r], key, keys);
  }

  EFFATTN_INLINE const float* row(int64_t row) const {
    return expanded_ + (staged_ ? smaller(row, last_row_) - first_row_ : rows_.query_place()[row]) * pitch_;
  }

 private:
  // Keys [key, key + keys) of the query whose entries begin at `first`; below 0: a prefix token.
  void expand_row(float* to, int64_t first, int64_t key, int64_t keys) const {
    const WindowTiling& tiling = rows_.tiling(0);
    const int64_t end = key + keys, run = tiling.x.enlarged();
    const int64_t on_grid = first < 0 ? key : smaller(end, tiling.grid_keys());
    int64_t j = key;
    if (all_keys_) {
      while (j < on_grid) {
        const float* from = table_ + first + j / run * tiling.bias_columns() + j % run;
        const int64_t count = smaller(run - j % run, on_grid - j);
        for (int64_t i = 0; i < count; i += kLanes)
          store_partial(to + j + i, load_partial(from + i, count - i) * broadcast(factor_), count - i);
        j += count;
      }
    } else {
      for (; j < on_grid; ++j) to[j] = table_[first + rows_.key_bias()[j]] * factor_;
    }
    for (; j < end; ++j) to[j] = neutral_;
    for (; j < round_up(end, kLanes); ++j) to[j] = 0.f;
  }

  const WindowRows& rows_;
  const float factor_, neutral_;
  const int64_t places_, pitch_;
  const bool staged_;
  const float* table_ = nullptr;
  bool all_keys_ = false;
  int64_t head_ = -1, window_ = -1, first_row_ = 0, last_row_ = 0;
  float* expanded_ = nullptr;
};

class WindowTableGradient {
  static constexpr int64_t kDenseFloats = 96 << 10;

 public:
  // sums: [task][entry], null: inactive.
  WindowTableGradient(const WindowRows& rows, int64_t entries, double* sums, Buffer& buffer)
      : rows_(rows),
        tiling_(rows.tiling(0)),
        entries_(entries),
        places_(rows.largest().queries),
        pitch_(round_up(rows.largest().keys, kLanes)),
        is_dense_(places_ * pitch_ <= kDenseFloats),
        sums_(sums) {
    if (!sums) return;
    const int64_t dense = is_dense_ ? places_ * pitch_ : 0;
    dense_ = buffer.reserve<float>(dense + kTileRows * pitch_ + entries + kLanes);
    staged_ = dense_ + dense;
    table_ = staged_ + kTileRows * pitch_;
    memset(staged_, 0, (kTileRows * pitch_ + entries) * sizeof(float));
  }

  bool active() const { return sums_ != nullptr; }

  void begin(int64_t task) {
    if (!sums_) return;
    if (is_dense_) memset(dense_, 0, places_ * pitch_ * sizeof(float));
    sum_ = sums_ + task * entries_;
    for (int64_t i = 0; i < entries_; ++i) sum_[i] = 0.0;
  }

  void enter(const IndexSet& set) {
    set_ = set;
    all_keys_ = set.keys == tiling_.keys();
    sums_dense_ = is_dense_ && all_keys_;
  }

  // Where a row's share is added, null where inactive. One past the last row adds zeros.
  EFFATTN_INLINE float* row(int64_t row, int64_t staged_row) const {
    if (!sums_) return nullptr;
    return sums_dense_ ? dense_ + rows_.query_place()[smaller(row, set_.queries - 1)] * pitch_
                       : staged_ + staged_row * pitch_;
  }

  void fold(int64_t row, int64_t rows) {
    if (!sums_ || sums_dense_) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = rows_.query_bias()[row + r];
      if (first < 0) continue;
      const float* from = staged_ + r * pitch_;
      float* to = table_ + first;
      if (all_keys_) {
        const int64_t run = tiling_.x.enlarged();
        for (int64_t y = 0; y < tiling_.y.enlarged(); ++y, from += run, to += tiling_.bias_columns())
          for (int64_t x = 0; x < run; x += kLanes) {
            const int64_t live = run - x;
            store_partial(to + x, load_partial(to + x, live) + load_partial(from + x, live), live);
          }
      } else {
        for (int64_t key = 0; key < set_.keys; ++key) to[rows_.key_bias()[key]] += from[key];
      }
    }
    memset(staged_, 0, kTileRows * pitch_ * sizeof(float));
  }

  // After the tiles of a window.
  void leave() {
    if (!sums_ || sums_dense_) return;
    for (int64_t i = 0; i < entries_; ++i) sum_[i] += table_[i];
    memset(table_, 0, entries_ * sizeof(float));
  }

  void end() {
    if (!sums_ || !is_dense_) return;
    const int64_t columns = tiling_.bias_columns(), run = tiling_.x.enlarged();
    for (int64_t place = 0; place < tiling_.y.size * tiling_.x.size; ++place) {
      const float* from = dense_ + place * pitch_;
      double* to = sum_ + tiling_.first_entry(place);
      for (int64_t y = 0; y < tiling_.y.enlarged(); ++y)
        for (int64_t x = 0; x < run; ++x) to[y * columns + x] += from[y * run + x];
    }
  }

 private:
  const WindowRows& rows_;
  const WindowTiling& tiling_;
  const int64_t entries_, places_, pitch_;
  const bool is_dense_;
  double* const sums_;
  IndexSet set_;
  bool all_keys_ = false, sums_dense_ = false;
  float* dense_ = nullptr;
  float* staged_ = nullptr;
  float* table_ = nullptr;
  double* sum_ = nullptr;
};

}  // namespace effattn::EFFATTN_ISA
