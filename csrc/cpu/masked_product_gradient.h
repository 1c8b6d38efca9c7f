// Gradient of a free elementwise mask: dM[h] = scale * sum over batch (and over heads where they share M) of dLogit *
// (q . k).
//
// A second pass of its own, because here the sum runs over what the main pass deals out to different tasks. A task owns
// a strip of M, queries x one block of keys, accumulates it in fp32 over batches and heads in order, and converts it
// once at the end: deterministic, O(N) memory, two products more per score.
#pragma once

#include "backward.h"

namespace effattn::EFFATTN_ISA {

template <class Arithmetic, class Policy>
class WeightGradient {
  using Word = typename Arithmetic::Word;

 public:
  struct Shared {
    const AttentionBackward& arguments;
    const AttentionForward& forward;
    const MaskedProduct& product;
    const Tensor& gradient;  // (1, Hw, N, N)
    int64_t weight_heads;
  };

  explicit WeightGradient(const Shared& shared)
      : shared_(shared),
        arguments_(shared.arguments),
        policy_(shared.forward, shared.product),
        tokens_(arguments_.query.size[2]),
        head_dim_(arguments_.query.size[3]),
        depth_(words<Arithmetic>(head_dim_)),
        row_pitch_(round_up(depth_, kLanes)) {
    static thread_local Buffer operands, floats;
    const int64_t panels = transposed_words<Arithmetic>(kKeyBlock, head_dim_);
    keys_ = operands.reserve<Word>(2 * panels + 2 * kStripRows * row_pitch_ + kLanes);
    values_ = keys_ + panels;
    query_rows_ = values_ + panels;
    grad_output_rows_ = query_rows_ + kStripRows * row_pitch_;
    strip_ = floats.reserve<float>(3 * kStripRows * kTilePitch + kLanes);
    scores_ = strip_ + kStripRows * kTilePitch;
    grad_scores_ = scores_ + kStripRows * kTilePitch;
  }

  static int64_t strips(const AttentionBackward& arguments) {
    return (arguments.query.size[2] + kStripRows - 1) / kStripRows;
  }
  static int64_t key_blocks(const AttentionBackward& arguments) { return KeyChunks(arguments.key.size[2], 1).blocks; }

  // Items are ordered (head of the weight, block of keys, strip of queries).
  void run(int64_t begin, int64_t end) {
    const int64_t strips = WeightGradient::strips(arguments_), blocks = key_blocks(arguments_);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item % strips * kStripRows, block = item / strips % blocks,
                    weight_head = item / strips / blocks;
      const int64_t key = block * kBackwardKeys, count = block + 1 == blocks ? tokens_ - key : kBackwardKeys;
      strip(weight_head, row, smaller(kStripRows, tokens_ - row), key, count);
    }
  }

 private:
  static constexpr int64_t kStripRows = kQueryBlock;

  void strip(int64_t weight_head, int64_t row, int64_t rows, int64_t key, int64_t count) {
    const int64_t padded_rows = round_up(rows, kTileRows);
    const int64_t first_head = shared_.weight_heads == 1 ? 0 : weight_head,
                  heads = shared_.weight_heads == 1 ? arguments_.query.size[1] : 1;
    memset(strip_, 0, kStripRows * kTilePitch * sizeof(float));
    for (int64_t batch = 0; batch < arguments_.query.size[0]; ++batch)
      for (int64_t head = first_head; head < first_head + heads; ++head) {
        pack_transposed<Arithmetic>(keys_, matrix_at(arguments_.key, batch, head, key), count, head_dim_);
        pack_transposed<Arithmetic>(values_, matrix_at(arguments_.value, batch, head, key), count, head_dim_);
        pack_rows<Arithmetic>(
            query_rows_, row_pitch_, matrix_at(arguments_.query, batch, head, row), rows, padded_rows, head_dim_);
        pack_rows<Arithmetic>(grad_output_rows_, row_pitch_, matrix_at(arguments_.grad_output, batch, head, row), rows,
            padded_rows, head_dim_);
        PanelProduct<Arithmetic>{query_rows_, row_pitch_, padded_rows, depth_}(keys_, count, 0, count, scores_);
        PanelProduct<Arithmetic>{grad_output_rows_, row_pitch_, padded_rows, depth_}(
            values_, count, 0, count, grad_scores_);
        row_deltas<kChains<Arithmetic>>(arguments_, batch, head, row, rows, 0, delta_);
        policy_.enter(batch, head);
        policy_.stage(row, rows, key, count);
        for (int64_t r = 0; r < rows; r += kTileRows)
          accumulate(batch, head, row, r, smaller(kTileRows, rows - r), key, count);
      }
    const Matrix to = offset_columns(matrix_at(shared_.gradient, 0, weight_head, row), key);
    for (int64_t r = 0; r < rows; ++r) store_row(to, r, strip_ + r * kTilePitch, broadcast(arguments_.scale), count);
  }

