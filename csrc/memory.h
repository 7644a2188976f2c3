// Memory that a call is about to fill.
#pragma once

#include <cstdint>

namespace cdistill {

// Asks for pages of 2 MB within [data, data + bytes): faulting in a gradient by pages of 4 KB takes longer than filling it.
void advise_large_pages(void* data, int64_t bytes);
void fill_with_zeros(void* data, int64_t bytes, int threads);

}  // namespace cdistill
