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

// The choices of a greedy mode whose gains only fall while the chosen set grows, rounding included:
// an old gain bounds a new one, and few have to be computed anew (M. Minoux: Accelerated greedy
// algorithms for maximizing submodular set functions, 1978). Of equal gains the lower token wins.
template <typename Gain>
class LazyQueue {
 public:
  struct Entry {
    Gain gain;
    std::size_t token;
    std::size_t seen;  // chosen tokens that the gain knows of
  };

  explicit LazyQueue(std::vector<Entry> entries) : queue_(IsWorse(), std::move(entries)) {}

  // The best token among those whose gain knows of all `count` chosen ones, or false if none is
  // left. refresh(entries) brings entries up to date; those that it drops do not come back.
  template <typename Refresh>
  bool Pop(std::size_t count, const Refresh& refresh, std::size_t* token) {
    constexpr std::size_t kBatch = 16;
    while (!queue_.empty()) {
      if (queue_.top().seen == count) {
        *token = queue_.top().token;
        queue_.pop();
        return true;
      }
      std::vector<Entry> stale;
      while (!queue_.empty() && stale.size() < kBatch && queue_.top().seen < count) {
        stale.push_back(queue_.top());
        queue_.pop();
      }
      refresh(&stale);
      for (const Entry& entry : stale) queue_.push(entry);
    }
    return false;
  }

 private:
  struct IsWorse {
    bool operator()(const Entry& a, const Entry& b) const {
      return a.gain < b.gain || (a.gain == b.gain && a.token > b.token);
    }
  };
  std::priority_queue<Entry, std::vector<Entry>, IsWorse> queue_;
};

std::vector<TokenSimilarity::Request> RequestsOf(
    const std::vector<LazyQueue<double>::Entry>& entries) {
  std::vector<TokenSimilarity::Request> requests;
  for (const auto& entry : entries) requests.push_back({entry.token, entry.seen});
  return requests;
}

// Adds tokens to `chosen` until there are k: again and again the largest
// theta * bonus - (1 - theta) * (largest similarity to any chosen token). `nearest` has that
// similarity of each token to the first `seen` ones of `chosen`.
Positions FillFarthest(TokenSimilarity* similarity, const std::vector<double>& bonus, double theta,
                       std::size_t k, Positions chosen, std::vector<float> nearest,
                       const std::vector<std::size_t>& seen) {
  const std::size_t n = similarity->all().size();
  const auto gain = [&](std::size_t token) {
    return theta * bonus[token] - (1.0 - theta) * double{nearest[token]};
  };
  std::vector<bool> is_chosen(n, false);
  for (const std::size_t token : chosen) is_chosen[token] = true;
  std::vector<LazyQueue<double>::Entry> entries;
  for (std::size_t token = 0; token < n; ++token) {
    if (!is_chosen[token]) entries.push_back({gain(token), token, seen[token]});
  }
  LazyQueue<double> queue(std::move(entries));
  TokenSet taken = similarity->Subset(chosen);
  std::size_t best = 0;
  const auto refresh = [&](std::vector<LazyQueue<double>::Entry>* stale) {
    similarity->ForRequests(RequestsOf(*stale), taken,
                            [&](std::size_t r, std::size_t, float value) {
                              float& largest = nearest[(*stale)[r].token];
                              largest = std::max(largest, value);
                            });
    for (auto& entry : *stale) {
      entry.gain = gain(entry.token);
      entry.seen = taken.size();
    }
  };
  while (chosen.size() < k && queue.Pop(chosen.size(), refresh, &best)) {
    chosen.push_back(best);
    similarity->Add(best, &taken);
  }
  return chosen;
}

