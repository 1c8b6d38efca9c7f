// The micro-kernel under every tile product: C[6][NV vectors] = A[6][steps] * B[steps][NV vectors], accumulators in
// registers.
//
// Operands are arrays of 32-bit words and all strides count words. With Float32 a word is one float and a step is one
// fused multiply-add; with BFloat16Pair a word is two neighbouring bf16 along the summed index and a step is one
// vdpbf16ps, so a product over n indices takes ceil(n / 2) steps.
//   A(row, step) = a[row * a_row + step * a_step]   any strides, hence also transposed (a_row = 1)
//   B(step, column) = b[step * b_step + column]     packed by pack.h; columns padded to whole vectors
// Per step: NV vector loads, 6 broadcasts, 6 * NV multiply-adds (AVX-512: 24 for 10 loads, bound by the multipliers).
// The epilogue receives the accumulators by reference; it must touch them through compile-time indices only
// (EFFATTN_UNROLL), otherwise they are spilled and the kernel runs at half speed.
#pragma once

#include "simd.h"

namespace effattn::EFFATTN_ISA {

struct Float32 {
  using Word = float;
  static constexpr int kPerWord = 1;
  static constexpr int kExp2Degree = 5;
  using Operand = Vec;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) { return broadcast(*from); }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return load(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) { return fma(a, b, c); }
  // Row of an operand packed by pack_natural, as floats.
  static EFFATTN_INLINE Vec load_row(const Word* from, ptrdiff_t pitch, ptrdiff_t row) {
    return load(from + row * pitch);
  }
};

#if defined(__AVX512BF16__)
#define EFFATTN_HAS_BFLOAT16_DOT 1
struct BFloat16Pair {
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  static constexpr int kExp2Degree = 3;
  using Operand = __m512bh;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) {
    return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(from));
  }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, a, b); }
  static EFFATTN_INLINE Vec load_row(const Word* from, ptrdiff_t pitch, ptrdiff_t row) {
    const WordVec pair = load_as<WordVec>(from + row / 2 * pitch);
    return (Vec)((pair << (row % 2 ? 0 : 16)) & 0xffff0000u);
  }
};
#else
#define EFFATTN_HAS_BFLOAT16_DOT 0
#endif

// Sums in two interleaved chains, even and odd steps: halves the squared rounding error of a long sum. With half the
// vectors per tile it needs the same registers, and on AVX-512 the same time, for a step still has fewer loads than
// multiply-adds to wait for; narrower machines are bound by the loads.
template <class Arithmetic>
inline constexpr int kChains = Arithmetic::kPerWord == 1 && kTileVectors * kLanes == 64 ? 2 : 1;
template <class Arithmetic>
inline constexpr int kChainedVectors = kTileVectors / kChains<Arithmetic>;

// epilogue(Vec (&accumulator)[kRows][kVectors])
template <class Arithmetic, int kVectors, int kSums = 1, int kRows = kTileRows, class Epilogue>
EFFATTN_INLINE void multiply_tile(const typename Arithmetic::Word* a, ptrdiff_t a_row, ptrdiff_t a_step,
    const typename Arithmetic::Word* b, ptrdiff_t b_step, ptrdiff_t steps, Epilogue&& epilogue) {
  Vec accumulator[kRows][kVectors] = {};
  const typename Arithmetic::Word* a3 = a + 3 * a_row;
  const auto step_into = [&](Vec(&sum)[kRows][kVectors]) __attribute__((always_inline)) {
    typename Arithmetic::Operand columns[kVectors];
    EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) columns[v] = Arithmetic::load_words(b + v * kLanes);
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto row = Arithmetic::broadcast_word(r < 3 ? a + r * a_row : a3 + (r - 3) * a_row);
      EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] =
          Arithmetic::multiply_add(row, columns[v], sum[r][v]);
    }
    a += a_step;
    a3 += a_step;
    b += b_step;
  };
  if constexpr (kSums == 2) {
    Vec odd[kRows][kVectors] = {};
#pragma GCC unroll 1
    for (; steps >= 2; steps -= 2) {
      step_into(accumulator);
      step_into(odd);
    }
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) accumulator[r][v] += odd[r][v];
    }
  }
#pragma GCC unroll 1
  for (; steps > 0; --steps) step_into(accumulator);
  epilogue(accumulator);
}

// Calls body(integral_constant-like<NV>, first_column) for column tiles that cover `vectors` vectors: full tiles, then
// one narrower remainder.
template <int kCount>
struct VectorCount {
  static constexpr int value = kCount;
};

template <class Body>
EFFATTN_INLINE void for_each_column_tile(int64_t vectors, Body&& body) {
  int64_t v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors) body(VectorCount<kTileVectors>{}, v * kLanes);
  const int64_t rest = vectors - v;
  if (rest == 1) body(VectorCount<1>{}, v * kLanes);
  if constexpr (kTileVectors > 2) {
    if (rest == 2) body(VectorCount<2>{}, v * kLanes);
    if (rest == 3) body(VectorCount<3>{}, v * kLanes);
  }
}

}  // namespace effattn::EFFATTN_ISA
