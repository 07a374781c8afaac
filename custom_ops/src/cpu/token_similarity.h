// Similarities between the tokens of one segment, computed when asked for. export/OPS.md has the
// formula.
#ifndef BIVLM_CPU_TOKEN_SIMILARITY_H_
#define BIVLM_CPU_TOKEN_SIMILARITY_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bivlm/token_prune.h"

namespace bivlm {

// Some tokens of a segment: position in the segment, row of `metric`, and squared norm, 0 where
// all similarities are 0.
struct TokenSet {
  std::vector<std::size_t> positions;
  std::vector<uint32_t> rows;
  std::vector<double> norms;

  std::size_t size() const { return positions.size(); }
  void Erase(std::size_t at);
};

class TokenSimilarity {
 public:
  // The segment of row `row` with these tokens. The arguments outlive this object.
  TokenSimilarity(const TokenPruneKernel& kernel, const TokenPruneArgs& args, std::size_t row,
                  const std::vector<uint32_t>& tokens, const Executor& executor);

  const TokenSet& all() const { return all_; }
  TokenSet Subset(const std::vector<std::size_t>& positions) const;
  const Executor& executor() const { return executor_; }
  const TokenPruneFunctions& functions() const { return *kernel_.functions; }

  // The similarity of a token to itself.
  float Own(std::size_t position) const;

  // out[i] = similarity of token `of` and token i of `to`.
  void From(std::size_t of, const TokenSet& to, float* out);

  // out[q * stride + i] = similarity of token q of `queries` and token i of `to`.
  void Between(const TokenSet& queries, const TokenSet& to, float* out, std::size_t stride);

  // The most tokens that `Between` should take as `queries`, so that they stay in a cache.
  static constexpr std::size_t kQueries = 128;

 private:
  // Writes features of `row` times a power of two that makes their norm 1 at most, so that no dot
  // product overflows. Returns the inverse of that power.
  double LoadQuery(uint32_t row, double norm, float* query) const;

  float Similarity(float dot, double scale, double norm, double other_norm) const;

  // body(rows, begin) for parts of the tokens that begin at `begin`.
  template <typename Body>
  void ForRows(const TokenSet& tokens, std::size_t queries, const Body& body) const;

  const TokenPruneKernel& kernel_;
  const TokenPruneArgs& args_;
  const Executor& executor_;
  TokenSet all_;
  std::vector<float> queries_;
  std::vector<double> scales_;
};

}  // namespace bivlm

#endif  // BIVLM_CPU_TOKEN_SIMILARITY_H_
