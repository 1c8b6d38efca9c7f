// Toeplitz-weighted linear attention by fast Fourier transforms (NPRF, arXiv 2106.12566), in float or in double.
//
//   o_i = sum_m q_im (C (k_m v_d))_i / n_i,   n_i = sum_m q_im (C k_m)_i + eps,   (C x)_i = sum_j c_{j-i} x_j
//
// C x is a product of spectra of length L >= 2 P - 1, P positions of tokens: a grid is a sequence with gaps
// (toeplitz_fft_operands.h). c is real, so that two channels, v_d + i v_{d+1}, share a complex transform and come out
// apart.
//
// A unit of work is up to kChannels channels of a head, over all m: k_m v is formed where the transform reads it, and
// the transform's last step adds q_m times what it gives to the outputs, so nothing of size N M D exists. A unit holds
// its channels of v and o, kFeatures columns of q and k and one transform: (2 kChannels + 2 kFeatures) P + 2 L numbers.
// Normalizers come first, in pairs of m. Spectra of c are made in double, one a head: 2 H L numbers.
//
// FLOPs: about 5 L log2 L M (D + 1) a head. Rows whose weights the transform cannot tell from 0 give 0.
#include "toeplitz_fft_gradient.h"

namespace effattn::EFFATTN_ISA {
namespace toeplitz_fft {
namespace {

template <class T>
class Forward {
 public:
  Forward(const Toeplitz& arguments, const ToeplitzResult& result)
      : a_(arguments), result_(result), sizes_(arguments), transform_(sizes_.length) {
    const int64_t enough = (kFewestUnits + sizes_.pairs() - 1) / larger(sizes_.pairs(), 1);
    group_ = smaller(kChannels, larger(round_up((sizes_.channels + enough - 1) / enough, 2), 2));
  }

  void run(const Runtime& runtime) {
    if (sizes_.pairs() == 0 || sizes_.tokens == 0) return;
    spectra_ = spectra_buffer_.reserve<T>(sizes_.heads * transform_.spectrum_size() + 1);
    norms_ = norms_buffer_.reserve<double>(sizes_.heads);
    make_spectra(runtime, a_, sizes_, transform_, spectra_, norms_);
    for_items(runtime, sizes_.pairs(), sizes_.flops() / static_cast<double>(sizes_.channels + 1),
        [&](int64_t begin, int64_t end) {
          for (int64_t pair = begin; pair < end; ++pair) normalizers(pair);
          scratch<T>().trim();
        });
    const int64_t groups = (sizes_.channels + group_ - 1) / group_;
    for_items(runtime, sizes_.pairs() * groups, 2 * sizes_.flops(), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) outputs(unit / groups, unit % groups * group_);
      scratch<T>().trim();
    });
  }

 private:
  static constexpr int64_t kChannels = 16, kFeatures = 16;
  static constexpr int64_t kFewestUnits = 32;  // of a problem large enough

  const T* spectrum_of(int64_t pair) const { return spectra_ + pair % sizes_.heads * transform_.spectrum_size(); }

  void normalizers(int64_t pair) {
    const int64_t pitch = sizes_.pitch;
    Scratch<T>& s = scratch<T>();
    T* query = s.query.template reserve<T>(kFeatures * pitch);
    T* key = s.key.template reserve<T>(kFeatures * pitch);
    T* sums = s.output.template reserve<T>(2 * pitch);
    T* bounds = sums + pitch;
    memset(sums, 0, 2 * pitch * sizeof(T));
    const Convolution<T> convolution(transform_, spectrum_of(pair), s);
    for (int64_t first = 0; first < sizes_.features; first += kFeatures) {
      const int64_t features = smaller(kFeatures, sizes_.features - first), even = round_up(features, 2);
      load_columns(query, pitch, columns_of(a_.query, pair, first), features, sizes_.place);
      load_columns(key, pitch, columns_of(a_.key, pair, first), features, sizes_.place);
      if (even > features) {
        memset(query + features * pitch, 0, pitch * sizeof(T));
        memset(key + features * pitch, 0, pitch * sizeof(T));
      }
      for (int64_t m = 0; m < features; m += 2) {
        const T *k0 = key + m * pitch, *k1 = k0 + pitch, *q0 = query + m * pitch, *q1 = q0 + pitch;
        convolution.run([=](int64_t j) __attribute__((always_inline)) { return Complex<T>{at(k0 + j), at(k1 + j)}; },
            [=](int64_t j, VectorOf<T> re, VectorOf<T> im)
                __attribute__((always_inline)) { put(sums + j, at(sums + j) + at(q0 + j) * re + at(q1 + j) * im); });
      }
      for (int64_t m = 0; m < features; ++m) {
        const T norm = norm_of(key + m * pitch);
        const T* q = query + m * pitch;
        for (int64_t j = 0; j < sizes_.positions; ++j) bounds[j] += (q[j] < 0 ? -q[j] : q[j]) * norm;
      }
    }
    // The error of a convolution is absolute: below it there is nothing.
    constexpr double kNoise = 2.0 * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
    const double level = kNoise * norms_[pair % sizes_.heads];
    float* normalizer = result_.normalizer + pair * sizes_.tokens;
    sizes_.place.each_run(sizes_.tokens, [&](int64_t token, int64_t tokens, int64_t position) {
      for (int64_t i = 0; i < tokens; ++i) {
        const double sum = static_cast<double>(sums[position + i]);
        const bool nothing = fabs(sum) <= level * static_cast<double>(bounds[position + i]);
        normalizer[token + i] = static_cast<float>((nothing ? 0.0 : sum) + a_.eps);
      }
    });
  }

