// Gradients of toeplitz_fft.cu. With G = grad_output / n and delta = (grad_output . O) / n, D_ij = G_i . v_j - delta_i
// and s_ij = q_i . k_j:
//
//   dQ_i = sum_j c D_ij k_j     dK_j = sum_i c D_ij q_i     dV_j = sum_i c s_ij G_i     the operation of toeplitz_fft.h
//   db_tau = c_tau sum over j - i = tau of s_ij D_ij,   the transform of sum_(b, m, e) conj(U) X
//
// U the transform of q_m (G, -delta)_e, X that of k_m (v, 1)_e, two columns e at a time: what the pair's cross terms
// leave is imaginary. The sum is made in double, wave by wave and in order, in the spectrum, one a head, and one
// inverse transform follows. FLOPs for each (b, h): three times those of the forward pass, and once more for db, in
// global memory whatever L is. A row with a normalizer of 0 has G = delta = 0.
#include "toeplitz_fft.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// A warp a row: 1 / n, and -delta as a column.
template <class T, class R>
__global__ void __launch_bounds__(kThreads) rows_kernel(Planes<T> grad_output, Planes<T> output, int width,
    const float* normalizer, int64_t first_plane, int64_t rows, R* inverse, Columns<R> columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  if (row >= rows) return;
  const int64_t plane = row / columns.tokens, token = row % columns.tokens;
  const T *g = grad_output.plane(first_plane + plane) + token * grad_output.row_stride,
          *o = output.plane(first_plane + plane) + token * output.row_stride;
  R delta = 0;
  for (int d = lane_index(); d < width; d += kWarp)
    delta += static_cast<R>(to_float(g[d * grad_output.column_stride])) * to_float(o[d * output.column_stride]);
  delta = warp_reduce(delta, Sum());
  if (lane_index() != 0) return;
  const R n = normalizer[first_plane * columns.tokens + row], factor = n != 0 ? 1 / n : R{0};
  inverse[row] = factor;
  columns.at(plane, width)[token] = -delta * factor;
}

__global__ void __launch_bounds__(kThreads) clear_kernel(Complex<double>* sums, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i < count) store_complex(sums + i, {0.0, 0.0});
}

// sums[head, f] += conj(U) X over the wave's slots of the head: a lane an element, slots dealt to the warps, whose sums
// are added in order.
template <class R>
__global__ void __launch_bounds__(kThreads)
    correlate_kernel(Convolution<R> c, Wave wave, const Complex<R>* u, const Complex<R>* x, Complex<double>* sums) {
  SharedMemory shared;
  const auto parts = shared.array<double>(2 * kThreads);
  const int64_t length = int64_t{1} << c.log_length, blocks = (length + kWarp - 1) / kWarp;
  const int64_t head = blockIdx.x / blocks, f = blockIdx.x % blocks * kWarp + lane_index();
  const int64_t pairs = c.pairs(), end = wave.first_tile + wave.tiles;
  Complex<double> sum = {0, 0};
  for (int64_t plane = (head + c.heads - c.first_plane % c.heads) % c.heads; plane < c.planes; plane += c.heads) {
    const int64_t first = max(plane * pairs, wave.first_tile), count = min((plane + 1) * pairs, end) - first;
    for (int64_t i = warp_index(); i < count * wave.columns && f < length; i += kWarps) {
      const int64_t slot = i / count * wave.tiles + first - wave.first_tile + i % count;
      const Complex<R> a = load_complex(u + (slot << c.log_length) + f),
                       b = load_complex(x + (slot << c.log_length) + f);
      sum.re += static_cast<double>(a.re) * b.re + static_cast<double>(a.im) * b.im;
      sum.im += static_cast<double>(a.re) * b.im - static_cast<double>(a.im) * b.re;
    }
  }
  parts.template store<2>(2 * thread_index(), Vec<double, 2>{{sum.re, sum.im}});
  sync_block();
  if (warp_index() != 0 || f >= length) return;
  Complex<double> total = load_complex(sums + head * length + f);
  for (int warp = 0; warp < kWarps; ++warp) {
    const Vec<double, 2> part = parts.template load<2>(2 * (warp * kWarp + lane_index()));
    total = total + Complex<double>{part[0], part[1]};
  }
  store_complex(sums + head * length + f, total);
}

