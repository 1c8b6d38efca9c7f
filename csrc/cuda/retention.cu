// Retention, linear attention with a memory that decays by gamma = exp(log_decay) a token:
//
//   O = r (s Q K^T * G) V + r s gamma^(i + 1) q_i S_0,    G_ij = gamma^(i - j) for j <= i, else 0
//   S_N = gamma^N S_0 + sum_j gamma^(N - 1 - j) k_j^T v_j
//
// by the scan of retention_scan.h, a launch that reads q and k once for each tile of columns, v once, and writes O and,
// where it is asked for, the last state. is_causal = false, G_ij = gamma^|i - j|: a scan with j <= i forward, which
// leaves O in float32, then one with j > i backward, which adds to it and rounds.
#include "retention.h"

namespace effattn::cuda {

// The widest tile of columns that is of use and finds room. Its width changes nothing in a result.
template <class T>
void launch_scan(const Scan<T>& scan, cudaStream_t stream) {
  const bool wide = scan.width > 32;
  if (scan.depth <= 128) {
    if (wide && scan_fits<T, 128, 64, false>()) return launch_scan_of_shape<T, 128, 64, false>(scan, stream);
    return launch_scan_of_shape<T, 128, 32, false>(scan, stream);
  }
  if (scan.depth <= 256) {
    if (wide && scan_fits<T, 256, 64, false>()) return launch_scan_of_shape<T, 256, 64, false>(scan, stream);
    return launch_scan_of_shape<T, 256, 32, false>(scan, stream);
  }
  if constexpr (std::is_same_v<T, float>)
    if (!scan_fits<T, 512, 32, false>()) return launch_scan_of_shape<T, 512, 16, false>(scan, stream);
  launch_scan_of_shape<T, 512, 32, false>(scan, stream);
}
template void launch_scan(const Scan<float>&, cudaStream_t);
template void launch_scan(const Scan<bfloat16>&, cudaStream_t);
template void launch_scan(const Scan<float16>&, cudaStream_t);

int64_t retention_workspace(const Retention& a) { return a.is_causal ? 0 : partial_bytes(a.value); }

void retention(const Retention& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  with_element_type(a.query.dtype, [&](auto element) {
    using T = decltype(element);
    Scan<T> scan = scan_of<T>(a, a.query, a.key, a.value, a.output);
    scan.initial = by_key(a.initial_state, a);
    scan.last = by_key(a.state, a);
    launch_scans(scan, a.is_causal, static_cast<float*>(workspace), stream);
  });
}

}  // namespace effattn::cuda
