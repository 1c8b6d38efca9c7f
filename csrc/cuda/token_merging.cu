// Merging tokens by a plan, unmerging them, and the gradients (reference/token_merging.py). Over the members i of t
//
//   sum, mean   y_t = sum_i x_i,  sum_i s_i (x_i + r_i) / S_t      S_t = sum_i s_i, s = 1 without sizes; 0 where S_t =
//   0 max         y_t = max_i x_i unmerge     x_i = y_t
//
//   gradients   dx_i = dy_t,  s_i / S_t dy_t,  or dy_t / (members that attain y_t) for those that do
//               ds_i = (x_i + r_i - y_t) . dy_t / S_t + dS_t
//
// A warp owns a row of the result, and gathers: no atomics. Of y it owns row t and goes through its members, a run of
// `members` that `offsets` bounds; of dx it owns row i and reads row source_i of dy. For the maximum's gradient it owns
// t and writes the rows of all its members. A lane has pieces of 16 bytes of a row in registers as floats, single
// elements where rows are not aligned: a warp 512 columns of fp32 at a time, 768 of bf16 and fp16, 128 single ones.
// Sums go through the members in order. No shared memory.
//
// Bytes: x once and y once; for dx dy once per member, from L2 but for the first, and dx once; ds reads x, r and y too,
// the maximum's gradient x twice where an output has several members. 2 FLOPs an element.
#include "tile.h"

namespace effattn::cuda {
namespace {

constexpr int kWarps = 4;

template <int V>
inline constexpr int kPieces = V == 8 ? 3 : 4;

// A plan; its indices are cut to their ranges, since nobody can have checked them without waiting for the device.
struct Groups {
  const int32_t *source, *members, *offsets;
  int64_t tokens, outputs;

  EFFATTN_DEVICE int64_t source_of(int64_t image, int64_t token) const {
    return clamp(source[image * tokens + token], outputs - 1);
  }
  EFFATTN_DEVICE int64_t begin(int64_t image, int64_t output) const {
    return clamp(offsets[image * (outputs + 1) + output], tokens);
  }
  EFFATTN_DEVICE int64_t member(int64_t image, int64_t place) const {
    return clamp(members[image * tokens + place], tokens - 1);
  }

 private:
  EFFATTN_DEVICE static int64_t clamp(int64_t index, int64_t last) { return max(int64_t{0}, min(index, last)); }
};

// An output's members, and what they weigh.
struct Group {
  int64_t begin, end;
  float total;

  EFFATTN_DEVICE Group(const Groups& groups, const float* sizes, int64_t image, int64_t output)
      : begin(groups.begin(image, output)), end(groups.begin(image, output + 1)) {
    total = static_cast<float>(max(end - begin, int64_t{0}));
    if (sizes == nullptr) return;
    total = 0;
    for (int64_t place = begin; place < end; ++place)
      total += sizes[image * groups.tokens + groups.member(image, place)];
  }
  // Of a member in the mean.
  EFFATTN_DEVICE float weight(float size) const { return total == 0 ? 0.0f : divide_rn(size, total); }
};

template <class T>
struct Row {
  const T* data;
  int64_t column_stride;
};

// The rows of all images. Planes would divide by a number of heads that is always 1.
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride, row_stride, column_stride;

  explicit Rows(const Tensor& tensor)
      : data(static_cast<T*>(tensor.data)),
        batch_stride(tensor.stride[0]),
        row_stride(tensor.stride[2]),
        column_stride(tensor.stride[3]) {}
  EFFATTN_DEVICE T* at(int64_t image, int64_t row, int64_t column) const {
    return data + image * batch_stride + row * row_stride + column * column_stride;
  }
  EFFATTN_DEVICE Row<T> row(int64_t image, int64_t row) const { return {at(image, row, 0), column_stride}; }
};

// What a lane has of a row: piece p begins at column first + p * kWarp * V, and is zeros behind the last column.
template <int V>
struct Pieces {
  float value[kPieces<V>][V];

  template <class T>
  EFFATTN_DEVICE Pieces(const Row<T>& row, int64_t first, int64_t columns) {
#pragma unroll
    for (int p = 0; p < kPieces<V>; ++p) {
      const int64_t column = first + p * kWarp * V;
      Vec<T, V> vec = {};
      if (column < columns) {
        if constexpr (V == 1)
          vec[0] = row.data[column * row.column_stride];
        else
          vec = load_global<V>(row.data + column);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) value[p][i] = to_float(vec[i]);
    }
  }
  EFFATTN_DEVICE explicit Pieces(float all) {
#pragma unroll
    for (int p = 0; p < kPieces<V>; ++p)
#pragma unroll
      for (int i = 0; i < V; ++i) value[p][i] = all;
  }

  // value <- function(value, others' value...)
  template <class Function, class... Others>
  EFFATTN_DEVICE void apply(Function function, const Others&... others) {
#pragma unroll
    for (int p = 0; p < kPieces<V>; ++p)
#pragma unroll
      for (int i = 0; i < V; ++i) value[p][i] = function(value[p][i], others.value[p][i]...);
  }

