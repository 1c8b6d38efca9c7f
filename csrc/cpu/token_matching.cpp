// Bipartite soft matching (ToMe, arXiv 2210.09461): which tokens go to which output.
//
// Tokens 0, 2, 4.. are a, tokens 1, 3, 5.. are b; every a proposes the b of the largest cosine similarity, the best
// num_merged proposals are carried out (reference/token_merging.py). Similarities are decided exactly, behind a filter
// in low precision (token_matching_similarity.h). Per image:
//   measure   norms of all tokens in float64
//   collect   the a that have a search to do and the b that can be found; of all others the partner is known
//   pack      those b, normalised and centred, as the columns of a product
//   match     blocks of at most 96 a over chunks of at most 1024 columns (256 KB of packed words, in the second cache):
//             6 x 64 micro-tiles (gemm.h) write 6 rows of scores (24 KB) and, for every 64 of these, the largest (16
//             lanes), so that a search looks at 1 score in 4; 6 rows are searched before the next 6 are computed
//   plan      a radix sort of the a by (level, index), 43 bits of level in 6 passes; source, members, offsets by
//             counting
// Work items are images, or blocks of tokens of one image where there are too few images for the threads. Every row's
// result is exact, so it depends on neither. FLOPs B N^2 d / 2; bytes read B N d elements a few times. Scratch per
// image in work: N/2 d packed words (2 B an element with vdpbf16ps, else 4 B), 24 N B of indices, and N/2 d floats if
// the tokens are not float32 with unit last stride.
#include "api.h"
#include "token_matching_similarity.h"

namespace effattn::EFFATTN_ISA {
namespace {

inline constexpr int64_t kNotANumber = -2 * kSteps, kAbsent = -3 * kSteps, kProtected = -4 * kSteps;
inline constexpr int64_t kColumnsInChunk = 1024, kWordsInChunk = 65536, kRowsInBlock = 16 * kTileRows;
inline constexpr int64_t kPeaksInChunk = kColumnsInChunk / kTileVectors;
inline constexpr int64_t kCentred = 16;  // the centre is the mean of so many tokens

struct ImageScratch {
  Buffer norms, indices, packed, shifts, measures, tokens, centre, best, order;
  void trim() {
    for (Buffer* buffer : {&norms, &indices, &packed, &shifts, &measures, &tokens, &centre, &best, &order})
      buffer->trim();
  }
};
struct BlockScratch {
  Buffer row, words, tokens, scores;
};

ImageScratch& image_scratch() {
  static thread_local ImageScratch scratch;
  return scratch;
}
BlockScratch& block_scratch() {
  static thread_local BlockScratch scratch;
  return scratch;
}

class Image {
 public:
  Image(const TokenMatching& call, int64_t image, ImageScratch& scratch)
      : call_(call),
        image_(image),
        tokens_(call.metric.size[2]),
        length_(call.metric.size[3]),
        rows_((tokens_ + 1) / 2),
        columns_(tokens_ / 2),
        protected_rows_(smaller((call.num_protected + 1) / 2, rows_)),
        protected_columns_(smaller(larger(call.num_protected / 2, call.distill_token ? 1 : 0), columns_)),
        sizes_(call.sizes ? call.sizes + image * tokens_ : nullptr),
        metric_(matrix_at(call.metric, 0, image)),
        in_place_(metric_.dtype == DType::kFloat32 && metric_.column_stride == 1),
        depth_(words<Filter>(length_)),
        pitch_(round_up(depth_, kLanes)),
        norms_(scratch.norms.reserve<double>(tokens_)),
        listed_columns_(scratch.indices.reserve<int32_t>(tokens_)),
        listed_rows_(listed_columns_ + columns_),
        packed_(scratch.packed.reserve<Word>(round_up(columns_, kLanes) * depth_)),
        shifts_(scratch.shifts.reserve<float>(round_up(columns_, kLanes))),
        measures_(scratch.measures.reserve<Measure>(round_up(columns_, kLanes) / kLanes)),
        centre_(scratch.centre.reserve<float>(round_up(length_, kLanes))),
        column_tokens_(in_place_ ? nullptr : scratch.tokens.reserve<float>(columns_ * length_)),
        best_(scratch.best.reserve<int64_t>(rows_)),
        order_(scratch.order.reserve<uint64_t>(2 * rows_)) {
    metric_.wrap = INT64_MAX;
  }

  int64_t tokens() const { return tokens_; }
  int64_t groups() const { return (num_listed_columns_ + kLanes - 1) / kLanes; }
  int64_t tiles() const { return (num_listed_rows_ + kTileRows - 1) / kTileRows; }

