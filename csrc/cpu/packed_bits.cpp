// Operands of one bit per element (MatAdd of arXiv 2306.06446 and its two-sided form).
//
//   pack_signs      bit = x > 0
//   binary_matmul   C[m][n] = sum_k a[m][k] b[n][k]:  popcount(a & b), or for signs  length - 2 popcount(a ^ b)
//   add_matmul      Y[m] = sum_k b[m][k] X[k]: the sum of the selected (or signed) rows of X; backward the same with
//   the
//                   bits transposed
//
// binary_matmul: micro-tiles of 6 x 64 counts (packed_bits.h, gemm.h), blocks of 512 columns packed once per range of
// rows. 2 M N K operations for 4 M N bytes written: bound by the writes at the lengths of attention heads.
// add_matmul: "four Russians". For 4 rows of X the 16 partial sums are tabulated, so 4 bits cost one addition: 32 rows
// x 32 columns of X give 8 tables of 16 x 32 floats (16 KB, in L1) that serve kSumRows output rows, whose sums (32 KB)
// pass through L2. Up to kFewRows rows the rows of X are added directly. M N K / 4 additions plus 16/4 per element of X
// and block of kSumRows rows.
#include "packed_bits.h"

#include "api.h"

namespace effattn::EFFATTN_ISA {
namespace {

struct BitScratch {
  Buffer rows, panels, transposed;
};

BitScratch& bit_scratch() {
  static thread_local BitScratch scratch;
  return scratch;
}

// ---- pack_signs ----

EFFATTN_INLINE uint32_t positive(Vec x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_GT_OQ));
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpgt_ps((__m128)x, _mm_setzero_ps()));
#else
  const IntVec yes = x > Vec{};
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (yes[lane] & 1u) << lane;
  return bits;
#endif
}

template <class T>
void sign_row(uint32_t* to, const T* from, int64_t stride, int64_t columns) {
  for (int64_t first = 0; first < columns; first += 32, ++to) {
    T part[32] = {};
    const T* source = from + first;
    if (stride != 1 || columns - first < 32) {
      for (int64_t i = 0; i < smaller(32, columns - first); ++i) part[i] = from[(first + i) * stride];
      source = part;
    }
    uint32_t bits = 0;
    EFFATTN_UNROLL for (int v = 0; v < 32; v += kLanes) bits |= positive(load_float(source + v)) << v;
    *to = bits;
  }
}

void sign_row(uint32_t* to, const Matrix& row, int64_t columns) {
  if (row.dtype == DType::kBFloat16)
    sign_row(to, static_cast<const bfloat16*>(row.data) + row.offset(0), row.column_stride, columns);
  else if (row.dtype == DType::kFloat16)
    sign_row(to, static_cast<const float16*>(row.data) + row.offset(0), row.column_stride, columns);
  else
    sign_row(to, static_cast<const float*>(row.data) + row.offset(0), row.column_stride, columns);
}

// ---- binary_matmul ----

constexpr int64_t kBitColumns = 512;

struct BinaryProduct {
  const BinaryMatmul& call;
  int64_t words, row_block, row_blocks, column_blocks;

