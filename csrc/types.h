// What crosses the border between bindings and kernels: plain data, no torch, no code (so no ISA-specific instruction
// can leak through it).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace effattn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kBool, kUInt8, kInt32, kUInt32 };

// Sizes and strides count elements. Any stride may be 0.
struct Tensor {
  void* data;
  int64_t size[4];
  int64_t stride[4];
  DType dtype;
};

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// How a kernel reaches the caller's thread pool. Results never depend on `threads`; it only decides whether a hop to
// the pool pays.
struct Runtime {
  int threads;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
};

}  // namespace effattn
