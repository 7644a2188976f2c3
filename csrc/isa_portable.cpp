// Kernels for any processor: 4 lanes (SSE2, NEON, ...), 16 registers.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cdistill {
namespace {
constexpr int kLanes = 4, kRegisterRows = 4, kRegisterVectors = 2;
constexpr bool kDotPairs = false;
}  // namespace
}  // namespace cdistill

#include "simd_attention.h"
#include "simd_gradient.h"
#include "simd_vocabulary.h"

namespace cdistill {
const Kernels kPortable = {"portable", kDotPairs, slice_forward, slice_forward_with_lse,
                          gradient, row_lse, has_subnormal, vocabulary_row};
}  // namespace cdistill
