#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

int64_t words_of(int64_t head_dim) {
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= 256, "head_dim must be in 1..256, got ", head_dim);
  return (head_dim + 31) / 32;
}

std::tuple<TorchTensor, TorchTensor> hamming_attention_fwd(
    TorchTensor query_bits, TorchTensor key_bits, TorchTensor value, int64_t head_dim, int64_t values, double scale) {
  const Device device(value);
  STD_TORCH_CHECK(query_bits.dim() == 4 && key_bits.dim() == 4 && value.dim() == 4, "all tensors must be (B, H, N, D)");
  const Tensor v = view(device, value, "value");
  STD_TORCH_CHECK(v.size[3] >= 1 && v.size[3] <= 256, "Dv must be in 1..256, got ", v.size[3]);
  const int64_t queries = query_bits.size(2), words = words_of(head_dim);
  TorchTensor output = device.empty({v.size[0], v.size[1], queries, v.size[3]}, torch_dtype(v.dtype));
  TorchTensor logsumexp = device.empty({v.size[0], v.size[1], queries}, aoti_torch_dtype_float32());
  effattn::cuda::hamming_attention({contiguous_data<const uint32_t>(device, query_bits, ScalarType::UInt32,
                                        {v.size[0], v.size[1], queries, words}, "query_bits"),
                                       contiguous_data<const uint32_t>(device, key_bits, ScalarType::UInt32,
                                           {v.size[0], v.size[1], v.size[2], words}, "key_bits"),
                                       v, queries, static_cast<int>(head_dim), values == 1, static_cast<float>(scale),
                                       output.data_ptr(), static_cast<float*>(logsumexp.data_ptr())},
      device.stream());
  return {std::move(output), std::move(logsumexp)};
}

TorchTensor hamming_attention_bwd(TorchTensor grad_output, TorchTensor query_bits, TorchTensor key_bits, TorchTensor,
    int64_t head_dim, int64_t values, double scale) {  // logsumexp is not needed
  const Device device(grad_output);
  STD_TORCH_CHECK(
      query_bits.dim() == 4 && key_bits.dim() == 4 && grad_output.dim() == 4, "all tensors must be (B, H, N, D)");
  const Tensor g = view(device, grad_output, "grad_output");
  STD_TORCH_CHECK(g.size[3] >= 1 && g.size[3] <= 256, "Dv must be in 1..256, got ", g.size[3]);
  const int64_t keys = key_bits.size(2), words = words_of(head_dim);
  TorchTensor grad_value = device.empty({g.size[0], g.size[1], keys, g.size[3]}, torch_dtype(g.dtype));
  const effattn::cuda::HammingAttentionGradient arguments = {
      contiguous_data<const uint32_t>(
          device, query_bits, ScalarType::UInt32, {g.size[0], g.size[1], g.size[2], words}, "query_bits"),
      contiguous_data<const uint32_t>(
          device, key_bits, ScalarType::UInt32, {g.size[0], g.size[1], keys, words}, "key_bits"),
      g, keys, static_cast<int>(head_dim), values == 1, static_cast<float>(scale), grad_value.data_ptr()};
  TorchTensor workspace = device.workspace(effattn::cuda::hamming_attention_gradient_workspace(arguments));
  effattn::cuda::hamming_attention_gradient(arguments, workspace.data_ptr(), device.stream());
  return grad_value;
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("hamming_attention_fwd", TORCH_BOX(&effattn::bindings::cuda::hamming_attention_fwd));
  m.impl("hamming_attention_bwd", TORCH_BOX(&effattn::bindings::cuda::hamming_attention_bwd));
}
