#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::Binarize;

void check_like(const Tensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.dtype == query.dtype, name, " and query must share one dtype");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size[d] == query.size[d], name, " and query must have the same sizes");
}

Tensor query_of(const Device& device, const TorchTensor& query) {
  STD_TORCH_CHECK(query.dim() == 4, "query must be (B, H, N, D)");
  const Tensor q = view(device, query, "query");
  STD_TORCH_CHECK(q.size[3] >= 1 && q.size[3] <= 256, "D must be in 1..256, got ", q.size[3]);
  return q;
}

Tensor like_query(const Device& device, const TorchTensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must be (B, H, N, D)");
  const Tensor x = view(device, tensor, name);
  check_like(x, query, name);
  return x;
}

// The weights of every head, or null.
const float* taps_of(const Device& device, std::optional<TorchTensor>& weight, const Tensor& query, int64_t* taps) {
  *taps = 0;
  if (!weight) return nullptr;
  STD_TORCH_CHECK(weight->dim() == 2 && weight->size(1) % 2 == 1, "residual_weight must be (H, T) with T odd");
  *taps = weight->size(1);
  return contiguous_data<const float>(device, *weight, ScalarType::Float, {query.size[1], *taps}, "residual_weight");
}

Binarize binarize_of(int64_t binarize) {
  STD_TORCH_CHECK(binarize >= 0 && binarize <= 3, "binarize must be in 0..3, got ", binarize);
  return static_cast<Binarize>(binarize);
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> shift_add_attention_fwd(TorchTensor query, TorchTensor key,
    TorchTensor value, std::optional<TorchTensor> residual_weight, int64_t binarize) {
  const Device device(query);
  const Tensor q = query_of(device, query);
  int64_t taps;
  const float* weight = taps_of(device, residual_weight, q, &taps);
  TorchTensor output = torch::stable::empty_like(query);
  TorchTensor context = device.empty({q.size[0], q.size[1], q.size[3], q.size[3]}, aoti_torch_dtype_float32());
  TorchTensor statistics = device.empty({q.size[0], q.size[1], 4}, aoti_torch_dtype_float32());
  const effattn::cuda::ShiftAddAttention arguments = {q, like_query(device, key, q, "key"),
      like_query(device, value, q, "value"), weight, taps, binarize_of(binarize), view(device, output, "output"),
      static_cast<float*>(context.data_ptr()), static_cast<float*>(statistics.data_ptr())};
  TorchTensor workspace = device.workspace(effattn::cuda::shift_add_attention_workspace(arguments));
  effattn::cuda::shift_add_attention(arguments, workspace.data_ptr(), device.stream());
  return {std::move(output), std::move(context), std::move(statistics)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> shift_add_attention_bwd(TorchTensor grad_output,
    TorchTensor query, TorchTensor key, TorchTensor value, std::optional<TorchTensor> residual_weight,
    TorchTensor context, TorchTensor statistics, int64_t binarize) {
  const Device device(query);
  const Tensor q = query_of(device, query);
  int64_t taps;
  const float* weight = taps_of(device, residual_weight, q, &taps);
  TorchTensor grad_query = torch::stable::empty_like(query), grad_key = torch::stable::empty_like(key),
              grad_value = torch::stable::empty_like(value);
  TorchTensor grad_weight = weight != nullptr ? device.empty({q.size[1], taps}, aoti_torch_dtype_float32())
                                              : device.empty({0}, aoti_torch_dtype_float32());
  const effattn::cuda::ShiftAddAttentionGradient arguments = {like_query(device, grad_output, q, "grad_output"), q,
      like_query(device, key, q, "key"), like_query(device, value, q, "value"), weight, taps, binarize_of(binarize),
      contiguous_data<const float>(
          device, context, ScalarType::Float, {q.size[0], q.size[1], q.size[3], q.size[3]}, "context"),
      contiguous_data<const float>(device, statistics, ScalarType::Float, {q.size[0], q.size[1], 4}, "statistics"),
      view(device, grad_query, "grad_query"), view(device, grad_key, "grad_key"),
      view(device, grad_value, "grad_value"),
      weight != nullptr ? static_cast<float*>(grad_weight.data_ptr()) : nullptr};
  TorchTensor workspace = device.workspace(effattn::cuda::shift_add_attention_gradient_workspace(arguments));
  effattn::cuda::shift_add_attention_gradient(arguments, workspace.data_ptr(), device.stream());
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_weight)};
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("shift_add_attention_fwd", TORCH_BOX(&effattn::bindings::cuda::shift_add_attention_fwd));
  m.impl("shift_add_attention_bwd", TORCH_BOX(&effattn::bindings::cuda::shift_add_attention_bwd));
}
