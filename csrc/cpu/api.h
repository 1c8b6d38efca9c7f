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

// Heads below H / 2 have windows window_h[0] x window_w[0], the others window_h[1] x window_w[1] (windows.h). All
// contiguous, null where absent: bias (H, 2 window_h + 2 overlap_h - 1, 2 window_w + 2 overlap_w - 1), of key minus
// query; weights as bias, what the weights are multiplied with after the softmax; lepe_weight (H,9,D), lepe_bias (H,D).
// num_prefix_tokens stand before the grid, only where one window is all of it: bias 0, weight 1.
struct Windows {
  int64_t grid_h, grid_w;
  int64_t window_h[2], window_w[2];
  int64_t shift_h, shift_w, overlap_h, overlap_w;
  bool mask_padding;
  const float* bias;
  const float* lepe_weight;
  const float* lepe_bias;
  const float* weights = nullptr;
  int64_t num_prefix_tokens = 0;
};

struct WindowsGrad {
  float* bias;
  float* lepe_weight;
  float* lepe_bias;
  float* weights = nullptr;
};

// output = input W^T [* scale] [+ bias] with W (N,K) in power-of-two codes; input (1,1,M,K), output (1,1,M,N).
// codes: bits <= 4: (N, ceil(K/2)), a nibble sign << 3 | e per weight, the even one low, 2^(e-7) or 0 for e = 0;
// bits = 5: (N, K), the e5m2 pattern. scale, bias: (N) or null.
enum class ShiftActivation : int32_t { kFloat, kInt8, kFixed16 };
struct ShiftLinear {
  Tensor input;
  const uint8_t* codes;
  const float* scale;
  const float* bias;
  Tensor output;
  int bits;
  ShiftActivation activation;
};

// grad_input (1,1,M,K) = (grad_output * scale) W.
struct ShiftLinearBackward {
  Tensor grad_output;
  const uint8_t* codes;
  const float* scale;
  Tensor grad_input;
  int bits;
};

// Packed bits: bit i of word w is element 32 w + i; pad bits of the last word are ignored where they are read and 0
// where they are written. Binary: bit b means b; signs: 2 b - 1.
struct PackSigns {
  Tensor input;  // (B,H,N,D)
  uint32_t* packed;
};

// output (1,B,M,N) = packed (B,M,ceil(K/32)) times dense (1,B,K,N).
struct AddMatmul {
  const uint32_t* packed;
  Tensor dense, output;
  bool signs;
};

// grad_dense (1,B,K,N) = packed^T times grad_output (1,B,M,N).
struct AddMatmulBackward {
  Tensor grad_output;
  const uint32_t* packed;
  Tensor grad_dense;
  bool signs;
};

// output (B,M,N) = left (B,M,W) times right (B,N,W)^T over `length` bits.
struct BinaryMatmul {
  const uint32_t* left;
  const uint32_t* right;
  int32_t* output;
  int64_t batches, rows, columns, length;
  bool signs;
};

// query (B,H,N,W), key (B,H,M,W) bits; value (B,H,M,Dv); output (B,H,N,Dv); logsumexp (B,H,N) contiguous.
struct HammingAttention {
  const uint32_t* query;
  const uint32_t* key;
  Tensor value, output;
  float* logsumexp;
  int64_t head_dim;
  bool signs;
  float scale;
};

// grad_output as output; grad_value as value.
struct HammingAttentionBackward {
  Tensor grad_output;
  const uint32_t* query;
  const uint32_t* key;
  const float* logsumexp;
  Tensor grad_value;
  int64_t head_dim;
  bool signs;
  float scale;
};

// How shift_add_attention turns a normalised element x^ into a bit: scale * 1[x^ > threshold], or +-1 (sign).
enum class Binarize : int32_t { kPublished, kMeanThreshold, kPerHead, kSign };

// query, key, value, output (B,H,N,D); residual_weight (H,taps) contiguous, null without one; context (B,H,D,D)
// contiguous; statistics (B,H,4) contiguous: scale and threshold of query, then of key.
struct ShiftAddAttentionForward {
  Tensor query, key, value, output;
  const float* residual_weight;
  int64_t taps;
  float* context;
  float* statistics;
  Binarize binarize;
};

