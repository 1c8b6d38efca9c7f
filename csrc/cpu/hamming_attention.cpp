// Softmax attention with queries and keys of one bit per element.
//
//   score = popcount(q & k), or for signs  head_dim - 2 popcount(q ^ k);   P = softmax(scale * score),  O = P V
//   backward (bits have no gradient):  dV = P^T dO,  P = exp(scale * score - logsumexp)
//
// One loop serves both: rows are queries and columns keys (forward), or rows keys and columns queries (backward), for
// the score is symmetric. A work item is a block of at most kQueryBlock = 48 rows of one head, over blocks of
// kKeyBlock = 256 columns:
//   scores    48 x 256   micro-tiles of 6 x 64 counts (packed_bits.h): small integers, exact as floats; so is the
//                        running row maximum
//   weights   per 6 rows exp2((score - max) * |scale| log2 e), in L1 (bf16: as pairs)
//   output    6 x Dv     += weights * V, as in forward.h
// Scores are exact, so eager's fp32 weights are right to one ulp, which exp(score - logsumexp) is not where logsumexp
// is large: the fp32 backward first recomputes maximum and sum of every query (kStatistics, no products). Columns' bits
// are packed once per head and thread (D / 8 bytes a column), V likewise. FLOPs 2 N M Dv per head and one exp2, one
// popcount per 32 bits a score; nothing of size N x M.
#include "api.h"
#include "packed_bits.h"
#include "policy.h"

namespace effattn::EFFATTN_ISA {
namespace {

struct HammingScratch {
  Buffer bits, values, tiles, statistics;
};

HammingScratch& hamming_scratch() {
  static thread_local HammingScratch scratch;
  return scratch;
}

enum class Pass { kForward, kStatistics, kBackward };

struct HammingCall {
  const uint32_t* row_bits;
  const uint32_t* column_bits;
  Tensor values, output;  // per column, per row
  float* logsumexp;       // written per row, or read per column
  int64_t length;
  bool signs;
  float scale;
  Pass pass;
  float* largest;  // per query, with its inverse sum behind it
};

template <class Arithmetic>
class Hamming {
  using Word = typename Arithmetic::Word;
  static constexpr bool kPairs = Arithmetic::kPerWord == 2;
  static constexpr int64_t kSummed =
      kPairs ? kKeyBlock : 128;  // bounds the rounding of long fp32 sums, as in forward.h
  static constexpr int64_t kWeightPitch = kKeyBlock / Arithmetic::kPerWord;
  static constexpr bool kRecomputed = !kPairs;
  static constexpr float kLowest = -0x1p100f;
  static constexpr float kNoCorrection[kTileRows] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f};

 public:
  explicit Hamming(const HammingCall& call)
      : call_(call),
        rows_(call.output.size[2]),
        columns_(call.values.size[2]),
        depth_(bit_words(call.length)),
        value_dim_(call.values.size[3]),
        value_pitch_(round_up(value_dim_, kLanes)),
        unit_(fabsf(call.scale) * kLog2E) {
    // score * sign(scale) = base + slope * count.
    const float sign = call.scale < 0 ? -1.f : 1.f;
    slope_ = call.signs ? -2.f * sign : sign;
    base_ = call.signs ? sign * static_cast<float>(call.length) : 0.f;
    HammingScratch& scratch = hamming_scratch();
    panels_ = scratch.bits.reserve<uint32_t>(bit_panel_words(columns_, call.length) + kLanes);
    values_ = scratch.values.template reserve<Word>(words<Arithmetic>(columns_) * value_pitch_ + kLanes);
    const int64_t shifts = call.pass == Pass::kBackward ? round_up(columns_, kTileColumns) : 0;
    scores_ = scratch.tiles.reserve<float>(
        kQueryBlock * (kKeyBlock + value_pitch_ + kLanes + depth_) + kTileRows * kWeightPitch + 2 * shifts + kLanes);
    output_ = scores_ + kQueryBlock * kKeyBlock;
    row_max_ = output_ + kQueryBlock * value_pitch_;
    shifts_ = row_max_ + kQueryBlock * kLanes;
    factors_ = shifts_ + shifts;
    weights_ = reinterpret_cast<Word*>(factors_ + shifts);
    row_bits_ = reinterpret_cast<uint32_t*>(weights_ + kTileRows * kWeightPitch);
  }

