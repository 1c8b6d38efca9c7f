// What the passes of shift_add_attention.cpp share: rows as floats, their norms, their bits, products with bits by
// tables, the convolution over tokens.
//
// A product with bits adds entries of tables ("four Russians"): for 4 rows of the dense factor the 16 possible sums are
// formed once, then 4 bits of the other factor cost one load and one addition where they cost four multiply-adds.
//
//   table       [group of 4 rows][16][kPanel columns], at most 16 groups = 16 KB: it stays in L1
//   words       uint64, bit i belongs to dense row i of the table; bits of rows that do not exist may be garbage, for
//               the table holds zeros there
//
// Padding: rows as floats are padded with zeros to a multiple of kPanel columns.
#pragma once

#include "pack.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA::shift_add_attention {

inline constexpr int kPanel = 16;
inline constexpr int kPanelVectors = kPanel / kLanes;
inline constexpr int kWordBits = 64;
inline constexpr int kGroups = kWordBits / 4;
inline constexpr int64_t kTableFloats = int64_t{kGroups} * 16 * kPanel;
inline constexpr int kTogether = kPanelVectors <= 2 ? 4 : 2;  // rows whose sums are in registers

struct Rows {
  const float* data;
  int64_t pitch;
  EFFATTN_INLINE const float* row(int64_t r) const { return data + r * pitch; }
};

EFFATTN_INLINE bool readable_in_place(const Matrix& matrix, int64_t columns) {
  return matrix.dtype == DType::kFloat32 && matrix.column_stride == 1 && columns % kPanel == 0;
}

// Rows first..first + rows of a matrix, where they lie or copied to the buffer.
inline Rows stage(float* buffer, const Matrix& from, int64_t first, int64_t rows, int64_t columns) {
  if (readable_in_place(from, columns))
    return {static_cast<const float*>(from.data) + from.offset(first), from.row_stride};
  const int64_t pitch = round_up(columns, kPanel);
  for (int64_t r = 0; r < rows; ++r) row_to_float(buffer + r * pitch, from, first + r, columns, pitch);
  return {buffer, pitch};
}

EFFATTN_INLINE Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

// A row is normalised as x * scale * inverse. scale is a power of 2, and 1 unless the squares leave the range of float.
struct Norms {
  float* scale;
  float* inverse;
};

// For sums of squares outside of this range the row is rescaled.
inline constexpr float kSmallestSquare = 1e-26f, kLargestSquare = 1e37f;
EFFATTN_INLINE bool needs_scale(float squares) { return !(squares > kSmallestSquare && squares < kLargestSquare); }

// The power of 2 that brings the largest element of a row to [1, 2). 1 for a row of zeros.
inline float scale_of(const float* row, int64_t width) {
  Vec largest = {};
  for (int64_t c = 0; c < width; c += kLanes) largest = max(absolute(load(row + c)), largest);
  const float bound = reduce_max(largest);
  if (!(bound > 0.f && bound < INFINITY)) return 1.f;
  const int32_t exponent = bit_cast<int32_t>(bound) >> 23;
  return bit_cast<float>(int32_t(smaller(larger(254 - exponent, 1), 254)) << 23);
}

// Norms of up to kWordBits rows; returns the sum of |x^| (kAbsolute) or x^ over them.
template <bool kAbsolute>
inline double normalise(const Norms& norms, const Rows& x, int64_t rows, int64_t width) {
  alignas(64) float squares[kWordBits] = {}, sums[kWordBits] = {};
  const auto measure = [&](int64_t r, float scale) __attribute__((always_inline)) {
    Vec square = {}, sum = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec value = load(x.row(r) + c) * broadcast(scale);
      square = fma(value, value, square);
      sum += kAbsolute ? absolute(value) : value;
    }
    norms.scale[r] = scale;
    squares[r] = reduce_add(square);
    sums[r] = reduce_add(sum);
  };
  for (int64_t r = 0; r < rows; ++r) measure(r, 1.f);
  for (int64_t r = 0; r < rows; ++r)
    if (needs_scale(squares[r])) measure(r, scale_of(x.row(r), width));
  alignas(64) float inverse[kWordBits];
  for (int r = 0; r < kWordBits; ++r) inverse[r] = squares[r] == 0.f ? 0.f : 1.f / __builtin_sqrtf(squares[r]);
  memcpy(norms.inverse, inverse, rows * sizeof(float));
  double total[4] = {};
  for (int r = 0; r < kWordBits; r += 4)
    for (int lane = 0; lane < 4; ++lane)
      total[lane] += static_cast<double>(sums[r + lane]) * static_cast<double>(inverse[r + lane]);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// How a bit is told: x > 0, or x^ > threshold, for which the norms are needed.
