// Packing: the only place that meets element types and strides. It reads the user's tensors where they lie and writes
// operands for gemm.h.
//
// A word holds Arithmetic::kPerWord neighbours along the summed index (1 float, or 2 bf16). Three layouts:
//   pack_rows         [row][word of columns]
//                     A operand summed over the columns (Q for Q K^T). Rows above `rows` and tail columns are zero.
//
//   pack_transposed   [panel of kTileColumns rows][word of columns][row in panel]
//                     B operand summed over the columns (K for Q K^T, V for dO V^T). Panel p starts at
//                     p * kTileColumns * words; the last panel is narrower: its row pitch is its own width rounded up
//                     to kLanes. Tail rows are zero.
//
//   pack_natural      [word of rows][columns]
//                     B operand summed over the rows (V for P V, K for dS K, Q and dO for dK, dV). Tail rows and
//                     columns are zero.
#pragma once

#include <utility>

#include "gemm.h"

namespace effattn::EFFATTN_ISA {

// A matrix of the user's tensor; strides count elements. Logical row r is row (r + first) of the tensor, wrapped around
// at `wrap`; or row tokens[r], a row of zeros where that is negative.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  DType dtype;
  int64_t first = 0;
  int64_t wrap = INT64_MAX;
  const int64_t* tokens = nullptr;

  EFFATTN_INLINE bool is_zero(int64_t row) const { return tokens && tokens[row] < 0; }
  EFFATTN_INLINE int64_t offset(int64_t row) const {
    const int64_t token = tokens ? tokens[row] : row + first;
    return (token < wrap ? token : token - wrap) * row_stride;
  }
};

EFFATTN_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2
         : dtype == DType::kBool || dtype == DType::kUInt8     ? 1
                                                               : 4;
}

EFFATTN_INLINE Matrix matrix_at(
    const Tensor& tensor, int64_t batch, int64_t head, int64_t first_row = 0, int64_t rotation = 0) {
  const int64_t offset = batch * tensor.stride[0] + head * tensor.stride[1];
  const int64_t tokens = tensor.size[2];
  const int64_t first = first_row + rotation;
  return {static_cast<const char*>(tensor.data) + offset * element_size(tensor.dtype), tensor.stride[2],
      tensor.stride[3], tensor.dtype, first < tokens ? first : first - tokens, tokens};
}

// Rows first_row ... of an index set; without one as above.
EFFATTN_INLINE Matrix matrix_at(
    const Tensor& tensor, int64_t batch, int64_t head, int64_t first_row, int64_t rotation, const int64_t* tokens) {
  if (!tokens) return matrix_at(tensor, batch, head, first_row, rotation);
  Matrix matrix = matrix_at(tensor, batch, head);
  matrix.tokens = tokens + first_row;
  return matrix;
}

inline constexpr int64_t kMaxHeadDim = 256;

template <class Arithmetic>
EFFATTN_INLINE constexpr int64_t words(int64_t count) {
  return (count + Arithmetic::kPerWord - 1) / Arithmetic::kPerWord;
}

// Columns 0..columns of one row as floats, zero up to padded_columns (a multiple of kLanes).
template <class T>
inline void row_to_float(float* to, const T* from, int64_t column_stride, int64_t columns, int64_t padded_columns) {
  int64_t c = 0;
  if (column_stride == 1) {
    for (; c + kLanes <= columns; c += kLanes) store(to + c, load_float(from + c));
    if (c < columns) store(to + c, load_float_partial(from + c, columns - c)), c += kLanes;
  } else {
    T part[kLanes] = {};
    for (; c < columns; c += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane)
        if (c + lane < columns)
          part[lane] = from[(c + lane) * column_stride];
        else
          part[lane] = T{};
      store(to + c, load_float(part));
    }
  }
  for (; c < padded_columns; c += kLanes) store(to + c, Vec{});
}

