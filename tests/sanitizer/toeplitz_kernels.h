// Toeplitz-weighted linear attention as sums over pairs of tokens in double, gradients included; for kernels.cpp.
#pragma once

namespace {

struct ToeplitzCase {
  int64_t grid_h, grid_w, features, value_dim;
  bool is_causal;
};

// forward(const Toeplitz&, const ToeplitzResult&) and backward(const Toeplitz&, const ToeplitzGrad&): of one method.
template <class RunForward, class RunBackward>
void toeplitz(const char* method, DType dtype, const ToeplitzCase& c, Layout layout, const RunForward& forward,
    const RunBackward& backward) {
  const int64_t batch = 2, heads = 2, N = c.grid_h * c.grid_w, M = c.features, D = c.value_dim,
                entries = N > 0 ? (2 * c.grid_h - 1) * (2 * c.grid_w - 1) : 0;
  const Layout dense = layout == Layout::kHeadsInside ? layout : Layout::kContiguous;
  const HeapTensor query(dtype, {batch, heads, N, M}, layout), key(dtype, {batch, heads, N, M}, layout),
      value(dtype, {batch, heads, N, D}, layout), upstream(dtype, {batch, heads, N, D}, layout),
      output(dtype, {batch, heads, N, D}, dense, true), grad_query(dtype, {batch, heads, N, M}, dense, true),
      grad_key(dtype, {batch, heads, N, M}, dense, true), grad_value(dtype, {batch, heads, N, D}, dense, true);
  const std::unique_ptr<float[]> bias = filled(heads * entries, false), grad_bias = filled(heads * entries, true),
                                 normalizer = filled(batch * heads * N, true);
  if (entries > 2) bias[entries / 3] = -INFINITY;
  std::vector<double> top(heads, -INFINITY), grad_entries(heads * entries);
  for (int64_t at = 0; at < heads * entries; ++at) top[at / entries] = fmax(top[at / entries], bias[at]);
  const auto entry = [&](int64_t i, int64_t j) {
    return (j / c.grid_w - i / c.grid_w + c.grid_h - 1) * (2 * c.grid_w - 1) + j % c.grid_w - i % c.grid_w + c.grid_w -
           1;
  };
  const auto weight = [&](int64_t h, int64_t i, int64_t j) {
    return c.is_causal && j > i ? 0.0 : exp(bias[h * entries + entry(i, j)] - top[h]);
  };
  const auto dot = [](const HeapTensor& x, const HeapTensor& y, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) {
    double sum = 0;
    for (int64_t d = 0; d < n; ++d) sum += x.at(b, h, i, d) * y.at(b, h, j, d);
    return sum;
  };
  std::vector<double> sums(batch * heads * N);
  double eps = 1;  // above twice any sum of weights: they are of either sign
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < N; ++i) {
        double& sum = sums[(b * heads + h) * N + i];
        for (int64_t j = 0; j < N; ++j) sum += weight(h, i, j) * dot(query, key, b, h, i, j, M);
        eps = fmax(eps, 1 + 2 * fabs(sum));
      }
  const Toeplitz arguments = {query.view(), key.view(), value.view(), bias.get(), c.grid_h, c.grid_w, c.is_causal, eps};
  forward(arguments, ToeplitzResult{output.view(), normalizer.get()});
  backward(arguments, ToeplitzGrad{upstream.view(), output.view(), normalizer.get(), grad_query.view(), grad_key.view(),
                          grad_value.view(), grad_bias.get()});

