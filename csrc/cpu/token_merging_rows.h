// Rows of tokens and how they are walked: columns in steps of a few vectors with a tail, outputs in blocks of equal
// work.
#pragma once

#include "api.h"
#include "pack.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA::merging {

inline constexpr int kStep = kLanes >= 16 ? 4 : 8;  // vectors

// A step of a row: kVectors whole vectors, or `count` lanes of one.
template <int kVectors_, bool kWhole_>
struct Columns {
  static constexpr int kVectors = kVectors_;
  static constexpr bool kWhole = kWhole_;
  int64_t first, count;
};

template <class Body>
EFFATTN_INLINE void over_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + kStep * kLanes <= columns; c += kStep * kLanes) body(Columns<kStep, true>{c, kStep * kLanes});
  for (; c + kLanes <= columns; c += kLanes) body(Columns<1, true>{c, kLanes});
  if (c < columns) body(Columns<1, false>{c, columns - c});
}

// A row to read. kUnit: its elements lie side by side.
template <class T, bool kUnit>
struct Row {
  const T* data;
  int64_t stride;

  template <class Columns>
  EFFATTN_INLINE Vec load(Columns at, int v) const {
    if constexpr (!kUnit) {
      T part[kLanes] = {};
      const T* const from = data + (at.first + v * kLanes) * stride;
      for (int lane = 0; lane < (Columns::kWhole ? kLanes : at.count); ++lane) part[lane] = from[lane * stride];
      return load_float(part);
    } else if constexpr (Columns::kWhole) {
      return load_float(data + at.first + v * kLanes);
    } else {
      return load_float_partial(data + at.first, at.count);
    }
  }
};

template <class Columns, class T>
EFFATTN_INLINE void store_row(T* to, Columns at, int v, Vec value) {
  if constexpr (Columns::kWhole)
    store_float(to + at.first + v * kLanes, value);
  else
    store_float_partial(to + at.first, value, at.count);
}

// The rows of one batch of a tensor (1,B,rows,C).
template <class T, bool kUnit>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t batch)
      : data_(static_cast<const T*>(tensor.data) + batch * tensor.stride[1]),
        row_stride_(tensor.stride[2]),
        column_stride_(tensor.stride[3]) {}
  EFFATTN_INLINE Row<T, kUnit> operator[](int64_t row) const { return {data_ + row * row_stride_, column_stride_}; }

 private:
  const T* data_;
  int64_t row_stride_, column_stride_;
};

// The rows of one batch of a contiguous tensor that is written.
template <class T>
class WrittenRows {
 public:
  WrittenRows(const Tensor& tensor, int64_t batch)
      : data_(static_cast<T*>(tensor.data) + batch * tensor.size[2] * tensor.size[3]), columns_(tensor.size[3]) {}
  EFFATTN_INLINE T* operator[](int64_t row) const { return data_ + row * columns_; }

 private:
  T* data_;
  int64_t columns_;
};

inline bool has_unit_columns(const Tensor& tensor) {
  return tensor.data == nullptr || tensor.stride[3] == 1 || tensor.size[3] <= 1;
}

template <class T, bool kUnit>
EFFATTN_INLINE void copy_row(T* to, const Row<T, kUnit>& from, int64_t columns) {
  over_columns(columns, [&](auto at) __attribute__((always_inline)) {
    EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) store_row(to, at, v, from.load(at, v));
  });
}

template <class T>
EFFATTN_INLINE void zero_row(T* to, int64_t columns) {
  memset(static_cast<void*>(to), 0, columns * sizeof(T));
}

template <class T, bool kUnit>
EFFATTN_INLINE void scale_row(T* to, const Row<T, kUnit>& from, float factor, int64_t columns) {
  over_columns(columns, [&](auto at) __attribute__((always_inline)) {
    EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) store_row(to, at, v, from.load(at, v) * broadcast(factor));
  });
}

// The members of one output.
struct Group {
  const int32_t* members;
  int64_t count;
};

// Hands (batch, first output, last output) to body, every range with about the same number of members and outputs.
template <class Body>
void over_outputs(const Runtime& runtime, const TokenGroups& groups, int64_t columns, const Body& body) {
  constexpr int64_t kBlock = 64;
  const int64_t rows = groups.tokens + groups.outputs, blocks = (rows + kBlock - 1) / kBlock;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / blocks, block = item % blocks;
      const int32_t* const offsets = groups.offsets + batch * (groups.outputs + 1);
      const auto output_at = [&](int64_t row) {  // the first output with so many members and outputs before it
        int64_t low = 0, high = groups.outputs;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (offsets[middle] + middle < row)
            low = middle + 1;
          else
            high = middle;
        }
        return low;
      };
      const int64_t last = block + 1 == blocks ? groups.outputs : output_at((block + 1) * kBlock);
      body(batch, output_at(block * kBlock), last);
    }
  };
  for_items(runtime, groups.batch * blocks, 2.0 * groups.batch * rows * columns, range);
}

EFFATTN_INLINE Group group_at(const TokenGroups& groups, int64_t batch, int64_t output) {
  const int32_t* const offsets = groups.offsets + batch * (groups.outputs + 1) + output;
  return {groups.members + batch * groups.tokens + offsets[0], offsets[1] - offsets[0]};
}

// The caller's element type, and whether all tensors have unit columns, as template arguments.
template <template <class, bool> class Kernel, class Call>
void dispatch(DType dtype, bool unit, const Call& call, const Runtime& runtime) {
  switch (dtype) {
    case DType::kBFloat16:
      return unit ? Kernel<bfloat16, true>::run(call, runtime) : Kernel<bfloat16, false>::run(call, runtime);
    case DType::kFloat16:
      return unit ? Kernel<float16, true>::run(call, runtime) : Kernel<float16, false>::run(call, runtime);
    default:
      return unit ? Kernel<float, true>::run(call, runtime) : Kernel<float, false>::run(call, runtime);
  }
}

}  // namespace effattn::EFFATTN_ISA::merging
