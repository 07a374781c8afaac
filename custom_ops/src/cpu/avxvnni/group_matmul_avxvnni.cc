// GroupMatMul with AVX-VNNI: codes as they are times int8 activations, with 256-bit vectors.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__) || !defined(__AVXVNNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avxvnni kernels"
#endif

#include "avx2/group_lanes_avx2.h"
#include "int8_rows.h"

namespace bivlm {
namespace {

struct AvxVnni : GroupLanesAvx2 {
  template <std::size_t bits>
  struct Levels {
    __m256i low;   // at 8 bits the codes
    __m256i high;  // at 4 bits
  };

  template <std::size_t bits>
  static Levels<bits> Load(const uint8_t* codes) {
    const __m256i bytes = LoadBytes(codes);
    if constexpr (bits == 8) return {bytes, bytes};
    return {LowCodes(bytes), HighCodes(bytes)};
  }

  template <std::size_t bits>
  static Ints Dot(const Levels<bits>& levels, const int8_t* const (&q)[2], Ints start) {
    const __m256i low = _mm256_dpbusd_avx_epi32((__m256i)start, levels.low, LoadBytes(q[0]));
    if constexpr (bits == 8) return (Ints)low;
    return (Ints)_mm256_dpbusd_avx_epi32(low, levels.high, LoadBytes(q[1]));
  }
};

}  // namespace

const GroupMatMulFunctions GroupMatMulAvxVnni = {1U << 18, PrepareInt8Avx2,
                                                 MultiplyGroups<AvxVnni>};

}  // namespace bivlm
