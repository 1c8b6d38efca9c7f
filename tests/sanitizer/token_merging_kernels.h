// Token merging, for kernels.cpp: plans, what is done by them, and the matching that makes them.
#pragma once

namespace {

struct MergingPlan {
  int64_t batch, tokens, outputs;
  std::unique_ptr<int32_t[]> source, members, offsets;

  MergingPlan(int64_t batch, int64_t tokens, int64_t outputs)
      : batch(batch),
        tokens(tokens),
        outputs(outputs),
        source(new int32_t[batch * tokens]),
        members(new int32_t[batch * tokens]),
        offsets(new int32_t[batch * (outputs + 1)]) {
    for (int64_t i = 0; i < batch * tokens; ++i) source[i] = members[i] = -1;
    for (int64_t i = 0; i < batch * (outputs + 1); ++i) offsets[i] = -1;
  }

  // Any output for any token, so that some have many members and some none; the first takes all where there are two.
  void fill() {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < tokens; ++i)
        source[b * tokens + i] =
            outputs == 2 ? 0 : static_cast<int32_t>((uniform() * 0.5f + 0.5f) * static_cast<float>(outputs)) % outputs;
      int32_t* const begin = offsets.get() + b * (outputs + 1);
      begin[0] = 0;
      for (int64_t t = 0, count = 0; t < outputs; ++t) {
        for (int64_t i = 0; i < tokens; ++i)
          if (source[b * tokens + i] == t) members[b * tokens + count++] = static_cast<int32_t>(i);
        begin[t + 1] = static_cast<int32_t>(count);
      }
    }
  }

  // Members are those tokens whose output is theirs, ascending within each.
  bool is_consistent() const {
    bool good = true;
    for (int64_t b = 0; b < batch; ++b) {
      const int32_t* const begin = offsets.get() + b * (outputs + 1);
      good = good && begin[0] == 0 && begin[outputs] == tokens;
      for (int64_t t = 0; t < outputs && good; ++t) {
        good = begin[t] <= begin[t + 1] && begin[t + 1] <= tokens;
        for (int64_t i = begin[t]; i < begin[t + 1] && good; ++i) {
          const int32_t member = members[b * tokens + i];
          good = member >= 0 && member < tokens && source[b * tokens + member] == t &&
                 (i == begin[t] || members[b * tokens + i - 1] < member);
        }
      }
    }
    return good;
  }

  TokenGroups groups() const { return {source.get(), members.get(), offsets.get(), batch, tokens, outputs}; }
  int64_t output_of(int64_t b, int64_t i) const { return source[b * tokens + i]; }
};

void token_merge(DType dtype, const MergingPlan& plan, int64_t C, MergeMode mode, Layout layout) {
  const int64_t B = plan.batch, N = plan.tokens, T = plan.outputs;
  const HeapTensor x(dtype, {1, B, N, C}, layout), grad(dtype, {1, B, T, C}, layout);
  const HeapTensor output(dtype, {1, B, T, C}, Layout::kContiguous, true),
      grad_x(dtype, {1, B, N, C}, Layout::kContiguous, true);
  kernels_under_test.token_merge_forward({x.view(), plan.groups(), mode, output.view()}, kRuntime);
  // An unmerge passes neither x nor output.
  const bool reads = mode != MergeMode::kSum;
  kernels_under_test.token_merge_backward(
      {grad.view(), reads ? x.view() : Tensor{}, reads ? output.view() : Tensor{}, plan.groups(), mode, grad_x.view()},
      kRuntime);
  Worst forward, backward;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c) {
      std::vector<double> sum(T), best(T, -INFINITY), count(T), attain(T);
      for (int64_t i = 0; i < N; ++i) {
        const int64_t t = plan.output_of(b, i);
        sum[t] += x.at(0, b, i, c), count[t] += 1, best[t] = fmax(best[t], x.at(0, b, i, c));
      }
      for (int64_t i = 0; i < N; ++i) attain[plan.output_of(b, i)] += x.at(0, b, i, c) == best[plan.output_of(b, i)];
      for (int64_t t = 0; t < T; ++t)
        forward.note(output.at(0, b, t, c), count[t] == 0              ? 0
                                            : mode == MergeMode::kMax  ? best[t]
                                            : mode == MergeMode::kMean ? sum[t] / count[t]
                                                                       : sum[t]);
      for (int64_t i = 0; i < N; ++i) {
        const int64_t t = plan.output_of(b, i);
        const double g = grad.at(0, b, t, c);
        backward.note(grad_x.at(0, b, i, c), mode == MergeMode::kSum       ? g
                                             : mode == MergeMode::kMean    ? g / count[t]
                                             : x.at(0, b, i, c) == best[t] ? g / attain[t]
                                                                           : 0);
      }
    }
  forward.check("token_merge", dtype, tolerance_of(dtype), N, T, C);
  backward.check("token_merge backward", dtype, tolerance_of(dtype), N, T, C);
}

