// Linear attention weighted by a Toeplitz matrix, by FFT:
//
//   O_i = sum_m q_im T(k_m v)_i / n_i,    n_i = sum_m q_im T(k_m)_i + eps,    T(x)_i = sum_j c_(j - i) x_j
//
// q, k and v with a column of ones become columns of float or double, the operation of toeplitz_fft.h gives the sums of
// all D + 1 columns, and a last kernel divides. Planes (b, h) go through in groups whose columns take a bounded amount of
// memory. FLOPs: 10 N log2(2 N) M (D + 1) for each (b, h). Bytes: tensors and columns twice, beside what the operation
// reads again (toeplitz_fft_convolution.cu).
#include "toeplitz_fft.h"

namespace effattn::cuda {
namespace {

template <class R>
struct Memory {
  Kernel<R> kernel;
  int64_t planes, slots;  // at once
  R *query, *key, *value, *sums;
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
                   value = columns(memory.value, a.value.size[3] + 1),
                   sums = columns(memory.sums, a.value.size[3] + 1);
  for (int64_t first = 0; first < all; first += memory.planes) {
    const int64_t planes = std::min(memory.planes, all - first);
    const R* const unscaled = nullptr;
    pack_columns(a.query, first, planes, unscaled, query, stream);
    pack_columns(a.key, first, planes, unscaled, key, stream);
    pack_columns(a.value, first, planes, unscaled, value, stream);
    const Convolution<R> convolution = {query, key, value, sums, memory.kernel.spectrum, memory.kernel.roots, planes,
        first, a.query.size[1], places_of(a), memory.kernel.log_length, false};
    convolve(convolution, memory.scratch, memory.slots, stream);
    unpack_columns(sums, first, planes, a.output, a.normalizer, a.eps, stream);
  }
}

}  // namespace

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
