// Attention inside windows of a token grid, forward (cross_shaped_window_policy.h).
//
// FLOPs 4 D per query and key of a window; bytes 4 N D elements per head, each read or written once.
#include "cross_shaped_window_policy.h"
#include "forward.h"

namespace effattn::EFFATTN_ISA {

void window_forward(const AttentionForward& attention, const Windows& windows, const Runtime& runtime) {
  if (windows.weights)
    forward_any_type<WindowPolicy<false, true>>(attention, windows, runtime);
  else if (windows.bias)
    forward_any_type<WindowPolicy<true, false>>(attention, windows, runtime);
  else
    forward_any_type<WindowPolicy<false, false>>(attention, windows, runtime);
}

}  // namespace effattn::EFFATTN_ISA
