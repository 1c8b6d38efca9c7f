// One scan over the tokens of a (sequence, head), from which retention.cu and retention_gradient.cu make the forward
// pass and every gradient. In chunks of C <= 64 tokens, with w = log_decay and i, j counted within the chunk,
//
//   O_i = e_i (q_i S) + sum over j <= i of (s gamma^(i - j) q_i . k_j) v_j,    e_i = a gamma^(i + 1)
//   S  <- gamma^C S + sum over j of l_j k_j^T v_j,                             l_j = b gamma^(C - 1 - j)
//
// or, with a step's decay applied to the state beforehand, e_i = a gamma^i and l_j = b gamma^(C - j): the form of a
// scan that runs from the last token to the first. kDecay: instead of O, the sum of dO . dO/dw, which takes
//
//   dO_i/dw = e_i (q_i (T + n_i S)) + sum over j <= i of (i - j) (s gamma^(i - j) q_i . k_j) v_j
//   T = dS/dw  <-  gamma^C (T + C S) + sum over j of m_j l_j k_j^T v_j
//
// with n_i and m_j the exponents of e_i and l_j. T and all these factors are kept divided by 64, the largest is then 1.
//
// A block of 8 warps owns a (sequence, head) and kWidth columns of v. Registers hold S (and T) in float32, kDepth x
// kWidth over 256 threads, and a chunk's scores and outputs. Shared memory holds q and k, 64 tokens by a slice of the
// depth (16-bit: 64, the next slice under way; float32: 32), v twice, S in the type of q for the product q S, and in
// turns the weighted v and the weighted scores. No chunk writes anything but its rows of O. S passes a chunk's decay as
// S + expm1(C w) S: a gamma^C near 1, rounded, would err the same way at every chunk.
//
// A chunk and block: 2 C (C (depth + kWidth) + 2 depth kWidth) FLOPs, of the first term 16-bit leaves out most of what
// is above the diagonal; C (2 depth + kWidth) elements are read, q and k from L2 by all tiles of columns but one.
#pragma once

#include <type_traits>

#include "retention_tile.h"
#include "tile.h"

namespace effattn::cuda {

// (sequence, head) matrices of depth x width.
struct StateMatrix {
  float* data;  // or null
  int64_t row_stride, column_stride;
};

template <class T>
struct Scan {
  Planes<T> query, key, value;
  ResultPlanes<T> output;
  StateMatrix initial, last;  // state before the first and after the last token
  const float* log_decay;     // (H,)
  const float* row_scale;     // (B, H, N) or null: factors of the output's rows, or of value's if scales_values
  const int32_t* bounds;      // (sequences + 1,) or null: sequence b is batch b
  const float* added;         // (B, H, N, width) or null: added to the output before it is rounded
  float* partial;             // the same, or null: where the output goes instead
  int64_t heads, sequences;
  int tokens, depth, width, chunk;
  bool reverse, strict, scales_values;  // reverse: row strides are negative already; strict: j < i
  float score_scale, entering_scale, leaving_scale;

  // kDecay only.
  Planes<T> grad_output;
  StateMatrix grad_state;  // of the last state, or null
  float* sums;             // one for every (sequence, tile of columns, head)
};

// gamma^n; gamma^0 is 1 also for a decay of -inf.
EFFATTN_DEVICE float decay_power(float log_decay, int n) { return n == 0 ? 1.0f : expf(log_decay * n); }

template <class T, int kDepth, int kWidth, bool kDecay>
struct ScanShape {
  static constexpr int kVector = 16 / sizeof(T), kSlice = sizeof(T) == 2 ? 64 : 32, kSlices = kDepth / kSlice;
  static constexpr int kStages = sizeof(T) == 2 ? 2 : 1, kStates = kDecay ? 2 : 1;
  // 16 bytes more than a row: neighbouring rows in different banks.
  static constexpr int kSlicePitch = kSlice + kVector, kPitch = kWidth + kVector, kScorePitch = kChunk + kVector;
  static constexpr int kScoreTile = kChunk * kScorePitch, kWeightedTiles = kStates * kChunk * kPitch;
  static constexpr int kScratch = kScoreTile > kWeightedTiles ? kScoreTile : kWeightedTiles;

