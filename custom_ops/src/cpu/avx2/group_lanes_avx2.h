// What the 256-bit kernels of GroupMatMul (avx2 and avxvnni) share beside group_products.h.
#ifndef BIVLM_CPU_AVX2_GROUP_LANES_AVX2_H_
#define BIVLM_CPU_AVX2_GROUP_LANES_AVX2_H_

#include "avx2/vectors_avx2.h"
#include "group_products.h"

namespace bivlm {
namespace {

struct GroupLanesAvx2 : Vectors {
  static constexpr std::size_t kStreams = 1;
  static __m256i LoadBytes(const void* bytes) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
  }
  // Codes of 4 bits: the even columns, and the odd ones.
  static __m256i LowCodes(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static __m256i HighCodes(__m256i bytes) { return LowCodes(_mm256_srli_epi16(bytes, 4)); }

  static void Sum(Vec a, Vec b, Vec c, Vec d, float* sums) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(sums,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }

  template <std::size_t lanes>
  static Vec Spread(const float* scales) {
    if constexpr (lanes >= kLanes) return _mm256_set1_ps(*scales);
    // no more floats than it needs: a load that reaches into two stores waits for both
    __m128 some;
    if constexpr (lanes == 4) {
      some = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
    } else {
      some = _mm_loadu_ps(scales);
    }
    const __m256 all = _mm256_castps128_ps256(some);
    const Bits number = Lanes() / static_cast<uint32_t>(lanes);
    return _mm256_permutevar8x32_ps(all, (__m256i)number);
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_AVX2_GROUP_LANES_AVX2_H_
