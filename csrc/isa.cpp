// Chooses the kernels for this processor.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace cdistill {

const Kernels& select_kernels() {
  struct Choice {
    const Kernels* kernels;
    bool supported;
  };
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("fma");
#endif
  const Choice choices[] = {
#if defined(__x86_64__)
      {&kAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
      {&kAvx512, avx512},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kPortable, true},
  };
  const char* wanted = std::getenv("CDISTILL_CPU_ISA");
  std::string supported;
  for (const Choice& choice : choices) {
    if (!choice.supported) continue;
    if (!wanted || std::string(wanted) == choice.kernels->name) return *choice.kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  throw std::invalid_argument("CDISTILL_CPU_ISA=" + std::string(wanted) +
                              " is not one of those this processor supports: " + supported);
}

}  // namespace cdistill
