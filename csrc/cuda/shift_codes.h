// Packed weights of powers of two (the format is in api.h) and their expansion, exact and without a multiplication.
//
// A nibble is a selector of PRMT: its exponent picks a byte of an eight-entry table held in two registers, its sign one
// of two bytes. Four weights take one PRMT to become the high bytes of fp16 (the format e5m2 is that byte), two to
// become bf16, three to become signed bytes, and two more to lie as pairs of 16 bits.
#pragma once

#include <type_traits>

#include "device.h"

namespace effattn::cuda {

template <bool kByte>  // a byte per weight, not a nibble
struct ShiftCodes {
  static constexpr int kWordsPer8 = kByte ? 2 : 1;

  __host__ __device__ static constexpr int64_t row_bytes(int64_t weights) {
    return kByte ? weights : (weights + 1) / 2;
  }
};

// A matrix of codes, read in pieces of 4 kWords bytes; zeros outside.
template <bool kByte>
struct CodeMatrix {
  const uint8_t* data;
  int64_t channels, in_features;
  bool aligned;  // rows can be read in pieces of 16 bytes

  // The codes of weights k.. of channel n, k a multiple of what kWords hold.
  template <int kWords>
  EFFATTN_DEVICE Vec<uint32_t, kWords> load(int64_t n, int64_t k) const {
    const int64_t bytes = ShiftCodes<kByte>::row_bytes(in_features), at = kByte ? k : k / 2;
    Vec<uint32_t, kWords> words = {};
    if (n >= channels || at >= bytes) return words;
    const uint8_t* from = data + n * bytes + at;
    if (aligned) return load_global<kWords>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i)
      if (at + i < bytes) words[i / 4] |= static_cast<uint32_t>(from[i]) << i % 4 * 8;
    return words;
  }
};

template <bool kByte>
CodeMatrix<kByte> code_matrix(const uint8_t* codes, int64_t channels, int64_t in_features) {
  return {codes, channels, in_features,
      ShiftCodes<kByte>::row_bytes(in_features) % 16 == 0 && reinterpret_cast<uintptr_t>(codes) % 16 == 0};
}

// Four nibbles in the lower half of `codes`: a byte of the table for each, by its exponent; 0 or `value` by its sign.
EFFATTN_DEVICE uint32_t by_exponent(uint32_t codes, uint32_t table_low, uint32_t table_high) {
  return byte_permute(table_low, table_high, codes & 0x7777);
}
EFFATTN_DEVICE uint32_t by_sign(uint32_t codes, uint32_t value) {
  return byte_permute(value << 8, 0, codes >> 3 & 0x1111);
}

// Eight consecutive weights, in order, as E: bfloat16 and float16 two in a register, int8_t four.
template <class E, bool kByte>
EFFATTN_DEVICE void expand_codes(
    const uint32_t (&codes)[kByte ? 2 : 1], uint32_t (&weights)[static_cast<int>(2 * sizeof(E))]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t four = kByte ? codes[kByte * half] : codes[0] >> 16 * half;
    if constexpr (std::is_same_v<E, int8_t>) {
      static_assert(!kByte);
      const uint32_t negative = by_sign(four, 0xff);
      weights[half] = (by_exponent(four, 0x04020100, 0x40201008) & ~negative) |
                      (by_exponent(four, 0xfcfeff00, 0xc0e0f0f8) & negative);
    } else if constexpr (std::is_same_v<E, bfloat16> && !kByte) {
      const uint32_t high = by_exponent(four, 0x3d3d3c00, 0x3f3f3e3e) | by_sign(four, 0x80);
      const uint32_t low = by_exponent(four, 0x80008000, 0x80008000);
      weights[2 * half] = byte_permute(low, high, 0x5140);
      weights[2 * half + 1] = byte_permute(low, high, 0x7362);
    } else {
      const uint32_t high = kByte ? four : by_exponent(four, 0x2c282400, 0x3c383430) | by_sign(four, 0x80);
      weights[2 * half] = byte_permute(high, 0, 0x1404);
      weights[2 * half + 1] = byte_permute(high, 0, 0x3424);
      if constexpr (std::is_same_v<E, bfloat16>) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {  // the exponent moves by 3 bits, and by 112 unless the weight is 0
          const uint32_t half_precision = weights[2 * half + pair], magnitude = half_precision & 0x7c007c00;
          const uint32_t is_not_zero = (magnitude + 0x7c007c00) & 0x80008000;
          weights[2 * half + pair] =
              (half_precision & 0x80008000) | ((magnitude >> 3) + (is_not_zero >> 1) - (is_not_zero >> 4));
        }
      }
    }
  }
}

// The same as fp32.
template <bool kByte>
EFFATTN_DEVICE void expand_codes_to_float(const uint32_t (&codes)[kByte ? 2 : 1], float (&weights)[8]) {
  uint32_t pairs[4];
  expand_codes<bfloat16, kByte>(codes, pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[2 * i] = float_of(pairs[i] << 16);
    weights[2 * i + 1] = float_of(pairs[i] & 0xffff0000);
  }
}

// A weight for integer arithmetic: s in the upper half, -p in the lower one; 0 is zero.
template <bool kByte>
EFFATTN_DEVICE int32_t shift_and_sign(uint32_t code) {
  const int exponent = kByte ? code >> 2 & 31 : code & 7, negative = kByte ? code >> 7 & 1 : code >> 3 & 1;
  if (exponent == 0) return 0;
  return (negative ? -65536 : 65536) + (kByte ? 15 : 7) - exponent;
}
// sum + s (activation >> -p), wrapping.
EFFATTN_DEVICE int32_t add_shifted(int32_t activation, int32_t weight, int32_t sum) {
  const uint32_t term = static_cast<uint32_t>(weight >> 16) * static_cast<uint32_t>(activation >> (weight & 31));
  return static_cast<int32_t>(static_cast<uint32_t>(sum) + term);
}

}  // namespace effattn::cuda
