// Soft merging: N tokens X (N x C) into P averages of them.
//
//   W_np = exp(G_np - logsumexp_p),  Y = W^T X,  logsumexp_p = ln sum_n exp(G_np)
//
// A work item is a block of at most 288 merged tokens and of channels (all of them where the batch alone keeps the
// threads busy). Its logits are read twice: once for the largest of each column, then, 256 tokens at a time,
//   weights   256 x 288        exp2((G - largest) log2 e), each once, and column sums; laid out [48 merged][token][48]
//
//   tokens    256 x 64         one panel of channels, packed; the next is fetched meanwhile
//
//   output    288 x channels   += weights^T tokens in micro-tiles of 6 x 64 (AVX-512) over 256 tokens, 128 at a time
//
// and the output is divided by the sums when it is stored. In L1: 6 columns of weights; in L2: weights (288 KB) and
// panel (64 KB); the output passes through. With bf16 products a word is two tokens of a column.
// FLOPs 2 N P C and one exp2 per weight per example; bytes (2 N P + ceil(P / 288) N C + P C) elements.
#include "api.h"
#include "soft_merge_gradient.h"
#include "soft_merge_residual.h"
#include "soft_merge_tiles.h"

namespace effattn::EFFATTN_ISA {
namespace {

constexpr int64_t kTokens = 256;
constexpr int64_t kPanel = 48;  // merged tokens; a multiple of kTileRows and of kLanes
constexpr int64_t kMostPanels = 6;
constexpr int64_t kFewestItems = 16;

Buffer& merge_scratch() {
  static thread_local Buffer scratch;
  return scratch;
}

// Equal parts of a number of tiles.
struct Parts {
  int64_t tiles, parts, tile, size;
  int64_t begin(int64_t part) const { return smaller(part * tiles / parts * tile, size); }
};

// How the output is dealt out. No element's sum depends on it.
struct MergeBlocks {
  Parts merged, channels;

  explicit MergeBlocks(const SoftMergeForward& arguments) {
    const int64_t batch = arguments.tokens.size[1], outputs = arguments.logits.size[3],
                  width = arguments.tokens.size[3];
    const int64_t panels = (outputs + kPanel - 1) / kPanel, tiles = (width + kTileColumns - 1) / kTileColumns;
    merged = {panels, (panels + kMostPanels - 1) / kMostPanels, kPanel, outputs};
    const int64_t items = larger(batch * merged.parts, 1);
    channels = {tiles, smaller(tiles, (kFewestItems + items - 1) / items), kTileColumns, width};
  }
};

template <class Arithmetic>
class SoftMerge {
  using Word = typename Arithmetic::Word;
  static constexpr bool kPairs = Arithmetic::kPerWord == 2;
  static constexpr int64_t kColumns = kMostPanels * kPanel;
  static constexpr int64_t kSummed = kPairs ? kTokens : 128;  // tokens summed in one register: bounds rounding
  static constexpr int kPanelVectors = kPanel / kLanes;
  static constexpr int64_t kPanelWords = kTokens / Arithmetic::kPerWord * kPanel;

 public:
  SoftMerge(const SoftMergeForward& arguments, const MergeBlocks& blocks)
      : arguments_(arguments), blocks_(blocks), tokens_(arguments.tokens.size[2]) {
    int64_t widest = 0;
    for (int64_t part = 0; part < blocks.channels.parts; ++part)
      widest = larger(widest, blocks.channels.begin(part + 1) - blocks.channels.begin(part));
    pitch_ = round_up(widest, kLanes);
    constexpr int64_t kPacked = kTokens / Arithmetic::kPerWord * kTileColumns;
    float* memory =
        merge_scratch().reserve<float>(4 * kColumns + kMostPanels * kPanelWords + kPacked + kColumns * pitch_);
    const auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
    staged_ = take(2 * kColumns);
    largest_ = take(kColumns);
    sum_ = take(kColumns);
    weights_ = reinterpret_cast<Word*>(take(kMostPanels * kPanelWords));
    packed_ = reinterpret_cast<Word*>(take(kPacked));
    output_ = memory;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Block next = block(smaller(item + 1, end - 1));
      block_ = block(item);
      merge(next);
    }
  }

 private:
  struct Block {
    int64_t batch, first, columns, channel, channels;  // merged tokens first .., channels channel ..
  };

