// Memory that a call fills: large pages where the system grants them, zeros by all threads.
#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cdistill {

void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // it may refuse
#endif
}

void fill_with_zeros(void* data, int64_t bytes, int threads) {
  constexpr int64_t kBlock = 1 << 20;
  advise_large_pages(data, bytes);
  parallel_for((bytes + kBlock - 1) / kBlock, threads, [&](int64_t block, int) {
    std::memset(static_cast<char*>(data) + block * kBlock, 0, std::min(kBlock, bytes - block * kBlock));
  });
}

}  // namespace cdistill
