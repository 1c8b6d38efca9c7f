// What the backward engine (backward.h) is made of: tile shapes, the products on them, the rounding-aware delta.
#pragma once

#include "pack.h"
#include "policy.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {

inline constexpr int64_t kBackwardQueries = 96;
inline constexpr int64_t kBackwardKeys =
    192;  // a multiple of kTileRows and kTileColumns; the last block takes up to kKeyBlock
inline constexpr int64_t kTilePitch = kKeyBlock + 16;  // an odd number of cache lines: columns spread over all sets
inline constexpr int64_t kWindowTile =
    128 * kTilePitch;  // floats of a tile of whole rows, fewer where a window is small
inline constexpr int64_t kFewestTasks = 16;
static_assert(
    kBackwardKeys % kTileRows == 0 && kBackwardKeys % kTileColumns == 0 && kBackwardQueries % kQueryBlock == 0);

struct BackwardScratch {
  Buffer keys, queries, gradients, tiles;
};

inline BackwardScratch& backward_scratch() {
  static thread_local BackwardScratch scratch;
  return scratch;
}

// Blocks of kBackwardKeys keys dealt out to chunks of neighbours.
struct KeyChunks {
  int64_t keys, blocks, chunks;

  KeyChunks(int64_t keys, int64_t independent_tasks)
      : keys(keys), blocks(keys <= kKeyBlock ? 1 : (keys - kKeyBlock + kBackwardKeys - 1) / kBackwardKeys + 1) {
    const int64_t wanted = (kFewestTasks + independent_tasks - 1) / larger(independent_tasks, 1);
    chunks = larger(smaller(wanted, blocks), 1);
  }
  int64_t begin(int64_t chunk) const { return chunk * blocks / chunks * kBackwardKeys; }
  int64_t end(int64_t chunk) const { return chunk + 1 == chunks ? keys : begin(chunk + 1); }
};

// The windows of all images of a head dealt out to chunks of neighbours: images fastest, so that one index set serves
// them all. Where windows share keys a chunk is an image and holds its windows in order.
struct WindowChunks {
  static constexpr int64_t kFewestChunks = 64, kLongest = 64;  // of all heads; problems per chunk
  int64_t batches, chunks;
  bool by_image;

  WindowChunks(int64_t heads, int64_t batches, int64_t windows, bool by_image)
      : batches(batches), chunks(batches), by_image(by_image) {
    const int64_t problems = batches * windows;
    if (problems == 0 || heads == 0)
      chunks = 0;
    else if (!by_image)
      chunks = smaller(problems, larger((kFewestChunks + heads - 1) / heads, (problems + kLongest - 1) / kLongest));
  }
  int64_t begin(int64_t chunk, int64_t windows) const { return chunk * (batches * windows) / chunks; }
  int64_t batch(int64_t problem, int64_t windows) const { return by_image ? problem / windows : problem % batches; }
  int64_t window(int64_t problem, int64_t windows) const { return by_image ? problem % windows : problem / batches; }
};

// C (rows x kVectors vectors) = or += A B, six rows at a time, then four or two; rows are padded to kRowStep by the
// caller.
inline constexpr int kRowStep = 2;

template <class Arithmetic, int kVectors, bool kAdd, int kSums, int kRows>
EFFATTN_INLINE void multiply_group(const typename Arithmetic::Word* a, ptrdiff_t a_row, ptrdiff_t a_step,
    const typename Arithmetic::Word* b, ptrdiff_t b_step, ptrdiff_t steps, float* c, ptrdiff_t c_row) {
  multiply_tile<Arithmetic, kVectors, kSums, kRows>(
      a, a_row, a_step, b, b_step, steps, [&](Vec(&accumulator)[kRows][kVectors]) __attribute__((always_inline)) {
        EFFATTN_UNROLL for (int i = 0; i < kRows; ++i) {
          EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
            float* to = c + i * c_row + v * kLanes;
            store(to, kAdd ? load(to) + accumulator[i][v] : accumulator[i][v]);
          }
        }
      });
}

template <class Arithmetic, int kVectors, bool kAdd, int kSums = 1>
__attribute__((noinline)) void multiply_rows(const typename Arithmetic::Word* a, ptrdiff_t a_row, ptrdiff_t a_step,
    const typename Arithmetic::Word* b, ptrdiff_t b_step, ptrdiff_t steps, float* c, ptrdiff_t c_row, ptrdiff_t rows) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row)
    multiply_group<Arithmetic, kVectors, kAdd, kSums, kTileRows>(a, a_row, a_step, b, b_step, steps, c, c_row);
  if (rows > kRowStep)
    multiply_group<Arithmetic, kVectors, kAdd, kSums, 2 * kRowStep>(a, a_row, a_step, b, b_step, steps, c, c_row);
  else if (rows > 0)
    multiply_group<Arithmetic, kVectors, kAdd, kSums, kRowStep>(a, a_row, a_step, b, b_step, steps, c, c_row);
}

// to[rows][count] = rows . panels, keys first .. first + count of a pack_transposed operand of `packed` keys. Summed
// exactly as the forward sums its scores: then the rounding of S and of logsumexp cancels in P = exp(S - logsumexp),
// which otherwise is the largest error of dV.
template <class Arithmetic>
struct PanelProduct {
  using Word = typename Arithmetic::Word;
  const Word* rows;
  ptrdiff_t row_pitch;
  int64_t row_count, depth;
  int64_t to_pitch = kTilePitch;

