// Gradients of shift_add_attention (formulas there), straight through the binary functions. With G = dL/dO, R = U /
// |U|:
//
//   dU = (G - R (R . G)) / |U|        B = bq^T dU
//   dV = dU / 2 + conv^T(G) + (1 / pi) bk B
//   dq^ = mask (1 / pi) dU (scale_k A)^T      dk^ = mask (1 / pi) V B^T      mask: x^ >= 0 (everywhere for signs)
//   dx = (dx^ - x^ (x^ . dx^)) / |x|
//   dw[t] = sum over b, n, d of G[n, d] V[n + t - taps / 2, d]
//
// 1. binarize_rows: q and k to packed bits, with the thresholds of the forward pass.
// 2. query_gradient_kernel: U again, dU in shared memory and, in fp32, in scratch memory; dq.
// 3. B without the scale of bq: add_matmul of the packed bits of q, transposed, with dU.
// 4. key_gradient_kernel: dV, then dk.
// 5. weight_gradient_kernel and sum_splits: dw in two ordered stages.
//
// 32 tokens a block and 2 x 32 D floats of shared memory in 2. and 4. Bytes: q, k twice (bits, then dx), V twice, G
// twice, dq, dk, dV once, and 3 x 4 N D for dU; with a residual weight V and G once more. FLOPs: 12 N D^2 per head.
#include "shift_add_attention.h"

