#include "tensors.h"

namespace effattn::bindings {
namespace {

int64_t words(int64_t length) { return (length + 31) / 32; }

// (B, rows, columns) as (1, B, rows, columns).
Tensor matrices(const TorchTensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, got ", tensor.dim());
  const Tensor matrices = view(tensor, name);
  STD_TORCH_CHECK(is_floating(matrices.dtype), name, " must be float32, bfloat16 or float16");
  return matrices;
}

TorchTensor pack_signs(TorchTensor input) {
  STD_TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions, got ", input.dim());
  const Tensor x = view(input, "input");
  STD_TORCH_CHECK(is_floating(x.dtype), "input must be float32, bfloat16 or float16");
  TorchTensor packed = empty({x.size[0], x.size[1], x.size[2], words(x.size[3])}, ScalarType::UInt32);
  kernels().pack_signs({x, static_cast<uint32_t*>(packed.data_ptr())}, runtime());
  return packed;
}

TorchTensor add_matmul_fwd(TorchTensor packed, TorchTensor dense, int64_t values) {
  const Tensor x = matrices(dense, "dense");
  STD_TORCH_CHECK(packed.dim() == 3, "packed must have 3 dimensions, got ", packed.dim());
  packed = torch::stable::contiguous(packed);
  const int64_t rows = packed.size(1);
  const uint32_t* bits = elements<uint32_t>(packed, ScalarType::UInt32, {x.size[1], rows, words(x.size[2])}, "packed");
  TorchTensor output = empty({x.size[1], rows, x.size[3]}, dense.scalar_type());
  kernels().add_matmul_forward({bits, x, view(output, "output"), values == 1}, runtime());
  return output;
}

TorchTensor add_matmul_bwd(TorchTensor grad_output, TorchTensor packed, int64_t length, int64_t values) {
  const Tensor g = matrices(grad_output, "grad_output");
  STD_TORCH_CHECK(length >= 0, "length must not be negative");
  packed = torch::stable::contiguous(packed);
  const uint32_t* bits =
      elements<uint32_t>(packed, ScalarType::UInt32, {g.size[1], g.size[2], words(length)}, "packed");
  TorchTensor grad_dense = empty({g.size[1], length, g.size[3]}, grad_output.scalar_type());
  kernels().add_matmul_backward({g, bits, view(grad_dense, "grad_dense"), values == 1}, runtime());
  return grad_dense;
}

TorchTensor binary_matmul(TorchTensor left, TorchTensor right, int64_t length, int64_t values) {
  STD_TORCH_CHECK(left.dim() == 3 && right.dim() == 3, "left and right must have 3 dimensions");
  STD_TORCH_CHECK(length >= 0 && length < int64_t{1} << 30, "length must be in 0..2^30 - 1, got ", length);
  left = torch::stable::contiguous(left), right = torch::stable::contiguous(right);
  const int64_t batches = left.size(0), rows = left.size(1), columns = right.size(1);
  const uint32_t* a = elements<uint32_t>(left, ScalarType::UInt32, {batches, rows, words(length)}, "left");
  const uint32_t* b = elements<uint32_t>(right, ScalarType::UInt32, {batches, columns, words(length)}, "right");
  TorchTensor output = empty({batches, rows, columns}, ScalarType::Int);
  kernels().binary_matmul(
      {a, b, static_cast<int32_t*>(output.data_ptr()), batches, rows, columns, length, values == 1}, runtime());
  return output;
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("pack_signs", TORCH_BOX(&effattn::bindings::pack_signs));
  m.impl("add_matmul_fwd", TORCH_BOX(&effattn::bindings::add_matmul_fwd));
  m.impl("add_matmul_bwd", TORCH_BOX(&effattn::bindings::add_matmul_bwd));
  m.impl("binary_matmul", TORCH_BOX(&effattn::bindings::binary_matmul));
}
