// Kernels on packed weights and packed bits, for kernels.cpp: every buffer ends where its tensor ends.
#pragma once

namespace {

template <class T>
std::unique_ptr<T[]> random_words(int64_t count) {
  std::unique_ptr<T[]> words(new T[count]);
  for (int64_t i = 0; i < count; ++i) {
    uniform();
    words[i] = static_cast<T>(random_state >> 3);
  }
  return words;
}

struct Worst {
  double error = 0, largest = 0.05;
  void note(double got, double want) {
    error = isfinite(got) ? fmax(error, fabs(got - want)) : INFINITY;
    largest = fmax(largest, fabs(want));
  }
  void check(const char* name, DType dtype, double tolerance, int64_t m, int64_t n, int64_t k) const {
    if (error <= tolerance * largest) return;
    ++failures;
    printf("%s: dtype %d, %ld x %ld x %ld: off by %g of %g\n", name, static_cast<int>(dtype), static_cast<long>(m),
        static_cast<long>(n), static_cast<long>(k), error, largest);
  }
};

double tolerance_of(DType dtype) { return dtype == DType::kFloat32 ? 2e-5 : 2e-2; }

void shift_linear(DType dtype, int64_t M, int64_t K, int64_t N, int bits, bool extras, Layout layout) {
  const int64_t row_bytes = bits > 4 ? K : (K + 1) / 2;
  const std::unique_ptr<uint8_t[]> codes = random_words<uint8_t>(N * row_bytes);
  for (int64_t i = 0; i < N * row_bytes; ++i) {
    if (bits > 4)
      codes[i] = static_cast<uint8_t>((codes[i] & 0x80) | ((1 + codes[i] % 15) << 2));
    else if (K % 2 == 1 && i % row_bytes == row_bytes - 1)
      codes[i] &= 15;
  }
  const auto weight = [&](int64_t n, int64_t k) {
    if (bits > 4) {
      const int code = codes[n * K + k];
      return (code & 0x80 ? -1.0 : 1.0) * pow(2, ((code & 0x7c) >> 2) - 15);
    }
    const int code = codes[n * row_bytes + k / 2] >> (4 * (k % 2)) & 15;
    return (code & 7) == 0 ? 0.0 : (code & 8 ? -1.0 : 1.0) * pow(2, (code & 7) - 7);
  };
  std::unique_ptr<float[]> scale(new float[N]), bias(new float[N]);
  for (int64_t n = 0; n < N; ++n) scale[n] = 1.f + uniform() / 2, bias[n] = uniform();
  const HeapTensor input(dtype, {1, 1, M, K}, layout), grad(dtype, {1, 1, M, N}, layout);
  for (const ShiftActivation activation :
      {ShiftActivation::kFloat, ShiftActivation::kInt8, ShiftActivation::kFixed16}) {
    if (activation == ShiftActivation::kInt8 && bits > 4) continue;
    const bool fixed = activation == ShiftActivation::kFixed16, scaled = extras && !fixed;
    const HeapTensor output(dtype, {1, 1, M, N}, Layout::kContiguous, true);
    kernels_under_test.shift_linear_forward({input.view(), codes.get(), scaled ? scale.get() : nullptr,
                                                extras ? bias.get() : nullptr, output.view(), bits, activation},
        kRuntime);
    Worst worst;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += input.at(0, 0, m, k) * weight(n, k);
        worst.note(output.at(0, 0, m, n), sum * (scaled ? scale[n] : 1) + (extras ? bias[n] : 0));
      }
    const double rounding = fixed ? 0x1p-16 * static_cast<double>(K + 2) / worst.largest : 2e-2;  // of the activations
    worst.check(
        "shift_linear", dtype, tolerance_of(dtype) + (activation == ShiftActivation::kFloat ? 0 : rounding), M, N, K);
  }
  const HeapTensor grad_input(dtype, {1, 1, M, K}, Layout::kContiguous, true);
  kernels_under_test.shift_linear_backward(
      {grad.view(), codes.get(), extras ? scale.get() : nullptr, grad_input.view(), bits}, kRuntime);
  Worst worst;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += grad.at(0, 0, m, n) * (extras ? scale[n] : 1) * weight(n, k);
      worst.note(grad_input.at(0, 0, m, k), sum);
    }
  worst.check("shift_linear backward", dtype, tolerance_of(dtype), M, N, K);
}

