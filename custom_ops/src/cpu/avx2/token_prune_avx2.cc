// The feature loops of TokenPrune with AVX2.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include <immintrin.h>

#include "bivlm/token_prune.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 8;

template <ElementType type>
__m256 Load(const TokenPruneRows& rows, std::size_t at) {
  if constexpr (type == ElementType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(rows.features) + at);
  } else {
    return _mm256_cvtph_ps(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(rows.features) + at)));
  }
}

template <ElementType type>
float LoadOne(const TokenPruneRows& rows, std::size_t at) {
  if constexpr (type == ElementType::kFloat32) {
    return static_cast<const float*>(rows.features)[at];
  } else {
    return _cvtsh_ss(static_cast<const uint16_t*>(rows.features)[at]);
  }
}

template <ElementType type>
double SquaredNorm(const TokenPruneRows& rows, std::size_t i) {
  const std::size_t start = rows.index[i] * rows.dim;
  __m256d low = _mm256_setzero_pd();
  __m256d high = _mm256_setzero_pd();
  std::size_t d = 0;
  for (; d + kLanes <= rows.dim; d += kLanes) {
    const __m256 v = Load<type>(rows, start + d);
    const __m256d v_low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d v_high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    low = _mm256_fmadd_pd(v_low, v_low, low);
    high = _mm256_fmadd_pd(v_high, v_high, high);
  }
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(low, high));
  double sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; d < rows.dim; ++d) {
    const double value = LoadOne<type>(rows, start + d);
    sum += value * value;
  }
  return sum;
}

template <ElementType type>
float Dot(const TokenPruneRows& rows, std::size_t i, const float* query) {
  const std::size_t start = rows.index[i] * rows.dim;
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  std::size_t d = 0;
  for (; d + 4 * kLanes <= rows.dim; d += 4 * kLanes) {
#pragma GCC unroll 4
    for (std::size_t part = 0; part < 4; ++part) {
      const std::size_t at = d + part * kLanes;
      sums[part] =
          _mm256_fmadd_ps(Load<type>(rows, start + at), _mm256_loadu_ps(query + at), sums[part]);
    }
  }
  float lanes[kLanes];
  _mm256_storeu_ps(lanes,
                   _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  float sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
              ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  for (; d < rows.dim; ++d) sum += LoadOne<type>(rows, start + d) * query[d];
  return sum;
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

const TokenPruneFunctions TokenPruneAvx2 = {SquaredNorms, Dots};

}  // namespace bivlm
