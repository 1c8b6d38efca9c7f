// Windows as attention with -inf outside a window; zero keys, overlap and LePE only for memory and forgotten elements.
#pragma once

struct WindowParameters {
  std::unique_ptr<float[]> bias, weight, lepe_bias;
  int64_t entries, taps, channels;
};

std::unique_ptr<float[]> filled(int64_t count, bool poison) {
  std::unique_ptr<float[]> memory(new float[count]);
  for (int64_t i = 0; i < count; ++i) memory[i] = poison ? NAN : uniform();
  return memory;
}

Windows with_parameters(Windows windows, const WindowParameters& parameters, bool bias, bool lepe) {
  windows.bias = bias ? parameters.bias.get() : nullptr;
  windows.lepe_weight = lepe ? parameters.weight.get() : nullptr;
  windows.lepe_bias = lepe ? parameters.lepe_bias.get() : nullptr;
  return windows;
}

WindowsGrad as_gradient(const WindowParameters& parameters, bool bias, bool lepe) {
  return {bias ? parameters.bias.get() : nullptr, lepe ? parameters.weight.get() : nullptr,
      lepe ? parameters.lepe_bias.get() : nullptr};
}

WindowParameters window_parameters(const Windows& w, int64_t heads, int64_t head_dim, bool poison) {
  const int64_t rows = 2 * w.window_h[0] + 2 * w.overlap_h - 1, columns = 2 * w.window_w[0] + 2 * w.overlap_w - 1;
  const int64_t entries = w.grid_h == 0 ? 0 : heads * rows * columns;
  return {filled(entries, poison), filled(heads * 9 * head_dim, poison), filled(heads * head_dim, poison), entries,
      heads * 9 * head_dim, heads * head_dim};
}

void expect_finite(const char* what, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!isfinite(values[i])) {
      ++failures, printf("windows: %s %ld is not finite\n", what, static_cast<long>(i));
      return;
    }
}

// Shifted windows with a bias, padding masked.
void shifted_windows(DType dtype, int64_t h, int64_t w, int64_t wh, int64_t ww, int64_t sy, int64_t sx,
    int64_t head_dim, Layout layout) {
  const int64_t heads = 2, columns = 2 * ww - 1;
  Windows windows = {h, w, {wh, wh}, {ww, ww}, sy, sx, 0, 0, true, nullptr, nullptr, nullptr};
  const WindowParameters parameters = window_parameters(windows, heads, head_dim, false),
                         gradient = window_parameters(windows, heads, head_dim, true);
  windows = with_parameters(windows, parameters, true, false);
  const int64_t padded[2] = {(h + wh - 1) / wh * wh, (w + ww - 1) / ww * ww};
  const auto rolled = [&](int64_t token, int64_t (&place)[2]) {
    const int64_t at[2] = {token / w, token % w}, extent[2] = {h, w}, shift[2] = {sy, sx};
    for (int d = 0; d < 2; ++d) place[d] = (at[d] + (padded[d] - extent[d]) / 2 - shift[d] + padded[d]) % padded[d];
  };
  const auto region = [](int64_t place, int64_t extent, int64_t size, int64_t shift) {
    return shift == 0 ? 0 : (place >= extent - size) + (place >= extent - shift);
  };
  const auto added = [&](int64_t, int64_t head, int64_t i, int64_t j) {
    int64_t q[2], k[2];
    rolled(i, q), rolled(j, k);
    if (q[0] / wh != k[0] / wh || q[1] / ww != k[1] / ww) return static_cast<double>(-INFINITY);
    const int64_t dy = k[0] - q[0] + wh - 1, dx = k[1] - q[1] + ww - 1;
    const bool apart = region(q[0], padded[0], wh, sy) != region(k[0], padded[0], wh, sy) ||
                       region(q[1], padded[1], ww, sx) != region(k[1], padded[1], ww, sx);
    return parameters.bias[(head * (2 * wh - 1) + dy) * columns + dx] - (apart ? 100.0 : 0.0);
  };
  compare(
      "windows", dtype, {2, heads, 1, h * w, h * w, head_dim, false, layout}, one, added,
      [&](const AttentionForward& a) { kernels_under_test.window_forward(a, windows, kRuntime); },
      [&](const AttentionBackward& a) {
        kernels_under_test.window_backward(a, windows, as_gradient(gradient, true, false), kRuntime);
      });
  expect_finite("bias gradient", gradient.bias.get(), gradient.entries);
}

