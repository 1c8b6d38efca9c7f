#include "tensors.h"

namespace effattn::bindings {
namespace {

struct Operands {
  Tensor tokens, logits;
};

Operands operands_of(const TorchTensor& tokens, const TorchTensor& logits) {
  STD_TORCH_CHECK(tokens.dim() == 3 && logits.dim() == 3, "tokens and logits must have 3 dimensions");
  const Operands operands = {view(tokens, "tokens"), view(logits, "logits")};
  STD_TORCH_CHECK(is_floating(operands.tokens.dtype) && operands.logits.dtype == operands.tokens.dtype,
      "tokens and logits must share one floating dtype");
  check_sizes(
      operands.logits, {1, operands.tokens.size[1], operands.tokens.size[2], operands.logits.size[3]}, "logits");
  return operands;
}

std::tuple<TorchTensor, TorchTensor> soft_merge_fwd(TorchTensor tokens, TorchTensor logits) {
  const Operands operands = operands_of(tokens, logits);
  const int64_t batch = operands.tokens.size[1], outputs = operands.logits.size[3];
  TorchTensor output = empty({batch, outputs, operands.tokens.size[3]}, tokens.scalar_type());
  TorchTensor logsumexp = empty({batch, outputs}, ScalarType::Float);
  kernels(operands.tokens.dtype)
      .soft_merge_forward(
          {operands.tokens, operands.logits, view(output, "output"), static_cast<float*>(logsumexp.data_ptr())},
          runtime());
  return {std::move(output), std::move(logsumexp)};
}

std::tuple<TorchTensor, TorchTensor> soft_merge_bwd(
    TorchTensor grad_output, TorchTensor tokens, TorchTensor logits, TorchTensor output, TorchTensor logsumexp) {
  const Operands operands = operands_of(tokens, logits);
  const int64_t batch = operands.tokens.size[1], outputs = operands.logits.size[3];
  const Tensor grad = view(grad_output, "grad_output"), merged = view(output, "output");
  for (const Tensor* tensor : {&grad, &merged}) {
    check_sizes(*tensor, {1, batch, outputs, operands.tokens.size[3]}, "output or its gradient");
    STD_TORCH_CHECK(tensor->dtype == operands.tokens.dtype, "output and gradient must have the element type of tokens");
  }
  TorchTensor grad_tokens = empty_like(tokens, operands.tokens), grad_logits = empty_like(logits, operands.logits);
  kernels(operands.tokens.dtype)
      .soft_merge_backward({grad, operands.tokens, operands.logits, merged,
                               elements<const float>(logsumexp, ScalarType::Float, {batch, outputs}, "logsumexp"),
                               view(grad_tokens, "grad_tokens"), view(grad_logits, "grad_logits")},
          runtime());
  return {std::move(grad_tokens), std::move(grad_logits)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("soft_merge_fwd", TORCH_BOX(&effattn::bindings::soft_merge_fwd));
  m.impl("soft_merge_bwd", TORCH_BOX(&effattn::bindings::soft_merge_bwd));
}
