// Gradients of windows of at most 64 slots, each in one pass, from q, k, v, dO and the log-sum-exp:
//
//   P = exp(scale Q K^T + bias + mask - lse)      dP = dO V^T      delta_i = sum_j P_ij dP_ij      dS = P (dP - delta)
//   dQ = scale dS K                 dK = scale dS^T Q                 dV = P^T dO + what LePE adds
//
// A warp has 16 queries and all keys of its window, S, P, dP and dS in registers; so the sums over a row are shuffles
// of four lanes, and dQ has its left factor where it lies. P^T and dS^T are sums over queries, which other warps have:
// both matrices go through shared memory once in 16 bits (8 stores and, transposed, 2 ldmatrix of each warp and 16
// queries). The other way, S^T = K Q^T as a product of its own, would be seven products instead of five and every
// exponential twice, and below D = 53 the exponentials cost more than the products; transposed rows alone would need
// delta, so O and LePE(V), from memory. The log-sum-exp is 4 bytes a row, and spares a maximum, a sum and a division.
//
// Shared memory, 64 rows each: q, k, v, dO; P and dS. V's rows belong to one warp once dP is there; they then stage
// what it stores. A block walks `walk` groups of windows of one head, and keeps its sums for LePE in shared memory. dS
// summed over those windows, for the bias table, stays in registers; at the end the diagonals are added up in the place
// of P and dS (_gradient_bias.h). That and the codes of slots are in the instance kRich, for a shift or a bias.
//
// Bytes: 7 N D of 2, 4 N. FLOPs: 10 N K D.
#pragma once

#include "cross_shaped_window_gradient_bias.h"
#include "cross_shaped_window_gradient_lepe.h"

namespace effattn::cuda {

inline constexpr int kTileRows = kSmallWindow, kTileThreads = kTileRows / kWarpRows * kWarp;
inline constexpr int kScorePitch = kTileRows + 8, kKeyBlocks = kTileRows / 8;

template <class T>
struct WindowGradient {
  WindowGeometry geometry;
  WindowGrid grid;
  int walk, groups[2];  // of windows: a block has `walk` of them, where it walks
  TokenTensor<T> query, key, value, grad_output;
  const float *logsumexp, *delta, *bias, *lepe_weight;
  TokenTensor<T> grad_query, grad_key, grad_value;
  float* lepe_sums;  // (blocks, 10, D)
  float* bias_sums;  // (blocks, 2 height - 1, 2 width - 1), null where there is no bias
  int heads;
  bool mask_padding;
  float scale;

  EFFATTN_DEVICE int64_t statistics(int batch, int head) const {
    return (int64_t{batch} * heads + head) * geometry.grid_h * geometry.grid_w;
  }
};

// sums * factor, rounded, to the rows of the tokens of slots g and g + 8; through 16 rows of a tile that the warp owns.
template <class T, int kBlocks>
EFFATTN_DEVICE void store_rows(const TokenRows<T>& to, const float (&sums)[kBlocks][4], float factor,
    SharedArray<T> tile, int pitch, int row, const int (&token)[2]) {
  const int lane = lane_index();
  sync_warp();
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      tile.store((row + lane / 4 + 8 * i) * pitch + n * 8 + lane % 4 * 2,
          Vec<T, 2>{from_float<T>(factor * sums[n][2 * i]), from_float<T>(factor * sums[n][2 * i + 1])});
  sync_warp();
#pragma unroll 1
  for (int first = 0; first < kWarpRows * kBlocks; first += kWarp) {
    const int at = (first + lane) / kBlocks, block = (first + lane) % kBlocks;
    const int low = shuffle(token[0], at % 8 * 4), high = shuffle(token[1], at % 8 * 4);
    if (at < kWarpRows) store_block(to, at < 8 ? low : high, block, tile, (row + at) * pitch + block * 8);
  }
}

// Scores of 16 rows of `left` and 8 n rows of a tile from `row` on, those n below `blocks`.
template <class T, int kCount, int kBlocks>
EFFATTN_DEVICE void add_scores(
    float (&sums)[kCount][4], const Left<kBlocks>& left, SharedArray<T> tile, int pitch, int row, int blocks) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    if (n >= blocks) break;
    Right<kBlocks> right;
    load_right<false>(right, tile, pitch, row + n * 8);
    multiply<T>(sums[n], left, right);
  }
}

// sums += left times 16 rows of a tile.
template <class T, int kBlocks>
EFFATTN_DEVICE void add_rows(float (&sums)[kBlocks][4], const Left<2>& left, SharedArray<T> tile, int pitch, int row) {
  Right<kBlocks> first, second;
  load_right<true>(first, tile, pitch, row);
  load_right<true>(second, tile, pitch, row + 8);
  multiply_two<T>(sums, left, first, second);
}

