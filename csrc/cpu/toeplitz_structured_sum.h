// The sum under every product of the structured method, for one head of one example:
//
//   t_i = sum_j c_{j-i} (x_i . y_j) z_j       and, where asked for, n_i = sum_j c_{j-i} x_i . y_j
//
// Tokens go in blocks of kBlock. With c_tau = exp(offset + slope |tau|) beyond a side's near blocks, what lies there
// reaches a block of queries through one state,
//
//   falling, slope <= 0   S <- e^(slope kBlock) S + sum_j e^(slope (distance of j to the newest token)) y_j^T z_j
//   rising                S <- S + sum_j e^(-slope (distance of j to the side's end)) y_j^T z_j
//   t_i += factor_i x_i S
//
// so that no weight, key's, query's or state's, is above 1, all underflow only where c does, and nothing is subtracted.
// The near blocks are tiles of scores times a table of c. One sweep carries the state of the keys before, whose blocks
// leave the near ring one by one; the states of the keys after come from a sweep that runs backwards (States).
#pragma once

#include "retention_tiles.h"
#include "toeplitz_structure.h"

namespace effattn::EFFATTN_ISA::toeplitz {

using retention::by_columns;
using retention::by_rows;
using retention::kTilePitch;
using retention::product;
using retention::Rows;
using retention::States;
using retention::Steps;
using retention::tile_rows;
using retention::Whole;
static_assert(kBlock == retention::kBlock);

inline constexpr int64_t kBlockRows = 72;  // tiles of rows read and write past the last one

// Rows of floats: columns of a matrix, times a factor each, and one more column where has_last: last[token] or 1.
struct Source {
  Matrix matrix;
  int64_t columns;
  const float* factor = nullptr;
  bool has_last = false;
  const float* last = nullptr;

  int64_t size() const { return columns + has_last; }
  int64_t pitch() const { return round_up(size(), kLanes); }

  void load(float* to, int64_t first, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* row = to + r * pitch();
      row_to_float(row, matrix, first + r, columns, pitch());
      if (factor)
        for (int64_t c = 0; c < pitch(); c += kLanes)
          store(row + c, effattn::EFFATTN_ISA::load(row + c) * broadcast(factor[first + r]));
      if (has_last) row[columns] = last ? last[first + r] : 1.f;
    }
    memset(to + rows * pitch(), 0, (kBlockRows - rows) * pitch() * sizeof(float));
  }
};

// What a head's table says of pairs (query, key); `turned`: of (key, query).
class Weights {
 public:
  Weights(const Structure& structure, const float* bias, bool is_sequence, int64_t tokens, bool is_causal, bool turned)
      : before(turned ? structure.after : structure.before),
        after(turned ? structure.before : structure.after),
        top_(structure.top),
        middle_(is_sequence ? bias + tokens - 1 : nullptr),
        tokens_(tokens),
        sign_(turned ? -1 : 1),
        is_causal_(is_causal) {}

  float at(int64_t tau) const {
    tau *= sign_;
    if (tau <= -tokens_ || tau >= tokens_ || (is_causal_ && tau > 0)) return 0.f;
    return middle_ ? static_cast<float>(exp(static_cast<double>(middle_[tau]) - top_)) : 1.f;
  }
  double top() const { return top_; }

  const Tail before, after;

 private:
  const double top_;
  const float* middle_;  // null: the same everywhere
  const int64_t tokens_, sign_;
  const bool is_causal_;
};

// The keys beyond the near blocks of one side. Positions count towards the queries: token j is at j before, at
// N - 1 - j after.
class Far {
 public:
  Far(float* memory, const Tail& tail, double top, int64_t near, int64_t tokens, bool is_after)
      : is_live(!tail.vanishes),
        keys_(memory),
        queries_(memory + kBlockRows),
        level_(tail.offset - top),
        slope_(tail.slope),
        near_(near),
        tokens_(tokens),
        is_after_(is_after) {
    memset(memory, 0, 2 * kBlockRows * sizeof(float));
    if (!is_live || is_rising()) return;
    for (int64_t t = 0; t < kBlock; ++t) {
      const int64_t back = is_after_ ? kBlock - 1 - t : t;
      keys_[back] = weight(slope_ * static_cast<double>(kBlock - 1 - t));
      queries_[back] = weight(level_ + slope_ * static_cast<double>(near_ * kBlock + 1 + t));
    }
  }
  static constexpr int64_t kFloats = 2 * kBlockRows;

  const float* keys(int64_t first, int64_t rows) {
    for (int64_t r = 0; is_rising() && r < rows; ++r) keys_[r] = weight(-slope_ * position(first + r));
    return keys_;
  }
  const float* queries(int64_t first, int64_t rows) {
    for (int64_t r = 0; is_rising() && r < rows; ++r) queries_[r] = weight(level_ + slope_ * position(first + r));
    return queries_;
  }
  Whole whole() const { return is_rising() ? Whole{1.f, 0.f} : retention::whole_of(slope_, kBlock); }

  const bool is_live;

