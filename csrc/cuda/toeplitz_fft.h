// What the files toeplitz_fft*.cu share. All work of method "fft" is one operation on three sets of columns, stored
// column by column in the type R that transforms have (float, or double for method "double fft"):
//
//   out_n(i) = sum_m left_m(i) T(middle_m * right_n)(i),   T(x)_i = sum_j c_(j - i) x_j, or its transpose
//
//              left          middle        right           out
//   output     query         key           value, 1        sums, normalizer
//   dQ         G, -delta     value, 1      key             grad_query
//   dK         value, 1      G, -delta     query           grad_key      transposed
//   dV         key           query         G               grad_value    transposed
//
// with G = grad_output / normalizer and delta = (grad_output . output) / normalizer as one more column.
//
// Token i stands at place p_i of a line of zeros (api.h), so T is a cyclic convolution of length L = 2^l >= 2 P - 1, P
// places, by the transforms of fft.h. c is real: two columns of `right` are the real and the imaginary part of one
// transform and need no separation. The spectrum of c, one a head, is made in double.
#pragma once

#include <algorithm>

#include "fft.h"
#include "tile.h"

namespace effattn::cuda {

struct Places {
  int tokens, grid_w, count;
  uint64_t reciprocal;  // of the period 2 grid_w - 1, times 2^shift, rounded up: exact for all places
  int shift;

  // The token at place p, -1 where there is none. Tokens stand in the first `count` places, at most half of L.
  EFFATTN_DEVICE int token(int p) const {
    if (p >= count) return -1;
    const int row = static_cast<int>(p * reciprocal >> shift), column = p - row * (2 * grid_w - 1);
    return column < grid_w ? row * grid_w + column : -1;
  }
};

inline Places places_of(const Toeplitz& a) {
  const int64_t period = 2 * a.grid_w - 1, count = (a.grid_h - 1) * period + a.grid_w;
  int shift = 0;
  while ((int64_t{1} << shift) < count * period) ++shift;
  return {static_cast<int>(a.query.size[2]), static_cast<int>(a.grid_w), static_cast<int>(count),
      (uint64_t{1} << shift) / period + 1, shift};
}

inline int log_length_of(const Places& places) {
  int log_length = 4;
  while ((int64_t{1} << log_length) < 2 * int64_t{places.count} - 1) ++log_length;
  return log_length;
}

// Columns (planes, columns, tokens): contiguous but for the distance of planes, which may hold further columns.
template <class R>
struct Columns {
  R* data;
  int64_t plane_stride;
  int count, tokens;

  EFFATTN_DEVICE R* at(int64_t plane, int column) const {
    return data + plane * plane_stride + static_cast<int64_t>(column) * tokens;
  }
};

template <class R>
struct Convolution {
  Columns<R> left, middle, right, out;  // left.count = middle.count, right.count = out.count
  const Complex<R>*spectrum, *roots;    // (heads, L), and fft.h
  int64_t planes, first_plane, heads;   // plane p of the columns is the call's first_plane + p
  Places places;
  int log_length;
  bool transposed;

  __host__ EFFATTN_DEVICE int pairs() const { return (right.count + 1) / 2; }
  EFFATTN_DEVICE int64_t head(int64_t plane) const { return (first_plane + plane) % heads; }

  // The input of the first butterfly of a transform, places t + r L / 8: the others hold no tokens. `even`: the first
  // column of a pair, whose second one follows it if there is one.
  EFFATTN_DEVICE void load(
      Complex<R> (&x)[8], const int (&tokens)[4], const R* factor, const R* even, bool has_odd) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      x[r] = x[r + 4] = {0, 0};
      if (tokens[r] < 0) continue;
      const R scale = factor[tokens[r]];
      x[r] = {scale * even[tokens[r]], has_odd ? scale * even[places.tokens + tokens[r]] : R{0}};
    }
  }
};

// ---- Transforms in global memory (toeplitz_fft_passes.cu): the first `outer` passes there, rows of L / 8^outer
// elements in shared memory

// Slots of scratch memory: slot s holds the transform of middle column first_column + s / tiles and of tile first_tile
// + s % tiles, a tile being a pair of columns of `right` of one plane.
struct Wave {
  int64_t first_tile, tiles;
  int first_column, columns;
};

template <class R>
void make_roots(Complex<R>* roots, int log_length, cudaStream_t stream);

// Passes first..last - 1 of `count` transforms.
template <class R>
void outer_passes(Complex<R>* data, int64_t count, int log_length, int first, int last, bool inverse,
    const Complex<R>* roots, cudaStream_t stream);

// The rows of `count` transforms: forward, times the spectrum that the convolution has for the wave's slots, inverse.
template <class R>
struct Rows {
  Complex<R>* data;
  int64_t count;
  int log_length, outer;
  const Complex<R>* roots;
  bool forward, inverse;
};
template <class R>
void transform_rows(const Rows<R>& rows, const Convolution<R>* convolution, Wave wave, cudaStream_t stream);

