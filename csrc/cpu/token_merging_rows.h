// Rows of tokens and how they are walked: columns in steps of a few vectors with a tail, outputs in blocks of equal
// work.
#pragma once

#include "api.h"
#include "pack.h"
#include "scratch.h"

namespace effattn::EFFATTN_ISA::merging {

inline constexpr int kStep = kLanes >= 16 ? 4 : 8;  // vectors

// A step of a row: kVectors whole vectors, or `count` lanes of one.
template <int kVectors_, bool kWhole_>
struct Columns {
  static constexpr int kVectors = kVectors_;
  static constexpr bool kWhole = kWhole_;
  int64_t first, count;
};

template <class Body>
EFFATTN_INLINE void over_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + kStep * kLanes <= columns; c += kStep * kLanes) body(Columns<kStep, true>{c, kStep * kLanes});
  for (; c + kLanes <= columns; c += kLanes) body(Columns<1, true>{c, kLanes});
  if (c < columns) body(Columns<1, false>{c, columns - c});
}

template <class T>
[[gnu::noinline]] Vec load_strided(const T* from, int64_t stride, int64_t count) {
  T part[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) part[lane] = from[lane * stride];
  return load_float(part);
}

// A row to read. Its elements nearly always lie side by side.
template <class T>
struct Row {
  const T* data;
  int64_t stride;

  template <class Columns>
  EFFATTN_INLINE Vec load(Columns at, int v) const {
    if (__builtin_expect(stride != 1, 0)) {
      const int64_t first = at.first + v * kLanes;
      return load_strided(data + first * stride, stride, Columns::kWhole ? kLanes : at.count);
    }
    if constexpr (Columns::kWhole) {
      return load_float(data + at.first + v * kLanes);
    } else {
      return load_float_partial(data + at.first, at.count);
    }
  }
};

inline constexpr int64_t kLine = 64, kStreamedBytes = int64_t{8} << 20;

// Past the caches; aligned to the vector.
template <class V>
EFFATTN_INLINE void stream(void* to, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(value));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(value));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(value));
#endif
  memcpy(to, &value, sizeof(value));
}

// Streamed stores are seen by other threads only behind it.
EFFATTN_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A row to write.
template <class T, bool kStream>
struct WrittenRow {
  T* data;

  template <class Columns>
  EFFATTN_INLINE void store(Columns at, int v, Vec value) const {
    if constexpr (!Columns::kWhole) {
      store_float_partial(data + at.first, value, at.count);
    } else if constexpr (!kStream) {
      store_float(data + at.first + v * kLanes, value);
    } else {
      T elements[kLanes];
      store_float(elements, value);
      if constexpr (sizeof(T) == 4)
        stream(data + at.first + v * kLanes, load_as<Vec>(elements));
      else
        stream(data + at.first + v * kLanes, load_as<HalfVec>(elements));
    }
  }
};

// The rows of one batch of a tensor (1,B,rows,C).
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t batch)
      : data_(static_cast<const T*>(tensor.data) + batch * tensor.stride[1]),
        row_stride_(tensor.stride[2]),
        column_stride_(tensor.stride[3]) {}
  EFFATTN_INLINE Row<T> operator[](int64_t row) const { return {data_ + row * row_stride_, column_stride_}; }

 private:
  const T* data_;
  int64_t row_stride_, column_stride_;
};

// The rows of one batch of a tensor that is written; columns lie side by side.
template <class T, bool kStream>
class WrittenRows {
 public:
  WrittenRows(const Tensor& tensor, int64_t batch)
      : data_(static_cast<T*>(tensor.data) + batch * tensor.stride[1]), row_stride_(tensor.stride[2]) {}
  EFFATTN_INLINE WrittenRow<T, kStream> operator[](int64_t row) const { return {data_ + row * row_stride_}; }

 private:
  T* data_;
  int64_t row_stride_;
};

inline bool is_streamed(const Tensor& written) {
  const int64_t element = element_size(written.dtype), row = written.size[3] * element;
  const bool whole_lines = (row | written.stride[1] * element | written.stride[2] * element) % kLine == 0;
  return whole_lines && reinterpret_cast<uintptr_t>(written.data) % kLine == 0 &&
         written.size[1] * written.size[2] * row >= kStreamedBytes;
}