  void measure(int64_t begin, int64_t end) {
    const int64_t padded = round_up(length_, kLanes);
    float* const row = in_place_ ? nullptr : block_scratch().row.reserve<float>(padded);
    for (int64_t token = begin; token < end; ++token) {
      if (in_place_) {
        norms_[token] = norm_of(in_place(token), length_);
        continue;
      }
      row_to_float(row, metric_, token, length_, padded);
      norms_[token] = norm_of(row, length_);
      if (token % 2 == 1) memcpy(column_tokens_ + token / 2 * length_, row, length_ * sizeof(float));
    }
  }

  void collect() {
    num_listed_columns_ = num_listed_rows_ = 0;
    int64_t present = -1;  // the first b that is neither protected nor absent
    for (int64_t j = protected_columns_; j < columns_; ++j) {
      if (is_absent(2 * j + 1)) continue;
      if (present < 0) present = j;
      if (!isnan(norms_[2 * j + 1])) listed_columns_[num_listed_columns_++] = static_cast<int32_t>(j);
    }
    const int64_t of_protected = key_of(kProtected, 0);
    const int64_t of_absent = protected_columns_ < columns_ ? key_of(kAbsent, protected_columns_) : of_protected;
    const int64_t of_nan = present < 0 ? of_absent : key_of(kNotANumber, present);
    for (int64_t i = 0; i < rows_; ++i) {
      if (i < protected_rows_)
        best_[i] = of_protected;
      else if (is_absent(2 * i))
        best_[i] = of_absent;
      else if (isnan(norms_[2 * i]) || num_listed_columns_ == 0)
        best_[i] = of_nan;
      else if (isinf(norms_[2 * i]))
        best_[i] = key_of(0, listed_columns_[0]);
      else
        listed_rows_[num_listed_rows_++] = static_cast<int32_t>(i);
    }
    find_centre();
  }

  // Groups of kLanes columns.
  void pack(int64_t begin, int64_t end) {
    Word* const staged = block_scratch().words.reserve<Word>(kLanes * pitch_);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kLanes, panel = first / kTileColumns * kTileColumns;
      const int64_t width = round_up(smaller(num_listed_columns_ - panel, kTileColumns), kLanes);
      Measure largest = {0.f, 0.f};
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (first + lane >= num_listed_columns_) {
          memset(staged + lane * pitch_, 0, pitch_ * sizeof(Word));
          shifts_[first + lane] = -INFINITY;
          continue;
        }
        const int64_t j = listed_columns_[first + lane];
        const float* const token = column_token(j);
        const double norm = norms_[2 * j + 1];
        const Measure measure = filter_words(staged + lane * pitch_, token, norm, centre_, length_);
        largest = larger_of(largest, measure);
        shifts_[first + lane] = static_cast<float>(dot(centre_, token, length_) / norm - centre_square_);
      }
      measures_[group] = largest;
      Word* const to = packed_ + panel * depth_ + (first - panel);
      for (int64_t w = 0; w < depth_; w += kLanes) {
        WordVec lines[kLanes];
        EFFATTN_UNROLL for (int lane = 0; lane < kLanes; ++lane) lines[lane] =
            load_as<WordVec>(staged + lane * pitch_ + w);
        store_transposed(to + w * width, width, lines, depth_ - w);
      }
    }
  }

  // Tiles of kTileRows rows.
  void match(int64_t begin, int64_t end) {
    Columns columns = {num_listed_columns_, listed_columns_, packed_, shifts_, {0.f, 0.f}, column_token(0),
        in_place_ ? 2 * metric_.row_stride : length_, norms_ + 1, length_};
    for (int64_t group = 0; group < groups(); ++group) columns.largest = larger_of(columns.largest, measures_[group]);
    const int64_t block = larger(1, smaller(kRowsInBlock, kWordsInChunk / pitch_) / kTileRows);
    for (int64_t tile = begin; tile < end; tile += block) match_block(tile, smaller(end - tile, block), columns);
  }

