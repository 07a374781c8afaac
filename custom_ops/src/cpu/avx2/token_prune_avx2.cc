// The feature loops of TokenPrune with AVX2.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include <immintrin.h>

#include <algorithm>

#include "bivlm/token_prune.h"
#include "token_prune_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 8;
// Rows and queries whose products are summed side by side.
constexpr std::size_t kRowTile = 2;
constexpr std::size_t kQueryTile = 4;

template <MetricType type>
__m256 Load(const TokenPruneRows& rows, std::size_t at) {
  if constexpr (type == MetricType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(rows.features) + at);
  } else if constexpr (type == MetricType::kFloat16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(rows.features) + at)));
  } else {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(
        reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(rows.features) + at))));
  }
}

template <MetricType type>
float LoadOne(const TokenPruneRows& rows, std::size_t at) {
  if constexpr (type == MetricType::kFloat32) {
    return static_cast<const float*>(rows.features)[at];
  } else if constexpr (type == MetricType::kFloat16) {
    return _cvtsh_ss(static_cast<const uint16_t*>(rows.features)[at]);
  } else {
    return static_cast<const int8_t*>(rows.features)[at];
  }
}

template <MetricType type>
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

float Sum(__m256 v) {
  float lanes[kLanes];
  _mm256_storeu_ps(lanes, v);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

template <MetricType type>
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
  float sum = Sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  for (; d < rows.dim; ++d) sum += LoadOne<type>(rows, start + d) * query[d];
  return sum;
}

// kRowTile rows from i on with kQueryTile queries.
template <MetricType type>
void DotTile(const TokenPruneRows& rows, std::size_t i, const float* queries, float* dots,
             std::size_t stride) {
  __m256 sums[kQueryTile][kRowTile];
#pragma GCC unroll 4
  for (auto& of_query : sums) {
#pragma GCC unroll 2
    for (__m256& sum : of_query) sum = _mm256_setzero_ps();
  }
  std::size_t d = 0;
  for (; d + kLanes <= rows.dim; d += kLanes) {
    __m256 row[kRowTile];
#pragma GCC unroll 2
    for (std::size_t r = 0; r < kRowTile; ++r) {
      row[r] = Load<type>(rows, rows.index[i + r] * rows.dim + d);
    }
#pragma GCC unroll 4
    for (std::size_t q = 0; q < kQueryTile; ++q) {
      const __m256 query = _mm256_loadu_ps(queries + q * rows.dim + d);
#pragma GCC unroll 2
      for (std::size_t r = 0; r < kRowTile; ++r) {
        sums[q][r] = _mm256_fmadd_ps(row[r], query, sums[q][r]);
      }
    }
  }
  for (std::size_t q = 0; q < kQueryTile; ++q) {
    for (std::size_t r = 0; r < kRowTile; ++r) {
      float sum = Sum(sums[q][r]);
      for (std::size_t rest = d; rest < rows.dim; ++rest) {
        sum +=
            LoadOne<type>(rows, rows.index[i + r] * rows.dim + rest) * queries[q * rows.dim + rest];
      }
      dots[q * stride + i + r] = sum;
    }
  }
}

template <MetricType type>
void SquaredNormsOf(const TokenPruneRows& rows, double* norms) {
  for (std::size_t i = 0; i < rows.count; ++i) norms[i] = SquaredNorm<type>(rows, i);
}

void SquaredNorms(const TokenPruneRows& rows, double* norms) {
  WithMetricType(rows.type, [&](auto type) { SquaredNormsOf<type()>(rows, norms); });
}

void Dots(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
          std::size_t stride) {
  WithMetricType(rows.type, [&](auto type) {
    TiledDots<kRowTile, kQueryTile>(
        rows, queries, count, dots, stride,
        [&](std::size_t i, const float* query, float* out) {
          DotTile<type()>(rows, i, query, out, stride);
        },
        [&](std::size_t i, const float* query) { return Dot<type()>(rows, i, query); });
  });
}

double Uncovered(const float* similarity, const float* covered, const double* weights,
                 std::size_t count) {
  constexpr std::size_t kDoubles = 4;
  __m256d sum = _mm256_setzero_pd();
  std::size_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    const __m256d alike = _mm256_cvtps_pd(_mm_loadu_ps(similarity + i));
    const __m256d already = _mm256_cvtps_pd(_mm_loadu_ps(covered + i));
    const __m256d more = _mm256_max_pd(_mm256_sub_pd(alike, already), _mm256_setzero_pd());
    sum = _mm256_fmadd_pd(_mm256_loadu_pd(weights + i), more, sum);
  }
  double lanes[kDoubles];
  _mm256_storeu_pd(lanes, sum);
  double total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; i < count; ++i) {
    total += weights[i] * std::max(0.0, double{similarity[i]} - double{covered[i]});
  }
  return total;
}

double Product(const double* a, const double* b, std::size_t count) {
  constexpr std::size_t kDoubles = 4;
  __m256d even = _mm256_setzero_pd();
  __m256d odd = _mm256_setzero_pd();
  std::size_t i = 0;
  for (; i + 2 * kDoubles <= count; i += 2 * kDoubles) {
    even = _mm256_fmadd_pd(_mm256_loadu_pd(a + i), _mm256_loadu_pd(b + i), even);
    odd =
        _mm256_fmadd_pd(_mm256_loadu_pd(a + i + kDoubles), _mm256_loadu_pd(b + i + kDoubles), odd);
  }
  double lanes[kDoubles];
  _mm256_storeu_pd(lanes, _mm256_add_pd(even, odd));
  double total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace

const TokenPruneFunctions TokenPruneAvx2 = {SquaredNorms, Dots, Uncovered, Product};

}  // namespace bivlm
