// Gradients of the FFT method. g = dO, u_m = q_m / n, delta_i = g_i . o_i; channel D stands for the normalizer: v_D =
// 1, g_D = -delta. With x = k_m v_d and z = u_m g_d, d = 0 ... D,
//
//   dq_im = sum_d g_id (C x)_i / n_i     dk_jm = sum_d v_jd (C^T z)_j     dv_jd = sum_m k_jm (C^T z)_j
//   dc_r = sum_md sum_i z_i x_{i+r}      db = c dc
//
// in two transforms and two inverses for two channels; dc adds up spectra and has one inverse transform a head.
//
// A unit of work is some features of a head, over all channels: dq and dk are its own, dv of several units of a head
// and dc are partial sums, added in order; units are cut by the problem, not by the threads. A unit holds 3 (D + 2) + 4
// kFeatures columns of P numbers and three transforms. Heads are taken in rounds that bound the partial sums.
#pragma once

#include "toeplitz_fft_convolution.h"

namespace effattn::EFFATTN_ISA {
namespace toeplitz_fft {
namespace {

template <class T>
class Backward {
 public:
  Backward(const Toeplitz& arguments, const ToeplitzGrad& gradient)
      : a_(arguments), gradient_(gradient), sizes_(arguments), transform_(sizes_.length) {
    const int64_t most = (sizes_.features + kFeatures - 1) / kFeatures * kFeatures / 2;
    slots_ = larger(smaller((kFewestUnits + sizes_.pairs() - 1) / larger(sizes_.pairs(), 1), most), 1);
    rows_ = round_up(sizes_.channels + 1, 2);
  }

  void run(const Runtime& runtime) {
    memset(gradient_.bias, 0, sizes_.heads * sizes_.entries * sizeof(float));
    if (sizes_.pairs() == 0 || sizes_.tokens == 0) return;
    const int64_t spectrum = transform_.spectrum_size(), pitch = sizes_.pitch;
    T* spectra = buffers_[0].reserve<T>(sizes_.heads * spectrum);
    double* norms = buffers_[1].reserve<double>(sizes_.heads);
    make_spectra(runtime, a_, sizes_, transform_, spectra, norms);
    const Exact exact(sizes_);
    // The units of a head, over the batch, are cut into parts that add up dc one after the other.
    const int64_t units = sizes_.batches * slots_, parts = smaller(units, kFewestUnits),
                  values = slots_ > 1 ? rows_ * pitch : 0;
    const double bytes = static_cast<double>(parts * spectrum + units * values) * sizeof(T);
    const int64_t round = larger(smaller(static_cast<int64_t>(kRoundBytes / bytes), sizes_.heads), 1);
    T* correlations = buffers_[2].reserve<T>(round * parts * spectrum);
    T* partial = buffers_[3].reserve<T>(round * units * values + 1);
    for (int64_t head = 0; head < sizes_.heads; head += round) {
      const int64_t heads = smaller(round, sizes_.heads - head);
      for_items(runtime, heads * parts, 4 * sizes_.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t h = index / parts, part = index % parts;
          T* correlation = correlations + index * spectrum;
          memset(correlation, 0, spectrum * sizeof(T));
          for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit)
            one(unit / slots_ * sizes_.heads + head + h, unit % slots_, spectra + (head + h) * spectrum, correlation,
                values ? partial + (h * units + unit) * values : nullptr);
        }
        scratch<T>().trim();
      });
      const double small = static_cast<double>(heads * (units * values + parts * spectrum));
      if (slots_ > 1)
        for_items(runtime, heads * sizes_.batches, small, [&](int64_t begin, int64_t end) {
          for (int64_t index = begin; index < end; ++index) {
            const int64_t h = index / sizes_.batches, batch = index % sizes_.batches;
            T* sum = partial + (h * units + batch * slots_) * values;
            for (int64_t slot = 1; slot < slots_; ++slot)
              for (int64_t i = 0; i < values; ++i) sum[i] += sum[slot * values + i];
            store_values(batch * sizes_.heads + head + h, sum);
          }
        });
      for_items(runtime, heads, small, [&](int64_t begin, int64_t end) {
        Buffer buffer;
        for (int64_t h = begin; h < end; ++h) {
          const Weights weights(a_, sizes_, head + h, buffer);
          float* bias = gradient_.bias + (head + h) * sizes_.entries + sizes_.positions - 1;
          exact.sequence(correlations + h * parts * spectrum, spectrum, parts, transform_,
              [&](int64_t r, double sum) { bias[r] = static_cast<float>(weights[r + sizes_.positions - 1] * sum); });
        }
      });
    }
  }

 private:
  static constexpr int64_t kFeatures = 16;
  static constexpr int64_t kFewestUnits = 8;     // of a problem large enough
  static constexpr double kRoundBytes = 0x1p27;  // of partial sums

