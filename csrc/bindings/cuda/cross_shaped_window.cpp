#include <limits>

#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::WindowAttention;

constexpr int64_t kMaxHeadDim = 64, kMostSlots = 1 << 27, kMostSlotsOfBiasGradient = 1024;

Tensor tokens_of(const Device& device, const TorchTensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must be (B, H, N, D)");
  const Tensor x = view(device, tensor, name);
  STD_TORCH_CHECK(x.dtype == query.dtype, name, " and query must share one dtype");
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(x.size[d] == query.size[d], name, " must have query's shape");
  return x;
}

// The options of both ops, in the order of their schema.
struct WindowOptions {
  int64_t grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h, overlap_w;
  int64_t num_prefix_tokens;
  bool mask_padding, bias_weighs;
  double scale;
};

// All but the results. Parameters are made contiguous in place.
WindowAttention arguments_of(const Device& device, const TorchTensor& query, const TorchTensor& key,
    const TorchTensor& value, std::optional<TorchTensor>& bias, std::optional<TorchTensor>& lepe_weight,
    std::optional<TorchTensor>& lepe_bias, const WindowOptions& o) {
  WindowAttention a = {};
  a.query = view(device, query, "query");
  STD_TORCH_CHECK(query.dim() == 4, "query must be (B, H, N, D)");
  STD_TORCH_CHECK(a.query.dtype != DType::kFloat32, "the CUDA kernels of windows take bfloat16 and float16");
  a.key = tokens_of(device, key, a.query, "key");
  a.value = tokens_of(device, value, a.query, "value");
  const int64_t heads = a.query.size[1], tokens = a.query.size[2], head_dim = a.query.size[3];
  STD_TORCH_CHECK(head_dim <= kMaxHeadDim, "head_dim must be at most ", kMaxHeadDim, ", got ", head_dim);
  STD_TORCH_CHECK(a.query.size[0] <= std::numeric_limits<int32_t>::max() &&
                      heads <= std::numeric_limits<int32_t>::max() && tokens <= std::numeric_limits<int32_t>::max(),
      "more than 2^31 - 1 images, heads or tokens");
  STD_TORCH_CHECK(o.grid_h >= 0 && o.grid_w >= 0 && o.grid_h <= std::numeric_limits<int32_t>::max() &&
                      o.grid_w <= std::numeric_limits<int32_t>::max() && o.grid_h * o.grid_w == tokens,
      "grid does not cover ", tokens, " tokens");
  const bool empty = tokens == 0;
  for (const int64_t size : {o.window_h, o.window_w, o.second_h, o.second_w})
    STD_TORCH_CHECK(
        size >= (empty ? 0 : 1) && size <= kMostSlots, "windows must have 1..", kMostSlots, " tokens a side");
  STD_TORCH_CHECK(o.window_h * o.window_w <= kMostSlots && o.second_h * o.second_w <= kMostSlots,
      "windows must have at most ", kMostSlots, " tokens");
  const bool same = o.window_h == o.second_h && o.window_w == o.second_w;
  STD_TORCH_CHECK(o.shift_h >= 0 && o.shift_w >= 0 &&
                      (o.shift_h + o.shift_w == 0 || (same && o.shift_h < o.window_h && o.shift_w < o.window_w)),
      "a shift must be smaller than the one window of all heads");
  STD_TORCH_CHECK(!bias || same, "a bias goes with one window");
  STD_TORCH_CHECK(lepe_weight || !lepe_bias, "lepe_bias goes with lepe_weight");
  STD_TORCH_CHECK(o.overlap_h == 0 && o.overlap_w == 0 && o.num_prefix_tokens == 0 && !o.bias_weighs,
      "the CUDA kernels of windows have no overlap, prefix tokens or bias that weighs");
  a.grid_h = o.grid_h;
  a.grid_w = o.grid_w;
  a.window_h[0] = o.window_h;
  a.window_h[1] = o.second_h;
  a.window_w[0] = o.window_w;
  a.window_w[1] = o.second_w;
  a.shift_h = o.shift_h;
  a.shift_w = o.shift_w;
  a.mask_padding = o.mask_padding;
  a.scale = static_cast<float>(o.scale);
  const auto parameter = [&](std::optional<TorchTensor>& tensor, std::initializer_list<int64_t> sizes,
                             const char* name) -> const float* {
    return tensor ? contiguous_data<const float>(device, *tensor, ScalarType::Float, sizes, name) : nullptr;
  };
  if (!empty) a.bias = parameter(bias, {heads, 2 * o.window_h - 1, 2 * o.window_w - 1}, "bias");
  a.lepe_weight = parameter(lepe_weight, {heads, 9, head_dim}, "lepe_weight");
  a.lepe_bias = parameter(lepe_bias, {heads, head_dim}, "lepe_bias");
  return a;
}

