// Flash attention forward, one engine for every softmax family (policy.h).
//
//   S = transform(Q K^T),  O = (softmax(S) [* W]) V,  logsumexp_i = ln sum_j exp(S_ij)
//
// A work item is one block of at most kQueryBlock = 48 queries of one problem (a head, or a window of it); a thread
// walks a contiguous range of items and packs K and V whenever it meets another problem. Per item, over blocks of
// kKeyBlock = 256 keys:
//   scores    48 x 256         micro-tiles of 6 x 64 (AVX-512), transformed in registers before they are stored
//
//   weights   per 6 rows       exp2(S - max), row sums; stays in L1 (bf16 weights are stored as pairs)
//
//   output    6 x head_dim     += weights * V, rescaled when the running maximum moved
//
// In L1: one K panel (64 keys, 16 KB at D = 64 fp32) and the query block; scores, K block and V block in L2.
// FLOPs 4 N M D per head, one exp2 per score; bytes (2 N + 2 M) D elements per head plus one packed copy of K and V per
// thread.
#pragma once

#include "pack.h"
#include "policy.h"
#include "rows_ahead.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA {

struct ForwardScratch {
  Buffer keys, values, tiles;
};

inline ForwardScratch& forward_scratch() {
  static thread_local ForwardScratch scratch;
  return scratch;
}

// output = or correction * output + weights * values.
template <class Arithmetic, int kRows, int kVectors, bool kHalf, bool kFirst>
__attribute__((noinline)) void output_tile(const typename Arithmetic::Word* weights, int64_t weight_pitch,
    const typename Arithmetic::Word* values, int64_t pitch, int64_t steps, float* output, const float* correction) {
  multiply_tile<Arithmetic, kVectors, 1, kRows, kHalf>(weights, weight_pitch, 1, values, pitch, steps,
      [&](Vec(&accumulator)[kRows][kVectors]) __attribute__((always_inline)) {
        EFFATTN_UNROLL for (int i = 0; i < kRows; ++i) {
          EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
            float* to = output + i * pitch + v * kLanes;
            store(to, kFirst ? accumulator[i][v] : fma(load(to), broadcast(correction[i]), accumulator[i][v]));
          }
        }
      });
}

