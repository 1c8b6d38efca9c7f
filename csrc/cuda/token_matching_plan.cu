// The plan of bipartite matching, from the best b of every a (token_matching.cu), by counting: a row's rank is the
// number of larger keys, its place within its output the number of earlier rows that merge into the same b.
//
//   rank_kernel    A thread has a row of a; a block of 512 stages the image's keys in shared memory, 512 at a time.
//   group_kernel   The same with the partners of rows that merge; a thread has a row of a and one of b.
//   place_kernel   A block an image: prefix sums of kept rows and of merged ones, 512 rows at a time, give the offsets.
//
// Up to 512 rows of a place_kernel does all three. |a|^2 comparisons of 64 bits, 3 |a|^2 of 32. Bytes: keys and
// partners once for every 512 rows, from L2, the plan once.
#include "token_matching.h"

namespace effattn::cuda {
namespace {

using Extent = MatchingExtent;
using Scratch = MatchingScratch;
using Plan = MatchingPlan;

constexpr int kPlanThreads = 512;

// Calls function(index, element) for all elements of an array in order; a block does so together.
template <class T, class Function>
EFFATTN_DEVICE void for_each_staged(SharedArray<T> tile, const T* array, int64_t count, Function function) {
  for (int64_t first = 0; first < count; first += kPlanThreads) {
    const int here = static_cast<int>(min(count - first, int64_t{kPlanThreads}));
    sync_block();
    if (thread_index() < here) tile[thread_index()] = array[first + thread_index()];
    sync_block();
#pragma unroll 4
    for (int i = 0; i < here; ++i) {
      const T element = tile[i];
      function(first + i, element);
    }
  }
}

// Of row `row` of a, which may lie behind the last.
EFFATTN_DEVICE void rank_row(
    SharedArray<int64_t> tile, const Extent& extent, const Scratch& scratch, int64_t image, int64_t row) {
  const int64_t* const keys = scratch.keys + image * extent.firsts;
  const int64_t key = keys[min(row, extent.firsts - 1)], level = level_of(key), own = key_of(level, row);
  int32_t rank = 0;
  for_each_staged(tile, keys, extent.firsts,
      [&](int64_t other, int64_t element) { rank += key_of(level_of(element), other) > own; });
  if (row >= extent.firsts) return;
  const bool merged = rank < extent.num_merged && level >= extent.least;
  scratch.ranks[image * extent.firsts + row] = rank;
  scratch.partner[image * extent.firsts + row] = merged ? static_cast<int32_t>(index_of(key)) : -1;
}

// Of row `row` of a and of b, both of which may lie behind the last.
EFFATTN_DEVICE void group_row(
    SharedArray<int32_t> tile, const Extent& extent, const Scratch& scratch, int64_t image, int64_t row) {
  const int32_t* const partners = scratch.partner + image * extent.firsts;
  const int32_t own = partners[min(row, extent.firsts - 1)];
  int32_t earlier = 0, merging = 0, before = 0;
  for_each_staged(tile, partners, extent.firsts, [&](int64_t other, int32_t partner) {
    earlier += partner == own && other < row;
    merging += partner == row;
    before += partner == row && other <= row;  // token 2 other stands before token 2 row + 1
  });
  if (row < extent.firsts) scratch.earlier[image * extent.firsts + row] = earlier;
  if (row < extent.seconds) {
    scratch.merging[image * extent.seconds + row] = merging;
    scratch.before[image * extent.seconds + row] = before;
  }
}

// The sum over the threads before this one, and over all; `scratch` has an element per warp.
EFFATTN_DEVICE int64_t sum_before(int64_t value, int64_t& total, SharedArray<int64_t> scratch) {
  int64_t sum = value;
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int64_t lower = shuffle_up(sum, delta);
    if (lane_index() >= delta) sum += lower;
  }
  if (lane_index() == kWarp - 1) scratch[warp_index()] = sum;
  sync_block();
  int64_t before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < kPlanThreads / kWarp; ++warp) {
    const int64_t part = scratch[warp];
    if (warp < warp_index()) before += part;
    total += part;
  }
  sync_block();
  return before + sum - value;
}