  template <bool kSigns>
  void run(int64_t begin, int64_t end) const {
    uint32_t* panels = bit_scratch().panels.reserve<uint32_t>(kBitColumns * words + kLanes);
    uint32_t* rows = bit_scratch().rows.reserve<uint32_t>(round_up(row_block, kTileRows) * words + 1);
    int64_t held = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / row_blocks, batch = block / column_blocks;
      const int64_t column = block % column_blocks * kBitColumns, row = item % row_blocks * row_block;
      const int64_t columns = smaller(kBitColumns, call.columns - column), count = smaller(row_block, call.rows - row);
      if (block != held)
        pack_bit_panels(panels, call.right + (batch * call.columns + column) * words, columns, call.length);
      held = block;
      pack_bit_rows(
          rows, call.left + (batch * call.rows + row) * words, count, round_up(count, kTileRows), call.length);
      int32_t* to = call.output + (batch * call.rows + row) * call.columns + column;
      for (int64_t r = 0; r < count; r += kTileRows)
        for (int64_t c = 0; c < columns; c += kTileColumns)
          tile<kSigns>(rows + r * words, panels + c * words, to + r * call.columns + c, smaller(kTileRows, count - r),
              columns - c);
    }
    bit_scratch().rows.trim();
  }

  template <bool kSigns>
  EFFATTN_INLINE void tile(const uint32_t* a, const uint32_t* b, int32_t* to, int64_t rows, int64_t columns) const {
    const WordVec length = static_cast<uint32_t>(call.length) - WordVec{};  // read before the stores below
    const int64_t pitch = call.columns;
    multiply_tile<BitDot<kSigns>, kTileVectors>(
        a, words, 1, b, kTileColumns, words, [&](Vec(&counts)[kTileRows][kTileVectors]) __attribute__((always_inline)) {
          const auto value = [&](int i, int v) __attribute__((always_inline)) {
            const WordVec count = (WordVec)counts[i][v];
            return (Vec)(kSigns ? length - (count + count) : count);
          };
          if (rows >= kTileRows && columns >= kTileColumns) {
            EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < kTileVectors; ++v)
                store(reinterpret_cast<float*>(to + i * pitch + v * kLanes), value(i, v));
          } else {
            EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < kTileVectors; ++v) {
              if (i < rows)
                store_partial(reinterpret_cast<float*>(to + i * pitch + v * kLanes), value(i, v), columns - v * kLanes);
            }
          }
        });
  }
};

// ---- add_matmul ----

constexpr int64_t kSumColumns = 32;
constexpr int64_t kSumRows = 256;
constexpr int kSumVectors = kSumColumns / kLanes;
constexpr int64_t kFewRows = 4, kFewColumns = 512;

struct BitSums {
  const uint32_t* bits;  // (batches, rows, words)
  Tensor dense, output;  // (1, batches, length, columns), (1, batches, rows, columns)
  bool signs;
  int64_t rows, words, row_blocks, column_blocks;

  BitSums(const uint32_t* bits, const Tensor& dense, const Tensor& output, bool signs)
      : bits(bits),
        dense(dense),
        output(output),
        signs(signs),
        rows(output.size[2]),
        words(bit_words(dense.size[2])),
        row_blocks((rows + kSumRows - 1) / kSumRows),
        column_blocks((output.size[3] + kSumColumns - 1) / kSumColumns) {}

  void run_all(const Runtime& runtime) {
    if (output.size[1] == 0 || rows == 0 || output.size[3] == 0) return;
    if (rows <= kFewRows) {
      column_blocks = (output.size[3] + kFewColumns - 1) / kFewColumns;
      return run_items(
          runtime, output.size[1] * column_blocks, 2.0 * output.size[1] * rows * output.size[3] * dense.size[2],
          [](int64_t begin, int64_t end, void* self) { static_cast<BitSums*>(self)->run_few(begin, end); }, this);
    }
    run_items(
        runtime, output.size[1] * column_blocks * row_blocks,
        0.5 * output.size[1] * rows * output.size[3] * dense.size[2],
        [](int64_t begin, int64_t end, void* self) { static_cast<BitSums*>(self)->run(begin, end); }, this);
  }