  // On a multiprocessor, as far as registers go: 128 a thread or all 255.
  static constexpr int kBlocks = sizeof(T) == 2 && kDepth == 128 && kWidth == 32 && !kDecay ? 2 : 1;

  static constexpr size_t bytes() {
    return 2 * shared_bytes<T>(kStages * kChunk * kSlicePitch) + shared_bytes<T>(2 * kChunk * kPitch) +
           shared_bytes<T>(kScratch) + shared_bytes<T>(kStates * kDepth * kPitch) + shared_bytes<float>(kChunk + 1) +
           shared_bytes<float>(kChunk) + shared_bytes<float>(2 * kScanThreads / kWarp);
  }
};

template <class T, int kDepth, int kWidth, bool kDecay>
__global__ void __launch_bounds__(kScanThreads, ScanShape<T, kDepth, kWidth, kDecay>::kBlocks)
    retention_scan(Scan<T> a) {
  using Shape = ScanShape<T, kDepth, kWidth, kDecay>;
  constexpr int kSlice = Shape::kSlice, kSlices = Shape::kSlices, kStages = Shape::kStages, kStates = Shape::kStates;
  constexpr int kSlicePitch = Shape::kSlicePitch, kPitch = Shape::kPitch, kScorePitch = Shape::kScorePitch;
  constexpr float kUnit = 1.0f / kChunk;  // of T, n, m
  using ScoreTile = ScanTile<T, kChunk, kChunk, true>;
  using OutputTile = ScanTile<T, kChunk, kWidth>;
  using StateTile = ScanTile<T, kSlice, kWidth>;
  constexpr int kStep = ScoreTile::kStep, kUnroll = ScoreTile::kUnroll;

  SharedMemory shared;
  const auto queries = shared.array<T>(kStages * kChunk * kSlicePitch);
  const auto keys = shared.array<T>(kStages * kChunk * kSlicePitch);
  const auto values = shared.array<T>(2 * kChunk * kPitch);
  const auto scratch = shared.array<T>(Shape::kScratch);  // first the weighted values, then the weighted scores
  const auto copies = shared.array<T>(kStates * kDepth * kPitch);
  const auto powers = shared.array<float>(kChunk + 1);
  const auto score_weight = shared.array<float>(kChunk);
  const auto warp_sums = shared.array<float>(2 * kScanThreads / kWarp);  // as many doubles as warps

  const int64_t tiles = (a.width + kWidth - 1) / kWidth;
  const int64_t tile = blockIdx.x % tiles, state_plane = blockIdx.x / tiles;
  const int64_t sequence = state_plane / a.heads, head = state_plane % a.heads;
  const int64_t plane = a.bounds != nullptr ? head : state_plane;
  const int first_column = static_cast<int>(tile) * kWidth, width = min(kWidth, a.width - first_column);
  const int slices = (a.depth + kSlice - 1) / kSlice, early = a.reverse ? 1 : 0;

  int begin = 0, end = a.tokens;
  if (a.bounds != nullptr) {
    begin = min(max(a.bounds[sequence], 0), a.tokens);
    end = min(max(a.bounds[sequence + 1], begin), a.tokens);
  }
  // Token p of the scan, counted from `start` in its direction.
  const int length = end - begin, start = a.reverse ? end - 1 : begin, direction = a.reverse ? -1 : 1;
  const auto origin = [&](const Planes<T>& planes, int column) {
    return planes.plane(plane) + start * direction * planes.row_stride + column * planes.column_stride;
  };
  const T* const query = origin(a.query, 0);
  const T* const key = origin(a.key, 0);
  const T* const value = origin(a.value, first_column);
  const T* const grad_output = kDecay ? origin(a.grad_output, first_column) : nullptr;
  T* const output_origin = kDecay ? nullptr : a.output.at(plane, start * direction, first_column);
  const float* const row_scale = a.row_scale != nullptr ? a.row_scale + plane * a.tokens + start : nullptr;

  const float log_decay = a.log_decay[head];
  if (thread_index() <= kChunk) powers[thread_index()] = decay_power(log_decay, thread_index());

  // Starts the copies of a slice of chunk n, and with the first one of its values.
  const auto bring = [&](int n, int slice, int stage) {
    const int64_t first = n * a.chunk;
    const int rows = min(a.chunk, length - n * a.chunk);
    const int depth = slice * kSlice;
    fill_tile<kChunk, kSlice, kScanThreads>(queries.from(stage * kChunk * kSlicePitch), kSlicePitch, a.query,
        query + first * a.query.row_stride + depth * a.query.column_stride, rows, a.depth - depth);
    fill_tile<kChunk, kSlice, kScanThreads>(keys.from(stage * kChunk * kSlicePitch), kSlicePitch, a.key,
        key + first * a.key.row_stride + depth * a.key.column_stride, rows, a.depth - depth);
    if (slice == 0)
      fill_tile<kChunk, kWidth, kScanThreads>(
          values.from(n % 2 * kChunk * kPitch), kPitch, a.value, value + first * a.value.row_stride, rows, width);
    cp_async_commit();
  };

  StateTile state[kStates][kSlices];
  // function(row, column, run) for the runs of a state, rows counted over all slices.
  const auto each_of_state = [&](int which, auto function) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice)
      state[which][slice].each([&](int row, int column, auto& run) { function(slice * kSlice + row, column, run); });
  };
  const auto state_at = [&](const StateMatrix& matrix, int row, int column) {
    return matrix.data + state_plane * a.depth * a.width + row * matrix.row_stride +
           (first_column + column) * matrix.column_stride;
  };

