// URPE and the feature map against loops in double; for kernels.cpp. Gradients of tables and projections are written
// whole and finite; tests/test_urpe.py and tests/test_feature_map.py hold their values against autograd.
#pragma once

namespace {

void check_written(const char* name, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!isfinite(values[i])) {
      ++failures, printf("%s: element %ld is not finite\n", name, static_cast<long>(i));
      return;
    }
}

void relative(DType dtype, int64_t grid_h, int64_t grid_w, int64_t head_dim, bool has_coefficient, bool has_bias,
    bool is_causal, Layout layout) {
  const int64_t heads = 2, tokens = grid_h * grid_w, columns = 2 * grid_w - 1;
  const int64_t entries = tokens > 0 ? (2 * grid_h - 1) * columns : 0;
  const std::unique_ptr<float[]> coefficient = filled(heads * entries, false), bias = filled(heads * entries, false),
                                 grad_coefficient = filled(heads * entries, true),
                                 grad_bias = filled(heads * entries, true);
  if (has_bias)
    for (int64_t i = 0; i < heads * entries; i += 3) bias[i] = -INFINITY;
  const auto entry = [&](int64_t h, int64_t i, int64_t j) {
    const int64_t dy = j / grid_w - i / grid_w, dx = j % grid_w - i % grid_w;
    return h * entries + (dy + grid_h - 1) * columns + dx + grid_w - 1;
  };
  const Relative arguments = {
      has_coefficient ? coefficient.get() : nullptr, has_bias ? bias.get() : nullptr, grid_h, grid_w, is_causal};
  compare(
      "relative", dtype, {2, heads, 1, tokens, tokens, head_dim, is_causal, layout}, one,
      [&](int64_t, int64_t h, int64_t i, int64_t j) { return has_bias ? double{bias[entry(h, i, j)]} : 0.0; },
      [&](const AttentionForward& a) { kernels_under_test.relative_forward(a, arguments, kRuntime); },
      [&](const AttentionBackward& a) {
        kernels_under_test.relative_backward(a, arguments,
            {has_coefficient ? grad_coefficient.get() : nullptr, has_bias ? grad_bias.get() : nullptr}, kRuntime);
      },
      [&](int64_t, int64_t h, int64_t i, int64_t j) {
        return has_coefficient ? double{coefficient[entry(h, i, j)]} : 1.0;
      });
  if (has_coefficient) check_written("gradient of the coefficient", grad_coefficient.get(), heads * entries);
  if (has_bias) check_written("gradient of the bias", grad_bias.get(), heads * entries);
}

void feature_map(DType dtype, int64_t tokens, int64_t head_dim, int64_t directions, bool trigonometric, bool normalize,
    FeatureShift shift, bool has_mask, Layout layout) {
  const int64_t batch = 2, heads = 2, columns = directions * (trigonometric ? 2 : 1);
  const Layout dense = layout == Layout::kHeadsInside ? layout : Layout::kContiguous;
  const HeapTensor x(dtype, {batch, heads, tokens, head_dim}, layout),
      features(dtype, {batch, heads, tokens, columns}, Layout::kContiguous, true),
      upstream(dtype, {batch, heads, tokens, columns}, layout),
      grad_x(dtype, {batch, heads, tokens, head_dim}, dense, true);
  const std::unique_ptr<float[]> projection = filled(heads * directions * head_dim, false),
                                 grad_projection = filled(heads * directions * head_dim, true);
  std::unique_ptr<bool[]> mask(new bool[batch * tokens]);
  for (int64_t i = 0; i < batch * tokens; ++i) mask[i] = has_mask && i % 3 == 1;
  const FeatureMap map = {
      x.view(), projection.get(), directions, has_mask ? mask.get() : nullptr, trigonometric, normalize, shift};
  kernels_under_test.feature_map_forward(map, features.view(), kRuntime);
  kernels_under_test.feature_map_backward(
      map, {upstream.view(), features.view(), grad_x.view(), grad_projection.get()}, kRuntime);

  Worst worst;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> exponent(tokens * directions), angle(tokens * directions), highest(tokens, -INFINITY);
      double of_head = -INFINITY;
      for (int64_t i = 0; i < tokens; ++i) {
        double square = 0;
        for (int64_t d = 0; d < head_dim; ++d) square += pow(x.at(b, h, i, d), 2);
        const double length = normalize ? sqrt(square) : 1, half = normalize ? 0.5 : square / 2;
        for (int64_t m = 0; m < directions; ++m) {
          double& dot = angle[i * directions + m];
          for (int64_t d = 0; d < head_dim; ++d)
            dot += projection[(h * directions + m) * head_dim + d] * x.at(b, h, i, d) / length;
          exponent[i * directions + m] = trigonometric ? half : dot - half;
          highest[i] = fmax(highest[i], exponent[i * directions + m]);
        }
        if (!mask[b * tokens + i]) of_head = fmax(of_head, highest[i]);
      }
      for (int64_t i = 0; i < tokens; ++i)
        for (int64_t m = 0; m < columns; ++m) {
          const int64_t at = i * directions + m % directions;
          const double off = shift == FeatureShift::kNone ? 0 : shift == FeatureShift::kRow ? highest[i] : of_head;
          const double wave = !trigonometric ? 1 : m < directions ? sin(angle[at]) : cos(angle[at]);
          const double size = exp(exponent[at] - off) / sqrt(static_cast<double>(directions));
          worst.note(features.at(b, h, i, m), mask[b * tokens + i] ? 0 : size * wave);
          for (int64_t d = 0; d < head_dim && m == 0; ++d)
            if (!isfinite(grad_x.at(b, h, i, d))) worst.note(NAN, 0);
        }
    }
  worst.check("features", dtype, tolerance_of(dtype), tokens, head_dim, directions);
  check_written("gradient of the projection", grad_projection.get(), heads * directions * head_dim);
}

}  // namespace

void urpe_kernels(DType dtype) {
  relative(dtype, 1, 75, 7, true, true, false, Layout::kContiguous);
  relative(dtype, 1, 330, 16, true, true, true, Layout::kHeadsInside);
  relative(dtype, 1, 1, 3, true, true, false, Layout::kContiguous);
  relative(dtype, 1, 0, 3, true, true, false, Layout::kContiguous);
  relative(dtype, 13, 1, 33, false, true, true, Layout::kStrided);
  relative(dtype, 5, 7, 16, true, false, false, Layout::kExpanded);
  relative(dtype, 3, 90, 8, true, true, false, Layout::kContiguous);
  relative(dtype, 2, 170, 8, true, true, true, Layout::kContiguous);  // staged rows
  relative(dtype, 1, 50, 64, false, false, true, Layout::kStrided);
  const FeatureShift shifts[] = {FeatureShift::kNone, FeatureShift::kRow, FeatureShift::kHead};
  for (const FeatureShift shift : shifts)
    for (const bool trigonometric : {false, true}) {
      feature_map(dtype, 75, 7, 5, trigonometric, true, shift, true, Layout::kContiguous);
      feature_map(dtype, 1, 33, 17, trigonometric, false, shift, false, Layout::kStrided);
      feature_map(dtype, 50, 16, 32, trigonometric, false, shift, true, Layout::kHeadsInside);
      feature_map(dtype, 0, 4, 4, trigonometric, true, shift, true, Layout::kContiguous);
    }
}
