// How many multiply-adds a second this processor can do: twelve independent chains of one instruction, which hide its
// latency. Built and called by _cpu.py.
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kChains = 12;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// NAME(steps): seconds for steps * kChains instructions. The chains stay in registers and are read at the end.
#define CDISTILL_PEAK(NAME, TARGET, VEC, ZERO, STEP)                          \
  extern "C" __attribute__((target(TARGET))) double NAME(long steps) {        \
    const float seed[] = {0.999f, 1e-9f};                                     \
    const volatile float* read = seed;                                        \
    const VEC a = ZERO + read[0], b = ZERO + read[1];                         \
    VEC x[kChains];                                                           \
    for (int i = 0; i < kChains; ++i) x[i] = ZERO;                            \
    const auto start = std::chrono::steady_clock::now();                      \
    for (long step = 0; step < steps; ++step) {                               \
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) x[i] = STEP; \
    }                                                                         \
    const double taken = seconds_since(start);                                \
    VEC sum = ZERO;                                                           \
    for (int i = 0; i < kChains; ++i) sum += x[i];                            \
    volatile float used = sum[0];                                             \
    (void)used;                                                               \
    return taken;                                                             \
  }

#if defined(__x86_64__)
CDISTILL_PEAK(peak_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), x[i] * a + b)
CDISTILL_PEAK(peak_avx512, "avx512f", __m512, _mm512_setzero_ps(), x[i] * a + b)
CDISTILL_PEAK(peak_avx512_bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
              _mm512_dpbf16_ps(x[i], (__m512bh)a, (__m512bh)b))
#endif