// One window that is the grid, behind prefix tokens, with a bias or weights.
void whole_grid(DType dtype, int64_t h, int64_t w, int64_t prefix, bool weighs, int64_t head_dim, Layout layout) {
  const int64_t heads = 2, tokens = prefix + h * w;
  Windows windows = {h, w, {h, h}, {w, w}, 0, 0, 0, 0, false, nullptr, nullptr, nullptr, nullptr, prefix};
  const WindowParameters parameters = window_parameters(windows, heads, head_dim, false),
                         gradient = window_parameters(windows, heads, head_dim, true);
  (weighs ? windows.weights : windows.bias) = parameters.bias.get();
  const WindowsGrad into = {
      weighs ? nullptr : gradient.bias.get(), nullptr, nullptr, weighs ? gradient.bias.get() : nullptr};
  const auto entry = [&](int64_t head, int64_t i, int64_t j, double neutral) {
    if (i < prefix || j < prefix) return neutral;
    const int64_t dy = (j - prefix) / w - (i - prefix) / w + h - 1, dx = (j - prefix) % w - (i - prefix) % w + w - 1;
    return static_cast<double>(parameters.bias[(head * (2 * h - 1) + dy) * (2 * w - 1) + dx]);
  };
  compare(
      "whole grid", dtype, {2, heads, 1, tokens, tokens, head_dim, false, layout}, one,
      [&](int64_t, int64_t head, int64_t i, int64_t j) { return weighs ? 0.0 : entry(head, i, j, 0.0); },
      [&](const AttentionForward& a) { kernels_under_test.window_forward(a, windows, kRuntime); },
      [&](const AttentionBackward& a) { kernels_under_test.window_backward(a, windows, into, kRuntime); },
      [&](int64_t, int64_t head, int64_t i, int64_t j) { return weighs ? entry(head, i, j, 1.0) : 1.0; });
  expect_finite("table gradient", gradient.bias.get(), gradient.entries);
}

void any_windows(DType dtype, Windows windows, int64_t head_dim, bool bias, bool lepe, Layout layout) {
  const int64_t heads = 3;
  const std::vector<int64_t> size = {2, heads, windows.grid_h * windows.grid_w, head_dim};
  const WindowParameters parameters = window_parameters(windows, heads, head_dim, false),
                         gradient = window_parameters(windows, heads, head_dim, true);
  windows = with_parameters(windows, parameters, bias, lepe);
  const HeapTensor query(dtype, size, layout), key(dtype, size, layout), value(dtype, size, layout),
      grad_output(dtype, size, layout);
  const HeapTensor results[4] = {{dtype, size, Layout::kContiguous, true}, {dtype, size, Layout::kContiguous, true},
      {dtype, size, Layout::kContiguous, true}, {dtype, size, Layout::kContiguous, true}};
  const std::unique_ptr<float[]> logsumexp = filled(size[0] * size[1] * size[2], true);
  kernels_under_test.window_forward(
      {query.view(), key.view(), value.view(), results[0].view(), logsumexp.get(), 0.3f}, windows, kRuntime);
  kernels_under_test.window_backward(
      {grad_output.view(), query.view(), key.view(), value.view(), results[0].view(), logsumexp.get(),
          results[1].view(), results[2].view(), results[3].view(), 0.3f},
      windows, as_gradient(gradient, bias, lepe), kRuntime);
  for (int which = 0; which < 4; ++which)
    for (int64_t b = 0; b < size[0]; ++b)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t n = 0; n < size[2]; ++n)
          for (int64_t d = 0; d < head_dim; ++d)
            if (!isfinite(results[which].at(b, head, n, d))) {
              ++failures, printf("windows: tensor %d has an element that is not finite\n", which);
              return;
            }
  if (bias) expect_finite("bias gradient", gradient.bias.get(), gradient.entries);
  if (lepe) expect_finite("weight gradient", gradient.weight.get(), gradient.taps);
  if (lepe) expect_finite("LePE bias gradient", gradient.lepe_bias.get(), gradient.channels);
}

void window_kernels(DType dtype) {
  const Layout layouts[] = {Layout::kContiguous, Layout::kHeadsInside, Layout::kStrided, Layout::kExpanded};
  const int64_t head_dims[] = {1, 24, 46, 77, 122};
  int turn = 0;
  for (const int64_t head_dim : head_dims) {
    const Layout layout = layouts[turn++ % 4];
    shifted_windows(dtype, 7, 7, 7, 7, 0, 0, head_dim, layout);
    shifted_windows(dtype, 5, 9, 3, 4, 1, 2, head_dim, layout);
    shifted_windows(dtype, 1, 1, 1, 1, 0, 0, head_dim, layout);
    shifted_windows(dtype, 3, 5, 4, 7, 3, 6, head_dim, layout);
    whole_grid(dtype, 4, 5, turn % 4, turn % 2 == 0, head_dim, layout);
    whole_grid(dtype, 1 + turn, 7, 0, true, head_dim, layout);
    any_windows(dtype, {6, 10, {6, 1}, {1, 10}, 0, 0, 0, 0, false}, head_dim, false, true, layout);
    any_windows(dtype, {9, 5, {9, 2}, {2, 5}, 0, 0, 0, 0, turn % 2 == 0}, head_dim, false, true, layout);
    any_windows(dtype, {8, 7, {4, 4}, {4, 4}, 0, 0, 2, 1, turn % 2 == 0}, head_dim, true, false, layout);
  }
  shifted_windows(dtype, 17, 20, 16, 18, 3, 5, 16, Layout::kHeadsInside);  // several key blocks
  whole_grid(dtype, 20, 16, 3, true, 5, Layout::kContiguous);  // several key blocks, tables too large to expand
  whole_grid(dtype, 13, 24, 0, false, 4, Layout::kHeadsInside);
  any_windows(dtype, {16, 16, {16, 16}, {16, 16}, 0, 0, 4, 4, false}, 30, true, false, Layout::kContiguous);
  any_windows(dtype, {0, 3, {0, 1}, {1, 3}, 0, 0, 0, 0, false}, 8, false, true, Layout::kContiguous);
}
