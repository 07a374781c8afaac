// The feature loops of TokenPrune, for vectors of any length.
//
// `Isa` is a struct `Vectors` (vectors_<isa>.h) in an anonymous namespace, so that what is
// instantiated with it stays in its object file, and has
//   kRowTile, kQueryTile    rows and queries whose products are summed side by side
//   FromBytes(bytes)        kLanes of them as floats
#ifndef BIVLM_CPU_TOKEN_PRUNE_LOOPS_H_
#define BIVLM_CPU_TOKEN_PRUNE_LOOPS_H_

#include <algorithm>
#include <cstring>

#include "bivlm/token_prune.h"
#include "token_prune_rows.h"

namespace bivlm {

template <typename Isa>
struct TokenPruneLoops {
  using Vec = typename Isa::Vec;
  static constexpr std::size_t kLanes = Isa::kLanes;
  static constexpr std::size_t kDoubles = kLanes / 2;
  static constexpr std::size_t kRowTile = Isa::kRowTile;
  static constexpr std::size_t kQueryTile = Isa::kQueryTile;
  using Doubles = typename Isa::Doubles;

  static Vec LoadFloats(const float* floats) {
    Vec v;
    std::memcpy(&v, floats, sizeof(v));
    return v;
  }
  static Doubles LoadDoubles(const double* doubles) {
    Doubles v;
    std::memcpy(&v, doubles, sizeof(v));
    return v;
  }
  template <MetricType type>
  static Vec Load(const TokenPruneRows& rows, std::size_t at) {
    if constexpr (type == MetricType::kFloat32) {
      return LoadFloats(static_cast<const float*>(rows.features) + at);
    } else if constexpr (type == MetricType::kFloat16) {
      return Isa::Widen(static_cast<const uint16_t*>(rows.features) + at);
    } else {
      return Isa::FromBytes(static_cast<const int8_t*>(rows.features) + at);
    }
  }

  template <MetricType type>
  static float LoadOne(const TokenPruneRows& rows, std::size_t at) {
    if constexpr (type == MetricType::kFloat32) {
      return static_cast<const float*>(rows.features)[at];
    } else if constexpr (type == MetricType::kFloat16) {
      return FloatFromHalf(static_cast<const uint16_t*>(rows.features)[at]);
    } else {
      return static_cast<const int8_t*>(rows.features)[at];
    }
  }

  // ((v0 + v1) + (v2 + v3)) + ..
  template <std::size_t count, typename Number>
  static Number Sum(const Number* v) {
    if constexpr (count == 1) {
      return *v;
    } else {
      return Sum<count / 2>(v) + Sum<count / 2>(v + count / 2);
    }
  }
  static float Sum(Vec v) {
    float lanes[kLanes];
    std::memcpy(lanes, &v, sizeof(v));
    return Sum<kLanes>(lanes);
  }
  static double Sum(Doubles v) {
    double lanes[kDoubles];
    std::memcpy(lanes, &v, sizeof(v));
    return Sum<kDoubles>(lanes);
  }

  template <MetricType type>
  static double SquaredNorm(const TokenPruneRows& rows, std::size_t i) {
    const std::size_t start = rows.index[i] * rows.dim;
    Doubles low = {};
    Doubles high = {};
    std::size_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) {
      float lanes[kLanes];
      const Vec v = Load<type>(rows, start + d);
      std::memcpy(lanes, &v, sizeof(v));
      const Doubles v_low = Isa::ToDoubles(lanes);
      const Doubles v_high = Isa::ToDoubles(lanes + kDoubles);
      low += v_low * v_low;
      high += v_high * v_high;
    }
    double sum = Sum(low + high);
    for (; d < rows.dim; ++d) {
      const double value = LoadOne<type>(rows, start + d);
      sum += value * value;
    }
    return sum;
  }

