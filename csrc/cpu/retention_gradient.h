// Gradients of retention.
//
// With S the state that enters a chunk, E the gradient of the state that leaves it, T the decays s gamma^(i - j) inside
// the chunk, P = Q K^T * T, dP = dO V^T and W = dP * T:
//
//   dQ = W K + s gamma^(i + 1) dO S^T
//   dK = W^T Q + gamma^(C - 1 - j) V E^T
//   dV = P^T dO + gamma^(C - 1 - j) K E
//
//   E <- gamma^C E + sum_i s gamma^(i + 1) q_i^T dO_i
//
//   d log_decay = sum (i - j) P dP + C gamma^C <S, E> + sum (i + 1) q.dQ_S + sum (C - 1 - j) k.dK_E
//
// where dQ_S, dK_E are the second terms: positions are local to the chunk, so nothing large is subtracted. A sweep over
// the keys leaves every S (States), a second one from the end carries E and does the rest.
//
// Not causal: F, the gradient of the state R of what follows, runs forwards with S and adds
//
//   s gamma^(C - 1 - i) dO R^T to dQ
//   gamma^(j + 1) V F^T to dK
//   gamma^(j + 1) K F to dV
//
// with their terms of d log_decay. All of it in float32: bf16 and fp16 are widened where they are read.
//
// FLOPs a token and head: C (3 Dk + 2 Dv) + 10 Dk Dv.
//
// Memory: the states of all chunks, or of one segment of up to 8 MB and one at the start of every segment.
#pragma once

#include "retention_tiles.h"

namespace effattn::EFFATTN_ISA::retention {

struct BackwardScratch {
  Buffer decay, query, key, value, upstream, keys, values, decayed, tiles, transposed, after, inner, boundaries;
  Buffer grad_query, grad_key, grad_value;
  void trim() {
    for (Buffer* buffer : {&query, &key, &value, &upstream, &keys, &values, &decayed, &inner, &boundaries, &grad_query,
             &grad_key, &grad_value})
      buffer->trim();
  }
};

class Backward {
 public:
  Backward(const Problem& problem, const RetentionGrad& grad, const int64_t* bounds, double* parts)
      : p_(problem), grad_(grad), bounds_(bounds), parts_(parts), scratch_(scratch()) {
    const int64_t rows = tile_rows(p_.chunk) + kTileRows, blocks = (p_.chunk + kBlock - 1) / kBlock;
    const int64_t key_floats = rows * p_.key_pitch, value_floats = rows * p_.value_pitch;
    query_buffer_ = scratch_.query.reserve<float>(key_floats);
    key_buffer_ = scratch_.key.reserve<float>(key_floats);
    value_buffer_ = scratch_.value.reserve<float>(value_floats);
    upstream_buffer_ = scratch_.upstream.reserve<float>(value_floats);
    decayed_ = scratch_.decayed.reserve<float>(value_floats);
    grad_query_ = scratch_.grad_query.reserve<float>(key_floats);
    grad_key_ = scratch_.grad_key.reserve<float>(key_floats);
    grad_value_ = scratch_.grad_value.reserve<float>(value_floats);
    keys_ = scratch_.keys.reserve<float>(blocks * kBlock * p_.key_pitch);
    values_ = scratch_.values.reserve<float>(blocks * kBlock * p_.value_pitch);
    weights_ = scratch_.tiles.reserve<float>(2 * tile_rows(kBlock) * kTilePitch);
    grad_weights_ = weights_ + tile_rows(kBlock) * kTilePitch;
    transposed_ = scratch_.transposed.reserve<float>(p_.value_dim * p_.key_pitch);
    after_ = scratch_.after.reserve<float>(2 * p_.state_floats);
    decay_memory_ = scratch_.decay.reserve<float>(Decay::floats(p_.chunk));
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) parts_[index] = one(Item(p_, bounds_, index));
    scratch_.trim();
  }

 private:
  static BackwardScratch& scratch() {
    static thread_local BackwardScratch scratch;
    return scratch;
  }

  struct Chunk {
    Rows query, key, value, upstream;
    int64_t first, tokens;
  };

