// All that the CUDA kernels ask of the machine: launches, shared memory, barriers, warp collectives, asynchronous
// copies, matrix instructions. No other file holds inline PTX, `__shared__` or `__syncthreads`.
//
// The same kernels also compile with g++ against tests/cuda_emulator, which defines EFFATTN_CUDA_EMULATED and brings a
// host twin of every primitive: it checks shared memory element by element and finds missing and divergent barriers.
//
// Rules for a kernel. Blocks are one-dimensional and whole warps (a multiple of 32 threads). Every collective (a name
// with block, warp, shuffle, mma, ldmatrix) is reached by all threads of the block or warp, from the same line.
// All shared memory is dynamic and carved out by SharedMemory. Nothing but sync_warp and sync_block orders accesses to
// it, also within a warp.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#define EFFATTN_DEVICE __device__ __forceinline__

namespace effattn::cuda {

inline constexpr int kWarp = 32;

// ---- Elements

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// N elements that move as one, N * sizeof(T) <= 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T value[N];
  EFFATTN_DEVICE T& operator[](int i) { return value[i]; }
  EFFATTN_DEVICE const T& operator[](int i) const { return value[i]; }
};

// ---- Shared memory sizes, for the host

inline constexpr size_t kSharedAlignment = 16;

// Bytes that SharedMemory::array<T>(count) takes; a launch asks for the sum.
template <class T>
__host__ __device__ constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
}

}  // namespace effattn::cuda

#ifdef EFFATTN_CUDA_EMULATED
#include "device_twins.h"
#else

#include <stdexcept>
#include <string>

namespace effattn::cuda {

// ---- Launch

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Runs the kernel, and throws where CUDA reports an error. A grid of no blocks does nothing.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024)  // more than this must be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = shared;
  configuration.stream = stream;
  check(cudaLaunchKernelEx(&configuration, kernel, arguments...));
}

// Bytes of shared memory that a block may ask for on the current device.
inline size_t shared_memory_limit() {
  int device, bytes;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
}

// ---- Shared memory

// A pointer into shared memory. Elements: a[i], a[i] = x. Several at once, aligned to their size: a.load<4>(i),
// a.store(i, vec). In the emulator a[i] is a proxy: write `const float x = a[i]`, not `auto x = a[i]`.
template <class T>
class SharedArray {
 public:
  EFFATTN_DEVICE SharedArray() : data_(nullptr) {}
  EFFATTN_DEVICE explicit SharedArray(T* data) : data_(data) {}

  EFFATTN_DEVICE T& operator[](int i) const { return data_[i]; }

  template <int N>
  EFFATTN_DEVICE Vec<T, N> load(int i) const {
    return *reinterpret_cast<const Vec<T, N>*>(data_ + i);
  }
  template <int N>
  EFFATTN_DEVICE void store(int i, const Vec<T, N>& vec) const {
    *reinterpret_cast<Vec<T, N>*>(data_ + i) = vec;
  }

  // The rest of the array from element i on, and the same bytes as another type.
  EFFATTN_DEVICE SharedArray from(int i) const { return SharedArray(data_ + i); }
  template <class U>
  EFFATTN_DEVICE SharedArray<U> as() const {
    return SharedArray<U>(reinterpret_cast<U*>(data_));
  }

  // The address as the `shared` state space knows it, for the instructions below.
  EFFATTN_DEVICE uint32_t address(int i) const { return static_cast<uint32_t>(__cvta_generic_to_shared(data_ + i)); }

 private:
  T* data_;
};

// Cuts the block's dynamic shared memory into arrays, in the same order in every thread:
//   SharedMemory shared;
//   auto tile = shared.array<float>(64 * 65);
class SharedMemory {
 public:
  EFFATTN_DEVICE SharedMemory() : offset_(0) {}

  template <class T>
  EFFATTN_DEVICE SharedArray<T> array(int count) {
    extern __shared__ __align__(16) unsigned char effattn_shared_memory[];
    T* data = reinterpret_cast<T*>(effattn_shared_memory + offset_);
    offset_ += shared_bytes<T>(count);
    return SharedArray<T>(data);
  }

 private:
  size_t offset_;
};

// ---- Threads and barriers

EFFATTN_DEVICE void sync_block() { __syncthreads(); }
EFFATTN_DEVICE void sync_warp() { __syncwarp(); }

// ---- Warp collectives: T is 4 or 8 bytes wide

inline constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
EFFATTN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
EFFATTN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
// Lanes without a partner keep their value.
template <class T>
EFFATTN_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(kAllLanes, value, delta);
}
template <class T>
EFFATTN_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
EFFATTN_DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
EFFATTN_DEVICE bool warp_any(bool predicate) { return __any_sync(kAllLanes, predicate); }
EFFATTN_DEVICE bool warp_all(bool predicate) { return __all_sync(kAllLanes, predicate); }

// ---- Arithmetic

EFFATTN_DEVICE int popcount(uint32_t word) { return __popc(word); }

// The place of the lowest bit of a word that is not 0.
EFFATTN_DEVICE int lowest_bit(uint64_t word) { return __ffsll(static_cast<long long>(word)) - 1; }

// The nearest integer, of two the even one.
EFFATTN_DEVICE int64_t round_to_integer(double value) { return __double2ll_rn(value); }

// a / b rounded to nearest, whatever the compiler was told about division.
EFFATTN_DEVICE float divide_rn(float a, float b) { return __fdiv_rn(a, b); }

