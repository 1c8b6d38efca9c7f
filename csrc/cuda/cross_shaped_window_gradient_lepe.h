// What LePE, the depthwise 3 x 3 convolution of V inside a window, adds to the gradients of window attention:
//
//   dV[p] += sum_t w[t] dO[p - t]        dw[t] = sum_p dO[p - t] V[p]        db = sum_p dO[p]        p - t in the
//   window
//
// A warp adds to the sums of its 16 rows of dV, where they lie, and has 10 x D sums of dw and db in shared memory: each
// neighbour of dO is read once for both. The D / 4 products of a lane are added up over the rows by an exchange of
// halves, so that each of 8 lanes ends with an eighth of them: 7 shuffles for 8 sums instead of 24.
#pragma once

#include "cross_shaped_window.h"
#include "window_tile.h"

namespace effattn::cuda {

inline constexpr int kTaps = 9, kLepeSums = kTaps + 1;

template <int D>
constexpr size_t lepe_shared(int warps) {
  return shared_bytes<float>((kTaps + warps * kLepeSums) * D);
}

// Taps t of LePE (bits) for which a slot - t is in the window; none past its last slot.
EFFATTN_DEVICE uint32_t taps_behind(const WindowHalf& half, int index) {
  const Slot slot = slot_of(half, index);
  uint32_t taps = 0;
  if (slot.y >= half.height) return taps;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) taps |= static_cast<uint32_t>(neighbour(half, slot, tap, -1).y >= 0) << tap;
  return taps;
}

template <int kHalf, int kCount>
EFFATTN_DEVICE void exchange_halves(float (&sum)[kCount], int mask) {
  const bool upper = lane_index() & mask;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? sum[i + kHalf] : sum[i], sent = upper ? sum[i] : sum[i + kHalf];
    sum[i] = kept + shuffle_xor(sent, mask);
  }
}

// A block's part of LePE in shared memory: the taps of its head, and the sums of each warp.
template <int D>
class Lepe {
  static constexpr int kSums = (D / 4 + 7) / 8 * 8, kEach = kSums / 8;  // of a lane, before and after the exchange

 public:
  // Taps are zeros past the last column; a barrier must follow.
  EFFATTN_DEVICE Lepe(SharedArray<float> shared, const float* weight, int head, int columns)
      : taps_(shared), sums_(shared.from(kTaps * D)), mine_(sums_.from(warp_index() * kLepeSums * D)) {
    if (weight == nullptr) return;
    for (int i = thread_index(); i < kTaps * D; i += block_threads())
      taps_[i] = i % D < columns ? weight[(head * int64_t{kTaps} + i / D) * columns + i % D] : 0.0f;
#pragma unroll 1
    for (int tap = 0; tap < kLepeSums; ++tap) each_sum(tap, [&](int at, int) { mine_[at] = 0; });
  }

  // grad_value: rows g and g + 8. near[i]: taps_behind. value(i, column): two elements of V in row g + 8 i;
  // behind(i, y, x, column): of dO, (y, x) before it.
  template <int kUnroll, class Value, class Behind>
  EFFATTN_DEVICE void add(float (&grad_value)[D / 8][4], const WindowHalf& half, const uint32_t (&near)[2], Value value,
      Behind behind) const {
#pragma unroll kUnroll
    for (int tap = 0; tap < kLepeSums; ++tap) {
      const bool of_bias = tap == kTaps;
      const int at = of_bias ? kTaps / 2 : tap, y = at / 3 - 1, x = at % 3 - 1;
      if ((y != 0 && half.height == 1) || (x != 0 && half.width == 1)) continue;
      float part[kSums] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!(near[i] >> at & 1)) continue;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const int column = n * 8 + lane_index() % 4 * 2;
          const auto gradient = behind(i, y, x, column);
          const auto own = value(i, column);
          const Vec<float, 2> weight = taps_.template load<2>(at * D + column);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float g = to_float(gradient[c]);
            part[2 * n + c] = of_bias ? part[2 * n + c] + g : fmaf(to_float(own[c]), g, part[2 * n + c]);
            if (!of_bias) grad_value[n][2 * i + c] = fmaf(weight[c], g, grad_value[n][2 * i + c]);
          }
        }
      }
      exchange_halves<kSums / 2>(part, 16);
      exchange_halves<kSums / 4>(part, 8);
      exchange_halves<kSums / 8>(part, 4);
      each_sum(tap, [&](int at, int i) {
        const float before = mine_[at];
        mine_[at] = before + part[i];
      });
    }
  }

  // The sums of a block, (10, columns), in the order of its warps.
  EFFATTN_DEVICE void write(float* to, int columns) const {
    sync_block();
    for (int i = thread_index(); i < kLepeSums * D; i += block_threads()) {
      if (i % D >= columns) continue;
      float total = 0;
      for (int warp = 0; warp < block_threads() / kWarp; ++warp) total += sums_[warp * kLepeSums * D + i];
      to[i / D * columns + i % D] = total;
    }
  }

 private:
  // function(place, i) for the sums that this lane has of a tap.
  template <class Function>
  EFFATTN_DEVICE static void each_sum(int tap, Function function) {
    const int lane = lane_index();
    const int first = ((lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0)) * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int sum = first + i;
      if (sum < D / 4) function(tap * D + sum / 2 * 8 + lane % 4 * 2 + sum % 2, i);
    }
  }

  SharedArray<float> taps_, sums_, mine_;
};

}  // namespace effattn::cuda
