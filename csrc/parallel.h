// A deterministic parallel loop: which thread runs an index never matters, because every index has its own output.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace cdistill {

inline int team_size(int64_t n, int threads) {
  return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n, 1)));
}

// Calls work(index, thread) for index < n, thread < team_size(n, threads). The work must not throw.
template <class Work>
void parallel_for(int64_t n, int threads, Work work) {
  const int team = team_size(n, threads);
  if (team == 1) {
    for (int64_t index = 0; index < n; ++index) work(index, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t index = 0; index < n; ++index) {
#if defined(_OPENMP)
    work(index, omp_get_thread_num());
#else
    work(index, 0);
#endif
  }
}

}  // namespace cdistill
