// AVX-512 (F, DQ, VL, BW) kernels: 16 lanes, 32 registers.
#if defined(__x86_64__)

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif

namespace cdistill {
namespace {
constexpr int kLanes = 16, kRegisterRows = 6, kRegisterVectors = 4;
constexpr bool kDotPairs = false;
}  // namespace
}  // namespace cdistill

#include "simd_attention.h"
#include "simd_gradient.h"
#include "simd_vocabulary.h"

namespace cdistill {
const Kernels kAvx512 = {"avx512", kDotPairs, slice_forward, slice_forward_with_lse,
                          gradient, row_lse, has_subnormal, vocabulary_row};
}  // namespace cdistill

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
