#include <stdexcept>

#include "api.h"

namespace effattn::EFFATTN_ISA {

void toeplitz_fft_forward(const Toeplitz&, const ToeplitzResult&, bool, const Runtime&) {
  throw std::runtime_error("toeplitz_fft_forward is not written yet");
}

void toeplitz_fft_backward(const Toeplitz&, const ToeplitzGrad&, bool, const Runtime&) {
  throw std::runtime_error("toeplitz_fft_backward is not written yet");
}

}  // namespace effattn::EFFATTN_ISA
