// The gradients of soft merging. With g = dY (P x C):
//
//   W_np = exp(G_np - logsumexp_p),  S = X g^T,  delta_p = Y_p . g_p
//   dG = W * (S - delta),  dX = W g
//
// A work item is a tile of at most 96 tokens of one example (48 where there are few); a thread walks a contiguous range
// of them and packs g, as the operand of either product, whenever it meets another example. Per tile, 256 merged tokens
// at a time:
//   S         96 x 256         micro-tiles of 6 x 64 (AVX-512) over the channels; W and dG are made of their
//                              accumulators, G is read and dG written there and then
//
//   W         96 x 256         stays in L2
//
//   dX        96 x C           += W g in micro-tiles of 6 x 64 over the 256
//
// In L2: the tokens (288 KB at C = 768), a panel of 64 rows of g (192 KB), W (102 KB), dX (288 KB). g comes from
// further away, 64 bytes for every 16 multiply-adds of a register. What the next step reads or writes is fetched
// meanwhile. FLOPs 4 N P C and one exp2 per weight per example; bytes (2 N C + 2 N P) elements and both packed copies
// of g.
#pragma once

#include "soft_merge_tiles.h"

namespace effattn::EFFATTN_ISA {

struct SoftMergeGradientItems {
  static constexpr int64_t kMostRows = 96;
  int64_t tokens, tiles, rows, count;  // rows of every tile but the last
  double flops;

  explicit SoftMergeGradientItems(const SoftMergeBackward& arguments) : tokens(arguments.tokens.size[2]) {
    const int64_t large = (tokens + kMostRows - 1) / kMostRows;
    const int64_t most = arguments.tokens.size[1] * large < kFewestTasks ? kMostRows / 2 : kMostRows;
    tiles = (tokens + most - 1) / most;
    rows = tiles == 0 ? 0 : round_up((tokens + tiles - 1) / tiles, kTileRows);
    tiles = tiles == 0 ? 0 : (tokens + rows - 1) / rows;
    count = arguments.tokens.size[1] * tiles;
    flops = 4.0 * arguments.tokens.size[1] * tokens * arguments.tokens.size[3] * arguments.logits.size[3];
  }
};

inline BackwardScratch& merge_gradient_scratch() {
  static thread_local BackwardScratch scratch;
  return scratch;
}

template <class Arithmetic>
class SoftMergeGradient {
  using Word = typename Arithmetic::Word;
  static constexpr bool kPairs = Arithmetic::kPerWord == 2;
  static constexpr int kSums = kChains<Arithmetic>;
  static constexpr int64_t kRows = SoftMergeGradientItems::kMostRows, kColumns = 256;
  static constexpr int64_t kWeightPitch = kColumns / Arithmetic::kPerWord + 16;

 public:
  SoftMergeGradient(const SoftMergeBackward& arguments, const SoftMergeGradientItems& items)
      : arguments_(arguments),
        items_(items),
        outputs_(arguments.logits.size[3]),
        channels_(arguments.tokens.size[3]),
        depth_(words<Arithmetic>(channels_)),
        token_pitch_(round_up(depth_, kLanes)),
        pitch_(round_up(channels_, kLanes)) {
    BackwardScratch& scratch = merge_gradient_scratch();
    const int64_t padded = round_up(outputs_, kTileColumns);
    columns_ = scratch.keys.template reserve<Word>(transposed_words<Arithmetic>(outputs_, channels_) + kLanes);
    rows_ = scratch.gradients.template reserve<Word>(words<Arithmetic>(outputs_) * pitch_ + kLanes);
    merged_ = scratch.queries.template reserve<Word>(kTileColumns * depth_);
    float* memory = scratch.tiles.template reserve<float>(
        3 * padded + kRows * (token_pitch_ + kWeightPitch + pitch_ + 2 * kColumns));
    const auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
    logsumexp_ = take(padded);
    correction_ = take(padded);
    delta_ = take(padded);
    tokens_ = reinterpret_cast<Word*>(take(kRows * token_pitch_));
    weights_ = reinterpret_cast<Word*>(take(kRows * kWeightPitch));
    grad_tokens_ = take(kRows * pitch_);
    logits_ = take(kRows * kColumns);
    grad_logits_ = memory;
  }

