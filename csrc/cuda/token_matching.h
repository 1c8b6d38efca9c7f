// What the kernels of bipartite matching hand on, see token_matching.cu.
#pragma once

#include "tile.h"

namespace effattn::cuda {

inline constexpr int64_t kSteps = int64_t{1} << 40, kIndices = int64_t{1} << 20;
inline constexpr int kNotANumber = -2, kAbsent = -3, kProtected = -4;  // times kSteps, below every similarity
inline constexpr int kOutside = -5;                                    // no token at all

EFFATTN_DEVICE int64_t key_of(int64_t level, int64_t index) { return level * kIndices + (kIndices - 1 - index); }
EFFATTN_DEVICE int64_t level_of(int64_t key) { return key >> 20; }
EFFATTN_DEVICE int64_t index_of(int64_t key) { return kIndices - 1 - (key & (kIndices - 1)); }

// What the kernels hand on. Tokens stand a first, then b.
struct MatchingScratch {
  float* unit;       // (B, N, pitch), zeros in padding and where the norm is 0 or not finite
  double* inverse;   // (B, N): 1 / |x|, 0 for a token of zeros
  int64_t* keys;     // (B, |a|): of the best b
  int32_t* kinds;    // (B, N): 0, or the level of all similarities of the token in units of kSteps
  int32_t* ranks;    // (B, |a|)
  int32_t* partner;  // (B, |a|): the b that this a merges into, or -1
  int32_t* earlier;  // (B, |a|): rows before this one that merge into the same b
  int32_t* merging;  // (B, |b|): rows that merge into this b, and how many of them stand before it
  int32_t* before;
};

struct MatchingExtent {
  int64_t batch, tokens, firsts, seconds, depth, pitch;
  int64_t num_merged, protected_firsts, protected_seconds;
  int64_t least;  // level that a pair must reach
  int64_t outputs;
  bool keeps_order, distill_token;
  const float* sizes;

  EFFATTN_DEVICE int64_t place(int64_t token) const { return token / 2 + token % 2 * firsts; }
};

struct MatchingPlan {
  int32_t *source, *members, *offsets;
};

// From the keys to the plan: token_matching_plan.cu.
void launch_matching_plan(
    const MatchingExtent& extent, const MatchingScratch& scratch, const MatchingPlan& plan, cudaStream_t stream);

}  // namespace effattn::cuda
