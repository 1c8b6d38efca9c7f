// One register of floats on whatever machine this file is compiled for.
//
// Every kernel source is compiled once per ISA level, each time into its own namespace effattn::EFFATTN_ISA, so that
// the linker can never pick an AVX-512 copy of an inline function for an SSE caller. For the same reason kernels use no
// std:: templates.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../types.h"

#ifndef EFFATTN_ISA
#define EFFATTN_ISA baseline
#endif

#define EFFATTN_INLINE inline __attribute__((always_inline))
#define EFFATTN_UNROLL _Pragma("GCC unroll 32")

namespace effattn::EFFATTN_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kTileVectors = 4;  // vectors per micro-kernel row; 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kTileVectors = 2;
#elif defined(__aarch64__)
inline constexpr int kLanes = 4;
inline constexpr int kTileVectors = 4;
#else
inline constexpr int kLanes = 4;
inline constexpr int kTileVectors = 2;
#endif
inline constexpr int kTileRows = 6;
inline constexpr int kTileColumns = kTileVectors * kLanes;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

EFFATTN_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
EFFATTN_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EFFATTN_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class To, class From>
EFFATTN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
EFFATTN_INLINE V load_as(const void* from) {
  V value;
  memcpy(&value, from, sizeof(value));
  return value;
}

EFFATTN_INLINE Vec load(const float* from) { return load_as<Vec>(from); }
EFFATTN_INLINE void store(float* to, Vec value) { memcpy(to, &value, sizeof(value)); }
EFFATTN_INLINE Vec broadcast(float value) { return value - Vec{}; }
EFFATTN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}  // contracted where the machine can: -ffp-contract=fast

EFFATTN_INLINE IntVec lane_index() {
  IntVec index;
  EFFATTN_UNROLL for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}

