// Softmax attention with a Toeplitz bias and Toeplitz coefficients on its weights (URPE, arXiv 2205.13401; without
// coefficients a relative position bias): the tile engine with urpe_policy.h, and urpe_gradient.h for the tables.
//
// Beyond plain attention a score costs one load and an addition fused into its scale for the bias, one load and a
// multiplication for the coefficient. FLOPs 4 N^2 D per head forward, 10 N^2 D backward (half of it if causal); bytes
// those of attention and the tables, O(N).
#include "urpe_gradient.h"

namespace effattn::EFFATTN_ISA {
namespace {

template <bool kBias, bool kWeights>
struct RelativeFamily {
  using Policy = RelativePolicy<kBias, kWeights>;
  using Sink = RelativeSink<Policy>;
  using SinkArguments = RelativeSinkArguments;
  static constexpr bool kMultiplies = false;
};

struct PlainFamily {
  using Policy = RelativePolicy<false, false>;
  using Sink = NoParameterGradient;
  using SinkArguments = NoParameterGradient;
  static constexpr bool kMultiplies = false;
};

}  // namespace

void relative_forward(const AttentionForward& attention, const Relative& relative, const Runtime& runtime) {
  if (relative.coefficient && relative.bias)
    forward_any_type<RelativePolicy<true, true>>(attention, relative, runtime);
  else if (relative.coefficient)
    forward_any_type<RelativePolicy<false, true>>(attention, relative, runtime);
  else if (relative.bias)
    forward_any_type<RelativePolicy<true, false>>(attention, relative, runtime);
  else
    forward_any_type<RelativePolicy<false, false>>(attention, relative, runtime);
}

void relative_backward(const AttentionBackward& attention, const Relative& relative, const RelativeGrad& gradient,
    const Runtime& runtime) {
  const int64_t batches = attention.query.size[0], heads = attention.query.size[1], tokens = attention.query.size[2];
  const KeyChunks chunks(tokens, batches * heads);
  if (!relative.coefficient && !relative.bias)
    return backward_any_type<PlainFamily>(attention, relative, chunks, NoParameterGradient{}, runtime);
  const int64_t entries = RelativeGrid(relative, tokens).entries, tasks = batches * heads * chunks.chunks;
  Buffer bias, coefficient;
  RelativeSinkArguments sink = {nullptr, nullptr};
  if (relative.bias) sink.bias = bias.reserve<double>(tasks * entries + 1);
  if (relative.coefficient) sink.coefficient = coefficient.reserve<double>(tasks * entries + 1);
  if (relative.coefficient && relative.bias)
    backward_any_type<RelativeFamily<true, true>>(attention, relative, chunks, sink, runtime);
  else if (relative.coefficient)
    backward_any_type<RelativeFamily<false, true>>(attention, relative, chunks, sink, runtime);
  else
    backward_any_type<RelativeFamily<true, false>>(attention, relative, chunks, sink, runtime);
  RelativeReduction reduction = {sink, gradient, entries, batches * chunks.chunks};
  run_items(runtime, heads, static_cast<double>(tasks) * entries, RelativeReduction::run, &reduction);
}

}  // namespace effattn::EFFATTN_ISA
