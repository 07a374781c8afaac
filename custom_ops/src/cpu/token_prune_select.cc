#include "token_prune_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

namespace bivlm {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kLargestFloat = std::numeric_limits<float>::max();

using Positions = std::vector<std::size_t>;

// Positions of the k largest keys, falling; of equal keys the lower position.
template <typename Key>
Positions LargestKeys(const std::vector<Key>& keys, std::size_t k) {
  Positions positions(keys.size());
  std::iota(positions.begin(), positions.end(), std::size_t{0});
  std::partial_sort(positions.begin(), positions.begin() + static_cast<std::ptrdiff_t>(k),
                    positions.end(), [&keys](std::size_t a, std::size_t b) {
                      return keys[a] > keys[b] || (keys[a] == keys[b] && a < b);
                    });
  positions.resize(k);
  return positions;
}

template <typename Key>
std::size_t Largest(const std::vector<Key>& keys) {
  return static_cast<std::size_t>(std::max_element(keys.begin(), keys.end()) - keys.begin());
}

Positions Uniform(std::size_t n, std::size_t k) {
  Positions chosen(k);
  for (std::size_t i = 0; i < k; ++i) chosen[i] = (2 * i + 1) * n / (2 * k);
  return chosen;
}

Positions Random(int64_t seed, int32_t segment, std::size_t n, std::size_t k) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const uint32_t key[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  std::vector<uint32_t> keys(n);
  for (std::size_t t = 0; t < n; ++t) {
    const uint32_t counter[4] = {static_cast<uint32_t>(t), static_cast<uint32_t>(segment), 0, 0};
    keys[t] = Philox4x32(counter, key);
  }
  return LargestKeys(keys, k);
}

// Adds tokens to `chosen` until there are k: again and again the largest
// theta * bonus - (1 - theta) * (largest similarity to any chosen token).
class FarthestTokens {
 public:
  // `nearest` has that similarity of every candidate.
  FarthestTokens(TokenSimilarity* similarity, TokenSet candidates, std::vector<float> nearest)
      : similarity_(*similarity),
        candidates_(std::move(candidates)),
        nearest_(std::move(nearest)),
        fresh_(candidates_.size()) {}

  void Take(std::size_t candidate) {
    const std::size_t position = candidates_.positions[candidate];
    candidates_.Erase(candidate);
    nearest_.erase(nearest_.begin() + static_cast<std::ptrdiff_t>(candidate));
    similarity_.From(position, candidates_, fresh_.data());
    for (std::size_t i = 0; i < candidates_.size(); ++i) {
      nearest_[i] = std::max(nearest_[i], fresh_[i]);
    }
  }

  void Fill(const std::vector<double>& bonus, double theta, std::size_t k, Positions* chosen) {
    while (chosen->size() < k) {
      std::size_t best = 0;
      double best_value = 0.0;
      for (std::size_t i = 0; i < candidates_.size(); ++i) {
        const double value =
            theta * bonus[candidates_.positions[i]] - (1.0 - theta) * double{nearest_[i]};
        if (i == 0 || value > best_value) {
          best = i;
          best_value = value;
        }
      }
      chosen->push_back(candidates_.positions[best]);
      if (chosen->size() < k) Take(best);
    }
  }

