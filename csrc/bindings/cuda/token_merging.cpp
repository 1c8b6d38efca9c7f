#include <algorithm>

#include "tensors.h"

namespace effattn::bindings::cuda {
namespace {

using effattn::cuda::MergeMode;
using effattn::cuda::TokenGroups;
using OptionalTensor = std::optional<TorchTensor>;

// (B, 1, N, C)
Tensor rows_of(const Device& device, const TorchTensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, got ", tensor.dim());
  return view(device, tensor, name);
}

Tensor rows_of(const Device& device, const TorchTensor& tensor, std::initializer_list<int64_t> sizes, DType dtype,
    const char* name) {
  const Tensor rows = rows_of(device, tensor, name);
  const int64_t* const wanted = sizes.begin();
  STD_TORCH_CHECK(rows.size[0] == wanted[0] && rows.size[2] == wanted[1] && rows.size[3] == wanted[2], name,
      " must be (", wanted[0], ", ", wanted[1], ", ", wanted[2], ")");
  STD_TORCH_CHECK(rows.dtype == dtype, name, " must have the element type of x");
  return rows;
}

const float* floats_of(
    const Device& device, OptionalTensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  return tensor ? contiguous_data<const float>(device, *tensor, ScalarType::Float, sizes, name) : nullptr;
}

// The tensors hold what may have been copied to be contiguous.
struct Plan {
  TorchTensor source, members, offsets;
  TokenGroups groups;

