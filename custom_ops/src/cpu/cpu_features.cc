#include "bivlm/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bivlm {
#if defined(__x86_64__)
namespace {

// Intel SDM volume 2A, CPUID, leaf 7, subleaf 1.
bool HasAvxVnni() {
  unsigned last_subleaf = 0;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &last_subleaf, &b, &c, &d) == 0 || last_subleaf < 1) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

#if defined(__linux__)
// Intel SDM volume 2A, CPUID, leaf 7, and volume 1, 13.3; Linux, Documentation/arch/x86/xstate.rst.
bool HasAmxInt8() {
  constexpr unsigned kTileAndInt8 = 3U << 24;
  constexpr unsigned kTileState = 3U << 17;  // of XCR0
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kTileAndInt8) != kTileAndInt8) return false;
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool HasAmxInt8() { return false; }
#endif

// Intel SDM volume 2A, CPUID, leaf 4; AMD64 manual volume 3, E.4.15, which has the same fields.
std::size_t DataCacheBytes(unsigned leaf) {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned kMostCaches = 16;
  for (unsigned index = 0; index < kMostCaches; ++index) {
    if (__get_cpuid_count(leaf, index, &a, &b, &c, &d) == 0) break;
    const unsigned kind = a & 31;
    const unsigned level = a >> 5 & 7;
    if (kind == 0) break;
    if (kind != 1 || level != 1) continue;
    const std::size_t line = (b & 4095) + 1;
    const std::size_t partitions = (b >> 12 & 1023) + 1;
    const std::size_t ways = (b >> 22) + 1;
    return line * partitions * ways * (std::size_t{c} + 1);
  }
  return 0;
}

}  // namespace
#endif

static IsaSet FindIsa() {
  IsaSet supported = isa::kNone;
#if defined(__x86_64__)
  // The builtin also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    supported |= isa::kAvx2;
    if (HasAvxVnni()) supported |= isa::kAvxVnni;  // the same registers, so they are switched on
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    supported |= isa::kAvx512;
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni")) {
      supported |= isa::kVbmiGfni;
    }
    if (HasAmxInt8()) supported |= isa::kAmxInt8;
  }
#endif
#if defined(__aarch64__)
  supported |= isa::kNeon;
#if defined(__linux__)
  // Linux, Documentation/arch/arm64/elf_hwcaps.rst.
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) supported |= isa::kDotProd;
  if ((getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0) supported |= isa::kI8mm;
#endif
#endif
  return supported;
}

IsaSet SupportedIsa() {
  static const IsaSet supported = FindIsa();
  return supported;
}

static std::size_t FindL1DataBytes() {
#if defined(__x86_64__)
  constexpr unsigned kIntel = 4;
  constexpr unsigned kAmd = 0x8000001D;
  const std::size_t bytes = DataCacheBytes(kAmd);
  return bytes != 0 ? bytes : DataCacheBytes(kIntel);
#else
  return 0;
#endif
}

std::size_t L1DataBytes() {
  static const std::size_t bytes = FindL1DataBytes();
  return bytes;
}

bool HasSmallL1() { return L1DataBytes() != 0 && L1DataBytes() < 48 << 10; }

}  // namespace bivlm