// Bit by bit.
template <class T, bool kStream>
EFFATTN_INLINE void copy_row(const WrittenRow<T, kStream>& to, const Row<T>& from, int64_t columns) {
  if (from.stride == 1) {
    constexpr int64_t kBytes = sizeof(Vec);
    const char* const source = reinterpret_cast<const char*>(from.data);
    char* const target = reinterpret_cast<char*>(to.data);
    const int64_t bytes = columns * sizeof(T);
    int64_t i = 0;
    for (; i + 4 * kBytes <= bytes; i += 4 * kBytes) {
      Vec part[4];
      EFFATTN_UNROLL for (int v = 0; v < 4; ++v) part[v] = load_as<Vec>(source + i + v * kBytes);
      EFFATTN_UNROLL for (int v = 0; v < 4; ++v) {
        if constexpr (kStream)
          stream(target + i + v * kBytes, part[v]);
        else
          memcpy(target + i + v * kBytes, &part[v], kBytes);
      }
    }
    memcpy(target + i, source + i, bytes - i);
  } else {
    for (int64_t c = 0; c < columns; ++c) to.data[c] = from.data[c * from.stride];
  }
}

template <class T, bool kStream>
EFFATTN_INLINE void zero_row(const WrittenRow<T, kStream>& to, int64_t columns) {
  memset(static_cast<void*>(to.data), 0, columns * sizeof(T));
}

template <class T, bool kStream>
EFFATTN_INLINE void scale_row(const WrittenRow<T, kStream>& to, const Row<T>& from, float factor, int64_t columns) {
  over_columns(columns, [&](auto at) __attribute__((always_inline)) {
    EFFATTN_UNROLL for (int v = 0; v < at.kVectors; ++v) to.store(at, v, from.load(at, v) * broadcast(factor));
  });
}

template <class T>
EFFATTN_INLINE void fetch_row(const Row<T>& row, int64_t columns) {
  if (row.stride == 1)
    for (int64_t c = 0; c < columns; c += kLine / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(row.data + c, 0, 2);
}

// The members of one output.
struct Group {
  const int32_t* members;
  int64_t count;
};

// Hands (batch, first output, last output) to body, every range with about the same number of members and outputs.
template <class Body>
void over_outputs(const Runtime& runtime, const TokenGroups& groups, int64_t columns, const Body& body) {
  constexpr int64_t kBlock = 64;
  const int64_t rows = groups.tokens + groups.outputs, blocks = (rows + kBlock - 1) / kBlock;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / blocks, block = item % blocks;
      const int32_t* const offsets = groups.offsets + batch * (groups.outputs + 1);
      const auto output_at = [&](int64_t row) {  // the first output with so many members and outputs before it
        int64_t low = 0, high = groups.outputs;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (offsets[middle] + middle < row)
            low = middle + 1;
          else
            high = middle;
        }
        return low;
      };
      const int64_t last = block + 1 == blocks ? groups.outputs : output_at((block + 1) * kBlock);
      body(batch, output_at(block * kBlock), last);
    }
    fence();
  };
  for_items(runtime, groups.batch * blocks, 2.0 * groups.batch * rows * columns, range);
}

EFFATTN_INLINE Group group_at(const TokenGroups& groups, int64_t batch, int64_t output) {
  const int32_t* const offsets = groups.offsets + batch * (groups.outputs + 1) + output;
  return {groups.members + batch * groups.tokens + offsets[0], offsets[1] - offsets[0]};
}

// The first members of the output that comes two later; none behind the last.
EFFATTN_INLINE Group group_ahead(const TokenGroups& groups, int64_t batch, int64_t output, int64_t last) {
  if (output + 2 >= last) return {nullptr, 0};
  const Group group = group_at(groups, batch, output + 2);
  return {group.members, smaller(group.count, 4)};
}

template <template <class, bool> class Kernel, class T, class Call>
void dispatch_stores(const Tensor& written, const Call& call, const Runtime& runtime) {
  if (is_streamed(written))
    Kernel<T, true>::run(call, runtime);
  else
    Kernel<T, false>::run(call, runtime);
}

// The element type, and whether the result is streamed, as template arguments.
template <template <class, bool> class Kernel, class Call>
void dispatch(const Tensor& written, const Call& call, const Runtime& runtime) {
  if (written.dtype == DType::kBFloat16)
    dispatch_stores<Kernel, bfloat16>(written, call, runtime);
  else if (written.dtype == DType::kFloat16)
    dispatch_stores<Kernel, float16>(written, call, runtime);
  else
    dispatch_stores<Kernel, float>(written, call, runtime);
}

}  // namespace effattn::EFFATTN_ISA::merging