struct Test {
  bool compares_norm;
  float threshold;
};

EFFATTN_INLINE uint64_t bits_above(Vec value, Vec threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)value, (__m512)threshold, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(value > threshold)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(value > threshold)));
#else
  const IntVec bits = (IntVec)(value > threshold) & (1 << lane_index());
  return static_cast<uint32_t>(bits[0] | bits[1] | bits[2] | bits[3]);
#endif
}

EFFATTN_INLINE WordVec mark_above(WordVec word, Vec value, Vec threshold, uint32_t bit) {
  const WordVec bits = WordVec{} + bit;
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_cmp_ps_mask((__m512)value, (__m512)threshold, _CMP_GT_OQ);
  return (WordVec)_mm512_mask_or_epi32((__m512i)word, mask, (__m512i)word, (__m512i)bits);
#else
  return word | ((WordVec)(value > threshold) & bits);
#endif
}

EFFATTN_INLINE int64_t word_count(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

template <bool kNormalised>
EFFATTN_INLINE void row_words(
    uint64_t* words, const Rows& x, int64_t rows, int64_t width, const Norms& norms, Vec threshold) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t first = 0; first < width; first += kWordBits) {
      uint64_t word = 0;
      for (int64_t c = first; c < smaller(first + kWordBits, width); c += kLanes) {
        Vec value = load(x.row(r) + c);
        if constexpr (kNormalised) value = value * broadcast(norms.scale[r]) * broadcast(norms.inverse[r]);
        word |= bits_above(value, threshold) << (c - first);
      }
      *words++ = word;
    }
}

// words[row][word_count(columns)], bit = column.
inline void row_words(
    uint64_t* words, const Rows& x, int64_t rows, int64_t width, const Norms& norms, const Test& test) {
  if (test.compares_norm)
    row_words<true>(words, x, rows, width, norms, broadcast(test.threshold));
  else
    row_words<false>(words, x, rows, width, norms, Vec{});
}

template <bool kNormalised>
EFFATTN_INLINE void column_words(
    uint64_t* words, const Rows& x, int64_t rows, int64_t width, const Norms& norms, Vec threshold) {
  for (int64_t c = 0; c < width; c += kLanes) {
    WordVec half[2] = {};
    EFFATTN_UNROLL for (int h = 0; h < 2; ++h) for (int64_t r = 32 * h; r < smaller(rows, 32 * h + 32); ++r) {
      Vec value = load(x.row(r) + c);
      if constexpr (kNormalised) value = value * broadcast(norms.scale[r]) * broadcast(norms.inverse[r]);
      half[h] = mark_above(half[h], value, threshold, uint32_t{1} << (r - 32 * h));
    }
    alignas(64) uint32_t low[kLanes], high[kLanes];
    memcpy(low, &half[0], sizeof(low));
    memcpy(high, &half[1], sizeof(high));
    for (int lane = 0; lane < kLanes; ++lane) words[c + lane] = low[lane] | uint64_t{high[lane]} << 32;
  }
}

// words[column], bit = row, of up to kWordBits rows.
inline void column_words(
    uint64_t* words, const Rows& x, int64_t rows, int64_t width, const Norms& norms, const Test& test) {
  if (test.compares_norm)
    column_words<true>(words, x, rows, width, norms, broadcast(test.threshold));
  else
    column_words<false>(words, x, rows, width, norms, Vec{});
}

