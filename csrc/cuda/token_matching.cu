// Bipartite soft matching (reference/token_merging.py). Tokens 0, 2, 4.. are a, the others b:
//
//   s_ij = a_i . b_j / (|a_i| |b_j|),  best_i = max_j s_ij at the first j that attains it,  the best r of all i merge
//
// decided by the similarities of exact arithmetic, rounded to multiples of 2^-40: as int64, level * 2^20 + (2^20 - 1 -
// j) makes a row's decision an integer maximum, and with i in place of j the order of the rows. Protected, absent and
// NaN similarities have levels below all others.
//
//   unit_kernel    A warp has a token: 1 / |x| in double, x / |x| as floats to scratch, rows padded to 16 bytes.
//   score_kernel   A block of 128 threads has 32 rows of a and goes through b, 64 at a time: 4 x 4 products a thread,
//                  fp32, over steps of 32 of the depth in two stages of shared memory (27 KB). An fp32 product f of
//                  unit rows errs by less than e (see `margin`), so whatever may attain the row's maximum has f >=
//                  (largest f so far) - 2 e. Such candidates, about one a row and tile of columns that beats the tiles
//                  before, are evaluated in double from the input by the 16 lanes that share the row. No similarity is
//                  written.
//   the plan       By counting, in token_matching_plan.cu.
//
// FLOPs 2 |a| |b| d in fp32, 2 N d and a few 2 |a| d in double. Bytes: the metric once for the units, which L2 then
// serves: b once for every 32 rows of a.
#include "token_matching.h"

namespace effattn::cuda {
namespace {

using Extent = MatchingExtent;
using Scratch = MatchingScratch;

int64_t level_of_threshold(double threshold) {
  return threshold < -1 ? INT64_MIN : static_cast<int64_t>(nearbyint(threshold * static_cast<double>(kSteps)));
}

Extent extent_of(const TokenMatching& a) {
  Extent e = {};
  e.batch = a.metric.size[0];
  e.tokens = a.metric.size[2];
  e.firsts = (e.tokens + 1) / 2;
  e.seconds = e.tokens / 2;
  e.depth = a.metric.size[3];
  e.pitch = ceil_div(e.depth, 4) * 4;
  e.num_merged = a.num_merged;
  e.protected_firsts = (a.num_protected + 1) / 2;
  e.protected_seconds = max(a.num_protected / 2, static_cast<int64_t>(a.distill_token));
  e.least = level_of_threshold(a.threshold);
  e.outputs = a.outputs;
  e.keeps_order = a.num_protected > 0;
  e.distill_token = a.distill_token;
  e.sizes = a.sizes;
  return e;
}

// The scratch memory that begins at `memory`; at the end `memory` is where it ends.
Scratch scratch_of(const Extent& e, uintptr_t& memory) {
  const auto take = [&](auto* array, int64_t count) {
    array = reinterpret_cast<decltype(array)>(memory);
    memory += ceil_div(count * sizeof(*array), 16) * 16;
    return array;
  };
  Scratch s = {};
  s.unit = take(s.unit, e.batch * e.tokens * e.pitch);
  s.inverse = take(s.inverse, e.batch * e.tokens);
  s.keys = take(s.keys, e.batch * e.firsts);
  s.kinds = take(s.kinds, e.batch * e.tokens);
  s.ranks = take(s.ranks, e.batch * e.firsts);
  s.partner = take(s.partner, e.batch * e.firsts);
  s.earlier = take(s.earlier, e.batch * e.firsts);
  s.merging = take(s.merging, e.batch * e.seconds);
  s.before = take(s.before, e.batch * e.seconds);
  return s;
}

// ---- Unit rows -----------------------------------------------------------------------------------------------------

constexpr int kUnitWarps = 8;

template <class T>
__global__ void __launch_bounds__(kUnitWarps* kWarp)
    unit_kernel(Planes<T> metric, Extent extent, Scratch scratch, unsigned blocks_per_image) {
  const int64_t image = blockIdx.x / blocks_per_image;
  const int64_t token = static_cast<int64_t>(blockIdx.x % blocks_per_image) * kUnitWarps + warp_index();
  if (token >= extent.tokens) return;
  const T* const from = metric.data + image * metric.batch_stride + token * metric.row_stride;
  double squares = 0;
  for (int64_t k = lane_index(); k < extent.depth; k += kWarp) {
    const double element = to_float(from[k * metric.column_stride]);
    squares += element * element;
  }
  squares = warp_reduce(squares, Sum());
  const bool finite = squares < INFINITY;
  const double inverse = finite && squares > 0 ? 1 / sqrt(squares) : 0.0;

  const int64_t place = image * extent.tokens + extent.place(token);
  float* const unit = scratch.unit + place * extent.pitch;
  for (int64_t k = lane_index(); k < extent.pitch; k += kWarp) {
    const float element = finite && k < extent.depth ? to_float(from[k * metric.column_stride]) : 0.0f;
    unit[k] = static_cast<float>(element * inverse);
  }
  if (lane_index() != 0) return;
  const bool present = extent.sizes == nullptr || extent.sizes[image * extent.tokens + token] > 0;
  const int64_t protected_tokens = token % 2 == 0 ? extent.protected_firsts : extent.protected_seconds;
  scratch.inverse[place] = inverse;
  scratch.kinds[place] = token / 2 < protected_tokens ? kProtected : !present ? kAbsent : !finite ? kNotANumber : 0;
}

// ---- The best b of every a -----------------------------------------------------------------------------------------

constexpr int kRows = 32, kColumns = 64, kDepth = 32, kPitch = kDepth + 4;  // 16 bytes off: different banks
constexpr int kThreads = 128, kLanes = 16;                                  // kLanes share a row
constexpr int kOwnRows = kRows / (kThreads / kLanes), kOwnColumns = kColumns / kLanes;

// 2 e, so that a product of unit rows in fp32 that lies lower than the largest by more cannot be of the largest
// similarity. With u = 2^-24: elements of unit rows err by u of themselves, the sum in fp32 by d u / (1 - d u) of the
// sum of magnitudes, which is at most 1 + 2 u. The 8 covers that, the double's and the level's rounding, and the
// subtraction.
float margin(int64_t depth) {
  const double part = static_cast<double>(depth + 8) * 0x1p-24;
  return part < 0.25 ? static_cast<float>(2.001 * part / (1 - part)) : INFINITY;
}

// Starts to fill a tile with `Count` unit rows, steps k.. of the depth.
template <int Count>
EFFATTN_DEVICE void fill_units(
    SharedArray<float> tile, const float* units, int64_t first, int64_t rows, int64_t k, int64_t pitch) {
  constexpr int kPerRow = kDepth / 4;
#pragma unroll
  for (int i = thread_index(); i < Count * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * 4;
    const bool valid = first + row < rows && k + column < pitch;
    cp_async16(tile, row * kPitch + column, valid ? units + (first + row) * pitch + k + column : units, valid);
  }
}

EFFATTN_DEVICE int row_of(int i) { return thread_index() / kLanes + i * (kThreads / kLanes); }
EFFATTN_DEVICE int column_of(int j) { return thread_index() % kLanes + j * kLanes; }

EFFATTN_DEVICE void multiply(
    float (&product)[kOwnRows][kOwnColumns], SharedArray<float> left, SharedArray<float> right) {
#pragma unroll 1
  for (int k = 0; k < kDepth; k += 4) {
    Vec<float, 4> a[kOwnRows], b[kOwnColumns];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) a[i] = left.load<4>(row_of(i) * kPitch + k);
#pragma unroll
    for (int j = 0; j < kOwnColumns; ++j) b[j] = right.load<4>(column_of(j) * kPitch + k);
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) product[i][j] = fmaf(a[i][step], b[j][step], product[i][j]);
  }
}

