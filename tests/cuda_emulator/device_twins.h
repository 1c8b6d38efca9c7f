// The host twins of csrc/cuda/device.h, by the same names, every one with the line that called it.
#pragma once

#include <bit>
#include <cmath>
#include <tuple>

#include "emulator.h"

namespace effattn::cuda {

using emulator::Where;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t, Arguments... arguments) {
  const std::tuple<Parameters...> values(arguments...);
  emulator::run(grid, block, shared, [&] { std::apply(kernel, values); });
}

inline size_t shared_memory_limit() { return emulator::shared_memory_limit(); }

// An integer that knows the line where it became an index.
struct Index {
  template <class Integer>
    requires std::is_integral_v<Integer>
  Index(Integer value, Where where = Where::current()) : value(value), where(where) {}
  int64_t value;
  Where where;
};

template <class T>
class SharedArray {
 public:
  // What a[i] is: reads as a T, and can be assigned to. It cannot be kept, since it would read later than the kernel.
  class Element {
   public:
    Element(const Element&) = delete;
    operator T() && { return array_.template load<1>(index_.value, index_.where)[0]; }
    void operator=(const T& value) && { array_.template store<1>(index_.value, {value}, index_.where); }
    void operator=(Element&& other) && { std::move(*this) = static_cast<T>(std::move(other)); }
    void operator+=(const T& value) && {
      array_.template store<1>(
          index_.value, {static_cast<T>(array_.template load<1>(index_.value, index_.where)[0] + value)}, index_.where);
    }

   private:
    friend SharedArray;
    Element(const SharedArray& array, Index index) : array_(array), index_(index) {}
    const SharedArray& array_;
    Index index_;
  };

  SharedArray() = default;
  SharedArray(emulator::Span span, int64_t offset) : span_(span), offset_(offset) {}

  Element operator[](Index index) const { return Element(*this, index); }

  template <int N>
  Vec<T, N> load(int64_t i, Where where = Where::current()) const {
    emulator::read(span_, byte(i), sizeof(T) * N, where);
    Vec<T, N> vec;
    memcpy(&vec, emulator::current->block->shared + byte(i), sizeof(vec));
    return vec;
  }
  template <int N>
  void store(int64_t i, const Vec<T, N>& vec, Where where = Where::current()) const {
    emulator::write(span_, byte(i), sizeof(T) * N, where);
    memcpy(emulator::current->block->shared + byte(i), &vec, sizeof(vec));
  }

  SharedArray from(int64_t i) const { return SharedArray(span_, byte(i)); }
  template <class U>
  SharedArray<U> as() const {
    return SharedArray<U>(span_, offset_);
  }

  const emulator::Span& span() const { return span_; }
  int64_t byte(int64_t i) const { return offset_ + i * static_cast<int64_t>(sizeof(T)); }

 private:
  emulator::Span span_;
  int64_t offset_ = 0;
};

class SharedMemory {
 public:
  template <class T>
  SharedArray<T> array(size_t count, Where where = Where::current()) {
    const emulator::Span span = emulator::carve(offset_, count, sizeof(T), where);
    return SharedArray<T>(span, span.begin);
  }

 private:
  size_t offset_ = 0;
};

inline void sync_block(Where where = Where::current()) { emulator::sync_block(where); }
inline void sync_warp(Where where = Where::current()) { emulator::sync_warp(where); }

template <class T>
T shuffle(T value, int lane, Where where = Where::current()) {
  return emulator::exchange(value, "shuffle", where)[lane % kWarp];
}
template <class T>
T shuffle_xor(T value, int mask, Where where = Where::current()) {
  return emulator::exchange(value, "shuffle_xor", where)[static_cast<int>(emulator::current->index.x % kWarp) ^ mask];
}
template <class T>
T shuffle_down(T value, int delta, Where where = Where::current()) {
  const auto lanes = emulator::exchange(value, "shuffle_down", where);
  const int source = static_cast<int>(emulator::current->index.x % kWarp) + delta;
  return source < kWarp ? lanes[source] : value;
}
template <class T>
T shuffle_up(T value, int delta, Where where = Where::current()) {
  const auto lanes = emulator::exchange(value, "shuffle_up", where);
  const int source = static_cast<int>(emulator::current->index.x % kWarp) - delta;
  return source >= 0 ? lanes[source] : value;
}
inline uint32_t warp_ballot(bool predicate, Where where = Where::current()) {
  const auto lanes = emulator::exchange(predicate, "warp_ballot", where);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<uint32_t>(lanes[lane]) << lane;
  return votes;
}
inline bool warp_any(bool predicate, Where where = Where::current()) { return warp_ballot(predicate, where) != 0; }
inline bool warp_all(bool predicate, Where where = Where::current()) { return warp_ballot(predicate, where) == ~0u; }