  ~SoftMergeGradient() {
    BackwardScratch& scratch = merge_gradient_scratch();
    scratch.keys.trim();
    scratch.gradients.trim();
  }

  void run(int64_t begin, int64_t end) {
    int64_t entered = -1;
    for (int64_t item = begin; item < end; ++item) {
      batch_ = item / items_.tiles;
      if (batch_ != entered) enter();
      entered = batch_;
      const int64_t first = item % items_.tiles * items_.rows;
      tile(first, smaller(items_.rows, items_.tokens - first));
    }
  }

 private:
  void enter() {
    const int64_t padded = round_up(outputs_, kTileColumns);
    const float* logsumexp = arguments_.logsumexp + batch_ * outputs_;
    for (int64_t p = 0; p < outputs_; ++p) logsumexp_[p] = usable_logsumexp(logsumexp[p]);
    for (int64_t p = outputs_; p < padded; ++p) logsumexp_[p] = INFINITY;  // weights of 0
    for (int64_t p = 0; p < outputs_; p += kLanes) refine(p);
    for (int64_t p = 0; p < outputs_; p += kTileColumns) {
      const int64_t live = smaller(kTileColumns, outputs_ - p), width = round_up(live, kLanes);
      Word* panel = columns_ + p * depth_;
      pack_panel(panel, arguments_.grad_output, p, live, width);
      pack_panel(merged_, arguments_.output, p, live, width);
      for (int64_t v = 0; v < width; v += kLanes) add_deltas(panel + v, merged_ + v, width, delta_ + p + v);
    }
    for (int64_t c = 0; c < channels_; c += kTileColumns) {
      const int64_t live = smaller(kTileColumns, channels_ - c);
      pack_natural<Arithmetic>(rows_ + c * words<Arithmetic>(outputs_), round_up(live, kLanes),
          block_at(arguments_.grad_output, batch_, 0, c), outputs_, live);
    }
  }

  // pack_transposed of at most kTileColumns rows of any length.
  void pack_panel(Word* to, const Tensor& from, int64_t row, int64_t rows, int64_t width) const {
    for (int64_t c = 0; c < channels_; c += kMaxHeadDim)
      pack_transposed<Arithmetic>(to + c / Arithmetic::kPerWord * width, block_at(from, batch_, row, c), rows,
          smaller(kMaxHeadDim, channels_ - c));
  }

  // Y . g, summed as a row of S is: where one token is all of a column, Y is that token, and S - delta is exactly 0.
  void add_deltas(const Word* gradient, const Word* merged, int64_t width, float* to) const {
    Vec sums[kSums] = {};
    int64_t step = 0;
    const auto add = [&](Vec& sum) __attribute__((always_inline)) {
      sum = Arithmetic::multiply_add(
          Arithmetic::load_words(merged + step * width), Arithmetic::load_words(gradient + step * width), sum);
      ++step;
    };
    while (step + kSums <= depth_) EFFATTN_UNROLL for (int s = 0; s < kSums; ++s) add(sums[s]);
    if (step < depth_) add(sums[0]);
    if constexpr (kSums == 2) sums[0] += sums[1];
    store(to, sums[0]);
  }

  // A logsumexp that is this large is rounded so coarsely that the weights of its column miss a sum of 1 by more than
  // rounding of the element type. correction = log2 of that sum.
  void refine(int64_t p) {
    const float large = arguments_.logits.dtype == DType::kFloat32 ? 2.f : 256.f;
    bool is_large = false;
    for (int64_t lane = p; lane < p + kLanes; ++lane)
      is_large = is_large || (fabsf(logsumexp_[lane]) >= large && logsumexp_[lane] != INFINITY);
    Vec correction = {};
    if (is_large) {
      const int64_t live = smaller(kLanes, outputs_ - p);
      const FloatRows logits(block_at(arguments_.logits, batch_, 0, p), live, logits_, kLanes);
      Vec sum = {};
      for (int64_t n = 0; n < items_.tokens; ++n)
        sum += exp2<5>((load_columns(logits.row(n), live) - load(logsumexp_ + p)) * broadcast(kLog2E));
      correction = sum > Vec{} ? log2(sum) : Vec{};
    }
    store(correction_ + p, correction);
  }

