// Gradients of what windows add to attention: the relative position bias or weights, and LePE, the depthwise 3 x 3
// convolution of value inside a window.
//
//   dbias[r] = sum dLogit,  dweights[r] = sum P * (dO V^T)
//              over batch, windows and the pairs with key - query = r, keys of zeros included
//
//   dV[p] += sum_t w[t] dO[p - t],   dw[t] = sum_p dO[p] V[p + t],   db = sum_p dO[p],   p, p + t in one window
//
// A task (head, chunk of its windows) sums into numbers of its own, which are added up in order afterwards, in float64:
//   tables    window_table.h
//
//   LePE      one pass per window over its rows in fp32, 16 columns at a time; every neighbour of dO is loaded once for
//             the taps of both sums. Windows of one column or row have three taps.
#pragma once

#include "backward.h"
#include "key_band.h"
#include "window_table.h"

namespace effattn::EFFATTN_ISA {

struct WindowSinkArguments {
  const AttentionBackward& attention;
  const Windows& windows;
  WindowChunks chunks;
  int64_t bias_entries;
  double* bias;     // [head][chunk][entry], null without a bias
  double* weights;  // the same, of the weights
  double* lepe;     // [head][chunk][9 taps, then the bias][pitch], null without LePE
};

inline constexpr int64_t kTaps = 9;

template <class Policy>
class WindowSink {
 public:
  static constexpr bool kActive = true;

  WindowSink(const Policy& policy, const WindowSinkArguments& arguments)
      : policy_(policy),
        arguments_(arguments),
        head_dim_(arguments.attention.query.size[3]),
        pitch_(round_up(head_dim_, kLanes)),
        places_(policy.largest().queries),
        band_(policy.window_rows().tiling(0), arguments.chunks.by_image ? pitch_ : 0),
        bias_(policy.window_rows(), arguments.bias_entries, arguments.bias, buffers().bias),
        weights_(policy.window_rows(), arguments.bias_entries, arguments.weights, buffers().weights) {
    static thread_local Buffer lepe, neighbours;
    if (arguments.lepe) {
      zeros_ = lepe.reserve<float>((1 + 2 * places_ + kTaps) * pitch_);
      memset(zeros_, 0, pitch_ * sizeof(float));
      grad_output_ = zeros_ + pitch_;
      values_ = grad_output_ + places_ * pitch_;
      taps_ = values_ + places_ * pitch_;
      neighbours_ = neighbours.reserve<int32_t>((kTaps + 2) * places_);
      row_at_ = neighbours_ + kTaps * places_;
      value_row_ = row_at_ + places_;
    }
  }

  void begin(int64_t task) {
    const int64_t head = task / arguments_.chunks.chunks;
    bias_.begin(task);
    weights_.begin(task);
    if (arguments_.lepe) {
      lepe_ = arguments_.lepe + task * (kTaps + 1) * pitch_;
      for (int64_t i = 0; i < (kTaps + 1) * pitch_; ++i) lepe_[i] = 0.0;
      for (int64_t t = 0; t < kTaps; ++t)
        for (int64_t d = 0; d < head_dim_; ++d)
          taps_[t * pitch_ + d] = arguments_.windows.lepe_weight[(head * kTaps + t) * head_dim_ + d];
    }
  }

  // A window, whose index sets the policy holds.
  void enter(int64_t batch, int64_t head, const IndexSet& rows) {
    const WindowRows& window = policy_.window_rows();
    tiling_ = &window.tiling(head < arguments_.attention.query.size[1] / 2 ? 0 : 1);
    rows_ = rows;
    bias_.enter(rows);
    weights_.enter(rows);
    if (arguments_.lepe) {
      const Matrix grad_output = matrix_at(arguments_.attention.grad_output, batch, head, 0, 0, rows.query_tokens);
      const Matrix values = matrix_at(arguments_.attention.value, batch, head, 0, 0, rows.query_tokens);
      rows_to_float(grad_output_, pitch_, grad_output, rows.queries, head_dim_);
      rows_to_float(values_, pitch_, values, rows.queries, head_dim_);
      find_neighbours(window);
    }
  }

  // Where dLogit and dW of a row are added, null without a table.
  EFFATTN_INLINE float* row(int64_t row, int64_t staged_row) const { return bias_.row(row, staged_row); }
  EFFATTN_INLINE float* weights_row(int64_t row, int64_t staged_row) const { return weights_.row(row, staged_row); }

  void fold(int64_t row, int64_t rows) {
    bias_.fold(row, rows);
    weights_.fold(row, rows);
  }

  // After the tiles of a window: what LePE adds to dV (rows of keys).
  void leave(float* grad_value) {
    bias_.leave();
    weights_.leave();
    if (!arguments_.lepe) return;
    for (int64_t column = 0; column < pitch_; column += kLanes) {
      if (tiling_->x.size == 1)
        convolve<1, 3, 3>(grad_value, column);
      else if (tiling_->y.size == 1)
        convolve<3, 1, 3>(grad_value, column);
      else
        convolve<0, 1, 9>(grad_value, column);
    }
  }

  // Overlapping windows: adds up dK and dV of an image, whose windows come in order.
  void share_keys(int64_t batch, int64_t head, int64_t window, const float* keys, const float* values, Vec factor) {
    const Matrix to_key = matrix_at(arguments_.attention.grad_key, batch, head);
    const Matrix to_value = matrix_at(arguments_.attention.grad_value, batch, head);
    if (window == 0) band_.begin();
    band_.finish(band_.first_row(window), to_key, to_value, factor, head_dim_);
    band_.add(rows_, keys, values);
    if (window + 1 == tiling_->windows()) band_.finish(to_key, to_value, factor, head_dim_);
  }

