// Gradients of retention: scans again, with other tensors in the places of q, k, v (see retention_scan.h), and with
// dO_i standing for r_i dO_i.
//
//   dQ   from first to last, (dO, V, K) on the state S^T
//   dV   from last to first, (K, Q, dO) on dS <- gamma dS + s q^T dO, from the last state's gradient to the first's
//   dK   from last to first, (V, dO, Q) on dS^T
//   dw   sum over i of dO_i . dO_i/dw + dS_N . dS_N/dw, a scan with kDecay; sums of blocks, added in order
//
// is_causal = false: each as a pair of scans, as in the forward pass; dw is the sum of two.
// A scan reads its q and k once for each tile of columns, its v once, and writes one gradient.
#include "retention.h"

namespace effattn::cuda {
namespace {

template <class T>
int decay_width(int depth) {
  if constexpr (std::is_same_v<T, float>) return depth > 128 && !scan_fits<T, 256, 32, true>() ? 16 : 32;
  return 32;
}

template <class T>
void launch_decay_scan(const Scan<T>& scan, cudaStream_t stream) {
  if (scan.depth <= 128) return launch_scan_of_shape<T, 128, 32, true>(scan, stream);
  if constexpr (std::is_same_v<T, float>)
    if (decay_width<T>(scan.depth) == 16) return launch_scan_of_shape<T, 256, 16, true>(scan, stream);
  launch_scan_of_shape<T, 256, 32, true>(scan, stream);
}

int decay_width_of(const Retention& a) {
  return a.query.dtype == DType::kFloat32 ? decay_width<float>(static_cast<int>(a.query.size[3])) : 32;
}

// (sequence, tile of columns) pairs: sums for every head.
int64_t decay_sums(const Retention& a) { return a.sequences * ceil_div(a.value.size[3], decay_width_of(a)); }

int64_t gradient_partial_bytes(const Retention& a) {
  return a.is_causal ? 0 : max(partial_bytes(a.query), partial_bytes(a.value));
}

}  // namespace

int64_t retention_gradient_workspace(const RetentionGradient& g) {
  return gradient_partial_bytes(g.of) + 2 * decay_sums(g.of) * g.of.query.size[1] * 4;
}

void retention_gradient(const RetentionGradient& g, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const Retention& a = g.of;
  float* const partial = static_cast<float*>(workspace);
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + gradient_partial_bytes(a));
  const int64_t heads = a.query.size[1], splits = decay_sums(a);

  with_element_type(a.query.dtype, [&](auto element) {
    using T = decltype(element);
    Scan<T> scan = scan_of<T>(a, g.grad_output, a.value, a.key, g.grad_query);
    scan.initial = by_value(a.initial_state, a);
    launch_scans(scan, a.is_causal, partial, stream);

    scan = scan_of<T>(a, a.key, a.query, g.grad_output, g.grad_value);
    scan.scales_values = true;
    scan.initial = by_key(g.grad_state, a);
    scan.last = by_key(g.grad_initial_state, a);
    launch_scans(a.is_causal ? reversed(scan) : scan, a.is_causal, partial, stream);

    scan = scan_of<T>(a, a.value, g.grad_output, a.query, g.grad_key);
    scan.scales_values = true;
    scan.initial = by_value(g.grad_state, a);
    launch_scans(a.is_causal ? reversed(scan) : scan, a.is_causal, partial, stream);

    scan = scan_of<T>(a, a.query, a.key, a.value, g.grad_query);
    scan.initial = by_key(a.initial_state, a);
    scan.grad_output = planes_of<T>(g.grad_output);
    scan.grad_state = by_key(g.grad_state, a);
    scan.sums = sums;
    launch_decay_scan(scan, stream);
    if (!a.is_causal) {
      scan.sums = sums + splits * heads;
      launch_decay_scan(reversed(scan), stream);
    }
  });
  launch(sum_splits<float>, dim3(static_cast<unsigned>(ceil_div(heads, 256))), dim3(256), 0, stream,
      static_cast<const float*>(sums), (a.is_causal ? 1 : 2) * splits, heads, g.grad_log_decay);
}

}  // namespace effattn::cuda