  double one(const Item& item) {
    const Retention& a = p_.arguments;
    const bool is_causal = a.is_causal;
    const Decay decay(decay_memory_, static_cast<double>(a.log_decay[item.head]), p_.chunk, is_causal, a.scale);
    const Matrix query = matrix_at(a.query, item.batch, item.head), key = matrix_at(a.key, item.batch, item.head),
                 value = matrix_at(a.value, item.batch, item.head),
                 upstream = matrix_at(grad_.output, item.batch, item.head);
    const float* row_scale = a.row_scale ? a.row_scale + (item.batch * p_.heads + item.head) * p_.tokens : nullptr;
    const int64_t length = item.tokens.end - item.tokens.begin, chunks = (length + p_.chunk - 1) / p_.chunk;
    const int64_t floats = p_.state_floats, state_at = item.pair(p_) * p_.key_dim * p_.value_dim;

    const auto load_pair = [&](int64_t chunk, bool of_query) {
      const int64_t first = item.tokens.begin + chunk * p_.chunk, tokens = smaller(p_.chunk, item.tokens.end - first);
      Chunk c = {{}, {}, {}, {}, first, tokens};
      if (of_query) {
        c.query = stage(query_buffer_, query, first, tokens, p_.key_dim, p_.tokens);
        c.upstream = stage(upstream_buffer_, upstream, first, tokens, p_.value_dim, p_.tokens, row_scale);
      } else {
        c.key = stage(key_buffer_, key, first, tokens, p_.key_dim, p_.tokens);
        c.value = stage(value_buffer_, value, first, tokens, p_.value_dim, p_.tokens);
      }
      return c;
    };
    // S and, not causal, F behind it.
    const auto advance = [&](int64_t chunk, const float* from, float* to) {
      const Chunk keys = load_pair(chunk, false);
      add_to_state(from, to, decay, keys.tokens, keys.key, keys.value, decay.fall(keys.tokens));
      if (is_causal) return;
      const Chunk queries = load_pair(chunk, true);
      add_to_state(from + floats, to + floats, decay, queries.tokens, queries.query, queries.upstream,
          decay.scaled_fall(queries.tokens));
    };
    States before(scratch_.inner, scratch_.boundaries, chunks, is_causal ? floats : 2 * floats);
    memset(before.first(), 0, (is_causal ? 1 : 2) * floats * sizeof(float));
    load_state(before.first(), a.initial_state ? a.initial_state + state_at : nullptr, p_.key_dim, p_.value_dim,
        p_.value_pitch);
    before.run(advance);

    float* after = after_;               // E
    float* following = after_ + floats;  // R
    load_state(after, grad_.state ? grad_.state + state_at : nullptr, p_.key_dim, p_.value_dim, p_.value_pitch);
    memset(following, 0, floats * sizeof(float));
    log_ = 0.0;
    for (int64_t index = chunks; index-- > 0;) {
      const bool is_first = index == 0, is_last = index + 1 == chunks;
      const float* state = before.at(index, advance);
      const float* preceding = state + floats;  // F
      Chunk c = load_pair(index, false);
      const Chunk queries = load_pair(index, true);
      c.query = queries.query;
      c.upstream = queries.upstream;
      const double whole = static_cast<double>(c.tokens) * power(static_cast<double>(a.log_decay[item.head]), c.tokens);

      const bool has_state = !is_first || a.initial_state, has_after = !is_last || grad_.state;
      bool is_fresh = true;
      if (has_state)
        through_state(grad_query_, c.upstream, c.query, state, decay.scaled_rise(), 1.f, 1.f, c.tokens, is_fresh);
      if (!is_causal && !is_last)
        through_state(grad_query_, c.upstream, c.query, following, decay.scaled_fall(c.tokens),
            static_cast<float>(c.tokens - 1), -1.f, c.tokens, is_fresh);
      if (is_fresh) memset(grad_query_, 0, c.tokens * p_.key_pitch * sizeof(float));
      is_fresh = true;
      if (has_after) {
        bool is_fresh_value = true;
        read_state(c.key, after, decay.fall(c.tokens), c.tokens, is_fresh_value);
        through_state(grad_key_, c.value, c.key, after, decay.fall(c.tokens), static_cast<float>(c.tokens - 1), -1.f,
            c.tokens, is_fresh);
        if (has_state) log_ += whole * inner_product(state, after);
      }
      if (!is_causal && !is_first) {
        bool is_fresh_value = is_fresh;
        read_state(c.key, preceding, decay.rise(), c.tokens, is_fresh_value);
        through_state(grad_key_, c.value, c.key, preceding, decay.rise(), 1.f, 1.f, c.tokens, is_fresh);
        if (!is_last) log_ += whole * inner_product(following, preceding);
      }
      if (is_fresh) {
        memset(grad_key_, 0, c.tokens * p_.key_pitch * sizeof(float));
        memset(grad_value_, 0, c.tokens * p_.value_pitch * sizeof(float));
      }
      inside(c, decay);
      write(grad_.query, item, c, grad_query_, p_.key_pitch, p_.key_dim);
      write(grad_.key, item, c, grad_key_, p_.key_pitch, p_.key_dim);
      write(grad_.value, item, c, grad_value_, p_.value_pitch, p_.value_dim);

      if (!is_first || grad_.initial_state)
        add_to_state(after, after, decay, c.tokens, c.query, c.upstream, decay.scaled_rise());
      if (!is_causal && !is_first) add_to_state(following, following, decay, c.tokens, c.key, c.value, decay.rise());
    }
    if (grad_.initial_state)
      store_state(grad_.initial_state + state_at, after, p_.key_dim, p_.value_dim, p_.value_pitch);
    return log_;
  }

