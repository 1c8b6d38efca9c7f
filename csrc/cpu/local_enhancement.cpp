// Local context enhancement (RMT): a depthwise T x T convolution of value over the token grid, zero padded, beside
// attention. t runs over the taps, T odd, |t| <= T/2 in both directions; p over the tokens of the grid; outside the
// grid V and dO are 0.
//
//   O[p] = attention[p] + bias + sum_t w[t] V[p + t],   O = attention at prefix tokens
//   dV[p] = sum_t w[t] dO[p - t],   dw[t] = sum_p dO[p] V[p + t],   dbias = sum_p dO[p],   dV = 0 at prefix tokens
//
// Channels are independent. A unit of work is a strip of grid rows of an image and up to kColumns channels of a head;
// where the heads of a token lie side by side in every tensor they count as one. The last T rows of the grid are kept
// as floats, zero padded on both sides, [vector of channels][token]:
//   convolution   8 tokens x 1 vector of channels in registers over all taps: per tap one load and 8 multiply-adds
//                 whose other operand comes from L1
//
//   dw            per row of taps up to 8 sums in registers along a grid row; fp32 within a unit
//
// A task of the backward pass is some units of the same channels. Tasks are cut by the problem, not by the threads, sum
// into numbers of their own and are added up in order, in float64. FLOPs 2 T^2 N D per head forward, twice that
// backward; bytes 3 N D elements either way, T - 1 rows of every strip twice.
#include "backward_tiles.h"

namespace effattn::EFFATTN_ISA {
namespace {

constexpr int64_t kColumns = 64;
constexpr int64_t kTokens = 8;
constexpr int kTapSums = 8;
constexpr int64_t kFewestUnits = 64;  // of a problem large enough
constexpr int64_t kFewestRows = 8;    // of a strip

struct Work {
  const LocalEnhancement& shape;
  int64_t batches, groups, channels;  // channels of a group: a head, or all heads

  Work(const LocalEnhancement& shape, const Tensor* const (&tensors)[3]) : shape(shape), batches(tensors[0]->size[0]) {
    const int64_t heads = tensors[0]->size[1], head_dim = tensors[0]->size[3];
    bool merged = true;
    for (const Tensor* tensor : tensors) merged = merged && tensor->stride[3] == 1 && tensor->stride[1] == head_dim;
    groups = merged ? smaller(heads, 1) : heads;
    channels = merged ? heads * head_dim : head_dim;
  }
  int64_t taps() const { return shape.size * shape.size; }
  int64_t blocks() const { return groups * ((channels + kColumns - 1) / kColumns); }
  int64_t first_channel(int64_t block) const { return block % (blocks() / groups) * kColumns; }
  int64_t group(int64_t block) const { return block / (blocks() / groups); }
  int64_t columns(int64_t block) const { return smaller(kColumns, channels - first_channel(block)); }
  int64_t parameter(int64_t block) const { return group(block) * channels + first_channel(block); }
  int64_t strips() const {
    const int64_t others = larger(batches * blocks(), 1);
    return larger(smaller((kFewestUnits + others - 1) / others, shape.grid_h / kFewestRows), 1);
  }
  int64_t first_row(int64_t strip) const { return strip * shape.grid_h / strips(); }
  double flops() const { return 2.0 * batches * groups * channels * shape.grid_h * shape.grid_w * taps(); }

  // The block's channels of an image from a token on, without those of the first vectors.
  Matrix matrix(const Tensor& tensor, int64_t batch, int64_t block, int64_t token, int64_t vector) const {
    Matrix matrix = matrix_at(tensor, batch, group(block));
    matrix.data = static_cast<const char*>(matrix.data) +
                  (first_channel(block) + vector * kLanes) * matrix.column_stride * element_size(matrix.dtype);
    matrix.first = token;
    matrix.wrap = INT64_MAX;
    return matrix;
  }
};

// What a thread works with, and the loops over one block of channels.
class Convolver {
 public:
  explicit Convolver(const Work& work)
      : work_(work),
        shape_(work.shape),
        half_(work.shape.size / 2),
        width_(round_up(larger(work.shape.grid_w, 1), kTokens)),
        line_((width_ + 2 * half_) * kLanes),
        vectors_((smaller(kColumns, work.channels) + kLanes - 1) / kLanes),
        sums_pitch_((work.taps() + 1) * kLanes) {
    static thread_local Buffer buffer;
    const int64_t ring = shape_.size * vectors_ * line_;
    values_ = buffer.reserve<float>(2 * ring + vectors_ * (width_ * kLanes + 2 * sums_pitch_));
    gradients_ = values_ + ring;
    row_ = gradients_ + ring;
    taps_ = row_ + vectors_ * width_ * kLanes;
    sums_ = taps_ + vectors_ * sums_pitch_;
  }

