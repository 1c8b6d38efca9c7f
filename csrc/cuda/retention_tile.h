// Sums of products of tiles in shared memory, by 256 threads: what the scan of retention.h keeps in registers.
#pragma once

#include "device.h"

namespace effattn::cuda {

inline constexpr int kScanThreads = 256, kChunk = 64;

// A left factor in registers: 16 rows by 16 of the depth for the matrix instructions, a thread's rows by 4 for FMA.
struct MatrixLeft {
  uint32_t a[4];
};
template <int kRows>
struct RowsLeft {
  Vec<float, 4> row[kRows];
};

// By matrix instructions: 64 x kColumns sums. Warp w has rows 16 (w / 2).. and the half w % 2 of the columns, so that
// each of the four schedulers has two groups of rows and the triangle of scores is shared out evenly. kScores: a score
// tile, of which only what lies on and below the diagonal is computed.
template <class T, int kRows, int kColumns, bool kScores = false>
class ScanTile {
  static_assert(kRows == 64 && kColumns % 32 == 0);

 public:
  static constexpr int kStep = 16, kUnroll = 2, kRun = 2, kFragments = kColumns / 16;

  using Left = MatrixLeft;

  EFFATTN_DEVICE static int first_row() { return warp_index() / 2 * 16; }

  // From a tile that lies as (row, depth), or as (depth, row).
  EFFATTN_DEVICE static Left left(SharedArray<T> tile, int pitch, int depth) {
    const int lane = lane_index();
    Left left;
    ldmatrix_x4(left.a, tile, (first_row() + lane % 16) * pitch + depth + lane / 16 * 8);
    return left;
  }
  EFFATTN_DEVICE static Left left_transposed(SharedArray<T> tile, int pitch, int depth) {
    const int lane = lane_index();
    Left left;
    ldmatrix_x4_trans(left.a, tile, (depth + lane % 8 + lane / 16 * 8) * pitch + first_row() + lane / 8 % 2 * 8);
    return left;
  }

  // The first depth from which on the left factor is zero, where it is a lower triangle.
  EFFATTN_DEVICE static int triangle_depth() { return first_row() + 16; }

  EFFATTN_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[n][i] = 0;
  }

  // The right factor lies as (depth, column), or as (column, depth).
  EFFATTN_DEVICE void add(const Left& left, SharedArray<T> right, int pitch, int depth) {
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < kFragments; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, right, (depth + lane % 16) * pitch + column(n) + lane / 16 * 8);
      multiply(n, left, b);
    }
  }
  EFFATTN_DEVICE void add_transposed(const Left& left, SharedArray<T> right, int pitch, int depth) {
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < kFragments; n += 2) {
      if (kScores && column(n) >= triangle_depth()) break;
      uint32_t b[4];
      ldmatrix_x4(b, right, (column(n) + lane / 16 * 8 + lane % 8) * pitch + depth + lane / 8 % 2 * 8);
      multiply(n, left, b);
    }
  }
  EFFATTN_DEVICE void flush() {}

  // function(row, column, run) for every run of kRun sums side by side.
  template <class Function>
  EFFATTN_DEVICE void each(Function function) {
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vec<float, kRun> run = {sum_[n][2 * i], sum_[n][2 * i + 1]};
        function(first_row() + lane / 4 + 8 * i, column(n) + lane % 4 * 2, run);
        sum_[n][2 * i] = run[0];
        sum_[n][2 * i + 1] = run[1];
      }
  }

  // sum += factor * other.
  EFFATTN_DEVICE void accumulate(float factor, const ScanTile& other) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[n][i] = fmaf(factor, other.sum_[n][i], sum_[n][i]);
  }
  // sum = (1 + decay) sum + added: 1 + decay is not rounded.
  EFFATTN_DEVICE void advance(float decay, const ScanTile& added) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[n][i] = fmaf(decay, sum_[n][i], sum_[n][i]) + added.sum_[n][i];
  }

 private:
  EFFATTN_DEVICE static int column(int n) { return warp_index() % 2 * (kColumns / 2) + n * 8; }
  EFFATTN_DEVICE void multiply(int n, const Left& left, const uint32_t (&b)[4]) {
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_m16n8k16<T>(sum_[n], left.a, first);
    mma_m16n8k16<T>(sum_[n + 1], left.a, second);
  }

  float sum_[kFragments][4];
};

