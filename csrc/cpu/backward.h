// Flash attention backward, one engine for every softmax family: the transform of the forward policy (policy.h), its
// slope, and a sink for parameter gradients.
//
//   S = Q K^T,  logit = transform(S),  P = exp(logit - logsumexp),  delta_i = dO_i . O_i
//   dP = dO V^T [* W],  dLogit = P * (dP - delta),  dS = dLogit * slope,     slope = d logit / d S
//   dV = P^T dO,  dK = dS^T Q,  dQ = dS K,    d slope = dLogit * S     (what a multiplying family's parameters receive)
//   reweighing families:  dV = (P * W)^T dO,  dW = P * (dO V^T)
//
// A task is (key head, batch, chunk of keys); it owns its rows of dK and dV. Per block of 192 keys and block of 96
// queries, all in micro-tiles of 6 x 64 (AVX-512):
//   S, dP     96 x 192   Q and dO rows against K^T and V^T, packed once per task
//
//   P, dS                one pass row by row over S and dP; bf16 also stores both with pairs of rows interleaved, the
//                        operand of the next two products
//
//   dV, dK    192 x D    += P^T dO, dS^T Q: the 96 x 192 tiles read by columns
//
//   dQ        96 x D     += dS K
//
// In L2: K and V of the block in three packings, both tiles, dK and dV of the block; in L1: one panel of 64 keys (16 KB
// at D = 64 fp32) and the rows of 6 queries. Chunks depend on the problem only, never on the threads; their dQ are
// added up in order, so every bit is the same on any number of threads. FLOPs 10 N M D per head, one exp2 per score.
// Memory O(N): packed operands and fp32 gradients of one head per thread, fp32 dQ per chunk.
#pragma once

#include "backward_tiles.h"

namespace effattn::EFFATTN_ISA {

// Family: using Policy (the forward's); static constexpr bool kMultiplies: transform(s) = slope * s, otherwise the
// slope is scale * log2 e everywhere; using Sink: NoParameterGradient, or one per thread with
//   Sink(const Policy&, const Shared&), begin(task), add<kPlain>(tile, r, v, dSlope), end(task); a sink that stages
//   rows (kStagesRows) has instead of add: row(row, i) and weights_row(row, i), where dLogit and dW of up to six rows
//   are written, each null where it is not wanted, and fold(row, rows, key, keys) after them.
//
// A family of windows says so (kWindows) and has tasks of its own, WindowChunks: a task is (head, chunk of the windows
// of all images). Each window is one problem that no other task shares, its dQ, dK and dV are stored at once; its rows
// are whole, however many keys they have, so blocks of queries get smaller as rows get longer. Its sink has
//   begin(task), enter(batch, head, rows), row(row, i) -> where dLogit of a row is added or null, weights_row(row, i)
//   -> the same for dW where the policy reweighs, fold(row, rows), leave(dV), share_keys(batch, head, window, dK, dV,
//   factor) where windows overlap, end().
template <bool kWindows>
struct TasksOf {
  using Type = KeyChunks;
};
template <>
struct TasksOf<true> {
  using Type = WindowChunks;
};

template <class Arithmetic, class Family>
class Backward {
  using Word = typename Arithmetic::Word;
  using Policy = typename Family::Policy;
  using Sink = typename Family::Sink;
  static constexpr int kPair = Arithmetic::kPerWord;
  static constexpr bool kWindows = requires { Family::kWindows; };
  static constexpr bool kStagesRows = requires { Sink::kStagesRows; };
  using Tasks = typename TasksOf<kWindows>::Type;
  // Rows of so many vectors fit into 32 registers.
  static constexpr int kShortVectors = kWindows && kLanes == 16 ? (kPair == 1 ? 7 : 4) : 0;

 public:
  struct Shared {
    const AttentionBackward& arguments;
    const AttentionForward& forward;
    const typename Policy::Arguments& parameters;
    const typename Family::SinkArguments& sink;
    Tasks chunks;
    float* chunk_grad_query;  // [key head][batch][chunk][head of the group][padded queries][pitch]; null with one chunk
  };

