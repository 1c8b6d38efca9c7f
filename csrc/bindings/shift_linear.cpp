#include "tensors.h"

namespace effattn::bindings {
namespace {

struct Weights {
  const uint8_t* codes;
  const float* scale;
};

Weights weights_of(
    const TorchTensor& codes, const std::optional<TorchTensor>& scale, int64_t channels, int64_t length, int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 5, "bits must be in 2..5, got ", bits);
  return {elements<uint8_t>(codes, ScalarType::Byte, {channels, bits > 4 ? length : (length + 1) / 2}, "codes"),
      scale ? elements<float>(*scale, ScalarType::Float, {channels}, "scale") : nullptr};
}

Tensor matrix(const TorchTensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  const Tensor matrix = view(tensor, name);
  STD_TORCH_CHECK(is_floating(matrix.dtype), name, " must be float32, bfloat16 or float16");
  return matrix;
}

TorchTensor shift_linear_fwd(TorchTensor input, TorchTensor codes, std::optional<TorchTensor> scale,
    std::optional<TorchTensor> bias, int64_t bits, int64_t activation) {
  const Tensor x = matrix(input, "input");
  STD_TORCH_CHECK(codes.dim() == 2, "codes must have 2 dimensions, got ", codes.dim());
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0 (float), 1 (int8) or 2 (fixed16.16)");
  STD_TORCH_CHECK(activation != 1 || bits <= 4, "int8 activations need a weight of at most 4 bits");
  STD_TORCH_CHECK(activation != 2 || !scale, "fixed16.16 activations take no scale");
  const int64_t channels = codes.size(0);
  const Weights weights = weights_of(codes, scale, channels, x.size[3], bits);
  const float* offset = bias ? elements<float>(*bias, ScalarType::Float, {channels}, "bias") : nullptr;
  TorchTensor output = empty({x.size[2], channels}, input.scalar_type());
  kernels().shift_linear_forward({x, weights.codes, weights.scale, offset, view(output, "output"),
                                     static_cast<int>(bits), static_cast<ShiftActivation>(activation)},
      runtime());
  return output;
}

TorchTensor shift_linear_bwd(
    TorchTensor grad_output, TorchTensor codes, std::optional<TorchTensor> scale, int64_t in_features, int64_t bits) {
  const Tensor g = matrix(grad_output, "grad_output");
  const Weights weights = weights_of(codes, scale, g.size[3], in_features, bits);
  TorchTensor grad_input = empty({g.size[2], in_features}, grad_output.scalar_type());
  kernels().shift_linear_backward(
      {g, weights.codes, weights.scale, view(grad_input, "grad_input"), static_cast<int>(bits)}, runtime());
  return grad_input;
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("shift_linear_fwd", TORCH_BOX(&effattn::bindings::shift_linear_fwd));
  m.impl("shift_linear_bwd", TORCH_BOX(&effattn::bindings::shift_linear_bwd));
}
