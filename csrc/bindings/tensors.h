// Between torch tensors and kernel arguments. All checks here guard memory; what a user can get wrong is reported by
// the Python front.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../cpu/api.h"

namespace effattn::bindings {

using TorchTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline DType dtype_of(const TorchTensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::UInt32:
      return DType::kUInt32;
    default:
      STD_TORCH_CHECK(false, name, " has an element type that the CPU kernels do not know");
  }
  return DType::kFloat32;
}

inline bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

// A view of up to four dimensions; missing leading ones have size 1 and stride 0.
inline Tensor view(const TorchTensor& tensor, const char* name) {
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 4, name, " must have 1 to 4 dimensions, got ", dims);
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  Tensor view = {tensor.data_ptr(), {1, 1, 1, 1}, {0, 0, 0, 0}, dtype_of(tensor, name)};
  for (int64_t d = 0; d < dims; ++d) {
    view.size[4 - dims + d] = sizes[d];
    view.stride[4 - dims + d] = strides[d];
  }
  return view;
}

inline void check_sizes(const Tensor& tensor, const std::array<int64_t, 4>& wanted, const char* name) {
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size[d] == wanted[d], name, " has size ", tensor.size[d], " where ", wanted[d],
        " is needed (dimension ", d, " of 4)");
}

inline int32_t shim_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::UInt32:
      return aoti_torch_dtype_uint32();
    default:
      STD_TORCH_CHECK(false, "no kernel allocates this element type");
  }
  return 0;
}

inline TorchTensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, shim_dtype(type), aoti_torch_device_type_cpu(), 0, &handle));
  return TorchTensor(handle);
}

// Fresh memory is faulted in page by page while a kernel writes it, which takes longer than the writing: for outputs of
// some megabytes the system is asked for pages of 2 MB instead. It may decline.
inline void ask_for_huge_pages(const TorchTensor& tensor, int64_t count) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(count) * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (begin != 0 && end - begin >= 2 * kPage && last > first)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A new contiguous tensor.
inline TorchTensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[8];
  STD_TORCH_CHECK(sizes.size() <= 8, "at most 8 dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes.begin()[d] > 0 ? sizes.begin()[d] : 1;
  }
  TorchTensor tensor = empty_strided(sizes.begin(), strides, static_cast<int64_t>(sizes.size()), type);
  ask_for_huge_pages(tensor, stride);
  return tensor;
}

// The elements of a contiguous CPU tensor of this type and these sizes.
template <class T>
inline T* elements(const TorchTensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous(), name,
      " must be a contiguous CPU tensor of the kernel's element type");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " dimensions");
  int64_t d = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(
        tensor.size(d) == size, name, " has size ", tensor.size(d), " where ", size, " is needed (dimension ", d, ")");
    ++d;
  }
  return static_cast<T*>(tensor.data_ptr());
}

// torch.empty_like: the strides of a dense tensor are kept. Only what is not dense takes the slow way through the
// dispatcher.
inline TorchTensor empty_like(const TorchTensor& tensor, const Tensor& view) {
  int64_t expected = 1;
  bool used[4] = {};
  for (int step = 0; step < 4; ++step) {
    int next = -1;
    for (int d = 3; d >= 0 && next < 0; --d)
      if (!used[d] && (view.size[d] == 1 || view.stride[d] == expected)) next = d;
    if (next < 0 || view.size[next] == 0) {
      TorchTensor like = torch::stable::empty_like(tensor);
      ask_for_huge_pages(like, like.numel());
      return like;
    }
    used[next] = true;
    expected *= view.size[next];
  }
  const int64_t dims = tensor.dim();
  TorchTensor like = empty_strided(view.size + 4 - dims, view.stride + 4 - dims, dims, tensor.scalar_type());
  ask_for_huge_pages(like, expected);
  return like;
}

inline Runtime runtime() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {
      static_cast<int>(threads), [](int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
        TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, function, context));
      }};
}

