// GroupMatMul with AVX-512 VNNI: codes as they are times int8 activations.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include "avx512/vectors_avx512.h"
#include "group_products.h"
#include "int8_rows.h"

namespace bivlm {
namespace {

struct Avx512 : Vectors {
  static constexpr std::size_t kStreams = 4;
  typedef int32_t Ints __attribute__((vector_size(64)));

  template <std::size_t bits>
  struct Levels {
    __m512i low;   // at 8 bits the codes
    __m512i high;  // at 4 bits
  };

  template <std::size_t bits>
  static Levels<bits> Load(const uint8_t* codes) {
    const __m512i bytes = _mm512_loadu_si512(codes);
    if constexpr (bits == 8) return {bytes, bytes};
    const __m512i mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
  }

  template <std::size_t bits>
  static Ints Dot(const Levels<bits>& levels, const int8_t* const (&q)[2], Ints start) {
    const __m512i low = _mm512_dpbusd_epi32((__m512i)start, levels.low, _mm512_loadu_si512(q[0]));
    if constexpr (bits == 8) return (Ints)low;
    return (Ints)_mm512_dpbusd_epi32(low, levels.high, _mm512_loadu_si512(q[1]));
  }

  static Vec ToFloats(Ints v) { return _mm512_cvtepi32_ps((__m512i)v); }
  static Vec MultiplyAdd(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  static void Sum(Vec a, Vec b, Vec c, Vec d, float* sums) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 quarters =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }

  template <std::size_t lanes>
  static Vec Spread(const float* scales) {
    if constexpr (lanes == 16) return _mm512_set1_ps(*scales);
    // no more floats than it needs: a load that reaches into two stores waits for both
    __m512 all;
    if constexpr (lanes == 8) {
      all = _mm512_castps128_ps512(
          _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales))));
    } else if constexpr (lanes == 4) {
      all = _mm512_castps128_ps512(_mm_loadu_ps(scales));
    } else {
      all = _mm512_castps256_ps512(_mm256_loadu_ps(scales));
    }
    const Bits number = Lanes() / static_cast<uint32_t>(lanes);
    return _mm512_permutexvar_ps((__m512i)number, all);
  }
};

}  // namespace

const GroupMatMulFunctions GroupMatMulAvx512 = {1U << 21, PrepareInt8Avx512,
                                                MultiplyGroups<Avx512>};

}  // namespace bivlm
