// Few rows: the weights are read once, from global memory straight into registers, and everything else waits for them.
//
// A block owns a few output channels; its 8 warps share out the input features in slices and their sums meet in shared
// memory, in the order of the warps.
//   bf16, fp16, int8: 16 channels by 8, 16 or 32 rows, slices of 128 features. The transposed product y^T = W x^T: the
//     weights are the 16 x k operand of mma, which codes expand into, the rows its 8 columns. Which feature stands for
//     which k of an instruction is free, so a lane takes 32 consecutive features: 16 bytes of codes of two channels,
//     and its own activations, with no exchange between lanes. The next slice's codes are under way meanwhile.
//   fp32: 4 channels by 1, 2 or 4 rows, slices of 256 features, 8 consecutive ones per lane, products by FMA.
#pragma once

#include "shift_codes.h"
#include "shift_linear_output.h"

namespace effattn::cuda {

inline constexpr int kStreamWarps = 8;
inline constexpr int kMatrixChannels = 16, kMatrixSlice = 128;
inline constexpr int kVectorChannels = 4, kVectorSlice = 256;

// Rows of `pitch` elements, aligned to 16 bytes, zero or absent from `columns` (a multiple of 8) on.
template <class E>
struct AlignedRows {
  const E* data;
  int64_t pitch, rows, columns;

  // Eight elements, as registers.
  EFFATTN_DEVICE void load8(int64_t row, int64_t column, uint32_t (&to)[static_cast<int>(2 * sizeof(E))]) const {
    constexpr int kWords = 2 * sizeof(E), kAtOnce = kWords < 4 ? kWords : 4;
    const bool valid = row < rows && column < columns;
#pragma unroll
    for (int i = 0; i < kWords; i += kAtOnce) {
      Vec<uint32_t, kAtOnce> words = {};
      if (valid) words = load_global<kAtOnce>(reinterpret_cast<const uint32_t*>(data + row * pitch + column) + i);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) to[i + j] = words[j];
    }
  }
};

// The block's sums meet: every warp brings Columns x Rows values, the result goes to output.add(column, row, sum).
template <class Accumulator, int kValues, class Store>
EFFATTN_DEVICE void add_warps(SharedArray<Accumulator> sums, Store store) {
  sync_block();
  for (int i = thread_index(); i < kValues; i += kStreamWarps * kWarp) {
    Accumulator sum = 0;
    for (int warp = 0; warp < kStreamWarps; ++warp) {
      const Accumulator next = sums[warp * kValues + i];
      sum += next;
    }
    store(i, sum);
  }
}

template <class E>
using AccumulatorOf = std::conditional_t<std::is_same_v<E, int8_t>, int32_t, float>;

template <class E, bool kByte>
struct MatrixSlice {  // codes of the lane's 32 features of two channels
  static constexpr int kLoads = kByte ? 2 : 1;
  Vec<uint32_t, 4> words[2][kLoads];

  EFFATTN_DEVICE void load(const CodeMatrix<kByte>& codes, int64_t channel, int64_t feature) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kLoads; ++j) words[i][j] = codes.template load<4>(channel + 8 * i, feature + j * 32 / kLoads);
  }

  // Weights 8 i.. of the first or second channel.
  EFFATTN_DEVICE void expand(int channel, int i, uint32_t (&weights)[static_cast<int>(2 * sizeof(E))]) const {
    uint32_t eight[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) eight[j] = words[channel][i * kLoads / 4][(i * kLoads + j) % 4];
    expand_codes<E, kByte>(eight, weights);
  }
};