  template <class T>
  EFFATTN_DEVICE void store(const Rows<T>& to, int64_t image, int64_t row, int64_t first, int64_t columns) const {
#pragma unroll
    for (int p = 0; p < kPieces<V>; ++p) {
      const int64_t column = first + p * kWarp * V;
      if (column >= columns) continue;
      Vec<T, V> vec;
#pragma unroll
      for (int i = 0; i < V; ++i) vec[i] = from_float<T>(value[p][i]);
      store_global<V>(to.at(image, row, column), vec);
    }
  }
};

// Which row of which image a warp owns; the last blocks of an image may have warps without a row.
struct Owned {
  int64_t image, row;
  EFFATTN_DEVICE explicit Owned(unsigned blocks_per_image)
      : image(blockIdx.x / blocks_per_image),
        row(static_cast<int64_t>(blockIdx.x % blocks_per_image) * kWarps + warp_index()) {}
};

template <int V>
EFFATTN_DEVICE int64_t first_column() {
  return lane_index() * V;
}

template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp) sum_kernel(unsigned blocks_per_image, Groups groups, int64_t columns,
    bool is_mean, Rows<T> x, Rows<T> residual, const float* sizes, Rows<T> output, float* merged_sizes) {
  const auto [image, t] = Owned(blocks_per_image);
  if (t >= groups.outputs) return;
  Group group(groups, sizes, image, t);
  if (merged_sizes != nullptr && lane_index() == 0) merged_sizes[image * groups.outputs + t] = group.total;
  if (is_mean && group.total == 0) group.end = group.begin;
  const float factor = is_mean && sizes == nullptr ? group.weight(1) : 1.0f;
  for (int64_t first = first_column<V>(); first < columns; first += kPieces<V> * kWarp * V) {
    Pieces<V> sum(group.begin < group.end ? -0.0f : 0.0f);  // -0 leaves a -0 that is added as it is
#pragma unroll 1  // most outputs have one member: registers for more warps gain more
    for (int64_t place = group.begin; place < group.end; ++place) {
      const int64_t member = groups.member(image, place);
      const float weight = sizes == nullptr ? 1.0f : group.weight(sizes[image * groups.tokens + member]);
      Pieces<V> piece(x.row(image, member), first, columns);
      if (residual.data != nullptr)
        piece.apply([](float a, float b) { return a + b; }, Pieces<V>(residual.row(image, member), first, columns));
      sum.apply([&](float total, float element) { return fmaf(weight, element, total); }, piece);
    }
    sum.apply([&](float total) { return total * factor; });
    sum.store(output, image, t, first, columns);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp)
    max_kernel(unsigned blocks_per_image, Groups groups, int64_t columns, Rows<T> x, Rows<T> output) {
  const auto [image, t] = Owned(blocks_per_image);
  if (t >= groups.outputs) return;
  const Group group(groups, nullptr, image, t);
  for (int64_t first = first_column<V>(); first < columns; first += kPieces<V> * kWarp * V) {
    Pieces<V> largest(0.0f);
    for (int64_t place = group.begin; place < group.end; ++place) {
      const Pieces<V> piece(x.row(image, groups.member(image, place)), first, columns);
      const bool is_first = place == group.begin;
      largest.apply([&](float most, float a) { return is_first || a > most || a != a ? a : most; }, piece);
    }
    largest.store(output, image, t, first, columns);
  }
}

// The gradient of sums and means: row i is row source_i of grad_output, times the weight of i.
template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp) gather_kernel(unsigned blocks_per_image, Groups groups,
    int64_t columns, bool is_mean, Rows<T> grad_output, const float* grad_merged_sizes, Rows<T> x, Rows<T> residual,
    Rows<T> output, const float* sizes, Rows<T> grad_x, float* grad_sizes) {
  const auto [image, token] = Owned(blocks_per_image);
  if (token >= groups.tokens) return;
  const int64_t t = groups.source_of(image, token), row = image * groups.tokens + token;
  float factor = 1, inverse_total = 0;
  if (is_mean) {
    const Group group(groups, sizes, image, t);
    factor = group.weight(sizes == nullptr ? 1.0f : sizes[row]);
    inverse_total = group.weight(1);
  }
  const Row<T> gradient = grad_output.row(image, t);
  float product = 0;
  for (int64_t first = first_column<V>(); first < columns; first += kPieces<V> * kWarp * V) {
    Pieces<V> piece(gradient, first, columns);
    if (grad_sizes != nullptr) {
      Pieces<V> difference(x.row(image, token), first, columns);
      if (residual.data != nullptr)
        difference.apply([](float a, float b) { return a + b; }, Pieces<V>(residual.row(image, token), first, columns));
      difference.apply([](float a, float y) { return a - y; }, Pieces<V>(output.row(image, t), first, columns));
      difference.apply(
          [&](float a, float g) {
            product = fmaf(a, g, product);
            return a;
          },
          piece);
    }
    piece.apply([&](float g) { return g * factor; });
    piece.store(grad_x, image, token, first, columns);
  }
  if (grad_sizes == nullptr) return;
  product = warp_reduce(product, Sum());
  const float upstream = grad_merged_sizes == nullptr ? 0.0f : grad_merged_sizes[image * groups.outputs + t];
  if (lane_index() == 0) grad_sizes[row] = (inverse_total == 0 ? 0.0f : product * inverse_total) + upstream;
}

