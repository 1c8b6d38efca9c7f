// What both passes of the feature map share: unit rows, and products of blocks of them.
#pragma once

#include <float.h>

#include "api.h"
#include "backward_tiles.h"

namespace effattn::EFFATTN_ISA::features {

inline constexpr int64_t kRows = 48;

// C (rows x columns) = A B; B and C padded to whole vectors, rows of A and C to kRowStep.
inline void product(const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b, ptrdiff_t b_step, int64_t steps,
    float* c, ptrdiff_t c_row, int64_t rows, int64_t columns) {
  constexpr int kVectors = kChainedVectors<Float32>, kSums = kChains<Float32>;
  rows = round_up(rows, kRowStep);
  int64_t column = 0;
  for (; column + (kVectors - 1) * kLanes < columns; column += kVectors * kLanes)
    multiply_rows<Float32, kVectors, false, kSums>(
        a, a_row, a_step, b + column, b_step, steps, c + column, c_row, rows);
  for (; column < columns; column += kLanes)
    multiply_rows<Float32, 1, false, kSums>(a, a_row, a_step, b + column, b_step, steps, c + column, c_row, rows);
}

struct Sizes {
  explicit Sizes(const FeatureMap& map)
      : batches(map.x.size[0]),
        heads(map.x.size[1]),
        tokens(map.x.size[2]),
        head_dim(map.x.size[3]),
        directions(map.directions),
        columns(map.directions * (map.trigonometric ? 2 : 1)),
        row_pitch(round_up(head_dim, kLanes)),
        tile_pitch(round_up(directions, kLanes)),
        factor(static_cast<float>(1.0 / sqrt(static_cast<double>(directions)))) {}
  int64_t batches, heads, tokens, head_dim, directions, columns, row_pitch, tile_pitch;
  float factor;
};

// x^ = x / |x|, or x, of the rows of one block.
class Rows {
 public:
  Rows(const FeatureMap& map, const Sizes& sizes, float* memory) : map_(map), sizes_(sizes), rows_(memory) {}
  static int64_t floats(const Sizes& sizes) { return kRows * sizes.row_pitch; }

  void load(int64_t batch, int64_t head, int64_t first, int64_t rows) {
    const Matrix from = matrix_at(map_.x, batch, head, first);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = rows_ + r * sizes_.row_pitch;
      masked_[r] = map_.mask && map_.mask[batch * sizes_.tokens + first + r];
      inverse_[r] = half_square_[r] = 0.f;
      if (masked_[r]) {
        memset(to, 0, sizes_.row_pitch * sizeof(float));
        continue;
      }
      row_to_float(to, from, r, sizes_.head_dim, sizes_.row_pitch);
      const double square = square_of(to);
      if (map_.normalize) {
        normalize(to, square, r);
      } else {
        inverse_[r] = 1.f;
        half_square_[r] = static_cast<float>(0.5 * square);
      }
    }
    memset(rows_ + rows * sizes_.row_pitch, 0, (round_up(rows, kRowStep) - rows) * sizes_.row_pitch * sizeof(float));
  }

  const float* data() const { return rows_; }
  const float* row(int64_t r) const { return rows_ + r * sizes_.row_pitch; }
  float half_square(int64_t r) const { return half_square_[r]; }
  float inverse(int64_t r) const { return inverse_[r]; }  // 1 / |x|; 0 where the row has no gradient
  bool is_masked(int64_t r) const { return masked_[r]; }

 private:
  // Double: no square underflows, and a large |x|^2 is the largest part of an exponent.
  double square_of(const float* row) const {
    double sums[4] = {};
    for (int64_t d = 0; d < sizes_.row_pitch; d += 4)
      for (int64_t i = 0; i < 4; ++i) sums[i] += static_cast<double>(row[d + i]) * static_cast<double>(row[d + i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  void normalize(float* to, double square, int64_t r) {
    if (square == 0.0) return;
    const double inverse = 1.0 / sqrt(square);
    for (int64_t d = 0; d < sizes_.row_pitch; ++d) to[d] = static_cast<float>(to[d] * inverse);
    inverse_[r] = static_cast<float>(inverse < FLT_MAX ? inverse : static_cast<double>(FLT_MAX));
    half_square_[r] = 0.5f;
  }

  const FeatureMap& map_;
  const Sizes& sizes_;
  float* rows_;
  float inverse_[kRows], half_square_[kRows];
  bool masked_[kRows];
};

}  // namespace effattn::EFFATTN_ISA::features
