#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

int64_t words(int64_t bits) { return (bits + 31) / 32; }

bool is_sign(int64_t values) {
  STD_TORCH_CHECK(values == 0 || values == 1, "values must be 0 (binary) or 1 (sign), got ", values);
  return values == 1;
}

TorchTensor pack_signs(TorchTensor input) {
  const Device device(input);
  STD_TORCH_CHECK(input.dim() == 4, "input must be (B, H, N, D)");
  const Tensor x = view(device, input, "input");
  TorchTensor packed = device.empty({x.size[0], x.size[1], x.size[2], words(x.size[3])}, aoti_torch_dtype_uint32());
  effattn::cuda::pack_signs({x, static_cast<uint32_t*>(packed.data_ptr())}, device.stream());
  return packed;
}

TorchTensor multiply(
    const Device& device, TorchTensor packed, const TorchTensor& dense, int64_t rows, int64_t values, bool transposed) {
  const Tensor v = view(device, dense, "dense");
  const int64_t depth = v.size[2];
  STD_TORCH_CHECK(rows >= 0, "length must not be negative");
  TorchTensor product = device.empty({v.size[0], rows, v.size[3]}, torch_dtype(v.dtype));
  const uint32_t* bits = contiguous_data<const uint32_t>(device, packed, ScalarType::UInt32,
      {v.size[0], transposed ? depth : rows, words(transposed ? rows : depth)}, "packed");
  const effattn::cuda::AddMatmul arguments = {bits, v, product.data_ptr(), v.dtype, rows, is_sign(values), transposed};
  TorchTensor workspace = device.workspace(effattn::cuda::add_matmul_workspace(arguments));
  effattn::cuda::add_matmul(arguments, workspace.data_ptr(), device.stream());
  return product;
}

TorchTensor add_matmul_fwd(TorchTensor packed, TorchTensor dense, int64_t values) {
  const Device device(dense);
  STD_TORCH_CHECK(packed.dim() == 3 && dense.dim() == 3, "packed and dense must have three dimensions");
  return multiply(device, packed, dense, packed.size(1), values, false);
}

TorchTensor add_matmul_bwd(TorchTensor grad_output, TorchTensor packed, int64_t length, int64_t values) {
  const Device device(grad_output);
  STD_TORCH_CHECK(grad_output.dim() == 3, "grad_output must have three dimensions");
  return multiply(device, packed, grad_output, length, values, true);
}

TorchTensor binary_matmul(TorchTensor left, TorchTensor right, int64_t length, int64_t values) {
  const Device device(left);
  STD_TORCH_CHECK(left.dim() == 3 && right.dim() == 3 && length >= 0, "left and right must have three dimensions");
  const int64_t batch = left.size(0), rows = left.size(1), columns = right.size(1);
  TorchTensor product = device.empty({batch, rows, columns}, aoti_torch_dtype_int32());
  const uint32_t* l =
      contiguous_data<const uint32_t>(device, left, ScalarType::UInt32, {batch, rows, words(length)}, "left");
  const uint32_t* r =
      contiguous_data<const uint32_t>(device, right, ScalarType::UInt32, {batch, columns, words(length)}, "right");
  effattn::cuda::binary_matmul(
      {l, r, static_cast<int32_t*>(product.data_ptr()), batch, rows, columns, length, is_sign(values)},
      device.stream());
  return product;
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("pack_signs", TORCH_BOX(&effattn::bindings::cuda::pack_signs));
  m.impl("add_matmul_fwd", TORCH_BOX(&effattn::bindings::cuda::add_matmul_fwd));
  m.impl("add_matmul_bwd", TORCH_BOX(&effattn::bindings::cuda::add_matmul_bwd));
  m.impl("binary_matmul", TORCH_BOX(&effattn::bindings::cuda::binary_matmul));
}
