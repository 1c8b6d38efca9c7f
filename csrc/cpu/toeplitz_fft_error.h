// Error of the FFT method relative to the largest element, as a multiple of eps A (toeplitz_plan.cpp), measured against
// float64 over 290 biases of 64 to 4096 tokens. In float the usual one, for bounds are only of interest where A is
// small: below A = 5 the output uses at most 0.6 of its budget, from A = 8 on up to 1.4; the largest are 0.9 of the
// output and 6 of a gradient. In double the largest of all.
#pragma once

namespace effattn {

inline constexpr double kFftError = 0.2;
inline constexpr double kDoubleFftError = 2.0;

}  // namespace effattn