 private:
  TokenSimilarity& similarity_;
  TokenSet candidates_;
  std::vector<float> nearest_;
  std::vector<float> fresh_;
};

Positions Farthest(TokenSimilarity* similarity, std::size_t first, const std::vector<double>& bonus,
                   double theta, std::size_t k) {
  const std::size_t n = similarity->all().size();
  Positions chosen = {first};
  if (k == 1) return chosen;
  FarthestTokens farthest(similarity, similarity->all(), std::vector<float>(n, -kLargestFloat));
  farthest.Take(first);
  farthest.Fill(bonus, theta, k, &chosen);
  return chosen;
}

// Calls body(begin, count, block) for blocks of tokens: block[q * stride + i] is the similarity of
// tokens begin + q and begin + i.
template <typename Body>
void ForUpperBlocks(TokenSimilarity* similarity, const Body& body) {
  const std::size_t n = similarity->all().size();
  std::vector<float> block(std::min(n, TokenSimilarity::kQueries) * n);
  for (std::size_t begin = 0; begin < n; begin += TokenSimilarity::kQueries) {
    Positions later(n - begin);
    std::iota(later.begin(), later.end(), begin);
    const TokenSet to = similarity->Subset(later);
    later.resize(std::min(later.size(), TokenSimilarity::kQueries));
    similarity->Between(similarity->Subset(later), to, block.data(), to.size());
    body(begin, later.size(), to.size(), block.data());
  }
}

// The token whose largest similarity to any other is smallest.
std::size_t MostIsolated(TokenSimilarity* similarity) {
  const std::size_t n = similarity->all().size();
  std::vector<float> nearest(n, -kLargestFloat);
  ForUpperBlocks(similarity,
                 [&](std::size_t begin, std::size_t count, std::size_t stride, const float* block) {
                   for (std::size_t q = 0; q < count; ++q) {
                     for (std::size_t i = q + 1; i < stride; ++i) {
                       const float value = block[q * stride + i];
                       nearest[begin + q] = std::max(nearest[begin + q], value);
                       nearest[begin + i] = std::max(nearest[begin + i], value);
                     }
                   }
                 });
  return static_cast<std::size_t>(std::min_element(nearest.begin(), nearest.end()) -
                                  nearest.begin());
}

// The greedy choice of a determinantal point process, by a Cholesky factorization that grows with
// the chosen set (L. Chen, G. Zhang, E. Zhou: Fast Greedy MAP Inference for Determinantal Point
// Process to Improve Recommendation Diversity, NeurIPS 2018).
Positions Determinantal(TokenSimilarity* similarity, const std::vector<double>& z, double theta,
                        std::size_t k) {
  constexpr double kSpanned = 1e-4;         // of a token's own similarity
  constexpr std::size_t kPart = 64 * 1024;  // products that a task takes at least
  const TokenSet& all = similarity->all();
  const std::size_t n = all.size();
  std::vector<double> weight(n);
  std::vector<double> residual(n);
  std::vector<double> limit(n);
  std::vector<bool> is_chosen(n, false);
  for (std::size_t i = 0; i < n; ++i) {
    weight[i] = theta < 1.0 ? theta / (1.0 - theta) * z[i] : 2.0 * std::log(z[i] + 1e-6);
    residual[i] = double{similarity->Own(i)};
    limit[i] = kSpanned * residual[i];
  }
  std::vector<float> nearest(n, -kLargestFloat);
  std::vector<float> fresh(n);
  std::vector<double> factors(k * n);  // a row per choice
  std::vector<double> of_best(k);
  Positions chosen;
  while (chosen.size() < k) {
    std::size_t best = n;
    double best_value = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      if (is_chosen[i] || !(residual[i] > limit[i])) continue;
      const double value = weight[i] + std::log(double{static_cast<float>(residual[i])});
      if (best == n || value > best_value) {
        best = i;
        best_value = value;
      }
    }
    if (best == n) break;
    const std::size_t step = chosen.size();
    chosen.push_back(best);
    is_chosen[best] = true;
    if (chosen.size() == k) return chosen;

    similarity->From(best, all, fresh.data());
    double* row = factors.data() + step * n;
    for (std::size_t t = 0; t < step; ++t) of_best[t] = factors[t * n + best];
    const double pivot = std::sqrt(residual[best]);
    const std::size_t parts = std::clamp<std::size_t>(n * (step + 1) / kPart, 1, n);
    similarity->executor().For(parts, [&](std::size_t part) {
      const std::size_t begin = n * part / parts;
      const std::size_t end = n * (part + 1) / parts;
      for (std::size_t i = begin; i < end; ++i) row[i] = double{fresh[i]};
      similarity->functions().subtract_products(factors.data() + begin, n, of_best.data(), step,
                                                row + begin, end - begin);
      for (std::size_t i = begin; i < end; ++i) {
        row[i] /= pivot;
        residual[i] -= row[i] * row[i];
        nearest[i] = std::max(nearest[i], fresh[i]);
      }
    });
  }

  Positions left;
  std::vector<float> nearest_left;
  for (std::size_t i = 0; i < n; ++i) {
    if (is_chosen[i]) continue;
    left.push_back(i);
    nearest_left.push_back(nearest[i]);
  }
  FarthestTokens farthest(similarity, similarity->Subset(left), std::move(nearest_left));
  farthest.Fill(std::vector<double>(n, 0.0), 0.0, k, &chosen);
  return chosen;
}

