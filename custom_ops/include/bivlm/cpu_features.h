// The instruction sets that kernels ask for, as a set of bits.
#ifndef BIVLM_CPU_FEATURES_H_
#define BIVLM_CPU_FEATURES_H_

#include <cstddef>
#include <cstdint>

namespace bivlm {

using IsaSet = uint32_t;

namespace isa {
inline constexpr IsaSet kNone = 0;
inline constexpr IsaSet kAvx2 = 1U << 0;      // AVX2, FMA and F16C
inline constexpr IsaSet kAvx512 = 1U << 1;    // AVX-512 F, BW, DQ, VL and VNNI
inline constexpr IsaSet kAvxVnni = 1U << 2;   // VNNI of 256-bit vectors without AVX-512
inline constexpr IsaSet kAmxInt8 = 1U << 3;   // AMX tiles and their int8 products
inline constexpr IsaSet kVbmiGfni = 1U << 4;  // AVX-512 VBMI and GFNI
inline constexpr IsaSet kNeon = 1U << 5;      // Advanced SIMD of ARMv8.0
inline constexpr IsaSet kDotProd = 1U << 6;   // its int8 dot products (ARMv8.2)
inline constexpr IsaSet kI8mm = 1U << 7;      // its int8 matrix products (ARMv8.6)
}  // namespace isa

// What this CPU has and its operating system has switched on. The first call asks Linux for the
// tile registers of AMX, which it gives to processes that ask; with other systems AMX is not used,
// nor are the int8 products of ARM.
IsaSet SupportedIsa();

// Bytes of a core's first data cache; 0 where CPUID does not say, and on ARM.
std::size_t L1DataBytes();

// Whether that is known and less than 48 KiB. On Zen 4 (32 KiB) fewer misses of L1 are on their way
// at a time than memory needs, so that kernels fetch what comes later into L2. On Zen 5 (48 KiB)
// fetching straight into L1 is a twelfth faster.
bool HasSmallL1();

}  // namespace bivlm

#endif  // BIVLM_CPU_FEATURES_H_
