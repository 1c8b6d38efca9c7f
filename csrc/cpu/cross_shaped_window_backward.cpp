// Backward of attention inside windows: the engine of backward.h over every window of every image, with the gradients
// of the bias and of LePE in the same task (cross_shaped_window_gradient.h).
#include "cross_shaped_window_gradient.h"
#include "cross_shaped_window_policy.h"

namespace effattn::EFFATTN_ISA {
namespace {

template <bool kBias, bool kWeights>
struct WindowFamily {
  using Policy = WindowPolicy<kBias, kWeights>;
  using Sink = WindowSink<Policy>;
  using SinkArguments = WindowSinkArguments;
  static constexpr bool kMultiplies = false;
  static constexpr bool kWindows = true;
};

}  // namespace

void window_backward(
    const AttentionBackward& attention, const Windows& windows, const WindowsGrad& gradient, const Runtime& runtime) {
  const int64_t batches = attention.query.size[0], heads = attention.query.size[1];
  const WindowTiling tilings[2] = {{windows, 0}, {windows, 1}};
  const int64_t most = larger(tilings[0].windows(), tilings[1].windows());
  const bool overlap = windows.overlap_h > 0 || windows.overlap_w > 0;
  WindowSinkArguments sink = {attention, windows, WindowChunks(heads, batches, most, overlap),
      tilings[0].bias_entries(), nullptr, nullptr, nullptr};
  const int64_t tasks = heads * sink.chunks.chunks;
  Buffer bias, weights, lepe;
  if (windows.bias) sink.bias = bias.reserve<double>(tasks * sink.bias_entries + 1);
  if (windows.weights) sink.weights = weights.reserve<double>(tasks * sink.bias_entries + 1);
  if (windows.lepe_weight)
    sink.lepe = lepe.reserve<double>(tasks * (kTaps + 1) * round_up(attention.query.size[3], kLanes) + 1);
  double scores = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const WindowTiling& tiling = tilings[head < heads / 2 ? 0 : 1];
    scores += 1.0 * tiling.windows() * tiling.queries() * tiling.keys();
  }
  const double flops = 10.0 * batches * scores * attention.query.size[3];
  if (windows.weights)
    backward_windows_any_type<WindowFamily<false, true>>(attention, windows, sink.chunks, sink, flops, runtime);
  else if (windows.bias)
    backward_windows_any_type<WindowFamily<true, false>>(attention, windows, sink.chunks, sink, flops, runtime);
  else
    backward_windows_any_type<WindowFamily<false, false>>(attention, windows, sink.chunks, sink, flops, runtime);
  WindowReduction reduction = {sink, gradient};
  const double terms =
      1.0 * tasks *
      ((sink.bias || sink.weights ? sink.bias_entries : 0) + (sink.lepe ? 10 * attention.query.size[3] : 0));
  run_items(runtime, heads, terms, WindowReduction::run, &reduction);
}

}  // namespace effattn::EFFATTN_ISA