// The sums of `live` dense rows (at most kWordBits), of one panel. kSigned: a bit 0 subtracts the row.
template <bool kSigned>
EFFATTN_INLINE void build_table(float* table, const Rows& dense, int64_t live) {
  for (int64_t r = 0; r < live; r += 4) EFFATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      const float* from = dense.row(r) + v * kLanes;
      const Vec a = load(from), b = r + 1 < live ? load(from + dense.pitch) : Vec{},
                c = r + 2 < live ? load(from + 2 * dense.pitch) : Vec{},
                d = r + 3 < live ? load(from + 3 * dense.pitch) : Vec{};
      const Vec first[4] = {kSigned ? -(a + b) : Vec{}, kSigned ? a - b : a, kSigned ? b - a : b, a + b};
      const Vec second[4] = {kSigned ? -(c + d) : Vec{}, kSigned ? c - d : c, kSigned ? d - c : d, c + d};
      float* to = table + r * 4 * kPanel + v * kLanes;
      EFFATTN_UNROLL for (int entry = 0; entry < 16; ++entry)
          store(to + entry * kPanel, first[entry & 3] + second[entry >> 2]);
    }
}

// Rows that will be wanted soon, fetched a few at a time while tables are added up: rows of a packed projection lie far
// apart, which the machine's own prefetching does not follow.
class Ahead {
 public:
  void add(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns, bool written = false) {
    if (matrix.column_stride != 1 || rows <= 0) return;
    const int64_t size = element_size(matrix.dtype);
    streams_[count_++] = {
        static_cast<const char*>(matrix.data) + matrix.offset(first) * size, matrix.row_stride * size, written};
    rows_ = larger(rows_, rows);
    bytes_ = columns * size;
  }

  void plan(int64_t steps) { each_ = (rows_ - row_ + steps - 1) / larger(steps, 1); }

  EFFATTN_INLINE void step() {
    const int64_t until = smaller(row_ + each_, rows_);
    for (; row_ < until; ++row_)
      for (int s = 0; s < count_; ++s) {
        const char* from = streams_[s].from + row_ * streams_[s].pitch;
        for (int64_t byte = 0; byte < bytes_; byte += 64) {
          if (streams_[s].written)
            __builtin_prefetch(from + byte, 1, 2);
          else
            __builtin_prefetch(from + byte, 0, 2);
        }
      }
  }

 private:
  struct Stream {
    const char* from;
    int64_t pitch;
    bool written;
  };
  Stream streams_[3];
  int count_ = 0;
  int64_t rows_ = 0, row_ = 0, bytes_ = 0, each_ = 0;
};

template <int kRows, bool kAdd>
EFFATTN_INLINE void look_up(
    float* to, int64_t pitch, const float* table, const uint64_t* words, int64_t stride, int64_t groups) {
  constexpr uint64_t kEntryBytes = kPanel * sizeof(float), kMask = 15 * kEntryBytes;
  static_assert(kEntryBytes == 64);
  Vec sum[kRows][kPanelVectors];
  uint64_t word[kRows];
  EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    word[r] = words[r * stride];
    EFFATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = kAdd ? load(to + r * pitch + v * kLanes) : Vec{};
  }
  const char* entries = reinterpret_cast<const char*>(table);
  const auto add = [&](int r, uint64_t offset) __attribute__((always_inline)) {
    const float* entry = reinterpret_cast<const float*>(entries + offset);
    EFFATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) sum[r][v] += load(entry + v * kLanes);
  };
  // Four groups an iteration: unrolled any further, the compiler forms all offsets first and spills them.
#pragma GCC unroll 1
  for (; groups >= 4; groups -= 4) {
    EFFATTN_UNROLL for (int g = 0; g < 4; ++g) {
      EFFATTN_UNROLL for (int r = 0; r < kRows; ++r)
          add(r, (g < 2 ? word[r] << (6 - 4 * g) : word[r] >> (4 * g - 6)) & kMask);
      entries += 16 * kEntryBytes;
    }
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) word[r] >>= 16;
  }
#pragma GCC unroll 1
  for (; groups > 0; --groups) {
    EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      add(r, (word[r] << 6) & kMask);
      word[r] >>= 4;
    }
    entries += 16 * kEntryBytes;
  }
  EFFATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    EFFATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) store(to + r * pitch + v * kLanes, sum[r][v]);
  }
}