  void write(
      const Tensor& tensor, const Item& item, const Chunk& c, const float* from, int64_t pitch, int64_t columns) {
    const Matrix to = matrix_at(tensor, item.batch, item.head);
    for (int64_t r = 0; r < c.tokens; ++r) store_row(to, c.first + r, from + r * pitch, broadcast(1.f), columns);
  }

  void add_to_state(const float* from, float* to, const Decay& decay, int64_t tokens, const Rows& left,
      const Rows& right, const float* factor) {
    scale_rows(decayed_, right, tokens, factor);
    advance_state(from, to, decay.whole(tokens), by_columns(left), {decayed_, p_.value_pitch}, tokens, p_.key_dim,
        p_.value_pitch);
  }

  double inner_product(const float* a, const float* b) const {
    double total = 0.0;
    for (int64_t row = 0; row < p_.key_dim; ++row) {
      Vec sum = {};
      for (int64_t c = 0; c < p_.value_pitch; c += kLanes)
        sum = fma(load(a + row * p_.value_pitch + c), load(b + row * p_.value_pitch + c), sum);
      total += static_cast<double>(reduce_add(sum));
    }
    return total;
  }

  // to (+)= x with x_i = factor_i left_i state^T; d log_decay += sum (exponent + i slope) of_i . x_i: the power of
  // gamma in factor_i.
  void through_state(float* to, const Rows& left, const Rows& of, const float* state, const float* factor,
      float exponent, float slope, int64_t tokens, bool& is_fresh) {
    const bool assigns = is_fresh;
    is_fresh = false;
    transpose_rows(transposed_, p_.key_pitch, {state, p_.value_pitch}, p_.key_dim, p_.value_dim);
    for (int64_t first = 0; first < tokens; first += kBlock) {
      const int64_t rows = smaller(kBlock, tokens - first);
      product(
          by_rows(Rows{left.row(first), left.pitch}), {transposed_, p_.key_pitch}, rows, p_.key_pitch,
          [&](int64_t) { return Steps{0, p_.value_dim}; },
          [&](auto& sum, auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
            const int64_t live = smaller(rows - r, kTileRows);
            Vec log = {};
            EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) if (i < live) {
              const int64_t row = first + r + i;
              const Vec scale = broadcast(factor[row]);
              const Vec weight = broadcast(exponent + static_cast<float>(row) * slope);
              EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
                const int64_t c = column + v * kLanes;
                const Vec x = sum[i][v] * scale;
                log = fma(weight * x, load(of.row(row) + c), log);
                float* at = to + row * p_.key_pitch + c;
                store(at, assigns ? x : x + load(at));
              }
            }
            log_ += static_cast<double>(reduce_add(log));
          });
    }
  }

  // grad_value (+)= factor_j k_j state.
  void read_state(const Rows& key, const float* state, const float* factor, int64_t tokens, bool& is_fresh) {
    const bool assigns = is_fresh;
    is_fresh = false;
    product(
        by_rows(key), {state, p_.value_pitch}, tokens, p_.value_pitch, [&](int64_t) { return Steps{0, p_.key_dim}; },
        [&](auto& sum, auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
            float* at = grad_value_ + (r + i) * p_.value_pitch + column + v * kLanes;
            store(at, fma(sum[i][v], broadcast(factor[r + i]), assigns ? Vec{} : load(at)));
          }
        });
  }

  void inside(const Chunk& c, const Decay& decay) {
    for (int64_t row = 0; row < c.tokens; row += kBlock) {
      const int64_t rows = smaller(kBlock, c.tokens - row);
      transpose_rows(keys_ + row * p_.key_pitch, kBlock, {c.key.row(row), c.key.pitch}, rows, p_.key_dim);
      transpose_rows(values_ + row * p_.value_pitch, kBlock, {c.value.row(row), c.value.pitch}, rows, p_.value_dim);
    }
    for (int64_t row = 0; row < c.tokens; row += kBlock) {
      const int64_t rows = smaller(kBlock, c.tokens - row);
      for (int64_t column = 0; column < (p_.arguments.is_causal ? row + rows : c.tokens); column += kBlock)
        block(c, decay, row, rows, column, smaller(kBlock, c.tokens - column));
    }
  }

  // One tile of scores: its part of dQ, dK, dV and d log_decay.
  void block(const Chunk& c, const Decay& decay, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const bool is_triangle = p_.arguments.is_causal && row == column;
    scores({c.query.row(row), c.query.pitch}, {keys_ + column * p_.key_pitch, kBlock}, rows, columns, p_.key_dim,
        is_triangle, [&](auto& sum, auto count, int64_t r, int64_t k) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) {
            const float* weight = decay.between(row + r + i, column + k);
            float* to = weights_ + (r + i) * kTilePitch + k;
            EFFATTN_UNROLL for (int v = 0; v < count.value; ++v)
                store(to + v * kLanes, sum[i][v] * load(weight + v * kLanes));
          }
        });
    scores({c.upstream.row(row), c.upstream.pitch}, {values_ + column * p_.value_pitch, kBlock}, rows, columns,
        p_.value_dim, is_triangle, [&](auto& sum, auto count, int64_t r, int64_t k) __attribute__((always_inline)) {
          const int64_t live = smaller(rows - r, kTileRows);
          Vec log = {};
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) if (i < live) {
            const float* weight = decay.between(row + r + i, column + k);
            const float* distance = decay.distance(row + r + i, column + k);
            const int64_t at = (r + i) * kTilePitch + k;
            EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
              const Vec term = load(distance + v * kLanes) * load(weights_ + at + v * kLanes);
              log = fma(term, sum[i][v], log);
              store(grad_weights_ + at + v * kLanes, sum[i][v] * load(weight + v * kLanes));
            }
          }
          log_ += static_cast<double>(reduce_add(log));
        });
    const auto of_query = [&](int64_t r) { return Steps{0, is_triangle ? smaller(columns, r + kTileRows) : columns}; };
    const auto of_key = [&](int64_t r) { return Steps{is_triangle ? r : 0, rows}; };
    const Rows weights = {weights_, kTilePitch}, grad_weights = {grad_weights_, kTilePitch};
    accumulate(grad_query_ + row * p_.key_pitch, by_rows(grad_weights), {c.key.row(column), c.key.pitch}, rows,
        p_.key_pitch, of_query);
    accumulate(grad_key_ + column * p_.key_pitch, by_columns(grad_weights), {c.query.row(row), c.query.pitch}, columns,
        p_.key_pitch, of_key);
    accumulate(grad_value_ + column * p_.value_pitch, by_columns(weights), {c.upstream.row(row), c.upstream.pitch},
        columns, p_.value_pitch, of_key);
  }

  template <class StepsOf>
  static void accumulate(
      float* to, const Left& left, const Rows& right, int64_t rows, int64_t pitch, const StepsOf& steps) {
    product(left, right, rows, pitch, steps,
        [&](auto& sum, auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
          const int64_t live = smaller(rows - r, kTileRows);
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) if (i < live)
              EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
            float* at = to + (r + i) * pitch + column + v * kLanes;
            store(at, sum[i][v] + load(at));
          }
        });
  }

  const Problem& p_;
  const RetentionGrad& grad_;
  const int64_t* bounds_;
  double* parts_;
  BackwardScratch& scratch_;
  double log_ = 0.0;
  float* query_buffer_;
  float* key_buffer_;
  float* value_buffer_;
  float* upstream_buffer_;
  float* decayed_;
  float* grad_query_;
  float* grad_key_;
  float* grad_value_;
  float* keys_;
  float* values_;
  float* weights_;
  float* grad_weights_;
  float* transposed_;
  float* after_;
  float* decay_memory_;
};

}  // namespace effattn::EFFATTN_ISA::retention
