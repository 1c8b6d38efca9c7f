// What the FFT method reads and writes: columns of the user's tensors as rows of numbers over positions, and the
// weights of a head with their spectrum. Token i stands at position p_i = (i / w)(2 w - 1) + i % w, other positions
// hold 0.
#pragma once

#include "api.h"
#include "backward_tiles.h"
#include "fft.h"
#include "toeplitz_table.h"

namespace effattn::EFFATTN_ISA {
namespace toeplitz_fft {

using fft::all;
using fft::at;
using fft::Complex;
using fft::kLanesOf;
using fft::put;
using fft::Transform;
using fft::VectorOf;

// Tokens and columns that are transposed at a time; rows of numbers are longer than their positions by as much.
inline constexpr int64_t kTile = 16;
static_assert(kTile % kLanes == 0);

struct Positions {
  int64_t grid_h, grid_w;

  int64_t count() const { return grid_h * grid_w == 0 ? 0 : (grid_h - 1) * (2 * grid_w - 1) + grid_w; }
  // body(token, tokens, position) for neighbours, at most `most` at a time.
  template <class Body>
  void each_run(int64_t most, const Body& body) const {
    for (int64_t y = 0; y < grid_h; ++y)
      for (int64_t x = 0; x < grid_w; x += most)
        body(y * grid_w + x, smaller(most, grid_w - x), y * (2 * grid_w - 1) + x);
  }
};

struct Sizes {
  int64_t batches, heads, tokens, features, channels, positions, entries, length, pitch;
  Positions place;

