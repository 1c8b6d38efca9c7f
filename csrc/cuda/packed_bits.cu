// Products with packed bits.
//
//   pack_signs     bit = x > 0
//   add_matmul     O = S V     S[m, k] = b or 2 b - 1: the sum of the rows of V that bits select, or sign
//   binary_matmul  P[m, n] = popcount(l[m] & r[n]),  or  length - 2 popcount(l[m] ^ r[n])
//
// pack_signs: a warp packs 4 rows at a time, a ballot per word. Bytes: x once, 1/32 word per element.
//
// add_matmul: a block of 4 warps makes 64 x 64 of O. Two stages of 64 rows of V and their bits in shared memory (36 KB
// in fp32, 19 KB in bf16), O in registers (32 a thread, fp32 twice). fp32: a bit selects an addition. bf16, fp16: bits
// become 0, 1, -1 in the registers of mma.m16n8k16, exactly. Bytes: V once per 64 rows of O, the bits once per 64
// columns, O once. 2 M N K FLOPs counted as a dense product; M N K additions. The gradient is the same kernel with the
// bits transposed.
//
// binary_matmul: a block of 128 threads makes 64 x 64 of P, 8 x 4 a thread; 16 words of each row in shared memory at a
// time (9 KB). Bytes: 4 M N for P, and each operand once per 64 rows of the other. M N K / 32 popcounts.
#include <type_traits>

#include "tile.h"

namespace effattn::cuda {
namespace {

// ---- pack_signs ----------------------------------------------------------------------------------------------------

constexpr int kPackWarps = 8, kPackRows = 4;  // rows of a warp

template <class T>
__global__ void __launch_bounds__(kPackWarps* kWarp)
    pack_signs_kernel(Planes<T> input, int64_t rows, int64_t columns, int64_t blocks_per_plane, uint32_t* words) {
  const int64_t plane = blockIdx.x / blocks_per_plane, words_per_row = (columns + 31) / 32;
  const int64_t first = (blockIdx.x % blocks_per_plane * kPackWarps + warp_index()) * kPackRows;
  const T* from = input.plane(plane);
  for (int64_t word = 0; word < words_per_row; ++word) {
    const int64_t column = word * 32 + lane_index();
    T element[kPackRows] = {};
#pragma unroll
    for (int r = 0; r < kPackRows; ++r)
      if (first + r < rows && column < columns)
        element[r] = from[(first + r) * input.row_stride + column * input.column_stride];
#pragma unroll
    for (int r = 0; r < kPackRows; ++r) {
      const uint32_t bits = warp_ballot(to_float(element[r]) > 0.0f);
      if (lane_index() == r && first + r < rows) words[(plane * rows + first + r) * words_per_row + word] = bits;
    }
  }
}

// ---- add_matmul ----------------------------------------------------------------------------------------------------

constexpr int kTile = 64;  // rows and columns of the product, and depth of a stage
constexpr int kThreads = 128;

struct AddMatmulSizes {
  int64_t rows, columns, depth;
  int64_t row_tiles, column_tiles;
  Splits splits;
};

// The bits of one stage: 64 x 2 words, as they lie. Row-major: 64 rows, 64 of depth. Transposed: 64 of depth, 64 rows.
EFFATTN_DEVICE void fill_words(SharedArray<uint32_t> tile, const uint32_t* words, int64_t words_per_line, int64_t line,
    int64_t lines, int64_t first_word) {
  const int i = thread_index() / 2;
  const int64_t word = first_word + thread_index() % 2;
  tile[thread_index()] = line + i < lines && word < words_per_line ? words[(line + i) * words_per_line + word] : 0;
}

template <bool kSign>
EFFATTN_DEVICE float add_selected(float sum, float value, bool bit) {
  if constexpr (kSign)
    return sum + (bit ? value : -value);
  else
    return bit ? sum + value : sum;
}

// 64 x 64 products in fp32: thread (row group 8 y.., column group 4 x..).
template <bool kSign, bool kTransposed>
struct AdditionTile {
  float sum[8][4] = {};

  EFFATTN_DEVICE static int row(int i) { return thread_index() / 16 * 8 + i; }
  EFFATTN_DEVICE static int column(int j) { return thread_index() % 16 * 4 + j; }

