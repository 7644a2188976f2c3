// Kernels for any processor: 4 lanes (SSE2, NEON, ...), 16 registers.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cdistill {
namespace {
constexpr int kLanes = 4, kRegisterRows = 4, kRegisterVectors = 2;
}  // namespace
}  // namespace cdistill

#include "simd_kernels.h"
#include "simd_vocabulary.h"

namespace cdistill {
const Kernels kPortable = {"portable", slice_forward_part, gradient_part, row_lse_part, vocabulary_row};
}  // namespace cdistill