  static int64_t block_rows(int64_t rows) {
    const int64_t blocks = (rows + kQueryBlock - 1) / kQueryBlock;
    return round_up((rows + blocks - 1) / blocks, kTileRows);
  }

  static void run_all(const HammingCall& call, const Runtime& runtime) {
    const int64_t* size = call.output.size;
    if (size[0] * size[1] * size[2] == 0) return;
    const int64_t block = block_rows(size[2]);
    run_items(
        runtime, size[0] * size[1] * ((size[2] + block - 1) / block),
        2.0 * size[0] * size[1] * size[2] * call.values.size[2] * (size[3] + 32),
        [](int64_t begin, int64_t end, void* opaque) {
          const HammingCall& call = *static_cast<const HammingCall*>(opaque);
          Hamming self(call);
          call.signs ? self.run<true>(begin, end) : self.run<false>(begin, end);
        },
        const_cast<HammingCall*>(&call));
  }

 private:
  template <bool kSigns>
  void run(int64_t begin, int64_t end) {
    const int64_t block = block_rows(rows_), blocks = (rows_ + block - 1) / block;
    const int64_t heads = call_.output.size[1];
    int64_t held = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks;
      if (head != held) enter(head, head / heads, head % heads);
      held = head;
      row_block<kSigns>(head, head / heads, head % heads, item % blocks * block, block);
    }
    hamming_scratch().bits.trim();
    hamming_scratch().values.trim();
    hamming_scratch().tiles.trim();
  }

  void enter(int64_t index, int64_t batch, int64_t head) {
    pack_bit_panels(panels_, call_.column_bits + index * columns_ * depth_, columns_, call_.length);
    if (call_.pass == Pass::kStatistics) return;
    pack_natural<Arithmetic>(values_, value_pitch_, matrix_at(call_.values, batch, head), columns_, value_dim_);
    if (call_.pass == Pass::kForward) return;
    const int64_t queries = call_.output.size[0] * call_.output.size[1] * columns_;
    for (int64_t c = 0; c < round_up(columns_, kTileColumns); ++c) {
      const int64_t query = index * columns_ + c;
      const bool live = c < columns_;
      if constexpr (kRecomputed) {
        shifts_[c] = live ? call_.largest[query] : 0.f;
        factors_[c] = live ? call_.largest[queries + query] : 0.f;
      } else {
        shifts_[c] = live ? -kLog2E * call_.logsumexp[query] : -INFINITY;
      }
    }
  }

  template <bool kSigns>
  void row_block(int64_t index, int64_t batch, int64_t head, int64_t row, int64_t block) {
    const int64_t rows = smaller(block, rows_ - row), padded_rows = round_up(rows, kTileRows);
    pack_bit_rows(row_bits_, call_.row_bits + (index * rows_ + row) * depth_, rows, padded_rows, call_.length);
    for (int64_t r = 0; r < padded_rows; ++r) running_max_[r] = kLowest, running_sum_[r] = 0.f;
    if (columns_ == 0) memset(output_, 0, rows * value_pitch_ * sizeof(float));
    for (int64_t column = 0; column < columns_; column += kKeyBlock) {
      const int64_t count = smaller(kKeyBlock, columns_ - column);
      for (int64_t r = 0; r < padded_rows; ++r) store(row_max_ + r * kLanes, broadcast(kLowest));
      for (int64_t c = 0; c < count; c += kTileColumns)
        for (int64_t r = 0; r < padded_rows; r += kTileRows) score_tile<kSigns>(r, column, c, count);
      for (int64_t r = 0; r < padded_rows; r += kTileRows) {
        alignas(64) float correction[kTileRows];
        for (int i = 0; i < kTileRows; ++i)
          correction[i] =
              call_.pass == Pass::kBackward ? weigh_gradient(r + i, i, column, count) : weigh(r + i, i, count);
        if (call_.pass == Pass::kStatistics) continue;
        multiply_values(r, column, count, correction);
      }
    }
    finish(index, batch, head, row, rows);
  }

