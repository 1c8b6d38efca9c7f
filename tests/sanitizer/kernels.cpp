// Runs every kernel of one ISA level, without torch, on tensors whose heap blocks end exactly where the tensor ends,
// and compares with plain loops in double. Built by tests/test_sanitizer.py with -fsanitize=address,undefined: a read
// or write past a tensor, a signed overflow or a misaligned access ends the run. Outputs start as NaN, so an element
// that a kernel forgets is found too. Work is split over real threads.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <thread>
#include <vector>

#include "api.h"

namespace effattn::EFFATTN_ISA {
extern const Kernels table;
}

using namespace effattn;

namespace {

const Kernels& kernels_under_test = EFFATTN_ISA::table;
int failures = 0;

uint32_t random_state = 12345;
float uniform() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(random_state >> 8) / 8388608.f - 1.f;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

enum class Layout { kContiguous, kHeadsInside, kStrided, kExpanded };

class HeapTensor {
 public:
  HeapTensor(DType dtype, std::vector<int64_t> size, Layout layout, bool poison = false) {
    view_.dtype = dtype;
    for (int d = 0; d < 4; ++d) view_.size[d] = size[d];
    const int64_t step = layout == Layout::kStrided ? 3 : 1;
    int64_t* stride = view_.stride;
    if (layout == Layout::kExpanded) {
      stride[0] = stride[2] = 0, stride[1] = size[3], stride[3] = 1;
    } else if (layout == Layout::kHeadsInside) {
      stride[3] = 1, stride[1] = size[3], stride[2] = size[1] * size[3], stride[0] = size[2] * stride[2];
    } else {
      stride[3] = step, stride[2] = size[3] * step, stride[1] = size[2] * stride[2], stride[0] = size[1] * stride[1];
    }
    int64_t count = 1;
    bool empty = false;
    for (int d = 0; d < 4; ++d) count += (size[d] - 1) * stride[d], empty = empty || size[d] == 0;
    if (empty) count = 0;
    storage_.reset(new char[count * element()]);
    view_.data = storage_.get();
    for (int64_t i = 0; i < count; ++i) write(i, poison ? NAN : dtype == DType::kBool ? uniform() > -0.5f : uniform());
  }

  const Tensor& view() const { return view_; }
  double at(int64_t b, int64_t h, int64_t n, int64_t d) const {
    const int64_t i = b * view_.stride[0] + h * view_.stride[1] + n * view_.stride[2] + d * view_.stride[3];
    const char* from = storage_.get() + i * element();
    if (view_.dtype == DType::kBool) return *from ? 0.0 : -INFINITY;
    if (view_.dtype == DType::kFloat32) {
      float value;
      memcpy(&value, from, 4);
      return value;
    }
    uint16_t half;
    memcpy(&half, from, 2);
    return from_bfloat16(half);
  }

 private:
  int64_t element() const { return view_.dtype == DType::kFloat32 ? 4 : view_.dtype == DType::kBool ? 1 : 2; }
  void write(int64_t i, float value) {
    char* to = storage_.get() + i * element();
    const uint16_t half = isnan(value) ? 0x7fc0 : to_bfloat16(value);
    if (view_.dtype == DType::kFloat32)
      memcpy(to, &value, 4);
    else if (view_.dtype == DType::kBool)
      *to = value != 0.f;
    else
      memcpy(to, &half, 2);
  }

  std::unique_ptr<char[]> storage_;
  Tensor view_ = {};
};

void parallel_for(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  constexpr int64_t kThreads = 3;
  const int64_t share = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share)
    threads.emplace_back([=] { function(first, first + share < end ? first + share : end, context); });
  for (std::thread& thread : threads) thread.join();
}

const Runtime kRuntime = {3, parallel_for};

struct Shape {
  int64_t batch, heads, group, queries, keys, head_dim;
  bool is_causal;
  Layout layout;
};

const auto one = [](auto...) { return 1.0; };
const auto zero = [](auto...) { return 0.0; };

