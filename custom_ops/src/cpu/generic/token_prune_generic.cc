// The feature loops of TokenPrune on any CPU.
#include "bivlm/token_prune.h"

namespace bivlm {
namespace {

float Load(const TokenPruneRows& rows, std::size_t i, std::size_t d) {
  const std::size_t at = rows.index[i] * rows.dim + d;
  if (rows.type == ElementType::kFloat32) return static_cast<const float*>(rows.features)[at];
  return FloatFromHalf(static_cast<const uint16_t*>(rows.features)[at]);
}

void SquaredNorms(const TokenPruneRows& rows, double* norms) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    double sum = 0.0;
    for (std::size_t d = 0; d < rows.dim; ++d) {
      const double value = Load(rows, i, d);
      sum += value * value;
    }
    norms[i] = sum;
  }
}

void Dots(const TokenPruneRows& rows, const float* query, float* dots) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    float sum = 0.0F;
    for (std::size_t d = 0; d < rows.dim; ++d) sum += Load(rows, i, d) * query[d];
    dots[i] = sum;
  }
}

}  // namespace

const TokenPruneFunctions TokenPruneGeneric = {SquaredNorms, Dots};

}  // namespace bivlm