  Worst worst[6];
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> dk(N * M), dv(N * D);
      for (int64_t i = 0; i < N; ++i) {
        const int64_t row = (b * heads + h) * N + i;
        const double n = sums[row] + eps;
        std::vector<double> o(D), dq(M);
        double delta = 0;
        worst[1].note(normalizer[row], n);
        for (int64_t j = 0; j < N; ++j) {
          const double w = weight(h, i, j) * dot(query, key, b, h, i, j, M) / n;
          for (int64_t d = 0; d < D; ++d) o[d] += w * value.at(b, h, j, d);
          for (int64_t d = 0; d < D; ++d) dv[j * D + d] += w * upstream.at(b, h, i, d);
        }
        for (int64_t d = 0; d < D; ++d)
          worst[0].note(output.at(b, h, i, d), o[d]), delta += o[d] * upstream.at(b, h, i, d);
        for (int64_t j = 0; j < N; ++j) {
          const double e = weight(h, i, j) * (dot(upstream, value, b, h, i, j, D) - delta) / n;
          for (int64_t d = 0; d < M; ++d) dq[d] += e * key.at(b, h, j, d);
          for (int64_t d = 0; d < M; ++d) dk[j * M + d] += e * query.at(b, h, i, d);
          grad_entries[h * entries + entry(i, j)] += e * dot(query, key, b, h, i, j, M);
        }
        for (int64_t d = 0; d < M; ++d) worst[2].note(grad_query.at(b, h, i, d), dq[d]);
      }
      for (int64_t j = 0; j < N; ++j) {
        for (int64_t d = 0; d < M; ++d) worst[3].note(grad_key.at(b, h, j, d), dk[j * M + d]);
        for (int64_t d = 0; d < D; ++d) worst[4].note(grad_value.at(b, h, j, d), dv[j * D + d]);
      }
    }
  for (int64_t at = 0; at < heads * entries; ++at) worst[5].note(grad_bias[at], grad_entries[at]);
  const char* names[] = {"output", "normalizer", "grad_query", "grad_key", "grad_value", "grad_bias"};
  for (int i = 0; i < 6; ++i) {
    char name[64];
    snprintf(name, sizeof(name), "toeplitz %s %s", method, names[i]);
    worst[i].check(name, dtype, tolerance_of(dtype), c.grid_h, c.grid_w, M);
  }
}

void toeplitz_direct(DType dtype, const ToeplitzCase& c, Layout layout) {
  toeplitz(
      "direct", dtype, c, layout,
      [](const Toeplitz& a, const ToeplitzResult& r) { kernels_under_test.toeplitz_direct_forward(a, r, kRuntime); },
      [](const Toeplitz& a, const ToeplitzGrad& g) { kernels_under_test.toeplitz_direct_backward(a, g, kRuntime); });
}

// In double where the tolerance is that of float.
void toeplitz_fft(DType dtype, const ToeplitzCase& c, Layout layout) {
  const bool precise = dtype == DType::kFloat32;
  toeplitz(
      "fft", dtype, c, layout,
      [=](const Toeplitz& a, const ToeplitzResult& r) {
        kernels_under_test.toeplitz_fft_forward(a, r, precise, kRuntime);
      },
      [=](const Toeplitz& a, const ToeplitzGrad& g) {
        kernels_under_test.toeplitz_fft_backward(a, g, precise, kRuntime);
      });
}

}  // namespace

void toeplitz_kernels(DType dtype) {
  toeplitz_fft(dtype, {1, 75, 5, 33, false}, Layout::kContiguous);
  toeplitz_fft(dtype, {1, 301, 16, 17, true}, Layout::kHeadsInside);
  toeplitz_fft(dtype, {1, 1, 9, 1, false}, Layout::kStrided);
  toeplitz_fft(dtype, {1, 0, 9, 64, true}, Layout::kContiguous);
  toeplitz_fft(dtype, {7, 9, 33, 64, true}, Layout::kStrided);
  toeplitz_fft(dtype, {40, 1, 8, 48, false}, Layout::kExpanded);
  toeplitz_direct(dtype, {1, 75, 5, 33, false}, Layout::kContiguous);
  toeplitz_direct(dtype, {1, 301, 16, 17, true}, Layout::kHeadsInside);
  toeplitz_direct(dtype, {1, 1, 9, 1, false}, Layout::kStrided);
  toeplitz_direct(dtype, {1, 0, 9, 64, true}, Layout::kContiguous);
  toeplitz_direct(dtype, {40, 1, 64, 48, false}, Layout::kExpanded);
  toeplitz_direct(dtype, {7, 9, 33, 64, true}, Layout::kStrided);
  toeplitz_direct(dtype, {5, 17, 1, 256, false}, Layout::kHeadsInside);
  toeplitz_direct(dtype, {2, 33, 256, 9, false}, Layout::kContiguous);
  toeplitz_direct(dtype, {10, 30, 8, 16, true}, Layout::kContiguous);
  toeplitz_direct(dtype, {150, 2, 8, 8, false}, Layout::kContiguous);
}
