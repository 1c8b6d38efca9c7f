// Products of packed bits, in the terms of gemm.h: a word holds 32 bits of the summed index, a step adds
// popcount(a & b) or popcount(a ^ b) per lane. With AVX512_VPOPCNTDQ that is 512 multiply-adds in three instructions;
// elsewhere the bytes are looked up by nibbles and summed within the word. Counts travel in the accumulators' bits.
#pragma once

#include "pack.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {

EFFATTN_INLINE int64_t bit_words(int64_t length) { return (length + 31) / 32; }
EFFATTN_INLINE uint32_t last_word_mask(int64_t length) {
  return length % 32 == 0 ? ~uint32_t{0} : (uint32_t{1} << length % 32) - 1;
}

EFFATTN_INLINE WordVec count_bits(WordVec words) {
#if defined(__AVX512VPOPCNTDQ__)
  return (WordVec)_mm512_popcnt_epi32((__m512i)words);
#elif defined(__x86_64__)
  const __m128i counts = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const WordVec low = words & 0x0f0f0f0fu, high = (words >> 4) & 0x0f0f0f0fu;
#if defined(__AVX512BW__)
  const __m512i table = _mm512_broadcast_i32x4(counts);
  const __m512i bytes =
      _mm512_add_epi8(_mm512_shuffle_epi8(table, (__m512i)low), _mm512_shuffle_epi8(table, (__m512i)high));
  return (WordVec)_mm512_madd_epi16(_mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i table = _mm256_broadcastsi128_si256(counts);
  const __m256i bytes =
      _mm256_add_epi8(_mm256_shuffle_epi8(table, (__m256i)low), _mm256_shuffle_epi8(table, (__m256i)high));
  return (WordVec)_mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
#else
  const __m128i bytes = _mm_add_epi8(_mm_shuffle_epi8(counts, (__m128i)low), _mm_shuffle_epi8(counts, (__m128i)high));
  return (WordVec)_mm_madd_epi16(_mm_maddubs_epi16(bytes, _mm_set1_epi8(1)), _mm_set1_epi16(1));
#endif
#else
  return (WordVec)vpaddlq_u16(vpaddlq_u8(vcntq_u8((uint8x16_t)words)));
#endif
}

template <bool kSigns>
struct BitDot {
  using Word = uint32_t;
  static constexpr int kPerWord = 1;
  using Operand = WordVec;
  static EFFATTN_INLINE Operand broadcast_word(const Word* from) { return *from - WordVec{}; }
  static EFFATTN_INLINE Operand load_words(const Word* from) { return load_as<WordVec>(from); }
  static EFFATTN_INLINE Vec multiply_add(Operand a, Operand b, Vec c) {
    return (Vec)((WordVec)c + count_bits(kSigns ? a ^ b : a & b));
  }
};

// A operand: rows of bits with the pad bits of the last word cleared, zero rows behind them.
inline void pack_bit_rows(uint32_t* to, const uint32_t* from, int64_t rows, int64_t padded_rows, int64_t length) {
  const int64_t words = bit_words(length);
  if (words == 0) return;
  memcpy(to, from, rows * words * sizeof(uint32_t));
  memset(to + rows * words, 0, (padded_rows - rows) * words * sizeof(uint32_t));
  if (length % 32 != 0)
    for (int64_t r = 0; r < rows; ++r) to[r * words + words - 1] &= last_word_mask(length);
}

// B operand: [panel of kTileColumns rows][word][row in panel], as pack_transposed; every panel kTileColumns wide.
inline void pack_bit_panels(uint32_t* to, const uint32_t* from, int64_t rows, int64_t length) {
  const int64_t words = bit_words(length);
  for (int64_t first = 0; first < rows; first += kTileColumns, to += words * kTileColumns) {
    const int64_t live = smaller(kTileColumns, rows - first);
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t mask = w + 1 == words ? last_word_mask(length) : ~uint32_t{0};
      const uint32_t* source = from + first * words + w;
      for (int64_t r = 0; r < live; ++r) to[w * kTileColumns + r] = source[r * words] & mask;
      for (int64_t r = live; r < kTileColumns; ++r) to[w * kTileColumns + r] = 0;
    }
  }
}

inline int64_t bit_panel_words(int64_t rows, int64_t length) {
  return round_up(rows, kTileColumns) * bit_words(length);
}

}  // namespace effattn::EFFATTN_ISA
