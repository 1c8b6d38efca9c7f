#include "tensors.h"

namespace effattn::bindings {
namespace {

FeatureMap feature_map_of(const TorchTensor& x, const TorchTensor& projection, const std::optional<TorchTensor>& mask,
    bool trigonometric, bool normalize, int64_t shift) {
  const Tensor rows = view(x, "x");
  STD_TORCH_CHECK(is_floating(rows.dtype), "x must be floating point");
  STD_TORCH_CHECK(projection.dim() == 3 && projection.size(1) >= 1, "projection must be (H, M, D)");
  STD_TORCH_CHECK(shift >= 0 && shift <= static_cast<int64_t>(FeatureShift::kHead), "shift must be 0, 1 or 2");
  const int64_t directions = projection.size(1);
  return {rows,
      elements<const float>(projection, ScalarType::Float, {rows.size[1], directions, rows.size[3]}, "projection"),
      directions, mask ? elements<const bool>(*mask, ScalarType::Bool, {rows.size[0], rows.size[2]}, "mask") : nullptr,
      trigonometric, normalize, static_cast<FeatureShift>(shift)};
}

TorchTensor feature_map_fwd(TorchTensor x, TorchTensor projection, std::optional<TorchTensor> mask, bool trigonometric,
    bool normalize, int64_t shift) {
  const FeatureMap arguments = feature_map_of(x, projection, mask, trigonometric, normalize, shift);
  const Tensor& rows = arguments.x;
  TorchTensor features = empty(
      {rows.size[0], rows.size[1], rows.size[2], arguments.directions * (trigonometric ? 2 : 1)}, x.scalar_type());
  kernels(rows.dtype).feature_map_forward(arguments, view(features, "features"), runtime());
  return features;
}

std::tuple<TorchTensor, TorchTensor> feature_map_bwd(TorchTensor grad_features, TorchTensor x, TorchTensor projection,
    std::optional<TorchTensor> mask, TorchTensor features, bool trigonometric, bool normalize, int64_t shift) {
  const FeatureMap arguments = feature_map_of(x, projection, mask, trigonometric, normalize, shift);
  const Tensor &rows = arguments.x, g = view(grad_features, "grad_features"), f = view(features, "features");
  const int64_t columns = arguments.directions * (trigonometric ? 2 : 1);
  STD_TORCH_CHECK(g.dtype == rows.dtype && f.dtype == rows.dtype, "gradients and features must have the dtype of x");
  check_sizes(g, {rows.size[0], rows.size[1], rows.size[2], columns}, "grad_features");
  check_sizes(f, {rows.size[0], rows.size[1], rows.size[2], columns}, "features");
  TorchTensor grad_x = empty_like(x, rows),
              grad_projection = empty({rows.size[1], arguments.directions, rows.size[3]}, ScalarType::Float);
  kernels(rows.dtype)
      .feature_map_backward(
          arguments, {g, f, view(grad_x, "grad_x"), static_cast<float*>(grad_projection.data_ptr())}, runtime());
  return {std::move(grad_x), std::move(grad_projection)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("feature_map_fwd", TORCH_BOX(&effattn::bindings::feature_map_fwd));
  m.impl("feature_map_bwd", TORCH_BOX(&effattn::bindings::feature_map_bwd));
}
