// Linear layers whose weights are signed powers of two, stored in 4 bits (or the 8 of e5m2): MatShift of arXiv
// 2306.06446.
//
//   float         y = (x . w) scale + bias                              fp32 sums; bf16 products are exact
//   int8          q = round(x / t), t = max|x| / 127 per row;  y = (q . 64 w) (t / 64) [scale] + bias
//   fixed16.16    y = 2^-16 (sum_k s (floor(2^16 x) >> -p) + floor(2^16 bias)), 32-bit, wrapping
//   backward      grad_x = (grad_y * scale) W, whatever the activation (straight through)
//
// Up to kFewRows rows: shift_linear_rows.h, codes decoded in registers, bound by the N K / 2 bytes of codes. Above, and
// for fixed16.16 and the backward pass: shift_linear_panels.h, weights expanded once per call and the tile
// micro-kernel.
#include "api.h"
#include "shift_linear_rows.h"

namespace effattn::EFFATTN_ISA {
namespace {

constexpr int64_t kFewRows = 16;

void floating(const ShiftProblem& problem, const Runtime& runtime) {
  const bool few = !problem.transposed && problem.rows() <= kFewRows;
#if EFFATTN_HAS_BFLOAT16_DOT
  if (problem.left.dtype == DType::kBFloat16) {
    if (few && !problem.codes.bytes)
      ShiftRows<PairRows>::run(problem, false, runtime);
    else if (few)
      ShiftRows<FloatRows<true>>::run(problem, false, runtime);
    else
      ShiftPanels<BFloat16Pair>::run(problem, runtime);
    return;
  }
#endif
  if (!few)
    ShiftPanels<Float32>::run(problem, runtime);
  else if (problem.codes.bytes)
    ShiftRows<FloatRows<true>>::run(problem, false, runtime);
  else
    ShiftRows<FloatRows<false>>::run(problem, false, runtime);
}

void integer(const ShiftProblem& problem, const Runtime& runtime) {
#if EFFATTN_HAS_BYTE_DOT
  if (problem.rows() <= kFewRows) return ShiftRows<ByteRows>::run(problem, true, runtime);
#endif
  ShiftPanels<Integer>::run(problem, runtime);
}

}  // namespace

void shift_linear_forward(const ShiftLinear& call, const Runtime& runtime) {
  const ShiftProblem problem = {call.input, call.output,
      codes_of(call.codes, call.output.size[3], call.input.size[3], call.bits), nullptr, call.scale, call.bias, false};
  if (problem.rows() == 0 || problem.columns() == 0) return;
  if (call.activation == ShiftActivation::kFloat)
    floating(problem, runtime);
  else if (call.activation == ShiftActivation::kInt8)
    integer(problem, runtime);
  else
    ShiftPanels<Fixed16>::run(problem, runtime);
}

void shift_linear_backward(const ShiftLinearBackward& call, const Runtime& runtime) {
  const ShiftProblem problem = {call.grad_output, call.grad_input,
      codes_of(call.codes, call.grad_output.size[3], call.grad_input.size[3], call.bits), call.scale, nullptr, nullptr,
      true};
  if (problem.rows() == 0 || problem.columns() == 0) return;
  floating(problem, runtime);
}

}  // namespace effattn::EFFATTN_ISA
