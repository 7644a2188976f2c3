// Kernels for any processor: the compiler's 4-lane vectors (SSE2, NEON, ...), score tile 4 x 8.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_kernels.h"

namespace cdistill {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kScoreRows = 4, kScoreVectors = 2;
  static constexpr int kUpdateRows = 4, kUpdateVectors = 2;
  struct Mask { Ints bits; };
  struct Half { uint16_t bits; };
  struct BFloat16 { uint16_t bits; };

  Floats v;

  static Vec zero() { return {Floats{0, 0, 0, 0}}; }
  static Vec set(float x) { return {Floats{x, x, x, x}}; }
  static Vec load(const float* p) {
    Vec a;
    memcpy(&a.v, p, sizeof(a.v));
    return a;
  }
  static void store(float* p, Vec a) { memcpy(p, &a.v, sizeof(a.v)); }

  // The first n of kLanes elements; n may be outside of [0, kLanes].
  static Vec load_first(const float* p, int64_t n) {
    if (n >= kLanes) return load(p);
    Vec a = zero();
    if (n > 0) memcpy(&a.v, p, n * sizeof(float));
    return a;
  }
  static void store_first(float* p, Vec a, int64_t n) {
    if (n > 0) memcpy(p, &a.v, (n >= kLanes ? kLanes : n) * sizeof(float));
  }

  static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static float widen_one(Half h) {
    const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = static_cast<uint32_t>(h.bits & 0x7fff) << 13;
    if ((h.bits & 0x7c00) == 0x7c00) return from_bits(sign | 0x7f800000 | rest);
    const float magnitude = from_bits(rest) * 0x1p112f;
    return sign ? -magnitude : magnitude;
  }
  static float widen_one(BFloat16 h) { return from_bits(static_cast<uint32_t>(h.bits) << 16); }
  static Vec widen(const float* p) { return load(p); }
  template <class Element>
  static Vec widen(const Element* p) {
    return {Floats{widen_one(p[0]), widen_one(p[1]), widen_one(p[2]), widen_one(p[3])}};
  }

  static Vec add(Vec a, Vec b) { return {a.v + b.v}; }
  static Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
  static Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec fms(Vec a, Vec b, Vec c) { return {a.v * b.v - c.v}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
  static Vec max_or_second(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }  // b where either is NaN
  static Vec min_or_nan(Vec a, float b) { return {set(b).v < a.v ? set(b).v : a.v}; }
  static Vec round(Vec a) { return sub(add(a, set(12582912.f)), set(12582912.f)); }  // 1.5 * 2^23; good for |a| < 2^22
  // a * 2^n for a in [0.7, 1.5], -126 <= n <= 129, in two steps because 2^n alone may overflow.
  static Vec scale_pow2(Vec a, Vec n) {
    const Ints whole = to_ints(n), half = whole >> 1;
    return {a.v * pow2(half) * pow2(whole - half)};
  }
  // round() left the integer in the low mantissa bits of n + 1.5 * 2^23.
  static Ints to_ints(Vec n) {
    const Vec shifted = add(n, set(12582912.f));
    Ints bits;
    memcpy(&bits, &shifted.v, sizeof(bits));
    return bits - 0x4b400000;
  }
  static Floats pow2(Ints n) {
    const Ints bits = (n + 127) << 23;
    Floats x;
    memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

  static Mask at_least(Vec a, float b) { return {~(a.v < set(b).v)}; }  // true for NaN
  static Mask visible(const int32_t* position, int32_t limit) {
    Ints positions;
    memcpy(&positions, position, sizeof(positions));
    return {positions <= limit};
  }
  static Vec select(Mask m, Vec a) { return {m.bits ? a.v : zero().v}; }  // 0 where not m
  static Vec blend(Mask m, Vec a, Vec b) { return {m.bits ? a.v : b.v}; }

  // out[d * step + u] = r_u[d]
  static void store_transposed(Vec r0, Vec r1, Vec r2, Vec r3, float* out, int64_t step) {
    for (int d = 0; d < kLanes; ++d) store(out + d * step, {Floats{r0.v[d], r1.v[d], r2.v[d], r3.v[d]}});
  }
};

}  // namespace

const Kernels kPortable = {"portable", SimdKernels<Vec>::slice_forward, SimdKernels<Vec>::gradient, SimdKernels<Vec>::row_lse};

}  // namespace cdistill