  void tile(int64_t first, int64_t rows) {
    const Matrix tokens = block_at(arguments_.tokens, batch_, first, 0);
    const Matrix gradient = block_at(arguments_.grad_tokens, batch_, first, 0);
    // Products store whole vectors.
    const bool in_place = FloatRows::in_place(gradient) && channels_ == pitch_;
    float* to = in_place ? static_cast<float*>(const_cast<void*>(gradient.data)) + gradient.offset(0) : grad_tokens_;
    const int64_t to_pitch = in_place ? gradient.row_stride : pitch_;
    pack_rows<Arithmetic>(tokens_, token_pitch_, tokens, rows, rows, channels_);
    if (outputs_ == 0)
      for (int64_t r = 0; r < rows; ++r) memset(to + r * to_pitch, 0, pitch_ * sizeof(float));
    const int64_t groups = (rows + kTileRows - 1) / kTileRows;
    for (int64_t p = 0; p < outputs_; p += kColumns) {
      const int64_t count = smaller(kColumns, outputs_ - p);
      ahead_.plan(gradient, p == 0 ? rows : 0, channels_, groups * ((count + kTileColumns - 1) / kTileColumns));
      score(first, rows, p, count);
      const int64_t next = first + rows, left = smaller(items_.rows, items_.tokens - next);
      ahead_.plan(block_at(arguments_.tokens, batch_, left > 0 ? next : first, 0), p == 0 ? larger(left, 0) : 0,
          channels_, groups * ((channels_ + kTileColumns - 1) / kTileColumns));
      for (int64_t c = 0; c < channels_; c += kTileColumns) {
        const int64_t width = round_up(smaller(kTileColumns, channels_ - c), kLanes);
        const Word* rows_of_g = rows_ + c * words<Arithmetic>(outputs_) + p / Arithmetic::kPerWord * width;
        for_each_column_tile(width / kLanes, [&](auto vectors, int64_t) __attribute__((always_inline)) {
          if (p == 0)
            add_tokens<vectors.value, false>(rows, words<Arithmetic>(count), rows_of_g, to + c, to_pitch);
          else
            add_tokens<vectors.value, true>(rows, words<Arithmetic>(count), rows_of_g, to + c, to_pitch);
        });
      }
    }
    if (!in_place) store_rows(gradient, rows, grad_tokens_, pitch_, broadcast(1.f), channels_);
  }

  template <int kVectors, bool kAdd>
  EFFATTN_INLINE void add_tokens(int64_t rows, int64_t steps, const Word* gradient, float* to, int64_t pitch) {
    for_each_row_group(rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
      ahead_.step();
      product_tile<Arithmetic, group.value, kVectors, kAdd>(
          weights_ + r * kWeightPitch, kWeightPitch, 1, gradient, kVectors * kLanes, steps, to + r * pitch, pitch);
    });
  }

