// Attention inside the windows of a token grid, with LePE (cross_shaped_window.h has the geometry):
//
//   Z = scale Q K^T + bias[h, key - query] + mask      P = softmax(Z)      O = P V + LePE(V)
//   LePE(V)[p] = lepe_bias + sum over 3 x 3 taps t of w[t] V[p + t], p + t in the window of p
//
// A warp has 16 queries: its rows of Q, 16 x 32 scores, statistics and 16 x D of O are in registers; keys and values of
// its window are in shared memory, all of them where they fit in kResidentBytes, else 64 at a time in two stages.
// Scores and weights are computed for the keys rounded up to 8, products have D rounded up to 8: with 49 keys and D =
// 24 a window is 64 x 56 x 24, where tiles of powers of two make it 64 x 64 x 32. P is rounded to the input's type, its
// sum is not. Results are rounded once, and leave through the warp's rows of Q, 16 bytes at a time.
//
// FLOPs per (b, h): 4 N K D, N queries meeting K keys each. Bytes at e per element: 4 N D e where a window is one
// block's, else K and V once more for every 128 queries of it; LePE reads the shared memory, or V again where that is
// not resident.
#include "cross_shaped_window.h"
#include "window_tile.h"

namespace effattn::cuda {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr int kKeyBlocks = 4, kKeyTile = 8 * kKeyBlocks;  // scores in registers
constexpr int kStreamed = 2 * kKeyTile;                   // keys of a stage, where not all are resident
constexpr int64_t kResidentBytes = 40 * 1024;

template <class T>
struct WindowForward {
  WindowGeometry geometry;
  WindowGrid grid;
  TokenTensor<T> query, key, value, output;
  float* logsumexp;
  const float *bias, *lepe_weight, *lepe_bias;
  int heads, head_dim;
  int tile[2], stages[2];  // keys of a stage
  float scale_log2;
  bool mask_padding;
};

// What a warp has of its 16 queries; of the rows g and g + 8 in two registers.
template <class T, int D, bool kRich>
struct QueryRows {
  static constexpr int kDepth = D / 8, kPitch = kPitchOf<D>;

  Left<kDepth> query;
  float output[kDepth][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const float* bias;  // of the slots themselves
  int code[2];

  // Attends to `count` keys from `row` of the tiles on, at most kKeyTile. `codes`: of the keys, where kRich.
  EFFATTN_DEVICE void attend(
      SharedArray<T> keys, SharedArray<T> values, SharedArray<int32_t> codes, int row, int count, float scale_log2) {
    const int lane = lane_index(), blocks = (count + 7) / 8;
    float score[kKeyBlocks][4], largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < kKeyBlocks; ++n) {
      if (n >= blocks) break;
      Right<kDepth> key;
      load_right<false>(key, keys, kPitch, row + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = 0;
      multiply<T>(score[n], query, key);
      const int column = 8 * n + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] *= scale_log2;
      if constexpr (kRich) {
        const Vec<int32_t, 2> key_code = codes.template load<2>(row + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = with_bias_and_mask(score[n][i], bias, code[i / 2], key_code[i % 2]);
      } else if (8 * n + 8 > count) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (column + i % 2 >= count) score[n][i] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], score[n][i]);
    }
    float anchor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = warp_reduce<4>(largest[r], Max());
      anchor[r] = kRich && largest[r] == -INFINITY ? 0 : largest[r];
      const float decay = exp2_approx(maximum[r] - anchor[r]);
      maximum[r] = largest[r];
      total[r] *= decay;
#pragma unroll
      for (int c = 0; c < kDepth; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) output[c][2 * r + i] *= decay;
    }
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n += 2) {
      if (n >= blocks) break;
      const bool both = n + 1 < blocks;
      Left<2> weight = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half && !both) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[n + half][i] = exp2_approx(score[n + half][i] - anchor[i / 2]);
          total[i / 2] += score[n + half][i];
        }
        pack_left<T>(weight[half], score[n + half]);
      }
      Right<kDepth> first, second;
      load_right<true>(first, values, kPitch, row + 8 * n);
      if (both) {
        load_right<true>(second, values, kPitch, row + 8 * n + 8);
        multiply_two<T>(output, weight, first, second);
      } else {
        multiply_one<T>(output, weight[0], first);
      }
    }
  }
};

