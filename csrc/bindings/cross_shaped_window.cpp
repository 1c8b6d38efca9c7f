#include "tensors.h"

namespace effattn::bindings {
namespace {

const float* parameter_of(
    const std::optional<TorchTensor>& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  return tensor ? elements<const float>(*tensor, ScalarType::Float, sizes, name) : nullptr;
}

// The options of both ops, in the order of their schema.
struct WindowOptions {
  int64_t grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h, overlap_w;
  int64_t num_prefix_tokens;
  bool mask_padding, bias_weighs;

  Windows windows(const Tensor& query, const std::optional<TorchTensor>& bias,
      const std::optional<TorchTensor>& lepe_weight, const std::optional<TorchTensor>& lepe_bias) const {
    const int64_t heads = query.size[1], head_dim = query.size[3];
    STD_TORCH_CHECK(
        grid_h >= 0 && grid_w >= 0 && num_prefix_tokens >= 0 && grid_h * grid_w + num_prefix_tokens == query.size[2],
        "grid and prefix do not cover ", query.size[2], " tokens");
    const bool empty = query.size[2] == 0;
    for (const int64_t size : {window_h, window_w, second_h, second_w})
      STD_TORCH_CHECK(size >= (empty ? 0 : 1), "windows must not be empty");
    const bool same = window_h == second_h && window_w == second_w;
    STD_TORCH_CHECK(shift_h >= 0 && shift_w >= 0 && overlap_h >= 0 && overlap_w >= 0, "negative shift or overlap");
    STD_TORCH_CHECK(shift_h + shift_w == 0 ||
                        (same && shift_h < window_h && shift_w < window_w && overlap_h == 0 && overlap_w == 0),
        "a shift must be smaller than the one window of all heads, without overlap");
    STD_TORCH_CHECK(overlap_h + overlap_w == 0 || (same && !lepe_weight), "overlap goes with one window and no LePE");
    STD_TORCH_CHECK(!bias || same, "a bias goes with one window");
    STD_TORCH_CHECK(num_prefix_tokens == 0 || (same && window_h == grid_h && window_w == grid_w && shift_h == 0 &&
                                                  shift_w == 0 && overlap_h == 0 && overlap_w == 0 && !lepe_weight),
        "prefix tokens go with one window that is the grid, without shift, overlap and LePE");
    STD_TORCH_CHECK(bias || !bias_weighs, "bias_weighs goes with a bias");
    STD_TORCH_CHECK(lepe_weight || !lepe_bias, "lepe_bias goes with lepe_weight");
    const float* table =
        parameter_of(bias, {heads, 2 * window_h + 2 * overlap_h - 1, 2 * window_w + 2 * overlap_w - 1}, "bias");
    return {grid_h, grid_w, {window_h, second_h}, {window_w, second_w}, shift_h, shift_w, overlap_h, overlap_w,
        mask_padding, bias_weighs ? nullptr : table, parameter_of(lepe_weight, {heads, 9, head_dim}, "lepe_weight"),
        parameter_of(lepe_bias, {heads, head_dim}, "lepe_bias"), bias_weighs ? table : nullptr, num_prefix_tokens};
  }
};

void check_shapes(const Tensor& query, const Tensor& key) {
  check_sizes(key, {query.size[0], query.size[1], query.size[2], query.size[3]}, "key");
}

std::tuple<TorchTensor, TorchTensor> window_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    std::optional<TorchTensor> bias, std::optional<TorchTensor> lepe_weight, std::optional<TorchTensor> lepe_bias,
    int64_t grid_h, int64_t grid_w, int64_t window_h, int64_t window_w, int64_t second_h, int64_t second_w,
    int64_t shift_h, int64_t shift_w, int64_t overlap_h, int64_t overlap_w, int64_t num_prefix_tokens,
    bool mask_padding, bool bias_weighs, double scale) {
  Forward forward = prepare_forward(query, key, value, scale);
  const Tensor& q = forward.arguments.query;
  check_shapes(q, forward.arguments.key);
  const WindowOptions options = {grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h,
      overlap_w, num_prefix_tokens, mask_padding, bias_weighs};
  kernels(q.dtype).window_forward(forward.arguments, options.windows(q, bias, lepe_weight, lepe_bias), runtime());
  return {std::move(forward.output), std::move(forward.logsumexp)};
}

// A gradient like the parameter, of no elements where that is absent.
TorchTensor gradient_of(const std::optional<TorchTensor>& parameter, std::initializer_list<int64_t> sizes) {
  return parameter ? empty(sizes, ScalarType::Float) : empty({0}, ScalarType::Float);
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> window_bwd(
    TorchTensor grad_output, TorchTensor query, TorchTensor key, TorchTensor value, std::optional<TorchTensor> bias,
    std::optional<TorchTensor> lepe_weight, std::optional<TorchTensor> lepe_bias, TorchTensor output,
    TorchTensor logsumexp, int64_t grid_h, int64_t grid_w, int64_t window_h, int64_t window_w, int64_t second_h,
    int64_t second_w, int64_t shift_h, int64_t shift_w, int64_t overlap_h, int64_t overlap_w, int64_t num_prefix_tokens,
    bool mask_padding, bool bias_weighs, double scale) {
  Backward backward = prepare_backward(grad_output, query, key, value, output, logsumexp, scale);
  const Tensor& q = backward.arguments.query;
  check_shapes(q, backward.arguments.key);
  const WindowOptions options = {grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h,
      overlap_w, num_prefix_tokens, mask_padding, bias_weighs};
  const Windows windows = options.windows(q, bias, lepe_weight, lepe_bias);
  const int64_t heads = q.size[1], head_dim = q.size[3];
  TorchTensor grad_bias =
                  gradient_of(bias, {heads, 2 * window_h + 2 * overlap_h - 1, 2 * window_w + 2 * overlap_w - 1}),
              grad_weight = gradient_of(lepe_weight, {heads, 9, head_dim}),
              grad_lepe_bias = gradient_of(lepe_bias, {heads, head_dim});
  const auto data = [](const TorchTensor& gradient, bool given) {
    return given ? static_cast<float*>(gradient.data_ptr()) : nullptr;
  };
  const WindowsGrad gradient = {data(grad_bias, bias && !bias_weighs), data(grad_weight, lepe_weight.has_value()),
      data(grad_lepe_bias, lepe_bias.has_value()), data(grad_bias, bias && bias_weighs)};
  kernels(q.dtype).window_backward(backward.arguments, windows, gradient, runtime());
  return {std::move(backward.grad_query), std::move(backward.grad_key), std::move(backward.grad_value),
      std::move(grad_bias), std::move(grad_weight), std::move(grad_lepe_bias)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("window_fwd", TORCH_BOX(&effattn::bindings::window_fwd));
  m.impl("window_bwd", TORCH_BOX(&effattn::bindings::window_bwd));
}