// logit = scale * q.k * multiplier(b, h, i, j) + bias(b, h, i, j); its softmax times weight(b, h, i, j).
template <class Multiplier, class Bias, class RunForward, class RunBackward, class Weight = decltype(one)>
void compare(const char* name, DType dtype, const Shape& s, const Multiplier& multiplier, const Bias& bias,
    const RunForward& run_forward, const RunBackward& run_backward, const Weight& weight = one) {
  const std::vector<int64_t> query_size = {s.batch, s.heads * s.group, s.queries, s.head_dim},
                             key_size = {s.batch, s.heads, s.keys, s.head_dim};
  const HeapTensor query(dtype, query_size, s.layout), key(dtype, key_size, s.layout), value(dtype, key_size, s.layout),
      grad_output(dtype, query_size, s.layout);
  const Layout dense = s.layout == Layout::kHeadsInside ? s.layout : Layout::kContiguous;
  const HeapTensor output(dtype, query_size, dense, true), grad_query(dtype, query_size, dense, true),
      grad_key(dtype, key_size, dense, true), grad_value(dtype, key_size, dense, true);
  const int64_t rows = s.batch * s.heads * s.group * s.queries;
  std::unique_ptr<float[]> logsumexp(new float[rows]);
  for (int64_t i = 0; i < rows; ++i) logsumexp[i] = NAN;
  const float scale = 1.f / sqrtf(static_cast<float>(s.head_dim));
  run_forward(AttentionForward{query.view(), key.view(), value.view(), output.view(), logsumexp.get(), scale});
  run_backward(AttentionBackward{grad_output.view(), query.view(), key.view(), value.view(), output.view(),
      logsumexp.get(), grad_query.view(), grad_key.view(), grad_value.view(), scale});

  const int64_t D = s.head_dim;
  double worst[4] = {}, largest[4] = {0.05, 0.05, 0.05, 0.05};
  const auto note = [&](int which, double got, double want) {
    const double error = fabs(got - want);
    if (!(error <= worst[which])) worst[which] = error;
    if (fabs(want) > largest[which]) largest[which] = fabs(want);
  };
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t kv = 0; kv < s.heads; ++kv) {
      std::vector<double> dk(s.keys * D), dv(s.keys * D);
      for (int64_t g = 0; g < s.group; ++g) {
        const int64_t h = kv * s.group + g;
        for (int64_t i = 0; i < s.queries; ++i) {
          std::vector<double> p(s.keys), o(D), dq(D);
          double top = -INFINITY, sum = 0, delta = 0;
          for (int64_t j = 0; j < s.keys; ++j) {
            double dot = 0;
            for (int64_t d = 0; d < D; ++d) dot += query.at(b, h, i, d) * key.at(b, kv, j, d);
            p[j] = s.is_causal && j > i ? -INFINITY : scale * dot * multiplier(b, h, i, j) + bias(b, h, i, j);
            top = fmax(top, p[j]);
          }
          for (double& x : p) sum += x = top == -INFINITY ? 0.0 : exp(x - top);
          for (double& x : p) x = sum > 0 ? x / sum : 0.0;
          for (int64_t j = 0; j < s.keys; ++j)
            for (int64_t d = 0; d < D; ++d) o[d] += p[j] * weight(b, h, i, j) * value.at(b, kv, j, d);
          for (int64_t d = 0; d < D; ++d)
            note(0, output.at(b, h, i, d), o[d]), delta += o[d] * grad_output.at(b, h, i, d);
          const float got = logsumexp[(b * s.heads * s.group + h) * s.queries + i];
          const double want = sum > 0 ? top + log(sum) : -INFINITY;
          if (isinf(want) ? !isinf(got) : !(fabs(got - want) < 0.02 * (1 + fabs(want)))) note(0, NAN, 0);
          for (int64_t j = 0; j < s.keys; ++j) {
            double dp = 0;
            for (int64_t d = 0; d < D; ++d) dp += grad_output.at(b, h, i, d) * value.at(b, kv, j, d);
            const double w = weight(b, h, i, j), ds = p[j] * (dp * w - delta) * scale * multiplier(b, h, i, j);
            for (int64_t d = 0; d < D; ++d) {
              dq[d] += ds * key.at(b, kv, j, d);
              dk[j * D + d] += ds * query.at(b, h, i, d);
              dv[j * D + d] += p[j] * w * grad_output.at(b, h, i, d);
            }
          }
          for (int64_t d = 0; d < D; ++d) note(1, grad_query.at(b, h, i, d), dq[d]);
        }
      }
      for (int64_t j = 0; j < s.keys; ++j)
        for (int64_t d = 0; d < D; ++d)
          note(2, grad_key.at(b, kv, j, d), dk[j * D + d]), note(3, grad_value.at(b, kv, j, d), dv[j * D + d]);
    }
  const double tolerance = dtype == DType::kFloat32 ? 2e-5 : 4e-2;
  for (int which = 0; which < 4; ++which)
    if (!(worst[which] <= tolerance * largest[which])) {
      ++failures;
      printf("%s: dtype %d, %ld x (%ld * %ld) x %ld x %ld x %ld, layout %d: tensor %d off by %g of %g\n", name,
          static_cast<int>(dtype), static_cast<long>(s.batch), static_cast<long>(s.heads), static_cast<long>(s.group),
          static_cast<long>(s.queries), static_cast<long>(s.keys), static_cast<long>(D), static_cast<int>(s.layout),
          which, worst[which], largest[which]);
    }
}

