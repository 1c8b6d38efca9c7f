#include <limits>

#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::Toeplitz;
using effattn::cuda::ToeplitzGradient;

constexpr int64_t kMaxSize = 256;
constexpr int64_t kFft = 2, kDoubleFft = 3;  // codes of effattn/ops/toeplitz_methods.py

int64_t entries_of(int64_t grid_h, int64_t grid_w) {
  return grid_h > 0 && grid_w > 0 ? (2 * grid_h - 1) * (2 * grid_w - 1) : 0;
}

Tensor tokens_of(
    const Device& device, const TorchTensor& tensor, const Tensor& query, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must be (B, H, N, columns)");
  const Tensor x = view(device, tensor, name);
  STD_TORCH_CHECK(x.dtype == query.dtype, name, " and query must share one dtype");
  for (int d = 0; d < 3; ++d)
    STD_TORCH_CHECK(x.size[d] == query.size[d], name, " must have query's batch, heads and tokens");
  STD_TORCH_CHECK(x.size[3] == columns, name, " must have ", columns, " columns, got ", x.size[3]);
  return x;
}

// All but the results.
Toeplitz arguments_of(const Device& device, const TorchTensor& query, const TorchTensor& key, const TorchTensor& value,
    TorchTensor& bias, const std::optional<TorchTensor>& plan, int64_t grid_h, int64_t grid_w, bool is_causal,
    int64_t method, double eps) {
  STD_TORCH_CHECK(!plan, "the CUDA kernels take a method, not a plan");
  STD_TORCH_CHECK(query.dim() == 4 && value.dim() == 4, "query and value must be (B, H, N, columns)");
  const bool is_empty = query.numel() == 0;  // needs no method, and a plan then names none
  STD_TORCH_CHECK(is_empty || method == kFft || method == kDoubleFft, "the CUDA kernels have method 'fft' only");
  Toeplitz a = {};
  a.query = view(device, query, "query");
  a.key = tokens_of(device, key, a.query, a.query.size[3], "key");
  a.value = tokens_of(device, value, a.query, value.size(3), "value");
  STD_TORCH_CHECK(
      a.query.size[3] >= 1 && a.query.size[3] <= kMaxSize && a.value.size[3] >= 1 && a.value.size[3] <= kMaxSize,
      "features and value must have 1..", kMaxSize, " columns, got ", a.query.size[3], " and ", a.value.size[3]);
  STD_TORCH_CHECK(grid_h >= 0 && grid_w >= 0 && grid_h <= std::numeric_limits<int32_t>::max() &&
                      grid_w <= std::numeric_limits<int32_t>::max() && grid_h * grid_w == a.query.size[2],
      "grid does not cover ", a.query.size[2], " tokens");
  const int64_t entries = entries_of(grid_h, grid_w);
  STD_TORCH_CHECK(entries <= int64_t{1} << 29, "too many tokens for a transform: ", a.query.size[2]);
  a.bias = contiguous_data<const float>(device, bias, ScalarType::Float, {a.query.size[1], entries}, "bias");
  a.grid_h = grid_h;
  a.grid_w = grid_w;
  a.is_causal = is_causal;
  a.in_double = method == kDoubleFft;
  a.eps = eps;
  return a;
}

std::tuple<TorchTensor, TorchTensor> toeplitz_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    TorchTensor bias, std::optional<TorchTensor> plan, int64_t grid_h, int64_t grid_w, bool is_causal, int64_t method,
    double eps, bool) {
  const Device device(query);
  Toeplitz a = arguments_of(device, query, key, value, bias, plan, grid_h, grid_w, is_causal, method, eps);
  TorchTensor output = torch::stable::empty_like(value);
  TorchTensor normalizer =
      device.empty({a.query.size[0], a.query.size[1], a.query.size[2]}, aoti_torch_dtype_float32());
  a.output = view(device, output, "output");
  a.normalizer = static_cast<float*>(normalizer.data_ptr());
  TorchTensor workspace = device.workspace(effattn::cuda::toeplitz_fft_workspace(a));
  effattn::cuda::toeplitz_fft(a, workspace.data_ptr(), device.stream());
  return {std::move(output), std::move(normalizer)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> toeplitz_bwd(TorchTensor grad_output, TorchTensor query,
    TorchTensor key, TorchTensor value, TorchTensor bias, std::optional<TorchTensor> plan, TorchTensor output,
    TorchTensor normalizer, int64_t grid_h, int64_t grid_w, bool is_causal, int64_t method, double eps,
    bool needs_bias_gradient) {
  const Device device(query);
  ToeplitzGradient g = {};
  g.of = arguments_of(device, query, key, value, bias, plan, grid_h, grid_w, is_causal, method, eps);
  Toeplitz& a = g.of;
  g.grad_output = tokens_of(device, grad_output, a.query, a.value.size[3], "grad_output");
  a.output = tokens_of(device, output, a.query, a.value.size[3], "output");
  a.normalizer = contiguous_data<float>(
      device, normalizer, ScalarType::Float, {a.query.size[0], a.query.size[1], a.query.size[2]}, "normalizer");
  TorchTensor grad_query = torch::stable::empty_like(query), grad_key = torch::stable::empty_like(key),
              grad_value = torch::stable::empty_like(value);
  TorchTensor grad_bias = device.empty({a.query.size[1], entries_of(grid_h, grid_w)}, aoti_torch_dtype_float32());
  g.grad_query = view(device, grad_query, "grad_query");
  g.grad_key = view(device, grad_key, "grad_key");
  g.grad_value = view(device, grad_value, "grad_value");
  if (needs_bias_gradient)
    g.grad_bias = static_cast<float*>(grad_bias.data_ptr());
  else
    torch::stable::zero_(grad_bias);
  TorchTensor workspace = device.workspace(effattn::cuda::toeplitz_fft_gradient_workspace(g));
  effattn::cuda::toeplitz_fft_gradient(g, workspace.data_ptr(), device.stream());
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_bias)};
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("toeplitz_fwd", TORCH_BOX(&effattn::bindings::cuda::toeplitz_fwd));
  m.impl("toeplitz_bwd", TORCH_BOX(&effattn::bindings::cuda::toeplitz_bwd));
}
