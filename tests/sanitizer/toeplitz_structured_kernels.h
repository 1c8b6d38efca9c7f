// The structured method of Toeplitz-weighted linear attention, and the planner, against sums over pairs of tokens in
// double; for kernels.cpp.
#pragma once

namespace {

enum class Bias { kConstant, kClipped, kFalling, kRising, kWindow, kAny };

struct StructuredCase {
  int64_t grid_h, grid_w, features, value_dim;
  bool is_causal;
  Bias bias;
};

float structured_bias(Bias bias, int64_t head, int64_t tau, int64_t tokens) {
  const int64_t distance = tau < 0 ? -tau : tau;
  const float slope = head == 0 ? 0.03125f : 0.5f;
  switch (bias) {
    case Bias::kConstant:
      return static_cast<float>(head);
    case Bias::kClipped:
      return sinf(static_cast<float>(tau > 40 ? 40 : tau < -7 ? -7 : tau));
    case Bias::kFalling:
      return tau > 0 ? -slope * static_cast<float>(distance) : -2.f * slope * static_cast<float>(distance);
    case Bias::kRising:
      return 0.0625f * slope * static_cast<float>(distance - tokens);
    case Bias::kWindow:
      return distance > 9 + 60 * head ? -INFINITY : 0.125f * static_cast<float>(tau % 5);
    default:
      return uniform();
  }
}

void toeplitz_structured(DType dtype, const StructuredCase& c, Layout layout) {
  const int64_t batch = 2, heads = 2, N = c.grid_h * c.grid_w, M = c.features, D = c.value_dim,
                entries = N > 0 ? (2 * c.grid_h - 1) * (2 * c.grid_w - 1) : 0;
  const Layout dense = layout == Layout::kHeadsInside ? layout : Layout::kContiguous;
  const HeapTensor query(dtype, {batch, heads, N, M}, layout), key(dtype, {batch, heads, N, M}, layout),
      value(dtype, {batch, heads, N, D}, layout), upstream(dtype, {batch, heads, N, D}, layout),
      output(dtype, {batch, heads, N, D}, dense, true), grad_query(dtype, {batch, heads, N, M}, dense, true),
      grad_key(dtype, {batch, heads, N, M}, dense, true), grad_value(dtype, {batch, heads, N, D}, dense, true);
  const std::unique_ptr<float[]> bias = filled(heads * entries, true), normalizer = filled(batch * heads * N, true);
  std::vector<double> top(heads, -INFINITY);
  for (int64_t at = 0; at < heads * entries; ++at) {
    const int64_t head = at / entries;
    bias[at] = structured_bias(c.bias, head, at % entries - N + 1, N);
    top[head] = fmax(top[head], bias[at]);
  }
  const auto weight = [&](int64_t h, int64_t i, int64_t j) {
    const int64_t entry = c.grid_h > 1 && c.grid_w > 1 ? 0 : j - i + N - 1;  // a grid's bias is constant here
    return c.is_causal && j > i ? 0.0 : exp(bias[h * entries + entry] - top[h]);
  };
  const auto dot = [](const HeapTensor& x, const HeapTensor& y, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) {
    double sum = 0;
    for (int64_t d = 0; d < n; ++d) sum += x.at(b, h, i, d) * y.at(b, h, j, d);
    return sum;
  };
  std::vector<double> sums(batch * heads * N);
  double eps = 1;  // above twice any sum of weights: they are of either sign
  for (int64_t row = 0; row < batch * heads * N; ++row) {
    const int64_t b = row / (heads * N), h = row / N % heads, i = row % N;
    for (int64_t j = 0; j < N; ++j) sums[row] += weight(h, i, j) * dot(query, key, b, h, i, j, M);
    eps = fmax(eps, 1 + 2 * fabs(sums[row]));
  }
  ToeplitzPlan plan;
  kernels_under_test.toeplitz_plan({bias.get(), batch, heads, M, D, c.grid_h, c.grid_w, c.is_causal,
                                       ToeplitzRequest::kStructured, 1e-8, {1.0, 1.0, 1.0, 1.0}},
      plan, kRuntime);
  if (N > 0 && (plan.method == ToeplitzMethod::kStructured) != (c.bias != Bias::kAny))
    ++failures,
        printf("toeplitz_plan: method %d of bias %d\n", static_cast<int>(plan.method), static_cast<int>(c.bias));
  const Toeplitz arguments = {
      query.view(), key.view(), value.view(), bias.get(), c.grid_h, c.grid_w, c.is_causal, eps, false};
  kernels_under_test.toeplitz_structured_forward(arguments, {output.view(), normalizer.get()}, kRuntime);
  kernels_under_test.toeplitz_structured_backward(arguments,
      {upstream.view(), output.view(), normalizer.get(), grad_query.view(), grad_key.view(), grad_value.view(),
          nullptr},
      kRuntime);

  Worst worst[5];
  for (int64_t pair = 0; pair < batch * heads; ++pair) {
    const int64_t b = pair / heads, h = pair % heads;
    std::vector<double> dk(N * M), dv(N * D);
    for (int64_t i = 0; i < N; ++i) {
      const double n = sums[pair * N + i] + eps;
      std::vector<double> o(D), dq(M);
      double delta = 0;
      worst[1].note(normalizer[pair * N + i], n);
      for (int64_t j = 0; j < N; ++j) {
        const double w = weight(h, i, j) * dot(query, key, b, h, i, j, M) / n;
        for (int64_t d = 0; d < D; ++d) o[d] += w * value.at(b, h, j, d), dv[j * D + d] += w * upstream.at(b, h, i, d);
      }
      for (int64_t d = 0; d < D; ++d)
        worst[0].note(output.at(b, h, i, d), o[d]), delta += o[d] * upstream.at(b, h, i, d);
      for (int64_t j = 0; j < N; ++j) {
        const double slope = weight(h, i, j) * (dot(upstream, value, b, h, i, j, D) - delta) / n;
        for (int64_t d = 0; d < M; ++d)
          dq[d] += slope * key.at(b, h, j, d), dk[j * M + d] += slope * query.at(b, h, i, d);
      }
      for (int64_t d = 0; d < M; ++d) worst[2].note(grad_query.at(b, h, i, d), dq[d]);
    }
    for (int64_t j = 0; j < N; ++j) {
      for (int64_t d = 0; d < M; ++d) worst[3].note(grad_key.at(b, h, j, d), dk[j * M + d]);
      for (int64_t d = 0; d < D; ++d) worst[4].note(grad_value.at(b, h, j, d), dv[j * D + d]);
    }
  }
  const char* names[] = {"output", "normalizer", "grad_query", "grad_key", "grad_value"};
  for (int i = 0; i < 5; ++i) {
    char name[64];
    snprintf(name, sizeof(name), "toeplitz structured %s", names[i]);
    worst[i].check(name, dtype, tolerance_of(dtype), N, M, D);
  }
}

}  // namespace

