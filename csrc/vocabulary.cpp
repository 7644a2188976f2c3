// Hands rows of logits to threads.
#include "drivers.h"
#include "parallel.h"

namespace cdistill {

void vocabulary_rows(const Kernels& kernels, const VocabularyRows& x, int threads) {
  parallel_for(x.n_rows, threads, [&](int64_t row, int) { kernels.vocabulary_row(x, row); });
}

}  // namespace cdistill
