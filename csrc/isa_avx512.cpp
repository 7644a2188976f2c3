// AVX-512 (F, DQ, VL, BW) kernels: 16 lanes, 32 registers, score tile 8 x 48.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c")
#endif

#include "simd_kernels.h"

namespace cdistill {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kScoreRows = 8, kScoreVectors = 3;
  static constexpr int kUpdateRows = 6, kUpdateVectors = 4;
  using Mask = __mmask16;
  struct Half { uint16_t bits; };
  struct BFloat16 { uint16_t bits; };

  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }

  // The first n of kLanes elements; n may be outside of [0, kLanes].
  static Mask first(int64_t n) { return n >= kLanes ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  static Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static void store_first(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

  static Vec widen(const float* p) { return load(p); }
  static Vec widen(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec widen(const BFloat16* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  }

  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
  static Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a * b - c
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
  static Vec max_or_second(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }        // b where either is NaN
  static Vec min_or_nan(Vec a, float b) { return {_mm512_min_ps(_mm512_set1_ps(b), a.v)}; }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec scale_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

  static Mask at_least(Vec a, float b) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(b), _CMP_NLT_UQ); }  // true for NaN
  static Mask visible(const int32_t* position, int32_t limit) {
    return _mm512_cmple_epi32_mask(_mm512_loadu_si512(position), _mm512_set1_epi32(limit));
  }
  static Vec select(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m, a.v)}; }  // 0 where not m
  static Vec blend(Mask m, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.v, m, a.v)}; }

  // out[d * step + u] = r_u[d]: transposes within the 128-bit quarters, then stores every quarter.
  static void store_transposed(Vec r0, Vec r1, Vec r2, Vec r3, float* out, int64_t step) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r0.v, r1.v)), b = _mm512_castps_pd(_mm512_unpacklo_ps(r2.v, r3.v));
    const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(r0.v, r1.v)), d = _mm512_castps_pd(_mm512_unpackhi_ps(r2.v, r3.v));
    store_quarters(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), out, step);
    store_quarters(_mm512_castpd_ps(_mm512_unpackhi_pd(a, b)), out + step, step);
    store_quarters(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), out + 2 * step, step);
    store_quarters(_mm512_castpd_ps(_mm512_unpackhi_pd(c, d)), out + 3 * step, step);
  }
  static void store_quarters(__m512 x, float* out, int64_t step) {
    _mm_storeu_ps(out, _mm512_castps512_ps128(x));
    _mm_storeu_ps(out + 4 * step, _mm512_extractf32x4_ps(x, 1));
    _mm_storeu_ps(out + 8 * step, _mm512_extractf32x4_ps(x, 2));
    _mm_storeu_ps(out + 12 * step, _mm512_extractf32x4_ps(x, 3));
  }
};

}  // namespace

const Kernels kAvx512 = {"avx512", SimdKernels<Vec>::slice_forward, SimdKernels<Vec>::gradient, SimdKernels<Vec>::row_lse};

}  // namespace cdistill

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
