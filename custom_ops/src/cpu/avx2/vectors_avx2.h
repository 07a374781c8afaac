// Vectors of eight floats for vector_math.h, on AVX2, FMA and F16C.
#ifndef BIVLM_CPU_VECTORS_AVX2_H_
#define BIVLM_CPU_VECTORS_AVX2_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "bivlm/float16.h"

namespace bivlm {
namespace {

struct Vectors {
  typedef float Vec __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  static constexpr std::size_t kLanes = 8;

  static Bits Lanes() { return Bits{0, 1, 2, 3, 4, 5, 6, 7}; }

  template <std::size_t h>
  static Vec Swap(Vec v) {
    if constexpr (h == 1) return _mm256_permute_ps(v, 0xB1);
    if constexpr (h == 2) return _mm256_permute_ps(v, 0x4E);
    return _mm256_permute2f128_ps(v, v, 0x01);
  }

  static Vec Widen(const uint16_t* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  }

  static void FromHalves(const uint16_t* halves, std::size_t count, float* floats) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      _mm256_storeu_ps(floats + i, Widen(halves + i));
    }
    for (; i < count; ++i) floats[i] = FloatFromHalf(halves[i]);
  }

  static void ToHalves(const float* floats, std::size_t count, uint16_t* halves) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const __m128i part = _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), part);
    }
    for (; i < count; ++i) halves[i] = HalfFromFloat(floats[i]);
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_VECTORS_AVX2_H_
