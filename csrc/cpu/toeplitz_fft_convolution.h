// Convolutions with the weights of a head, one after the other in the same memory.
#pragma once

#include "toeplitz_fft_operands.h"

namespace effattn::EFFATTN_ISA {
namespace toeplitz_fft {

// What a thread keeps.
template <class T>
struct Scratch {
  Buffer query, key, value, output, gradient, array, other;
  void trim() {
    for (Buffer* buffer : {&query, &key, &value, &output, &gradient, &array, &other}) buffer->trim();
  }
};

template <class T>
Scratch<T>& scratch() {
  static thread_local Scratch<T> kept;
  return kept;
}

template <class T>
class Convolution {
 public:
  Convolution(const Transform<T>& transform, const T* spectrum, Scratch<T>& s)
      : transform_(transform), spectrum_(spectrum), array_(s.array.template reserve<T>(transform.array_size())) {
    transform.clear_tail(array_);
  }

  // sink gets C x of x from source.
  template <class Source, class Sink>
  void run(const Source& source, const Sink& sink) const {
    T* const arrays[1] = {array_};
    transform_.enter(array_, source);
    transform_.template middle<true>(arrays, Product{spectrum_});
    transform_.leave(array_, sink);
  }

 private:
  struct Product {
    const T* spectrum;
    EFFATTN_INLINE void operator()(int64_t row, Complex<T> (&x)[1]) const {
      x[0] = x[0] * fft::load_complex(spectrum + row * Transform<T>::kRow);
    }
  };

  const Transform<T>& transform_;
  const T* spectrum_;
  T* array_;
};

// C x, C^T u, and correlation += the spectrum of sum_i u_i x_{i+r}, which for two channels in a complex number is that
// of both sums in the real part.
template <class T>
class TwoConvolutions {
 public:
  TwoConvolutions(const Transform<T>& transform, const T* spectrum, T* correlation, Scratch<T>& s)
      : transform_(transform),
        spectrum_(spectrum),
        correlation_(correlation),
        arrays_{
            s.array.template reserve<T>(transform.array_size()), s.other.template reserve<T>(transform.array_size())} {
    for (T* array : arrays_) transform.clear_tail(array);
  }

  template <class SourceX, class SourceU, class SinkX, class SinkU>
  void run(const SourceX& x, const SourceU& u, const SinkX& weighted, const SinkU& transposed) const {
    const T* spectrum = spectrum_;
    T* correlation = correlation_;
    transform_.enter(arrays_[0], x);
    transform_.enter(arrays_[1], u);
    transform_.template middle<true>(arrays_, [=](int64_t row, Complex<T>(&a)[2]) __attribute__((always_inline)) {
      const Complex<T> weight = fft::load_complex(spectrum + row * Transform<T>::kRow);
      T* sum = correlation + row * Transform<T>::kRow;
      fft::store_complex(sum, fft::load_complex(sum) + a[1].conj() * a[0]);
      a[0] = a[0] * weight;
      a[1] = a[1] * weight.conj();
    });
    transform_.leave(arrays_[0], weighted);
    transform_.leave(arrays_[1], transposed);
  }

 private:
  const Transform<T>& transform_;
  const T* spectrum_;
  T* correlation_;
  T* const arrays_[2];
};

// Spectra of all heads, and the Euclidean norms of their weights.
template <class T>
void make_spectra(const Runtime& runtime, const Toeplitz& arguments, const Sizes& sizes, const Transform<T>& transform,
    T* spectra, double* norms) {
  const Exact exact(sizes);
  for_items(
      runtime, sizes.heads, 60.0 * static_cast<double>(sizes.heads * sizes.length), [&](int64_t begin, int64_t end) {
        Buffer buffer;
        for (int64_t head = begin; head < end; ++head) {
          const Weights weights(arguments, sizes, head, buffer);
          exact.spectrum(spectra + head * transform.spectrum_size(), transform,
              [&](int64_t r) { return weights[r + sizes.positions - 1]; });
          norms[head] = weights.norm();
        }
      });
}

}  // namespace toeplitz_fft
}  // namespace effattn::EFFATTN_ISA
