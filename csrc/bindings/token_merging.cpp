#include "tensors.h"

namespace effattn::bindings {
namespace {

using OptionalTensor = std::optional<TorchTensor>;

// (1, B, N, C)
Tensor rows_of(const TorchTensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, got ", tensor.dim());
  const Tensor rows = view(tensor, name);
  STD_TORCH_CHECK(is_floating(rows.dtype), name, " must be float32, bfloat16 or float16");
  return rows;
}

const float* sizes_of(const OptionalTensor& sizes, int64_t batch, int64_t tokens) {
  return sizes ? elements<const float>(*sizes, ScalarType::Float, {batch, tokens}, "sizes") : nullptr;
}

// Kernels follow these indices, so each is checked here, whoever made the plan.
TokenGroups groups_of(const TorchTensor& source, const TorchTensor& members, const TorchTensor& offsets) {
  STD_TORCH_CHECK(source.dim() == 2 && offsets.dim() == 2 && offsets.size(1) >= 1,
      "a plan's source must be (B, N), its offsets (B, T + 1)");
  const int64_t batch = source.size(0), tokens = source.size(1), outputs = offsets.size(1) - 1;
  const TokenGroups groups = {elements<const int32_t>(source, ScalarType::Int, {batch, tokens}, "source"),
      elements<const int32_t>(members, ScalarType::Int, {batch, tokens}, "members"),
      elements<const int32_t>(offsets, ScalarType::Int, {batch, outputs + 1}, "offsets"), batch, tokens, outputs};
  bool in_range = true;
  for (int64_t i = 0; i < batch * tokens; ++i)
    in_range &=
        groups.source[i] >= 0 && groups.source[i] < outputs && groups.members[i] >= 0 && groups.members[i] < tokens;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* const row = groups.offsets + b * (outputs + 1);
    in_range &= row[0] == 0 && row[outputs] == tokens;
    for (int64_t t = 0; t < outputs; ++t) in_range &= row[t] <= row[t + 1];
  }
  STD_TORCH_CHECK(in_range, "a plan's indices must lie in its ranges");
  return groups;
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> bipartite_match(TorchTensor metric, OptionalTensor sizes,
    int64_t num_merged, int64_t num_protected, bool distill_token, double threshold, bool padded) {
  const Tensor m = rows_of(metric, "metric");
  const int64_t batch = m.size[1], tokens = m.size[2], outputs = padded ? tokens : tokens - num_merged;
  STD_TORCH_CHECK(tokens <= int64_t{1} << 21, "metric must have at most 2^21 tokens, got ", tokens);
  const int64_t rows = (num_protected + 1) / 2, columns = std::max<int64_t>(num_protected / 2, distill_token ? 1 : 0);
  STD_TORCH_CHECK(num_protected >= 0 && num_merged >= 1 && num_merged <= (tokens - rows - columns) / 2,
      "num_merged must be in 1..the number of unprotected pairs");
  STD_TORCH_CHECK(padded || threshold < -1.0, "with a threshold the plan must be padded");
  TorchTensor source = empty({batch, tokens}, ScalarType::Int), members = empty({batch, tokens}, ScalarType::Int),
              offsets = empty({batch, outputs + 1}, ScalarType::Int);
  const auto data = [](const TorchTensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); };
  // of the level whose bf16 products are the faster ones: they are most of its time
  kernels(DType::kBFloat16)
      .bipartite_match({m, sizes_of(sizes, batch, tokens), num_merged, num_protected, distill_token, threshold, outputs,
                           data(source), data(members), data(offsets)},
          runtime());
  return {std::move(source), std::move(members), std::move(offsets)};
}

Tensor checked_rows(const TorchTensor& tensor, int64_t batch, int64_t rows, const Tensor& like, const char* name) {
  const Tensor checked = rows_of(tensor, name);
  check_sizes(checked, {1, batch, rows, like.size[3]}, name);
  STD_TORCH_CHECK(checked.dtype == like.dtype, name, " must have the element type of the other tensors");
  return checked;
}

// A gradient laid out like its tensor; launch(target) writes it. Kernels want rows of adjacent elements.
template <class Launch>
TorchTensor gradient_like(const TorchTensor& tensor, const Launch& launch) {
  const Tensor like = view(tensor, "tensor");
  TorchTensor gradient = empty_like(tensor, like);
  const Tensor target = view(gradient, "gradient");
  if (target.size[3] <= 1 || target.stride[3] == 1) {
    launch(target);
    return gradient;
  }
  TorchTensor adjacent = empty({like.size[1], like.size[2], like.size[3]}, tensor.scalar_type());
  launch(view(adjacent, "gradient"));
  return torch::stable::copy_(gradient, adjacent);
}

MergeMode mode_of(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode must be 0 (mean), 1 (sum) or 2 (max)");
  return static_cast<MergeMode>(mode);
}

TorchTensor token_merge_fwd(TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets, int64_t mode) {
  const TokenGroups groups = groups_of(source, members, offsets);
  const Tensor rows = rows_of(x, "x");
  check_sizes(rows, {1, groups.batch, groups.tokens, rows.size[3]}, "x");
  TorchTensor output = empty({groups.batch, groups.outputs, rows.size[3]}, x.scalar_type());
  kernels().token_merge_forward({rows, groups, mode_of(mode), view(output, "output")}, runtime());
  return output;
}

TorchTensor token_merge_bwd(TorchTensor grad_output, TorchTensor x, TorchTensor source, TorchTensor members,
    TorchTensor offsets, TorchTensor output, int64_t mode) {
  const TokenGroups groups = groups_of(source, members, offsets);
  const Tensor rows = checked_rows(x, groups.batch, groups.tokens, rows_of(x, "x"), "x");
  const Tensor grad = checked_rows(grad_output, groups.batch, groups.outputs, rows, "grad_output");
  const Tensor merged = checked_rows(output, groups.batch, groups.outputs, rows, "output");
  return gradient_like(x, [&](const Tensor& grad_x) {
    kernels().token_merge_backward({grad, rows, merged, groups, mode_of(mode), grad_x}, runtime());
  });
}

// Unmerging is what the gradient of a sum does, and its gradient a sum.
TorchTensor token_unmerge_fwd(TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets) {
  const TokenGroups groups = groups_of(source, members, offsets);
  const Tensor rows = checked_rows(x, groups.batch, groups.outputs, rows_of(x, "x"), "x");
  TorchTensor output = empty({groups.batch, groups.tokens, rows.size[3]}, x.scalar_type());
  kernels().token_merge_backward({rows, {}, {}, groups, MergeMode::kSum, view(output, "output")}, runtime());
  return output;
}

TorchTensor token_unmerge_bwd(
    TorchTensor grad_output, TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets) {
  const TokenGroups groups = groups_of(source, members, offsets);
  const Tensor rows = checked_rows(x, groups.batch, groups.outputs, rows_of(x, "x"), "x");
  const Tensor grad = checked_rows(grad_output, groups.batch, groups.tokens, rows, "grad_output");
  return gradient_like(x,
      [&](const Tensor& grad_x) { kernels().token_merge_forward({grad, groups, MergeMode::kSum, grad_x}, runtime()); });
}

Tensor residual_of(const OptionalTensor& residual, const Tensor& x) {
  return residual ? checked_rows(*residual, x.size[1], x.size[2], x, "residual") : Tensor{};
}

std::tuple<TorchTensor, TorchTensor> token_merge_weighted_fwd(TorchTensor x, TorchTensor source, TorchTensor members,
    TorchTensor offsets, OptionalTensor residual, OptionalTensor sizes, bool) {
  const TokenGroups groups = groups_of(source, members, offsets);
  const Tensor rows = rows_of(x, "x");
  check_sizes(rows, {1, groups.batch, groups.tokens, rows.size[3]}, "x");
  TorchTensor output = empty({groups.batch, groups.outputs, rows.size[3]}, x.scalar_type());
  TorchTensor merged_sizes = empty({groups.batch, groups.outputs}, ScalarType::Float);
  kernels().weighted_merge_forward({rows, residual_of(residual, rows), sizes_of(sizes, groups.batch, groups.tokens),
                                       groups, view(output, "output"), static_cast<float*>(merged_sizes.data_ptr())},
      runtime());
  return {std::move(output), std::move(merged_sizes)};
}

std::tuple<TorchTensor, TorchTensor> token_merge_weighted_bwd(TorchTensor grad_output, OptionalTensor grad_merged_sizes,
    TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets, OptionalTensor residual,
    OptionalTensor sizes, TorchTensor output, bool wants_sizes) {
  const TokenGroups groups = groups_of(source, members, offsets);
  const Tensor rows = checked_rows(x, groups.batch, groups.tokens, rows_of(x, "x"), "x");
  const Tensor merged = checked_rows(output, groups.batch, groups.outputs, rows, "output");
  const Tensor grad = checked_rows(grad_output, groups.batch, groups.outputs, rows, "grad_output");
  OptionalTensor dense;
  if (grad_merged_sizes) dense = torch::stable::contiguous(*grad_merged_sizes);
  const float* const upstream =
      dense ? elements<const float>(*dense, ScalarType::Float, {groups.batch, groups.outputs}, "grad_merged_sizes")
            : nullptr;
  TorchTensor grad_sizes =
      sizes ? empty({groups.batch, groups.tokens}, ScalarType::Float) : empty({0}, ScalarType::Float);
  float* const wanted = sizes && wants_sizes ? static_cast<float*>(grad_sizes.data_ptr()) : nullptr;
  if (sizes && !wants_sizes) grad_sizes = torch::stable::zero_(grad_sizes);
  TorchTensor grad_x = gradient_like(x, [&](const Tensor& target) {
    kernels().weighted_merge_backward({grad, upstream, rows, residual_of(residual, rows), merged,
                                          sizes_of(sizes, groups.batch, groups.tokens), groups, target, wanted},
        runtime());
  });
  return {std::move(grad_x), std::move(grad_sizes)};
}

}  // namespace
}  // namespace effattn::bindings

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&effattn::bindings::bipartite_match));
  m.impl("token_merge_fwd", TORCH_BOX(&effattn::bindings::token_merge_fwd));
  m.impl("token_merge_bwd", TORCH_BOX(&effattn::bindings::token_merge_bwd));
  m.impl("token_merge_weighted_fwd", TORCH_BOX(&effattn::bindings::token_merge_weighted_fwd));
  m.impl("token_merge_weighted_bwd", TORCH_BOX(&effattn::bindings::token_merge_weighted_bwd));
  m.impl("token_unmerge_fwd", TORCH_BOX(&effattn::bindings::token_unmerge_fwd));
  m.impl("token_unmerge_bwd", TORCH_BOX(&effattn::bindings::token_unmerge_bwd));
}
