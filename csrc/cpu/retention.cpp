// Retention (RetNet, arXiv 2307.08621): linear attention whose memory decays by gamma a token.
//
//   O = (s Q K^T * G) V,  G_ij = gamma^(i - j) for j <= i else 0;   not causal: gamma^|i - j|
//
// One task is one head of one sequence, walked over in chunks of C tokens with the state S (Dk x Dv, float32) in cache:
//
//   P = s Q K^T * G   inside the chunk
//   O = P V + s gamma^(i + 1) q_i S
//   S = gamma^C S + sum_j gamma^(C - 1 - j) k_j^T v_j
//
//   not causal   a sweep from the end leaves the state R of what follows every chunk: O += s gamma^(C - 1 - i) q_i R
//   C = 1        recurrent: a loop over tokens without tiles
//   C = N        parallel: one chunk, no state
//
// C = 64 unless asked otherwise. Blocks of 64 tokens; micro-tiles of 6 x 64 (gemm.h) for all products; a tile of scores
// is decayed in registers, by one load from a table over j - i; tiles above the diagonal are not computed. In L1 and
// L2: a tile of scores (20 KB), a chunk of Q, K^T, V, O, and S. Bytes: q, k, v, output once; FLOPs a token and head: C
// (Dk + Dv) + 4 Dk Dv.
//
// Lives: retention_tiles.h decays, products, states; retention_operands.h what is multiplied, in float32 or bf16;
// retention_token.h the recurrent form; retention_gradient.h the backward pass.
#include "retention_gradient.h"
#include "retention_operands.h"
#include "retention_token.h"

namespace effattn::EFFATTN_ISA {
namespace retention {
namespace {

class Forward {
 public:
  Forward(const Problem& problem, const RetentionResult& result, const int64_t* bounds)
      : p_(problem), result_(result), bounds_(bounds), scratch_(scratch()) {
    output_ = scratch_.output.reserve<float>(tile_rows(kBlock) * p_.value_pitch);
    state_ = scratch_.state.reserve<float>(p_.state_floats);
    decay_ = scratch_.decay.reserve<float>(Decay::floats(p_.chunk));
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Item item(p_, bounds_, index);
      const Retention& a = p_.arguments;
      const Decay decay(decay_, static_cast<double>(a.log_decay[item.head]), p_.chunk, a.is_causal, a.scale);
      const int64_t at = item.pair(p_) * p_.key_dim * p_.value_dim;
      load_state(state_, a.initial_state ? a.initial_state + at : nullptr, p_.key_dim, p_.value_dim, p_.value_pitch);
      const Sequence sequence = {matrix_at(a.query, item.batch, item.head), matrix_at(a.key, item.batch, item.head),
          matrix_at(a.value, item.batch, item.head), matrix_at(result_.output, item.batch, item.head),
          a.row_scale ? a.row_scale + (item.batch * p_.heads + item.head) * p_.tokens : nullptr};
      if (p_.chunk == 1 && a.is_causal)
        by_tokens(item, sequence, decay);
      else
        choose_operands(item, sequence, decay);
      if (result_.state) store_state(result_.state + at, state_, p_.key_dim, p_.value_dim, p_.value_pitch);
    }
    scratch_.trim();
  }

 private:
  static ForwardScratch& scratch() {
    static thread_local ForwardScratch scratch;
    return scratch;
  }

  void by_tokens(const Item& item, const Sequence& sequence, const Decay& decay) {
    const Whole gamma = decay.whole(1);
    float* query = scratch_.query.reserve<float>(p_.key_pitch);
    float* key = scratch_.key.reserve<float>(p_.key_pitch);
    float* value = scratch_.value.reserve<float>(p_.value_pitch);
    for (int64_t n = item.tokens.begin; n < item.tokens.end; ++n) {
      row_to_float(query, sequence.query, n, p_.key_dim, p_.key_pitch);
      row_to_float(key, sequence.key, n, p_.key_dim, p_.key_pitch);
      row_to_float(value, sequence.value, n, p_.value_dim, p_.value_pitch);
      advance_token(state_, state_, p_.key_dim, p_.value_pitch, p_.value_pitch, gamma, {query, key, value, output_});
      store_output(sequence, n, output_, static_cast<float>(p_.arguments.scale));
    }
  }

