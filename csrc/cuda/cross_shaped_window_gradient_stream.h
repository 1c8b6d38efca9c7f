// Gradients of windows of any size, in two kernels of one form: a block owns 16 slots for each of its warps, and the
// other slots of the window stream past, 64 at a time and in two stages.
//
//   S = X X'^T     dP = Y Y'^T     P = exp(scale S + bias + mask - lse)     dS = P (dP - delta)
//   keys:     (X, Y) = (K, V), (X', Y') = (Q, dO):    dK = scale dS X',  dV = P Y' + what LePE adds
//   queries:  (X, Y) = (Q, dO), (X', Y') = (K, V):    dQ = scale dS X',  sums of dS for the bias table
//
// Either way S comes as the products need it as their left factor, in registers; no score goes through shared memory.
// Keys read the log-sum-exp and delta of a column, queries those of their row, and for a column what takes it out. With
// a shift or a bias (kRich) rows and columns have codes. With a bias a block of queries walks `walk` windows and keeps
// the diagonals of dS in shared memory (_gradient_bias.h).
//
// Registers: one or two sums, S and dP of 16 or 32 columns. Shared memory: X and Y, two stages of X' and Y'.
// Bytes per kernel: 2 N D of 2 for each block of a window and 2 N D more, 8 N; keys write 2 N D, queries N D.
// FLOPs: keys 8 N K D, queries 6 N K D.
#pragma once

#include "cross_shaped_window_gradient_tile.h"