// 2^x and log2 x to about two units in the last place; 2^-inf is 0.
EFFATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EFFATTN_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sum + the dot product of four signed bytes.
EFFATTN_DEVICE int dp4a(uint32_t a, uint32_t b, int sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

// Four of the eight bytes of high:low, byte i of the result being the one that nibble i of `selector` names, 0 to 7.
EFFATTN_DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// The same value, of which the compiler knows nothing: what follows from it is computed again, not kept in registers.
EFFATTN_DEVICE int opaque(int value) {
  int result;
  asm volatile("mov.b32 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

EFFATTN_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
EFFATTN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

EFFATTN_DEVICE float to_float(float value) { return value; }
EFFATTN_DEVICE float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
EFFATTN_DEVICE float to_float(float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Round to nearest even.
template <class T>
EFFATTN_DEVICE T from_float(float value);
template <>
EFFATTN_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
EFFATTN_DEVICE bfloat16 from_float<bfloat16>(float value) {
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
EFFATTN_DEVICE float16 from_float<float16>(float value) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two elements in one register, `low` in the low half: the operand format of the matrix instructions.
template <class T>
EFFATTN_DEVICE uint32_t pack2(float low, float high);
template <>
EFFATTN_DEVICE uint32_t pack2<bfloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
EFFATTN_DEVICE uint32_t pack2<float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// ---- Global memory

// N elements at an address that is a multiple of their size.
template <int N, class T>
EFFATTN_DEVICE Vec<T, N> load_global(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <int N, class T>
EFFATTN_DEVICE void store_global(T* to, const Vec<T, N>& vec) {
  *reinterpret_cast<Vec<T, N>*>(to) = vec;
}

// ---- Asynchronous copies

// Starts a copy of 16 aligned bytes to to[index...]; zeros where not valid, and then `from` is not read. The bytes are
// there for this thread after cp_async_wait, for the others after a barrier that follows it.
template <class T>
EFFATTN_DEVICE void cp_async16(SharedArray<T> to, int index, const T* from, bool valid = true) {
  const int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(index)), "l"(from), "r"(size)
      : "memory");
}
// Closes the group of all copies since the last commit.
EFFATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the Pending youngest groups of this thread are under way.
template <int Pending>
EFFATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- Matrix instructions
// Fragments, with g = lane / 4 and t = lane % 4, elements of a register from the low end up:
//   ldmatrix   8 x 8 matrices of 2-byte elements; lane 8 m + r brings the address of row r of matrix m. Register m gets
//              (g, 2t), (g, 2t + 1); transposed: (2t, g), (2t + 1, g).
//   m16n8k16   a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..): two elements each, A is
//              16 x 16;  b[0] (k = 2t.., n = g)  b[1] (k = 2t + 8.., n = g), B is 16 x 8;
//              d[0] (g, 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1), D is 16 x 8.
//   m16n8k8    the same without the upper half of the depth: a[0], a[1] and b[0].
//   m16n8k32   of bytes: the same registers with four elements each, 4t.. and 4t + 16.. in place of 2t.. and 2t + 8..

template <class T>
EFFATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedArray<T> tile, int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(tile.address(row))
      : "memory");
}
template <class T>
EFFATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedArray<T> tile, int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(tile.address(row))
      : "memory");
}
template <class T>
EFFATTN_DEVICE void ldmatrix_x2(uint32_t (&r)[2], SharedArray<T> tile, int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
      : "=r"(r[0]), "=r"(r[1])
      : "r"(tile.address(row))
      : "memory");
}
template <class T>
EFFATTN_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], SharedArray<T> tile, int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
      : "=r"(r[0]), "=r"(r[1])
      : "r"(tile.address(row))
      : "memory");
}

// d += a b, products of T accumulated in fp32.
template <class T>
EFFATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
EFFATTN_DEVICE void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
EFFATTN_DEVICE void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
EFFATTN_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
template <>
EFFATTN_DEVICE void mma_m16n8k8<bfloat16>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
template <>
EFFATTN_DEVICE void mma_m16n8k8<float16>(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// d += a b, signed bytes accumulated in int32.
EFFATTN_DEVICE void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace effattn::cuda

#endif  // EFFATTN_CUDA_EMULATED

namespace effattn::cuda {

// ---- Reductions, the same on both sides

EFFATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
EFFATTN_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
EFFATTN_DEVICE int lane_index() { return thread_index() % kWarp; }
EFFATTN_DEVICE int warp_index() { return thread_index() / kWarp; }

struct Sum {
  template <class T>
  EFFATTN_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  EFFATTN_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// In every lane the reduction over its group of Lanes neighbours, in an order that depends on nothing.
template <int Lanes = kWarp, class T, class Operation>
EFFATTN_DEVICE T warp_reduce(T value, Operation operation) {
  static_assert(Lanes <= kWarp && (Lanes & (Lanes - 1)) == 0);
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value = operation(value, shuffle_xor(value, mask));
  return value;
}

// In every thread the reduction over the block. `scratch` has an element per warp and can be used again after the call.
template <class T, class Operation>
EFFATTN_DEVICE T block_reduce(T value, Operation operation, SharedArray<T> scratch) {
  value = warp_reduce(value, operation);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  T result = scratch[0];
  for (int warp = 1; warp < block_threads() / kWarp; ++warp) {
    const T next = scratch[warp];
    result = operation(result, next);
  }
  sync_block();
  return result;
}

}  // namespace effattn::cuda