struct Table {
  const float* bias;
  const double* highest;
  const Complex<double>* sums;
  int places, log_length;
  bool is_causal;

  __host__ EFFATTN_DEVICE int64_t entries() const { return 2 * int64_t{places} - 1; }
  EFFATTN_DEVICE double gradient(int64_t head, int64_t entry) const {
    const int64_t lag = entry - (places - 1), length = int64_t{1} << log_length;
    if (lag > 0 && is_causal) return 0;
    const double sum = sums[(head << log_length) + (lag & (length - 1))].re;
    return exp(bias[head * entries() + entry] - highest[head]) * sum / static_cast<double>(length);
  }
};

__global__ void __launch_bounds__(kThreads) bias_kernel(Table table, int64_t count, float* grad_bias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i < count) grad_bias[i] = static_cast<float>(table.gradient(i / table.entries(), i % table.entries()));
}

template <class R>
struct Memory {
  Kernel<R> kernel;
  int64_t planes, slots;  // at once
  R *query, *key, *value, *gradient, *inverse, *result;
  Complex<R>* scratch;  // twice, for db
  Complex<double>* sums;
};

template <class R>
Memory<R> memory_of(const ToeplitzGradient& g, Arena& arena) {
  const Toeplitz& a = g.of;
  const int64_t tokens = a.query.size[2], features = a.query.size[3], width = a.value.size[3],
                widest = std::max(features, width);
  Memory<R> memory = {};
  memory.kernel = take_kernel<R>(a, arena);
  memory.planes = planes_at_once<R>(a.query.size[0] * a.query.size[1], tokens, 2 * (features + width + 1) + widest + 1);
  memory.query = arena.take<R>(memory.planes * features * tokens);
  memory.key = arena.take<R>(memory.planes * features * tokens);
  memory.value = arena.take<R>(memory.planes * (width + 1) * tokens);
  memory.gradient = arena.take<R>(memory.planes * (width + 1) * tokens);
  memory.inverse = arena.take<R>(memory.planes * tokens);
  memory.result = arena.take<R>(memory.planes * widest * tokens);
  if (g.grad_bias != nullptr || outer_passes_of<R>(memory.kernel.log_length) > 0) {
    memory.slots = slots_of<R>(memory.kernel.log_length,
        memory.planes * std::max(ceil_div(width + 1, 2) * features, ceil_div(features, 2) * (width + 1)));
    memory.scratch = arena.take<Complex<R>>(2 * memory.slots << memory.kernel.log_length);
  }
  if (g.grad_bias != nullptr) memory.sums = arena.take<Complex<double>>(a.query.size[1] << memory.kernel.log_length);
  return memory;
}

template <class R>
void correlate(const Memory<R>& memory, const Convolution<R>& u, const Convolution<R>& x, cudaStream_t stream) {
  const int outer = std::max(outer_passes_of<R>(x.log_length), 1);
  Complex<R>* const second = memory.scratch + (memory.slots << x.log_length);
  Complex<R>* const both[] = {memory.scratch, second};  // nvcc's host code has no braced list in a lambda's loop
  for_each_wave(x, memory.slots, [&](Wave wave) {
    const int64_t count = wave.tiles * wave.columns;
    scatter(u, wave, memory.scratch, stream);
    scatter(x, wave, second, stream);
    for (Complex<R>* data : both) {
      outer_passes(data, count, x.log_length, 1, outer, false, x.roots, stream);
      transform_rows(Rows<R>{data, count, x.log_length, outer, x.roots, true, false},
          static_cast<const Convolution<R>*>(nullptr), wave, stream);
    }
    const int64_t blocks = x.heads * ceil_div(int64_t{1} << x.log_length, kWarp);
    launch(correlate_kernel<R>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes<double>(2 * kThreads),
        stream, x, wave, static_cast<const Complex<R>*>(memory.scratch), static_cast<const Complex<R>*>(second),
        memory.sums);
  });
}