namespace effattn::cuda {

inline constexpr int kStreamed = 64;

// bias_slots: those of a window where its bias needs a gradient.
template <class T, int D, bool kKeys, bool kRich>
constexpr size_t stream_gradient_shared(int warps, int bias_slots) {
  return 2 * shared_bytes<T>(warps * kWarpRows * kPitchOf<D>) + 2 * shared_bytes<T>(2 * kStreamed * kPitchOf<D>) +
         shared_bytes<float>(4 * kStreamed) + shared_bytes<int32_t>(kRich ? 2 * kStreamed : 0) +
         (kKeys               ? lepe_shared<D>(warps)
             : bias_slots > 0 ? shared_bytes<float>(warps * BiasSums::floats(bias_slots))
                              : 0);
}

// What a column of scores brings: lse and delta of a query, or whether a key takes part.
struct Column {
  float shift, delta;
};

template <class T, bool kKeys>
EFFATTN_DEVICE Column column_of(const WindowGradient<T>& a, int64_t statistics, int token, bool exists) {
  if constexpr (kKeys) {
    if (token < 0) return {INFINITY, 0};  // P = 0
    return {a.logsumexp[statistics + token] * kLog2E, a.delta[statistics + token]};
  }
  return {exists && (token >= 0 || !a.mask_padding) ? 0 : INFINITY, 0};
}

template <class T, int D, bool kKeys, bool kRich>
__global__ void __launch_bounds__(kWindowWarps* kWarp, D <= 32 ? 2 : 1)
    stream_gradient_kernel(const __grid_constant__ WindowGradient<T> a) {
  constexpr int kBlocks = D / 8, kPitch = kPitchOf<D>;
  constexpr bool kWalks = kRich && !kKeys;
  constexpr int kScoreColumns = kRich && kKeys ? 16 : 32;  // what registers hold
  SharedMemory shared;
  const int block_rows = block_threads() / kWarp * kWarpRows;
  const auto x_own = shared.array<T>(block_rows * kPitch), y_own = shared.array<T>(block_rows * kPitch);
  const auto x_tiles = shared.array<T>(2 * kStreamed * kPitch), y_tiles = shared.array<T>(2 * kStreamed * kPitch);
  const auto columns = shared.array<float>(4 * kStreamed);  // shifts and deltas of a stage
  const auto codes = shared.array<int32_t>(kRich ? 2 * kStreamed : 0);

  const WindowPlace place = place_of(a.geometry, a.grid, blockIdx.x);
  const WindowHalf& half = a.geometry.half[place.half];
  const WindowShare& share = a.grid.share[place.half];
  const int lane = lane_index(), row = warp_index() * kWarpRows, slots = half.slots();
  const int first_slot = place.block * share.warps * kWarpRows;
  const bool working = warp_index() < share.warps, sums_bias = kWalks && a.bias_sums != nullptr;
  const float* const bias = kRich && a.bias != nullptr ? bias_centre(a.bias, half, place.head) : nullptr;
  const float scale_log2 = a.scale * kLog2E;
  const BiasSums bias_sums(shared.array<float>(sums_bias ? block_threads() / kWarp * BiasSums::floats(slots) : 0), half,
      first_slot + row, sums_bias);
  const auto gradients_of = [&](int member) {
    const Slots<kRich> window = {a.geometry, half, window_of(half, member)};
    const int batch = window.window.batch;
    const int64_t statistics = a.statistics(batch, place.head);
    const TokenRows<T> q = a.query.at(batch, place.head), k = a.key.at(batch, place.head);
    const TokenRows<T> v = a.value.at(batch, place.head), g = a.grad_output.at(batch, place.head);
    if constexpr (kWalks) sync_block();  // all are done with the last window

    each_block<D>(share.warps * kWarpRows, thread_index(), block_threads(), [&](int at, int block) {
      const int token = window.token(first_slot + at).index, to = at * kPitch + block * 8;
      load_block(x_own, to, kKeys ? k : q, token, block);
      load_block(y_own, to, kKeys ? v : g, token, block);
    });
    Column column;  // of thread 0 .. 63, on its way to shared memory
    int column_code = 0;
    const auto fetch = [&](int tile) {
      const int first = tile * kStreamed, stage = tile % 2 * kStreamed;
      const int rows = min((slots - first + kWarpRows - 1) / kWarpRows * kWarpRows, kStreamed);
      each_block<D>(rows, thread_index(), block_threads(), [&](int at, int block) {
        const int token = window.token(first + at).index, to = (stage + at) * kPitch + block * 8;
        load_block(x_tiles, to, kKeys ? q : k, token, block);
        load_block(y_tiles, to, kKeys ? g : v, token, block);
      });
      cp_async_commit();
      const int slot = first + thread_index();
      if (thread_index() >= kStreamed) return;
      column = column_of<T, kKeys>(a, statistics, window.token(slot).index, slot < slots);
      if constexpr (kRich) column_code = kKeys ? query_code(window, slot) : key_code(window, slot, a.mask_padding);
    };

    int token[2], code[2] = {};
    float shift[2] = {}, delta[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slot = first_slot + row + lane / 4 + 8 * i;
      token[i] = working ? window.token(slot).index : -1;
      if constexpr (kRich) code[i] = kKeys ? key_code(window, slot, a.mask_padding) : query_code(window, slot);
      if (kKeys) continue;
      const Column own = column_of<T, true>(a, statistics, token[i], true);
      shift[i] = own.shift;
      delta[i] = own.delta;
    }

    fetch(0);
    float x_sums[kBlocks][4] = {}, y_sums[kBlocks][4] = {};
    const int tiles = (slots + kStreamed - 1) / kStreamed;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % 2 * kStreamed;
      if (thread_index() < kStreamed) {
        columns[stage + thread_index()] = column.shift;
        columns[2 * kStreamed + stage + thread_index()] = column.delta;
        if constexpr (kRich) codes[stage + thread_index()] = column_code;
      }
      cp_async_wait<0>();
      sync_block();  // this stage is there, and all are done with the other
      if (tile + 1 < tiles) fetch(tile + 1);
      if (!working) continue;
#pragma unroll 1
      for (int first = 0; first < kStreamed; first += kScoreColumns) {
        const int left_over = slots - tile * kStreamed - first;
        if (left_over <= 0) break;
        const int blocks = (left_over + 7) / 8;
        constexpr int kScoreBlocks = kScoreColumns / 8;
        float p[kScoreBlocks][4] = {}, ds[kScoreBlocks][4] = {};
        uint32_t left_rows[kBlocks][2];  // again for these columns: held, they would spill
        load_left(left_rows, x_own, kPitch, row);
        add_scores(p, left_rows, x_tiles, kPitch, stage + first, blocks);
        load_left(left_rows, y_own, kPitch, row);
        add_scores(ds, left_rows, y_tiles, kPitch, stage + first, blocks);
#pragma unroll
        for (int n = 0; n < kScoreBlocks; ++n) {
          if (n >= blocks) break;
          const int at = stage + first + n * 8 + lane % 4 * 2;
          const Vec<float, 2> shifts = columns.load<2>(at);
          Vec<float, 2> deltas = {};
          if constexpr (kKeys) deltas = columns.load<2>(2 * kStreamed + at);
          Vec<int32_t, 2> column_codes = {};
          if constexpr (kRich) column_codes = codes.load<2>(at);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float down = kKeys ? shifts[i % 2] : shift[i / 2] + shifts[i % 2];
            if constexpr (kRich) {
              const int own = code[i / 2], other = column_codes[i % 2];
              p[n][i] = with_bias_and_mask(p[n][i] * scale_log2, bias, kKeys ? other : own, kKeys ? own : other);
              p[n][i] = exp2_approx(p[n][i] - down);
            } else {
              p[n][i] = exp2_approx(fmaf(p[n][i], scale_log2, -down));
            }
            ds[n][i] = p[n][i] * (ds[n][i] - (kKeys ? deltas[i % 2] : delta[i / 2]));
          }
        }
        if (sums_bias) bias_sums.add<0>(ds, tile * kStreamed + first);
#pragma unroll
        for (int n = 0; n < kScoreBlocks; n += 2) {
          if (n >= blocks) break;
          Left<2> left;
          pack_left<T>(left[0], ds[n]);
          pack_left<T>(left[1], ds[n + 1]);
          add_rows(x_sums, left, x_tiles, kPitch, stage + first + n * 8);
          if constexpr (kKeys) {
            pack_left<T>(left[0], p[n]);
            pack_left<T>(left[1], p[n + 1]);
            add_rows(y_sums, left, y_tiles, kPitch, stage + first + n * 8);
          }
        }
      }
    }

