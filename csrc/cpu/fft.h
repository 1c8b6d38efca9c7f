// A fast Fourier transform for convolutions, in float or double:
//
//   X_f = sum_j x_j e^(-2 pi i j f / L),   L = W R_1 ... R_k even, x_j = 0 from L / 2 on
//
// and back, for j < L / 2, without the 1 / L. W is the number of lanes of a register, R_1 ... R_k the radices 2, 3, 4, 5
// and 8. Spectra stay in the order in which the transform leaves them, which a product of spectra does not mind.
//
// One step divides the residue of x modulo z^m - e^(-2 pi i t) into residues modulo the R factors of that polynomial,
// z^(m / R) - e^(-2 pi i (t + s) / R): a_s times e^(-2 pi i s t / R), then a DFT over the R parts of the residue. The
// twiddle factors are those of a whole block, so a loop over a block keeps them in registers.
//
//   enter    the step of radix W over W parts of x, half of them 0: two DFTs of W / 2 registers whose lanes are
//            neighbouring j, then W x W elements are transposed. From here on the lanes are W blocks side by side
//
//   middle   the steps R_1 ... R_k, a product with spectra, and the same steps inverted. Blocks that exceed the first
//            cache are finished one after the other; the last step, the product and its inverse meet in registers
//
//   leave    the inverse of enter: only the first half is computed
//
// Numbers: [row of L / W][W real parts, W imaginary parts], 2 L numbers; as many for twiddle factors, which are computed
// in double. 5 L log2 L FLOPs a transform; the numbers pass through the second cache once each way.
#pragma once

#include "scratch.h"

