// Gradients of attention in windows: the formulas and who owns what are in the headers.
//
// Windows of at most 64 slots: tile_gradient_kernel, all in one pass (_gradient_tile.h). Others: delta_kernel, then
// stream_gradient_kernel for keys and for queries (_gradient_stream.h). Parameters: sums of blocks, of LePE's weight
// and bias in the kernels that have dV (_gradient_lepe.h), of the bias table in those that have dQ (_gradient_bias.h),
// added in order.
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
        // its place in the rolled grid
        int y = token / a.geometry.grid_w + half.top - a.geometry.shift_h;
        int column = token % a.geometry.grid_w + half.left - a.geometry.shift_w;
        if (y < 0) y += half.rows * half.height;
        if (column < 0) column += half.columns * half.width;
        const Slot slot = {y % half.height, column % half.width};
        const Window window = {batch, y - slot.y, column - slot.x};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] -= bias[i];
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const Slot at = neighbour(half, slot, tap);
          const int near_token = at.y < 0 ? -1 : token_at<true>(a.geometry, half, window, at).index;
          if (near_token < 0) continue;
          float near[8];
          read_block(near, v, near_token, block);
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

// One block: 32 of the `size` sums of a head, over all blocks that had the head: every 32nd, then those sums. `first`
// has the first `size_of_first` of a head, `second`, where it is not null, the others.
__global__ void __launch_bounds__(kSumWarps* kWarp) add_sums_kernel(const float* sums, WindowGeometry geometry,
    WindowGrid grid, int size, int size_of_first, float* first, float* second) {
  SharedMemory shared;
  const auto parts = shared.array<double>(kSumWarps * kWarp);
  const int blocks = (size + kWarp - 1) / kWarp;
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
  if (element < size_of_first)
    first[int64_t{head} * size_of_first + element] = static_cast<float>(total);
  else if (second != nullptr)
    second[int64_t{head} * (size - size_of_first) + element - size_of_first] = static_cast<float>(total);
}

bool one_tile(const WindowGeometry& geometry) {
  return geometry.half[0].slots() <= kSmallWindow && geometry.half[1].slots() <= kSmallWindow;
}

inline constexpr int kWantedBlocks =
    2048;  // several waves of the largest chip; fixed, so that sums do not depend on it
inline constexpr size_t kLeastShared = 99 * 1024;  // what a block may ask for on every chip that is served

// A grid whose blocks walk over groups of windows.
struct Walk {
  WindowGrid grid;
  int walk, groups[2];
};

Walk walk_of(const WindowGeometry& geometry, const WindowGrid& grid, int walk) {
  Walk result = {grid, walk, {}};
  int64_t blocks = 0;
  for (int i = 0; i < 2; ++i) {
    WindowShare& share = result.grid.share[i];
    result.groups[i] = share.chunks;
    share.chunks = static_cast<int>(ceil_div(share.chunks, walk));
    blocks += int64_t{geometry.half[i].heads} * share.blocks * share.chunks;
    if (i == 0) result.grid.first_blocks = static_cast<int>(blocks);
  }
  result.grid.blocks = static_cast<int>(blocks);
  return result;
}

struct GradientPlan {
  WindowGeometry geometry;
  bool one_tile, rich;
  int bias_slots;         // of a window with a bias, else 0
  Walk windows, queries;  // the kernel that has dV and, where it is another, the one that has dQ
  int64_t delta_bytes, lepe_bytes, bias_bytes;
};

// The most warps of a block of queries that keeps sums for the bias.
int warps_with_bias(int columns, int slots) {
  int warps = kWindowWarps;
  with_columns(columns, [&]<int D>() {
    while (warps > 1 && stream_gradient_shared<bfloat16, D, false, true>(warps, slots) > kLeastShared) --warps;
  });
  return warps;
}

GradientPlan plan_of(const WindowAttention& a) {
  GradientPlan plan = {};
  const WindowGeometry geometry = plan.geometry = geometry_of(a);
  plan.one_tile = one_tile(geometry);
  plan.rich = a.bias != nullptr || a.shift_h + a.shift_w > 0;
  plan.bias_slots = a.bias == nullptr ? 0 : geometry.half[0].slots();
  const auto walk = [](const WindowGrid& grid) { return max(1, grid.blocks / kWantedBlocks); };
  const WindowGrid grid = grid_of(geometry, plan.one_tile);
  plan.windows = walk_of(geometry, grid, plan.one_tile ? walk(grid) : 1);
  plan.queries = plan.windows;
  if (!plan.one_tile && plan.bias_slots > 0) {
    const int columns = static_cast<int>(a.query.size[3]);
    const WindowGrid queries = grid_of(geometry, false, warps_with_bias(columns, plan.bias_slots));
    plan.queries = walk_of(geometry, queries, walk(queries));
  }
  plan.delta_bytes = plan.one_tile ? 0 : ceil_div(a.query.size[0] * a.query.size[1] * a.query.size[2], 4) * 16;
  plan.lepe_bytes = a.lepe_weight == nullptr ? 0 : int64_t{plan.windows.grid.blocks} * kLepeSums * a.query.size[3] * 4;
  if (plan.bias_slots > 0) plan.bias_bytes = int64_t{plan.queries.grid.blocks} * geometry.half[0].bias_entries() * 4;
  return plan;
}

