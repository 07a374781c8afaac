// The feature loops of TokenPrune with AVX-512.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include <immintrin.h>

#include <algorithm>

#include "bivlm/token_prune.h"
#include "token_prune_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kTile = 4;  // rows and queries whose products are summed side by side

// Lanes of the vector at feature d that exist.
__mmask16 LanesAt(std::size_t d, std::size_t dim) {
  return static_cast<__mmask16>((1U << std::min(kLanes, dim - d)) - 1U);
}

template <MetricType type>
__m512 Load(const TokenPruneRows& rows, std::size_t i, std::size_t d, __mmask16 mask) {
  const std::size_t at = rows.index[i] * rows.dim + d;
  if constexpr (type == MetricType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(rows.features) + at);
  } else if constexpr (type == MetricType::kFloat16) {
    return _mm512_cvtph_ps(
        _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows.features) + at));
  } else {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm_maskz_loadu_epi8(mask, static_cast<const int8_t*>(rows.features) + at)));
  }
}

template <MetricType type>
void SquaredNormsOf(const TokenPruneRows& rows, double* norms) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    __m512d low = _mm512_setzero_pd();
    __m512d high = _mm512_setzero_pd();
    for (std::size_t d = 0; d < rows.dim; d += kLanes) {
      const __m512 v = Load<type>(rows, i, d, LanesAt(d, rows.dim));
      const __m512d v_low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
      const __m512d v_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
      low = _mm512_fmadd_pd(v_low, v_low, low);
      high = _mm512_fmadd_pd(v_high, v_high, high);
    }
    norms[i] = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
}

template <MetricType type>
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

// kTile rows from i on with kTile queries.
template <MetricType type>
void DotTile(const TokenPruneRows& rows, std::size_t i, const float* queries, float* dots,
             std::size_t stride) {
  __m512 sums[kTile][kTile];
#pragma GCC unroll 4
  for (auto& of_query : sums) {
#pragma GCC unroll 4
    for (__m512& sum : of_query) sum = _mm512_setzero_ps();
  }
  const auto add = [&](std::size_t d, __mmask16 mask) {
    __m512 row[kTile];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kTile; ++r) row[r] = Load<type>(rows, i + r, d, mask);
#pragma GCC unroll 4
    for (std::size_t q = 0; q < kTile; ++q) {
      const __m512 query = _mm512_maskz_loadu_ps(mask, queries + q * rows.dim + d);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kTile; ++r) {
        sums[q][r] = _mm512_fmadd_ps(row[r], query, sums[q][r]);
      }
    }
  };
  std::size_t d = 0;
  for (; d + kLanes <= rows.dim; d += kLanes) add(d, 0xFFFF);
  if (d < rows.dim) add(d, LanesAt(d, rows.dim));
  for (std::size_t q = 0; q < kTile; ++q) {
    for (std::size_t r = 0; r < kTile; ++r) {
      dots[q * stride + i + r] = _mm512_reduce_add_ps(sums[q][r]);
    }
  }
}

void SquaredNorms(const TokenPruneRows& rows, double* norms) {
  WithMetricType(rows.type, [&](auto type) { SquaredNormsOf<type()>(rows, norms); });
}

void Dots(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
          std::size_t stride) {
  WithMetricType(rows.type, [&](auto type) {
    TiledDots<kTile, kTile>(
        rows, queries, count, dots, stride,
        [&](std::size_t i, const float* query, float* out) {
          DotTile<type()>(rows, i, query, out, stride);
        },
        [&](std::size_t i, const float* query) { return Dot<type()>(rows, i, query); });
  });
}

double Uncovered(const float* similarity, const float* covered, const double* weights,
                 std::size_t count) {
  constexpr std::size_t kDoubles = 8;
  __m512d sum = _mm512_setzero_pd();
  for (std::size_t i = 0; i < count; i += kDoubles) {
    const auto mask = static_cast<__mmask8>((1U << std::min(kDoubles, count - i)) - 1U);
    const __m512d alike = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, similarity + i));
    const __m512d already = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, covered + i));
    const __m512d more = _mm512_max_pd(_mm512_sub_pd(alike, already), _mm512_setzero_pd());
    sum = _mm512_fmadd_pd(_mm512_maskz_loadu_pd(mask, weights + i), more, sum);
  }
  return _mm512_reduce_add_pd(sum);
}

double Product(const double* a, const double* b, std::size_t count) {
  constexpr std::size_t kDoubles = 8;
  __m512d even = _mm512_setzero_pd();
  __m512d odd = _mm512_setzero_pd();
  std::size_t i = 0;
  for (; i + 2 * kDoubles <= count; i += 2 * kDoubles) {
    even = _mm512_fmadd_pd(_mm512_loadu_pd(a + i), _mm512_loadu_pd(b + i), even);
    odd =
        _mm512_fmadd_pd(_mm512_loadu_pd(a + i + kDoubles), _mm512_loadu_pd(b + i + kDoubles), odd);
  }
  for (; i < count; i += kDoubles) {
    const auto mask = static_cast<__mmask8>((1U << std::min(kDoubles, count - i)) - 1U);
    even = _mm512_fmadd_pd(_mm512_maskz_loadu_pd(mask, a + i), _mm512_maskz_loadu_pd(mask, b + i),
                           even);
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(even, odd));
}

}  // namespace

const TokenPruneFunctions TokenPruneAvx512 = {SquaredNorms, Dots, Uncovered, Product};

}  // namespace bivlm
