// Attention over tokens that stand for several each: S = scale * Q K^T + l_j, O = softmax(S) V, with l_j = log size_j.
//
//   dS = P * (dP - delta),   dl_j = sum of dS[i][j] over heads and queries
//
// Tiles, products and bytes are those of plain attention (forward.h, backward.h). The sizes cost no instruction: l is
// multiplied with log2 e once per image, and the multiplication that brings a score to log2 units becomes a
// multiply-add whose addend is a load from L1 (4 M bytes there, beside the panel of keys). A key with l = -inf gets a
// score of -inf and so a weight of 0; a row of such keys gives 0, a logsumexp of -inf and no gradient.
//
// Gradient of l, in three ordered stages, so every bit is the same on any number of threads:
//
//   1. per task (head, batch, chunk of keys), six rows of dS at a time while they are in L1: one sum per key and block
//   of 96 queries, added to the sum of the earlier blocks when the next one begins; short sums round less
//
//   2. per task: its keys' sums go to memory, 4 H B M bytes
//
//   3. per image: the heads in order
//
// FLOPs 4 N M D per head forward, 10 N M D backward; where the gradient of l is not wanted none of it is computed.
#include "backward.h"
#include "forward.h"

namespace effattn::EFFATTN_ISA {
namespace {

class TokenSizesPolicy : public WholeSequence {
 public:
  using Arguments = TokenSizes;

  TokenSizesPolicy(const AttentionForward& attention, const TokenSizes& sizes)
      : WholeSequence(attention), sizes_(sizes), keys_(attention.key.size[2]), factor_(attention.scale * kLog2E) {
    static thread_local Buffer buffer;
    addends_ = buffer.reserve<float>(round_up(keys_, kLanes) + 1);
  }

  int64_t rotation() const { return 0; }
  int64_t key_limit(int64_t) const { return keys_; }
  int64_t plain_keys(int64_t) const { return keys_; }
  void stage(int64_t, int64_t, int64_t, int64_t) {}

  void enter(int64_t batch, int64_t) {
    if (batch == batch_) return;
    batch_ = batch;
    const float* from = sizes_.log_sizes + batch * keys_;
    for (int64_t key = 0; key < keys_; key += kLanes)
      store(addends_ + key, load_partial(from + key, keys_ - key) * broadcast(kLog2E));
  }

  template <bool kPlain>
  struct Tile {
    const float* addends;
    float factor;
    EFFATTN_INLINE Vec transform(Vec score, int, int64_t v) const {
      return fma(score, broadcast(factor), load(addends + v * kLanes));
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t, int64_t key) const {
    return {addends_ + key, factor_};
  }

 private:
  const TokenSizes& sizes_;
  const int64_t keys_;
  const float factor_;
  int64_t batch_ = -1;
  float* addends_;
};

struct TokenSizesSinkArguments {
  KeyChunks chunks;
  float* sums;  // [head][batch][key]
};

class TokenSizesSink {
 public:
  static constexpr bool kActive = true;
  static constexpr bool kStagesRows = true;

  TokenSizesSink(const TokenSizesPolicy&, const TokenSizesSinkArguments& arguments)
      : arguments_(arguments), padded_(round_up(arguments.chunks.keys, kLanes)) {
    static thread_local Buffer buffer;
    rows_ = buffer.reserve<float>(kTileRows * kTilePitch + 2 * padded_);
    block_ = rows_ + kTileRows * kTilePitch;
    earlier_ = block_ + padded_;
  }

  void begin(int64_t) { memset(block_, 0, 2 * padded_ * sizeof(float)); }

  EFFATTN_INLINE float* row(int64_t, int64_t staged_row) const { return rows_ + staged_row * kTilePitch; }

  // Rows of keys key ... key + count, zero up to a whole vector.
  __attribute__((noinline)) void fold(int64_t row, int64_t rows, int64_t key, int64_t count) {
    const int64_t padded = round_up(count, kLanes);
    for (int64_t r = rows; r < kTileRows; ++r) memset(rows_ + r * kTilePitch, 0, padded * sizeof(float));
    if (row % kBackwardQueries == 0) close_block(key, padded);
    for (int64_t c = 0; c < padded; c += kLanes) {
      Vec even = load(block_ + key + c), odd = {};
      EFFATTN_UNROLL for (int r = 0; r < kTileRows; r += 2) {
        even += load(rows_ + r * kTilePitch + c);
        odd += load(rows_ + (r + 1) * kTilePitch + c);
      }
      store(block_ + key + c, even + odd);
    }
  }

  void end(int64_t task) {
    const KeyChunks& chunks = arguments_.chunks;
    const int64_t first = chunks.begin(task % chunks.chunks), end = chunks.end(task % chunks.chunks);
    close_block(first, round_up(end - first, kLanes));
    float* to = arguments_.sums + task / chunks.chunks * chunks.keys;
    for (int64_t key = first; key < end; ++key) to[key] = earlier_[key];
  }

 private:
  void close_block(int64_t key, int64_t padded) {
    for (int64_t c = key; c < key + padded; c += kLanes) {
      store(earlier_ + c, load(earlier_ + c) + load(block_ + c));
      store(block_ + c, Vec{});
    }
  }

  const TokenSizesSinkArguments& arguments_;
  const int64_t padded_;
  float* rows_;
  float* block_;    // sums of the block of queries that is being added
  float* earlier_;  // of those before it
};

struct TokenSizesFamily {
  using Policy = TokenSizesPolicy;
  using Sink = TokenSizesSink;
  using SinkArguments = TokenSizesSinkArguments;
  static constexpr bool kMultiplies = false;
};

struct GivenSizesFamily {
  using Policy = TokenSizesPolicy;
  using Sink = NoParameterGradient;
  using SinkArguments = NoParameterGradient;
  static constexpr bool kMultiplies = false;
};

}  // namespace

void token_sizes_forward(const AttentionForward& attention, const TokenSizes& sizes, const Runtime& runtime) {
  forward_any_type<TokenSizesPolicy>(attention, sizes, runtime);
}

void token_sizes_backward(const AttentionBackward& attention, const TokenSizes& sizes, const TokenSizesGrad& gradient,
    const Runtime& runtime) {
  const int64_t batches = attention.key.size[0], heads = attention.key.size[1], keys = attention.key.size[2];
  const KeyChunks chunks(keys, batches * heads);
  if (!gradient.log_sizes)
    return backward_any_type<GivenSizesFamily>(attention, sizes, chunks, NoParameterGradient{}, runtime);
  Buffer buffer;
  float* sums = buffer.reserve<float>(heads * batches * keys + 1);
  backward_any_type<TokenSizesFamily>(attention, sizes, chunks, TokenSizesSinkArguments{chunks, sums}, runtime);
  for_items(runtime, batches, static_cast<double>(heads) * batches * keys, [&](int64_t begin, int64_t end) {
    for (int64_t batch = begin; batch < end; ++batch)
      for (int64_t key = 0; key < keys; key += kLanes) {
        Vec total = {};
        for (int64_t head = 0; head < heads; ++head)
          total += load_partial(sums + (head * batches + batch) * keys + key, keys - key);
        store_partial(gradient.log_sizes + batch * keys + key, total, keys - key);
      }
  });
}

}  // namespace effattn::EFFATTN_ISA
