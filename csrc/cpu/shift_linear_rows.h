// Few rows times power-of-two weights: bound by reading the codes, so each code is read once and decoded in registers.
//
//   output[m][n] = sum_k x[m][k] w[n][k]
//
// A vector of kLanes dwords of one channel holds, at place j, the weights k = base + 8 lane + j (bytes: base + 4 lane
// + j). The activations are laid out once per call in that order, [block][j][lane], so a step is a load of x, and per
// channel a shift, a table look-up and a multiply-add. Channels share the loads of x, rows share the decoded weights:
// 8 channels x 1 row .. 2 channels x 8 rows of accumulators in registers. bf16 (vdpbf16ps): a 16-bit lane looks up its
// own weight, 32 per instruction, pairs are (base + 8 lane + j, the same + 4). Integer (vpdpbusd): 64 per instruction.
// Bytes: N K / 2 of codes plus M K (in L1 or L2). FLOPs 2 M N K.
#pragma once

#include "shift_linear_panels.h"

namespace effattn::EFFATTN_ISA {

// Per arithmetic: words of x per block of kLanes dwords, and the inner step over one such block.
template <bool kBytes>
struct FloatRows {
  static constexpr int kPlaces = Code<kBytes>::kPerDword;
  static constexpr int64_t kBlock = kLanes * Code<kBytes>::kPerDword;

  static float lay_out(uint32_t* to, float* staged, const Matrix& row, int64_t length, int64_t padded) {
    row_to_float(staged, row, 0, length, padded);
    for (int64_t base = 0; base < padded; base += kBlock, to += kBlock)
      for (int j = 0; j < kPlaces; ++j)
        for (int lane = 0; lane < kLanes; ++lane)
          memcpy(to + j * kLanes + lane, staged + base + lane * kPlaces + j, sizeof(float));
    return 1.f;
  }
  static EFFATTN_INLINE WordVec decode(WordVec dwords, int j) { return (WordVec)Code<kBytes>::decode(dwords, j); }
  static EFFATTN_INLINE WordVec multiply_add(WordVec x, WordVec w, WordVec sum) {
    return (WordVec)fma((Vec)x, (Vec)w, (Vec)sum);
  }
  static EFFATTN_INLINE float total(WordVec sum, WordVec) { return reduce_add((Vec)sum); }
  static constexpr bool kOffset = false;
};

#if EFFATTN_HAS_BFLOAT16_DOT
alignas(64) inline constexpr uint16_t kHalfWeights[32] = {0, 0x3c80, 0x3d00, 0x3d80, 0x3e00, 0x3e80, 0x3f00, 0x3f80, 0,
    0xbc80, 0xbd00, 0xbd80, 0xbe00, 0xbe80, 0xbf00, 0xbf80, 0, 0x3c80, 0x3d00, 0x3d80, 0x3e00, 0x3e80, 0x3f00, 0x3f80,
    0, 0xbc80, 0xbd00, 0xbd80, 0xbe00, 0xbe80, 0xbf00, 0xbf80};

struct PairRows {
  static constexpr int kPlaces = 4;
  static constexpr int64_t kBlock = kLanes * 8;

