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
  using Element = float;
  static constexpr DType kType = DType::kFloat32;
  static constexpr int kPerWord = 1;
  static constexpr int kExp2Degree = 5;
  using Operand = Vec;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) { return broadcast(*from); }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return load(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) { return fma(a, b, c); }
#if defined(__AVX512F__)
  static EFFATTN_INLINE __m256 multiply_add_half(Operand a, const Word* b, __m256 c) {
    return _mm512_castps512_ps256((__m512)a) * _mm256_loadu_ps(b) + c;
  }
#endif
  // kLanes words of elements that lie side by side; those past the first `count` elements read as 0.
  static EFFATTN_INLINE WordVec load_elements(const Element* from) { return load_as<WordVec>(from); }
  static EFFATTN_INLINE WordVec load_elements(const Element* from, int64_t count) {
    return (WordVec)load_partial(from, count);
  }
};

#if defined(__AVX512BF16__)
#define EFFATTN_HAS_BFLOAT16_DOT 1
struct BFloat16Pair {
  using Word = uint32_t;
  using Element = uint16_t;
  static constexpr DType kType = DType::kBFloat16;
  static constexpr int kPerWord = 2;
  static constexpr int kExp2Degree = 3;
  using Operand = __m512bh;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) {
    return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(from));
  }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, a, b); }
  static EFFATTN_INLINE __m256 multiply_add_half(Operand a, const Word* b, __m256 c) {
    return _mm256_dpbf16_ps(c, (__m256bh)_mm512_castsi512_si256((__m512i)a),
        (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static EFFATTN_INLINE void unpack(const Word* from, float* even, float* odd) {
    const WordVec pair = load_as<WordVec>(from);
    store(even, (Vec)(pair << 16));
    store(odd, (Vec)(pair & 0xffff0000u));
  }
  static EFFATTN_INLINE WordVec load_elements(const Element* from) { return load_as<WordVec>(from); }
  static EFFATTN_INLINE WordVec load_elements(const Element* from, int64_t count) {
    return (WordVec)_mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1, from);
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

// Whether the last of the vectors that hold `columns` columns can be computed in half a register. Only where a register
// is so wide that its empty half costs something.
EFFATTN_INLINE constexpr bool half_tail(int64_t columns) {
  return kLanes == 16 && columns % kLanes > 0 && columns % kLanes <= kLanes / 2;
}

// Accumulators of one row group; the last vector of a half tail is in half a register.
template <int kRows, int kVectors, bool kHalfTail>
struct Sums {
  static constexpr int kFull = kVectors - kHalfTail;
  Vec full[kRows][kFull > 0 ? kFull : 1] = {};
#if defined(__AVX512F__)
  __m256 tail[kRows] = {};
#endif

  template <class Arithmetic>
  EFFATTN_INLINE void step(const typename Arithmetic::Word* a, const typename Arithmetic::Word* a3, ptrdiff_t a_row,
      const typename Arithmetic::Word* b) {
    typename Arithmetic::Operand columns[kFull > 0 ? kFull : 1];
    EFFATTN_UNROLL for (int v = 0; v < kFull; ++v) columns[v] = Arithmetic::load_words(b + v * kLanes);
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto row = Arithmetic::broadcast_word(r < 3 ? a + r * a_row : a3 + (r - 3) * a_row);
      EFFATTN_UNROLL for (int v = 0; v < kFull; ++v) full[r][v] = Arithmetic::multiply_add(row, columns[v], full[r][v]);
#if defined(__AVX512F__)
      if constexpr (kHalfTail) tail[r] = Arithmetic::multiply_add_half(row, b + kFull * kLanes, tail[r]);
#endif
    }
  }

  EFFATTN_INLINE Vec get(int r, int v) const {
#if defined(__AVX512F__)
    if (kHalfTail && v == kFull) return (Vec)_mm512_zextps256_ps512(tail[r]);
#endif
    return full[r][v];
  }
};

// epilogue(Vec (&accumulator)[kRows][kVectors]). With kHalfTail the upper half of the last vector is not computed: 0.
template <class Arithmetic, int kVectors, int kSums = 1, int kRows = kTileRows, bool kHalfTail = false, class Epilogue>
EFFATTN_INLINE void multiply_tile(const typename Arithmetic::Word* a, ptrdiff_t a_row, ptrdiff_t a_step,
    const typename Arithmetic::Word* b, ptrdiff_t b_step, ptrdiff_t steps, Epilogue&& epilogue) {
  Sums<kRows, kVectors, kHalfTail> sums;
  const typename Arithmetic::Word* a3 = a + 3 * a_row;
  const auto step_into = [&](auto& into) __attribute__((always_inline)) {
    into.template step<Arithmetic>(a, a3, a_row, b);
    a += a_step;
    a3 += a_step;
    b += b_step;
  };
  Vec accumulator[kRows][kVectors];
  if constexpr (kSums == 2) {
    Sums<kRows, kVectors, kHalfTail> odd;
#pragma GCC unroll 1
    for (; steps >= 2; steps -= 2) {
      step_into(sums);
      step_into(odd);
    }
    if (steps > 0) step_into(sums);
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) accumulator[r][v] = sums.get(r, v) + odd.get(r, v);
    }
  } else {
#pragma GCC unroll 1
    for (; steps > 0; --steps) step_into(sums);
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) accumulator[r][v] = sums.get(r, v);
    }
  }
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

// The same with a half tail where there is one: body(VectorCount<NV>, VectorCount<0 or 1: half tail>, first column).
template <class Body>
EFFATTN_INLINE void for_each_half_tile(int64_t columns, Body&& body) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes, whole = vectors - half_tail(columns);
  int64_t v = 0;
  for (; v + kTileVectors <= whole; v += kTileVectors) body(VectorCount<kTileVectors>{}, VectorCount<0>{}, v * kLanes);
  const int64_t rest = vectors - v;
  const auto last = [&](auto count) __attribute__((always_inline)) {
    if (rest != count.value) return;
    if constexpr (kLanes == 16)
      if (half_tail(columns)) return body(count, VectorCount<1>{}, v * kLanes);
    body(count, VectorCount<0>{}, v * kLanes);
  };
  last(VectorCount<1>{});
  last(VectorCount<2>{});
  if constexpr (kTileVectors > 2) {
    last(VectorCount<3>{});
    last(VectorCount<4>{});
  }
}

}  // namespace effattn::EFFATTN_ISA
