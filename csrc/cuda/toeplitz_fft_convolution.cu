// out_n(i) = sum_m left_m(i) T(middle_m * right_n)(i), the operation of toeplitz_fft.h, and never an (N, M D) tensor.
//
// Where a transform fits into a block (L <= 16384 in float, 8192 in double, on chips with 227 KB), a block owns a pair
// of columns n of one plane (b, h), or several where L is small. Shared memory holds its L complex numbers; the sums of
// the places that a thread has in the first and the last pass, the same ones, are in registers up to L = 4096, then in
// `out`. For m after m: the first pass takes middle * right from global memory, half of its input being zeros; the
// innermost one multiplies with the spectrum; the last one, of whose output half is wanted, adds left * it to the sums.
//
// Longer transforms go through global memory in waves of as many pairs and columns m as scratch memory holds: the first
// pass a kernel that writes it, rows in shared memory (toeplitz_fft_passes.cu), the last pass a kernel that contracts.
//
// FLOPs for each (b, h): 10 L log2(L) M pairs, pairs = (D + 1) / 2 rounded up, so 10 N log2(2 N) M (D + 1) for L = 2 N.
// Bytes: a pair reads left, middle and its columns M times, all from caches but the first time, and writes once; the
// spectrum, L, M times. In waves: 4 + 4 (outer passes - 1) + 2 times sizeof(Complex) L / 2 for each m and pair, more or
// less, in L2.
#include "toeplitz_fft.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 256;

template <class R>
EFFATTN_DEVICE void add_or_set(R* to, R x, bool add) {
  *to = add ? *to + x : x;
}

// kInRegisters: a thread has one butterfly in the first and the last pass, and its sums in registers. Else they are in
// `out`, where nobody else has them.
template <class R, bool kInRegisters>
__global__ void __launch_bounds__(kTransformThreads) convolve_kernel(Convolution<R> c, BlockShape shape) {
  SharedMemory shared;
  const int length = 1 << c.log_length, log_stride = c.log_length - 3, stride = 1 << log_stride;
  const int group = thread_index() / shape.threads, thread = thread_index() % shape.threads;
  const int elements = 2 * SharedTransform<R>::padded(length);
  const SharedTransform<R> transform = {
      shared.array<R>(shape.groups * elements).from(group * elements), c.log_length, thread, shape.threads};

  const int pairs = c.pairs(), blocks = (pairs + shape.groups - 1) / shape.groups;
  const int64_t plane = blockIdx.x / blocks;
  const int pair = static_cast<int>(blockIdx.x % blocks) * shape.groups + group;
  const bool active = pair < pairs, has_odd = 2 * pair + 1 < c.right.count;
  const R* const even = c.right.at(plane, active ? 2 * pair : 0);
  const Complex<R>* const spectrum = c.spectrum + (c.head(plane) << c.log_length);

  int tokens[4];
  Complex<R> sums[4];
  const auto find_tokens = [&](int t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) tokens[r] = active ? c.places.token(t + (r << log_stride)) : -1;
  };
  if (kInRegisters) find_tokens(thread);
#pragma unroll
  for (int r = 0; r < 4; ++r) sums[r] = {0, 0};

  for (int m = 0; m < c.middle.count; ++m) {
    const R* const factor = c.middle.at(plane, m);
    for (int t = thread; t < stride; t += kInRegisters ? stride : shape.threads) {
      if (!kInRegisters) find_tokens(t);
      Complex<R> x[8];
      c.load(x, tokens, factor, even, has_odd);
      butterfly<false>(x);
      multiply_by_powers(x, load_complex(c.roots + t));
#pragma unroll
      for (int r = 0; r < 8; ++r) transform.set(t + (r << log_stride), x[r]);
    }
    transform.forward_passes(log_stride, c.roots + stride);
    transform.innermost_pass(true, spectrum, c.transposed, true);
    transform.inverse_passes(log_stride, c.roots + stride);
    const R* const weight = c.left.at(plane, m);
    for (int t = thread; t < stride; t += kInRegisters ? stride : shape.threads) {
      if (!kInRegisters) find_tokens(t);
      Complex<R> x[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) x[r] = transform.get(t + (r << log_stride));
      multiply_by_powers(x, conjugate(load_complex(c.roots + t)));
      butterfly<true>(x);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (tokens[r] < 0) continue;
        const R scale = weight[tokens[r]];
        if (kInRegisters) {
          sums[r] = {sums[r].re + scale * x[r].re, sums[r].im + scale * x[r].im};
        } else {
          add_or_set(c.out.at(plane, 2 * pair) + tokens[r], scale * x[r].re, m > 0);
          if (has_odd) add_or_set(c.out.at(plane, 2 * pair + 1) + tokens[r], scale * x[r].im, m > 0);
        }
      }
    }
  }

  if constexpr (kInRegisters) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (tokens[r] < 0) continue;
      c.out.at(plane, 2 * pair)[tokens[r]] = sums[r].re;
      if (has_odd) c.out.at(plane, 2 * pair + 1)[tokens[r]] = sums[r].im;
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Convolution<R> c, Wave wave, int64_t butterflies, Complex<R>* scratch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= butterflies) return;
  const int log_stride = c.log_length - 3, pairs = c.pairs();
  const int t = static_cast<int>(i & ((int64_t{1} << log_stride) - 1));
  const int64_t slot = i >> log_stride, tile = wave.first_tile + slot % wave.tiles, plane = tile / pairs;
  const int column = 2 * static_cast<int>(tile % pairs), m = wave.first_column + static_cast<int>(slot / wave.tiles);
  int tokens[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) tokens[r] = c.places.token(t + (r << log_stride));
  Complex<R> x[8];
  c.load(x, tokens, c.middle.at(plane, m), c.right.at(plane, column), column + 1 < c.right.count);
  butterfly<false>(x);
  multiply_by_powers(x, load_complex(c.roots + t));
