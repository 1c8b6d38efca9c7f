// Linear attention with binary queries and keys, and a depthwise convolution of the values:
//
//   x^ = x / |x|;   bq, bk = scale * 1[x^ > threshold], or +-1
//   A = bk^T V;   U = V / 2 + (1 / pi) bq A;   O = U / |U| + conv(V)
//
// 1. binarize_rows (shift_add_attention.h): q and k to packed bits, and sums of x^ or |x^| where a mean is asked for;
//    statistics_kernel adds the sums in order. A threshold other than 0 takes q and k a second time.
// 2. A without the scale of bk: add_matmul of the packed bits of k, transposed, with V (packed_bits.cu).
// 3. output_kernel: 32 tokens a block, U in shared memory (32 D floats), bits select rows of A.
//
// Bytes: q, k once (twice for mean_threshold), V twice, O once, 2 N D / 8 for the bits written and read; A comes from
// L2, 4 D^2 for every block. FLOPs counted as dense products: 4 N D^2 per head; additions: as many as bits are set.
#include "shift_add_attention.h"

namespace effattn::cuda {
namespace {

// statistics[plane] = {scale, threshold} of q, then of k, from the sums of blocks.
__global__ void __launch_bounds__(kAttentionThreads) statistics_kernel(const double* partial, int64_t planes,
    int64_t blocks_per_plane, double count, Binarize binarize, float* statistics) {
  SharedMemory shared;
  const SharedArray<double> scratch = shared.array<double>(kAttentionThreads / kWarp);
  const int64_t plane = blockIdx.x;
  const bool own = binarize == Binarize::kPerHead;
  const int64_t begin = own ? plane * blocks_per_plane : 0,
                end = own ? begin + blocks_per_plane : planes * blocks_per_plane;
  for (int tensor = 0; tensor < 2; ++tensor) {
    double mean = 0;
    if (binarize != Binarize::kSign) {
      for (int64_t i = begin + thread_index(); i < end; i += kAttentionThreads)
        mean += partial[tensor * planes * blocks_per_plane + i];
      mean = block_reduce(mean, Sum(), scratch) / (count > 0 ? count : 1.0);
    }
    if (thread_index() != 0) continue;
    const bool scaled = binarize == Binarize::kPublished || binarize == Binarize::kPerHead;
    statistics[4 * plane + 2 * tensor] = scaled ? static_cast<float>(mean) : 1.0f;
    statistics[4 * plane + 2 * tensor + 1] = binarize == Binarize::kMeanThreshold ? static_cast<float>(mean) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    output_kernel(Planes<T> value, const uint32_t* query_words, const float* context, const float* statistics,
        const float* residual_weight, int64_t taps, bool sign, Extent extent, ResultPlanes<T> output) {
  SharedMemory shared;
  const auto u = shared.array<float>(kTokens * extent.row_pitch);
  const auto tile = shared.array<float>(kMatrixTile * kMatrixPitch);
  const auto words = shared.array<uint32_t>(kTokens * extent.words);

  const int64_t plane = blockIdx.x / extent.blocks_per_plane, block = blockIdx.x % extent.blocks_per_plane;
  const int size = extent.size;
  const T* v = value.plane(plane);
  const float factor = kInversePi * statistics[4 * plane] * statistics[4 * plane + 2];
  const float* weight = residual_weight != nullptr ? residual_weight + plane % value.heads * taps : nullptr;
  MatrixPieces matrix(tile, context + plane * size * size, size);

  const int64_t last = min(extent.tiles_per_plane, (block + 1) * extent.tiles_per_block);
  for (int64_t t = block * extent.tiles_per_block; t < last; ++t) {
    const int64_t token = t * kTokens;
    load_words(words, query_words + plane * extent.tokens * extent.words, token, extent);
    sync_block();
    bits_times_matrix(words, extent.words, sign ? -1.0f : 0.0f, matrix, [&](int r, int c, float sum) {
      float half_v = 0;
      if (token + r < extent.tokens)
        half_v = 0.5f * to_float(v[(token + r) * value.row_stride + c * value.column_stride]);
      u[r * extent.row_pitch + c] = fmaf(factor, sum, half_v);
    });
    sync_block();

    const int row = warp_index() * kTokensPerWarp;
    float inverse[kTokensPerWarp];
#pragma unroll
    for (int i = 0; i < kTokensPerWarp; ++i) {
      float squares = 0;
      for (int d = lane_index(); d < size; d += kWarp) {
        const float x = u[(row + i) * extent.row_pitch + d];
        squares = fmaf(x, x, squares);
      }
      squares = warp_reduce(squares, Sum());
      inverse[i] = squares > 0 ? 1 / sqrtf(squares) : 0.0f;
    }
    for (int d = lane_index(); d < size; d += kWarp) {
      float sum[kTokensPerWarp];
#pragma unroll
      for (int i = 0; i < kTokensPerWarp; ++i) sum[i] = u[(row + i) * extent.row_pitch + d] * inverse[i];
      if (weight != nullptr)
        convolve<false>(v + d * value.column_stride, value.row_stride, extent.tokens, token + row, weight, taps, sum);
#pragma unroll
      for (int i = 0; i < kTokensPerWarp; ++i)
        if (token + row + i < extent.tokens) *output.at(plane, token + row + i, d) = from_float<T>(sum[i]);
    }
    sync_block();
  }
}

struct Workspace {
  int64_t words, partial, product;  // bytes of the bits of one of q, k; of the sums of both; of add_matmul
};

AddMatmul context_product(const ShiftAddAttention& a, const uint32_t* key_words) {
  return {key_words, a.value, a.context, DType::kFloat32, a.value.size[3], a.binarize == Binarize::kSign, true};
}

Workspace workspace_of(const ShiftAddAttention& a) {
  const int64_t planes = a.query.size[0] * a.query.size[1], tokens = a.query.size[2];
  return {ceil_div(planes * tokens * ((a.query.size[3] + 31) / 32) * 4, 16) * 16,
      ceil_div(2 * planes * ceil_div(tokens, kRowsPerBlock) * 8, 16) * 16,
      add_matmul_workspace(context_product(a, nullptr))};
}

}  // namespace

int64_t shift_add_attention_workspace(const ShiftAddAttention& a) {
  const Workspace bytes = workspace_of(a);
  return 2 * bytes.words + bytes.partial + bytes.product;
}

void shift_add_attention(const ShiftAddAttention& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t planes = a.query.size[0] * a.query.size[1];
  const int64_t sums = planes * ceil_div(a.query.size[2], kRowsPerBlock);
  const Workspace bytes = workspace_of(a);
  char* scratch = static_cast<char*>(workspace);
  double* partial = reinterpret_cast<double*>(scratch);
  uint32_t* query_words = reinterpret_cast<uint32_t*>(scratch + bytes.partial);
  uint32_t* key_words = reinterpret_cast<uint32_t*>(scratch + bytes.partial + bytes.words);
  const Extent extent = extent_of(a.query);
  const bool sign = a.binarize == Binarize::kSign, threshold = a.binarize == Binarize::kMeanThreshold;

  with_element_type(a.query.dtype, [&](auto element) {
    using T = decltype(element);
    launch_binarize<T>(
        a.query, nullptr, threshold ? nullptr : query_words, sign ? nullptr : partial, !threshold, stream);
    launch_binarize<T>(
        a.key, nullptr, threshold ? nullptr : key_words, sign ? nullptr : partial + sums, !threshold, stream);
    const double count = static_cast<double>(a.query.size[2] * a.query.size[3]) *
                         static_cast<double>(a.binarize == Binarize::kPerHead ? 1 : planes);
    launch(statistics_kernel, dim3(static_cast<unsigned>(planes)), dim3(kAttentionThreads),
        shared_bytes<double>(kAttentionThreads / kWarp), stream, static_cast<const double*>(partial), planes,
        ceil_div(a.query.size[2], kRowsPerBlock), count, a.binarize, a.statistics);
    if (threshold) {
      launch_binarize<T>(a.query, a.statistics + 1, query_words, nullptr, false, stream);
      launch_binarize<T>(a.key, a.statistics + 3, key_words, nullptr, false, stream);
    }
    add_matmul(context_product(a, key_words), scratch + bytes.partial + 2 * bytes.words, stream);
    launch(output_kernel<T>, dim3(static_cast<unsigned>(planes * extent.blocks_per_plane)), dim3(kAttentionThreads),
        extent.rows_bytes() + extent.matrix_bytes() + extent.words_bytes(), stream, planes_of<T>(a.value),
        static_cast<const uint32_t*>(query_words), static_cast<const float*>(a.context),
        static_cast<const float*>(a.statistics), a.residual_weight, a.taps, sign, extent,
        result_planes_of<T>(a.output));
  });
}

}  // namespace effattn::cuda