  EFFATTN_DEVICE void add(SharedArray<float> dense, int pitch, SharedArray<uint32_t> words) {
    float part[8][4] = {};  // sums of sums: the error of a long sum grows with its number of terms
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      uint32_t bits[8];
      if constexpr (!kTransposed)
#pragma unroll
        for (int i = 0; i < 8; ++i) bits[i] = words[row(i) * 2 + half];
#pragma unroll 8
      for (int k = 0; k < 32; ++k) {
        const int depth = half * 32 + k;
        const Vec<float, 4> value = dense.load<4>(depth * pitch + column(0));
        uint32_t selected = 0;
        if constexpr (kTransposed) selected = words[depth * 2 + row(0) / 32] >> row(0) % 32;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool bit = kTransposed ? selected >> i & 1 : bits[i] >> k & 1;
#pragma unroll
          for (int j = 0; j < 4; ++j) part[i][j] = add_selected<kSign>(part[i][j], value[j], bit);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
  }

  template <class Store>
  EFFATTN_DEVICE void store(Store store) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) store(row(i), column(j), sum[i][j]);
  }
};

// The lowest bits of `low` and `high` as two elements 0, 1 or -1, 1.
template <class T, bool kSign>
EFFATTN_DEVICE uint32_t expand_bits(uint32_t low, uint32_t high) {
  constexpr uint32_t kOne = std::is_same_v<T, bfloat16> ? 0x3f80 : 0x3c00;
  if constexpr (kSign) return (kOne | kOne << 16) ^ ((~low & 1) << 15) ^ (~high << 31);
  return (low & 1) * kOne | (high & 1) * (kOne << 16);
}

// 64 x 64 products by matrix instructions: warp w has rows 16 w.., eight fragments of 8 columns.
template <class T, bool kSign, bool kTransposed>
struct MatrixTile {
  float sum[8][4] = {};

  EFFATTN_DEVICE static int row(int i) { return warp_index() * 16 + lane_index() / 4 + i / 2 * 8; }
  EFFATTN_DEVICE static int column(int fragment, int i) { return fragment * 8 + lane_index() % 4 * 2 + i % 2; }

  EFFATTN_DEVICE void add(SharedArray<T> dense, int pitch, SharedArray<uint32_t> words) {
    const int pair = lane_index() % 4 * 2;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      if constexpr (kTransposed) {
        const int shift = row(0) % 32, word = row(0) / 32;  // row(2) = row(0) + 8 is in the same word
        uint32_t line[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) line[i] = words[(step * 16 + pair + i / 2 * 8 + i % 2) * 2 + word] >> shift;
        a[0] = expand_bits<T, kSign>(line[0], line[1]);
        a[1] = expand_bits<T, kSign>(line[0] >> 8, line[1] >> 8);
        a[2] = expand_bits<T, kSign>(line[2], line[3]);
        a[3] = expand_bits<T, kSign>(line[2] >> 8, line[3] >> 8);
      } else {
        const int shift = step % 2 * 16 + pair;
        const uint32_t top = words[row(0) * 2 + step / 2] >> shift, bottom = words[row(2) * 2 + step / 2] >> shift;
        a[0] = expand_bits<T, kSign>(top, top >> 1);
        a[1] = expand_bits<T, kSign>(bottom, bottom >> 1);
        a[2] = expand_bits<T, kSign>(top >> 8, top >> 9);
        a[3] = expand_bits<T, kSign>(bottom >> 8, bottom >> 9);
      }
#pragma unroll
      for (int fragment = 0; fragment < 8; fragment += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, dense, (step * 16 + lane_index() % 16) * pitch + fragment * 8 + lane_index() / 16 * 8);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        mma_m16n8k16<T>(sum[fragment], a, left);
        mma_m16n8k16<T>(sum[fragment + 1], a, right);
      }
    }
  }

  template <class Store>
  EFFATTN_DEVICE void store(Store store) const {
#pragma unroll
    for (int fragment = 0; fragment < 8; ++fragment)
#pragma unroll
      for (int i = 0; i < 4; ++i) store(row(i), column(fragment, i), sum[fragment][i]);
  }
};