  explicit Backward(const Shared& shared)
      : shared_(shared),
        arguments_(shared.arguments),
        policy_(shared.forward, shared.parameters),
        sink_(policy_, shared.sink),
        head_dim_(arguments_.query.size[3]),
        depth_(words<Arithmetic>(head_dim_)),
        row_pitch_(round_up(depth_, kLanes)),
        pitch_(round_up(head_dim_, kLanes)),
        most_queries_(round_up(policy_.largest().queries, kTileRows)),
        tile_pitch_(kWindows ? odd_lines(policy_.largest().keys) : kTilePitch),
        block_queries_(kWindows ? queries_per_block(tile_pitch_) : kBackwardQueries) {
    int64_t longest = policy_.largest().keys;
    whole_rows_ = true;
    if constexpr (!kWindows) {
      whole_rows_ = shared.chunks.blocks == 1;
      longest = 0;
      for (int64_t chunk = 0; chunk < shared.chunks.chunks; ++chunk)
        longest = larger(longest, shared.chunks.end(chunk) - shared.chunks.begin(chunk));
    }
    BackwardScratch& scratch = backward_scratch();
    const int64_t transposed = transposed_words<Arithmetic>(longest, head_dim_);
    keys_transposed_ =
        scratch.keys.template reserve<Word>(2 * transposed + words<Arithmetic>(longest) * pitch_ + kLanes);
    values_transposed_ = keys_transposed_ + transposed;
    keys_natural_ = values_transposed_ + transposed;

    const int64_t rows = most_queries_ * row_pitch_,
                  natural = kPair == 1 ? 0 : words<Arithmetic>(most_queries_) * pitch_;
    query_rows_ = scratch.queries.template reserve<Word>(2 * rows + 2 * natural + 2 * most_queries_ + kLanes);
    grad_output_rows_ = query_rows_ + rows;
    query_natural_ = kPair == 1 ? query_rows_ : grad_output_rows_ + rows;
    grad_output_natural_ = kPair == 1 ? grad_output_rows_ : query_natural_ + natural;
    logsumexp_ = reinterpret_cast<float*>(grad_output_rows_ + rows + 2 * natural);
    delta_ = logsumexp_ + most_queries_;

    const int64_t key_rows = (longest + kTileRows) * pitch_;
    grad_key_ = scratch.gradients.template reserve<float>(
        2 * key_rows + (shared.chunk_grad_query ? 0 : most_queries_ * pitch_));
    grad_value_ = grad_key_ + key_rows;
    key_gradient_floats_ = 2 * key_rows;
    grad_query_ = grad_value_ + key_rows;

    const int64_t tile = smaller(block_queries_, most_queries_) * tile_pitch_ + kLanes;
    scores_ = scratch.tiles.template reserve<float>(2 * tile + kTileRows * tile_pitch_ + (kPair == 1 ? 0 : 3 * tile));
    grad_scores_ = scores_ + tile;
    weights_ = grad_scores_ + tile;
    if constexpr (kPair == 1) {
      weights_by_key_ = scores_;
      grad_scores_by_key_ = grad_scores_by_query_ = grad_scores_;
    } else {
      weights_by_key_ = reinterpret_cast<Word*>(weights_ + kTileRows * tile_pitch_);
      grad_scores_by_key_ = weights_by_key_ + tile;
      grad_scores_by_query_ = grad_scores_by_key_ + tile;
    }
  }

  static int64_t pitch(const AttentionBackward& arguments) { return round_up(arguments.query.size[3], kLanes); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      if constexpr (kWindows)
        run_windows(task);
      else
        run_chunk(task);
    }
    BackwardScratch& scratch = backward_scratch();
    scratch.keys.trim();
    scratch.queries.trim();
    scratch.gradients.trim();
    scratch.tiles.trim();
  }

 private:
  // The smallest pitch of an odd number of cache lines.
  static int64_t odd_lines(int64_t keys) { return (round_up(keys, 16) / 16 | 1) * 16; }
  // As many as make a tile of about the usual size.
  static int64_t queries_per_block(int64_t tile_pitch) {
    return larger(kWindowTile / tile_pitch / kTileRows, 4) * kTileRows;
  }

