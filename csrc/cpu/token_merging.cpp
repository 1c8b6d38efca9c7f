// Merging tokens by a plan (reference/token_merging.py). Over the members i of each output t
//
//   merge     y_t = sum_i x_i / n_t, sum_i x_i or max_i x_i              dx_i = dy_t / n_t, dy_t, or dy_t shared evenly
//                                                                                by the members that attain y_t
//   weighted  y_t = sum_i s_i (x_i + r_i) / S_t,  S_t = sum_i s_i        dx_i = s_i / S_t dy_t
//                                                                        ds_i = (x_i + r_i - y_t) . dy_t / S_t + dS_t
//
// Each output belongs to one thread, forward and backward: it reads its members' rows, in ascending order, and writes
// its own row, or reads its own and writes theirs. A step of up to 64 columns of a row stays in registers over all
// members, summed in float32. Most outputs have one member: their row is copied as it is. Bytes: every row is read once
// and written once (of a maximum's gradient x, y and dy are read, and so they are for ds where an output has several
// members); about one FLOP per element, so the aim is the speed of a copy.
#include "token_merging_rows.h"

namespace effattn::EFFATTN_ISA {
namespace {

using merging::Group;
using merging::group_ahead;
using merging::group_at;
using merging::over_columns;
using merging::over_outputs;
using merging::Row;
using merging::Rows;
using merging::WrittenRow;
using merging::WrittenRows;

// The larger one; NaN if one of them is.
EFFATTN_INLINE Vec larger_or_nan(Vec a, Vec b) {
  const IntVec keep = (a >= b) | (a != a);
  return keep ? a : b;
}

template <class T, bool kStream>
struct Merge {
  static void run(const TokenMergeForward& call, const Runtime& runtime) {
    const int64_t columns = call.output.size[3];
    over_outputs(runtime, call.groups, columns, [&](int64_t batch, int64_t first, int64_t last) {
      const Rows<T> x(call.x, batch);
      const WrittenRows<T, kStream> output(call.output, batch);
      for (int64_t t = first; t < last; ++t) {
        const Group group = group_at(call.groups, batch, t), ahead = group_ahead(call.groups, batch, t, last);
        for (int64_t i = 0; i < ahead.count; ++i) merging::fetch_row(x[ahead.members[i]], columns);
        if (group.count == 0)
          merging::zero_row(output[t], columns);
        else if (group.count == 1)
          merging::copy_row(output[t], x[group.members[0]], columns);
        else if (call.mode == MergeMode::kMax)
          maximum(output[t], x, group, columns);
        else
          sum(output[t], x, group, call.mode == MergeMode::kMean ? static_cast<float>(group.count) : 1.f, columns);
      }
    });
  }

 private:
  static EFFATTN_INLINE void sum(
      const WrittenRow<T, kStream>& to, const Rows<T>& x, const Group& group, float divisor, int64_t columns) {
    over_columns(columns, [&](auto at) __attribute__((always_inline)) {
      Vec total[at.kVectors] = {};
      for (int64_t i = 0; i < group.count; ++i) {
        const Row<T> row = x[group.members[i]];
        EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) total[v] += row.load(at, v);
      }
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to.store(at, v, total[v] / broadcast(divisor));
    });
  }

  static EFFATTN_INLINE void maximum(
      const WrittenRow<T, kStream>& to, const Rows<T>& x, const Group& group, int64_t columns) {
    over_columns(columns, [&](auto at) __attribute__((always_inline)) {
      Vec best[at.kVectors];
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) best[v] = x[group.members[0]].load(at, v);
      for (int64_t i = 1; i < group.count; ++i) {
        const Row<T> row = x[group.members[i]];
        EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) best[v] = larger_or_nan(best[v], row.load(at, v));
      }
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to.store(at, v, best[v]);
    });
  }
};