EFFATTN_DEVICE void place_rows(
    SharedArray<int64_t> sums, const Extent& extent, const Scratch& scratch, int64_t image, const Plan& plan) {
  const int32_t* const ranks = scratch.ranks + image * extent.firsts;
  const int32_t* const partners = scratch.partner + image * extent.firsts;
  const int32_t* const earlier = scratch.earlier + image * extent.firsts;
  const int32_t* const merging = scratch.merging + image * extent.seconds;
  const int32_t* const before = scratch.before + image * extent.seconds;
  int32_t* const source = plan.source + image * extent.tokens;
  int32_t* const members = plan.members + image * extent.tokens;
  int32_t* const offsets = plan.offsets + image * (extent.outputs + 1);

  int64_t merged = 0;
  for (int64_t row = thread_index(); row < extent.firsts; row += kPlanThreads) merged += partners[row] >= 0;
  merged = block_reduce(merged, Sum(), sums);
  const int64_t kept = extent.firsts - merged;
  const int64_t leading = extent.distill_token ? merging[0] : 0;  // rows that merge into output 1
  const auto own_output = [&](int64_t second) { return extent.distill_token && second == 0 ? 1 : kept + second; };

  // Rows of a that are kept, and b: each row's carry holds the kept rows before it and, 2^32 up, the merged ones.
  int64_t carry = 0;
  for (int64_t first = 0; first < extent.firsts; first += kPlanThreads) {
    const int64_t row = first + thread_index();
    const bool is_kept = row < extent.firsts && partners[row] < 0;
    const int64_t count = row < extent.seconds ? merging[row] : 0;
    int64_t total;
    const int64_t sum = carry + sum_before(count << 32 | static_cast<int64_t>(is_kept), total, sums);
    carry += total;
    if (is_kept) {
      int64_t output = extent.keeps_order ? sum & 0xffffffff : ranks[row] - merged, place = output;
      if (extent.distill_token && output > 0) {
        output += 1;
        place += 1 + leading;
      }
      source[2 * row] = static_cast<int32_t>(output);
      offsets[output] = static_cast<int32_t>(place);
      members[place] = static_cast<int32_t>(2 * row);
    }
    if (row < extent.seconds) {
      const int64_t output = own_output(row);
      const int64_t place = output == 1 && extent.distill_token ? 1 : kept + row + (sum >> 32);
      source[2 * row + 1] = static_cast<int32_t>(output);
      offsets[output] = static_cast<int32_t>(place);
      members[place + before[row]] = static_cast<int32_t>(2 * row + 1);
    }
  }
  for (int64_t output = extent.tokens - merged + thread_index(); output <= extent.outputs; output += kPlanThreads)
    offsets[output] = static_cast<int32_t>(extent.tokens);
  sync_block();

  for (int64_t row = thread_index(); row < extent.firsts; row += kPlanThreads) {
    const int64_t partner = partners[row];
    if (partner < 0) continue;
    const int64_t output = own_output(partner);
    source[2 * row] = static_cast<int32_t>(output);
    members[offsets[output] + earlier[row] + (partner < row)] = static_cast<int32_t>(2 * row);
  }
}

__global__ void __launch_bounds__(kPlanThreads) rank_kernel(Extent extent, Scratch scratch, unsigned tiles) {
  SharedMemory shared;
  rank_row(shared.array<int64_t>(kPlanThreads), extent, scratch, blockIdx.x / tiles,
      static_cast<int64_t>(blockIdx.x % tiles) * kPlanThreads + thread_index());
}

__global__ void __launch_bounds__(kPlanThreads) group_kernel(Extent extent, Scratch scratch, unsigned tiles) {
  SharedMemory shared;
  group_row(shared.array<int32_t>(kPlanThreads), extent, scratch, blockIdx.x / tiles,
      static_cast<int64_t>(blockIdx.x % tiles) * kPlanThreads + thread_index());
}

// A block an image; `alone`: it ranks and groups too.
__global__ void __launch_bounds__(kPlanThreads) place_kernel(Extent extent, Scratch scratch, Plan plan, bool alone) {
  SharedMemory shared;
  const auto keys = shared.array<int64_t>(kPlanThreads), sums = shared.array<int64_t>(kPlanThreads / kWarp);
  const auto partners = shared.array<int32_t>(kPlanThreads);
  if (alone) {
    rank_row(keys, extent, scratch, blockIdx.x, thread_index());
    sync_block();
    group_row(partners, extent, scratch, blockIdx.x, thread_index());
    sync_block();
  }
  place_rows(sums, extent, scratch, blockIdx.x, plan);
}

}  // namespace

void launch_matching_plan(const Extent& extent, const Scratch& scratch, const Plan& plan, cudaStream_t stream) {
  const int64_t tiles = ceil_div(extent.firsts, kPlanThreads);
  const size_t keys = shared_bytes<int64_t>(kPlanThreads), partners = shared_bytes<int32_t>(kPlanThreads);
  const size_t sums = shared_bytes<int64_t>(kPlanThreads / kWarp);
  const bool alone = tiles == 1;
  if (!alone) {
    const dim3 blocks(static_cast<unsigned>(extent.batch * tiles));
    launch(rank_kernel, blocks, dim3(kPlanThreads), keys, stream, extent, scratch, static_cast<unsigned>(tiles));
    launch(group_kernel, blocks, dim3(kPlanThreads), partners, stream, extent, scratch, static_cast<unsigned>(tiles));
  }
  launch(place_kernel, dim3(static_cast<unsigned>(extent.batch)), dim3(kPlanThreads), keys + partners + sums, stream,
      extent, scratch, plan, alone);
}

}  // namespace effattn::cuda
