// The loops of TokenPrune over types and tiles of rows, for any instruction set. What they call are
// lambdas, whose types belong to one file: no instance is shared between instruction sets.
#ifndef BIVLM_CPU_TOKEN_PRUNE_ROWS_H_
#define BIVLM_CPU_TOKEN_PRUNE_ROWS_H_

#include <cstddef>
#include <type_traits>

#include "bivlm/token_prune.h"

namespace bivlm {

// Calls body(type) with the type as a constant of the language: `type()` is a template argument.
template <typename Body>
void WithMetricType(MetricType type, const Body& body) {
  switch (type) {
    case MetricType::kFloat32:
      return body(std::integral_constant<MetricType, MetricType::kFloat32>());
    case MetricType::kFloat16:
      return body(std::integral_constant<MetricType, MetricType::kFloat16>());
    case MetricType::kInt8:
      return body(std::integral_constant<MetricType, MetricType::kInt8>());
  }
}

// TokenPruneFunctions::dots by tile(i, query, out), which writes kRowTile rows from i on times
// kQueryTile queries, and one(i, query), a single product.
template <std::size_t kRowTile, std::size_t kQueryTile, typename Tile, typename One>
void TiledDots(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
               std::size_t stride, const Tile& tile, const One& one) {
  const std::size_t tiled_rows = rows.count / kRowTile * kRowTile;
  std::size_t q = 0;
  for (; q + kQueryTile <= count; q += kQueryTile) {
    const float* query = queries + q * rows.dim;
    float* out = dots + q * stride;
    for (std::size_t i = 0; i < tiled_rows; i += kRowTile) tile(i, query, out);
    for (std::size_t i = tiled_rows; i < rows.count; ++i) {
      for (std::size_t t = 0; t < kQueryTile; ++t)
        out[t * stride + i] = one(i, query + t * rows.dim);
    }
  }
  for (; q < count; ++q) {
    for (std::size_t i = 0; i < rows.count; ++i) {
      dots[q * stride + i] = one(i, queries + q * rows.dim);
    }
  }
}

}  // namespace bivlm

#endif  // BIVLM_CPU_TOKEN_PRUNE_ROWS_H_
