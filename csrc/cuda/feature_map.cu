// Random features of the rows x of (B, H, N, D), with M directions w a head:
//
//   positive       phi_m = exp(w_m . x - |x|^2 / 2 - s) / sqrt(M)
//   trigonometric  phi   = exp(|x|^2 / 2 - s) [sin(w_m . x), cos(w_m . x)] / sqrt(M)
//   x <- x / |x| first with `normalize`; s: 0, the largest exponent of the row, or of the head among rows not masked
//
// A block owns 32 rows of one plane (b, h), in shared memory as floats, and takes the directions 32 at a time beside
// them: a warp has 4 rows, a lane one direction. The largest exponent of a row comes from a pass over the directions of
// its own (positive; the trigonometric exponent is the same for all of them); that of a head from a launch that leaves
// one maximum a block, which all blocks of the plane then read.
//
// Gradients, e = dL/d exponent, p = dL/d(w . x), s without one:
//   positive       e_m = G_m phi_m,  dx = sum_m e_m (w_m - x),  dw_m = sum_i e_m x
//   trigonometric  p_m = G_sin phi_cos - G_cos phi_sin,  dx = sum_m p_m w_m + x sum_m G . phi,  dw_m = sum_i p_m x
//   with `normalize` dx <- (dx - x (x . dx)) / |x|, 0 for a row of zeros
// One launch for dx, tiles as above. Another for dw: a block owns 32 directions and a part of the rows, sum_splits adds
// the parts of all batches in order.
//
// FLOPs 2 N M D for each (b, h), twice that for the largest of rows or of the head, 6 N M D backwards. Bytes: x and
// features once (x twice for "head"), the directions once for every 32 rows, from L2; backwards x, G and phi twice.
#include "tile.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = 32, kDirections = 32;
constexpr int kRowsPerWarp = kRows / kWarps, kMaxWidth = 256, kPieces = kMaxWidth / kWarp;

struct Extent {
  int64_t planes, heads;
  int rows, width, directions;
  bool trigonometric, normalize;
  FeatureShift shift;
  const float* projection;
  const bool* mask;

  __host__ EFFATTN_DEVICE int row_blocks() const { return (rows + kRows - 1) / kRows; }
  __host__ EFFATTN_DEVICE int pitch() const { return width + 1; }  // lanes that take a column take other banks
  EFFATTN_DEVICE bool masked(int64_t plane, int row) const {
    return mask != nullptr && mask[plane / heads * rows + row];
  }
};

Extent extent_of(const FeatureMap& a) {
  return {a.x.size[0] * a.x.size[1], max(a.x.size[1], int64_t{1}), static_cast<int>(a.x.size[2]),
      static_cast<int>(a.x.size[3]), static_cast<int>(a.directions), a.trigonometric, a.normalize, a.shift,
      a.projection, a.mask};
}

// 32 rows of x from `first` on, divided by their lengths if asked for, zeros behind the last; the inverses of the
// lengths (1 where nothing was divided, 0 for a row of zeros) and half the squares. A barrier is up to the caller.
template <class T>
EFFATTN_DEVICE void load_rows(SharedArray<float> x, SharedArray<float> inverses, SharedArray<float> half_squares,
    const Planes<T>& from, int64_t plane, int first, const Extent& extent) {
  const T* const origin = from.plane(plane);
#pragma unroll 1
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int row = warp_index() * kRowsPerWarp + i, token = first + row;
    const T* const at = origin + token * from.row_stride;
    float piece[kPieces], squares = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int d = lane_index() + j * kWarp;
      piece[j] = token < extent.rows && d < extent.width ? to_float(at[d * from.column_stride]) : 0.0f;
      squares = fmaf(piece[j], piece[j], squares);
    }
    squares = warp_reduce(squares, Sum());
    float inverse = 1;
    if (extent.normalize) {
      inverse = squares == 0 ? 0.0f : rsqrtf(squares);
      squares = 0;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        piece[j] *= inverse;
        squares = fmaf(piece[j], piece[j], squares);
      }
      squares = warp_reduce(squares, Sum());
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
      if (lane_index() + j * kWarp < extent.width) x[row * extent.pitch() + lane_index() + j * kWarp] = piece[j];
    if (lane_index() == 0) {
      inverses[row] = inverse;
      half_squares[row] = squares / 2;
    }
  }
}