void weighted_merge(DType dtype, const MergingPlan& plan, int64_t C, bool has_sizes, bool has_residual, Layout layout) {
  const int64_t B = plan.batch, N = plan.tokens, T = plan.outputs;
  const HeapTensor x(dtype, {1, B, N, C}, layout), residual(dtype, {1, B, N, C}, layout),
      grad(dtype, {1, B, T, C}, layout);
  const HeapTensor output(dtype, {1, B, T, C}, Layout::kContiguous, true),
      grad_x(dtype, {1, B, N, C}, Layout::kContiguous, true);
  std::unique_ptr<float[]> sizes(new float[B * N]), merged(new float[B * T]), grad_merged(new float[B * T]),
      grad_sizes(new float[B * N]);
  for (int64_t i = 0; i < B * N; ++i) sizes[i] = 1.5f + uniform(), grad_sizes[i] = NAN;
  for (int64_t i = 0; i < B * T; ++i) grad_merged[i] = uniform(), merged[i] = NAN;
  const float* const given = has_sizes ? sizes.get() : nullptr;
  const Tensor added = has_residual ? residual.view() : Tensor{};
  kernels_under_test.weighted_merge_forward(
      {x.view(), added, given, plan.groups(), output.view(), merged.get()}, kRuntime);
  kernels_under_test.weighted_merge_backward(
      {grad.view(), has_sizes ? grad_merged.get() : nullptr, x.view(), added, output.view(), given, plan.groups(),
          grad_x.view(), has_sizes ? grad_sizes.get() : nullptr},
      kRuntime);
  const auto size = [&](int64_t b, int64_t i) { return has_sizes ? double{sizes[b * N + i]} : 1.0; };
  const auto value = [&](int64_t b, int64_t i, int64_t c) {
    return x.at(0, b, i, c) + (has_residual ? residual.at(0, b, i, c) : 0);
  };
  Worst forward, totals, backward, of_sizes;
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> total(T), average(T * C);
    for (int64_t i = 0; i < N; ++i) total[plan.output_of(b, i)] += size(b, i);
    for (int64_t i = 0; i < N; ++i) {
      const int64_t t = plan.output_of(b, i);
      for (int64_t c = 0; c < C; ++c) average[t * C + c] += size(b, i) / total[t] * value(b, i, c);
    }
    for (int64_t t = 0; t < T; ++t) {
      totals.note(merged[b * T + t], total[t]);
      for (int64_t c = 0; c < C; ++c) forward.note(output.at(0, b, t, c), average[t * C + c]);
    }
    for (int64_t i = 0; i < N; ++i) {
      const int64_t t = plan.output_of(b, i);
      double pull = 0;
      for (int64_t c = 0; c < C; ++c) {
        const double g = grad.at(0, b, t, c);
        backward.note(grad_x.at(0, b, i, c), size(b, i) / total[t] * g);
        pull += (value(b, i, c) - average[t * C + c]) * g;
      }
      if (has_sizes) of_sizes.note(grad_sizes[b * N + i], pull / total[t] + grad_merged[b * T + t]);
    }
  }
  forward.check("weighted_merge", dtype, tolerance_of(dtype), N, T, C);
  totals.check("weighted_merge sizes", dtype, 2e-5, N, T, C);
  backward.check("weighted_merge backward", dtype, tolerance_of(dtype), N, T, C);
  of_sizes.check("weighted_merge gradient of sizes", dtype, tolerance_of(dtype), N, T, C);
}

