// Many rows: tiles of 64 rows by 64 columns, 64 of depth at a time, for products with the packed weights W (N x K) and
// with their transpose:
//   forward    y = x W^T     rows of x, columns are channels, depth is features
//   gradient   g W           rows of g, columns are features, depth is channels
//
// 128 threads. Two stages of the left operand come by cp.async; 64 x 64 codes go through registers and are expanded
// into one tile of shared memory while the next ones are under way. The arithmetics below say how elements lie there
// and how they are multiplied.
#pragma once

#include "product_tile.h"
#include "shift_codes.h"
#include "shift_linear_output.h"

namespace effattn::cuda {

inline constexpr int kLinearTile = kProductTile, kLinearThreads = kProductThreads;

struct ShiftAndAdd {
  EFFATTN_DEVICE int32_t operator()(int32_t a, int32_t b, int32_t sum) const { return add_shifted(a, b, sum); }
};

// How the codes of eight consecutive features of one channel come to lie in shared memory, as the right operand of a
// product: for scalar products by depth, for matrix instructions by channel.
template <class T>
struct ScalarArithmetic
    : ScalarProduct<T, std::conditional_t<std::is_same_v<T, float>, FusedMultiplyAdd, ShiftAndAdd>> {
  static constexpr int kPitch = kLinearTile + 4;

  template <bool kByte, bool kGradient>
  EFFATTN_DEVICE static void expand(
      const uint32_t (&codes)[kByte ? 2 : 1], float scale, SharedArray<T> tile, int channel, int feature) {
    T weight[8];
    if constexpr (std::is_same_v<T, float>) {
      expand_codes_to_float<kByte>(codes, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) weight[i] *= scale;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        weight[i] = shift_and_sign<kByte>(kByte ? codes[i / 4 * kByte] >> i % 4 * 8 : codes[0] >> i * 4);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      tile[kGradient ? channel * kPitch + feature + i : (feature + i) * kPitch + channel] = weight[i];
  }

  template <bool kGradient>
  static constexpr bool kRightByDepth = true;
};

template <class E>
struct MatrixArithmetic : MatrixProduct<E> {
  using typename MatrixProduct<E>::Element;
  using MatrixProduct<E>::kPitch;

  template <bool kByte, bool kGradient>
  EFFATTN_DEVICE static void expand(
      const uint32_t (&codes)[kByte ? 2 : 1], float scale, SharedArray<Element> tile, int channel, int feature) {
    constexpr int kRegisters = 2 * sizeof(E);
    uint32_t weights[kRegisters];
    expand_codes<E, kByte>(codes, weights);
    if constexpr (MatrixProduct<E>::kBytes) {
      tile.template store<2>(channel * kPitch + feature / 4, Vec<uint32_t, 2>{{weights[0], weights[1]}});
    } else {
      Vec<E, 8> eight;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const E weight = {static_cast<uint16_t>(weights[i / 2] >> i % 2 * 16)};
        eight[i] = kGradient ? from_float<E>(to_float(weight) * scale) : weight;
      }
      tile.template store<8>(channel * kPitch + feature, eight);
    }
  }

  template <bool kGradient>
  static constexpr bool kRightByDepth = kGradient;  // the depth of the gradient is channels
};

template <class Arithmetic>
constexpr size_t linear_tile_shared() {
  return shared_bytes<typename Arithmetic::Element>(2 * kLinearTile * Arithmetic::kPitch) +
         shared_bytes<typename Arithmetic::Element>(kLinearTile * Arithmetic::kPitch);
}

// `left_columns` counts Elements. The gradient takes scale into the weights.
template <class Arithmetic, bool kByte, bool kGradient>
__global__ void __launch_bounds__(kLinearThreads)
    linear_tile_kernel(Planes<typename Arithmetic::Element> left, int64_t left_columns, CodeMatrix<kByte> codes,
        const float* gradient_scale, LinearOutput output, Splits splits, int64_t column_tiles) {
  using Element = typename Arithmetic::Element;
  constexpr int kPer = Arithmetic::kPerElement, kTile = kLinearTile, kTileColumns = kTile / kPer;
  constexpr int kPitch = Arithmetic::kPitch, kWords = kByte ? 2 : 1;
  SharedMemory shared;
  const auto rows = shared.array<Element>(2 * kTile * kPitch);
  const auto weights = shared.array<typename Arithmetic::Element>(kTile * Arithmetic::kPitch);

  const int64_t column = blockIdx.x % column_tiles * kTile, split = blockIdx.x / column_tiles % splits.count;
  const int64_t row = blockIdx.x / column_tiles / splits.count * kTile;
  const int64_t depth_end = kGradient ? codes.channels : codes.in_features;
  const int64_t begin = split * splits.depth, end = min(depth_end, begin + splits.depth);
  const Element* origin = left.data + row * left.row_stride;

  const auto fill = [&](int64_t depth, int stage) {
    fill_tile<kTile, kTileColumns, kLinearThreads>(rows.from(stage * kTile * kPitch), kPitch, left,
        origin + depth / kPer * left.column_stride, output.rows - row,
        min(left_columns, (end + kPer - 1) / kPer) - depth / kPer);
    cp_async_commit();
  };
  const int channel = thread_index() / 2, feature = thread_index() % 2 * 32;  // of the tile: 32 codes per thread
  Vec<uint32_t, 4> next[kWords];
  const auto load_codes = [&](int64_t depth) {
    const int64_t n = kGradient ? depth : column, k = kGradient ? column : depth;
#pragma unroll
    for (int i = 0; i < kWords; ++i) next[i] = codes.template load<4>(n + channel, k + feature + i * 32 / kWords);
  };

  Arithmetic result;
  if (begin < end) {
    fill(begin, 0);
    load_codes(begin);
  }
  int stage = 0;
  for (int64_t depth = begin; depth < end; depth += kTile, stage ^= 1) {
    float scale = 1;
    if (kGradient && gradient_scale != nullptr && depth + channel < end) scale = gradient_scale[depth + channel];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t eight[kWords];
#pragma unroll
      for (int j = 0; j < kWords; ++j) eight[j] = next[i * kWords / 4][(i * kWords + j) % 4];
      Arithmetic::template expand<kByte, kGradient>(eight, scale, weights, channel, feature + 8 * i);
    }
    if (depth + kTile < end) {
      fill(depth + kTile, stage ^ 1);
      load_codes(depth + kTile);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    sync_block();
    result.template add<Arithmetic::template kRightByDepth<kGradient>>(rows.from(stage * kTile * kPitch), weights);
    sync_block();
  }
  result.store(
      [&](int r, int c, typename Arithmetic::Accumulator sum) { output.add(split, row + r, column + c, sum); });
}

}  // namespace effattn::cuda
