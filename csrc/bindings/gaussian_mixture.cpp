#include "tensors.h"

namespace effattn::bindings {
namespace {

GaussianMixture mixture_of(const TorchTensor& alpha, const TorchTensor& sigma, int64_t heads, int64_t tokens,
    int64_t grid_h, int64_t grid_w, int64_t num_prefix_tokens, double eps) {
  STD_TORCH_CHECK(alpha.dim() == 2, "alpha must be (K, H)");
  STD_TORCH_CHECK(grid_h >= 0 && grid_w >= 0 && num_prefix_tokens >= 0 && grid_h * grid_w + num_prefix_tokens == tokens,
      "grid and prefix do not cover ", tokens, " tokens");
  const int64_t gaussians = alpha.size(0);
  if (grid_h == 0 || grid_w == 0) grid_h = grid_w = 0;  // only prefix tokens: 2 h - 1 rows of differences would be -1
  return {float_parameter(alpha, gaussians, heads, "alpha"), float_parameter(sigma, gaussians, heads, "sigma"),
      gaussians, grid_h, grid_w, num_prefix_tokens, eps};
}

std::tuple<TorchTensor, TorchTensor> gaussian_mixture_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    TorchTensor alpha, TorchTensor sigma, int64_t grid_h, int64_t grid_w, int64_t num_prefix_tokens, double eps,
    double scale) {
  Forward forward = prepare_forward(query, key, value, scale);
  const Tensor& q = forward.arguments.query;
  check_sizes(forward.arguments.key, {q.size[0], q.size[1], q.size[2], q.size[3]}, "key");
  const GaussianMixture mixture =
      mixture_of(alpha, sigma, q.size[1], q.size[2], grid_h, grid_w, num_prefix_tokens, eps);
  kernels(q.dtype).gaussian_mixture_forward(forward.arguments, mixture, runtime());
  return {std::move(forward.output), std::move(forward.logsumexp)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> gaussian_mixture_bwd(
    TorchTensor grad_output, TorchTensor query, TorchTensor key, TorchTensor value, TorchTensor alpha,
    TorchTensor sigma, TorchTensor output, TorchTensor logsumexp, int64_t grid_h, int64_t grid_w,
    int64_t num_prefix_tokens, double eps, double scale) {
  Backward backward = prepare_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Tensor& q = backward.arguments.query;
  check_sizes(backward.arguments.key, {q.size[0], q.size[1], q.size[2], q.size[3]}, "key");
  const GaussianMixture mixture =
      mixture_of(alpha, sigma, q.size[1], q.size[2], grid_h, grid_w, num_prefix_tokens, eps);
  const int64_t sizes[2] = {mixture.num_gaussians, q.size[1]}, strides[2] = {q.size[1], 1};
  TorchTensor grad_alpha = empty_strided(sizes, strides, 2, ScalarType::Float),
              grad_sigma = empty_strided(sizes, strides, 2, ScalarType::Float);
  const GaussianMixtureGrad gradient = {
      static_cast<float*>(grad_alpha.data_ptr()), static_cast<float*>(grad_sigma.data_ptr())};
  kernels(q.dtype).gaussian_mixture_backward(backward.arguments, mixture, gradient, runtime());
  return {std::move(backward.grad_query), std::move(backward.grad_key), std::move(backward.grad_value),
      std::move(grad_alpha), std::move(grad_sigma)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("gaussian_mixture_fwd", TORCH_BOX(&effattn::bindings::gaussian_mixture_fwd));
  m.impl("gaussian_mixture_bwd", TORCH_BOX(&effattn::bindings::gaussian_mixture_bwd));
}