  template <MetricType type>
  static float Dot(const TokenPruneRows& rows, std::size_t i, const float* query) {
    const std::size_t start = rows.index[i] * rows.dim;
    Vec sums[4] = {};
    std::size_t d = 0;
    for (; d + 4 * kLanes <= rows.dim; d += 4 * kLanes) {
#pragma GCC unroll 4
      for (std::size_t part = 0; part < 4; ++part) {
        const std::size_t at = d + part * kLanes;
        sums[part] =
            Isa::MultiplyAdd(Load<type>(rows, start + at), LoadFloats(query + at), sums[part]);
      }
    }
    float sum = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; d < rows.dim; ++d) sum += LoadOne<type>(rows, start + d) * query[d];
    return sum;
  }

  // kRowTile rows from i on with kQueryTile queries.
  template <MetricType type>
  static void DotTile(const TokenPruneRows& rows, std::size_t i, const float* queries, float* dots,
                      std::size_t stride) {
    Vec sums[kQueryTile][kRowTile];
#pragma GCC unroll 4
    for (auto& of_query : sums) {
#pragma GCC unroll 4
      for (Vec& sum : of_query) sum = Vec{};
    }
    std::size_t start[kRowTile];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRowTile; ++r) start[r] = rows.index[i + r] * rows.dim;
    std::size_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) {
      Vec row[kRowTile];
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kRowTile; ++r) row[r] = Load<type>(rows, start[r] + d);
#pragma GCC unroll 4
      for (std::size_t q = 0; q < kQueryTile; ++q) {
        const Vec query = LoadFloats(queries + q * rows.dim + d);
#pragma GCC unroll 4
        for (std::size_t r = 0; r < kRowTile; ++r) {
          sums[q][r] = Isa::MultiplyAdd(row[r], query, sums[q][r]);
        }
      }
    }
    float totals[kQueryTile][kRowTile];
#pragma GCC unroll 4
    for (std::size_t q = 0; q < kQueryTile; ++q) {
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kRowTile; ++r) totals[q][r] = Sum(sums[q][r]);
    }
    for (std::size_t q = 0; q < kQueryTile; ++q) {
      for (std::size_t r = 0; r < kRowTile; ++r) {
        float sum = totals[q][r];
        for (std::size_t rest = d; rest < rows.dim; ++rest) {
          sum += LoadOne<type>(rows, start[r] + rest) * queries[q * rows.dim + rest];
        }
        dots[q * stride + i + r] = sum;
      }
    }
  }

  template <MetricType type>
  static void SquaredNormsOf(const TokenPruneRows& rows, double* norms) {
    for (std::size_t i = 0; i < rows.count; ++i) norms[i] = SquaredNorm<type>(rows, i);
  }

  static void SquaredNorms(const TokenPruneRows& rows, double* norms) {
    WithMetricType(rows.type, [&](auto type) { SquaredNormsOf<type()>(rows, norms); });
  }

  static void Dots(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
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

  static double Uncovered(const float* similarity, const float* covered, const double* weights,
                          std::size_t count) {
    Doubles sum = {};
    std::size_t i = 0;
    for (; i + kDoubles <= count; i += kDoubles) {
      const Doubles more = Isa::ToDoubles(similarity + i) - Isa::ToDoubles(covered + i);
      sum += LoadDoubles(weights + i) * (more > 0.0 ? more : Doubles{});
    }
    double total = Sum(sum);
    for (; i < count; ++i) {
      total += weights[i] * std::max(0.0, double{similarity[i]} - double{covered[i]});
    }
    return total;
  }

  static double Product(const double* a, const double* b, std::size_t count) {
    Doubles even = {};
    Doubles odd = {};
    std::size_t i = 0;
    for (; i + 2 * kDoubles <= count; i += 2 * kDoubles) {
      even += LoadDoubles(a + i) * LoadDoubles(b + i);
      odd += LoadDoubles(a + i + kDoubles) * LoadDoubles(b + i + kDoubles);
    }
    double total = Sum(even + odd);
    for (; i < count; ++i) total += a[i] * b[i];
    return total;
  }
};

}  // namespace bivlm

#endif  // BIVLM_CPU_TOKEN_PRUNE_LOOPS_H_
