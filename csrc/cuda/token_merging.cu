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
// t and writes the rows of all its members. A lane has 4 pieces of 16 bytes of a row in registers as floats (4 elements
// where rows are not aligned): 1024 columns of bf16 at a time. Sums go through the members in order. No shared memory.
//
// Bytes: x once and y once; for dx dy once per member, from L2 but for the first, and dx once; ds reads x, r and y too,
// the maximum's gradient x twice where an output has several members. 2 FLOPs an element.
#include "tile.h"

namespace effattn::cuda {
namespace {

constexpr int kWarps = 4, kPieces = 4;

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
  EFFATTN_DEVICE Row(const Planes<T>& from, int64_t image, int64_t row)
      : data(from.plane(image) + row * from.row_stride), column_stride(from.column_stride) {}
};

// What a lane has of a row: piece p begins at column first + p * kWarp * V, and is zeros behind the last column.
template <int V>
struct Pieces {
  float value[kPieces][V];

  template <class T>
  EFFATTN_DEVICE Pieces(const Row<T>& row, int64_t first, int64_t columns) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
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
  EFFATTN_DEVICE Pieces() {
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int i = 0; i < V; ++i) value[p][i] = 0;
  }

  // value <- function(value, others' value...)
  template <class Function, class... Others>
  EFFATTN_DEVICE void apply(Function function, const Others&... others) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int i = 0; i < V; ++i) value[p][i] = function(value[p][i], others.value[p][i]...);
  }

  template <class T>
  EFFATTN_DEVICE void store(
      const ResultPlanes<T>& to, int64_t image, int64_t row, int64_t first, int64_t columns) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t column = first + p * kWarp * V;
      if (column >= columns) continue;
      Vec<T, V> vec;
#pragma unroll
      for (int i = 0; i < V; ++i) vec[i] = from_float<T>(value[p][i]);
      store_global<V>(to.at(image, row, column), vec);
    }
  }
};

EFFATTN_DEVICE int64_t owned_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(); }

template <int V>
EFFATTN_DEVICE int64_t first_column() {
  return lane_index() * V;
}

