// What the passes of retention share: decays, operands, products.
//
// A chunk of C tokens is worked on in blocks of kBlock tokens; a tile of scores is one block against another. With i, j
// local to the chunk, gamma = exp(log_decay) and s the scale, every decay is one of
//   between(i, j)  s gamma^|i - j|, causal: 0 for j > i     rise(i)  gamma^(i + 1)     fall(j)  gamma^(C - 1 - j)
// all taken from float64 exponentials of n log_decay: a rounded gamma, raised to a power, would drift.
//
// Rows that a tile of the micro-kernel reads past the last one exist (memory of the caller's, or padding of a buffer);
// what they give is not used.
#pragma once

#include "api.h"
#include "pack.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA::retention {

inline constexpr int64_t kBlock = 64;
inline constexpr int64_t kTilePitch = 80;  // of a tile of scores: odd in cache lines, and rows of a last tile fit

template <class Word>
struct RowsOf {
  const Word* data;
  int64_t pitch;
  EFFATTN_INLINE const Word* row(int64_t r) const { return data + r * pitch; }
};
using Rows = RowsOf<float>;

// Rows first ... of a matrix of `tokens` rows as floats, where they lie or copied (times `factor`) to the buffer, which
// holds rows + kTileRows.
inline Rows stage(float* buffer, const Matrix& from, int64_t first, int64_t rows, int64_t columns, int64_t tokens,
    const float* factor = nullptr) {
  const int64_t pitch = round_up(columns, kLanes);
  if (from.dtype == DType::kFloat32 && from.column_stride == 1 && from.row_stride == pitch && columns == pitch &&
      first + rows + kTileRows <= tokens && !factor)
    return {static_cast<const float*>(from.data) + from.offset(first), pitch};
  for (int64_t r = 0; r < rows; ++r) {
    float* to = buffer + r * pitch;
    row_to_float(to, from, first + r, columns, pitch);
    if (factor)
      for (int64_t c = 0; c < pitch; c += kLanes) store(to + c, load(to + c) * broadcast(factor[first + r]));
  }
  memset(buffer + rows * pitch, 0, kTileRows * pitch * sizeof(float));
  return {buffer, pitch};
}

// to[column][row] with row_pitch `pitch`; rows past `rows` are zero up to a whole vector.
inline void transpose_rows(float* to, int64_t pitch, const Rows& from, int64_t rows, int64_t columns) {
  for (int64_t first = 0; first < rows; first += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      WordVec lines[kLanes];
      EFFATTN_UNROLL for (int r = 0; r < kLanes; ++r) lines[r] =
          first + r < rows ? load_as<WordVec>(from.row(first + r) + c) : WordVec{};
      store_transposed(to + c * pitch + first, pitch, lines, columns - c);
    }
}

EFFATTN_INLINE void scale_rows(float* to, const Rows& from, int64_t rows, const float* factor) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < from.pitch; c += kLanes)
      store(to + r * from.pitch + c, load(from.row(r) + c) * broadcast(factor[r]));
}

template <class Word>
struct LeftOf {  // A(row, step)
  const Word* data;
  int64_t row, step;
};
using Left = LeftOf<float>;
template <class Word>
EFFATTN_INLINE LeftOf<Word> by_rows(const RowsOf<Word>& rows) {
  return {rows.data, rows.pitch, 1};
}
EFFATTN_INLINE Left by_columns(const Rows& rows) { return {rows.data, 1, rows.pitch}; }

struct Steps {
  int64_t begin, end;
};

// epilogue(accumulator[kTileRows][vectors], count of vectors, first row, first column) for every tile of A B;
// steps(first row): the part of the sum that is not zero for these rows.
template <class Arithmetic = Float32, class StepsOf, class Epilogue>
EFFATTN_INLINE void product(const LeftOf<typename Arithmetic::Word>& a, const RowsOf<typename Arithmetic::Word>& b,
    int64_t rows, int64_t columns, StepsOf&& steps, Epilogue&& epilogue) {
  for_each_column_tile((columns + kLanes - 1) / kLanes, [&](auto count, int64_t column) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Steps part = steps(r);
      multiply_tile<Arithmetic, count.value>(a.data + r * a.row + part.begin * a.step, a.row, a.step,
          b.row(part.begin) + column, b.pitch, part.end - part.begin,
          [&](Vec(&sum)[kTileRows][count.value]) __attribute__((always_inline)) { epilogue(sum, count, r, column); });
    }
  });
}