void toeplitz_structured_kernels(DType dtype) {
  toeplitz_structured(dtype, {1, 200, 5, 33, false, Bias::kConstant}, Layout::kContiguous);
  toeplitz_structured(dtype, {1, 150, 16, 17, false, Bias::kClipped}, Layout::kHeadsInside);
  toeplitz_structured(dtype, {1, 193, 16, 16, true, Bias::kClipped}, Layout::kStrided);
  toeplitz_structured(dtype, {1, 129, 33, 7, false, Bias::kFalling}, Layout::kExpanded);
  toeplitz_structured(dtype, {1, 200, 8, 16, false, Bias::kRising}, Layout::kContiguous);
  toeplitz_structured(dtype, {200, 1, 8, 16, true, Bias::kRising}, Layout::kContiguous);
  toeplitz_structured(dtype, {1, 260, 4, 4, false, Bias::kWindow}, Layout::kContiguous);
  toeplitz_structured(dtype, {1, 70, 4, 40, false, Bias::kAny}, Layout::kContiguous);  // near blocks only
  toeplitz_structured(dtype, {9, 10, 4, 8, true, Bias::kConstant}, Layout::kContiguous);
  toeplitz_structured(dtype, {1, 66, 256, 256, false, Bias::kFalling}, Layout::kContiguous);
  toeplitz_structured(dtype, {1, 1, 3, 2, false, Bias::kConstant}, Layout::kContiguous);
  toeplitz_structured(dtype, {1, 0, 3, 2, false, Bias::kConstant}, Layout::kContiguous);
}
