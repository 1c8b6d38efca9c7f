// Many rows times power-of-two weights: the weights expanded once, then the micro-kernel of gemm.h.
//
//   forward    output (M,N) = left (M,K) W^T       backward    grad (M,K) = (left (M,N) * scale) W
//
// A panel is kTileColumns output columns over the whole summed index, [word][column], as gemm.h wants its B operand; as
// many panels as fit kChunkWords are expanded into memory that the calling thread owns (first parallel pass: one item a
// panel), then blocks of kRowBlock rows run over them (second pass). In a block, kBlockSteps words of a panel (16 KB at
// 64 columns) stay in L1 while 48 rows go by, six at a time; sums of several such runs meet in a 48 x 64 tile, also in
// L1. fp32 rows are read where they lie, through the broadcast strides; other rows are packed once per block.
// FLOPs 2 M N K (Integer: 64 multiply-adds per vpdpbusd); bytes M K + M N elements, N K / 2 of codes.
#pragma once

#include "scratch.h"
#include "shift_linear_arithmetic.h"

namespace effattn::EFFATTN_ISA {

struct ShiftProblem {
  Tensor left, output;
  Codes codes;
  const float* left_scale;  // per column of left
  const float* scale;       // per column of the output
  const float* bias;
  bool transposed;  // the summed index is the channel: backward

  int64_t rows() const { return left.size[2]; }
  int64_t depth() const { return left.size[3]; }
  int64_t columns() const { return output.size[3]; }
};

struct ColumnTerms {
  alignas(64) float scale[kTileColumns], bias[kTileColumns];
  alignas(64) uint32_t offset[kTileColumns];
};

struct ShiftScratch {
  Buffer panels, terms, rows;
};

inline ShiftScratch& shift_scratch() {
  static thread_local ShiftScratch scratch;
  return scratch;
}

EFFATTN_INLINE void store_output(const Tensor& to, int64_t offset, Vec value, int64_t count) {
  const auto put = [&](auto* data) __attribute__((always_inline)) {
    if (count >= kLanes)
      store_float(data + offset, value);
    else
      store_float_partial(data + offset, value, count);
  };
  if (to.dtype == DType::kFloat32)
    put(static_cast<float*>(to.data));
  else if (to.dtype == DType::kBFloat16)
    put(static_cast<bfloat16*>(to.data));
  else
    put(static_cast<float16*>(to.data));
}

// Keeps the compiler from contracting the product into a multiply-add: integer activations are compared bit for bit.
EFFATTN_INLINE Vec rounded(Vec product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#else
  asm("" : "+w"(product));
#endif
  return product;
}

template <class Arithmetic>
class ShiftPanels {
  using Word = typename Arithmetic::Word;
  using Traits = ShiftTraits<Arithmetic>;
  static constexpr int64_t kRowBlock = 48;
  static constexpr int64_t kBlockSteps = 64;
  static constexpr int64_t kChunkWords = int64_t{1} << 20;
  static constexpr int64_t kPerWord = Arithmetic::kPerWord;

 public:
  static void run(const ShiftProblem& problem, const Runtime& runtime) {
    ShiftPanels panels(problem, runtime.threads);
    const int64_t all = (problem.columns() + kTileColumns - 1) / kTileColumns;
    const int64_t per_panel = panels.words_ * kTileColumns;
    const int64_t chunk = smaller(all, larger(larger(kChunkWords / larger(per_panel, 1), runtime.threads), 1));
    panels.panels_ = shift_scratch().panels.reserve<Word>(chunk * per_panel + kLanes);
    panels.terms_ = shift_scratch().terms.reserve<ColumnTerms>(chunk);
    const double work = 2.0 * problem.rows() * kTileColumns * problem.depth();
    for (int64_t first = 0; first < all; first += chunk) {
      panels.first_ = first;
      panels.count_ = smaller(chunk, all - first);
      panels.groups_ = smaller(panels.count_, (runtime.threads + panels.blocks_ - 1) / panels.blocks_);
      const double expansion = 8.0 * panels.count_ * per_panel;
      run_items(
          runtime, panels.count_, expansion,
          [](int64_t begin, int64_t end, void* self) { static_cast<ShiftPanels*>(self)->expand(begin, end); }, &panels);
      run_items(
          runtime, panels.blocks_ * panels.groups_, work * panels.count_,
          [](int64_t begin, int64_t end, void* self) { static_cast<ShiftPanels*>(self)->multiply(begin, end); },
          &panels);
    }
    shift_scratch().panels.trim();
  }

