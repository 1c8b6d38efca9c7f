// Retention as sums over pairs of tokens in double, gradients included; for kernels.cpp.
#pragma once

namespace {

struct RetentionCase {
  std::vector<int32_t> bounds;  // of packed sequences, with a batch of 1; empty: two batches of `tokens`
  int64_t tokens, key_dim, value_dim, chunk_size;
  bool is_causal, has_state, has_row_scale;
};

// Floats of (sequences, heads, key_dim, value_dim) and what is added to them in double.
struct StateMemory {
  int64_t rows, columns;
  std::unique_ptr<float[]> values;
  std::vector<double> wanted;

  StateMemory(int64_t pairs, int64_t rows, int64_t columns, bool poison)
      : rows(rows),
        columns(columns),
        values(filled(pairs * rows * columns, poison)),
        wanted(static_cast<size_t>(pairs * rows * columns)) {}
  int64_t at(int64_t pair, int64_t d, int64_t c) const { return (pair * rows + d) * columns + c; }
  void note(Worst& worst) const {
    for (size_t i = 0; i < wanted.size(); ++i) worst.note(values[static_cast<int64_t>(i)], wanted[i]);
  }
};

void retention(DType dtype, const RetentionCase& c, Layout layout) {
  const bool is_packed = !c.bounds.empty();
  const int64_t heads = 2, batch = is_packed ? 1 : 2, N = c.tokens, K = c.key_dim, V = c.value_dim;
  const int64_t sequences = is_packed ? static_cast<int64_t>(c.bounds.size()) - 1 : batch;
  const double scale = 0.3;
  const Layout dense = layout == Layout::kHeadsInside ? layout : Layout::kContiguous;
  const HeapTensor query(dtype, {batch, heads, N, K}, layout), key(dtype, {batch, heads, N, K}, layout),
      value(dtype, {batch, heads, N, V}, layout), upstream(dtype, {batch, heads, N, V}, layout),
      output(dtype, {batch, heads, N, V}, dense, true), grad_query(dtype, {batch, heads, N, K}, dense, true),
      grad_key(dtype, {batch, heads, N, K}, dense, true), grad_value(dtype, {batch, heads, N, V}, dense, true);
  const StateMemory initial(sequences * heads, K, V, false), grad_state(sequences * heads, K, V, false);
  StateMemory state(sequences * heads, K, V, true), grad_initial(sequences * heads, K, V, true);
  const std::unique_ptr<float[]> log_decay = filled(heads, false), row_scale = filled(batch * heads * N, false),
                                 grad_log_decay = filled(heads, true);
  std::unique_ptr<int32_t[]> bounds(new int32_t[c.bounds.size()]);
  for (size_t i = 0; i < c.bounds.size(); ++i) bounds[i] = c.bounds[i];
  for (int64_t h = 0; h < heads; ++h) log_decay[h] = -0.02f - 0.1f * fabsf(log_decay[h]);
  const Retention arguments = {query.view(), key.view(), value.view(), log_decay.get(),
      c.has_state ? initial.values.get() : nullptr, c.has_row_scale ? row_scale.get() : nullptr,
      is_packed ? bounds.get() : nullptr, sequences, c.is_causal, c.chunk_size, scale};
  kernels_under_test.retention_forward(
      arguments, {output.view(), c.has_state ? state.values.get() : nullptr}, kRuntime);
  kernels_under_test.retention_backward(arguments,
      {upstream.view(), c.has_state ? grad_state.values.get() : nullptr, grad_query.view(), grad_key.view(),
          grad_value.view(), grad_log_decay.get(), c.has_state ? grad_initial.values.get() : nullptr},
      kRuntime);

  Worst worst[7];
  for (int64_t h = 0; h < heads; ++h) {
    double grad_decay = 0;
    const double l = log_decay[h];
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t b = is_packed ? 0 : s, pair = s * heads + h;
      const int64_t first = is_packed ? c.bounds[s] : 0, length = is_packed ? c.bounds[s + 1] - first : N;
      std::vector<double> dk(length * K), dv(length * V);
      for (int64_t i = 0; i < length; ++i) {
        const double row = c.has_row_scale ? row_scale[(b * heads + h) * N + first + i] : 1;
        std::vector<double> o(V), dq(K), G(V);
        for (int64_t n = 0; n < V; ++n) G[n] = row * upstream.at(b, h, first + i, n);
        for (int64_t j = 0; j < (c.is_causal ? i + 1 : length); ++j) {
          const double distance = fabs(static_cast<double>(i - j)), weight = scale * exp(l * distance);
          double dot = 0, slope = 0;
          for (int64_t d = 0; d < K; ++d) dot += query.at(b, h, first + i, d) * key.at(b, h, first + j, d);
          for (int64_t n = 0; n < V; ++n) {
            slope += G[n] * value.at(b, h, first + j, n);
            o[n] += row * weight * dot * value.at(b, h, first + j, n);
            dv[j * V + n] += weight * dot * G[n];
          }
          for (int64_t d = 0; d < K; ++d) {
            dq[d] += weight * slope * key.at(b, h, first + j, d);
            dk[j * K + d] += weight * slope * query.at(b, h, first + i, d);
          }
          grad_decay += distance * weight * dot * slope;
        }
        const double rise = exp(l * static_cast<double>(i + 1)), fall = exp(l * static_cast<double>(length - 1 - i));
        for (int64_t d = 0; d < K && c.has_state; ++d)
          for (int64_t n = 0; n < V; ++n) {
            const int64_t at = initial.at(pair, d, n);
            const double q = query.at(b, h, first + i, d), before = initial.values[at], after = grad_state.values[at],
                         kv = key.at(b, h, first + i, d) * value.at(b, h, first + i, n);
            o[n] += row * scale * rise * q * before;
            dq[d] += scale * rise * before * G[n];
            grad_decay += static_cast<double>(i + 1) * scale * rise * q * before * G[n] +
                          static_cast<double>(length - 1 - i) * fall * kv * after;
            grad_initial.wanted[at] += scale * rise * q * G[n];
            state.wanted[at] += fall * kv;
            dk[i * K + d] += fall * after * value.at(b, h, first + i, n);
            dv[i * V + n] += fall * after * key.at(b, h, first + i, d);
          }
        for (int64_t n = 0; n < V; ++n) worst[0].note(output.at(b, h, first + i, n), o[n]);
        for (int64_t d = 0; d < K; ++d) worst[1].note(grad_query.at(b, h, first + i, d), dq[d]);
      }
      for (int64_t j = 0; j < length; ++j) {
        for (int64_t d = 0; d < K; ++d) worst[2].note(grad_key.at(b, h, first + j, d), dk[j * K + d]);
        for (int64_t n = 0; n < V; ++n) worst[3].note(grad_value.at(b, h, first + j, n), dv[j * V + n]);
      }
      const double whole = exp(l * static_cast<double>(length));
      for (int64_t at = pair * K * V; at < (pair + 1) * K * V && c.has_state; ++at) {
        state.wanted[at] += whole * initial.values[at];
        grad_initial.wanted[at] += whole * grad_state.values[at];
        grad_decay += static_cast<double>(length) * whole * initial.values[at] * grad_state.values[at];
      }
    }
    worst[4].note(grad_log_decay[h], grad_decay);
  }
  if (c.has_state) state.note(worst[5]), grad_initial.note(worst[6]);
  const char* names[] = {"output", "grad_query", "grad_key", "grad_value", "grad_log_decay", "state", "grad_initial"};
  for (int i = 0; i < 7; ++i) worst[i].check(names[i], dtype, tolerance_of(dtype), c.chunk_size, K, V);
}