Positions Farthest(TokenSimilarity* similarity, std::size_t first, const std::vector<double>& bonus,
                   double theta, std::size_t k) {
  const std::size_t n = similarity->all().size();
  if (k == 1) return {first};
  std::vector<float> nearest(n);
  similarity->From(first, similarity->all(), nearest.data());
  return FillFarthest(similarity, bonus, theta, k, {first}, std::move(nearest),
                      std::vector<std::size_t>(n, 1));
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
// Process to Improve Recommendation Diversity, NeurIPS 2018), each token's row of it only as far
// as it is needed (S. Hemmi, T. Oki, S. Sakaue, K. Fujii, S. Iwata: Lazy and Fast Greedy MAP
// Inference for Determinantal Point Process, NeurIPS 2022).
Positions Determinantal(TokenSimilarity* similarity, const std::vector<double>& z, double theta,
                        std::size_t k) {
  constexpr double kSpanned = 1e-4;  // of a token's own similarity
  using Entry = LazyQueue<double>::Entry;
  const std::size_t n = similarity->all().size();
  std::vector<double> weight(n);
  std::vector<double> residual(n);
  std::vector<double> limit(n);
  const auto gain = [&](std::size_t token) {
    return weight[token] + std::log(double{static_cast<float>(residual[token])});
  };
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < n; ++i) {
    weight[i] = theta < 1.0 ? theta / (1.0 - theta) * z[i] : 2.0 * std::log(z[i] + 1e-6);
    residual[i] = double{similarity->Own(i)};
    limit[i] = kSpanned * residual[i];
    if (residual[i] > limit[i]) entries.push_back({gain(i), i, 0});
  }
  LazyQueue<double> queue(std::move(entries));
  std::vector<float> nearest(n, -kLargestFloat);
  std::vector<std::size_t> seen(n, 0);
  std::vector<double> factors(n * k);  // a row per token
  std::vector<double> pivots;
  Positions chosen;
  TokenSet taken;
  const auto refresh = [&](std::vector<Entry>* stale) {
    similarity->ForRequests(
        RequestsOf(*stale), taken, [&](std::size_t r, std::size_t t, float value) {
          const std::size_t token = (*stale)[r].token;
          double* row = factors.data() + token * k;
          const double* other = factors.data() + chosen[t] * k;
          row[t] = (double{value} - similarity->functions().product(row, other, t)) / pivots[t];
          residual[token] -= row[t] * row[t];
          nearest[token] = std::max(nearest[token], value);
        });
    std::vector<Entry> left;
    for (const Entry& entry : *stale) {
      seen[entry.token] = taken.size();
      if (!(residual[entry.token] > limit[entry.token])) continue;
      left.push_back({gain(entry.token), entry.token, taken.size()});
    }
    *stale = std::move(left);
  };
  std::size_t best = 0;
  while (chosen.size() < k && queue.Pop(chosen.size(), refresh, &best)) {
    chosen.push_back(best);
    similarity->Add(best, &taken);
    pivots.push_back(std::sqrt(residual[best]));
  }
  if (chosen.size() == k) return chosen;
  return FillFarthest(similarity, std::vector<double>(n, 0.0), 0.0, k, std::move(chosen),
                      std::move(nearest), seen);
}

// Greedy facility location.
Positions Covering(TokenSimilarity* similarity, const std::vector<double>& z, std::size_t k) {
  using Entry = LazyQueue<float>::Entry;
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
  std::vector<Entry> entries(n);
  similarity->executor().For(n,
                             [&](std::size_t token) { entries[token] = {gain(token), token, 0}; });
  LazyQueue<float> queue(std::move(entries));
  Positions chosen;
  std::size_t best = 0;
  const auto refresh = [&](std::vector<Entry>* stale) {
    similarity->executor().For(stale->size(), [&](std::size_t i) {
      Entry& entry = (*stale)[i];
      entry = {gain(entry.token), entry.token, chosen.size()};
    });
  };
  while (chosen.size() < k && queue.Pop(chosen.size(), refresh, &best)) {
    chosen.push_back(best);
    const float* row = matrix.data() + best * n;
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
