// What the forward pass multiplies, as float32 or as pairs of bf16 (gemm.h).
//
// Pairs run along the summed index: Q and a tile of scores by rows, K^T, V and S by pairs of rows. The decayed values
// that enter the state are split into two bf16 terms, 16 bits together, so that the state, which is kept and handed on
// in float32, is as good as its inputs; S is rounded to bf16 only where an output is read from it.
#pragma once

#include "retention_tiles.h"

namespace effattn::EFFATTN_ISA::retention {

struct ForwardScratch {
  Buffer decay, query, key, value, keys, decayed, tile, output, state, entering, inner, boundaries;
  void trim() {
    for (Buffer* buffer : {&query, &key, &value, &keys, &decayed, &inner, &boundaries}) buffer->trim();
  }
};

struct Sequence {
  Matrix query, key, value, output;
  const float* row_scale;
};

class FloatOperands {
 public:
  using Arithmetic = Float32;

  FloatOperands(const Problem& problem, ForwardScratch& scratch) : p_(problem) {
    const int64_t rows = tile_rows(p_.chunk) + kTileRows;
    query_buffer_ = scratch.query.reserve<float>(rows * p_.key_pitch);
    key_buffer_ = scratch.key.reserve<float>(rows * p_.key_pitch);
    value_buffer_ = scratch.value.reserve<float>(rows * p_.value_pitch);
    decayed_ = scratch.decayed.reserve<float>(rows * p_.value_pitch);
    keys_ = scratch.keys.reserve<float>(round_up(p_.chunk, kBlock) * p_.key_pitch);
    tile_ = scratch.tile.reserve<float>(tile_rows(kBlock) * kTilePitch);
  }

  // What enters the state.
  void load_keys(const Sequence& sequence, int64_t first, int64_t tokens) {
    tokens_ = tokens;
    key_ = stage(key_buffer_, sequence.key, first, tokens, p_.key_dim, p_.tokens);
    value_ = stage(value_buffer_, sequence.value, first, tokens, p_.value_dim, p_.tokens);
  }
  // And the rest.
  void load(const Sequence& sequence, int64_t first, int64_t tokens) {
    load_keys(sequence, first, tokens);
    query_ = stage(query_buffer_, sequence.query, first, tokens, p_.key_dim, p_.tokens);
    for (int64_t row = 0; row < tokens; row += kBlock)
      transpose_rows(
          keys_ + row * p_.key_pitch, kBlock, {key_.row(row), key_.pitch}, smaller(kBlock, tokens - row), p_.key_dim);
  }

  Rows query(int64_t row) const { return {query_.row(row), query_.pitch}; }
  Rows keys(int64_t column) const { return {keys_ + column * p_.key_pitch, kBlock}; }
  Rows value(int64_t row) const { return {value_.row(row), value_.pitch}; }
  Rows state(const float* state) { return {state, p_.value_pitch}; }
  Rows tile() const { return {tile_, kTilePitch}; }
  EFFATTN_INLINE void store_score(int64_t row, int64_t column, Vec score) {
    store(tile_ + row * kTilePitch + column, score);
  }

  void add_to_state(const float* from, float* to, const Whole& whole, const float* factor) {
    scale_rows(decayed_, value_, tokens_, factor);
    advance_state<Float32>(
        from, to, whole, by_columns(key_), {decayed_, p_.value_pitch}, tokens_, p_.key_dim, p_.value_pitch);
  }

 private:
  const Problem& p_;
  Rows query_, key_, value_;
  int64_t tokens_ = 0;
  float* query_buffer_;
  float* key_buffer_;
  float* value_buffer_;
  float* decayed_;
  float* keys_;
  float* tile_;
};

#if EFFATTN_HAS_BFLOAT16_DOT
EFFATTN_INLINE WordVec join(Vec even, Vec odd) {
  return __builtin_convertvector(to_bfloat16(even), WordVec) |
         (__builtin_convertvector(to_bfloat16(odd), WordVec) << 16);
}

class PairOperands {
  using Words = RowsOf<uint32_t>;

 public:
  using Arithmetic = BFloat16Pair;

  // pack.h knows no more columns.
  static bool serves(const Problem& problem) { return problem.value_dim <= kMaxHeadDim; }

