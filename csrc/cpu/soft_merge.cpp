// Soft merging: N tokens X (N x C) into P averages of them.
//
//   W_np = exp(G_np - logsumexp_p),  Y = W^T X,  logsumexp_p = ln sum_n exp(G_np)
//
// A work item is a block of at most kMostPanels * 48 = 144 merged tokens and of channels (all of them where the batch
// alone keeps the threads busy). Its logits are read twice: once for the largest of each column, then, 256 tokens at a
// time,
//   weights   256 x 144        exp2((G - largest) log2 e), each once, and column sums; laid out [48 merged][token][48]
//
//   tokens    256 x 64         one panel of channels, packed; the next is fetched meanwhile
//
//   output    144 x channels   += weights^T tokens in micro-tiles of 6 x 64 (AVX-512) over the 256 tokens
//
// and the output is divided by the sums when it is stored. In L1: 6 columns of weights; in L2: weights (144 KB), panel
// (64 KB), output (432 KB at C = 768). With bf16 products a word is two tokens of a column.
// FLOPs 2 N P C and one exp2 per weight per example; bytes (2 N P + ceil(P / 144) N C + P C) elements.
#include "api.h"
#include "soft_merge_gradient.h"
#include "soft_merge_tiles.h"

namespace effattn::EFFATTN_ISA {
namespace {

constexpr int64_t kTokens = 256;
constexpr int64_t kPanel = 48;  // merged tokens; a multiple of kTileRows and of kLanes
constexpr int64_t kMostPanels = 3;
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
        merge_scratch().reserve<float>(5 * kColumns + kMostPanels * kPanelWords + kPacked + kColumns * pitch_);
    const auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
    staged_ = take(2 * kColumns);
    largest_ = take(kColumns);
    sum_ = take(kColumns);
    block_sum_ = take(kColumns);
    weights_ = reinterpret_cast<Word*>(take(kMostPanels * kPanelWords));
    packed_ = reinterpret_cast<Word*>(take(kPacked));
    output_ = memory;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel_part = item % blocks_.channels.parts, rest = item / blocks_.channels.parts;
      const int64_t merged_part = rest % blocks_.merged.parts;
      batch_ = rest / blocks_.merged.parts;
      first_ = blocks_.merged.begin(merged_part);
      columns_ = blocks_.merged.begin(merged_part + 1) - first_;
      channel_ = blocks_.channels.begin(channel_part);
      channels_ = blocks_.channels.begin(channel_part + 1) - channel_;
      block();
    }
  }

 private:
  void block() {
    const FloatRows logits(block_at(arguments_.logits, batch_, 0, first_), columns_, staged_, kColumns);
    find_largest(logits);
    memset(sum_, 0, kColumns * sizeof(float));
    if (tokens_ == 0) memset(output_, 0, columns_ * pitch_ * sizeof(float));
    for (int64_t token = 0; token < tokens_; token += kTokens) {
      const int64_t count = smaller(kTokens, tokens_ - token);
      weigh(logits, token, count);
      for (int64_t c = 0; c < channels_; c += kTileColumns) add_channels(token, count, c);
    }
    finish();
  }

  void add_channels(int64_t token, int64_t count, int64_t c) {
    const int64_t live = smaller(kTileColumns, channels_ - c), width = round_up(live, kLanes);
    pack_natural<Arithmetic>(packed_, width, block_at(arguments_.tokens, batch_, token, channel_ + c), count, live);
    const int64_t groups = (columns_ + kTileRows - 1) / kTileRows;
    if (c + kTileColumns < channels_)
      ahead_.plan(block_at(arguments_.tokens, batch_, token, channel_ + c + kTileColumns), count,
          smaller(kTileColumns, channels_ - c - kTileColumns), groups);
    else if (token + kTokens < tokens_)
      ahead_.plan(block_at(arguments_.tokens, batch_, token + kTokens, channel_),
          smaller(kTokens, tokens_ - token - kTokens), smaller(kTileColumns, channels_), groups);
    else
      ahead_.nothing();
    for_each_column_tile(width / kLanes, [&](auto vectors, int64_t) __attribute__((always_inline)) {
      for (int64_t first = 0; first < count; first += kSummed) {
        const int64_t step = first / Arithmetic::kPerWord, some = words<Arithmetic>(smaller(kSummed, count - first));
        if (token + first == 0)
          add_rows<vectors.value, false>(step, some, output_ + c);
        else
          add_rows<vectors.value, true>(step, some, output_ + c);
      }
    });
  }

  template <int kVectors, bool kAdd>
  EFFATTN_INLINE void add_rows(int64_t first, int64_t steps, float* output) {
    for_each_row_group(columns_, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      ahead_.step();
      product_tile<Arithmetic, rows.value, kVectors, kAdd>(
          weights_ + r / kPanel * kPanelWords + r % kPanel + first * kPanel, 1, kPanel,
          packed_ + first * kVectors * kLanes, kVectors * kLanes, steps, output + r * pitch_, pitch_);
    });
  }

  // A column of nothing but -inf is shifted by 0: its weights are exp2(-inf) = 0.
  __attribute__((noinline)) void find_largest(const FloatRows& logits) {
    for (int64_t p = 0; p < columns_; p += kLanes) store(largest_ + p, broadcast(-INFINITY));
    for (int64_t n = 0; n < tokens_; ++n) {
      const float* row = logits.row(n);
      for (int64_t p = 0; p < columns_; p += kLanes)
        store(largest_ + p, max(load_columns(row + p, columns_ - p), load(largest_ + p)));
    }
    for (int64_t p = 0; p < columns_; p += kLanes) {
      const Vec largest = load(largest_ + p);
      store(largest_ + p, largest == broadcast(-INFINITY) ? Vec{} : largest);
    }
  }

  EFFATTN_INLINE Vec weight(const float* row, int64_t p) const {
    const Vec logit = load_columns(row + p, columns_ - p);
    return exp2<Arithmetic::kExp2Degree>((logit - load(largest_ + p)) * broadcast(kLog2E));
  }

  __attribute__((noinline)) void weigh(const FloatRows& logits, int64_t token, int64_t count) {
    memset(block_sum_, 0, kColumns * sizeof(float));
    for (int64_t n = 0; n < count; n += Arithmetic::kPerWord) {
      const float* row = logits.row(token + n);
      const float* odd_row = kPairs && n + 1 < count ? logits.row(token + n + 1, 1) : nullptr;
      Word* to = weights_ + n / Arithmetic::kPerWord * kPanel;
      for (int64_t panel = 0; panel < columns_; panel += kPanel, to += kPanelWords)
        for (int64_t p = panel; p < smaller(panel + kPanel, columns_); p += kLanes) {
          const Vec even = weight(row, p);
          const Vec odd = kPairs && odd_row ? weight(odd_row, p) : Vec{};
          store(block_sum_ + p, load(block_sum_ + p) + (kPairs ? even + odd : even));
          if constexpr (kPairs)
            store_pair<Arithmetic>(to + p - panel, even, odd);
          else
            store(to + p - panel, even);
        }
    }
    for (int64_t p = 0; p < columns_; p += kLanes) store(sum_ + p, load(sum_ + p) + load(block_sum_ + p));
  }

  void finish() {
    float* logsumexp = arguments_.logsumexp + batch_ * arguments_.logits.size[3] + first_;
    for (int64_t p = 0; p < columns_; p += kLanes) {
      const Vec sum = load(sum_ + p);
      const Vec logarithm = fma(log2(sum), broadcast(kLn2), load(largest_ + p));
      if (channel_ == 0) store_partial(logsumexp + p, sum == Vec{} ? broadcast(-INFINITY) : logarithm, columns_ - p);
      store(sum_ + p, sum == Vec{} ? Vec{} : broadcast(1.f) / sum);
    }
    for (int64_t p = 0; p < columns_; ++p)
      if (sum_[p] == 0.f) memset(output_ + p * pitch_, 0, pitch_ * sizeof(float));
    store_rows_by(
        block_at(arguments_.output, batch_, first_, channel_), columns_, output_, pitch_,
        [&](int64_t p) __attribute__((always_inline)) { return broadcast(sum_[p]); }, channels_);
  }

  const SoftMergeForward& arguments_;
  const MergeBlocks& blocks_;
  const int64_t tokens_;
  int64_t pitch_, batch_ = 0, first_ = 0, columns_ = 0, channel_ = 0, channels_ = 0;
  TileAhead ahead_;
  float* staged_;
  float* largest_;
  float* sum_;
  float* block_sum_;
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
}

}  // namespace effattn::EFFATTN_ISA
