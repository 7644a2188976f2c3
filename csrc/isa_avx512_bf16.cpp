// AVX-512 (F, DQ, VL, BW) kernels with the dot products of AVX512-BF16: 16 lanes, 32 registers.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma")
#endif

namespace cdistill {
namespace {
constexpr int kLanes = 16, kRegisterRows = 6, kRegisterVectors = 4;
constexpr bool kDotPairs = true;
}  // namespace
}  // namespace cdistill

#include "simd_tiles.h"

namespace cdistill {
namespace {
template <>
inline __attribute__((always_inline)) Vec dot_pairs<true>(Vec sum, Vec a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
}  // namespace
}  // namespace cdistill

#include "simd_attention.h"
#include "simd_gradient.h"
#include "simd_vocabulary.h"

namespace cdistill {
const Kernels kAvx512Bf16 = {"avx512_bf16", kDotPairs, slice_forward, slice_forward_with_lse,
                          gradient, row_lse, has_subnormal, vocabulary_row};
}  // namespace cdistill

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
