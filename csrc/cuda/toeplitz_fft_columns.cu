// Tensors to columns of the transforms' type and back, through tiles of 32 tokens and 32 columns in shared memory so
// that both sides are read and written along what lies together. Bytes: the tensor once, the columns once.
#include "toeplitz_fft.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 256, kSide = 32;

struct TileOf {
  int64_t plane;
  int token, column;
};

// Block number -> tile of a plane.
EFFATTN_DEVICE TileOf tile_of(int64_t block, int tokens, int columns) {
  const int across = (columns + kSide - 1) / kSide, along = (tokens + kSide - 1) / kSide;
  return {block / across / along, static_cast<int>(block / across % along) * kSide,
      static_cast<int>(block % across) * kSide};
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Planes<T> from, int width, int64_t first_plane, const R* scale, Columns<R> to) {
  SharedMemory shared;
  const auto tile = shared.array<R>(kSide * (kSide + 1));
  const TileOf at = tile_of(blockIdx.x, to.tokens, to.count);
  const T* const origin = from.plane(first_plane + at.plane);
  for (int i = thread_index(); i < kSide * kSide; i += kThreads) {
    const int token = at.token + i / kSide, column = at.column + i % kSide;
    R x = 1;
    if (token < to.tokens && column < width) {
      x = to_float(origin[token * from.row_stride + column * from.column_stride]);
      if (scale != nullptr) x *= scale[at.plane * to.tokens + token];
    }
    tile[i / kSide * (kSide + 1) + i % kSide] = x;
  }
  sync_block();
  for (int i = thread_index(); i < kSide * kSide; i += kThreads) {
    const int token = at.token + i % kSide, column = at.column + i / kSide;
    if (token < to.tokens && column < to.count)
      to.at(at.plane, column)[token] = tile[i % kSide * (kSide + 1) + i / kSide];
  }
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Columns<R> from, int64_t first_plane, int width, float* normalizer, double eps, ResultPlanes<T> to) {
  SharedMemory shared;
  const auto tile = shared.array<R>(kSide * (kSide + 1));
  const TileOf at = tile_of(blockIdx.x, from.tokens, width);
  for (int i = thread_index(); i < kSide * kSide; i += kThreads) {
    const int token = at.token + i % kSide, column = at.column + i / kSide;
    if (token >= from.tokens || column >= width) continue;
    R x = from.at(at.plane, column)[token];
    if (normalizer != nullptr) {
      const R divisor = from.at(at.plane, width)[token] + static_cast<R>(eps);
      x = divisor != 0 ? x / divisor : R{0};
      if (column == 0) normalizer[(first_plane + at.plane) * from.tokens + token] = static_cast<float>(divisor);
    }
    tile[i % kSide * (kSide + 1) + i / kSide] = x;
  }
  sync_block();
  for (int i = thread_index(); i < kSide * kSide; i += kThreads) {
    const int token = at.token + i / kSide, column = at.column + i % kSide;
    if (token >= from.tokens || column >= width) continue;
    const R x = tile[i / kSide * (kSide + 1) + i % kSide];
    *to.at(first_plane + at.plane, token, column) = from_float<T>(static_cast<float>(x));
  }
}

unsigned tiles(int64_t planes, int64_t tokens, int64_t columns) {
  return static_cast<unsigned>(planes * ceil_div(tokens, kSide) * ceil_div(columns, kSide));
}

}  // namespace

template <class R>
void pack_columns(const Tensor& tensor, int64_t first_plane, int64_t planes, const R* scale, const Columns<R>& columns,
    cudaStream_t stream) {
  with_element_type(tensor.dtype, [&](auto element) {
    using T = decltype(element);
    launch(pack_kernel<T, R>, dim3(tiles(planes, columns.tokens, columns.count)), dim3(kThreads),
        shared_bytes<R>(kSide * (kSide + 1)), stream, planes_of<T>(tensor), static_cast<int>(tensor.size[3]),
        first_plane, scale, columns);
  });
}

template <class R>
void unpack_columns(const Columns<R>& columns, int64_t first_plane, int64_t planes, const Tensor& tensor,
    float* normalizer, double eps, cudaStream_t stream) {
  const int width = static_cast<int>(tensor.size[3]);
  with_element_type(tensor.dtype, [&](auto element) {
    using T = decltype(element);
    launch(unpack_kernel<T, R>, dim3(tiles(planes, columns.tokens, width)), dim3(kThreads),
        shared_bytes<R>(kSide * (kSide + 1)), stream, columns, first_plane, width, normalizer, eps,
        result_planes_of<T>(tensor));
  });
}

template void pack_columns(const Tensor&, int64_t, int64_t, const float*, const Columns<float>&, cudaStream_t);
template void pack_columns(const Tensor&, int64_t, int64_t, const double*, const Columns<double>&, cudaStream_t);
template void unpack_columns(const Columns<float>&, int64_t, int64_t, const Tensor&, float*, double, cudaStream_t);
template void unpack_columns(const Columns<double>&, int64_t, int64_t, const Tensor&, float*, double, cudaStream_t);

}  // namespace effattn::cuda
