// The four arithmetics of a shift-linear product, in the terms of gemm.h, and how weights become their words.
//
//   Float32        x, w as floats
//   BFloat16Pair   vdpbf16ps; every weight is exact in bf16
//   Integer        x as integers -127..127, 64 w as -64..64, int32 sums. With VNNI four to a word, x + 128 unsigned
//   (the
//                  sum of the weights times 128 is taken off at the end); elsewhere two to a word and pmaddwd, whose
//                  sums cannot saturate
//   Fixed16        sum of s (x >> -p), wrapping: a word is the count, the sign in bit 31, bit 30 unless w = 0
// Integer sums travel in the accumulators' bits.
#pragma once

#include "shift_linear_code.h"

namespace effattn::EFFATTN_ISA {

#if defined(__AVX512VNNI__)
#define EFFATTN_HAS_BYTE_DOT 1
struct Integer {
  using Word = uint32_t;
  static constexpr int kPerWord = 4;
  using Operand = __m512i;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) { return _mm512_set1_epi32(load_as<int32_t>(from)); }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return _mm512_loadu_si512(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) {
    return (Vec)_mm512_dpbusd_epi32((__m512i)c, a, b);
  }
};

alignas(64) inline constexpr int8_t kByteWeights[16] = {0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64};

// 64 w of the even (0) or odd (1) nibbles of each dword.
EFFATTN_INLINE __m512i decode_bytes(WordVec dwords, int odd) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kByteWeights)));
  return _mm512_shuffle_epi8(table, (__m512i)((dwords >> (4 * odd)) & 0x0f0f0f0fu));
}
#else
#define EFFATTN_HAS_BYTE_DOT 0
struct Integer {
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  using Operand = WordVec;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) { return load_as<uint32_t>(from) - WordVec{}; }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return load_as<WordVec>(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) {
#if defined(__AVX512BW__)
    return (Vec)((WordVec)c + (WordVec)_mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    return (Vec)((WordVec)c + (WordVec)_mm256_madd_epi16((__m256i)a, (__m256i)b));
#elif defined(__x86_64__)
    return (Vec)((WordVec)c + (WordVec)_mm_madd_epi16((__m128i)a, (__m128i)b));
#else
    const IntVec high = ((IntVec)a >> 16) * ((IntVec)b >> 16);
    return (Vec)((WordVec)c + (WordVec)(((IntVec)(a << 16) >> 16) * ((IntVec)(b << 16) >> 16) + high));
#endif
  }
};
#endif

struct Fixed16 {
  using Word = uint32_t;
  static constexpr int kPerWord = 1;
  struct Operand {
    IntVec count;
    WordVec negative, nonzero;
  };
  static EFFATTN_INLINE IntVec broadcast_word(const Word* from) { return load_as<int32_t>(from) - IntVec{}; }
  static EFFATTN_INLINE Operand load_words(const Word* from) {
    const IntVec word = load_as<IntVec>(from);
    return {word & 31, (WordVec)(word >> 31), (WordVec)((IntVec)((WordVec)word << 1) >> 31)};
  }
  static EFFATTN_INLINE Vec multiply_add(IntVec a, const Operand& b, Vec c) {
    return (Vec)((WordVec)c + (((WordVec)(a >> b.count) ^ b.negative) & b.nonzero));  // -v = ~v + 1: the ones in offset
  }
};

template <class Arithmetic>
struct ShiftTraits {
  static constexpr bool kFloating = true;
  static constexpr int kSums = kChains<Arithmetic>;
  static constexpr int kVectors = kChainedVectors<Arithmetic>;
};
template <>
struct ShiftTraits<Integer> {
  static constexpr bool kFloating = false;
  static constexpr int kSums = 1;
  static constexpr int kVectors = kTileVectors;
};
template <>
struct ShiftTraits<Fixed16> {
  static constexpr bool kFloating = false;
  static constexpr int kSums = 1;
  static constexpr int kVectors = kTileVectors / 2;
};

template <class Arithmetic>
EFFATTN_INLINE Vec add_sums(Vec a, Vec b) {
  if constexpr (ShiftTraits<Arithmetic>::kFloating)
    return a + b;
  else
    return (Vec)((WordVec)a + (WordVec)b);
}

