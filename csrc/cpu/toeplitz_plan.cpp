// Which of the exact methods serves a bias: predicted time and predicted error of each, O(H entries).
//
//   seconds     pair products, transforms and scans times what a unit costs on this machine
//   FFT error   kappa eps A,  A = max over the rows i of ||c||_2 sqrt(N) / C_i,  C_i = sum of c over the keys i sees
//
// Every element of a convolution by FFT has an error of about eps ||c||_2 ||x||_2 / sqrt(N), whatever its own size, and
// is divided by a normalizer that goes with C_i: a row that sees only small weights, as the first rows of a causal
// bias that grows with the distance do, loses its digits. Gradients divide by the same normalizers. kappa:
// toeplitz_fft_error.h.
//
// Sums over the keys of a row are rectangles of the table: its 2-D prefix sums, in double.
#include "scratch.h"
#include "toeplitz_fft_error.h"
#include "toeplitz_structure.h"

namespace effattn::EFFATTN_ISA {
namespace toeplitz {
namespace {

// The shortest 2^a 3^b 5^c of at least `least`.
int64_t transform_length(int64_t least) {
  int64_t best = INT64_MAX;
  for (int64_t fives = 1;; fives *= 5) {
    for (int64_t threes = fives;; threes *= 3) {
      int64_t length = threes;
      while (length < least) length *= 2;
      best = smaller(best, length);
      if (threes >= least) break;
    }
    if (fives >= least) break;
  }
  return best;
}

// One head: what its table says.
class Head {
 public:
  Head(const ToeplitzPlanning& p, const float* bias, double top, double* sums)
      : p_(p), bias_(bias), top_(static_cast<float>(top)), sums_(sums) {}

  static int64_t doubles(const ToeplitzPlanning& p) { return 2 * p.grid_h * 2 * p.grid_w; }

  // A; infinite where a row sees no weight at all.
  double amplification() {
    const double squared = add_up();
    const double tokens = static_cast<double>(p_.grid_h * p_.grid_w);
    double least = INFINITY;
    for (int64_t y = 0; y < p_.grid_h; ++y)
      for (int64_t x = 0; x < p_.grid_w; ++x) {
        const double seen = row_sum(y, x);
        if (!(seen >= least)) least = seen;  // NaN stays
      }
    return least > 0.0 ? sqrt(squared * tokens) / least : INFINITY;
  }

 private:
  // Prefix sums over rows [0, y) and columns [0, x) of the table; returns the sum of the squares of all that is used.
  double add_up() {
    const int64_t rows = 2 * p_.grid_h - 1, columns = 2 * p_.grid_w - 1, pitch = columns + 1;
    double squared = 0.0;
    for (int64_t x = 0; x <= columns; ++x) sums_[x] = 0.0;
    for (int64_t y = 0; y < rows; ++y) {
      const double* above = sums_ + y * pitch;
      double* to = sums_ + (y + 1) * pitch;
      double line = 0.0;
      to[0] = 0.0;
      for (int64_t first = 0; first < columns; first += kLanes) {
        const int64_t count = smaller(kLanes, columns - first);
        float weights[kLanes];
        store(weights, weight(load_partial(bias_ + y * columns + first, count)));
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t x = first + lane;
          const double c = static_cast<double>(weights[lane]);
          line += c;
          to[x + 1] = above[x + 1] + line;
          const bool unseen = p_.is_causal && (y >= p_.grid_h || (y == p_.grid_h - 1 && x >= p_.grid_w));
          squared += unseen ? 0.0 : c * c;
        }
      }
    }
    return squared;
  }

  EFFATTN_INLINE Vec weight(Vec bias) const {
    const Vec x = (bias - broadcast(top_)) * broadcast(1.44269504f), least = broadcast(-126.f);
    return (Vec)((IntVec)exp2<5>(max(x, least)) & (IntVec)(x > least));
  }

  double rectangle(int64_t top, int64_t bottom, int64_t left, int64_t right) const {
    const int64_t pitch = 2 * p_.grid_w;
    return sums_[bottom * pitch + right] - sums_[top * pitch + right] - sums_[bottom * pitch + left] +
           sums_[top * pitch + left];
  }

  double row_sum(int64_t y, int64_t x) const {
    const int64_t h = p_.grid_h, w = p_.grid_w, left = w - 1 - x, top = h - 1 - y;
    if (!p_.is_causal) return rectangle(top, top + h, left, left + w);
    return rectangle(top, h - 1, left, left + w) + rectangle(h - 1, h, left, w);
  }