  void end() {
    bias_.end();
    weights_.end();
  }

 private:
  struct Buffers {
    Buffer bias, weights;
  };
  static Buffers& buffers() {
    static thread_local Buffers buffers;
    return buffers;
  }

  // neighbours[row][t]: where the row at (place of the row) - t lies, that of zeros if the window has none there.
  void find_neighbours(const WindowRows& window) {
    if (tiling_ == neighbours_of_ && window.whole()) return;
    neighbours_of_ = window.whole() ? tiling_ : nullptr;
    const int64_t height = tiling_->y.size, width = tiling_->x.size;
    for (int64_t place = 0; place < height * width; ++place) row_at_[place] = -1;
    for (int64_t r = 0; r < rows_.queries; ++r) row_at_[window.query_place()[r]] = static_cast<int32_t>(r);
    for (int64_t r = 0; r < rows_.queries; ++r) {
      const int64_t place = window.query_place()[r], y = place / width, x = place % width;
      value_row_[r] = static_cast<int32_t>(window.key_at()[place] * pitch_);
      for (int64_t t = 0; t < kTaps; ++t) {
        const int64_t other_y = y - (t / 3 - 1), other_x = x - (t % 3 - 1);
        const bool inside = other_y >= 0 && other_y < height && other_x >= 0 && other_x < width;
        neighbours_[r * kTaps + t] =
            static_cast<int32_t>(((inside ? row_at_[other_y * width + other_x] : -1) + 1) * pitch_);
      }
    }
  }

  template <int kFirst, int kStep, int kCount>
  __attribute__((noinline)) void convolve(float* grad_value, int64_t column) {
    Vec weight[kCount], sum[kCount] = {}, total = {};
    EFFATTN_UNROLL for (int t = 0; t < kCount; ++t) weight[t] = load(taps_ + (kFirst + t * kStep) * pitch_ + column);
    const float* rows = zeros_ + column;
    for (int64_t r = 0; r < rows_.queries; ++r) {
      const int32_t* at = neighbours_ + r * kTaps + kFirst;
      float* to = grad_value + value_row_[r] + column;
      const Vec value = load(values_ + r * pitch_ + column);
      Vec gradient = load(to);
      EFFATTN_UNROLL for (int t = 0; t < kCount; ++t) {
        const Vec other = load(rows + at[t * kStep]);
        gradient = fma(weight[t], other, gradient);
        sum[t] = fma(other, value, sum[t]);
        if (t == kCount / 2) total += other;
      }
      store(to, gradient);
    }
    alignas(64) float part[kLanes];
    const auto add = [&](double* to, Vec from) {
      store(part, from);
      for (int lane = 0; lane < kLanes; ++lane) to[lane] += part[lane];
    };
    EFFATTN_UNROLL for (int t = 0; t < kCount; ++t) add(lepe_ + (kFirst + t * kStep) * pitch_ + column, sum[t]);
    add(lepe_ + kTaps * pitch_ + column, total);
  }

  const Policy& policy_;
  const WindowSinkArguments& arguments_;
  const int64_t head_dim_, pitch_, places_;
  KeyBand band_;
  WindowTableGradient bias_, weights_;
  IndexSet rows_;
  const WindowTiling* tiling_ = nullptr;
  const WindowTiling* neighbours_of_ = nullptr;
  float* zeros_ = nullptr;  // one row; grad_output_ follows it
  float* grad_output_ = nullptr;
  float* values_ = nullptr;
  float* taps_ = nullptr;
  int32_t* neighbours_ = nullptr;
  int32_t* row_at_ = nullptr;
  int32_t* value_row_ = nullptr;
  double* lepe_ = nullptr;
};

// Second stage, for heads [begin, end).
struct WindowReduction {
  const WindowSinkArguments& sink;
  const WindowsGrad& gradient;

  static void run(int64_t begin, int64_t end, void* context) {
    const WindowReduction& reduction = *static_cast<const WindowReduction*>(context);
    for (int64_t head = begin; head < end; ++head) reduction.head(head);
  }

  void head(int64_t head) const {
    const int64_t columns = sink.attention.query.size[3], pitch = round_up(columns, kLanes);
    const int64_t entries = sink.bias_entries, taps = (kTaps + 1) * pitch;
    for (int64_t i = 0; gradient.bias && i < entries; ++i)
      gradient.bias[head * entries + i] = sum(sink.bias, head, entries, i);
    for (int64_t i = 0; gradient.weights && i < entries; ++i)
      gradient.weights[head * entries + i] = sum(sink.weights, head, entries, i);
    for (int64_t t = 0; gradient.lepe_weight && t < kTaps; ++t)
      for (int64_t d = 0; d < columns; ++d)
        gradient.lepe_weight[(head * kTaps + t) * columns + d] = sum(sink.lepe, head, taps, t * pitch + d);
    for (int64_t d = 0; gradient.lepe_bias && d < columns; ++d)
      gradient.lepe_bias[head * columns + d] = sum(sink.lepe, head, taps, kTaps * pitch + d);
  }

  float sum(const double* from, int64_t head, int64_t size, int64_t entry) const {
    const int64_t chunks = sink.chunks.chunks;
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += from[(head * chunks + chunk) * size + entry];
    return static_cast<float>(total);
  }
};

}  // namespace effattn::EFFATTN_ISA
