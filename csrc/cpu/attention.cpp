// Plain scaled dot-product attention: S = scale * Q K^T (+ bias), softmax over the keys j <= i if causal (top-left
// aligned), grouped-query heads.
//
// Without bias a score costs one multiply beyond the product; with a dense bias one load and two multiply-adds, read in
// place when float32 (dense_tile.h). Causal blocks past the diagonal are not computed. FLOPs 4 N M D per head (half if
// causal).
#include "backward.h"
#include "dense_tile.h"
#include "forward.h"

namespace effattn::EFFATTN_ISA {
namespace {

class PlainPolicy : public WholeSequence {
 public:
  using Arguments = AttentionMask;

  PlainPolicy(const AttentionForward& attention, const AttentionMask& mask)
      : WholeSequence(attention),
        keys_(attention.key.size[2]),
        is_causal_(mask.is_causal),
        factor_(attention.scale * kLog2E) {}

  int64_t rotation() const { return 0; }
  int64_t key_limit(int64_t row) const { return is_causal_ ? smaller(row + 1, keys_) : keys_; }
  int64_t plain_keys(int64_t row) const { return key_limit(row); }
  void enter(int64_t, int64_t) {}
  void stage(int64_t, int64_t, int64_t, int64_t) {}

  template <bool kPlain>
  struct Tile {
    float factor;
    EFFATTN_INLINE Vec transform(Vec score, int, int) const { return score * broadcast(factor); }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t, int64_t) const {
    return {factor_};
  }

 private:
  const int64_t keys_;
  const bool is_causal_;
  const float factor_;
};

class BiasPolicy : public WholeSequence {
 public:
  using Arguments = AttentionMask;

  BiasPolicy(const AttentionForward& attention, const AttentionMask& mask)
      : WholeSequence(attention), bias_(mask.bias), keys_(attention.key.size[2]), factor_(attention.scale * kLog2E) {}

  int64_t rotation() const { return 0; }
  int64_t key_limit(int64_t) const { return keys_; }
  int64_t plain_keys(int64_t) const { return keys_; }
  void enter(int64_t batch, int64_t head) { bias_.enter(batch, head); }
  void stage(int64_t row, int64_t rows, int64_t key, int64_t keys) { bias_.stage(row, rows, key, keys); }

  template <bool kPlain>
  struct Tile {
    DenseTile::Rows<kPlain> bias;
    float factor;
    EFFATTN_INLINE Vec transform(Vec score, int r, int v) const {
      return fma(score, broadcast(factor), bias.load(r, v) * broadcast(kLog2E));
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t row, int64_t key) const {
    return {bias_.rows<kPlain>(row, key), factor_};
  }

 private:
  DenseTile bias_;
  const int64_t keys_;
  const float factor_;
};

template <class AnyPolicy>
struct AttentionFamily {
  using Policy = AnyPolicy;
  using Sink = NoParameterGradient;
  using SinkArguments = NoParameterGradient;
  static constexpr bool kMultiplies = false;
};

}  // namespace

void attention_forward(const AttentionForward& attention, const AttentionMask& mask, const Runtime& runtime) {
  if (mask.bias.data)
    forward_any_type<BiasPolicy>(attention, mask, runtime);
  else
    forward_any_type<PlainPolicy>(attention, mask, runtime);
}

void attention_backward(const AttentionBackward& attention, const AttentionMask& mask, const Runtime& runtime) {
  const KeyChunks chunks(attention.key.size[2], attention.query.size[0] * attention.key.size[1]);
  if (mask.bias.data)
    backward_any_type<AttentionFamily<BiasPolicy>>(attention, mask, chunks, NoParameterGradient{}, runtime);
  else
    backward_any_type<AttentionFamily<PlainPolicy>>(attention, mask, chunks, NoParameterGradient{}, runtime);
}

}  // namespace effattn::EFFATTN_ISA
