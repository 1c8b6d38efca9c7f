// Linear layer with weights that are signed powers of two, kept packed:
//
//   y[m, n] = sum_k x[m, k] w[n, k] * scale[n] + bias[n]        w = s 2^p, 4 bits or a byte
//   float        x as it is; products of bf16 and fp16 are exact, sums are fp32
//   int8         q = round(x / t), t = max|x[m]| / 127; sums of q (64 w) in int32; y = sum (t 2^-6) ...
//   fixed16.16   xi = floor(x 2^16); y = 2^-16 sum s (xi >> -p), in int32
//   gradient     dx[m, k] = sum_n g[m, n] scale[n] w[n, k]
//
// Few rows (up to 32 in bf16, fp16, int8, up to 8 in fp32): shift_linear_stream.h. Bytes: the codes once (K N / 2, or K
// N), x once per 16 channels (from L2), y once. Otherwise: shift_linear_tile.h, the codes once per 64 rows, x once per
// 64 channels. Neither keeps an expanded copy of the weights. Both count 2 M N K FLOPs.
//
// Where few blocks would have much to sum, the sum is split over blocks and finished, in order, by a second kernel.
// int8 and fixed16.16 activations, and activations that are not aligned rows where the stream needs them, are first
// brought into scratch memory, M K elements.
#include "shift_linear_stream.h"
#include "shift_linear_tile.h"

namespace effattn::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int64_t kFewRows = 32, kFewRowsFloat = 8;

// A row of the input as E, zeros up to `pitch`. int8: by its own scale t, which goes to `row_scale`.
template <class T, class E>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows(Planes<T> input, int64_t columns, int64_t pitch, E* rows, float* row_scale) {
  const int64_t row = blockIdx.x;
  const T* from = input.data + row * input.row_stride;
  float t = 1;
  if constexpr (std::is_same_v<E, int8_t>) {
    SharedMemory shared;
    const SharedArray<float> scratch = shared.array<float>(kRowThreads / kWarp);
    float largest = 0;
    for (int64_t k = thread_index(); k < columns; k += kRowThreads)
      largest = fmaxf(largest, fabsf(to_float(from[k * input.column_stride])));
    largest = block_reduce(largest, Max(), scratch);
    if (largest > 0) t = divide_rn(largest, 127.0f);
    if (thread_index() == 0) row_scale[row] = t;
  }
  for (int64_t k = thread_index(); k < pitch; k += kRowThreads) {
    E element = {};
    if (k < columns) {
      const T x = from[k * input.column_stride];
      if constexpr (std::is_same_v<E, int8_t>)
        element = static_cast<int8_t>(rintf(divide_rn(to_float(x), t)));
      else if constexpr (std::is_same_v<E, int32_t>)
        element = fixed16(to_float(x));
      else
        element = x;
    }
    rows[row * pitch + k] = element;
  }
}

// What a call needs, from its sizes alone.
struct Plan {
  bool stream;                   // few rows
  int64_t fragments, row_tiles;  // stream: 8-row fragments (or single rows in fp32) of a block
  int64_t tiles, column_tiles;
  Splits splits;
  int64_t element_bytes, pitch;  // of prepared rows; 0 bytes: the input is used as it is
  int64_t prepared_bytes, scale_bytes, partial_bytes;

  int64_t bytes() const { return prepared_bytes + scale_bytes + partial_bytes; }
};

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

void set_splits(Plan& plan, int64_t rows, int64_t columns, int64_t depth, int64_t step, int64_t least) {
  plan.splits = split_depth(plan.tiles, depth, step, least);
  plan.partial_bytes = plan.splits.count > 1 ? plan.splits.count * rows * columns * 4 : 0;
}