  // Bound by reading dense: long pieces of its rows, added where the bit is set (or with their sign flipped where not).
  void run_few(int64_t begin, int64_t end) const {
    float* line = bit_scratch().rows.reserve<float>((1 + kFewRows) * kFewColumns);
    float* sums = line + kFewColumns;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item % column_blocks * kFewColumns, batch = item / column_blocks;
      const int64_t columns = smaller(kFewColumns, output.size[3] - column), padded = round_up(columns, kLanes);
      const Matrix from = shifted(matrix_at(dense, 0, batch), column);
      memset(sums, 0, rows * kFewColumns * sizeof(float));
      for (int64_t k = 0; k < dense.size[2]; ++k) {
        row_to_float(line, from, k, columns, padded);
        for (int64_t r = 0; r < rows; ++r) {
          const uint32_t bit = bits[(batch * rows + r) * words + k / 32] >> (k % 32) & 1;
          const uint32_t flip = signs && !bit ? 0x80000000u : 0;
          if (!signs && !bit) continue;
          float* sum = sums + r * kFewColumns;
          for (int64_t c = 0; c < padded; c += kLanes)
            store(sum + c, load(sum + c) + (Vec)((WordVec)load(line + c) ^ flip));
        }
      }
      const Matrix to = shifted(matrix_at(output, 0, batch), column);
      for (int64_t r = 0; r < rows; ++r) store_row(to, r, sums + r * kFewColumns, broadcast(1.f), columns);
    }
  }

  static Matrix shifted(Matrix matrix, int64_t column) {
    matrix.data = static_cast<const char*>(matrix.data) + column * matrix.column_stride * element_size(matrix.dtype);
    return matrix;
  }

  void run(int64_t begin, int64_t end) const {
    float* tables = bit_scratch().rows.reserve<float>((8 * 16 + 32 + kSumRows) * kSumColumns);
    float* lines = tables + 8 * 16 * kSumColumns;
    float* sums = lines + 32 * kSumColumns;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % row_blocks, panel = item / row_blocks % column_blocks,
                    batch = item / row_blocks / column_blocks;
      const int64_t row = block * kSumRows, count = smaller(kSumRows, rows - row);
      const int64_t column = panel * kSumColumns, columns = smaller(kSumColumns, output.size[3] - column);
      const Matrix from = shifted(matrix_at(dense, 0, batch), column);
      memset(sums, 0, count * kSumColumns * sizeof(float));
      for (int64_t w = 0; w < words; ++w) {
        const int64_t live = smaller(32, dense.size[2] - 32 * w);
        for (int64_t k = 0; k < 32; ++k) {
          if (k < live)
            row_to_float(lines + k * kSumColumns, from, 32 * w + k, columns, kSumColumns);
          else
            memset(lines + k * kSumColumns, 0, kSumColumns * sizeof(float));
        }
        const int nibbles = static_cast<int>((live + 3) / 4);
        for (int t = 0; t < nibbles; ++t) tabulate(tables + t * 16 * kSumColumns, lines + 4 * t * kSumColumns);
        const uint32_t* word = bits + (batch * rows + row) * words + w;
        if (nibbles == 8)
          add<true>(sums, tables, word, count, 8);
        else
          add<false>(sums, tables, word, count, nibbles);
      }
      const Matrix to = shifted(matrix_at(output, 0, batch, row), column);
      for (int64_t r = 0; r < count; ++r) store_row(to, r, sums + r * kSumColumns, broadcast(1.f), columns);
    }
  }

  // to[p] = sum of four lines, those with a set bit in p plainly, the others not at all or with a minus.
  void tabulate(float* to, const float* lines) const {
    for (int64_t c = 0; c < kSumColumns; c += kLanes) {
      Vec pair[2][4];
      EFFATTN_UNROLL for (int half = 0; half < 2; ++half) {
        const Vec x = load(lines + 2 * half * kSumColumns + c), y = load(lines + (2 * half + 1) * kSumColumns + c);
        pair[half][0] = signs ? -x - y : Vec{};
        pair[half][1] = signs ? x - y : x;
        pair[half][2] = signs ? y - x : y;
        pair[half][3] = x + y;
      }
      EFFATTN_UNROLL for (int p = 0; p < 16; ++p) store(to + p * kSumColumns + c, pair[0][p & 3] + pair[1][p >> 2]);
    }
  }

  template <bool kWhole>
  void add(float* sums, const float* tables, const uint32_t* word, int64_t count, int nibbles) const {
    for (int64_t r = 0; r < count; ++r, sums += kSumColumns, word += words) {
      Vec sum[kSumVectors];
      EFFATTN_UNROLL for (int v = 0; v < kSumVectors; ++v) sum[v] = load(sums + v * kLanes);
      const uint32_t bits = *word;
      const auto nibble = [&](int t) __attribute__((always_inline)) {
        const float* line = tables + (16 * t + (bits >> (4 * t) & 15)) * kSumColumns;
        EFFATTN_UNROLL for (int v = 0; v < kSumVectors; ++v) sum[v] += load(line + v * kLanes);
      };
      if constexpr (kWhole) {
        EFFATTN_UNROLL for (int t = 0; t < 8; ++t) nibble(t);
      } else {
        for (int t = 0; t < nibbles; ++t) nibble(t);
      }
      EFFATTN_UNROLL for (int v = 0; v < kSumVectors; ++v) store(sums + v * kLanes, sum[v]);
    }
  }
};