struct Forward {
  AttentionForward arguments;
  TorchTensor output, logsumexp;
};

inline Forward prepare_forward(
    const TorchTensor& query, const TorchTensor& key, const TorchTensor& value, double scale) {
  const Tensor q = view(query, "query"), k = view(key, "key"), v = view(value, "value");
  STD_TORCH_CHECK(is_floating(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype,
      "query, key and value must share one floating dtype");
  STD_TORCH_CHECK(q.size[3] >= 1 && q.size[3] <= 256, "head_dim must be in 1..256, got ", q.size[3]);
  check_sizes(k, {q.size[0], k.size[1], k.size[2], q.size[3]}, "key");
  check_sizes(v, {q.size[0], k.size[1], k.size[2], q.size[3]}, "value");
  STD_TORCH_CHECK(q.size[1] == 0 || (k.size[1] > 0 && q.size[1] % k.size[1] == 0),
      "heads of query must be a multiple of heads of key");
  TorchTensor output = empty_like(query, q);
  const int64_t sizes[3] = {q.size[0], q.size[1], q.size[2]};
  const int64_t strides[3] = {q.size[1] * q.size[2], q.size[2], 1};
  TorchTensor logsumexp = empty_strided(sizes, strides, 3, ScalarType::Float);
  const AttentionForward arguments = {
      q, k, v, view(output, "output"), static_cast<float*>(logsumexp.data_ptr()), static_cast<float>(scale)};
  return {arguments, std::move(output), std::move(logsumexp)};
}

struct Backward {
  AttentionBackward arguments;
  TorchTensor grad_query, grad_key, grad_value;
};

inline Backward prepare_backward(const TorchTensor& grad_output, const TorchTensor& query, const TorchTensor& key,
    const TorchTensor& value, const TorchTensor& output, const TorchTensor& logsumexp, double scale) {
  const Tensor g = view(grad_output, "grad_output"), q = view(query, "query"), k = view(key, "key"),
               v = view(value, "value"), o = view(output, "output");
  STD_TORCH_CHECK(
      is_floating(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype && o.dtype == q.dtype && g.dtype == q.dtype,
      "query, key, value, output and grad_output must share one floating dtype");
  STD_TORCH_CHECK(q.size[3] >= 1 && q.size[3] <= 256, "head_dim must be in 1..256, got ", q.size[3]);
  check_sizes(k, {q.size[0], k.size[1], k.size[2], q.size[3]}, "key");
  check_sizes(v, {q.size[0], k.size[1], k.size[2], q.size[3]}, "value");
  check_sizes(o, {q.size[0], q.size[1], q.size[2], q.size[3]}, "output");
  check_sizes(g, {q.size[0], q.size[1], q.size[2], q.size[3]}, "grad_output");
  STD_TORCH_CHECK(q.size[1] == 0 || (k.size[1] > 0 && q.size[1] % k.size[1] == 0),
      "heads of query must be a multiple of heads of key");
  STD_TORCH_CHECK(logsumexp.is_cpu() && logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_contiguous() &&
                      logsumexp.dim() == 3 && logsumexp.size(0) == q.size[0] && logsumexp.size(1) == q.size[1] &&
                      logsumexp.size(2) == q.size[2],
      "logsumexp must be a contiguous float32 (B, H, N) CPU tensor");
  TorchTensor grad_query = empty_like(query, q), grad_key = empty_like(key, k), grad_value = empty_like(value, v);
  const AttentionBackward arguments = {g, q, k, v, o, static_cast<const float*>(logsumexp.data_ptr()),
      view(grad_query, "grad_query"), view(grad_key, "grad_key"), view(grad_value, "grad_value"),
      static_cast<float>(scale)};
  return {arguments, std::move(grad_query), std::move(grad_key), std::move(grad_value)};
}

inline const float* float_parameter(const TorchTensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
      " must be a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be ", rows,
      " x ", columns);
  return static_cast<const float*>(tensor.data_ptr());
}

}  // namespace effattn::bindings