Plan plan_forward(const ShiftLinear& a) {
  const int64_t rows = a.input.size[2], features = a.input.size[3], channels = a.channels;
  const bool is_float = a.activation == Activation::kFloat;
  const bool vector = is_float && a.input.dtype == DType::kFloat32;
  Plan plan = {};
  plan.stream = rows <= (vector ? kFewRowsFloat : kFewRows) && a.activation != Activation::kFixed16;
  if (plan.stream) {
    const int64_t needed = vector ? rows : ceil_div(rows, 8);
    plan.fragments = needed <= 1 ? 1 : needed <= 2 ? 2 : 4;
    plan.row_tiles = ceil_div(needed, plan.fragments);
    plan.tiles = plan.row_tiles * ceil_div(channels, vector ? kVectorChannels : kMatrixChannels);
    const int64_t slice = vector ? kVectorSlice : kMatrixSlice;
    set_splits(plan, rows, channels, features, slice, kStreamWarps * slice);
  } else {
    plan.column_tiles = ceil_div(channels, kLinearTile);
    plan.tiles = plan.column_tiles * ceil_div(rows, kLinearTile);
    set_splits(plan, rows, channels, features, kLinearTile, 4 * kLinearTile);
  }
  plan.pitch = round_up(features, 16);
  if (a.activation == Activation::kInt8)
    plan.element_bytes = 1;
  else if (a.activation == Activation::kFixed16)
    plan.element_bytes = 4;
  else if (plan.stream && (!rows_are_aligned(a.input) || features % 8 != 0))
    plan.element_bytes = vector ? 4 : 2;
  plan.prepared_bytes = round_up(rows * plan.pitch * plan.element_bytes, 16);
  plan.scale_bytes = a.activation == Activation::kInt8 ? round_up(rows * 4, 16) : 0;
  return plan;
}

Plan plan_gradient(const ShiftLinearGradient& a) {
  const int64_t rows = a.grad_output.size[2], channels = a.grad_output.size[3];
  Plan plan = {};
  plan.column_tiles = ceil_div(a.in_features, kLinearTile);
  plan.tiles = plan.column_tiles * ceil_div(rows, kLinearTile);
  set_splits(plan, rows, a.in_features, channels, kLinearTile, 4 * kLinearTile);
  return plan;
}

template <class Function>
void with_code_format(int bits, Function function) {
  if (bits == 5)
    function(std::true_type{});
  else
    function(std::false_type{});
}

template <class E>
void stream_matrix(
    const Plan& plan, const auto& codes, const AlignedRows<E>& input, const LinearOutput& output, cudaStream_t stream) {
  const auto start = [&](auto fragments) {
    constexpr int kFragments = decltype(fragments)::value;
    constexpr bool kByte = !std::is_same_v<std::decay_t<decltype(codes)>, CodeMatrix<false>>;
    launch(stream_matrix_kernel<E, kByte, kFragments>, dim3(static_cast<unsigned>(plan.tiles * plan.splits.count)),
        dim3(kStreamWarps * kWarp), shared_bytes<AccumulatorOf<E>>(kStreamWarps * kMatrixChannels * 8 * kFragments),
        stream, codes, input, output, plan.splits, plan.row_tiles);
  };
  if (plan.fragments == 1) start(std::integral_constant<int, 1>{});
  if (plan.fragments == 2) start(std::integral_constant<int, 2>{});
  if (plan.fragments == 4) start(std::integral_constant<int, 4>{});
}

template <bool kByte>
void stream_vector(const Plan& plan, const CodeMatrix<kByte>& codes, const AlignedRows<float>& input,
    const LinearOutput& output, cudaStream_t stream) {
  const auto start = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    launch(stream_vector_kernel<kByte, kRows>, dim3(static_cast<unsigned>(plan.tiles * plan.splits.count)),
        dim3(kStreamWarps * kWarp), shared_bytes<float>(kStreamWarps * kVectorChannels * kRows), stream, codes, input,
        output, plan.splits, plan.row_tiles);
  };
  if (plan.fragments == 1) start(std::integral_constant<int, 1>{});
  if (plan.fragments == 2) start(std::integral_constant<int, 2>{});
  if (plan.fragments == 4) start(std::integral_constant<int, 4>{});
}

template <class Arithmetic, bool kGradient, bool kByte>
void linear_tiles(const Plan& plan, const Planes<typename Arithmetic::Element>& left, int64_t left_columns,
    const CodeMatrix<kByte>& codes, const float* scale, const LinearOutput& output, cudaStream_t stream) {
  launch(linear_tile_kernel<Arithmetic, kByte, kGradient>, dim3(static_cast<unsigned>(plan.tiles * plan.splits.count)),
      dim3(kLinearThreads), linear_tile_shared<Arithmetic>(), stream, left, left_columns, codes, scale, output,
      plan.splits, plan.column_tiles);
}

// Prepared rows as elements of `E`, each of several features if E is a word of bytes.
template <class E>
Planes<E> prepared_planes(const void* rows, int64_t pitch) {
  return {static_cast<const E*>(rows), 1, 0, 0, pitch, 1, true};
}

template <class Accumulator>
void finish(const Plan& plan, const LinearOutput& output, cudaStream_t stream) {
  if (plan.splits.count > 1)
    launch(finish_splits<Accumulator>, dim3(static_cast<unsigned>(ceil_div(output.rows * output.columns, 256))),
        dim3(256), 0, stream, output, plan.splits.count);
}

