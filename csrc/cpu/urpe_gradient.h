// Gradients of the tables of urpe_policy.h: sums over their diagonals,
//
//   db[t] = sum dLogit[i][j],   dc[t] = sum P[i][j] (dO V^T)[i][j]      over batch and the pairs with j - i = t
//
//   1. per task (head, batch, chunk of keys), six rows of scores at a time while they are in L1: on a line one vector
//   of
//      diagonals is the sum of six vectors, each read one entry further on; on a grid every row adds its grid rows to
//      one of kCopies tables in turn, so that neighbours, one entry apart, do not wait for each other's stores
//
//   2. per task: its tables, in double
//
//   3. per head: the tasks in order
//
// so every bit is the same on any number of threads.
#pragma once

#include "backward.h"
#include "urpe_policy.h"

namespace effattn::EFFATTN_ISA {

struct RelativeSinkArguments {
  double* bias;         // [task][entry], null without a bias
  double* coefficient;  // the same
};

template <class Policy>
class RelativeSink {
  static constexpr int64_t kCopies = 4;
  static constexpr int64_t kBefore = 16;  // zeros before the first key of a row, as there are behind the last
  static constexpr int64_t kPitch = kTilePitch + 2 * kBefore;
  static_assert(kBefore >= kTileRows && kBefore >= kLanes);

 public:
  static constexpr bool kActive = true;
  static constexpr bool kStagesRows = true;

  RelativeSink(const Policy& policy, const RelativeSinkArguments& arguments)
      : arguments_(arguments),
        grid_(policy.grid()),
        copies_(grid_.is_line ? 1 : kCopies),
        copy_(round_up(grid_.entries, kLanes) + kKeyBlock) {
    static thread_local Buffer buffer;
    const int64_t each = kTileRows * kPitch + copies_ * copy_;
    float* memory = buffer.reserve<float>(2 * each);
    memset(memory, 0, 2 * each * sizeof(float));
    for (Diagonals* one : {&bias_, &coefficient_}) {
      one->rows = memory + kBefore;
      one->sums = memory + kTileRows * kPitch;
      memory += each;
    }
  }

  void begin(int64_t) {
    for (Diagonals* one : {&bias_, &coefficient_}) memset(one->sums, 0, copies_ * copy_ * sizeof(float));
  }

  EFFATTN_INLINE float* row(int64_t, int64_t staged_row) const {
    return arguments_.bias ? bias_.rows + staged_row * kPitch : nullptr;
  }
  EFFATTN_INLINE float* weights_row(int64_t, int64_t staged_row) const {
    return arguments_.coefficient ? coefficient_.rows + staged_row * kPitch : nullptr;
  }

  // Rows of keys key ... key + count, zero up to a whole vector.
  void fold(int64_t row, int64_t rows, int64_t key, int64_t count) {
    if (arguments_.bias) add(bias_, row, rows, key, count);
    if (arguments_.coefficient) add(coefficient_, row, rows, key, count);
  }

  void end(int64_t task) {
    if (arguments_.bias) write(arguments_.bias + task * grid_.entries, bias_);
    if (arguments_.coefficient) write(arguments_.coefficient + task * grid_.entries, coefficient_);
  }

 private:
  struct Diagonals {
    float* rows;
    float* sums;
  };

  __attribute__((noinline)) void add(const Diagonals& to, int64_t row, int64_t rows, int64_t key, int64_t count) {
    if (grid_.is_line)
      add_line(to, row, rows, key, count);
    else
      for (int64_t r = 0; r < rows; ++r) add_row(to, row + r, r, key, count);
  }

  void add_line(const Diagonals& to, int64_t row, int64_t rows, int64_t key, int64_t count) {
    const int64_t padded = round_up(count, kLanes);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kTileRows; c += kLanes) store(to.rows + r * kPitch + padded + c, Vec{});
    float* sums = to.sums + grid_.first_entry(row + rows - 1) + key;
    const float* last = to.rows + (rows - 1) * kPitch;
    if (rows == kTileRows) {
      for (int64_t u = 0; u < padded + kTileRows - 1; u += kLanes) {
        Vec even = load(sums + u), odd = {};
        EFFATTN_UNROLL for (int r = 0; r < kTileRows; r += 2) {
          even += load(last + u - r * (kPitch + 1));
          odd += load(last + u - (r + 1) * (kPitch + 1));
        }
        store(sums + u, even + odd);
      }
    } else {
      for (int64_t u = 0; u < padded + rows - 1; u += kLanes) {
        Vec sum = load(sums + u);
        for (int64_t r = 0; r < rows; ++r) sum += load(last + u - r * (kPitch + 1));
        store(sums + u, sum);
      }
    }
  }

  void add_row(const Diagonals& to, int64_t row, int64_t staged_row, int64_t key, int64_t count) {
    const int64_t w = grid_.w, x = key % w;
    const float* from = to.rows + staged_row * kPitch;
    float* sums = to.sums + row % kCopies * copy_ + grid_.first_entry(row) + key / w * grid_.columns + x;
    // Every other grid row: vectors of neighbours may overlap.
    const auto add_rows = [&](int64_t first) __attribute__((always_inline)) {
      for (int64_t run = first; run * w - x < count; run += 2) {
        const int64_t begin = larger(run * w - x, 0), end = smaller((run + 1) * w - x, count);
        float* at = sums + run * (grid_.columns - w);
        for (int64_t c = begin; c < end; c += kLanes) {
          const Vec live = select(first_lanes(end - c), load(from + c), Vec{});
          store(at + c, load(at + c) + live);
        }
      }
    };
    add_rows(0);
    add_rows(1);
  }

  void write(double* to, const Diagonals& from) const {
    for (int64_t i = 0; i < grid_.entries; ++i) {
      double sum = 0.0;
      for (int64_t copy = 0; copy < copies_; ++copy) sum += static_cast<double>(from.sums[copy * copy_ + i]);
      to[i] = sum;
    }
  }

  const RelativeSinkArguments& arguments_;
  const RelativeGrid& grid_;
  const int64_t copies_, copy_;
  Diagonals bias_, coefficient_;
};

// Third stage, for heads [begin, end).
struct RelativeReduction {
  const RelativeSinkArguments& sink;
  const RelativeGrad& gradient;
  int64_t entries, tasks_per_head;

  static void run(int64_t begin, int64_t end, void* context) {
    const RelativeReduction& r = *static_cast<const RelativeReduction*>(context);
    for (int64_t head = begin; head < end; ++head) {
      if (r.sink.bias) r.sum(r.sink.bias, r.gradient.bias, head);
      if (r.sink.coefficient) r.sum(r.sink.coefficient, r.gradient.coefficient, head);
    }
  }

  void sum(const double* tasks, float* to, int64_t head) const {
    for (int64_t i = 0; i < entries; ++i) {
      double total = 0.0;
      for (int64_t task = 0; task < tasks_per_head; ++task)
        total += tasks[(head * tasks_per_head + task) * entries + i];
      to[head * entries + i] = static_cast<float>(total);
    }
  }
};

}  // namespace effattn::EFFATTN_ISA
