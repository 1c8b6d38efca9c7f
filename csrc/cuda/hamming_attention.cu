// Softmax attention whose queries and keys are bits:
//
//   S[n, m] = scale popcount(q & k),  or  scale (D - 2 popcount(q ^ k))     O = softmax(S) V     L = log sum exp S
//   dV = P^T G,  P = softmax(S)
//
// A score is a + b c with c the number of bits, 0..D, so a weight relative to the row's best is one of D + 1 numbers: a
// table in shared memory.
//
// A block of 4 warps has 64 queries and 64 columns of V. It goes over the keys twice, 64 at a time: first for the best
// c of every query, then for the weights, a 64 x 64 tile of shared memory in the dtype of V, and their product with V
// by product_tile.h. Nothing is rescaled. The gradient has 64 keys and goes over the queries once; a kernel before it
// finds the best c and the sum of weights of every query again. Shared memory: 44 KB in fp32, 26 KB in bf16. Bytes: V
// once per 64 queries, the bits of the keys twice (from L2), O and L once. FLOPs: 2 N M Dv for the product; 2 N M words
// popcounts for every 64 columns of V.
#include "product_tile.h"
#include "tile.h"

namespace effattn::cuda {
namespace {

constexpr int kTile = kProductTile, kThreads = kProductThreads;
constexpr int kMostWords = 8, kWordsPitch = kMostWords + 1;  // D <= 256
constexpr float kLog2E = 1.4426950408889634f;

// Two sides of packed rows, and how a count of bits becomes a score in units of log 2.
struct Counts {
  const uint32_t *query, *key;
  int64_t queries, keys, columns, column_tiles;
  int words, head_dim;
  bool sign;
  float offset, slope;  // score = offset + slope * count
};

Counts counts_of(const uint32_t* query, const uint32_t* key, int64_t queries, int64_t keys, int64_t columns,
    int head_dim, bool sign, float scale) {
  const float unit = scale * kLog2E;
  return {query, key, queries, keys, columns, ceil_div(columns, kTile), (head_dim + 31) / 32, head_dim, sign,
      sign ? unit * head_dim : 0.0f, sign ? -2 * unit : unit};
}

// 64 rows of words, the bits past D cleared; rows past the last one are 0.
EFFATTN_DEVICE void load_rows(
    SharedArray<uint32_t> tile, const uint32_t* rows, int64_t first, int64_t count, const Counts& a) {
  const uint32_t last = a.head_dim % 32 != 0 ? (1u << a.head_dim % 32) - 1 : ~0u;
  for (int i = thread_index(); i < kTile * a.words; i += kThreads) {
    const int row = i / a.words, word = i % a.words;
    const uint32_t bits = first + row < count ? rows[(first + row) * a.words + word] : 0;
    tile[row * kWordsPitch + word] = word == a.words - 1 ? bits & last : bits;
  }
}

// A row of words in registers, against rows in shared memory.
struct RowBits {
  uint32_t bits[kMostWords];

