// Vectors of sixteen floats for vector_math.h, on AVX-512.
#ifndef BIVLM_CPU_VECTORS_AVX512_H_
#define BIVLM_CPU_VECTORS_AVX512_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "bivlm/float16.h"

namespace bivlm {
namespace {

struct Vectors {
  typedef float Vec __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  static constexpr std::size_t kLanes = 16;

  static Bits Lanes() { return Bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

  template <std::size_t h>
  static Vec Swap(Vec v) {
    if constexpr (h == 1) return _mm512_permute_ps(v, 0xB1);
    if constexpr (h == 2) return _mm512_permute_ps(v, 0x4E);
    if constexpr (h == 4) return _mm512_shuffle_f32x4(v, v, 0xB1);
    return _mm512_shuffle_f32x4(v, v, 0x4E);
  }

  static Vec Widen(const uint16_t* halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
  }

  static void FromHalves(const uint16_t* halves, std::size_t count, float* floats) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      const __mmask16 mask = Mask(count - i);
      _mm512_mask_storeu_ps(floats + i, mask,
                            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves + i)));
    }
  }

  static void ToHalves(const float* floats, std::size_t count, uint16_t* halves) {
    for (std::size_t i = 0; i < count; i += kLanes) {
      const __mmask16 mask = Mask(count - i);
      const __m512 part = _mm512_maskz_loadu_ps(mask, floats + i);
      _mm256_mask_storeu_epi16(halves + i, mask, _mm512_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
  }

  static __mmask16 Mask(std::size_t left) {
    return static_cast<__mmask16>(left >= kLanes ? 0xFFFFU : (1U << left) - 1U);
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_VECTORS_AVX512_H_
