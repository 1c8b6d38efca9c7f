// What both passes of the direct method share: tiles of scores and the weights that lie under them.
#pragma once

#include "backward_tiles.h"
#include "toeplitz_table.h"

namespace effattn::EFFATTN_ISA::toeplitz {

// body(VectorCount<rows>, first row) for groups of six rows, then four or two; rows are padded to kRowStep.
template <class Body>
EFFATTN_INLINE void for_row_groups(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) body(VectorCount<kTileRows>{}, r);
  if (rows - r > kRowStep)
    body(VectorCount<2 * kRowStep>{}, r);
  else if (rows > r)
    body(VectorCount<kRowStep>{}, r);
}

// body(VectorCount<vectors>, panel, pitch of the panel, first column) for the columns that a score tile has, of keys
// first .. first + count of a pack_transposed operand of `packed` keys.
template <class Arithmetic, class Body>
EFFATTN_INLINE void for_panels(
    const typename Arithmetic::Word* panels, int64_t packed, int64_t first, int64_t count, int64_t depth, Body&& body) {
  constexpr int kVectors = kChainedVectors<Arithmetic>;
  for (int64_t column = 0; column < count; column += kTileColumns) {
    const int64_t width = round_up(smaller(kTileColumns, packed - first - column), kLanes);
    const int64_t end = round_up(smaller(kTileColumns, count - column), kLanes);
    const auto* panel = panels + (first + column) * depth;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= end; c += kVectors * kLanes)
      body(VectorCount<kVectors>{}, panel + c, width, column + c);
    for (; c < end; c += kLanes) body(VectorCount<1>{}, panel + c, width, column + c);
  }
}

// Where the weights of a tile lie: row r from column c on is at + r * row_pitch + c.
struct TileWeights {
  const float* at;
  ptrdiff_t row_pitch;
  EFFATTN_INLINE const float* row(int64_t r) const { return at + r * row_pitch; }
};

// Those of queries row .. row + rows and keys key .. key + count. On a sequence a row of a tile reads the table at
// consecutive entries, one further to the left for every query. On a grid a row is put together of runs.
EFFATTN_INLINE TileWeights tile_weights(const Positions& positions, const Weights& weights, Runs& runs, float* staged,
    int64_t row, int64_t rows, int64_t key, int64_t count) {
  if (positions.is_sequence()) return {weights.at(key - row), -1};
  runs.cut(positions, key, smaller(round_up(count, kLanes), positions.tokens - key));
  for (int64_t r = 0; r < rows; ++r)
    runs.gather(staged + r * kTilePitch, weights, positions.of(smaller(row + r, positions.tokens - 1)));
  return {staged, kTilePitch};
}

// Blocks that cost more from the first to the last, or less: dealt from both ends, so that every range gets its share.
EFFATTN_INLINE int64_t dealt(int64_t index, int64_t count) {
  return index % 2 == 0 ? index / 2 : count - 1 - index / 2;
}

}  // namespace effattn::EFFATTN_ISA::toeplitz