// bits[i] bit j <-> bits[j] bit i.
EFFATTN_INLINE void transpose_bits(uint32_t (&bits)[32]) {
  uint32_t mask = 0x0000ffffu;
  for (int distance = 16; distance != 0; distance >>= 1, mask ^= mask << distance)
    for (int i = 0; i < 32; i = (i + distance + 1) & ~distance) {
      const uint32_t swap = ((bits[i] >> distance) ^ bits[i + distance]) & mask;
      bits[i] ^= swap << distance;
      bits[i + distance] ^= swap;
    }
}

struct BitTranspose {
  const uint32_t* from;  // (batches, rows, words)
  uint32_t* to;          // (batches, columns, bit_words(rows))
  int64_t rows, words, columns;

  void run(int64_t begin, int64_t end) const {
    const int64_t row_words = bit_words(rows);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % row_words, batch = item / row_words;
      for (int64_t w = 0; w < words; ++w) {
        uint32_t bits[32];
        for (int64_t r = 0; r < 32; ++r)
          bits[r] = 32 * block + r < rows ? from[(batch * rows + 32 * block + r) * words + w] : 0;
        transpose_bits(bits);
        for (int64_t k = 0; k < smaller(32, columns - 32 * w); ++k)
          to[(batch * columns + 32 * w + k) * row_words + block] = bits[k];
      }
    }
  }
};

}  // namespace

void pack_signs(const PackSigns& call, const Runtime& runtime) {
  constexpr int64_t kBlock = 64;
  const int64_t* size = call.input.size;
  const int64_t rows = size[0] * size[1] * size[2];
  if (rows == 0 || size[3] == 0) return;
  run_items(
      runtime, (rows + kBlock - 1) / kBlock, 4.0 * rows * size[3],
      [](int64_t begin, int64_t end, void* opaque) {
        const PackSigns& call = *static_cast<const PackSigns*>(opaque);
        const int64_t* size = call.input.size;
        const int64_t words = bit_words(size[3]);
        for (int64_t row = begin * kBlock; row < smaller(end * kBlock, size[0] * size[1] * size[2]); ++row) {
          const int64_t head = row / size[2];
          sign_row(
              call.packed + row * words, matrix_at(call.input, head / size[1], head % size[1], row % size[2]), size[3]);
        }
      },
      const_cast<PackSigns*>(&call));
}

void binary_matmul(const BinaryMatmul& call, const Runtime& runtime) {
  if (call.batches == 0 || call.rows == 0 || call.columns == 0) return;
  BinaryProduct product = {call, bit_words(call.length), 0, 0, (call.columns + kBitColumns - 1) / kBitColumns};
  const int64_t blocks = call.batches * product.column_blocks;
  const int64_t shares = (4 * runtime.threads + blocks - 1) / blocks;  // ranges of rows, so that every thread has some
  product.row_block = smaller(4096, round_up((call.rows + shares - 1) / shares, kTileRows));
  product.row_blocks = (call.rows + product.row_block - 1) / product.row_block;
  const RangeFunction run[2] = {
      [](int64_t begin, int64_t end, void* self) { static_cast<BinaryProduct*>(self)->run<false>(begin, end); },
      [](int64_t begin, int64_t end, void* self) { static_cast<BinaryProduct*>(self)->run<true>(begin, end); }};
  const double work = 8.0 * call.batches * call.rows * call.columns * (product.words + 1);
  run_items(runtime, blocks * product.row_blocks, work, run[call.signs], &product);
}

void add_matmul_forward(const AddMatmul& call, const Runtime& runtime) {
  BitSums(call.packed, call.dense, call.output, call.signs).run_all(runtime);
}

void add_matmul_backward(const AddMatmulBackward& call, const Runtime& runtime) {
  const int64_t batches = call.grad_dense.size[1], columns = call.grad_dense.size[2], rows = call.grad_output.size[2];
  if (batches == 0 || columns == 0 || call.grad_dense.size[3] == 0) return;
  uint32_t* transposed = bit_scratch().transposed.reserve<uint32_t>(batches * columns * bit_words(rows) + 1);
  BitTranspose transpose = {call.packed, transposed, rows, bit_words(columns), columns};
  run_items(
      runtime, batches * bit_words(rows), 1.0 * batches * rows * columns,
      [](int64_t begin, int64_t end, void* self) { static_cast<BitTranspose*>(self)->run(begin, end); }, &transpose);
  BitSums(transposed, call.grad_output, call.grad_dense, call.signs).run_all(runtime);
  bit_scratch().transposed.trim();
}

}  // namespace effattn::EFFATTN_ISA