template <class T, bool kStream>
struct MergeGradient {
  static void run(const TokenMergeBackward& call, const Runtime& runtime) {
    const int64_t columns = call.grad_x.size[3];
    over_outputs(runtime, call.groups, columns, [&](int64_t batch, int64_t first, int64_t last) {
      const Rows<T> upstream(call.grad_output, batch);
      const WrittenRows<T, kStream> grad_x(call.grad_x, batch);
      for (int64_t t = first; t < last; ++t) {
        const Group group = group_at(call.groups, batch, t), ahead = group_ahead(call.groups, batch, t, last);
        if (call.mode == MergeMode::kMax && ahead.count > 1)
          for (int64_t i = 0; i < ahead.count; ++i)
            merging::fetch_row(Rows<T>(call.x, batch)[ahead.members[i]], columns);
        if (call.mode == MergeMode::kMax && group.count > 1) {
          share(grad_x, upstream[t], {call.x, batch}, Rows<T>(call.output, batch)[t], group, columns);
        } else if (call.mode == MergeMode::kMean && group.count > 1) {
          for (int64_t i = 0; i < group.count; ++i)
            merging::scale_row(grad_x[group.members[i]], upstream[t], 1.f / static_cast<float>(group.count), columns);
        } else {
          for (int64_t i = 0; i < group.count; ++i) merging::copy_row(grad_x[group.members[i]], upstream[t], columns);
        }
      }
    });
  }

 private:
  // Where the maximum is NaN no member attains it, and its gradient is NaN.
  static EFFATTN_INLINE void share(const WrittenRows<T, kStream>& to, const Row<T>& upstream, const Rows<T>& x,
      const Row<T>& largest, const Group& group, int64_t columns) {
    over_columns(columns, [&](auto at) __attribute__((always_inline)) {
      Vec best[at.kVectors], part[at.kVectors], others[at.kVectors];
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) best[v] = largest.load(at, v), part[v] = Vec{};
      for (int64_t i = 0; i < group.count; ++i) {
        const Row<T> row = x[group.members[i]];
        EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) part[v] +=
            row.load(at, v) == best[v] ? broadcast(1.f) : Vec{};
      }
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) {
        part[v] = upstream.load(at, v) / part[v];
        others[v] = best[v] == best[v] ? Vec{} : best[v];
      }
      for (int64_t i = 0; i < group.count; ++i) {
        const Row<T> row = x[group.members[i]];
        EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to[group.members[i]].store(
            at, v, row.load(at, v) == best[v] ? part[v] : others[v]);
      }
    });
  }
};

EFFATTN_INLINE float total_size(const float* sizes, const Group& group) {
  if (!sizes) return static_cast<float>(group.count);
  float total = 0.f;
  for (int64_t i = 0; i < group.count; ++i) total += sizes[group.members[i]];
  return total;
}

// x or x + residual.
template <class T>
class Sums {
 public:
  Sums(const Tensor& x, const Tensor& residual, int64_t batch)
      : x_(x, batch), residual_(residual, batch), has_residual_(residual.data != nullptr) {}
  bool has_residual() const { return has_residual_; }
  EFFATTN_INLINE Row<T> x(int64_t row) const { return x_[row]; }

  EFFATTN_INLINE void fetch(int64_t row, int64_t columns) const {
    merging::fetch_row(x_[row], columns);
    if (has_residual_) merging::fetch_row(residual_[row], columns);
  }

  // to[v] for the whole step.
  template <class Columns>
  EFFATTN_INLINE void load(Vec (&to)[Columns::kVectors], int64_t row, Columns at) const {
    const Row<T> x = x_[row];
    EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to[v] = x.load(at, v);
    if (!has_residual_) return;
    const Row<T> residual = residual_[row];
    EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to[v] += residual.load(at, v);
  }

 private:
  const Rows<T> x_, residual_;
  const bool has_residual_;
};

template <class T, bool kStream>
struct WeightedMerge {
  static void run(const WeightedMergeForward& call, const Runtime& runtime) {
    const int64_t columns = call.output.size[3];
    over_outputs(runtime, call.groups, columns, [&](int64_t batch, int64_t first, int64_t last) {
      const Sums<T> tokens(call.x, call.residual, batch);
      const WrittenRows<T, kStream> output(call.output, batch);
      const float* const sizes = call.sizes ? call.sizes + batch * call.groups.tokens : nullptr;
      float* const merged_sizes = call.merged_sizes + batch * call.groups.outputs;
      for (int64_t t = first; t < last; ++t) {
        const Group group = group_at(call.groups, batch, t), ahead = group_ahead(call.groups, batch, t, last);
        for (int64_t i = 0; i < ahead.count; ++i) tokens.fetch(ahead.members[i], columns);
        const float total = total_size(sizes, group);
        merged_sizes[t] = total;
        if (total == 0.f)
          merging::zero_row(output[t], columns);
        else if (group.count == 1 && total - total == 0.f)
          single(output[t], tokens, group.members[0], columns);
        else
          average(output[t], tokens, sizes, group, total, columns);
      }
    });
  }

