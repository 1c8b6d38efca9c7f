#include "tensors.h"

namespace effattn::bindings {
namespace {

struct HammingTensors {
  TorchTensor query, key;  // hold the memory of the pointers
  const uint32_t* query_bits;
  const uint32_t* key_bits;
  int64_t batches, heads, queries, keys;
};

HammingTensors bits_of(const TorchTensor& query, const TorchTensor& key, int64_t head_dim) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query_bits and key_bits must have 4 dimensions");
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= 256, "head_dim must be in 1..256, got ", head_dim);
  HammingTensors bits = {torch::stable::contiguous(query), torch::stable::contiguous(key), nullptr, nullptr,
      query.size(0), query.size(1), query.size(2), key.size(2)};
  const int64_t words = (head_dim + 31) / 32;
  bits.query_bits =
      elements<uint32_t>(bits.query, ScalarType::UInt32, {bits.batches, bits.heads, bits.queries, words}, "query_bits");
  bits.key_bits =
      elements<uint32_t>(bits.key, ScalarType::UInt32, {bits.batches, bits.heads, bits.keys, words}, "key_bits");
  return bits;
}

Tensor values_of(const TorchTensor& tensor, int64_t batches, int64_t heads, int64_t tokens, const char* name) {
  const Tensor values = view(tensor, name);
  STD_TORCH_CHECK(is_floating(values.dtype), name, " must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(values.size[3] >= 1 && values.size[3] <= 256, name, " must have 1..256 columns");
  check_sizes(values, {batches, heads, tokens, values.size[3]}, name);
  return values;
}

std::tuple<TorchTensor, TorchTensor> hamming_attention_fwd(
    TorchTensor query_bits, TorchTensor key_bits, TorchTensor value, int64_t head_dim, int64_t values, double scale) {
  const HammingTensors bits = bits_of(query_bits, key_bits, head_dim);
  const Tensor v = values_of(value, bits.batches, bits.heads, bits.keys, "value");
  TorchTensor output = empty({bits.batches, bits.heads, bits.queries, v.size[3]}, value.scalar_type());
  TorchTensor logsumexp = empty({bits.batches, bits.heads, bits.queries}, ScalarType::Float);
  kernels().hamming_attention_forward(
      {bits.query_bits, bits.key_bits, v, view(output, "output"), static_cast<float*>(logsumexp.data_ptr()), head_dim,
          values == 1, static_cast<float>(scale)},
      runtime());
  return {std::move(output), std::move(logsumexp)};
}

TorchTensor hamming_attention_bwd(TorchTensor grad_output, TorchTensor query_bits, TorchTensor key_bits,
    TorchTensor logsumexp, int64_t head_dim, int64_t values, double scale) {
  const HammingTensors bits = bits_of(query_bits, key_bits, head_dim);
  const Tensor g = values_of(grad_output, bits.batches, bits.heads, bits.queries, "grad_output");
  const float* sums =
      elements<float>(logsumexp, ScalarType::Float, {bits.batches, bits.heads, bits.queries}, "logsumexp");
  TorchTensor grad_value = empty({bits.batches, bits.heads, bits.keys, g.size[3]}, grad_output.scalar_type());
  kernels().hamming_attention_backward({g, bits.query_bits, bits.key_bits, sums, view(grad_value, "grad_value"),
                                           head_dim, values == 1, static_cast<float>(scale)},
      runtime());
  return grad_value;
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("hamming_attention_fwd", TORCH_BOX(&effattn::bindings::hamming_attention_fwd));
  m.impl("hamming_attention_bwd", TORCH_BOX(&effattn::bindings::hamming_attention_bwd));
}
