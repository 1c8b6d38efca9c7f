// c = a b for a (16, K), b (K, 8), K a multiple of 16: one warp, two stages of cp.async, ldmatrix, mma. And a reversal
// inside a warp, which sync_warp makes right. With a bug to choose.
#include "call.h"

using namespace effattn::cuda;

enum Bug { kNone, kNoWait, kWaitForTooFew, kNoCommit, kOverwrittenEarly, kWrongFragment, kWrongRow };

template <class T, int kBug>
__global__ void __launch_bounds__(32) product(const T* a, const T* b, float* c, int length) {
  SharedMemory shared;
  auto left = shared.array<T>(2 * 16 * 16);
  auto right = shared.array<T>(2 * 16 * 8);
  const int lane = lane_index();

  const auto fetch = [&](int k) {
    const int stage = k / 16 % 2, row = lane / 2, half = lane % 2 * 8;
    cp_async16(left, stage * 256 + row * 16 + half, a + row * length + k + half);
    if (lane < 16) cp_async16(right, stage * 128 + lane * 8, b + (k + lane) * 8);
    if (kBug != kNoCommit) cp_async_commit();
  };

  float d[4] = {};
  fetch(0);
  for (int k = 0; k < length; k += 16) {
    const bool more = k + 16 < length;
    if (more) fetch(k + 16);
    if (kBug == kWaitForTooFew || (more && kBug != kNoWait))
      cp_async_wait<1>();
    else if (kBug != kNoWait)
      cp_async_wait<0>();
    sync_warp();
    uint32_t x[4], y[2];
    const int stage = k / 16 % 2;
    ldmatrix_x4(x, left, stage * 256 + (lane % 16) * 16 + (kBug == kWrongRow ? lane % 2 : lane / 16) * 8);
    ldmatrix_x2_trans(y, right, stage * 128 + (lane % 16) * 8);
    mma_m16n8k16<T>(d, x, y);
    if (kBug != kOverwrittenEarly) sync_warp();
  }
  for (int i = 0; i < 4; ++i) {
    const int lower = kBug == kWrongFragment ? i % 2 : i / 2, odd = kBug == kWrongFragment ? i / 2 : i % 2;
    c[(lane / 4 + 8 * lower) * 8 + lane % 4 * 2 + odd] = d[i];
  }
}

template <class T, int kBug = kWrongRow>
void launch_product(int bug, const void* a, const void* b, float* c, int length) {
  if (bug == kBug)
    launch(product<T, kBug>, 1, 32, shared_bytes<T>(512) + shared_bytes<T>(256), nullptr, static_cast<const T*>(a),
        static_cast<const T*>(b), c, length);
  else if constexpr (kBug > 0)
    launch_product<T, kBug - 1>(bug, a, b, c, length);
}

EXPORTED const char* effattn_product(int bug, bool half, const void* a, const void* b, float* c, int length) {
  return message_of([=] { (half ? launch_product<float16> : launch_product<bfloat16>)(bug, a, b, c, length); });
}

__global__ void __launch_bounds__(64) reverse_in_warps(const int* x, int* y, bool synchronised) {
  SharedMemory shared;
  auto values = shared.array<int>(64);
  const int thread = thread_index();
  values[thread] = x[thread];
  if (synchronised)
    sync_warp();
  else
    warp_any(true);  // brings the lanes together, but orders nothing
  y[thread] = values[thread ^ 31];
}

EXPORTED const char* effattn_reverse_in_warps(const int* x, int* y, bool synchronised) {
  return message_of([=] { launch(reverse_in_warps, 1, 64, shared_bytes<int>(64), nullptr, x, y, synchronised); });
}