template <class Arithmetic, class Policy>
class Forward {
  using Word = typename Arithmetic::Word;
  static constexpr bool kPairs = Arithmetic::kPerWord == 2;
  static constexpr int kScoreVectors = kChainedVectors<Arithmetic>;
  static constexpr int64_t kSummed =
      kPairs ? kKeyBlock : 128;  // keys summed in one register before they meet the earlier ones: bounds rounding
  static constexpr float kNoCorrection[kTileRows] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f};
  // Many short problems; in narrower registers a tile is too few keys.
  static constexpr bool kShortRows = kLanes == 16 && requires { Policy::kManyProblems; };
  static constexpr int64_t kWeightPitch = kKeyBlock / Arithmetic::kPerWord;

 public:
  Forward(const AttentionForward& arguments, const typename Policy::Arguments& parameters)
      : arguments_(arguments),
        policy_(arguments, parameters),
        parameters_(parameters),
        tokens_(arguments.query.size[2]),
        head_dim_(arguments.query.size[3]),
        depth_(words<Arithmetic>(head_dim_)),
        query_pitch_(round_up(depth_, kLanes)),
        value_pitch_(round_up(head_dim_, kLanes)),
        score_pitch_(round_up(smaller(policy_.largest().keys, kKeyBlock), kLanes)) {
    ForwardScratch& scratch = forward_scratch();
    const int64_t most = policy_.largest().keys;
    packed_keys_ = scratch.keys.template reserve<Word>(transposed_words<Arithmetic>(most, head_dim_) + kLanes);
    packed_values_ = scratch.values.template reserve<Word>((words<Arithmetic>(most) + 1) * value_pitch_ + kLanes);
    const int64_t tile_words =
        kQueryBlock * (query_pitch_ + kKeyBlock + value_pitch_ + kLanes) + kTileRows * kWeightPitch;
    scores_ = scratch.tiles.template reserve<float>(tile_words);
    output_ = scores_ + kQueryBlock * kKeyBlock;
    row_max_ = output_ + kQueryBlock * value_pitch_;
    packed_queries_ = reinterpret_cast<Word*>(row_max_ + kQueryBlock * kLanes);
    weights_ = packed_queries_ + kQueryBlock * query_pitch_;
  }

  static int64_t blocks(int64_t queries) { return (queries + kQueryBlock - 1) / kQueryBlock; }

  // Items of a key head and what one costs beside those of other heads.
  struct Work {
    int64_t items, cost;
    double flops;
  };

  static Work work(const AttentionForward& arguments, const typename Policy::Arguments& parameters, int64_t key_head) {
    const Tensor& query = arguments.query;
    const int64_t heads = query.size[1], key_heads = arguments.key.size[1], group = heads / key_heads;
    const Problems problems = Policy::problems(arguments, parameters, key_head * group);
    const Problems first = Policy::problems(arguments, parameters, 0),
                   last = Policy::problems(arguments, parameters, heads - 1);
    const bool alike = first.queries == last.queries && first.keys == last.keys;
    const int64_t count = problems.count * query.size[0] * group, per_problem = blocks(problems.queries);
    return {count * per_problem, alike ? 1 : problems.queries * problems.keys / larger(per_problem, 1),
        4.0 * count * problems.queries * problems.keys * query.size[3]};
  }

  // Items are ordered (key head, window, batch, head of the group, query block): head tables and index sets outlive the
  // batch, packed keys the group. The range is one of costs: item i of a head begins at (costs of earlier heads) + i *
  // cost.
  void run(int64_t begin, int64_t end) {
    const int64_t batches = arguments_.query.size[0], key_heads = arguments_.key.size[1];
    const int64_t group = arguments_.query.size[1] / key_heads;
    for (int64_t key_head = 0; key_head < key_heads && end > 0; ++key_head) {
      const Work work = Forward::work(arguments_, parameters_, key_head);
      const int64_t last = smaller(work.items, (end + work.cost - 1) / work.cost);
      const int64_t blocks = Forward::blocks(Policy::problems(arguments_, parameters_, key_head * group).queries);
      for (int64_t item = begin <= 0 ? 0 : (begin + work.cost - 1) / work.cost; item < last; ++item) {
        const int64_t head_item = item / blocks, pack_item = head_item / group;
        run_item(
            pack_item / batches, pack_item % batches, key_head, key_head * group + head_item % group, item % blocks);
      }
      begin -= work.items * work.cost;
      end -= work.items * work.cost;
    }
    forward_scratch().keys.trim();
    forward_scratch().values.trim();
  }

 private:
  void run_item(int64_t window, int64_t batch, int64_t key_head, int64_t head, int64_t block) {
    const bool other_window = window != window_ || head != head_;
    if (other_window) rows_ = policy_.rows(head, window);
    const int64_t blocks = Forward::blocks(rows_.queries);  // fewer than the problem's where it lies at a border
    if (window != window_ || batch != batch_ || key_head != key_head_) packed_ = false;
    if (batch != batch_ || head != head_) policy_.enter(batch, head);
    window_ = window;
    batch_ = batch;
    key_head_ = key_head;
    head_ = head;
    if (block >= blocks) return;
    if (!packed_) {
      const auto matrix = [&](const Tensor& tensor) {
        return matrix_at(tensor, batch, key_head, 0, policy_.rotation(), rows_.key_tokens);
      };
      pack_transposed<Arithmetic>(packed_keys_, matrix(arguments_.key), rows_.keys, head_dim_);
      pack_natural<Arithmetic>(packed_values_, value_pitch_, matrix(arguments_.value), rows_.keys, head_dim_);
      if constexpr (Policy::kAdds) policy_.template prepare_add<Arithmetic>(packed_values_, value_pitch_);
      packed_ = true;
    }
    if (rows_.key_tokens && block == 0) {
      const bool is_short = kShortRows && rows_.keys <= kTileColumns;
      const int64_t tiles = is_short ? 1 : (rows_.keys + kScoreVectors * kLanes - 1) / (kScoreVectors * kLanes);
      ahead_.plan(arguments_, rows_, batch, head, larger(1, rows_.queries / kTileRows * (tiles + 1)));
    }
    // Causal blocks differ in cost: deal them from both ends so that every range gets its share.
    const int64_t dealt = block % 2 == 0 ? block / 2 : blocks - 1 - block / 2;
    const int64_t rows = (rows_.queries + blocks - 1) / blocks;
    query_block(batch, head, dealt * rows, smaller(rows, rows_.queries - dealt * rows));
  }

  // Groups of kTileRows rows and of one row less, so that nearly no row is computed in vain.
  struct Groups {
    int64_t count, full;
    explicit Groups(int64_t rows)
        : count((rows + kTileRows - 1) / kTileRows), full(larger(0, rows - count * (kTileRows - 1))) {}
    int64_t padded_rows() const { return count * (kTileRows - 1) + full; }
    // body(VectorCount<rows of the group>, first row)
    template <class Body>
    EFFATTN_INLINE void each(Body&& body) const {
      int64_t r = 0, group = 0;
      for (; group < full; ++group, r += kTileRows) body(VectorCount<kTileRows>{}, r);
      for (; group < count; ++group, r += kTileRows - 1) body(VectorCount<kTileRows - 1>{}, r);
    }
  };

  void query_block(int64_t batch, int64_t head, int64_t row, int64_t rows) {
    const Groups groups(rows);
    const int64_t padded_rows = groups.padded_rows();
    pack_rows<Arithmetic>(packed_queries_, query_pitch_,
        matrix_at(arguments_.query, batch, head, row, policy_.rotation(), rows_.query_tokens), rows, padded_rows,
        head_dim_);
    const int64_t last_key = policy_.key_limit(row + rows - 1);
    if constexpr (kShortRows) {
      if (last_key > 0 && last_key <= kTileColumns && policy_.plain_keys(row) == rows_.keys) {
        short_rows(row, rows, groups);
        return finish(batch, head, row, rows);
      }
    }
    for (int64_t key = 0; key < last_key; key += kKeyBlock) {
      const int64_t count = smaller(kKeyBlock, last_key - key);
      policy_.stage(row, rows, key, count);
      score_block(row, groups, key, count);
      groups.each([&](auto group_rows, int64_t r) __attribute__((always_inline)) {
        constexpr int kRows = group_rows.value;
        ahead_.step();
        alignas(64) float correction[kRows];
        weigh_rows(row, r, kRows, key, count, correction);
        add_output<kRows>(r, key, count, correction);
      });
    }
    if (last_key == 0) {
      memset(output_, 0, rows * value_pitch_ * sizeof(float));
      for (int64_t r = 0; r < rows; ++r) running_max_[r] = -INFINITY, running_sum_[r] = 0.f;
    }
    finish(batch, head, row, rows);
  }

  // output of a group of rows = or correction * output + weights * values.
  template <int kRows>
  EFFATTN_INLINE void add_output(int64_t r, int64_t key, int64_t count, const float* correction) {
    const Word* weights = kPairs ? weights_ : reinterpret_cast<const Word*>(scores_ + r * score_pitch_);
    const int64_t weight_pitch = kPairs ? kWeightPitch : score_pitch_;
    const Word* values = packed_values_ + key / Arithmetic::kPerWord * value_pitch_;
    const int64_t steps = words<Arithmetic>(count);
    for_each_half_tile(head_dim_, [&](auto vectors, auto half, int64_t column) __attribute__((always_inline)) {
      constexpr bool kHalf = half.value;
      float* output = output_ + r * value_pitch_ + column;
      const float* factor = correction;
      for (int64_t first = 0; first < steps; first += kSummed) {
        const Word* from = values + first * value_pitch_ + column;
        const int64_t some = smaller(kSummed, steps - first);
        if (key == 0 && first == 0)
          output_tile<Arithmetic, kRows, vectors.value, kHalf, true>(
              weights, weight_pitch, from, value_pitch_, some, output, factor);
        else
          output_tile<Arithmetic, kRows, vectors.value, kHalf, false>(
              weights + first, weight_pitch, from, value_pitch_, some, output, factor);
        factor = kNoCorrection;
      }
    });
  }

  // Rows whose keys are one tile: the scores of six rows never leave the registers before they are weights.
  void short_rows(int64_t row, int64_t rows, const Groups& groups) {
    policy_.stage(row, rows, 0, rows_.keys);
    groups.each([&](auto group_rows, int64_t r) __attribute__((always_inline)) {
      ahead_.step();
      weigh_tiles<group_rows.value, kTileVectors>((rows_.keys + kLanes - 1) / kLanes, row, r);
      ahead_.step();
      add_output<group_rows.value>(r, 0, rows_.keys, kNoCorrection);
    });
  }

  template <int kRows, int kVectors>
  EFFATTN_INLINE void weigh_tiles(int64_t vectors, int64_t row, int64_t r) {
    if (vectors == kVectors) {
      if (half_tail(rows_.keys))
        weigh_tile<kRows, kVectors, kLanes == 16>(row, r);
      else
        weigh_tile<kRows, kVectors, false>(row, r);
    } else if constexpr (kVectors > 1) {
      weigh_tiles<kRows, kVectors - 1>(vectors, row, r);
    }
  }

  template <int kRows, int kVectors, bool kHalf>
  __attribute__((noinline)) void weigh_tile(int64_t row, int64_t r) {
    const auto tile = policy_.template tile<true>(row + r, 0);
    const Mask last = first_lanes(rows_.keys - (kVectors - 1) * kLanes);
    multiply_tile<Arithmetic, kVectors, 1, kRows, kHalf>(packed_queries_ + r * query_pitch_, query_pitch_, 1,
        packed_keys_, kVectors * kLanes, depth_, [&](Vec(&logit)[kRows][kVectors]) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kRows; ++i) {
            EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) logit[i][v] = tile.transform(logit[i][v], i, v);
            logit[i][kVectors - 1] = select(last, logit[i][kVectors - 1], broadcast(-INFINITY));
            Vec best = logit[i][0], sum = {};
            EFFATTN_UNROLL for (int v = 1; v < kVectors; ++v) best = max(best, logit[i][v]);
            const float largest = reduce_max(best);
            const Vec shift = broadcast(largest == -INFINITY ? 0.f : largest);
            const float* multipliers = nullptr;
            if constexpr (Policy::kReweighs) multipliers = policy_.multipliers(row + r + i);
            EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
              const Vec weight = exp2<Arithmetic::kExp2Degree>(logit[i][v] - shift);
              sum += weight;
              const Vec to_store = reweighed(weight, multipliers + v * kLanes);
              if constexpr (kPairs)
                store_float(reinterpret_cast<bfloat16*>(weights_ + i * kWeightPitch) + v * kLanes, to_store);
              else
                store(scores_ + (r + i) * score_pitch_ + v * kLanes, to_store);
            }
            running_max_[r + i] = largest;
            running_sum_[r + i] = reduce_add(sum);
          }
        });
  }

  void score_block(int64_t row, const Groups& groups, int64_t key, int64_t count) {
    for (int64_t r = 0; r < groups.padded_rows(); ++r) store(row_max_ + r * kLanes, broadcast(-INFINITY));
    for (int64_t column = 0; column < count; column += kTileColumns) {
      // The packed panel holds every key of the problem, the block may end earlier (causal): width is the panel's
      // pitch, vectors what is needed of it.
      const int64_t width = round_up(smaller(kTileColumns, rows_.keys - key - column), kLanes);
      const int64_t vectors = (smaller(kTileColumns, count - column) + kLanes - 1) / kLanes;
      const Word* panel = packed_keys_ + (key + column) * depth_;
      groups.each([&](auto group_rows, int64_t r) __attribute__((always_inline)) {
        const int64_t plain_keys = policy_.plain_keys(row + r) - key - column;
        for (int64_t v = 0; v < vectors; v += kScoreVectors) {
          ahead_.step();
          const int64_t some = smaller(kScoreVectors, vectors - v), end = v + some;
          const bool half = end == vectors && half_tail(smaller(kTileColumns, count - column));
          score_vectors<group_rows.value, kScoreVectors>(
              some, half, end * kLanes <= plain_keys, row, r, key, column + v * kLanes, panel + v * kLanes, width);
        }
      });
    }
  }

  // A half tail ends inside a vector, so it is never plain.
  template <int kRows, int kVectors>
  EFFATTN_INLINE void score_vectors(int64_t vectors, bool half, bool plain, int64_t row, int64_t r, int64_t key,
      int64_t column, const Word* panel, int64_t width) {
    if (vectors == kVectors) {
      if (plain) return score_tile<kRows, kVectors, false, true>(row, r, key, column, panel, width);
      if constexpr (kLanes == 16)
        if (half) return score_tile<kRows, kVectors, true, false>(row, r, key, column, panel, width);
      score_tile<kRows, kVectors, false, false>(row, r, key, column, panel, width);
    } else if constexpr (kVectors > 1) {
      score_vectors<kRows, kVectors - 1>(vectors, half, plain, row, r, key, column, panel, width);
    }
  }

  template <int kRows, int kVectors, bool kHalf, bool kPlain>
  __attribute__((noinline)) void score_tile(
      int64_t row, int64_t r, int64_t key, int64_t column, const Word* panel, int64_t width) {
    float* scores = scores_ + r * score_pitch_ + column;
    float* row_max = row_max_ + r * kLanes;
    const auto tile = policy_.template tile<kPlain>(row + r, key + column);
    multiply_tile<Arithmetic, kVectors, kChains<Arithmetic>, kRows, kHalf>(packed_queries_ + r * query_pitch_,
        query_pitch_, 1, panel, width, depth_, [&](Vec(&accumulator)[kRows][kVectors]) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kRows; ++i) {
            Vec best = load(row_max + i * kLanes);
            EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
              Vec logit = tile.transform(accumulator[i][v], i, v);
              if constexpr (!kPlain) {
                const int64_t visible = policy_.key_limit(row + r + i) - (key + column + v * kLanes);
                logit = select(first_lanes(visible), logit, broadcast(-INFINITY));
              }
              best = max(best, logit);
              store(scores + i * score_pitch_ + v * kLanes, logit);
            }
            store(row_max + i * kLanes, best);
          }
        });
  }

  // Scores of one row -> weights exp2(score - running max); returns what the row's earlier output has to be multiplied
  // with.
  __attribute__((noinline)) void weigh_rows(
      int64_t row, int64_t r, int rows, int64_t key, int64_t count, float* correction) {
#pragma GCC unroll 1
    for (int i = 0; i < rows; ++i) {
      const float* multipliers = nullptr;
      if constexpr (Policy::kReweighs) multipliers = policy_.multipliers(row + r + i) + key;
      correction[i] = weigh_row(r + i, i, count, key == 0, multipliers);
    }
  }

  static EFFATTN_INLINE Vec reweighed(Vec weight, const float* multipliers) {
    if constexpr (Policy::kReweighs) return weight * load(multipliers);
    return weight;
  }

  EFFATTN_INLINE float weigh_row(int64_t r, int64_t row_in_group, int64_t count, bool first, const float* multipliers) {
    const float block_max = reduce_max(load(row_max_ + r * kLanes));
    const float old_max = first ? -INFINITY : running_max_[r];
    const float new_max = block_max > old_max ? block_max : old_max;
    const float finite_max =
        new_max == -INFINITY ? 0.f
                             : new_max;  // a row with nothing to attend to yet: all weights 0, no NaN from -inf - -inf
    const Vec shift = broadcast(finite_max);
    const float correction = old_max == -INFINITY ? 0.f : exp2<5>(broadcast(old_max - finite_max))[0];
    float* scores = scores_ + r * score_pitch_;
    Vec sum[2] = {};
    const int64_t padded = round_up(count, kLanes);
    int64_t c = 0;
    if constexpr (kPairs) {
      Word* weights = weights_ + row_in_group * kWeightPitch;
#pragma GCC unroll 2
      for (; c + 2 * kLanes <= padded; c += 2 * kLanes) {
        const Vec low = exp2<Arithmetic::kExp2Degree>(load(scores + c) - shift);
        const Vec high = exp2<Arithmetic::kExp2Degree>(load(scores + c + kLanes) - shift);
        sum[0] += low;
        sum[1] += high;
        store_float(reinterpret_cast<bfloat16*>(weights) + c, reweighed(low, multipliers + c));
        store_float(reinterpret_cast<bfloat16*>(weights) + c + kLanes, reweighed(high, multipliers + c + kLanes));
      }
      if (c < padded) {
        const Vec low = exp2<Arithmetic::kExp2Degree>(load(scores + c) - shift);
        sum[0] += low;
        store_float(reinterpret_cast<bfloat16*>(weights) + c, reweighed(low, multipliers + c));
      }
    } else {
#pragma GCC unroll 2
      for (; c + 2 * kLanes <= padded; c += 2 * kLanes) {
        const Vec low = exp2<Arithmetic::kExp2Degree>(load(scores + c) - shift);
        const Vec high = exp2<Arithmetic::kExp2Degree>(load(scores + c + kLanes) - shift);
        sum[0] += low;
        sum[1] += high;
        store(scores + c, reweighed(low, multipliers + c));
        store(scores + c + kLanes, reweighed(high, multipliers + c + kLanes));
      }
      if (c < padded) {
        const Vec low = exp2<Arithmetic::kExp2Degree>(load(scores + c) - shift);
        sum[0] += low;
        store(scores + c, reweighed(low, multipliers + c));
      }
    }
    running_max_[r] = new_max;
    running_sum_[r] = reduce_add(sum[0] + sum[1]) + (first ? 0.f : running_sum_[r] * correction);
    return correction;
  }

  void finish(int64_t batch, int64_t head, int64_t row, int64_t rows) {
    const int64_t rotation = policy_.rotation();
    const Matrix to = matrix_at(arguments_.output, batch, head, row, rotation, rows_.query_tokens);
    float* logsumexp = arguments_.logsumexp + (batch * arguments_.query.size[1] + head) * tokens_;
    alignas(64) float inverse[kQueryBlock], log_sum[kQueryBlock];
    for (int64_t r = 0; r < rows; r += kLanes) {
      const Vec sum = load(running_sum_ + r);
      store(log_sum + r, sum == Vec{} ? broadcast(-INFINITY) : (load(running_max_ + r) + log2(sum)) * broadcast(kLn2));
      store(inverse + r, sum == Vec{} ? Vec{} : broadcast(1.f) / sum);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t rotated = row + r + rotation;
      const int64_t token = rows_.query_tokens  ? rows_.query_tokens[row + r]
                            : rotated < tokens_ ? rotated
                                                : rotated - tokens_;
      logsumexp[token] = log_sum[r];
      if (running_sum_[r] == 0.f) memset(output_ + r * value_pitch_, 0, value_pitch_ * sizeof(float));
    }
    if constexpr (Policy::kAdds) {
      if (policy_.adds()) {
        policy_.add(row, rows, output_, value_pitch_, inverse);
        for (int64_t r = 0; r < rows; ++r) inverse[r] = 1.f;
      }
    }
    store_rows_by(
        to, rows, output_, value_pitch_,
        [&](int64_t r) __attribute__((always_inline)) { return broadcast(inverse[r]); }, head_dim_);
  }

  const AttentionForward& arguments_;
  Policy policy_;
  const typename Policy::Arguments& parameters_;
  const int64_t tokens_, head_dim_, depth_, query_pitch_, value_pitch_, score_pitch_;
  IndexSet rows_;
  int64_t window_ = -1, batch_ = -1, key_head_ = -1, head_ = -1;
  bool packed_ = false;
  RowsAhead ahead_;
  Word* packed_keys_;
  Word* packed_values_;
  Word* packed_queries_;
  Word* weights_;
  float* scores_;
  float* output_;
  float* row_max_;
  alignas(64) float running_max_[kQueryBlock] = {};
  alignas(64) float running_sum_[kQueryBlock] = {};
};

