// Cross-entropy and divergence of one row of logits, written once in the compiler's vector types. Include it only from
// isa_*.cpp, as simd_tiles.h.
//
// With p and q the student's and the teacher's softmax of logits / T, and p1 the student's at T = 1, the gradient in the
// student's logits is
//   ce_weight (p1 - onehot) + kd_weight / T * { p - q                  forward KL
//                                             { p (r - sum_j p_j r_j)  r = log p/q: reverse KL; (1 - beta) log p/m: JSD
// with m = beta q + (1 - beta) p. A row is swept for its maxima, its sums, (not for forward KL) the mean of r, and the
// gradient, which overwrites the student's logits; after the first sweep it lies in the second-level cache.
//
// Of a top-k teacher the other tokens are one more bucket, for both models: q is theirs altogether. Their probability
// under the student is summed over them alone (the top-k logits stand as -inf meanwhile), so nothing cancels.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_vectors.h"

namespace cdistill {
namespace {

constexpr int64_t kSweep = 2048;  // elements that are summed in fp32 before they go into a double

typedef uint16_t BFloat16;

inline Vec load_logits(const float* p) { return load(p); }
inline Vec load_logits(const BFloat16* p) {
  return (Vec)(__builtin_convertvector(load_as<HalfVec>(p), BitVec) << 16);
}

inline void store_logits(float* p, Vec v) { store(p, v); }
inline void store_logits(BFloat16* p, Vec v) {
  const HalfVec narrow = __builtin_convertvector(narrow_bfloat16(v), HalfVec);
  memcpy(p, &narrow, sizeof(narrow));
}

template <class T>
inline float load_one(const T* p) {
  T first[kLanes] = {*p};
  return load_logits(first)[0];
}

template <class T>
inline void store_one(T* p, float x) {
  T rounded[kLanes];
  store_logits(rounded, Vec{} + x);
  *p = rounded[0];
}

inline IntVec lane_numbers() {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

struct Total {
  Vec lanes = {};
  double sum = 0;
  void flush() {
    sum += lane_sum(lanes);
    lanes = Vec{};
  }
};

// body(j, valid) for vectors of n elements; valid is 0 in lanes beyond n. flush() after every kSweep elements.
template <class Body, class Flush>
inline __attribute__((always_inline)) void sweep(int64_t n, Body body, Flush flush) {
  const IntVec lane = lane_numbers();
  for (int64_t begin = 0; begin < n; begin += kSweep) {
    const int64_t end = smaller(begin + kSweep, n);
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) body(j, ~IntVec{});
    if (j < end) body(j, lane < static_cast<int32_t>(end - j));
    flush();
  }
}

struct Peak {
  float value;
  int32_t index;
};

template <class T>
Peak maximum(const T* logits, int64_t n) {
  Vec most = Vec{} + kLowest;
  IntVec at = {};
  const IntVec index = lane_numbers();
  sweep(
      n,
      [&](int64_t j, IntVec valid) __attribute__((always_inline)) {
        const Vec x = load_logits(logits + j);
        const IntVec larger = valid & (x > most);
        most = larger ? x : most;
        at = larger ? index + static_cast<int32_t>(j) : at;
      },
      [] {});
  Peak peak{kLowest, 0};
  for (int lane = 0; lane < kLanes; ++lane)
    if (most[lane] > peak.value) peak = {most[lane], at[lane]};
  return peak;
}

// log sum_j exp(factor * (logits_j - top)).
template <class T>
double log_sum_exp(const T* logits, int64_t n, float top, float factor) {
  Total total;
  sweep(
      n,
      [&](int64_t j, IntVec valid) __attribute__((always_inline)) {
        const Vec term = exp((load_logits(logits + j) - top) * factor);
        total.lanes += valid ? term : Vec{};
      },
      [&] { total.flush(); });
  return __builtin_log(total.sum);
}

// A vector of both models' probabilities.
struct Pair {
  Vec student;  // logits from their maximum
  Vec p, q, log_p, log_q;
  Vec log_ratio;  // log q - log p, of which large parts of both have cancelled before it is rounded
};

// Maxima of both rows, and the logarithms of their sums from there.
struct Softmaxes {
  float top_p, top_q, lse_p, lse_q, lse_difference, factor;

