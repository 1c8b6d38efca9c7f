// The gradient of the logits of peaked columns, made to sum to 0 (float32).
//
// sum_n dG_np = sum_n W_np S_np - delta_p vanishes in exact arithmetic. Computed as Y_p . g_p, delta is off by the
// rounding of that product; where one token holds most of a column, S - delta cancels and dG is little more than that
// error. So
//
//   dG_np -= W_np (sum_m dG_mp) / (sum_m W_mp)
//
// which is delta taken from the same S after all. A work item is 64 columns of one example: the logits are read once
// more, and only vectors of columns in which a weight exceeds kPeaked are read and written again.
#pragma once

#include "soft_merge_tiles.h"

namespace effattn::EFFATTN_ISA {

class SoftMergeResidual {
  static constexpr int64_t kBlock = 64;
  static constexpr float kPeaked = -1.4f;  // ln(1/4)

 public:
  explicit SoftMergeResidual(const SoftMergeBackward& arguments)
      : arguments_(arguments), tokens_(arguments.logits.size[2]), outputs_(arguments.logits.size[3]) {}

  static int64_t blocks(const SoftMergeBackward& arguments) {
    return arguments.logits.dtype == DType::kFloat32 ? (arguments.logits.size[3] + kBlock - 1) / kBlock : 0;
  }

  void run(int64_t begin, int64_t end) {
    const int64_t count = blocks(arguments_);
    for (int64_t item = begin; item < end; ++item) block(item / count, item % count * kBlock);
  }

 private:
  void block(int64_t batch, int64_t first) {
    const int64_t columns = smaller(kBlock, outputs_ - first);
    alignas(64) float staged[kBlock], largest[kBlock], logsumexp[kBlock];
    const FloatRows logits(block_at(arguments_.logits, batch, 0, first), columns, staged, kBlock);
    for (int64_t p = 0; p < kBlock; ++p) {
      largest[p] = -INFINITY;
      logsumexp[p] = p < columns ? usable_logsumexp(arguments_.logsumexp[batch * outputs_ + first + p]) : INFINITY;
    }
    for (int64_t n = 0; n < tokens_; ++n) {
      const float* row = logits.row(n);
      for (int64_t p = 0; p < columns; p += kLanes)
        store(largest + p, max(load_columns(row + p, columns - p), load(largest + p)));
    }
    for (int64_t p = 0; p < columns; p += kLanes)
      if (reduce_max(load(largest + p) - load(logsumexp + p)) > kPeaked)
        balance(batch, first + p, smaller(kLanes, columns - p), load(logsumexp + p));
  }

  __attribute__((noinline)) void balance(int64_t batch, int64_t first, int64_t columns, Vec logsumexp) {
    alignas(64) float staged[kLanes], staged_gradient[kLanes], result[kLanes];
    const Matrix matrix = block_at(arguments_.grad_logits, batch, 0, first);
    const FloatRows logits(block_at(arguments_.logits, batch, 0, first), columns, staged, kLanes);
    const FloatRows gradient(matrix, columns, staged_gradient, kLanes);
    const auto weight = [&](int64_t n) __attribute__((always_inline)) {
      return exp2<5>((load_columns(logits.row(n), columns) - logsumexp) * broadcast(kLog2E));
    };
    Vec sum = {}, total = {};
    for (int64_t n = 0; n < tokens_; ++n) {
      sum += load_columns(gradient.row(n), columns);
      total += weight(n);
    }
    const Vec excess = total > Vec{} ? sum / total : Vec{};
    for (int64_t n = 0; n < tokens_; ++n) {
      store(result, fma(Vec{} - excess, weight(n), load_columns(gradient.row(n), columns)));
      store_row(matrix, n, result, broadcast(1.f), columns);
    }
  }

  const SoftMergeBackward& arguments_;
  const int64_t tokens_, outputs_;
};

}  // namespace effattn::EFFATTN_ISA
