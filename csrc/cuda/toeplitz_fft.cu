// Linear attention weighted by a Toeplitz matrix, by FFT:
//
//   O_i = sum_m q_im T(k_m v)_i / n_i,    n_i = sum_m q_im T(k_m)_i + eps,    T(x)_i = sum_j c_(j - i) x_j
//
// The spectrum of c_tau = exp(b_tau - max b) / L, one a head, is made in double; lag s = p_i - p_j stands in place s
// mod L, so that T is a product of spectra. q, k and v with a column of ones become columns of float or double, the
// operation of toeplitz_fft.h gives the sums of all D + 1 columns, and a last kernel divides. Planes (b, h) go through
// in groups whose columns take a bounded amount of memory. FLOPs: 10 N log2(2 N) M (D + 1) for each (b, h). Bytes:
// tensors and columns twice, beside what the operation reads again (toeplitz_fft_convolution.cu).
#include "toeplitz_fft.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) highest_kernel(const float* bias, int64_t entries, double* highest) {
  SharedMemory shared;
  const auto scratch = shared.array<float>(kThreads / kWarp);
  float most = -INFINITY;
  for (int64_t i = thread_index(); i < entries; i += kThreads) most = max(most, bias[blockIdx.x * entries + i]);
  most = block_reduce(most, Max(), scratch);
  if (thread_index() == 0) highest[blockIdx.x] = most == -INFINITY ? 0.0 : most;
}

__global__ void __launch_bounds__(kThreads) weights_kernel(const float* bias, const double* highest, int places,
    bool is_causal, int log_length, int64_t count, Complex<double>* weights) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= count) return;
  const int64_t head = i >> log_length, length = int64_t{1} << log_length, s = i & (length - 1), middle = places - 1;
  int64_t entry = -1;
  if (s < places)
    entry = middle - s;
  else if (s > length - places && !is_causal)
    entry = middle + length - s;
  double weight = 0;
  if (entry >= 0) weight = exp(bias[head * (2 * middle + 1) + entry] - highest[head]) / static_cast<double>(length);
  store_complex(weights + i, {weight, 0.0});
}

template <class R>
__global__ void __launch_bounds__(kThreads) round_kernel(const Complex<double>* from, int64_t count, Complex<R>* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= count) return;
  const Complex<double> x = load_complex(from + i);
  store_complex(to + i, {static_cast<R>(x.re), static_cast<R>(x.im)});
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const Complex<double>* weights, int log_length, double* norm) {
  SharedMemory shared;
  const auto scratch = shared.array<double>(kThreads / kWarp);
  const int64_t length = int64_t{1} << log_length;
  double sum = 0;
  for (int64_t i = thread_index(); i < length; i += kThreads) {
    const double weight = weights[blockIdx.x * length + i].re;
    sum += weight * weight;
  }
  sum = block_reduce(sum, Sum(), scratch);
  if (thread_index() == 0) norm[blockIdx.x] = sqrt(sum) * static_cast<double>(length);
}

template <class R>
__global__ void __launch_bounds__(kThreads) column_norms_kernel(Columns<R> columns, R* norms) {
  SharedMemory shared;
  const auto scratch = shared.array<R>(kThreads / kWarp);
  const R* const column = columns.at(blockIdx.x / columns.count, blockIdx.x % columns.count);
  R sum = 0;
  for (int i = thread_index(); i < columns.tokens; i += kThreads) sum += column[i] * column[i];
  sum = block_reduce(sum, Sum(), scratch);
  if (thread_index() == 0) norms[blockIdx.x] = sqrt(sum);
}

// The error of a convolution is absolute, about eps ||c|| ||k_m||: a normalizer below it is none.
template <class R>
__global__ void __launch_bounds__(kThreads) silence_kernel(Columns<R> query, const R* key_norms, const double* norm,
    int64_t first_plane, int64_t heads, int64_t rows, Columns<R> sums) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (row >= rows) return;
  const int64_t plane = row / query.tokens, token = row % query.tokens;
  R level = 0;
  for (int m = 0; m < query.count; ++m) level += abs(query.at(plane, m)[token]) * key_norms[plane * query.count + m];
  level *=
      static_cast<R>(2 * norm[(first_plane + plane) % heads]) * (sizeof(R) == sizeof(float) ? R(0x1p-23) : R(0x1p-52));
  R& normalizer = sums.at(plane, sums.count - 1)[token];
  if (abs(normalizer) <= level) normalizer = 0;
}

template <class R>
struct Memory {
  Kernel<R> kernel;
  int64_t planes, slots;  // at once
  R *query, *key, *value, *sums, *key_norms;
  Complex<R>* scratch;
};