  template <class T>
  inline __attribute__((always_inline)) Pair at(const T* student, const T* teacher, int64_t j) const {
    Pair x;
    x.student = load_logits(student + j) - top_p;
    const Vec t = load_logits(teacher + j) - top_q;
    x.log_p = x.student * factor - lse_p;
    x.log_q = t * factor - lse_q;
    x.log_ratio = (t - x.student) * factor - lse_difference;
    x.p = exp(x.log_p);
    x.q = exp(x.log_q);
    return x;
  }
};

// A vector of both models, r of the formula above without its factor 1 - beta, and what elements add to the divergence.
// Not inlined: compilers contract multiply-adds as the surroundings suggest, and r - mean needs the same bits in all sweeps.
template <class T, Divergence kDivergence>
__attribute__((noinline)) void compare(const VocabularyRows& x, const Softmaxes& both, const T* student,
                                       const T* teacher, int64_t j, Pair& at, Vec& r, Vec& term) {
  at = both.at(student, teacher, j);
  const Vec p = at.p, q = at.q;
  if (kDivergence == Divergence::kForwardKl) {
    r = Vec{};
    term = q * at.log_ratio;
  } else if (kDivergence == Divergence::kReverseKl) {
    r = -at.log_ratio;
    term = p * r;
  } else {
    const Vec mixture = q * x.beta + p * (1.f - x.beta), smallest = Vec{} + 1.17549435e-38f;
    const Vec log_m = log(mixture < smallest ? smallest : mixture);
    r = at.log_p - log_m;
    term = p * r * (1.f - x.beta) + q * (at.log_q - log_m) * x.beta;
  }
}

template <class T, Divergence kDivergence>
void dense_row(const VocabularyRows& x, int64_t i) {
  T* student = static_cast<T*>(x.student) + i * x.student_stride;
  const T* teacher = static_cast<const T*>(x.teacher) + i * x.teacher_stride;
  const int32_t label = static_cast<int32_t>(x.labels[i]);
  const float factor = 1.f / x.temperature, label_logit = load_one(student + label);
  const bool scaled = x.temperature != 1.f;

  const Peak peak = maximum(student, x.vocab);
  const float top_p = peak.value, top_q = maximum(teacher, x.vocab).value;
  const double log_sum = log_sum_exp(student, x.vocab, top_p, factor);
  const double log_sum_1 = scaled ? log_sum_exp(student, x.vocab, top_p, 1.f) : log_sum;
  const double log_sum_q = log_sum_exp(teacher, x.vocab, top_q, factor);
  const float lse_1 = static_cast<float>(log_sum_1);
  const Softmaxes both{top_p,
                       top_q,
                       static_cast<float>(log_sum),
                       static_cast<float>(log_sum_q),
                       static_cast<float>(log_sum_q - log_sum),
                       factor};
  x.ce[i] = static_cast<float>(static_cast<double>(top_p) - label_logit + log_sum_1);

  float origin = 0.f, mean = 0.f;  // r and its mean from that of the likeliest token: of a certain student they all but cancel
  if (kDivergence != Divergence::kForwardKl) {
    const int32_t lane = peak.index % kLanes;
    Pair at;
    Vec r, term;
    compare<T, kDivergence>(x, both, student, teacher, peak.index - lane, at, r, term);
    origin = r[lane];
    Total value, slope, total;
    sweep(
        x.vocab,
        [&](int64_t j, IntVec valid) __attribute__((always_inline)) {
          Pair at;
          Vec r, term;
          compare<T, kDivergence>(x, both, student, teacher, j, at, r, term);
          value.lanes += valid ? term : Vec{};
          slope.lanes += valid ? at.p * (r - origin) : Vec{};
          total.lanes += valid ? at.p : Vec{};
        },
        [&] {
          value.flush();
          slope.flush();
          total.flush();
        });
    mean = static_cast<float>(slope.sum / total.sum);
    x.kd[i] = static_cast<float>(value.sum);
    if (!x.gradient) return;
  }

  const float kd_weight = x.kd_weight * factor * (kDivergence == Divergence::kJsd ? 1.f - x.beta : 1.f);
  const IntVec index = lane_numbers();
  Total value;
  sweep(
      x.vocab,
      [&](int64_t j, IntVec valid) __attribute__((always_inline)) {
        Pair at;
        Vec r, term;
        compare<T, kDivergence>(x, both, student, teacher, j, at, r, term);
        value.lanes += valid ? term : Vec{};
        const Vec slope = kDivergence == Divergence::kForwardKl ? at.p - at.q : at.p * (r - origin - mean);
        const Vec p_1 = scaled ? exp(at.student - lse_1) : at.p;
        const Vec hit = index + static_cast<int32_t>(j) == label ? Vec{} + x.ce_weight : Vec{};
        const Vec of_ce = p_1 * x.ce_weight - hit;
        if (x.gradient) store_logits(student + j, kd_weight == 0.f ? of_ce : of_ce + slope * kd_weight);
      },
      [&] { value.flush(); });
  if (kDivergence == Divergence::kForwardKl) x.kd[i] = static_cast<float>(value.sum);
}

double log_add(double a, double b) {
  const double most = a > b ? a : b;
  return most + __builtin_log(__builtin_exp(a - most) + __builtin_exp(b - most));
}

// r and the term of one bucket; the same formulas as `compare`.
inline void compare_bucket(const VocabularyRows& x, double log_p, double log_q, double& r, double& term) {
  const double p = __builtin_exp(log_p), q = __builtin_exp(log_q);
  if (x.divergence == Divergence::kForwardKl) {
    r = 0;
    term = q * (log_q - log_p);
  } else if (x.divergence == Divergence::kReverseKl) {
    r = log_p - log_q;
    term = p * r;
  } else {
    const double beta = x.beta;
    const double log_m = log_add(log_q + __builtin_log(beta), log_p + __builtin_log(1 - beta));
    r = (1 - beta) * (log_p - log_m);
    term = p * r + beta * q * (log_q - log_m);
  }
}

template <class T>
void top_row(const VocabularyRows& x, int64_t i) {
  T* student = static_cast<T*>(x.student) + i * x.student_stride;
  const int64_t* indices = x.top_indices + i * x.n_top;
  const float* log_q = x.top_values + i * x.n_top;
  float* logit = x.top_logits + i * x.n_top;
  const int32_t label = static_cast<int32_t>(x.labels[i]);
  const float factor = 1.f / x.temperature, label_logit = load_one(student + label);
  const bool scaled = x.temperature != 1.f;

  float top_max = kLowest;
  for (int64_t k = 0; k < x.n_top; ++k) {
    logit[k] = load_one(student + indices[k]);
    top_max = logit[k] > top_max ? logit[k] : top_max;
  }
  for (int64_t k = 0; k < x.n_top; ++k) store_one(student + indices[k], -kInfinity);

  const float tail_max = maximum(student, x.vocab).value, top = tail_max > top_max ? tail_max : top_max;
  auto tail_log_sum = [&](float by) {
    return (static_cast<double>(tail_max) - top) * by + log_sum_exp(student, x.vocab, tail_max, by);
  };
  auto top_log_sum = [&](float by) {
    double sum = 0;
    for (int64_t k = 0; k < x.n_top; ++k) sum += __builtin_exp((static_cast<double>(logit[k]) - top_max) * by);
    return (static_cast<double>(top_max) - top) * by + __builtin_log(sum);
  };
  const double lse_tail = tail_log_sum(factor), lse_p = log_add(lse_tail, top_log_sum(factor));
  const double lse_1 = scaled ? log_add(tail_log_sum(1.f), top_log_sum(1.f)) : lse_p;
  x.ce[i] = static_cast<float>(static_cast<double>(top) - label_logit + lse_1);
  auto top_log_p = [&](int64_t k) { return (static_cast<double>(logit[k]) - top) * factor - lse_p; };

  const double tail_log_p = lse_tail - lse_p, tail_log_q = x.top_tail[i];
  double tail_r, value;
  compare_bucket(x, tail_log_p, tail_log_q, tail_r, value);
  double mean = __builtin_exp(tail_log_p) * tail_r;
  for (int64_t k = 0; k < x.n_top; ++k) {
    const double log_p = top_log_p(k);
    double r, term;
    compare_bucket(x, log_p, log_q[k], r, term);
    value += term;
    mean += __builtin_exp(log_p) * r;
  }
  x.kd[i] = static_cast<float>(value);
  if (!x.gradient) return;

  const bool forward = x.divergence == Divergence::kForwardKl;
  const float kd_weight = x.kd_weight * factor, lse_ce = static_cast<float>(lse_1);
  const float lse = static_cast<float>(lse_p), tail_slope = forward ? 1.f : static_cast<float>(tail_r - mean);
  const float tail_share = static_cast<float>(lse_tail - tail_log_q);  // exp(s / T - it): the tail's q, spread as p
  const IntVec index = lane_numbers();
  sweep(
      x.vocab,
      [&](int64_t j, IntVec) __attribute__((always_inline)) {
        const Vec s = load_logits(student + j) - top, p = exp(s * factor - lse);
        const Vec slope = p * tail_slope - (forward ? exp(s * factor - tail_share) : Vec{});
        const Vec p_1 = scaled ? exp(s - lse_ce) : p;
        const Vec hit = index + static_cast<int32_t>(j) == label ? Vec{} + x.ce_weight : Vec{};
        const Vec of_ce = p_1 * x.ce_weight - hit;
        store_logits(student + j, kd_weight == 0.f ? of_ce : of_ce + slope * kd_weight);
      },
      [] {});
  for (int64_t k = 0; k < x.n_top; ++k) {
    const double log_p = top_log_p(k), p = __builtin_exp(log_p);
    double r, term;
    compare_bucket(x, log_p, log_q[k], r, term);
    const double slope = forward ? p - __builtin_exp(static_cast<double>(log_q[k])) : p * (r - mean);
    const double hit = indices[k] == label ? 1. : 0.;
    double d = (__builtin_exp(static_cast<double>(logit[k]) - top - lse_1) - hit) * x.ce_weight;
    if (kd_weight != 0.f) d += slope * kd_weight;
    store_one(student + indices[k], static_cast<float>(d));
  }
}

template <class T>
void vocabulary_row_as(const VocabularyRows& x, int64_t i) {
  if (x.n_top) top_row<T>(x, i);
  else if (x.divergence == Divergence::kForwardKl) dense_row<T, Divergence::kForwardKl>(x, i);
  else if (x.divergence == Divergence::kReverseKl) dense_row<T, Divergence::kReverseKl>(x, i);
  else dense_row<T, Divergence::kJsd>(x, i);
}

void vocabulary_row(const VocabularyRows& x, int64_t i) {
  if (x.dtype == DType::kFloat32) vocabulary_row_as<float>(x, i);
  else vocabulary_row_as<BFloat16>(x, i);
}

}  // namespace
}  // namespace cdistill
