// A dense (batch, head, row, key) operand of the scores, one score block at a time.
//
// float32 with unit last stride is read in place; anything else (bool, bf16, fp16, broadcast or transposed keys) is
// first converted into a 48 x 256 float tile.
#pragma once

#include "pack.h"
#include "policy.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {

class DenseTile {
 public:
  explicit DenseTile(const Tensor& tensor)
      : tensor_(tensor), in_place_(tensor.dtype == DType::kFloat32 && tensor.stride[3] == 1) {
    if (!in_place_) staged_ = staging().reserve<float>(kQueryBlock * kKeyBlock);
  }

  void enter(int64_t batch, int64_t head) {
    matrix_ = matrix_at(tensor_, batch, head);
    matrix_.wrap = INT64_MAX;
    if (in_place_) base_ = static_cast<const float*>(matrix_.data), pitch_ = matrix_.row_stride;
  }

  void stage(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    last_row_ = row + rows - 1;
    end_key_ = key + keys;
    if (in_place_) return;
    first_row_ = row;
    first_key_ = key;
    base_ = staged_;
    pitch_ = kKeyBlock;
    for (int64_t r = 0; r < rows; ++r) {
      // Rows that are one row, broadcast, are converted once.
      if (r > 0 && matrix_.row_stride == 0)
        memcpy(staged_ + r * kKeyBlock, staged_, round_up(keys, kLanes) * sizeof(float));
      else
        convert_row(staged_ + r * kKeyBlock, row + r, key, keys);
    }
  }

  template <bool kPlain>
  struct Rows {
    const float* row[kTileRows];
    int64_t keys;  // readable, from the first key of the tile

    EFFATTN_INLINE Vec load(int r, int v) const {
      if constexpr (kPlain)
        return EFFATTN_ISA::load(row[r] + v * kLanes);
      else
        return load_partial(row[r] + v * kLanes, keys - v * kLanes);
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Rows<kPlain> rows(int64_t row, int64_t key) const {
    Rows<kPlain> rows;
    EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) rows.row[r] =
        base_ + (smaller(row + r, last_row_) - first_row_) * pitch_ + (key - first_key_);
    // The next six rows: too far apart for the hardware prefetcher.
    if (in_place_) {
      EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) {
        const float* next =
            base_ + (smaller(row + kTileRows + r, last_row_) - first_row_) * pitch_ + (key - first_key_);
        EFFATTN_UNROLL for (int c = 0; c < kTileColumns; c += 16) __builtin_prefetch(next + c);
      }
    }
    rows.keys = end_key_ - key;
    return rows;
  }

 private:
  static Buffer& staging() {
    static thread_local Buffer buffer;
    return buffer;
  }

  void convert_row(float* to, int64_t row, int64_t key, int64_t keys) const {
    if (matrix_.dtype != DType::kBool) {
      Matrix shifted = matrix_;
      shifted.data = static_cast<const char*>(matrix_.data) + key * matrix_.column_stride * element_size(matrix_.dtype);
      row_to_float(to, shifted, row, keys, round_up(keys, kLanes));
      return;
    }
    const uint8_t* from =
        static_cast<const uint8_t*>(matrix_.data) + row * matrix_.row_stride + key * matrix_.column_stride;
    for (int64_t k = 0; k < keys; ++k) to[k] = from[k * matrix_.column_stride] ? 0.f : -INFINITY;
    for (int64_t k = keys; k < round_up(keys, kLanes); ++k) to[k] = 0.f;
  }

  const Tensor& tensor_;
  const bool in_place_;
  Matrix matrix_ = {};
  float* staged_ = nullptr;
  const float* base_ = nullptr;
  int64_t pitch_ = 0, first_row_ = 0, first_key_ = 0, last_row_ = 0, end_key_ = 0;
};

}  // namespace effattn::EFFATTN_ISA