  template <bool kSigns>
  __attribute__((noinline)) void score_tile(int64_t r, int64_t column, int64_t c, int64_t count) {
    float* scores = scores_ + r * kKeyBlock + c;
    float* row_max = row_max_ + r * kLanes;
    multiply_tile<BitDot<kSigns>, kTileVectors>(row_bits_ + r * depth_, depth_, 1, panels_ + (column + c) * depth_,
        kTileColumns, depth_, [&](Vec(&counts)[kTileRows][kTileVectors]) __attribute__((always_inline)) {
          const bool whole = count - c >= kTileColumns;
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) {
            Vec best = load(row_max + i * kLanes);
            EFFATTN_UNROLL for (int v = 0; v < kTileVectors; ++v) {
              Vec score = fma(__builtin_convertvector((IntVec)counts[i][v], Vec), broadcast(slope_), broadcast(base_));
              if (!whole) score = select(first_lanes(count - c - v * kLanes), score, broadcast(kLowest));
              best = max(best, score);
              store(scores + i * kKeyBlock + v * kLanes, score);
            }
            store(row_max + i * kLanes, best);
          }
        });
  }

  EFFATTN_INLINE void store_weight(int64_t r, int row_in_group, int64_t c, Vec weight) {
    if constexpr (kPairs)
      store_float(reinterpret_cast<bfloat16*>(weights_ + row_in_group * kWeightPitch) + c, weight);
    else
      store(scores_ + r * kKeyBlock + c, weight);
  }

  // Scores of one row -> weights; returns what the row's earlier output has to be multiplied with.
  EFFATTN_INLINE float weigh(int64_t r, int row_in_group, int64_t count) {
    const float block_max = reduce_max(load(row_max_ + r * kLanes)), old_max = running_max_[r];
    const float new_max = block_max > old_max ? block_max : old_max;
    const Vec top = broadcast(new_max), unit = broadcast(unit_);
    const float* scores = scores_ + r * kKeyBlock;
    Vec sum[2] = {};
    int64_t c = 0;
    const auto weight = [&](int64_t at) __attribute__((always_inline)) {
      return exp2<Arithmetic::kExp2Degree>((load(scores + at) - top) * unit);
    };
    for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
      const Vec low = weight(c), high = weight(c + kLanes);
      sum[0] += low;
      sum[1] += high;
      store_weight(r, row_in_group, c, low);
      store_weight(r, row_in_group, c + kLanes, high);
    }
    for (; c < count; c += kLanes) {
      const Vec last = select(first_lanes(count - c), weight(c), Vec{});
      sum[0] += last;
      store_weight(r, row_in_group, c, last);
    }
    const float correction = old_max == kLowest ? 0.f : exp2<5>(broadcast((old_max - new_max) * unit_))[0];
    running_max_[r] = new_max;
    running_sum_[r] = running_sum_[r] * correction + reduce_add(sum[0] + sum[1]);
    return correction;
  }

  EFFATTN_INLINE float weigh_gradient(int64_t r, int row_in_group, int64_t column, int64_t count) {
    const float* scores = scores_ + r * kKeyBlock;
    for (int64_t c = 0; c < count; c += kLanes) {
      const Vec score = load(scores + c), shift = load(shifts_ + column + c), unit = broadcast(unit_);
      Vec weight;
      if constexpr (kRecomputed)
        weight = exp2<Arithmetic::kExp2Degree>((score - shift) * unit) * load(factors_ + column + c);
      else
        weight = exp2<Arithmetic::kExp2Degree>(fma(score, unit, shift));
      store_weight(r, row_in_group, c, weight);
    }
    return 1.f;
  }

  void multiply_values(int64_t r, int64_t column, int64_t count, const float* correction) {
    const Word* weights = kPairs ? weights_ : reinterpret_cast<const Word*>(scores_ + r * kKeyBlock);
    const Word* values = values_ + column / Arithmetic::kPerWord * value_pitch_;
    const int64_t steps = words<Arithmetic>(count);
    for_each_column_tile(value_pitch_ / kLanes, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
      const float* factor = correction;
      for (int64_t first = 0; first < steps; first += kSummed) {
        output_tile<vectors.value>(weights + first, values + first * value_pitch_ + c, smaller(kSummed, steps - first),
            output_ + r * value_pitch_ + c, column + first == 0 ? nullptr : factor);
        factor = kNoCorrection;
      }
    });
  }

  template <int kVectors>
  __attribute__((noinline)) void output_tile(
      const Word* weights, const Word* values, int64_t steps, float* output, const float* correction) {
    const int64_t pitch = value_pitch_;
    multiply_tile<Arithmetic, kVectors>(weights, kWeightPitch, 1, values, pitch, steps,
        [&](Vec(&sum)[kTileRows][kVectors]) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
            float* to = output + i * pitch + v * kLanes;
            store(to, correction ? fma(load(to), broadcast(correction[i]), sum[i][v]) : sum[i][v]);
          }
        });
  }

  void finish(int64_t index, int64_t batch, int64_t head, int64_t row, int64_t rows) {
    if (call_.pass == Pass::kStatistics) {
      float* largest = call_.largest + index * rows_ + row;
      const int64_t queries = call_.output.size[0] * call_.output.size[1] * rows_;
      for (int64_t r = 0; r < rows; ++r) {
        largest[r] = running_max_[r];
        largest[queries + r] = 1.f / running_sum_[r];
      }
      return;
    }
    const Matrix to = matrix_at(call_.output, batch, head, row);
    for (int64_t r = 0; r < rows; ++r) {
      float factor = 1.f;
      if (call_.pass == Pass::kForward) {
        const float sum = running_sum_[r];
        call_.logsumexp[index * rows_ + row + r] =
            columns_ > 0 ? (running_max_[r] * unit_ + log2f(sum)) * kLn2 : -INFINITY;
        factor = columns_ > 0 ? 1.f / sum : 0.f;
      }
      store_row(to, r, output_ + r * value_pitch_, broadcast(factor), value_dim_);
    }
  }

  const HammingCall& call_;
  const int64_t rows_, columns_, depth_, value_dim_, value_pitch_;
  const float unit_;
  float slope_, base_;
  uint32_t* panels_;
  Word* values_;
  float* scores_;
  float* output_;
  float* row_max_;
  float* shifts_;
  float* factors_;
  Word* weights_;
  uint32_t* row_bits_;
  float running_max_[kQueryBlock];
  float running_sum_[kQueryBlock];
};