#if defined(__AVX512F__)
using Mask = __mmask16;
EFFATTN_INLINE Mask first_lanes(int64_t count) {
  return count >= kLanes ? Mask(0xffff) : count <= 0 ? Mask(0) : Mask((1u << count) - 1);
}
EFFATTN_INLINE Vec select(Mask mask, Vec yes, Vec no) {
  return (Vec)_mm512_mask_blend_ps(mask, (__m512)no, (__m512)yes);
}
EFFATTN_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
EFFATTN_INLINE Vec load_partial(const float* from, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), from);
}
EFFATTN_INLINE void store_partial(float* to, Vec value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value);
}
// Lanes of `mask` come from `yes`, the others from `no`; memory of lanes not taken from `yes` is not touched there.
EFFATTN_INLINE Vec load_select(Mask mask, const float* yes, const float* no) {
  return (Vec)_mm512_mask_loadu_ps(_mm512_loadu_ps(no), mask, yes);
}
EFFATTN_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps((__m512)a); }
EFFATTN_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps((__m512)a); }
EFFATTN_INLINE Vec floor(Vec a) {
  return (Vec)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
#else
using Mask = IntVec;
EFFATTN_INLINE Mask first_lanes(int64_t count) {
  const int32_t bound = count >= kLanes ? kLanes : count <= 0 ? 0 : int32_t(count);
  return lane_index() < (bound - IntVec{});
}
EFFATTN_INLINE Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes : no; }
#if defined(__AVX2__)
EFFATTN_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
EFFATTN_INLINE Vec load_partial(const float* from, int64_t count) {
  return (Vec)_mm256_maskload_ps(from, (__m256i)first_lanes(count));
}
EFFATTN_INLINE void store_partial(float* to, Vec value, int64_t count) {
  _mm256_maskstore_ps(to, (__m256i)first_lanes(count), (__m256)value);
}
EFFATTN_INLINE Vec floor(Vec a) { return (Vec)_mm256_floor_ps((__m256)a); }
#else
EFFATTN_INLINE Vec load_partial(const float* from, int64_t count) {
  Vec value = {};
  for (int lane = 0; lane < kLanes; ++lane)
    if (lane < count) value[lane] = from[lane];
  return value;
}
EFFATTN_INLINE void store_partial(float* to, Vec value, int64_t count) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (lane < count) to[lane] = value[lane];
}
#if defined(__x86_64__)
EFFATTN_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
EFFATTN_INLINE Vec floor(Vec a) { return (Vec)_mm_floor_ps((__m128)a); }
#elif defined(__aarch64__)
EFFATTN_INLINE Vec max(Vec a, Vec b) { return (Vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
EFFATTN_INLINE Vec floor(Vec a) { return (Vec)vrndmq_f32((float32x4_t)a); }
#endif
#endif
EFFATTN_INLINE Vec load_select(Mask mask, const float* yes, const float* no) {
  return select(mask, load(yes), load(no));
}
EFFATTN_INLINE float reduce_add(Vec a) {
  float part[kLanes];
  store(part, a);
  EFFATTN_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) for (int lane = 0; lane < half; ++lane) part[lane] +=
      part[lane + half];
  return part[0];
}
EFFATTN_INLINE float reduce_max(Vec a) {
  float best = a[0];
  EFFATTN_UNROLL for (int lane = 1; lane < kLanes; ++lane) best = a[lane] > best ? a[lane] : best;
  return best;
}
#endif

// 2^x for x <= 127 (softmax never asks for more than 0): x = n + f with n = floor(x), 2^f by a minimax polynomial on
// [0, 1) with p(0) = 1, scaled by 2^n. Largest relative error 8.6e-5 (degree 3, far below bf16's half ulp of 2e-3)
// and 1.6e-7 (degree 5). 2^-inf = 0, and so is what would be subnormal: some processors take a hundred times as long to
// multiply with it.
template <int kDegree>
EFFATTN_INLINE Vec exp2(Vec x) {
  static_assert(kDegree == 3 || kDegree == 5);
#if defined(__AVX512DQ__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  x = max(x, broadcast(-127.f));
  const Vec n = floor(x);
  const Vec f = x - n;
#endif
  Vec p;
  if constexpr (kDegree == 3) {
    p = broadcast(0.07706703914784001f);
    p = fma(p, f, broadcast(0.22764499515857392f));
    p = fma(p, f, broadcast(0.6951167855852893f));
  } else {
    p = broadcast(0.0018671452801044385f);
    p = fma(p, f, broadcast(0.009016993467104628f));
    p = fma(p, f, broadcast(0.05579994537004679f));
    p = fma(p, f, broadcast(0.2401644380628233f));
    p = fma(p, f, broadcast(0.6931513133449989f));
  }
  p = fma(p, f, broadcast(1.f));
#if defined(__AVX512DQ__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);  // or NaN
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
#else
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;  // n = -127 gives +0
  return p * (Vec)exponent;
#endif
}

// log2(x) of a positive normal x, largest relative error 2.1e-7; NaN stays NaN. x = 2^n m with m around 1, and
// log2 m = 2 log2(e) artanh((m - 1) / (m + 1)) by its series.
EFFATTN_INLINE Vec log2(Vec x) {
  const IntVec exponent = ((IntVec)x - 0x3f3504f3) >> 23;  // m from sqrt(1/2) to sqrt(2)
  const Vec m = (Vec)((IntVec)x - (exponent << 23));
  const Vec s = (m - 1.f) / (m + 1.f), square = s * s;
  Vec p = broadcast(0.32059889797532529f);
  p = fma(p, square, broadcast(0.41219858311113240f));
  p = fma(p, square, broadcast(0.57707801635558536f));
  p = fma(p, square, broadcast(0.96179669392597556f));
  p = fma(p, square, broadcast(2.88539008177792681f));
  return fma(p, s, __builtin_convertvector(exponent, Vec)) + (x - x);
}

// Element type conversions. Rounding is to nearest even; NaN stays NaN.
EFFATTN_INLINE Vec load_float(const float* from) { return load(from); }
EFFATTN_INLINE Vec load_float(const bfloat16* from) {
  return (Vec)(__builtin_convertvector(load_as<HalfVec>(from), WordVec) << 16);
}
EFFATTN_INLINE Vec load_float(const float16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(load_as<__m128i>(from));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(load_as<float16x4_t>(from));
#else
  const WordVec half = __builtin_convertvector(load_as<HalfVec>(from), WordVec);
  const WordVec magnitude = (half & 0x7fff) << 13;
  const WordVec sign = (half & 0x8000) << 16;
  const Vec scaled = (Vec)magnitude * broadcast(0x1p112f);
  const WordVec special = (WordVec)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Vec)((WordVec)scaled | special | sign);
#endif
}

