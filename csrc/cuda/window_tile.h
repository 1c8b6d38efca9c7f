// Rows of D elements in shared memory and in fragments of the matrix instructions, D a multiple of 8: depths are
// counted in blocks of 8, two of them a m16n8k16 and a last odd one a m16n8k8, so that no product is padded beyond 8.
#pragma once

#include "tile.h"

namespace effattn::cuda {

// Elements from row to row: 16-byte pieces of eight neighbouring rows lie in different banks if their number is odd.
template <int D>
inline constexpr int kPitchOf = D / 8 % 2 ? D : D + 8;

// ---- Between global and shared memory

// The rows of one (b, h); strides in elements, any of them may be 0.
template <class T>
struct TokenRows {
  T* data;
  int64_t row_stride, column_stride;
  int columns;
  int unit;  // elements that can be moved at once: 8, 2 or 1
};

// A tensor (B, H, N, columns).
template <class T>
struct TokenTensor {
  T* data;
  int64_t batch_stride, head_stride, row_stride, column_stride;
  int columns, unit;

  EFFATTN_DEVICE TokenRows<T> at(int64_t batch, int64_t head) const {
    return {data + batch * batch_stride + head * head_stride, row_stride, column_stride, columns, unit};
  }
};

template <class T>
TokenTensor<T> token_tensor(const Tensor& tensor) {
  int unit = 8;
  const auto divides = [&](int64_t value) {
    while (value % unit) unit = unit == 8 ? 2 : 1;
  };
  divides(static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) / sizeof(T)));
  divides(tensor.size[3]);
  for (int d = 0; d < 3; ++d)
    if (tensor.size[d] > 1) divides(tensor.stride[d]);
  if (tensor.size[3] > 1 && tensor.stride[3] != 1) unit = 1;
  return {static_cast<T*>(tensor.data), tensor.stride[0], tensor.stride[1], tensor.stride[2], tensor.stride[3],
      static_cast<int>(tensor.size[3]), unit};
}

// function(row, block) for every 8 elements of `rows` rows, dealt out to `threads` threads.
template <int D, class Function>
EFFATTN_DEVICE void each_block(int rows, int thread, int threads, Function function) {
#pragma unroll 1
  for (int i = thread; i < rows * (D / 8); i += threads) function(i / (D / 8), i % (D / 8));
}

// Two neighbouring elements of a token's row from an even column on; zeros if it is negative, and past the last column.
template <class T>
EFFATTN_DEVICE Vec<T, 2> load_pair(const TokenRows<T>& rows, int token, int column) {
  Vec<T, 2> pair = {};
  if (token < 0 || column >= rows.columns) return pair;
  const T* from = rows.data + token * rows.row_stride + column * rows.column_stride;
  if (rows.unit > 1) return load_global<2>(from);
  pair[0] = from[0];
  if (column + 1 < rows.columns) pair[1] = from[rows.column_stride];
  return pair;
}

// Eight such elements to tile[at..], by asynchronous
// copy or by store: the caller commits, waits and synchronises.
template <class T>
EFFATTN_DEVICE void load_block(SharedArray<T> tile, int at, const TokenRows<T>& rows, int token, int block) {
  if (rows.unit == 8) {
    const bool there = token >= 0 && block * 8 < rows.columns;
    cp_async16(tile, at, there ? rows.data + token * rows.row_stride + block * 8 : rows.data, there);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; i += 2) tile.store(at + i, load_pair(rows, token, block * 8 + i));
}

// The other way, where there is a token.
template <class T>
EFFATTN_DEVICE void store_block(const TokenRows<T>& rows, int token, int block, SharedArray<T> tile, int at) {
  if (token < 0 || block * 8 >= rows.columns) return;
  T* to = rows.data + token * rows.row_stride;
  if (rows.unit == 8) {
    store_global(to + block * 8, tile.template load<8>(at));
    return;
  }
#pragma unroll 1
  for (int column = block * 8; column < min(rows.columns, block * 8 + 8); ++column)
    to[column * rows.column_stride] = tile[at + column % 8];
}