// The columns column.. + 15 of 16 rows as the rows of a left factor.
template <class T>
EFFATTN_DEVICE void load_left_transposed(Left<2>& left, SharedArray<T> tile, int pitch, int row, int column) {
  const int lane = lane_index();
  uint32_t r[4];
  ldmatrix_x4_trans(r, tile, (row + lane % 8 + lane / 16 * 8) * pitch + column + lane / 8 % 2 * 8);
  left[0][0] = r[0];
  left[0][1] = r[1];
  left[1][0] = r[2];
  left[1][1] = r[3];
}

// The slots of a window, at most 64, whose keys take part.
EFFATTN_DEVICE uint64_t keys_taking_part(const Slots<false>& window, bool mask_padding) {
  const int count = window.count();
  if (!mask_padding) return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  const uint32_t low = warp_ballot(window.token(lane_index()).index >= 0);
  const uint32_t high = warp_ballot(window.token(lane_index() + kWarp).index >= 0);
  return low | uint64_t{high} << kWarp;
}

template <class T, int D, bool kRich>
constexpr size_t tile_gradient_shared() {
  return 4 * shared_bytes<T>(kTileRows * kPitchOf<D>) + shared_bytes<T>(2 * kTileRows * kScorePitch) +
         lepe_shared<D>(kTileRows / kWarpRows) + shared_bytes<int32_t>(kRich ? kTileRows : 0);
}

template <class T, int D, bool kRich>
__global__ void __launch_bounds__(kTileThreads, (D <= 32 ? 4 : 3) - kRich)
    tile_gradient_kernel(const __grid_constant__ WindowGradient<T> a) {
  constexpr int kBlocks = D / 8, kPitch = kPitchOf<D>;
  SharedMemory shared;
  const auto q_tile = shared.array<T>(kTileRows * kPitch), k_tile = shared.array<T>(kTileRows * kPitch);
  const auto v_tile = shared.array<T>(kTileRows * kPitch), g_tile = shared.array<T>(kTileRows * kPitch);
  const auto p_tile = shared.array<T>(2 * kTileRows * kScorePitch), ds_tile = p_tile.from(kTileRows * kScorePitch);

  const WindowPlace place = place_of(a.geometry, a.grid, blockIdx.x);
  const WindowHalf& half = a.geometry.half[place.half];
  const WindowShare& share = a.grid.share[place.half];
  const int lane = lane_index(), team = share.by_warps.quotient(warp_index()), row = warp_index() * kWarpRows;
  const int key_blocks = team < share.teams ? (half.slots() + 7) / 8 : 0;
  const int first_row = team * share.warps * kWarpRows, first_slot = row - first_row;  // of the team, of the warp
  const float scale_log2 = a.scale * kLog2E;
  const Lepe<D> lepe(shared.array<float>((kTaps + block_threads() / kWarp * kLepeSums) * D), a.lepe_weight, place.head,
      a.query.columns);
  const auto codes = shared.array<int32_t>(kRich ? kTileRows : 0);  // of the keys
  const float* const bias = kRich && a.bias != nullptr ? bias_centre(a.bias, half, place.head) : nullptr;
  float ds_sums[kRich ? kKeyBlocks : 1][4] = {};
  const int last = min(a.groups[place.half], (place.chunk + 1) * a.walk);
  for (int group = place.chunk * a.walk; group < last; ++group) {
    const int member = group * share.teams + team;
    const bool exists = team < share.teams && member < share.members;
    const Slots<kRich> window = {a.geometry, half, window_of(half, exists ? member : 0)};
    const int batch = window.window.batch;
    sync_block();  // all are done with the last window
    {
      const TokenRows<T> q = a.query.at(batch, place.head), k = a.key.at(batch, place.head);
      const TokenRows<T> v = a.value.at(batch, place.head), g = a.grad_output.at(batch, place.head);
      each_block<D>(kWarpRows, lane, kWarp, [&](int at, int block) {
        const int to = (row + at) * kPitch + block * 8, token = exists ? window.token(first_slot + at).index : -1;
        load_block(q_tile, to, q, token, block);
        load_block(k_tile, to, k, token, block);
        load_block(v_tile, to, v, token, block);
        load_block(g_tile, to, g, token, block);
      });
    }
    cp_async_commit();
    int token[2];
    float lse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      token[i] = exists ? window.token(first_slot + lane / 4 + 8 * i).index : -1;
      lse[i] = INFINITY;  // a row that is none has P = 0
      if (token[i] >= 0) lse[i] = a.logsumexp[a.statistics(batch, place.head) + token[i]] * kLog2E;
    }
    uint64_t part = 0;
    int code[2] = {};
    if constexpr (kRich) {
      if (lane < kWarpRows) codes[row + lane] = key_code(window, first_slot + lane, a.mask_padding);
#pragma unroll
      for (int i = 0; i < 2; ++i) code[i] = query_code(window, first_slot + lane / 4 + 8 * i);
    } else {
      part = keys_taking_part(window, a.mask_padding);
    }
    cp_async_wait<0>();
    sync_block();

    uint32_t ds_left[kKeyBlocks][2];
    {
      float p[kKeyBlocks][4] = {}, dp[kKeyBlocks][4] = {}, delta[2] = {};
      uint32_t left[kBlocks][2];
      load_left(left, q_tile, kPitch, row);
      add_scores(p, left, k_tile, kPitch, first_row, key_blocks);
      load_left(left, g_tile, kPitch, row);
      add_scores(dp, left, v_tile, kPitch, first_row, key_blocks);
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        if (n >= key_blocks) break;
        const uint32_t here = static_cast<uint32_t>(part >> n * 8) & 0xff;
        Vec<int32_t, 2> keys = {};
        if constexpr (kRich) keys = codes.load<2>(first_row + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kRich) {
            p[n][i] = with_bias_and_mask(p[n][i] * scale_log2, bias, code[i / 2], keys[i % 2]);
            p[n][i] = exp2_approx(p[n][i] - lse[i / 2]);
          } else {
            p[n][i] = exp2_approx(fmaf(p[n][i], scale_log2, -lse[i / 2]));
            if (here != 0xff && !(here >> (lane % 4 * 2 + i % 2) & 1)) p[n][i] = 0;
          }
          delta[i / 2] = fmaf(p[n][i], dp[n][i], delta[i / 2]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) delta[i] = warp_reduce<4>(delta[i], Sum());
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dp[n][i] = p[n][i] * (dp[n][i] - delta[i / 2]);
          if constexpr (kRich) ds_sums[n][i] += dp[n][i];
        }
        uint32_t p_left[2];
        pack_left<T>(p_left, p[n]);
        pack_left<T>(ds_left[n], dp[n]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = ((row + lane / 4 + 8 * i) * kScorePitch + n * 8 + lane % 4 * 2) / 2;
          p_tile.template as<uint32_t>()[at] = p_left[i];
          ds_tile.template as<uint32_t>()[at] = ds_left[n][i];
        }
      }
    }
    sync_block();

    const int query_steps = team < share.teams ? share.warps : 0;
    float sums[kBlocks][4] = {};
    for (int step = 0; step < query_steps; ++step) {
      Left<2> left;
      load_left_transposed(left, p_tile, kScorePitch, first_row + step * 16, first_slot);
      add_rows(sums, left, g_tile, kPitch, first_row + step * 16);
    }
    if (a.lepe_weight != nullptr) {
      uint32_t near[2];  // a slot outside of the image is a row of zeros, as good as any
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = opaque(first_slot) + lane / 4 + 8 * i;  // not kept from window to window
        near[i] = team < share.teams ? taps_behind(half, slot) : 0;
      }
      lepe.template add<1>(
          sums, half, near,
          [&](int i, int column) { return v_tile.template load<2>((row + lane / 4 + 8 * i) * kPitch + column); },
          [&](int i, int y, int x, int column) {
            return g_tile.template load<2>((row + lane / 4 + 8 * i - y * half.width - x) * kPitch + column);
          });
    }
    store_rows(a.grad_value.at(batch, place.head), sums, 1.0f, v_tile, kPitch, row, token);

