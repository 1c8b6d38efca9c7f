// Attention over tokens with sizes against loops in double, and the gradient of log sizes against the gradient of the
// keys' logits; for kernels.cpp.
#pragma once

namespace {

void size_weighted(DType dtype, int64_t batch, int64_t queries, int64_t keys, int64_t head_dim, Layout layout) {
  const int64_t heads = 2;
  const std::unique_ptr<float[]> log_sizes = filled(batch * keys, false), gradient = filled(batch * keys, true);
  for (int64_t i = 0; i < batch * keys; i += 3) log_sizes[i] = -INFINITY;
  if (batch > 1)
    for (int64_t j = 0; j < keys; ++j) log_sizes[keys + j] = -INFINITY;  // an image without keys
  const TokenSizes sizes = {log_sizes.get()};
  const auto bias = [&](int64_t b, int64_t, int64_t, int64_t j) { return double{log_sizes[b * keys + j]}; };
  const Shape shape = {batch, heads, 1, queries, keys, head_dim, false, layout};
  const auto run_forward = [&](const AttentionForward& a) {
    kernels_under_test.token_sizes_forward(a, sizes, kRuntime);
  };
  for (float* wanted : {gradient.get(), static_cast<float*>(nullptr)})
    compare("size_weighted_attention", dtype, shape, one, bias, run_forward,
        [&](const AttentionBackward& a) { kernels_under_test.token_sizes_backward(a, sizes, {wanted}, kRuntime); });
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0, largest = 0.05;  // dS sums to 0 over the keys
    for (int64_t j = 0; j < keys; ++j) {
      const double value = gradient[b * keys + j];
      sum += value, largest = fmax(largest, fabs(value));
      if (isinf(log_sizes[b * keys + j]) && value != 0.0) sum = NAN;
    }
    if (!(fabs(sum) <= 2 * tolerance_of(dtype) * largest * sqrt(static_cast<double>(keys)))) {
      ++failures;
      printf("size_weighted_attention: gradients of sizes add up to %g, the largest is %g\n", sum, largest);
    }
  }
}

}  // namespace

void size_weighted_kernels(DType dtype) {
  size_weighted(dtype, 2, 67, 70, 16, Layout::kContiguous);
  size_weighted(dtype, 1, 97, 300, 7, Layout::kHeadsInside);  // two blocks of queries and of keys
  size_weighted(dtype, 1, 5, 600, 33, Layout::kStrided);      // several chunks
  size_weighted(dtype, 3, 13, 1, 64, Layout::kExpanded);
  size_weighted(dtype, 2, 1, 40, 1, Layout::kContiguous);
  size_weighted(dtype, 2, 0, 5, 8, Layout::kContiguous);
  size_weighted(dtype, 2, 5, 0, 8, Layout::kContiguous);
}