 private:
  static EFFATTN_INLINE void single(
      const WrittenRow<T, kStream>& to, const Sums<T>& tokens, int64_t member, int64_t columns) {
    if (!tokens.has_residual()) return merging::copy_row(to, tokens.x(member), columns);
    over_columns(columns, [&](auto at) __attribute__((always_inline)) {
      Vec value[at.kVectors];
      tokens.load(value, member, at);
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to.store(at, v, value[v]);
    });
  }

  static EFFATTN_INLINE void average(const WrittenRow<T, kStream>& to, const Sums<T>& tokens, const float* sizes,
      const Group& group, float total, int64_t columns) {
    over_columns(columns, [&](auto at) __attribute__((always_inline)) {
      Vec sum[at.kVectors] = {}, value[at.kVectors];
      for (int64_t i = 0; i < group.count; ++i) {
        const Vec weight = broadcast(sizes ? sizes[group.members[i]] : 1.f);
        tokens.load(value, group.members[i], at);
        EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) sum[v] = fma(weight, value[v], sum[v]);
      }
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to.store(at, v, sum[v] / broadcast(total));
    });
  }
};

template <class T, bool kStream>
struct WeightedMergeGradient {
  static void run(const WeightedMergeBackward& call, const Runtime& runtime) {
    const int64_t columns = call.grad_x.size[3];
    over_outputs(runtime, call.groups, columns, [&](int64_t batch, int64_t first, int64_t last) {
      const Rows<T> upstream(call.grad_output, batch);
      const WrittenRows<T, kStream> grad_x(call.grad_x, batch);
      const int64_t token = batch * call.groups.tokens, output = batch * call.groups.outputs;
      const float* const sizes = call.sizes ? call.sizes + token : nullptr;
      for (int64_t t = first; t < last; ++t) {
        const Group group = group_at(call.groups, batch, t), ahead = group_ahead(call.groups, batch, t, last);
        if (call.grad_sizes && ahead.count > 1)
          for (int64_t i = 0; i < ahead.count; ++i)
            Sums<T>(call.x, call.residual, batch).fetch(ahead.members[i], columns);
        const float total = total_size(sizes, group);
        const float of_total = call.grad_merged_sizes ? call.grad_merged_sizes[output + t] : 0.f;
        // A token alone does not change with its size; where there is nothing to average only the sum of sizes does.
        const bool moves = call.grad_sizes && group.count > 1 && total != 0.f;
        for (int64_t i = 0; i < group.count; ++i) {
          const int64_t member = group.members[i];
          const float factor = total == 0.f ? 0.f : (sizes ? sizes[member] : 1.f) / total;
          if (factor == 1.f)
            merging::copy_row(grad_x[member], upstream[t], columns);
          else if (total == 0.f)
            merging::zero_row(grad_x[member], columns);
          else
            merging::scale_row(grad_x[member], upstream[t], factor, columns);
          if (call.grad_sizes)
            call.grad_sizes[token + member] =
                of_total + (moves ? pull({call.x, call.residual, batch}, member, Rows<T>(call.output, batch)[t],
                                        upstream[t], columns) /
                                        total
                                  : 0.f);
        }
      }
    });
  }

 private:
  // (x_i + r_i - y_t) . dy_t
  static EFFATTN_INLINE float pull(
      const Sums<T>& tokens, int64_t member, const Row<T>& output, const Row<T>& upstream, int64_t columns) {
    Vec dot[merging::kStep] = {};
    over_columns(columns, [&](auto at) __attribute__((always_inline)) {
      Vec value[at.kVectors];
      tokens.load(value, member, at);
      EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) dot[v] =
          fma(value[v] - output.load(at, v), upstream.load(at, v), dot[v]);
    });
    Vec sum = dot[0];
    EFFATTN_UNROLL for (int v = 1; v < merging::kStep; ++v) sum += dot[v];
    return reduce_add(sum);
  }
};

}  // namespace

void token_merge_forward(const TokenMergeForward& call, const Runtime& runtime) {
  merging::dispatch<Merge>(call.output, call, runtime);
}

void token_merge_backward(const TokenMergeBackward& call, const Runtime& runtime) {
  merging::dispatch<MergeGradient>(call.grad_x, call, runtime);
}

void weighted_merge_forward(const WeightedMergeForward& call, const Runtime& runtime) {
  merging::dispatch<WeightedMerge>(call.output, call, runtime);
}

void weighted_merge_backward(const WeightedMergeBackward& call, const Runtime& runtime) {
  merging::dispatch<WeightedMergeGradient>(call.grad_x, call, runtime);
}

}  // namespace effattn::EFFATTN_ISA
