// Toeplitz-weighted linear attention in tiles: the direct method (NPRF, arXiv 2106.12566).
//
//   W_ij = (q_i . k_j) c_{p_j - p_i},  c = exp(b - max b),   n_i = sum_j W_ij + eps,   O_i = sum_j W_ij v_j / n_i
//
// A work item is one block of at most kQueryBlock = 48 queries of a (batch, head); a thread walks a contiguous range of
// items and packs K and V whenever it meets another. Per item, over blocks of kKeyBlock = 256 keys:
//
//   W    48 x 256         micro-tiles of 6 x 64 (AVX-512; float32 6 x 32 in two chains). Weighted in registers: a row
//                         of a tile reads the table of c at consecutive entries (toeplitz_direct_tiles.h), so there is
//                         no exponential, no maximum and nothing to rescale. Rows are summed on the way.
//
//   O    48 x value_dim   += W V
//
// In L1: one panel of K (64 keys, 8 KB at M = 32 float32), the block's queries, what a tile reads of c (1.2 KB); W (51
// KB), the block of V and O in L2. Causal blocks end where their last query does; inside, c is 0 above the diagonal.
//
// FLOPs 2 N^2 (M + D) a head, half of it causal; bytes: q, k, v, output once, one packed copy of K and V a thread and
// (2h - 1)(2w - 1) exponentials a head and thread. bf16 is multiplied in pairs where the machine can (W is rounded to
// bf16, for n as for O), float16 and bf16 elsewhere are widened where they are read.
//
// Lives: toeplitz_table.h positions and c; toeplitz_direct_gradient.h the backward pass.
#include "toeplitz_direct_gradient.h"

namespace effattn::EFFATTN_ISA {
namespace toeplitz {
namespace {

struct DirectScratch {
  Buffer keys, values, tiles, table;
};

// to[at ...] = weights, in floats or in bf16; their sums by lanes, added to `sum`. What was rounded is summed as it is:
// a row with one key gives the value of that key.
template <class Arithmetic, int kVectors>
EFFATTN_INLINE Vec store_weights(float* to, int64_t at, const Vec (&weights)[kVectors], Vec sum) {
#if EFFATTN_HAS_BFLOAT16_DOT
  if constexpr (Arithmetic::kPerWord == 2) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to) + at;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    EFFATTN_UNROLL for (int v = 0; v + 1 < kVectors; v += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)weights[v + 1], (__m512)weights[v]);
      _mm512_storeu_si512(halves + v * kLanes, (__m512i)both);
      sum = (Vec)_mm512_dpbf16_ps((__m512)sum, both, ones);
    }
    if constexpr (kVectors % 2 == 1) {
      const __m256i one = (__m256i)_mm512_cvtneps_pbh((__m512)weights[kVectors - 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves + (kVectors - 1) * kLanes), one);
      sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_zextsi256_si512(one), ones);
    }
    return sum;
  }
#endif
  EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
    sum += weights[v];
    store(to + at + v * kLanes, weights[v]);
  }
  return sum;
}

template <class Arithmetic>
class DirectForward {
  using Word = typename Arithmetic::Word;
  static constexpr bool kPairs = Arithmetic::kPerWord == 2;
  // Keys summed in one register before they meet the earlier ones: bounds rounding.
  static constexpr int64_t kSummed = kPairs ? kKeyBlock : 128;

 public:
  DirectForward(const Toeplitz& arguments, const ToeplitzResult& result)
      : a_(arguments),
        result_(result),
        positions_(arguments.grid_h, arguments.grid_w),
        tokens_(arguments.query.size[2]),
        features_(arguments.query.size[3]),
        value_dim_(arguments.value.size[3]),
        depth_(words<Arithmetic>(features_)),
        query_pitch_(round_up(depth_, kLanes)),
        value_pitch_(round_up(value_dim_, kLanes)),
        weights_(positions_, arguments.is_causal, scratch().table.reserve<float>(Weights::floats(positions_))) {
    keys_ = scratch().keys.template reserve<Word>(transposed_words<Arithmetic>(tokens_, features_) + kLanes);
    values_ = scratch().values.template reserve<Word>(words<Arithmetic>(tokens_) * value_pitch_ + kLanes);
    const int64_t rows = kQueryBlock + kTileRows;
    tile_ = scratch().tiles.template reserve<float>(rows * (2 * kTilePitch + value_pitch_ + kLanes + query_pitch_));
    staged_ = tile_ + rows * kTilePitch;
    output_ = staged_ + rows * kTilePitch;
    row_sums_ = output_ + rows * value_pitch_;
    queries_ = reinterpret_cast<Word*>(row_sums_ + rows * kLanes);
  }

  static int64_t blocks(int64_t tokens) { return (tokens + kQueryBlock - 1) / kQueryBlock; }