 private:
  ShiftPanels(const ShiftProblem& problem, int threads) : problem_(problem) {
    // Panels of a forward product hold whole dwords of codes.
    const int64_t per_dword = problem.codes.bytes ? 4 : 8;
    words_ = problem.transposed ? (problem.depth() + kPerWord - 1) / kPerWord
                                : round_up(problem.depth(), per_dword) / kPerWord;
    pitch_ = round_up(larger(words_, 1), kLanes);
    const int64_t shares = (problem.rows() + 2 * threads - 1) / (2 * threads);
    block_rows_ = smaller(kRowBlock, round_up(larger(shares, 1), kTileRows));
    blocks_ = (problem.rows() + block_rows_ - 1) / block_rows_;
  }

  Word* panel(int64_t p) const { return panels_ + p * words_ * kTileColumns; }
  int64_t width(int64_t column) const { return round_up(smaller(kTileColumns, problem_.columns() - column), kLanes); }

  void expand(int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t column = (first_ + p) * kTileColumns;
      ColumnTerms& terms = terms_[p];
      for (int64_t c = 0; c < kTileColumns; ++c) {
        const bool live = column + c < problem_.columns();
        terms.scale[c] = live && problem_.scale ? problem_.scale[column + c] : 1.f;
        terms.bias[c] = live && problem_.bias ? problem_.bias[column + c] : 0.f;
      }
      if (problem_.codes.bytes)
        problem_.transposed ? expand_natural<true>(panel(p), column) : expand_transposed<true>(panel(p), terms, column);
      else
        problem_.transposed ? expand_natural<false>(panel(p), column)
                            : expand_transposed<false>(panel(p), terms, column);
    }
  }

  template <bool kBytes>
  void expand_transposed(Word* to, ColumnTerms& terms, int64_t channel) {
    if constexpr (!kBytes || kPerWord <= 2) {
      constexpr int64_t kWords = kWordsPerDword<Arithmetic, kBytes>;
      const int64_t dwords = words_ / kWords, pitch = width(channel);
      for (int64_t first = 0; first < pitch; first += kLanes) {
        WordVec offset = {};
        for (int64_t d = 0; d < dwords; d += kLanes) {
          WordVec lines[kLanes];
          EFFATTN_UNROLL for (int r = 0; r < kLanes; ++r) {
            const int64_t row = channel + first + r;
            lines[r] = row < problem_.codes.channels
                           ? load_dwords(problem_.codes.row(row), 4 * d, problem_.codes.row_bytes)
                           : WordVec{};
          }
          transpose(lines);
          alignas(64) uint32_t staged[kLanes * kLanes];
          EFFATTN_UNROLL for (int r = 0; r < kLanes; ++r) memcpy(staged + r * kLanes, &lines[r], sizeof(WordVec));
          for (int64_t r = 0; r < smaller(kLanes, dwords - d); ++r)
            expand_dwords<Arithmetic, kBytes>(
                to + (d + r) * kWords * pitch + first, pitch, load_as<WordVec>(staged + r * kLanes), offset);
        }
        memcpy(terms.offset + first, &offset, sizeof(offset));
      }
    }
  }

  template <bool kBytes>
  void expand_natural(Word* to, int64_t column) {
    if constexpr (Traits::kFloating) {
      const Codes& codes = problem_.codes;
      const int64_t pitch = width(column);
      for (int64_t word = 0; word < words_; ++word)
        for (int64_t c = 0; c < pitch; c += kLanes) {
          WordVec packed = (WordVec)decode_run<kBytes>(codes.row(word * kPerWord), column + c, codes.row_bytes);
          if constexpr (kPerWord == 2) {
            packed >>= 16;
            if (word * 2 + 1 < codes.channels)
              packed |= (WordVec)decode_run<kBytes>(codes.row(word * 2 + 1), column + c, codes.row_bytes);
          }
          memcpy(to + word * pitch + c, &packed, sizeof(packed));
        }
    }
  }

