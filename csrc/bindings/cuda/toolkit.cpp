#include "tensors.h"

#ifndef EFFATTN_CUDA_EMULATED
#include <cuda_runtime_api.h>

namespace {

int64_t cuda_toolkit() { return CUDART_VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(effattn, m) { m.def("cuda_toolkit() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(effattn, CompositeExplicitAutograd, m) { m.impl("cuda_toolkit", TORCH_BOX(&cuda_toolkit)); }
#endif