namespace effattn::EFFATTN_ISA {
namespace fft {

typedef double DoubleVec __attribute__((vector_size(4 * kLanes)));

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using Vector = Vec;
};
template <>
struct LanesOf<double> {
  using Vector = DoubleVec;
};

template <class T>
using VectorOf = typename LanesOf<T>::Vector;
template <class T>
inline constexpr int kLanesOf = sizeof(VectorOf<T>) / sizeof(T);

template <class T>
EFFATTN_INLINE VectorOf<T> at(const T* from) {
  return load_as<VectorOf<T>>(from);
}
template <class T>
EFFATTN_INLINE void put(T* to, VectorOf<T> value) {
  memcpy(to, &value, sizeof(value));
}
template <class T>
EFFATTN_INLINE VectorOf<T> all(T value) {
  return value - VectorOf<T>{};
}

// a_0 b_0 a_1 b_1 ...: the first register, and the second.
template <class T>
EFFATTN_INLINE void interleave(VectorOf<T> a, VectorOf<T> b, VectorOf<T>& low, VectorOf<T>& high) {
  if constexpr (kLanesOf<T> == 16) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (kLanesOf<T> == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (kLanesOf<T> == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    static_assert(kLanesOf<T> == 2);
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  }
}

// Every round moves the highest bit of the lane below the bits of the register, and the other way round.
template <class T>
EFFATTN_INLINE void transpose(VectorOf<T> (&a)[kLanesOf<T>]) {
  constexpr int kCount = kLanesOf<T>;
  EFFATTN_UNROLL for (int round = 1; round < kCount; round *= 2) {
    VectorOf<T> b[kCount];
    EFFATTN_UNROLL for (int i = 0; i < kCount / 2; ++i)
        interleave<T>(a[i], a[i + kCount / 2], b[2 * i], b[2 * i + 1]);
    EFFATTN_UNROLL for (int i = 0; i < kCount; ++i) a[i] = b[i];
  }
}

template <class T>
struct Complex {
  VectorOf<T> re, im;

  EFFATTN_INLINE Complex operator+(const Complex& b) const { return {re + b.re, im + b.im}; }
  EFFATTN_INLINE Complex operator-(const Complex& b) const { return {re - b.re, im - b.im}; }
  EFFATTN_INLINE Complex operator*(const Complex& b) const {
    return {re * b.re - im * b.im, re * b.im + im * b.re};
  }
  EFFATTN_INLINE Complex operator*(T b) const { return {re * b, im * b}; }
  EFFATTN_INLINE Complex conj() const { return {re, -im}; }
  EFFATTN_INLINE Complex by_minus_i() const { return {im, -re}; }
  // Between swapped numbers a DFT is its inverse and a factor its conjugate.
  EFFATTN_INLINE Complex swapped() const { return {im, re}; }
};

template <class T>
EFFATTN_INLINE Complex<T> load_complex(const T* row) {
  return {at(row), at(row + kLanesOf<T>)};
}
template <class T>
EFFATTN_INLINE void store_complex(T* row, const Complex<T>& value) {
  put(row, value.re);
  put(row + kLanesOf<T>, value.im);
}

template <int kRadix, class T>
EFFATTN_INLINE void dft(Complex<T> (&a)[kRadix]) {
  if constexpr (kRadix == 2) {
    const Complex<T> sum = a[0] + a[1];
    a[1] = a[0] - a[1];
    a[0] = sum;
  } else if constexpr (kRadix == 3) {
    constexpr T kSine = T(0.86602540378443864676);
    const Complex<T> sum = a[1] + a[2], turned = (a[1] - a[2]).by_minus_i() * kSine, middle = a[0] - sum * T(0.5);
    a[0] = a[0] + sum;
    a[1] = middle + turned;
    a[2] = middle - turned;
  } else if constexpr (kRadix == 4) {
    const Complex<T> even = a[0] + a[2], odd = a[1] + a[3], low = a[0] - a[2], high = (a[1] - a[3]).by_minus_i();
    a[0] = even + odd;
    a[1] = low + high;
    a[2] = even - odd;
    a[3] = low - high;
  } else if constexpr (kRadix == 5) {
    constexpr T kCosine1 = T(0.30901699437494742410), kCosine2 = T(-0.80901699437494742410);
    constexpr T kSine1 = T(0.95105651629515357212), kSine2 = T(0.58778525229247312917);
    const Complex<T> sum1 = a[1] + a[4], sum2 = a[2] + a[3];
    const Complex<T> difference1 = (a[1] - a[4]).by_minus_i(), difference2 = (a[2] - a[3]).by_minus_i();
    const Complex<T> middle1 = a[0] + sum1 * kCosine1 + sum2 * kCosine2,
                     middle2 = a[0] + sum1 * kCosine2 + sum2 * kCosine1;
    const Complex<T> turned1 = difference1 * kSine1 + difference2 * kSine2,
                     turned2 = difference1 * kSine2 - difference2 * kSine1;
    a[0] = a[0] + sum1 + sum2;
    a[1] = middle1 + turned1;
    a[2] = middle2 + turned2;
    a[3] = middle2 - turned2;
    a[4] = middle1 - turned1;
  } else if constexpr (kRadix == 8) {
    constexpr T kHalfRoot = T(0.70710678118654752440);
    Complex<T> even[4] = {a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]};
    const Complex<T> b1 = a[1] - a[5], b3 = a[3] - a[7];
    Complex<T> odd[4] = {a[0] - a[4], Complex<T>{b1.re + b1.im, b1.im - b1.re} * kHalfRoot, (a[2] - a[6]).by_minus_i(),
        Complex<T>{b3.im - b3.re, -(b3.re + b3.im)} * kHalfRoot};
    dft<4>(even);
    dft<4>(odd);
    EFFATTN_UNROLL for (int i = 0; i < 4; ++i) a[2 * i] = even[i], a[2 * i + 1] = odd[i];
  } else {
    static_assert(kRadix == 1);
  }
}

// e^(-2 pi i e / length) for any e below length, from two short tables.
class Roots {
 public:
  explicit Roots(int64_t length) {
    while (int64_t{1} << (2 * bits_) < length) ++bits_;
    fine_ = buffer_.reserve<double>(2 * ((int64_t{1} << bits_) + (length >> bits_) + 1));
    coarse_ = fine_ + (int64_t{2} << bits_);
    for (int64_t i = 0; i < int64_t{1} << bits_; ++i) set(fine_ + 2 * i, i, length);
    for (int64_t i = 0; i <= length >> bits_; ++i) set(coarse_ + 2 * i, i << bits_, length);
  }
  void get(int64_t exponent, double& re, double& im) const {
    const double* f = fine_ + 2 * (exponent & ((int64_t{1} << bits_) - 1));
    const double* c = coarse_ + 2 * (exponent >> bits_);
    re = c[0] * f[0] - c[1] * f[1];
    im = c[0] * f[1] + c[1] * f[0];
  }

 private:
  static void set(double* to, int64_t exponent, int64_t length) {
    constexpr double kTurn = 6.283185307179586476925;
    to[0] = cos(kTurn * static_cast<double>(exponent) / static_cast<double>(length));
    to[1] = -sin(kTurn * static_cast<double>(exponent) / static_cast<double>(length));
  }
  Buffer buffer_;
  int bits_ = 0;
  double *fine_, *coarse_;
};

// The radices of a length, largest blocks first.
template <class T>
struct Radices {
  static constexpr int kLanesHere = kLanesOf<T>, kMost = 40;
  int count = 0, radix[kMost];