 private:
  bool is_rising() const { return slope_ > 0.0; }
  double position(int64_t token) const { return static_cast<double>(is_after_ ? tokens_ - 1 - token : token); }
  static float weight(double exponent) { return exponent < -87.0 ? 0.f : static_cast<float>(exp(exponent)); }

  float* keys_;
  float* queries_;
  const double level_, slope_;
  const int64_t near_, tokens_;
  const bool is_after_;
};

struct SumScratch {
  Buffer query, rows, transposed, values, staged, decayed, tile, output, sums, state, table, far, inner, boundaries;
  void trim() {
    for (Buffer* buffer : {&rows, &transposed, &values, &inner, &boundaries, &table}) buffer->trim();
  }
};

class Sum {
 public:
  Sum(SumScratch& scratch, const Weights& weights, const Source& x, const Source& y, const Source& z, int64_t tokens,
      bool adds_weights)
      : scratch_(scratch),
        x_(x),
        y_(y),
        z_(z),
        tokens_(tokens),
        blocks_((tokens + kBlock - 1) / kBlock),
        near_before_(smaller(weights.before.near_blocks(), blocks_ - 1)),
        near_after_(smaller(weights.after.near_blocks(), blocks_ - 1)),
        slots_(near_before_ + near_after_ + 1),
        depth_(y.size()),
        y_pitch_(y.pitch()),
        z_pitch_(z.pitch()),
        adds_weights_(adds_weights),
        state_floats_((depth_ + kTileRows) * z_pitch_ + y_pitch_),
        before_(
            scratch.far.reserve<float>(2 * Far::kFloats), weights.before, weights.top(), near_before_, tokens, false),
        after_(scratch.far.reserve<float>(2 * Far::kFloats) + Far::kFloats, weights.after, weights.top(), near_after_,
            tokens, true) {
    query_ = scratch.query.reserve<float>(kBlockRows * x.pitch());
    rows_ = scratch.rows.reserve<float>(slots_ * kBlockRows * y_pitch_);
    transposed_ = scratch.transposed.reserve<float>(slots_ * kBlock * y_pitch_);
    values_ = scratch.values.reserve<float>(slots_ * kBlockRows * z_pitch_);
    staged_ = scratch.staged.reserve<float>(kBlockRows * (y_pitch_ + z_pitch_));
    decayed_ = scratch.decayed.reserve<float>(kBlockRows * z_pitch_);
    tile_ = scratch.tile.reserve<float>(kBlockRows * kTilePitch);
    output_ = scratch.output.reserve<float>(kBlockRows * z_pitch_);
    sums_ = scratch.sums.reserve<float>(kBlockRows * kLanes);
    state_ = scratch.state.reserve<float>(state_floats_);
    fill_table(weights);
  }