  Block block(int64_t item) const {
    const int64_t channel_part = item % blocks_.channels.parts, rest = item / blocks_.channels.parts;
    const int64_t merged_part = rest % blocks_.merged.parts;
    const int64_t first = blocks_.merged.begin(merged_part), channel = blocks_.channels.begin(channel_part);
    return {rest / blocks_.merged.parts, first, blocks_.merged.begin(merged_part + 1) - first, channel,
        blocks_.channels.begin(channel_part + 1) - channel};
  }

  void merge(const Block& next) {
    const int64_t steps = (tokens_ + kTokens - 1) / kTokens * ((block_.channels + kTileColumns - 1) / kTileColumns) *
                          ((block_.columns + kTileRows - 1) / kTileRows);
    logits_ahead_.plan(
        block_at(arguments_.logits, next.batch, 0, next.first), steps > 0 ? tokens_ : 0, next.columns, steps);
    find_largest();
    memset(sum_, 0, kColumns * sizeof(float));
    if (tokens_ == 0) memset(output_, 0, block_.columns * pitch_ * sizeof(float));
    for (int64_t token = 0; token < tokens_; token += kTokens) {
      const int64_t count = smaller(kTokens, tokens_ - token);
      weigh(token, count);
      for (int64_t c = 0; c < block_.channels; c += kTileColumns) add_channels(token, count, c);
    }
    finish();
  }

  void add_channels(int64_t token, int64_t count, int64_t c) {
    const int64_t live = smaller(kTileColumns, block_.channels - c), width = round_up(live, kLanes);
    pack_natural<Arithmetic>(
        packed_, width, block_at(arguments_.tokens, block_.batch, token, block_.channel + c), count, live);
    const int64_t groups = (block_.columns + kTileRows - 1) / kTileRows;
    if (c + kTileColumns < block_.channels)
      ahead_.plan(block_at(arguments_.tokens, block_.batch, token, block_.channel + c + kTileColumns), count,
          smaller(kTileColumns, block_.channels - c - kTileColumns), groups);
    else if (token + kTokens < tokens_)
      ahead_.plan(block_at(arguments_.tokens, block_.batch, token + kTokens, block_.channel),
          smaller(kTokens, tokens_ - token - kTokens), smaller(kTileColumns, block_.channels), groups);
    else
      ahead_.nothing();
    for_each_column_tile(width / kLanes, [&](auto vectors, int64_t) __attribute__((always_inline)) {
      for_each_row_group(block_.columns, [&](auto rows, int64_t r) __attribute__((always_inline)) {
        add_tile<rows.value, vectors.value>(r, token == 0, count, output_ + r * pitch_ + c);
      });
    });
  }

  template <int kRows, int kVectors>
  EFFATTN_INLINE void add_tile(int64_t r, bool is_first, int64_t count, float* output) {
    EFFATTN_UNROLL for (int i = 0; i < kRows; ++i) for (int c = 0; c < kVectors * kLanes; c += 16)
        __builtin_prefetch(output + i * pitch_ + c, 1);
    ahead_.step();
    logits_ahead_.step();
    const Word* weights = weights_ + r / kPanel * kPanelWords + r % kPanel;
    for (int64_t first = 0; first < count; first += kSummed) {
      const int64_t step = first / Arithmetic::kPerWord, steps = words<Arithmetic>(smaller(kSummed, count - first));
      (is_first && first == 0 ? product_tile<Arithmetic, kRows, kVectors, false>
                              : product_tile<Arithmetic, kRows, kVectors, true>)(weights + step * kPanel, 1, kPanel,
          packed_ + step * kVectors * kLanes, kVectors * kLanes, steps, output, pitch_);
    }
  }

  FloatRows logits() const {
    return {block_at(arguments_.logits, block_.batch, 0, block_.first), block_.columns, staged_, kColumns};
  }

  // A column of nothing but -inf is shifted by 0: its weights are exp2(-inf) = 0.
  __attribute__((noinline)) void find_largest() {
    const FloatRows rows = logits();
    const int64_t columns = block_.columns, tokens = tokens_;
    alignas(64) float largest[kColumns];
    for (int64_t p = 0; p < columns; p += kLanes) store(largest + p, broadcast(-INFINITY));
    for (int64_t n = 0; n < tokens; ++n) {
      const float* row = rows.row(n);
      for (int64_t p = 0; p < columns; p += kLanes)
        store(largest + p, max(load_columns(row + p, columns - p), load(largest + p)));
    }
    for (int64_t p = 0; p < columns; p += kLanes) {
      const Vec found = load(largest + p);
      store(largest_ + p, found == broadcast(-INFINITY) ? Vec{} : found);
    }
  }