  explicit Radices(int64_t length) {
    int64_t rest = length / kLanesHere;
    for (const int odd : {5, 3})
      for (; rest % odd == 0; rest /= odd) radix[count++] = odd;
    int twos = 0;
    for (; rest > 1; rest /= 2) ++twos;
    const int eights = twos % 2 == 1 && twos >= 3 ? 1 : 0;
    for (int i = 0; i < (twos - 3 * eights) / 2; ++i) radix[count++] = 4;
    for (int i = 0; i < eights; ++i) radix[count++] = 8;
    if (twos == 1) radix[count++] = 2;
  }

  // Of a transform, relative: what a number costs at every step.
  double cost() const {
    double each = 3.0;
    for (int i = 0; i < count; ++i)
      each += radix[i] == 2 ? 1.3 : radix[i] == 3 ? 2.0 : radix[i] == 4 ? 2.0 : radix[i] == 5 ? 3.2 : 3.0;
    return each;
  }
};

// The cheapest length from `least` on. A multiple of 2 kLanes, so float and double can have the same.
inline int64_t length_from(int64_t least) {
  constexpr int64_t kUnit = 2 * kLanes;
  int64_t best = 0;
  double lowest = 0.0;
  for (int64_t fives = 1; fives <= 125; fives *= 5)
    for (int64_t odd = fives; odd <= 27 * fives; odd *= 3) {
      int64_t length = kUnit * odd;
      while (length < least) length *= 2;
      const double cost = Radices<float>(length).cost() * static_cast<double>(length);
      if (best == 0 || cost < lowest) best = length, lowest = cost;
    }
  return best;
}

template <class T>
class Transform {
 public:
  using V = VectorOf<T>;
  static constexpr int kWidth = kLanesOf<T>, kHalf = kWidth / 2, kRow = 2 * kWidth;

  explicit Transform(int64_t length) : length_(length), rows_(length / kWidth), radices_(length) {
    twiddles_ = tables_.reserve<T>(rows_ * kRow);
    frequencies_ = places_.reserve<int64_t>(rows_);
    const Roots roots(length);
    T* to = twiddles_;
    frequencies_[0] = 0;
    int64_t blocks = 1;
    for (int level = 0; level < radices_.count; ++level) {
      const int radix = radices_.radix[level];
      const int64_t step = rows_ / blocks / radix;
      level_[level] = to;
      for (int64_t block = 0; block < blocks; ++block)
        for (int s = 1; s < radix; ++s, to += kRow)
          for (int lane = 0; lane < kWidth; ++lane) {
            double re, im;
            roots.get(s * (frequencies_[block] + first_frequency(lane)) * step, re, im);
            to[lane] = static_cast<T>(re);
            to[kWidth + lane] = static_cast<T>(im);
          }
      for (int64_t block = blocks - 1; block >= 0; --block)
        for (int s = radix - 1; s >= 0; --s)
          frequencies_[block * radix + s] = frequencies_[block] + s * blocks * kWidth;
      blocks *= radix;
    }
  }

  int64_t length() const { return length_; }
  int64_t rows() const { return rows_; }
  // Numbers of a spectrum, and of an array that is transformed in place: rows beyond the last stay 0.
  int64_t spectrum_size() const { return rows_ * kRow; }
  int64_t array_size() const { return (rows_ + kWidth) * kRow; }
  void clear_tail(T* array) const { memset(array + rows_ * kRow, 0, kWidth * kRow * sizeof(T)); }
  // What a source may read and a sink write: positions below this.
  int64_t positions() const { return length_ / 2 + kWidth; }
  int64_t frequency(int64_t row, int lane) const { return frequencies_[row] + first_frequency(lane); }
  static constexpr bool is_odd(int lane) { return lane >= kHalf; }

