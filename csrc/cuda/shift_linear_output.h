// From the sums of a shift-add linear layer to its output, and the partial sums of a split reduction on the way.
#pragma once

#include "product_tile.h"
#include "tile.h"

namespace effattn::cuda {

// y = sum * scale + bias;  int8: sum * (t 2^-6) * scale + bias, t of the row;  fixed 16.16: (sum + bias) 2^-16.
struct LinearOutput {
  void* output;
  DType dtype;
  int64_t rows, columns;
  const float* scale;      // per column, or null
  const float* bias;       // per column, or null
  const float* row_scale;  // t, int8 only
  uint32_t* partial;       // (splits, rows, columns) sums, where there are several splits; else null

  EFFATTN_DEVICE void store(int64_t row, int64_t column, float value) const {
    const int64_t i = row * columns + column;
    if (dtype == DType::kFloat32)
      static_cast<float*>(output)[i] = value;
    else if (dtype == DType::kBFloat16)
      static_cast<bfloat16*>(output)[i] = from_float<bfloat16>(value);
    else
      static_cast<float16*>(output)[i] = from_float<float16>(value);
  }

  EFFATTN_DEVICE void finish(int64_t row, int64_t column, float sum) const {
    if (scale != nullptr) sum *= scale[column];
    if (bias != nullptr) sum += bias[column];
    store(row, column, sum);
  }
  EFFATTN_DEVICE void finish(int64_t row, int64_t column, int32_t sum) const;

  template <class Accumulator>
  EFFATTN_DEVICE void add(int64_t split, int64_t row, int64_t column, Accumulator sum) const {
    if (row >= rows || column >= columns) return;
    if (partial != nullptr)
      reinterpret_cast<Accumulator*>(partial)[(split * rows + row) * columns + column] = sum;
    else
      finish(row, column, sum);
  }
};

// x as 16.16, as the published code rounds it.
EFFATTN_DEVICE int32_t fixed16(float x) {
  return static_cast<int32_t>(fminf(fmaxf(floorf(x * 65536.0f), -2147483648.0f), 2147418112.0f));
}

EFFATTN_DEVICE void LinearOutput::finish(int64_t row, int64_t column, int32_t sum) const {
  if (row_scale != nullptr) {
    finish(row, column, static_cast<float>(sum) * (row_scale[row] * 0.015625f));
  } else {
    if (bias != nullptr) sum = wrapping_add(sum, fixed16(bias[column]));
    store(row, column, static_cast<float>(sum) * (1.0f / 65536.0f));
  }
}

template <class Accumulator>
__global__ void finish_splits(LinearOutput to, int64_t splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads() + thread_index(), count = to.rows * to.columns;
  if (i >= count) return;
  const Accumulator* partial = reinterpret_cast<const Accumulator*>(to.partial);
  Accumulator sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum = cuda::add(sum, partial[split * count + i]);
  to.finish(i / to.columns, i % to.columns, sum);
}

}  // namespace effattn::cuda