template <class E, bool kByte, int kFragments>  // 8 kFragments rows
__global__ void __launch_bounds__(kStreamWarps* kWarp, kFragments <= 2 ? 2 : 1) stream_matrix_kernel(
    CodeMatrix<kByte> codes, AlignedRows<E> input, LinearOutput output, Splits splits, int64_t row_tiles) {
  using Accumulator = AccumulatorOf<E>;
  constexpr int kRows = 8 * kFragments, kRegisters = 2 * sizeof(E);
  SharedMemory shared;
  const SharedArray<Accumulator> sums = shared.array<Accumulator>(kStreamWarps * kMatrixChannels * kRows);

  const int64_t row = blockIdx.x % row_tiles * kRows, split = blockIdx.x / row_tiles % splits.count;
  const int64_t channel = blockIdx.x / row_tiles / splits.count * kMatrixChannels;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t begin = split * splits.depth, end = min(codes.in_features, begin + splits.depth);

  Accumulator sum[kFragments][4] = {};
  MatrixSlice<E, kByte> slice, next;
  int64_t feature = begin + warp_index() * kMatrixSlice;
  if (feature < end) next.load(codes, channel + g, feature + 32 * t);
  for (; feature < end; feature += kStreamWarps * kMatrixSlice) {
    slice = next;
    const int64_t following = feature + kStreamWarps * kMatrixSlice;
    if (following < end) next.load(codes, channel + g, following + 32 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t top[kRegisters], bottom[kRegisters];
      slice.expand(0, i, top);
      slice.expand(1, i, bottom);
#pragma unroll
      for (int fragment = 0; fragment < kFragments; ++fragment) {
        uint32_t x[kRegisters];
        input.load8(row + 8 * fragment + g, feature + 32 * t + 8 * i, x);
#pragma unroll
        for (int k = 0; k < kRegisters; k += 2) {
          const uint32_t a[4] = {top[k], bottom[k], top[k + 1], bottom[k + 1]}, b[2] = {x[k], x[k + 1]};
          if constexpr (std::is_same_v<E, int8_t>)
            mma_m16n8k32(sum[fragment], a, b);
          else
            mma_m16n8k16<E>(sum[fragment], a, b);
        }
      }
    }
  }

#pragma unroll
  for (int fragment = 0; fragment < kFragments; ++fragment)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(warp_index() * kRows + 8 * fragment + 2 * t + i % 2) * kMatrixChannels + g + i / 2 * 8] = sum[fragment][i];
  add_warps<Accumulator, kMatrixChannels * kRows>(sums, [&](int i, Accumulator total) {
    output.add(split, row + i / kMatrixChannels, channel + i % kMatrixChannels, total);
  });
}

template <bool kByte, int kRows>
__global__ void __launch_bounds__(kStreamWarps* kWarp, kRows <= 2 ? 2 : 1) stream_vector_kernel(
    CodeMatrix<kByte> codes, AlignedRows<float> input, LinearOutput output, Splits splits, int64_t row_tiles) {
  constexpr int kWords = kByte ? 2 : 1;
  SharedMemory shared;
  const SharedArray<float> sums = shared.array<float>(kStreamWarps * kVectorChannels * kRows);

  const int64_t row = blockIdx.x % row_tiles * kRows, split = blockIdx.x / row_tiles % splits.count;
  const int64_t channel = blockIdx.x / row_tiles / splits.count * kVectorChannels;
  const int64_t begin = split * splits.depth, end = min(codes.in_features, begin + splits.depth);

  float sum[kRows][kVectorChannels] = {};
  int64_t slice = begin + warp_index() * kVectorSlice;
#pragma unroll 2
  for (; slice < end; slice += kStreamWarps * kVectorSlice) {
    const int64_t feature = slice + 8 * lane_index();
    Vec<uint32_t, kWords> words[kVectorChannels];
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) words[c] = codes.template load<kWords>(channel + c, feature);
    uint32_t x[kRows][8];
#pragma unroll
    for (int r = 0; r < kRows; ++r) input.load8(row + r, feature, x[r]);
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) {
      float weight[8];
      expand_codes_to_float<kByte>(words[c].value, weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[r][c] = fmaf(float_of(x[r][i]), weight[i], sum[r][c]);
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) {
      const float total = warp_reduce(sum[r][c], Sum());
      if (lane_index() == 0) sums[(warp_index() * kRows + r) * kVectorChannels + c] = total;
    }
  add_warps<float, kVectorChannels * kRows>(sums,
      [&](int i, float total) { output.add(split, row + i / kVectorChannels, channel + i % kVectorChannels, total); });
}

}  // namespace effattn::cuda
