// Backward of shift_add_attention.cpp, straight through the bits (d b / d x^ = 1 where x^ >= 0, everywhere for +-1):
//
//   R = U / |U|,  dU = (G - R (R . G)) / |U|,  B = b(q)^T dU
//   dV = 0.5 dU + transposed convolution of G + (1 / pi) b(k) B
//   dq^ = (1 / pi) dU A^T,  dk^ = (1 / pi) V B^T;  dx = (dx^ - x^ (x^ . dx^)) / |x|
//   d weight[t] = sum G[n] . V[n + t - taps / 2]
//
//   pass 1   reads q, v, G by strips: U by tables of A, dU over it, the first two terms of dV, d weight, B by tables
//            of dU, dq by the 6-row micro-kernel with A^T packed
//   pass 2   reads k, v: the last term of dV by tables of B, dk by the micro-kernel with B^T packed
//
// A head of one chunk goes through both at once; several chunks add up B between them. The first terms of dV lie in
// grad_value itself where that is rows of float32, otherwise in a float32 scratch.
// Bytes, D = 64: q, k, G, dq, dk once, v twice, dV twice written and once read. FLOPs: 4 D^2 a token in the
// micro-kernel and a quarter of 6 D^2 in tables.
#pragma once

#include "api.h"
#include "shift_add_attention_rows.h"

namespace effattn::EFFATTN_ISA::shift_add_attention {

// to[row] = left[row] * packed for kTileRows rows; packed by pack_transposed, head_dim x head_dim.
inline void multiply_rows(float* to, int64_t to_pitch, const Rows& left, const float* packed, int64_t head_dim) {
  for (int64_t panel = 0; panel < head_dim; panel += kTileColumns) {
    const int64_t width = round_up(smaller(head_dim - panel, kTileColumns), kLanes);
    for_each_column_tile(width / kLanes, [&](auto count, int64_t column) {
      constexpr int kVectors = decltype(count)::value;
      multiply_tile<Float32, kVectors>(left.data, left.pitch, 1, packed + column, width, head_dim,
          [&](Vec(&sum)[kTileRows][kVectors]) __attribute__((always_inline)) {
            EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) {
              EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v)
                  store(to + r * to_pitch + panel + column + v * kLanes, sum[r][v]);
            }
          });
    });
    packed += width * head_dim;
  }
}

// x^ . g / x^ . x^, both summed in one order: where g lies along x the rounding cancels.
EFFATTN_INLINE float projection(Vec dot, Vec square) {
  const float squares = reduce_add(square);
  return squares == 0.f ? 0.f : reduce_add(dot) / squares;
}

struct BackwardScratch {
  Buffer partial, weights;  // of the calling thread, for all
  Buffer query, value, grad, words, norms, tile, product, packed, context, sums, grad_value;
  void trim() {
    for (Buffer* buffer : {&partial, &weights, &query, &value, &grad, &words, &tile, &grad_value}) buffer->trim();
  }
};

inline BackwardScratch& backward_scratch() {
  static thread_local BackwardScratch scratch;
  return scratch;
}

class Backward {
 public:
  explicit Backward(const ShiftAddAttentionBackward& arguments)
      : arguments_(arguments), geometry_(arguments.query), is_signed_(arguments.binarize == Binarize::kSign) {
    BackwardScratch& scratch = backward_scratch();
    const Geometry& g = geometry_;
    weights_ = scratch.weights.reserve<double>(g.items() * larger(arguments.taps, 1));
    if (g.chunks > 1) {
      sums_ = scratch.partial.reserve<float>(g.items() * g.head_dim * g.width);
      if (!writes_in_place(0)) grad_value_ = shared_grad_value_.reserve<float>(g.batch * g.heads * g.tokens * g.width);
    }
  }