  void run_chunk(int64_t task) {
    const int64_t chunks = shared_.chunks.chunks, batches = arguments_.query.size[0];
    const int64_t chunk = task % chunks, batch = task / chunks % batches, key_head = task / chunks / batches;
    const int64_t first_key = shared_.chunks.begin(chunk), end_key = shared_.chunks.end(chunk);
    const int64_t group = arguments_.query.size[1] / arguments_.key.size[1];
    const IndexSet rows = policy_.rows(key_head * group, 0);
    if constexpr (Sink::kActive) sink_.begin(task);
    prepare_keys(batch, key_head, rows, first_key, end_key - first_key);
    limited_ = rows.queries == 0 || first_key == end_key || policy_.key_limit(0) < end_key;
    if (limited_) memset(grad_key_, 0, key_gradient_floats_ * sizeof(float));
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = key_head * group + member;
      prepare_queries(batch, head, rows);
      policy_.enter(batch, head);
      const int64_t query_floats = round_up(rows.queries, kTileRows) * pitch_;
      if (shared_.chunk_grad_query) grad_query_ = shared_.chunk_grad_query + (task * group + member) * query_floats;
      if (limited_) memset(grad_query_, 0, query_floats * sizeof(float));
      for (int64_t key = first_key; key < end_key;) {
        const int64_t block = end_key - key <= kKeyBlock ? end_key - key : kBackwardKeys;
        for (int64_t row = 0; row < queries_; row += block_queries_)
          tile_pair(row, smaller(block_queries_, queries_ - row), key, block, member > 0 || row > 0);
        key += block;
      }
      if (!shared_.chunk_grad_query) store_queries(batch, head, rows);
    }
    store_keys(batch, key_head, rows);
    if constexpr (Sink::kActive) sink_.end(task);
  }

  void run_windows(int64_t task) {
    const WindowChunks& chunks = shared_.chunks;
    const int64_t head = task / chunks.chunks, chunk = task % chunks.chunks, windows = policy_.windows(head);
    const int64_t end = chunks.begin(chunk + 1, windows);
    sink_.begin(task);
    for (int64_t problem = chunks.begin(chunk, windows); problem < end; ++problem) {
      const int64_t batch = chunks.batch(problem, windows), window = chunks.window(problem, windows);
      const IndexSet rows = policy_.rows(head, window);
      if (rows.queries == 0) continue;
      policy_.enter(batch, head);
      prepare_keys(batch, head, rows, 0, rows.keys);
      prepare_queries(batch, head, rows);
      sink_.enter(batch, head, rows);
      fetch(batch, head, rows, problem + 1 < end && !chunks.by_image && batch + 1 < chunks.batches);
      const int64_t blocks = (queries_ + block_queries_ - 1) / block_queries_;
      const int64_t block = round_up((queries_ + blocks - 1) / blocks, kTileRows);
      for (int64_t row = 0; row < queries_; row += block)
        tile_pair(row, smaller(block, queries_ - row), 0, rows.keys, row > 0);
      sink_.leave(grad_value_);
      store_queries(batch, head, rows);
      if (chunks.by_image)
        sink_.share_keys(batch, head, window, grad_key_, grad_value_, gradient_factor(arguments_));
      else
        store_keys(batch, head, rows);
    }
    sink_.end();
  }

 public:
  // What accumulated dS lacks: the tables of multiplying families are in log2 units and hold the scale already.
  static Vec gradient_factor(const AttentionBackward& arguments) {
    return broadcast(Family::kMultiplies ? kLn2 : arguments.scale);
  }

 private:
  // The rows that this window's gradients go to, and those of the same window of the next image.
  void fetch(int64_t batch, int64_t head, const IndexSet& rows, bool next_image) {
    fetch_.clear(head_dim_ * element_size(arguments_.query.dtype), (queries_ + kTileRows - 1) / kTileRows);
    fetch_.add(arguments_.grad_query, batch, head, rows.query_tokens, rows.queries);
    fetch_.add(arguments_.grad_key, batch, head, rows.key_tokens, rows.keys);
    fetch_.add(arguments_.grad_value, batch, head, rows.key_tokens, rows.keys);
    if (!next_image) return;
    fetch_.add(arguments_.query, batch + 1, head, rows.query_tokens, rows.queries);
    fetch_.add(arguments_.grad_output, batch + 1, head, rows.query_tokens, rows.queries);
    fetch_.add(arguments_.key, batch + 1, head, rows.key_tokens, rows.keys);
    fetch_.add(arguments_.value, batch + 1, head, rows.key_tokens, rows.keys);
  }

  void prepare_keys(int64_t batch, int64_t key_head, const IndexSet& rows, int64_t first_key, int64_t count) {
    const int64_t rotation = policy_.rotation();
    const Matrix keys = matrix_at(arguments_.key, batch, key_head, first_key, rotation, rows.key_tokens);
    const Matrix values = matrix_at(arguments_.value, batch, key_head, first_key, rotation, rows.key_tokens);
    pack_transposed<Arithmetic>(keys_transposed_, keys, count, head_dim_);
    pack_natural<Arithmetic>(keys_natural_, pitch_, keys, count, head_dim_);
    pack_transposed<Arithmetic>(values_transposed_, values, count, head_dim_);
    first_key_ = first_key;
    chunk_keys_ = count;
  }

  void prepare_queries(int64_t batch, int64_t head, const IndexSet& rows) {
    const int64_t rotation = policy_.rotation(), tokens = arguments_.query.size[2];
    queries_ = rows.queries;
    const int64_t padded = round_up(queries_, kTileRows);
    const Matrix query = matrix_at(arguments_.query, batch, head, 0, rotation, rows.query_tokens);
    const Matrix grad_output = matrix_at(arguments_.grad_output, batch, head, 0, rotation, rows.query_tokens);
    pack_rows<Arithmetic>(query_rows_, row_pitch_, query, queries_, padded, head_dim_);
    pack_rows<Arithmetic>(grad_output_rows_, row_pitch_, grad_output, queries_, padded, head_dim_);
    if constexpr (kPair > 1) {
      pack_natural<Arithmetic>(query_natural_, pitch_, query, queries_, head_dim_);
      pack_natural<Arithmetic>(grad_output_natural_, pitch_, grad_output, queries_, head_dim_);
    }
    const float* logsumexp = arguments_.logsumexp + (batch * arguments_.query.size[1] + head) * tokens;
    for (int64_t r = 0; r < queries_; ++r) {
      const int64_t token = rows.query_tokens ? rows.query_tokens[r] : r + rotation;
      logsumexp_[r] = usable_logsumexp(logsumexp[token < tokens ? token : token - tokens]);
    }
    if (!whole_rows_) row_deltas<kChains<Arithmetic>>(arguments_, batch, head, 0, queries_, rotation, delta_);
    for (int64_t r = queries_; r < padded; ++r) {
      logsumexp_[r] = INFINITY;
      delta_[r] = 0.f;
    }
  }

  void store_queries(int64_t batch, int64_t head, const IndexSet& rows) const {
    const Matrix to = matrix_at(arguments_.grad_query, batch, head, 0, policy_.rotation(), rows.query_tokens);
    store_rows(to, queries_, grad_query_, pitch_, gradient_factor(arguments_), head_dim_);
  }

  void store_keys(int64_t batch, int64_t key_head, const IndexSet& rows) const {
    const int64_t rotation = policy_.rotation();
    const Matrix to_key = matrix_at(arguments_.grad_key, batch, key_head, first_key_, rotation, rows.key_tokens);
    const Matrix to_value = matrix_at(arguments_.grad_value, batch, key_head, first_key_, rotation, rows.key_tokens);
    store_rows(to_key, chunk_keys_, grad_key_, pitch_, gradient_factor(arguments_), head_dim_);
    store_rows(to_value, chunk_keys_, grad_value_, pitch_, broadcast(1.f), head_dim_);
  }

  // Both tiles of one block of queries and one of keys, and all five products. Unless some rows see fewer keys, what
  // comes first writes its gradients and what follows adds to them.
  void tile_pair(int64_t row, int64_t rows, int64_t key, int64_t block, bool add_to_keys) {
    const int64_t visible = policy_.key_limit(row + rows - 1) - key;
    if (visible <= 0) return;
    // Micro-tiles of 6 keys never run into the next block's keys with columns that this pass has not written: 48 is a
    // multiple of both 6 and kLanes.
    const int64_t count = smaller(block, round_up(visible, 48));
    const int64_t padded_rows = round_up(rows, kRowStep), padded_keys = round_up(count, kRowStep),
                  local = key - first_key_;
    const PanelProduct<Arithmetic> scores = {
        query_rows_ + row * row_pitch_, row_pitch_, padded_rows, depth_, tile_pitch_};
    const PanelProduct<Arithmetic> grad_scores = {
        grad_output_rows_ + row * row_pitch_, row_pitch_, padded_rows, depth_, tile_pitch_};
    scores(keys_transposed_, chunk_keys_, local, count, scores_);
    grad_scores(values_transposed_, chunk_keys_, local, count, grad_scores_);
    for (int64_t first = 0; first < rows; first += kQueryBlock) {
      policy_.stage(row + first, smaller(kQueryBlock, rows - first), key, count);
      for (int64_t r = first; r < smaller(first + kQueryBlock, rows); r += kTileRows)
        differentiate(row, r, smaller(kTileRows, rows - r), key, count);
    }
    const int64_t query_steps = words<Arithmetic>(rows), key_steps = words<Arithmetic>(count);
    by_natural(weights_by_key_, 1, tile_pitch_, padded_keys, grad_output_natural_ + row / kPair * pitch_, query_steps,
        grad_value_ + local * pitch_, add_to_keys || limited_);
    by_natural(grad_scores_by_key_, 1, tile_pitch_, padded_keys, query_natural_ + row / kPair * pitch_, query_steps,
        grad_key_ + local * pitch_, add_to_keys || limited_);
    by_natural(grad_scores_by_query_, tile_pitch_ / kPair, 1, padded_rows, keys_natural_ + local / kPair * pitch_,
        key_steps, grad_query_ + row * pitch_, local > 0 || limited_);
  }

  // to[rows][head_dim] = or += A . B
  void by_natural(const Word* a, ptrdiff_t a_row, ptrdiff_t a_step, int64_t row_count, const Word* b, int64_t steps,
      float* to, bool add) {
    for_each_column_tile(pitch_ / kLanes, [&](auto vectors, int64_t column) __attribute__((always_inline)) {
      (add ? multiply_rows<Arithmetic, vectors.value, true> : multiply_rows<Arithmetic, vectors.value, false>)(a, a_row,
          a_step, b + column, pitch_, steps, to + column, pitch_, row_count);
    });
  }

  // S, dP -> P, dS for up to six rows.
  void differentiate(int64_t row, int64_t r, int64_t rows, int64_t key, int64_t count) {
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    const int64_t plain_keys = smaller(policy_.plain_keys(row + r) - key, count);
    const int64_t plain = plain_keys <= 0 ? 0 : plain_keys / kLanes;
    live_ = round_up(rows, kPair);
    if (kShortVectors > 0 && vectors <= kShortVectors) {
      if (plain_keys == count)
        short_rows<true, kShortVectors>(vectors, row, r, count);
      else
        short_rows<false, kShortVectors>(vectors, row, r, count);
    } else if (whole_rows_) {
      Vec sum[kTileRows] = {}, product[kTileRows] = {};
      if (plain > 0) weigh<true>(row, r, key, count, 0, plain, sum, product);
      if (plain < vectors) weigh<false>(row, r, key, count, plain, vectors, sum, product);
      for (int i = 0; i < live_; ++i) {
        const float total = reduce_add(sum[i]);
        inverse_[i] = total > 0.f ? 1.f / total : 0.f;
        delta_[row + r + i] = reduce_add(product[i]) * inverse_[i];
      }
      if (plain > 0) differentiate_vectors<true, true>(row, r, key, count, 0, plain);
      if (plain < vectors) differentiate_vectors<false, true>(row, r, key, count, plain, vectors);
    } else {
      if (plain > 0) differentiate_vectors<true, false>(row, r, key, count, 0, plain);
      if (plain < vectors) differentiate_vectors<false, false>(row, r, key, count, plain, vectors);
    }
    if constexpr (kWindows) {
      sink_.fold(row + r, rows);
      fetch_.step();
    } else if constexpr (kStagesRows) {
      sink_.fold(row + r, rows, key, count);
    }
  }

  template <bool kPlain, int kVectors>
  EFFATTN_INLINE void short_rows(int64_t vectors, int64_t row, int64_t r, int64_t count) {
    if constexpr (kVectors > 0) {
      if (vectors == kVectors)
        differentiate_short<kPlain, kVectors>(row, r, count);
      else
        short_rows<kPlain, kVectors - 1>(vectors, row, r, count);
    }
  }

  // Whole rows of few keys, as weigh and differentiate_vectors do them, but in one pass: P and dP stay in registers.
  template <bool kPlain, int kVectors>
  __attribute__((noinline)) void differentiate_short(int64_t row, int64_t r, int64_t count) {
    const auto tile = policy_.template tile<kPlain>(row + r, 0);
    const Mask last = first_lanes(count - (kVectors - 1) * kLanes);
    for (int i = 0; i < live_; i += kPair) {
      Vec w[kPair][kVectors], grad_score[kPair][kVectors];
      float* scores = scores_ + (r + i) * tile_pitch_;
      float* grad_scores = grad_scores_ + (r + i) * tile_pitch_;
      EFFATTN_UNROLL for (int p = 0; p < kPair; ++p) {
        const Vec logsumexp = broadcast(logsumexp_[row + r + i + p]);
        const float* multipliers = multipliers_of(row + r + i + p, 0);
        Vec sum = {}, product = {};
        EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
          const int64_t at = p * tile_pitch_ + v * kLanes;
          const Vec logit = tile.transform(load(scores + at), i + p, v);
          w[p][v] = exp2<Arithmetic::kExp2Degree>(fma(logsumexp, broadcast(-kLog2E), logit));
          if (v == kVectors - 1) w[p][v] = select(last, w[p][v], Vec{});
          grad_score[p][v] = load(grad_scores + at);
          sum += w[p][v];
          product = fma(w[p][v], reweighed(grad_score[p][v], multipliers + v * kLanes), product);
        }
        const float total = reduce_add(sum), inverse = total > 0.f ? 1.f / total : 0.f;
        const Vec delta = broadcast(reduce_add(product) * inverse);
        float *to = nullptr, *to_weights = nullptr;
        if constexpr (kWindows) to = sink_.row(row + r + i + p, i + p);
        if constexpr (Policy::kReweighs) to_weights = sink_.weights_row(row + r + i + p, i + p);
        EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
          const int64_t at = p * tile_pitch_ + v * kLanes;
          w[p][v] *= broadcast(inverse);
          const Vec grad_weight = grad_score[p][v];
          grad_score[p][v] = w[p][v] * (reweighed(grad_weight, multipliers + v * kLanes) - delta);
          if constexpr (Policy::kReweighs) {
            if (to_weights) add_to(to_weights + v * kLanes, w[p][v] * grad_weight);
            w[p][v] *= load(multipliers + v * kLanes);
          }
          if (to) add_to(to + v * kLanes, grad_score[p][v]);
          if constexpr (kPair == 1) {
            store(scores + at, w[p][v]);
            store(grad_scores + at, grad_score[p][v]);
          } else {
            store_float(
                reinterpret_cast<bfloat16*>(grad_scores_by_query_) + (r + i) * tile_pitch_ + at, grad_score[p][v]);
          }
        }
      }
      if constexpr (kPair == 2) {
        EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
          const int64_t at = (r + i) / 2 * tile_pitch_ + v * kLanes;
          store_pair<Arithmetic>(weights_by_key_ + at, w[0][v], w[1][v]);
          store_pair<Arithmetic>(grad_scores_by_key_ + at, grad_score[0][v], grad_score[1][v]);
        }
      }
    }
  }

  EFFATTN_INLINE const float* multipliers_of(int64_t row, int64_t key) const {
    if constexpr (Policy::kReweighs) return policy_.multipliers(row) + key;
    return nullptr;
  }
  static EFFATTN_INLINE Vec reweighed(Vec grad, const float* multipliers) {
    if constexpr (Policy::kReweighs) return grad * load(multipliers);
    return grad;
  }
  static EFFATTN_INLINE void add_to(float* to, Vec value) { store(to, kStagesRows ? value : load(to) + value); }

  template <bool kPlain, class Tile>
  EFFATTN_INLINE Vec weight(const Tile& tile, Vec score, int i, int64_t v, Vec logsumexp, int64_t limit) const {
    Vec logit = tile.transform(score, i, v);
    if constexpr (!kPlain) logit = select(first_lanes(limit - v * kLanes), logit, broadcast(-INFINITY));
    return exp2<Arithmetic::kExp2Degree>(
        fma(logsumexp, broadcast(-kLog2E), logit));  // one rounding of the difference, not two
  }

  // Where one block holds all keys of a row, P is normalised here and delta is the sum of P * dP: the rounding of
  // logsumexp cancels, and dLogit sums to 0.
  template <bool kPlain>
  __attribute__((noinline)) void weigh(
      int64_t row, int64_t r, int64_t key, int64_t count, int64_t first, int64_t last, Vec* sums, Vec* products) {
    const auto tile = policy_.template tile<kPlain>(row + r, key);
    for (int i = 0; i < live_; ++i) {
      const float* scores = scores_ + (r + i) * tile_pitch_;
      const float* grad_scores = grad_scores_ + (r + i) * tile_pitch_;
      float* weights = weights_ + i * tile_pitch_;
      const Vec logsumexp = broadcast(logsumexp_[row + r + i]);
      const int64_t limit = smaller(policy_.key_limit(row + r + i) - key, count);
      const float* multipliers = multipliers_of(row + r + i, key);
      Vec sum = sums[i], product = products[i];
      for (int64_t v = first; v < last; ++v) {
        const Vec w = weight<kPlain>(tile, load(scores + v * kLanes), i, v, logsumexp, limit);
        store(weights + v * kLanes, w);
        sum += w;
        product = fma(w, reweighed(load(grad_scores + v * kLanes), multipliers + v * kLanes), product);
      }
      sums[i] = sum;
      products[i] = product;
    }
  }

  template <bool kPlain, bool kWeighed>
  __attribute__((noinline)) void differentiate_vectors(
      int64_t row, int64_t r, int64_t key, int64_t count, int64_t first, int64_t last) {
    const auto tile = policy_.template tile<kPlain>(row + r, key);
    for (int i = 0; i < live_; i += kPair) {
      float* scores = scores_ + (r + i) * tile_pitch_;
      float* grad_scores = grad_scores_ + (r + i) * tile_pitch_;
      Vec total[kPair], delta[kPair];
      int64_t limit[kPair];
      const float* multipliers[kPair];
      float *to[kPair] = {}, *to_weights[kPair] = {};
      EFFATTN_UNROLL for (int p = 0; p < kPair; ++p) {
        total[p] = broadcast(kWeighed ? inverse_[i + p] : logsumexp_[row + r + i + p]);
        delta[p] = broadcast(delta_[row + r + i + p]);
        limit[p] = smaller(policy_.key_limit(row + r + i + p) - key, count);
        multipliers[p] = multipliers_of(row + r + i + p, key);
        if constexpr (kWindows || kStagesRows) to[p] = sink_.row(row + r + i + p, i + p);
        if constexpr (Policy::kReweighs) to_weights[p] = sink_.weights_row(row + r + i + p, i + p);
      }
      for (int64_t v = first; v < last; ++v) {
        Vec w[kPair], grad_score[kPair];
        EFFATTN_UNROLL for (int p = 0; p < kPair; ++p) {
          const int64_t at = p * tile_pitch_ + v * kLanes;
          const Vec score = load(scores + at);
          const Vec slope = Family::kMultiplies ? tile.transform(broadcast(1.f), i + p, v) : Vec{};
          if constexpr (kWeighed)
            w[p] = load(weights_ + i * tile_pitch_ + at) * total[p];
          else
            w[p] = weight<kPlain>(tile, score, i + p, v, total[p], limit[p]);
          const Vec grad_weight = load(grad_scores + at);
          const Vec grad_logit = w[p] * (reweighed(grad_weight, multipliers[p] + v * kLanes) - delta[p]);
          grad_score[p] = Family::kMultiplies ? grad_logit * slope : grad_logit;
          if constexpr (!kPlain) grad_score[p] = select(first_lanes(limit[p] - v * kLanes), grad_score[p], Vec{});
          if constexpr (kWindows || kStagesRows) {
            if (to[p]) add_to(to[p] + v * kLanes, grad_score[p]);
          } else if constexpr (Sink::kActive) {
            sink_.template add<kPlain, kPair>(tile, i + p, v, grad_logit * score);
          }
          if constexpr (Policy::kReweighs) {
            if (to_weights[p]) add_to(to_weights[p] + v * kLanes, w[p] * grad_weight);
            w[p] *= load(multipliers[p] + v * kLanes);
          }
          if constexpr (kPair == 1) {
            store(scores + at, w[p]);
            store(grad_scores + at, grad_score[p]);
          } else {
            store_float(reinterpret_cast<bfloat16*>(grad_scores_by_query_) + (r + i) * tile_pitch_ + at, grad_score[p]);
          }
        }
        if constexpr (kPair == 2) {
          const int64_t at = (r + i) / 2 * tile_pitch_ + v * kLanes;
          store_pair<Arithmetic>(weights_by_key_ + at, w[0], w[1]);
          store_pair<Arithmetic>(grad_scores_by_key_ + at, grad_score[0], grad_score[1]);
        }
      }
    }
  }

  const Shared& shared_;
  const AttentionBackward& arguments_;
  Policy policy_;
  Sink sink_;
  RowFetch fetch_;
  const int64_t head_dim_, depth_, row_pitch_, pitch_, most_queries_, tile_pitch_, block_queries_;
  bool whole_rows_, limited_ = false;
  int64_t queries_ = 0, first_key_ = 0, chunk_keys_ = 0, key_gradient_floats_ = 0, live_ = 0;
  Word* keys_transposed_;
  Word* values_transposed_;
  Word* keys_natural_;
  Word* query_rows_;
  Word* grad_output_rows_;
  Word* query_natural_;
  Word* grad_output_natural_;
  Word* weights_by_key_;
  Word* grad_scores_by_key_;
  Word* grad_scores_by_query_;
  float* logsumexp_;
  float* delta_;
  float* grad_key_;
  float* grad_value_;
  float* grad_query_;
  float* scores_;
  float* grad_scores_;
  float* weights_;
  float inverse_[kTileRows];
};