template <class R>
void bias_gradient(const ToeplitzGradient& g, const Memory<R>& memory, cudaStream_t stream) {
  const Kernel<R>& kernel = memory.kernel;
  const int64_t heads = g.of.query.size[1];
  const Places places = places_of(g.of);
  const int outer = outer_passes_of<double>(kernel.log_length);
  transform_rows(Rows<double>{memory.sums, heads, kernel.log_length, outer, kernel.exact_roots, false, true},
      static_cast<const Convolution<double>*>(nullptr), Wave{}, stream);
  outer_passes(memory.sums, heads, kernel.log_length, 0, outer, true,
      static_cast<const Complex<double>*>(kernel.exact_roots), stream);
  const Table table = {g.of.bias, kernel.highest, memory.sums, places.count, kernel.log_length, g.of.is_causal};
  const int64_t count = heads * table.entries();
  launch(bias_kernel, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0, stream, table, count, g.grad_bias);
}

template <class R>
void run(const ToeplitzGradient& g, void* workspace, cudaStream_t stream) {
  const Toeplitz& a = g.of;
  Arena arena(workspace);
  const Memory<R> memory = memory_of<R>(g, arena);
  const int64_t heads = a.query.size[1], all = a.query.size[0] * heads, tokens = a.query.size[2];
  if (heads == 0 || tokens == 0) return;
  make_kernel(a, memory.kernel, stream);
  if (g.grad_bias != nullptr) {
    const int64_t count = heads << memory.kernel.log_length;
    launch(clear_kernel, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0, stream, memory.sums, count);
  }

  const auto columns = [&](R* data, int64_t count) {
    return Columns<R>{data, count * tokens, static_cast<int>(count), static_cast<int>(tokens)};
  };
  const int64_t features = a.query.size[3], width = a.value.size[3];
  const Columns<R> query = columns(memory.query, features), key = columns(memory.key, features),
                   value = columns(memory.value, width + 1), gradient = columns(memory.gradient, width + 1);
  Columns<R> scaled = gradient;  // without delta
  scaled.count = static_cast<int>(width);

  for (int64_t first = 0; first < all; first += memory.planes) {
    const int64_t planes = std::min(memory.planes, all - first);
    const R* const unscaled = nullptr;
    pack_columns(a.query, first, planes, unscaled, query, stream);
    pack_columns(a.key, first, planes, unscaled, key, stream);
    pack_columns(a.value, first, planes, unscaled, value, stream);
    with_element_type(a.value.dtype, [&](auto element) {
      using T = decltype(element);
      launch(rows_kernel<T, R>, dim3(blocks_for(planes * tokens, kWarps)), dim3(kThreads), 0, stream,
          planes_of<T>(g.grad_output), planes_of<T>(a.output), static_cast<int>(width),
          static_cast<const float*>(a.normalizer), first, planes * tokens, memory.inverse, gradient);
    });
    pack_columns(g.grad_output, first, planes, static_cast<const R*>(memory.inverse), scaled, stream);

    const auto operation = [&](const Columns<R>& left, const Columns<R>& middle, const Columns<R>& right,
                               bool transposed) {
      return Convolution<R>{left, middle, right, columns(memory.result, right.count), memory.kernel.spectrum,
          memory.kernel.roots, planes, first, heads, places_of(a), memory.kernel.log_length, transposed};
    };
    const auto store = [&](const Convolution<R>& convolution, const Tensor& result) {
      convolve(convolution, memory.scratch, memory.slots, stream);
      unpack_columns(convolution.out, first, planes, result, nullptr, 0, stream);
    };
    store(operation(gradient, value, key, false), g.grad_query);
    store(operation(value, gradient, query, true), g.grad_key);
    store(operation(key, query, scaled, true), g.grad_value);
    if (g.grad_bias != nullptr)
      correlate(memory, operation(key, query, gradient, false), operation(query, key, value, false), stream);
  }
  if (g.grad_bias != nullptr) bias_gradient(g, memory, stream);
}

}  // namespace

int64_t toeplitz_fft_gradient_workspace(const ToeplitzGradient& g) {
  Arena arena(nullptr);
  if (g.of.in_double)
    memory_of<double>(g, arena);
  else
    memory_of<float>(g, arena);
  return arena.bytes();
}

void toeplitz_fft_gradient(const ToeplitzGradient& g, void* workspace, void* stream) {
  if (g.of.in_double)
    run<double>(g, workspace, static_cast<cudaStream_t>(stream));
  else
    run<float>(g, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace effattn::cuda
