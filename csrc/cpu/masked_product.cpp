// Attention with a learned elementwise mask: S = scale * (Q K^T) * M with M a free (H, N, N) or (N, N) parameter
// (variant ELM of arXiv 2309.05375).
//
// M is read once per score, straight from where it lies if it is float32 with unit last stride, through a converted 48
// x 256 tile otherwise (dense_tile.h). FLOPs as plain attention; bytes 4 B H N^2 for M unless it stays in cache.
#include "dense_tile.h"
#include "forward.h"
#include "masked_product_gradient.h"

namespace effattn::EFFATTN_ISA {
namespace {

class MaskedProductPolicy : public WholeSequence {
 public:
  using Arguments = MaskedProduct;

  MaskedProductPolicy(const AttentionForward& attention, const MaskedProduct& mask)
      : WholeSequence(attention),
        weight_(mask.weight),
        tokens_(attention.query.size[2]),
        factor_(attention.scale * kLog2E) {}

  int64_t rotation() const { return 0; }
  int64_t key_limit(int64_t) const { return tokens_; }
  int64_t plain_keys(int64_t) const { return tokens_; }
  void enter(int64_t, int64_t head) { weight_.enter(0, head); }
  void stage(int64_t row, int64_t rows, int64_t key, int64_t keys) { weight_.stage(row, rows, key, keys); }

  template <bool kPlain>
  struct Tile {
    DenseTile::Rows<kPlain> weight;
    float factor;
    EFFATTN_INLINE Vec transform(Vec score, int r, int v) const {
      return score * broadcast(factor) * weight.load(r, v);
    }
  };

  template <bool kPlain>
  EFFATTN_INLINE Tile<kPlain> tile(int64_t row, int64_t key) const {
    return {weight_.rows<kPlain>(row, key), factor_};
  }

 private:
  DenseTile weight_;
  const int64_t tokens_;
  const float factor_;
};

struct MaskedProductFamily {
  using Policy = MaskedProductPolicy;
  using Sink = NoParameterGradient;
  using SinkArguments = NoParameterGradient;
  static constexpr bool kMultiplies = true;
};

}  // namespace

void masked_product_forward(const AttentionForward& attention, const MaskedProduct& mask, const Runtime& runtime) {
  forward_any_type<MaskedProductPolicy>(attention, mask, runtime);
}

void masked_product_backward(const AttentionBackward& attention, const MaskedProduct& mask,
    const MaskedProductGrad& gradient, const Runtime& runtime) {
  const KeyChunks chunks(attention.key.size[2], attention.query.size[0] * attention.query.size[1]);
  backward_any_type<MaskedProductFamily>(attention, mask, chunks, NoParameterGradient{}, runtime);
  weight_gradient<MaskedProductPolicy>(attention, mask, gradient, runtime);
}

}  // namespace effattn::EFFATTN_ISA