// Words of one dword of codes per lane. offset: what the sum over all words has to be corrected by.
template <class Arithmetic, bool kBytes>
EFFATTN_INLINE void expand_dwords(typename Arithmetic::Word* to, int64_t pitch, WordVec dwords, WordVec& offset) {
  using C = Code<kBytes>;
  const auto put = [&](int64_t word, WordVec value)
                       __attribute__((always_inline)) { memcpy(to + word * pitch, &value, sizeof(value)); };
  if constexpr (__is_same(Arithmetic, Float32)) {
    EFFATTN_UNROLL for (int j = 0; j < C::kPerDword; ++j) put(j, (WordVec)C::decode(dwords, j));
#if EFFATTN_HAS_BFLOAT16_DOT
  } else if constexpr (__is_same(Arithmetic, BFloat16Pair)) {
    EFFATTN_UNROLL for (int j = 0; j < C::kPerDword; j += 2)
        put(j / 2, ((WordVec)C::decode(dwords, j) >> 16) | (WordVec)C::decode(dwords, j + 1));
#endif
  } else if constexpr (__is_same(Arithmetic, Integer)) {
#if EFFATTN_HAS_BYTE_DOT
    EFFATTN_UNROLL for (int odd = 0; odd < 2; ++odd) {
      const __m512i weights = decode_bytes(dwords, odd);
      put(odd, (WordVec)weights);
      offset = (WordVec)_mm512_dpbusd_epi32((__m512i)offset, _mm512_set1_epi8(-128), weights);
    }
#else
    const auto weight = [&](int j) __attribute__((always_inline)) {
      return (WordVec) __builtin_convertvector(C::decode(dwords, j) * broadcast(64.f), IntVec);
    };
    EFFATTN_UNROLL for (int j = 0; j < C::kPerDword; j += 2) put(j / 2, (weight(j) & 0xffff) | (weight(j + 1) << 16));
#endif
  } else {
    EFFATTN_UNROLL for (int j = 0; j < C::kPerDword; ++j) {
      const WordVec bits = (WordVec)C::decode(dwords, j);
      const WordVec nonzero = (WordVec)((bits << 1) != 0);
      const WordVec negative = (bits >> 31) & nonzero;
      put(j, ((127 - ((bits >> 23) & 255)) & 31) | (negative << 31) | (nonzero & 0x40000000u));
      offset -= negative;
    }
  }
}

template <class Arithmetic, bool kBytes>
inline constexpr int kWordsPerDword = Code<kBytes>::kPerDword / Arithmetic::kPerWord;

// Activations of one row, already floats and padded with zeros to `padded` (a multiple of 8 and of kLanes), as integers
// -127..127 in steps of the largest magnitude / 127; returns the step. With VNNI a group of 8 goes into two words, the
// even ones and the odd ones, as decode_bytes delivers the weights.
EFFATTN_INLINE IntVec round_to_int(Vec x) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtps_epi32((__m256)x);
#elif defined(__x86_64__)
  return (IntVec)_mm_cvtps_epi32((__m128)x);
#else
  return (IntVec)vcvtnq_s32_f32((float32x4_t)x);
#endif
}

inline float quantize_row(uint32_t* to, const float* from, int64_t padded) {
  Vec most[2] = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec magnitude = (Vec)((WordVec)load(from + k) & 0x7fffffffu);
    most[k / kLanes & 1] = max(magnitude, most[k / kLanes & 1]);
  }
  const float largest = reduce_max(max(most[0], most[1]));
  const float step = largest == 0.f ? 1.f : largest / 127.f;
  const Vec divisor = broadcast(step);
  for (int64_t k = 0; k < padded; k += kLanes) {
    const IntVec q = round_to_int(load(from + k) / divisor);
#if EFFATTN_HAS_BYTE_DOT
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtsepi32_epi8((__m512i)q), order);
    const __m128i moved = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    memcpy(to + k / 4, &moved, sizeof(moved));
#else
    typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));
    const ShortVec half = __builtin_convertvector(q, ShortVec);
    memcpy(to + k / 2, &half, sizeof(half));
#endif
  }
  return step;
}

// int32(clamp(floor(x * 2^16), -2^31, (2^15 - 1) * 2^16)).
EFFATTN_INLINE IntVec to_fixed16(Vec x) {
  const Vec low = broadcast(-0x1p31f), high = broadcast(0x1.fffcp30f);
  const Vec units = floor(x * broadcast(0x1p16f));
  return __builtin_convertvector(-max(-max(units, low), -high), IntVec);
}

}  // namespace effattn::EFFATTN_ISA
