#include <stdexcept>

#include "api.h"

namespace effattn::EFFATTN_ISA {

void toeplitz_plan(const ToeplitzPlanning&, ToeplitzPlan&, const Runtime&) {
  throw std::runtime_error("toeplitz_plan is not written yet");
}

}  // namespace effattn::EFFATTN_ISA