class Bits {
 public:
  Bits(int64_t rows, int64_t length)
      : words_((length + 31) / 32), data_(random_words<uint32_t>(rows * words_)) {}  // the pad bits are garbage
  uint32_t* get() const { return data_.get(); }
  double at(int64_t row, int64_t i, bool signs) const {
    const int bit = data_[row * words_ + i / 32] >> (i % 32) & 1;
    return signs ? 2 * bit - 1 : bit;
  }

 private:
  int64_t words_;
  std::unique_ptr<uint32_t[]> data_;
};

void packed_products(DType dtype, int64_t M, int64_t N, int64_t length, bool signs, Layout layout) {
  constexpr int64_t kBatches = 2;
  const Bits left(kBatches * M, length), right(kBatches * N, length);
  std::unique_ptr<int32_t[]> product(new int32_t[kBatches * M * N]);
  kernels_under_test.binary_matmul({left.get(), right.get(), product.get(), kBatches, M, N, length, signs}, kRuntime);
  Worst binary, forward, backward;
  for (int64_t i = 0; i < kBatches * M * N; ++i) {
    const int64_t row = i / N, column = i / N / M * N + i % N;
    double sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += left.at(row, k, signs) * right.at(column, k, signs);
    binary.note(product[i], sum);
  }
  binary.check("binary_matmul", dtype, 0, M, N, length);

  const HeapTensor dense(dtype, {1, kBatches, length, N}, layout), grad(dtype, {1, kBatches, M, N}, layout);
  const HeapTensor output(dtype, {1, kBatches, M, N}, Layout::kContiguous, true),
      grad_dense(dtype, {1, kBatches, length, N}, Layout::kContiguous, true);
  kernels_under_test.add_matmul_forward({left.get(), dense.view(), output.view(), signs}, kRuntime);
  kernels_under_test.add_matmul_backward({grad.view(), left.get(), grad_dense.view(), signs}, kRuntime);
  for (int64_t b = 0; b < kBatches; ++b)
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t m = 0; m < M; ++m) {
        double sum = 0;
        for (int64_t k = 0; k < length; ++k) sum += left.at(b * M + m, k, signs) * dense.at(0, b, k, n);
        forward.note(output.at(0, b, m, n), sum);
      }
      for (int64_t k = 0; k < length; ++k) {
        double sum = 0;
        for (int64_t m = 0; m < M; ++m) sum += left.at(b * M + m, k, signs) * grad.at(0, b, m, n);
        backward.note(grad_dense.at(0, b, k, n), sum);
      }
    }
  forward.check("add_matmul", dtype, tolerance_of(dtype), M, N, length);
  backward.check("add_matmul backward", dtype, tolerance_of(dtype), M, N, length);

  const HeapTensor input(dtype, {1, kBatches, M, length}, layout);
  Bits packed(kBatches * M, length);
  kernels_under_test.pack_signs({input.view(), packed.get()}, kRuntime);
  for (int64_t i = 0; i < kBatches * M; ++i)
    for (int64_t k = 0; k < (length + 31) / 32 * 32; ++k)
      if (packed.at(i, k, false) != (k < length && input.at(0, i / M, i % M, k) > 0)) {
        ++failures, printf("pack_signs: a bit is wrong\n");
        return;
      }
}

