// exp, sin and cos of a register of floats to float accuracy, over the whole range.
//
//   exp    x = n ln 2 + r, e^r = 1 + r + r^2 p(r); ln 2 in two parts
//   sin    x = n pi / 2 + r with |n| < 2^15; pi / 2 in three parts whose products with n are exact, so |r| <= pi / 4
//          keeps its digits; r + r^3 p(r^2) and 1 - r^2 / 2 + r^4 q(r^2), exchanged and negated by n mod 4
//
// Polynomials are minimax fits; their relative errors, 4e-9 at most, are below rounding.
#pragma once

#include "simd.h"

namespace effattn::EFFATTN_ISA::features {

EFFATTN_INLINE Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

// 0 below -104 and infinity from 88.8 on; NaN stays NaN.
EFFATTN_INLINE Vec exp(Vec x) {
  x = max(broadcast(-104.f), x);  // the second operand where one is NaN
  x = -max(broadcast(-89.f), -x);
  const Vec n = floor(fma(x, broadcast(1.44269504088896340736f), broadcast(0.5f)));
  const Vec r = fma(n, broadcast(-3.194618329871446e-05f), fma(n, broadcast(-0.693115234375f), x));
  Vec p = broadcast(0.0013813142431899905f);
  p = fma(p, r, broadcast(0.00836941972374916f));
  p = fma(p, r, broadcast(0.04166845604777336f));
  p = fma(p, r, broadcast(0.16666515171527863f));
  p = fma(p, r, broadcast(0.4999999403953552f));
  p = fma(p * r, r, r) + 1.f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const IntVec power = __builtin_convertvector(n, IntVec), half = power >> 1;  // 2^n itself may not be a float
  return p * (Vec)((half + 127) << 23) * (Vec)((power - half + 127) << 23);
#endif
}

struct SineCosine {
  Vec sine, cosine;
};

inline constexpr float kLargestAngle = 16384.f;

// |x| <= kLargestAngle.
EFFATTN_INLINE SineCosine sine_cosine(Vec x) {
  const Vec n = floor(fma(x, broadcast(0.63661977236758134308f), broadcast(0.5f)));
  Vec r = fma(n, broadcast(-1.5703125f), x);
  r = fma(n, broadcast(-0.00048351287841796875f), r);
  r = fma(n, broadcast(-3.1391647326017846e-07f), r);
  const Vec square = r * r;
  Vec p = broadcast(-0.00019502134819049388f);
  p = fma(p, square, broadcast(0.00833206344395876f));
  p = fma(p, square, broadcast(-0.16666653752326965f));
  const Vec sine = fma(p * square, r, r);
  Vec q = broadcast(2.4418126486125402e-05f);
  q = fma(q, square, broadcast(-0.0013887184904888272f));
  q = fma(q, square, broadcast(0.04166664183139801f));
  const Vec cosine = fma(q * square, square, fma(square, broadcast(-0.5f), broadcast(1.f)));
  const IntVec quarter = __builtin_convertvector(n, IntVec), exchange = -(quarter & 1);
  const IntVec s = ((IntVec)cosine & exchange) | ((IntVec)sine & ~exchange);
  const IntVec c = ((IntVec)sine & exchange) | ((IntVec)cosine & ~exchange);
  return {(Vec)(s ^ ((quarter & 2) << 30)), (Vec)(c ^ (((quarter + 1) & 2) << 30))};
}

// Any x, by the C library.
inline SineCosine sine_cosine_of_large(Vec x) {
  float angle[kLanes], sine[kLanes], cosine[kLanes];
  store(angle, x);
  for (int lane = 0; lane < kLanes; ++lane) sine[lane] = sinf(angle[lane]), cosine[lane] = cosf(angle[lane]);
  return {load(sine), load(cosine)};
}

}  // namespace effattn::EFFATTN_ISA::features