// 32 directions from `first` on, zeros behind the last; no barrier.
EFFATTN_DEVICE void load_directions(SharedArray<float> w, int64_t plane, int first, const Extent& extent) {
  const float* const from =
      extent.projection + (plane % extent.heads * extent.directions + first) * static_cast<int64_t>(extent.width);
  const int count = min(kDirections, extent.directions - first) * extent.width;
  for (int i = thread_index(); i < kDirections * extent.width; i += kThreads)
    w[i / extent.width * extent.pitch() + i % extent.width] = i < count ? from[i] : 0.0f;
}

// Calls function(i, m, w_m . x) for the warp's row i = 0.. and the lane's direction m, tile after tile.
template <class Function>
EFFATTN_DEVICE void for_each_product(
    SharedArray<float> x, SharedArray<float> w, int64_t plane, const Extent& extent, Function function) {
  for (int first = 0; first < extent.directions; first += kDirections) {
    sync_block();
    load_directions(w, plane, first, extent);
    sync_block();
    float product[kRowsPerWarp] = {};
    for (int d = 0; d < extent.width; ++d) {
      const float factor = w[lane_index() * extent.pitch() + d];
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i)
        product[i] = fmaf(x[(warp_index() * kRowsPerWarp + i) * extent.pitch() + d], factor, product[i]);
    }
    if (first + lane_index() >= extent.directions) continue;
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) function(i, first + lane_index(), product[i]);
  }
}

// The largest w . x of each of the warp's rows, in every lane.
EFFATTN_DEVICE void largest_products(
    float (&largest)[kRowsPerWarp], SharedArray<float> x, SharedArray<float> w, int64_t plane, const Extent& extent) {
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) largest[i] = -INFINITY;
  for_each_product(x, w, plane, extent, [&](int i, int, float product) { largest[i] = max(largest[i], product); });
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) largest[i] = warp_reduce(largest[i], Max());
}

struct RowTile {
  SharedArray<float> x, w, inverses, half_squares, scratch;
  EFFATTN_DEVICE explicit RowTile(const Extent& extent) {
    SharedMemory shared;
    x = shared.array<float>(kRows * extent.pitch());
    w = shared.array<float>(kDirections * extent.pitch());
    inverses = shared.array<float>(kRows);
    half_squares = shared.array<float>(kRows);
    scratch = shared.array<float>(kDirections * (kRows + 1));
  }
  static size_t bytes(const Extent& extent) {
    return shared_bytes<float>(kRows * extent.pitch()) + shared_bytes<float>(kDirections * extent.pitch()) +
           2 * shared_bytes<float>(kRows) + shared_bytes<float>(kDirections * (kRows + 1));
  }
};

// highest[plane, block]: the largest exponent of a block's rows that are not masked.
template <class T>
__global__ void __launch_bounds__(kThreads) highest_kernel(Planes<T> input, Extent extent, float* highest) {
  const RowTile tile(extent);
  const int64_t plane = blockIdx.x / extent.row_blocks();
  const int first = static_cast<int>(blockIdx.x % extent.row_blocks()) * kRows;
  load_rows(tile.x, tile.inverses, tile.half_squares, input, plane, first, extent);
  sync_block();
  float largest[kRowsPerWarp], most = -INFINITY;
  if (!extent.trigonometric) largest_products(largest, tile.x, tile.w, plane, extent);
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int row = warp_index() * kRowsPerWarp + i;
    if (first + row >= extent.rows || extent.masked(plane, first + row)) continue;
    const float half_square = tile.half_squares[row];
    most = max(most, extent.trigonometric ? half_square : largest[i] - half_square);
  }
  most = block_reduce(most, Max(), tile.scratch);
  if (thread_index() == 0) highest[blockIdx.x] = most;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    feature_kernel(Planes<T> input, Extent extent, const float* highest, ResultPlanes<T> features) {
  const RowTile tile(extent);
  const int blocks = extent.row_blocks(), row = warp_index() * kRowsPerWarp;
  const int64_t plane = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * kRows;
  load_rows(tile.x, tile.inverses, tile.half_squares, input, plane, first, extent);
  sync_block();

  float offset[kRowsPerWarp], largest[kRowsPerWarp];  // exponent = w . x - offset, trigonometric: -offset
  if (extent.shift == FeatureShift::kRow && !extent.trigonometric)
    largest_products(largest, tile.x, tile.w, plane, extent);
  float most = -INFINITY;
  if (extent.shift == FeatureShift::kHead) {
    for (int i = thread_index(); i < blocks; i += kThreads) most = max(most, highest[plane * blocks + i]);
    most = block_reduce(most, Max(), tile.scratch);
  }
  const float shift = most == -INFINITY ? 0.0f : most;
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const float half_square = tile.half_squares[row + i];
    offset[i] = (extent.trigonometric ? -half_square : half_square) + shift;
    if (extent.shift == FeatureShift::kRow) offset[i] = extent.trigonometric ? 0.0f : largest[i];
  }

  const float factor = 1 / sqrtf(static_cast<float>(extent.directions));
  for_each_product(tile.x, tile.w, plane, extent, [&](int i, int m, float product) {
    const int token = first + row + i;
    if (token >= extent.rows) return;
    const bool masked = extent.masked(plane, token);
    if (!extent.trigonometric) {
      const float feature = masked ? 0.0f : factor * expf(product - offset[i]);
      *features.at(plane, token, m) = from_float<T>(feature);
      return;
    }
    const float amplitude = masked ? 0.0f : factor * expf(-offset[i]);
    // sin(pi t) needs no stack, unlike sin(x) of a large x; t is rounded to a period in double.
    const double half_turns = static_cast<double>(product) * 0.31830988618379067154;
    const float rest = static_cast<float>(half_turns - 2 * rint(half_turns / 2));
    *features.at(plane, token, m) = from_float<T>(amplitude * sinpif(rest));
    *features.at(plane, token, extent.directions + m) = from_float<T>(amplitude * cospif(rest));
  });
}