void bipartite_match(DType dtype, int64_t tokens, int64_t dim, int64_t merged, int64_t is_protected, bool distill,
    bool has_sizes, double threshold, Layout layout) {
  constexpr int64_t kBatch = 2;
  const HeapTensor metric(dtype, {1, kBatch, tokens, dim}, layout);
  std::unique_ptr<float[]> sizes(new float[kBatch * tokens]);
  for (int64_t i = 0; i < kBatch * tokens; ++i) sizes[i] = i % 5 == 0 ? 0.f : 1.f;
  const bool padded = threshold >= -1;
  const MergingPlan plan(kBatch, tokens, padded ? tokens : tokens - merged);
  kernels_under_test.bipartite_match(
      {metric.view(), has_sizes ? sizes.get() : nullptr, merged, is_protected, distill, threshold, plan.outputs,
          plan.source.get(), plan.members.get(), plan.offsets.get()},
      kRuntime);
  if (!plan.is_consistent())
    ++failures, printf("bipartite_match: %ld tokens of %ld, %ld merged: no plan\n", static_cast<long>(tokens),
                    static_cast<long>(dim), static_cast<long>(merged));
}

void token_merging_kernels(DType dtype) {
  const Layout layouts[] = {Layout::kContiguous, Layout::kHeadsInside, Layout::kStrided, Layout::kExpanded};
  int turn = 0;
  for (const int64_t columns : {1, 7, 16, 33, 64, 130, 0})
    for (const int64_t tokens : {1, 9, 70, 201}) {
      const Layout layout = layouts[turn % 4];
      MergingPlan plan(2, tokens, turn % 3 == 0 ? 2 : 1 + tokens * 2 / 3);
      plan.fill();
      for (const MergeMode mode : {MergeMode::kMean, MergeMode::kSum, MergeMode::kMax})
        token_merge(dtype, plan, columns, mode, layout);
      weighted_merge(dtype, plan, columns, turn % 2 == 0, turn % 3 != 1, layout);
      weighted_merge(dtype, plan, columns, turn % 2 == 1, turn % 3 == 1, layouts[(turn + 1) % 4]);
      ++turn;
    }
  // Written past the caches: 8 MB in whole lines, though new[] rarely aligns to them.
  MergingPlan plan(1, 1100, 1050);
  plan.fill();
  const int64_t wide = dtype == DType::kFloat32 ? 2048 : 4096;
  token_merge(dtype, plan, wide, MergeMode::kMax, Layout::kContiguous);
  weighted_merge(dtype, plan, wide, true, true, Layout::kContiguous);
  for (const int64_t tokens : {2, 3, 9, 64, 131})
    for (const int64_t dim : {1, 5, 32, 67}) {
      const int64_t rows = 1 + tokens / 40;
      bipartite_match(dtype, tokens, dim, rows, 0, false, turn % 2 == 0, -2.0, layouts[turn % 4]);
      if (tokens >= 9) {
        bipartite_match(dtype, tokens, dim, (tokens - 1) / 2, 1, false, false, -2.0, layouts[(turn + 1) % 4]);
        bipartite_match(dtype, tokens, dim, (tokens - 2) / 2, 2, true, true, 0.1, layouts[(turn + 2) % 4]);
      }
      ++turn;
    }
}

}  // namespace