// The tiles of a block of scores, of `rows` queries and `keys` keys transposed to [d][kBlock]; on the diagonal of a
// causal call only the vectors that reach it. Summed in two chains: an error of a score is seen, many times over, in
// the gradient of the decay.
template <class Arithmetic = Float32, class Epilogue>
EFFATTN_INLINE void scores(const RowsOf<typename Arithmetic::Word>& query,
    const RowsOf<typename Arithmetic::Word>& keys, int64_t rows, int64_t columns, int64_t depth, bool is_triangle,
    Epilogue&& epilogue) {
  constexpr int kVectors = kChainedVectors<Arithmetic>;
  const auto tile = [&](auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
    multiply_tile<Arithmetic, count.value, kChains<Arithmetic>>(query.row(r), query.pitch, 1, keys.data + column,
        keys.pitch, depth,
        [&](Vec(&sum)[kTileRows][count.value]) __attribute__((always_inline)) { epilogue(sum, count, r, column); });
  };
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t live = is_triangle ? smaller(columns, r + kTileRows) : columns;
    int64_t column = 0;
    for (; column + (kVectors - 1) * kLanes < live; column += kVectors * kLanes)
      tile(VectorCount<kVectors>{}, r, column);
    for (; column < live; column += kLanes) tile(VectorCount<1>{}, r, column);
  }
}

// Buffers of products are padded to whole tiles of rows.
EFFATTN_INLINE int64_t tile_rows(int64_t rows) { return round_up(rows, kTileRows); }

struct Whole {  // gamma^C = high + low, low far below a rounding error of high: applied once a chunk, it does not drift
  float high, low;
};

inline double power(double log_decay, int64_t n) { return n == 0 ? 1.0 : exp(static_cast<double>(n) * log_decay); }

inline Whole whole_of(double log_decay, int64_t tokens) {
  const double all = power(log_decay, tokens);
  const float high = static_cast<float>(all);
  const double below = tokens == 0 ? 0.0
                       : all > 0.5 ? expm1(static_cast<double>(tokens) * log_decay) - (static_cast<double>(high) - 1.0)
                                   : all - static_cast<double>(high);
  return {high, static_cast<float>(below)};
}

// The decays of one head for chunks of up to `chunk` tokens.
class Decay {
 public:
  static int64_t floats(int64_t chunk) { return 8 * (chunk + kBlock); }

  Decay(float* memory, double log_decay, int64_t chunk, bool is_causal, double scale)
      : log_decay_(log_decay), chunk_(chunk) {
    const int64_t padded = chunk + kBlock;
    between_ = memory + padded;
    distance_ = between_ + 2 * padded;
    rise_ = distance_ + padded;
    scaled_rise_ = rise_ + padded;
    fall_ = scaled_rise_ + padded;
    scaled_fall_ = fall_ + padded;
    for (int64_t n = -padded; n < padded; ++n) {
      between_[n] = 0.f;
      distance_[n] = static_cast<float>(n < 0 ? -n : n);
    }
    for (int64_t n = 0; n <= chunk; ++n) {
      const double power = retention::power(log_decay, n);
      if (n < chunk) {
        between_[-n] = static_cast<float>(scale * power);
        if (!is_causal) between_[n] = between_[-n];
        fall_[chunk - 1 - n] = static_cast<float>(power);
        scaled_fall_[chunk - 1 - n] = static_cast<float>(scale * power);
      }
      if (n > 0) {
        rise_[n - 1] = static_cast<float>(power);
        scaled_rise_[n - 1] = static_cast<float>(scale * power);
      }
    }
  }

  // Row i of the decays from column j on.
  EFFATTN_INLINE const float* between(int64_t i, int64_t j) const { return between_ + j - i; }
  EFFATTN_INLINE const float* distance(int64_t i, int64_t j) const { return distance_ + j - i; }
  const float* rise() const { return rise_; }
  const float* scaled_rise() const { return scaled_rise_; }
  const float* fall(int64_t tokens) const { return fall_ + chunk_ - tokens; }
  const float* scaled_fall(int64_t tokens) const { return scaled_fall_ + chunk_ - tokens; }

  Whole whole(int64_t tokens) const { return whole_of(log_decay_, tokens); }

 private:
  const double log_decay_;
  const int64_t chunk_;
  float* between_;
  float* distance_;
  float* rise_;
  float* scaled_rise_;
  float* fall_;
  float* scaled_fall_;
};

EFFATTN_INLINE Vec decayed(Vec state, const Whole& whole, Vec added) {
  return fma(state, broadcast(whole.high), fma(state, broadcast(whole.low), added));
}

// to = gamma^C from + A B: a state after one more chunk, (key_dim, pitch).
template <class Arithmetic = Float32>
inline void advance_state(const float* from, float* to, const Whole& whole,
    const LeftOf<typename Arithmetic::Word>& left, const RowsOf<typename Arithmetic::Word>& right, int64_t steps,
    int64_t key_dim, int64_t pitch) {
  product<Arithmetic>(
      left, right, key_dim, pitch, [&](int64_t) { return Steps{0, steps}; },
      [&](auto& sum, auto count, int64_t row, int64_t column) __attribute__((always_inline)) {
        const int64_t live = smaller(key_dim - row, kTileRows);
        EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) if (r < live)
            EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
          const int64_t at = (row + r) * pitch + column + v * kLanes;
          store(to + at, decayed(load(from + at), whole, sum[r][v]));
        }
      });
}