  const ToeplitzPlanning& p_;
  const float* bias_;
  const float top_;
  double* sums_;
};

ToeplitzMethod choose(const ToeplitzPlanning& p, const ToeplitzPlan& plan) {
  const bool fft = plan.fft_error <= p.tolerance, double_fft = plan.double_fft_error <= p.tolerance;
  const bool structured = plan.seconds[3] < INFINITY;
  switch (p.request) {
    case ToeplitzRequest::kDirect:
      return ToeplitzMethod::kDirect;
    case ToeplitzRequest::kFft:
      return fft ? ToeplitzMethod::kFft : double_fft ? ToeplitzMethod::kDoubleFft : ToeplitzMethod::kNone;
    case ToeplitzRequest::kStructured:
      return structured ? ToeplitzMethod::kStructured : ToeplitzMethod::kNone;
    default:
      break;
  }
  const bool serves[4] = {true, fft, double_fft, structured};
  int best = 0;
  for (int m = 1; m < 4; ++m)
    if (serves[m] && plan.seconds[m] < plan.seconds[best]) best = m;
  return static_cast<ToeplitzMethod>(static_cast<int64_t>(ToeplitzMethod::kDirect) + best);
}

}  // namespace
}  // namespace toeplitz

void toeplitz_plan(const ToeplitzPlanning& p, ToeplitzPlan& plan, const Runtime&) {
  using namespace toeplitz;
  const int64_t tokens = p.grid_h * p.grid_w, heads = p.heads;
  plan = {ToeplitzMethod::kDirect, {0.0, 0.0, 0.0, 0.0}, 0.0, 0.0, 0.0, 0.0};
  if (tokens == 0 || heads == 0 || p.batch == 0) return;
  const int64_t entries = (2 * p.grid_h - 1) * (2 * p.grid_w - 1);
  Buffer buffer;
  double* sums = buffer.reserve<double>(Head::doubles(p));
  double amplification = 0.0, near_keys = 0.0;
  bool has_structure = true;
  for (int64_t head = 0; head < heads; ++head) {
    const float* bias = p.bias + head * entries;
    const Extent extent = extent_of(bias, entries);
    const double a = Head(p, bias, extent.top, sums).amplification(), range = extent.range;
    amplification = a > amplification ? a : amplification;
    plan.range = range > plan.range ? range : plan.range;
    const Structure structure = structure_of(bias, extent.top, p.grid_h, p.grid_w, p.is_causal);
    has_structure = has_structure && structure.applies;
    const double width = static_cast<double>(larger(structure.before.width, structure.after.width));
    plan.tail = width > plan.tail ? width : plan.tail;
    near_keys += static_cast<double>(
        smaller(kBlock * (1 + structure.before.near_blocks() + structure.after.near_blocks()), tokens));
  }
  if (!has_structure) plan.tail = INFINITY;
  plan.fft_error = kFftError * 0x1p-23 * amplification;
  plan.double_fft_error = kDoubleFftError * 0x1p-52 * amplification;

  const double n = static_cast<double>(tokens), batch = static_cast<double>(p.batch), nano = 1e-9;
  const double queries = batch * static_cast<double>(heads) * n, keys = p.is_causal ? (n + 1.0) / 2.0 : n;
  const double m = static_cast<double>(p.features), d = static_cast<double>(p.value_dim);
  const double length =
      static_cast<double>(transform_length(larger(2 * ((p.grid_h - 1) * (2 * p.grid_w - 1) + p.grid_w) - 1, 2)));
  const double butterflies = batch * static_cast<double>(heads) * m * (d + 1.0) * length * ::log2(length);
  plan.seconds[0] = nano * queries * keys * (m + d) * p.costs.direct;
  plan.seconds[1] = nano * butterflies * p.costs.fft;
  plan.seconds[2] = nano * butterflies * p.costs.double_fft;
  plan.seconds[3] = has_structure ? nano * (batch * n * near_keys * (m + d) * p.costs.direct +
                                               queries * (p.is_causal ? 1.0 : 2.0) * m * d * p.costs.scan)
                                  : INFINITY;
  plan.method = choose(p, plan);
}

}  // namespace effattn::EFFATTN_ISA
