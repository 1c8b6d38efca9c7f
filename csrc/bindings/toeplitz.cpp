#include <string.h>

#include "tensors.h"

namespace effattn::bindings {
namespace {

constexpr int64_t kMaxSize = 256;

int64_t entries_of(int64_t grid_h, int64_t grid_w) {
  return grid_h > 0 && grid_w > 0 ? (2 * grid_h - 1) * (2 * grid_w - 1) : 0;
}

Toeplitz toeplitz_of(const TorchTensor& query, const TorchTensor& key, const TorchTensor& value,
    const TorchTensor& bias, int64_t grid_h, int64_t grid_w, bool is_causal, double eps, bool wants_bias) {
  const Tensor q = view(query, "query"), k = view(key, "key"), v = view(value, "value");
  STD_TORCH_CHECK(is_floating(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype,
      "query, key and value must share one floating dtype");
  STD_TORCH_CHECK(q.size[3] >= 1 && q.size[3] <= kMaxSize && v.size[3] >= 1 && v.size[3] <= kMaxSize,
      "features and value must have 1..", kMaxSize, " columns, got ", q.size[3], " and ", v.size[3]);
  check_sizes(k, {q.size[0], q.size[1], q.size[2], q.size[3]}, "key");
  check_sizes(v, {q.size[0], q.size[1], q.size[2], v.size[3]}, "value");
  STD_TORCH_CHECK(
      grid_h >= 0 && grid_w >= 0 && grid_h * grid_w == q.size[2], "grid does not cover ", q.size[2], " tokens");
  return {q, k, v, elements<const float>(bias, ScalarType::Float, {q.size[1], entries_of(grid_h, grid_w)}, "bias"),
      grid_h, grid_w, is_causal, eps, wants_bias};
}

ToeplitzMethod method_of(const std::optional<TorchTensor>& plan, int64_t method) {
  if (plan) method = *elements<int64_t>(*plan, ScalarType::Long, {1}, "plan");
  STD_TORCH_CHECK(method >= static_cast<int64_t>(ToeplitzMethod::kDirect) &&
                      method <= static_cast<int64_t>(ToeplitzMethod::kStructured),
      "no method serves this call: method 'structured' needs a bias that is linear or constant beyond some distance, "
      "method 'fft' one of a smaller range");
  return static_cast<ToeplitzMethod>(method);
}

std::tuple<TorchTensor, TorchTensor> toeplitz_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    TorchTensor bias, std::optional<TorchTensor> plan, int64_t grid_h, int64_t grid_w, bool is_causal, int64_t method,
    double eps, bool needs_bias_gradient) {
  const Toeplitz arguments = toeplitz_of(query, key, value, bias, grid_h, grid_w, is_causal, eps, needs_bias_gradient);
  const Tensor& q = arguments.query;
  TorchTensor output = empty_like(value, arguments.value),
              normalizer = empty({q.size[0], q.size[1], q.size[2]}, ScalarType::Float);
  const ToeplitzResult result = {view(output, "output"), static_cast<float*>(normalizer.data_ptr())};
  const Kernels& kernel = kernels(q.dtype);
  switch (method_of(plan, method)) {
    case ToeplitzMethod::kStructured:
      kernel.toeplitz_structured_forward(arguments, result, runtime());
      break;
    case ToeplitzMethod::kFft:
      kernel.toeplitz_fft_forward(arguments, result, false, runtime());
      break;
    case ToeplitzMethod::kDoubleFft:
      kernel.toeplitz_fft_forward(arguments, result, true, runtime());
      break;
    default:
      kernel.toeplitz_direct_forward(arguments, result, runtime());
  }
  return {std::move(output), std::move(normalizer)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> toeplitz_bwd(TorchTensor grad_output, TorchTensor query,
    TorchTensor key, TorchTensor value, TorchTensor bias, std::optional<TorchTensor> plan, TorchTensor output,
    TorchTensor normalizer, int64_t grid_h, int64_t grid_w, bool is_causal, int64_t method, double eps,
    bool needs_bias_gradient) {
  const Toeplitz arguments = toeplitz_of(query, key, value, bias, grid_h, grid_w, is_causal, eps, needs_bias_gradient);
  const Tensor &q = arguments.query, &v = arguments.value, g = view(grad_output, "grad_output"),
               o = view(output, "output");
  STD_TORCH_CHECK(g.dtype == v.dtype && o.dtype == v.dtype, "grad_output and output must have the dtype of value");
  check_sizes(g, {q.size[0], q.size[1], q.size[2], v.size[3]}, "grad_output");
  check_sizes(o, {q.size[0], q.size[1], q.size[2], v.size[3]}, "output");
  TorchTensor grad_query = empty_like(query, q), grad_key = empty_like(key, arguments.key),
              grad_value = empty_like(value, v),
              grad_bias = empty({q.size[1], entries_of(grid_h, grid_w)}, ScalarType::Float);
  if (!needs_bias_gradient)
    memset(grad_bias.data_ptr(), 0, static_cast<size_t>(q.size[1] * entries_of(grid_h, grid_w)) * sizeof(float));
  const ToeplitzGrad gradient = {g, o,
      elements<const float>(normalizer, ScalarType::Float, {q.size[0], q.size[1], q.size[2]}, "normalizer"),
      view(grad_query, "grad_query"), view(grad_key, "grad_key"), view(grad_value, "grad_value"),
      static_cast<float*>(grad_bias.data_ptr())};
  const Kernels& kernel = kernels(q.dtype);
  switch (method_of(plan, method)) {
    case ToeplitzMethod::kStructured:
      kernel.toeplitz_structured_backward(arguments, gradient, runtime());
      break;
    case ToeplitzMethod::kFft:
      kernel.toeplitz_fft_backward(arguments, gradient, false, runtime());
      break;
    case ToeplitzMethod::kDoubleFft:
      kernel.toeplitz_fft_backward(arguments, gradient, true, runtime());
      break;
    default:
      kernel.toeplitz_direct_backward(arguments, gradient, runtime());
  }
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_bias)};
}

std::tuple<TorchTensor, TorchTensor> toeplitz_plan(TorchTensor bias, int64_t batch, int64_t features, int64_t value_dim,
    int64_t grid_h, int64_t grid_w, bool is_causal, int64_t requested, double tolerance, double direct_ns,
    double fft_ns, double double_fft_ns, double scan_ns) {
  STD_TORCH_CHECK(bias.dim() == 2 && grid_h >= 0 && grid_w >= 0 && batch >= 0 && features >= 0 && value_dim >= 0,
      "bias must be (H, entries) and no size negative");
  STD_TORCH_CHECK(requested >= 0 && requested <= static_cast<int64_t>(ToeplitzRequest::kStructured),
      "requested must be the index of a method, got ", requested);
  const int64_t heads = bias.size(0);
  const ToeplitzPlanning planning = {
      elements<const float>(bias, ScalarType::Float, {heads, entries_of(grid_h, grid_w)}, "bias"), batch, heads,
      features, value_dim, grid_h, grid_w, is_causal, static_cast<ToeplitzRequest>(requested), tolerance,
      {direct_ns, fft_ns, double_fft_ns, scan_ns}};
  ToeplitzPlan plan = {};
  kernels().toeplitz_plan(planning, plan, runtime());
  TorchTensor method = empty({1}, ScalarType::Long), report = empty({8}, ScalarType::Double);
  *static_cast<int64_t*>(method.data_ptr()) = static_cast<int64_t>(plan.method);
  double* to = static_cast<double*>(report.data_ptr());
  for (const double value : {plan.seconds[0], plan.seconds[1], plan.seconds[2], plan.seconds[3], plan.fft_error,
           plan.double_fft_error, plan.tail, plan.range})
    *to++ = value;
  return {std::move(method), std::move(report)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("toeplitz_fwd", TORCH_BOX(&effattn::bindings::toeplitz_fwd));
  m.impl("toeplitz_bwd", TORCH_BOX(&effattn::bindings::toeplitz_bwd));
  m.impl("toeplitz_plan", TORCH_BOX(&effattn::bindings::toeplitz_plan));
}
