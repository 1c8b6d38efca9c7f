// One warp, one primitive: what each lane brings and what it gets.
#include "call.h"

using namespace effattn::cuda;

// tile: 32 x 8 of 16 bits, row 8 m + r of it row r of matrix m. Lane l gets out[4 l + m].
template <int kMatrices, bool kTransposed>
__global__ void __launch_bounds__(32) ldmatrix(const uint16_t* tile, uint32_t* out) {
  SharedMemory shared;
  auto rows = shared.array<uint16_t>(32 * 8);
  const int lane = lane_index();
  rows.store(lane * 8, load_global<8>(tile + lane * 8));
  sync_warp();
  uint32_t r[kMatrices];
  if constexpr (kMatrices == 4 && kTransposed) ldmatrix_x4_trans(r, rows, lane * 8);
  if constexpr (kMatrices == 4 && !kTransposed) ldmatrix_x4(r, rows, lane * 8);
  if constexpr (kMatrices == 2 && kTransposed) ldmatrix_x2_trans(r, rows, lane * 8);
  if constexpr (kMatrices == 2 && !kTransposed) ldmatrix_x2(r, rows, lane * 8);
  for (int m = 0; m < kMatrices; ++m) out[4 * lane + m] = r[m];
}

EXPORTED const char* effattn_ldmatrix(int matrices, bool transposed, const uint16_t* tile, uint32_t* out) {
  const auto kernel = matrices == 4 ? (transposed ? ldmatrix<4, true> : ldmatrix<4, false>)
                                    : (transposed ? ldmatrix<2, true> : ldmatrix<2, false>);
  return message_of([=] { launch(kernel, 1, 32, shared_bytes<uint16_t>(256), nullptr, tile, out); });
}

// Lane l brings a[4 l..], b[2 l..] and d[4 l..], and gets d[4 l..]; m16n8k8 leaves the upper halves of a and b.
template <class T, class Accumulator, bool kEight = false>
__global__ void __launch_bounds__(32) mma(const uint32_t* a, const uint32_t* b, Accumulator* d) {
  const int lane = lane_index();
  const auto x = load_global<4>(a + 4 * lane);
  const auto y = load_global<2>(b + 2 * lane);
  auto sum = load_global<4>(d + 4 * lane);
  if constexpr (sizeof(T) == 1)
    mma_m16n8k32(sum.value, x.value, y.value);
  else if constexpr (kEight)
    mma_m16n8k8<T>(sum.value, {x[0], x[1]}, {y[0]});
  else
    mma_m16n8k16<T>(sum.value, x.value, y.value);
  store_global(d + 4 * lane, sum);
}

EXPORTED const char* effattn_mma(int type, const uint32_t* a, const uint32_t* b, void* d) {
  return message_of([=] {
    const dim3 one = 1, warp = kWarp;
    if (type == 0) launch(mma<bfloat16, float>, one, warp, 0, nullptr, a, b, static_cast<float*>(d));
    if (type == 1) launch(mma<float16, float>, one, warp, 0, nullptr, a, b, static_cast<float*>(d));
    if (type == 2) launch(mma<int8_t, int32_t>, one, warp, 0, nullptr, a, b, static_cast<int32_t*>(d));
    if (type == 3) launch(mma<bfloat16, float, true>, one, warp, 0, nullptr, a, b, static_cast<float*>(d));
    if (type == 4) launch(mma<float16, float, true>, one, warp, 0, nullptr, a, b, static_cast<float*>(d));
  });
}

// Collectives of one int per lane, in columns of out (32, 7); arithmetic of three words per lane, in out[224..] (32,
// 3).
__global__ void __launch_bounds__(32) collectives(const int* x, uint32_t* out) {
  const int lane = lane_index(), value = x[lane];
  const uint32_t results[7] = {
      static_cast<uint32_t>(shuffle(value, 5)),
      static_cast<uint32_t>(shuffle_xor(value, 9)),
      static_cast<uint32_t>(shuffle_down(value, 3)),
      static_cast<uint32_t>(shuffle_up(value, 4)),
      warp_ballot(value > 0),
      warp_any(lane == 7) + 2u * warp_any(lane > 31) + 4u * warp_all(lane < 32) + 8u * warp_all(lane != 7),
      static_cast<uint32_t>(warp_reduce<8>(value, Sum())),
  };
  for (int i = 0; i < 7; ++i) out[7 * lane + i] = results[i];
  const uint32_t a = x[lane], b = x[31 - lane], c = x[lane / 2];
  const uint32_t arithmetic[3] = {
      static_cast<uint32_t>(popcount(a)),
      static_cast<uint32_t>(dp4a(a, b, static_cast<int>(c))),
      byte_permute(a, b, c & 0x7777),
  };
  for (int i = 0; i < 3; ++i) out[7 * 32 + 3 * lane + i] = arithmetic[i];
}

EXPORTED const char* effattn_collectives(const int* x, uint32_t* out) {
  return message_of([=] { launch(collectives, 1, 32, 0, nullptr, x, out); });
}

// To a 2-byte type and back; two at once where i is even.
template <class T>
__global__ void __launch_bounds__(128) round_trip(const float* x, uint16_t* bits, float* back, int count) {
  for (int i = 2 * (blockIdx.x * block_threads() + thread_index()); i < count; i += 2 * gridDim.x * block_threads()) {
    const uint32_t two = pack2<T>(x[i], x[i + 1]);
    bits[i] = static_cast<uint16_t>(two);
    bits[i + 1] = from_float<T>(x[i + 1]).bits;
    back[i] = to_float(T{bits[i]});
    back[i + 1] = to_float(T{static_cast<uint16_t>(two >> 16)});
  }
}

EXPORTED const char* effattn_round_trip(bool half, const float* x, uint16_t* bits, float* back, int count) {
  return message_of(
      [=] { launch(half ? round_trip<float16> : round_trip<bfloat16>, 2, 128, 0, nullptr, x, bits, back, count); });
}