struct ShiftAddAttentionBackward {
  Tensor grad_output, query, key, value;
  const float* residual_weight;
  int64_t taps;
  const float* context;
  const float* statistics;
  Tensor grad_query, grad_key, grad_value;
  float* grad_residual_weight;
  Binarize binarize;
};

// query, key (B,H,N,Dk), value (B,H,N,Dv), Dv up to 512. Contiguous, null where absent: log_decay (H), initial_state
// (sequences,H,Dk,Dv), row_scale (B,H,N), cu_seqlens (sequences + 1), without which every batch is a sequence.
struct Retention {
  Tensor query, key, value;
  const float* log_decay;
  const float* initial_state;
  const float* row_scale;
  const int32_t* cu_seqlens;
  int64_t sequences;
  bool is_causal;
  int64_t chunk_size;  // 0: the kernel's choice
  double scale;
};

struct RetentionResult {
  Tensor output;
  float* state;  // as initial_state; may be null
};

// grad_state as initial_state, null where absent; grad_initial_state likewise.
struct RetentionGrad {
  Tensor output;
  const float* state;
  Tensor query, key, value;
  float* log_decay;
  float* initial_state;
};

// One token: (B,H,1,D); state and new_state (B,H,Dk,Dv) contiguous, may be the same memory.
struct RetentionStep {
  Tensor query, key, value, output;
  const float* log_decay;
  const float* state;
  float* new_state;
  double scale;
};

// weight (H,D,size * size), bias (H,D) or null, contiguous. N = num_prefix_tokens + grid_h * grid_w.
struct LocalEnhancement {
  const float* weight;
  const float* bias;
  int64_t size, grid_h, grid_w, num_prefix_tokens;
};

// attention, value, output (B,H,N,D).
struct LocalEnhancementForward {
  Tensor attention, value, output;
  LocalEnhancement shape;
};

// grad_weight, grad_bias as weight and bias.
struct LocalEnhancementBackward {
  Tensor grad_output, value, grad_value;
  float* grad_weight;
  float* grad_bias;
  LocalEnhancement shape;
};

// Toeplitz-weighted linear attention. query, key: features (B,H,N,M); value (B,H,N,D), M and D up to 256. bias
// (H, (2 grid_h - 1)(2 grid_w - 1)) contiguous; token i stands at p_i = (i / grid_w)(2 grid_w - 1) + i % grid_w, and
// the entry of query i and key j is p_j - p_i + (grid_h - 1)(2 grid_w - 1) + grid_w - 1. A sequence is a grid of one
// row. Without wants_bias ToeplitzGrad::bias is zero already and may stay so.
struct Toeplitz {
  Tensor query, key, value;
  const float* bias;
  int64_t grid_h, grid_w;
  bool is_causal;
  double eps;
  bool wants_bias = true;
};

// output as value; normalizer (B,H,N) contiguous: the denominators, eps included.
struct ToeplitzResult {
  Tensor output;
  float* normalizer;
};

// grad_output, output as value; query, key, value: gradients of those, any strides; bias as Toeplitz::bias.
struct ToeplitzGrad {
  Tensor grad_output, output;
  const float* normalizer;
  Tensor query, key, value;
  float* bias;
};

// Codes that the Python front knows too. kNone: no kernel serves the request.
enum class ToeplitzMethod : int64_t { kNone, kDirect, kFft, kDoubleFft, kStructured };
enum class ToeplitzRequest : int64_t { kAuto, kDirect, kFft, kStructured };

struct ToeplitzCosts {
  double direct, fft, double_fft, scan;  // nanoseconds a unit (effattn/ops/toeplitz_methods.py)
};

struct ToeplitzPlanning {
  const float* bias;
  int64_t batch, heads, features, value_dim, grid_h, grid_w;
  bool is_causal;
  ToeplitzRequest request;
  double tolerance;
  ToeplitzCosts costs;
};

struct ToeplitzPlan {
  ToeplitzMethod method;
  double seconds[4];  // direct, fft, double fft, structured; infinite where it does not apply
  double fft_error, double_fft_error;
  double tail, range;
};

// Random features phi(x), reference/toeplitz.py. x (B,H,N,D); projection (H,M,D) contiguous; mask (B,N) contiguous or
// null, true: a row of zeros.
enum class FeatureShift : int64_t { kNone, kRow, kHead };
struct FeatureMap {
  Tensor x;
  const float* projection;
  int64_t directions;
  const bool* mask;
  bool trigonometric, normalize;
  FeatureShift shift;
};

