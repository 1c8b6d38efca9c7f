#pragma once

namespace effattn {

inline constexpr double kFftError = 1.0;
inline constexpr double kDoubleFftError = 1.0;

}  // namespace effattn