// Of a row and a direction: what w, and for x also what the exponent, gets.
template <class T>
EFFATTN_DEVICE void product_gradient(float& of_product, float& of_exponent, const T* gradient, int64_t gradient_stride,
    const T* feature, int64_t feature_stride, int m, const Extent& extent) {
  const float g = to_float(gradient[m * gradient_stride]), f = to_float(feature[m * feature_stride]);
  if (!extent.trigonometric) {
    of_product = g * f;
    of_exponent = -of_product;
    return;
  }
  const int n = m + extent.directions;
  const float h = to_float(gradient[n * gradient_stride]), e = to_float(feature[n * feature_stride]);
  of_product = g * e - h * f;
  of_exponent = g * f + h * e;
}

template <class T>
__global__ void __launch_bounds__(kThreads) input_gradient_kernel(
    Planes<T> grad_features, Planes<T> features, Planes<T> input, Extent extent, ResultPlanes<T> grad_input) {
  const RowTile tile(extent);
  const int row = warp_index() * kRowsPerWarp;
  const int64_t plane = blockIdx.x / extent.row_blocks();
  const int first = static_cast<int>(blockIdx.x % extent.row_blocks()) * kRows;
  load_rows(tile.x, tile.inverses, tile.half_squares, input, plane, first, extent);
  const T *g = grad_features.plane(plane), *f = features.plane(plane);

  float sums[kRowsPerWarp][kPieces] = {}, of_x[kRowsPerWarp] = {};
  for (int direction = 0; direction < extent.directions; direction += kDirections) {
    sync_block();
    load_directions(tile.w, plane, direction, extent);
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int token = first + row + i, m = direction + lane_index();
      float of_product = 0, of_exponent = 0;
      if (token < extent.rows && m < extent.directions)
        product_gradient(of_product, of_exponent, g + token * grad_features.row_stride, grad_features.column_stride,
            f + token * features.row_stride, features.column_stride, m, extent);
      of_x[i] += of_exponent;
      tile.scratch[lane_index() * (kRows + 1) + row + i] = of_product;
    }
    sync_block();
    for (int m = 0; m < min(kDirections, extent.directions - direction); ++m) {
      float p[kRowsPerWarp];
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) p[i] = tile.scratch[m * (kRows + 1) + row + i];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int d = lane_index() + j * kWarp;
        if (d >= extent.width) continue;
        const float w = tile.w[m * extent.pitch() + d];
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) sums[i][j] = fmaf(p[i], w, sums[i][j]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const float factor = warp_reduce(of_x[i], Sum());
    float along = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int d = lane_index() + j * kWarp;
      if (d >= extent.width) continue;
      const float x = tile.x[(row + i) * extent.pitch() + d];
      sums[i][j] = fmaf(factor, x, sums[i][j]);
      along = fmaf(x, sums[i][j], along);
    }
    along = warp_reduce(along, Sum());
    const float inverse = tile.inverses[row + i];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int d = lane_index() + j * kWarp;
      if (first + row + i >= extent.rows || d >= extent.width) continue;
      const float x = tile.x[(row + i) * extent.pitch() + d];
      const float gradient = extent.normalize ? (sums[i][j] - x * along) * inverse : sums[i][j];
      *grad_input.at(plane, first + row + i, d) = from_float<T>(gradient);
    }
  }
}

