#include <limits>

#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::FeatureMap;
using effattn::cuda::FeatureShift;

constexpr int64_t kMaxWidth = 256;

FeatureMap arguments_of(const Device& device, const TorchTensor& x, TorchTensor& projection,
    std::optional<TorchTensor>& mask, bool trigonometric, bool normalize, int64_t shift) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be (B, H, N, D)");
  const Tensor rows = view(device, x, "x");
  STD_TORCH_CHECK(
      rows.size[3] >= 1 && rows.size[3] <= kMaxWidth, "x must have 1..", kMaxWidth, " columns, got ", rows.size[3]);
  STD_TORCH_CHECK(rows.size[2] <= std::numeric_limits<int32_t>::max() - 64, "too many rows: ", rows.size[2]);
  STD_TORCH_CHECK(projection.dim() == 3 && projection.size(1) >= 1 && projection.size(1) <= 1 << 20,
      "projection must be (H, M, D)");
  STD_TORCH_CHECK(shift >= 0 && shift <= static_cast<int64_t>(FeatureShift::kHead), "shift must be 0, 1 or 2");
  const int64_t directions = projection.size(1);
  const float* const data = contiguous_data<const float>(
      device, projection, ScalarType::Float, {rows.size[1], directions, rows.size[3]}, "projection");
  const bool* const masked =
      mask ? contiguous_data<const bool>(device, *mask, ScalarType::Bool, {rows.size[0], rows.size[2]}, "mask")
           : nullptr;
  return {rows, data, directions, masked, trigonometric, normalize, static_cast<FeatureShift>(shift)};
}

TorchTensor feature_map_fwd(TorchTensor x, TorchTensor projection, std::optional<TorchTensor> mask, bool trigonometric,
    bool normalize, int64_t shift) {
  const Device device(x);
  const FeatureMap a = arguments_of(device, x, projection, mask, trigonometric, normalize, shift);
  TorchTensor features = device.empty(
      {a.x.size[0], a.x.size[1], a.x.size[2], a.directions * (trigonometric ? 2 : 1)}, torch_dtype(a.x.dtype));
  TorchTensor workspace = device.workspace(effattn::cuda::feature_map_workspace(a));
  effattn::cuda::feature_map(a, view(device, features, "features"), workspace.data_ptr(), device.stream());
  return features;
}

std::tuple<TorchTensor, TorchTensor> feature_map_bwd(TorchTensor grad_features, TorchTensor x, TorchTensor projection,
    std::optional<TorchTensor> mask, TorchTensor features, bool trigonometric, bool normalize, int64_t shift) {
  const Device device(x);
  effattn::cuda::FeatureMapGradient g = {};
  g.of = arguments_of(device, x, projection, mask, trigonometric, normalize, shift);
  g.grad_features = view(device, grad_features, "grad_features");
  g.features = view(device, features, "features");
  const int64_t columns = g.of.directions * (trigonometric ? 2 : 1);
  for (const Tensor* tensor : {&g.grad_features, &g.features}) {
    STD_TORCH_CHECK(tensor->dtype == g.of.x.dtype, "gradients and features must have the dtype of x");
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(tensor->size[d] == (d < 3 ? g.of.x.size[d] : columns), "gradients must have the features' sizes");
  }
  TorchTensor grad_x = torch::stable::empty_like(x);
  TorchTensor grad_projection =
      device.empty({g.of.x.size[1], g.of.directions, g.of.x.size[3]}, aoti_torch_dtype_float32());
  g.grad_x = view(device, grad_x, "grad_x");
  g.grad_projection = static_cast<float*>(grad_projection.data_ptr());
  TorchTensor workspace = device.workspace(effattn::cuda::feature_map_gradient_workspace(g));
  effattn::cuda::feature_map_gradient(g, workspace.data_ptr(), device.stream());
  return {std::move(grad_x), std::move(grad_projection)};
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("feature_map_fwd", TORCH_BOX(&effattn::bindings::cuda::feature_map_fwd));
  m.impl("feature_map_bwd", TORCH_BOX(&effattn::bindings::cuda::feature_map_bwd));
}
