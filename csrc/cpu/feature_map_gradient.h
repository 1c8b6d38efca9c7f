// Gradient of the feature map; the shift counts as a constant. With g = d phi and G = d l (48 rows x M):
//
//   positive        G_m = phi_m g_m,                                  dx^ = W^T G - x^ sum G
//   trigonometric   G_m = phi_cos,m g_sin,m - phi_sin,m g_cos,m,      dx^ = W^T G + x^ (phi . g)
//   both            dW = sum over batch and rows of G x^T,            dx = (dx^ - x^ (x^ . dx^)) / |x|
//
// Where x^ is normalised, the terms along x^ drop out. The features hold all that the exponentials would give again.
//
// A work item is (head, chunk of the rows of all batches): chunks depend on the sizes only, an item adds its blocks to
// its own dW in double, and a second pass adds the items of a head in order, so every bit is the same on any number of
// threads. FLOPs 4 N M D per head; bytes N (2 D + 2 M) elements and at most max(64, H) M D doubles.
#pragma once

#include "feature_map_rows.h"

namespace effattn::EFFATTN_ISA::features {

class Backward {
  static constexpr int64_t kFewestItems = 64;

 public:
  struct Shared {
    const FeatureMap& map;
    const FeatureMapGrad& gradient;
    const Sizes sizes;
    int64_t chunks;
    double* sums;  // [head][chunk][M][D]
  };

  static int64_t chunks_of(const Sizes& sizes) {
    const int64_t rows = sizes.batches * sizes.tokens,
                  wanted = (kFewestItems + sizes.heads - 1) / larger(sizes.heads, 1);
    return larger(1, smaller(wanted, (rows + kRows - 1) / kRows));
  }

  explicit Backward(const Shared& shared)
      : shared_(shared), sizes_(shared.sizes), rows_(shared.map, sizes_, memory(floats(sizes_))) {
    slopes_ = memory(0) + Rows::floats(sizes_);
    gradient_ = slopes_ + kRows * sizes_.tile_pitch;
    features_ = gradient_ + padded_columns(sizes_);
    grad_rows_ = features_ + padded_columns(sizes_);
    directions_ = grad_rows_ + kRows * sizes_.row_pitch;
    grad_directions_ = directions_ + sizes_.directions * sizes_.row_pitch;
  }

  static void run(int64_t begin, int64_t end, void* context) {
    const Shared& shared = *static_cast<const Shared*>(context);
    Backward pass(shared);
    for (int64_t item = begin; item < end; ++item) pass.chunk(item / shared.chunks, item % shared.chunks);
  }