#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0;
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n += 2) {
      if (n >= key_blocks) break;
      const Left<2> left = {{ds_left[n][0], ds_left[n][1]}, {ds_left[n + 1][0], ds_left[n + 1][1]}};
      add_rows(sums, left, k_tile, kPitch, first_row + n * 8);
    }
    store_rows(a.grad_query.at(batch, place.head), sums, a.scale, v_tile, kPitch, row, token);

#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    for (int step = 0; step < query_steps; ++step) {
      Left<2> left;
      load_left_transposed(left, ds_tile, kScorePitch, first_row + step * 16, first_slot);
      add_rows(sums, left, q_tile, kPitch, first_row + step * 16);
    }
    store_rows(a.grad_key.at(batch, place.head), sums, a.scale, v_tile, kPitch, row, token);
  }
  if (a.lepe_weight != nullptr)
    lepe.write(a.lepe_sums + int64_t{blockIdx.x} * kLepeSums * a.query.columns, a.query.columns);
  if constexpr (kRich) {
    static_assert(kTileRows / kWarpRows * BiasSums::floats(kTileRows) <= kTileRows * kScorePitch);
    if (a.bias_sums == nullptr) return;
    sync_block();  // all are done with P and dS
    const BiasSums sums(p_tile.template as<float>(), half, first_slot);
    sums.add<0>(ds_sums, 0);
    if (half.slots() > kTileRows / 2) sums.add<kKeyBlocks / 2>(ds_sums, kTileRows / 2);
    sums.write(a.bias_sums + int64_t{blockIdx.x} * half.bias_entries(), 0, share.teams * share.warps, share.warps);
  }
}

}  // namespace effattn::cuda
