// Attention inside the windows of a token grid (CSWin stripes, Swin, HAT) as a policy of the tile engine.
//
//   S = scale * Q K^T + bias[key - query] - 100 [region of query != region of key]
//   O = softmax(S) V + LePE(V),   or (softmax(S) * weights[key - query]) V
//   LePE(V)[p][d] = lepe_bias[d] + sum_t lepe_weight[t][d] V[p + t][d],   t: 3 x 3 neighbours inside the window
//
// A window is an index set (windows.h); nothing is partitioned. Everything is in log2 units.
//
//   tables    bias and weights, expanded (window_table.h): a score costs one load, one multiply-add
//
//   regions   only windows that the roll has mixed: one row of 0 and -100 per region, one load and add more
//
//   LePE      when a row is finished, from V as the engine has packed it: 9 multiply-adds per element of the output
#pragma once

#include "gemm.h"
#include "window_table.h"

namespace effattn::EFFATTN_ISA {

template <bool kBias, bool kWeights>
class WindowPolicy {
  static constexpr int64_t kRegions = 9;
  static constexpr float kApart = -100.f * kLog2E;

 public:
  using Arguments = Windows;
  static constexpr bool kManyProblems = true;
  static constexpr bool kReweighs = kWeights;
  static constexpr bool kAdds = true;

  WindowPolicy(const AttentionForward& attention, const Windows& windows)
      : windows_(windows),
        rows_(windows),
        heads_(attention.query.size[1]),
        head_dim_(attention.query.size[3]),
        factor_(attention.scale * kLog2E),
        pitch_(round_up(rows_.largest().keys, kLanes)),
        places_(rows_.largest().queries),
        bias_(rows_, kLog2E, 0.f),
        weights_(rows_, 1.f, 1.f) {
    static thread_local Buffer floats, neighbours;
    const int64_t bias = kBias ? bias_.floats() : 0, weights = kWeights ? weights_.floats() : 0;
    const int64_t lepe_pitch = windows.lepe_weight ? round_up(head_dim_, kLanes) : 0;
    float* memory = floats.reserve<float>(bias + weights + (kRegions + 1) * pitch_ + kTileColumns + 10 * lepe_pitch);
    bias_.place(memory);
    weights_.place(memory + bias);
    apart_ = memory + bias + weights;
    lepe_ = apart_ + (kRegions + 1) * pitch_ + kTileColumns;
    together_ = apart_ + kRegions * pitch_;
    for (int64_t i = 0; i < pitch_; ++i) together_[i] = 0.f;
    if (windows.lepe_weight) neighbours_ = neighbours.reserve<int32_t>(9 * places_);
  }

  static int half(int64_t head, int64_t heads) { return head < heads / 2 ? 0 : 1; }

  static Problems problems(const AttentionForward& attention, const Windows& windows, int64_t head) {
    const WindowTiling tiling(windows, half(head, attention.query.size[1]));
    return {tiling.windows(), tiling.queries(), tiling.keys()};
  }

  int64_t windows(int64_t head) const { return rows_.tiling(half(head, heads_)).windows(); }
  IndexSet largest() const { return rows_.largest(); }
  const WindowRows& window_rows() const { return rows_; }

  IndexSet rows(int64_t head, int64_t window) {
    const int side = half(head, heads_);
    const bool other_window = side != half_ || window != window_;
    if (!other_window && head == head_) return set_;
    set_ = rows_.enter(side, window);
    const bool all_keys = set_.keys == rows_.tiling(side).keys();
    if constexpr (kBias) bias_.enter(windows_.bias + head * rows_.tiling(0).bias_entries(), head, window, set_);
    if constexpr (kWeights)
      weights_.enter(windows_.weights + head * rows_.tiling(0).bias_entries(), head, window, set_);
    if (other_window) separate_regions();
    if (windows_.lepe_weight) {
      if (head != head_) load_lepe(head);
      if (other_window) find_neighbours(side, all_keys);
    }
    half_ = side;
    head_ = head;
    window_ = window;
    return set_;
  }

  int64_t rotation() const { return 0; }
  void enter(int64_t, int64_t) {}
  int64_t key_limit(int64_t) const { return set_.keys; }
  int64_t plain_keys(int64_t) const { return rows_.mixed() ? 0 : set_.keys; }

  void stage(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    if constexpr (kBias) bias_.stage(row, rows, key, keys);
    if constexpr (kWeights) weights_.stage(row, rows, key, keys);
  }

  template <bool kPlain>
  struct Tile {
    const float* bias[kTileRows];
    const float* apart[kTileRows];
    float factor;
    EFFATTN_INLINE Vec transform(Vec score, int r, int v) const {
      Vec logit = kBias ? fma(score, broadcast(factor), load(bias[r] + v * kLanes)) : score * broadcast(factor);
      if constexpr (!kPlain) logit += load(apart[r] + v * kLanes);
      return logit;
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t row, int64_t key) const {
    Tile<kPlain> tile;
    EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = smaller(row + r, set_.queries - 1);
      if constexpr (kBias) tile.bias[r] = bias_.row(at) + key;
      if constexpr (!kPlain)
        tile.apart[r] = (rows_.mixed() ? apart_ + rows_.query_region()[at] * pitch_ : together_) + key;
    }
    tile.factor = factor_;
    return tile;
  }

