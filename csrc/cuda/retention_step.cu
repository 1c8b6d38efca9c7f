// One token of recurrent retention:
//
//   S = gamma S_old + k^T v,    o = s q S,    gamma = exp(log_decay)
//
// Bound by the memory of the state: 2 Dk Dv floats for each (b, h), read once and written once, for 5 Dk Dv FLOPs.
// A block has a tile of columns of one (b, h). Its threads lie as rows x groups of 4 columns (1 where rows of the state
// are not aligned), so that a warp reads and writes one stretch of memory; each goes down its column with kAhead loads
// under way, and holds 4 sums of o in registers. s q and k lie in shared memory (2 Dk floats), and at the end the sums
// of the rows of threads, which are added in order. S may lie where S_old does: a thread writes what it alone reads.
//
// gamma S + k v is S + expm1(log_decay) S + k v: a gamma near 1, rounded, would err the same way at every token.
#include "tile.h"

namespace effattn::cuda {
namespace {

inline constexpr int kStepThreads = 256, kAhead = 8, kLeastWidth = 32;  // a line of memory

template <class T, int kVector>
__global__ void __launch_bounds__(kStepThreads)
    step_kernel(Planes<T> query, Planes<T> key, Planes<T> value, const float* log_decay, const float* state, int depth,
        int width, int tile_width, float scale, ResultPlanes<T> output, float* new_state) {
  SharedMemory shared;
  const auto queries = shared.array<float>(depth);
  const auto keys = shared.array<float>(depth);
  const auto sums = shared.array<float>(kStepThreads * kVector);

  const int64_t tiles = (width + tile_width - 1) / tile_width, plane = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * tile_width, columns = min(tile_width, width - first);
  for (int d = thread_index(); d < depth; d += kStepThreads) {
    queries[d] = scale * to_float(query.plane(plane)[d * query.column_stride]);
    keys[d] = to_float(key.plane(plane)[d * key.column_stride]);
  }
  sync_block();

  const int groups = columns / kVector, rows = kStepThreads / groups;
  const int y = thread_index() / groups, column = first + thread_index() % groups * kVector;
  Vec<float, kVector> v = {}, sum = {};
  if (y < rows) {
    const float decay = expm1f(log_decay[plane % query.heads]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(value.plane(plane)[(column + i) * value.column_stride]);
    const int64_t start = plane * depth * width + column;
    for (int d = y; d < depth; d += rows * kAhead) {
      Vec<float, kVector> old[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (d + i * rows < depth)
          old[i] = load_global<kVector>(state + start + static_cast<int64_t>(d + i * rows) * width);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = d + i * rows;
        if (row >= depth) break;
        const float q = queries[row], k = keys[row];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          old[i][j] = fmaf(k, v[j], fmaf(decay, old[i][j], old[i][j]));
          sum[j] = fmaf(q, old[i][j], sum[j]);
        }
        store_global(new_state + start + static_cast<int64_t>(row) * width, old[i]);
      }
    }
    sums.store(thread_index() * kVector, sum);
  }
  sync_block();
  for (int c = thread_index(); c < columns; c += kStepThreads) {
    float total = 0;
    for (int i = 0; i < rows; ++i) {
      const float next = sums[i * columns + c];
      total += next;
    }
    *output.at(plane, 0, first + c) = from_float<T>(total);
  }
}

}  // namespace

void retention_step(const RetentionStep& a, void* stream_pointer) {
  const int64_t planes = a.query.size[0] * a.query.size[1];
  const int depth = static_cast<int>(a.query.size[3]), width = static_cast<int>(a.value.size[3]);
  const bool aligned = width % 4 == 0 && reinterpret_cast<uintptr_t>(a.state) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.new_state) % 16 == 0;
  const int vector = aligned ? 4 : 1;
  int tile = static_cast<int>(ceil_div(width, kLeastWidth) * kLeastWidth);
  while (tile > kStepThreads * vector || (tile > kLeastWidth && planes * ceil_div(width, tile) < 2 * kEnoughBlocks))
    tile = static_cast<int>(ceil_div(tile / 2, kLeastWidth) * kLeastWidth);
  const dim3 grid(static_cast<unsigned>(planes * ceil_div(width, tile)));
  const size_t shared = 2 * shared_bytes<float>(depth) + shared_bytes<float>(kStepThreads * vector);

  with_element_type(a.query.dtype, [&](auto element) {
    using T = decltype(element);
    launch(aligned ? step_kernel<T, 4> : step_kernel<T, 1>, grid, dim3(kStepThreads), shared,
        static_cast<cudaStream_t>(stream_pointer), planes_of<T>(a.query), planes_of<T>(a.key), planes_of<T>(a.value),
        a.log_decay, a.state, depth, width, tile, a.scale, result_planes_of<T>(a.output), a.new_state);
  });
}

}  // namespace effattn::cuda