template <class T>
using ArithmeticOf = std::conditional_t<std::is_same_v<T, float>, ScalarArithmetic<float>, MatrixArithmetic<T>>;

}  // namespace

int64_t shift_linear_workspace(const ShiftLinear& a) { return plan_forward(a).bytes(); }

void shift_linear(const ShiftLinear& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t rows = a.input.size[2], features = a.input.size[3];
  const Plan plan = plan_forward(a);
  char* scratch = static_cast<char*>(workspace);
  float* row_scale = plan.scale_bytes > 0 ? reinterpret_cast<float*>(scratch + plan.prepared_bytes) : nullptr;
  uint32_t* partial = reinterpret_cast<uint32_t*>(scratch + plan.prepared_bytes + plan.scale_bytes);
  const LinearOutput output = {
      a.output, a.input.dtype, rows, a.channels, a.scale, a.bias, row_scale, plan.splits.count > 1 ? partial : nullptr};

  with_element_type(a.input.dtype, [&](auto element) {
    using T = decltype(element);
    const Planes<T> input = planes_of<T>(a.input);
    const auto prepare = [&](auto to) {
      using E = decltype(to);
      launch(prepare_rows<T, E>, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads),
          shared_bytes<float>(kRowThreads / kWarp), stream, input, features, plan.pitch, reinterpret_cast<E*>(scratch),
          row_scale);
    };

    if (a.activation == Activation::kInt8) {
      const CodeMatrix<false> codes = code_matrix<false>(a.codes, a.channels, features);
      prepare(int8_t{});
      if (plan.stream)
        stream_matrix<int8_t>(plan, codes,
            AlignedRows<int8_t>{reinterpret_cast<const int8_t*>(scratch), plan.pitch, rows, plan.pitch}, output,
            stream);
      else
        linear_tiles<MatrixArithmetic<int8_t>, false>(
            plan, prepared_planes<uint32_t>(scratch, plan.pitch / 4), plan.pitch / 4, codes, nullptr, output, stream);
      finish<int32_t>(plan, output, stream);
      return;
    }

    with_code_format(a.bits, [&](auto format) {
      constexpr bool kByte = decltype(format)::value;
      const CodeMatrix<kByte> codes = code_matrix<kByte>(a.codes, a.channels, features);
      if (a.activation == Activation::kFixed16) {
        prepare(int32_t{});
        linear_tiles<ScalarArithmetic<int32_t>, false>(
            plan, prepared_planes<int32_t>(scratch, plan.pitch), plan.pitch, codes, nullptr, output, stream);
        finish<int32_t>(plan, output, stream);
        return;
      }
      if (plan.stream) {
        AlignedRows<T> aligned = {input.data, input.row_stride, rows, features};
        if (plan.element_bytes > 0) {
          prepare(T{});
          aligned = {reinterpret_cast<const T*>(scratch), plan.pitch, rows, plan.pitch};
        }
        if constexpr (std::is_same_v<T, float>)
          stream_vector<kByte>(plan, codes, aligned, output, stream);
        else
          stream_matrix<T>(plan, codes, aligned, output, stream);
      } else {
        linear_tiles<ArithmeticOf<T>, false>(plan, input, features, codes, nullptr, output, stream);
      }
      finish<float>(plan, output, stream);
    });
  });
}

int64_t shift_linear_gradient_workspace(const ShiftLinearGradient& a) { return plan_gradient(a).bytes(); }

void shift_linear_gradient(const ShiftLinearGradient& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t rows = a.grad_output.size[2], channels = a.grad_output.size[3];
  const Plan plan = plan_gradient(a);
  const LinearOutput output = {a.grad_input, a.grad_output.dtype, rows, a.in_features, nullptr, nullptr, nullptr,
      plan.splits.count > 1 ? static_cast<uint32_t*>(workspace) : nullptr};
  with_element_type(a.grad_output.dtype, [&](auto element) {
    using T = decltype(element);
    with_code_format(a.bits, [&](auto format) {
      constexpr bool kByte = decltype(format)::value;
      linear_tiles<ArithmeticOf<T>, true>(plan, planes_of<T>(a.grad_output), channels,
          code_matrix<kByte>(a.codes, channels, a.in_features), a.scale, output, stream);
    });
  });
  finish<float>(plan, output, stream);
}

}  // namespace effattn::cuda