// Greedy facility location. A gain only falls while the chosen set grows, rounding included, so
// that an old gain bounds a new one and few have to be computed anew (M. Minoux: Accelerated greedy
// algorithms for maximizing submodular set functions, 1978).
Positions Covering(TokenSimilarity* similarity, const std::vector<double>& z, std::size_t k) {
  const std::size_t n = similarity->all().size();
  std::vector<float> matrix(n * n);
  ForUpperBlocks(similarity,
                 [&](std::size_t begin, std::size_t count, std::size_t stride, const float* block) {
                   for (std::size_t q = 0; q < count; ++q) {
                     const float* row = block + q * stride;
                     matrix[(begin + q) * (n + 1)] = similarity->Own(begin + q);
                     for (std::size_t i = q + 1; i < stride; ++i) {
                       matrix[(begin + q) * n + begin + i] = row[i];
                       matrix[(begin + i) * n + begin + q] = row[i];
                     }
                   }
                 });
  std::vector<float> covered(n, 0.0F);
  const auto gain = [&](std::size_t token) {
    return static_cast<float>(
        similarity->functions().uncovered(matrix.data() + token * n, covered.data(), z.data(), n));
  };

  struct Candidate {
    float gain;
    std::size_t token;
    std::size_t computed;  // before this choice
  };
  const auto is_worse = [](const Candidate& a, const Candidate& b) {
    return a.gain < b.gain || (a.gain == b.gain && a.token > b.token);
  };
  std::vector<Candidate> start(n);
  similarity->executor().For(n, [&](std::size_t token) { start[token] = {gain(token), token, 0}; });
  std::priority_queue<Candidate, std::vector<Candidate>, decltype(is_worse)> queue(
      is_worse, std::move(start));
  Positions chosen;
  while (chosen.size() < k) {
    Candidate best = queue.top();
    queue.pop();
    if (best.computed < chosen.size()) {
      best.gain = gain(best.token);
      best.computed = chosen.size();
      queue.push(best);
      continue;
    }
    chosen.push_back(best.token);
    const float* row = matrix.data() + best.token * n;
    for (std::size_t i = 0; i < n; ++i) covered[i] = std::max(covered[i], row[i]);
  }
  return chosen;
}

std::size_t FirstOfMaxmin(FirstToken first, const std::vector<float>& scores,
                          TokenSimilarity* similarity) {
  if (first == FirstToken::kFarthest) return MostIsolated(similarity);
  const bool by_score = first == FirstToken::kMaxScore || !scores.empty();
  if (first != FirstToken::kMaxNorm && by_score) return Largest(scores);
  return Largest(similarity->all().norms);
}

}  // namespace

std::vector<double> NormalizedScores(const std::vector<float>& scores) {
  double low = kInfinity;
  double high = -kInfinity;
  for (const float score : scores) {
    if (!std::isfinite(score)) continue;
    low = std::min(low, double{score});
    high = std::max(high, double{score});
  }
  std::vector<double> z(scores.size());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (!std::isfinite(scores[i])) {
      z[i] = scores[i] > 0 ? 1.0 : 0.0;
    } else {
      z[i] = low == high ? 0.5 : (double{scores[i]} - low) / (high - low);
    }
  }
  return z;
}

bool NeedsSimilarity(TokenPruneMode mode) {
  return mode == TokenPruneMode::kMaxmin || mode == TokenPruneMode::kMmr ||
         mode == TokenPruneMode::kDpp || mode == TokenPruneMode::kCoverage;
}

std::vector<std::size_t> SelectTokens(const TokenPruneOptions& options, int32_t segment,
                                      std::size_t n, std::size_t k, const std::vector<float>& given,
                                      TokenSimilarity* similarity) {
  const TokenPruneMode mode = options.mode;
  if (mode == TokenPruneMode::kRandom) return Random(options.seed, segment, n, k);
  if (mode == TokenPruneMode::kUniform) return Uniform(n, k);

  std::vector<float> scores = given;
  const bool by_other_first =
      mode == TokenPruneMode::kMaxmin &&
      (options.first == FirstToken::kMaxNorm || options.first == FirstToken::kFarthest);
  if (!scores.empty() && !by_other_first) {
    bool all_nan = true;
    for (float& score : scores) {
      all_nan = all_nan && std::isnan(score);
      if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
    }
    if (all_nan) return Uniform(n, k);
  }
  if (mode == TokenPruneMode::kTopkScore) return LargestKeys(scores, k);

  const double theta = double{options.theta};
  if (mode == TokenPruneMode::kMaxmin) {
    return Farthest(similarity, FirstOfMaxmin(options.first, scores, similarity),
                    std::vector<double>(n, 0.0), 0.0, k);
  }
  const std::vector<double> z =
      scores.empty() ? std::vector<double>(n, 1.0) : NormalizedScores(scores);
  if (mode == TokenPruneMode::kMmr) return Farthest(similarity, Largest(z), z, theta, k);
  if (mode == TokenPruneMode::kDpp) return Determinantal(similarity, z, theta, k);
  return Covering(similarity, z, k);
}

}  // namespace bivlm
