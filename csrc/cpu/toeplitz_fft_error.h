#pragma once

namespace effattn {

inline constexpr double kFftError = 0.9;
inline constexpr double kDoubleFftError = 0.6;
inline constexpr double kFftGradientError = 6.0;
inline constexpr double kDoubleFftGradientError = 2.0;

}  // namespace effattn