  static void reduce(int64_t begin, int64_t end, void* context) {
    const Shared& shared = *static_cast<const Shared*>(context);
    const int64_t entries = shared.sizes.directions * shared.sizes.head_dim;
    for (int64_t head = begin; head < end; ++head)
      for (int64_t i = 0; i < entries; ++i) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < shared.chunks; ++chunk)
          sum += shared.sums[(head * shared.chunks + chunk) * entries + i];
        shared.gradient.projection[head * entries + i] = static_cast<float>(sum);
      }
  }

 private:
  static int64_t padded_columns(const Sizes& sizes) { return 2 * sizes.tile_pitch + kLanes; }
  static int64_t floats(const Sizes& sizes) {
    return Rows::floats(sizes) + kRows * (sizes.tile_pitch + sizes.row_pitch) + 2 * padded_columns(sizes) +
           (sizes.directions + round_up(sizes.directions, kRowStep)) * sizes.row_pitch + kLanes;
  }
  static float* memory(int64_t floats) {
    static thread_local Buffer buffer;
    return buffer.reserve<float>(floats);
  }

  void chunk(int64_t head, int64_t chunk) {
    const int64_t tokens = sizes_.tokens, all = sizes_.batches * tokens, chunks = shared_.chunks;
    pack_directions(head);
    double* sum = shared_.sums + (head * chunks + chunk) * sizes_.directions * sizes_.head_dim;
    for (int64_t i = 0; i < sizes_.directions * sizes_.head_dim; ++i) sum[i] = 0.0;
    for (int64_t at = all * chunk / chunks, end = all * (chunk + 1) / chunks; at < end;) {
      const int64_t batch = at / tokens, first = at % tokens;
      const int64_t rows = smaller(kRows, smaller(end - at, tokens - first));
      block(batch, head, first, rows, sum);
      at += rows;
    }
  }

  void pack_directions(int64_t head) {
    if (head == head_) return;
    head_ = head;
    const float* from = shared_.map.projection + head * sizes_.directions * sizes_.head_dim;
    for (int64_t m = 0; m < sizes_.directions; ++m)
      row_to_float(
          directions_ + m * sizes_.row_pitch, from + m * sizes_.head_dim, 1, sizes_.head_dim, sizes_.row_pitch);
  }

  void block(int64_t batch, int64_t head, int64_t first, int64_t rows, double* sum) {
    const int64_t padded = round_up(rows, kRowStep), D = sizes_.head_dim, M = sizes_.directions;
    const Matrix grad_features = matrix_at(shared_.gradient.grad_features, batch, head, first),
                 features = matrix_at(shared_.gradient.features, batch, head, first),
                 to = matrix_at(shared_.gradient.x, batch, head, first);
    float along[kRows];
    rows_.load(batch, head, first, rows);
    for (int64_t r = 0; r < rows; ++r) along[r] = slopes_of(grad_features, features, r);
    memset(slopes_ + rows * sizes_.tile_pitch, 0, (padded - rows) * sizes_.tile_pitch * sizeof(float));

    product(slopes_, 1, sizes_.tile_pitch, rows_.data(), sizes_.row_pitch, rows, grad_directions_, sizes_.row_pitch, M,
        sizes_.row_pitch);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t d = 0; d < D; ++d) sum[m * D + d] += static_cast<double>(grad_directions_[m * sizes_.row_pitch + d]);

    product(slopes_, sizes_.tile_pitch, 1, directions_, sizes_.row_pitch, M, grad_rows_, sizes_.row_pitch, rows,
        sizes_.row_pitch);
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = rows_.row(r);
      float* grad = grad_rows_ + r * sizes_.row_pitch;
      if (shared_.map.normalize) {
        Vec dot = {};
        for (int64_t d = 0; d < sizes_.row_pitch; d += kLanes) dot = fma(load(x + d), load(grad + d), dot);
        along[r] = -reduce_add(dot);
      }
      for (int64_t d = 0; d < sizes_.row_pitch; d += kLanes)
        store(grad + d, fma(load(x + d), broadcast(along[r]), load(grad + d)));
    }
    store_rows_by(
        to, rows, grad_rows_, sizes_.row_pitch,
        [&](int64_t r) __attribute__((always_inline)) { return broadcast(rows_.inverse(r)); }, D);
  }

  // G of a row; returns the derivative by |x^|^2 / 2.
  float slopes_of(const Matrix& grad_features, const Matrix& features, int64_t r) {
    float* to = slopes_ + r * sizes_.tile_pitch;
    if (rows_.is_masked(r)) {
      memset(to, 0, sizes_.tile_pitch * sizeof(float));
      return 0.f;
    }
    const int64_t padded = round_up(sizes_.columns, kLanes), M = sizes_.directions;
    row_to_float(gradient_, grad_features, r, sizes_.columns, padded);
    row_to_float(features_, features, r, sizes_.columns, padded);
    Vec sum = {};
    if (shared_.map.trigonometric) {
      for (int64_t m = 0; m < padded; m += kLanes) sum = fma(load(gradient_ + m), load(features_ + m), sum);
      for (int64_t m = 0; m < M; m += kLanes) {
        const Vec turned = load_partial(features_ + M + m, M - m) * load_partial(gradient_ + m, M - m) -
                           load_partial(features_ + m, M - m) * load_partial(gradient_ + M + m, M - m);
        store(to + m, turned);
      }
      return reduce_add(sum);
    }
    for (int64_t m = 0; m < padded; m += kLanes) {
      const Vec slope = load(gradient_ + m) * load(features_ + m);
      sum += slope;
      store(to + m, slope);
    }
    return -reduce_add(sum);
  }

  const Shared& shared_;
  const Sizes& sizes_;
  Rows rows_;
  int64_t head_ = -1;
  float* slopes_;
  float* gradient_;
  float* features_;
  float* grad_rows_;
  float* directions_;
  float* grad_directions_;
};

inline void backward(const FeatureMap& map, const FeatureMapGrad& gradient, const Runtime& runtime) {
  const Sizes sizes(map);
  const int64_t chunks = Backward::chunks_of(sizes), entries = sizes.directions * sizes.head_dim;
  Buffer sums;
  Backward::Shared shared = {map, gradient, sizes, chunks, sums.reserve<double>(sizes.heads * chunks * entries + 1)};
  const double rows = static_cast<double>(sizes.batches) * sizes.heads * sizes.tokens;
  run_items(runtime, sizes.heads * chunks, rows * entries * 4.0, Backward::run, &shared);
  run_items(runtime, sizes.heads, static_cast<double>(sizes.heads) * chunks * entries, Backward::reduce, &shared);
}

}  // namespace effattn::EFFATTN_ISA::features