// ---- The operation (toeplitz_fft_convolution.cu)

// Passes that must run in global memory on this chip, 0: a transform fits into a block.
template <class R>
int outer_passes_of(int log_length);

template <class R>
void convolve(const Convolution<R>& convolution, Complex<R>* scratch, int64_t slots, cudaStream_t stream);

// The first pass of the transforms of a wave, from the columns into scratch memory.
template <class R>
void scatter(const Convolution<R>& convolution, Wave wave, Complex<R>* scratch, cudaStream_t stream);

// Calls function(wave) for waves of at most `slots` slots that together are all tiles and middle columns.
template <class R, class Function>
void for_each_wave(const Convolution<R>& c, int64_t slots, Function function) {
  const int64_t tiles = c.planes * c.pairs(), step = std::min(tiles, slots);
  for (int64_t tile = 0; tile < tiles; tile += step) {
    const int64_t count = std::min(step, tiles - tile);
    const int columns = static_cast<int>(std::clamp<int64_t>(slots / count, 1, std::max(c.middle.count, 1)));
    for (int column = 0; column < c.middle.count; column += columns)
      function(Wave{tile, count, column, std::min(columns, c.middle.count - column)});
  }
}

// ---- Columns (toeplitz_fft_columns.cu)

// Columns of R from planes first_plane... of a tensor (B, H, N, C) with any strides; row i times scale[plane, i] where
// that is given. A column behind those of the tensor is of ones.
template <class R>
void pack_columns(const Tensor& tensor, int64_t first_plane, int64_t planes, const R* scale, const Columns<R>& columns,
    cudaStream_t stream);

// Back, rounded. With `normalizer`: the column behind those of the tensor, plus eps, is the normalizer of a row, which
// is stored and divided by; 0: a row of zeros.
template <class R>
void unpack_columns(const Columns<R>& columns, int64_t first_plane, int64_t planes, const Tensor& tensor,
    float* normalizer, double eps, cudaStream_t stream);

// ---- The spectrum (toeplitz_fft.cu)

// What a call needs beside columns: the spectrum in R, divided by L, and the roots.
template <class R>
struct Kernel {
  Complex<R>*spectrum, *roots;
  double* highest;                      // max b, one a head; 0 where there is none
  double* norm;                         // of c, one a head
  Complex<double>*exact, *exact_roots;  // the same in double
  int log_length;
};
template <class R>
void make_kernel(const Toeplitz& a, const Kernel<R>& kernel, cudaStream_t stream);

// ---- Workspaces

// Cuts memory into arrays; with no memory it only adds up what they need.
class Arena {
 public:
  explicit Arena(void* memory) : begin_(static_cast<char*>(memory)), bytes_(0) {}
  template <class T>
  T* take(int64_t count) {
    char* const at = begin_ + bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_;
};

// What memory a call takes is bounded, whatever its batch: transforms in global memory about as much as a large cache
// holds, columns twice that, but at least those of one plane.
inline int64_t scratch_bytes() { return 128 * static_cast<int64_t>(shared_memory_limit()); }
inline int64_t column_bytes() { return 2 * scratch_bytes(); }

template <class R>
int64_t slots_of(int log_length, int64_t wanted) {
  const int64_t room = scratch_bytes() / (static_cast<int64_t>(sizeof(Complex<R>)) << log_length);
  return std::clamp<int64_t>(room, 1, std::max<int64_t>(wanted, 1));
}

template <class R>
int64_t planes_at_once(int64_t planes, int64_t tokens, int64_t columns) {
  const int64_t each = std::max<int64_t>(tokens * columns * sizeof(R), 1);
  return std::clamp<int64_t>(column_bytes() / each, 1, std::max<int64_t>(planes, 1));
}

template <class R>
Kernel<R> take_kernel(const Toeplitz& a, Arena& arena) {
  const int log_length = log_length_of(places_of(a));
  const int64_t heads = a.query.size[1], length = int64_t{1} << log_length,
                roots = roots_before(log_length, eights(log_length));
  Kernel<R> kernel = {};
  kernel.log_length = log_length;
  kernel.highest = arena.take<double>(heads);
  kernel.norm = arena.take<double>(heads);
  kernel.exact = arena.take<Complex<double>>(heads * length);
  kernel.exact_roots = arena.take<Complex<double>>(roots);
  if constexpr (sizeof(R) == sizeof(double)) {
    kernel.spectrum = kernel.exact;
    kernel.roots = kernel.exact_roots;
  } else {
    kernel.spectrum = arena.take<Complex<R>>(heads * length);
    kernel.roots = arena.take<Complex<R>>(roots);
  }
  return kernel;
}

inline unsigned blocks_for(int64_t threads, int64_t block) { return static_cast<unsigned>(ceil_div(threads, block)); }

}  // namespace effattn::cuda