  EFFATTN_INLINE const float* multipliers(int64_t row) const { return weights_.row(smaller(row, set_.queries - 1)); }

  bool adds() const { return windows_.lepe_weight != nullptr; }

  // V as rows of floats with a row of zeros after the last key.
  template <class Arithmetic>
  void prepare_add(typename Arithmetic::Word* values, int64_t pitch) {
    if (!adds()) return;
    if constexpr (Arithmetic::kPerWord == 1) {
      memset(values + set_.keys * pitch, 0, pitch * sizeof(float));
      values_ = values;
    } else {
      static thread_local Buffer buffer;
      float* to = buffer.reserve<float>((round_up(rows_.largest().keys, 2) + 1) * pitch);
      for (int64_t r = 0; r < set_.keys; r += 2)
        for (int64_t c = 0; c < pitch; c += kLanes)
          Arithmetic::unpack(values + r / 2 * pitch + c, to + r * pitch + c, to + (r + 1) * pitch + c);
      memset(to + set_.keys * pitch, 0, pitch * sizeof(float));
      values_ = to;
    }
  }

  // LePE: with the 9 taps in registers, one vector of channels after the other.
  __attribute__((noinline)) void add(
      int64_t row, int64_t rows, float* output, int64_t pitch, const float* factor) const {
    const int32_t* place = rows_.query_place() + row;
    for (int64_t c = 0; c < pitch; c += kLanes) {
      Vec weight[9];
      EFFATTN_UNROLL for (int t = 0; t < 9; ++t) weight[t] = load(lepe_ + t * pitch + c);
      const Vec bias = load(lepe_ + 9 * pitch + c);
      const float* values = values_ + c;
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* neighbour = neighbours_ + 9 * place[r];
        float* to = output + r * pitch + c;
        Vec sum[3] = {bias, Vec{}, Vec{}};
        EFFATTN_UNROLL for (int t = 0; t < 9; ++t) sum[t / 3] = fma(load(values + neighbour[t]), weight[t], sum[t / 3]);
        store(to, fma(load(to), broadcast(factor[r]), sum[0] + sum[1] + sum[2]));
      }
    }
  }

 private:
  void separate_regions() {
    if (!rows_.mixed()) return;
    const int32_t* region = rows_.key_region();
    for (int32_t own = 0; own < kRegions; ++own) {
      float* to = apart_ + own * pitch_;
      for (int64_t j = 0; j < set_.keys; ++j) to[j] = region[j] == own ? 0.f : kApart;
      for (int64_t j = set_.keys; j < pitch_; ++j) to[j] = 0.f;
    }
  }

  void load_lepe(int64_t head) {
    const int64_t pitch = round_up(head_dim_, kLanes);
    for (int64_t i = 0; i < 10 * pitch; ++i) lepe_[i] = 0.f;
    for (int64_t t = 0; t < 9; ++t)
      memcpy(lepe_ + t * pitch, windows_.lepe_weight + (head * 9 + t) * head_dim_, head_dim_ * sizeof(float));
    if (windows_.lepe_bias) memcpy(lepe_ + 9 * pitch, windows_.lepe_bias + head * head_dim_, head_dim_ * sizeof(float));
  }

  // Where V of the 3 x 3 neighbours of every place begins; the row of zeros where there is none.
  void find_neighbours(int side, bool all_keys) {
    if (all_keys && neighbours_half_ == side) return;
    neighbours_half_ = all_keys ? side : -1;
    const int64_t height = rows_.tiling(side).y.size, width = rows_.tiling(side).x.size;
    const int64_t pitch = round_up(head_dim_, kLanes);
    int32_t* to = neighbours_;
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t i = y + t / 3 - 1, j = x + t % 3 - 1;
          const bool inside = i >= 0 && i < height && j >= 0 && j < width;
          const int32_t key = inside ? rows_.key_at()[i * width + j] : -1;
          *to++ = static_cast<int32_t>((key < 0 ? set_.keys : key) * pitch);
        }
  }

  const Windows& windows_;
  WindowRows rows_;
  const int64_t heads_, head_dim_;
  const float factor_;
  const int64_t pitch_, places_;
  WindowTable bias_, weights_;
  IndexSet set_;
  int half_ = -1, neighbours_half_ = -1;
  int64_t head_ = -1, window_ = -1;
  float* apart_;     // [region][key]
  float* together_;  // [key], zeros
  float* lepe_;      // 9 taps and the bias
  const float* values_ = nullptr;
  int32_t* neighbours_ = nullptr;
};

}  // namespace effattn::EFFATTN_ISA