  // ---- rows ----

  struct Rows {
    const Word* words;
    int64_t row, step;  // strides
  };

  // Where six rows can be read as they lie.
  bool in_place(Rows& rows, int64_t row) const {
    const Tensor& left = problem_.left;
    if (problem_.left_scale || !Traits::kFloating) return false;
    if constexpr (kPerWord == 1) {
      rows = {static_cast<const Word*>(left.data) + row * left.stride[2], left.stride[2], left.stride[3]};
      return left.dtype == DType::kFloat32;
    } else {
      const uint16_t* data = static_cast<const uint16_t*>(left.data) + row * left.stride[2];
      rows = {reinterpret_cast<const Word*>(data), left.stride[2] / 2, 1};
      return left.stride[3] == 1 && left.stride[2] % 2 == 0 && left.size[3] % 2 == 0;
    }
  }

  void pack_row(Word* to, int64_t row, float* staged, float& step) const {
    const Matrix from = matrix_at(problem_.left, 0, 0, row);
    const int64_t depth = problem_.depth(), padded = pitch_ * kPerWord;
    if constexpr (Traits::kFloating) {
      row_to_words<Arithmetic>(to, from, 0, depth, pitch_);
      if (!problem_.left_scale) return;
      for (int64_t k = 0; k < padded; k += kLanes) {
        const Vec scale = load_float_partial(problem_.left_scale + k, depth - k);
        if constexpr (kPerWord == 1) {
          store(to + k, load(to + k) * scale);
        } else {
          bfloat16* half = reinterpret_cast<bfloat16*>(to) + k;
          store_float(half, load_float(half) * scale);
        }
      }
    } else {
      row_to_float(staged, from, 0, depth, padded);
      if constexpr (__is_same(Arithmetic, Integer)) {
        step = quantize_row(to, staged, padded);
      } else {
        for (int64_t k = 0; k < padded; k += kLanes) {
          const IntVec fixed = to_fixed16(load(staged + k));
          memcpy(to + k, &fixed, sizeof(fixed));
        }
      }
    }
  }

