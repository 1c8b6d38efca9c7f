#include <stdexcept>

#include "api.h"

namespace effattn::EFFATTN_ISA {

void toeplitz_structured_forward(const Toeplitz&, const ToeplitzResult&, const Runtime&) {
  throw std::runtime_error("toeplitz_structured_forward is not written yet");
}

void toeplitz_structured_backward(const Toeplitz&, const ToeplitzGrad&, const Runtime&) {
  throw std::runtime_error("toeplitz_structured_backward is not written yet");
}

}  // namespace effattn::EFFATTN_ISA