  static float lay_out(uint32_t* to, float* staged, const Matrix& row, int64_t length, int64_t padded) {
    uint16_t* half = reinterpret_cast<uint16_t*>(staged);
    row_to_bfloat16(half, row, 0, length, padded);
    for (int64_t base = 0; base < padded; base += kBlock, to += kPlaces * kLanes)
      for (int j = 0; j < kPlaces; ++j)
        for (int lane = 0; lane < kLanes; ++lane)
          to[j * kLanes + lane] = half[base + 8 * lane + j] | uint32_t{half[base + 8 * lane + 4 + j]} << 16;
    return 1.f;
  }
  static EFFATTN_INLINE WordVec decode(WordVec dwords, int j) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    return (WordVec)_mm512_permutexvar_epi16((__m512i)((Halves)dwords >> (4 * j)), _mm512_load_si512(kHalfWeights));
  }
  static EFFATTN_INLINE WordVec multiply_add(WordVec x, WordVec w, WordVec sum) {
    return (WordVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  static EFFATTN_INLINE float total(WordVec sum, WordVec) { return reduce_add((Vec)sum); }
  static constexpr bool kOffset = false;
};
#endif

#if EFFATTN_HAS_BYTE_DOT
struct ByteRows {
  static constexpr int kPlaces = 2;
  static constexpr int64_t kBlock = kLanes * 8;

  static float lay_out(uint32_t* to, float* staged, const Matrix& row, int64_t length, int64_t padded) {
    row_to_float(staged, row, 0, length, padded);
    uint32_t* words = reinterpret_cast<uint32_t*>(staged + padded);
    const float step = quantize_row(words, staged, padded);
    for (int64_t base = 0; base < padded; base += kBlock, to += kPlaces * kLanes)
      for (int odd = 0; odd < 2; ++odd)
        for (int lane = 0; lane < kLanes; ++lane) to[odd * kLanes + lane] = words[base / 4 + 2 * lane + odd];
    return step;
  }
  static EFFATTN_INLINE WordVec decode(WordVec dwords, int odd) { return (WordVec)decode_bytes(dwords, odd); }
  static EFFATTN_INLINE WordVec multiply_add(WordVec x, WordVec w, WordVec sum) {
    return (WordVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
  }
  static EFFATTN_INLINE float total(WordVec sum, WordVec offset) {
    return static_cast<float>(_mm512_reduce_add_epi32((__m512i)(sum - offset)));
  }
  static constexpr bool kOffset = true;  // x is moved by 128 to be unsigned
};
#endif

template <class Step>
class ShiftRows {
  static constexpr int64_t kChannels = 8;  // of an item

 public:
  static void run(const ShiftProblem& problem, bool integer, const Runtime& runtime) {
    ShiftRows self(problem, integer);
    const int64_t rows = problem.rows(), padded = round_up(larger(problem.depth(), 1), Step::kBlock);
    self.pitch_ = padded / Step::kBlock * Step::kPlaces * kLanes;
    uint32_t* laid_out = shift_scratch().panels.reserve<uint32_t>(rows * self.pitch_ + 2 * padded);
    float* staged = reinterpret_cast<float*>(laid_out + rows * self.pitch_);
    self.step_ = shift_scratch().terms.reserve<float>(rows);
    for (int64_t m = 0; m < rows; ++m)
      self.step_[m] =
          Step::lay_out(laid_out + m * self.pitch_, staged, matrix_at(problem.left, 0, 0, m), problem.depth(), padded);
    self.laid_out_ = laid_out;
    run_items(
        runtime, (problem.columns() + kChannels - 1) / kChannels, 2.0 * rows * problem.columns() * problem.depth(),
        [](int64_t begin, int64_t end, void* opaque) {
          for (int64_t item = begin; item < end; ++item) static_cast<ShiftRows*>(opaque)->channels(item * kChannels);
        },
        &self);
    shift_scratch().panels.trim();
  }

 private:
  ShiftRows(const ShiftProblem& problem, bool integer) : problem_(problem), integer_(integer) {}

  void channels(int64_t channel) const {
    constexpr bool kWide = kLanes == 16;
    const int64_t rows = problem_.rows();
    int64_t m = 0;
    for (; m + 8 <= rows; m += 8) product<kWide ? 2 : 1, 8>(channel, m);
    if (m + 4 <= rows) product<kWide ? 4 : 2, 4>(channel, m), m += 4;
    if (m + 2 <= rows) product<kWide ? 8 : 4, 2>(channel, m), m += 2;
    if (m < rows) product<kWide ? 8 : 4, 1>(channel, m);
  }

  template <int kCount, int kRows>
  void product(int64_t channel, int64_t row) const {
    for (int64_t c = channel; c < smaller(channel + kChannels, problem_.columns()); c += kCount)
      tile<kCount, kRows>(c, row);
  }

  template <int kCount, int kRows>
  __attribute__((noinline)) void tile(int64_t channel, int64_t row) const {
    const Codes& codes = problem_.codes;
    const uint8_t* from[kCount];
    // Channels behind the last one repeat it and are not stored.
    EFFATTN_UNROLL for (int c = 0; c < kCount; ++c) from[c] = codes.row(smaller(channel + c, codes.channels - 1));
    WordVec sum[kCount][kRows] = {}, offset[kCount] = {};
    const uint32_t* x = laid_out_ + row * pitch_;
    const auto block = [&](const WordVec(&dwords)[kCount]) __attribute__((always_inline)) {
      EFFATTN_UNROLL for (int j = 0; j < Step::kPlaces; ++j) {
        WordVec weight[kCount];
        EFFATTN_UNROLL for (int c = 0; c < kCount; ++c) {
          weight[c] = Step::decode(dwords[c], j);
          if constexpr (Step::kOffset) offset[c] = Step::multiply_add(WordVec{} + 0x80808080u, weight[c], offset[c]);
        }
        EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
          const WordVec value = load_as<WordVec>(x + r * pitch_ + j * kLanes);
          EFFATTN_UNROLL for (int c = 0; c < kCount; ++c) sum[c][r] = Step::multiply_add(value, weight[c], sum[c][r]);
        }
      }
      x += Step::kPlaces * kLanes;
    };
    const int64_t ahead = channel + 2 * kCount <= codes.channels ? kCount * codes.row_bytes : 0;  // the next channels
    int64_t byte = 0;
    for (; byte + 4 * kLanes <= codes.row_bytes; byte += 4 * kLanes) {
      WordVec dwords[kCount];
      EFFATTN_UNROLL for (int c = 0; c < kCount; ++c) {
        dwords[c] = load_as<WordVec>(from[c] + byte);
        __builtin_prefetch(from[c] + byte + ahead);
      }
      block(dwords);
    }
    if (byte < codes.row_bytes) {
      WordVec dwords[kCount];
      EFFATTN_UNROLL for (int c = 0; c < kCount; ++c) dwords[c] = load_dwords(from[c], byte, codes.row_bytes);
      block(dwords);
    }
    EFFATTN_UNROLL for (int c = 0; c < kCount; ++c) EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      if (channel + c < codes.channels) finish(Step::total(sum[c][r], offset[c]), row + r, channel + c);
    }
  }

  EFFATTN_INLINE void finish(float sum, int64_t row, int64_t channel) const {
    const Vec scale = broadcast(problem_.scale ? problem_.scale[channel] : 1.f),
              bias = broadcast(problem_.bias ? problem_.bias[channel] : 0.f);
    Vec value = broadcast(sum);
    if (integer_)
      value = rounded(rounded(value * broadcast(step_[row] * 0x1p-6f)) * scale) + bias;
    else
      value = fma(value, scale, bias);
    store_output(problem_.output, row * problem_.columns() + channel, value, 1);
  }

  const ShiftProblem& problem_;
  const bool integer_;
  const uint32_t* laid_out_ = nullptr;
  float* step_ = nullptr;
  int64_t pitch_ = 0;
};

}  // namespace effattn::EFFATTN_ISA
