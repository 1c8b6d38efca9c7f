// y = softmax(x) over each row, a block per row: reductions through warps and shared memory. With a bug to choose.
#include "call.h"

using namespace effattn::cuda;

enum Bug {
  kNone,
  kUnorderedRead,
  kUnorderedWrite,
  kDivergentBarrier,
  kEarlyExit,
  kMissingLane,
  kDivergentCollective,
  kSharedOverrun,
  kSharedUnderrun,
  kGlobalRead,
  kGlobalWrite,
  kUnwritten,
  kCarvedTooMuch,
  kMisaligned,
};

template <int kBug>
__global__ void __launch_bounds__(128) softmax(const float* x, float* y, int columns) {
  SharedMemory shared;
  auto partial = shared.array<float>(block_threads() / kWarp);
  auto row = shared.array<float>(kBug == kCarvedTooMuch ? columns + 4 : columns);
  const float* from = x + static_cast<size_t>(blockIdx.x) * columns;
  float* to = y + static_cast<size_t>(blockIdx.x) * columns;

  if (kBug == kEarlyExit && thread_index() == 77) return;

  float largest = -INFINITY;
  for (int i = thread_index(); i < columns; i += block_threads()) {
    const float value = from[kBug == kGlobalRead ? i + 1 : i];
    if (kBug != kUnwritten || i != columns / 2) row[kBug == kSharedOverrun ? i + 1 : i] = value;
    largest = fmaxf(largest, value);
  }
  if (kBug == kSharedUnderrun && thread_index() == 5) row[-1] = largest;
  if (kBug == kMisaligned && thread_index() == 0) row.store(1, Vec<float, 2>{});

  if (kBug == kMissingLane) {
    if (lane_index() != 13) largest = warp_reduce(largest, Max());
  } else if (kBug == kDivergentCollective) {
    largest = lane_index() < 16 ? shuffle_xor(largest, 1) : shuffle_down(largest, 1);
  } else {
    largest = warp_reduce(largest, Max());
  }
  if (lane_index() == 0) partial[warp_index()] = largest;
  if (kBug == kDivergentBarrier && warp_index() == 1)
    sync_block();
  else if (kBug != kUnorderedRead)
    sync_block();  // what the kernel should have
  for (int warp = 0; warp < block_threads() / kWarp; ++warp) {
    const float other = partial[warp];
    largest = fmaxf(largest, other);
  }
  if (kBug != kUnorderedWrite) sync_block();

  float sum = 0;
  for (int i = (thread_index() + 64) % 128; i < columns; i += block_threads()) {  // not what this thread wrote
    const float weight = exp2_approx((row[i] - largest) * 1.44269504f);
    row[i] = weight;
    sum += weight;
  }
  sum = block_reduce(sum, Sum(), partial);
  for (int i = thread_index(); i < columns; i += block_threads()) {
    const float weight = row[i];
    to[kBug == kGlobalWrite ? i + 1 : i] = divide_rn(weight, sum);
  }
}

template <int kBug>
void launch_softmax(int bug, const float* x, float* y, int rows, int columns) {
  if (bug == kBug)
    launch(softmax<kBug>, rows, 128, shared_bytes<float>(4) + shared_bytes<float>(columns), nullptr, x, y, columns);
  else if constexpr (kBug > 0)
    launch_softmax<kBug - 1>(bug, x, y, rows, columns);
}

EXPORTED const char* effattn_softmax(int bug, const float* x, float* y, int rows, int columns) {
  return message_of([=] { launch_softmax<kMisaligned>(bug, x, y, rows, columns); });
}