template <bool kAdd>
inline void look_up_rows(float* to, int64_t pitch, const float* table, const uint64_t* words, int64_t stride,
    int64_t rows, int64_t live, Ahead& ahead) {
  const int64_t groups = (live + 3) / 4;
  for (; rows >= kTogether; rows -= kTogether, to += kTogether * pitch, words += kTogether * stride) {
    ahead.step();
    look_up<kTogether, kAdd>(to, pitch, table, words, stride, groups);
  }
  for (; rows > 0; --rows, to += pitch, words += stride) look_up<1, kAdd>(to, pitch, table, words, stride, groups);
}

// to[row] (+)= sum over the `live` dense rows of bit(row, dense row) * dense row, for all columns; words[row * stride].
template <bool kAdd>
inline void multiply_bits(float* to, int64_t pitch, const uint64_t* words, int64_t stride, int64_t rows,
    const Rows& dense, int64_t live, int64_t width, bool is_signed, Ahead& ahead) {
  alignas(64) float table[kTableFloats];
  for (int64_t c = 0; c < width; c += kPanel) {
    const Rows panel = {dense.data + c, dense.pitch};
    is_signed ? build_table<true>(table, panel, live) : build_table<false>(table, panel, live);
    look_up_rows<kAdd>(to + c, pitch, table, words, stride, rows, live, ahead);
  }
}

// to = bits * dense for `columns` bits a row and as many dense rows.
inline void select_rows(float* to, int64_t pitch, const uint64_t* words, int64_t rows, const Rows& dense,
    int64_t columns, int64_t width, bool is_signed, Ahead& ahead) {
  const int64_t stride = word_count(columns);
  ahead.plan(larger(rows / kTogether, 1) * (width / kPanel) * stride);
  multiply_bits<false>(to, pitch, words, stride, rows, dense, smaller(columns, kWordBits), width, is_signed, ahead);
  for (int64_t word = 1; word < stride; ++word)
    multiply_bits<true>(to, pitch, words + word, stride, rows, {dense.row(word * kWordBits), dense.pitch},
        smaller(columns - word * kWordBits, kWordBits), width, is_signed, ahead);
}

// How the work is cut, by the shape alone: a head is one chunk, or several where there are few heads; a pass walks over
// a chunk in strips whose floats stay in L2.
struct Geometry {
  int64_t batch, heads, tokens, head_dim;
  int64_t width;   // head_dim, padded
  int64_t stride;  // words of a row
  int64_t chunks, chunk_rows, strip_rows;

  explicit Geometry(const Tensor& query)
      : batch(query.size[0]), heads(query.size[1]), tokens(query.size[2]), head_dim(query.size[3]) {
    width = round_up(head_dim, kPanel);
    stride = word_count(head_dim);
    constexpr int64_t kEnoughItems = 16, kWantedItems = 32, kFewestRows = 192;
    const int64_t all = batch * heads;
    chunks = 1;
    if (all > 0 && all < kEnoughItems)
      chunks = larger(1, smaller((kWantedItems + all - 1) / all, tokens / kFewestRows));
    chunk_rows = round_up((tokens + chunks - 1) / chunks, 32);
    chunks = larger(1, chunk_rows ? (tokens + chunk_rows - 1) / chunk_rows : 1);
    strip_rows = smaller(448, 57344 / width / kWordBits * kWordBits);
  }

  int64_t items() const { return batch * heads * chunks; }
  double flops() const {
    return 2.0 * static_cast<double>(batch * heads * tokens) * static_cast<double>(head_dim * head_dim);
  }
};

struct Item {
  int64_t batch, head, pair, first, last;  // pair = batch and head; rows first..last
  EFFATTN_INLINE Item(const Geometry& g, int64_t index) {
    pair = index / g.chunks;
    batch = pair / g.heads;
    head = pair % g.heads;
    first = smaller(index % g.chunks * g.chunk_rows, g.tokens);
    last = smaller(first + g.chunk_rows, g.tokens);
  }
};

// Rows begin..end of a sequence, zeros outside of them.
struct Halo {
  Rows rows;
  int64_t begin, end;
  const float* zeros;
  EFFATTN_INLINE const float* at(int64_t n) const { return n >= begin && n < end ? rows.row(n - begin) : zeros; }
};

