#include "tensors.h"

namespace effattn::bindings {
namespace {

TokenSizes sizes_of(const TorchTensor& log_sizes, const Tensor& key) {
  return {elements<const float>(log_sizes, ScalarType::Float, {key.size[0], key.size[2]}, "log_sizes")};
}

std::tuple<TorchTensor, TorchTensor> size_weighted_attention_fwd(
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_sizes, double scale, bool) {
  Forward forward = prepare_forward(query, key, value, scale);
  const TokenSizes sizes = sizes_of(log_sizes, forward.arguments.key);
  kernels(forward.arguments.query.dtype).token_sizes_forward(forward.arguments, sizes, runtime());
  return {std::move(forward.output), std::move(forward.logsumexp)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> size_weighted_attention_bwd(TorchTensor grad_output,
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor log_sizes, TorchTensor output,
    TorchTensor logsumexp, double scale, bool wants_sizes) {
  Backward backward = prepare_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Tensor& k = backward.arguments.key;
  const TokenSizes sizes = sizes_of(log_sizes, k);
  TorchTensor grad_log_sizes = empty({k.size[0], k.size[2]}, ScalarType::Float);
  if (!wants_sizes) grad_log_sizes = torch::stable::zero_(grad_log_sizes);
  kernels(backward.arguments.query.dtype)
      .token_sizes_backward(backward.arguments, sizes,
          {wants_sizes ? static_cast<float*>(grad_log_sizes.data_ptr()) : nullptr}, runtime());
  return {std::move(backward.grad_query), std::move(backward.grad_key), std::move(backward.grad_value),
      std::move(grad_log_sizes)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("size_weighted_attention_fwd", TORCH_BOX(&effattn::bindings::size_weighted_attention_fwd));
  m.impl("size_weighted_attention_bwd", TORCH_BOX(&effattn::bindings::size_weighted_attention_bwd));
}
