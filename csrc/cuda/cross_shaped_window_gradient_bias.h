// The gradient of the bias table: dS summed over the pairs of a query and a key at one difference, over windows and
// batch.
//
// Slots are row-major, so pairs at one difference (dy, dx) lie on the diagonal key - query = dy width + dx of dS. Two
// differences share a diagonal: dx >= 0, and dx - width < 0 in the next row. A warp therefore adds up the diagonals of
// its 16 queries, those with the key left of its query apart. 16 x 32 of dS go through shared memory, where a lane has
// a diagonal and reads one row after the other, so that no two lanes add to one sum: 16 loads for 16 elements, in an
// order that depends on nothing. A block adds the diagonals of its warps to entries of the table at its end.
#pragma once

#include "cross_shaped_window.h"

namespace effattn::cuda {

class BiasSums {
  static constexpr int kColumns = kWarp, kPitch = kColumns + 8;  // four rows of a store lie in different banks

 public:
  // Of shared memory, for a warp.
  __host__ __device__ static constexpr int floats(int slots) { return kWarpRows * kPitch + 2 * diagonals(slots); }

  // first_query: the first slot of this warp. Without `wanted` an object that is not used.
  EFFATTN_DEVICE BiasSums(SharedArray<float> shared, const WindowHalf& half, int first_query, bool wanted = true)
      : half_(half),
        sums_(shared.from(kWarpRows * kPitch)),
        tile_(shared.from(warp_index() * floats(half.slots()))),
        mine_(sums_.from(warp_index() * floats(half.slots()))),
        first_query_(first_query) {
    if (!wanted) return;
    for (int i = lane_index(); i < 2 * diagonals(half.slots()); i += kWarp) mine_[i] = 0;
  }

  // The sums of the blocks kFirst .. kFirst + 3 of 8 columns, whose keys begin at slot `key`; zeros past the last slot.
  template <int kFirst, int kBlocks>
  EFFATTN_DEVICE void add(const float (&ds)[kBlocks][4], int key) const {
    const int lane = lane_index(), width = half_.width;
    sync_warp();  // the tile before has been read
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        tile_.store((lane / 4 + 8 * i) * kPitch + n * 8 + lane % 4 * 2,
            Vec<float, 2>{ds[kFirst + n][2 * i], ds[kFirst + n][2 * i + 1]});
    sync_warp();
    // columns lane, lane + 1 .. of the rows, past the last column the first: there the diagonal is kColumns before
    const int difference = key - first_query_ + lane + kColumns * half_.slots();  // 0 or more, the same modulo width
    const int steps = half_.by_width.remainder(difference);
    const int steps_before = half_.by_width.remainder(difference - kColumns + kColumns * half_.slots());
    int query_x = half_.by_width.remainder(first_query_);
    float right = 0, left = 0, right_before = 0, left_before = 0;  // of the query
#pragma unroll 4
    for (int row = 0; row < kWarpRows; ++row) {
      const bool before = lane + row >= kColumns;
      const float value = tile_[row * kPitch + (lane + row) % kColumns];
      const bool is_left = query_x + (before ? steps_before : steps) >= width;
      if (before)
        (is_left ? left_before : right_before) += value;
      else
        (is_left ? left : right) += value;
      if (++query_x == width) query_x = 0;
    }
    const int at = key + lane + kWarpRows - 1;
    add_to(at, right, left);
    if (lane + kWarpRows > kColumns) add_to(at - kColumns, right_before, left_before);
  }

  // The sums of a block, (2 height - 1, 2 width - 1), in the order of its warps. Warp w has the slots from
  // first_query + w % team kWarpRows on.
  EFFATTN_DEVICE void write(float* to, int first_query, int warps, int team) const {
    const int columns = bias_columns(half_), length = diagonals(half_.slots());
    sync_block();
    for (int i = thread_index(); i < half_.bias_entries(); i += block_threads()) {
      const int dx = i % columns - half_.width + 1, dy = i / columns - half_.height + 1;
      float total = 0;
      for (int warp = 0; warp < warps; ++warp) {
        const int at = dy * half_.width + dx + first_query + (warp % team + 1) * kWarpRows - 1;
        if (at >= 0 && at < length) total += sums_[warp * floats(half_.slots()) + (dx < 0 ? length : 0) + at];
      }
      to[i] = total;
    }
  }

 private:
  // Those of 16 queries and all keys, rounded up to kColumns.
  __host__ __device__ static constexpr int diagonals(int slots) {
    return (slots + kColumns - 1) / kColumns * kColumns + kWarpRows;
  }
  EFFATTN_DEVICE void add_to(int at, float right, float left) const {
    const int left_at = diagonals(half_.slots()) + at;
    const float right_sum = mine_[at], left_sum = mine_[left_at];
    mine_[at] = right_sum + right;
    mine_[left_at] = left_sum + left;
  }

  const WindowHalf& half_;
  SharedArray<float> sums_, tile_, mine_;
  int first_query_;
};

}  // namespace effattn::cuda