// The states that enter the steps of a sweep, for a sweep that runs the other way: all of them, or where they are many
// those of one segment and one at the start of every segment, from which the segment is computed again.
class States {
 public:
  // advance(step, from, to); `first`: room for the state that enters step 0, to be filled before `run`.
  States(Buffer& inner, Buffer& boundaries, int64_t steps, int64_t floats) : steps_(steps), floats_(floats) {
    constexpr int64_t kFloats = int64_t{2} << 20;
    segment_ = smaller(larger(kFloats / larger(floats, 1), 4), larger(steps, 1));
    inner_ = inner.reserve<float>(segment_ * floats);
    boundaries_ = boundaries.reserve<float>((steps / segment_ + 1) * floats);
  }
  float* first() { return inner_; }

  template <class Advance>
  void run(Advance&& advance) {
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t slot = step % segment_;
      if (slot == 0) memcpy(boundaries_ + step / segment_ * floats_, inner_, floats_ * sizeof(float));
      if (step + 1 < steps_) advance(step, inner_ + slot * floats_, inner_ + (step + 1) % segment_ * floats_);
    }
    loaded_ = steps_ > 0 ? (steps_ - 1) / segment_ : 0;
  }

  template <class Advance>
  const float* at(int64_t step, Advance&& advance) {
    if (step / segment_ != loaded_) {
      loaded_ = step / segment_;
      memcpy(inner_, boundaries_ + loaded_ * floats_, floats_ * sizeof(float));
      for (int64_t slot = 0; slot + 1 < segment_; ++slot)
        advance(loaded_ * segment_ + slot, inner_ + slot * floats_, inner_ + (slot + 1) * floats_);
    }
    return inner_ + step % segment_ * floats_;
  }

 private:
  const int64_t steps_, floats_;
  int64_t segment_, loaded_ = 0;
  float* inner_;
  float* boundaries_;
};

// What is asked for, cut into items of one head of one sequence each.
class Problem {
 public:
  const Retention& arguments;
  const int64_t heads, tokens, key_dim, value_dim, key_pitch, value_pitch, state_floats;
  int64_t chunk;

  explicit Problem(const Retention& a)
      : arguments(a),
        heads(a.query.size[1]),
        tokens(a.query.size[2]),
        key_dim(a.query.size[3]),
        value_dim(a.value.size[3]),
        key_pitch(round_up(key_dim, kLanes)),
        value_pitch(round_up(value_dim, kLanes)),
        state_floats(key_dim * value_pitch),
        chunk(larger(smaller(a.chunk_size ? a.chunk_size : kBlock, tokens), 1)) {}

  int64_t items() const { return heads * arguments.sequences; }
  double flops() const {
    return 2.0 * static_cast<double>(arguments.query.size[0] * heads * tokens) *
           static_cast<double>(chunk * (key_dim + value_dim) + 2 * key_dim * value_dim);
  }
};

// Items are ordered by heads, so that threads with as many heads have as many tokens.
struct Item {
  int64_t head, sequence, batch;
  Steps tokens;

  Item(const Problem& problem, const int64_t* bounds, int64_t index)
      : head(index / problem.arguments.sequences),
        sequence(index % problem.arguments.sequences),
        batch(bounds ? 0 : sequence),
        tokens(bounds ? Steps{bounds[sequence], bounds[sequence + 1]} : Steps{0, problem.tokens}) {}

  int64_t pair(const Problem& problem) const { return sequence * problem.heads + head; }
};

// Ascending and inside the tensors whatever cu_seqlens holds.
inline const int64_t* sequence_bounds(Buffer& buffer, const Retention& arguments) {
  if (!arguments.cu_seqlens) return nullptr;
  int64_t* bounds = buffer.reserve<int64_t>(arguments.sequences + 1);
  int64_t last = 0;
  for (int64_t s = 0; s <= arguments.sequences; ++s)
    bounds[s] = last = smaller(larger(arguments.cu_seqlens[s], last), arguments.query.size[2]);
  return bounds;
}

inline void load_state(float* to, const float* from, int64_t rows, int64_t columns, int64_t pitch) {
  if (!from) {
    memset(to, 0, rows * pitch * sizeof(float));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) row_to_float(to + r * pitch, from + r * columns, 1, columns, pitch);
}

inline void store_state(float* to, const float* from, int64_t rows, int64_t columns, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * columns, from + r * pitch, columns * sizeof(float));
}

}  // namespace effattn::EFFATTN_ISA::retention
