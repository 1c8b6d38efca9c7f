// Which of many tokens b_j has the largest cosine similarity with a, decided exactly at the speed of a rounded product.
//
//   s_j = a . b_j / (|a| |b_j|),  level_j = s_j 2^40 rounded to even;  wanted: the largest level, the first j of it
//
// A filter, then the predicate. With unit vectors u = a / |a|, v_j = b_j / |b_j| and any c (the mean of some v_j):
//   s_j = u . c + score_j,  score_j = (u - c) . (v_j - c) + c . (v_j - c)
// u . c is the same for the whole row, so the score ranks like s. It is computed in low precision, and only the j whose
// score is within 2 eps of the row's largest are evaluated in float64, from the tokens as given. The usual tokens share
// a large mean, and without it products, hence rounding errors, are small against what tells tokens apart.
//
// The bound eps. Let x = u - c, w = v_j - c, x' and w' their roundings to bf16 (without vdpbf16ps: to float), and e
// the norms of what the rounding took, all measured. The computed product f of x' and w' is wrong by at most
//   |f - x . w| <= e_x |w'| + |x| e_w + gamma |x'| |w'|,  gamma = 2 d 2^-24 / (1 - 2 d 2^-24)
// (Cauchy-Schwarz twice; at most two float roundings per product of the sum, in any order). Added to that: 2^-19 for
// float's rounding of x and w (2^-24 (|x| + 1.1) |w|, and so for w, where |x|, |w| <= 2.1), of c . w (2^-24 2.1) and of
// its sum with f (2^-24 7), bf16 and float that underflow (d 2^-125), the float64 similarity (d 2^-52), one step 2^-40
// and the limit's own rounding (2^-22); and 2 % of the whole for the norms, sums of d squares in float. If j has the
// largest level, s_j >= s_k - 2^-40 for all k, hence score_j >= score_k - 2 eps. For d <= 2^16, where all this holds,
// the bound is used; for longer tokens every pair is evaluated. The norms are float64: no finite float overflows or
// underflows them.
//
// An exact evaluation is d products of floats, exact in double, summed in the same order for every pair: tokens of
// equal elements tie. Each sum takes at most d / 8 + 8 roundings, so up to d = 2^13 no similarity exceeds 1 by 2^-41:
// none is rounded to more than 1, and a row stops at its first 1.
#pragma once

#include <float.h>

#include "pack.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {
namespace {

#if EFFATTN_HAS_BFLOAT16_DOT
using Filter = BFloat16Pair;
#else
using Filter = Float32;
#endif
using Word = Filter::Word;

inline constexpr int64_t kSteps = int64_t{1} << 40;    // similarities are multiples of 1 / kSteps
inline constexpr int64_t kIndices = int64_t{1} << 20;  // a key is level * kIndices + (kIndices - 1 - index)
inline constexpr int64_t kLongestFiltered = int64_t{1} << 16;
inline constexpr int64_t kLongestBounded = int64_t{1} << 13;

// Ordered like (level, descending index).
EFFATTN_INLINE constexpr int64_t key_of(int64_t level, int64_t index) {
  return level * kIndices + (kIndices - 1 - index);
}
EFFATTN_INLINE constexpr int64_t level_of(int64_t key) { return key >> 20; }
EFFATTN_INLINE constexpr int64_t index_of(int64_t key) { return kIndices - 1 - (key & (kIndices - 1)); }

// Half a register of floats as a register of doubles.
inline constexpr int kDoubles = kLanes / 2;
typedef float HalfFloats __attribute__((vector_size(4 * kDoubles)));
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));

EFFATTN_INLINE Doubles load_doubles(const float* from) {
  return __builtin_convertvector(load_as<HalfFloats>(from), Doubles);
}
EFFATTN_INLINE uint32_t lanes_at_least(Vec value, Vec limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)value, (__m512)limit, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(value >= limit)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(value >= limit)));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= uint32_t{value[lane] >= limit[lane]} << lane;
  return lanes;
#endif
}

inline double dot(const float* a, const float* b, int64_t length) {
  constexpr int kSums = 4;
  Doubles sum[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kDoubles <= length; c += kSums * kDoubles) {
    EFFATTN_UNROLL for (int i = 0; i < kSums; ++i) sum[i] +=
        load_doubles(a + c + i * kDoubles) * load_doubles(b + c + i * kDoubles);
  }
  for (; c + kDoubles <= length; c += kDoubles) sum[0] += load_doubles(a + c) * load_doubles(b + c);
  if (c < length) {
    const Vec rest_a = load_partial(a + c, length - c), rest_b = load_partial(b + c, length - c);
    float part_a[kLanes], part_b[kLanes];
    store(part_a, rest_a);
    store(part_b, rest_b);
    sum[1] += load_doubles(part_a) * load_doubles(part_b);
  }
  const Doubles total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double part[kDoubles];
  memcpy(part, &total, sizeof(part));
  EFFATTN_UNROLL for (int half = kDoubles / 2; half > 0; half /= 2) {
    EFFATTN_UNROLL for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  }
  return part[0];
}

