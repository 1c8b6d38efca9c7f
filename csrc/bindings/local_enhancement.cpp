#include "tensors.h"

namespace effattn::bindings {
namespace {

LocalEnhancement shape_of(const Tensor& value, const TorchTensor& weight, const std::optional<TorchTensor>& bias,
    int64_t grid_h, int64_t grid_w, int64_t num_prefix_tokens, int64_t size) {
  STD_TORCH_CHECK(is_floating(value.dtype), "value must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(value.size[3] >= 1 && value.size[3] <= 256, "head_dim must be in 1..256, got ", value.size[3]);
  STD_TORCH_CHECK(
      grid_h >= 0 && grid_w >= 0 && num_prefix_tokens >= 0 && grid_h * grid_w + num_prefix_tokens == value.size[2],
      "grid and prefix do not cover ", value.size[2], " tokens");
  STD_TORCH_CHECK(size >= 1 && size % 2 == 1, "size must be odd, got ", size);
  const int64_t heads = value.size[1], head_dim = value.size[3];
  return {elements<const float>(weight, ScalarType::Float, {heads, head_dim, size * size}, "weight"),
      bias ? elements<const float>(*bias, ScalarType::Float, {heads, head_dim}, "bias") : nullptr, size, grid_h, grid_w,
      num_prefix_tokens};
}

Tensor like_value(const TorchTensor& tensor, const Tensor& value, const char* name) {
  const Tensor view = bindings::view(tensor, name);
  STD_TORCH_CHECK(view.dtype == value.dtype, name, " must have the dtype of value");
  check_sizes(view, {value.size[0], value.size[1], value.size[2], value.size[3]}, name);
  return view;
}

TorchTensor local_enhancement_fwd(TorchTensor attention, TorchTensor value, TorchTensor weight,
    std::optional<TorchTensor> bias, int64_t grid_h, int64_t grid_w, int64_t num_prefix_tokens, int64_t size) {
  const Tensor v = view(value, "value"), a = like_value(attention, v, "attention");
  const LocalEnhancement shape = shape_of(v, weight, bias, grid_h, grid_w, num_prefix_tokens, size);
  TorchTensor output = empty_like(attention, a);
  kernels().local_enhancement_forward({a, v, view(output, "output"), shape}, runtime());
  return output;
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> local_enhancement_bwd(TorchTensor grad_output, TorchTensor,
    TorchTensor value, TorchTensor weight, std::optional<TorchTensor> bias, int64_t grid_h, int64_t grid_w,
    int64_t num_prefix_tokens, int64_t size) {
  const Tensor v = view(value, "value"), g = like_value(grad_output, v, "grad_output");
  const LocalEnhancement shape = shape_of(v, weight, bias, grid_h, grid_w, num_prefix_tokens, size);
  const int64_t heads = v.size[1], head_dim = v.size[3];
  TorchTensor grad_value = empty_like(value, v), grad_weight = empty({heads, head_dim, size * size}, ScalarType::Float),
              grad_bias = bias ? empty({heads, head_dim}, ScalarType::Float) : empty({0}, ScalarType::Float);
  kernels().local_enhancement_backward(
      {g, v, view(grad_value, "grad_value"), static_cast<float*>(grad_weight.data_ptr()),
          bias ? static_cast<float*>(grad_bias.data_ptr()) : nullptr, shape},
      runtime());
  return {std::move(grad_value), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("local_enhancement_fwd", TORCH_BOX(&effattn::bindings::local_enhancement_fwd));
  m.impl("local_enhancement_bwd", TORCH_BOX(&effattn::bindings::local_enhancement_bwd));
}
