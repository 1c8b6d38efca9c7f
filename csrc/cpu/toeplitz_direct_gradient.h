// Gradients of Toeplitz-weighted linear attention, direct method.
//
//   s_ij = q_i . k_j,  delta_i = g_i . o_i,  P_ij = c_ij s_ij / n_i,  E_ij = c_ij (g_i . v_j - delta_i) / n_i
//   dV = P^T g,  dQ = E K,  dK = E^T Q,  db_t = sum of s_ij E_ij over j - i = t (g is dO)
//
// A task is (head, batch, chunk of keys); it owns its rows of dK and dV. Per block of 192 keys and block of 96 queries,
// in micro-tiles of 6 x 64 (AVX-512; float32 6 x 32 in two chains):
//
//   S             96 x 192   Q rows against K^T
//
//   g V^T         96 x 192   and in registers, before anything is stored: P over S, E, and s E. On a sequence s E is
//                            added to a diagonal sum, one unaligned load, add and store; each of the six rows of a
//                            micro-tile has sums of its own, or a row would wait for what the one above just stored. On
//                            a grid it is stored over the weights and added to a table of entries by runs.
//
//   dV, dK        192 x D, M += P^T g, E^T Q: the tiles read by columns
//
//   dQ            96 x M     += E K
//
// In L2: K and V of the block, both tiles (100 KB each), dK and dV of the block. Diagonal sums of at most 16 floats a
// pair of blocks (on a grid of a few tiles) meet in double. Chunks depend on the problem only, never on the threads;
// what several of them give to dQ and db is added up in order. FLOPs 2 N^2 (3 M + 2 D) a head, half of it causal.
// Memory O(N): packed operands and float32 gradients of one head a thread, float32 dQ a chunk, double db a task.
#pragma once

#include "toeplitz_direct_tiles.h"

namespace effattn::EFFATTN_ISA::toeplitz {

struct GradientScratch {
  Buffer keys, queries, rows, gradients, tiles, table;
};

// Sums over diagonals of one task, in double; room for the sums of whole tiles on both sides.
struct EntrySums {
  static constexpr int64_t kBefore = kBackwardQueries + kTileRows, kAfter = kTilePitch;
  static int64_t doubles(const Positions& positions) { return kBefore + positions.entries + kAfter; }
};

// What the tasks leave for the second stage.
struct Partials {
  KeyChunks chunks;
  double* entries;    // [head][batch][chunk][EntrySums::doubles]
  float* grad_query;  // [head][batch][chunk][padded queries][pitch]; null with one chunk
};

template <class Arithmetic>
class DirectBackward {
  using Word = typename Arithmetic::Word;
  static constexpr int kPair = Arithmetic::kPerWord;
  static constexpr int64_t kDiagonals = kBackwardQueries + kTilePitch;
  // Products that the float table of a grid takes before it goes to double, on average an entry.
  static constexpr int64_t kSummedProducts = 32;