template <class R>
Memory<R> memory_of(const Toeplitz& a, Arena& arena) {
  const int64_t tokens = a.query.size[2], features = a.query.size[3], width = a.value.size[3];
  Memory<R> memory = {};
  memory.kernel = take_kernel<R>(a, arena);
  memory.planes = planes_at_once<R>(a.query.size[0] * a.query.size[1], tokens, 2 * (features + width + 1));
  memory.query = arena.take<R>(memory.planes * features * tokens);
  memory.key = arena.take<R>(memory.planes * features * tokens);
  memory.key_norms = arena.take<R>(memory.planes * features);
  memory.value = arena.take<R>(memory.planes * (width + 1) * tokens);
  memory.sums = arena.take<R>(memory.planes * (width + 1) * tokens);
  if (outer_passes_of<R>(memory.kernel.log_length) > 0) {
    memory.slots = slots_of<R>(memory.kernel.log_length, memory.planes * ceil_div(width + 1, 2) * features);
    memory.scratch = arena.take<Complex<R>>(memory.slots << memory.kernel.log_length);
  }
  return memory;
}

template <class R>
void run(const Toeplitz& a, void* workspace, cudaStream_t stream) {
  Arena arena(workspace);
  const Memory<R> memory = memory_of<R>(a, arena);
  const int64_t all = a.query.size[0] * a.query.size[1], tokens = a.query.size[2];
  if (all == 0 || tokens == 0) return;
  make_kernel(a, memory.kernel, stream);
  const auto columns = [&](R* data, int64_t count) {
    return Columns<R>{data, count * tokens, static_cast<int>(count), static_cast<int>(tokens)};
  };
  const Columns<R> query = columns(memory.query, a.query.size[3]), key = columns(memory.key, a.key.size[3]),
                   value = columns(memory.value, a.value.size[3] + 1), sums = columns(memory.sums, a.value.size[3] + 1);
  for (int64_t first = 0; first < all; first += memory.planes) {
    const int64_t planes = std::min(memory.planes, all - first);
    const R* const unscaled = nullptr;
    pack_columns(a.query, first, planes, unscaled, query, stream);
    pack_columns(a.key, first, planes, unscaled, key, stream);
    pack_columns(a.value, first, planes, unscaled, value, stream);
    const Convolution<R> convolution = {query, key, value, sums, memory.kernel.spectrum, memory.kernel.roots, planes,
        first, a.query.size[1], places_of(a), memory.kernel.log_length, false};
    convolve(convolution, memory.scratch, memory.slots, stream);
    launch(column_norms_kernel<R>, dim3(static_cast<unsigned>(planes * key.count)), dim3(kThreads),
        shared_bytes<R>(kThreads / kWarp), stream, key, memory.key_norms);
    launch(silence_kernel<R>, dim3(blocks_for(planes * tokens, kThreads)), dim3(kThreads), 0, stream, query,
        static_cast<const R*>(memory.key_norms), static_cast<const double*>(memory.kernel.norm), first, a.query.size[1],
        planes * tokens, sums);
    unpack_columns(sums, first, planes, a.output, a.normalizer, a.eps, stream);
  }
}

}  // namespace

template <class R>
void make_kernel(const Toeplitz& a, const Kernel<R>& kernel, cudaStream_t stream) {
  const int64_t heads = a.query.size[1], count = heads << kernel.log_length;
  const Places places = places_of(a);
  launch(highest_kernel, dim3(static_cast<unsigned>(heads)), dim3(kThreads), shared_bytes<float>(kThreads / kWarp),
      stream, a.bias, 2 * int64_t{places.count} - 1, kernel.highest);
  launch(weights_kernel, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0, stream, a.bias,
      static_cast<const double*>(kernel.highest), places.count, a.is_causal, kernel.log_length, count, kernel.exact);
  launch(norm_kernel, dim3(static_cast<unsigned>(heads)), dim3(kThreads), shared_bytes<double>(kThreads / kWarp),
      stream, static_cast<const Complex<double>*>(kernel.exact), kernel.log_length, kernel.norm);
  make_roots(kernel.exact_roots, kernel.log_length, stream);
  const int outer = outer_passes_of<double>(kernel.log_length);
  outer_passes(kernel.exact, heads, kernel.log_length, 0, outer, false, kernel.exact_roots, stream);
  transform_rows(Rows<double>{kernel.exact, heads, kernel.log_length, outer, kernel.exact_roots, true, false},
      static_cast<const Convolution<double>*>(nullptr), Wave{}, stream);
  if constexpr (sizeof(R) < sizeof(double)) {
    make_roots(kernel.roots, kernel.log_length, stream);
    launch(round_kernel<R>, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0, stream,
        static_cast<const Complex<double>*>(kernel.exact), count, kernel.spectrum);
  }
}

template void make_kernel(const Toeplitz&, const Kernel<float>&, cudaStream_t);
template void make_kernel(const Toeplitz&, const Kernel<double>&, cudaStream_t);

int64_t toeplitz_fft_workspace(const Toeplitz& a) {
  Arena arena(nullptr);
  if (a.in_double)
    memory_of<double>(a, arena);
  else
    memory_of<float>(a, arena);
  return arena.bytes();
}

void toeplitz_fft(const Toeplitz& a, void* workspace, void* stream) {
  if (a.in_double)
    run<double>(a, workspace, static_cast<cudaStream_t>(stream));
  else
    run<float>(a, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace effattn::cuda