inline void row_to_float(float* to, const Matrix& from, int64_t row, int64_t columns, int64_t padded_columns) {
  if (from.is_zero(row)) {
    memset(to, 0, padded_columns * sizeof(float));
    return;
  }
  const int64_t offset = from.offset(row);
  switch (from.dtype) {
    case DType::kBFloat16:
      return row_to_float(
          to, static_cast<const bfloat16*>(from.data) + offset, from.column_stride, columns, padded_columns);
    case DType::kFloat16:
      return row_to_float(
          to, static_cast<const float16*>(from.data) + offset, from.column_stride, columns, padded_columns);
    default:
      return row_to_float(
          to, static_cast<const float*>(from.data) + offset, from.column_stride, columns, padded_columns);
  }
}

// Columns of one bf16 row, zero up to padded_columns (even).
inline void row_to_bfloat16(uint16_t* to, const Matrix& from, int64_t row, int64_t columns, int64_t padded_columns) {
  if (from.is_zero(row)) {
    memset(to, 0, padded_columns * sizeof(uint16_t));
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(from.data) + from.offset(row);
  if (from.column_stride == 1) {
    memcpy(to, source, columns * sizeof(uint16_t));
  } else {
    for (int64_t c = 0; c < columns; ++c) to[c] = source[c * from.column_stride];
  }
  if (padded_columns > columns) memset(to + columns, 0, (padded_columns - columns) * sizeof(uint16_t));
}

// padded_words is a multiple of kLanes.
template <class Arithmetic>
EFFATTN_INLINE void row_to_words(
    typename Arithmetic::Word* to, const Matrix& from, int64_t row, int64_t columns, int64_t padded_words) {
  if constexpr (Arithmetic::kPerWord == 1) {
    row_to_float(to, from, row, columns, padded_words);
  } else {
    row_to_bfloat16(reinterpret_cast<uint16_t*>(to), from, row, columns, padded_words * 2);
  }
}

// Rows that are copied as they are: elements of the words, side by side.
template <class Arithmetic>
class PlainRows {
  using Element = typename Arithmetic::Element;
  alignas(64) static constexpr Element kZeros[kMaxHeadDim] = {};

 public:
  explicit PlainRows(const Matrix& from) : from_(from), data_(static_cast<const Element*>(from.data)) {}
  static bool serves(const Matrix& from) { return from.dtype == Arithmetic::kType && from.column_stride == 1; }
  EFFATTN_INLINE const Element* at(int64_t row) const {
    return from_.is_zero(row) ? kZeros : data_ + from_.offset(row);
  }
  static const Element* zeros() { return kZeros; }
  // Words word ... of a row of `columns` elements, 0 past its end.
  static EFFATTN_INLINE WordVec load(const Element* row, int64_t word, int64_t columns) {
    const int64_t first = word * Arithmetic::kPerWord, left = columns - first;
    return left >= kLanes * Arithmetic::kPerWord ? Arithmetic::load_elements(row + first)
                                                 : Arithmetic::load_elements(row + first, left);
  }

 private:
  const Matrix from_;
  const Element* data_;
};

EFFATTN_INLINE void store_words(void* to, WordVec words) { memcpy(to, &words, sizeof(words)); }

// to[row * pitch + word]; pitch a multiple of kLanes, at least words<Arithmetic>(columns).
template <class Arithmetic>
inline void pack_rows(typename Arithmetic::Word* to, int64_t pitch, const Matrix& from, int64_t rows,
    int64_t padded_rows, int64_t columns) {
  if (PlainRows<Arithmetic>::serves(from)) {
    const PlainRows<Arithmetic> plain(from);
    const int64_t used = round_up(words<Arithmetic>(columns), kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const auto* row = plain.at(r);
      for (int64_t w = 0; w < used; w += kLanes) store_words(to + r * pitch + w, plain.load(row, w, columns));
      for (int64_t w = used; w < pitch; w += kLanes) store_words(to + r * pitch + w, WordVec{});
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) row_to_words<Arithmetic>(to + r * pitch, from, r, columns, pitch);
  }
  if (padded_rows > rows) memset(to + rows * pitch, 0, (padded_rows - rows) * pitch * sizeof(*to));
}

template <int kDistance, size_t... kLane>
EFFATTN_INLINE void exchange(WordVec& x, WordVec& y, std::index_sequence<kLane...>) {
  const WordVec low = __builtin_shufflevector(x, y, ((kLane & kDistance) ? kLanes + kLane - kDistance : kLane)...);
  y = __builtin_shufflevector(x, y, ((kLane & kDistance) ? kLanes + kLane : kLane + kDistance)...);
  x = low;
}

// lines[i][j] <-> lines[j][i], in log2(kLanes) rounds of two-register shuffles.
template <int kDistance = 1>
EFFATTN_INLINE void transpose(WordVec (&lines)[kLanes]) {
  if constexpr (kDistance < kLanes) {
    EFFATTN_UNROLL for (int i = 0; i < kLanes; ++i) {
      if ((i & kDistance) == 0) exchange<kDistance>(lines[i], lines[i + kDistance], std::make_index_sequence<kLanes>{});
    }
    transpose<kDistance * 2>(lines);
  }
}

// The transpose of the lines, as many as there are, `pitch` words apart.
EFFATTN_INLINE void store_transposed(void* to, int64_t pitch, WordVec (&lines)[kLanes], int64_t count) {
  transpose(lines);
  char* line = static_cast<char*>(to);
  if (count >= kLanes) {
    EFFATTN_UNROLL for (int k = 0; k < kLanes; ++k) store_words(line + k * pitch * sizeof(float), lines[k]);
  } else {
    EFFATTN_UNROLL for (int k = 0; k < kLanes; ++k) if (k < count)
        store_words(line + k * pitch * sizeof(float), lines[k]);
  }
}

template <class Arithmetic>
inline int64_t transposed_words(int64_t rows, int64_t columns) {
  return round_up(rows, kLanes) * words<Arithmetic>(columns);
}

// Word count: transposed_words(rows, columns).
template <class Arithmetic>
inline void pack_transposed(typename Arithmetic::Word* to, const Matrix& from, int64_t rows, int64_t columns) {
  using Word = typename Arithmetic::Word;
  alignas(64) Word staged[kLanes * kMaxHeadDim];
  const int64_t depth = words<Arithmetic>(columns);
  const int64_t pitch = round_up(depth, kLanes);
  const bool plain = PlainRows<Arithmetic>::serves(from);
  const PlainRows<Arithmetic> source(from);
  for (int64_t panel = 0; panel < rows; panel += kTileColumns) {
    const int64_t width = round_up(smaller(rows - panel, kTileColumns), kLanes);
    for (int64_t first = 0; first < width; first += kLanes) {
      const int64_t live = smaller(rows - panel - first, kLanes);
      if (plain) {
        const typename Arithmetic::Element* line[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) line[r] = r < live ? source.at(panel + first + r) : source.zeros();
        for (int64_t d = 0; d < depth; d += kLanes) {
          WordVec lines[kLanes];
          EFFATTN_UNROLL for (int r = 0; r < kLanes; ++r) lines[r] = source.load(line[r], d, columns);
          store_transposed(to + d * width + first, width, lines, depth - d);
        }
        continue;
      }
      for (int64_t r = 0; r < live; ++r)
        row_to_words<Arithmetic>(staged + r * pitch, from, panel + first + r, columns, pitch);
      if (live < kLanes) memset(staged + larger(live, 0) * pitch, 0, (kLanes - larger(live, 0)) * pitch * sizeof(Word));
      for (int64_t d = 0; d < depth; d += kLanes) {
        WordVec lines[kLanes];
        EFFATTN_UNROLL for (int r = 0; r < kLanes; ++r) lines[r] = load_as<WordVec>(staged + r * pitch + d);
        store_transposed(to + d * width + first, width, lines, depth - d);
      }
    }
    to += width * depth;
  }
}

EFFATTN_INLINE WordVec pair_rows(const uint16_t* even, const uint16_t* odd, int64_t columns) {
  const auto load = [columns](const uint16_t* from) __attribute__((always_inline)) {
#if defined(__AVX512BW__)
    if (columns < kLanes) return (WordVec)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(columns), from));
#endif
    return __builtin_convertvector(load_as<HalfVec>(from), WordVec);
  };
  return load(even) | (load(odd) << 16);
}