void gaussian_mixture(
    DType dtype, int64_t grid_h, int64_t grid_w, int64_t prefix, int64_t gaussians, int64_t head_dim, Layout layout) {
  const int64_t heads = 2, tokens = grid_h * grid_w + prefix;
  std::unique_ptr<float[]> alpha(new float[gaussians * heads]), sigma(new float[gaussians * heads]),
      grad_alpha(new float[gaussians * heads]), grad_sigma(new float[gaussians * heads]);
  for (int64_t i = 0; i < gaussians * heads; ++i)
    alpha[i] = uniform(), sigma[i] = i % 3 == 0 ? 0.f : 4.f * uniform(), grad_alpha[i] = grad_sigma[i] = NAN;
  const GaussianMixture mixture = {alpha.get(), sigma.get(), gaussians, grid_h, grid_w, prefix, 1e-5};
  const auto multiplier = [&](int64_t, int64_t h, int64_t i, int64_t j) {
    if (i < prefix || j < prefix) return 1.0;
    const double dy = static_cast<double>((i - prefix) / grid_w - (j - prefix) / grid_w),
                 dx = static_cast<double>((i - prefix) % grid_w - (j - prefix) % grid_w);
    double m = 0;
    for (int64_t k = 0; k < gaussians; ++k)
      m += alpha[k * heads + h] * exp(-(dx * dx + dy * dy) / (2 * (pow(sigma[k * heads + h], 2) + 1e-5)));
    return m;
  };
  compare(
      "gaussian_mixture", dtype, {2, heads, 1, tokens, tokens, head_dim, false, layout}, multiplier, zero,
      [&](const AttentionForward& a) { kernels_under_test.gaussian_mixture_forward(a, mixture, kRuntime); },
      [&](const AttentionBackward& a) {
        kernels_under_test.gaussian_mixture_backward(a, mixture, {grad_alpha.get(), grad_sigma.get()}, kRuntime);
      });
  for (int64_t i = 0; i < gaussians * heads; ++i)
    if (!isfinite(grad_alpha[i]) || !isfinite(grad_sigma[i]))
      ++failures, printf("gaussian_mixture: parameter gradient %ld is not finite\n", static_cast<long>(i));
}

void masked_product(DType dtype, DType weight_dtype, int64_t tokens, int64_t head_dim, bool shared, Layout layout) {
  const int64_t heads = 2;
  const HeapTensor weight(weight_dtype, {1, shared ? 1 : heads, tokens, tokens}, Layout::kContiguous),
      grad(weight_dtype, {1, shared ? 1 : heads, tokens, tokens}, Layout::kContiguous, true);
  Tensor view = weight.view(), grad_view = grad.view();
  if (shared) view.stride[1] = 0;
  compare(
      "masked_product", dtype, {2, heads, 1, tokens, tokens, head_dim, false, layout},
      [&](int64_t, int64_t h, int64_t i, int64_t j) { return weight.at(0, shared ? 0 : h, i, j); }, zero,
      [&](const AttentionForward& a) { kernels_under_test.masked_product_forward(a, {view}, kRuntime); },
      [&](const AttentionBackward& a) {
        kernels_under_test.masked_product_backward(a, {view}, {grad_view}, kRuntime);
      });
  for (int64_t h = 0; h < (shared ? 1 : heads); ++h)
    for (int64_t i = 0; i < tokens * tokens; ++i)
      if (!isfinite(grad.at(0, h, i / tokens, i % tokens))) {
        ++failures, printf("masked_product: a weight gradient is not finite\n");
        return;
      }
}

