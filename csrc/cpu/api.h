// The kernels as bindings see them: argument structs and one table of function pointers per ISA level.
// A new family adds its argument structs, its line in kernels.inc, and its <family>.cpp.
#pragma once

#include "../types.h"

namespace effattn {

// query (B,H,N,D); key, value (B,Hkv,M,D); output as query; logsumexp (B,H,N) contiguous, natural logarithm.
struct AttentionForward {
  Tensor query, key, value, output;
  float* logsumexp;
  float scale;
};

// grad_output as output (any strides); logsumexp as above; grad_* as query, key, value.
struct AttentionBackward {
  Tensor grad_output, query, key, value, output;
  const float* logsumexp;
  Tensor grad_query, grad_key, grad_value;
  float scale;
};

// alpha, sigma (K,H) contiguous. N = num_prefix_tokens + grid_h * grid_w.
struct GaussianMixture {
  const float* alpha;
  const float* sigma;
  int64_t num_gaussians;
  int64_t grid_h, grid_w, num_prefix_tokens;
  double eps;
};

struct GaussianMixtureGrad {
  float* alpha;
  float* sigma;
};

// weight as (1, Hw, N, N) with stride[1] = 0 where it is shared by the heads.
struct MaskedProduct {
  Tensor weight;
};

struct MaskedProductGrad {
  Tensor weight;
};

// bias: attn_mask expanded to (B,H,N,M), bool (true = attend) or floating; bias.data is null without one.
struct AttentionMask {
  Tensor bias;
  bool is_causal;
};

struct Kernels {
  const char* isa;
#define EFFATTN_KERNEL(name, ...) void (*name)(__VA_ARGS__, const Runtime&);
#include "kernels.inc"
#undef EFFATTN_KERNEL
};

// The kernels for this element type on this processor; the environment variable EFFATTN_CPU_ISA, read once, can name a
// lower level.
const Kernels& kernels(DType dtype);

// baseline, avx2, avx512 or avx512_bf16.
const char* isa_name();

}  // namespace effattn
