#include "tensors.h"

namespace effattn::bindings {
namespace {

struct Residual {
  const float* weight;
  int64_t taps;
};

Residual residual_of(const std::optional<TorchTensor>& weight, int64_t heads) {
  if (!weight) return {nullptr, 0};
  STD_TORCH_CHECK(weight->dim() == 2 && weight->size(1) % 2 == 1, "residual_weight must be (H, odd)");
  return {float_parameter(*weight, heads, weight->size(1), "residual_weight"), weight->size(1)};
}

Binarize binarize_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(Binarize::kSign), "unknown binarize ", value);
  return static_cast<Binarize>(value);
}

void check_inputs(const Tensor& query, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(other.dtype == query.dtype, name, " must have the dtype of query");
  check_sizes(other, {query.size[0], query.size[1], query.size[2], query.size[3]}, name);
}

Tensor query_of(const TorchTensor& query) {
  const Tensor q = view(query, "query");
  STD_TORCH_CHECK(query.dim() == 4 && q.dtype != DType::kBool, "query must be a floating (B, H, N, D) tensor");
  STD_TORCH_CHECK(q.size[3] >= 1 && q.size[3] <= 256, "head_dim must be in 1..256, got ", q.size[3]);
  return q;
}

TorchTensor contiguous(const std::array<int64_t, 4>& sizes, int64_t dims) {
  std::array<int64_t, 4> strides = {};
  int64_t step = 1;
  for (int64_t d = dims; d-- > 0; step *= sizes[d]) strides[d] = step;
  return empty_strided(sizes.data(), strides.data(), dims, ScalarType::Float);
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> shift_add_attention_fwd(TorchTensor query, TorchTensor key,
    TorchTensor value, std::optional<TorchTensor> residual_weight, int64_t binarize) {
  const Tensor q = query_of(query), k = view(key, "key"), v = view(value, "value");
  check_inputs(q, k, "key");
  check_inputs(q, v, "value");
  const Residual residual = residual_of(residual_weight, q.size[1]);
  TorchTensor output = empty_like(query, q), context = contiguous({q.size[0], q.size[1], q.size[3], q.size[3]}, 4),
              statistics = contiguous({q.size[0], q.size[1], 4}, 3);
  kernels(q.dtype).shift_add_attention_forward(
      {q, k, v, view(output, "output"), residual.weight, residual.taps, static_cast<float*>(context.data_ptr()),
          static_cast<float*>(statistics.data_ptr()), binarize_of(binarize)},
      runtime());
  return {std::move(output), std::move(context), std::move(statistics)};
}

const float* saved(const TorchTensor& tensor, const std::array<int64_t, 4>& sizes, int64_t dims, const char* name) {
  bool fits =
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.dim() == dims;
  for (int64_t d = 0; d < dims && fits; ++d) fits = tensor.size(d) == sizes[d];
  STD_TORCH_CHECK(fits, name, " is not what the forward pass gave");
  return static_cast<const float*>(tensor.data_ptr());
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> shift_add_attention_bwd(TorchTensor grad_output,
    TorchTensor query, TorchTensor key, TorchTensor value, std::optional<TorchTensor> residual_weight,
    TorchTensor context, TorchTensor statistics, int64_t binarize) {
  const Tensor q = query_of(query), k = view(key, "key"), v = view(value, "value"),
               g = view(grad_output, "grad_output");
  check_inputs(q, k, "key");
  check_inputs(q, v, "value");
  check_inputs(q, g, "grad_output");
  const Residual residual = residual_of(residual_weight, q.size[1]);
  TorchTensor grad_query = empty_like(query, q), grad_key = empty_like(key, k), grad_value = empty_like(value, v),
              grad_weight = residual_weight ? contiguous({q.size[1], residual.taps}, 2) : contiguous({0}, 1);
  kernels(q.dtype).shift_add_attention_backward(
      {g, q, k, v, residual.weight, residual.taps,
          saved(context, {q.size[0], q.size[1], q.size[3], q.size[3]}, 4, "context"),
          saved(statistics, {q.size[0], q.size[1], 4}, 3, "statistics"), view(grad_query, "grad_query"),
          view(grad_key, "grad_key"), view(grad_value, "grad_value"), static_cast<float*>(grad_weight.data_ptr()),
          binarize_of(binarize)},
      runtime());
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_weight)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("shift_add_attention_fwd", TORCH_BOX(&effattn::bindings::shift_add_attention_fwd));
  m.impl("shift_add_attention_bwd", TORCH_BOX(&effattn::bindings::shift_add_attention_bwd));
}
