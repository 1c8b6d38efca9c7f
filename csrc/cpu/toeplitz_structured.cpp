// Toeplitz-weighted linear attention in O(N M D), where every head's bias is linear or constant beyond some distance W.
//
//   O_i = sum_j c_{j-i} (q_i . k_j) v_j / n_i,  n_i = sum_j c_{j-i} q_i . k_j + eps,  c = exp(b - max b)
//
// One task is one head of one example. Keys within W, rounded up to blocks of 64 tokens, are met in tiles as the direct
// method does; what is farther comes through one state (M x D, float32) a side (toeplitz_structured_sum.h). Micro-tiles
// of 6 x 64 (gemm.h) for all products. In L1 and L2: a tile of scores (20 KB), blocks of Q, K^T, V, O, the states, and
// a ring of the near blocks of K and V.
//
// With G_i = g_i / n_i and d_i = g_i . o_i / n_i the gradients are three sums of the same kind:
//
//   dq_i = sum_j c_{j-i} ([G_i, -d_i] . [v_j, 1]) k_j
//   dk_j = sum_i c_{j-i} ([v_j, 1] . [G_i, -d_i]) q_i
//   dv_j = sum_i c_{j-i} (k_j . q_i) G_i
//
// A gradient of the bias is a sum over each diagonal, which no state holds: with wants_bias the direct method runs.
//
// FLOPs a token and head, W' = 64 x near blocks: 2 W' (M + D) + 8 M D, half the states' where causal; backward 3 times
// that. Bytes: q, k, v, output once, k and v twice where not causal. Memory: a state per block of tokens, or of one
// segment of up to 8 MB and one at the start of every segment (States), and the ring.
#include "toeplitz_structured_sum.h"

namespace effattn::EFFATTN_ISA {

void toeplitz_direct_forward(const Toeplitz&, const ToeplitzResult&, const Runtime&);
void toeplitz_direct_backward(const Toeplitz&, const ToeplitzGrad&, const Runtime&);

namespace toeplitz {
namespace {

struct Call {
  const Toeplitz& arguments;
  const int64_t batch, heads, tokens, key_dim, value_dim;
  const bool is_sequence;
  const Structure* structures;

  Call(const Toeplitz& a, Buffer& buffer, const Runtime& runtime)
      : arguments(a),
        batch(a.query.size[0]),
        heads(a.query.size[1]),
        tokens(a.query.size[2]),
        key_dim(a.query.size[3]),
        value_dim(a.value.size[3]),
        is_sequence(a.grid_h == 1 || a.grid_w == 1) {
    Structure* found = buffer.reserve<Structure>(larger(heads, 1));
    structures = found;
    if (tokens == 0) return;
    const int64_t entries = (2 * a.grid_h - 1) * (2 * a.grid_w - 1);
    for_items(runtime, heads, 20.0 * static_cast<double>(heads * entries), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const float* bias = a.bias + head * entries;
        found[head] = structure_of(bias, extent_of(bias, entries).top, a.grid_h, a.grid_w, a.is_causal);
      }
    });
  }