EFFATTN_INLINE HalfVec to_bfloat16(Vec value) {
#if defined(__AVX512BF16__)
  return (HalfVec)_mm512_cvtneps_pbh((__m512)value);
#else
  const WordVec bits = (WordVec)value;
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec quiet = (bits >> 16) | 0x40;
  const WordVec nan = (WordVec)((bits & 0x7fffffff) > 0x7f800000u);
  return __builtin_convertvector((quiet & nan) | (rounded & ~nan), HalfVec);
#endif
}

EFFATTN_INLINE HalfVec to_float16(Vec value) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfVec)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return bit_cast<HalfVec>(vcvt_f16_f32((float32x4_t)value));
#else
  const WordVec bits = (WordVec)value;
  const WordVec sign = (bits >> 16) & 0x8000;
  const WordVec magnitude = bits & 0x7fffffff;
  const WordVec normal =
      (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;  // rebias the exponent by -112 and round
  const WordVec subnormal =
      (WordVec)((Vec)magnitude + broadcast(0.5f)) - 0x3f000000u;  // the adder rounds at 2^-24 for us
  const WordVec infinite = (WordVec)(magnitude >= 0x477ff000u);   // 65520 and above round to infinity
  const WordVec tiny = (WordVec)(magnitude < 0x38800000u);
  const WordVec nan = (WordVec)(magnitude > 0x7f800000u);
  WordVec half = (subnormal & tiny) | (normal & ~tiny);
  half = (infinite & 0x7c00) | (half & ~infinite);
  half = (nan & 0x7e00) | (half & ~nan);
  return __builtin_convertvector(half | sign, HalfVec);
#endif
}

EFFATTN_INLINE void store_float(float* to, Vec value) { store(to, value); }
EFFATTN_INLINE void store_float(bfloat16* to, Vec value) {
  const HalfVec half = to_bfloat16(value);
  memcpy(to, &half, sizeof(half));
}
EFFATTN_INLINE void store_float(float16* to, Vec value) {
  const HalfVec half = to_float16(value);
  memcpy(to, &half, sizeof(half));
}

// The first `count` lanes only; the others read as 0 and are not written. Never touches memory beyond them.
template <class T>
EFFATTN_INLINE Vec load_float_partial(const T* from, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return load_partial(from, count);
#if defined(__AVX512BW__)
  } else if constexpr (sizeof(T) == 2) {
    const __m256i part = _mm256_maskz_loadu_epi16(first_lanes(count), from);
    return load_float(reinterpret_cast<const T*>(&part));
#endif
  } else {
    T part[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane)
      if (lane < count) part[lane] = from[lane];
    return load_float(part);
  }
}
template <class T>
EFFATTN_INLINE void store_float_partial(T* to, Vec value, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    store_partial(to, value, count);
  } else {
    T part[kLanes];
    store_float(part, value);
#if defined(__AVX512BW__)
    _mm256_mask_storeu_epi16(to, first_lanes(count), load_as<__m256i>(part));
    return;
#endif
    for (int lane = 0; lane < kLanes; ++lane)
      if (lane < count) to[lane] = part[lane];
  }
}

}  // namespace effattn::EFFATTN_ISA
