// AVX2 + FMA kernels: 8 lanes, 16 registers.
#if defined(__x86_64__)

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace cdistill {
namespace {
constexpr int kLanes = 8, kRegisterRows = 6, kRegisterVectors = 2;
constexpr bool kDotPairs = false;
}  // namespace
}  // namespace cdistill

#include "simd_attention.h"
#include "simd_gradient.h"
#include "simd_vocabulary.h"

namespace cdistill {
const Kernels kAvx2 = {"avx2", kDotPairs, slice_forward, slice_forward_with_lse,
                          gradient, row_lse, has_subnormal, vocabulary_row};
}  // namespace cdistill

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