// Calls function.operator()<D>() with the columns rounded up to 16, 24 .. 64.
template <class Function>
void with_columns(int64_t columns, Function function) {
  if (columns <= 16) return function.template operator()<16>();
  if (columns <= 24) return function.template operator()<24>();
  if (columns <= 32) return function.template operator()<32>();
  if (columns <= 40) return function.template operator()<40>();
  if (columns <= 48) return function.template operator()<48>();
  if (columns <= 56) return function.template operator()<56>();
  return function.template operator()<64>();
}

// ---- Fragments
// A left factor of 16 rows has two registers a block of depth (rows g and g + 8), a right factor of 8 columns one. Sums
// are four, as device.h says; rounded to T they are a block of a left factor as they lie. nvcc 12.4 crashes at a local
// Left<n> where n is a constant of the function: such arrays are written out.

template <int kBlocks>
using Left = uint32_t[kBlocks][2];
template <int kBlocks>
using Right = uint32_t[kBlocks];

// 16 rows from `row` on of a tile that lies as (row, depth).
template <class T, int kBlocks>
EFFATTN_DEVICE void load_left(Left<kBlocks>& left, SharedArray<T> tile, int pitch, int row) {
  const int lane = lane_index();
#pragma unroll
  for (int block = 0; block < kBlocks; block += 2) {
    uint32_t r[4];
    const int at = block + lane / 16 < kBlocks ? block + lane / 16 : kBlocks - 1;
    ldmatrix_x4(r, tile, (row + lane % 16) * pitch + at * 8);
    left[block][0] = r[0];
    left[block][1] = r[1];
    if (block + 1 < kBlocks) {
      left[block + 1][0] = r[2];
      left[block + 1][1] = r[3];
    }
  }
}

// 8 rows from `row` on, kBlocks blocks of each: right[i] of a product over the columns, whose columns are these rows.
// Transposed: right[i] is a block of depth, these rows, of the 8 columns of block i.
template <bool kTransposed, class T, int kBlocks>
EFFATTN_DEVICE void load_right(Right<kBlocks>& right, SharedArray<T> tile, int pitch, int row) {
  const int lane = lane_index();
#pragma unroll
  for (int block = 0; block < kBlocks; block += 4) {
    const int at = block + lane / 8 < kBlocks ? block + lane / 8 : kBlocks - 1;
    const int from = (row + lane % 8) * pitch + at * 8;
    uint32_t r[4];
    if constexpr (kTransposed)
      ldmatrix_x4_trans(r, tile, from);
    else
      ldmatrix_x4(r, tile, from);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (block + i < kBlocks) right[block + i] = r[i];
  }
}

// sum += left right over all blocks of depth.
template <class T, int kBlocks>
EFFATTN_DEVICE void multiply(float (&sum)[4], const Left<kBlocks>& left, const Right<kBlocks>& right) {
#pragma unroll
  for (int block = 0; block + 1 < kBlocks; block += 2)
    mma_m16n8k16<T>(sum, {left[block][0], left[block][1], left[block + 1][0], left[block + 1][1]},
        {right[block], right[block + 1]});
  if constexpr (kBlocks % 2) mma_m16n8k8<T>(sum, {left[kBlocks - 1][0], left[kBlocks - 1][1]}, {right[kBlocks - 1]});
}

// sum[c] += left right for two blocks of depth, or one, and the 8 columns of every block c of the right factor.
template <class T, int kColumns>
EFFATTN_DEVICE void multiply_two(
    float (&sum)[kColumns][4], const Left<2>& left, const Right<kColumns>& first, const Right<kColumns>& second) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    mma_m16n8k16<T>(sum[c], {left[0][0], left[0][1], left[1][0], left[1][1]}, {first[c], second[c]});
}
template <class T, int kColumns>
EFFATTN_DEVICE void multiply_one(float (&sum)[kColumns][4], const uint32_t (&left)[2], const Right<kColumns>& right) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) mma_m16n8k8<T>(sum[c], left, {right[c]});
}

// Four sums rounded: a block of a left factor.
template <class T>
EFFATTN_DEVICE void pack_left(uint32_t (&left)[2], const float (&sum)[4]) {
  left[0] = pack2<T>(sum[0], sum[1]);
  left[1] = pack2<T>(sum[2], sum[3]);
}

}  // namespace effattn::cuda