  void run(const Runtime& runtime) {
    const Geometry& g = geometry_;
    const int64_t pairs = g.batch * g.heads;
    if (g.chunks == 1) {
      for_items(runtime, pairs, 6 * g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          first_pass(i, i + 1 < end);
          second_pass(i, i + 1 < end);
        }
      });
    } else {
      const int64_t floats = g.head_dim * g.width;
      for_items(runtime, g.items(), 4 * g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) first_pass(i, i + 1 < end);
      });
      for_items(runtime, pairs, static_cast<double>(g.items() * floats), [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) add_parts(sums_ + pair * g.chunks * floats, g.chunks, floats);
      });
      for_items(runtime, g.items(), 2 * g.flops(), [&](int64_t begin, int64_t end) {
        for (int64_t i = end; i-- > begin;) second_pass(i, false);
      });
    }
    for (int64_t head = 0; head < g.heads; ++head)
      for (int64_t t = 0; t < arguments_.taps; ++t) {
        double sum = 0.0;
        for (int64_t b = 0; b < g.batch; ++b)
          for (int64_t chunk = 0; chunk < g.chunks; ++chunk)
            sum += weights_[((b * g.heads + head) * g.chunks + chunk) * arguments_.taps + t];
        arguments_.grad_residual_weight[head * arguments_.taps + t] = static_cast<float>(sum);
      }
    backward_scratch().trim();
  }

 private:
  bool writes_in_place(int64_t pair) const {
    return readable_in_place(
        matrix_at(arguments_.grad_value, pair / geometry_.heads, pair % geometry_.heads), geometry_.head_dim);
  }

  // Where the first terms of dV of an item's first row lie.
  Rows first_terms(const Item& item) const {
    const Geometry& g = geometry_;
    if (writes_in_place(item.pair)) {
      const Matrix grad = matrix_at(arguments_.grad_value, item.batch, item.head);
      return {static_cast<const float*>(grad.data) + grad.offset(item.first), grad.row_stride};
    }
    if (g.chunks > 1) return {grad_value_ + (item.pair * g.tokens + item.first) * g.width, g.width};
    return {backward_scratch().grad_value.reserve<float>(g.tokens * g.width), g.width};
  }

  float* grad_context(int64_t index) const {
    const int64_t floats = geometry_.head_dim * geometry_.width;
    return geometry_.chunks > 1 ? sums_ + index * floats : backward_scratch().sums.reserve<float>(floats);
  }

  Test test(int64_t pair, bool of_key) const {
    return {arguments_.binarize == Binarize::kMeanThreshold, arguments_.statistics[pair * 4 + (of_key ? 3 : 1)]};
  }

  // The strip that begins at `first`, or the first one of the item.
  void look_ahead(Ahead& ahead, const Tensor& tensor, const Item& item, int64_t first = -1) const {
    if (first < 0) first = item.first;
    const int64_t rows = smaller(geometry_.strip_rows, item.last - first);
    ahead.add(matrix_at(tensor, item.batch, item.head), first, rows, geometry_.head_dim);
  }

  // Norms and row words of a strip.
  Norms examine(uint64_t* words, const Rows& x, int64_t rows, const Test& test) const {
    const Geometry& g = geometry_;
    float* scale = backward_scratch().norms.reserve<float>(2 * g.strip_rows);
    const Norms norms = {scale, scale + g.strip_rows};
    for (int64_t n = 0; n < rows; n += kWordBits) {
      const int64_t live = smaller(kWordBits, rows - n);
      const Norms part = {norms.scale + n, norms.inverse + n};
      normalise<true>(part, {x.row(n), x.pitch}, live, g.width);
      row_words(words + n * g.stride, {x.row(n), x.pitch}, live, g.width, part, test);
    }
    return norms;
  }

  // grad = the gradient of x from left * packed = dx^ / factor, `rows` of them.
  void write_gradient(const Matrix& grad, int64_t first, int64_t rows, const Rows& left, const float* packed,
      const Rows& x, const Norms& norms, float factor, Ahead& ahead) const {
    const Geometry& g = geometry_;
    ahead.plan((rows + kTileRows - 1) / kTileRows);
    float* product = backward_scratch().product.reserve<float>(2 * kTileRows * g.width);
    float* copy = product + kTileRows * g.width;
    const int64_t width = round_up(g.head_dim, kLanes);
    for (int64_t n = 0; n < rows; n += kTileRows) {
      ahead.step();
      const int64_t live = smaller(kTileRows, rows - n);
      Rows block = {left.row(n), left.pitch};
      if (live < kTileRows) {
        memset(copy, 0, kTileRows * g.width * sizeof(float));
        for (int64_t r = 0; r < live; ++r) memcpy(copy + r * g.width, block.row(r), g.head_dim * sizeof(float));
        block = {copy, g.width};
      }
      multiply_rows(product, g.width, block, packed, g.head_dim);
      for (int64_t r = 0; r < live; ++r) {
        const float* from = x.row(n + r);
        float* to = product + r * g.width;
        const Vec scale = broadcast(norms.scale[n + r]), inverse = broadcast(norms.inverse[n + r]);
        Vec dot = {}, square = {};
        for (int64_t c = 0; c < width; c += kLanes) {
          const Vec value = load(from + c), unit = value * scale * inverse;
          Vec grad = load(to + c) * broadcast(factor);
          if (!is_signed_) grad = value >= 0.f ? grad : Vec{};
          store(to + c, grad);
          dot = fma(unit, grad, dot);
          square = fma(unit, unit, square);
        }
        const Vec along = broadcast(projection(dot, square));
        for (int64_t c = 0; c < width; c += kLanes)
          store(to + c, (load(to + c) - load(from + c) * scale * inverse * along) * inverse * scale);
        store_row(grad, first + n + r, to, broadcast(1.f), g.head_dim);
      }
    }
  }

  void first_pass(int64_t index, bool has_next) {
    if (arguments_.taps == 9)
      first_pass<9>(index, has_next);
    else
      first_pass<0>(index, has_next);
  }

  template <int kTaps>
  void first_pass(int64_t index, bool has_next) {
    const Geometry& g = geometry_;
    const Item item(g, index);
    BackwardScratch& scratch = backward_scratch();
    const float* statistics = arguments_.statistics + item.pair * 4;
    const Matrix context = context_matrix(arguments_.context, g, item.pair),
                 query = matrix_at(arguments_.query, item.batch, item.head),
                 value = matrix_at(arguments_.value, item.batch, item.head),
                 grad = matrix_at(arguments_.grad_output, item.batch, item.head),
                 grad_query = matrix_at(arguments_.grad_query, item.batch, item.head),
                 grad_value = matrix_at(arguments_.grad_value, item.batch, item.head);
    const int64_t floats = g.head_dim * g.width, reach = reach_of(arguments_.taps, g.tokens);
    const Rows dense = stage(scratch.context.reserve<float>(floats), context, 0, g.head_dim, g.head_dim);
    float* packed = scratch.packed.reserve<float>(transposed_words<Float32>(g.head_dim, g.head_dim));
    pack_transposed<Float32>(packed, context, g.head_dim, g.head_dim);
    float* grad_context = this->grad_context(index);
    memset(grad_context, 0, floats * sizeof(float));
    double* weights = weights_ + index * arguments_.taps;
    for (int64_t t = 0; t < arguments_.taps; ++t) weights[t] = 0.0;
    const Rows terms = first_terms(item);
    float* tile = scratch.tile.reserve<float>((g.strip_rows + kBlockRows) * g.width);
    float* copy = readable_in_place(query, g.head_dim) ? nullptr : scratch.query.reserve<float>(g.strip_rows * g.width);
    uint64_t* words = scratch.words.reserve<uint64_t>(g.strip_rows * g.stride);
    alignas(64) uint64_t columns[kMaxHeadDim];

    for (int64_t first = item.first; first < item.last; first += g.strip_rows) {
      const int64_t rows = smaller(g.strip_rows, item.last - first), last = first + rows;
      const Rows q = stage(copy, query, first, rows, g.head_dim);
      const Norms norms = examine(words, q, rows, test(item.pair, false));
      Ahead ahead;
      ahead.add(value, first, rows, g.head_dim);
      ahead.add(grad, first, rows, g.head_dim);
      ahead.add(grad_value, first, rows, g.head_dim, true);
      select_rows(tile, g.width, words, rows, dense, g.head_dim, g.width, is_signed_, ahead);
      memset(tile + rows * g.width, 0, kBlockRows * g.width * sizeof(float));
      const Strip<kTaps> strip = {stage_halo(scratch.value, value, first, last, reach, g),
          stage_halo(scratch.grad, grad, first, last, reach, g),
          arguments_.residual_weight + item.head * arguments_.taps, arguments_.taps,
          over_pi(statistics[0], statistics[2]), weights};
      strip.differentiate(tile, first, rows, {terms.row(first - item.first), terms.pitch}, g);
      for (int64_t n = 0; n < rows; n += kWordBits) {
        const int64_t live = smaller(kWordBits, rows - n);
        const Norms part = {norms.scale + n, norms.inverse + n};
        column_words(columns, {q.row(n), q.pitch}, live, g.width, part, test(item.pair, false));
        Ahead ahead;
        ahead.add(grad_query, first + n, live, g.head_dim, true);
        ahead.plan(larger(g.head_dim / kTogether, 1) * (g.width / kPanel));
        multiply_bits<true>(grad_context, g.width, columns, 1, g.head_dim, {tile + n * g.width, g.width}, live, g.width,
            is_signed_, ahead);
      }
      Ahead next;
      if (last < item.last)
        look_ahead(next, arguments_.query, item, last);
      else if (g.chunks == 1)
        look_ahead(next, arguments_.key, item, item.first);
      else if (has_next)
        look_ahead(next, arguments_.query, Item(g, index + 1));
      write_gradient(grad_query, first, rows, {tile, g.width}, packed, q, norms, over_pi(1.f, statistics[2]), next);
    }
  }

  template <int kTaps>
  struct Strip {
    Halo value, grad;
    const float* weight;
    int64_t taps;
    float factor;
    double* grad_weight;

    // dU over the selected rows in the tile, the first terms of dV, the gradient of the weights.
    void differentiate(float* tile, int64_t first, int64_t rows, const Rows& terms, const Geometry& g) const {
      Vec weights[kTaps + 1] = {};
      for (int64_t n = 0; n < rows; n += kBlockRows) {
        const int64_t live = smaller(kBlockRows, rows - n);
        float* block = tile + n * g.width;
        for (int64_t r = 0; r < live; ++r) differentiate_row(block + r * g.width, first + n + r, g.width);
        const Convolution<kTaps> convolution(grad, weight, taps, first + n), neighbours(value, weight, taps, first + n);
        const float* gradient[kBlockRows];
        EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) gradient[r] =
            r < live ? grad.at(first + n + r) : grad.zeros;
        float* to = const_cast<float*>(terms.row(n));
        for (int64_t c = 0; c < g.width; c += kLanes) {
          Vec sum[kBlockRows];
          convolution.template at<true>(sum, c);
          EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) if (r < live)
              store(to + r * terms.pitch + c, fma(broadcast(0.5f), load(block + r * g.width + c), sum[r]));
          if constexpr (kTaps > 0) {
            Vec here[kBlockRows];
            EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) here[r] = load(gradient[r] + c);
            EFFATTN_UNROLL for (int s = 0; s < kBlockRows + kTaps - 1; ++s) {
              const Vec there = load(neighbours.row[s] + c);
              EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) if (s - r >= 0 && s - r < kTaps) weights[s - r] =
                  fma(here[r], there, weights[s - r]);
            }
          }
        }
      }
      if constexpr (kTaps > 0) {
        EFFATTN_UNROLL for (int t = 0; t < kTaps; ++t) grad_weight[t] += static_cast<double>(reduce_add(weights[t]));
      } else {
        for (int64_t t = 0; t < taps; ++t) {
          Vec sum = {};
          for (int64_t n = first; n < first + rows; ++n)
            for (int64_t c = 0; c < g.width; c += kLanes)
              sum = fma(load(grad.at(n) + c), load(value.at(n + t - taps / 2) + c), sum);
          grad_weight[t] += static_cast<double>(reduce_add(sum));
        }
      }
    }

    EFFATTN_INLINE void differentiate_row(float* u, int64_t n, int64_t width) const {
      float scale;
      const float inverse = combine_row(u, value.at(n), factor, width, &scale);
      const float* upstream = grad.at(n);
      Vec dot = {}, square = {};
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vec unit = load(u + c) * broadcast(inverse);
        dot = fma(unit, load(upstream + c), dot);
        square = fma(unit, unit, square);
      }
      const Vec along = broadcast(projection(dot, square));
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vec unit = load(u + c) * broadcast(inverse);
        store(u + c, (load(upstream + c) - unit * along) * broadcast(inverse) * broadcast(scale));
      }
    }
  };

  void second_pass(int64_t index, bool has_next) {
    const Geometry& g = geometry_;
    const Item item(g, index);
    BackwardScratch& scratch = backward_scratch();
    const float* statistics = arguments_.statistics + item.pair * 4;
    const Matrix key = matrix_at(arguments_.key, item.batch, item.head),
                 value = matrix_at(arguments_.value, item.batch, item.head),
                 grad_key = matrix_at(arguments_.grad_key, item.batch, item.head),
                 grad_value = matrix_at(arguments_.grad_value, item.batch, item.head);
    const float* sum = grad_context(item.pair * g.chunks);
    float* packed = scratch.packed.reserve<float>(transposed_words<Float32>(g.head_dim, g.head_dim));
    pack_transposed<Float32>(packed, {sum, g.width, 1, DType::kFloat32}, g.head_dim, g.head_dim);
    const Rows terms = first_terms(item);
    const float through_query = over_pi(statistics[0], 1.f), factor = over_pi(statistics[0], statistics[2]);
    float* tile = scratch.tile.reserve<float>((g.strip_rows + kBlockRows) * g.width);
    float* key_copy =
        readable_in_place(key, g.head_dim) ? nullptr : scratch.query.reserve<float>(g.strip_rows * g.width);
    float* value_copy =
        readable_in_place(value, g.head_dim) ? nullptr : scratch.value.reserve<float>(g.strip_rows * g.width);
    uint64_t* words = scratch.words.reserve<uint64_t>(g.strip_rows * g.stride);
    for (int64_t first = item.first; first < item.last; first += g.strip_rows) {
      const int64_t rows = smaller(g.strip_rows, item.last - first);
      const Rows k = stage(key_copy, key, first, rows, g.head_dim);
      const Norms norms = examine(words, k, rows, test(item.pair, true));
      Ahead ahead;
      ahead.add(value, first, rows, g.head_dim);
      ahead.add(grad_value, first, rows, g.head_dim, true);
      ahead.add(grad_key, first, rows, g.head_dim, true);
      select_rows(tile, g.width, words, rows, {sum, g.width}, g.head_dim, g.width, is_signed_, ahead);
      for (int64_t n = 0; n < rows; ++n) {
        float* row = tile + n * g.width;
        const float* begun = terms.row(first - item.first + n);
        for (int64_t c = 0; c < g.width; c += kLanes)
          store(row + c, fma(broadcast(factor), load(row + c), load(begun + c)));
        store_row(grad_value, first + n, row, broadcast(1.f), g.head_dim);
      }
      Ahead next;
      if (first + rows < item.last)
        look_ahead(next, arguments_.key, item, first + rows);
      else if (has_next)
        look_ahead(next, arguments_.query, Item(g, index + 1));
      write_gradient(grad_key, first, rows, stage(value_copy, value, first, rows, g.head_dim), packed, k, norms,
          through_query, next);
    }
  }

  const ShiftAddAttentionBackward& arguments_;
  const Geometry geometry_;
  const bool is_signed_;
  double* weights_;
  float* sums_ = nullptr;
  float* grad_value_ = nullptr;
  Buffer shared_grad_value_;
};

}  // namespace effattn::EFFATTN_ISA::shift_add_attention