void attention(DType dtype, const Shape& s, const HeapTensor* bias) {
  const AttentionMask mask = {bias ? bias->view() : Tensor{}, s.is_causal};
  const auto run_forward = [&](const AttentionForward& a) { kernels_under_test.attention_forward(a, mask, kRuntime); };
  const auto run_backward = [&](const AttentionBackward& a) {
    kernels_under_test.attention_backward(a, mask, kRuntime);
  };
  if (bias)
    compare(
        "attention with mask", dtype, s, one,
        [&](int64_t b, int64_t h, int64_t i, int64_t j) { return bias->at(b, h, i, j); }, run_forward, run_backward);
  else
    compare("attention", dtype, s, one, zero, run_forward, run_backward);
}

// Everything of one head in plain loops; which elements are bits is told from the statistics that the kernel gives.
void shift_add_attention(DType dtype, int64_t tokens, int64_t D, int64_t taps, Binarize binarize, Layout layout) {
  const int64_t batch = 2, heads = 2;
  const std::vector<int64_t> size = {batch, heads, tokens, D};
  const HeapTensor query(dtype, size, layout), key(dtype, size, layout), value(dtype, size, layout),
      G(dtype, size, layout);
  const Layout dense = layout == Layout::kHeadsInside ? layout : Layout::kContiguous;
  const HeapTensor output(dtype, size, dense, true), dq(dtype, size, dense, true), dk(dtype, size, dense, true),
      dv(dtype, size, dense, true);
  const auto floats = [](int64_t count) {
    std::unique_ptr<float[]> memory(new float[count]);
    for (int64_t i = 0; i < count; ++i) memory[i] = NAN;
    return memory;
  };
  const auto weight = floats(heads * taps), grad_weight = floats(heads * taps), context = floats(batch * heads * D * D),
             statistics = floats(batch * heads * 4);
  for (int64_t i = 0; i < heads * taps; ++i) weight[i] = uniform();
  kernels_under_test.shift_add_attention_forward({query.view(), key.view(), value.view(), output.view(), weight.get(),
                                                     taps, context.get(), statistics.get(), binarize},
      kRuntime);
  kernels_under_test.shift_add_attention_backward(
      {G.view(), query.view(), key.view(), value.view(), weight.get(), taps, context.get(), statistics.get(), dq.view(),
          dk.view(), dv.view(), grad_weight.get(), binarize},
      kRuntime);

  using Matrix = std::vector<std::vector<double>>;
  const auto zeros = [](int64_t rows, int64_t columns) { return Matrix(rows, std::vector<double>(columns)); };
  const bool is_signed = binarize == Binarize::kSign;
  double worst[5] = {}, largest[5] = {0.05, 0.05, 0.05, 0.05, 0.05};
  const auto note = [&](int which, double got, double want) {
    const double error = fabs(got - want);
    if (!(error <= worst[which])) worst[which] = error;
    if (fabs(want) > largest[which]) largest[which] = fabs(want);
  };
  const double inverse_pi = 0.31830988618379067;
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> dw(taps);
    for (int64_t b = 0; b < batch; ++b) {
      const float* s = statistics.get() + (b * heads + h) * 4;
      Matrix unit[2] = {zeros(tokens, D), zeros(tokens, D)}, bits[2] = {zeros(tokens, D), zeros(tokens, D)};
      Matrix norm = zeros(2, tokens), A = zeros(D, D), B = zeros(D, D), dU = zeros(tokens, D), dV = zeros(tokens, D);
      for (int which = 0; which < 2; ++which)
        for (int64_t n = 0; n < tokens; ++n) {
          const HeapTensor& x = which ? key : query;
          for (int64_t d = 0; d < D; ++d) norm[which][n] += x.at(b, h, n, d) * x.at(b, h, n, d);
          norm[which][n] = sqrt(norm[which][n]);
          for (int64_t d = 0; d < D; ++d) {
            unit[which][n][d] = x.at(b, h, n, d) / norm[which][n];
            const double scale = s[2 * which], threshold = s[2 * which + 1];
            bits[which][n][d] = is_signed ? (unit[which][n][d] > 0 ? 1 : -1) : scale * (unit[which][n][d] > threshold);
          }
        }
      for (int64_t n = 0; n < tokens; ++n)
        for (int64_t d = 0; d < D; ++d)
          for (int64_t c = 0; c < D; ++c) A[d][c] += bits[1][n][d] * value.at(b, h, n, c);
      for (int64_t n = 0; n < tokens; ++n) {
        std::vector<double> U(D), R(D);
        double length = 0, along = 0;
        for (int64_t c = 0; c < D; ++c) {
          U[c] = 0.5 * value.at(b, h, n, c);
          for (int64_t d = 0; d < D; ++d) U[c] += inverse_pi * bits[0][n][d] * A[d][c];
          length += U[c] * U[c];
        }
        length = sqrt(length);
        for (int64_t c = 0; c < D; ++c) R[c] = U[c] / length, along += R[c] * G.at(b, h, n, c);
        for (int64_t c = 0; c < D; ++c) {
          dU[n][c] = (G.at(b, h, n, c) - R[c] * along) / length;
          largest[3] = fmax(largest[3], fabs(G.at(b, h, n, c)) / length);  // what cancels where D is 1
          double sum = R[c];
          dV[n][c] += 0.5 * dU[n][c];
          for (int64_t t = 0; t < taps; ++t) {
            const int64_t other = n + t - taps / 2;
            if (other < 0 || other >= tokens) continue;
            sum += weight[h * taps + t] * value.at(b, h, other, c);
            dV[other][c] += weight[h * taps + t] * G.at(b, h, n, c);
            dw[t] += G.at(b, h, n, c) * value.at(b, h, other, c);
          }
          note(0, output.at(b, h, n, c), sum);
          for (int64_t d = 0; d < D; ++d) B[d][c] += bits[0][n][d] * dU[n][c];
        }
      }
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t c = 0; c < D; ++c) {
          for (int64_t d = 0; d < D; ++d) dV[n][c] += inverse_pi * bits[1][n][d] * B[d][c];
          note(3, dv.at(b, h, n, c), dV[n][c]);
        }
        for (int which = 0; which < 2; ++which) {
          std::vector<double> grad(D);
          double along = 0;
          for (int64_t d = 0; d < D; ++d) {
            for (int64_t c = 0; c < D; ++c)
              grad[d] += inverse_pi * (which ? value.at(b, h, n, c) * B[d][c] : dU[n][c] * A[d][c]);
            if (!is_signed && unit[which][n][d] < 0) grad[d] = 0;
            along += grad[d] * unit[which][n][d];
          }
          for (int64_t d = 0; d < D; ++d)
            note(1 + which, (which ? dk : dq).at(b, h, n, d), (grad[d] - unit[which][n][d] * along) / norm[which][n]);
        }
      }
    }
    for (int64_t t = 0; t < taps; ++t) note(4, grad_weight[h * taps + t], dw[t]);
  }
  const double tolerance = dtype == DType::kFloat32 ? 4e-5 : 2e-2;
  for (int which = 0; which < 5; ++which)
    if (!(worst[which] <= tolerance * largest[which])) {
      ++failures;
      printf("shift_add_attention: dtype %d, %ld x %ld, %ld taps, binarize %d, layout %d: tensor %d off by %g of %g\n",
          static_cast<int>(dtype), static_cast<long>(tokens), static_cast<long>(D), static_cast<long>(taps),
          static_cast<int>(binarize), static_cast<int>(layout), which, worst[which], largest[which]);
    }
}

