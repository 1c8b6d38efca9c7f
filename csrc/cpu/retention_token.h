// One token of the recurrent form: S' = gamma S + k^T v, o = q S'.
//
// Walks over the state in groups of kGroup rows, so that memory is read and written in order, with one pass over v and
// o (which stay in L1) a group. Every element of S' is rounded three times whatever lies around it: a sequence gives
// the same state however it is split. 4 operations and 8 bytes an element.
#pragma once

#include "retention_tiles.h"

namespace effattn::EFFATTN_ISA::retention {

inline constexpr int kGroup = 4;

struct Token {
  const float* query;
  const float* key;
  const float* value;  // value, output: padded to whole vectors
  float* output;
};

template <int kRows>
EFFATTN_INLINE void token_rows(
    const float* from, float* to, int64_t columns, int64_t pitch, const Whole& gamma, const Token& token, int64_t row) {
  Vec key[kRows], query[kRows];
  EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    key[r] = broadcast(token.key[row + r]);
    query[r] = broadcast(token.query[row + r]);
  }
  from += row * pitch;
  to += row * pitch;
  const auto vector = [&](int64_t c, auto&& load_state, auto&& store_state) __attribute__((always_inline)) {
    const Vec value = load(token.value + c);
    Vec output = row == 0 ? Vec{} : load(token.output + c);
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec state = decayed(load_state(from + r * pitch + c), gamma, key[r] * value);
      store_state(to + r * pitch + c, state);
      output = fma(query[r], state, output);
    }
    store(token.output + c, output);
  };
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes)
    vector(
        c, [](const float* at) __attribute__((always_inline)) { return load(at); },
        [](float* at, Vec state) __attribute__((always_inline)) { store(at, state); });
  const int64_t left = columns - c;
  if (left > 0)
    vector(
        c, [&](const float* at) __attribute__((always_inline)) { return load_partial(at, left); },
        [&](float* at, Vec state) __attribute__((always_inline)) { store_partial(at, state, left); });
}

// States of (key_dim, columns), rows `pitch` apart; from and to may be the same.
inline void advance_token(const float* from, float* to, int64_t key_dim, int64_t columns, int64_t pitch,
    const Whole& gamma, const Token& token) {
  int64_t row = 0;
  for (; row + kGroup <= key_dim; row += kGroup) token_rows<kGroup>(from, to, columns, pitch, gamma, token, row);
  for (; row < key_dim; ++row) token_rows<1>(from, to, columns, pitch, gamma, token, row);
}

}  // namespace effattn::EFFATTN_ISA::retention
