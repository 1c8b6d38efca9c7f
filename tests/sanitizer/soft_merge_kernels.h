// Soft merging forward and backward, against plain loops.
#pragma once

namespace {

void soft_merge(DType dtype, int64_t batch, int64_t tokens, int64_t channels, int64_t merged, Layout layout) {
  const std::vector<int64_t> token_size = {1, batch, tokens, channels}, logit_size = {1, batch, tokens, merged},
                             output_size = {1, batch, merged, channels};
  const HeapTensor x(dtype, token_size, layout), logits(dtype, logit_size, layout), g(dtype, output_size, layout);
  const Layout dense = layout == Layout::kExpanded ? Layout::kContiguous : layout;
  const HeapTensor output(dtype, output_size, Layout::kContiguous, true), grad_x(dtype, token_size, dense, true),
      grad_logits(dtype, logit_size, dense, true);
  std::unique_ptr<float[]> logsumexp(new float[batch * merged]);
  for (int64_t i = 0; i < batch * merged; ++i) logsumexp[i] = NAN;
  kernels_under_test.soft_merge_forward({x.view(), logits.view(), output.view(), logsumexp.get()}, kRuntime);
  kernels_under_test.soft_merge_backward(
      {g.view(), x.view(), logits.view(), output.view(), logsumexp.get(), grad_x.view(), grad_logits.view()}, kRuntime);

  double worst[3] = {}, largest[3] = {0.05, 0.05, 0.05};
  const auto note = [&](int which, double got, double want) {
    const double error = fabs(got - want);
    if (!(error <= worst[which])) worst[which] = error;
    if (fabs(want) > largest[which]) largest[which] = fabs(want);
  };
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> dx(tokens * channels);
    for (int64_t p = 0; p < merged; ++p) {
      double sum = 0, mean = 0;
      std::vector<double> w(tokens), slope(tokens), y(channels);
      for (int64_t n = 0; n < tokens; ++n) sum += w[n] = exp(logits.at(0, b, n, p));
      for (int64_t n = 0; n < tokens; ++n) {
        w[n] /= sum;
        for (int64_t c = 0; c < channels; ++c) {
          y[c] += w[n] * x.at(0, b, n, c);
          slope[n] += x.at(0, b, n, c) * g.at(0, b, p, c);
          dx[n * channels + c] += w[n] * g.at(0, b, p, c);
        }
        mean += w[n] * slope[n];
      }
      const double want = tokens > 0 ? log(sum) : -INFINITY;
      const float got = logsumexp[b * merged + p];
      if (isinf(want) ? !isinf(got) : !(fabs(got - want) < 0.02 * (1 + fabs(want)))) note(0, NAN, 0);
      for (int64_t c = 0; c < channels; ++c) note(0, output.at(0, b, p, c), y[c]);
      for (int64_t n = 0; n < tokens; ++n) {
        note(2, grad_logits.at(0, b, n, p), w[n] * (slope[n] - mean));
        largest[2] = fmax(largest[2], fabs(w[n] * slope[n]));  // what cancels where a column has one token
      }
    }
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t c = 0; c < channels; ++c) note(1, grad_x.at(0, b, n, c), dx[n * channels + c]);
  }
  const double tolerance = dtype == DType::kFloat32 ? 2e-5 : 4e-2;
  for (int which = 0; which < 3; ++which)
    if (!(worst[which] <= tolerance * largest[which])) {
      ++failures;
      printf("soft_merge: dtype %d, %ld x %ld x %ld to %ld, layout %d: tensor %d off by %g of %g\n",
          static_cast<int>(dtype), static_cast<long>(batch), static_cast<long>(tokens), static_cast<long>(channels),
          static_cast<long>(merged), static_cast<int>(layout), which, worst[which], largest[which]);
    }
}

void soft_merge_kernels(DType dtype) {
  soft_merge(dtype, 1, 1, 1, 1, Layout::kContiguous);
  soft_merge(dtype, 2, 3, 17, 65, Layout::kHeadsInside);
  soft_merge(dtype, 3, 65, 3, 17, Layout::kStrided);
  soft_merge(dtype, 2, 17, 65, 3, Layout::kExpanded);
  soft_merge(dtype, 1, 197, 70, 49, Layout::kContiguous);
  soft_merge(dtype, 2, 99, 7, 300, Layout::kContiguous);    // several blocks of merged tokens
  soft_merge(dtype, 1, 301, 265, 19, Layout::kContiguous);  // and of tokens, channels packed in parts
  soft_merge(dtype, 2, 5, 4, 0, Layout::kContiguous);
  soft_merge(dtype, 2, 0, 4, 5, Layout::kContiguous);
}

}  // namespace
