// Fast Fourier transforms of powers of two, L = 8^a R with R = 2, 4 or 8, in shared or global memory.
//
//   X_k = sum_t x_t exp(-2 pi i t k / L); the inverse is not divided by L
//
// Forward by decimation in frequency: a pass at length n takes the 8 elements t + r n / 8 of every segment of n, makes
// their transform, multiplies element k with the root w_n^(t k), and leaves 8 segments of n / 8 to the next pass; the
// last, innermost pass takes R neighbours and no roots. The inverse runs the passes backwards by decimation in time.
// So nothing is ever reordered: a spectrum lies in an order that depends on L alone, the same in every kernel, and
// all that is done to a spectrum is to multiply and to add elements of one place.
//
// Roots: exp(-2 pi i t / n) for t < n / 8, the passes n = L, L / 8, ... one after the other, about L / 7 elements. The
// seven that a butterfly needs are products of the one that it reads.
#pragma once

#include "device.h"

namespace effattn::cuda {

template <class R>
struct Complex {
  R re, im;
};

template <class R>
EFFATTN_DEVICE Complex<R> operator+(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class R>
EFFATTN_DEVICE Complex<R> operator-(Complex<R> a, Complex<R> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class R>
EFFATTN_DEVICE Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class R>
EFFATTN_DEVICE Complex<R> conjugate(Complex<R> a) {
  return {a.re, -a.im};
}

template <class R>
EFFATTN_DEVICE Complex<R> load_complex(const Complex<R>* from) {
  const Vec<R, 2> x = load_global<2>(reinterpret_cast<const R*>(from));
  return {x[0], x[1]};
}
template <class R>
EFFATTN_DEVICE void store_complex(Complex<R>* to, Complex<R> x) {
  store_global(reinterpret_cast<R*>(to), Vec<R, 2>{{x.re, x.im}});
}

// ---- Butterflies: transforms in registers, in natural order

template <bool kInverse, class R>
EFFATTN_DEVICE Complex<R> quarter_turn(Complex<R> x) {  // times -i, inverse: times i
  return kInverse ? Complex<R>{-x.im, x.re} : Complex<R>{x.im, -x.re};
}
template <bool kInverse, class R>
EFFATTN_DEVICE Complex<R> eighth_turn(Complex<R> x) {
  constexpr R kHalfRoot = static_cast<R>(0.70710678118654752440);
  return kInverse ? Complex<R>{kHalfRoot * (x.re - x.im), kHalfRoot * (x.re + x.im)}
                  : Complex<R>{kHalfRoot * (x.re + x.im), kHalfRoot * (x.im - x.re)};
}

template <bool kInverse, class R>
EFFATTN_DEVICE void butterfly(Complex<R> (&x)[2]) {
  const Complex<R> sum = x[0] + x[1], difference = x[0] - x[1];
  x[0] = sum;
  x[1] = difference;
}
template <bool kInverse, class R>
EFFATTN_DEVICE void butterfly(Complex<R> (&x)[4]) {
  const Complex<R> a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = quarter_turn<kInverse>(x[1] - x[3]);
  x[0] = a + c;
  x[1] = b + d;
  x[2] = a - c;
  x[3] = b - d;
}
template <bool kInverse, class R>
EFFATTN_DEVICE void butterfly(Complex<R> (&x)[8]) {
  Complex<R> even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
  butterfly<kInverse>(even);
  butterfly<kInverse>(odd);
  odd[1] = eighth_turn<kInverse>(odd[1]);
  odd[2] = quarter_turn<kInverse>(odd[2]);
  odd[3] = eighth_turn<kInverse>(quarter_turn<kInverse>(odd[3]));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[k] = even[k] + odd[k];
    x[k + 4] = even[k] - odd[k];
  }
}

// x[k] *= w^k
template <class R>
EFFATTN_DEVICE void multiply_by_powers(Complex<R> (&x)[8], Complex<R> w) {
  const Complex<R> w2 = w * w, w3 = w2 * w, w4 = w2 * w2;
  x[1] = x[1] * w;
  x[2] = x[2] * w2;
  x[3] = x[3] * w3;
  x[4] = x[4] * w4;
  x[5] = x[5] * (w4 * w);
  x[6] = x[6] * (w4 * w2);
  x[7] = x[7] * (w4 * w3);
}

// ---- Lengths

// The passes of radix 8 of a transform of 2^log_length, and the innermost radix, 2, 4 or 8.
__host__ __device__ constexpr int eights(int log_length) { return (log_length - 1) / 3; }
__host__ __device__ constexpr int innermost(int log_length) { return 1 << (log_length - 3 * eights(log_length)); }

// Where the roots of the passes begin that follow `passes` of a transform of 2^log_length; with all passes: how many
// roots there are.
__host__ __device__ constexpr int64_t roots_before(int log_length, int passes) {
  int64_t count = 0;
  for (int pass = 0; pass < passes; ++pass) count += int64_t{1} << (log_length - 3 * pass - 3);
  return count;
}

// ---- Passes in shared memory

// A transform of 2^log_length elements in shared memory, by `threads` threads of which this is number `thread`. One
// unused element after every 16 keeps threads that take 8 neighbours each on different banks.
template <class R>
struct SharedTransform {
  SharedArray<R> data;
  int log_length, thread, threads;

  static __host__ __device__ constexpr int padded(int length) { return length + length / 16; }

  EFFATTN_DEVICE Complex<R> get(int i) const {
    const Vec<R, 2> x = data.template load<2>(2 * (i + (i >> 4)));
    return {x[0], x[1]};
  }
  EFFATTN_DEVICE void set(int i, Complex<R> x) const {
    data.template store<2>(2 * (i + (i >> 4)), Vec<R, 2>{{x.re, x.im}});
  }

  // The pass at length 2^log_n, `roots` those of this pass.
  template <bool kInverse>
  EFFATTN_DEVICE void pass(int log_n, const Complex<R>* roots) const {
    const int log_stride = log_n - 3;
    for (int i = thread; i < 1 << (log_length - 3); i += threads) {
      const int t = i & ((1 << log_stride) - 1), first = (i >> log_stride << log_n) + t;
      const Complex<R> w = load_complex(roots + t);
      Complex<R> x[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) x[r] = get(first + (r << log_stride));
      if (kInverse) multiply_by_powers(x, conjugate(w));
      butterfly<kInverse>(x);
      if (!kInverse) multiply_by_powers(x, w);
#pragma unroll
      for (int r = 0; r < 8; ++r) set(first + (r << log_stride), x[r]);
    }
  }

  // All passes below length 2^log_n but the innermost; a barrier before each. `roots`: of the first of them.
  EFFATTN_DEVICE void forward_passes(int log_n, const Complex<R>* roots) const {
    for (int pass_n = log_n; pass_n > 3; pass_n -= 3) {
      sync_block();
      pass<false>(pass_n, roots);
      roots += int64_t{1} << (pass_n - 3);
    }
    sync_block();
  }
  // The same backwards; a barrier after each.
  EFFATTN_DEVICE void inverse_passes(int log_n, const Complex<R>* roots) const {
    sync_block();
    const int count = eights(log_n);
    roots += roots_before(log_n, count);
    for (int left = count; left > 0; --left) {
      const int pass_n = log_n - 3 * (left - 1);
      roots -= int64_t{1} << (pass_n - 3);
      pass<true>(pass_n, roots);
      sync_block();
    }
  }

  // The innermost pass: forward, multiplied with the spectrum (or its conjugate), inverse. What is not wanted, left
  // out.
  template <int kRadix>
  EFFATTN_DEVICE void innermost_pass(bool forward, const Complex<R>* spectrum, bool conjugated, bool inverse) const {
    for (int i = thread * kRadix; i < 1 << log_length; i += threads * kRadix) {
      Complex<R> x[kRadix];
#pragma unroll
      for (int r = 0; r < kRadix; ++r) x[r] = get(i + r);
      if (forward) butterfly<false>(x);
      if (spectrum != nullptr) {
#pragma unroll
        for (int r = 0; r < kRadix; ++r) {
          const Complex<R> factor = load_complex(spectrum + i + r);
          x[r] = x[r] * (conjugated ? conjugate(factor) : factor);
        }
      }
      if (inverse) butterfly<true>(x);
#pragma unroll
      for (int r = 0; r < kRadix; ++r) set(i + r, x[r]);
    }
  }
  EFFATTN_DEVICE void innermost_pass(bool forward, const Complex<R>* spectrum, bool conjugated, bool inverse) const {
    const int radix = innermost(log_length);
    if (radix == 8)
      innermost_pass<8>(forward, spectrum, conjugated, inverse);
    else if (radix == 4)
      innermost_pass<4>(forward, spectrum, conjugated, inverse);
    else
      innermost_pass<2>(forward, spectrum, conjugated, inverse);
  }
};

// How transforms of one length share a block: `groups` of them, `threads` threads each, powers of two, whole warps.
struct BlockShape {
  int groups, threads;
  size_t shared;  // bytes
};

inline constexpr int kTransformThreads = 512;  // of a block at most

// Several transforms a block, up to `wanted`, where one has few threads. No room at all: groups = 0.
template <class R>
BlockShape block_shape(int log_length, int64_t wanted, size_t shared_limit) {
  const int butterflies = log_length > 3 ? 1 << (log_length - 3) : 1;
  BlockShape shape = {1, butterflies < kTransformThreads ? butterflies : kTransformThreads, 0};
  const auto bytes = [&](int groups) {
    return shared_bytes<R>(static_cast<size_t>(groups) * 2 * SharedTransform<R>::padded(1 << log_length));
  };
  while (shape.groups * shape.threads < kWarp) shape.groups *= 2;
  if (log_length > 20 || bytes(shape.groups) > shared_limit) return {0, 0, 0};
  while (shape.groups * shape.threads < kTransformThreads / 2 && shape.groups < wanted &&
         bytes(2 * shape.groups) <= shared_limit)
    shape.groups *= 2;
  shape.shared = bytes(shape.groups);
  return shape;
}

}  // namespace effattn::cuda
