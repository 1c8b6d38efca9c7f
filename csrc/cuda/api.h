// What the CUDA bindings call: plain data in, launches on a stream out. No torch here, no device code.
//
// Every launch is asynchronous on `stream` (a cudaStream_t). A launch that needs scratch memory says how much through
// its *_workspace function, in bytes; the memory must be aligned to 16 bytes and live until the stream has passed.
#pragma once

#include "../types.h"

namespace effattn::cuda {

// ---- Packed bits: bit i of word w is element 32 w + i, rows are padded to whole words -------------------------------

struct PackSigns {
  Tensor input;     // (B, H, N, D), any strides
  uint32_t* words;  // (B, H, N, ceil(D / 32)) contiguous
};
void pack_signs(const PackSigns& arguments, void* stream);

// product = S dense, S (rows x depth) the selection that the bits mean: b, or 2 b - 1 if `sign`. `transposed`: the bits
// lie as (depth x rows), so S is their transpose.
struct AddMatmul {
  const uint32_t* words;  // (B, H, rows, ceil(depth / 32)), or (B, H, depth, ceil(rows / 32)) if transposed; contiguous
  Tensor dense;           // (B, H, depth, columns), any strides
  void* product;          // (B, H, rows, columns) contiguous
  DType product_dtype;    // dense's, or float32
  int64_t rows;
  bool sign, transposed;
};
int64_t add_matmul_workspace(const AddMatmul& arguments);
void add_matmul(const AddMatmul& arguments, void* workspace, void* stream);

// product[m, n] = sum over `length` bits of left[m] right[n].
struct BinaryMatmul {
  const uint32_t *left, *right;  // (batch, rows, ceil(length / 32)), (batch, columns, ceil(length / 32)) contiguous
  int32_t* product;              // (batch, rows, columns) contiguous
  int64_t batch, rows, columns, length;
  bool sign;
};
void binary_matmul(const BinaryMatmul& arguments, void* stream);

// ---- Weights of powers of two, packed -------------------------------------------------------------------------------
// w = s 2^p. bits <= 4: a nibble each, s << 3 | e, 2^(e - 7), e = 0 is zero; element k in the low nibble of byte k / 2
// if k is even, else in the high one; rows of whole bytes. bits = 5: a byte each, float8_e5m2.

enum class Activation : int32_t { kFloat, kInt8, kFixed16 };

struct ShiftLinear {
  Tensor input;          // (1, 1, M, K), any strides
  const uint8_t* codes;  // (N, ceil(K / 2)) or (N, K) contiguous
  const float* scale;    // (N,) or null
  const float* bias;     // (N,) or null
  void* output;          // (M, N) contiguous, the input's dtype
  int64_t channels;      // N
  int bits;
  Activation activation;
};
int64_t shift_linear_workspace(const ShiftLinear& arguments);
void shift_linear(const ShiftLinear& arguments, void* workspace, void* stream);

struct ShiftLinearGradient {
  Tensor grad_output;    // (1, 1, M, N), any strides
  const uint8_t* codes;  // as above
  const float* scale;    // (N,) or null
  void* grad_input;      // (M, K) contiguous, the dtype of grad_output
  int64_t in_features;   // K
  int bits;
};
int64_t shift_linear_gradient_workspace(const ShiftLinearGradient& arguments);
void shift_linear_gradient(const ShiftLinearGradient& arguments, void* workspace, void* stream);

// ---- Linear attention with binary queries and keys
// -------------------------------------------------------------------

enum class Binarize : int32_t { kPublished, kMeanThreshold, kPerHead, kSign };

struct ShiftAddAttention {
  Tensor query, key, value;      // (B, H, N, D), any strides, one dtype, D <= 256
  const float* residual_weight;  // (H, taps) contiguous, or null
  int64_t taps;
  Binarize binarize;
  Tensor output;      // as query
  float* context;     // (B, H, D, D) contiguous, without the scale of the key
  float* statistics;  // (B, H, 4): scale and threshold of the query, of the key
};
int64_t shift_add_attention_workspace(const ShiftAddAttention& arguments);
void shift_add_attention(const ShiftAddAttention& arguments, void* workspace, void* stream);

struct ShiftAddAttentionGradient {
  Tensor grad_output, query, key, value;  // (B, H, N, D), any strides, one dtype
  const float* residual_weight;           // as above
  int64_t taps;
  Binarize binarize;
  const float *context, *statistics;        // from the forward pass
  Tensor grad_query, grad_key, grad_value;  // as query, key, value
  float* grad_residual_weight;              // (H, taps), or null
};
int64_t shift_add_attention_gradient_workspace(const ShiftAddAttentionGradient& arguments);
void shift_add_attention_gradient(const ShiftAddAttentionGradient& arguments, void* workspace, void* stream);

// ---- Softmax attention with binary queries and keys
// -------------------------------------------------------------------

struct HammingAttention {
  const uint32_t *query, *key;  // (B, H, N, words), (B, H, M, words) contiguous, words = ceil(head_dim / 32)
  Tensor value;                 // (B, H, M, Dv), any strides
  int64_t queries;              // N
  int head_dim;
  bool sign;
  float scale;
  void* output;      // (B, H, N, Dv) contiguous, the dtype of value
  float* logsumexp;  // (B, H, N) contiguous
};
void hamming_attention(const HammingAttention& arguments, void* stream);

struct HammingAttentionGradient {
  const uint32_t *query, *key;  // as above
  Tensor grad_output;           // (B, H, N, Dv), any strides
  int64_t keys;                 // M
  int head_dim;
  bool sign;
  float scale;
  void* grad_value;  // (B, H, M, Dv) contiguous, the dtype of grad_output
};
int64_t hamming_attention_gradient_workspace(const HammingAttentionGradient& arguments);
void hamming_attention_gradient(const HammingAttentionGradient& arguments, void* workspace, void* stream);

// ---- Attention inside the windows of a token grid -------------------------------------------------------------------

// As effattn/ops/cross_shaped_window.py says of `window`, without prefix tokens, overlap and a bias that weighs.
struct WindowAttention {
  Tensor query, key, value;  // (B, H, grid_h grid_w, D), any strides, bfloat16 or float16, D <= 64
  int64_t grid_h, grid_w;
  int64_t window_h[2], window_w[2];  // of heads 0 .. H / 2 - 1, and of the others
  int64_t shift_h, shift_w;          // only where both are the same
  bool mask_padding;                 // zeros around the grid take no part
  float scale;
  const float* bias;         // (H, 2 window_h - 1, 2 window_w - 1) contiguous, key minus query; or null
  const float* lepe_weight;  // (H, 9, D) contiguous, or null
  const float* lepe_bias;    // (H, D) contiguous, or null
  Tensor output;             // as query
  float* logsumexp;          // (B, H, N) contiguous, of scores with bias and mask
};
void window_attention(const WindowAttention& arguments, void* stream);

struct WindowAttentionGradient {
  WindowAttention of;  // with output and logsumexp of the forward pass; with a bias, windows of at most 1024 tokens
  Tensor grad_output;  // (B, H, N, D), any strides
  Tensor grad_query, grad_key, grad_value;
  float *grad_bias, *grad_lepe_weight, *grad_lepe_bias;  // as bias, lepe_weight, lepe_bias; null where those are
};
int64_t window_attention_gradient_workspace(const WindowAttentionGradient& arguments);
void window_attention_gradient(const WindowAttentionGradient& arguments, void* workspace, void* stream);

// ---- Retention
// -------------------------------------------------------------------------------------------------------------

struct Retention {
  Tensor query, key;           // (B, H, N, Dk), any strides, one dtype, Dk <= 256
  Tensor value;                // (B, H, N, Dv), any strides, Dv <= 512
  const float* log_decay;      // (H,)
  const float* initial_state;  // (sequences, H, Dk, Dv) contiguous, or null
  const float* row_scale;      // (B, H, N) contiguous, or null
  const int32_t* bounds;       // (sequences + 1,) where B = 1 packs them, or null: B sequences
  int64_t sequences;
  bool is_causal;
  int chunk_size;  // 1 to 64
  float scale;
  Tensor output;  // (B, H, N, Dv)
  float* state;   // as initial_state, or null
};
int64_t retention_workspace(const Retention& arguments);
void retention(const Retention& arguments, void* workspace, void* stream);

struct RetentionGradient {
  Retention of;             // without output and state
  Tensor grad_output;       // (B, H, N, Dv), any strides
  const float* grad_state;  // as initial_state, or null
  Tensor grad_query, grad_key, grad_value;
  float* grad_log_decay;      // (H,)
  float* grad_initial_state;  // or null
};
int64_t retention_gradient_workspace(const RetentionGradient& arguments);
void retention_gradient(const RetentionGradient& arguments, void* workspace, void* stream);

struct RetentionStep {
  Tensor query, key, value;  // (B, H, 1, D), any strides, one dtype
  const float* log_decay;    // (H,)
  const float* state;        // (B, H, Dk, Dv) contiguous
  float scale;
  Tensor output;     // (B, H, 1, Dv)
  float* new_state;  // as state; may be the same memory
};
void retention_step(const RetentionStep& arguments, void* stream);

// ---- Linear attention weighted by a Toeplitz matrix, by FFT
// -------------------------------------------------------------------------------------------------------------

// Token i stands at p_i = (i / grid_w)(2 grid_w - 1) + i % grid_w, and the entry of query i and key j is p_j - p_i +
// (grid_h - 1)(2 grid_w - 1) + grid_w - 1. A sequence is a grid of one row.
struct Toeplitz {
  Tensor query, key;  // features (B, H, N, M), any strides, one dtype
  Tensor value;       // (B, H, N, D), any strides
  const float* bias;  // (H, (2 grid_h - 1)(2 grid_w - 1)) contiguous
  int64_t grid_h, grid_w;
  bool is_causal;
  bool in_double;  // transforms
  double eps;
  Tensor output;      // as value
  float* normalizer;  // (B, H, N) contiguous, eps included
};
int64_t toeplitz_fft_workspace(const Toeplitz& arguments);
void toeplitz_fft(const Toeplitz& arguments, void* workspace, void* stream);

struct ToeplitzGradient {
  Toeplitz of;  // with output and normalizer of the forward pass
  Tensor grad_output;
  Tensor grad_query, grad_key, grad_value;
  float* grad_bias;  // as bias, or null
};
int64_t toeplitz_fft_gradient_workspace(const ToeplitzGradient& arguments);
void toeplitz_fft_gradient(const ToeplitzGradient& arguments, void* workspace, void* stream);

// ---- Random features
// -------------------------------------------------------------------------------------------------------------

enum class FeatureShift : int32_t { kNone, kRow, kHead };

struct FeatureMap {
  Tensor x;                 // (B, H, N, D), any strides, D <= 256
  const float* projection;  // (H, M, D) contiguous
  int64_t directions;       // M
  const bool* mask;         // (B, N) contiguous, true: a row of zeros; or null
  bool trigonometric, normalize;
  FeatureShift shift;
};
int64_t feature_map_workspace(const FeatureMap& arguments);
void feature_map(const FeatureMap& arguments, const Tensor& features, void* workspace, void* stream);

struct FeatureMapGradient {
  FeatureMap of;
  Tensor grad_features, features;  // (B, H, N, M or 2 M), any strides
  Tensor grad_x;
  float* grad_projection;  // (H, M, D)
};
int64_t feature_map_gradient_workspace(const FeatureMapGradient& arguments);
void feature_map_gradient(const FeatureMapGradient& arguments, void* workspace, void* stream);

// ---- Merging tokens -------------------------------------------------------------------------------------------------

// Bipartite soft matching (reference/token_merging.py). Tokens 0, 2, 4.. are a, the others b.
struct TokenMatching {
  Tensor metric;       // (B, 1, N, d), any strides, N <= 2^21
  const float* sizes;  // (B, N) contiguous, or null
  int64_t num_merged;  // 1 to the number of unprotected pairs
  int64_t num_protected;
  bool distill_token;
  double threshold;                     // below -1: none
  int64_t outputs;                      // N - num_merged; N with a threshold
  int32_t *source, *members, *offsets;  // (B, N), (B, N), (B, outputs + 1) contiguous
};
int64_t bipartite_match_workspace(const TokenMatching& arguments);
void bipartite_match(const TokenMatching& arguments, void* workspace, void* stream);

// A plan: the output of every token, and the tokens of every output, ascending. An index out of range is a wrong
// result, but never an access out of bounds.
struct TokenGroups {
  const int32_t *source, *members, *offsets;  // as above
  int64_t batch, tokens, outputs;             // outputs >= 1, unless there are no tokens
};

enum class MergeMode : int32_t { kMean, kSum, kMax };

// kMean: output_t = sum s_i (x_i + residual_i) / S_t, S_t = sum s_i; 0 where S_t = 0.
struct TokenMerge {
  Tensor x;            // (B, 1, N, C), any strides
  Tensor residual;     // as x; kMean only, data is null without one
  const float* sizes;  // (B, N) contiguous; kMean only, null: ones
  TokenGroups groups;
  MergeMode mode;
  Tensor output;        // (B, 1, outputs, C)
  float* merged_sizes;  // S, (B, outputs) contiguous, or null
};
void token_merge(const TokenMerge& arguments, void* stream);

// x and output are read for kMax and for grad_sizes only, residual for grad_sizes only. Unmerging is the gradient of
// kSum. A maximum's gradient is shared evenly by the members that attain it.
struct TokenMergeGradient {
  Tensor grad_output;              // (B, 1, outputs, C), any strides
  const float* grad_merged_sizes;  // (B, outputs) contiguous, or null
  Tensor x, residual, output;
  const float* sizes;
  TokenGroups groups;
  MergeMode mode;
  Tensor grad_x;      // as x
  float* grad_sizes;  // (B, N) contiguous; kMean only, or null
};
void token_merge_gradient(const TokenMergeGradient& arguments, void* stream);

}  // namespace effattn::cuda