// Where the maximum is NaN nothing attains it, and its gradient is NaN.
template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp) max_gradient_kernel(unsigned blocks_per_image, Groups groups,
    int64_t columns, Rows<T> grad_output, Rows<T> x, Rows<T> output, Rows<T> grad_x) {
  const auto [image, t] = Owned(blocks_per_image);
  if (t >= groups.outputs) return;
  const Group group(groups, nullptr, image, t);
  if (group.end <= group.begin) return;
  for (int64_t first = first_column<V>(); first < columns; first += kPieces<V> * kWarp * V) {
    Pieces<V> share(grad_output.row(image, t), first, columns);
    if (group.end == group.begin + 1) {
      share.store(grad_x, image, groups.member(image, group.begin), first, columns);
      continue;
    }
    const Pieces<V> largest(output.row(image, t), first, columns);
    Pieces<V> attained(0.0f);
    for (int64_t place = group.begin; place < group.end; ++place)
      attained.apply([](float count, float a, float most) { return a == most ? count + 1 : count; },
          Pieces<V>(x.row(image, groups.member(image, place)), first, columns), largest);
    share.apply([](float g, float count) { return g / count; }, attained);
    for (int64_t place = group.begin; place < group.end; ++place) {
      const int64_t member = groups.member(image, place);
      Pieces<V> piece(x.row(image, member), first, columns);
      piece.apply(
          [](float a, float most, float g) {
            if (a == most) return g;
            return most == most ? 0.0f : most;
          },
          largest, share);
      piece.store(grad_x, image, member, first, columns);
    }
  }
}

Groups groups_of(const TokenGroups& groups) {
  return {groups.source, groups.members, groups.offsets, groups.tokens, groups.outputs};
}

// A tensor that is not read does not stand in the way of reading in pieces of 16 bytes.
bool is_aligned(const Tensor& tensor) { return tensor.data == nullptr || rows_are_aligned(tensor); }

// A warp for each of an image's `rows`.
template <class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(unsigned, Parameters...), const TokenGroups& groups, int64_t rows, void* stream,
    Arguments... arguments) {
  const int64_t blocks = ceil_div(rows, kWarps);
  launch(kernel, dim3(static_cast<unsigned>(groups.batch * blocks)), dim3(kWarps * kWarp), 0,
      static_cast<cudaStream_t>(stream), static_cast<unsigned>(blocks), arguments...);
}

template <class T, int V>
void launch_merge(const TokenMerge& a, void* stream) {
  const Groups groups = groups_of(a.groups);
  const int64_t columns = a.output.size[3];
  const Rows<T> x(a.x), residual(a.residual), output(a.output);
  if (a.mode == MergeMode::kMax)
    launch_rows(max_kernel<T, V>, a.groups, a.groups.outputs, stream, groups, columns, x, output);
  else
    launch_rows(sum_kernel<T, V>, a.groups, a.groups.outputs, stream, groups, columns, a.mode == MergeMode::kMean, x,
        residual, a.sizes, output, a.merged_sizes);
}

template <class T, int V>
void launch_gradient(const TokenMergeGradient& a, void* stream) {
  const Groups groups = groups_of(a.groups);
  const int64_t columns = a.grad_x.size[3];
  const Rows<T> grad_output(a.grad_output), x(a.x), residual(a.residual), output(a.output), grad_x(a.grad_x);
  if (a.mode == MergeMode::kMax)
    launch_rows(
        max_gradient_kernel<T, V>, a.groups, a.groups.outputs, stream, groups, columns, grad_output, x, output, grad_x);
  else
    launch_rows(gather_kernel<T, V>, a.groups, a.groups.tokens, stream, groups, columns, a.mode == MergeMode::kMean,
        grad_output, a.grad_merged_sizes, x, residual, output, a.sizes, grad_x, a.grad_sizes);
}

}  // namespace

void token_merge(const TokenMerge& a, void* stream) {
  const bool aligned = is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.output);
  with_element_type(a.output.dtype, [&](auto element) {
    using T = decltype(element);
    if (aligned)
      launch_merge<T, 16 / sizeof(T)>(a, stream);
    else
      launch_merge<T, 1>(a, stream);
  });
}

void token_merge_gradient(const TokenMergeGradient& a, void* stream) {
  const bool reads_x = a.mode == MergeMode::kMax || a.grad_sizes != nullptr;
  const bool aligned = is_aligned(a.grad_output) && is_aligned(a.grad_x) &&
                       (!reads_x || (is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.output)));
  with_element_type(a.grad_x.dtype, [&](auto element) {
    using T = decltype(element);
    if (aligned)
      launch_gradient<T, 16 / sizeof(T)>(a, stream);
    else
      launch_gradient<T, 1>(a, stream);
  });
}

}  // namespace effattn::cuda