  PairOperands(const Problem& problem, ForwardScratch& scratch)
      : p_(problem),
        depth_(words<BFloat16Pair>(p_.key_dim)),
        query_pitch_(round_up(depth_, kLanes)),
        pairs_(p_.chunk / 2 + 1) {
    query_ = scratch.query.reserve<uint32_t>((tile_rows(p_.chunk) + kTileRows) * query_pitch_);
    key_ = scratch.key.reserve<uint32_t>((2 * pairs_ + 1) * p_.key_pitch);
    value_ = scratch.value.reserve<uint32_t>(pairs_ * p_.value_pitch);
    decayed_ = scratch.decayed.reserve<uint32_t>(2 * pairs_ * p_.value_pitch);
    keys_ = scratch.keys.reserve<uint32_t>(round_up(p_.chunk, kBlock) * depth_);
    tile_ = scratch.tile.reserve<uint16_t>(tile_rows(kBlock) * 2 * kTilePitch);
    state_ = scratch.entering.reserve<uint32_t>(depth_ * p_.value_pitch);
  }

  void load_keys(const Sequence& sequence, int64_t first, int64_t tokens) {
    tokens_ = tokens;
    pack_natural<BFloat16Pair>(key_, p_.key_pitch, from(sequence.key, first), tokens, p_.key_dim);
    pack_natural<BFloat16Pair>(value_, p_.value_pitch, from(sequence.value, first), tokens, p_.value_dim);
    const int64_t used = words<BFloat16Pair>(tokens) * p_.key_pitch;
    memcpy(key_ + used, key_, used * sizeof(uint32_t));  // for the second term of the decayed values
    memset(key_ + 2 * used, 0, kTileRows * sizeof(uint32_t));
  }
  void load(const Sequence& sequence, int64_t first, int64_t tokens) {
    load_keys(sequence, first, tokens);
    pack_rows<BFloat16Pair>(query_, query_pitch_, from(sequence.query, first), tokens, tokens + kTileRows, p_.key_dim);
    for (int64_t row = 0; row < tokens; row += kBlock)
      pack_transposed<BFloat16Pair>(
          keys_ + row * depth_, from(sequence.key, first + row), smaller(kBlock, tokens - row), p_.key_dim);
  }

  Words query(int64_t row) const { return {query_ + row * query_pitch_, query_pitch_}; }
  Words keys(int64_t column) const {
    return {keys_ + column * depth_, round_up(smaller(kBlock, tokens_ - column), kLanes)};
  }
  Words value(int64_t row) const { return {value_ + row / 2 * p_.value_pitch, p_.value_pitch}; }
  Words state(const float* state) {
    for (int64_t d = 0; d < depth_; ++d)
      for (int64_t c = 0; c < p_.value_pitch; c += kLanes) {
        const float* even = state + 2 * d * p_.value_pitch + c;
        const Vec odd = 2 * d + 1 < p_.key_dim ? effattn::EFFATTN_ISA::load(even + p_.value_pitch) : Vec{};
        store_words(state_ + d * p_.value_pitch + c, join(effattn::EFFATTN_ISA::load(even), odd));
      }
    return {state_, p_.value_pitch};
  }
  Words tile() const { return {reinterpret_cast<const uint32_t*>(tile_), kTilePitch}; }
  EFFATTN_INLINE void store_score(int64_t row, int64_t column, Vec score) {
    store_float(reinterpret_cast<bfloat16*>(tile_ + row * 2 * kTilePitch + column), score);
  }

  void add_to_state(const float* from, float* to, const Whole& whole, const float* factor) {
    const int64_t pairs = words<BFloat16Pair>(tokens_), used = pairs * p_.value_pitch;
    for (int64_t n = 0; n < pairs; ++n) {
      const Vec even = broadcast(factor[2 * n]), odd = broadcast(2 * n + 1 < tokens_ ? factor[2 * n + 1] : 0.f);
      for (int64_t c = 0; c < p_.value_pitch; c += kLanes) {
        const int64_t at = n * p_.value_pitch + c;
        const WordVec pair = load_as<WordVec>(value_ + at);
        const Vec x = (Vec)(pair << 16) * even, y = (Vec)(pair & 0xffff0000u) * odd;
        const WordVec high = join(x, y);
        store_words(decayed_ + at, high);
        store_words(decayed_ + used + at, join(x - (Vec)(high << 16), y - (Vec)(high & 0xffff0000u)));
      }
    }
    advance_state<BFloat16Pair>(
        from, to, whole, {key_, 1, p_.key_pitch}, {decayed_, p_.value_pitch}, 2 * pairs, p_.key_dim, p_.value_pitch);
  }

 private:
  static Matrix from(Matrix matrix, int64_t first) {
    matrix.first += first;
    return matrix;
  }

  const Problem& p_;
  const int64_t depth_, query_pitch_, pairs_;
  int64_t tokens_ = 0;
  uint32_t* query_;
  uint32_t* key_;
  uint32_t* value_;
  uint32_t* decayed_;
  uint32_t* keys_;
  uint16_t* tile_;
  uint32_t* state_;
};
#endif

}  // namespace effattn::EFFATTN_ISA::retention