  T norm_of(const T* column) const {
    VectorOf<T> squares = {};
    for (int64_t j = 0; j < sizes_.positions; j += kLanesOf<T>) squares += at(column + j) * at(column + j);
    double square = 0.0;
    for (int lane = 0; lane < kLanesOf<T>; ++lane) square += static_cast<double>(squares[lane]);
    return static_cast<T>(sqrt(square));
  }

  void outputs(int64_t pair, int64_t channel) {
    const int64_t pitch = sizes_.pitch, channels = smaller(group_, sizes_.channels - channel),
                  even = round_up(channels, 2);
    Scratch<T>& s = scratch<T>();
    T* query = s.query.template reserve<T>(kFeatures * pitch);
    T* key = s.key.template reserve<T>(kFeatures * pitch);
    T* value = s.value.template reserve<T>(even * pitch);
    T* output = s.output.template reserve<T>(even * pitch);
    load_columns(value, pitch, columns_of(a_.value, pair, channel), channels, sizes_.place);
    if (even > channels) memset(value + channels * pitch, 0, pitch * sizeof(T));
    memset(output, 0, even * pitch * sizeof(T));
    const Convolution<T> convolution(transform_, spectrum_of(pair), s);
    for (int64_t first = 0; first < sizes_.features; first += kFeatures) {
      const int64_t features = smaller(kFeatures, sizes_.features - first);
      load_columns(query, pitch, columns_of(a_.query, pair, first), features, sizes_.place);
      load_columns(key, pitch, columns_of(a_.key, pair, first), features, sizes_.place);
      for (int64_t d = 0; d < channels; d += 2)
        for (int64_t m = 0; m < features; ++m) {
          const T *k = key + m * pitch, *q = query + m * pitch, *v0 = value + d * pitch, *v1 = v0 + pitch;
          T *o0 = output + d * pitch, *o1 = o0 + pitch;
          convolution.run(
              [=](int64_t j) __attribute__((always_inline)) {
                const VectorOf<T> weight = at(k + j);
                return Complex<T>{weight * at(v0 + j), weight * at(v1 + j)};
              },
              [=](int64_t j, VectorOf<T> re, VectorOf<T> im) __attribute__((always_inline)) {
                const VectorOf<T> weight = at(q + j);
                put(o0 + j, at(o0 + j) + weight * re);
                put(o1 + j, at(o1 + j) + weight * im);
              });
        }
    }
    const float* normalizer = result_.normalizer + pair * sizes_.tokens;
    const float nothing = static_cast<float>(a_.eps);
    store_columns(columns_of(result_.output, pair, channel), output, pitch, channels, sizes_.place,
        [=](int64_t token) { return normalizer[token] == nothing ? T(0) : T(1) / static_cast<T>(normalizer[token]); });
  }

  const Toeplitz& a_;
  const ToeplitzResult& result_;
  const Sizes sizes_;
  const Transform<T> transform_;
  int64_t group_;
  Buffer spectra_buffer_, norms_buffer_;
  T* spectra_;
  double* norms_;
};

}  // namespace
}  // namespace toeplitz_fft

void toeplitz_fft_forward(
    const Toeplitz& arguments, const ToeplitzResult& result, bool precise, const Runtime& runtime) {
  if (precise)
    toeplitz_fft::Forward<double>(arguments, result).run(runtime);
  else
    toeplitz_fft::Forward<float>(arguments, result).run(runtime);
}

void toeplitz_fft_backward(
    const Toeplitz& arguments, const ToeplitzGrad& gradient, bool precise, const Runtime& runtime) {
  if (precise)
    toeplitz_fft::Backward<double>(arguments, gradient).run(runtime);
  else
    toeplitz_fft::Backward<float>(arguments, gradient).run(runtime);
}

}  // namespace effattn::EFFATTN_ISA