void hamming_attention(
    DType dtype, int64_t N, int64_t M, int64_t length, int64_t value_dim, bool signs, Layout layout) {
  constexpr int64_t kHeads = 2;
  const float scale = static_cast<float>(signs ? 1 : -2) / sqrtf(static_cast<float>(length));
  const Bits query(kHeads * N, length), key(kHeads * M, length);
  const HeapTensor value(dtype, {1, kHeads, M, value_dim}, layout), grad(dtype, {1, kHeads, N, value_dim}, layout);
  const HeapTensor output(dtype, {1, kHeads, N, value_dim}, Layout::kContiguous, true),
      grad_value(dtype, {1, kHeads, M, value_dim}, Layout::kContiguous, true);
  std::unique_ptr<float[]> logsumexp(new float[kHeads * N]);
  kernels_under_test.hamming_attention_forward(
      {query.get(), key.get(), value.view(), output.view(), logsumexp.get(), length, signs, scale}, kRuntime);
  kernels_under_test.hamming_attention_backward(
      {grad.view(), query.get(), key.get(), logsumexp.get(), grad_value.view(), length, signs, scale}, kRuntime);
  Worst forward, backward, sums;
  for (int64_t h = 0; h < kHeads; ++h) {
    std::vector<double> dv(M * value_dim);
    for (int64_t n = 0; n < N; ++n) {
      std::vector<double> weight(M), out(value_dim);
      double total = 0;
      for (int64_t m = 0; m < M; ++m) {
        double score = 0;
        for (int64_t k = 0; k < length; ++k) score += query.at(h * N + n, k, signs) * key.at(h * M + m, k, signs);
        total += weight[m] = exp(scale * score);
      }
      if (M > 0) sums.note(logsumexp[h * N + n], log(total));
      for (int64_t m = 0; m < M; ++m)
        for (int64_t d = 0; d < value_dim; ++d) {
          out[d] += weight[m] / total * value.at(0, h, m, d);
          dv[m * value_dim + d] += weight[m] / total * grad.at(0, h, n, d);
        }
      for (int64_t d = 0; d < value_dim; ++d) forward.note(output.at(0, h, n, d), out[d]);
    }
    for (int64_t i = 0; i < M * value_dim; ++i) backward.note(grad_value.at(0, h, i / value_dim, i % value_dim), dv[i]);
  }
  forward.check("hamming_attention", dtype, tolerance_of(dtype), N, M, length);
  backward.check("hamming_attention backward", dtype, tolerance_of(dtype), N, M, length);
  sums.check("hamming_attention logsumexp", dtype, 1e-4, N, M, length);
}

void packed_kernels() {
  const Layout layouts[] = {Layout::kContiguous, Layout::kHeadsInside, Layout::kStrided, Layout::kExpanded};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    int turn = 0;
    for (const int64_t rows : {1, 2, 5, 11, 16, 17, 50, 131})
      for (const int bits : {4, 5, 2}) {
        const int64_t length = 1 + turn * 37 % 301, channels = 1 + turn * 53 % 190;
        shift_linear(dtype, rows, length, channels, bits, turn % 2 == 0, layouts[turn % 4]);
        packed_products(dtype, rows, channels, length, turn % 2 == 0, layouts[turn % 4]);
        hamming_attention(dtype, rows, 1 + turn * 29 % 330, 1 + turn * 41 % 256, 1 + turn * 23 % 256, turn % 2 == 0,
            layouts[turn % 4]);
        ++turn;
      }
    for (const int64_t empty : {0, 1, 2}) {
      shift_linear(dtype, empty == 0 ? 0 : 7, empty == 1 ? 0 : 40, empty == 2 ? 0 : 9, 4, true, Layout::kContiguous);
      packed_products(dtype, empty == 0 ? 0 : 7, empty == 1 ? 0 : 40, empty == 2 ? 0 : 9, true, Layout::kContiguous);
    }
    shift_linear(dtype, 20, 1100, 65, 4, true, Layout::kContiguous);
    packed_products(dtype, 300, 600, 70, true, Layout::kContiguous);
    hamming_attention(dtype, 7, 0, 64, 33, true, Layout::kContiguous);
  }
}

}  // namespace