alignas(64) inline constexpr float kZeroRow[kMaxHeadDim] = {};

EFFATTN_INLINE int64_t reach_of(int64_t taps, int64_t tokens) { return smaller(taps / 2, tokens); }

// Rows first..last and `reach` more on both sides as far as there are.
inline Halo stage_halo(
    Buffer& buffer, const Matrix& from, int64_t first, int64_t last, int64_t reach, const Geometry& g) {
  const int64_t begin = larger(first - reach, 0), end = smaller(last + reach, g.tokens);
  float* copy = readable_in_place(from, g.head_dim) ? nullptr : buffer.reserve<float>((end - begin) * g.width);
  return {stage(copy, from, begin, end - begin, g.head_dim), begin, end, kZeroRow};
}

inline constexpr int kBlockRows = 4;  // rows that share the loads of a convolution

// sum[r] = sum_t weight[t] x[n + r + t - taps / 2][c ..]; kTaps = 0: as many as `taps` says.
template <int kTaps>
struct Convolution {
  const float* row[kBlockRows + kTaps];
  const Halo& halo;
  const float* weight;
  int64_t taps, first;

  EFFATTN_INLINE Convolution(const Halo& from, const float* weights, int64_t count, int64_t n)
      : halo(from), weight(weights), taps(count), first(n) {
    if constexpr (kTaps > 0) {
      EFFATTN_UNROLL for (int r = 0; r < kBlockRows + kTaps - 1; ++r) row[r] = from.at(n + r - kTaps / 2);
    }
  }

  // kReversed: the weights in reverse order, which is the transposed convolution.
  template <bool kReversed>
  EFFATTN_INLINE void at(Vec (&sum)[kBlockRows], int64_t c) const {
    EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) sum[r] = Vec{};
    if constexpr (kTaps > 0) {
      EFFATTN_UNROLL for (int s = 0; s < kBlockRows + kTaps - 1; ++s) {
        const Vec value = load(row[s] + c);
        EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) {
          const int t = s - r;
          if (t >= 0 && t < kTaps) sum[r] = fma(broadcast(weight[kReversed ? kTaps - 1 - t : t]), value, sum[r]);
        }
      }
    } else {
      for (int64_t t = 0; t < taps; ++t) {
        const Vec factor = broadcast(weight[kReversed ? taps - 1 - t : t]);
        EFFATTN_UNROLL for (int r = 0; r < kBlockRows; ++r) sum[r] =
            fma(factor, load(halo.at(first + r + t - taps / 2) + c), sum[r]);
      }
    }
  }
};

// The first of `parts` = the sum of them, in order.
inline void add_parts(float* parts, int64_t count, int64_t floats) {
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < floats; ++i) parts[i] += parts[part * floats + i];
}

EFFATTN_INLINE Matrix context_matrix(const float* context, const Geometry& g, int64_t pair) {
  return {context + pair * g.head_dim * g.head_dim, g.head_dim, 1, DType::kFloat32};
}

// Rounded once: an error here is one of every element.
EFFATTN_INLINE float over_pi(float a, float b) {
  return static_cast<float>(0.318309886183790671538 * static_cast<double>(a) * static_cast<double>(b));
}

// Half the value added to the selected rows: u = 0.5 v + factor * u. Returns 1 / |u|, of the row scaled in place if its
// squares leave the range of float (*scale); 0 for a row of zeros.
EFFATTN_INLINE float combine_row(float* u, const float* value, float factor, int64_t width, float* scale) {
  Vec square = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec sum = fma(broadcast(factor), load(u + c), broadcast(0.5f) * load(value + c));
    store(u + c, sum);
    square = fma(sum, sum, square);
  }
  float squares = reduce_add(square);
  *scale = 1.f;
  if (__builtin_expect(needs_scale(squares), 0)) {
    *scale = scale_of(u, width);
    square = Vec{};
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec sum = load(u + c) * broadcast(*scale);
      store(u + c, sum);
      square = fma(sum, sum, square);
    }
    squares = reduce_add(square);
  }
  return squares == 0.f ? 0.f : 1.f / __builtin_sqrtf(squares);
}

}  // namespace effattn::EFFATTN_ISA::shift_add_attention