  void store_output(const Sequence& sequence, int64_t token, const float* from, float factor = 1.f) {
    if (sequence.row_scale) factor *= sequence.row_scale[token];
    store_row(sequence.output, token, from, broadcast(factor), p_.value_dim);
  }

  void choose_operands(const Item& item, const Sequence& sequence, const Decay& decay) {
#if EFFATTN_HAS_BFLOAT16_DOT
    if (sequence.query.dtype == DType::kBFloat16 && PairOperands::serves(p_)) {
      PairOperands pairs(p_, scratch_);
      return by_chunks(item, sequence, decay, pairs);
    }
#endif
    FloatOperands floats(p_, scratch_);
    by_chunks(item, sequence, decay, floats);
  }

  template <class Operands>
  void by_chunks(const Item& item, const Sequence& sequence, const Decay& decay, Operands& operands) {
    const int64_t length = item.tokens.end - item.tokens.begin, chunks = (length + p_.chunk - 1) / p_.chunk;
    const bool is_causal = p_.arguments.is_causal;
    const auto first_of = [&](int64_t chunk) { return item.tokens.begin + chunk * p_.chunk; };
    const auto tokens_of = [&](int64_t chunk) { return smaller(p_.chunk, item.tokens.end - first_of(chunk)); };
    const auto add_following = [&](int64_t step, const float* from, float* to) {
      const int64_t chunk = chunks - 1 - step;
      operands.load_keys(sequence, first_of(chunk), tokens_of(chunk));
      operands.add_to_state(from, to, decay.whole(tokens_of(chunk)), decay.rise());
    };
    States following(scratch_.inner, scratch_.boundaries, is_causal ? 0 : chunks, p_.state_floats);
    if (!is_causal) {
      memset(following.first(), 0, p_.state_floats * sizeof(float));
      following.run(add_following);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = first_of(chunk), tokens = tokens_of(chunk);
      const float* after = is_causal || chunk + 1 == chunks ? nullptr : following.at(chunks - 1 - chunk, add_following);
      operands.load(sequence, first, tokens);
      const bool has_state = chunk > 0 || p_.arguments.initial_state;
      for (int64_t row = 0; row < tokens; row += kBlock) {
        const int64_t rows = smaller(kBlock, tokens - row);
        bool is_fresh = true;
        if (has_state) read_state(operands, row, rows, state_, decay.scaled_rise() + row, is_fresh);
        if (after) read_state(operands, row, rows, after, decay.scaled_fall(tokens) + row, is_fresh);
        for (int64_t column = 0; column < (is_causal ? row + rows : tokens); column += kBlock)
          add_block(operands, decay, row, rows, column, smaller(kBlock, tokens - column), is_fresh);
        for (int64_t r = 0; r < rows; ++r) store_output(sequence, first + row + r, output_ + r * p_.value_pitch);
      }
      if (chunk + 1 < chunks || result_.state)
        operands.add_to_state(state_, state_, decay.whole(tokens), decay.fall(tokens));
    }
  }

  // output (+)= factor_i q_i S.
  template <class Operands>
  void read_state(
      Operands& operands, int64_t row, int64_t rows, const float* state, const float* factor, bool& is_fresh) {
    using Arithmetic = typename Operands::Arithmetic;
    const bool assigns = is_fresh;
    is_fresh = false;
    product<Arithmetic>(
        by_rows(operands.query(row)), operands.state(state), rows, p_.value_pitch,
        [&](int64_t) { return Steps{0, words<Arithmetic>(p_.key_dim)}; },
        [&](auto& sum, auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
            float* to = output_ + (r + i) * p_.value_pitch + column + v * kLanes;
            store(to, fma(sum[i][v], broadcast(factor[r + i]), assigns ? Vec{} : load(to)));
          }
        });
  }

