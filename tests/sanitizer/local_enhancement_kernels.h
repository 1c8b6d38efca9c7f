// The depthwise convolution beside attention, against plain loops.
#pragma once

void local_enhancement(
    DType dtype, int64_t h, int64_t w, int64_t prefix, int64_t size, int64_t head_dim, bool biased, Layout layout) {
  const int64_t batch = 2, heads = 3, tokens = prefix + h * w, taps = size * size, channels = heads * head_dim;
  const std::vector<int64_t> shape = {batch, heads, tokens, head_dim};
  const HeapTensor attention(dtype, shape, layout), value(dtype, shape, layout), gradient(dtype, shape, layout);
  const Layout dense = layout == Layout::kHeadsInside ? layout : Layout::kContiguous;
  const HeapTensor output(dtype, shape, dense, true), grad_value(dtype, shape, dense, true);
  const auto weight = filled(channels * taps, false), bias = filled(channels, false),
             grad_weight = filled(channels * taps, true), grad_bias = filled(channels, true);
  const LocalEnhancement options = {weight.get(), biased ? bias.get() : nullptr, size, h, w, prefix};
  kernels_under_test.local_enhancement_forward({attention.view(), value.view(), output.view(), options}, kRuntime);
  kernels_under_test.local_enhancement_backward({gradient.view(), value.view(), grad_value.view(), grad_weight.get(),
                                                    biased ? grad_bias.get() : nullptr, options},
      kRuntime);
  double worst[4] = {}, largest[4] = {0.05, 0.05, 0.05, 0.05};
  const auto note = [&](int which, double got, double want) {
    const double error = fabs(got - want);
    if (!(error <= worst[which])) worst[which] = error;
    if (fabs(want) > largest[which]) largest[which] = fabs(want);
  };
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t d = 0; d < head_dim; ++d) {
      const int64_t channel = head * head_dim + d;
      std::vector<double> dw(taps);
      double db = 0;
      for (int64_t b = 0; b < batch; ++b) {
        std::vector<double> dv(tokens);
        for (int64_t n = 0; n < tokens; ++n) {
          double sum = attention.at(b, head, n, d);
          const double g = gradient.at(b, head, n, d);
          if (n >= prefix && biased) sum += bias[channel];
          if (n >= prefix) db += g;
          for (int64_t t = 0; n >= prefix && t < taps; ++t) {
            const int64_t y = (n - prefix) / w + t / size - size / 2, x = (n - prefix) % w + t % size - size / 2;
            if (y < 0 || y >= h || x < 0 || x >= w) continue;
            const int64_t other = prefix + y * w + x;
            sum += weight[channel * taps + t] * value.at(b, head, other, d);
            dv[other] += weight[channel * taps + t] * g;
            dw[t] += g * value.at(b, head, other, d);
          }
          note(0, output.at(b, head, n, d), sum);
        }
        for (int64_t n = 0; n < tokens; ++n) note(1, grad_value.at(b, head, n, d), dv[n]);
      }
      for (int64_t t = 0; t < taps; ++t) note(2, grad_weight[channel * taps + t], dw[t]);
      if (biased) note(3, grad_bias[channel], db);
    }
  for (int which = 0; which < 4; ++which)
    if (!(worst[which] <= (which >= 2 || dtype == DType::kFloat32 ? 1e-5 : 1e-2) * largest[which])) {
      ++failures;
      printf("local_enhancement: dtype %d, %ld + %ld x %ld, %ld taps, layout %d: tensor %d off by %g of %g\n",
          static_cast<int>(dtype), static_cast<long>(prefix), static_cast<long>(h), static_cast<long>(w),
          static_cast<long>(taps), static_cast<int>(layout), which, worst[which], largest[which]);
    }
}

void local_enhancement_kernels(DType dtype) {
  local_enhancement(dtype, 7, 9, 0, 5, 16, true, Layout::kContiguous);
  local_enhancement(dtype, 4, 5, 3, 3, 23, false, Layout::kHeadsInside);
  local_enhancement(dtype, 17, 3, 1, 7, 5, true, Layout::kStrided);
  local_enhancement(dtype, 1, 18, 0, 9, 33, true, Layout::kExpanded);
  local_enhancement(dtype, 2, 2, 19, 1, 130, true, Layout::kHeadsInside);
  local_enhancement(dtype, 0, 4, 2, 5, 8, true, Layout::kContiguous);
}
