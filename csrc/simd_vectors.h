// Vectors of kLanes floats in the compiler's vector types, and their elementary functions. Include it only from
// isa_*.cpp, after the target pragma and the constant kLanes: everything here is compiled for that instruction set, so
// it has internal linkage and calls no inline function of another header.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cdistill {
namespace {

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

constexpr float kLowest = -3.402823466e38f;
constexpr float kInfinity = __builtin_inff();

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class V>
inline V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

// The first n lanes, at most all of them; zero in the others.
inline Vec load_first(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  Vec v = {};
  if (n > 0) memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void store_first(float* p, Vec v, int64_t n) {
  if (n >= kLanes) store(p, v);
  else if (n > 0) memcpy(p, &v, n * sizeof(float));
}

inline float lane_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// x itself, as a value that compilers cannot contract with what follows: score * scale - max must be exactly 0 at the
// maximum, or the error of a large product goes into the exponent.
inline Vec rounded(Vec x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// fp16 bits in the low half of every lane to fp32.
inline Vec widen_half(BitVec h) {
  const BitVec sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  const BitVec finite = (BitVec)((Vec)rest * 0x1p112f);
  return (Vec)(sign | ((h & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : finite));
}

// fp32 to fp16 bits, to nearest even.
inline BitVec narrow_half(Vec x) {
  const BitVec bits = (BitVec)x, sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  // 0.5 has the spacing of fp16's subnormal numbers: adding it rounds to one of them.
  const BitVec subnormal = (BitVec)((Vec)rest + 0.5f) - 0x3f000000u;
  const BitVec normal = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  const BitVec finite = rest < 0x38800000u ? subnormal : normal;
  const BitVec large = rest > 0x7f800000u ? BitVec{} + 0x7e00u : BitVec{} + 0x7c00u;
  return sign | (rest < 0x47800000u ? finite : large);
}

// fp32 to bf16 bits, to nearest even.
inline BitVec narrow_bfloat16(Vec x) {
  const BitVec bits = (BitVec)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded;
}

// e^x to about 1 ulp, or half the spacing of subnormal numbers; inf on overflow, NaN for NaN.
inline Vec exp(Vec x) {
  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low mantissa bits
  const float shift = 12582912.f;
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  Vec f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  Vec p = f * 0.0013814539f + 0.008368745f;
  p = p * f + 0.04166839f;
  p = p * f + 0.16666521f;
  p = p * f + 0.49999994f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  // p * 2^n by adding n to the exponent of p, which stays in range between the two limits: where the result may be
  // subnormal, n + 64 and a product with 2^-64.
  const IntVec faint = x < -86.f;
  const Vec power = (Vec)((BitVec)p + ((BitVec)shifted << 23) + ((BitVec)faint & 64u << 23));
  const Vec lowered = faint ? power * 0x1p-64f : power;
  const Vec finite = x < -103.97208f ? Vec{} : lowered;
  return x < 88.72283f ? finite : x + kInfinity;
}

// Natural logarithm of normal positive numbers to about 1 ulp; inf for inf, NaN for NaN.
inline Vec log(Vec x) {
  const BitVec shifted = (BitVec)x - 0x3f3504f3u;  // sqrt(1/2): the mantissa then lies from there to sqrt(2)
  const Vec exponent = __builtin_convertvector((IntVec)shifted >> 23, Vec);
  const Vec f = (Vec)((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec square = f * f;
  const Vec low = p * f * square + exponent * -2.12194440e-4f - square * 0.5f;
  return x < kInfinity ? f + low + exponent * 0.693359375f : x;
}

}  // namespace
}  // namespace cdistill
