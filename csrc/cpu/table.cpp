// The kernels of one ISA level.
#include "api.h"
#include "simd.h"

namespace effattn::EFFATTN_ISA {

#define EFFATTN_KERNEL(name, ...) void name(__VA_ARGS__, const Runtime&);
#include "kernels.inc"
#undef EFFATTN_KERNEL

#define EFFATTN_STRING(name) #name
#define EFFATTN_STRING_OF(macro) EFFATTN_STRING(macro)

extern const Kernels table;
const Kernels table = {
    EFFATTN_STRING_OF(EFFATTN_ISA),
#define EFFATTN_KERNEL(name, ...) name,
#include "kernels.inc"
#undef EFFATTN_KERNEL
};

}  // namespace effattn::EFFATTN_ISA
