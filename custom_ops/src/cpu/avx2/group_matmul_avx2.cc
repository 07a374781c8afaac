// GroupMatMul with AVX2: vpmaddubsw, whose 16-bit sums of two products saturate.
//
// At 4 bits two products are 2 * 15 * 127 at most, and both halves of a byte fit. Codes of 8 bits
// do not: their levels, -128 to 127, are multiplied by magnitude, with the sign moved to q. Two
// products are then 2 * 128 * 127 = 32512 at most.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include "avx2/group_lanes_avx2.h"
#include "int8_rows.h"

namespace bivlm {
namespace {

struct Avx2 : GroupLanesAvx2 {
  template <std::size_t bits>
  struct Levels {
    __m256i first;   // 8 bits: magnitudes of levels; 4 bits: codes of even columns
    __m256i second;  // 8 bits: levels; 4 bits: codes of odd columns
  };

  template <std::size_t bits>
  static Levels<bits> Load(const uint8_t* codes) {
    const __m256i bytes = LoadBytes(codes);
    if constexpr (bits == 4) return {LowCodes(bytes), HighCodes(bytes)};
    const __m256i levels = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    return {_mm256_abs_epi8(levels), levels};
  }

  template <std::size_t bits>
  static Ints Dot(const Levels<bits>& levels, const int8_t* const (&q)[2], Ints start) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i low = LoadBytes(q[0]);
    if constexpr (bits == 8) {
      const __m256i pairs =
          _mm256_maddubs_epi16(levels.first, _mm256_sign_epi8(low, levels.second));
      return (Ints)_mm256_madd_epi16(pairs, ones);
    }
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(levels.first, low),
                                           _mm256_maddubs_epi16(levels.second, LoadBytes(q[1])));
    return start + (Ints)_mm256_madd_epi16(pairs, ones);
  }
};

}  // namespace

const GroupMatMulFunctions GroupMatMulAvx2 = {1U << 17, PrepareInt8Avx2, MultiplyGroups<Avx2>};

}  // namespace bivlm