  EFFATTN_DEVICE RowBits(SharedArray<uint32_t> tile, int row, int words) {
#pragma unroll
    for (int w = 0; w < kMostWords; ++w) {
      bits[w] = 0;
      if (w < words) bits[w] = tile[row * kWordsPitch + w];
    }
  }
  EFFATTN_DEVICE int count(SharedArray<uint32_t> tile, int row, const Counts& a) const {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kMostWords; ++w) {
      if (w >= a.words) break;
      const uint32_t other = tile[row * kWordsPitch + w];
      sum += popcount(a.sign ? bits[w] ^ other : bits[w] & other);
    }
    return sum;
  }
};

// Two threads per query, a half of each tile of keys each.
inline constexpr int kHalf = kTile / 2;

// The count of the query's best key, in both of its threads.
EFFATTN_DEVICE int best_count(
    const RowBits& bits, int half, SharedArray<uint32_t> key_words, const uint32_t* key_rows, const Counts& a) {
  int best = a.slope > 0 ? 0 : a.head_dim;
  for (int64_t key = 0; key < a.keys; key += kTile) {
    load_rows(key_words, key_rows, key, a.keys, a);
    sync_block();
    for (int j = half; j < half + kHalf && key + j < a.keys; ++j) {
      const int count = bits.count(key_words, j, a);
      best = a.slope > 0 ? max(best, count) : min(best, count);
    }
    sync_block();
  }
  const int other = shuffle_xor(best, 1);
  return a.slope > 0 ? max(best, other) : min(best, other);
}

// exp of a score that is `steps` counts below the best.
EFFATTN_DEVICE void fill_table(SharedArray<float> table, const Counts& a) {
  for (int i = thread_index(); i <= a.head_dim; i += kThreads) table[i] = exp2_approx(-fabsf(a.slope) * i);
}

template <class T>
size_t shared_of() {
  return 2 * shared_bytes<T>(kTile * ProductOf<T>::kPitch) + 2 * shared_bytes<uint32_t>(kTile * kWordsPitch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(Counts a, Planes<T> value, T* output, float* logsumexp) {
  constexpr int kPitch = ProductOf<T>::kPitch;
  SharedMemory shared;
  const auto weights = shared.array<T>(kTile * kPitch);
  const auto values = shared.array<T>(kTile * kPitch);
  const auto query_words = shared.array<uint32_t>(kTile * kWordsPitch);
  const auto key_words = shared.array<uint32_t>(kTile * kWordsPitch);
  const auto table = shared.array<float>(a.head_dim + 1);
  const auto sums = shared.array<float>(kTile);

  const int64_t column = blockIdx.x % a.column_tiles * kTile, query_tiles = (a.queries + kTile - 1) / kTile;
  const int64_t query = blockIdx.x / a.column_tiles % query_tiles * kTile;
  const int64_t plane = blockIdx.x / a.column_tiles / query_tiles;
  const uint32_t* key_rows = a.key + plane * a.keys * a.words;
  const T* origin = value.plane(plane) + column * value.column_stride;

  load_rows(query_words, a.query + plane * a.queries * a.words, query, a.queries, a);
  fill_table(table, a);
  sync_block();

  const int row = thread_index() / 2, half = thread_index() % 2 * kHalf;
  const RowBits bits(query_words, row, a.words);
  const int best = best_count(bits, half, key_words, key_rows, a);

  float sum = 0;
  ProductOf<T> product;
  for (int64_t key = 0; key < a.keys; key += kTile) {
    fill_tile<kTile, kTile, kThreads>(
        values, kPitch, value, origin + key * value.row_stride, a.keys - key, a.columns - column);
    cp_async_commit();
    load_rows(key_words, key_rows, key, a.keys, a);
    sync_block();
    float part = 0;
    for (int j = half; j < half + kHalf; ++j) {
      float weight = 0;
      if (key + j < a.keys) {
        weight = table[abs(best - bits.count(key_words, j, a))];
      }
      part += weight;
      weights[row * kPitch + j] = from_float<T>(weight);
    }
    sum += part;
    cp_async_wait<0>();
    sync_block();
    product.template add<true>(weights, values);
    sync_block();
  }
  sum += shuffle_xor(sum, 1);
  if (half == 0) {
    sums[row] = sum > 0 ? 1 / sum : 0.0f;
    if (column == 0 && query + row < a.queries)
      logsumexp[plane * a.queries + query + row] = (a.offset + a.slope * best + log2_approx(sum)) / kLog2E;
  }
  sync_block();
  product.store([&](int r, int c, float total) {
    if (query + r < a.queries && column + c < a.columns)
      output[(plane * a.queries + query + r) * a.columns + column + c] = from_float<T>(total * sums[r]);
  });
}

// What turns counts into probabilities, anew for the gradient: exp(S - L) would carry L's own rounding, up to |L|
// 2^-24.
struct Normaliser {
  int best;
  float inverse;  // of the sum of the weights
};

__global__ void __launch_bounds__(kThreads) normaliser_kernel(Counts a, Normaliser* normalisers) {
  SharedMemory shared;
  const auto query_words = shared.array<uint32_t>(kTile * kWordsPitch);
  const auto key_words = shared.array<uint32_t>(kTile * kWordsPitch);
  const auto table = shared.array<float>(a.head_dim + 1);

  const int64_t query_tiles = (a.queries + kTile - 1) / kTile;
  const int64_t query = blockIdx.x % query_tiles * kTile, plane = blockIdx.x / query_tiles;
  const uint32_t* key_rows = a.key + plane * a.keys * a.words;
  load_rows(query_words, a.query + plane * a.queries * a.words, query, a.queries, a);
  fill_table(table, a);
  sync_block();
  const int row = thread_index() / 2, half = thread_index() % 2 * kHalf;
  const RowBits bits(query_words, row, a.words);
  const int best = best_count(bits, half, key_words, key_rows, a);
  float sum = 0;
  for (int64_t key = 0; key < a.keys; key += kTile) {
    load_rows(key_words, key_rows, key, a.keys, a);
    sync_block();
    float part = 0;
    for (int j = half; j < half + kHalf && key + j < a.keys; ++j)
      part += table[abs(best - bits.count(key_words, j, a))];
    sum += part;
    sync_block();
  }
  sum += shuffle_xor(sum, 1);
  if (half == 0 && query + row < a.queries) normalisers[plane * a.queries + query + row] = {best, 1 / sum};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_kernel(Counts a, Planes<T> grad_output, const Normaliser* normalisers, T* grad_value) {
  constexpr int kPitch = ProductOf<T>::kPitch;
  SharedMemory shared;
  const auto weights = shared.array<T>(kTile * kPitch);  // P^T: (key, query)
  const auto gradients = shared.array<T>(kTile * kPitch);
  const auto query_words = shared.array<uint32_t>(kTile * kWordsPitch);
  const auto key_words = shared.array<uint32_t>(kTile * kWordsPitch);
  const auto best = shared.array<int>(kTile);
  const auto inverse = shared.array<float>(kTile);
  const auto table = shared.array<float>(a.head_dim + 1);

  const int64_t column = blockIdx.x % a.column_tiles * kTile, key_tiles = (a.keys + kTile - 1) / kTile;
  const int64_t key = blockIdx.x / a.column_tiles % key_tiles * kTile;
  const int64_t plane = blockIdx.x / a.column_tiles / key_tiles;
  const T* origin = grad_output.plane(plane) + column * grad_output.column_stride;

  load_rows(key_words, a.key + plane * a.keys * a.words, key, a.keys, a);
  fill_table(table, a);
  sync_block();
  const int row = thread_index() / 2, half = thread_index() % 2 * kHalf;  // two threads per key
  const RowBits bits(key_words, row, a.words);
  ProductOf<T> product;
  for (int64_t query = 0; query < a.queries; query += kTile) {
    fill_tile<kTile, kTile, kThreads>(
        gradients, kPitch, grad_output, origin + query * grad_output.row_stride, a.queries - query, a.columns - column);
    cp_async_commit();
    load_rows(query_words, a.query + plane * a.queries * a.words, query, a.queries, a);
    if (thread_index() < kTile && query + thread_index() < a.queries) {
      const Normaliser normaliser = normalisers[plane * a.queries + query + thread_index()];
      best[thread_index()] = normaliser.best;
      inverse[thread_index()] = normaliser.inverse;
    }
    sync_block();
    for (int j = half; j < half + kHalf; ++j) {
      float weight = 0;
      if (query + j < a.queries && key + row < a.keys)
        weight = table[abs(best[j] - bits.count(query_words, j, a))] * inverse[j];
      weights[row * kPitch + j] = from_float<T>(weight);
    }
    cp_async_wait<0>();
    sync_block();
    product.template add<true>(weights, gradients);
    sync_block();
  }
  product.store([&](int r, int c, float total) {
    if (key + r < a.keys && column + c < a.columns)
      grad_value[(plane * a.keys + key + r) * a.columns + column + c] = from_float<T>(total);
  });
}

}  // namespace

void hamming_attention(const HammingAttention& a, void* stream) {
  const int64_t planes = a.value.size[0] * a.value.size[1];
  const Counts counts =
      counts_of(a.query, a.key, a.queries, a.value.size[2], a.value.size[3], a.head_dim, a.sign, a.scale);
  const int64_t blocks = planes * ceil_div(a.queries, kTile) * counts.column_tiles;
  with_element_type(a.value.dtype, [&](auto element) {
    using T = decltype(element);
    launch(forward_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
        shared_of<T>() + shared_bytes<float>(a.head_dim + 1) + shared_bytes<float>(kTile),
        static_cast<cudaStream_t>(stream), counts, planes_of<T>(a.value), static_cast<T*>(a.output), a.logsumexp);
  });
}

int64_t hamming_attention_gradient_workspace(const HammingAttentionGradient& a) {
  return a.grad_output.size[0] * a.grad_output.size[1] * a.grad_output.size[2] *
         static_cast<int64_t>(sizeof(Normaliser));
}

void hamming_attention_gradient(const HammingAttentionGradient& a, void* workspace, void* stream) {
  Normaliser* normalisers = static_cast<Normaliser*>(workspace);
  const int64_t planes = a.grad_output.size[0] * a.grad_output.size[1];
  const Counts counts =
      counts_of(a.query, a.key, a.grad_output.size[2], a.keys, a.grad_output.size[3], a.head_dim, a.sign, a.scale);
  const int64_t blocks = planes * ceil_div(a.keys, kTile) * counts.column_tiles;
  launch(normaliser_kernel, dim3(static_cast<unsigned>(planes * ceil_div(counts.queries, kTile))), dim3(kThreads),
      2 * shared_bytes<uint32_t>(kTile * kWordsPitch) + shared_bytes<float>(a.head_dim + 1),
      static_cast<cudaStream_t>(stream), counts, normalisers);
  with_element_type(a.grad_output.dtype, [&](auto element) {
    using T = decltype(element);
    launch(gradient_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
        shared_of<T>() + shared_bytes<float>(a.head_dim + 1) + 2 * shared_bytes<float>(kTile),
        static_cast<cudaStream_t>(stream), counts, planes_of<T>(a.grad_output),
        static_cast<const Normaliser*>(normalisers), static_cast<T*>(a.grad_value));
  });
}

}  // namespace effattn::cuda
