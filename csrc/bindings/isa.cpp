#include <string>

#include "tensors.h"

namespace {

std::string cpu_isa() { return effattn::isa_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(effattn, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(effattn, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