// features, grad_features (B,H,N,M or 2M); x as FeatureMap::x; projection (H,M,D) contiguous.
struct FeatureMapGrad {
  Tensor grad_features, features, x;
  float* projection;
};

// softmax(scale Q K^T + bias) * coefficient: tables as Toeplitz::bias, null where absent.
struct Relative {
  const float* coefficient;
  const float* bias;
  int64_t grid_h, grid_w;
  bool is_causal;
};

struct RelativeGrad {
  float* coefficient;
  float* bias;
};

// Bipartite soft matching (reference/token_merging.py): metric (1,B,N,d); sizes (B,N) or null. Tokens 0, 2, 4.. are a,
// the others b; 1 <= num_merged <= unprotected pairs; a threshold below -1 is none. The plan, all contiguous: source
// and members (B,N), offsets (B,outputs + 1).
struct TokenMatching {
  Tensor metric;
  const float* sizes;
  int64_t num_merged, num_protected;
  bool distill_token;
  double threshold;
  int64_t outputs;
  int32_t* source;
  int32_t* members;
  int32_t* offsets;
};

// A plan: the output of every token, and the tokens of every output, ascending. All contiguous, every index in range.
struct TokenGroups {
  const int32_t* source;   // (B,N)
  const int32_t* members;  // (B,N)
  const int32_t* offsets;  // (B,outputs + 1)
  int64_t batch, tokens, outputs;
};

enum class MergeMode : int64_t { kMean, kSum, kMax };

// x (1,B,N,C), output (1,B,outputs,C); an output without members is 0.
struct TokenMergeForward {
  Tensor x;
  TokenGroups groups;
  MergeMode mode;
  Tensor output;
};

// x and output are read for kMax only. A maximum's gradient is shared evenly by the members that attain it.
struct TokenMergeBackward {
  Tensor grad_output, x, output;
  TokenGroups groups;
  MergeMode mode;
  Tensor grad_x;
};

// output_t = sum s_i (x_i + residual_i) / S_t, S_t = sum s_i; 0 where S_t = 0. residual.data is null without one; sizes
// (B,N) contiguous or null: ones; merged_sizes (B,outputs) contiguous.
struct WeightedMergeForward {
  Tensor x, residual;
  const float* sizes;
  TokenGroups groups;
  Tensor output;
  float* merged_sizes;
};

// grad_merged_sizes (B,outputs) contiguous or null: zeros; grad_sizes (B,N) contiguous or null: not wanted, and then
// x, residual and output are not read.
struct WeightedMergeBackward {
  Tensor grad_output;
  const float* grad_merged_sizes;
  Tensor x, residual, output;
  const float* sizes;
  TokenGroups groups;
  Tensor grad_x;
  float* grad_sizes;
};

// output (1,B,P,C) = softmax over N of logits (1,B,N,P), transposed, times tokens (1,B,N,C); logsumexp (B,P)
// contiguous.
struct SoftMergeForward {
  Tensor tokens, logits, output;
  float* logsumexp;
};

struct SoftMergeBackward {
  Tensor grad_output, tokens, logits, output;
  const float* logsumexp;
  Tensor grad_tokens, grad_logits;
};

// softmax(scale Q K^T + log_sizes_j): log_sizes (B,M) contiguous.
struct TokenSizes {
  const float* log_sizes;
};

// null where it is not wanted
struct TokenSizesGrad {
  float* log_sizes;
};

struct Kernels {
  const char* isa;
#define EFFATTN_KERNEL(name, ...) void (*name)(__VA_ARGS__, const Runtime&);
#include "kernels.inc"
#undef EFFATTN_KERNEL
};

// The kernels of the softmax families for this element type on this processor: the engine holds bf16 products only at
// the avx512_bf16 level, where they are faster than fp32 ones (not on Intel). The environment variable EFFATTN_CPU_ISA,
// read once, can name a lower level, or that one with its bf16 products.
const Kernels& kernels(DType dtype);

// The highest level, for kernels that serve every element type at every level.
const Kernels& kernels();

// baseline, avx2, avx512 or avx512_bf16.
const char* isa_name();

}  // namespace effattn