  Plan(const Device& device, TorchTensor source_, TorchTensor members_, TorchTensor offsets_)
      : source(std::move(source_)), members(std::move(members_)), offsets(std::move(offsets_)) {
    STD_TORCH_CHECK(source.dim() == 2 && offsets.dim() == 2 && offsets.size(1) >= 1,
        "a plan's source must be (B, N), its offsets (B, T + 1)");
    const int64_t batch = source.size(0), tokens = source.size(1), outputs = offsets.size(1) - 1;
    STD_TORCH_CHECK(outputs >= 1 || batch * tokens == 0, "a plan of tokens must have outputs");
    const auto indices = [&](TorchTensor& tensor, int64_t columns, const char* name) {
      return contiguous_data<const int32_t>(device, tensor, ScalarType::Int, {batch, columns}, name);
    };
    groups = {indices(source, tokens, "source"), indices(members, tokens, "members"),
        indices(offsets, outputs + 1, "offsets"), batch, tokens, outputs};
  }
};

std::tuple<TorchTensor, TorchTensor, TorchTensor> bipartite_match(TorchTensor metric, OptionalTensor sizes,
    int64_t num_merged, int64_t num_protected, bool distill_token, double threshold, bool padded) {
  const Device device(metric);
  const Tensor m = rows_of(device, metric, "metric");
  const int64_t batch = m.size[0], tokens = m.size[2], outputs = padded ? tokens : tokens - num_merged;
  STD_TORCH_CHECK(tokens <= int64_t{1} << 21, "metric must have at most 2^21 tokens, got ", tokens);
  STD_TORCH_CHECK(m.size[3] >= 1, "metric must have columns");
  const int64_t rows = (num_protected + 1) / 2, columns = std::max<int64_t>(num_protected / 2, distill_token ? 1 : 0);
  STD_TORCH_CHECK(num_protected >= 0 && num_merged >= 1 && num_merged <= (tokens - rows - columns) / 2,
      "num_merged must be in 1..the number of unprotected pairs");
  STD_TORCH_CHECK(padded || threshold < -1, "with a threshold the plan must be padded");
  const int32_t type = aoti_torch_dtype_int32();
  TorchTensor source = device.empty({batch, tokens}, type), members = device.empty({batch, tokens}, type),
              offsets = device.empty({batch, outputs + 1}, type);
  const auto data = [](const TorchTensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); };
  const effattn::cuda::TokenMatching arguments = {m, floats_of(device, sizes, {batch, tokens}, "sizes"), num_merged,
      num_protected, distill_token, threshold, outputs, data(source), data(members), data(offsets)};
  TorchTensor workspace = device.workspace(effattn::cuda::bipartite_match_workspace(arguments));
  effattn::cuda::bipartite_match(arguments, workspace.data_ptr(), device.stream());
  return {std::move(source), std::move(members), std::move(offsets)};
}

MergeMode mode_of(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode must be 0 (mean), 1 (sum) or 2 (max)");
  return static_cast<MergeMode>(mode);
}

void merge(const Device& device, const TorchTensor& x, const Plan& plan, MergeMode mode, const TorchTensor& output) {
  const TokenGroups& groups = plan.groups;
  const Tensor merged = rows_of(device, output, "output");
  STD_TORCH_CHECK(merged.size[0] == groups.batch && merged.size[2] == groups.outputs, "a merged tensor must be (",
      groups.batch, ", ", groups.outputs, ", channels)");
  const Tensor rows = rows_of(device, x, {groups.batch, groups.tokens, merged.size[3]}, merged.dtype, "x");
  effattn::cuda::token_merge({rows, {}, nullptr, groups, mode, merged, nullptr}, device.stream());
}

TorchTensor token_merge_fwd(TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets, int64_t mode) {
  const Device device(x);
  const Plan plan(device, source, members, offsets);
  const int64_t channels = rows_of(device, x, "x").size[3];
  TorchTensor output = device.empty({plan.groups.batch, plan.groups.outputs, channels}, torch_dtype(dtype_of(x, "x")));
  merge(device, x, plan, mode_of(mode), output);
  return output;
}

TorchTensor token_merge_bwd(TorchTensor grad_output, TorchTensor x, TorchTensor source, TorchTensor members,
    TorchTensor offsets, TorchTensor output, int64_t mode) {
  const Device device(x);
  const Plan plan(device, source, members, offsets);
  const TokenGroups& groups = plan.groups;
  const int64_t channels = rows_of(device, x, "x").size[3];
  const DType dtype = dtype_of(x, "x");
  TorchTensor grad_x = torch::stable::empty_like(x);  // permuted as x is
  effattn::cuda::TokenMergeGradient a = {};
  a.grad_output = rows_of(device, grad_output, {groups.batch, groups.outputs, channels}, dtype, "grad_output");
  a.x = rows_of(device, x, {groups.batch, groups.tokens, channels}, dtype, "x");
  a.output = rows_of(device, output, {groups.batch, groups.outputs, channels}, dtype, "output");
  a.groups = groups;
  a.mode = mode_of(mode);
  a.grad_x = view(device, grad_x, "grad_x");
  effattn::cuda::token_merge_gradient(a, device.stream());
  return grad_x;
}

TorchTensor token_unmerge_fwd(TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets) {
  const Device device(x);
  const Plan plan(device, source, members, offsets);
  const TokenGroups& groups = plan.groups;
  const int64_t channels = rows_of(device, x, "x").size[3];
  const DType dtype = dtype_of(x, "x");
  TorchTensor unmerged = device.empty({groups.batch, groups.tokens, channels}, torch_dtype(dtype));
  effattn::cuda::TokenMergeGradient a = {};
  a.grad_output = rows_of(device, x, {groups.batch, groups.outputs, channels}, dtype, "x");
  a.groups = groups;
  a.mode = MergeMode::kSum;
  a.grad_x = view(device, unmerged, "unmerged");
  effattn::cuda::token_merge_gradient(a, device.stream());
  return unmerged;
}

TorchTensor token_unmerge_bwd(
    TorchTensor grad_output, TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets) {
  const Device device(x);
  TorchTensor grad_x = torch::stable::empty_like(x);
  merge(device, grad_output, {device, source, members, offsets}, MergeMode::kSum, grad_x);
  return grad_x;
}

std::tuple<TorchTensor, TorchTensor> token_merge_weighted_fwd(TorchTensor x, TorchTensor source, TorchTensor members,
    TorchTensor offsets, OptionalTensor residual, OptionalTensor sizes, bool) {
  const Device device(x);
  const Plan plan(device, source, members, offsets);
  const TokenGroups& groups = plan.groups;
  const int64_t channels = rows_of(device, x, "x").size[3];
  const DType dtype = dtype_of(x, "x");
  TorchTensor output = device.empty({groups.batch, groups.outputs, channels}, torch_dtype(dtype));
  TorchTensor merged_sizes = device.empty({groups.batch, groups.outputs}, aoti_torch_dtype_float32());
  effattn::cuda::TokenMerge a = {};
  a.x = rows_of(device, x, {groups.batch, groups.tokens, channels}, dtype, "x");
  if (residual) a.residual = rows_of(device, *residual, {groups.batch, groups.tokens, channels}, dtype, "residual");
  a.sizes = floats_of(device, sizes, {groups.batch, groups.tokens}, "sizes");
  a.groups = groups;
  a.mode = MergeMode::kMean;
  a.output = view(device, output, "output");
  a.merged_sizes = static_cast<float*>(merged_sizes.data_ptr());
  effattn::cuda::token_merge(a, device.stream());
  return {std::move(output), std::move(merged_sizes)};
}

std::tuple<TorchTensor, TorchTensor> token_merge_weighted_bwd(TorchTensor grad_output, OptionalTensor grad_merged_sizes,
    TorchTensor x, TorchTensor source, TorchTensor members, TorchTensor offsets, OptionalTensor residual,
    OptionalTensor sizes, TorchTensor output, bool wants_sizes) {
  const Device device(x);
  const Plan plan(device, source, members, offsets);
  const TokenGroups& groups = plan.groups;
  const int64_t channels = rows_of(device, x, "x").size[3];
  const DType dtype = dtype_of(x, "x");
  TorchTensor grad_x = torch::stable::empty_like(x);  // permuted as x is
  TorchTensor grad_sizes = sizes ? device.empty({groups.batch, groups.tokens}, aoti_torch_dtype_float32())
                                 : device.empty({0}, aoti_torch_dtype_float32());
  effattn::cuda::TokenMergeGradient a = {};
  a.grad_output = rows_of(device, grad_output, {groups.batch, groups.outputs, channels}, dtype, "grad_output");
  a.grad_merged_sizes = floats_of(device, grad_merged_sizes, {groups.batch, groups.outputs}, "grad_merged_sizes");
  a.x = rows_of(device, x, {groups.batch, groups.tokens, channels}, dtype, "x");
  if (residual) a.residual = rows_of(device, *residual, {groups.batch, groups.tokens, channels}, dtype, "residual");
  a.output = rows_of(device, output, {groups.batch, groups.outputs, channels}, dtype, "output");
  a.sizes = floats_of(device, sizes, {groups.batch, groups.tokens}, "sizes");
  a.groups = groups;
  a.mode = MergeMode::kMean;
  a.grad_x = view(device, grad_x, "grad_x");
  if (sizes && wants_sizes) a.grad_sizes = static_cast<float*>(grad_sizes.data_ptr());
  if (sizes && !wants_sizes) grad_sizes = torch::stable::zero_(grad_sizes);
  effattn::cuda::token_merge_gradient(a, device.stream());
  return {std::move(grad_x), std::move(grad_sizes)};
}

}  // namespace
}  // namespace effattn::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(EFFATTN_CUDA_NAMESPACE, EFFATTN_CUDA_KEY, m) {
  m.impl("bipartite_match", TORCH_BOX(&effattn::bindings::cuda::bipartite_match));
  m.impl("token_merge_fwd", TORCH_BOX(&effattn::bindings::cuda::token_merge_fwd));
  m.impl("token_merge_bwd", TORCH_BOX(&effattn::bindings::cuda::token_merge_bwd));
  m.impl("token_merge_weighted_fwd", TORCH_BOX(&effattn::bindings::cuda::token_merge_weighted_fwd));
  m.impl("token_merge_weighted_bwd", TORCH_BOX(&effattn::bindings::cuda::token_merge_weighted_bwd));
  m.impl("token_unmerge_fwd", TORCH_BOX(&effattn::bindings::cuda::token_unmerge_fwd));
  m.impl("token_unmerge_bwd", TORCH_BOX(&effattn::bindings::cuda::token_unmerge_bwd));
}