  // The taps of a block, [vector][tap][channel], and its bias behind them; mirrored for the backward pass.
  void enter(int64_t block, bool mirrored) {
    block_ = block;
    columns_ = work_.columns(block);
    const int64_t taps = work_.taps(), first = work_.parameter(block);
    memset(taps_, 0, vectors_ * sums_pitch_ * sizeof(float));
    for (int64_t c = 0; c < columns_; ++c) {
      float* to = taps_ + c / kLanes * sums_pitch_ + c % kLanes;
      const float* from = shape_.weight + (first + c) * taps;
      for (int64_t t = 0; t < taps; ++t) to[t * kLanes] = from[mirrored ? taps - 1 - t : t];
      if (shape_.bias && !mirrored) to[taps * kLanes] = shape_.bias[first + c];
    }
  }

  void forward(const LocalEnhancementForward& arguments, int64_t batch, int64_t strip) {
    if (strip == 0)
      each_prefix([&](int64_t token, int64_t count) {
        read_row(arguments.attention, batch, token, count);
        store_row(arguments.output, batch, token, count);
      });
    const int64_t begin = work_.first_row(strip), end = work_.first_row(strip + 1);
    memset(values_, 0, shape_.size * vectors_ * line_ * sizeof(float));
    for (int64_t y = larger(begin - half_, 0); y < begin + half_; ++y) read_line(values_, arguments.value, batch, y);
    for (int64_t y = begin; y < end; ++y) {
      const int64_t token = shape_.num_prefix_tokens + y * shape_.grid_w;
      read_line(values_, arguments.value, batch, y + half_);
      read_row(arguments.attention, batch, token, shape_.grid_w);
      convolve<true>(values_, y);
      store_row(arguments.output, batch, token, shape_.grid_w);
    }
  }

  void backward(const LocalEnhancementBackward& arguments, int64_t batch, int64_t strip, double* sums) {
    if (strip == 0) {
      memset(row_, 0, vectors_ * width_ * kLanes * sizeof(float));
      each_prefix([&](int64_t token, int64_t count) { store_row(arguments.grad_value, batch, token, count); });
    }
    const int64_t begin = work_.first_row(strip), end = work_.first_row(strip + 1);
    memset(values_, 0, 2 * shape_.size * vectors_ * line_ * sizeof(float));
    memset(sums_, 0, vectors_ * sums_pitch_ * sizeof(float));
    const auto read = [&](int64_t y) {
      read_line(values_, arguments.value, batch, y);
      read_line(gradients_, arguments.grad_output, batch, y);
    };
    for (int64_t y = larger(begin - half_, 0); y < begin + half_; ++y) read(y);
    for (int64_t y = begin; y < end; ++y) {
      read(y + half_);
      convolve<false>(gradients_, y);
      store_row(arguments.grad_value, batch, shape_.num_prefix_tokens + y * shape_.grid_w, shape_.grid_w);
      for (int64_t v = 0; v * kLanes < columns_; ++v) {
        add_tap_sums(v, y);
        add_bias_sums(v, y, sums + v * sums_pitch_ + work_.taps() * kLanes);
      }
    }
    for (int64_t i = 0; i < vectors_ * sums_pitch_; ++i) sums[i] += sums_[i];
  }

  int64_t sums() const { return vectors_ * sums_pitch_; }

 private:
  template <class Body>
  void each_prefix(Body&& body) const {
    for (int64_t token = 0; token < shape_.num_prefix_tokens; token += width_)
      body(token, smaller(width_, shape_.num_prefix_tokens - token));
  }

  // Where token 0 of a grid row, or that of the padding before it, lies.
  float* line(float* ring, int64_t y, int64_t v) const { return ring + (y % shape_.size * vectors_ + v) * line_; }

  void read_line(float* ring, const Tensor& tensor, int64_t batch, int64_t y) const {
    if (y >= shape_.grid_h) return;
    const int64_t token = shape_.num_prefix_tokens + y * shape_.grid_w;
    for (int64_t v = 0; v * kLanes < columns_; ++v)
      rows_to_float(line(ring, y, v) + half_ * kLanes, kLanes, work_.matrix(tensor, batch, block_, token, v),
          shape_.grid_w, smaller(kLanes, columns_ - v * kLanes));
  }

