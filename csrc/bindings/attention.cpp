#include "tensors.h"

namespace effattn::bindings {
namespace {

AttentionMask mask_of(
    const std::optional<TorchTensor>& attn_mask, const Tensor& query, const Tensor& key, bool is_causal) {
  AttentionMask mask = {{}, is_causal};
  if (attn_mask) {
    mask.bias = view(*attn_mask, "attn_mask");
    check_sizes(mask.bias, {query.size[0], query.size[1], query.size[2], key.size[2]}, "attn_mask");
    STD_TORCH_CHECK(!is_causal, "attn_mask and is_causal exclude each other");
  }
  return mask;
}

std::tuple<TorchTensor, TorchTensor> attention_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    std::optional<TorchTensor> attn_mask, bool is_causal, double scale) {
  Forward forward = prepare_forward(query, key, value, scale);
  const Tensor& q = forward.arguments.query;
  const AttentionMask mask = mask_of(attn_mask, q, forward.arguments.key, is_causal);
  kernels(q.dtype).attention_forward(forward.arguments, mask, runtime());
  return {std::move(forward.output), std::move(forward.logsumexp)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> attention_bwd(TorchTensor grad_output, TorchTensor query,
    TorchTensor key, TorchTensor value, std::optional<TorchTensor> attn_mask, TorchTensor output, TorchTensor logsumexp,
    bool is_causal, double scale) {
  Backward backward = prepare_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Tensor& q = backward.arguments.query;
  const AttentionMask mask = mask_of(attn_mask, q, backward.arguments.key, is_causal);
  kernels(q.dtype).attention_backward(backward.arguments, mask, runtime());
  return {std::move(backward.grad_query), std::move(backward.grad_key), std::move(backward.grad_value)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&effattn::bindings::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&effattn::bindings::attention_bwd));
}
