// Loops of TokenPrune that the compiler vectorizes by itself. Included by the file of each
// instruction set, which gets a copy of its own.
#ifndef BIVLM_CPU_TOKEN_PRUNE_LOOPS_H_
#define BIVLM_CPU_TOKEN_PRUNE_LOOPS_H_

#include <algorithm>
#include <cstddef>

namespace bivlm {
namespace {

// As TokenPruneFunctions::subtract_products.
void SubtractProducts(const double* factors, std::size_t stride, const double* weights,
                      std::size_t terms, double* values, std::size_t count) {
  constexpr std::size_t kBlock = 512;  // of values, which stay in the first cache
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t end = std::min(begin + kBlock, count);
    for (std::size_t t = 0; t < terms; ++t) {
      const double weight = weights[t];
      const double* factor = factors + t * stride;
      for (std::size_t i = begin; i < end; ++i) values[i] -= weight * factor[i];
    }
  }
}

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_TOKEN_PRUNE_LOOPS_H_
