#include <stdexcept>

#include "api.h"

namespace effattn::EFFATTN_ISA {

void relative_forward(const AttentionForward&, const Relative&, const Runtime&) {
  throw std::runtime_error("relative_forward is not written yet");
}

void relative_backward(const AttentionBackward&, const Relative&, const RelativeGrad&, const Runtime&) {
  throw std::runtime_error("relative_backward is not written yet");
}

}  // namespace effattn::EFFATTN_ISA
