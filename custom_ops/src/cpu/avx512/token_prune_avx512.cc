// The feature loops of TokenPrune with AVX-512.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include <immintrin.h>

#include <algorithm>

#include "bivlm/token_prune.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 16;

// Lanes of the vector at feature d that exist.
__mmask16 LanesAt(std::size_t d, std::size_t dim) {
  return static_cast<__mmask16>((1U << std::min(kLanes, dim - d)) - 1U);
}

template <ElementType type>
__m512 Load(const TokenPruneRows& rows, std::size_t i, std::size_t d, __mmask16 mask) {
  const std::size_t at = rows.index[i] * rows.dim + d;
  if constexpr (type == ElementType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(rows.features) + at);
  } else {
    return _mm512_cvtph_ps(
        _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows.features) + at));
  }
}

template <ElementType type>
double SquaredNorm(const TokenPruneRows& rows, std::size_t i) {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();
  for (std::size_t d = 0; d < rows.dim; d += kLanes) {
    const __m512 v = Load<type>(rows, i, d, LanesAt(d, rows.dim));
    const __m512d v_low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d v_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    low = _mm512_fmadd_pd(v_low, v_low, low);
    high = _mm512_fmadd_pd(v_high, v_high, high);
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

template <ElementType type>
float Dot(const TokenPruneRows& rows, std::size_t i, const float* query) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  std::size_t d = 0;
  for (; d + 4 * kLanes <= rows.dim; d += 4 * kLanes) {
#pragma GCC unroll 4
    for (std::size_t part = 0; part < 4; ++part) {
      const std::size_t at = d + part * kLanes;
      sums[part] =
          _mm512_fmadd_ps(Load<type>(rows, i, at, 0xFFFF), _mm512_loadu_ps(query + at), sums[part]);
    }
  }
  for (; d < rows.dim; d += kLanes) {
    const __mmask16 mask = LanesAt(d, rows.dim);
    sums[0] = _mm512_fmadd_ps(Load<type>(rows, i, d, mask), _mm512_maskz_loadu_ps(mask, query + d),
                              sums[0]);
  }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

void SquaredNorms(const TokenPruneRows& rows, double* norms) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    norms[i] = rows.type == ElementType::kFloat32 ? SquaredNorm<ElementType::kFloat32>(rows, i)
                                                  : SquaredNorm<ElementType::kFloat16>(rows, i);
  }
}

void Dots(const TokenPruneRows& rows, const float* query, float* dots) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    dots[i] = rows.type == ElementType::kFloat32 ? Dot<ElementType::kFloat32>(rows, i, query)
                                                 : Dot<ElementType::kFloat16>(rows, i, query);
  }
}

}  // namespace

const TokenPruneFunctions TokenPruneAvx512 = {SquaredNorms, Dots};

}  // namespace bivlm