template <class T, int D, bool kRich>
void launch_gradients(WindowGradient<T> gradient, const GradientPlan& plan, cudaStream_t stream) {
  const auto launch_on = [&](const Walk& walk, auto kernel, size_t shared) {
    gradient.grid = walk.grid;
    gradient.walk = walk.walk;
    for (int i = 0; i < 2; ++i) gradient.groups[i] = walk.groups[i];
    launch(kernel, dim3(static_cast<unsigned>(walk.grid.blocks)), dim3(static_cast<unsigned>(walk.grid.warps * kWarp)),
        shared, stream, gradient);
  };
  if (plan.one_tile) {
    launch_on(plan.windows, tile_gradient_kernel<T, D, kRich>, tile_gradient_shared<T, D, kRich>());
  } else {
    launch_on(plan.windows, stream_gradient_kernel<T, D, true, kRich>,
        stream_gradient_shared<T, D, true, kRich>(plan.windows.grid.warps, 0));
    launch_on(plan.queries, stream_gradient_kernel<T, D, false, kRich>,
        stream_gradient_shared<T, D, false, kRich>(plan.queries.grid.warps, plan.bias_slots));
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
  return plan.delta_bytes + plan.lepe_bytes + plan.bias_bytes;
}

void window_attention_gradient(const WindowAttentionGradient& g, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const WindowAttention& a = g.of;
  const GradientPlan plan = plan_of(a);
  char* const memory = static_cast<char*>(workspace);
  float* const delta = reinterpret_cast<float*>(memory);
  float* const lepe_sums = reinterpret_cast<float*>(memory + plan.delta_bytes);
  float* const bias_sums = reinterpret_cast<float*>(memory + plan.delta_bytes + plan.lepe_bytes);
  const auto run = [&]<int D>(auto element) {
    using T = decltype(element);
    const WindowGradient<T> gradient = {plan.geometry, {}, 1, {}, token_tensor<T>(a.query), token_tensor<T>(a.key),
        token_tensor<T>(a.value), token_tensor<T>(g.grad_output), a.logsumexp, delta, a.bias, a.lepe_weight,
        token_tensor<T>(g.grad_query), token_tensor<T>(g.grad_key), token_tensor<T>(g.grad_value), lepe_sums,
        a.bias == nullptr ? nullptr : bias_sums, static_cast<int>(a.query.size[1]), a.mask_padding, a.scale};
    if (!plan.one_tile) launch_delta(gradient, a, delta, stream);
    if (plan.rich)
      launch_gradients<T, D, true>(gradient, plan, stream);
    else
      launch_gradients<T, D, false>(gradient, plan, stream);
  };
  with_columns(a.query.size[3], [&]<int D>() {  // instances that differ by T alone, side by side, compress to one
    if (a.query.dtype == DType::kBFloat16)
      run.template operator()<D>(bfloat16{});
    else
      run.template operator()<D>(float16{});
  });
  const auto add_sums = [&](const float* sums, const WindowGrid& grid, int64_t size, int64_t size_of_first,
                            float* first, float* second) {
    launch(add_sums_kernel, dim3(static_cast<unsigned>(a.query.size[1] * ceil_div(size, kWarp))),
        dim3(kSumWarps * kWarp), shared_bytes<double>(kSumWarps * kWarp), stream, sums, plan.geometry, grid,
        static_cast<int>(size), static_cast<int>(size_of_first), first, second);
  };
  const int64_t columns = a.query.size[3], entries = plan.geometry.half[0].bias_entries();
  if (a.lepe_weight != nullptr)
    add_sums(lepe_sums, plan.windows.grid, kLepeSums * columns, kTaps * columns, g.grad_lepe_weight, g.grad_lepe_bias);
  if (a.bias != nullptr) add_sums(bias_sums, plan.queries.grid, entries, entries, g.grad_bias, nullptr);
}

}  // namespace effattn::cuda