  void plan() {
    const uint64_t* const order = sort_rows();
    const int64_t lowest = call_.threshold < -1.0 ? INT64_MIN : llrint(call_.threshold * static_cast<double>(kSteps));
    int64_t merged = 0;
    while (merged < call_.num_merged && level_of(best_[order[merged] % kIndices]) >= lowest) ++merged;
    const int64_t kept = rows_ - merged;
    const auto own = [&](int64_t j) { return call_.distill_token && j == 0 ? int64_t{1} : kept + j; };
    const auto behind = [&](int64_t place) { return place + (call_.distill_token && place > 0 ? 1 : 0); };

    int32_t* const source = call_.source + image_ * tokens_;
    for (int64_t i = 0; i < rows_; ++i) source[2 * i] = -1;
    for (int64_t rank = 0; rank < merged; ++rank) {
      const int64_t i = order[rank] % kIndices;
      source[2 * i] = static_cast<int32_t>(own(index_of(best_[i])));
    }
    if (call_.num_protected > 0) {
      int64_t place = 0;
      for (int64_t i = 0; i < rows_; ++i)
        if (source[2 * i] < 0) source[2 * i] = static_cast<int32_t>(behind(place++));
    } else {
      for (int64_t rank = merged; rank < rows_; ++rank)
        source[2 * (order[rank] % kIndices)] = static_cast<int32_t>(behind(rank - merged));
    }
    for (int64_t j = 0; j < columns_; ++j) source[2 * j + 1] = static_cast<int32_t>(own(j));
    group(source);
  }

 private:
  static Measure larger_of(Measure a, Measure b) {
    return {a.norm > b.norm ? a.norm : b.norm, a.error > b.error ? a.error : b.error};
  }
  bool is_absent(int64_t token) const { return sizes_ && !(sizes_[token] > 0.f); }
  const float* in_place(int64_t token) const { return static_cast<const float*>(metric_.data) + metric_.offset(token); }
  const float* column_token(int64_t j) const { return in_place_ ? in_place(2 * j + 1) : column_tokens_ + j * length_; }

  void find_centre() {
    const int64_t padded = round_up(length_, kLanes), sampled = smaller(kCentred, num_listed_columns_);
    memset(centre_, 0, padded * sizeof(float));
    for (int64_t s = 0; s < sampled; ++s) {
      const int64_t j = listed_columns_[s * num_listed_columns_ / sampled];
      const float* const token = column_token(j);
      const double factor = 1.0 / (norms_[2 * j + 1] * static_cast<double>(sampled));
      for (int64_t c = 0; c < length_; ++c) centre_[c] += static_cast<float>(static_cast<double>(token[c]) * factor);
    }
    centre_square_ = dot(centre_, centre_, length_);
  }