template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp) sum_kernel(Planes<T> x, Planes<T> residual, const float* sizes,
    Groups groups, int64_t rows, int64_t columns, bool is_mean, ResultPlanes<T> output, float* merged_sizes) {
  const int64_t row = owned_row();
  if (row >= rows) return;
  const int64_t image = row / groups.outputs, t = row % groups.outputs;
  Group group(groups, sizes, image, t);
  if (merged_sizes != nullptr && lane_index() == 0) merged_sizes[row] = group.total;
  if (is_mean && group.total == 0) group.end = group.begin;
  const float factor = is_mean && sizes == nullptr ? group.weight(1) : 1.0f;
  for (int64_t first = first_column<V>(); first < columns; first += kPieces * kWarp * V) {
    Pieces<V> sum;
#pragma unroll 2
    for (int64_t place = group.begin; place < group.end; ++place) {
      const int64_t member = groups.member(image, place);
      const float weight = sizes == nullptr ? 1.0f : group.weight(sizes[image * groups.tokens + member]);
      Pieces<V> piece(Row<T>(x, image, member), first, columns);
      if (residual.data != nullptr)
        piece.apply([](float a, float b) { return a + b; }, Pieces<V>(Row<T>(residual, image, member), first, columns));
      sum.apply([&](float total, float element) { return fmaf(weight, element, total); }, piece);
    }
    sum.apply([&](float total) { return total * factor; });
    sum.store(output, image, t, first, columns);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp)
    max_kernel(Planes<T> x, Groups groups, int64_t rows, int64_t columns, ResultPlanes<T> output) {
  const int64_t row = owned_row();
  if (row >= rows) return;
  const int64_t image = row / groups.outputs, t = row % groups.outputs;
  const Group group(groups, nullptr, image, t);
  for (int64_t first = first_column<V>(); first < columns; first += kPieces * kWarp * V) {
    Pieces<V> largest;
    for (int64_t place = group.begin; place < group.end; ++place) {
      const Pieces<V> piece(Row<T>(x, image, groups.member(image, place)), first, columns);
      const bool is_first = place == group.begin;
      largest.apply([&](float most, float a) { return is_first || a > most || a != a ? a : most; }, piece);
    }
    largest.store(output, image, t, first, columns);
  }
}

// The gradient of sums and means: row i is row source_i of grad_output, times the weight of i.
template <class T, int V>
__global__ void __launch_bounds__(kWarps* kWarp) gather_kernel(Planes<T> grad_output, const float* grad_merged_sizes,
    Planes<T> x, Planes<T> residual, Planes<T> output, const float* sizes, Groups groups, int64_t rows, int64_t columns,
    bool is_mean, ResultPlanes<T> grad_x, float* grad_sizes) {
  const int64_t row = owned_row();
  if (row >= rows) return;
  const int64_t image = row / groups.tokens, token = row % groups.tokens, t = groups.source_of(image, token);
  float factor = 1, inverse_total = 0;
  if (is_mean) {
    const Group group(groups, sizes, image, t);
    factor = group.weight(sizes == nullptr ? 1.0f : sizes[row]);
    inverse_total = group.weight(1);
  }
  const Row<T> gradient(grad_output, image, t);
  float product = 0;
  for (int64_t first = first_column<V>(); first < columns; first += kPieces * kWarp * V) {
    Pieces<V> piece(gradient, first, columns);
    if (grad_sizes != nullptr) {
      Pieces<V> difference(Row<T>(x, image, token), first, columns);
      if (residual.data != nullptr)
        difference.apply(
            [](float a, float b) { return a + b; }, Pieces<V>(Row<T>(residual, image, token), first, columns));
      difference.apply([](float a, float y) { return a - y; }, Pieces<V>(Row<T>(output, image, t), first, columns));
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
__global__ void __launch_bounds__(kWarps* kWarp) max_gradient_kernel(Planes<T> grad_output, Planes<T> x,
    Planes<T> output, Groups groups, int64_t rows, int64_t columns, ResultPlanes<T> grad_x) {
  const int64_t row = owned_row();
  if (row >= rows) return;
  const int64_t image = row / groups.outputs, t = row % groups.outputs;
  const Group group(groups, nullptr, image, t);
  if (group.end <= group.begin) return;
  for (int64_t first = first_column<V>(); first < columns; first += kPieces * kWarp * V) {
    Pieces<V> share(Row<T>(grad_output, image, t), first, columns);
    if (group.end == group.begin + 1) {
      share.store(grad_x, image, groups.member(image, group.begin), first, columns);
      continue;
    }
    const Pieces<V> largest(Row<T>(output, image, t), first, columns);
    Pieces<V> attained;
    for (int64_t place = group.begin; place < group.end; ++place)
      attained.apply([](float count, float a, float most) { return a == most ? count + 1 : count; },
          Pieces<V>(Row<T>(x, image, groups.member(image, place)), first, columns), largest);
    share.apply([](float g, float count) { return g / count; }, attained);
    for (int64_t place = group.begin; place < group.end; ++place) {
      const int64_t member = groups.member(image, place);
      Pieces<V> piece(Row<T>(x, image, member), first, columns);
      piece.apply(
          [](float a, float most, float g) { return a == most      ? g
                                                    : most == most ? 0.0f
                                                                   : most; }, largest, share);
      piece.store(grad_x, image, member, first, columns);
    }
  }
}

Groups groups_of(const TokenGroups& groups) {
  return {groups.source, groups.members, groups.offsets, groups.tokens, groups.outputs};
}

dim3 blocks_for(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kWarps))); }

// A tensor that is not read does not stand in the way of reading in pieces of 16 bytes.
bool is_aligned(const Tensor& tensor) { return tensor.data == nullptr || rows_are_aligned(tensor); }

template <class T, int V>
void launch_merge(const TokenMerge& a, cudaStream_t stream) {
  const int64_t rows = a.groups.batch * a.groups.outputs, columns = a.output.size[3];
  const Groups groups = groups_of(a.groups);
  if (a.mode == MergeMode::kMax)
    launch(max_kernel<T, V>, blocks_for(rows), dim3(kWarps * kWarp), 0, stream, planes_of<T>(a.x), groups, rows,
        columns, result_planes_of<T>(a.output));
  else
    launch(sum_kernel<T, V>, blocks_for(rows), dim3(kWarps * kWarp), 0, stream, planes_of<T>(a.x),
        planes_of<T>(a.residual), a.sizes, groups, rows, columns, a.mode == MergeMode::kMean,
        result_planes_of<T>(a.output), a.merged_sizes);
}

template <class T, int V>
void launch_gradient(const TokenMergeGradient& a, cudaStream_t stream) {
  const Groups groups = groups_of(a.groups);
  const int64_t columns = a.grad_x.size[3];
  if (a.mode == MergeMode::kMax) {
    const int64_t rows = a.groups.batch * a.groups.outputs;
    launch(max_gradient_kernel<T, V>, blocks_for(rows), dim3(kWarps * kWarp), 0, stream, planes_of<T>(a.grad_output),
        planes_of<T>(a.x), planes_of<T>(a.output), groups, rows, columns, result_planes_of<T>(a.grad_x));
  } else {
    const int64_t rows = a.groups.batch * a.groups.tokens;
    launch(gather_kernel<T, V>, blocks_for(rows), dim3(kWarps * kWarp), 0, stream, planes_of<T>(a.grad_output),
        a.grad_merged_sizes, planes_of<T>(a.x), planes_of<T>(a.residual), planes_of<T>(a.output), a.sizes, groups, rows,
        columns, a.mode == MergeMode::kMean, result_planes_of<T>(a.grad_x), a.grad_sizes);
  }
}

}  // namespace

void token_merge(const TokenMerge& a, void* stream) {
  const bool aligned = is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.output);
  with_element_type(a.output.dtype, [&](auto element) {
    using T = decltype(element);
    if (aligned)
      launch_merge<T, 16 / sizeof(T)>(a, static_cast<cudaStream_t>(stream));
    else
      launch_merge<T, 1>(a, static_cast<cudaStream_t>(stream));
  });
}

void token_merge_gradient(const TokenMergeGradient& a, void* stream) {
  const bool reads_x = a.mode == MergeMode::kMax || a.grad_sizes != nullptr;
  const bool aligned = is_aligned(a.grad_output) && is_aligned(a.grad_x) &&
                       (!reads_x || (is_aligned(a.x) && is_aligned(a.residual) && is_aligned(a.output)));
  with_element_type(a.grad_x.dtype, [&](auto element) {
    using T = decltype(element);
    if (aligned)
      launch_gradient<T, 16 / sizeof(T)>(a, static_cast<cudaStream_t>(stream));
    else
      launch_gradient<T, 1>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace effattn::cuda