#pragma unroll
  for (int which = 0; which < kStates; ++which)
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) state[which][slice].clear();
  if (a.initial.data != nullptr)
    each_of_state(0, [&](int row, int column, auto& run) {
#pragma unroll
      for (int r = 0; r < StateTile::kRun; ++r)
        if (row < a.depth && column + r < width) run[r] = *state_at(a.initial, row, column + r);
    });

  // Copies the state for the product with the next chunk's queries; returns the factor that the copy lacks: float16
  // reaches to 65504 only.
  const auto copy_state = [&]() {
    float factor = 1, inverse = 1;
    if constexpr (std::is_same_v<T, float16>) {
      float largest = 0;
#pragma unroll
      for (int which = 0; which < kStates; ++which)
        each_of_state(
            which, [&](int, int, auto& run) { largest = fmaxf(largest, fmaxf(fabsf(run[0]), fabsf(run[1]))); });
      largest = block_reduce(largest, Max(), warp_sums);
      const int exponent = static_cast<int>(bits_of(largest) >> 23) - 127 - 14;
      if (exponent > 0) {
        factor = float_of(static_cast<uint32_t>(127 + min(exponent, 126)) << 23);
        inverse = 1 / factor;
      }
    }
#pragma unroll
    for (int which = 0; which < kStates; ++which)
      each_of_state(which, [&](int row, int column, auto& run) {
        if (row >= slices * kSlice) return;
        Vec<T, StateTile::kRun> rounded;
#pragma unroll
        for (int r = 0; r < StateTile::kRun; ++r) rounded[r] = from_float<T>(run[r] * inverse);
        copies.store((which * kDepth + row) * kPitch + column, rounded);
      });
    return factor;
  };

  float copy_factor = copy_state();
  double total = 0;
  int stage = 0;
  if (length > 0) bring(0, 0, 0);
  for (int n = 0; n * a.chunk < length; ++n) {
    const int first = n * a.chunk;
    const int count = min(a.chunk, length - first);
    const bool last = first + count >= length;
    const auto chunk_values = values.from(n % 2 * kChunk * kPitch);
    const float whole_decay = expm1f(log_decay * count);
    const bool has_rows = ScoreTile::first_row() < count;

    ScoreTile scores;
    OutputTile output[kStates];
    scores.clear();
#pragma unroll
    for (int which = 0; which < kStates; ++which) output[which].clear();

#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      cp_async_wait<0>();
      sync_block();
      const auto query_slice = queries.from(stage * kChunk * kSlicePitch);
      const auto key_slice = keys.from(stage * kChunk * kSlicePitch);
      const bool ends = slice + 1 == slices;
      if (kStages == 2 && !(ends && last)) bring(ends ? n + 1 : n, ends ? 0 : slice + 1, 1 - stage);

      if (slice == 0) {
        constexpr int kVectors = kWidth / Shape::kVector;
        for (int i = thread_index(); i < kChunk * kVectors; i += kScanThreads) {
          const int row = i / kVectors, at = row * kPitch + i % kVectors * Shape::kVector;
          const int steps = count - 1 - row + early;
          float weight = row < count ? a.leaving_scale * powers[max(steps, 0)] : 0.0f;
          if (a.scales_values && row_scale != nullptr && row < count) weight *= row_scale[(first + row) * direction];
          const auto run = chunk_values.template load<Shape::kVector>(at);
#pragma unroll
          for (int which = 0; which < kStates; ++which) {
            Vec<T, Shape::kVector> weighted;
#pragma unroll
            for (int r = 0; r < Shape::kVector; ++r) weighted[r] = from_float<T>(to_float(run[r]) * weight);
            scratch.store(which * kChunk * kPitch + at, weighted);
            weight *= steps * kUnit;
          }
        }
        if (thread_index() < kChunk) {
          float weight = a.score_scale;
          if (a.scales_values && row_scale != nullptr && thread_index() < count)
            weight *= row_scale[(first + thread_index()) * direction];
          score_weight[thread_index()] = weight;
        }
      }

      const int depth = min(kSlice, a.depth - slice * kSlice);
#pragma unroll kUnroll
      for (int step = 0; step < kSlice; step += kStep) {
        if (!has_rows || step >= depth) break;
        const auto left = ScoreTile::left(query_slice, kSlicePitch, step);
        scores.add_transposed(left, key_slice, kSlicePitch, step);
#pragma unroll
        for (int which = 0; which < kStates; ++which)
          output[which].add(left, copies.from((which * kDepth + slice * kSlice) * kPitch), kPitch, step);
      }
      scores.flush();
#pragma unroll
      for (int which = 0; which < kStates; ++which) output[which].flush();

      if (slice == 0) sync_block();
      StateTile added[kStates];
#pragma unroll
      for (int which = 0; which < kStates; ++which) added[which].clear();
#pragma unroll kUnroll
      for (int step = 0; step < kChunk; step += kStep) {
        if (step >= count) break;
        const auto left = StateTile::left_transposed(key_slice, kSlicePitch, step);
#pragma unroll
        for (int which = 0; which < kStates; ++which)
          added[which].add(left, scratch.from(which * kChunk * kPitch), kPitch, step);
      }
#pragma unroll
      for (int which = 0; which < kStates; ++which) added[which].flush();
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {  // registers have no index
        if (s != slice) continue;
        if constexpr (kDecay) {
          state[1][s].accumulate(count * kUnit, state[0][s]);
          state[1][s].advance(whole_decay, added[1]);
        }
        state[0][s].advance(whole_decay, added[0]);
      }

      if (kStages == 1 && !(ends && last)) {
        sync_block();
        bring(ends ? n + 1 : n, ends ? 0 : slice + 1, 0);
      }
      stage = (stage + 1) % kStages;
    }

    sync_block();  // nobody reads the weighted values or the copy of the state any more
    if (has_rows)
      scores.each([&](int i, int column, auto& run) {
        Vec<T, ScoreTile::kRun> weighted;
#pragma unroll
        for (int r = 0; r < ScoreTile::kRun; ++r) {
          const int j = column + r, distance = i - j;
          float score = 0;
          if (distance >= (a.strict ? 1 : 0)) {
            const float power = powers[distance], weight = score_weight[j];
            score = run[r] * (power * weight);
          }
          weighted[r] = from_float<T>(kDecay ? score * (distance * kUnit) : score);
        }
        scratch.store(i * kScorePitch + column, weighted);
      });
    const float factor = copy_factor;
    if (!last) copy_factor = copy_state();
    sync_block();
    if (!has_rows) continue;

    if constexpr (kDecay) {
      output[0].each([&](int i, int, auto& run) {
#pragma unroll
        for (int r = 0; r < OutputTile::kRun; ++r) run[r] *= (i + 1 - early) * kUnit;
      });
      output[0].accumulate(1, output[1]);
    }
    output[0].each([&](int i, int, auto& run) {
      const float power = powers[i + 1 - early], entering = a.entering_scale * power * factor;
#pragma unroll
      for (int r = 0; r < OutputTile::kRun; ++r) run[r] *= entering;
    });
