// Gradient of the mixture's parameters, in three ordered stages and without an N x N buffer:
//
//   1. per task (head, batch, key chunk), while the tiles pass: table[dy][dx] += dLogit * (q . k), at the very
//      addresses where the mixture is read, so a score vector costs one unaligned read-modify-write; two tables where
//      the engine walks rows in pairs, for the accesses of neighbouring rows overlap
//
//   2. per task: fold the table to |dy|, |dx| in float64 (h w numbers)
//
//   3. per head: add up the tasks in order, then with G_k = ey[dy] ex[dx]
//        dalpha_k = scale sum G_k folded
//        dsigma_k = scale sum alpha_k G_k r2 sigma_k / (sigma_k^2 + eps)^2 folded
//
// Prefix tokens fall outside the table: their rows into a region that nobody reads, their keys into masked lanes.
#pragma once

#include "backward.h"

namespace effattn::EFFATTN_ISA {

struct MixtureSinkArguments {
  const GaussianMixture& mixture;
  double* folded;  // [task][h][w]
};

template <class Policy>
class MixtureSink {
 public:
  static constexpr bool kActive = true;

  MixtureSink(const Policy& policy, const MixtureSinkArguments& arguments)
      : policy_(policy), arguments_(arguments), copy_(round_up(policy.table_floats(), kLanes)) {
    static thread_local Buffer buffer;
    storage_ = buffer.reserve<float>(2 * copy_);
  }

  void begin(int64_t) { memset(storage_, 0, 2 * copy_ * sizeof(float)); }

  template <bool kPlain, int kCopies, class Tile>
  EFFATTN_INLINE void add(const Tile& tile, int r, int64_t v, Vec gradient) {
    const auto& keys = tile.keys[v];
    float* row = storage_ + (tile.row[r] - policy_.storage()) + (kCopies == 2 && r % 2 == 1 ? copy_ : 0);
    if constexpr (!kPlain) gradient = select(first_lanes(tile.grid_keys - v * kLanes), gradient, Vec{});
    if (__builtin_expect(keys.first == keys.second, true)) {
      store(row + keys.first, load(row + keys.first) + gradient);
    } else {
      const Vec before = select(keys.in_first, gradient, Vec{});
      store(row + keys.first, load(row + keys.first) + before);
      store(row + keys.second, load(row + keys.second) + (gradient - before));
    }
  }

  void end(int64_t task) {
    const int64_t h = arguments_.mixture.grid_h, w = arguments_.mixture.grid_w;
    double* folded = arguments_.folded + task * h * w;
    for (int64_t i = 0; i < h * w; ++i) folded[i] = 0.0;
    for (int copy = 0; copy < 2; ++copy) {
      const float* from = storage_ + copy * copy_ + kLanes;
      const int64_t columns = policy_.narrow() ? w : 1;
      for (int64_t x = 0; x < columns; ++x)
        for (int64_t y = 0; y < 2 * h - 1; ++y) {
          double* to = folded + (y < h - 1 ? h - 1 - y : y - (h - 1)) * w;
          if (policy_.narrow()) {
            for (int64_t other = 0; other < w; ++other) to[other < x ? x - other : other - x] += from[other];
            from += w;
          } else {
            for (int64_t dx = 0; dx < 2 * w - 1; ++dx) to[dx < w - 1 ? w - 1 - dx : dx - (w - 1)] += from[dx];
            from += 2 * w - 1;
          }
        }
    }
  }

 private:
  const Policy& policy_;
  const MixtureSinkArguments& arguments_;
  const int64_t copy_;
  float* storage_;
};

// Third stage for heads [begin, end).
struct MixtureReduction {
  const GaussianMixture& mixture;
  const GaussianMixtureGrad& gradient;
  double* folded;
  int64_t heads, tasks_per_head;
  double scale;

  static void run(int64_t begin, int64_t end, void* context) {
    const MixtureReduction& reduction = *static_cast<const MixtureReduction*>(context);
    for (int64_t head = begin; head < end; ++head) reduction.head(head);
  }

  void head(int64_t head) const {
    const int64_t h = mixture.grid_h, w = mixture.grid_w, extent = larger(h, w);
    static thread_local Buffer buffer;
    double* total = buffer.reserve<double>(h * w + extent);
    double* profile = total + h * w;
    for (int64_t i = 0; i < h * w; ++i) total[i] = 0.0;
    for (int64_t task = 0; task < tasks_per_head; ++task) {
      const double* from = folded + (head * tasks_per_head + task) * h * w;
      for (int64_t i = 0; i < h * w; ++i) total[i] += from[i];
    }
    for (int64_t k = 0; k < mixture.num_gaussians; ++k) {
      const double alpha = mixture.alpha[k * heads + head], sigma = mixture.sigma[k * heads + head];
      const double variance = sigma * sigma + mixture.eps;
      for (int64_t d = 0; d < extent; ++d)
        profile[d] = d == 0 ? 1.0 : exp(static_cast<double>(d * d) * (-0.5 / variance));
      double sum = 0.0, moment = 0.0;
      for (int64_t y = 0; y < h; ++y) {
        double row_sum = 0.0, row_moment = 0.0;
        for (int64_t x = 0; x < w; ++x) {
          const double term = profile[x] * total[y * w + x];
          row_sum += term;
          row_moment += term * static_cast<double>(x * x + y * y);
        }
        sum += profile[y] * row_sum;
        moment += profile[y] * row_moment;
      }
      gradient.alpha[k * heads + head] = static_cast<float>(scale * sum);
      // At sigma = eps = 0 every G_k off the diagonal is 0 and so is its derivative; the formula would say 0 / 0.
      gradient.sigma[k * heads + head] =
          static_cast<float>(moment == 0.0 ? 0.0 : scale * alpha * moment * sigma / (variance * variance));
    }
  }
};

}  // namespace effattn::EFFATTN_ISA