  static EFFATTN_INLINE Vec weight(const float* row, const float* largest, int64_t left) {
    return exp2<Arithmetic::kExp2Degree>((load_columns(row, left) - load(largest)) * broadcast(kLog2E));
  }

  __attribute__((noinline)) void weigh(int64_t token, int64_t count) {
    const FloatRows rows = logits();
    const int64_t columns = block_.columns;
    alignas(64) float largest[kColumns], sum[kColumns] = {};
    memcpy(largest, largest_, sizeof(largest));
    Word* line = weights_;
    for (int64_t n = 0; n < count; n += Arithmetic::kPerWord, line += kPanel) {
      const float* row = rows.row(token + n);
      const float* odd_row = kPairs && n + 1 < count ? rows.row(token + n + 1, 1) : nullptr;
      Word* to = line;
      for (int64_t panel = 0; panel < columns; panel += kPanel, to += kPanelWords)
        EFFATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
          const int64_t p = panel + v * kLanes, left = columns - p;
          if (left <= 0) break;
          const Vec even = weight(row + p, largest + p, left);
          if constexpr (kPairs) {
            const Vec odd = odd_row ? weight(odd_row + p, largest + p, left) : Vec{};
            store(sum + p, load(sum + p) + (even + odd));
            store_pair<Arithmetic>(to + v * kLanes, even, odd);
          } else {
            store(sum + p, load(sum + p) + even);
            store(to + v * kLanes, even);
          }
        }
    }
    for (int64_t p = 0; p < columns; p += kLanes) store(sum_ + p, load(sum_ + p) + load(sum + p));
  }

  void finish() {
    float* logsumexp = arguments_.logsumexp + block_.batch * arguments_.logits.size[3] + block_.first;
    for (int64_t p = 0; p < block_.columns; p += kLanes) {
      const Vec sum = load(sum_ + p);
      const Vec logarithm = fma(log2(sum), broadcast(kLn2), load(largest_ + p));
      if (block_.channel == 0)
        store_partial(logsumexp + p, sum == Vec{} ? broadcast(-INFINITY) : logarithm, block_.columns - p);
      store(sum_ + p, sum == Vec{} ? Vec{} : broadcast(1.f) / sum);
    }
    for (int64_t p = 0; p < block_.columns; ++p)
      if (sum_[p] == 0.f) memset(output_ + p * pitch_, 0, pitch_ * sizeof(float));
    store_rows_by(
        block_at(arguments_.output, block_.batch, block_.first, block_.channel), block_.columns, output_, pitch_,
        [&](int64_t p) __attribute__((always_inline)) { return broadcast(sum_[p]); }, block_.channels);
  }

  const SoftMergeForward& arguments_;
  const MergeBlocks& blocks_;
  const int64_t tokens_;
  int64_t pitch_;
  Block block_ = {};
  TileAhead ahead_, logits_ahead_;
  float* staged_;
  float* largest_;
  float* sum_;
  Word* weights_;
  Word* packed_;
  float* output_;
};

#if EFFATTN_HAS_BFLOAT16_DOT
using Products = BFloat16Pair;  // this level gets bf16 tensors only
#else
using Products = Float32;
#endif

}  // namespace

void soft_merge_forward(const SoftMergeForward& arguments, const Runtime& runtime) {
  const MergeBlocks blocks(arguments);
  const Tensor& tokens = arguments.tokens;
  const double flops = 2.0 * tokens.size[1] * tokens.size[2] * tokens.size[3] * arguments.logits.size[3];
  const int64_t items = tokens.size[1] * blocks.merged.parts * blocks.channels.parts;
  for_items(runtime, items, flops, [&](int64_t begin, int64_t end) {
    SoftMerge<Products>(arguments, blocks).run(begin, end);
    merge_scratch().trim();
  });
}

void soft_merge_backward(const SoftMergeBackward& arguments, const Runtime& runtime) {
  const SoftMergeGradientItems items(arguments);
  for_items(runtime, items.count, items.flops,
      [&](int64_t begin, int64_t end) { SoftMergeGradient<Products>(arguments, items).run(begin, end); });
  const int64_t blocks = items.count == 0 ? 0 : arguments.logits.size[1] * SoftMergeResidual::blocks(arguments);
  for_items(
      runtime, blocks, items.flops, [&](int64_t begin, int64_t end) { SoftMergeResidual(arguments).run(begin, end); });
}

}  // namespace effattn::EFFATTN_ISA