 public:
  DirectBackward(const Toeplitz& arguments, const ToeplitzGrad& grad, const Partials& partials)
      : a_(arguments),
        grad_(grad),
        partials_(partials),
        positions_(arguments.grid_h, arguments.grid_w),
        tokens_(arguments.query.size[2]),
        features_(arguments.query.size[3]),
        value_dim_(arguments.value.size[3]),
        depth_(words<Arithmetic>(features_)),
        value_depth_(words<Arithmetic>(value_dim_)),
        row_pitch_(round_up(depth_, kLanes)),
        value_row_pitch_(round_up(value_depth_, kLanes)),
        pitch_(round_up(features_, kLanes)),
        value_pitch_(round_up(value_dim_, kLanes)),
        padded_(padded_queries(tokens_)),
        weights_(positions_, arguments.is_causal, scratch().table.reserve<float>(2 * table_floats())) {
    int64_t longest = 0;
    for (int64_t chunk = 0; chunk < partials.chunks.chunks; ++chunk)
      longest = larger(longest, partials.chunks.end(chunk) - partials.chunks.begin(chunk));
    const int64_t key_words = transposed_words<Arithmetic>(longest, features_),
                  value_words = transposed_words<Arithmetic>(longest, value_dim_);
    keys_transposed_ =
        scratch().keys.template reserve<Word>(key_words + value_words + words<Arithmetic>(longest) * pitch_ + kLanes);
    values_transposed_ = keys_transposed_ + key_words;
    keys_natural_ = values_transposed_ + value_words;

    query_rows_ = scratch().queries.template reserve<Word>(
        padded_ * (row_pitch_ + value_row_pitch_) + words<Arithmetic>(padded_) * (pitch_ + value_pitch_));
    upstream_rows_ = query_rows_ + padded_ * row_pitch_;
    query_natural_ = kPair == 1 ? query_rows_ : upstream_rows_ + padded_ * value_row_pitch_;
    upstream_natural_ = kPair == 1 ? upstream_rows_ : query_natural_ + words<Arithmetic>(padded_) * pitch_;
    inverse_ = scratch().rows.template reserve<float>(2 * (padded_ + kLanes));
    delta_ = inverse_ + padded_ + kLanes;

    grad_key_floats_ = (longest + kTileRows) * pitch_;
    grad_value_floats_ = (longest + kTileRows) * value_pitch_;
    grad_key_ = scratch().gradients.template reserve<float>(
        grad_key_floats_ + grad_value_floats_ + (partials.grad_query ? 0 : padded_ * pitch_));
    grad_value_ = grad_key_ + grad_key_floats_;
    grad_query_ = grad_value_ + grad_value_floats_;

    const int64_t tile = (kBackwardQueries + kTileRows) * kTilePitch + kLanes;
    scores_ = scratch().tiles.template reserve<float>(3 * tile + kTileRows * kDiagonals + (kPair == 1 ? 0 : 2 * tile));
    grad_scores_ = scores_ + tile;
    staged_ = grad_scores_ + tile;
    diagonals_ = staged_ + tile;
    memset(diagonals_, 0, kTileRows * kDiagonals * sizeof(float));
    if constexpr (kPair == 1) {
      weights_by_key_ = scores_;
      grad_by_key_ = grad_by_query_ = grad_scores_;
    } else {
      weights_by_key_ = reinterpret_cast<Word*>(diagonals_ + kTileRows * kDiagonals);
      grad_by_key_ = weights_by_key_ + tile;
      grad_by_query_ = reinterpret_cast<Word*>(grad_scores_);
    }
    sums_ = scratch().table.template reserve<float>(2 * table_floats()) + table_floats();
  }

  static int64_t padded_queries(int64_t tokens) { return round_up(tokens, kTileRows); }
  static int64_t pitch(int64_t features) { return round_up(features, kLanes); }

  void run(int64_t begin, int64_t end) {
    const int64_t batches = a_.query.size[0], chunks = partials_.chunks.chunks;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / chunks, chunk = dealt(task % chunks, chunks);
      enter(pair / batches, pair % batches);
      run_chunk(pair, chunk);
    }
    for (Buffer* buffer :
        {&scratch().keys, &scratch().queries, &scratch().rows, &scratch().gradients, &scratch().table})
      buffer->trim();
  }

 private:
  static GradientScratch& scratch() {
    static thread_local GradientScratch scratch;
    return scratch;
  }

  int64_t table_floats() const { return round_up(Weights::floats(positions_), 16); }

  void enter(int64_t head, int64_t batch) {
    if (head == head_ && batch == batch_) return;
    if (head != head_) weights_.load(a_.bias + head * positions_.entries);
    head_ = head;
    batch_ = batch;
    const Matrix query = matrix_at(a_.query, batch, head), upstream = matrix_at(grad_.grad_output, batch, head);
    pack_rows<Arithmetic>(query_rows_, row_pitch_, query, tokens_, padded_, features_);
    pack_rows<Arithmetic>(upstream_rows_, value_row_pitch_, upstream, tokens_, padded_, value_dim_);
    if constexpr (kPair > 1) {
      pack_natural<Arithmetic>(query_natural_, pitch_, query, tokens_, features_);
      pack_natural<Arithmetic>(upstream_natural_, value_pitch_, upstream, tokens_, value_dim_);
    }
    const AttentionBackward like = {
        grad_.grad_output, a_.value, a_.key, a_.value, grad_.output, nullptr, {}, {}, {}, 1};
    row_deltas<kChains<Arithmetic>>(like, batch, head, 0, tokens_, 0, delta_);
    const float* normalizer = grad_.normalizer + (batch * a_.query.size[1] + head) * tokens_;
    for (int64_t r = 0; r < tokens_; ++r) inverse_[r] = inverse_normalizer(normalizer[r]);
    for (int64_t r = tokens_; r < padded_; ++r) inverse_[r] = delta_[r] = 0.f;
  }

