// Gradients of attention in windows: the formulas and who owns what are in the headers.
//
// Windows of at most 64 slots: tile_gradient_kernel, all in one pass (_gradient_tile.h). Others: delta_kernel, then
// stream_gradient_kernel for keys and for queries (_gradient_stream.h). LePE's weight and bias: sums of blocks in the
// kernels that have dV, added in order (_gradient_lepe.h).
#include "cross_shaped_window_gradient_stream.h"

namespace effattn::cuda {
namespace {

inline constexpr int kDeltaThreads = 128, kDeltaTokens = 128, kSumWarps = 32;

// Eight elements of a token's row; zeros past the last column.
template <class T>
EFFATTN_DEVICE void read_block(float (&to)[8], const TokenRows<T>& rows, int token, int block) {
  const T* from = rows.data + token * rows.row_stride;
  if (rows.unit == 8) {
    const Vec<T, 8> piece = load_global<8>(from + block * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_float(piece[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      to[i] = block * 8 + i < rows.columns ? to_float(from[(block * 8 + i) * rows.column_stride]) : 0;
  }
}

// delta_i = dO_i . (O - LePE(V))_i, kLanes lanes for a token, 8 columns each, whose taps stay in registers.
template <class T, int kLanes>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(
    const WindowGradient<T> a, const TokenTensor<T> output, const float* lepe_bias, int chunks, float* delta) {
  const int head = blockIdx.x % a.heads, chunk = blockIdx.x / a.heads % chunks, batch = blockIdx.x / a.heads / chunks;
  const WindowHalf& half = a.geometry.half[head >= a.geometry.half[1].first_head];
  const int tokens = a.geometry.grid_h * a.geometry.grid_w, block = lane_index() % kLanes;
  const bool mine = block * 8 < a.query.columns, lepe = a.lepe_weight != nullptr;
  const TokenRows<T> o = output.at(batch, head), v = a.value.at(batch, head), g = a.grad_output.at(batch, head);
  float taps[kTaps][8] = {}, bias[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = block * 8 + i;
    if (column >= a.query.columns || !lepe) break;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      taps[tap][i] = a.lepe_weight[(head * int64_t{kTaps} + tap) * a.query.columns + column];
    if (lepe_bias != nullptr) bias[i] = lepe_bias[int64_t{head} * a.query.columns + column];
  }
  for (int first = 0; first < kDeltaTokens; first += kDeltaThreads / kLanes) {
    const int token = chunk * kDeltaTokens + first + thread_index() / kLanes;
    float sum = 0;
    if (token < tokens && mine) {
      float x[8], gradient[8];
      read_block(x, o, token, block);
      read_block(gradient, g, token, block);
      if (lepe) {
        const int y = token / a.geometry.grid_w, column = token % a.geometry.grid_w;
        const Slot slot = {(y + half.top) % half.height, (column + half.left) % half.width};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] -= bias[i];
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const int near_y = y + tap / 3 - 1, near_x = column + tap % 3 - 1;
          if (neighbour(half, slot, tap).y < 0 || near_y < 0 || near_y >= a.geometry.grid_h || near_x < 0 ||
              near_x >= a.geometry.grid_w)
            continue;
          float near[8];
          read_block(near, v, near_y * a.geometry.grid_w + near_x, block);
#pragma unroll
          for (int i = 0; i < 8; ++i) x[i] = fmaf(-taps[tap][i], near[i], x[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(gradient[i], x[i], sum);
    }
    sum = warp_reduce<kLanes>(sum, Sum());
    if (token < tokens && block == 0) delta[a.statistics(batch, head) + token] = sum;
  }
}

// One block: 32 of the 10 x columns sums of a head, over all blocks that had the head: every 32nd, then those sums.
__global__ void __launch_bounds__(kSumWarps* kWarp) add_lepe_sums_kernel(
    const float* sums, WindowGeometry geometry, WindowGrid grid, int columns, float* grad_weight, float* grad_bias) {
  SharedMemory shared;
  const auto parts = shared.array<double>(kSumWarps * kWarp);
  const int size = kLepeSums * columns, blocks = (size + kWarp - 1) / kWarp;
  const int head = blockIdx.x / blocks, element = blockIdx.x % blocks * kWarp + lane_index();
  const int which = head >= geometry.half[1].first_head;
  const WindowHalf& half = geometry.half[which];
  const int count = grid.share[which].blocks * grid.share[which].chunks;
  const float* from = sums + (int64_t{which ? grid.first_blocks : 0} + head - half.first_head) * size + element;
  double part = 0;
  if (element < size) {
#pragma unroll 4
    for (int i = warp_index(); i < count; i += kSumWarps) part += from[int64_t{i} * half.heads * size];
  }
  parts[thread_index()] = part;
  sync_block();
  if (warp_index() > 0 || element >= size) return;
  double total = 0;
  for (int warp = 0; warp < kSumWarps; ++warp) total += parts[warp * kWarp + lane_index()];
  if (element < kTaps * columns)
    grad_weight[int64_t{head} * kTaps * columns + element] = static_cast<float>(total);
  else if (grad_bias != nullptr)
    grad_bias[int64_t{head} * columns + element - kTaps * columns] = static_cast<float>(total);
}

bool one_tile(const WindowGeometry& geometry) {
  return geometry.half[0].slots() <= kSmallWindow && geometry.half[1].slots() <= kSmallWindow;
}

inline constexpr int kWantedBlocks =
    2048;  // several waves of the largest chip; fixed, so that sums do not depend on it

struct GradientPlan {
  WindowGeometry geometry;
  WindowGrid grid;
  bool one_tile;
  int walk, groups[2];
  int64_t delta_bytes, lepe_bytes;
};

GradientPlan plan_of(const WindowAttention& a) {
  GradientPlan plan = {};
  plan.geometry = geometry_of(a);
  plan.one_tile = one_tile(plan.geometry);
  plan.grid = grid_of(plan.geometry, plan.one_tile);
  plan.walk = plan.one_tile ? max(1, plan.grid.blocks / kWantedBlocks) : 1;
  int64_t blocks = 0;
  for (int i = 0; i < 2; ++i) {
    WindowShare& share = plan.grid.share[i];
    plan.groups[i] = share.chunks;
    share.chunks = static_cast<int>(ceil_div(share.chunks, plan.walk));
    blocks += int64_t{plan.geometry.half[i].heads} * share.blocks * share.chunks;
    if (i == 0) plan.grid.first_blocks = static_cast<int>(blocks);
  }
  plan.grid.blocks = static_cast<int>(blocks);
  plan.delta_bytes = plan.one_tile ? 0 : ceil_div(a.query.size[0] * a.query.size[1] * a.query.size[2], 4) * 16;
  plan.lepe_bytes = a.lepe_weight == nullptr ? 0 : blocks * kLepeSums * a.query.size[3] * 4;
  return plan;
}

template <class T, int D>
void launch_gradients(const WindowGradient<T>& gradient, const GradientPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.grid.blocks)), block(static_cast<unsigned>(plan.grid.warps * kWarp));
  if (plan.one_tile) {
    launch(tile_gradient_kernel<T, D>, grid, block, tile_gradient_shared<T, D>(), stream, gradient);
  } else {
    const int warps = plan.grid.warps;
    launch(
        stream_gradient_kernel<T, D, true>, grid, block, stream_gradient_shared<T, D, true>(warps), stream, gradient);
    launch(
        stream_gradient_kernel<T, D, false>, grid, block, stream_gradient_shared<T, D, false>(warps), stream, gradient);
  }
}

template <class T>
void launch_delta(const WindowGradient<T>& gradient, const WindowAttention& a, float* delta, cudaStream_t stream) {
  const int chunks = static_cast<int>(ceil_div(a.query.size[2], kDeltaTokens));
  const int blocks = checked_count(a.query.size[0] * a.query.size[1] * chunks);
  launch(a.query.size[3] <= 32 ? delta_kernel<T, 4> : delta_kernel<T, 8>, dim3(static_cast<unsigned>(blocks)),
      dim3(kDeltaThreads), 0, stream, gradient, token_tensor<T>(a.output), a.lepe_bias, chunks, delta);
}

}  // namespace

int64_t window_attention_gradient_workspace(const WindowAttentionGradient& g) {
  const GradientPlan plan = plan_of(g.of);
  return plan.delta_bytes + plan.lepe_bytes;
}

void window_attention_gradient(const WindowAttentionGradient& g, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const WindowAttention& a = g.of;
  const GradientPlan plan = plan_of(a);
  float* const delta = static_cast<float*>(workspace);
  float* const lepe_sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.delta_bytes);
  const auto run = [&](auto element) {
    using T = decltype(element);
    const WindowGradient<T> gradient = {plan.geometry, plan.grid, plan.walk, {plan.groups[0], plan.groups[1]},
        token_tensor<T>(a.query), token_tensor<T>(a.key), token_tensor<T>(a.value), token_tensor<T>(g.grad_output),
        a.logsumexp, delta, a.lepe_weight, token_tensor<T>(g.grad_query), token_tensor<T>(g.grad_key),
        token_tensor<T>(g.grad_value), lepe_sums, static_cast<int>(a.query.size[1]), a.mask_padding, a.scale};
    if (!plan.one_tile) launch_delta(gradient, a, delta, stream);
    with_columns(a.query.size[3], [&]<int D>() { launch_gradients<T, D>(gradient, plan, stream); });
  };
  a.query.dtype == DType::kBFloat16 ? run(bfloat16{}) : run(float16{});
  if (a.lepe_weight == nullptr) return;
  const int columns = static_cast<int>(a.query.size[3]);
  const int64_t blocks = a.query.size[1] * ceil_div(kLepeSums * columns, kWarp);
  launch(add_lepe_sums_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSumWarps * kWarp),
      shared_bytes<double>(kSumWarps * kWarp), stream, static_cast<const float*>(lepe_sums), plan.geometry, plan.grid,
      columns, g.grad_lepe_weight, g.grad_lepe_bias);
}

}  // namespace effattn::cuda