namespace effattn::cuda {
namespace {

// e: dx^ of the tile without its mask. out: dx.
template <class T>
EFFATTN_DEVICE void store_normalised_gradient(SharedArray<float> e, const Extent& extent, const Planes<T>& input,
    int64_t plane, int64_t token, bool sign, const ResultPlanes<T>& out) {
  for (int i = 0; i < kTokensPerWarp; ++i) {
    const int r = warp_index() * kTokensPerWarp + i;
    const bool valid = token + r < extent.tokens;
    const T* row = input.plane(plane) + (token + r) * input.row_stride;
    float squares = 0, along = 0;  // along = x^ . dx^
    for (int d = lane_index(); d < extent.size && valid; d += kWarp) {
      const float x = to_float(row[d * input.column_stride]);
      squares = fmaf(x, x, squares);
    }
    squares = warp_reduce(squares, Sum());
    const float norm = squares > 0 ? sqrtf(squares) : INFINITY;  // a zero row: all that is divided by it is 0
    for (int d = lane_index(); d < extent.size && valid; d += kWarp) {
      const float x = to_float(row[d * input.column_stride]), gradient = e[r * extent.row_pitch + d];
      if (sign || x >= 0) along = fmaf(x / norm, gradient, along);
    }
    along = warp_reduce(along, Sum());
    for (int d = lane_index(); d < extent.size && valid; d += kWarp) {
      const float x = to_float(row[d * input.column_stride]), gradient = e[r * extent.row_pitch + d];
      const float masked = sign || x >= 0 ? gradient : 0.0f;
      *out.at(plane, token + r, d) = from_float<T>((masked - x / norm * along) / norm);
    }
  }
}

EFFATTN_DEVICE void clear_padding(SharedArray<float> rows, const Extent& extent) {
  const int padding = extent.row_pitch - extent.size;
  for (int i = thread_index(); i < kTokens * padding; i += kAttentionThreads)
    rows[i / padding * extent.row_pitch + extent.size + i % padding] = 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 2) query_gradient_kernel(Planes<T> grad_output, Planes<T> query,
    Planes<T> value, const uint32_t* query_words, const float* context, const float* statistics, bool sign,
    Extent extent, float* grad_u, ResultPlanes<T> grad_query) {
  SharedMemory shared;
  const auto u = shared.array<float>(kTokens * extent.row_pitch);
  const auto e = shared.array<float>(kTokens * extent.row_pitch);
  const auto tile = shared.array<float>(kMatrixTile * kMatrixPitch);
  const auto words = shared.array<uint32_t>(kTokens * extent.words);

  const int64_t plane = blockIdx.x / extent.blocks_per_plane, block = blockIdx.x % extent.blocks_per_plane;
  const int size = extent.size, pitch = extent.row_pitch;
  const T *v = value.plane(plane), *g = grad_output.plane(plane);
  const float key_scale = statistics[4 * plane + 2], factor = kInversePi * statistics[4 * plane] * key_scale;
  MatrixPieces matrix(tile, context + plane * size * size, size);
  clear_padding(u, extent);

  const int64_t last = min(extent.tiles_per_plane, (block + 1) * extent.tiles_per_block);
  for (int64_t t = block * extent.tiles_per_block; t < last; ++t) {
    const int64_t token = t * kTokens;
    load_words(words, query_words + plane * extent.tokens * extent.words, token, extent);
    sync_block();
    bits_times_matrix(words, extent.words, sign ? -1.0f : 0.0f, matrix, [&](int r, int c, float sum) {
      float half_v = 0;
      if (token + r < extent.tokens)
        half_v = 0.5f * to_float(v[(token + r) * value.row_stride + c * value.column_stride]);
      u[r * pitch + c] = fmaf(factor, sum, half_v);
    });
    sync_block();

    for (int i = 0; i < kTokensPerWarp; ++i) {  // U becomes dU
      const int r = warp_index() * kTokensPerWarp + i;
      const bool valid = token + r < extent.tokens;
      const T* g_row = g + (token + r) * grad_output.row_stride;
      float squares = 0, along = 0;  // along = R . G
      for (int d = lane_index(); d < size; d += kWarp) {
        const float x = u[r * pitch + d];
        squares = fmaf(x, x, squares);
      }
      squares = warp_reduce(squares, Sum());
      const float norm = squares > 0 ? sqrtf(squares) : INFINITY;  // U = 0: all that is divided by it is 0
      for (int d = lane_index(); d < size && valid; d += kWarp)
        along = fmaf(u[r * pitch + d] / norm, to_float(g_row[d * grad_output.column_stride]), along);
      along = warp_reduce(along, Sum());
      for (int d = lane_index(); d < size; d += kWarp) {
        float gradient = 0;
        if (valid) {
          const float unit = u[r * pitch + d] / norm;
          gradient = (to_float(g_row[d * grad_output.column_stride]) - unit * along) / norm;
          grad_u[(plane * extent.tokens + token + r) * size + d] = gradient;
        }
        u[r * pitch + d] = gradient;
      }
    }
    sync_block();

    rows_times_transposed(
        u, pitch, matrix, [&](int r, int c, float sum) { e[r * pitch + c] = kInversePi * key_scale * sum; });
    sync_block();
    store_normalised_gradient(e, extent, query, plane, token, sign, grad_query);
  }
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_gradient_kernel(Planes<T> grad_output, Planes<T> key, Planes<T> value, const uint32_t* key_words,
        const float* gradient_context, const float* statistics, const float* grad_u, const float* residual_weight,
        int64_t taps, bool sign, Extent extent, ResultPlanes<T> grad_key, ResultPlanes<T> grad_value) {
  SharedMemory shared;
  const auto v_rows = shared.array<float>(kTokens * extent.row_pitch);
  const auto e = shared.array<float>(kTokens * extent.row_pitch);
  const auto tile = shared.array<float>(kMatrixTile * kMatrixPitch);
  const auto words = shared.array<uint32_t>(kTokens * extent.words);

  const int64_t plane = blockIdx.x / extent.blocks_per_plane, block = blockIdx.x % extent.blocks_per_plane;
  const int size = extent.size, pitch = extent.row_pitch;
  const T *v = value.plane(plane), *g = grad_output.plane(plane);
  const float query_scale = statistics[4 * plane], factor = kInversePi * query_scale * statistics[4 * plane + 2];
  const float* weight = residual_weight != nullptr ? residual_weight + plane % grad_output.heads * taps : nullptr;
  MatrixPieces matrix(tile, gradient_context + plane * size * size, size);
  clear_padding(v_rows, extent);

  const int64_t last = min(extent.tiles_per_plane, (block + 1) * extent.tiles_per_block);
  for (int64_t t = block * extent.tiles_per_block; t < last; ++t) {
    const int64_t token = t * kTokens;
    load_words(words, key_words + plane * extent.tokens * extent.words, token, extent);
    for (int i = thread_index(); i < kTokens * size; i += kAttentionThreads) {
      const int r = i / size, d = i % size;
      float x = 0;
      if (token + r < extent.tokens) x = to_float(v[(token + r) * value.row_stride + d * value.column_stride]);
      v_rows[r * pitch + d] = x;
    }
    sync_block();
    bits_times_matrix(words, extent.words, sign ? -1.0f : 0.0f, matrix,
        [&](int r, int c, float sum) { e[r * pitch + c] = factor * sum; });
    sync_block();

    const int row = warp_index() * kTokensPerWarp;
    for (int d = lane_index(); d < size; d += kWarp) {
      float sum[kTokensPerWarp];
#pragma unroll
      for (int i = 0; i < kTokensPerWarp; ++i) {
        sum[i] = e[(row + i) * pitch + d];
        if (token + row + i < extent.tokens)
          sum[i] = fmaf(0.5f, grad_u[(plane * extent.tokens + token + row + i) * size + d], sum[i]);
      }
      if (weight != nullptr)
        convolve<true>(
            g + d * grad_output.column_stride, grad_output.row_stride, extent.tokens, token + row, weight, taps, sum);
#pragma unroll
      for (int i = 0; i < kTokensPerWarp; ++i)
        if (token + row + i < extent.tokens) *grad_value.at(plane, token + row + i, d) = from_float<T>(sum[i]);
    }
    sync_block();

    rows_times_transposed(
        v_rows, pitch, matrix, [&](int r, int c, float sum) { e[r * pitch + c] = kInversePi * query_scale * sum; });
    sync_block();
    store_normalised_gradient(e, extent, key, plane, token, sign, grad_key);
  }
}

constexpr int kTaps = 9;  // as published: one pass
constexpr int64_t kWeightTokens = 256;

// partial[chunk, b, h, t] over kWeightTokens tokens.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) weight_gradient_kernel(
    Planes<T> grad_output, Planes<T> value, int64_t tokens, int size, int64_t taps, int64_t planes, float* partial) {
  SharedMemory shared;
  const auto scratch = shared.array<float>(kAttentionThreads / kWarp);
  const int64_t plane = blockIdx.x % planes, begin = blockIdx.x / planes * kWeightTokens;
  const T *v = value.plane(plane), *g = grad_output.plane(plane);
  const int count = static_cast<int>(min(kWeightTokens, tokens - begin));
  for (int64_t tap = 0; tap < taps; tap += kTaps) {
    float sum[kTaps] = {};
    for (int i = thread_index(); i < count * size; i += kAttentionThreads) {
      const int64_t token = begin + i / size, d = i % size;
      const float gradient = to_float(g[token * grad_output.row_stride + d * grad_output.column_stride]);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const int64_t at = token + tap + j - taps / 2;
        if (at >= 0 && at < tokens)
          sum[j] = fmaf(gradient, to_float(v[at * value.row_stride + d * value.column_stride]), sum[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const float total = block_reduce(sum[j], Sum(), scratch);
      if (thread_index() == 0 && tap + j < taps) partial[blockIdx.x * taps + tap + j] = total;
    }
  }
}

struct Workspace {
  int64_t words, grad_u, context, partial, product;  // bytes; partial: of the residual weight

  int64_t total() const { return 2 * words + grad_u + context + partial + product; }
};

int64_t round16(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

// B = bq^T dU, dU contiguous in scratch memory.
AddMatmul gradient_context(const ShiftAddAttentionGradient& a, const uint32_t* words, float* grad_u, float* product) {
  const int64_t tokens = a.query.size[2], size = a.query.size[3];
  const Tensor dense = {grad_u, {a.query.size[0], a.query.size[1], tokens, size},
      {a.query.size[1] * tokens * size, tokens * size, size, 1}, DType::kFloat32};
  return {words, dense, product, DType::kFloat32, size, a.binarize == Binarize::kSign, true};
}

Workspace workspace_of(const ShiftAddAttentionGradient& a) {
  const int64_t planes = a.query.size[0] * a.query.size[1], tokens = a.query.size[2], size = a.query.size[3];
  return {round16(planes * tokens * ((size + 31) / 32) * 4), round16(planes * tokens * size * 4),
      round16(planes * size * size * 4),
      a.grad_residual_weight != nullptr ? round16(planes * ceil_div(tokens, kWeightTokens) * a.taps * 4) : 0,
      add_matmul_workspace(gradient_context(a, nullptr, nullptr, nullptr))};
}

}  // namespace

int64_t shift_add_attention_gradient_workspace(const ShiftAddAttentionGradient& a) { return workspace_of(a).total(); }

void shift_add_attention_gradient(const ShiftAddAttentionGradient& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t planes = a.query.size[0] * a.query.size[1], tokens = a.query.size[2];
  const Workspace bytes = workspace_of(a);
  char* scratch = static_cast<char*>(workspace);
  const auto take = [&](int64_t size) {
    char* memory = scratch;
    scratch += size;
    return memory;
  };
  uint32_t* query_words = reinterpret_cast<uint32_t*>(take(bytes.words));
  uint32_t* key_words = reinterpret_cast<uint32_t*>(take(bytes.words));
  float* grad_u = reinterpret_cast<float*>(take(bytes.grad_u));
  float* context = reinterpret_cast<float*>(take(bytes.context));
  float* partial = reinterpret_cast<float*>(take(bytes.partial));

  const Extent extent = extent_of(a.query);
  const bool sign = a.binarize == Binarize::kSign, threshold = a.binarize == Binarize::kMeanThreshold;
  const dim3 grid(static_cast<unsigned>(planes * extent.blocks_per_plane)), block(kAttentionThreads);
  const size_t shared = 2 * extent.rows_bytes() + extent.matrix_bytes() + extent.words_bytes();

  with_element_type(a.query.dtype, [&](auto element) {
    using T = decltype(element);
    const Planes<T> g = planes_of<T>(a.grad_output), v = planes_of<T>(a.value);
    launch_binarize<T>(a.query, threshold ? a.statistics + 1 : nullptr, query_words, nullptr, false, stream);
    launch_binarize<T>(a.key, threshold ? a.statistics + 3 : nullptr, key_words, nullptr, false, stream);
    launch(query_gradient_kernel<T>, grid, block, shared, stream, g, planes_of<T>(a.query), v,
        static_cast<const uint32_t*>(query_words), a.context, a.statistics, sign, extent, grad_u,
        result_planes_of<T>(a.grad_query));
    add_matmul(gradient_context(a, query_words, grad_u, context), scratch, stream);
    launch(key_gradient_kernel<T>, grid, block, shared, stream, g, planes_of<T>(a.key), v,
        static_cast<const uint32_t*>(key_words), static_cast<const float*>(context), a.statistics,
        static_cast<const float*>(grad_u), a.residual_weight, a.taps, sign, extent, result_planes_of<T>(a.grad_key),
        result_planes_of<T>(a.grad_value));
    if (a.grad_residual_weight == nullptr) return;
    const int64_t chunks = ceil_div(tokens, kWeightTokens), count = a.query.size[1] * a.taps;
    launch(weight_gradient_kernel<T>, dim3(static_cast<unsigned>(planes * chunks)), block,
        shared_bytes<float>(kAttentionThreads / kWarp), stream, g, v, tokens, extent.size, a.taps, planes, partial);
    launch(sum_splits<float>, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, stream,
        static_cast<const float*>(partial), chunks * a.query.size[0], count, a.grad_residual_weight);
  });
}

}  // namespace effattn::cuda