inline int popcount(uint32_t word) { return std::popcount(word); }
inline int lowest_bit(uint64_t word) { return std::countr_zero(word); }
inline int64_t round_to_integer(double value) { return std::llrint(value); }
inline float divide_rn(float a, float b) { return a / b; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline int dp4a(uint32_t a, uint32_t b, int sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  return sum;
}
inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline int opaque(int value) { return value; }

inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(float16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, sign = (value.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u << 13) return float_of(sign | 0x7f800000 | magnitude);
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));  // the exponents' biases differ by 112
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float value) {
  const uint32_t bits = bits_of(value) & 0x7fffffff, sign = bits_of(value) >> 16 & 0x8000;
  uint32_t half = 0x7c00;
  if (value != value) return {0x7fff};
  if (bits < bits_of(0x1p-14f))  // subnormal: 2^-24 is the last place of 0.5, so that this addition rounds
    half = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  else if (bits < bits_of(65520.0f))
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <int N, class T>
Vec<T, N> load_global(const T* from, Where where = Where::current()) {
  emulator::check_aligned(from, sizeof(T) * N, where);
  Vec<T, N> vec;
  memcpy(&vec, from, sizeof(vec));
  return vec;
}
template <int N, class T>
void store_global(T* to, const Vec<T, N>& vec, Where where = Where::current()) {
  emulator::check_aligned(to, sizeof(T) * N, where);
  memcpy(to, &vec, sizeof(vec));
}

template <class T>
void cp_async16(SharedArray<T> to, int index, const T* from, bool valid = true, Where where = Where::current()) {
  emulator::start_copy(to.span(), to.byte(index), from, valid, where);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int Pending>
void cp_async_wait() {
  emulator::wait_copies(Pending);
}

namespace emulator {

template <int Matrices, bool Transposed, class T>
void ldmatrix(uint32_t (&r)[Matrices], SharedArray<T> tile, int row, const char* name, Where where) {
  const int lane = current->index.x % kWarp, g = lane / 4, t = lane % 4;
  const auto rows = exchange(tile.byte(row), name, where);
  for (int m = 0; m < Matrices; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int line = Transposed ? 2 * t + i : g, column = Transposed ? g : 2 * t + i;
      const int64_t start = rows[8 * m + line];
      if (start % 16) fail(std::string(name) + " at " + at(where) + ": a row that is not 16-byte aligned");
      const int64_t offset = start + 2 * column;
      read(tile.span(), offset, 2, where);
      memcpy(&pair[i], current->block->shared + offset, 2);
    }
    r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// d += a b, the depth in `Parts` of four registers' elements: m16n8k8 has one, the others two.
template <int Parts, class Accumulator, class Product>
void mma(Accumulator (&d)[4], const uint32_t (&a)[2 * Parts], const uint32_t (&b)[Parts], const char* name, Where where,
    Product product) {
  struct Operands {
    uint32_t a[2 * Parts], b[Parts];
  };
  Operands mine;
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  const auto lanes = exchange(mine, name, where);
  const int lane = current->index.x % kWarp, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int n = 2 * t + i % 2, upper = i / 2;  // d[i] is row g + 8 * upper, column n
    Accumulator sum = d[i];
    for (int part = 0; part < Parts; ++part)
      for (int quad = 0; quad < 4; ++quad)
        sum = product(sum, lanes[4 * g + quad].a[2 * part + upper], lanes[4 * n + quad].b[part]);
    d[i] = sum;
  }
}

}  // namespace emulator

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], SharedArray<T> tile, int row, Where where = Where::current()) {
  emulator::ldmatrix<4, false>(r, tile, row, "ldmatrix_x4", where);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], SharedArray<T> tile, int row, Where where = Where::current()) {
  emulator::ldmatrix<4, true>(r, tile, row, "ldmatrix_x4_trans", where);
}
template <class T>
void ldmatrix_x2(uint32_t (&r)[2], SharedArray<T> tile, int row, Where where = Where::current()) {
  emulator::ldmatrix<2, false>(r, tile, row, "ldmatrix_x2", where);
}
template <class T>
void ldmatrix_x2_trans(uint32_t (&r)[2], SharedArray<T> tile, int row, Where where = Where::current()) {
  emulator::ldmatrix<2, true>(r, tile, row, "ldmatrix_x2_trans", where);
}

template <class T>
float multiply_add2(float sum, uint32_t x, uint32_t y) {
  for (int shift = 0; shift < 32; shift += 16)
    sum += to_float(T{static_cast<uint16_t>(x >> shift)}) * to_float(T{static_cast<uint16_t>(y >> shift)});
  return sum;
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  emulator::mma<2>(d, a, b, "mma_m16n8k16", where, multiply_add2<T>);
}
template <class T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], Where where = Where::current()) {
  emulator::mma<1>(d, a, b, "mma_m16n8k8", where, multiply_add2<T>);
}
inline void mma_m16n8k32(
    int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  emulator::mma<2>(d, a, b, "mma_m16n8k32", where, [](int32_t sum, uint32_t x, uint32_t y) { return dp4a(x, y, sum); });
}

}  // namespace effattn::cuda
