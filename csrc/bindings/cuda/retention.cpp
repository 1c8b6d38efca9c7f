#include <algorithm>
#include <limits>

#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::Retention;

constexpr int64_t kLongestChunk = 64;

Tensor tokens_of(const Device& device, const TorchTensor& tensor, const Tensor* like, const char* name, int64_t most) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must be (B, H, N, D)");
  const Tensor x = view(device, tensor, name);
  STD_TORCH_CHECK(
      x.size[3] >= 1 && x.size[3] <= most, name, "'s last dimension must be in 1..", most, ", got ", x.size[3]);
  if (like != nullptr) {
    STD_TORCH_CHECK(x.dtype == like->dtype, name, " and query must share one dtype");
    for (int d = 0; d < 3; ++d)
      STD_TORCH_CHECK(x.size[d] == like->size[d], name, " must have query's batch, heads and tokens");
  }
  return x;
}

Tensor query_of(const Device& device, const TorchTensor& query) {
  return tokens_of(device, query, nullptr, "query", 256);
}
Tensor key_of(const Device& device, const TorchTensor& key, const Tensor& query) {
  const Tensor k = tokens_of(device, key, &query, "key", 256);
  STD_TORCH_CHECK(k.size[3] == query.size[3], "key must have query's sizes");
  return k;
}
Tensor value_of(const Device& device, const TorchTensor& value, const Tensor& query) {
  return tokens_of(device, value, &query, "value", 512);
}

const float* decay_of(const Device& device, TorchTensor& log_decay, const Tensor& query) {
  return contiguous_data<const float>(device, log_decay, ScalarType::Float, {query.size[1]}, "log_decay");
}

// (B, H, N, columns), its dimensions in memory in the order of query's: what the shape rule of the operator gives.
TorchTensor empty_like_query(const Device& device, const TorchTensor& query, int64_t columns) {
  if (columns == query.size(3)) return torch::stable::empty_like(query);
  const auto strides = query.strides();
  int order[3] = {0, 1, 2};
  std::stable_sort(order, order + 3, [&](int a, int b) { return strides[a] > strides[b]; });
  int64_t next = std::max<int64_t>(columns, 1), sizes[4] = {0, 0, 0, columns}, placed[4] = {0, 0, 0, 1};
  for (int i = 2; i >= 0; --i) {
    const int d = order[i];
    sizes[d] = query.size(d);
    placed[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  }
  return device.empty_strided(sizes, placed, 4, torch_dtype(dtype_of(query, "query")));
}

// All but the results.
Retention arguments_of(const Device& device, TorchTensor& query, TorchTensor& key, TorchTensor& value,
    TorchTensor& log_decay, std::optional<TorchTensor>& initial_state, std::optional<TorchTensor>& row_scale,
    std::optional<TorchTensor>& cu_seqlens, bool is_causal, int64_t chunk_size, double scale) {
  Retention a = {};
  a.query = query_of(device, query);
  a.key = key_of(device, key, a.query);
  a.value = value_of(device, value, a.query);
  a.log_decay = decay_of(device, log_decay, a.query);
  const int64_t batch = a.query.size[0], heads = a.query.size[1], tokens = a.query.size[2];
  STD_TORCH_CHECK(tokens <= std::numeric_limits<int32_t>::max() - kLongestChunk, "too many tokens: ", tokens);
  a.sequences = batch;
  if (cu_seqlens) {
    STD_TORCH_CHECK(batch == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "cu_seqlens needs a batch of 1");
    a.sequences = cu_seqlens->size(0) - 1;
    a.bounds = contiguous_data<const int32_t>(device, *cu_seqlens, ScalarType::Int, {a.sequences + 1}, "cu_seqlens");
  }
  if (initial_state)
    a.initial_state = contiguous_data<const float>(device, *initial_state, ScalarType::Float,
        {a.sequences, heads, a.query.size[3], a.value.size[3]}, "initial_state");
  if (row_scale)
    a.row_scale =
        contiguous_data<const float>(device, *row_scale, ScalarType::Float, {batch, heads, tokens}, "row_scale");
  STD_TORCH_CHECK(chunk_size >= 0 && std::min(chunk_size, std::max<int64_t>(tokens, 1)) <= kLongestChunk,
      "chunks of the CUDA kernel have at most ", kLongestChunk, " tokens, got ", chunk_size);
  a.chunk_size = static_cast<int>(chunk_size == 0 ? kLongestChunk : std::min(chunk_size, kLongestChunk));
  a.is_causal = is_causal;
  a.scale = static_cast<float>(scale);
  return a;
}

TorchTensor empty_state(const Device& device, const Retention& a) {
  return device.empty({a.sequences, a.query.size[1], a.query.size[3], a.value.size[3]}, aoti_torch_dtype_float32());
}

std::tuple<TorchTensor, TorchTensor> retention_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    TorchTensor log_decay, std::optional<TorchTensor> initial_state, std::optional<TorchTensor> row_scale,
    std::optional<TorchTensor> cu_seqlens, bool is_causal, int64_t chunk_size, bool return_state, double scale) {
  const Device device(query);
  Retention a = arguments_of(
      device, query, key, value, log_decay, initial_state, row_scale, cu_seqlens, is_causal, chunk_size, scale);
  TorchTensor output = empty_like_query(device, query, a.value.size[3]);
  TorchTensor state = return_state ? empty_state(device, a) : device.empty({0}, aoti_torch_dtype_float32());
  a.output = view(device, output, "output");
  a.state = return_state ? static_cast<float*>(state.data_ptr()) : nullptr;
  TorchTensor workspace = device.workspace(effattn::cuda::retention_workspace(a));
  effattn::cuda::retention(a, workspace.data_ptr(), device.stream());
  return {std::move(output), std::move(state)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> retention_bwd(TorchTensor grad_output,
    std::optional<TorchTensor> grad_state, TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_decay,
    std::optional<TorchTensor> initial_state, std::optional<TorchTensor> row_scale,
    std::optional<TorchTensor> cu_seqlens, bool is_causal, int64_t chunk_size, bool return_state, double scale) {
  const Device device(query);
  effattn::cuda::RetentionGradient g = {};
  g.of = arguments_of(
      device, query, key, value, log_decay, initial_state, row_scale, cu_seqlens, is_causal, chunk_size, scale);
  const Retention& a = g.of;
  g.grad_output = value_of(device, grad_output, a.query);
  STD_TORCH_CHECK(g.grad_output.size[3] == a.value.size[3], "grad_output must have value's sizes");
  if (grad_state && return_state)  // else it is a compiled graph's zeros for the state that is (0,)
    g.grad_state = contiguous_data<const float>(device, *grad_state, ScalarType::Float,
        {a.sequences, a.query.size[1], a.query.size[3], a.value.size[3]}, "grad_state");
  TorchTensor grad_query = torch::stable::empty_like(query), grad_key = torch::stable::empty_like(key),
              grad_value = torch::stable::empty_like(value);
  TorchTensor grad_log_decay = device.empty({a.query.size[1]}, aoti_torch_dtype_float32());
  TorchTensor grad_initial_state =
      initial_state ? empty_state(device, a) : device.empty({0}, aoti_torch_dtype_float32());
  g.grad_query = view(device, grad_query, "grad_query");
  g.grad_key = view(device, grad_key, "grad_key");
  g.grad_value = view(device, grad_value, "grad_value");
  g.grad_log_decay = static_cast<float*>(grad_log_decay.data_ptr());
  g.grad_initial_state = initial_state ? static_cast<float*>(grad_initial_state.data_ptr()) : nullptr;
  TorchTensor workspace = device.workspace(effattn::cuda::retention_gradient_workspace(g));
  effattn::cuda::retention_gradient(g, workspace.data_ptr(), device.stream());
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_log_decay),
      std::move(grad_initial_state)};
}

