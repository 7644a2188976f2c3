// AVX2 + FMA kernels: 8 lanes, 16 registers, score tile 6 x 16.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_kernels.h"

namespace cdistill {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kScoreRows = 6, kScoreVectors = 2;
  static constexpr int kUpdateRows = 6, kUpdateVectors = 2;
  struct Mask { __m256 bits; };
  struct Half { uint16_t bits; };
  struct BFloat16 { uint16_t bits; };

  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }

  // The first n of kLanes elements; n may be outside of [0, kLanes].
  static __m256i first(int64_t n) {
    const int count = n >= kLanes ? kLanes : n <= 0 ? 0 : static_cast<int>(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load_first(const float* p, int64_t n) { return n >= kLanes ? load(p) : Vec{_mm256_maskload_ps(p, first(n))}; }
  static void store_first(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }

  static Vec widen(const float* p) { return load(p); }
  static Vec widen(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec widen(const BFloat16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  }

  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
  static Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }    // a * b - c
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
  static Vec max_or_second(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }        // b where either is NaN
  static Vec min_or_nan(Vec a, float b) { return {_mm256_min_ps(_mm256_set1_ps(b), a.v)}; }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // Adds n to the exponent of a, a in [0.7, 1.5], -126 <= n <= 129; inf where that overflows.
  static Vec scale_pow2(Vec a, Vec n) {
    const __m256i shifted = _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23));
    const __m256i largest = _mm256_set1_epi32(0x7f7fffff);
    const __m256i finite_input = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q));
    const __m256i overflow = _mm256_and_si256(_mm256_cmpgt_epi32(shifted, largest), finite_input);
    return {_mm256_blendv_ps(_mm256_castsi256_ps(shifted), _mm256_set1_ps(__builtin_inff()), _mm256_castsi256_ps(overflow))};
  }
  static float sum(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }

  static Mask at_least(Vec a, float b) { return {_mm256_cmp_ps(a.v, _mm256_set1_ps(b), _CMP_NLT_UQ)}; }  // true for NaN
  static Mask visible(const int32_t* position, int32_t limit) {
    const __m256i positions = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(limit + 1), positions))};
  }
  static Vec select(Mask m, Vec a) { return {_mm256_and_ps(m.bits, a.v)}; }  // 0 where not m
  static Vec blend(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.bits)}; }

  // out[d * step + u] = r_u[d]: transposes within the 128-bit halves, then stores every half.
  static void store_transposed(Vec r0, Vec r1, Vec r2, Vec r3, float* out, int64_t step) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0.v, r1.v)), b = _mm256_castps_pd(_mm256_unpacklo_ps(r2.v, r3.v));
    const __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(r0.v, r1.v)), d = _mm256_castps_pd(_mm256_unpackhi_ps(r2.v, r3.v));
    store_halves(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), out, step);
    store_halves(_mm256_castpd_ps(_mm256_unpackhi_pd(a, b)), out + step, step);
    store_halves(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), out + 2 * step, step);
    store_halves(_mm256_castpd_ps(_mm256_unpackhi_pd(c, d)), out + 3 * step, step);
  }
  static void store_halves(__m256 x, float* out, int64_t step) {
    _mm_storeu_ps(out, _mm256_castps256_ps128(x));
    _mm_storeu_ps(out + 4 * step, _mm256_extractf128_ps(x, 1));
  }
};

}  // namespace

const Kernels kAvx2 = {"avx2", SimdKernels<Vec>::slice_forward, SimdKernels<Vec>::gradient, SimdKernels<Vec>::row_lse};

}  // namespace cdistill

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
