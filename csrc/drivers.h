// Multi-threaded entry points over whole problems; results do not depend on `threads`.
#pragma once

#include <string>

#include "kernels.h"

namespace cdistill {

// The keys of a problem are the columns of its slice (n_keys == n_cols), whatever else a call visits.
void slice_forward(const Kernels&, Problem, const float* lse, float* out, bool each, int threads);
void slice_forward_with_lse(const Kernels&, Problem, float* lse, float* out, bool each, int threads);
void row_lse(const Kernels&, Problem, float* lse, int threads);  // of all keys
void gradient(const Kernels&, Problem, Gradient, int threads);
void fill_with_zeros(void* data, int64_t bytes, int threads);
void vocabulary_rows(const Kernels&, const VocabularyRows&, int threads);

enum class Loss : int;  // its losses are listed in alignment.cpp
enum class Reduction { kRow, kMatrix, kColumn };

// Both throw std::invalid_argument for a name that they do not know.
Loss loss_named(const std::string&);
Reduction reduction_named(const std::string&);

// Distance of the slices a from target, both (samples, n_rows, n_cols), over valid rows and columns.
struct Alignment {
  const float* a;
  const float* target;
  const uint8_t* row_valid;  // (samples, n_rows)
  const uint8_t* col_valid;  // (samples, n_cols)
  int64_t samples, n_rows, n_cols;
  Loss loss;
  Reduction reduction;
  bool sink_filter;
};

void alignment_loss(const Alignment&, float* losses, int threads);  // (samples,)
void alignment_grad(const Alignment&, const float* grad_out, float* grad, int threads);  // like a

}  // namespace cdistill
