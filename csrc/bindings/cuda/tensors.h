// Between torch tensors and the arguments of the CUDA kernels. All checks here guard memory; what a user can get wrong
// is reported by the Python front.
//
// EFFATTN_CUDA_EMULATED: the kernels run on the host, tensors live in CPU memory and there is no stream.
#pragma once

#ifndef EFFATTN_CUDA_NAMESPACE
#define EFFATTN_CUDA_NAMESPACE effattn
#endif
#ifndef EFFATTN_CUDA_KEY
#define EFFATTN_CUDA_KEY CUDA
#endif
#if !defined(EFFATTN_CUDA_EMULATED) && !defined(USE_CUDA)
#define USE_CUDA  // shim.h declares what concerns CUDA only then
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "../../cuda/api.h"

namespace effattn::bindings::cuda {

using TorchTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

// The device of a call, current while this object lives: where outputs are allocated and kernels run.
class Device {
 public:
  explicit Device(const TorchTensor& tensor)
      : index_(tensor.get_device_index())
#ifndef EFFATTN_CUDA_EMULATED
        ,
        guard_(index_)
#endif
  {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type_));
#ifndef EFFATTN_CUDA_EMULATED
    STD_TORCH_CHECK(type_ == aoti_torch_device_type_cuda(), "tensors must be on a CUDA device");
#endif
  }

  void* stream() const {
    void* stream = nullptr;
#ifndef EFFATTN_CUDA_EMULATED
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
#endif
    return stream;
  }

  void check_holds(const TorchTensor& tensor, const char* name) const {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    STD_TORCH_CHECK(type == type_ && tensor.get_device_index() == index_, name, " is on another device");
  }

  // Contiguous, not initialised.
  TorchTensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) const {
    int64_t strides[4] = {}, next = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = next;
      next *= sizes.begin()[d];
    }
    return empty_strided(sizes.begin(), strides, static_cast<int64_t>(sizes.size()), dtype);
  }
  TorchTensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype) const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, type_, index_, &handle));
    return TorchTensor(handle);
  }

  // Scratch memory. The caching allocator may reuse it once the current stream has passed, so it can be dropped after
  // the launches.
  TorchTensor workspace(int64_t bytes) const { return empty({bytes}, aoti_torch_dtype_uint8()); }

 private:
  int32_t index_, type_ = 0;
#ifndef EFFATTN_CUDA_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline DType dtype_of(const TorchTensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " has an element type that the CUDA kernels do not know");
  }
  return DType::kFloat32;
}

inline int32_t torch_dtype(DType dtype) {
  return dtype == DType::kFloat32    ? aoti_torch_dtype_float32()
         : dtype == DType::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                     : aoti_torch_dtype_float16();
}

// A floating tensor of two to four dimensions as (B, H, N, D); missing leading ones have size 1. Of three dimensions
// the first is B.
inline Tensor view(const Device& device, const TorchTensor& tensor, const char* name) {
  device.check_holds(tensor, name);
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dims >= 2 && dims <= 4, name, " must have 2 to 4 dimensions, got ", dims);
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  Tensor view = {tensor.data_ptr(), {1, 1, 1, 1}, {0, 0, 0, 0}, dtype_of(tensor, name)};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t to = dims == 3 && d == 0 ? 0 : 4 - dims + d;
    view.size[to] = sizes[d];
    view.stride[to] = strides[d];
  }
  return view;
}

// The data of a tensor of this element type and these sizes; contiguous, if need be by a copy that `tensor` then holds.
template <class T>
T* contiguous_data(const Device& device, TorchTensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes,
    const char* name) {
  device.check_holds(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong element type");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " has the wrong number of dimensions");
  for (size_t d = 0; d < sizes.size(); ++d)
    STD_TORCH_CHECK(tensor.size(d) == sizes.begin()[d], name, " has size ", tensor.size(d), " where ", sizes.begin()[d],
        " is needed (dimension ", d, ")");
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace effattn::bindings::cuda
