// Transforms of fft.h that do not fit into a block's shared memory, in place in global memory (L2 as far as it goes):
// the first passes a kernel each, a thread per butterfly, which read and write runs of L / 8 neighbours; then rows of
// L / 8^outer elements, each by a block in shared memory, which makes all further passes, the product with the spectrum
// and their inverses on the way. Bytes: 2 sizeof(Complex) L for the rows and for each outer pass and its inverse.
#include "toeplitz_fft.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 256;

template <class R>
__global__ void __launch_bounds__(kThreads) roots_kernel(Complex<R>* roots, int log_length, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= count) return;
  int64_t t = i;
  int log_n = log_length;
  for (; t >= int64_t{1} << (log_n - 3); log_n -= 3) t -= int64_t{1} << (log_n - 3);
  const double half_turns = static_cast<double>(2 * t) / static_cast<double>(int64_t{1} << log_n);
  store_complex(roots + i, {static_cast<R>(cospi(half_turns)), static_cast<R>(-sinpi(half_turns))});
}

template <class R, bool kInverse>
__global__ void __launch_bounds__(kThreads)
    outer_pass_kernel(Complex<R>* data, int64_t butterflies, int log_n, const Complex<R>* roots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= butterflies) return;
  const int log_stride = log_n - 3;
  const int64_t t = i & ((int64_t{1} << log_stride) - 1);
  Complex<R>* const first = data + (i >> log_stride << log_n) + t;
  const Complex<R> w = load_complex(roots + t);
  Complex<R> x[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) x[r] = load_complex(first + (int64_t{r} << log_stride));
  if (kInverse) multiply_by_powers(x, conjugate(w));
  butterfly<kInverse>(x);
  if (!kInverse) multiply_by_powers(x, w);
#pragma unroll
  for (int r = 0; r < 8; ++r) store_complex(first + (int64_t{r} << log_stride), x[r]);
}

// pairs = 0: no spectrum.
struct SpectrumOf {
  int64_t first_tile, tiles, pairs, first_plane, heads;
  bool conjugated;
};

template <class R>
__global__ void __launch_bounds__(kTransformThreads)
    rows_kernel(Rows<R> rows, BlockShape shape, const Complex<R>* spectrum, SpectrumOf of) {
  SharedMemory shared;
  const int log_row = rows.log_length - 3 * rows.outer, length = 1 << log_row;
  const int group = thread_index() / shape.threads;
  const int elements = 2 * SharedTransform<R>::padded(length);
  const SharedTransform<R> transform = {shared.array<R>(shape.groups * elements).from(group * elements), log_row,
      thread_index() % shape.threads, shape.threads};

  const int64_t row = static_cast<int64_t>(blockIdx.x) * shape.groups + group;
  const bool valid = row < rows.count << 3 * rows.outer;
  const int64_t slot = valid ? row >> 3 * rows.outer : 0, part = valid ? row - (slot << 3 * rows.outer) : 0;
  Complex<R>* const data = rows.data + (row << log_row);
  const Complex<R>* factor = nullptr;
  if (of.pairs > 0) {
    const int64_t plane = (of.first_tile + slot % of.tiles) / of.pairs;
    factor = spectrum + ((of.first_plane + plane) % of.heads << rows.log_length) + (part << log_row);
  }
  const Complex<R>* const roots = rows.roots + roots_before(rows.log_length, rows.outer);

  for (int i = transform.thread; i < length; i += transform.threads)
    transform.set(i, valid ? load_complex(data + i) : Complex<R>{0, 0});
  if (rows.forward)
    transform.forward_passes(log_row, roots);
  else
    sync_block();
  transform.innermost_pass(rows.forward, factor, of.conjugated, rows.inverse);
  if (rows.inverse)
    transform.inverse_passes(log_row, roots);
  else
    sync_block();
  for (int i = transform.thread; i < length && valid; i += transform.threads) store_complex(data + i, transform.get(i));
}

}  // namespace

template <class R>
void make_roots(Complex<R>* roots, int log_length, cudaStream_t stream) {
  const int64_t count = roots_before(log_length, eights(log_length));
  launch(roots_kernel<R>, dim3(blocks_for(count, kThreads)), dim3(kThreads), 0, stream, roots, log_length, count);
}

template <class R>
void outer_passes(Complex<R>* data, int64_t count, int log_length, int first, int last, bool inverse,
    const Complex<R>* roots, cudaStream_t stream) {
  const int64_t butterflies = count << (log_length - 3);
  for (int i = first; i < last; ++i) {
    const int pass = inverse ? first + last - 1 - i : i;
    launch(inverse ? outer_pass_kernel<R, true> : outer_pass_kernel<R, false>, dim3(blocks_for(butterflies, kThreads)),
        dim3(kThreads), 0, stream, data, butterflies, log_length - 3 * pass, roots + roots_before(log_length, pass));
  }
}

template <class R>
void transform_rows(const Rows<R>& rows, const Convolution<R>* c, Wave wave, cudaStream_t stream) {
  const int64_t count = rows.count << 3 * rows.outer;
  const BlockShape shape = block_shape<R>(rows.log_length - 3 * rows.outer, count, shared_memory_limit());
  SpectrumOf of = {};
  if (c != nullptr) of = {wave.first_tile, wave.tiles, c->pairs(), c->first_plane, c->heads, c->transposed};
  launch(rows_kernel<R>, dim3(blocks_for(count, shape.groups)), dim3(shape.groups * shape.threads), shape.shared,
      stream, rows, shape, c != nullptr ? c->spectrum : nullptr, of);
}

template void make_roots(Complex<float>*, int, cudaStream_t);
template void make_roots(Complex<double>*, int, cudaStream_t);
template void outer_passes(Complex<float>*, int64_t, int, int, int, bool, const Complex<float>*, cudaStream_t);
template void outer_passes(Complex<double>*, int64_t, int, int, int, bool, const Complex<double>*, cudaStream_t);
template void transform_rows(const Rows<float>&, const Convolution<float>*, Wave, cudaStream_t);
template void transform_rows(const Rows<double>&, const Convolution<double>*, Wave, cudaStream_t);

}  // namespace effattn::cuda