template <class Arithmetic, class Policy>
inline void forward(
    const AttentionForward& arguments, const typename Policy::Arguments& parameters, const Runtime& runtime) {
  struct Context {
    const AttentionForward& arguments;
    const typename Policy::Arguments& parameters;
  } context{arguments, parameters};
  const RangeFunction range = [](int64_t begin, int64_t end, void* opaque) {
    const Context& shared = *static_cast<const Context*>(opaque);
    Forward<Arithmetic, Policy>(shared.arguments, shared.parameters).run(begin, end);
  };
  int64_t cost = 0;
  double flops = 0;
  for (int64_t key_head = 0; key_head < arguments.key.size[1]; ++key_head) {
    const auto work = Forward<Arithmetic, Policy>::work(arguments, parameters, key_head);
    cost += work.items * work.cost;
    flops += work.flops;
  }
  run_items(runtime, cost, flops, range, &context);
}

// The avx512_bf16 level holds bf16 products only: for other element types dispatch.cpp takes the avx512 level. Below it
// every type is converted to fp32 in packing.
template <class Policy>
inline void forward_any_type(
    const AttentionForward& arguments, const typename Policy::Arguments& parameters, const Runtime& runtime) {
#if EFFATTN_HAS_BFLOAT16_DOT
  forward<BFloat16Pair, Policy>(arguments, parameters, runtime);
#else
  forward<Float32, Policy>(arguments, parameters, runtime);
#endif
}

}  // namespace effattn::EFFATTN_ISA
