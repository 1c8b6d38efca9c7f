#include <stdexcept>

#include "api.h"

namespace effattn::EFFATTN_ISA {

void feature_map_forward(const FeatureMap&, const Tensor&, const Runtime&) {
  throw std::runtime_error("feature_map_forward is not written yet");
}

void feature_map_backward(const FeatureMap&, const FeatureMapGrad&, const Runtime&) {
  throw std::runtime_error("feature_map_backward is not written yet");
}

}  // namespace effattn::EFFATTN_ISA
