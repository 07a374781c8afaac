// The transform of activations with AVX-512, which all kernels of these vectors share.
//
// Everything here is in an anonymous namespace for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AVX512_TRANSFORM_AVX512_H_
#define BIVLM_CPU_AVX512_TRANSFORM_AVX512_H_

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bivlm/binary_matmul.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 16;

// u (k_padded) = one row of x, padded with zeros. Fetches the next row: with m = 256 and k = 4096,
// waiting for x was a tenth of the whole product.
inline void LoadRow(const BinaryMatMulArgs& args, std::size_t row, float* u) {
  const std::size_t k = args.weight->k;
  const std::size_t offset = row * k;
  for (std::size_t j = 0; j < args.weight->k_padded; j += kLanes) {
    const std::size_t count = j < k ? std::min(kLanes, k - j) : 0;
    const __mmask16 mask = static_cast<__mmask16>((1U << count) - 1U);
    if (args.type == ElementType::kFloat32) {
      const float* x = static_cast<const float*>(args.x) + offset + j;
      _mm_prefetch(reinterpret_cast<const char*>(x + k), _MM_HINT_T0);
      _mm512_storeu_ps(u + j, count == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, x));
    } else {
      const uint16_t* x = static_cast<const uint16_t*>(args.x) + offset + j;
      _mm_prefetch(reinterpret_cast<const char*>(x + k), _MM_HINT_T0);
      const __m256i half = count == 0 ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(mask, x);
      _mm512_storeu_ps(u + j, _mm512_cvtph_ps(half));
    }
  }
}

// The butterfly between lanes that differ in one bit: `other` holds the partner of each lane of v,
// `minus` the lanes whose bit is set.
inline __m512 Butterfly(__m512 v, __m512 other, __mmask16 minus) {
  return _mm512_mask_sub_ps(_mm512_add_ps(v, other), minus, other, v);
}

inline __m512 HadamardInLanes(__m512 v) {
  v = Butterfly(v, _mm512_permute_ps(v, 0xB1), 0xAAAA);
  v = Butterfly(v, _mm512_permute_ps(v, 0x4E), 0xCCCC);
  v = Butterfly(v, _mm512_shuffle_f32x4(v, v, 0xB1), 0xF0F0);
  return Butterfly(v, _mm512_shuffle_f32x4(v, v, 0x4E), 0xFF00);
}

// u = H diag(signs) u / sqrt(block) for every block.
inline void SignedHadamard(const BinaryMatMulWeight& weight, float* u) {
  const std::size_t block = weight.hadamard_block;
  const float factor = 1.0F / std::sqrt(static_cast<float>(block));
  const __m512 plus = _mm512_set1_ps(factor);
  const __m512 minus = _mm512_set1_ps(-factor);
  for (std::size_t start = 0; start < weight.k_padded; start += block) {
    for (std::size_t j = start; j < start + block; j += kLanes) {
      uint16_t bits = 0xFFFF;
      if (weight.signs != nullptr) std::memcpy(&bits, weight.signs + j / 8, sizeof(bits));
      const __m512 v =
          _mm512_mul_ps(_mm512_loadu_ps(u + j), _mm512_mask_blend_ps(bits, minus, plus));
      _mm512_storeu_ps(u + j, HadamardInLanes(v));
    }
    for (std::size_t half = kLanes; half < block; half *= 2) {
      for (std::size_t j = start; j < start + block; j += 2 * half) {
        for (std::size_t i = j; i < j + half; i += kLanes) {
          const __m512 a = _mm512_loadu_ps(u + i);
          const __m512 b = _mm512_loadu_ps(u + i + half);
          _mm512_storeu_ps(u + i, _mm512_add_ps(a, b));
          _mm512_storeu_ps(u + i + half, _mm512_sub_ps(a, b));
        }
      }
    }
  }
}

// 16 channels of v, from column j on.
inline __m512 Ordered(const BinaryMatMulWeight& weight, const float* u, std::size_t j) {
  if (weight.order == nullptr) return _mm512_loadu_ps(u + j);
  if (weight.order_has_chunks) {
    uint16_t chunk = 0;
    std::memcpy(&chunk, weight.order + 2 * (j / kChunkColumns), sizeof(chunk));
    return _mm512_loadu_ps(u + chunk * kChunkColumns + j % kChunkColumns);
  }
  const __m256i columns =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight.order + 2 * j));
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(columns), u, sizeof(float));
}

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_AVX512_TRANSFORM_AVX512_H_
