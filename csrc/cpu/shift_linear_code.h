// Weights that are signed powers of two, from their codes to registers.
//
// A row of codes is read as dwords: 8 nibbles (bits <= 4) or 4 bytes (bits = 5). A vector of dwords holds, for one j,
// one weight per lane: the caller puts neighbouring dwords of one channel into the lanes, or the same dword of
// neighbouring channels (after a transposition). Nibbles cost two instructions for 16 weights on AVX-512 (a shift and a
// table of 16 floats in one register; the table instruction looks at the low 4 bits of its index only), three more on
// AVX2 (a table of 8 and the sign). Elsewhere the exponent bits are shifted into place and the bias corrected by one
// exact product.
#pragma once

#include "pack.h"

namespace effattn::EFFATTN_ISA {

struct Codes {
  const uint8_t* data;
  int64_t channels, length, row_bytes;
  bool bytes;

  const uint8_t* row(int64_t channel) const { return data + channel * row_bytes; }
};

inline Codes codes_of(const uint8_t* data, int64_t channels, int64_t length, int bits) {
  return {data, channels, length, bits > 4 ? length : (length + 1) / 2, bits > 4};
}

#define EFFATTN_POWERS 0.f, 0x1p-6f, 0x1p-5f, 0x1p-4f, 0x1p-3f, 0x1p-2f, 0x1p-1f, 1.f
#define EFFATTN_NEGATIVE_POWERS 0.f, -0x1p-6f, -0x1p-5f, -0x1p-4f, -0x1p-3f, -0x1p-2f, -0x1p-1f, -1.f
alignas(64) inline constexpr float kNibbleWeights[16] = {EFFATTN_POWERS, EFFATTN_NEGATIVE_POWERS};

template <bool kBytes>
struct Code {
  static constexpr int kPerDword = kBytes ? 4 : 8;

  // Weight j of each dword.
  static EFFATTN_INLINE Vec decode(WordVec dwords, int j) {
    if constexpr (kBytes) {
      const WordVec code = dwords >> (8 * j);
      return (Vec)((WordVec)((Vec)((code & 0x7f) << 21) * broadcast(0x1p112f)) | ((code & 0x80) << 24));
    } else {
#if defined(__AVX512F__)
      return (Vec)_mm512_permutexvar_ps((__m512i)(dwords >> (4 * j)), (__m512)load(kNibbleWeights));
#elif defined(__AVX2__)
      const Vec magnitude = (Vec)_mm256_permutevar8x32_ps((__m256)load(kNibbleWeights), (__m256i)(dwords >> (4 * j)));
      return (Vec)((WordVec)magnitude | ((dwords << (28 - 4 * j)) & 0x80000000u));
#else
      const WordVec code = dwords >> (4 * j);
      return (Vec)((WordVec)((Vec)((code & 7) << 23) * broadcast(0x1p120f)) | ((code & 8) << 28));
#endif
    }
  }
};

// kLanes dwords of one row from byte `first` on; zeros behind its end.
EFFATTN_INLINE WordVec load_dwords(const uint8_t* row, int64_t first, int64_t row_bytes) {
  constexpr int64_t kBytes = 4 * kLanes;
  if (first + kBytes <= row_bytes) return load_as<WordVec>(row + first);
  WordVec part = {};
  if (first < row_bytes) memcpy(&part, row + first, row_bytes - first);
  return part;
}

// Weights column .. column + kLanes of one channel; column is a multiple of kLanes.
template <bool kBytes>
EFFATTN_INLINE Vec decode_run(const uint8_t* row, int64_t column, int64_t row_bytes) {
  constexpr int64_t kCount = kBytes ? kLanes : kLanes / 2;
  const int64_t first = kBytes ? column : column / 2;
  uint8_t part[kCount] = {};
  if (first + kCount <= row_bytes)
    memcpy(part, row + first, kCount);
  else if (first < row_bytes)
    memcpy(part, row + first, row_bytes - first);
  WordVec code;
  if constexpr (kBytes) {
    typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
    code = __builtin_convertvector(load_as<ByteVec>(part), WordVec);
  } else {
    const WordVec lane = (WordVec)lane_index();
    if constexpr (kLanes == 16) {
      const uint64_t both = load_as<uint64_t>(part);
      const WordVec low = static_cast<uint32_t>(both) - WordVec{}, high = static_cast<uint32_t>(both >> 32) - WordVec{};
      code = (lane < 8 ? low : high) >> (4 * (lane & 7));
    } else {
      uint32_t word = 0;
      memcpy(&word, part, kCount);
      code = (word - WordVec{}) >> (4 * lane);
    }
  }
  return Code<kBytes>::decode(code, 0);
}

}  // namespace effattn::EFFATTN_ISA
