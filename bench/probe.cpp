// Measures what this machine can do at most: copy bandwidth, the peaks of fp32 FMA, bf16 dot and int8 dot, and of the
// exponential of softmax.
//
//   copy_bandwidth(destination, source, threads, repeats) -> float64[repeats]   bytes read + written per second
//   peak(kind, threads, repeats)                          -> float64[repeats]   operations per second; of "exp2" and
//                                                            "exp2_bf16" numbers 2^(x - c) per second
//   instruction(kind)                                     -> the instruction that peak(kind) issues, "" if none
//
// A peak loop keeps 12 independent accumulators in registers and touches no memory: 12 covers latency x throughput of
// every x86 and Arm core so far. Every thread starts at one barrier; a repeat is timed from there to the last thread's
// end. The file is compiled for the baseline ISA; wider instructions are behind target attributes and asked for at run
// time.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace py = pybind11;

namespace {

constexpr int kAccumulators = 12;
constexpr std::int64_t kSteps = 1 << 22;

volatile float float_sink;
volatile int int_sink;

struct Peak {
  std::string instruction;
  double operations_per_step = 0;  // one step advances every accumulator once
  void (*loop)() = nullptr;
};

#if defined(__x86_64__)

__attribute__((target("avx512f"))) void fma_avx512() {
  __m512 acc[kAccumulators];
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_fmadd_ps(acc[i], a, b);
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += _mm512_cvtss_f32(acc[i]);
  float_sink = sum;
}

__attribute__((target("avx2,fma"))) void fma_avx2() {
  __m256 acc[kAccumulators];
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm256_set1_ps(static_cast<float>(i));
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += _mm256_cvtss_f32(acc[i]);
  float_sink = sum;
}

__attribute__((target("avx512f,avx512bf16"))) void dot_bf16() {
  __m512 acc[kAccumulators];
  // 0x3c00 is 2^-7 in bf16: sums stay normal numbers.
  const __m512i bits = _mm512_set1_epi16(0x3c00);
  __m512bh a;
  std::memcpy(&a, &bits, sizeof a);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, a);
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += _mm512_cvtss_f32(acc[i]);
  float_sink = sum;
}

__attribute__((target("avx512f,avx512vnni"))) void dot_int8() {
  __m512i acc[kAccumulators];
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_set1_epi32(i);
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
  }
  int sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += _mm512_cvtsi512_si32(acc[i]);
  int_sink = sum;
}

// AMX: tiles of 16 rows of 64 bytes, four sums and two operands on each side. Linux lends the tiles on request.
#if defined(__linux__)
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_tiles() { return false; }
#endif

constexpr double kTileWords = 16.0 * 16 * 16;  // products of 4-byte words in one instruction

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define EFFATTN_TILE_LOOP(name, features, dot)                                                    \
  __attribute__((target("amx-tile," features))) void name() {                                     \
    static const TileShapes shapes; /* GCC takes the first 8 bytes of an automatic one for all */ \
    _tile_loadconfig(&shapes);                                                                    \
    for (std::int64_t step = 0; step < kSteps; ++step) {                                          \
      dot(0, 4, 6);                                                                               \
      dot(1, 4, 7);                                                                               \
      dot(2, 5, 6);                                                                               \
      dot(3, 5, 7);                                                                               \
    }                                                                                             \
    _tile_release();                                                                              \
  }
EFFATTN_TILE_LOOP(tiles_bf16, "amx-bf16", _tile_dpbf16ps)
EFFATTN_TILE_LOOP(tiles_int8, "amx-int8", _tile_dpbusd)
#undef EFFATTN_TILE_LOOP

// 2^(x - c) as the kernels compute it (csrc/cpu/simd.h): degree 5 for float32, 3 for bfloat16. As a chain x = 2^(x - 1)
// stays in [0.5, 1].
constexpr float kExp2Degree5[] = {
    0.0018671452801044385f, 0.009016993467104628f, 0.05579994537004679f, 0.2401644380628233f, 0.6931513133449989f, 1.f};
constexpr float kExp2Degree3[] = {0.07706703914784001f, 0.22764499515857392f, 0.6951167855852893f, 1.f};

template <int kDegree>
__attribute__((target("avx512f,avx512dq"))) void exp2_avx512() {
  const float* const coefficients = kDegree == 5 ? kExp2Degree5 : kExp2Degree3;
  __m512 x[kAccumulators], p[kDegree + 1];
  const __m512 one = _mm512_set1_ps(1.f);
#pragma GCC unroll 6
  for (int d = 0; d <= kDegree; ++d) p[d] = _mm512_set1_ps(coefficients[d]);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) x[i] = _mm512_set1_ps(0.05f * static_cast<float>(i));
  for (std::int64_t step = 0; step < kSteps / 8; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) {
      const __m512 y = _mm512_sub_ps(x[i], one);
      const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      __m512 sum = p[0];
#pragma GCC unroll 5
      for (int d = 1; d <= kDegree; ++d) sum = _mm512_fmadd_ps(sum, f, p[d]);
      x[i] = _mm512_scalef_ps(sum, y);
    }
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += _mm512_cvtss_f32(x[i]);
  float_sink = sum;
}