// output += LePE of the 16 queries from `first` on. Values are those of the window where they are resident, else rows
// that pass through `scratch`, the 16 rows of this warp.
template <class T, int D, bool kRich>
EFFATTN_DEVICE void add_lepe(float (&output)[D / 8][4], const Slots<kRich>& slots, int first,
    SharedArray<float> weights, bool resident, SharedArray<T> values, SharedArray<T> scratch,
    const TokenRows<T>& rows) {
  constexpr int kPitch = kPitchOf<D>;
  const WindowHalf& half = slots.half;
  const int lane = lane_index();
  const SharedArray<T> tile = resident ? values : scratch;
  int index[2];
  Slot slot[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    index[r] = min(first + lane / 4 + 8 * r, slots.count() - 1);
    slot[r] = slot_of(half, index[r]);
  }
#pragma unroll
  for (int c = 0; c < D / 8; ++c) {
    const Vec<float, 2> bias = weights.template load<2>(9 * D + c * 8 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) output[c][i] += bias[i % 2];
  }
  const int reach_y = half.height > 1, reach_x = half.width > 1;
#pragma unroll 1
  for (int y = -reach_y; y <= reach_y; ++y)
#pragma unroll 1
    for (int x = -reach_x; x <= reach_x; ++x) {
      if (!resident) {
        sync_warp();  // the rows of the last tap have been read
        each_block<D>(kWarpRows, lane, kWarp, [&](int row, int block) {
          const Slot at = slot_of(half, first + row);
          const bool inside = contains(half, at.y + y, at.x + x);
          const int token = inside ? slots.token(first + row + y * half.width + x).index : -1;
          load_block(tile, row * kPitch + block * 8, rows, token, block);
        });
        cp_async_commit();
        cp_async_wait<0>();
        sync_warp();
      }
      int row[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        row[r] = resident ? index[r] + y * half.width + x : lane / 4 + 8 * r;
        if (!contains(half, slot[r].y + y, slot[r].x + x)) row[r] = -1;
      }
      const int tap = (3 * y + x + 4) * D;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const int column = c * 8 + lane % 4 * 2;
        const Vec<float, 2> weight = weights.template load<2>(tap + column);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          Vec<T, 2> pair = {};
          if (row[r] >= 0) pair = tile.template load<2>(row[r] * kPitch + column);
#pragma unroll
          for (int i = 0; i < 2; ++i) output[c][2 * r + i] = fmaf(weight[i], to_float(pair[i]), output[c][2 * r + i]);
        }
      }
    }
}

// 24, 20 or 16 warps to a multiprocessor. A bound on threads could not say 96, since blocks have up to 256.
template <int D, bool kRich>
constexpr int kRegisters = D <= 24 && !kRich ? 80
                           : D <= 32         ? 96
                                             : 128;