TorchTensor take_step(const Device& device, TorchTensor& query, TorchTensor& key, TorchTensor& value,
    TorchTensor& log_decay, const float* state, double scale, float* new_state) {
  const Tensor q = query_of(device, query);
  STD_TORCH_CHECK(q.size[2] == 1, "query must hold one token");
  const Tensor v = value_of(device, value, q);
  TorchTensor output = empty_like_query(device, query, v.size[3]);
  effattn::cuda::retention_step({q, key_of(device, key, q), v, decay_of(device, log_decay, q), state,
                                    static_cast<float>(scale), view(device, output, "output"), new_state},
      device.stream());
  return output;
}

std::tuple<TorchTensor, TorchTensor> retention_step(
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_decay, TorchTensor state, double scale) {
  const Device device(query);
  const float* old = contiguous_data<const float>(
      device, state, ScalarType::Float, {query.size(0), query.size(1), query.size(3), value.size(3)}, "state");
  TorchTensor new_state = torch::stable::empty_like(state);
  TorchTensor output =
      take_step(device, query, key, value, log_decay, old, scale, static_cast<float*>(new_state.data_ptr()));
  return {std::move(output), std::move(new_state)};
}

TorchTensor retention_step_(
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_decay, TorchTensor state, double scale) {
  const Device device(query);
  STD_TORCH_CHECK(state.is_contiguous(), "state must be contiguous to be written in place");
  float* data = contiguous_data<float>(
      device, state, ScalarType::Float, {query.size(0), query.size(1), query.size(3), value.size(3)}, "state");
  return take_step(device, query, key, value, log_decay, data, scale, data);
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("retention_fwd", TORCH_BOX(&effattn::bindings::cuda::retention_fwd));
  m.impl("retention_bwd", TORCH_BOX(&effattn::bindings::cuda::retention_bwd));
  m.impl("retention_step", TORCH_BOX(&effattn::bindings::cuda::retention_step));
  m.impl("retention_step_", TORCH_BOX(&effattn::bindings::cuda::retention_step_));
}
