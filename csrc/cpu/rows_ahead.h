// Rows of the same window in the next batch, brought into the cache while this one is computed, a few at a time, and
// those of the output that this one is about to write: windows are short runs of tokens far apart.
#pragma once

#include "pack.h"
#include "policy.h"

namespace effattn::EFFATTN_ISA {

class RowsAhead {
 public:
  void plan(const AttentionForward& arguments, const IndexSet& rows, int64_t batch, int64_t head, int64_t steps) {
    const bool next = batch + 1 < arguments.query.size[0];
    row_ = 0;
    last_ = larger(rows.queries, rows.keys);
    rows_ = rows;
    keys_ = next ? rows.keys : 0;
    queries_ = next ? rows.queries : 0;
    share_ = (last_ + steps - 1) / steps;
    const Tensor* tensors[] = {&arguments.query, &arguments.key, &arguments.value, &arguments.output};
    for (int t = 0; t < 4; ++t) {
      const Matrix matrix = matrix_at(*tensors[t], batch + (t < 3), head);
      const int64_t size = element_size(matrix.dtype);
      data_[t] = static_cast<const char*>(matrix.data);
      pitch_[t] = matrix.row_stride * size;
      bytes_[t] = matrix.column_stride == 1 ? tensors[t]->size[3] * size : 1;
    }
  }

  EFFATTN_INLINE void step() {
    if (row_ < last_) fetch();
  }

 private:
  __attribute__((noinline)) void fetch() {
    const int64_t end = smaller(row_ + share_, last_);
    for (; row_ < end; ++row_) {
      if (row_ < rows_.queries) touch<true>(3, rows_.query_tokens[row_]);
      if (row_ < queries_) touch<false>(0, rows_.query_tokens[row_]);
      if (row_ < keys_ && rows_.key_tokens[row_] >= 0) {
        touch<false>(1, rows_.key_tokens[row_]);
        touch<false>(2, rows_.key_tokens[row_]);
      }
    }
  }

  template <bool kWrite>
  EFFATTN_INLINE void touch(int tensor, int64_t token) const {
    const char* row = data_[tensor] + token * pitch_[tensor];
    __builtin_prefetch(row, kWrite);
    for (int64_t byte = 64; byte < bytes_[tensor]; byte += 64) __builtin_prefetch(row + byte, kWrite);
    if (bytes_[tensor] % 64) __builtin_prefetch(row + bytes_[tensor] - 1, kWrite);
  }

  IndexSet rows_;
  int64_t row_ = 0, last_ = 0, share_ = 0, keys_ = 0, queries_ = 0;
  const char* data_[4];
  int64_t pitch_[4], bytes_[4];
};

}  // namespace effattn::EFFATTN_ISA
