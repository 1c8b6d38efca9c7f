// Steps that shift_add_attention.cu and shift_add_attention_backward.cu share: binary rows and their statistics,
// products of a tile of tokens with a D x D matrix, the depthwise convolution over tokens.
//
// A block of 8 warps has a tile of 32 tokens: D <= 256 floats of each in shared memory, and 64 x 64 of the matrix,
// which stay there from tile to tile if D <= 64.
#pragma once

#include "tile.h"

namespace effattn::cuda {

inline constexpr int kTokens = 32, kAttentionThreads = 256, kTokensPerWarp = kTokens * kWarp / kAttentionThreads;
inline constexpr int kMatrixTile = 64, kMatrixPitch = kMatrixTile + 4;
inline constexpr float kInversePi = 0.31830988618379067f;

// Tokens of one (b, h) by D.
struct Extent {
  int64_t tokens;
  int size, words;  // D, and words of D bits
  int64_t tiles_per_plane, tiles_per_block, blocks_per_plane;
  int row_pitch;  // of a token's floats in shared memory

  size_t rows_bytes() const { return shared_bytes<float>(kTokens * row_pitch); }
  size_t matrix_bytes() const { return shared_bytes<float>(kMatrixTile * kMatrixPitch); }
  size_t words_bytes() const { return shared_bytes<uint32_t>(kTokens * words); }
};

inline Extent extent_of(const Tensor& tensor) {
  Extent e = {};
  e.tokens = tensor.size[2];
  e.size = static_cast<int>(tensor.size[3]);
  e.words = (e.size + 31) / 32;
  e.tiles_per_plane = ceil_div(e.tokens, kTokens);
  const int64_t planes = tensor.size[0] * tensor.size[1], each = planes * e.tiles_per_plane / (2 * kEnoughBlocks);
  e.tiles_per_block = each < 1 ? 1 : each > 8 ? 8 : each;
  e.blocks_per_plane = ceil_div(e.tiles_per_plane, e.tiles_per_block);
  e.row_pitch = (e.size + kMatrixTile - 1) / kMatrixTile * kMatrixTile + 4;
  return e;
}

// scale * 1[x^ > threshold], or +-1: what a statistics row says of the query (0) or the key (2).
struct BinaryRows {
  const uint32_t* words;  // (planes, tokens, words)
  float scale, off;       // a bit b stands for scale * (b ? 1 : off)
};

// ---- Rows to bits
// --------------------------------------------------------------------------------------------------------

inline constexpr int kRowsPerBlock = 128;  // 8 warps, a row each at a time

// bits = x^ > threshold[4 plane] (0 without `threshold`: then x^ need not be known), if `words`.
// partial[block] = the sum of x^, or of |x^|, over the block's rows, if `partial`.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) binarize_rows(Planes<T> input, int64_t tokens, int size,
    int64_t blocks_per_plane, const float* threshold, uint32_t* words, double* partial, bool absolute) {
  SharedMemory shared;
  const SharedArray<double> sums = shared.array<double>(kAttentionThreads / kWarp);
  const int64_t plane = blockIdx.x / blocks_per_plane, first = blockIdx.x % blocks_per_plane * kRowsPerBlock;
  const T* rows = input.plane(plane);
  const int words_per_row = (size + 31) / 32;
  double sum = 0;
#pragma unroll 2
  for (int i = warp_index(); i < kRowsPerBlock; i += kAttentionThreads / kWarp) {
    const int64_t token = first + i;
    const bool valid = token < tokens;
    const T* row = rows + token * input.row_stride;
    float squares = 0, values = 0;
    if (partial != nullptr || threshold != nullptr) {
      for (int d = lane_index(); d < size && valid; d += kWarp) {
        const float x = to_float(row[d * input.column_stride]);
        squares += x * x;
        values += absolute ? fabsf(x) : x;
      }
      squares = warp_reduce(squares, Sum());
      values = warp_reduce(values, Sum());
    }
    const float inverse = squares > 0 ? 1 / sqrtf(squares) : 0.0f;
    sum += values * inverse;
    if (words != nullptr) {
      const float limit = threshold != nullptr ? threshold[4 * plane] : 0.0f;
      const float factor = threshold != nullptr ? inverse : 1.0f;
      for (int word = 0; word < words_per_row; ++word) {
        const int d = word * 32 + lane_index();
        const bool inside = valid && d < size;
        const uint32_t bits =
            warp_ballot(inside && to_float(inside ? row[d * input.column_stride] : T{}) * factor > limit);
        if (valid && lane_index() == 0) words[(plane * tokens + token) * words_per_row + word] = bits;
      }
    }
  }
  if (partial == nullptr) return;
  if (lane_index() == 0) sums[warp_index()] = sum;  // the same in all lanes
  sync_block();
  if (thread_index() != 0) return;
  double total = 0;
  for (int warp = 0; warp < kAttentionThreads / kWarp; ++warp) {
    const double next = sums[warp];
    total += next;
  }
  partial[blockIdx.x] = total;
}

