// Linear angular attention with binary queries and keys (ShiftAddViT, arXiv 2306.06446):
//
//   x^ = x / |x|,  b(x) = scale * 1[x^ > threshold] or +-1,  A = b(k)^T V,  U = 0.5 V + (1 / pi) b(q) A
//   output = U / |U| + convolution over tokens of V
//
//   pass 0   only where the threshold is a mean: norms of q and k, sum of x^
//   pass 1   by blocks of 64 tokens: norms, sum of |x^|, bits of q (kept, 1 bit an element), bits of k as columns, and
//            A += bits^T V through tables of V: 4 rows of 64 tokens x 16 columns, 16 KB
//   pass 2   by strips of up to 448 tokens: b(q) A through tables of A (64 rows x 16 columns, 16 KB), then U, its
//            norm and the convolution by 4 rows. Walks backwards: what pass 1 read last is still in cache
//
// Scales are constants of a tensor or head and are applied in pass 2. Without a scale to wait for ("per_head" in one
// chunk, "sign", "mean_threshold") a head goes through pass 2 right after pass 1, out of L2.
//
// Bytes, D = 64: q, k, output once, v twice, 8 B a token of bits. FLOPs: of the 4 D^2 a token of the two products a
// quarter is left as additions of 4-row sums, plus 3 D^2 / 16 to build the tables of V.
// Lives: shift_add_attention_rows.h rows, bits, tables; shift_add_attention_gradient.h the backward pass.
#include "shift_add_attention_gradient.h"

namespace effattn::EFFATTN_ISA {
namespace shift_add_attention {
namespace {

struct ForwardScratch {
  Buffer words, sums, partial, statistics;               // of the calling thread, for all
  Buffer query, key, value, accumulator, context, tile;  // of every thread
  void trim() {
    for (Buffer* buffer : {&words, &sums, &partial, &query, &key, &value, &accumulator, &context, &tile})
      buffer->trim();
  }
};

ForwardScratch& forward_scratch() {
  static thread_local ForwardScratch scratch;
  return scratch;
}

class Forward {
 public:
  explicit Forward(const ShiftAddAttentionForward& arguments)
      : arguments_(arguments), geometry_(arguments.query), is_signed_(arguments.binarize == Binarize::kSign) {
    ForwardScratch& scratch = forward_scratch();
    const Geometry& g = geometry_;
    words_ = scratch.words.reserve<uint64_t>(g.batch * g.heads * g.tokens * g.stride);
    sums_ = scratch.sums.reserve<Sums>(g.items());
    if (g.chunks > 1) partial_ = scratch.partial.reserve<float>(g.items() * g.head_dim * g.width);
  }