// The rows of one thread, and what is known of them.
template <class T>
struct Search {
  const Planes<T>& metric;
  const Extent& extent;
  const T* origin;        // of the image
  const double* inverse;  // of the image
  const int32_t* kinds;
  int64_t first;  // row
  float twice_error;
  int64_t key[kOwnRows];    // of the best so far that this thread knows
  float highest[kOwnRows];  // fp32 product of the row so far, the same in its kLanes lanes
  int32_t kind[kOwnRows];

  EFFATTN_DEVICE const T* element(int64_t token, int64_t k) const {
    return origin + token * metric.row_stride + k * metric.column_stride;
  }

  // Bit c: the similarity of row i and column c of the tile must be known exactly.
  EFFATTN_DEVICE uint64_t candidates_of(
      float (&product)[kOwnColumns], int i, const int32_t (&column_kind)[kOwnColumns], int64_t first_column) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kOwnColumns; ++j) {
      const int32_t lower = min(kind[i], column_kind[j]);
      if (lower < 0) {
        product[j] = -INFINITY;
        if (lower > kOutside) key[i] = max(key[i], key_of(lower * kSteps, first_column + column_of(j)));
      }
      largest = max(largest, product[j]);
    }
    highest[i] = max(highest[i], warp_reduce<kLanes>(largest, Max()));
    const float bound = highest[i] - twice_error;
    uint64_t candidates = 0;
