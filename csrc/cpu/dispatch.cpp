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

// Intel's vdpbf16ps does fewer multiply-adds a cycle than two fp32 units do, conversions included (docs/cpu_engine.md).
bool pairs_pay() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

struct Choice {
  int level;
  bool pairs;  // bf16 products are those of kBFloat16Level
};

const Choice& choice() {
  static const Choice chosen = [] {
    const int supported = supported_level();
    const char* wanted = getenv("EFFATTN_CPU_ISA");
    if (wanted)
      for (int level = 0; level <= supported; ++level)
        if (strcmp(wanted, kLevels[level]->isa) == 0) return Choice{level, level == kBFloat16Level};
    return Choice{supported, supported == kBFloat16Level && pairs_pay()};
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels(DType dtype) {
  const auto [level, pairs] = choice();
  return *kLevels[level == kBFloat16Level && !(pairs && dtype == DType::kBFloat16) ? level - 1 : level];
}

const Kernels& kernels() { return *kLevels[choice().level]; }

const char* isa_name() { return kLevels[choice().level]->isa; }

}  // namespace effattn
