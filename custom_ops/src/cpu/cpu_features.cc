#include "bivlm/cpu_features.h"

namespace bivlm {

IsaSet SupportedIsa() {
  IsaSet supported = isa::kNone;
#if defined(__x86_64__)
  // The builtin also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    supported |= isa::kAvx2;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    supported |= isa::kAvx512;
  }
#endif
  return supported;
}

}  // namespace bivlm
