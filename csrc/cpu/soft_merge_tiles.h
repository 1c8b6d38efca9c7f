// What the two directions of soft merging (soft_merge.cpp, soft_merge_gradient.h) share.
#pragma once

#include "backward_tiles.h"

namespace effattn::EFFATTN_ISA {

inline Matrix from_column(Matrix matrix, int64_t column) {
  matrix.data = static_cast<const char*>(matrix.data) + column * matrix.column_stride * element_size(matrix.dtype);
  return matrix;
}

// Columns column ... of the rows of batch b of a (1,B,rows,columns) tensor, from a row on.
inline Matrix block_at(const Tensor& tensor, int64_t batch, int64_t row, int64_t column) {
  return from_column(matrix_at(tensor, 0, batch, row), column);
}

EFFATTN_INLINE Vec load_columns(const float* from, int64_t left) {
  return left >= kLanes ? load(from) : load_partial(from, left);
}

// Rows of a matrix as floats: where they lie if they are floats side by side, else converted into one of the places
// `staged + slot * pitch`, whole vectors. Read them with load_columns.
class FloatRows {
 public:
  FloatRows(const Matrix& matrix, int64_t columns, float* staged, int64_t pitch)
      : matrix_(matrix), columns_(columns), staged_(staged), pitch_(pitch) {}
  static bool in_place(const Matrix& matrix) { return matrix.dtype == DType::kFloat32 && matrix.column_stride == 1; }

  EFFATTN_INLINE const float* row(int64_t row, int64_t slot = 0) const {
    if (matrix_.column_stride == 1) {
      const char* ahead =
          static_cast<const char*>(matrix_.data) + matrix_.offset(row + kAhead) * element_size(matrix_.dtype);
      for (int64_t byte = 0; byte < columns_ * element_size(matrix_.dtype); byte += 64)
        __builtin_prefetch(ahead + byte);
    }
    if (in_place(matrix_)) return static_cast<const float*>(matrix_.data) + matrix_.offset(row);
    row_to_float(staged_ + slot * pitch_, matrix_, row, columns_, round_up(columns_, kLanes));
    return staged_ + slot * pitch_;
  }

 private:
  static constexpr int64_t kAhead = 16;  // rows: short pieces far apart are not fetched by the processor itself
  const Matrix matrix_;
  const int64_t columns_;
  float* const staged_;
  const int64_t pitch_;
};

// body(VectorCount<rows of the group>, first row): sixes, then what is left in four, two and one.
template <class Body>
EFFATTN_INLINE void for_each_row_group(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) body(VectorCount<kTileRows>{}, r);
  if (rows - r >= 4) body(VectorCount<4>{}, r), r += 4;
  if (rows - r >= 2) body(VectorCount<2>{}, r), r += 2;
  if (rows - r >= 1) body(VectorCount<1>{}, r);
}

// C = or += A B on one tile.
template <class Arithmetic, int kRows, int kVectors, bool kAdd>
__attribute__((noinline)) void product_tile(const typename Arithmetic::Word* a, ptrdiff_t a_row, ptrdiff_t a_step,
    const typename Arithmetic::Word* b, ptrdiff_t b_step, ptrdiff_t steps, float* c, ptrdiff_t c_row) {
  multiply_group<Arithmetic, kVectors, kAdd, 1, kRows>(a, a_row, a_step, b, b_step, steps, c, c_row);
}

// Fetches into L2 what the next tile will be packed from, a few rows with every step of this one: short pieces of rows
// far apart are nothing that the processor would fetch by itself.
class TileAhead {
 public:
  void plan(const Matrix& from, int64_t rows, int64_t columns, int64_t steps) {
    row_ = 0;
    rows_ = from.column_stride == 1 ? rows : 0;
    share_ = (rows + larger(steps, 1) - 1) / larger(steps, 1);
    bytes_ = columns * element_size(from.dtype);
    matrix_ = from;
  }
  void nothing() { rows_ = row_ = 0; }
  EFFATTN_INLINE void step() {
    if (row_ < rows_) fetch();
  }

 private:
  __attribute__((noinline)) void fetch() {
    const int64_t end = smaller(row_ + share_, rows_), size = element_size(matrix_.dtype);
    for (; row_ < end; ++row_) {
      const char* row = static_cast<const char*>(matrix_.data) + matrix_.offset(row_) * size;
      for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      __builtin_prefetch(row + bytes_ - 1, 0, 2);
    }
  }

  Matrix matrix_ = {};
  int64_t row_ = 0, rows_ = 0, share_ = 0, bytes_ = 0;
};

}  // namespace effattn::EFFATTN_ISA
