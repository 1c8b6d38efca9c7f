#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::Activation;

int64_t row_bytes(int64_t features, int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 5, "bits must be in 2..5, got ", bits);
  return bits == 5 ? features : (features + 1) / 2;
}

// A vector of one float32 for every channel, or null.
const float* per_channel(const Device& device, std::optional<TorchTensor>& tensor, int64_t channels, const char* name) {
  return tensor ? contiguous_data<const float>(device, *tensor, ScalarType::Float, {channels}, name) : nullptr;
}

TorchTensor shift_linear_fwd(TorchTensor input, TorchTensor codes, std::optional<TorchTensor> scale,
    std::optional<TorchTensor> bias, int64_t bits, int64_t activation) {
  const Device device(input);
  STD_TORCH_CHECK(input.dim() == 2 && codes.dim() == 2, "input and codes must have two dimensions");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
  STD_TORCH_CHECK(activation != 1 || bits <= 4, "int8 activations need weights of at most 4 bits");
  STD_TORCH_CHECK(activation != 2 || !scale, "fixed16.16 activations take no scale");
  const Tensor x = view(device, input, "input");
  const int64_t rows = x.size[2], features = x.size[3], channels = codes.size(0);
  TorchTensor output = device.empty({rows, channels}, torch_dtype(x.dtype));
  const effattn::cuda::ShiftLinear arguments = {x,
      contiguous_data<const uint8_t>(device, codes, ScalarType::Byte, {channels, row_bytes(features, bits)}, "codes"),
      per_channel(device, scale, channels, "scale"), per_channel(device, bias, channels, "bias"), output.data_ptr(),
      channels, static_cast<int>(bits), static_cast<Activation>(activation)};
  TorchTensor workspace = device.workspace(effattn::cuda::shift_linear_workspace(arguments));
  effattn::cuda::shift_linear(arguments, workspace.data_ptr(), device.stream());
  return output;
}

TorchTensor shift_linear_bwd(
    TorchTensor grad_output, TorchTensor codes, std::optional<TorchTensor> scale, int64_t in_features, int64_t bits) {
  const Device device(grad_output);
  STD_TORCH_CHECK(grad_output.dim() == 2 && in_features >= 0, "grad_output must have two dimensions");
  const Tensor g = view(device, grad_output, "grad_output");
  const int64_t rows = g.size[2], channels = g.size[3];
  TorchTensor grad_input = device.empty({rows, in_features}, torch_dtype(g.dtype));
  const effattn::cuda::ShiftLinearGradient arguments = {g,
      contiguous_data<const uint8_t>(
          device, codes, ScalarType::Byte, {channels, row_bytes(in_features, bits)}, "codes"),
      per_channel(device, scale, channels, "scale"), grad_input.data_ptr(), in_features, static_cast<int>(bits)};
  TorchTensor workspace = device.workspace(effattn::cuda::shift_linear_gradient_workspace(arguments));
  effattn::cuda::shift_linear_gradient(arguments, workspace.data_ptr(), device.stream());
  return grad_input;
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("shift_linear_fwd", TORCH_BOX(&effattn::bindings::cuda::shift_linear_fwd));
  m.impl("shift_linear_bwd", TORCH_BOX(&effattn::bindings::cuda::shift_linear_bwd));
}
