#include <utility>

#include "tensors.h"

namespace effattn::bindings {
namespace {

constexpr int64_t kMaxValueDim = 512;

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(is_floating(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype,
      "query, key and value must share one floating dtype");
  STD_TORCH_CHECK(q.size[3] >= 1 && q.size[3] <= 256, "head_dim must be in 1..256, got ", q.size[3]);
  STD_TORCH_CHECK(
      v.size[3] >= 1 && v.size[3] <= kMaxValueDim, "value must have 1..", kMaxValueDim, " columns, got ", v.size[3]);
  check_sizes(k, {q.size[0], q.size[1], q.size[2], q.size[3]}, "key");
  check_sizes(v, {q.size[0], q.size[1], q.size[2], v.size[3]}, "value");
}

const float* optional_floats(
    const std::optional<TorchTensor>& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  return tensor ? elements<float>(*tensor, ScalarType::Float, sizes, name) : nullptr;
}

// Of query's sizes but for the last, laid out as query is.
TorchTensor like_query(const TorchTensor& query, const Tensor& q, int64_t columns) {
  if (columns == q.size[3]) return empty_like(query, q);
  int64_t order[3] = {0, 1, 2}, strides[4] = {0, 0, 0, 1}, step = columns;
  for (int i = 1; i < 3; ++i)  // a stable sort by falling stride
    for (int j = i; j > 0 && q.stride[order[j - 1]] < q.stride[order[j]]; --j) std::swap(order[j - 1], order[j]);
  for (int i = 2; i >= 0; --i) {
    strides[order[i]] = step;
    step *= q.size[order[i]] > 0 ? q.size[order[i]] : 1;
  }
  const int64_t sizes[4] = {q.size[0], q.size[1], q.size[2], columns};
  TorchTensor output = empty_strided(sizes, strides, 4, query.scalar_type());
  ask_for_huge_pages(output, step);
  return output;
}

Retention retention_of(const TorchTensor& query, const TorchTensor& key, const TorchTensor& value,
    const TorchTensor& log_decay, const std::optional<TorchTensor>& initial_state,
    const std::optional<TorchTensor>& row_scale, const std::optional<TorchTensor>& cu_seqlens, bool is_causal,
    int64_t chunk_size, double scale) {
  STD_TORCH_CHECK(query.dim() == 4, "query must be (B, H, N, D)");
  const Tensor q = view(query, "query"), k = view(key, "key"), v = view(value, "value");
  check_inputs(q, k, v);
  STD_TORCH_CHECK(chunk_size >= 0, "chunk_size must not be negative, got ", chunk_size);
  STD_TORCH_CHECK(is_causal || !initial_state, "initial_state needs is_causal");
  const int32_t* bounds = nullptr;
  int64_t sequences = q.size[0];
  if (cu_seqlens) {
    STD_TORCH_CHECK(q.size[0] == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
        "cu_seqlens must be (sequences + 1,) and the batch 1");
    sequences = cu_seqlens->size(0) - 1;
    bounds = elements<int32_t>(*cu_seqlens, ScalarType::Int, {sequences + 1}, "cu_seqlens");
  }
  return {q, k, v, elements<float>(log_decay, ScalarType::Float, {q.size[1]}, "log_decay"),
      optional_floats(initial_state, {sequences, q.size[1], q.size[3], v.size[3]}, "initial_state"),
      optional_floats(row_scale, {q.size[0], q.size[1], q.size[2]}, "row_scale"), bounds, sequences, is_causal,
      chunk_size, scale};
}

TorchTensor state_or_nothing(const Retention& arguments, bool wanted) {
  if (!wanted) return empty({0}, ScalarType::Float);
  return empty({arguments.sequences, arguments.query.size[1], arguments.query.size[3], arguments.value.size[3]},
      ScalarType::Float);
}

std::tuple<TorchTensor, TorchTensor> retention_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    TorchTensor log_decay, std::optional<TorchTensor> initial_state, std::optional<TorchTensor> row_scale,
    std::optional<TorchTensor> cu_seqlens, bool is_causal, int64_t chunk_size, bool return_state, double scale) {
  const Retention arguments =
      retention_of(query, key, value, log_decay, initial_state, row_scale, cu_seqlens, is_causal, chunk_size, scale);
  STD_TORCH_CHECK(is_causal || !return_state, "return_state needs is_causal");
  TorchTensor output = like_query(query, arguments.query, arguments.value.size[3]);
  TorchTensor state = state_or_nothing(arguments, return_state);
  kernels(arguments.query.dtype)
      .retention_forward(arguments,
          {view(output, "output"), return_state ? static_cast<float*>(state.data_ptr()) : nullptr}, runtime());
  return {std::move(output), std::move(state)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> retention_bwd(TorchTensor grad_output,
    std::optional<TorchTensor> grad_state, TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_decay,
    std::optional<TorchTensor> initial_state, std::optional<TorchTensor> row_scale,
    std::optional<TorchTensor> cu_seqlens, bool is_causal, int64_t chunk_size, bool return_state, double scale) {
  const Retention arguments =
      retention_of(query, key, value, log_decay, initial_state, row_scale, cu_seqlens, is_causal, chunk_size, scale);
  const Tensor &q = arguments.query, &v = arguments.value, g = view(grad_output, "grad_output");
  STD_TORCH_CHECK(g.dtype == q.dtype, "grad_output must have the dtype of query");
  check_sizes(g, {q.size[0], q.size[1], q.size[2], v.size[3]}, "grad_output");
  STD_TORCH_CHECK(is_causal || !grad_state || !return_state, "grad_state needs is_causal");
  std::optional<TorchTensor> dense;
  if (return_state && grad_state) dense = torch::stable::contiguous(*grad_state);
  TorchTensor grad_query = empty_like(query, q), grad_key = empty_like(key, arguments.key),
              grad_value = empty_like(value, v), grad_log_decay = empty({q.size[1]}, ScalarType::Float),
              grad_initial = state_or_nothing(arguments, initial_state.has_value());
  kernels(q.dtype).retention_backward(arguments,
      {g, optional_floats(dense, {arguments.sequences, q.size[1], q.size[3], v.size[3]}, "grad_state"),
          view(grad_query, "grad_query"), view(grad_key, "grad_key"), view(grad_value, "grad_value"),
          static_cast<float*>(grad_log_decay.data_ptr()),
          initial_state ? static_cast<float*>(grad_initial.data_ptr()) : nullptr},
      runtime());
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_log_decay),
      std::move(grad_initial)};
}

TorchTensor step_into(const TorchTensor& query, const TorchTensor& key, const TorchTensor& value,
    const TorchTensor& log_decay, const TorchTensor& state, const TorchTensor& new_state, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && query.size(2) == 1, "query must be (B, H, 1, D)");
  const Tensor q = view(query, "query"), k = view(key, "key"), v = view(value, "value");
  check_inputs(q, k, v);
  const std::initializer_list<int64_t> sizes = {q.size[0], q.size[1], q.size[3], v.size[3]};
  TorchTensor output = like_query(query, q, v.size[3]);
  kernels(q.dtype).retention_step(
      {q, k, v, view(output, "output"), elements<float>(log_decay, ScalarType::Float, {q.size[1]}, "log_decay"),
          elements<float>(state, ScalarType::Float, sizes, "state"),
          elements<float>(new_state, ScalarType::Float, sizes, "state"), scale},
      runtime());
  return output;
}

std::tuple<TorchTensor, TorchTensor> retention_step(
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_decay, TorchTensor state, double scale) {
  TorchTensor new_state = empty_like(state, view(state, "state"));
  TorchTensor output = step_into(query, key, value, log_decay, state, new_state, scale);
  return {std::move(output), std::move(new_state)};
}

TorchTensor retention_step_inplace(
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_decay, TorchTensor state, double scale) {
  return step_into(query, key, value, log_decay, state, state, scale);
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("retention_fwd", TORCH_BOX(&effattn::bindings::retention_fwd));
  m.impl("retention_bwd", TORCH_BOX(&effattn::bindings::retention_bwd));
  m.impl("retention_step", TORCH_BOX(&effattn::bindings::retention_step));
  m.impl("retention_step_", TORCH_BOX(&effattn::bindings::retention_step_inplace));
}
