// Chooses the ISA level once, when first asked. Compiled for the oldest processor.
#include <stdlib.h>
#include <string.h>

#include "api.h"

namespace effattn {

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

const Kernels* const kLevels[] = {
    &baseline::table,
#if defined(__x86_64__)
    &avx2::table,
    &avx512::table,
    &avx512_bf16::table,
#endif
};
constexpr int kBFloat16Level = 3;

int supported_level() {
  int level = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c")) {
    level = 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
      level = 2;
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
          __builtin_cpu_supports("avx512vpopcntdq"))
        level = kBFloat16Level;
    }
  }
#endif
  return level;
}

int chosen_level() {
  static const int chosen = [] {
    const int supported = supported_level();
    const char* wanted = getenv("EFFATTN_CPU_ISA");
    if (wanted)
      for (int level = 0; level <= supported; ++level)
        if (strcmp(wanted, kLevels[level]->isa) == 0) return level;
    return supported;
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels(DType dtype) {
  const int level = chosen_level();
  return *kLevels[level == kBFloat16Level && dtype != DType::kBFloat16 ? level - 1 : level];
}

const Kernels& kernels() { return *kLevels[chosen_level()]; }

const char* isa_name() { return kLevels[chosen_level()]->isa; }

}  // namespace effattn
