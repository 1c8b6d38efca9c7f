// Stands in for CUDA's header when kernels are compiled with g++. Only what kernels may use beside device.h is here:
// anything else (static __shared__, intrinsics) fails to compile, and belongs in device.h.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }

namespace effattn::cuda {  // newer C libraries have these too, and a kernel finds its own namespace's first
inline double sinpi(double x) { return sin(M_PI * x); }
inline double cospi(double x) { return cos(M_PI * x); }
inline float sinpif(float x) { return static_cast<float>(sinpi(static_cast<double>(x))); }
inline float cospif(float x) { return static_cast<float>(cospi(static_cast<double>(x))); }
}  // namespace effattn::cuda

#include "emulator.h"

#define threadIdx (::effattn::cuda::emulator::current->index)
#define blockIdx (::effattn::cuda::emulator::current->block->index)
#define blockDim (::effattn::cuda::emulator::current->block->size)
#define gridDim (::effattn::cuda::emulator::current->block->grid)
