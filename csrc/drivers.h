// Multi-threaded entry points over whole problems; results do not depend on `threads`.
#pragma once

#include "kernels.h"

namespace cdistill {

void slice_forward(const Kernels&, const Problem&, const float* lse, float* out, bool each, int threads);
void gradient(const Kernels&, const Problem&, const Gradient&, int threads);
void row_lse(const Kernels&, const Problem&, float* lse, int threads);

}  // namespace cdistill
