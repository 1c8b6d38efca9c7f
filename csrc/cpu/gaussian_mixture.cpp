// Gaussian-mixture-mask attention: S = scale * (Q K^T) * M, elementwise before the softmax (arXiv 2309.05375), with on
// an h x w grid of tokens
//
//   M[i][j] = sum_k alpha_k exp(-r2(i, j) / (2 (sigma_k^2 + eps))),  r2 = (x_i - x_j)^2 + (y_i - y_j)^2
//
// and 1 where i or j is a prefix token.
//
// Tokens are rotated so that grid tokens come first and key vectors start on the grid. M depends on coordinate
// differences only, so one table per head holds all of it (times scale * log2 e) and a score vector costs one unaligned
// load and one multiply, however many Gaussians there are:
//
//   narrow grids   for every column x_i the (2h-1) x w rows of M[., x - x_i]; keys j, j+1, ... of any length lie
//                  contiguous: address = row_base[i] + j
//
//   wide grids     (2h-1) x (2w-1) by (dy, dx); a key vector spans at most two grid rows (w >= kLanes):
//                  address = row_base[i] + offset(vector), two loads if it straddles
//
// Table bytes: narrow 4 (2h-1) w^2, kept below kNarrowBytes; wide 4 (2h-1)(2w-1) = O(N). Building: (max(h, w)) K
// exponentials and h w K multiply-adds in float64.
#include "forward.h"
#include "gaussian_mixture_gradient.h"

namespace effattn::EFFATTN_ISA {
namespace {

struct GaussianMixtureScratch {
  Buffer table, profile, rows, vectors;
};

GaussianMixtureScratch& gaussian_mixture_scratch() {
  static thread_local GaussianMixtureScratch scratch;
  return scratch;
}

class GaussianMixturePolicy : public WholeSequence {
 public:
  using Arguments = GaussianMixture;

  struct KeyVector {
    int64_t first, second;  // table offsets of the lanes before and after the grid row ends
    Mask in_first;
  };

  static constexpr int64_t kNarrowBytes = 192 << 10;

  GaussianMixturePolicy(const AttentionForward& attention, const GaussianMixture& mixture)
      : WholeSequence(attention),
        mixture_(mixture),
        heads_(attention.query.size[1]),
        tokens_(attention.query.size[2]),
        grid_tokens_(mixture.grid_h * mixture.grid_w),
        factor_(attention.scale * kLog2E) {
    const int64_t h = mixture.grid_h, w = mixture.grid_w;
    GaussianMixtureScratch& scratch = gaussian_mixture_scratch();
    narrow_ = w < kLanes || (w % kLanes != 0 && (2 * h - 1) * w * w * int64_t{sizeof(float)} <= kNarrowBytes);
    const int64_t reach = (narrow_ ? grid_tokens_ : h * (2 * w - 1)) + 2 * kLanes;  // beyond every row base
    const int64_t table = narrow_ ? w * (2 * h - 1) * w : (2 * h - 1) * (2 * w - 1);
    table_floats_ = kLanes + table + kLanes + reach;
    storage_ = scratch.table.reserve<float>(table_floats_);
    table_ = storage_ + kLanes;
    ones_ = table_ + table + kLanes;
    profile_ = scratch.profile.reserve<double>(mixture.num_gaussians * larger(h, w) + h * w);
    row_base_ = scratch.rows.reserve<const float*>(tokens_);
    key_vectors_ = scratch.vectors.reserve<KeyVector>(round_up(tokens_, kTileColumns) / kLanes);
    for (int64_t i = 0; i < kLanes; ++i) storage_[i] = table_[table + i] = 0.f;
    for (int64_t i = 0; i < reach; ++i) ones_[i] = factor_;
    address_rows();
    address_key_vectors();
  }

  int64_t rotation() const { return mixture_.num_prefix_tokens; }
  int64_t key_limit(int64_t) const { return tokens_; }
  int64_t plain_keys(int64_t) const { return grid_tokens_; }
  void stage(int64_t, int64_t, int64_t, int64_t) {}

  void enter(int64_t, int64_t head) {
    if (head == head_) return;
    head_ = head;
    build_profile(head);
    const int64_t h = mixture_.grid_h, w = mixture_.grid_w;
    const double* mixed = profile_ + mixture_.num_gaussians * larger(h, w);
    if (narrow_) {
      for (int64_t x = 0; x < w; ++x)
        for (int64_t y = 0; y < 2 * h - 1; ++y) {
          const double* row = mixed + (y < h - 1 ? h - 1 - y : y - (h - 1)) * w;
          float* to = table_ + (x * (2 * h - 1) + y) * w;
          for (int64_t other = 0; other < x; ++other) to[other] = static_cast<float>(row[x - other]);
          for (int64_t other = x; other < w; ++other) to[other] = static_cast<float>(row[other - x]);
        }
    } else {
      for (int64_t y = 0; y < 2 * h - 1; ++y) {
        const double* row = mixed + (y < h - 1 ? h - 1 - y : y - (h - 1)) * w;
        float* to = table_ + y * (2 * w - 1) + (w - 1);
        for (int64_t x = 0; x < w; ++x) to[x] = to[-x] = static_cast<float>(row[x]);
      }
    }
  }

  // Where the table lies, for its twin that collects the gradient.
  bool narrow() const { return narrow_; }
  const float* storage() const { return storage_; }
  int64_t table_floats() const { return table_floats_; }