  // source(j): x_j ... as Complex, kWidth of them.
  template <class Source>
  void enter(T* array, const Source& source) const {
    for (int64_t j = 0; j < rows_; j += kWidth) {
      Complex<T> even[kHalf], odd[kHalf];
      EFFATTN_UNROLL for (int part = 0; part < kHalf; ++part) {
        even[part] = source(part * rows_ + j);
        odd[part] = part == 0 ? even[part] : even[part] * root(part);
      }
      dft<kHalf>(even);
      dft<kHalf>(odd);
      V re[kWidth], im[kWidth];
      EFFATTN_UNROLL for (int i = 0; i < kHalf; ++i) {
        re[i] = even[i].re, im[i] = even[i].im;
        re[kHalf + i] = odd[i].re, im[kHalf + i] = odd[i].im;
      }
      transpose<T>(re);
      transpose<T>(im);
      T* to = array + j * kRow;
      const int64_t left = rows_ - j;
      if (left >= kWidth) {
        EFFATTN_UNROLL for (int i = 0; i < kWidth; ++i) put(to + i * kRow, re[i]), put(to + i * kRow + kWidth, im[i]);
      } else {
        for (int i = 0; i < kWidth; ++i)
          if (i < left) put(to + i * kRow, re[i]), put(to + i * kRow + kWidth, im[i]);
      }
    }
  }

  // sink(j, real, imaginary) for x_j ...; where rows() is no multiple of kWidth, x of 0 for some that come again.
  template <class Sink>
  void leave(const T* array, const Sink& sink) const {
    for (int64_t j = 0; j < rows_; j += kWidth) {
      const T* from = array + j * kRow;
      V re[kWidth], im[kWidth];
      EFFATTN_UNROLL for (int i = 0; i < kWidth; ++i) re[i] = at(from + i * kRow), im[i] = at(from + i * kRow + kWidth);
      transpose<T>(re);
      transpose<T>(im);
      Complex<T> even[kHalf], odd[kHalf];
      EFFATTN_UNROLL for (int i = 0; i < kHalf; ++i) {
        even[i] = {im[i], re[i]};
        odd[i] = {im[kHalf + i], re[kHalf + i]};
      }
      dft<kHalf>(even);
      dft<kHalf>(odd);
      EFFATTN_UNROLL for (int part = 0; part < kHalf; ++part) {
        const Complex<T> sum = even[part] + (part == 0 ? odd[part] : odd[part] * root(part));
        sink(part * rows_ + j, sum.im, sum.re);
      }
    }
  }

  // Forward steps of arrays[0] ..., then apply(row, numbers of every array), then, if kBack, the steps back.
  template <bool kBack, int kArrays, class Apply>
  void middle(T* const (&arrays)[kArrays], const Apply& apply) const {
    descend<kBack>(0, 0, arrays, apply);
  }

 private:
  static constexpr int64_t kFirstCache = 16384;  // bytes of the blocks that are worked on level by level

  static constexpr int64_t first_frequency(int lane) { return lane < kHalf ? 2 * lane : 2 * (lane - kHalf) + 1; }

  // e^(-2 pi i part / kWidth).
  static EFFATTN_INLINE Complex<T> root(int part) {
    constexpr double kCosine[9] = {1.0, 0.92387953251128675613, 0.70710678118654752440, 0.38268343236508977173, 0.0,
        -0.38268343236508977173, -0.70710678118654752440, -0.92387953251128675613, -1.0};
    const int sixteenths = part * (16 / kWidth);
    return {all(T(kCosine[sixteenths])), all(T(-kCosine[sixteenths < 4 ? 4 - sixteenths : sixteenths - 4]))};
  }

  int64_t blocks_at(int level) const {
    int64_t blocks = 1;
    for (int i = 0; i < level; ++i) blocks *= radices_.radix[i];
    return blocks;
  }

  template <bool kBack, int kArrays, class Apply>
  void descend(int level, int64_t block, T* const (&arrays)[kArrays], const Apply& apply) const {
    const int last = radices_.count - 1, radix = radices_.radix[level];
    int64_t rows = rows_ / blocks_at(level);
    const int64_t first_row = block * rows;
    if (level < last && rows * kRow * static_cast<int64_t>(sizeof(T)) * kArrays > kFirstCache) {
      for (T* array : arrays) steps<true>(level, array + first_row * kRow, block, 1, rows / radix);
      for (int s = 0; s < radix; ++s) descend<kBack>(level + 1, block * radix + s, arrays, apply);
      if constexpr (kBack)
        for (T* array : arrays) steps<false>(level, array + first_row * kRow, block, 1, rows / radix);
      return;
    }
    int64_t count = 1;
    for (int l = level; l < last; ++l) {
      rows /= radices_.radix[l];
      for (T* array : arrays) steps<true>(l, array + first_row * kRow, block, count, rows);
      count *= radices_.radix[l], block *= radices_.radix[l];
    }
    with_radix(radices_.radix[last], [&](auto size) __attribute__((always_inline)) {
      turn<kBack, size.value>(first_row, block, count, arrays, apply);
    });
    if constexpr (kBack)
      for (int l = last - 1; l >= level; --l) {
        count /= radices_.radix[l], block /= radices_.radix[l];
        for (T* array : arrays) steps<false>(l, array + first_row * kRow, block, count, rows);
        rows *= radices_.radix[l];
      }
  }