void everything(DType dtype) {
  const Layout layouts[] = {Layout::kContiguous, Layout::kHeadsInside, Layout::kStrided, Layout::kExpanded};
  const int64_t head_dims[] = {1, 7, 16, 33, 64, 80, 256};
  int turn = 0;
  for (const int64_t head_dim : head_dims) {
    const Layout layout = layouts[turn % 4], other = layouts[(turn + 1) % 4];
    gaussian_mixture(dtype, 1, 1, turn % 2, 1, head_dim, layout);
    gaussian_mixture(dtype, 3, 5, 1, 3, head_dim, other);
    gaussian_mixture(dtype, 5, 19, turn % 3, 2, head_dim, layout);
    gaussian_mixture(dtype, 2, 40, 17, 1, head_dim, other);
    masked_product(dtype, DType::kFloat32, 1 + 13 * turn, head_dim, turn % 2 == 0, layout);
    masked_product(dtype, dtype, 50, head_dim, turn % 2 == 1, other);
    attention(dtype, {1, 2, 1 + turn % 2, 1 + 11 * turn, 65, head_dim, false, layout}, nullptr);
    attention(dtype, {2, 1, 2, 67, 67, head_dim, true, other}, nullptr);
    attention(dtype, {1, 1, 1, 5, 0, head_dim, false, Layout::kContiguous}, nullptr);
    const Shape masked = {1, 2, 1, 20, 35 + turn, head_dim, false, layout};
    for (const DType mask_dtype : {DType::kBool, DType::kFloat32, dtype})
      for (const Layout mask_layout : {Layout::kContiguous, Layout::kStrided, Layout::kExpanded}) {
        const HeapTensor bias(mask_dtype, {masked.batch, masked.heads, masked.queries, masked.keys}, mask_layout);
        attention(dtype, masked, &bias);
      }
    for (const Binarize binarize :
        {Binarize::kPublished, Binarize::kMeanThreshold, Binarize::kPerHead, Binarize::kSign}) {
      const int64_t taps[] = {9, 0, 1, 9, 3, 15};
      shift_add_attention(dtype, 1 + 23 * turn, head_dim, taps[turn % 6], binarize, layout);
      shift_add_attention(dtype, 64, head_dim, 9, binarize, other);
    }
    ++turn;
  }
  gaussian_mixture(dtype, 18, 33, 1, 5, 16, Layout::kContiguous);  // several key blocks, wide table
  attention(dtype, {1, 1, 1, 100, 600, 24, false, Layout::kHeadsInside}, nullptr);
  attention(dtype, {1, 1, 1, 600, 300, 8, true, Layout::kContiguous}, nullptr);
  shift_add_attention(dtype, 601, 24, 9, Binarize::kPublished, Layout::kHeadsInside);  // several chunks
  shift_add_attention(dtype, 470, 16, 5, Binarize::kPerHead, Layout::kContiguous);
}