  template <bool kPlain>
  struct Tile {
    const float* row[kTileRows];
    const KeyVector* keys;
    int64_t grid_keys;  // from the first key of the tile
    float factor;

    EFFATTN_INLINE Vec transform(Vec score, int r, int v) const {
      Vec mixture = load_select(keys[v].in_first, row[r] + keys[v].first, row[r] + keys[v].second);
      if constexpr (!kPlain) mixture = select(first_lanes(grid_keys - v * kLanes), mixture, broadcast(factor));
      return score * mixture;
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t row, int64_t key) const {
    Tile<kPlain> tile;
    EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) tile.row[r] = row_base_[smaller(row + r, tokens_ - 1)];
    tile.keys = key_vectors_ + key / kLanes;
    tile.grid_keys = grid_tokens_ - key;
    tile.factor = factor_;
    return tile;
  }

 private:
  // profile[k][d] = exp(-d^2 / (2 (sigma_k^2 + eps))), then mixed[dy][dx] = sum_k factor alpha_k profile[k][dy]
  // profile[k][dx].
  void build_profile(int64_t head) {
    const int64_t h = mixture_.grid_h, w = mixture_.grid_w, extent = larger(h, w);
    double* mixed = profile_ + mixture_.num_gaussians * extent;
    for (int64_t i = 0; i < h * w; ++i) mixed[i] = 0.0;
    for (int64_t k = 0; k < mixture_.num_gaussians; ++k) {
      const double alpha = mixture_.alpha[k * heads_ + head], sigma = mixture_.sigma[k * heads_ + head];
      const double rate = -0.5 / (sigma * sigma + mixture_.eps);
      double* profile = profile_ + k * extent;
      for (int64_t d = 0; d < extent; ++d) profile[d] = d == 0 ? 1.0 : exp(static_cast<double>(d * d) * rate);
      for (int64_t y = 0; y < h; ++y) {
        const double amplitude = static_cast<double>(factor_) * alpha * profile[y];
        for (int64_t x = 0; x < w; ++x) mixed[y * w + x] += amplitude * profile[x];
      }
    }
  }

  void address_rows() {
    const int64_t h = mixture_.grid_h, w = mixture_.grid_w;
    int64_t token = 0;
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 0; x < w; ++x, ++token)
        row_base_[token] =
            narrow_ ? table_ + (x * (2 * h - 1) + (h - 1 - y)) * w : table_ + (h - 1 - y) * (2 * w - 1) + (w - 1 - x);
    for (; token < tokens_; ++token) row_base_[token] = ones_;
  }

  void address_key_vectors() {
    const int64_t w = mixture_.grid_w;
    int64_t x = 0, y = 0;
    for (int64_t key = 0; key < round_up(tokens_, kTileColumns); key += kLanes) {
      KeyVector vector = {0, 0, first_lanes(kLanes)};
      if (narrow_) {
        vector.first = vector.second = key < grid_tokens_ ? key : 0;
      } else if (key < grid_tokens_) {
        vector.first = vector.second = y * (2 * w - 1) + x;
        if (x + kLanes > w && y + 1 < mixture_.grid_h) {
          vector.second = (y + 1) * (2 * w - 1) - (w - x);
          vector.in_first = first_lanes(w - x);
        }
        x += kLanes;
        if (x >= w) x -= w, ++y;
      }
      key_vectors_[key / kLanes] = vector;
    }
  }

  const GaussianMixture& mixture_;
  const int64_t heads_, tokens_, grid_tokens_;
  const float factor_;
  int64_t head_ = -1;
  bool narrow_;
  int64_t table_floats_;
  float* storage_;
  float* table_;
  float* ones_;
  double* profile_;
  const float** row_base_;
  KeyVector* key_vectors_;
};

struct GaussianMixtureFamily {
  using Policy = GaussianMixturePolicy;
  using Sink = MixtureSink<GaussianMixturePolicy>;
  using SinkArguments = MixtureSinkArguments;
  static constexpr bool kMultiplies = true;
};

}  // namespace

void gaussian_mixture_forward(
    const AttentionForward& attention, const GaussianMixture& mixture, const Runtime& runtime) {
  forward_any_type<GaussianMixturePolicy>(attention, mixture, runtime);
}

void gaussian_mixture_backward(const AttentionBackward& attention, const GaussianMixture& mixture,
    const GaussianMixtureGrad& gradient, const Runtime& runtime) {
  const int64_t batches = attention.query.size[0], heads = attention.query.size[1];
  const KeyChunks chunks(attention.key.size[2], batches * heads);
  Buffer folded;
  const MixtureSinkArguments sink = {
      mixture, folded.reserve<double>(batches * heads * chunks.chunks * mixture.grid_h * mixture.grid_w)};
  backward_any_type<GaussianMixtureFamily>(attention, mixture, chunks, sink, runtime);
  MixtureReduction reduction = {mixture, gradient, sink.folded, heads, batches * chunks.chunks, attention.scale};
  const double terms = static_cast<double>(heads) * mixture.grid_h * mixture.grid_w *
                       (mixture.num_gaussians * 4 + batches * chunks.chunks);
  run_items(runtime, heads, terms, MixtureReduction::run, &reduction);
}

}  // namespace effattn::EFFATTN_ISA