  void run_chunk(int64_t pair, int64_t chunk) {
    first_key_ = partials_.chunks.begin(chunk);
    chunk_keys_ = partials_.chunks.end(chunk) - first_key_;
    const Matrix key = matrix_at(a_.key, batch_, head_, first_key_),
                 value = matrix_at(a_.value, batch_, head_, first_key_);
    pack_transposed<Arithmetic>(keys_transposed_, key, chunk_keys_, features_);
    pack_natural<Arithmetic>(keys_natural_, pitch_, key, chunk_keys_, features_);
    pack_transposed<Arithmetic>(values_transposed_, value, chunk_keys_, value_dim_);
    const int64_t task = pair * partials_.chunks.chunks + chunk, query_floats = padded_ * pitch_;
    if (partials_.grad_query) grad_query_ = partials_.grad_query + task * query_floats;
    entries_ = partials_.entries + task * EntrySums::doubles(positions_);
    memset(grad_key_, 0, grad_key_floats_ * sizeof(float));
    memset(grad_value_, 0, grad_value_floats_ * sizeof(float));
    memset(grad_query_, 0, query_floats * sizeof(float));
    memset(entries_, 0, EntrySums::doubles(positions_) * sizeof(double));
    memset(sums_, 0, table_floats() * sizeof(float));
    products_ = 0;

    const int64_t end_key = first_key_ + chunk_keys_;
    for (int64_t key = first_key_; key < end_key;) {
      const int64_t block = end_key - key <= kKeyBlock ? end_key - key : kBackwardKeys;
      const int64_t first = a_.is_causal ? key / kBackwardQueries * kBackwardQueries : 0;
      for (int64_t row = first; row < tokens_; row += kBackwardQueries)
        tile_pair(row, smaller(kBackwardQueries, tokens_ - row), key, block);
      key += block;
    }
    settle();
    store_rows(
        matrix_at(grad_.key, batch_, head_, first_key_), chunk_keys_, grad_key_, pitch_, broadcast(1.f), features_);
    store_rows(matrix_at(grad_.value, batch_, head_, first_key_), chunk_keys_, grad_value_, value_pitch_,
        broadcast(1.f), value_dim_);
    if (!partials_.grad_query)
      store_rows(matrix_at(grad_.query, batch_, head_), tokens_, grad_query_, pitch_, broadcast(1.f), features_);
  }

  void tile_pair(int64_t row, int64_t rows, int64_t key, int64_t block) {
    const int64_t visible = a_.is_causal ? row + rows - key : block;
    if (visible <= 0) return;
    // Micro-tiles of 6 keys never run into the next block's keys with columns that this pass has not written: 48 is a
    // multiple of both 6 and kLanes.
    const int64_t count = smaller(block, round_up(visible, 48));
    const int64_t padded_rows = round_up(rows, kRowStep), padded_keys = round_up(count, kRowStep),
                  local = key - first_key_;
    const PanelProduct<Arithmetic> scores = {query_rows_ + row * row_pitch_, row_pitch_, padded_rows, depth_};
    scores(keys_transposed_, chunk_keys_, local, count, scores_);
    const TileWeights weights = tile_weights(positions_, weights_, runs_, staged_, row, padded_rows, key, count);
    for_panels<Arithmetic>(values_transposed_, chunk_keys_, local, count, value_depth_,
        [&](auto vectors, const Word* panel, int64_t width, int64_t column) __attribute__((always_inline)) {
          const TileWeights part = {weights.at + column, weights.row_pitch};
          if (positions_.is_sequence())
            differentiate<vectors.value, true>(row, padded_rows, panel, width, part, column);
          else
            differentiate<vectors.value, false>(row, padded_rows, panel, width, part, column);
        });
    if (positions_.is_sequence())
      fold(row, rows, key, count);
    else
      scatter(row, rows, count);

    const int64_t query_steps = words<Arithmetic>(rows), key_steps = words<Arithmetic>(count);
    accumulate(weights_by_key_, 1, kTilePitch, padded_keys, upstream_natural_ + row / kPair * value_pitch_,
        value_pitch_, query_steps, grad_value_ + local * value_pitch_);
    accumulate(grad_by_key_, 1, kTilePitch, padded_keys, query_natural_ + row / kPair * pitch_, pitch_, query_steps,
        grad_key_ + local * pitch_);
    accumulate(grad_by_query_, kTilePitch / kPair, 1, padded_rows, keys_natural_ + local / kPair * pitch_, pitch_,
        key_steps, grad_query_ + row * pitch_);
  }