#include "window_kernels.h"
// which it builds on:
#include "local_enhancement_kernels.h"

}  // namespace

#include "packed_kernels.h"
#include "retention_kernels.h"
#include "soft_merge_kernels.h"
#include "toeplitz_kernels.h"
#include "toeplitz_structured_kernels.h"
#include "token_merging_kernels.h"
#include "urpe_kernels.h"
#include "size_weighted_kernels.h"

int main() {
  packed_kernels();
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) everything(DType::kFloat32);
  everything(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) window_kernels(DType::kFloat32);
  window_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) local_enhancement_kernels(DType::kFloat32);
  local_enhancement_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) retention_kernels(DType::kFloat32);
  retention_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) toeplitz_kernels(DType::kFloat32);
  toeplitz_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) toeplitz_structured_kernels(DType::kFloat32);
  toeplitz_structured_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) urpe_kernels(DType::kFloat32);
  urpe_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) size_weighted_kernels(DType::kFloat32);
  size_weighted_kernels(DType::kBFloat16);
  token_merging_kernels(DType::kFloat32);
  token_merging_kernels(DType::kBFloat16);
  if (strcmp(kernels_under_test.isa, "avx512_bf16") != 0) soft_merge_kernels(DType::kFloat32);
  soft_merge_kernels(DType::kBFloat16);
  printf("%s: %d failures\n", kernels_under_test.isa, failures);
  return failures != 0;
}