std::tuple<TorchTensor, TorchTensor> window_fwd(TorchTensor query, TorchTensor key, TorchTensor value,
    std::optional<TorchTensor> bias, std::optional<TorchTensor> lepe_weight, std::optional<TorchTensor> lepe_bias,
    int64_t grid_h, int64_t grid_w, int64_t window_h, int64_t window_w, int64_t second_h, int64_t second_w,
    int64_t shift_h, int64_t shift_w, int64_t overlap_h, int64_t overlap_w, int64_t num_prefix_tokens,
    bool mask_padding, bool bias_weighs, double scale) {
  const Device device(query);
  WindowAttention a = arguments_of(device, query, key, value, bias, lepe_weight, lepe_bias,
      {grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h, overlap_w,
          num_prefix_tokens, mask_padding, bias_weighs, scale});
  TorchTensor output = torch::stable::empty_like(query);
  TorchTensor logsumexp = device.empty({a.query.size[0], a.query.size[1], a.query.size[2]}, aoti_torch_dtype_float32());
  a.output = view(device, output, "output");
  a.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  if (query.numel() > 0) effattn::cuda::window_attention(a, device.stream());
  return {std::move(output), std::move(logsumexp)};
}

using Gradients = std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor>;

Gradients window_bwd(TorchTensor grad_output, TorchTensor query, TorchTensor key, TorchTensor value,
    std::optional<TorchTensor> bias, std::optional<TorchTensor> lepe_weight, std::optional<TorchTensor> lepe_bias,
    TorchTensor output, TorchTensor logsumexp, int64_t grid_h, int64_t grid_w, int64_t window_h, int64_t window_w,
    int64_t second_h, int64_t second_w, int64_t shift_h, int64_t shift_w, int64_t overlap_h, int64_t overlap_w,
    int64_t num_prefix_tokens, bool mask_padding, bool bias_weighs, double scale) {
  const Device device(query);
  effattn::cuda::WindowAttentionGradient g = {};
  g.of = arguments_of(device, query, key, value, bias, lepe_weight, lepe_bias,
      {grid_h, grid_w, window_h, window_w, second_h, second_w, shift_h, shift_w, overlap_h, overlap_w,
          num_prefix_tokens, mask_padding, bias_weighs, scale});
  STD_TORCH_CHECK(!bias || window_h * window_w <= kMostSlotsOfBiasGradient,
      "the CUDA kernels have a gradient of the bias of windows of up to ", kMostSlotsOfBiasGradient, " tokens, got ",
      window_h * window_w);
  const Tensor& q = g.of.query;
  const int64_t heads = q.size[1], head_dim = q.size[3];
  g.of.output = tokens_of(device, output, q, "output");
  g.of.logsumexp =
      contiguous_data<float>(device, logsumexp, ScalarType::Float, {q.size[0], heads, q.size[2]}, "logsumexp");
  g.grad_output = tokens_of(device, grad_output, q, "grad_output");
  TorchTensor grad_query = torch::stable::empty_like(query), grad_key = torch::stable::empty_like(key),
              grad_value = torch::stable::empty_like(value);
  g.grad_query = view(device, grad_query, "grad_query");
  g.grad_key = view(device, grad_key, "grad_key");
  g.grad_value = view(device, grad_value, "grad_value");
  const auto parameter = [&](bool given, std::initializer_list<int64_t> sizes, float*& to) {
    TorchTensor gradient = device.empty(given ? sizes : std::initializer_list<int64_t>{0}, aoti_torch_dtype_float32());
    if (given) to = static_cast<float*>(gradient.data_ptr());
    return gradient;
  };
  TorchTensor grad_bias = parameter(bias.has_value(), {heads, 2 * window_h - 1, 2 * window_w - 1}, g.grad_bias);
  TorchTensor grad_weight = parameter(lepe_weight.has_value(), {heads, 9, head_dim}, g.grad_lepe_weight);
  TorchTensor grad_lepe_bias = parameter(lepe_bias.has_value(), {heads, head_dim}, g.grad_lepe_bias);
  if (query.numel() > 0) {
    TorchTensor workspace = device.workspace(effattn::cuda::window_attention_gradient_workspace(g));
    effattn::cuda::window_attention_gradient(g, workspace.data_ptr(), device.stream());
  } else {
    for (TorchTensor* gradient : {&grad_bias, &grad_weight, &grad_lepe_bias}) torch::stable::zero_(*gradient);
  }
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_bias),
      std::move(grad_weight), std::move(grad_lepe_bias)};
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("window_fwd", TORCH_BOX(&effattn::bindings::cuda::window_fwd));
  m.impl("window_bwd", TORCH_BOX(&effattn::bindings::cuda::window_bwd));
}