  // Items are ordered (head, batch, query block).
  void run(int64_t begin, int64_t end) {
    const int64_t batches = a_.query.size[0], blocks = DirectForward::blocks(tokens_);
    const int64_t rows = (tokens_ + blocks - 1) / blocks;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / blocks, row = dealt(item % blocks, blocks) * rows;
      enter(pair % batches, pair / batches);
      if (row < tokens_) query_block(row, smaller(rows, tokens_ - row));
    }
    for (Buffer* buffer : {&scratch().keys, &scratch().values, &scratch().table}) buffer->trim();
  }

 private:
  static DirectScratch& scratch() {
    static thread_local DirectScratch scratch;
    return scratch;
  }

  void enter(int64_t batch, int64_t head) {
    if (batch == batch_ && head == head_) return;
    if (head != head_) weights_.load(a_.bias + head * positions_.entries);
    batch_ = batch;
    head_ = head;
    pack_transposed<Arithmetic>(keys_, matrix_at(a_.key, batch, head), tokens_, features_);
    pack_natural<Arithmetic>(values_, value_pitch_, matrix_at(a_.value, batch, head), tokens_, value_dim_);
  }

  void query_block(int64_t row, int64_t rows) {
    const int64_t padded = round_up(rows, kRowStep), end = a_.is_causal ? row + rows : tokens_;
    pack_rows<Arithmetic>(queries_, query_pitch_, matrix_at(a_.query, batch_, head_, row), rows, padded, features_);
    double sums[kQueryBlock] = {};
    for (int64_t key = 0; key < end; key += kKeyBlock) {
      const int64_t count = smaller(kKeyBlock, end - key);
      memset(row_sums_, 0, padded * kLanes * sizeof(float));
      const TileWeights weights = tile_weights(positions_, weights_, runs_, staged_, row, padded, key, count);
      for_panels<Arithmetic>(keys_, tokens_, key, count, depth_,
          [&](auto vectors, const Word* panel, int64_t width, int64_t column) __attribute__((always_inline)) {
            weigh<vectors.value>(padded, panel, width, {weights.at + column, weights.row_pitch}, column);
          });
      for (int64_t r = 0; r < rows; ++r) sums[r] += static_cast<double>(reduce_add(load(row_sums_ + r * kLanes)));
      add_output(padded, key, count);
    }
    finish(row, rows, sums);
  }

  // W of all rows and a few vectors of keys.
  template <int kVectors>
  __attribute__((noinline)) void weigh(
      int64_t rows, const Word* panel, int64_t width, TileWeights weights, int64_t column) {
    for_row_groups(rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
      constexpr int kRows = group.value;
      multiply_tile<Arithmetic, kVectors, kChains<Arithmetic>, kRows>(queries_ + r * query_pitch_, query_pitch_, 1,
          panel, width, depth_, [&](Vec(&score)[kRows][kVectors]) __attribute__((always_inline)) {
            EFFATTN_UNROLL for (int i = 0; i < kRows; ++i) {
              const float* weight = weights.row(r + i);
              float* to_sum = row_sums_ + (r + i) * kLanes;
              EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) score[i][v] *= load(weight + v * kLanes);
              store(to_sum,
                  store_weights<Arithmetic, kVectors>(tile_, (r + i) * kTilePitch + column, score[i], load(to_sum)));
            }
          });
    });
  }

  void add_output(int64_t rows, int64_t key, int64_t count) {
    const Word* weights = reinterpret_cast<const Word*>(tile_);
    const Word* values = values_ + key / Arithmetic::kPerWord * value_pitch_;
    const int64_t steps = words<Arithmetic>(count);
    for_each_column_tile(value_pitch_ / kLanes, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      for (int64_t first = 0; first < steps; first += kSummed) {
        const auto product = key == 0 && first == 0 ? multiply_rows<Arithmetic, vectors.value, false>
                                                    : multiply_rows<Arithmetic, vectors.value, true>;
        product(weights + first, kTilePitch / Arithmetic::kPerWord, 1, values + first * value_pitch_ + column,
            value_pitch_, smaller(kSummed, steps - first), output_ + column, value_pitch_, rows);
      }
    });
  }

  void finish(int64_t row, int64_t rows, const double* sums) {
    float* normalizer = result_.normalizer + (batch_ * a_.query.size[1] + head_) * tokens_ + row;
    float inverse[kQueryBlock];
    for (int64_t r = 0; r < rows; ++r) {
      normalizer[r] = static_cast<float>(sums[r] + a_.eps);
      inverse[r] = inverse_normalizer(normalizer[r]);
    }
    store_rows_by(
        matrix_at(result_.output, batch_, head_, row), rows, output_, value_pitch_,
        [&](int64_t r) __attribute__((always_inline)) { return broadcast(inverse[r]); }, value_dim_);
  }

  const Toeplitz& a_;
  const ToeplitzResult& result_;
  const Positions positions_;
  const int64_t tokens_, features_, value_dim_, depth_, query_pitch_, value_pitch_;
  Weights weights_;
  Runs runs_;
  int64_t batch_ = -1, head_ = -1;
  Word* keys_;
  Word* values_;
  Word* queries_;
  float* tile_;
  float* staged_;
  float* output_;
  float* row_sums_;
};

// The avx512_bf16 level holds bf16 products only, as forward_any_type (forward.h).
#if EFFATTN_HAS_BFLOAT16_DOT
using DirectArithmetic = BFloat16Pair;
#else
using DirectArithmetic = Float32;
#endif

}  // namespace
}  // namespace toeplitz

void toeplitz_direct_forward(const Toeplitz& arguments, const ToeplitzResult& result, const Runtime& runtime) {
  using namespace toeplitz;
  using Forward = DirectForward<DirectArithmetic>;
  const Tensor& query = arguments.query;
  const int64_t pairs = query.size[0] * query.size[1];
  const double flops = (arguments.is_causal ? 1.0 : 2.0) * static_cast<double>(pairs * query.size[2]) *
                       static_cast<double>(query.size[2] * (query.size[3] + arguments.value.size[3]));
  for_items(runtime, pairs * Forward::blocks(query.size[2]), flops,
      [&](int64_t begin, int64_t end) { Forward(arguments, result).run(begin, end); });
}

void toeplitz_direct_backward(const Toeplitz& arguments, const ToeplitzGrad& grad, const Runtime& runtime) {
  using namespace toeplitz;
  direct_backward<DirectArithmetic>(arguments, grad, runtime);
}

}  // namespace effattn::EFFATTN_ISA