  void multiply(int64_t begin, int64_t end) {
    const int64_t staged_floats = Traits::kFloating ? 0 : pitch_ * kPerWord;
    float* scratch = shift_scratch().rows.reserve<float>(kRowBlock * (pitch_ + kTileColumns) + staged_floats + kLanes);
    float* partial = scratch;
    float* staged = partial + kRowBlock * kTileColumns;
    Word* packed = reinterpret_cast<Word*>(staged + staged_floats);
    int64_t held = -1;
    alignas(64) float step[kRowBlock] = {};
    Rows sources[kRowBlock / kTileRows];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / groups_, group = item % groups_;
      const int64_t row = block * block_rows_, rows = smaller(block_rows_, problem_.rows() - row);
      if (block != held) {
        held = block;
        for (int64_t r = 0; r < rows; r += kTileRows) {
          Rows& source = sources[r / kTileRows];
          if (rows - r >= kTileRows && in_place(source, row + r)) continue;
          Word* to = packed + r * pitch_;
          source = {to, pitch_, 1};
          for (int64_t i = 0; i < kTileRows; ++i) {
            if (r + i < rows)
              pack_row(to + i * pitch_, row + r + i, staged, step[r + i]);
            else
              memset(to + i * pitch_, 0, pitch_ * sizeof(Word));
          }
        }
      }
      for (int64_t p = group * count_ / groups_; p < (group + 1) * count_ / groups_; ++p)
        multiply_panel(p, sources, step, row, rows, partial);
    }
    shift_scratch().rows.trim();
  }

  void multiply_panel(
      int64_t p, const Rows* sources, const float* step, int64_t row, int64_t rows, float* partial) const {
    const int64_t column = (first_ + p) * kTileColumns, pitch = width(column);
    // Words behind the last weight are not read from the user's rows.
    const int64_t steps = Traits::kFloating ? (problem_.depth() + kPerWord - 1) / kPerWord : words_;
    int64_t from = 0;
    do {
      const int64_t count = smaller(kBlockSteps, steps - from);
      const bool last = from + count >= steps;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const Rows& source = sources[r / kTileRows];
        Tile tile = {source.words + from * source.step, source.row, source.step, panel(p) + from * pitch, pitch, count,
            partial + r * kTileColumns, from == 0, last, &terms_[p], step + r, row + r, smaller(kTileRows, rows - r),
            column, 0};
        int64_t v = 0;
        for (; v + Traits::kVectors <= pitch / kLanes; v += Traits::kVectors)
          tile.at(v), run_tile<Traits::kVectors>(tile);
        run_rest<Traits::kVectors - 1>(tile, v, pitch / kLanes - v);
      }
      from += count;
    } while (from < steps);
  }

  struct Tile {
    const Word* a;
    int64_t a_row, a_step;
    const Word* b;
    int64_t b_step, steps;
    float* partial;
    bool first, last;
    const ColumnTerms* terms;
    const float* step;
    int64_t row, rows, column, vector;
    void at(int64_t v) { vector = v; }
  };

  template <int kVectors>
  void run_rest(Tile& tile, int64_t v, int64_t rest) const {
    if constexpr (kVectors > 0) {
      if (rest == kVectors)
        tile.at(v), run_tile<kVectors>(tile);
      else
        run_rest<kVectors - 1>(tile, v, rest);
    }
  }

  template <int kVectors>
  __attribute__((noinline)) void run_tile(const Tile& t) const {
    const int64_t lane = t.vector * kLanes;
    multiply_tile<Arithmetic, kVectors, Traits::kSums>(t.a, t.a_row, t.a_step, t.b + lane, t.b_step, t.steps,
        [&](Vec(&sum)[kTileRows][kVectors]) __attribute__((always_inline)) {
          if (!t.first) {
            EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v)
                sum[i][v] = add_sums<Arithmetic>(load(t.partial + i * kTileColumns + lane + v * kLanes), sum[i][v]);
          }
          if (!t.last) {
            EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v)
                store(t.partial + i * kTileColumns + lane + v * kLanes, sum[i][v]);
            return;
          }
          const int64_t columns = problem_.columns(), column = t.column + lane;
          EFFATTN_UNROLL for (int i = 0; i < kTileRows; ++i) if (i < t.rows) {
            EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
              const int64_t c = lane + v * kLanes;
              const Vec value = finish(sum[i][v], *t.terms, c, t.step[i]);
              store_output(
                  problem_.output, (t.row + i) * columns + column + v * kLanes, value, columns - column - v * kLanes);
            }
          }
        });
  }

  static EFFATTN_INLINE Vec finish(Vec sum, const ColumnTerms& terms, int64_t c, float step) {
    if constexpr (Traits::kFloating) {
      return fma(sum, load(terms.scale + c), load(terms.bias + c));
    } else {
      WordVec total = (WordVec)sum;
      total -= load_as<WordVec>(terms.offset + c);
      if constexpr (__is_same(Arithmetic, Integer)) {
        const Vec value = rounded(__builtin_convertvector((IntVec)total, Vec) * broadcast(step * 0x1p-6f));
        return rounded(value * load(terms.scale + c)) + load(terms.bias + c);
      } else {
        total += (WordVec)to_fixed16(load(terms.bias + c));
        return __builtin_convertvector((IntVec)total, Vec) * broadcast(0x1p-16f);
      }
    }
  }

  const ShiftProblem& problem_;
  Word* panels_ = nullptr;
  ColumnTerms* terms_ = nullptr;
  int64_t words_, pitch_, block_rows_, blocks_, first_ = 0, count_ = 0, groups_ = 1;
};

}  // namespace effattn::EFFATTN_ISA
