// Tiles of strided tensors in shared memory, and sums over the splits of a long reduction: what the kernels of this
// folder share beyond device.h.
#pragma once

#include "api.h"
#include "device.h"

namespace effattn::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls function(T{}) with the element type that `dtype` names.
template <class Function>
void with_element_type(DType dtype, Function function) {
  if (dtype == DType::kFloat32)
    function(float{});
  else if (dtype == DType::kBFloat16)
    function(bfloat16{});
  else
    function(float16{});
}

// Whether every row of the tensor can be read in pieces of 16 bytes.
inline bool rows_are_aligned(const Tensor& tensor) {
  const int64_t bytes = tensor.dtype == DType::kFloat32 ? 4 : 2;
  bool aligned =
      reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.size[3] * bytes % 16 == 0 && tensor.stride[3] == 1;
  for (int d = 0; d < 3; ++d) aligned = aligned && tensor.stride[d] * bytes % 16 == 0;
  return aligned;
}

// One matrix per plane (b, h), b H + h; strides in elements, any of them may be 0.
template <class T>
struct Planes {
  const T* data;
  int64_t heads, batch_stride, head_stride, row_stride, column_stride;
  bool aligned;

  EFFATTN_DEVICE const T* plane(int64_t index) const {
    return data + index / heads * batch_stride + index % heads * head_stride;
  }
};

template <class T>
Planes<T> planes_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data), tensor.size[1] > 0 ? tensor.size[1] : 1, tensor.stride[0],
      tensor.stride[1], tensor.stride[2], tensor.stride[3], rows_are_aligned(tensor)};
}

// Where a result goes: the same without what only reading needs.
template <class T>
struct ResultPlanes {
  T* data;
  int64_t heads, batch_stride, head_stride, row_stride, column_stride;

  EFFATTN_DEVICE T* at(int64_t plane, int64_t row, int64_t column) const {
    return data + plane / heads * batch_stride + plane % heads * head_stride + row * row_stride +
           column * column_stride;
  }
};

template <class T>
ResultPlanes<T> result_planes_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data), tensor.size[1] > 0 ? tensor.size[1] : 1, tensor.stride[0], tensor.stride[1],
      tensor.stride[2], tensor.stride[3]};
}

// Starts to fill a Rows x Columns tile (rows of `pitch` elements) from `origin`; zeros outside rows x columns. The tile
// is there after cp_async_commit, cp_async_wait and a barrier.
template <int Rows, int Columns, int Threads, class T>
EFFATTN_DEVICE void fill_tile(
    SharedArray<T> tile, int pitch, const Planes<T>& from, const T* origin, int64_t rows, int64_t columns) {
  constexpr int kVector = 16 / sizeof(T), kPerRow = Columns / kVector;
  for (int i = thread_index(); i < Rows * kPerRow; i += Threads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector;
    if (from.aligned) {
      const bool valid = row < rows && column < columns;
      cp_async16(tile, row * pitch + column, valid ? origin + row * from.row_stride + column : origin, valid);
    } else {
      for (int j = 0; j < kVector; ++j) {
        T element = {};
        if (row < rows && column + j < columns)
          element = origin[row * from.row_stride + (column + j) * from.column_stride];
        tile[row * pitch + column + j] = element;
      }
    }
  }
}

// ---- Long reductions
// --------------------------------------------------------------------------------------------------- A reduction over
// `depth` is cut into splits where the tiles alone would leave multiprocessors idle. Every split writes its partial
// result, sum_splits adds them in order. The number of splits depends on the sizes only, not on the chip.

inline constexpr int64_t kEnoughBlocks = 264;  // two for each multiprocessor of an H200

struct Splits {
  int64_t count, depth;  // depth of one split
};

inline Splits split_depth(int64_t tiles, int64_t depth, int64_t step, int64_t least) {
  const int64_t wanted = tiles > 0 ? kEnoughBlocks / tiles : 1, most = depth / least;
  int64_t count = wanted < most ? wanted : most;
  if (count < 1) count = 1;
  int64_t each = ceil_div(ceil_div(depth, count), step) * step;
  if (each == 0) each = step;
  return {depth > 0 ? ceil_div(depth, each) : 1, each};
}

template <class T>
__global__ void sum_splits(const float* partial, int64_t splits, int64_t count, T* sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads() + thread_index();
  if (i >= count) return;
  double total = 0;
  for (int64_t split = 0; split < splits; ++split) total += partial[split * count + i];
  sum[i] = from_float<T>(static_cast<float>(total));
}

}  // namespace effattn::cuda
