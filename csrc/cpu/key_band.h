// dK and dV where windows overlap: a token is a key of several of them.
//
// One task walks the windows of an image in order and adds their rows up in fp32. A row of the grid is final once the
// windows have passed it, so a ring of as many grid rows as a window has holds all that is open.
#pragma once

#include "pack.h"
#include "windows.h"

namespace effattn::EFFATTN_ISA {

class KeyBand {
 public:
  KeyBand(const WindowTiling& tiling, int64_t pitch)
      : tiling_(tiling),
        rows_(smaller(tiling.y.enlarged(), tiling.y.extent)),
        width_(tiling.x.extent),
        pitch_(pitch),
        values_(rows_ * width_ * pitch) {
    static thread_local Buffer buffer;
    keys_ = buffer.reserve<float>(2 * values_);
  }

  void begin() {
    memset(keys_, 0, 2 * values_ * sizeof(float));
    open_ = 0;
  }

  // The first grid row that a window and those after it can still touch.
  int64_t first_row(int64_t window) const {
    const int64_t top = window / tiling_.x.windows() * tiling_.y.size - tiling_.y.overlap - tiling_.y.before;
    return smaller(larger(top, 0), tiling_.y.extent);
  }

  void add(const IndexSet& rows, const float* keys, const float* values) {
    for (int64_t r = 0; r < rows.keys; ++r) {
      const int64_t token = rows.key_tokens[r];
      if (token < 0) continue;
      float* to = at(token / width_, token % width_);
      for (int64_t d = 0; d < pitch_; d += kLanes) {
        store(to + d, load(to + d) + load(keys + r * pitch_ + d));
        store(to + values_ + d, load(to + values_ + d) + load(values + r * pitch_ + d));
      }
    }
  }

  // Stores the grid rows below `row`.
  void finish(int64_t row, const Matrix& to_key, const Matrix& to_value, Vec factor, int64_t columns) {
    for (; open_ < row; ++open_) {
      float* from = at(open_, 0);
      for (int64_t x = 0; x < width_; ++x) {
        store_row(to_key, open_ * width_ + x, from + x * pitch_, factor, columns);
        store_row(to_value, open_ * width_ + x, from + values_ + x * pitch_, broadcast(1.f), columns);
      }
      memset(from, 0, width_ * pitch_ * sizeof(float));
      memset(from + values_, 0, width_ * pitch_ * sizeof(float));
    }
  }

  void finish(const Matrix& to_key, const Matrix& to_value, Vec factor, int64_t columns) {
    finish(tiling_.y.extent, to_key, to_value, factor, columns);
  }

 private:
  float* at(int64_t y, int64_t x) const { return keys_ + (y % rows_ * width_ + x) * pitch_; }

  const WindowTiling tiling_;
  const int64_t rows_, width_, pitch_, values_;
  float* keys_;
  int64_t open_ = 0;
};

}  // namespace effattn::EFFATTN_ISA