  explicit Sizes(const Toeplitz& a)
      : batches(a.query.size[0]),
        heads(a.query.size[1]),
        tokens(a.query.size[2]),
        features(a.query.size[3]),
        channels(a.value.size[3]),
        place{a.grid_h, a.grid_w} {
    positions = place.count();
    entries = positions > 0 ? 2 * positions - 1 : 0;
    length = fft::length_from(2 * positions);
    pitch = length / 2 + kTile;
  }
  int64_t pairs() const { return batches * heads; }
  // Of one transform of every product of a feature and a channel, the normalizers' channel among them.
  double flops() const {
    return 2.5 * static_cast<double>(pairs() * features * (channels + 1)) * static_cast<double>(length) *
           ::log2(static_cast<double>(length));
  }
};

EFFATTN_INLINE Matrix columns_of(const Tensor& tensor, int64_t pair, int64_t first) {
  Matrix matrix = matrix_at(tensor, pair / tensor.size[1], pair % tensor.size[1]);
  matrix.data = static_cast<const char*>(matrix.data) + first * matrix.column_stride * element_size(matrix.dtype);
  return matrix;
}

// Columns of a matrix and `tokens` rows of it from `token` on, kTile at most of either.
EFFATTN_INLINE Matrix tile_of(const Matrix& matrix, int64_t token, int64_t column) {
  Matrix tile = matrix;
  tile.data = static_cast<const char*>(matrix.data) + column * matrix.column_stride * element_size(matrix.dtype);
  tile.first = token;
  return tile;
}

EFFATTN_INLINE void transpose_tile(float (&to)[kTile][kTile], const float (&from)[kTile][kTile]) {
  for (int64_t row = 0; row < kTile; row += kLanes)
    for (int64_t column = 0; column < kTile; column += kLanes) {
      Vec lines[kLanes];
      EFFATTN_UNROLL for (int i = 0; i < kLanes; ++i) lines[i] = load(from[row + i] + column);
      fft::transpose<float>(lines);
      EFFATTN_UNROLL for (int i = 0; i < kLanes; ++i) store(to[column + i] + row, lines[i]);
    }
}

// to[column][position] = from[token][column] * factor(token); everything else of `count` rows is 0.
template <class T, class Factor>
inline void load_columns(T* to, int64_t pitch, const Matrix& from, int64_t count, Positions place, Factor factor) {
  const int64_t kept = place.grid_h == 1 ? place.grid_w : 0;
  for (int64_t c = 0; c < count; ++c) memset(to + c * pitch + kept, 0, (pitch - kept) * sizeof(T));
  alignas(64) float tile[kTile][kTile] = {}, columns[kTile][kTile];
  place.each_run(kTile, [&](int64_t token, int64_t tokens, int64_t position) {
    alignas(64) T times[kTile] = {};
    for (int64_t r = 0; r < tokens; ++r) times[r] = factor(token + r);
    for (int64_t first = 0; first < count; first += kTile) {
      const int64_t width = smaller(kTile, count - first);
      rows_to_float(tile[0], kTile, tile_of(from, token, first), tokens, width);
      transpose_tile(columns, tile);
      for (int64_t c = 0; c < width; ++c) {
        T* column = to + (first + c) * pitch + position;
        if (tokens == kTile) {
          for (int64_t r = 0; r < kTile; ++r) column[r] = static_cast<T>(columns[c][r]) * times[r];
        } else {
          for (int64_t r = 0; r < tokens; ++r) column[r] = static_cast<T>(columns[c][r]) * times[r];
        }
      }
    }
  });
}

template <class T>
inline void load_columns(T* to, int64_t pitch, const Matrix& from, int64_t count, Positions place) {
  load_columns(to, pitch, from, count, place, [](int64_t) { return T(1); });
}

// The way back.
template <class T, class Factor>
inline void store_columns(
    const Matrix& to, const T* from, int64_t pitch, int64_t count, Positions place, Factor factor) {
  alignas(64) float tile[kTile][kTile], columns[kTile][kTile] = {};
  place.each_run(kTile, [&](int64_t token, int64_t tokens, int64_t position) {
    alignas(64) T times[kTile] = {};
    for (int64_t r = 0; r < tokens; ++r) times[r] = factor(token + r);
    for (int64_t first = 0; first < count; first += kTile) {
      const int64_t width = smaller(kTile, count - first);
      for (int64_t c = 0; c < width; ++c) {
        const T* column = from + (first + c) * pitch + position;
        for (int64_t r = 0; r < kTile; ++r) columns[c][r] = static_cast<float>(column[r] * times[r]);
      }
      transpose_tile(tile, columns);
      store_rows(tile_of(to, token, first), tokens, tile[0], kTile, broadcast(1.f), width);
    }
  });
}

// The weights of a head: entry r + positions - 1 is that of a key r positions behind the query.
class Weights {
 public:
  Weights(const Toeplitz& arguments, const Sizes& sizes, int64_t head, Buffer& buffer)
      : entries_(sizes.entries), weights_(buffer.reserve<double>(sizes.entries)) {
    const float* bias = arguments.bias + head * entries_;
    const double highest = toeplitz::highest_entry(bias, entries_);
    for (int64_t i = 0; i < entries_; ++i) {
      const bool seen = !(arguments.is_causal && i >= sizes.positions);
      weights_[i] = seen ? exp(static_cast<double>(bias[i]) - highest) : 0.0;
      square_ += weights_[i] * weights_[i];
    }
  }
  double operator[](int64_t i) const { return weights_[i]; }
  double norm() const { return sqrt(square_); }

 private:
  int64_t entries_;
  double* weights_;
  double square_ = 0.0;
};

// The spectrum of a real sequence over -positions < r < positions, in double whatever the method's numbers are.
class Exact {
 public:
  explicit Exact(const Sizes& sizes) : sizes_(sizes), transform_(sizes.length) {}

