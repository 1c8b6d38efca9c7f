// What a family adds to the tile engine.
//
// The engine computes  logit = transform(query_i . key_j ; i, j)  in log2 units (it exponentiates with exp2), softmax
// over the keys below key_limit(i), perhaps times a multiplier of (i, j), times value. Rows and keys are *logical*
// indices: a head is one or more independent problems (windows), each with its own index set of tokens, and a policy
// may rotate the tokens of a whole sequence (rotation()). Softmax does not mind the order of the keys.
//
//   struct Policy {
//     struct Arguments;  // the family's parameters, shared by all threads
//
//     Policy(const AttentionForward&, const Arguments&);  // one per thread and call
//
//     static Problems problems(const AttentionForward&, const Arguments&, int64_t head);
//       // How many independent problems a head has, and their size but for those at borders.
//
//     int64_t windows(int64_t head) const;
//       // Their number again.
//
//     IndexSet largest() const;
//       // Bounds of their sizes.
//
//     IndexSet rows(int64_t head, int64_t window);
//       // Before the first tile of a problem: its index set, valid until the next call.
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
//
//     static constexpr bool kReweighs;  // multiplies the weights after the softmax, which is not normalised again,
//     with const float* multipliers(int64_t row) const;
//       // by key; at least those of the staged score block, whole vectors. The row may run past the last one: clamp.
//
//     static constexpr bool kManyProblems;  // where it exists: rows of few keys get a tile of their own
//
//     static constexpr bool kAdds;  // what it adds to the output, where adds():
//     void prepare_add<Arithmetic>(Word* values, int64_t pitch);
//       // Before the first add of a problem: its values by pack_natural; one row more may be written behind them.
//
//     void add(int64_t row, int64_t rows, float* output, int64_t pitch, const float* factor) const;
//       // Output of finished rows = output * factor + ...
//   };
#pragma once

#include "api.h"
#include "simd.h"

namespace effattn::EFFATTN_ISA {

inline constexpr int64_t kZeroToken = -1;

struct IndexSet {
  int64_t queries = 0, keys = 0;
  const int64_t* query_tokens = nullptr;  // token of each row; null: row r is token (r + rotation) % tokens
  const int64_t* key_tokens = nullptr;    // likewise; kZeroToken: a key and a value of zeros
};

struct Problems {
  int64_t count, queries, keys;
};

// What policies without windows inherit: a head is one problem.
class WholeSequence {
 public:
  explicit WholeSequence(const AttentionForward& attention) : whole_{attention.query.size[2], attention.key.size[2]} {}
  static constexpr bool kReweighs = false;
  static constexpr bool kAdds = false;
  template <class Arguments>
  static Problems problems(const AttentionForward& attention, const Arguments&, int64_t) {
    return {1, attention.query.size[2], attention.key.size[2]};
  }
  int64_t windows(int64_t) const { return 1; }
  IndexSet largest() const { return whole_; }
  IndexSet rows(int64_t, int64_t) const { return whole_; }

 private:
  const IndexSet whole_;
};

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr int64_t kQueryBlock = 48;
inline constexpr int64_t kKeyBlock = 256;

}  // namespace effattn::EFFATTN_ISA