  void operator()(const Word* panels, int64_t packed, int64_t first, int64_t count, float* to) const {
    constexpr int kVectors = kChainedVectors<Arithmetic>;
    for (int64_t column = 0; column < count; column += kTileColumns) {
      const int64_t width = round_up(smaller(kTileColumns, packed - first - column), kLanes);
      const Word* panel = panels + (first + column) * depth;
      const int64_t vectors = round_up(smaller(kTileColumns, count - column), kLanes) / kLanes;
      for (int64_t v = 0; v < vectors; v += kVectors)
        columns<kVectors>(vectors - v, panel + v * kLanes, width, to + column + v * kLanes);
    }
  }

  template <int kVectors>
  EFFATTN_INLINE void columns(int64_t vectors, const Word* panel, int64_t width, float* to) const {
    if (vectors >= kVectors)
      multiply_rows<Arithmetic, kVectors, false, kChains<Arithmetic>>(
          rows, row_pitch, 1, panel, width, depth, to, to_pitch, row_count);
    else if constexpr (kVectors > 1)
      columns<kVectors - 1>(vectors, panel, width, to);
  }
};

// A row with nothing to attend to gets P = exp2(-inf) = 0.
EFFATTN_INLINE float usable_logsumexp(float logsumexp) { return logsumexp == -INFINITY ? INFINITY : logsumexp; }

// delta = dO . O of rows, each summed in the order in which PanelProduct sums dO V^T: where one key dominates a row, O
// is nearly its value, and the rounding of dP - delta cancels as it does in eager's softmax backward.
template <int kSums>
inline void row_deltas(const AttentionBackward& arguments, int64_t batch, int64_t head, int64_t row, int64_t rows,
    int64_t rotation, float* delta) {
  const int64_t head_dim = arguments.query.size[3];
  alignas(64) float output[kLanes * kMaxHeadDim], gradient[kLanes * kMaxHeadDim];
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = smaller(kLanes, rows - first);
    pack_transposed<Float32>(output, matrix_at(arguments.output, batch, head, row + first, rotation), count, head_dim);
    pack_transposed<Float32>(
        gradient, matrix_at(arguments.grad_output, batch, head, row + first, rotation), count, head_dim);
    Vec sums[kSums] = {};
    int64_t d = 0;
    for (; d + kSums <= head_dim; d += kSums)
      EFFATTN_UNROLL for (int c = 0; c < kSums; ++c) sums[c] =
          fma(load(gradient + (d + c) * kLanes), load(output + (d + c) * kLanes), sums[c]);
    if constexpr (kSums == 2) sums[0] += sums[1];
    for (; d < head_dim; ++d) sums[0] = fma(load(gradient + d * kLanes), load(output + d * kLanes), sums[0]);
    store_partial(delta + first, sums[0], count);
  }
}

template <class T>
inline void rows_to_float(float* to, int64_t pitch, const Matrix& from, int64_t rows, int64_t columns) {
  const T* data = static_cast<const T*>(from.data);
  for (int64_t r = 0; r < rows; ++r, to += pitch) {
    const T* row = data + from.offset(r);
    if (from.column_stride != 1) {
      row_to_float(to, row, from.column_stride, columns, pitch);
      continue;
    }
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
      store(to + c, load_float(row + c));
      store(to + c + kLanes, load_float(row + c + kLanes));
    }
    for (; c < columns; c += kLanes) store(to + c, load_float_partial(row + c, columns - c));
  }
}

// to[row * pitch + column]; no row of zeros among them; pitch is columns rounded up to kLanes.
inline void rows_to_float(float* to, int64_t pitch, const Matrix& from, int64_t rows, int64_t columns) {
  switch (from.dtype) {
    case DType::kBFloat16:
      return rows_to_float<bfloat16>(to, pitch, from, rows, columns);
    case DType::kFloat16:
      return rows_to_float<float16>(to, pitch, from, rows, columns);
    default:
      return rows_to_float<float>(to, pitch, from, rows, columns);
  }
}

// Fetches rows that a later step reads or writes into L2, a few at a time between the products: small problems have as
// much to move as to compute.
class RowFetch {
 public:
  void clear(int64_t row_bytes, int64_t steps) {
    tensors_ = 0;
    row_ = rows_ = 0;
    row_bytes_ = row_bytes;
    steps_ = steps;
  }
  void add(const Tensor& tensor, int64_t batch, int64_t head, const int64_t* tokens, int64_t rows) {
    if (tensor.stride[3] != 1) return;
    const Matrix matrix = matrix_at(tensor, batch, head);
    sets_[tensors_++] = {
        static_cast<const char*>(matrix.data), matrix.row_stride * element_size(matrix.dtype), tokens, rows};
    rows_ = larger(rows_, rows);
  }
  void step() {
    const int64_t end = smaller(row_ + (rows_ + steps_ - 1) / steps_, rows_);
    for (int t = 0; t < tensors_; ++t)
      for (int64_t r = row_; r < smaller(end, sets_[t].rows); ++r) {
        const char* row = sets_[t].data + larger(sets_[t].tokens[r], 0) * sets_[t].stride;
        for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
        __builtin_prefetch(row + row_bytes_ - 1, 0, 2);
      }
    row_ = end;
  }

 private:
  struct Set {
    const char* data;
    int64_t stride;
    const int64_t* tokens;
    int64_t rows;
  };
  Set sets_[7];
  int tensors_ = 0;
  int64_t row_ = 0, rows_ = 0, row_bytes_ = 0, steps_ = 1;
};

// The parameter gradient of families that have none.
struct NoParameterGradient {
  static constexpr bool kActive = false;
  NoParameterGradient() = default;
  template <class Policy>
  NoParameterGradient(const Policy&, const NoParameterGradient&) {}
};

template <class Arithmetic>
EFFATTN_INLINE void store_pair(typename Arithmetic::Word* to, Vec even, Vec odd) {
#if EFFATTN_HAS_BFLOAT16_DOT
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
      24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
#endif
}

}  // namespace effattn::EFFATTN_ISA