#pragma unroll
    for (int j = 0; j < kOwnColumns; ++j) {
      const uint32_t votes = warp_ballot(product[j] > -INFINITY && product[j] >= bound);
      candidates |= static_cast<uint64_t>(votes >> lane_index() / kLanes * kLanes & 0xffffu) << (j * kLanes);
    }
    return candidates;
  }

  EFFATTN_DEVICE void take(float (&product)[kOwnRows][kOwnColumns], int64_t first_column) {
    static_assert(kColumns == 64 && 2 * kLanes == kWarp);
    int32_t column_kind[kOwnColumns];
#pragma unroll
    for (int j = 0; j < kOwnColumns; ++j) {
      const int64_t column = first_column + column_of(j);
      column_kind[j] = column < extent.seconds ? kinds[extent.firsts + column] : kOutside;
    }
    uint64_t candidates[kOwnRows], any = 0;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) any |= candidates[i] = candidates_of(product[i], i, column_kind, first_column);
    while (warp_any(any != 0)) {  // one of each row
      int64_t column[kOwnRows];
      double sum[kOwnRows] = {};
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) column[i] = candidates[i] == 0 ? -1 : first_column + lowest_bit(candidates[i]);
#pragma unroll 2
      for (int64_t k = thread_index() % kLanes; k < extent.depth; k += kLanes) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          if (column[i] < 0) continue;
          const double a = to_float(*element(2 * (first + row_of(i)), k));
          const double b = to_float(*element(2 * column[i] + 1, k));
          sum[i] += a * b;
        }
      }
      any = 0;
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const double dot = warp_reduce<kLanes>(sum[i], Sum());
        if (column[i] >= 0) {
          const double similarity = dot * inverse[first + row_of(i)] * inverse[extent.firsts + column[i]];
          const int64_t level = round_to_integer(similarity * static_cast<double>(kSteps));
          key[i] = max(key[i], key_of(level, column[i]));
        }
        candidates[i] &= candidates[i] - 1;
        any |= candidates[i];
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    score_kernel(Planes<T> metric, Extent extent, Scratch scratch, unsigned row_tiles, float twice_error) {
  SharedMemory shared;
  const auto left = shared.array<float>(2 * kRows * kPitch), right = shared.array<float>(2 * kColumns * kPitch);
  const int64_t image = blockIdx.x / row_tiles, first = static_cast<int64_t>(blockIdx.x % row_tiles) * kRows;
  const float* const a = scratch.unit + image * extent.tokens * extent.pitch;
  const float* const b = a + extent.firsts * extent.pitch;

  Search<T> search = {metric, extent, metric.data + image * metric.batch_stride,
      scratch.inverse + image * extent.tokens, scratch.kinds + image * extent.tokens, first, twice_error, {}, {}, {}};
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    search.key[i] = INT64_MIN;
    search.highest[i] = -INFINITY;
    search.kind[i] = first + row_of(i) < extent.firsts ? search.kinds[first + row_of(i)] : kOutside;
  }

  const auto fill = [&](int stage, int64_t column, int64_t k) {
    if (column < extent.seconds) {
      fill_units<kRows>(left.from(stage * kRows * kPitch), a, first, extent.firsts, k, extent.pitch);
      fill_units<kColumns>(right.from(stage * kColumns * kPitch), b, column, extent.seconds, k, extent.pitch);
    }
    cp_async_commit();
  };
  fill(0, 0, 0);
  int stage = 0;
  for (int64_t column = 0; column < extent.seconds; column += kColumns) {
    float product[kOwnRows][kOwnColumns] = {};
    for (int64_t k = 0; k < extent.depth; k += kDepth) {
      if (k + kDepth < extent.depth)
        fill(1 - stage, column, k + kDepth);
      else
        fill(1 - stage, column + kColumns, 0);
      cp_async_wait<1>();
      sync_block();
      multiply(product, left.from(stage * kRows * kPitch), right.from(stage * kColumns * kPitch));
      sync_block();
      stage = 1 - stage;
    }
    search.take(product, column);
  }
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const int64_t key = warp_reduce<kLanes>(search.key[i], Max());
    const int64_t row = first + row_of(i);
    if (thread_index() % kLanes == 0 && row < extent.firsts) scratch.keys[image * extent.firsts + row] = key;
  }
}

}  // namespace

int64_t bipartite_match_workspace(const TokenMatching& a) {
  uintptr_t end = 0;
  scratch_of(extent_of(a), end);
  return static_cast<int64_t>(end);
}

void bipartite_match(const TokenMatching& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const Extent extent = extent_of(a);
  uintptr_t memory = reinterpret_cast<uintptr_t>(workspace);
  const Scratch scratch = scratch_of(extent, memory);
  const auto blocks = [&](int64_t an_image) { return dim3(static_cast<unsigned>(extent.batch * an_image)); };
  const unsigned unit_blocks = static_cast<unsigned>(ceil_div(extent.tokens, kUnitWarps));
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(extent.firsts, kRows));
  with_element_type(a.metric.dtype, [&](auto element) {
    using T = decltype(element);
    launch(unit_kernel<T>, blocks(unit_blocks), dim3(kUnitWarps * kWarp), 0, stream, planes_of<T>(a.metric), extent,
        scratch, unit_blocks);
    launch(score_kernel<T>, blocks(row_tiles), dim3(kThreads),
        shared_bytes<float>(2 * kRows * kPitch) + shared_bytes<float>(2 * kColumns * kPitch), stream,
        planes_of<T>(a.metric), extent, scratch, row_tiles, margin(extent.depth));
  });
  launch_matching_plan(extent, scratch, {a.source, a.members, a.offsets}, stream);
}

}  // namespace effattn::cuda
