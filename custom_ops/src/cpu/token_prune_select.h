// The modes of TokenPrune: which tokens of one segment stay.
#ifndef BIVLM_CPU_TOKEN_PRUNE_SELECT_H_
#define BIVLM_CPU_TOKEN_PRUNE_SELECT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "token_similarity.h"

namespace bivlm {

// z of OPS.md, from scores in which a NaN counts as -inf.
std::vector<double> NormalizedScores(const std::vector<float>& scores);

// Positions inside the segment of k tokens, k less than all, in the order of their choice.
// `scores` are those of the segment, or empty where the operator has none. `similarity` is null in
// modes that need none.
std::vector<std::size_t> SelectTokens(const TokenPruneOptions& options, int32_t segment,
                                      std::size_t n, std::size_t k,
                                      const std::vector<float>& scores,
                                      TokenSimilarity* similarity);

// Whether the mode compares tokens.
bool NeedsSimilarity(TokenPruneMode mode);

}  // namespace bivlm

#endif  // BIVLM_CPU_TOKEN_PRUNE_SELECT_H_