// By FMA: threads lie as 16 x 16. Of 64 rows a thread has y + 16 i, of fewer (of the state) neighbours. Columns are
// neighbours, those of scores x + 16 j: so no two threads of a quarter warp meet in a bank.
template <int kRows, int kColumns, bool kScores>
class ScanTile<float, kRows, kColumns, kScores> {
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0);
  static constexpr int kRowsEach = kRows / 16, kColumnsEach = kColumns / 16;

 public:
  static constexpr int kStep = 4, kUnroll = 1, kRun = kScores ? 1 : kColumnsEach;

  using Left = RowsLeft<kRowsEach>;

  EFFATTN_DEVICE static int first_row() { return row(0); }

  EFFATTN_DEVICE static Left left(SharedArray<float> tile, int pitch, int depth) {
    Left left;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) left.row[i] = tile.template load<4>(row(i) * pitch + depth);
    return left;
  }
  EFFATTN_DEVICE static Left left_transposed(SharedArray<float> tile, int pitch, int depth) {
    Left left;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Vec<float, kRowsEach> rows = tile.template load<kRowsEach>((depth + k) * pitch + row(0));
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) left.row[i][k] = rows[i];
    }
    return left;
  }
  EFFATTN_DEVICE static int triangle_depth() { return kChunk; }

  EFFATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) sum_[i][j] = part_[i][j] = 0;
  }

  EFFATTN_DEVICE void add(const Left& left, SharedArray<float> right, int pitch, int depth) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Vec<float, kColumnsEach> factor = right.template load<kColumnsEach>((depth + k) * pitch + column(0));
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
        for (int j = 0; j < kColumnsEach; ++j) part_[i][j] = fmaf(left.row[i][k], factor[j], part_[i][j]);
    }
  }
  EFFATTN_DEVICE void add_transposed(const Left& left, SharedArray<float> right, int pitch, int depth) {
#pragma unroll
    for (int j = 0; j < kColumnsEach; ++j) {
      const Vec<float, 4> factor = right.template load<4>(column(j) * pitch + depth);
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) part_[i][j] = fmaf(left.row[i][k], factor[k], part_[i][j]);
    }
  }
  // Sums of sums: the error of a long sum grows with its number of terms.
  EFFATTN_DEVICE void flush() {
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) {
        sum_[i][j] += part_[i][j];
        part_[i][j] = 0;
      }
  }

  template <class Function>
  EFFATTN_DEVICE void each(Function function) {
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsEach; j += kRun) {
        Vec<float, kRun> run;
#pragma unroll
        for (int r = 0; r < kRun; ++r) run[r] = sum_[i][j + r];
        function(row(i), column(j), run);
#pragma unroll
        for (int r = 0; r < kRun; ++r) sum_[i][j + r] = run[r];
      }
  }

  EFFATTN_DEVICE void accumulate(float factor, const ScanTile& other) {
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) sum_[i][j] = fmaf(factor, other.sum_[i][j], sum_[i][j]);
  }
  EFFATTN_DEVICE void advance(float decay, const ScanTile& added) {
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) sum_[i][j] = fmaf(decay, sum_[i][j], sum_[i][j]) + added.sum_[i][j];
  }

 private:
  EFFATTN_DEVICE static int row(int i) {
    const int y = thread_index() / 16;
    return kRows == 64 ? y + 16 * i : y * kRowsEach + i;
  }
  EFFATTN_DEVICE static int column(int j) {
    const int x = thread_index() % 16;
    return kScores ? x + 16 * j : x * kColumnsEach + j;
  }

  float sum_[kRowsEach][kColumnsEach], part_[kRowsEach][kColumnsEach];
};

}  // namespace effattn::cuda