template <int kDegree>
__attribute__((target("avx2,fma"))) void exp2_avx2() {
  const float* const coefficients = kDegree == 5 ? kExp2Degree5 : kExp2Degree3;
  __m256 x[kAccumulators], p[kDegree + 1];
  const __m256 one = _mm256_set1_ps(1.f), least = _mm256_set1_ps(-127.f);
#pragma GCC unroll 6
  for (int d = 0; d <= kDegree; ++d) p[d] = _mm256_set1_ps(coefficients[d]);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) x[i] = _mm256_set1_ps(0.05f * static_cast<float>(i));
  for (std::int64_t step = 0; step < kSteps / 8; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) {
      const __m256 y = _mm256_max_ps(_mm256_sub_ps(x[i], one), least), n = _mm256_floor_ps(y);
      const __m256 f = _mm256_sub_ps(y, n);
      __m256 sum = p[0];
#pragma GCC unroll 5
      for (int d = 1; d <= kDegree; ++d) sum = _mm256_fmadd_ps(sum, f, p[d]);
      const __m256i exponent = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
      x[i] = _mm256_mul_ps(sum, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += _mm256_cvtss_f32(x[i]);
  float_sink = sum;
}

Peak find_exp2(const std::string& kind) {
  const bool coarse = kind == "exp2_bf16";
  // An eighth of the steps: a number takes about eight instructions.
  if (__builtin_cpu_supports("avx512dq"))
    return {"vreduceps, vscalefps, 512 bits", kAccumulators * 16 / 8.0, coarse ? exp2_avx512<3> : exp2_avx512<5>};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"vroundps, 256 bits", kAccumulators * 8 / 8.0, coarse ? exp2_avx2<3> : exp2_avx2<5>};
  return {};
}

Peak find_peak(const std::string& kind) {
  __builtin_cpu_init();
  if (kind.rfind("exp2", 0) == 0) return find_exp2(kind);
  if (kind == "bf16" && __builtin_cpu_supports("amx-bf16") && may_use_tiles())
    return {"tdpbf16ps, 16 x 16 tiles", 4 * kTileWords * 4, tiles_bf16};
  if (kind == "int8" && __builtin_cpu_supports("amx-int8") && may_use_tiles())
    return {"tdpbusd, 16 x 16 tiles", 4 * kTileWords * 8, tiles_int8};
  const bool wide = __builtin_cpu_supports("avx512f");
  if (kind == "fp32") {
    if (wide) return {"vfmadd, 512 bits", kAccumulators * 16 * 2.0, fma_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return {"vfmadd, 256 bits", kAccumulators * 8 * 2.0, fma_avx2};
  }
  if (kind == "bf16" && wide && __builtin_cpu_supports("avx512bf16"))
    return {"vdpbf16ps, 512 bits", kAccumulators * 16 * 4.0, dot_bf16};
  if (kind == "int8" && wide && __builtin_cpu_supports("avx512vnni"))
    return {"vpdpbusd, 512 bits", kAccumulators * 16 * 8.0, dot_int8};
  return {};
}

#elif defined(__aarch64__)

void fma_neon() {
  float32x4_t acc[kAccumulators];
  const float32x4_t a = vdupq_n_f32(0.5f), b = vdupq_n_f32(0.25f);
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) acc[i] = vdupq_n_f32(static_cast<float>(i));
  for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = vfmaq_f32(b, acc[i], a);
  }
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kAccumulators; ++i) sum += vgetq_lane_f32(acc[i], 0);
  float_sink = sum;
}

Peak find_peak(const std::string& kind) {
  if (kind == "fp32") return {"fmla, 128 bits", kAccumulators * 4 * 2.0, fma_neon};
  return {};
}

#else

Peak find_peak(const std::string&) { return {}; }

#endif

// Without this the scheduler may leave two short-lived threads on one core while another idles.
void pin_to_core(int thread) {
#if defined(__linux__)
  cpu_set_t allowed, chosen;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int skip = thread % CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || skip-- > 0) continue;
    CPU_ZERO(&chosen);
    CPU_SET(cpu, &chosen);
    sched_setaffinity(0, sizeof chosen, &chosen);
    return;
  }
#else
  (void)thread;
#endif
}

// Seconds from a common start until the last of `threads` calls of work(thread) is done.
double timed(int threads, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      pin_to_core(t);
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
    });
  }
  while (ready.load() < threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  for (auto& thread : team) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void require_positive(int threads, int repeats) {
  if (threads < 1 || repeats < 1) throw std::invalid_argument("threads and repeats must be at least 1");
}

py::array_t<double> peak(const std::string& kind, int threads, int repeats) {
  require_positive(threads, repeats);
  const Peak found = find_peak(kind);
  if (!found.loop) throw std::invalid_argument("this machine has no instruction for " + kind);
  py::array_t<double> rates(repeats);
  double* rate = rates.mutable_data();
  py::gil_scoped_release release;
  found.loop();  // wakes the wide units
  for (int r = 0; r < repeats; ++r) {
    rate[r] = threads * kSteps * found.operations_per_step / timed(threads, [&](int) { found.loop(); });
  }
  return rates;
}

py::array_t<double> copy_bandwidth(py::array_t<std::uint8_t, py::array::c_style> destination,
    py::array_t<std::uint8_t, py::array::c_style> source, int threads, int repeats) {
  require_positive(threads, repeats);
  if (destination.size() != source.size()) throw std::invalid_argument("destination and source must have one size");
  std::uint8_t* to = destination.mutable_data();
  const std::uint8_t* from = source.data();
  const std::int64_t size = source.size();
  py::array_t<double> rates(repeats);
  double* rate = rates.mutable_data();
  py::gil_scoped_release release;
  for (int r = 0; r < repeats; ++r) {
    rate[r] = 2.0 * size / timed(threads, [&](int t) {
      const std::int64_t begin = size * t / threads, end = size * (t + 1) / threads;
      std::memcpy(to + begin, from + begin, end - begin);
    });
  }
  return rates;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("copy_bandwidth", &copy_bandwidth, py::arg("destination").noconvert(), py::arg("source"),
      py::arg("threads"), py::arg("repeats"));
  module.def("peak", &peak, py::arg("kind"), py::arg("threads"), py::arg("repeats"));
  module.def("instruction", [](const std::string& kind) { return find_peak(kind).instruction; }, py::arg("kind"));
}
