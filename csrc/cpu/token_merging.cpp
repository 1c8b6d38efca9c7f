#include "api.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {
void token_merge_forward(const TokenMergeForward&, const Runtime&) {}
void token_merge_backward(const TokenMergeBackward&, const Runtime&) {}
void weighted_merge_forward(const WeightedMergeForward&, const Runtime&) {}
void weighted_merge_backward(const WeightedMergeBackward&, const Runtime&) {}

}  // namespace effattn::EFFATTN_ISA