  void read_row(const Tensor& tensor, int64_t batch, int64_t token, int64_t count) const {
    for (int64_t v = 0; v * kLanes < columns_; ++v)
      rows_to_float(row_ + v * width_ * kLanes, kLanes, work_.matrix(tensor, batch, block_, token, v), count,
          smaller(kLanes, columns_ - v * kLanes));
  }

  void store_row(const Tensor& tensor, int64_t batch, int64_t token, int64_t count) const {
    for (int64_t v = 0; v * kLanes < columns_; ++v)
      store_rows(work_.matrix(tensor, batch, block_, token, v), count, row_ + v * width_ * kLanes, kLanes,
          broadcast(1.f), smaller(kLanes, columns_ - v * kLanes));
  }

  // row = bias + convolution of a ring around y [+ row].
  template <bool kAdd>
  void convolve(float* ring, int64_t y) const {
    for (int64_t v = 0; v * kLanes < columns_; ++v) convolve_vector<kAdd>(ring, y, v);
  }

  template <bool kAdd>
  __attribute__((noinline)) void convolve_vector(float* ring, int64_t y, int64_t v) const {
    const int64_t size = shape_.size;
    const float* taps = taps_ + v * sums_pitch_;
    const Vec bias = load(taps + work_.taps() * kLanes);
    const int64_t first = larger(half_ - y, 0), last = smaller(size, shape_.grid_h - y + half_);
    float* to = row_ + v * width_ * kLanes;
    for (int64_t x = 0; x < shape_.grid_w; x += kTokens, to += kTokens * kLanes) {
      Vec sum[kTokens];
      EFFATTN_UNROLL for (int i = 0; i < kTokens; ++i) sum[i] = kAdd ? load(to + i * kLanes) + bias : bias;
      for (int64_t row = first; row < last; ++row) {
        const float* from = line(ring, y + row - half_, v) + x * kLanes;
        const float* tap = taps + row * size * kLanes;
        for (int64_t column = 0; column < size; ++column, from += kLanes, tap += kLanes) {
          const Vec weight = load(tap);
          EFFATTN_UNROLL for (int i = 0; i < kTokens; ++i) sum[i] = fma(load(from + i * kLanes), weight, sum[i]);
        }
      }
      EFFATTN_UNROLL for (int i = 0; i < kTokens; ++i) store(to + i * kLanes, sum[i]);
    }
  }

  // The share of grid row y of dO.
  void add_tap_sums(int64_t v, int64_t y) const {
    const int64_t size = shape_.size;
    const float* gradients = line(gradients_, y, v) + half_ * kLanes;
    float* sums = sums_ + v * sums_pitch_;
    for (int64_t row = larger(half_ - y, 0); row < smaller(size, shape_.grid_h - y + half_); ++row) {
      const float* values = line(values_, y + row - half_, v);
      for (int64_t column = 0; column < size; column += kTapSums)
        some_taps<kTapSums>(smaller(kTapSums, size - column), gradients, values + column * kLanes,
            sums + (row * size + column) * kLanes);
    }
  }

  // Equal gradients (of a mean) make a long fp32 sum drift.
  void add_bias_sums(int64_t v, int64_t y, double* sums) const {
    const float* gradients = line(gradients_, y, v) + half_ * kLanes;
    alignas(64) float part[kLanes];
    for (int64_t x = 0; x < shape_.grid_w; x += kTokens) {  // the padding is 0
      Vec total = {};
      EFFATTN_UNROLL for (int i = 0; i < kTokens; ++i) total += load(gradients + (x + i) * kLanes);
      store(part, total);
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += part[lane];
    }
  }

  template <int kCount>
  EFFATTN_INLINE void some_taps(int64_t count, const float* gradients, const float* values, float* to) const {
    if (count == kCount)
      tap_sums<kCount>(gradients, values, to);
    else if constexpr (kCount > 1)
      some_taps<kCount - 1>(count, gradients, values, to);
  }