    if constexpr (!kKeys) {
      if (working) store_rows(a.grad_query.at(batch, place.head), x_sums, a.scale, x_own, kPitch, row, token);
    } else {
      if (a.lepe_weight != nullptr) {
        const Lepe<D> lepe(shared.array<float>((kTaps + block_threads() / kWarp * kLepeSums) * D), a.lepe_weight,
            place.head, a.query.columns);
        sync_block();
        uint32_t near[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) near[i] = token[i] < 0 ? 0 : taps_behind(half, first_slot + row + lane / 4 + 8 * i);
        if (working)
          lepe.template add<kRich ? 1 : 3>(
              y_sums, half, near,
              [&](int i, int column) { return y_own.template load<2>((row + lane / 4 + 8 * i) * kPitch + column); },
              [&](int i, int y, int x, int column) {
                const int slot = first_slot + row + lane / 4 + 8 * i - y * half.width - x;
                return load_pair(g, window.token(slot).index, column);
              });
        lepe.write(a.lepe_sums + int64_t{blockIdx.x} * kLepeSums * a.query.columns, a.query.columns);
      }
      if (working) {
        store_rows(a.grad_key.at(batch, place.head), x_sums, a.scale, x_own, kPitch, row, token);
        store_rows(a.grad_value.at(batch, place.head), y_sums, 1.0f, y_own, kPitch, row, token);
      }
    }
  };
  if constexpr (kWalks) {
    const int last = min(a.groups[place.half], (place.chunk + 1) * a.walk);
    for (int member = place.chunk * a.walk; member < last; ++member) gradients_of(member);
  } else {
    gradients_of(place.chunk);
  }
  if (sums_bias)
    bias_sums.write(a.bias_sums + int64_t{blockIdx.x} * half.bias_entries(), first_slot, share.warps, share.warps);
}

}  // namespace effattn::cuda
