// What a family adds to the tile engine.
//
// The engine computes  logit = transform(query_i . key_j ; i, j)  in log2 units (it exponentiates with exp2), softmax
// over the keys below key_limit(i), times value. Rows and keys are *logical* indices: a policy may rotate tokens
// (rotation()), softmax does not mind the order of the keys.
//
//   struct Policy {
//     struct Arguments;  // the family's parameters, shared by all threads
//
//     Policy(const AttentionForward&, const Arguments&);  // one per thread and call
//
//     int64_t rotation() const;
//       // Logical index t is token (t + rotation) % tokens, for queries and keys alike; 0 if unused.
//
//     void enter(int64_t batch, int64_t head);
//       // Before the first tile of a head; heads change slowest, then batches.
//
//     void stage(int64_t row, int64_t rows, int64_t key, int64_t keys);
//       // Before the tiles of one score block.
//
//     int64_t key_limit(int64_t row) const;
//       // Row attends to keys [0, key_limit); does not decrease with row.
//
//     int64_t plain_keys(int64_t row) const;
//       // Tiles of rows >= row wholly below this key take the plain path: no limit, no special key.
//
//     template <bool kPlain> Tile tile(int64_t row, int64_t key) const;
//       // kTileRows rows from `row`, which may run past the last row: clamp.
//
//     struct Tile { Vec transform(Vec score, int r, int v) const; };
//       // Row + r, keys key + v * kLanes ...; r and v are compile-time constants in effect.
//   };
#pragma once

#include "api.h"
#include "simd.h"

namespace effattn::EFFATTN_ISA {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr int64_t kQueryBlock = 48;
inline constexpr int64_t kKeyBlock = 256;

}  // namespace effattn::EFFATTN_ISA