  template <int kValue>
  struct Radix {
    static constexpr int value = kValue;
  };
  template <class Body>
  static EFFATTN_INLINE void with_radix(int radix, const Body& body) {
    switch (radix) {
      case 2:
        return body(Radix<2>());
      case 3:
        return body(Radix<3>());
      case 4:
        return body(Radix<4>());
      case 5:
        return body(Radix<5>());
      default:
        return body(Radix<8>());
    }
  }

  // Blocks block ... of a level, count of them, of R parts of `rows` rows.
  template <bool kForward>
  void steps(int level, T* array, int64_t block, int64_t count, int64_t rows) const {
    with_radix(radices_.radix[level], [&](auto size) __attribute__((always_inline)) {
      constexpr int kRadix = size.value;
      const T* factor = level_[level] + block * (kRadix - 1) * kRow;
      for (int64_t b = 0; b < count; ++b, factor += (kRadix - 1) * kRow, array += kRadix * rows * kRow)
        step<kForward, kRadix>(array, rows, factor);
    });
  }

  template <bool kForward, int kRadix>
  static __attribute__((noinline)) void step(T* array, int64_t rows, const T* factor) {
    Complex<T> twiddle[kRadix];
    EFFATTN_UNROLL for (int s = 1; s < kRadix; ++s) twiddle[s] = load_complex(factor + (s - 1) * kRow);
    const int64_t part = rows * kRow;
    for (int64_t j = 0; j < rows; ++j, array += kRow) {
      Complex<T> a[kRadix];
      EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) a[s] = load_complex(array + s * part);
      if constexpr (kForward) {
        EFFATTN_UNROLL for (int s = 1; s < kRadix; ++s) a[s] = a[s] * twiddle[s];
        dft<kRadix>(a);
      } else {
        EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) a[s] = a[s].swapped();
        dft<kRadix>(a);
        EFFATTN_UNROLL for (int s = 1; s < kRadix; ++s) a[s] = a[s] * twiddle[s];
        EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) a[s] = a[s].swapped();
      }
      EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) store_complex(array + s * part, a[s]);
    }
  }

  template <bool kBack, int kRadix, int kArrays, class Apply>
  void turn(int64_t row, int64_t block, int64_t count, T* const (&arrays)[kArrays], const Apply& apply) const {
    const T* factor = level_[radices_.count - 1] + block * (kRadix - 1) * kRow;
    for (int64_t b = 0; b < count; ++b, row += kRadix, factor += (kRadix - 1) * kRow) {
      Complex<T> a[kArrays][kRadix];
      EFFATTN_UNROLL for (int i = 0; i < kArrays; ++i) {
        EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) {
          a[i][s] = load_complex(arrays[i] + (row + s) * kRow);
          if (s > 0) a[i][s] = a[i][s] * load_complex(factor + (s - 1) * kRow);
        }
        dft<kRadix>(a[i]);
      }
      EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) {
        Complex<T> numbers[kArrays];
        EFFATTN_UNROLL for (int i = 0; i < kArrays; ++i) numbers[i] = a[i][s];
        apply(row + s, numbers);
        EFFATTN_UNROLL for (int i = 0; i < kArrays; ++i) a[i][s] = numbers[i].swapped();
      }
      if constexpr (kBack) EFFATTN_UNROLL for (int i = 0; i < kArrays; ++i) {
          dft<kRadix>(a[i]);
          EFFATTN_UNROLL for (int s = 0; s < kRadix; ++s) {
            if (s > 0) a[i][s] = a[i][s] * load_complex(factor + (s - 1) * kRow);
            store_complex(arrays[i] + (row + s) * kRow, a[i][s].swapped());
          }
        }
    }
  }

  const int64_t length_, rows_;
  const Radices<T> radices_;
  Buffer tables_, places_;
  T* twiddles_;
  T* level_[Radices<T>::kMost];
  int64_t* frequencies_;  // of lane 0 of every row
};

}  // namespace fft
}  // namespace effattn::EFFATTN_ISA
