// What LePE, the depthwise 3 x 3 convolution of V inside a window, adds to the gradients of window attention:
//
//   dV[p] += sum_t w[t] dO[p - t]        dw[t] = sum_p dO[p - t] V[p]        db = sum_p dO[p]        p - t in the window
//   delta_i = dO_i . (O - LePE(V))_i
//
// dV and dw in the sums of a warp's 16 rows and 8 columns, where dV lies: each neighbour of dO is read once for both.
// The 20 products of a pair of columns are added up over the rows by an exchange of halves, so that of 8 lanes each ends
// with 3 of 24 sums after 21 shuffles instead of 60. A block writes its sums, add_lepe_sums adds those of a head in order.
#pragma once

#include "cross_shaped_window.h"
#include "window_tile.h"

namespace effattn::cuda {

inline constexpr int kTaps = 9, kLepeSums = kTaps + 1, kLepeShare = 3;

// Taps t of LePE (bits) for which slot - t is in the window.
EFFATTN_DEVICE uint32_t taps_behind(const WindowHalf& half, Slot slot) {
  uint32_t taps = 0;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
    taps |= static_cast<uint32_t>(neighbour(half, slot, tap, -1).y >= 0) << tap;
  return taps;
}

// The taps of a head, (9, columns) in shared memory, zeros past the last column.
template <int D>
EFFATTN_DEVICE void load_taps(SharedArray<float> taps, const float* weight, int head, int columns) {
  for (int i = thread_index(); i < kTaps * D; i += block_threads())
    taps[i] = i % D < columns ? weight[(head * int64_t{kTaps} + i / D) * columns + i % D] : 0.0f;
}

// Adds up over the 8 lanes g of a column pair. Lane g then has sums first_sum().. in the first kLepeShare places.
EFFATTN_DEVICE void add_over_rows(float (&sum)[8 * kLepeShare]) {
#pragma unroll
  for (int mask = 16, half = 4 * kLepeShare; mask >= 4; mask /= 2, half /= 2) {
    const bool upper = lane_index() & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? sum[i + half] : sum[i], sent = upper ? sum[i] : sum[i + half];
      sum[i] = kept + shuffle_xor(sent, mask);
    }
  }
}
EFFATTN_DEVICE int first_sum() {
  const int lane = lane_index();
  return ((lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0)) * kLepeShare;
}

// A lane's part of the sums of dw and db, three for each 8 columns.
template <int D>
struct LepeSums {
  float sum[D / 8][kLepeShare] = {};

  // grad_value, the sums of rows g and g + 8, gets what LePE adds. near[i]: taps_behind; value(i, column): two elements
  // of V in row g + 8 i; behind(i, tap, column): of dO a tap before it.
  template <class Value, class Behind>
  EFFATTN_DEVICE void convolve(float (&grad_value)[D / 8][4], const WindowHalf& half, const uint32_t (&near)[2],
      SharedArray<float> taps, Value value, Behind behind) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int column = n * 8 + lane_index() % 4 * 2;
      const Vec<float, 2> own[2] = {value(0, column), value(1, column)};
      float part[8 * kLepeShare] = {};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        if ((tap / 3 != 1 && half.height == 1) || (tap % 3 != 1 && half.width == 1)) continue;
        const Vec<float, 2> weight = taps.load<2>(tap * D + column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!(near[i] >> tap & 1)) continue;
          const Vec<float, 2> x = behind(i, tap, column);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            grad_value[n][2 * i + c] = fmaf(weight[c], x[c], grad_value[n][2 * i + c]);
            part[2 * tap + c] = fmaf(own[i][c], x[c], part[2 * tap + c]);
            if (tap == kTaps / 2) part[2 * kTaps + c] += x[c];
          }
        }
      }
      add_over_rows(part);
#pragma unroll
      for (int i = 0; i < kLepeShare; ++i) sum[n][i] += part[i];
    }
  }

  // The sums of a block, (10, columns), in the order of its warps. scratch: warps x 10 x D; a barrier has come before.
  EFFATTN_DEVICE void write(SharedArray<float> scratch, float* to, int columns) const {
    const auto mine = scratch.from(warp_index() * kLepeSums * D);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < kLepeShare; ++i) {
        const int at = first_sum() + i;
        if (at < 2 * kLepeSums) mine[at / 2 * D + n * 8 + lane_index() % 4 * 2 + at % 2] = sum[n][i];
      }
    sync_block();
    for (int i = thread_index(); i < kLepeSums * D; i += block_threads()) {
      if (i % D >= columns) continue;
      float total = 0;
      for (int warp = 0; warp < block_threads() / kWarp; ++warp) total += scratch[warp * kLepeSums * D + i];
      to[i / D * columns + i % D] = total;
    }
  }
};

}  // namespace effattn::cuda