  // output (+)= (s q k^T * G) v of one block of keys.
  template <class Operands>
  void add_block(Operands& operands, const Decay& decay, int64_t row, int64_t rows, int64_t column, int64_t columns,
      bool& is_fresh) {
    using Arithmetic = typename Operands::Arithmetic;
    const bool is_triangle = p_.arguments.is_causal && row == column, assigns = is_fresh;
    is_fresh = false;
    scores<Arithmetic>(operands.query(row), operands.keys(column), rows, columns, words<Arithmetic>(p_.key_dim),
        is_triangle, [&](auto& sum, auto count, int64_t r, int64_t c) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) {
            const float* weight = decay.between(row + r + i, column + c);
            EFFATTN_UNROLL for (int v = 0; v < count.value; ++v)
                operands.store_score(r + i, c + v * kLanes, sum[i][v] * load(weight + v * kLanes));
          }
        });
    product<Arithmetic>(
        by_rows(operands.tile()), operands.value(column), rows, p_.value_pitch,
        [&](int64_t r) { return Steps{0, words<Arithmetic>(is_triangle ? smaller(columns, r + kTileRows) : columns)}; },
        [&](auto& sum, auto count, int64_t r, int64_t c) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
            float* to = output_ + (r + i) * p_.value_pitch + c + v * kLanes;
            store(to, assigns ? sum[i][v] : sum[i][v] + load(to));
          }
        });
  }

  const Problem& p_;
  const RetentionResult& result_;
  const int64_t* bounds_;
  ForwardScratch& scratch_;
  float* output_;
  float* state_;
  float* decay_;
};

}  // namespace
}  // namespace retention

void retention_forward(const Retention& arguments, const RetentionResult& result, const Runtime& runtime) {
  using namespace retention;
  Buffer buffer;
  const int64_t* bounds = sequence_bounds(buffer, arguments);
  const Problem problem(arguments);
  for_items(runtime, problem.items(), problem.flops(),
      [&](int64_t begin, int64_t end) { Forward(problem, result, bounds).run(begin, end); });
}

void retention_backward(const Retention& arguments, const RetentionGrad& grad, const Runtime& runtime) {
  using namespace retention;
  Buffer buffer, sums;
  const int64_t* bounds = sequence_bounds(buffer, arguments);
  Retention own = arguments;
  if (own.chunk_size == 1) own.chunk_size = 0;  // the gradient of the recurrent form is that of any other
  const Problem problem(own);
  double* parts = sums.reserve<double>(larger(problem.items(), 1));
  for_items(runtime, problem.items(), 4.0 * problem.flops(),
      [&](int64_t begin, int64_t end) { Backward(problem, grad, bounds, parts).run(begin, end); });
  for (int64_t head = 0; head < problem.heads; ++head) {
    double sum = 0.0;
    for (int64_t s = 0; s < own.sequences; ++s) sum += parts[head * own.sequences + s];
    grad.log_decay[head] = static_cast<float>(sum);
  }
}

void retention_step(const RetentionStep& arguments, const Runtime& runtime) {
  using namespace retention;
  const int64_t heads = arguments.query.size[1], items = arguments.query.size[0] * heads;
  const int64_t key_dim = arguments.query.size[3], value_dim = arguments.value.size[3];
  const int64_t key_pitch = round_up(key_dim, kLanes), value_pitch = round_up(value_dim, kLanes);
  for_items(runtime, items, 8.0 * static_cast<double>(items * key_dim * value_dim), [&](int64_t begin, int64_t end) {
    static thread_local Buffer buffer;
    float* query = buffer.reserve<float>(2 * key_pitch + 2 * value_pitch);
    float* key = query + key_pitch;
    float* value = key + key_pitch;
    float* output = value + value_pitch;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / heads, head = index % heads, at = index * key_dim * value_dim;
      row_to_float(query, matrix_at(arguments.query, batch, head), 0, key_dim, key_pitch);
      row_to_float(key, matrix_at(arguments.key, batch, head), 0, key_dim, key_pitch);
      row_to_float(value, matrix_at(arguments.value, batch, head), 0, value_dim, value_pitch);
      const double log_decay = static_cast<double>(arguments.log_decay[head]);
      advance_token(arguments.state + at, arguments.new_state + at, key_dim, value_dim, value_dim,
          whole_of(log_decay, 1), {query, key, value, output});
      store_row(matrix_at(arguments.output, batch, head), 0, output, broadcast(static_cast<float>(arguments.scale)),
          value_dim);
    }
  });
}

}  // namespace effattn::EFFATTN_ISA