template <class Arithmetic>
void gradient(const HammingAttentionBackward& call, const Runtime& runtime) {
  const int64_t* size = call.grad_output.size;
  float* largest = nullptr;
  if constexpr (__is_same(Arithmetic, Float32)) {
    largest = hamming_scratch().statistics.reserve<float>(2 * size[0] * size[1] * size[2] + 1);
    if (call.grad_value.size[2] > 0)
      Hamming<Float32>::run_all({call.query, call.key, call.grad_value, call.grad_output, nullptr, call.head_dim,
                                    call.signs, call.scale, Pass::kStatistics, largest},
          runtime);
  }
  Hamming<Arithmetic>::run_all(
      {call.key, call.query, call.grad_output, call.grad_value, const_cast<float*>(call.logsumexp), call.head_dim,
          call.signs, call.scale, Pass::kBackward, largest},
      runtime);
  hamming_scratch().statistics.trim();
}

}  // namespace

void hamming_attention_forward(const HammingAttention& call, const Runtime& runtime) {
  const HammingCall forward = {call.query, call.key, call.value, call.output, call.logsumexp, call.head_dim, call.signs,
      call.scale, Pass::kForward, nullptr};
#if EFFATTN_HAS_BFLOAT16_DOT
  if (call.value.dtype == DType::kBFloat16) return Hamming<BFloat16Pair>::run_all(forward, runtime);
#endif
  Hamming<Float32>::run_all(forward, runtime);
}

void hamming_attention_backward(const HammingAttentionBackward& call, const Runtime& runtime) {
#if EFFATTN_HAS_BFLOAT16_DOT
  if (call.grad_output.dtype == DType::kBFloat16) return gradient<BFloat16Pair>(call, runtime);
#endif
  gradient<Float32>(call, runtime);
}

}  // namespace effattn::EFFATTN_ISA
