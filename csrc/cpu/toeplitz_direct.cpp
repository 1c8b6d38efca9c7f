#include <stdexcept>

#include "api.h"

namespace effattn::EFFATTN_ISA {

void toeplitz_direct_forward(const Toeplitz&, const ToeplitzResult&, const Runtime&) {
  throw std::runtime_error("toeplitz_direct_forward is not written yet");
}

void toeplitz_direct_backward(const Toeplitz&, const ToeplitzGrad&, const Runtime&) {
  throw std::runtime_error("toeplitz_direct_backward is not written yet");
}

}  // namespace effattn::EFFATTN_ISA