// to[word * pitch + column] for ceil(rows / kPerWord) words; pitch a multiple of kLanes, at least columns.
template <class Arithmetic>
inline void pack_natural(
    typename Arithmetic::Word* to, int64_t pitch, const Matrix& from, int64_t rows, int64_t columns) {
  if constexpr (Arithmetic::kPerWord == 1) {
    pack_rows<Arithmetic>(to, pitch, from, rows, rows, columns);
  } else {
    if (PlainRows<Arithmetic>::serves(from)) {
      const PlainRows<Arithmetic> plain(from);
      const int64_t used = round_up(columns, kLanes);
      for (int64_t r = 0; r < rows; r += 2, to += pitch) {
        const auto* even = plain.at(r);
        const auto* odd = r + 1 < rows ? plain.at(r + 1) : plain.zeros();
        for (int64_t c = 0; c < used; c += kLanes) store_words(to + c, pair_rows(even + c, odd + c, columns - c));
        for (int64_t c = used; c < pitch; c += kLanes) store_words(to + c, WordVec{});
      }
      return;
    }
    uint16_t even[kMaxHeadDim], odd[kMaxHeadDim];
    for (int64_t r = 0; r < rows; r += 2) {
      row_to_bfloat16(even, from, r, columns, round_up(columns, kLanes));
      if (r + 1 < rows)
        row_to_bfloat16(odd, from, r + 1, columns, round_up(columns, kLanes));
      else
        memset(odd, 0, sizeof(odd));
      uint32_t* line = to + r / 2 * pitch;
      for (int64_t c = 0; c < round_up(columns, kLanes); c += kLanes)
        store_words(line + c, pair_rows(even + c, odd + c, kLanes));
      for (int64_t c = round_up(columns, kLanes); c < pitch; c += kLanes) memset(line + c, 0, sizeof(WordVec));
    }
  }
}