#pragma unroll
  for (int r = 0; r < 8; ++r) store_complex(scratch + (slot << c.log_length) + t + (int64_t{r} << log_stride), x[r]);
}

// The last pass, and its contraction over the wave's columns m; added to `out` but for the first of them.
template <class R>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Convolution<R> c, Wave wave, int64_t butterflies, const Complex<R>* scratch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= butterflies) return;
  const int log_stride = c.log_length - 3, pairs = c.pairs();
  const int t = static_cast<int>(i & ((int64_t{1} << log_stride) - 1));
  const int64_t tile = wave.first_tile + (i >> log_stride), plane = tile / pairs;
  const int column = 2 * static_cast<int>(tile % pairs);
  const Complex<R> w = conjugate(load_complex(c.roots + t));
  int tokens[4];
  Complex<R> sums[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    tokens[r] = c.places.token(t + (r << log_stride));
    sums[r] = {0, 0};
  }
  for (int m = 0; m < wave.columns; ++m) {
    const Complex<R>* const from = scratch + ((m * wave.tiles + (i >> log_stride)) << c.log_length) + t;
    Complex<R> x[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) x[r] = load_complex(from + (int64_t{r} << log_stride));
    multiply_by_powers(x, w);
    butterfly<true>(x);
    const R* const weight = c.left.at(plane, wave.first_column + m);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const R scale = tokens[r] >= 0 ? weight[tokens[r]] : R{0};
      sums[r] = {sums[r].re + scale * x[r].re, sums[r].im + scale * x[r].im};
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (tokens[r] < 0) continue;
    add_or_set(c.out.at(plane, column) + tokens[r], sums[r].re, wave.first_column > 0);
    if (column + 1 < c.out.count)
      add_or_set(c.out.at(plane, column + 1) + tokens[r], sums[r].im, wave.first_column > 0);
  }
}

}  // namespace

template <class R>
int outer_passes_of(int log_length) {
  int outer = 0;
  while (outer < eights(log_length) && block_shape<R>(log_length - 3 * outer, 1, shared_memory_limit()).groups == 0)
    ++outer;
  return outer;
}

template <class R>
void scatter(const Convolution<R>& c, Wave wave, Complex<R>* scratch, cudaStream_t stream) {
  const int64_t butterflies = wave.tiles * wave.columns << (c.log_length - 3);
  launch(scatter_kernel<R>, dim3(blocks_for(butterflies, kThreads)), dim3(kThreads), 0, stream, c, wave, butterflies,
      scratch);
}

template <class R>
void convolve(const Convolution<R>& c, Complex<R>* scratch, int64_t slots, cudaStream_t stream) {
  const int outer = outer_passes_of<R>(c.log_length);
  if (outer == 0) {
    const BlockShape shape = block_shape<R>(c.log_length, c.pairs(), shared_memory_limit());
    const bool in_registers = shape.threads == 1 << (c.log_length - 3);
    launch(in_registers ? convolve_kernel<R, true> : convolve_kernel<R, false>,
        dim3(static_cast<unsigned>(c.planes * ceil_div(c.pairs(), shape.groups))), dim3(shape.groups * shape.threads),
        shape.shared, stream, c, shape);
    return;
  }
  for_each_wave(c, slots, [&](Wave wave) {
    const int64_t count = wave.tiles * wave.columns, butterflies = wave.tiles << (c.log_length - 3);
    scatter(c, wave, scratch, stream);
    outer_passes(scratch, count, c.log_length, 1, outer, false, c.roots, stream);
    transform_rows(Rows<R>{scratch, count, c.log_length, outer, c.roots, true, true}, &c, wave, stream);
    outer_passes(scratch, count, c.log_length, 1, outer, true, c.roots, stream);
    launch(gather_kernel<R>, dim3(blocks_for(butterflies, kThreads)), dim3(kThreads), 0, stream, c, wave, butterflies,
        static_cast<const Complex<R>*>(scratch));
  });
}

template int outer_passes_of<float>(int);
template int outer_passes_of<double>(int);
template void scatter(const Convolution<float>&, Wave, Complex<float>*, cudaStream_t);
template void scatter(const Convolution<double>&, Wave, Complex<double>*, cudaStream_t);
template void convolve(const Convolution<float>&, Complex<float>*, int64_t, cudaStream_t);
template void convolve(const Convolution<double>&, Complex<double>*, int64_t, cudaStream_t);

}  // namespace effattn::cuda
