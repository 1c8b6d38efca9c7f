// Random features of kernelised attention (reference/toeplitz.py): x^ = x / |x| or x, l = W x^,
//
//   positive        phi_m = exp(l_m - |x^|^2 / 2 - s) / sqrt(M)
//   trigonometric   phi = exp(|x^|^2 / 2 - s) [sin l, cos l] / sqrt(M)
//
// with s = 0, the largest exponent of the row, or that of the head among the rows that are not masked.
//
// A work item is 48 rows of one (head, batch): rows as floats (48 x D), their product with W^T (D x M, packed once per
// head and thread) into a tile (48 x M), one pass of exponentials over it; all of it in L1 and L2. The largest exponent
// of a head takes a pass of its own first: float32 leaves its exponents where the features go, other types compute them
// twice, and the trigonometric ones are known from the norms. FLOPs 2 N M D and N M exponentials (or sines and cosines)
// per head; bytes N (D + M) elements.
#include "feature_map_functions.h"
#include "feature_map_gradient.h"
#include "feature_map_rows.h"

namespace effattn::EFFATTN_ISA {
namespace {

using features::kRows;

class FeatureForward {
 public:
  struct Shared {
    const FeatureMap& map;
    const Tensor& features;
    const features::Sizes sizes;
    int64_t blocks;
    float* block_highest;  // [head][batch][block], of shift kHead
    float* head_highest;   // [head][batch]
    bool is_first_pass;
  };

  explicit FeatureForward(const Shared& shared)
      : shared_(shared),
        sizes_(shared.sizes),
        rows_(shared.map, sizes_, memory(features::Rows::floats(sizes_) + tile_floats(sizes_))) {
    tile_ = memory(0) + features::Rows::floats(sizes_);
    waves_ = tile_ + kRows * sizes_.tile_pitch;
    directions_ = waves_ + 2 * sizes_.tile_pitch;
  }

  static void run(int64_t begin, int64_t end, void* context) {
    const Shared& shared = *static_cast<const Shared*>(context);
    FeatureForward pass(shared);
    for (int64_t item = begin; item < end; ++item)
      pass.block(item / shared.blocks / shared.sizes.batches, item / shared.blocks % shared.sizes.batches,
          item % shared.blocks);
  }

  // Whether the first pass leaves the exponents in the features.
  static bool keeps(const Shared& shared) {
    return shared.features.dtype == DType::kFloat32 && !shared.map.trigonometric;
  }

 private:
  static int64_t tile_floats(const features::Sizes& sizes) {
    return (kRows + 2 + sizes.head_dim) * sizes.tile_pitch + kLanes;
  }
  static float* memory(int64_t floats) {
    static thread_local Buffer buffer;
    return buffer.reserve<float>(floats);
  }

  void block(int64_t head, int64_t batch, int64_t block) {
    const FeatureMap& map = shared_.map;
    const int64_t first = block * kRows, rows = smaller(kRows, sizes_.tokens - first);
    const Matrix to = matrix_at(shared_.features, batch, head, first);
    const int64_t entry = head * sizes_.batches + batch;
    if (map.shift == FeatureShift::kHead && !shared_.is_first_pass && keeps(shared_)) {
      for (int64_t r = 0; r < rows; ++r) {
        float* exponents = tile_ + r * sizes_.tile_pitch;
        row_to_float(exponents, to, r, sizes_.directions, sizes_.tile_pitch);
        if (!map.mask || !map.mask[batch * sizes_.tokens + first + r])
          exponentiate(exponents, shared_.head_highest[entry]);
      }
      return store_rows(to, rows, tile_, sizes_.tile_pitch, broadcast(1.f), sizes_.columns);
    }
    rows_.load(batch, head, first, rows);
    if (!(map.trigonometric && shared_.is_first_pass)) {
      pack_directions(head);
      features::product(rows_.data(), sizes_.row_pitch, 1, directions_, sizes_.tile_pitch, sizes_.head_dim, tile_,
          sizes_.tile_pitch, rows, sizes_.tile_pitch);
    }
    if (shared_.is_first_pass) {
      shared_.block_highest[entry * shared_.blocks + block] = highest_of(rows);
      if (keeps(shared_)) store_rows(to, rows, tile_, sizes_.tile_pitch, broadcast(1.f), sizes_.columns);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row = tile_ + r * sizes_.tile_pitch;
      const float highest = map.shift == FeatureShift::kHead ? shared_.head_highest[entry] : 0.f;
      if (map.trigonometric) {
        turn(row, map.shift == FeatureShift::kRow ? 0.f : rows_.half_square(r) - highest, rows_.is_masked(r));
        store_row(to, r, waves_, broadcast(1.f), sizes_.columns);
      } else if (rows_.is_masked(r)) {
        memset(row, 0, sizes_.tile_pitch * sizeof(float));
      } else if (map.shift == FeatureShift::kRow) {
        exponentiate(row, finite(highest_in(row)));  // |x^|^2 / 2 is in the highest as well
      } else {
        subtract(row, rows_.half_square(r));
        exponentiate(row, highest);
      }
    }
    if (!map.trigonometric) store_rows(to, rows, tile_, sizes_.tile_pitch, broadcast(1.f), sizes_.columns);
  }