template <class T, int D, bool kRich>
__global__ void __maxnreg__((kRegisters<D, kRich>)) window_forward(const __grid_constant__ WindowForward<T> a) {
  constexpr int kPitch = kPitchOf<D>;
  const WindowPlace place = place_of(a.geometry, a.grid, blockIdx.x);
  const WindowShare& share = a.grid.share[place.half];
  const int lane = lane_index(), team = share.by_warps.quotient(warp_index());
  const int thread = thread_index() - team * share.warps * kWarp, threads = share.warps * kWarp;  // of the team
  const int member = place.chunk * share.teams + team;
  const bool active = team < share.teams && member < share.members;
  // made anew in every part of the kernel: registers are for the products
  const auto slots_now = [&] {
    const WindowHalf& half = a.geometry.half[opaque(place.half)];
    return Slots<kRich>{a.geometry, half, window_of(half, active ? opaque(member) : 0)};
  };
  const Slots<kRich> slots = slots_now();
  const int count = slots.count(), first = place.block * threads / 2 + thread / kWarp * kWarpRows;
  const bool works = active && first < count;
  const int tile = a.tile[place.half], stages = a.stages[place.half], buffers = stages > 1 ? 2 : 1;

  SharedMemory shared;
  auto queries = shared.array<T>(share.teams * threads / 2 * kPitch);
  auto keys = shared.array<T>(share.teams * buffers * tile * kPitch);
  auto values = shared.array<T>(share.teams * buffers * tile * kPitch);
  auto query_tokens = shared.array<int32_t>(share.teams * threads / 2);
  auto key_tokens = shared.array<int32_t>(share.teams * buffers * tile);
  auto codes = shared.array<int32_t>(kRich ? share.teams * buffers * tile : 0);
  auto weights = shared.array<float>(a.lepe_weight == nullptr ? 0 : 10 * D);
  if (active) {
    queries = queries.from(warp_index() * kWarpRows * kPitch);
    keys = keys.from(team * buffers * tile * kPitch);
    values = values.from(team * buffers * tile * kPitch);
    query_tokens = query_tokens.from(warp_index() * kWarpRows);
    key_tokens = key_tokens.from(team * buffers * tile);
    if constexpr (kRich) codes = codes.from(team * buffers * tile);
  }

  if (active && lane < kWarpRows) query_tokens[lane] = slots.token(first + lane).index;
  if (a.lepe_weight != nullptr) {
    const float* from = a.lepe_weight + int64_t{place.head} * 9 * a.head_dim;
    const float* bias = a.lepe_bias + int64_t{place.head} * a.head_dim;
#pragma unroll 1
    for (int i = thread_index(); i < 10 * D; i += block_threads()) {
      const int tap = i / D, column = i % D;
      float weight = 0;
      if (column < a.head_dim && (tap < 9 || a.lepe_bias != nullptr))
        weight = tap < 9 ? from[tap * a.head_dim + column] : bias[column];
      weights[i] = weight;
    }
  }
  QueryRows<T, D, kRich> rows;
  if constexpr (kRich) {
    rows.bias = a.bias == nullptr ? nullptr : bias_centre(a.bias, slots.half, place.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.code[r] = query_code(slots, first + lane / 4 + 8 * r);
  }

  for (int next = 0; next <= stages; ++next) {
    if (next < stages) {
      const Slots<kRich> slots = slots_now();
      const int start = next * tile, row = next % 2 * tile, rounded = min(tile, (count - start + 7) / 8 * 8);
      if (active)
#pragma unroll 1
        for (int i = thread; i < rounded; i += threads) key_tokens[row + i] = slots.token(start + i).index;
      sync_block();  // and the products with what was in this half of the buffers are done
      if constexpr (kRich) {
        if (active)
#pragma unroll 1
          for (int i = thread; i < rounded; i += threads) codes[row + i] = key_code(slots, start + i, a.mask_padding);
      }
      if (works && next == 0) {
        const TokenRows<T> query = a.query.at(slots.window.batch, place.head);
        each_block<D>(kWarpRows, lane, kWarp,
            [&](int i, int block) { load_block(queries, i * kPitch + block * 8, query, query_tokens[i], block); });
      }
      if (active) {
        const TokenRows<T> key = a.key.at(slots.window.batch, place.head),
                           value = a.value.at(slots.window.batch, place.head);
        each_block<D>(rounded, thread, threads, [&](int i, int block) {
          const int token = key_tokens[row + i], at = (row + i) * kPitch + block * 8;
          load_block(keys, at, key, token, block);
          load_block(values, at, value, token, block);
        });
      }
    }
    cp_async_commit();
    if (next == 0) continue;
    cp_async_wait<1>();
    sync_block();
    if (!works) continue;
    if (next == 1) load_left(rows.query, queries, kPitch, 0);
    const int start = (next - 1) * tile, row = (next - 1) % 2 * tile, here = min(tile, count - start);
    for (int key = 0; key < here; key += kKeyTile)
      rows.attend(keys, values, codes, row + key, min(here - key, kKeyTile), a.scale_log2);
  }
  if (!works) return;

  const Slots<kRich> again = slots_now();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = warp_reduce<4>(rows.total[r], Sum()), factor = 1.0f / total;
    const int token = query_tokens[lane / 4 + 8 * r];
    if (lane % 4 == 0 && token >= 0) {
      const int64_t plane = int64_t{again.window.batch} * a.heads + place.head;
      // in double, so that it is rounded once
      a.logsumexp[plane * a.geometry.grid_h * a.geometry.grid_w + token] =
          static_cast<float>((static_cast<double>(rows.maximum[r]) + log2_approx(total)) * kLn2);
    }
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) rows.output[c][2 * r + i] *= factor;
  }
  if (a.lepe_weight != nullptr)
    add_lepe<T, D, kRich>(
        rows.output, again, first, weights, stages == 1, values, queries, a.value.at(again.window.batch, place.head));
  sync_warp();  // its rows of Q have been read
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      queries.store((lane / 4 + 8 * r) * kPitch + c * 8 + lane % 4 * 2,
          Vec<T, 2>{from_float<T>(rows.output[c][2 * r]), from_float<T>(rows.output[c][2 * r + 1])});
  sync_warp();
  const TokenRows<T> output = a.output.at(again.window.batch, place.head);
  each_block<D>(kWarpRows, lane, kWarp,
      [&](int row, int block) { store_block(output, query_tokens[row], block, queries, row * kPitch + block * 8); });
}