  static Matrix offset_columns(Matrix matrix, int64_t column) {
    matrix.data = static_cast<const char*>(matrix.data) + column * matrix.column_stride * element_size(matrix.dtype);
    return matrix;
  }

  void accumulate(int64_t batch, int64_t head, int64_t row, int64_t r, int64_t rows, int64_t key, int64_t count) {
    const auto tile = policy_.template tile<false>(row + r, key);
    for (int64_t i = 0; i < rows; ++i) {
      const float* logsumexp = arguments_.logsumexp + (batch * arguments_.query.size[1] + head) * tokens_;
      const Vec total = broadcast(usable_logsumexp(logsumexp[row + r + i])), delta = broadcast(delta_[r + i]);
      const int64_t at = (r + i) * kTilePitch;
      for (int64_t v = 0; v * kLanes < count; ++v) {
        const Vec score = load(scores_ + at + v * kLanes);
        const Vec logit = tile.transform(score, static_cast<int>(i), static_cast<int>(v));
        const Vec weight = exp2<Arithmetic::kExp2Degree>(fma(total, broadcast(-kLog2E), logit));
        const Vec gradient = weight * (load(grad_scores_ + at + v * kLanes) - delta) * score;
        store(strip_ + at + v * kLanes, load(strip_ + at + v * kLanes) + gradient);
      }
    }
  }

  const Shared& shared_;
  const AttentionBackward& arguments_;
  Policy policy_;
  const int64_t tokens_, head_dim_, depth_, row_pitch_;
  Word* keys_;
  Word* values_;
  Word* query_rows_;
  Word* grad_output_rows_;
  float* strip_;
  float* scores_;
  float* grad_scores_;
  float delta_[kStripRows];
};

template <class Policy>
inline void weight_gradient(const AttentionBackward& arguments, const MaskedProduct& product,
    const MaskedProductGrad& gradient, const Runtime& runtime) {
#if EFFATTN_HAS_BFLOAT16_DOT
  using Pass = WeightGradient<BFloat16Pair, Policy>;
#else
  using Pass = WeightGradient<Float32, Policy>;
#endif
  const AttentionForward forward = {arguments.query, arguments.key, arguments.value, arguments.output,
      const_cast<float*>(arguments.logsumexp), arguments.scale};
  const int64_t weight_heads = gradient.weight.size[1];
  typename Pass::Shared shared = {arguments, forward, product, gradient.weight, weight_heads};
  const double tokens = static_cast<double>(arguments.query.size[2]);
  run_items(
      runtime, weight_heads * Pass::strips(arguments) * Pass::key_blocks(arguments),
      4.0 * arguments.query.size[0] * arguments.query.size[1] * tokens * tokens * arguments.query.size[3],
      [](int64_t begin, int64_t end, void* context) {
        Pass(*static_cast<const typename Pass::Shared*>(context)).run(begin, end);
      },
      &shared);
}

}  // namespace effattn::EFFATTN_ISA
