// What retention.cu and retention_gradient.cu share: how a scan is put together and launched.
#pragma once

#include "retention_scan.h"

namespace effattn::cuda {

template <class T>
void launch_scan(const Scan<T>& scan, cudaStream_t stream);  // retention.cu

// A state (Dk, Dv) as a matrix whose rows are those of the key, or of the value.
inline StateMatrix by_key(const float* state, const Retention& a) {
  return {const_cast<float*>(state), a.value.size[3], 1};
}
inline StateMatrix by_value(const float* state, const Retention& a) {
  return {const_cast<float*>(state), 1, a.value.size[3]};
}

// Bytes of what a first scan leaves to a second one.
inline int64_t partial_bytes(const Tensor& like) {
  return ceil_div(like.size[0] * like.size[1] * like.size[2] * like.size[3] * 4, 16) * 16;
}

// From the first token to the last, no state.
template <class T>
Scan<T> scan_of(const Retention& a, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output) {
  Scan<T> scan = {};
  scan.query = planes_of<T>(query);
  scan.key = planes_of<T>(key);
  scan.value = planes_of<T>(value);
  scan.output = result_planes_of<T>(output);
  scan.log_decay = a.log_decay;
  scan.row_scale = a.row_scale;
  scan.bounds = a.bounds;
  scan.tokens = static_cast<int>(a.query.size[2]);
  scan.heads = a.query.size[1];
  scan.sequences = a.sequences;
  scan.depth = static_cast<int>(query.size[3]);
  scan.width = static_cast<int>(value.size[3]);
  scan.chunk = a.chunk_size;
  scan.score_scale = scan.entering_scale = a.scale;
  scan.leaving_scale = 1;
  return scan;
}

// From the last token to the first. The state is then a gradient, which holds the scale.
template <class T>
Scan<T> reversed(Scan<T> scan) {
  scan.reverse = true;
  for (Planes<T>* planes : {&scan.query, &scan.key, &scan.value, &scan.grad_output})
    planes->row_stride = -planes->row_stride;
  scan.output.row_stride = -scan.output.row_stride;
  scan.leaving_scale = scan.entering_scale;
  scan.entering_scale = 1;
  return scan;
}

// The scan, and without causality a strict one against it.
template <class T>
void launch_scans(Scan<T> scan, bool is_causal, float* partial, cudaStream_t stream) {
  if (is_causal) return launch_scan(scan, stream);
  scan.partial = partial;
  launch_scan(scan, stream);
  scan = reversed(scan);
  scan.strict = true;
  scan.partial = nullptr;
  scan.added = partial;
  launch_scan(scan, stream);
}

}  // namespace effattn::cuda