  T inverse(int64_t pair, int64_t token) const {
    const float normalizer = gradient_.normalizer[pair * sizes_.tokens + token];
    return normalizer == 0.f ? T(0) : T(1) / static_cast<T>(normalizer);
  }

  void store_values(int64_t pair, const T* values) const {
    store_columns(columns_of(gradient_.value, pair, 0), values, sizes_.pitch, sizes_.channels, sizes_.place,
        [](int64_t) { return T(1); });
  }

  void one(int64_t pair, int64_t slot, const T* spectrum, T* correlation, T* values) const {
    const int64_t pitch = sizes_.pitch, channels = sizes_.channels;
    Scratch<T>& s = scratch<T>();
    T* value = s.value.template reserve<T>(rows_ * pitch);
    T* gradient = s.gradient.template reserve<T>(rows_ * pitch);
    T* grad_value = values ? values : s.output.template reserve<T>(rows_ * pitch);
    T* query = s.query.template reserve<T>(2 * kFeatures * pitch);
    T* key = s.key.template reserve<T>(2 * kFeatures * pitch);
    T *grad_query = query + kFeatures * pitch, *grad_key = key + kFeatures * pitch;
    load_columns(value, pitch, columns_of(a_.value, pair, 0), channels, sizes_.place);
    load_columns(gradient, pitch, columns_of(gradient_.grad_output, pair, 0), channels, sizes_.place);
    load_columns(grad_value, pitch, columns_of(gradient_.output, pair, 0), channels, sizes_.place);
    memset(value + channels * pitch, 0, (rows_ - channels) * pitch * sizeof(T));
    memset(gradient + channels * pitch, 0, (rows_ - channels) * pitch * sizeof(T));
    sizes_.place.each_run(sizes_.tokens, [&](int64_t, int64_t tokens, int64_t position) {
      for (int64_t j = position; j < position + tokens; ++j) value[channels * pitch + j] = T(1);
    });
    T* delta = gradient + channels * pitch;
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t j = 0; j < sizes_.positions; ++j) delta[j] -= gradient[d * pitch + j] * grad_value[d * pitch + j];
    memset(grad_value, 0, rows_ * pitch * sizeof(T));

    const TwoConvolutions<T> convolutions(transform_, spectrum, correlation, s);
    const int64_t end = (slot + 1) * sizes_.features / slots_;
    for (int64_t first = slot * sizes_.features / slots_; first < end; first += kFeatures) {
      const int64_t features = smaller(kFeatures, end - first);
      const auto factor = [&](int64_t token) { return inverse(pair, token); };
      load_columns(query, pitch, columns_of(a_.query, pair, first), features, sizes_.place, factor);
      load_columns(key, pitch, columns_of(a_.key, pair, first), features, sizes_.place);
      memset(grad_query, 0, features * pitch * sizeof(T));
      memset(grad_key, 0, features * pitch * sizeof(T));
      for (int64_t d = 0; d < rows_; d += 2)
        for (int64_t m = 0; m < features; ++m) {
          const T *k = key + m * pitch, *u = query + m * pitch, *v0 = value + d * pitch, *v1 = v0 + pitch,
                  *g0 = gradient + d * pitch, *g1 = g0 + pitch;
          T *dq = grad_query + m * pitch, *dk = grad_key + m * pitch, *dv0 = grad_value + d * pitch, *dv1 = dv0 + pitch;
          convolutions.run(
              [=](int64_t j) __attribute__((always_inline)) {
                const VectorOf<T> weight = at(k + j);
                return Complex<T>{weight * at(v0 + j), weight * at(v1 + j)};
              },
              [=](int64_t j) __attribute__((always_inline)) {
                const VectorOf<T> weight = at(u + j);
                return Complex<T>{weight * at(g0 + j), weight * at(g1 + j)};
              },
              [=](int64_t j, VectorOf<T> re, VectorOf<T> im)
                  __attribute__((always_inline)) { put(dq + j, at(dq + j) + re * at(g0 + j) + im * at(g1 + j)); },
              [=](int64_t j, VectorOf<T> re, VectorOf<T> im) __attribute__((always_inline)) {
                const VectorOf<T> weight = at(k + j);
                put(dk + j, at(dk + j) + re * at(v0 + j) + im * at(v1 + j));
                put(dv0 + j, at(dv0 + j) + weight * re);
                put(dv1 + j, at(dv1 + j) + weight * im);
              });
        }
      store_columns(columns_of(gradient_.query, pair, first), grad_query, pitch, features, sizes_.place, factor);
      store_columns(columns_of(gradient_.key, pair, first), grad_key, pitch, features, sizes_.place,
          [](int64_t) { return T(1); });
    }
    if (!values) store_values(pair, grad_value);
  }

  const Toeplitz& a_;
  const ToeplitzGrad& gradient_;
  const Sizes sizes_;
  const Transform<T> transform_;
  int64_t slots_, rows_;
  Buffer buffers_[4];
};

}  // namespace
}  // namespace toeplitz_fft
}  // namespace effattn::EFFATTN_ISA
