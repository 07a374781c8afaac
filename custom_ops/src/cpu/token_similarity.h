// Similarities between the tokens of one segment, computed when asked for. export/OPS.md has the
// formula.
#ifndef BIVLM_CPU_TOKEN_SIMILARITY_H_
#define BIVLM_CPU_TOKEN_SIMILARITY_H_

#include <algorithm>
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
};

class TokenSimilarity {
 public:
  // The segment of row `row` with these tokens. The arguments outlive this object.
  TokenSimilarity(const TokenPruneKernel& kernel, const TokenPruneArgs& args, std::size_t row,
                  const std::vector<uint32_t>& tokens, const Executor& executor);

  const TokenSet& all() const { return all_; }
  TokenSet Subset(const std::vector<std::size_t>& positions) const;
  void Add(std::size_t position, TokenSet* set) const;
  const Executor& executor() const { return executor_; }
  const TokenPruneFunctions& functions() const { return *kernel_.functions; }

  // The similarity of a token to itself.
  float Own(std::size_t position) const;

  // out[i] = similarity of token `of` and token i of `to`.
  void From(std::size_t of, const TokenSet& to, float* out);

  // use(r, i, value) with the similarity of token requests[r].token and token i of `to`, for all i
  // from requests[r].begin on, rising. Requests are served side by side: `use` must not throw.
  struct Request {
    std::size_t token;
    std::size_t begin;
  };
  template <typename Use>
  void ForRequests(const std::vector<Request>& requests, const TokenSet& to, const Use& use);

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

template <typename Use>
void TokenSimilarity::ForRequests(const std::vector<Request>& requests, const TokenSet& to,
                                  const Use& use) {
  queries_.resize(std::max(queries_.size(), requests.size() * args_.dim));
  executor_.For(requests.size(), [&](std::size_t r) {
    constexpr std::size_t kBlock = 32;
    float dots[kBlock];
    float* query = queries_.data() + r * args_.dim;
    const std::size_t token = requests[r].token;
    const double norm = all_.norms[token];
    const double scale = norm > 0.0 ? LoadQuery(all_.rows[token], norm, query) : 0.0;
    for (std::size_t begin = requests[r].begin; begin < to.size(); begin += kBlock) {
      TokenPruneRows rows;
      rows.type = args_.metric_type;
      rows.features = args_.metric;
      rows.dim = args_.dim;
      rows.index = to.rows.data() + begin;
      rows.count = std::min(kBlock, to.size() - begin);
      if (norm > 0.0) functions().dots(rows, query, 1, dots, 0);
      for (std::size_t i = 0; i < rows.count; ++i) {
        use(r, begin + i, Similarity(dots[i], scale, norm, to.norms[begin + i]));
      }
    }
  });
}

}  // namespace bivlm

#endif  // BIVLM_CPU_TOKEN_SIMILARITY_H_