// `product` is the partial sums of all splits in fp32, or the result itself where there is one split.
template <class T, class Product, bool kSign, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 4)
    add_matmul_kernel(const uint32_t* words, Planes<T> dense, AddMatmulSizes sizes, Product* product) {
  using Tile =
      std::conditional_t<std::is_same_v<T, float>, AdditionTile<kSign, kTransposed>, MatrixTile<T, kSign, kTransposed>>;
  constexpr int kPitch = kTile + 16 / sizeof(T);  // 16 bytes off: ldmatrix rows fall in different banks
  SharedMemory shared;
  const SharedArray<T> tile = shared.array<T>(2 * kTile * kPitch);
  const SharedArray<uint32_t> bits = shared.array<uint32_t>(2 * kThreads);

  int64_t block = blockIdx.x;
  const int64_t column = block % sizes.column_tiles * kTile;
  block /= sizes.column_tiles;
  const int64_t row = block % sizes.row_tiles * kTile;
  block /= sizes.row_tiles;
  const int64_t split = block % sizes.splits.count, plane = block / sizes.splits.count;

  const int64_t lines = kTransposed ? sizes.depth : sizes.rows;
  const int64_t words_per_line = ((kTransposed ? sizes.rows : sizes.depth) + 31) / 32;
  const uint32_t* plane_words = words + plane * lines * words_per_line;
  const T* origin = dense.plane(plane) + column * dense.column_stride;
  const int64_t begin = split * sizes.splits.depth;
  const int64_t end = min(sizes.depth, begin + sizes.splits.depth);

  const auto fill = [&](int64_t depth, int stage) {
    fill_tile<kTile, kTile, kThreads>(tile.from(stage * kTile * kPitch), kPitch, dense,
        origin + depth * dense.row_stride, end - depth, sizes.columns - column);
    fill_words(bits.from(stage * kThreads), plane_words, words_per_line, kTransposed ? depth : row, lines,
        (kTransposed ? row : depth) / 32);
    cp_async_commit();
  };

  Tile result;
  if (begin < end) fill(begin, 0);
  int stage = 0;
  for (int64_t depth = begin; depth < end; depth += kTile, stage ^= 1) {
    if (depth + kTile < end) {
      fill(depth + kTile, stage ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    sync_block();
    result.add(tile.from(stage * kTile * kPitch), kPitch, bits.from(stage * kThreads));
    sync_block();
  }

  const int64_t planes = gridDim.x / (sizes.column_tiles * sizes.row_tiles * sizes.splits.count);
  Product* to = product + (split * planes + plane) * sizes.rows * sizes.columns;
  result.store([&](int r, int c, float sum) {
    if (row + r < sizes.rows && column + c < sizes.columns)
      to[(row + r) * sizes.columns + column + c] = from_float<Product>(sum);
  });
}

AddMatmulSizes sizes_of(const AddMatmul& a) {
  const int64_t columns = a.dense.size[3], depth = a.dense.size[2];
  const int64_t row_tiles = ceil_div(a.rows, kTile), column_tiles = ceil_div(columns, kTile);
  const int64_t planes = a.dense.size[0] * a.dense.size[1];
  return {a.rows, columns, depth, row_tiles, column_tiles,
      split_depth(planes * row_tiles * column_tiles, depth, kTile, 4 * kTile)};
}

template <class T, class Product, bool kSign, bool kTransposed>
void launch_add_matmul(const AddMatmul& a, const AddMatmulSizes& sizes, Product* product, cudaStream_t stream) {
  const size_t shared = shared_bytes<T>(2 * kTile * (kTile + 16 / sizeof(T))) + shared_bytes<uint32_t>(2 * kThreads);
  const int64_t planes = a.dense.size[0] * a.dense.size[1];
  launch(add_matmul_kernel<T, Product, kSign, kTransposed>,
      dim3(static_cast<unsigned>(planes * sizes.splits.count * sizes.row_tiles * sizes.column_tiles)), dim3(kThreads),
      shared, stream, a.words, planes_of<T>(a.dense), sizes, product);
}

template <class T, class Product>
void launch_add_matmul(const AddMatmul& a, const AddMatmulSizes& sizes, Product* product, cudaStream_t stream) {
  if (a.sign && a.transposed) launch_add_matmul<T, Product, true, true>(a, sizes, product, stream);
  if (a.sign && !a.transposed) launch_add_matmul<T, Product, true, false>(a, sizes, product, stream);
  if (!a.sign && a.transposed) launch_add_matmul<T, Product, false, true>(a, sizes, product, stream);
  if (!a.sign && !a.transposed) launch_add_matmul<T, Product, false, false>(a, sizes, product, stream);
}

// ---- binary_matmul -------------------------------------------------------------------------------------------------

constexpr int kWords = 16;  // of a row in shared memory at a time

template <bool kSign>
__global__ void __launch_bounds__(kThreads, 4)
    binary_matmul_kernel(BinaryMatmul a, int64_t row_tiles, int64_t column_tiles) {
  constexpr int kPitch = kWords + 1;
  SharedMemory shared;
  const SharedArray<uint32_t> left = shared.array<uint32_t>(kTile * kPitch);
  const SharedArray<uint32_t> right = shared.array<uint32_t>(kTile * kPitch);
  const int64_t column = blockIdx.x % column_tiles * kTile, row = blockIdx.x / column_tiles % row_tiles * kTile;
  const int64_t plane = blockIdx.x / column_tiles / row_tiles, words = (a.length + 31) / 32;
  const uint32_t last_word = a.length % 32 ? (1u << a.length % 32) - 1 : ~0u;

  const auto fill = [&](SharedArray<uint32_t> tile, const uint32_t* lines, int64_t first, int64_t count, int64_t word) {
    for (int i = thread_index(); i < kTile * kWords; i += kThreads) {
      const int64_t line = first + i / kWords, at = word + i % kWords;
      uint32_t value = line < count && at < words ? lines[(plane * count + line) * words + at] : 0;
      if (at == words - 1) value &= last_word;
      tile[i / kWords * kPitch + i % kWords] = value;
    }
  };

  int count[8][4] = {};
  const int y = thread_index() / 16, x = thread_index() % 16;  // rows y + 8 i, columns x + 16 j
  for (int64_t word = 0; word < words; word += kWords) {
    sync_block();
    fill(left, a.left, row, a.rows, word);
    fill(right, a.right, column, a.columns, word);
    sync_block();
    const int filled = static_cast<int>(min(static_cast<int64_t>(kWords), words - word));
    for (int w = 0; w < filled; ++w) {
      uint32_t l[8], r[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) l[i] = left[(y + 8 * i) * kPitch + w];
#pragma unroll
      for (int j = 0; j < 4; ++j) r[j] = right[(x + 16 * j) * kPitch + w];
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) count[i][j] += popcount(kSign ? l[i] ^ r[j] : l[i] & r[j]);
    }
  }

#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = row + y + 8 * i, n = column + x + 16 * j;
      if (m < a.rows && n < a.columns)
        a.product[(plane * a.rows + m) * a.columns + n] =
            kSign ? static_cast<int32_t>(a.length) - 2 * count[i][j] : count[i][j];
    }
}

}  // namespace