#pragma unroll kUnroll
    for (int step = 0; step < kChunk; step += kStep) {
      if (step >= count || step >= OutputTile::triangle_depth()) break;
      output[0].add(OutputTile::left(scratch, kScorePitch, step), chunk_values, kPitch, step);
    }
    output[0].flush();

    float dot = 0;
    output[0].each([&](int i, int column, auto& run) {
      if (i >= count || column >= width) return;
      constexpr int kRun = OutputTile::kRun;
      const int inside = min(kRun, width - column);
      const float scale = !a.scales_values && row_scale != nullptr ? row_scale[(first + i) * direction] : 1.0f;
      if constexpr (kDecay) {
        const T* grad = grad_output + (first + i) * a.grad_output.row_stride + column * a.grad_output.column_stride;
        float sum = 0;
#pragma unroll
        for (int r = 0; r < kRun; ++r)
          if (r < inside) sum = fmaf(to_float(grad[r * a.grad_output.column_stride]), run[r], sum);
        dot = fmaf(scale, sum, dot);
        return;
      }
      if (a.partial != nullptr || a.added != nullptr) {
        const int64_t at = (plane * a.tokens + start + (first + i) * direction) * a.width + first_column + column;
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          if (r < inside && a.added != nullptr) run[r] += a.added[at + r];
          if (r < inside && a.partial != nullptr) a.partial[at + r] = run[r];
        }
        if (a.partial != nullptr) return;
      }
      Vec<T, kRun> rounded;
#pragma unroll
      for (int r = 0; r < kRun; ++r) rounded[r] = from_float<T>(run[r] * scale);
      T* to = output_origin + (first + i) * a.output.row_stride + column * a.output.column_stride;
      if (inside == kRun && a.output.column_stride == 1 && reinterpret_cast<uintptr_t>(to) % sizeof(rounded) == 0) {
        store_global(to, rounded);
      } else {
#pragma unroll
        for (int r = 0; r < kRun; ++r)
          if (r < inside) to[r * a.output.column_stride] = rounded[r];
      }
    });
    total += dot;
  }

  if (a.last.data != nullptr)
    each_of_state(0, [&](int row, int column, auto& run) {
#pragma unroll
      for (int r = 0; r < StateTile::kRun; ++r)
        if (row < a.depth && column + r < width) *state_at(a.last, row, column + r) = run[r];
    });
  if constexpr (kDecay) {
    if (a.grad_state.data != nullptr) {
      float dot = 0;
      each_of_state(1, [&](int row, int column, auto& run) {
#pragma unroll
        for (int r = 0; r < StateTile::kRun; ++r)
          if (row < a.depth && column + r < width) dot = fmaf(*state_at(a.grad_state, row, column + r), run[r], dot);
      });
      total += dot;
    }
    total = block_reduce(total, Sum(), warp_sums.template as<double>());
    if (thread_index() == 0) a.sums[(sequence * tiles + tile) * a.heads + head] = static_cast<float>(total * kChunk);
  }
}

template <class T, int kDepth, int kWidth, bool kDecay>
void launch_scan_of_shape(const Scan<T>& scan, cudaStream_t stream) {
  const int64_t blocks = scan.sequences * scan.heads * ceil_div(scan.width, kWidth);
  launch(retention_scan<T, kDepth, kWidth, kDecay>, dim3(static_cast<unsigned>(blocks)), dim3(kScanThreads),
      ScanShape<T, kDepth, kWidth, kDecay>::bytes(), stream, scan);
}

// Whether a block of this shape finds room, which depends on the chip: its results do not.
template <class T, int kDepth, int kWidth, bool kDecay>
bool scan_fits() {
  return ScanShape<T, kDepth, kWidth, kDecay>::bytes() <= shared_memory_limit();
}

}  // namespace effattn::cuda