// Infinite of a token of zeros: it is similar to nothing. NaN if an element is not finite.
inline double norm_of(const float* token, int64_t length) {
  const double norm = sqrt(dot(token, token, length));
  return norm == 0.0 ? static_cast<double>(INFINITY) : norm < INFINITY ? norm : static_cast<double>(NAN);
}

// The norm of a vector of the filter, rounded, and the norm of what the rounding took.
struct Measure {
  float norm, error;
};

// One token as the filter reads it: token / norm - centre. centre has its end padded with zeros, `to` is padded so.
inline Measure filter_words(Word* to, const float* token, double norm, const float* centre, int64_t length) {
  // The inverse of a very small or large norm is no float; a power of two first costs no rounding.
  const float power = norm < 0x1p-64 ? 0x1p64f : norm > 0x1p100 ? 0x1p-64f : 1.f;
  const Vec scale = broadcast(power),
            inverse = broadcast(static_cast<float>(1.0 / (norm * static_cast<double>(power))));
  Vec norms = {}, errors = {};
  int64_t c = 0;
  const auto step = [&](Vec token, Vec centre) __attribute__((always_inline)) {
    const Vec x = fma(token * scale, inverse, -centre);
    if constexpr (Filter::kPerWord == 1) {
      store(reinterpret_cast<float*>(to) + c, x);
      norms = fma(x, x, norms);
    } else {
      const HalfVec half = to_bfloat16(x);
      memcpy(reinterpret_cast<uint16_t*>(to) + c, &half, sizeof(half));
      const Vec rounded = (Vec)(__builtin_convertvector(half, WordVec) << 16);
      norms = fma(rounded, rounded, norms);
      errors = fma(x - rounded, x - rounded, errors);
    }
  };
  for (; c + kLanes <= length; c += kLanes) step(load(token + c), load(centre + c));
  if (c < length) {
    step(load_partial(token + c, length - c), load(centre + c));
    c += kLanes;
  }
  for (; c < round_up(words<Filter>(length), kLanes) * Filter::kPerWord; c += kLanes) step(Vec{}, Vec{});
  return {sqrtf(reduce_add(norms)), sqrtf(reduce_add(errors))};
}

// 2 eps of the row that measures x, over columns that measure at most w.
inline float margin_of(Measure x, Measure w, int64_t length) {
  if (length > kLongestFiltered) return INFINITY;
  const float n = static_cast<float>(2 * length) * 0x1p-24f, gamma = n / (1.f - n);
  const float eps = x.error * w.norm + (x.norm + x.error) * w.error + gamma * x.norm * w.norm;
  return 2.f * (1.02f * eps + 0x1p-19f);
}

// Tokens b as the filter and as the predicate read them.
struct Columns {
  int64_t count;
  const int32_t* index;  // of b, ascending: those that can be similar to anything
  const Word* packed;    // as pack_transposed
  const float* shift;    // centre . (v_j - centre), and -inf in the padding
  Measure largest;
  const float* tokens;  // token index[j] at index[j] * pitch
  int64_t pitch;
  const double* norm;  // of b, two apart
  int64_t length;
};

// A token of a on its way through the columns.
class Search {
 public:
  const float* token;
  double norm;
  float margin;
  float largest = -FLT_MAX;  // score
  int64_t key = INT64_MIN;

  // scores: of columns first ... first + count, padded to whole registers with -inf; peaks: a register for every
  // kTileColumns of them, the largest of each lane.
  void advance(const float* scores, const float* peaks, int64_t first, int64_t count, const Columns& columns) {
    const bool bounded = columns.length <= kLongestBounded;
    if (bounded && key >= key_of(kSteps, kIndices - 1)) return;
    const int64_t tiles = (count + kTileColumns - 1) / kTileColumns;
    Vec peak = broadcast(largest);
    for (int64_t t = 0; t < tiles; ++t) peak = max(peak, load(peaks + t * kLanes));
    largest = reduce_max(peak);
    const float lowest = largest - margin;
    const Vec limit = broadcast(lowest > -FLT_MAX ? lowest : -FLT_MAX);
    for (int64_t t = 0; t < tiles; ++t) {
      if (lanes_at_least(load(peaks + t * kLanes), limit) == 0) continue;
      for (int64_t c = t * kTileColumns; c < smaller(count, (t + 1) * kTileColumns); c += kLanes) {
        for (uint32_t lanes = lanes_at_least(load(scores + c), limit); lanes != 0; lanes &= lanes - 1) {
          const int64_t level = evaluate(columns.index[first + c + __builtin_ctz(lanes)], columns);
          if (bounded && level >= kSteps) return;
        }
      }
    }
  }

 private:
  int64_t evaluate(int64_t index, const Columns& columns) {
    const double product = dot(token, columns.tokens + index * columns.pitch, columns.length);
    const int64_t level = llrint(product / (norm * columns.norm[2 * index]) * static_cast<double>(kSteps));
    key = larger(key, key_of(level, index));
    return level;
  }
};

}  // namespace
}  // namespace effattn::EFFATTN_ISA