template <class T, int D, bool kRich>
void forward(const WindowAttention& arguments, cudaStream_t stream) {
  WindowForward<T> a = {};
  a.geometry = geometry_of(arguments);
  a.grid = grid_of(a.geometry);
  a.query = token_tensor<T>(arguments.query);
  a.key = token_tensor<T>(arguments.key);
  a.value = token_tensor<T>(arguments.value);
  a.output = token_tensor<T>(arguments.output);
  a.logsumexp = arguments.logsumexp;
  a.bias = arguments.bias;
  a.lepe_weight = arguments.lepe_weight;
  a.lepe_bias = arguments.lepe_bias;
  a.heads = static_cast<int>(arguments.query.size[1]);
  a.head_dim = static_cast<int>(arguments.query.size[3]);
  a.scale_log2 = arguments.scale * kLog2E;
  a.mask_padding = arguments.mask_padding;
  size_t bytes = 0;
  for (int i = 0; i < 2; ++i) {
    const WindowHalf& half = a.geometry.half[i];
    const WindowShare& share = a.grid.share[i];
    const int64_t keys = ceil_div(half.slots(), 8) * 8, row = kPitchOf<D> * sizeof(T);
    const bool resident = 2 * keys * row <= kResidentBytes;
    a.tile[i] = resident ? static_cast<int>(keys) : kStreamed;
    a.stages[i] = static_cast<int>(ceil_div(half.slots(), a.tile[i]));
    const size_t held = static_cast<size_t>(share.teams) * (resident ? 1 : 2) * a.tile[i];
    const size_t here =
        shared_bytes<T>(share.teams * share.warps * kWarpRows * kPitchOf<D>) + 2 * shared_bytes<T>(held * kPitchOf<D>) +
        shared_bytes<int32_t>(share.teams * share.warps * kWarpRows) + shared_bytes<int32_t>(held) +
        shared_bytes<int32_t>(kRich ? held : 0) + shared_bytes<float>(a.lepe_weight == nullptr ? 0 : 10 * D);
    if (half.heads > 0 && here > bytes) bytes = here;
  }
  launch(window_forward<T, D, kRich>, dim3(a.grid.blocks), dim3(a.grid.warps * kWarp), bytes, stream, a);
}

template <class T>
void forward(const WindowAttention& a, cudaStream_t stream) {
  const bool rich = a.bias != nullptr || a.mask_padding || a.shift_h + a.shift_w > 0;
  with_columns(a.query.size[3], [&]<int D>() {
    if (rich)
      forward<T, D, true>(a, stream);
    else
      forward<T, D, false>(a, stream);
  });
}

}  // namespace

void window_attention(const WindowAttention& a, void* stream) {
  if (a.query.dtype == DType::kBFloat16)
    forward<bfloat16>(a, static_cast<cudaStream_t>(stream));
  else
    forward<float16>(a, static_cast<cudaStream_t>(stream));
}

}  // namespace effattn::cuda