  void match_block(int64_t first_tile, int64_t tiles, const Columns& columns) {
    const int64_t first = first_tile * kTileRows, count = smaller(num_listed_rows_ - first, tiles * kTileRows);
    const int64_t chunk = larger(1, smaller(kColumnsInChunk, kWordsInChunk / depth_) / kTileColumns) * kTileColumns;
    BlockScratch& scratch = block_scratch();
    Word* const words = scratch.words.reserve<Word>(larger(kLanes, tiles * kTileRows) * pitch_);
    float* const scores = scratch.scores.reserve<float>(kTileRows * (kColumnsInChunk + kPeaksInChunk));
    float* const peaks = scores + kTileRows * kColumnsInChunk;
    float* const staged = in_place_ ? nullptr : scratch.tokens.reserve<float>(count * pitch_ * Filter::kPerWord);
    Search searches[kRowsInBlock];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = 2 * listed_rows_[first + r];
      Search& search = searches[r] = {};
      if (in_place_) {
        search.token = in_place(token);
      } else {
        float* const to = staged + r * pitch_ * Filter::kPerWord;
        row_to_float(to, metric_, token, length_, round_up(length_, kLanes));
        search.token = to;
      }
      search.norm = norms_[token];
      const Measure measure = filter_words(words + r * pitch_, search.token, search.norm, centre_, length_);
      search.margin = margin_of(measure, columns.largest, length_);
    }
    memset(words + count * pitch_, 0, (tiles * kTileRows - count) * pitch_ * sizeof(Word));
    for (int64_t begin = 0; begin < columns.count; begin += chunk) {
      const int64_t width = smaller(columns.count - begin, chunk);
      for (int64_t r = 0; r < count; r += kTileRows) {
        score(scores, peaks, words + r * pitch_, columns, begin, width);
        for (int64_t i = 0; i < smaller(count - r, kTileRows); ++i)
          searches[r + i].advance(scores + i * kColumnsInChunk, peaks + i * kPeaksInChunk, begin, width, columns);
      }
    }
    for (int64_t r = 0; r < count; ++r) best_[listed_rows_[first + r]] = searches[r].key;
  }

  void score(
      float* scores, float* peaks, const Word* words, const Columns& columns, int64_t begin, int64_t width) const {
    for_each_half_tile(width, [&](auto vectors, auto half, int64_t column) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      multiply_tile<Filter, kVectors, 1, kTileRows, decltype(half)::value != 0>(words, pitch_, 1,
          columns.packed + (begin + column) * depth_, kVectors * kLanes, depth_,
          [&](Vec(&sums)[kTileRows][kVectors]) __attribute__((always_inline)) {
            Vec shift[kVectors];
            EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) shift[v] =
                load(columns.shift + begin + column + v * kLanes);
            EFFATTN_UNROLL for (int r = 0; r < kTileRows; ++r) {
              Vec peak = broadcast(-INFINITY);
              EFFATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
                const Vec sum = sums[r][v] + shift[v];
                store(scores + r * kColumnsInChunk + column + v * kLanes, sum);
                peak = max(peak, sum);
              }
              store(peaks + r * kPeaksInChunk + column / kTileVectors, peak);
            }
          });
    });
  }

  // Rows by descending level, ties by index: each a word whose lowest 20 bits are the row.
  const uint64_t* sort_rows() {
    uint64_t* from = order_;
    uint64_t* to = order_ + rows_;
    for (int64_t i = 0; i < rows_; ++i)
      from[i] = static_cast<uint64_t>(2 * kSteps - level_of(best_[i])) * kIndices + static_cast<uint64_t>(i);
    for (int shift = 20; shift < 63; shift += 8) {
      int32_t begin[257] = {};
      for (int64_t i = 0; i < rows_; ++i) ++begin[(from[i] >> shift) % 256 + 1];
      if (begin[(from[0] >> shift) % 256 + 1] == rows_) continue;
      for (int digit = 0; digit < 256; ++digit) begin[digit + 1] += begin[digit];
      for (int64_t i = 0; i < rows_; ++i) to[begin[(from[i] >> shift) % 256]++] = from[i];
      uint64_t* const sorted = to;
      to = from;
      from = sorted;
    }
    return from;
  }

  void group(const int32_t* source) {
    int32_t* const members = call_.members + image_ * tokens_;
    int32_t* const offsets = call_.offsets + image_ * (call_.outputs + 1);
    // Shifted by one, so that after each member has moved its output's beginning, all stand where they belong.
    memset(offsets, 0, (call_.outputs + 1) * sizeof(*offsets));
    for (int64_t token = 0; token < tokens_; ++token)
      if (source[token] + 2 <= call_.outputs) ++offsets[source[token] + 2];
    for (int64_t t = 1; t <= call_.outputs; ++t) offsets[t] += offsets[t - 1];
    for (int64_t token = 0; token < tokens_; ++token)
      members[offsets[source[token] + 1]++] = static_cast<int32_t>(token);
  }

  const TokenMatching& call_;
  const int64_t image_, tokens_, length_, rows_, columns_, protected_rows_, protected_columns_;
  const float* const sizes_;
  Matrix metric_;
  const bool in_place_;
  const int64_t depth_, pitch_;
  double* const norms_;  // per token
  int32_t* const listed_columns_;
  int32_t* const listed_rows_;
  int64_t num_listed_columns_ = 0, num_listed_rows_ = 0;
  Word* const packed_;
  float* const shifts_;
  Measure* const measures_;  // the largest of each group of columns
  float* const centre_;
  double centre_square_ = 0.0;
  float* const column_tokens_;
  int64_t* const best_;  // keys, per row
  uint64_t* const order_;
};

}  // namespace

void bipartite_match(const TokenMatching& call, const Runtime& runtime) {
  const int64_t images = call.metric.size[1], tokens = call.metric.size[2];
  const double flops = 0.5 * static_cast<double>(tokens) * tokens * call.metric.size[3];
  constexpr double kWorthSplitting = 4e6;
  if (images % runtime.threads == 0 || images >= 4 * runtime.threads || flops < kWorthSplitting) {
    for_items(runtime, images, flops * images, [&](int64_t begin, int64_t end) {
      ImageScratch& scratch = image_scratch();
      for (int64_t i = begin; i < end; ++i) {
        Image image(call, i, scratch);
        image.measure(0, image.tokens());
        image.collect();
        image.pack(0, image.groups());
        image.match(0, image.tiles());
        image.plan();
      }
      scratch.trim();
    });
    return;
  }
  ImageScratch& scratch = image_scratch();
  for (int64_t i = 0; i < images; ++i) {
    Image image(call, i, scratch);
    for_items(runtime, image.tokens(), flops, [&](int64_t begin, int64_t end) { image.measure(begin, end); });
    image.collect();
    for_items(runtime, image.groups(), flops, [&](int64_t begin, int64_t end) { image.pack(begin, end); });
    for_items(runtime, image.tiles(), flops, [&](int64_t begin, int64_t end) { image.match(begin, end); });
    image.plan();
  }
  scratch.trim();
}

}  // namespace effattn::EFFATTN_ISA
