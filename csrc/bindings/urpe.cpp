#include "tensors.h"

namespace effattn::bindings {
namespace {

int64_t entries_of(const Tensor& query, const Tensor& key, int64_t grid_h, int64_t grid_w) {
  check_sizes(key, {query.size[0], query.size[1], query.size[2], query.size[3]}, "key");
  STD_TORCH_CHECK(
      grid_h >= 0 && grid_w >= 0 && grid_h * grid_w == query.size[2], "grid does not cover ", query.size[2], " tokens");
  return query.size[2] > 0 ? (2 * grid_h - 1) * (2 * grid_w - 1) : 0;
}

const float* table_of(const std::optional<TorchTensor>& table, int64_t heads, int64_t entries, const char* name) {
  return table ? elements<const float>(*table, ScalarType::Float, {heads, entries}, name) : nullptr;
}

std::tuple<TorchTensor, TorchTensor> relative_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    std::optional<TorchTensor> coefficient, std::optional<TorchTensor> bias, int64_t grid_h, int64_t grid_w,
    bool is_causal, double scale) {
  Forward forward = prepare_forward(query, key, value, scale);
  const Tensor& q = forward.arguments.query;
  const int64_t heads = q.size[1], entries = entries_of(q, forward.arguments.key, grid_h, grid_w);
  const Relative relative = {table_of(coefficient, heads, entries, "coefficient"),
      table_of(bias, heads, entries, "bias"), grid_h, grid_w, is_causal};
  kernels(q.dtype).relative_forward(forward.arguments, relative, runtime());
  return {std::move(forward.output), std::move(forward.logsumexp)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> relative_bwd(TorchTensor grad_output,
    TorchTensor query, TorchTensor key, TorchTensor value, std::optional<TorchTensor> coefficient,
    std::optional<TorchTensor> bias, TorchTensor output, TorchTensor logsumexp, int64_t grid_h, int64_t grid_w,
    bool is_causal, double scale) {
  Backward backward = prepare_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Tensor& q = backward.arguments.query;
  const int64_t heads = q.size[1], entries = entries_of(q, backward.arguments.key, grid_h, grid_w);
  const Relative relative = {table_of(coefficient, heads, entries, "coefficient"),
      table_of(bias, heads, entries, "bias"), grid_h, grid_w, is_causal};
  const auto gradient_of = [&](bool given) {
    return given ? empty({heads, entries}, ScalarType::Float) : empty({0}, ScalarType::Float);
  };
  TorchTensor grad_coefficient = gradient_of(coefficient.has_value()), grad_bias = gradient_of(bias.has_value());
  const auto data = [](const TorchTensor& gradient, bool given) {
    return given ? static_cast<float*>(gradient.data_ptr()) : nullptr;
  };
  kernels(q.dtype).relative_backward(backward.arguments, relative,
      {data(grad_coefficient, coefficient.has_value()), data(grad_bias, bias.has_value())}, runtime());
  return {std::move(backward.grad_query), std::move(backward.grad_key), std::move(backward.grad_value),
      std::move(grad_coefficient), std::move(grad_bias)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("relative_fwd", TORCH_BOX(&effattn::bindings::relative_fwd));
  m.impl("relative_bwd", TORCH_BOX(&effattn::bindings::relative_bwd));
}