template <class Arithmetic, class Family>
inline void backward_windows(const AttentionBackward& arguments, const typename Family::Policy::Arguments& parameters,
    const WindowChunks& chunks, const typename Family::SinkArguments& sink, double flops, const Runtime& runtime) {
  using Engine = Backward<Arithmetic, Family>;
  const AttentionForward forward = {arguments.query, arguments.key, arguments.value, arguments.output,
      const_cast<float*>(arguments.logsumexp), arguments.scale};
  typename Engine::Shared shared = {arguments, forward, parameters, sink, chunks, nullptr};
  run_items(
      runtime, arguments.query.size[1] * chunks.chunks, flops,
      [](int64_t begin, int64_t end, void* context) {
        Engine(*static_cast<typename Engine::Shared*>(context)).run(begin, end);
      },
      &shared);
}

template <class Arithmetic, class Family>
inline void backward(const AttentionBackward& arguments, const typename Family::Policy::Arguments& parameters,
    const KeyChunks& chunks, const typename Family::SinkArguments& sink, const Runtime& runtime) {
  using Engine = Backward<Arithmetic, Family>;
  const AttentionForward forward = {arguments.query, arguments.key, arguments.value, arguments.output,
      const_cast<float*>(arguments.logsumexp), arguments.scale};
  const int64_t heads = arguments.query.size[1], group = heads / larger(arguments.key.size[1], 1),
                batches = arguments.query.size[0];
  const int64_t queries = arguments.query.size[2], padded = round_up(queries, kTileRows),
                pitch = Engine::pitch(arguments);
  const int64_t head_tasks = batches * arguments.key.size[1];
  const double flops = 10.0 * batches * heads * queries * arguments.key.size[2] * arguments.query.size[3];

  Buffer partial;
  float* partials =
      chunks.chunks > 1 ? partial.reserve<float>(head_tasks * chunks.chunks * group * padded * pitch) : nullptr;
  typename Engine::Shared shared = {arguments, forward, parameters, sink, chunks, partials};
  run_items(
      runtime, head_tasks * chunks.chunks, flops,
      [](int64_t begin, int64_t end, void* context) {
        Engine(*static_cast<typename Engine::Shared*>(context)).run(begin, end);
      },
      &shared);
  if (!partials) return;

  // Second stage: add the chunks up in order.
  struct Reduction {
    const AttentionBackward& arguments;
    float* partials;
    int64_t chunks, group, padded, pitch, rotation;
  } reduction = {arguments, partials, chunks.chunks, group, padded, pitch,
      typename Family::Policy(forward, parameters).rotation()};
  run_items(
      runtime, head_tasks * group, flops,
      [](int64_t begin, int64_t end, void* context) {
        const Reduction& r = *static_cast<const Reduction*>(context);
        const int64_t batches = r.arguments.query.size[0], floats = r.padded * r.pitch;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t member = item % r.group, head_task = item / r.group, batch = head_task % batches,
                        key_head = head_task / batches;
          const Matrix to = matrix_at(r.arguments.grad_query, batch, key_head * r.group + member, 0, r.rotation);
          float* sum = r.partials + (head_task * r.chunks * r.group + member) * floats;
          for (int64_t row = 0; row < r.arguments.query.size[2]; ++row) {
            float* at = sum + row * r.pitch;
            for (int64_t c = 0; c < r.pitch; c += kLanes) {
              Vec total = load(at + c);
              for (int64_t chunk = 1; chunk < r.chunks; ++chunk) total += load(at + chunk * r.group * floats + c);
              store(at + c, total);
            }
            store_row(to, row, at, Engine::gradient_factor(r.arguments), r.arguments.query.size[3]);
          }
        }
      },
      &reduction);
}

// As forward_any_type.
template <class Family>
inline void backward_any_type(const AttentionBackward& arguments, const typename Family::Policy::Arguments& parameters,
    const KeyChunks& chunks, const typename Family::SinkArguments& sink, const Runtime& runtime) {
#if EFFATTN_HAS_BFLOAT16_DOT
  backward<BFloat16Pair, Family>(arguments, parameters, chunks, sink, runtime);
#else
  backward<Float32, Family>(arguments, parameters, chunks, sink, runtime);
#endif
}

template <class Family>
inline void backward_windows_any_type(const AttentionBackward& arguments,
    const typename Family::Policy::Arguments& parameters, const WindowChunks& chunks,
    const typename Family::SinkArguments& sink, double flops, const Runtime& runtime) {
#if EFFATTN_HAS_BFLOAT16_DOT
  backward_windows<BFloat16Pair, Family>(arguments, parameters, chunks, sink, flops, runtime);
#else
  backward_windows<Float32, Family>(arguments, parameters, chunks, sink, flops, runtime);
#endif
}

}  // namespace effattn::EFFATTN_ISA