  void run(const Runtime& runtime) {
    const Geometry& g = geometry_;
    const Binarize binarize = arguments_.binarize;
    const int64_t pairs = g.batch * g.heads;
    if (binarize == Binarize::kMeanThreshold) {
      for_items(runtime, g.items(), g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums_[i] = measure(Item(g, i));
      });
      const Sums mean = mean_of(0, g.items());
      query_test_ = {true, static_cast<float>(mean.query)};
      key_test_ = {true, static_cast<float>(mean.key)};
    }
    if (g.chunks == 1 && binarize != Binarize::kPublished) {
      for_items(runtime, pairs, g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          collect(i, end);
          note_statistics(i, mean_of(i, i + 1));
          produce(i);
        }
      });
    } else {
      for_items(runtime, g.items(), g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) collect(i, end);
      });
      const Sums mean = mean_of(0, g.items());
      for (int64_t pair = 0; pair < pairs; ++pair)
        note_statistics(pair, binarize == Binarize::kPerHead ? mean_of(pair * g.chunks, (pair + 1) * g.chunks) : mean);
      if (g.chunks > 1)
        for_items(
            runtime, pairs, static_cast<double>(g.items() * g.head_dim * g.width), [&](int64_t begin, int64_t end) {
              for (int64_t pair = begin; pair < end; ++pair) add_up(pair);
            });
      for_items(runtime, g.items(), g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = end; i-- > begin;) produce(i);
      });
    }
    forward_scratch().trim();
  }

 private:
  struct Sums {
    double query, key;
  };

  // In the order of the items; over as many elements as they have.
  Sums mean_of(int64_t begin, int64_t end) const {
    Sums total = {0.0, 0.0};
    int64_t rows = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Item item(geometry_, i);
      total.query += sums_[i].query;
      total.key += sums_[i].key;
      rows += item.last - item.first;
    }
    const double elements = static_cast<double>(larger(rows * geometry_.head_dim, 1));
    return {total.query / elements, total.key / elements};
  }

  void note_statistics(int64_t pair, const Sums& mean) {
    float* to = arguments_.statistics + pair * 4;
    const bool scaled = arguments_.binarize == Binarize::kPublished || arguments_.binarize == Binarize::kPerHead;
    to[0] = scaled ? static_cast<float>(mean.query) : 1.f;
    to[1] = query_test_.threshold;
    to[2] = scaled ? static_cast<float>(mean.key) : 1.f;
    to[3] = key_test_.threshold;
  }

  Sums measure(const Item& item) const {
    const Geometry& g = geometry_;
    ForwardScratch& scratch = forward_scratch();
    float* copy = scratch.query.reserve<float>(kWordBits * g.width);
    const Matrix query = matrix_at(arguments_.query, item.batch, item.head),
                 key = matrix_at(arguments_.key, item.batch, item.head);
    float scale[kWordBits], inverse[kWordBits];
    Sums sums = {0.0, 0.0};
    for (int64_t n = item.first; n < item.last; n += kWordBits) {
      const int64_t live = smaller(kWordBits, item.last - n);
      sums.query += normalise<false>({scale, inverse}, stage(copy, query, n, live, g.head_dim), live, g.width);
      sums.key += normalise<false>({scale, inverse}, stage(copy, key, n, live, g.head_dim), live, g.width);
    }
    return sums;
  }

  // Blocks of equal size: a small last one could not hide the fetching of the next.
  int64_t block_rows(const Item& item) const {
    const int64_t rows = item.last - item.first, blocks = (rows + kWordBits - 1) / kWordBits;
    return blocks ? round_up((rows + blocks - 1) / blocks, 4) : kWordBits;
  }

  // The block at `first`, or the first one of the item.
  void look_ahead(Ahead& ahead, const Item& item, int64_t first) const {
    if (first < 0) first = item.first;
    const int64_t rows = smaller(block_rows(item), item.last - first);
    for (const Tensor* tensor : {&arguments_.query, &arguments_.key, &arguments_.value})
      ahead.add(matrix_at(*tensor, item.batch, item.head), first, rows, geometry_.head_dim);
  }

  // Pass 1 over an item; `end`: where the items of this thread end.
  void collect(int64_t index, int64_t end) {
    const Geometry& g = geometry_;
    const Item item(g, index);
    ForwardScratch& scratch = forward_scratch();
    float* query_copy = scratch.query.reserve<float>(kWordBits * g.width);
    float* key_copy = scratch.key.reserve<float>(kWordBits * g.width);
    float* value_copy = scratch.value.reserve<float>(kWordBits * g.width);
    const int64_t floats = g.head_dim * g.width;
    float* sum = g.chunks > 1 ? partial_ + index * floats : scratch.accumulator.reserve<float>(floats);
    memset(sum, 0, floats * sizeof(float));
    const Matrix query = matrix_at(arguments_.query, item.batch, item.head),
                 key = matrix_at(arguments_.key, item.batch, item.head),
                 value = matrix_at(arguments_.value, item.batch, item.head);
    alignas(64) float scale[kWordBits], inverse[kWordBits];
    alignas(64) uint64_t columns[kMaxHeadDim];
    const Norms norms = {scale, inverse};
    Sums sums = {0.0, 0.0};
    const int64_t block = block_rows(item);
    for (int64_t n = item.first; n < item.last; n += block) {
      const int64_t live = smaller(block, item.last - n);
      const Rows q = stage(query_copy, query, n, live, g.head_dim);
      if (!is_signed_) sums.query += normalise<true>(norms, q, live, g.width);
      row_words(words_ + (item.pair * g.tokens + n) * g.stride, q, live, g.width, norms, query_test_);
      const Rows k = stage(key_copy, key, n, live, g.head_dim);
      if (!is_signed_) sums.key += normalise<true>(norms, k, live, g.width);
      column_words(columns, k, live, g.width, norms, key_test_);
      const Rows v = stage(value_copy, value, n, live, g.head_dim);
      Ahead ahead;
      if (n + block < item.last)
        look_ahead(ahead, item, n + block);
      else if (index + 1 < end)
        look_ahead(ahead, Item(g, index + 1), -1);
      ahead.plan(larger(g.head_dim / kTogether, 1) * (g.width / kPanel));
      multiply_bits<true>(sum, g.width, columns, 1, g.head_dim, v, live, g.width, is_signed_, ahead);
    }
    sums_[index] = sums;
    if (g.chunks == 1) write_context(item.pair, sum);
  }

  void write_context(int64_t pair, const float* sum) {
    float* to = arguments_.context + pair * geometry_.head_dim * geometry_.head_dim;
    for (int64_t d = 0; d < geometry_.head_dim; ++d)
      memcpy(to + d * geometry_.head_dim, sum + d * geometry_.width, geometry_.head_dim * sizeof(float));
  }

  void add_up(int64_t pair) {
    const int64_t floats = geometry_.head_dim * geometry_.width;
    add_parts(partial_ + pair * geometry_.chunks * floats, geometry_.chunks, floats);
    write_context(pair, partial_ + pair * geometry_.chunks * floats);
  }

  void produce(int64_t index) {
    if (arguments_.taps == 9)
      produce<9>(index);
    else
      produce<0>(index);
  }

  template <int kTaps>
  void produce(int64_t index) {
    const Geometry& g = geometry_;
    const Item item(g, index);
    ForwardScratch& scratch = forward_scratch();
    const Rows context = stage(scratch.context.reserve<float>(g.head_dim * g.width),
        context_matrix(arguments_.context, g, item.pair), 0, g.head_dim, g.head_dim);
    const float* statistics = arguments_.statistics + item.pair * 4;
    const float factor = over_pi(statistics[0], statistics[2]);
    const float* weight = arguments_.residual_weight + item.head * arguments_.taps;
    const Matrix value = matrix_at(arguments_.value, item.batch, item.head),
                 output = matrix_at(arguments_.output, item.batch, item.head);
    float* tile = scratch.tile.reserve<float>((g.strip_rows + kBlockRows) * g.width);
    for (int64_t first = item.first; first < item.last; first += g.strip_rows) {
      const int64_t last = smaller(first + g.strip_rows, item.last);
      Ahead ahead;
      ahead.add(value, first, last - first, g.head_dim);
      ahead.add(output, first, last - first, g.head_dim, true);
      select_rows(tile, g.width, words_ + (item.pair * g.tokens + first) * g.stride, last - first, context, g.head_dim,
          g.width, is_signed_, ahead);
      memset(tile + (last - first) * g.width, 0, kBlockRows * g.width * sizeof(float));
      const Halo halo = stage_halo(scratch.value, value, first, last, reach_of(arguments_.taps, g.tokens), g);
      for (int64_t n = first; n < last; n += kBlockRows) {
        const int64_t live = smaller(kBlockRows, last - n);
        float* block = tile + (n - first) * g.width;
        float inverse[kBlockRows] = {}, scale;
        for (int64_t r = 0; r < live; ++r)
          inverse[r] = combine_row(block + r * g.width, halo.at(n + r), factor, g.width, &scale);
        const Convolution<kTaps> convolution(halo, weight, arguments_.taps, n);
        for (int64_t c = 0; c < g.width; c += kLanes) {
          Vec sum[kBlockRows];
          convolution.template at<false>(sum, c);
          EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) {
            float* to = block + r * g.width + c;
            store(to, fma(load(to), broadcast(inverse[r]), sum[r]));
          }
        }
        for (int64_t r = 0; r < live; ++r) store_row(output, n + r, block + r * g.width, broadcast(1.f), g.head_dim);
      }
    }
  }

  const ShiftAddAttentionForward& arguments_;
  const Geometry geometry_;
  const bool is_signed_;
  Test query_test_ = {false, 0.f}, key_test_ = {false, 0.f};
  uint64_t* words_;
  Sums* sums_;
  float* partial_ = nullptr;
};

}  // namespace
}  // namespace shift_add_attention

void shift_add_attention_forward(const ShiftAddAttentionForward& arguments, const Runtime& runtime) {
  if (arguments.query.size[0] == 0 || arguments.query.size[1] == 0) return;
  shift_add_attention::Forward(arguments).run(runtime);
}

void shift_add_attention_backward(const ShiftAddAttentionBackward& arguments, const Runtime& runtime) {
  if (arguments.query.size[0] == 0 || arguments.query.size[1] == 0) {
    for (int64_t i = 0; i < arguments.query.size[1] * arguments.taps; ++i) arguments.grad_residual_weight[i] = 0.f;
    return;
  }
  shift_add_attention::Backward(arguments).run(runtime);
}

}  // namespace effattn::EFFATTN_ISA