template <class T>
inline void store_row(T* to, int64_t column_stride, const float* from, Vec factor, int64_t columns) {
  if (column_stride == 1) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store_float(to + c, load(from + c) * factor);
    if (c < columns) store_float_partial(to + c, load(from + c) * factor, columns - c);
  } else {
    T part[kLanes];
    for (int64_t c = 0; c < columns; c += kLanes) {
      store_float(part, load(from + c) * factor);
      for (int lane = 0; lane < kLanes; ++lane)
        if (c + lane < columns) to[(c + lane) * column_stride] = part[lane];
    }
  }
}

// from[0 .. columns rounded up to kLanes) * factor -> logical row of the user's tensor; nothing for a row of zeros.
inline void store_row(const Matrix& to, int64_t row, const float* from, Vec factor, int64_t columns) {
  if (to.is_zero(row)) return;
  void* data = const_cast<void*>(to.data);
  const int64_t offset = to.offset(row);
  switch (to.dtype) {
    case DType::kBFloat16:
      return store_row(static_cast<bfloat16*>(data) + offset, to.column_stride, from, factor, columns);
    case DType::kFloat16:
      return store_row(static_cast<float16*>(data) + offset, to.column_stride, from, factor, columns);
    default:
      return store_row(static_cast<float*>(data) + offset, to.column_stride, from, factor, columns);
  }
}

// Rows of the user's tensor = rows of `from` * factor(row); one look at the element type for all of them.
template <class T, class Factor>
inline void store_rows(
    const Matrix& to, int64_t rows, const float* from, int64_t pitch, const Factor& factor, int64_t columns) {
  T* data = static_cast<T*>(const_cast<void*>(to.data));
  for (int64_t r = 0; r < rows; ++r)
    if (!to.is_zero(r)) store_row(data + to.offset(r), to.column_stride, from + r * pitch, factor(r), columns);
}

template <class Factor>
inline void store_rows_by(
    const Matrix& to, int64_t rows, const float* from, int64_t pitch, const Factor& factor, int64_t columns) {
  switch (to.dtype) {
    case DType::kBFloat16:
      return store_rows<bfloat16>(to, rows, from, pitch, factor, columns);
    case DType::kFloat16:
      return store_rows<float16>(to, rows, from, pitch, factor, columns);
    default:
      return store_rows<float>(to, rows, from, pitch, factor, columns);
  }
}

inline void store_rows(const Matrix& to, int64_t rows, const float* from, int64_t pitch, Vec factor, int64_t columns) {
  store_rows_by(to, rows, from, pitch, [factor](int64_t) __attribute__((always_inline)) { return factor; }, columns);
}

}  // namespace effattn::EFFATTN_ISA
