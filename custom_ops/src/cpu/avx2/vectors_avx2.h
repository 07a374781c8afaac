// Vectors of eight floats for the headers of src/cpu that take any, on AVX2, FMA and F16C.
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
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(32)));
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

  // kLanes / 2 of them.
  static Doubles ToDoubles(const float* floats) { return _mm256_cvtps_pd(_mm_loadu_ps(floats)); }

  static Vec ToFloats(Ints v) { return _mm256_cvtepi32_ps((__m256i)v); }
  static Ints Round(Vec v) { return (Ints)_mm256_cvtps_epi32(v); }
  static Vec MultiplyAdd(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Vec MultiplyAdd(Vec a, float b, Vec sum) {
    return _mm256_fmadd_ps(a, _mm256_set1_ps(b), sum);
  }

  static uint32_t Largest(Bits v) {
    const __m256i all = (__m256i)v;
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }

  static int32_t Sum(Ints v) {
    const __m256i all = (__m256i)v;
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
    return _mm_cvtsi128_si32(s);
  }

  // The numbers of v, -128 to 127, as 4 kLanes bytes.
  static void SaveBytes(const Ints (&v)[4], int8_t* bytes) {
    // The packs work inside 128-bit halves; the permutation puts the groups of four in order.
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]),
                                              _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]));
    const __m256i ordered =
        _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), ordered);
  }

  // Lane i: floats[columns[i]]; columns at any address.
  static Vec Gather(const float* floats, const uint8_t* columns) {
    const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
    return _mm256_i32gather_ps(floats, _mm256_cvtepu16_epi32(at), sizeof(float));
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_VECTORS_AVX2_H_
