#include "tensors.h"

namespace effattn::bindings {
namespace {

// (Hw, N, N) as (1, H, N, N), shared weights with a head stride of 0.
MaskedProduct product_of(const TorchTensor& weight, int64_t heads, int64_t tokens) {
  Tensor w = view(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 3 && is_floating(w.dtype), "weight must be a floating (1 or H, N, N) tensor");
  STD_TORCH_CHECK(
      w.size[1] == 1 || w.size[1] == heads, "weight has ", w.size[1], " heads where 1 or ", heads, " are needed");
  check_sizes(w, {1, w.size[1], tokens, tokens}, "weight");
  if (w.size[1] == 1) w.stride[1] = 0;
  return {w};
}

std::tuple<TorchTensor, TorchTensor> masked_product_fwd(
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor weight, double scale) {
  Forward forward = prepare_forward(query, key, value, scale);
  const Tensor& q = forward.arguments.query;
  check_sizes(forward.arguments.key, {q.size[0], q.size[1], q.size[2], q.size[3]}, "key");
  const MaskedProduct product = product_of(weight, q.size[1], q.size[2]);
  kernels(q.dtype).masked_product_forward(forward.arguments, product, runtime());
  return {std::move(forward.output), std::move(forward.logsumexp)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> masked_product_bwd(TorchTensor grad_output,
    TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor weight, TorchTensor output,
    TorchTensor logsumexp, double scale) {
  Backward backward = prepare_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Tensor& q = backward.arguments.query;
  check_sizes(backward.arguments.key, {q.size[0], q.size[1], q.size[2], q.size[3]}, "key");
  const MaskedProduct product = product_of(weight, q.size[1], q.size[2]);
  TorchTensor grad_weight = torch::stable::empty_like(weight);
  const MaskedProductGrad gradient = {view(grad_weight, "grad_weight")};
  kernels(q.dtype).masked_product_backward(backward.arguments, product, gradient, runtime());
  return {std::move(backward.grad_query), std::move(backward.grad_key), std::move(backward.grad_value),
      std::move(grad_weight)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("masked_product_fwd", TORCH_BOX(&effattn::bindings::masked_product_fwd));
  m.impl("masked_product_bwd", TORCH_BOX(&effattn::bindings::masked_product_bwd));
}
