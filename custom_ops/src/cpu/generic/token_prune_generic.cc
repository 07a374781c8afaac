// The feature loops of TokenPrune on any CPU.
#include <algorithm>

#include "bivlm/token_prune.h"
#include "token_prune_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 8;  // sums side by side

template <MetricType type>
float Load(const TokenPruneRows& rows, std::size_t i, std::size_t d) {
  const std::size_t at = rows.index[i] * rows.dim + d;
  if constexpr (type == MetricType::kFloat32) return static_cast<const float*>(rows.features)[at];
  if constexpr (type == MetricType::kInt8) return static_cast<const int8_t*>(rows.features)[at];
  return FloatFromHalf(static_cast<const uint16_t*>(rows.features)[at]);
}

template <MetricType type>
void SquaredNormsOf(const TokenPruneRows& rows, double* norms) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    double sum = 0.0;
    for (std::size_t d = 0; d < rows.dim; ++d) {
      const double value = Load<type>(rows, i, d);
      sum += value * value;
    }
    norms[i] = sum;
  }
}

template <MetricType type>
float Dot(const TokenPruneRows& rows, std::size_t i, const float* query) {
  float sums[kLanes] = {};
  std::size_t d = 0;
  for (; d + kLanes <= rows.dim; d += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += Load<type>(rows, i, d + lane) * query[d + lane];
    }
  }
  for (; d < rows.dim; ++d) sums[0] += Load<type>(rows, i, d) * query[d];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <MetricType type>
void DotsOf(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
            std::size_t stride) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    for (std::size_t q = 0; q < count; ++q) {
      dots[q * stride + i] = Dot<type>(rows, i, queries + q * rows.dim);
    }
  }
}

void SquaredNorms(const TokenPruneRows& rows, double* norms) {
  WithMetricType(rows.type, [&](auto type) { SquaredNormsOf<type()>(rows, norms); });
}

void Dots(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
          std::size_t stride) {
  WithMetricType(rows.type, [&](auto type) { DotsOf<type()>(rows, queries, count, dots, stride); });
}

double Uncovered(const float* similarity, const float* covered, const double* weights,
                 std::size_t count) {
  double sum = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    sum += weights[i] * std::max(0.0, double{similarity[i]} - double{covered[i]});
  }
  return sum;
}

double Product(const double* a, const double* b, std::size_t count) {
  double sums[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

const TokenPruneFunctions TokenPruneGeneric = {SquaredNorms, Dots, Uncovered, Product};

}  // namespace bivlm
