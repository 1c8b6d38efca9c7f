// Relative positions of the tokens of a grid, and a head's Toeplitz weights c = exp(b - max b) over them.
//
// Token i stands at p_i = (i / w)(2 w - 1) + i % w, and the entry of query i and key j is p_j - p_i + center. Positions
// grow with the token, so a causal call reaches the entries up to the centre. Tokens of a row of the grid are
// neighbours on the table too; on a sequence, a grid of one row or one column, all are: p_i = i.
#pragma once

#include "api.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA::toeplitz {

struct Positions {
  int64_t tokens, row, pitch, entries, center;  // tokens in all and of a row of the grid; entries of a row of the table

  Positions(int64_t grid_h, int64_t grid_w)
      : tokens(grid_h * grid_w),
        row(grid_h == 1 || grid_w == 1 ? larger(tokens, 1) : larger(grid_w, 1)),
        pitch(2 * row - 1),
        entries(tokens > 0 ? (2 * grid_h - 1) * (2 * grid_w - 1) : 0),
        center(entries / 2) {}

  bool is_sequence() const { return row >= tokens; }
  int64_t of(int64_t token) const { return token / row * pitch + token % row; }
};

// max b where it is finite, as what is subtracted from b.
inline double highest_entry(const float* bias, int64_t entries) {
  float highest = -INFINITY;
  for (int64_t e = 0; e < entries; ++e) highest = bias[e] > highest ? bias[e] : highest;
  return highest == -INFINITY ? 0.0 : static_cast<double>(highest);
}

// The weights of one head, zero around them, so that whole vectors can be read at every position of a token.
class Weights {
 public:
  static constexpr int64_t kBefore = 16, kAfter = 32;
  static int64_t floats(const Positions& positions) { return kBefore + positions.entries + kAfter; }

  Weights(const Positions& positions, bool is_causal, float* memory)
      : entries_(positions.entries),
        reached_(is_causal ? smaller(positions.center + 1, entries_) : entries_),
        memory_(memory),
        center_(memory + kBefore + positions.center) {}

  void load(const float* bias) {
    const double highest = highest_entry(bias, entries_);
    float* to = memory_ + kBefore;
    memset(memory_, 0, kBefore * sizeof(float));
    for (int64_t e = 0; e < reached_; ++e) to[e] = static_cast<float>(exp(static_cast<double>(bias[e]) - highest));
    memset(to + reached_, 0, (entries_ - reached_ + kAfter) * sizeof(float));
  }

  // Of a key that stands `distance` behind the query.
  EFFATTN_INLINE const float* at(int64_t distance) const { return center_ + distance; }

 private:
  const int64_t entries_, reached_;
  float* memory_;
  const float* center_;
};

// The keys of a block, cut where a row of the grid ends.
class Runs {
 public:
  void cut(const Positions& positions, int64_t key, int64_t keys) {
    row_ = positions.row;
    pitch_ = positions.pitch;
    keys_ = keys;
    position_ = positions.of(key);
    first_ = row_ - key % row_;
  }

  // The weights of the query at `position`, keys side by side; then zeros. Writes up to 2 kLanes past the keys.
  EFFATTN_INLINE void gather(float* to, const Weights& weights, int64_t position) const {
    const float* from = weights.at(position_ - position);
    if (row_ <= kLanes) {
      store(to, load(from));
      from += first_ - row_ + pitch_;
      for (int64_t offset = first_; offset < keys_; offset += row_, from += pitch_) store(to + offset, load(from));
    } else {
      each([&](int64_t offset, int64_t entry, int64_t length) __attribute__((always_inline)) {
        for (int64_t k = 0; k < length; k += kLanes) store(to + offset + k, load(from + entry + k));
      });
    }
    store(to + keys_, Vec{});
  }

  // entries[...] += what belongs to the query at `position`, whose own entry is `center`.
  EFFATTN_INLINE void scatter(float* center, const float* from, int64_t position) const {
    float* first = center + position_ - position;
    each([&](int64_t offset, int64_t entry, int64_t length) __attribute__((always_inline)) {
      float* to = first + entry;
      const float* values = from + offset;
      int64_t k = 0;
      for (; k + kLanes <= length; k += kLanes) store(to + k, load(to + k) + load(values + k));
      const int64_t rest = length - k;
      if (rest > 0) store_partial(to + k, load_partial(to + k, rest) + load_partial(values + k, rest), rest);
    });
  }

 private:
  // body(first key of the run, its entry from that of the block's first key, keys).
  template <class Body>
  EFFATTN_INLINE void each(Body&& body) const {
    body(0, 0, smaller(first_, keys_));
    int64_t entry = first_ - row_ + pitch_;
    for (int64_t offset = first_; offset < keys_; offset += row_, entry += pitch_)
      body(offset, entry, smaller(row_, keys_ - offset));
  }

  int64_t row_ = 1, pitch_ = 1, keys_ = 0, position_ = 0, first_ = 0;
};

// 1 / n, finite; 0 for a row without weight.
EFFATTN_INLINE float inverse_normalizer(float normalizer) {
  constexpr double kLargest = 3.4028234663852886e38;
  if (normalizer == 0.f) return 0.f;
  const double inverse = 1.0 / static_cast<double>(normalizer);
  return static_cast<float>(inverse > kLargest ? kLargest : inverse < -kLargest ? -kLargest : inverse);
}

}  // namespace effattn::EFFATTN_ISA::toeplitz