  // store(first token, rows, t with rows of z.pitch(), n in kLanes parts a row).
  template <class Store>
  void run(Store&& store) {
    const bool looks_ahead = after_.is_live && near_after_ + 1 < blocks_;
    const auto add_following = [&](int64_t step, const float* from, float* to) {
      const int64_t block = blocks_ - 1 - step + near_after_;
      if (block >= blocks_) {
        memcpy(to, from, state_floats_ * sizeof(float));
        return;
      }
      float* values = staged_ + kBlockRows * y_pitch_;
      y_.load(staged_, block * kBlock, rows_of(block));
      z_.load(values, block * kBlock, rows_of(block));
      add_to_state(after_, from, to, staged_, values, block);
    };
    States following(scratch_.inner, scratch_.boundaries, looks_ahead ? blocks_ : 0, state_floats_);
    if (looks_ahead) {
      memset(following.first(), 0, state_floats_ * sizeof(float));
      following.run(add_following);
    }
    memset(state_, 0, state_floats_ * sizeof(float));
    for (int64_t block = 0; block < near_after_; ++block) load_near(block);
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t leaves = block - near_before_ - 1;
      if (leaves >= 0 && before_.is_live) {
        const int64_t slot = leaves % slots_;
        add_to_state(before_, state_, state_, rows_ + slot * kBlockRows * y_pitch_,
            values_ + slot * kBlockRows * z_pitch_, leaves);
      }
      if (block + near_after_ < blocks_) load_near(block + near_after_);
      const int64_t rows = rows_of(block);
      x_.load(query_, block * kBlock, rows);
      is_fresh_ = true;
      if (adds_weights_) memset(sums_, 0, kBlockRows * kLanes * sizeof(float));
      if (leaves >= 0 && before_.is_live) read_state(state_, before_.queries(block * kBlock, rows), rows);
      if (looks_ahead && block + near_after_ + 1 < blocks_)
        read_state(following.at(blocks_ - 1 - block, add_following), after_.queries(block * kBlock, rows), rows);
      const int64_t end = smaller(block + near_after_ + 1, blocks_);
      for (int64_t key_block = larger(block - near_before_, 0); key_block < end; ++key_block)
        add_near(block, key_block, rows);
      store(block * kBlock, rows, output_, sums_);
    }
  }

 private:
  int64_t rows_of(int64_t block) const { return smaller(kBlock, tokens_ - block * kBlock); }

  void fill_table(const Weights& weights) {
    const int64_t before = (near_before_ + 1) * kBlock + kBlockRows, after = (near_after_ + 1) * kBlock + kBlockRows;
    table_ = scratch_.table.reserve<float>(before + after) + before;
    for (int64_t tau = -before; tau < after; ++tau) table_[tau] = weights.at(tau);
  }

  void load_near(int64_t block) {
    const int64_t slot = block % slots_, rows = rows_of(block);
    float* y = rows_ + slot * kBlockRows * y_pitch_;
    y_.load(y, block * kBlock, rows);
    z_.load(values_ + slot * kBlockRows * z_pitch_, block * kBlock, rows);
    retention::transpose_rows(transposed_ + slot * kBlock * y_pitch_, kBlock, {y, y_pitch_}, rows, depth_);
  }

  void add_to_state(Far& far, const float* from, float* to, const float* y, const float* z, int64_t block) {
    const int64_t rows = rows_of(block);
    const float* weight = far.keys(block * kBlock, rows);
    const Whole whole = far.whole();
    retention::scale_rows(decayed_, {z, z_pitch_}, rows, weight);
    retention::advance_state(
        from, to, whole, by_columns(Rows{y, y_pitch_}), {decayed_, z_pitch_}, rows, depth_, z_pitch_);
    if (!adds_weights_) return;
    const int64_t at = state_floats_ - y_pitch_;
    for (int64_t c = 0; c < y_pitch_; c += kLanes) {
      Vec sum = {};
      for (int64_t r = 0; r < rows; ++r) sum = fma(load(y + r * y_pitch_ + c), broadcast(weight[r]), sum);
      store(to + at + c, retention::decayed(load(from + at + c), whole, sum));
    }
  }

  void read_state(const float* state, const float* factor, int64_t rows) {
    const bool assigns = is_fresh_;
    is_fresh_ = false;
    product(
        by_rows(Rows{query_, x_.pitch()}), {state, z_pitch_}, rows, z_pitch_, [&](int64_t) { return Steps{0, depth_}; },
        [&](auto& sum, auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
            float* to = output_ + (r + i) * z_pitch_ + column + v * kLanes;
            store(to, fma(sum[i][v], broadcast(factor[r + i]), assigns ? Vec{} : load(to)));
          }
        });
    if (!adds_weights_) return;
    const float* keys = state + state_floats_ - y_pitch_;
    for (int64_t r = 0; r < rows; ++r) {
      Vec sum = {};
      for (int64_t c = 0; c < y_pitch_; c += kLanes) sum = fma(load(query_ + r * x_.pitch() + c), load(keys + c), sum);
      store(sums_ + r * kLanes, fma(sum, broadcast(factor[r]), load(sums_ + r * kLanes)));
    }
  }

  void add_near(int64_t block, int64_t key_block, int64_t rows) {
    const int64_t slot = key_block % slots_, columns = rows_of(key_block);
    const bool assigns = is_fresh_;
    is_fresh_ = false;
    const float* table = table_ + (key_block - block) * kBlock;
    retention::scores(Rows{query_, x_.pitch()}, Rows{transposed_ + slot * kBlock * y_pitch_, kBlock}, rows, columns,
        depth_, false, [&](auto& sum, auto count, int64_t r, int64_t c) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) {
            const float* weight = table + c - (r + i);
            float* to = tile_ + (r + i) * kTilePitch + c;
            EFFATTN_UNROLL for (int v = 0; v < count.value; ++v)
                store(to + v * kLanes, sum[i][v] * load(weight + v * kLanes));
          }
        });
    if (adds_weights_)
      for (int64_t r = 0; r < rows; ++r) {
        Vec sum = {};
        for (int64_t c = 0; c < columns; c += kLanes) sum += load(tile_ + r * kTilePitch + c);
        store(sums_ + r * kLanes, sum + load(sums_ + r * kLanes));
      }
    product(
        by_rows(Rows{tile_, kTilePitch}), {values_ + slot * kBlockRows * z_pitch_, z_pitch_}, rows, z_pitch_,
        [&](int64_t) { return Steps{0, columns}; },
        [&](auto& sum, auto count, int64_t r, int64_t column) __attribute__((always_inline)) {
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < count.value; ++v) {
            float* to = output_ + (r + i) * z_pitch_ + column + v * kLanes;
            store(to, assigns ? sum[i][v] : sum[i][v] + load(to));
          }
        });
  }

  SumScratch& scratch_;
  const Source x_, y_, z_;
  const int64_t tokens_, blocks_, near_before_, near_after_, slots_, depth_, y_pitch_, z_pitch_;
  const bool adds_weights_;
  const int64_t state_floats_;
  Far before_, after_;
  bool is_fresh_ = true;
  float* query_;
  float* rows_;
  float* transposed_;
  float* values_;
  float* staged_;
  float* decayed_;
  float* tile_;
  float* output_;
  float* sums_;
  float* state_;
  float* table_;
};

}  // namespace effattn::EFFATTN_ISA::toeplitz