  bool is_empty() const { return batch * heads * tokens == 0; }
  // A sequence without a tail is all near blocks; such a grid has no blocks.
  bool applies() const {
    for (int64_t head = 0; head < heads; ++head)
      if (!is_sequence && !structures[head].applies) return false;
    return true;
  }
  double flops() const {
    double near = 0.0;
    for (int64_t head = 0; head < heads; ++head)
      near += static_cast<double>(
          smaller(kBlock * (1 + structures[head].before.near_blocks() + structures[head].after.near_blocks()), tokens));
    const double m = static_cast<double>(key_dim), d = static_cast<double>(value_dim);
    return 2.0 * static_cast<double>(batch * tokens) * (near * (m + d) + 4.0 * static_cast<double>(heads) * m * d);
  }
  Weights weights(int64_t head, bool turned) const {
    const int64_t entries = (2 * arguments.grid_h - 1) * (2 * arguments.grid_w - 1);
    return Weights(structures[head], arguments.bias + head * entries, is_sequence, tokens, arguments.is_causal, turned);
  }
};

// 0 where there is no weight, or less than float32 can divide by.
float reciprocal(float normalizer) { return fabsf(normalizer) >= 0x1p-126f ? 1.f / normalizer : 0.f; }

SumScratch& scratch() {
  static thread_local SumScratch scratch;
  return scratch;
}

void forward(const Call& call, const ToeplitzResult& result, int64_t index) {
  const Toeplitz& a = call.arguments;
  const int64_t batch = index / call.heads, head = index % call.heads;
  const Source query = {matrix_at(a.query, batch, head), call.key_dim},
               key = {matrix_at(a.key, batch, head), call.key_dim},
               value = {matrix_at(a.value, batch, head), call.value_dim};
  const Matrix output = matrix_at(result.output, batch, head);
  float* normalizer = result.normalizer + index * call.tokens;
  Sum sum(scratch(), call.weights(head, false), query, key, value, call.tokens, true);
  sum.run([&](int64_t first, int64_t rows, const float* t, const float* n) {
    for (int64_t r = 0; r < rows; ++r) {
      const float all = reduce_add(load(n + r * kLanes)) + static_cast<float>(a.eps);
      const float* row = t + r * value.pitch();
      normalizer[first + r] = all;
      store_row(output, first + r, row, broadcast(reciprocal(all)), call.value_dim);
    }
  });
}

struct GradScratch {
  Buffer inverse, minus_delta, row;
};

void backward(const Call& call, const ToeplitzGrad& grad, int64_t index) {
  static thread_local GradScratch own;
  const Toeplitz& a = call.arguments;
  const int64_t batch = index / call.heads, head = index % call.heads, tokens = call.tokens;
  const Matrix upstream = matrix_at(grad.grad_output, batch, head), output = matrix_at(grad.output, batch, head);
  const float* normalizer = grad.normalizer + index * tokens;
  float* inverse = own.inverse.reserve<float>(tokens);
  float* minus_delta = own.minus_delta.reserve<float>(tokens);
  const int64_t pitch = round_up(call.value_dim, kLanes);
  float* g = own.row.reserve<float>(2 * pitch);
  float* o = g + pitch;
  for (int64_t i = 0; i < tokens; ++i) {
    row_to_float(g, upstream, i, call.value_dim, pitch);
    row_to_float(o, output, i, call.value_dim, pitch);
    Vec delta = {};
    for (int64_t c = 0; c < pitch; c += kLanes) delta = fma(load(g + c), load(o + c), delta);
    inverse[i] = reciprocal(normalizer[i]);
    minus_delta[i] = -reduce_add(delta) * inverse[i];
  }
  const Source query = {matrix_at(a.query, batch, head), call.key_dim},
               key = {matrix_at(a.key, batch, head), call.key_dim}, scaled = {upstream, call.value_dim, inverse},
               full = {upstream, call.value_dim, inverse, true, minus_delta},
               value = {matrix_at(a.value, batch, head), call.value_dim, nullptr, true};
  const auto one = [&](bool turned, const Source& x, const Source& y, const Source& z, const Tensor& to) {
    const Matrix matrix = matrix_at(to, batch, head);
    Sum sum(scratch(), call.weights(head, turned), x, y, z, tokens, false);
    sum.run([&](int64_t first, int64_t rows, const float* t, const float*) {
      for (int64_t r = 0; r < rows; ++r) store_row(matrix, first + r, t + r * z.pitch(), broadcast(1.f), z.columns);
    });
  };
  one(false, full, value, key, grad.query);
  one(true, value, full, query, grad.key);
  one(true, key, query, scaled, grad.value);
}

template <class Body>
void for_heads(const Call& call, double flops, const Runtime& runtime, const Body& body) {
  for_items(runtime, call.batch * call.heads, flops, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) body(index);
    scratch().trim();
  });
}

}  // namespace
}  // namespace toeplitz

void toeplitz_structured_forward(const Toeplitz& arguments, const ToeplitzResult& result, const Runtime& runtime) {
  using namespace toeplitz;
  Buffer buffer;
  const Call call(arguments, buffer, runtime);
  if (call.is_empty()) return;
  if (!call.applies()) return toeplitz_direct_forward(arguments, result, runtime);
  for_heads(call, call.flops(), runtime, [&](int64_t index) { forward(call, result, index); });
}

void toeplitz_structured_backward(const Toeplitz& arguments, const ToeplitzGrad& grad, const Runtime& runtime) {
  using namespace toeplitz;
  if (arguments.wants_bias) return toeplitz_direct_backward(arguments, grad, runtime);
  Buffer buffer;
  const Call call(arguments, buffer, runtime);
  if (call.is_empty()) return;
  if (!call.applies()) return toeplitz_direct_backward(arguments, grad, runtime);
  for_heads(call, 3.0 * call.flops(), runtime, [&](int64_t index) { backward(call, grad, index); });
}

}  // namespace effattn::EFFATTN_ISA