  template <int kCount>
  __attribute__((noinline)) void tap_sums(const float* gradients, const float* values, float* to) const {
    Vec sum[kCount] = {};
    const float* end = gradients + shape_.grid_w * kLanes;
    for (; gradients < end; gradients += kLanes, values += kLanes) {
      const Vec gradient = load(gradients);
      EFFATTN_UNROLL for (int t = 0; t < kCount; ++t) sum[t] = fma(load(values + t * kLanes), gradient, sum[t]);
    }
    EFFATTN_UNROLL for (int t = 0; t < kCount; ++t) store(to + t * kLanes, load(to + t * kLanes) + sum[t]);
  }

  const Work& work_;
  const LocalEnhancement& shape_;
  const int64_t half_, width_, line_, vectors_, sums_pitch_;
  int64_t block_ = 0, columns_ = 0;
  float* values_;     // ring of T grid rows: [row % T][vector][padding, tokens, padding]
  float* gradients_;  // the same of dO
  float* row_;        // [vector][token], attention, then what is stored
  float* taps_;       // [vector][tap, then the bias]
  float* sums_;       // the same of their gradients, but for the bias
};

}  // namespace

void local_enhancement_forward(const LocalEnhancementForward& arguments, const Runtime& runtime) {
  struct Context {
    const LocalEnhancementForward& arguments;
    const Work work;
  } context = {arguments, {arguments.shape, {&arguments.attention, &arguments.value, &arguments.output}}};
  const Work& work = context.work;
  run_items(
      runtime, work.blocks() * work.batches * work.strips(), work.flops(),
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& shared = *static_cast<const Context*>(opaque);
        const int64_t strips = shared.work.strips(), units = shared.work.batches * strips;
        Convolver convolver(shared.work);
        for (int64_t item = begin; item < end; ++item) {
          if (item == begin || item % units == 0) convolver.enter(item / units, false);
          convolver.forward(shared.arguments, item % units / strips, item % strips);
        }
      },
      &context);
}

void local_enhancement_backward(const LocalEnhancementBackward& arguments, const Runtime& runtime) {
  struct Context {
    const LocalEnhancementBackward& arguments;
    const Work work;
    int64_t chunks, sums;
    double* partial;  // [block][chunk][vector][tap, then the bias][channel]
  } context = {
      arguments, {arguments.shape, {&arguments.grad_output, &arguments.value, &arguments.grad_value}}, 0, 0, nullptr};
  const Work& work = context.work;
  const int64_t blocks = work.blocks(), units = work.batches * work.strips();
  context.chunks = smaller(units, (kFewestUnits + blocks - 1) / larger(blocks, 1));
  context.sums = Convolver(work).sums();
  Buffer buffer;
  context.partial = buffer.reserve<double>(blocks * context.chunks * context.sums + 1);
  run_items(
      runtime, blocks * context.chunks, 2 * work.flops(),
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& shared = *static_cast<const Context*>(opaque);
        const int64_t strips = shared.work.strips(), units = shared.work.batches * strips;
        Convolver convolver(shared.work);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t chunk = task % shared.chunks;
          double* sums = shared.partial + task * shared.sums;
          for (int64_t i = 0; i < shared.sums; ++i) sums[i] = 0.0;
          if (task == begin || chunk == 0) convolver.enter(task / shared.chunks, true);
          for (int64_t unit = chunk * units / shared.chunks; unit < (chunk + 1) * units / shared.chunks; ++unit)
            convolver.backward(shared.arguments, unit / strips, unit % strips, sums);
        }
      },
      &context);
  run_items(
      runtime, blocks, 1.0 * blocks * context.chunks * context.sums,
      [](int64_t begin, int64_t end, void* opaque) {
        const Context& shared = *static_cast<const Context*>(opaque);
        const int64_t taps = shared.work.taps();
        for (int64_t block = begin; block < end; ++block)
          for (int64_t c = 0; c < shared.work.columns(block); ++c)
            for (int64_t t = 0; t <= taps; ++t) {
              const double* from = shared.partial + block * shared.chunks * shared.sums +
                                   (c / kLanes * (taps + 1) + t) * kLanes + c % kLanes;
              double total = 0.0;
              for (int64_t chunk = 0; chunk < shared.chunks; ++chunk) total += from[chunk * shared.sums];
              const int64_t channel = shared.work.parameter(block) + c;
              if (t < taps)
                shared.arguments.grad_weight[channel * taps + t] = static_cast<float>(total);
              else if (shared.arguments.grad_bias)
                shared.arguments.grad_bias[channel] = static_cast<float>(total);
            }
      },
      &context);
}

}  // namespace effattn::EFFATTN_ISA