  void pack_directions(int64_t head) {
    if (head == head_) return;
    head_ = head;
    const float* from = shared_.map.projection + head * sizes_.directions * sizes_.head_dim;
    memset(directions_, 0, sizes_.head_dim * sizes_.tile_pitch * sizeof(float));
    for (int64_t m = 0; m < sizes_.directions; ++m)
      for (int64_t d = 0; d < sizes_.head_dim; ++d)
        directions_[d * sizes_.tile_pitch + m] = from[m * sizes_.head_dim + d];
  }

  static float finite(float highest) { return highest == -INFINITY ? 0.f : highest; }

  float highest_in(const float* row) const {
    Vec best = broadcast(-INFINITY);
    for (int64_t m = 0; m < sizes_.directions; m += kLanes)
      best = max(best, select(first_lanes(sizes_.directions - m), load(row + m), broadcast(-INFINITY)));
    return reduce_max(best);
  }

  // Of the block; turns its products into exponents.
  float highest_of(int64_t rows) {
    float highest = -INFINITY;
    for (int64_t r = 0; r < rows; ++r) {
      float of_row = -INFINITY;
      if (rows_.is_masked(r)) {
        if (!shared_.map.trigonometric) memset(tile_ + r * sizes_.tile_pitch, 0, sizes_.tile_pitch * sizeof(float));
      } else if (shared_.map.trigonometric) {
        of_row = rows_.half_square(r);
      } else {
        subtract(tile_ + r * sizes_.tile_pitch, rows_.half_square(r));
        of_row = highest_in(tile_ + r * sizes_.tile_pitch);
      }
      highest = of_row > highest ? of_row : highest;
    }
    return highest;
  }

  void subtract(float* row, float value) const {
    for (int64_t m = 0; m < sizes_.tile_pitch; m += kLanes) store(row + m, load(row + m) - broadcast(value));
  }

  void exponentiate(float* row, float highest) const {
    for (int64_t m = 0; m < sizes_.tile_pitch; m += kLanes)
      store(row + m, features::exp(load(row + m) - broadcast(highest)) * broadcast(sizes_.factor));
  }

  void turn(const float* angles, float exponent, bool masked) {
    if (masked) {
      memset(waves_, 0, 2 * sizes_.tile_pitch * sizeof(float));
      return;
    }
    const Vec amplitude = features::exp(broadcast(exponent)) * broadcast(sizes_.factor);
    Vec largest = {};
    for (int64_t m = 0; m < sizes_.tile_pitch; m += kLanes)
      largest = max(largest, features::absolute(load(angles + m)));
    const auto each = [&](auto&& wave) __attribute__((always_inline)) {
      // The last sines reach into the cosines, which come after them.
      for (int64_t m = 0; m < sizes_.tile_pitch; m += kLanes)
        store(waves_ + m, wave(load(angles + m)).sine * amplitude);
      for (int64_t m = 0; m < sizes_.tile_pitch; m += kLanes)
        store(waves_ + sizes_.directions + m, wave(load(angles + m)).cosine * amplitude);
    };
    if (reduce_max(largest) > features::kLargestAngle)
      each([](Vec angle) { return features::sine_cosine_of_large(angle); });
    else
      each([](Vec angle) __attribute__((always_inline)) { return features::sine_cosine(angle); });
  }

  const Shared& shared_;
  const features::Sizes& sizes_;
  features::Rows rows_;
  int64_t head_ = -1;
  float* tile_;
  float* waves_;
  float* directions_;
};

}  // namespace

void feature_map_forward(const FeatureMap& map, const Tensor& features, const Runtime& runtime) {
  const features::Sizes sizes(map);
  const int64_t blocks = (sizes.tokens + kRows - 1) / kRows, entries = sizes.heads * sizes.batches;
  static thread_local Buffer maxima;
  float* block_highest = maxima.reserve<float>(entries * (blocks + 1));
  FeatureForward::Shared shared = {
      map, features, sizes, blocks, block_highest, block_highest + entries * blocks, false};
  const double terms = static_cast<double>(entries) * sizes.tokens * sizes.directions;
  const double flops = terms * (2.0 * sizes.head_dim + (map.trigonometric ? 60.0 : 30.0));
  if (map.shift == FeatureShift::kHead) {
    shared.is_first_pass = true;
    run_items(runtime, entries * blocks, flops, FeatureForward::run, &shared);
    for (int64_t entry = 0; entry < entries; ++entry) {
      float highest = -INFINITY;
      for (int64_t block = 0; block < blocks; ++block)
        highest = block_highest[entry * blocks + block] > highest ? block_highest[entry * blocks + block] : highest;
      shared.head_highest[entry] = highest == -INFINITY ? 0.f : highest;
    }
    shared.is_first_pass = false;
  }
  run_items(runtime, entries * blocks, flops, FeatureForward::run, &shared);
}

void feature_map_backward(const FeatureMap& map, const FeatureMapGrad& gradient, const Runtime& runtime) {
  features::backward(map, gradient, runtime);
}

}  // namespace effattn::EFFATTN_ISA
