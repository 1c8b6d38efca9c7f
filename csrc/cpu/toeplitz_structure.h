// What the planner and the structured method know of a bias: on either side of the diagonal it is a line beyond some
// distance, or not.
//
//   b_tau = offset + slope |tau|  for |tau| >= width       constant: slope 0; vanishing: -inf, nothing far is seen
//
// A line is accepted where it differs from the table by less than what float32 does to b - max b anyway: the weight
// exp(b - max b) changes by a rounding error or two, less where it is small. Lines are fitted in double to ever longer
// ends of a side, O(entries).
#pragma once

#include "api.h"
#include "simd.h"

namespace effattn::EFFATTN_ISA::toeplitz {

inline constexpr int64_t kBlock = 64;  // tokens

struct Tail {
  int64_t width;  // as many as there are tokens: no tail
  double offset, slope;
  bool vanishes;

  // How many blocks beside its own a query meets token by token: those that hold a distance below `width`.
  int64_t near_blocks() const { return (width + 2 * kBlock - 2) / kBlock - 1; }
};

struct Structure {
  double top;          // max b, 0 if all are -inf
  Tail before, after;  // keys before the query, after it
  bool applies;
};

struct Extent {
  double top, range;  // max b, 0 if all are -inf; largest less smallest finite entry
};

inline Extent extent_of(const float* bias, int64_t entries) {
  Vec high = broadcast(-INFINITY), finite = high, low = high;  // low: of -b
  for (int64_t e = 0; e < entries; e += kLanes) {
    const int64_t count = entries - e;
    const Mask live = first_lanes(count);
    const Vec b = load_partial(bias + e, count);
    const Vec size = max(b, -b);
    high = max(select(live, b, broadcast(-INFINITY)), high);
    const IntVec is_finite = (IntVec)(size < broadcast(INFINITY));
    const Vec kept = (Vec)((is_finite & (IntVec)b) | (~is_finite & (IntVec)broadcast(-INFINITY)));
    const Vec negated = (Vec)((is_finite & (IntVec)(-b)) | (~is_finite & (IntVec)broadcast(-INFINITY)));
    finite = max(select(live, kept, broadcast(-INFINITY)), finite);
    low = max(select(live, negated, broadcast(-INFINITY)), low);
  }
  const double top = static_cast<double>(reduce_max(high)), most = static_cast<double>(reduce_max(finite)),
               least = -static_cast<double>(reduce_max(low));
  return {top == -INFINITY ? 0.0 : top, most >= least ? most - least : 0.0};
}

// The line through the entries at the end of a side, u = 0 being the farthest, by least squares in units of what an
// entry may be off.
class EndLine {
 public:
  EndLine(const float* middle, int64_t step, int64_t tokens, double top)
      : far_(middle + step * (tokens - 1)), step_(step), top_(top), last_(static_cast<double>(*far_)) {}

  double level() const { return last_ + level_; }
  double rise() const { return rise_; }

  void fit(int64_t count) {
    for (; count_ < count; ++count_) {
      const double given = at(count_), u = static_cast<double>(count_), y = given - last_, off = allowed(given);
      const double weight = 1.0 / (off * off), wu = weight * u;
      n_ += weight, u_ += wu, uu_ += wu * u, y_ += weight * y, uy_ += wu * y;
    }
    const double spread = n_ * uu_ - u_ * u_;
    rise_ = spread > 0.0 ? (n_ * uy_ - u_ * y_) / spread : 0.0;
    level_ = (y_ - rise_ * u_) / n_;
  }

  // The first of begin ... end - 1 that is not on the line, or `end`.
  int64_t first_off(int64_t begin, int64_t end) const {
    for (int64_t u = begin; u < end; ++u) {
      const double given = at(u), off = last_ + level_ + rise_ * static_cast<double>(u) - given;
      if (!(fabs(off) <= 0x1p-24 * allowed(given))) return u;
    }
    return end;
  }

 private:
  double at(int64_t u) const { return static_cast<double>(far_[-step_ * u]); }
  double allowed(double given) const { return 2.0 + 1.5 * (top_ - given); }  // in float32 roundings of 1

  const float* far_;
  int64_t step_;
  double top_, last_;
  int64_t count_ = 0;
  double n_ = 0.0, u_ = 0.0, uu_ = 0.0, y_ = 0.0, uy_ = 0.0, level_ = 0.0, rise_ = 0.0;
};

// One side of a sequence's table; step +1: keys after the query.
inline Tail find_tail(const float* middle, int64_t step, int64_t tokens, double top) {
  constexpr int64_t kSettled = 32;  // so many entries tell a line from chance
  int64_t nothing = 0;
  while (nothing < tokens && middle[step * (tokens - 1 - nothing)] == -INFINITY) ++nothing;
  if (nothing > 0) return {tokens - nothing, -INFINITY, 0.0, true};
  EndLine line(middle, step, tokens, top), found = line;
  int64_t reached = 0;
  for (int64_t length = smaller(2, tokens);; length = smaller(2 * length, tokens)) {
    line.fit(length);
    const bool fits = line.first_off(0, length) == length;
    if (fits) found = line, reached = length;
    if (length == tokens || (!fits && length > kSettled)) break;
  }
  // What lies nearer tells the line more exactly, so every longer fit may reach farther.
  for (int64_t before = 0; reached > before;) {
    before = reached;
    EndLine longer = found;
    longer.fit(reached);
    const int64_t reaches = longer.first_off(0, tokens);
    if (reaches >= reached) found = longer, reached = reaches;
  }
  if (reached < smaller(3, tokens)) return {tokens, 0.0, 0.0, false};
  return {tokens - reached, found.level() + found.rise() * static_cast<double>(tokens - 1), -found.rise(), false};
}

inline bool is_constant(const float* bias, int64_t entries) {
  for (int64_t e = 0; e < entries; ++e)
    if (!(bias[e] == bias[0])) return false;
  return entries > 0 && fabsf(bias[0]) < INFINITY;
}

// Of one head. A grid has a structure only where its bias is constant: it is a sequence then.
inline Structure structure_of(const float* bias, double top, int64_t grid_h, int64_t grid_w, bool is_causal) {
  const int64_t tokens = grid_h * grid_w, entries = (2 * grid_h - 1) * (2 * grid_w - 1);
  Structure s = {top, {0, -INFINITY, 0.0, true}, {0, -INFINITY, 0.0, true}, true};
  if (grid_h > 1 && grid_w > 1) {
    s.applies = is_constant(bias, entries);
    s.before = s.after = {0, s.top, 0.0, false};
  } else {
    const float* middle = bias + tokens - 1;
    s.before = find_tail(middle, -1, tokens, s.top);
    if (!is_causal) s.after = find_tail(middle, 1, tokens, s.top);
    s.applies = s.before.width < tokens && s.after.width < tokens;
  }
  if (is_causal) s.after = {0, -INFINITY, 0.0, true};
  return s;
}

}  // namespace effattn::EFFATTN_ISA::toeplitz