  // W and dG of rows x count, from merged token p on.
  void score(int64_t first, int64_t rows, int64_t p, int64_t count) {
    const Matrix logits = block_at(arguments_.logits, batch_, first, p),
                 gradient = block_at(arguments_.grad_logits, batch_, first, p);
    const bool read_in_place = FloatRows::in_place(logits), write_in_place = FloatRows::in_place(gradient);
    if (!read_in_place)
      for (int64_t r = 0; r < rows; ++r)
        row_to_float(logits_ + r * kColumns, logits, r, count, round_up(count, kLanes));
    const Block block = {read_in_place ? static_cast<const float*>(logits.data) + logits.offset(0) : logits_,
        read_in_place ? logits.row_stride : kColumns,
        write_in_place ? static_cast<float*>(const_cast<void*>(gradient.data)) + gradient.offset(0) : grad_logits_,
        write_in_place ? gradient.row_stride : kColumns, p, count};
    constexpr int kVectors = kChainedVectors<Arithmetic>;
    for (int64_t panel = 0; panel < count; panel += kTileColumns) {
      const int64_t width = round_up(smaller(kTileColumns, outputs_ - p - panel), kLanes);
      const int64_t vectors = width / kLanes;
      for (int64_t v = 0; v < vectors; v += kVectors)
        score_columns<kVectors>(smaller(kVectors, vectors - v), block, rows,
            columns_ + (p + panel) * depth_ + v * kLanes, width, panel + v * kLanes);
    }
    if (!write_in_place) store_rows(gradient, rows, grad_logits_, kColumns, broadcast(1.f), count);
  }

  struct Block {
    const float* logits;
    int64_t logit_pitch;
    float* gradient;
    int64_t gradient_pitch, first, count;
  };

  template <int kVectors>
  EFFATTN_INLINE void score_columns(
      int64_t vectors, const Block& block, int64_t rows, const Word* panel, int64_t width, int64_t column) {
    if (vectors == kVectors)
      for_each_row_group(rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
        ahead_.step();
        score_tile<group.value, kVectors>(block, r, panel, width, column);
      });
    else if constexpr (kVectors > 1)
      score_columns<kVectors - 1>(vectors, block, rows, panel, width, column);
  }

  template <int kGroup, int kVectors>
  __attribute__((noinline)) void score_tile(
      const Block& block, int64_t r, const Word* panel, int64_t width, int64_t column) {
    const float* logits = block.logits + r * block.logit_pitch + column;
    float* gradient = block.gradient + r * block.gradient_pitch + column;
    Word* weights = weights_ + r * kWeightPitch + column / Arithmetic::kPerWord;
    const float* logsumexp = logsumexp_ + block.first + column;
    const float* correction = correction_ + block.first + column;
    const float* delta = delta_ + block.first + column;
    const int64_t left = block.count - column;
    EFFATTN_UNROLL for (int i = 0; i < kGroup; ++i) for (int c = 0; c < kVectors * kLanes; c += 16) {
      __builtin_prefetch(logits + i * block.logit_pitch + c);
      __builtin_prefetch(gradient + i * block.gradient_pitch + c, 1);
    }
    multiply_tile<Arithmetic, kVectors, kSums, kGroup>(tokens_ + r * token_pitch_, token_pitch_, 1, panel, width,
        depth_, [&](Vec(&score)[kGroup][kVectors]) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kGroup; ++i) {
            EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
              const int64_t at = v * kLanes;
              const Vec above = load_columns(logits + i * block.logit_pitch + at, left - at) - load(logsumexp + at);
              const Vec weight =
                  exp2<Arithmetic::kExp2Degree>(fma(above, broadcast(kLog2E), Vec{} - load(correction + at)));
              const Vec slope = weight * (score[i][v] - load(delta + at));
              float* to = gradient + i * block.gradient_pitch + at;
              if (left - at >= kLanes)
                store(to, slope);
              else
                store_partial(to, slope, left - at);
              if constexpr (kPairs)
                store_float(reinterpret_cast<bfloat16*>(weights + i * kWeightPitch) + at, weight);
              else
                store(weights + i * kWeightPitch + at, weight);
            }
          }
        });
  }

  const SoftMergeBackward& arguments_;
  const SoftMergeGradientItems& items_;
  const int64_t outputs_, channels_, depth_, token_pitch_, pitch_;
  int64_t batch_ = 0;
  TileAhead ahead_;
  Word* columns_;  // g as the operand of S
  Word* rows_;     // g as the operand of dX
  Word* merged_;   // a panel of Y
  float* logsumexp_;
  float* correction_;
  float* delta_;
  Word* tokens_;
  Word* weights_;
  float* grad_tokens_;
  float* logits_;
  float* grad_logits_;
};

}  // namespace effattn::EFFATTN_ISA