  // to += A B, rows of B and of `to` alike.
  static void accumulate(const Word* a, ptrdiff_t a_row, ptrdiff_t a_step, int64_t rows, const Word* b, int64_t pitch,
      int64_t steps, float* to) {
    for_each_column_tile(pitch / kLanes, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      multiply_rows<Arithmetic, vectors.value, true>(
          a, a_row, a_step, b + column, pitch, steps, to + column, pitch, rows);
    });
  }

  // P, E and s E of all rows and a few vectors of keys.
  template <int kVectors, bool kSequence>
  __attribute__((noinline)) void differentiate(
      int64_t row, int64_t rows, const Word* panel, int64_t width, TileWeights weights, int64_t column) {
    for_row_groups(rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
      constexpr int kRows = group.value;
      const float* inverse = inverse_ + row + r;
      const float* delta = delta_ + row + r;
      float* products = kSequence ? diagonals_ + kBackwardQueries - r + column : staged_ + r * kTilePitch + column;
      constexpr ptrdiff_t kProductPitch = kSequence ? kDiagonals - 1 : kTilePitch;
      multiply_tile<Arithmetic, kVectors, kChains<Arithmetic>, kRows>(upstream_rows_ + (row + r) * value_row_pitch_,
          value_row_pitch_, 1, panel, width, value_depth_,
          [&](Vec(&slope)[kRows][kVectors]) __attribute__((always_inline)) {
            EFFATTN_UNROLL for (int i = 0; i < kRows; i += kPair) {
              EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
                Vec p[kPair], e[kPair];
                const int64_t at = (r + i) * kTilePitch + column + v * kLanes;
                EFFATTN_UNROLL for (int n = 0; n < kPair; ++n) {
                  const Vec score = load(scores_ + at + n * kTilePitch);
                  const Vec weight = load(weights.row(r + i + n) + v * kLanes) * broadcast(inverse[i + n]);
                  e[n] = (slope[i + n][v] - broadcast(delta[i + n])) * weight;
                  p[n] = score * weight;
                  float* to = products + (i + n) * kProductPitch + v * kLanes;
                  store(to, kSequence ? fma(score, e[n], load(to)) : score * e[n]);
                }
                if constexpr (kPair == 1) {
                  store(scores_ + at, p[0]);
                  store(grad_scores_ + at, e[0]);
                } else {
                  const int64_t pair = (r + i) / 2 * kTilePitch + column + v * kLanes;
                  store_pair<Arithmetic>(weights_by_key_ + pair, p[0], p[1]);
                  store_pair<Arithmetic>(grad_by_key_ + pair, e[0], e[1]);
                  EFFATTN_UNROLL for (int n = 0; n < kPair; ++n)
                      store_float(reinterpret_cast<bfloat16*>(grad_by_query_) + at + n * kTilePitch, e[n]);
                }
              }
            }
          });
    });
  }

  // The diagonal sums of a pair of blocks go to double.
  __attribute__((noinline)) void fold(int64_t row, int64_t rows, int64_t key, int64_t count) {
    const int64_t first = kBackwardQueries - round_up(rows, kTileRows),
                  end = kBackwardQueries + round_up(count, kLanes);
    double* to = entries_ + EntrySums::kBefore + positions_.center + key - row - kBackwardQueries;
    for (int64_t d = first; d < end; ++d) {
      float* part = diagonals_ + d;
      double sum = 0.0;
      EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) {
        sum += static_cast<double>(part[i * kDiagonals]);
        part[i * kDiagonals] = 0.f;
      }
      to[d] += sum;
    }
  }

  // On a grid: every row of products to its entries.
  __attribute__((noinline)) void scatter(int64_t row, int64_t rows, int64_t count) {
    float* center = sums_ + Weights::kBefore + positions_.center;
    for (int64_t r = 0; r < rows; ++r) runs_.scatter(center, staged_ + r * kTilePitch, positions_.of(row + r));
    products_ += rows * count;
    if (products_ >= kSummedProducts * positions_.entries) settle();
  }

  void settle() {
    if (positions_.is_sequence()) return;
    float* from = sums_ + Weights::kBefore;
    double* to = entries_ + EntrySums::kBefore;
    for (int64_t e = 0; e < positions_.entries; ++e) to[e] += static_cast<double>(from[e]);
    memset(from, 0, positions_.entries * sizeof(float));
    products_ = 0;
  }

  const Toeplitz& a_;
  const ToeplitzGrad& grad_;
  const Partials& partials_;
  const Positions positions_;
  const int64_t tokens_, features_, value_dim_, depth_, value_depth_, row_pitch_, value_row_pitch_, pitch_,
      value_pitch_, padded_;
  Weights weights_;
  Runs runs_;
  int64_t head_ = -1, batch_ = -1, first_key_ = 0, chunk_keys_ = 0, grad_key_floats_ = 0, grad_value_floats_ = 0,
          products_ = 0;
  Word* keys_transposed_;
  Word* values_transposed_;
  Word* keys_natural_;
  Word* query_rows_;
  Word* upstream_rows_;
  Word* query_natural_;
  Word* upstream_natural_;
  Word* weights_by_key_;
  Word* grad_by_key_;
  Word* grad_by_query_;
  float* inverse_;
  float* delta_;
  float* grad_key_;
  float* grad_value_;
  float* grad_query_;
  float* scores_;
  float* grad_scores_;
  float* staged_;
  float* diagonals_;
  float* sums_;
  double* entries_ = nullptr;
};