// partial[split, plane, m, d] over the rows of a split; a warp has 4 of the block's directions.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) projection_gradient_kernel(
    Planes<T> grad_features, Planes<T> features, Planes<T> input, Extent extent, int64_t split_rows, float* partial) {
  const RowTile tile(extent);
  const int tiles = (extent.directions + kDirections - 1) / kDirections;
  const int direction = static_cast<int>(blockIdx.x % tiles) * kDirections, own = warp_index() * kRowsPerWarp;
  const int64_t plane = blockIdx.x / tiles % extent.planes, split = blockIdx.x / tiles / extent.planes;
  const T *g = grad_features.plane(plane), *f = features.plane(plane);
  const int64_t end = min(static_cast<int64_t>(extent.rows), (split + 1) * split_rows);

  float sums[kRowsPerWarp][kPieces] = {};
  for (int first = static_cast<int>(split * split_rows); first < end; first += kRows) {
    sync_block();
    load_rows(tile.x, tile.inverses, tile.half_squares, input, plane, first, extent);
#pragma unroll 1
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int token = first + own + i, m = direction + lane_index();
      float of_product = 0, of_exponent = 0;
      if (token < end && m < extent.directions)
        product_gradient(of_product, of_exponent, g + token * grad_features.row_stride, grad_features.column_stride,
            f + token * features.row_stride, features.column_stride, m, extent);
      tile.scratch[lane_index() * (kRows + 1) + own + i] = of_product;
    }
    sync_block();
    for (int row = 0; row < kRows; ++row) {
      float p[kRowsPerWarp];
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) p[i] = tile.scratch[(own + i) * (kRows + 1) + row];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int d = lane_index() + j * kWarp;
        if (d >= extent.width) continue;
        const float x = tile.x[row * extent.pitch() + d];
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) sums[i][j] = fmaf(p[i], x, sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i)
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int m = direction + own + i, d = lane_index() + j * kWarp;
      if (m < extent.directions && d < extent.width)
        partial[((split * extent.planes + plane) * extent.directions + m) * extent.width + d] = sums[i][j];
    }
}

Splits splits_of(const Extent& extent) {
  const int64_t tiles = extent.planes * ceil_div(extent.directions, kDirections);
  return split_depth(tiles, extent.rows, kRows, kRows);
}

}  // namespace

int64_t feature_map_workspace(const FeatureMap& a) {
  const Extent extent = extent_of(a);
  return a.shift == FeatureShift::kHead ? extent.planes * extent.row_blocks() * 4 : 0;
}

void feature_map(const FeatureMap& a, const Tensor& features, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const Extent extent = extent_of(a);
  const dim3 grid(static_cast<unsigned>(extent.planes * extent.row_blocks())), block(kThreads);
  float* const highest = static_cast<float*>(workspace);
  with_element_type(a.x.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.shift == FeatureShift::kHead)
      launch(highest_kernel<T>, grid, block, RowTile::bytes(extent), stream, planes_of<T>(a.x), extent, highest);
    launch(feature_kernel<T>, grid, block, RowTile::bytes(extent), stream, planes_of<T>(a.x), extent,
        static_cast<const float*>(highest), result_planes_of<T>(features));
  });
}

int64_t feature_map_gradient_workspace(const FeatureMapGradient& g) {
  const Extent extent = extent_of(g.of);
  return splits_of(extent).count * extent.planes * extent.directions * extent.width * 4;
}

void feature_map_gradient(const FeatureMapGradient& g, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const Extent extent = extent_of(g.of);
  const Splits splits = splits_of(extent);
  const dim3 block(kThreads);
  const size_t shared = RowTile::bytes(extent);
  float* const partial = static_cast<float*>(workspace);
  with_element_type(g.of.x.dtype, [&](auto element) {
    using T = decltype(element);
    const Planes<T> gradient = planes_of<T>(g.grad_features), features = planes_of<T>(g.features),
                    input = planes_of<T>(g.of.x);
    launch(input_gradient_kernel<T>, dim3(static_cast<unsigned>(extent.planes * extent.row_blocks())), block, shared,
        stream, gradient, features, input, extent, result_planes_of<T>(g.grad_x));
    const int64_t blocks = splits.count * extent.planes * ceil_div(extent.directions, kDirections);
    launch(projection_gradient_kernel<T>, dim3(static_cast<unsigned>(blocks)), block, shared, stream, gradient,
        features, input, extent, splits.depth, partial);
  });
  const int64_t count = g.of.x.size[1] * extent.directions * extent.width;
  launch(sum_splits<float>, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, stream,
      static_cast<const float*>(partial), splits.count * g.of.x.size[0], count, g.grad_projection);
}

}  // namespace effattn::cuda