// ---- Launches ------------------------------------------------------------------------------------------------------

void pack_signs(const PackSigns& a, void* stream) {
  const int64_t rows = a.input.size[2], columns = a.input.size[3];
  const int64_t blocks_per_plane = ceil_div(rows, kPackWarps * kPackRows);
  const int64_t blocks = columns > 0 ? a.input.size[0] * a.input.size[1] * blocks_per_plane : 0;
  with_element_type(a.input.dtype, [&](auto element) {
    using T = decltype(element);
    launch(pack_signs_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kPackWarps * kWarp), 0,
        static_cast<cudaStream_t>(stream), planes_of<T>(a.input), rows, columns, blocks_per_plane, a.words);
  });
}

int64_t add_matmul_workspace(const AddMatmul& a) {
  const AddMatmulSizes sizes = sizes_of(a);
  if (sizes.splits.count == 1) return 0;
  return sizes.splits.count * a.dense.size[0] * a.dense.size[1] * a.rows * sizes.columns * sizeof(float);
}

void add_matmul(const AddMatmul& a, void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const AddMatmulSizes sizes = sizes_of(a);
  with_element_type(a.dense.dtype, [&](auto element) {
    using T = decltype(element);
    if (sizes.splits.count > 1) {
      float* partial = static_cast<float*>(workspace);
      launch_add_matmul<T>(a, sizes, partial, stream);
      const int64_t count = a.dense.size[0] * a.dense.size[1] * a.rows * sizes.columns;
      with_element_type(a.product_dtype, [&](auto sum) {
        using Sum = decltype(sum);
        launch(sum_splits<Sum>, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, stream,
            static_cast<const float*>(partial), sizes.splits.count, count, static_cast<Sum*>(a.product));
      });
    } else if (a.product_dtype == DType::kFloat32) {
      launch_add_matmul<T>(a, sizes, static_cast<float*>(a.product), stream);
    } else {
      launch_add_matmul<T>(a, sizes, static_cast<T*>(a.product), stream);
    }
  });
}

void binary_matmul(const BinaryMatmul& a, void* stream) {
  const int64_t row_tiles = ceil_div(a.rows, kTile), column_tiles = ceil_div(a.columns, kTile);
  launch(a.sign ? binary_matmul_kernel<true> : binary_matmul_kernel<false>,
      dim3(static_cast<unsigned>(a.batch * row_tiles * column_tiles)), dim3(kThreads),
      2 * shared_bytes<uint32_t>(kTile * (kWords + 1)), static_cast<cudaStream_t>(stream), a, row_tiles, column_tiles);
}

}  // namespace effattn::cuda