// db of a head: its tasks in order.
inline void reduce_entries(const Toeplitz& a, const ToeplitzGrad& grad, const Partials& partials,
    const Positions& positions, int64_t head, double* sums) {
  const int64_t batches = a.query.size[0], tasks = batches * partials.chunks.chunks, entries = positions.entries;
  float* to = grad.bias + head * entries;
  memset(sums, 0, entries * sizeof(double));
  for (int64_t task = 0; task < tasks; ++task) {
    const double* from = partials.entries + (head * tasks + task) * EntrySums::doubles(positions) + EntrySums::kBefore;
    for (int64_t e = 0; e < entries; ++e) sums[e] += from[e];
  }
  for (int64_t e = 0; e < entries; ++e) to[e] = static_cast<float>(sums[e]);
}

template <class Arithmetic>
inline void direct_backward(const Toeplitz& a, const ToeplitzGrad& grad, const Runtime& runtime) {
  using Engine = DirectBackward<Arithmetic>;
  const int64_t batches = a.query.size[0], heads = a.query.size[1], tokens = a.query.size[2],
                features = a.query.size[3], pairs = batches * heads;
  const Positions positions(a.grid_h, a.grid_w);
  const KeyChunks chunks(tokens, pairs);
  const int64_t tasks = tokens > 0 ? pairs * chunks.chunks : 0;
  const int64_t query_floats = Engine::padded_queries(tokens) * Engine::pitch(features);
  const double flops = (a.is_causal ? 1.0 : 2.0) * static_cast<double>(pairs * tokens) *
                       static_cast<double>(tokens * (3 * features + 2 * a.value.size[3]));
  Buffer entries, grad_query;
  const Partials partials = {chunks, entries.reserve<double>(larger(tasks, 1) * EntrySums::doubles(positions)),
      chunks.chunks > 1 ? grad_query.reserve<float>(tasks * query_floats) : nullptr};
  for_items(runtime, tasks, flops, [&](int64_t begin, int64_t end) { Engine(a, grad, partials).run(begin, end); });
  for_items(
      runtime, tokens > 0 ? heads : 0, static_cast<double>(tasks * positions.entries), [&](int64_t begin, int64_t end) {
        static thread_local Buffer sums;
        for (int64_t head = begin; head < end; ++head)
          reduce_entries(a, grad, partials, positions, head, sums.reserve<double>(positions.entries));
        sums.trim();
      });
  if (!partials.grad_query) return;
  for_items(runtime, tokens > 0 ? pairs : 0, flops, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      float* sum = partials.grad_query + pair * chunks.chunks * query_floats;
      for (int64_t chunk = 1; chunk < chunks.chunks; ++chunk)
        for (int64_t at = 0; at < query_floats; at += kLanes)
          store(sum + at, load(sum + at) + load(sum + chunk * query_floats + at));
      store_rows(matrix_at(grad.query, pair % batches, pair / batches), tokens, sum, Engine::pitch(features),
          broadcast(1.f), features);
    }
  });
}

}  // namespace effattn::EFFATTN_ISA::toeplitz