void retention_step(DType dtype, int64_t K, int64_t V, bool in_place, Layout layout) {
  const int64_t batch = 2, heads = 2, pairs = batch * heads;
  const HeapTensor query(dtype, {batch, heads, 1, K}, layout), key(dtype, {batch, heads, 1, K}, layout),
      value(dtype, {batch, heads, 1, V}, layout), output(dtype, {batch, heads, 1, V}, Layout::kContiguous, true);
  StateMemory before(pairs, K, V, false), after(pairs, K, V, true);
  const std::unique_ptr<float[]> log_decay = filled(heads, false);
  for (int64_t h = 0; h < heads; ++h) log_decay[h] = -fabsf(log_decay[h]);
  Worst worst[2];
  std::vector<double> o(pairs * V);
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t d = 0; d < K; ++d)
      for (int64_t n = 0; n < V; ++n) {
        const int64_t b = pair / heads, h = pair % heads, at = before.at(pair, d, n);
        before.wanted[at] = after.wanted[at] =
            exp(static_cast<double>(log_decay[h])) * before.values[at] + key.at(b, h, 0, d) * value.at(b, h, 0, n);
        o[pair * V + n] += 0.3 * query.at(b, h, 0, d) * after.wanted[at];
      }
  kernels_under_test.retention_step({query.view(), key.view(), value.view(), output.view(), log_decay.get(),
                                        before.values.get(), in_place ? before.values.get() : after.values.get(), 0.3},
      kRuntime);
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t n = 0; n < V; ++n) worst[0].note(output.at(pair / heads, pair % heads, 0, n), o[pair * V + n]);
  (in_place ? before : after).note(worst[1]);
  worst[0].check("output of a step", dtype, tolerance_of(dtype), 1, K, V);
  worst[1].check("state of a step", dtype, tolerance_of(DType::kFloat32), 1, K, V);
}

}  // namespace

void retention_kernels(DType dtype) {
  retention(dtype, {{}, 75, 7, 33, 0, true, true, true}, Layout::kContiguous);
  retention(dtype, {{}, 70, 64, 48, 0, true, false, false}, Layout::kHeadsInside);
  retention(dtype, {{}, 33, 16, 5, 16, true, true, false}, Layout::kStrided);
  retention(dtype, {{}, 40, 16, 16, 1, true, true, true}, Layout::kExpanded);
  retention(dtype, {{}, 101, 8, 16, 101, true, false, true}, Layout::kContiguous);
  retention(dtype, {{}, 72, 33, 20, 24, false, false, false}, Layout::kContiguous);
  retention(dtype, {{}, 80, 16, 1, 80, false, false, true}, Layout::kHeadsInside);
  retention(dtype, {{0, 0, 1, 40, 40, 71}, 71, 16, 24, 32, true, true, true}, Layout::kContiguous);
  retention(dtype, {{0, 9, 45}, 45, 24, 8, 16, false, false, true}, Layout::kStrided);
  retention(dtype, {{}, 0, 4, 4, 0, true, true, true}, Layout::kContiguous);
  retention(dtype, {{}, 60, 8, 8, 2, true, true, false}, Layout::kContiguous);
  retention(dtype, {{}, 6, 256, 512, 2, true, true, false}, Layout::kContiguous);  // states of several segments
  retention(dtype, {{}, 24, 256, 512, 2, false, false, false}, Layout::kContiguous);
  for (const bool in_place : {false, true}) {
    retention_step(dtype, 16, 48, in_place, Layout::kContiguous);
    retention_step(dtype, 7, 37, in_place, Layout::kStrided);
  }
}