  // to = FFT of x_i = value(-i), divided by the length, in the order of `order`.
  template <class T, class Value>
  void spectrum(T* to, const Transform<T>& order, const Value& value) const {
    Scratch& s = reserve();
    for (const bool second : {false, true}) {
      memset(s.line, 0, transform_.positions() * sizeof(double));
      for (int64_t r = second ? 1 : 0; r < sizes_.positions; ++r)
        s.line[second ? sizes_.length / 2 - r : r] = value(second ? r : -r) / static_cast<double>(sizes_.length);
      transform_.enter(s.array, [&](int64_t j) __attribute__((always_inline)) {
        return Complex<double>{at(s.line + j), VectorOf<double>{}};
      });
      double* const arrays[1] = {s.array};
      transform_.middle<false>(arrays, [&](int64_t row, const Complex<double>(&x)[1]) {
        for (int lane = 0; lane < kWidth; ++lane) {
          double* number = s.natural + 2 * transform_.frequency(row, lane);
          const double sign = transform_.is_odd(lane) ? -1.0 : 1.0;
          number[0] = second ? number[0] + sign * x[0].re[lane] : x[0].re[lane];
          number[1] = second ? number[1] + sign * x[0].im[lane] : x[0].im[lane];
        }
      });
    }
    for (int64_t row = 0; row < order.rows(); ++row, to += Transform<T>::kRow)
      for (int lane = 0; lane < Transform<T>::kWidth; ++lane) {
        const double* number = s.natural + 2 * order.frequency(row, lane);
        to[lane] = static_cast<T>(number[0]);
        to[Transform<T>::kWidth + lane] = static_cast<T>(number[1]);
      }
    give_back(s);
  }

  // result(r, x_r) from the sum of spectra from[0], from[stride] ... that count many, in this order.
  template <class T, class Result>
  void sequence(const T* from, int64_t stride, int64_t count, const Transform<T>& order, const Result& result) const {
    Scratch& s = reserve();
    for (int64_t row = 0; row < order.rows(); ++row)
      for (int lane = 0; lane < Transform<T>::kWidth; ++lane) {
        const T* number = from + row * Transform<T>::kRow + lane;
        double re = 0.0, im = 0.0;
        for (int64_t i = 0; i < count; ++i) re += number[i * stride], im += number[i * stride + Transform<T>::kWidth];
        double* sum = s.natural + 2 * order.frequency(row, lane);
        sum[0] = re, sum[1] = im;
      }
    const double scale = 1.0 / static_cast<double>(sizes_.length);
    for (const bool second : {false, true}) {
      for (int64_t row = 0; row < transform_.rows(); ++row)
        for (int lane = 0; lane < kWidth; ++lane) {
          const double* number = s.natural + 2 * transform_.frequency(row, lane);
          const double sign = second && transform_.is_odd(lane) ? -1.0 : 1.0;
          s.spectrum[row * kRow + lane] = sign * number[0];
          s.spectrum[row * kRow + kWidth + lane] = sign * number[1];
        }
      memset(s.line, 0, transform_.positions() * sizeof(double));
      memset(s.array, 0, transform_.array_size() * sizeof(double));
      double* const arrays[1] = {s.array};
      transform_.middle<true>(arrays, [&](int64_t row, Complex<double>(&x)[1]) __attribute__((always_inline)) {
        x[0] = fft::load_complex(s.spectrum + row * kRow);
      });
      transform_.leave(s.array, [&](int64_t j, VectorOf<double> re, VectorOf<double>)
                                    __attribute__((always_inline)) { put(s.line + j, at(s.line + j) + re * scale); });
      for (int64_t r = second ? 1 : 0; r < sizes_.positions; ++r)
        if (second)
          result(-r, s.line[sizes_.length / 2 - r]);
        else
          result(r, s.line[r]);
    }
    give_back(s);
  }

 private:
  static constexpr int kWidth = Transform<double>::kWidth, kRow = Transform<double>::kRow;

  struct Scratch {
    Buffer buffers[4];
    double *line, *array, *natural, *spectrum;
  };

  Scratch& reserve() const {
    static thread_local Scratch s;
    s.line = s.buffers[0].reserve<double>(transform_.positions());
    s.array = s.buffers[1].reserve<double>(transform_.array_size());
    s.natural = s.buffers[2].reserve<double>(2 * sizes_.length);
    s.spectrum = s.buffers[3].reserve<double>(transform_.spectrum_size());
    transform_.clear_tail(s.array);
    return s;
  }
  static void give_back(Scratch& s) {
    for (Buffer& buffer : s.buffers) buffer.trim();
  }

  const Sizes& sizes_;
  const Transform<double> transform_;
};

}  // namespace toeplitz_fft
}  // namespace effattn::EFFATTN_ISA