template <class T>
void launch_binarize(
    const Tensor& input, const float* threshold, uint32_t* words, double* partial, bool absolute, cudaStream_t stream) {
  const int64_t blocks_per_plane = ceil_div(input.size[2], kRowsPerBlock);
  launch(binarize_rows<T>, dim3(static_cast<unsigned>(input.size[0] * input.size[1] * blocks_per_plane)),
      dim3(kAttentionThreads), shared_bytes<double>(kAttentionThreads / kWarp), stream, planes_of<T>(input),
      input.size[2], static_cast<int>(input.size[3]), blocks_per_plane, threshold, words, partial, absolute);
}

// ---- Tiles of tokens
// -----------------------------------------------------------------------------------------------------

// 64 x 64 pieces of a contiguous D x D matrix, one at a time in shared memory.
class MatrixPieces {
 public:
  EFFATTN_DEVICE MatrixPieces(SharedArray<float> tile, const float* matrix, int size)
      : tile_(tile),
        from_{matrix, 1, 0, 0, size, 1, size % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0},
        size_(size) {}

  // Brings M[row.., column..]; all threads are done with the last piece when it comes.
  EFFATTN_DEVICE void bring(int row, int column) {
    if (there_ && size_ <= kMatrixTile) return;
    sync_block();
    fill_tile<kMatrixTile, kMatrixTile, kAttentionThreads>(
        tile_, kMatrixPitch, from_, from_.data + row * size_ + column, size_ - row, size_ - column);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    there_ = true;
  }
  EFFATTN_DEVICE Vec<float, 4> four(int row, int column) const { return tile_.load<4>(row * kMatrixPitch + column); }
  EFFATTN_DEVICE int size() const { return size_; }

 private:
  SharedArray<float> tile_;
  Planes<float> from_;
  int size_;
  bool there_ = false;
};

// The bits of a tile of tokens; rows past the last token are 0.
EFFATTN_DEVICE void load_words(SharedArray<uint32_t> tile, const uint32_t* words, int64_t token, const Extent& extent) {
  for (int i = thread_index(); i < kTokens * extent.words; i += kAttentionThreads)
    tile[i] = token + i / extent.words < extent.tokens ? words[token * extent.words + i] : 0;
}

// store(r, c, sum_i (bit i of token r ? 1 : off) M[i, c]) for all tokens of the tile and columns below D.
template <class Store>
EFFATTN_DEVICE void bits_times_matrix(
    SharedArray<uint32_t> words, int words_per_row, float off, MatrixPieces& matrix, Store store) {
  const int y = thread_index() / 16, x = thread_index() % 16 * 4;  // tokens y, y + 16, columns x..
  for (int column = 0; column < matrix.size(); column += kMatrixTile) {
    float sum[2][4] = {};
    for (int row = 0; row < matrix.size(); row += kMatrixTile) {
      matrix.bring(row, column);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int word = row / 32 + half;
        if (word >= words_per_row) break;
        const uint32_t bits[2] = {words[y * words_per_row + word], words[(y + 16) * words_per_row + word]};
#pragma unroll 8
        for (int k = 0; k < 32; ++k) {
          const Vec<float, 4> value = matrix.four(half * 32 + k, x);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float factor = bits[r] >> k & 1 ? 1.0f : off;
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[r][j] = fmaf(factor, value[j], sum[r][j]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (column + x + j < matrix.size()) store(y + 16 * r, column + x + j, sum[r][j]);
  }
}

// store(r, i, sum_d X[r, d] M[i, d]), X the tile's floats, zero from D on.
template <class Store>
EFFATTN_DEVICE void rows_times_transposed(SharedArray<float> rows, int pitch, MatrixPieces& matrix, Store store) {
  const int y = thread_index() / 16, x = thread_index() % 16;  // tokens y, y + 16, columns x + 16 j
  for (int column = 0; column < matrix.size(); column += kMatrixTile) {
    float sum[2][4] = {};
    for (int depth = 0; depth < matrix.size(); depth += kMatrixTile) {
      matrix.bring(column, depth);
#pragma unroll 4
      for (int d = 0; d < kMatrixTile; d += 4) {
        const Vec<float, 4> left[2] = {rows.load<4>(y * pitch + depth + d), rows.load<4>((y + 16) * pitch + depth + d)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Vec<float, 4> right = matrix.four(x + 16 * j, d);
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[r][j] = fmaf(left[r][k], right[k], sum[r][j]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (column + x + 16 * j < matrix.size()) store(y + 16 * r, column + x + 16 * j, sum[r][j]);
  }
}

// Four tokens of the convolution of one column: sum_t w[t] X[token + i + t - taps / 2], or its transpose.
template <bool kTransposed, class T>
EFFATTN_DEVICE void convolve(const T* column, int64_t stride, int64_t tokens, int64_t token, const float* weight,
    int64_t taps, float (&sum)[kTokensPerWarp]) {
  for (int64_t s = 0; s < taps + kTokensPerWarp - 1; ++s) {
    const int64_t at = token + s - taps / 2;
    if (at < 0 || at >= tokens) continue;
    const float x = to_float(column[at * stride]);
#pragma unroll
    for (int i = 0; i < kTokensPerWarp; ++i) {
      const int64_t t = s - i;
      if (t >= 0 && t < taps) sum[i] = fmaf(weight[kTransposed ? taps - 1 - t : t], x, sum[i]);
    }
  }
}

}  // namespace effattn::cuda
