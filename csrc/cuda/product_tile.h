// Products of two 64 x 64 tiles in shared memory, by 128 threads: what stands between shared memory and the sums in
// registers.
#pragma once

#include <type_traits>

#include "device.h"

namespace effattn::cuda {

inline constexpr int kProductTile = 64, kProductThreads = 128;

EFFATTN_DEVICE int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
EFFATTN_DEVICE float add(float a, float b) { return a + b; }
EFFATTN_DEVICE int32_t add(int32_t a, int32_t b) { return wrapping_add(a, b); }

// By FMA, or by what MultiplyAdd does. Left lies as (row, depth), right as (depth, column); a thread has rows y + 8 i
// and columns 4 x...
struct FusedMultiplyAdd {
  EFFATTN_DEVICE float operator()(float a, float b, float sum) const { return fmaf(a, b, sum); }
};

template <class T, class MultiplyAdd = FusedMultiplyAdd>
struct ScalarProduct {
  using Element = T;
  using Accumulator = T;
  static constexpr int kPerElement = 1, kPitch = kProductTile + 4;

  T sum[8][4] = {};

  template <bool kRightByDepth = true>
  EFFATTN_DEVICE void add(SharedArray<T> left, SharedArray<T> right) {
    const int y = thread_index() / 16, x = thread_index() % 16;
    T part[8][4] = {};  // sums of sums: the error of a long sum grows with its number of terms
#pragma unroll 2
    for (int depth = 0; depth < kProductTile; depth += 4) {
      Vec<T, 4> factor[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) factor[k] = right.template load<4>((depth + k) * kPitch + 4 * x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Vec<T, 4> element = left.template load<4>((y + 8 * i) * kPitch + depth);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int j = 0; j < 4; ++j) part[i][j] = MultiplyAdd()(element[k], factor[k][j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = cuda::add(sum[i][j], part[i][j]);
  }

  // store(row, column, sum)
  template <class Store>
  EFFATTN_DEVICE void store(Store store) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) store(thread_index() / 16 + 8 * i, thread_index() % 16 * 4 + j, sum[i][j]);
  }
};

// By matrix instructions: bf16 and fp16 accumulated in fp32, signed bytes in int32, four of which make an Element. Left
// lies as (row, depth), right as (depth, column) or as (column, depth), bytes only so. Warp w has rows 16 w.., eight
// fragments of 8 columns.
template <class E>
struct MatrixProduct {
  static constexpr bool kBytes = std::is_same_v<E, int8_t>;
  using Element = std::conditional_t<kBytes, uint32_t, E>;
  using Accumulator = std::conditional_t<kBytes, int32_t, float>;
  static constexpr int kPerElement = kBytes ? 4 : 1;
  static constexpr int kPitch = kProductTile / kPerElement + 16 / sizeof(Element);  // 16 bytes off: different banks

  Accumulator sum[8][4] = {};

  template <bool kRightByDepth>
  EFFATTN_DEVICE void add(SharedArray<Element> left, SharedArray<Element> right) {
    const int lane = lane_index(), row = warp_index() * 16;
    if constexpr (kBytes) {
      static_assert(!kRightByDepth);
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int at = step * 8 + t;
        const uint32_t a[4] = {left[(row + g) * kPitch + at], left[(row + g + 8) * kPitch + at],
            left[(row + g) * kPitch + at + 4], left[(row + g + 8) * kPitch + at + 4]};
#pragma unroll
        for (int fragment = 0; fragment < 8; ++fragment) {
          const uint32_t b[2] = {right[(fragment * 8 + g) * kPitch + at], right[(fragment * 8 + g) * kPitch + at + 4]};
          mma_m16n8k32(sum[fragment], a, b);
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < kProductTile; step += 16) {
        uint32_t a[4];
        ldmatrix_x4(a, left, (row + lane % 16) * kPitch + step + lane / 16 * 8);
#pragma unroll
        for (int fragment = 0; fragment < 8; fragment += 2) {
          uint32_t b[4];
          if constexpr (kRightByDepth)
            ldmatrix_x4_trans(b, right, (step + lane % 16) * kPitch + fragment * 8 + lane / 16 * 8);
          else
            ldmatrix_x4(b, right, (fragment * 8 + lane / 16 * 8 + lane % 8) * kPitch + step + lane / 8 % 2 * 8);
          const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
          mma_m16n8k16<E>(sum[fragment], a, first);
          mma_m16n8k16<E>(sum[fragment + 1], a, second);
        }
      }
    }
  }

  template <class Store>
  EFFATTN_DEVICE void store(Store store) const {
#pragma unroll
    for (int fragment = 0; fragment < 8; ++fragment)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store(warp_index() * 16 + lane_index() / 4 + i / 2 * 8, fragment * 8 + lane_index() % 4 * 2 + i % 2,
            sum[fragment][i]);
  }
};

// Products of tensors of T in T's own precision.
template <class T>
using ProductOf = std::conditional_t<std::is_same_v<T, float>, ScalarProduct<float>, MatrixProduct<T>>;

}  // namespace effattn::cuda
