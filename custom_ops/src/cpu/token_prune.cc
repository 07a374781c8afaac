// The selections of TokenPrune: counting, ordering, and the greedy loops round the kernels.
#include "bivlm/token_prune.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

namespace bivlm {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Features that a task reads at least: 4 to 9 us with AVX2 or AVX-512 on Zen 5.
constexpr std::size_t kTaskFeatures = 131072;

// One segment of one row of the batch.
struct Segment {
  std::size_t row = 0;
  int32_t id = 0;
  std::vector<uint32_t> tokens;  // positions in the row, rising
};

// Positions inside the segment, rising, of the k largest keys; of equal keys the lower position.
template <typename Key>
std::vector<std::size_t> LargestKeys(const std::vector<Key>& keys, std::size_t k) {
  std::vector<std::size_t> positions(keys.size());
  std::iota(positions.begin(), positions.end(), std::size_t{0});
  std::partial_sort(positions.begin(), positions.begin() + static_cast<std::ptrdiff_t>(k),
                    positions.end(), [&keys](std::size_t a, std::size_t b) {
                      return keys[a] > keys[b] || (keys[a] == keys[b] && a < b);
                    });
  positions.resize(k);
  return positions;
}

std::vector<std::size_t> Uniform(std::size_t n, std::size_t k) {
  std::vector<std::size_t> chosen(k);
  for (std::size_t i = 0; i < k; ++i) chosen[i] = (2 * i + 1) * n / (2 * k);
  return chosen;
}

std::vector<std::size_t> Random(int64_t seed, int32_t segment, std::size_t n, std::size_t k) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const uint32_t key[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  std::vector<uint32_t> keys(n);
  for (std::size_t t = 0; t < n; ++t) {
    const uint32_t counter[4] = {static_cast<uint32_t>(t), static_cast<uint32_t>(segment), 0, 0};
    keys[t] = Philox4x32(counter, key);
  }
  return LargestKeys(keys, k);
}

// z of `mmr`, from scores in which NaN is already -inf.
std::vector<double> NormalizedScores(const std::vector<double>& scores) {
  double low = kInfinity;
  double high = -kInfinity;
  for (const double score : scores) {
    if (!std::isfinite(score)) continue;
    low = std::min(low, score);
    high = std::max(high, score);
  }
  std::vector<double> z(scores.size());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (!std::isfinite(scores[i])) {
      z[i] = scores[i] > 0 ? 1.0 : 0.0;
    } else {
      z[i] = low == high ? 0.5 : (scores[i] - low) / (high - low);
    }
  }
  return z;
}

// Chooses tokens one after the other, each by its own weight and its largest similarity to those
// chosen before.
class GreedySelection {
 public:
  GreedySelection(const TokenPruneKernel& kernel, const TokenPruneArgs& args,
                  const Segment& segment, const Executor& executor)
      : kernel_(kernel),
        args_(args),
        executor_(executor),
        index_(segment.tokens),
        positions_(segment.tokens.size()),
        norms_(segment.tokens.size()),
        similarity_(segment.tokens.size(), -std::numeric_limits<float>::infinity()),
        dots_(segment.tokens.size()),
        query_(args.dim) {
    for (uint32_t& token : index_) token += static_cast<uint32_t>(segment.row * args.s);
    std::iota(positions_.begin(), positions_.end(), std::size_t{0});
    ForRows([this](const TokenPruneRows& rows, std::size_t begin) {
      kernel_.functions->squared_norms(rows, norms_.data() + begin);
    });
    // Rows that have no direction, in float32 terms, count as norm 0: similar to nothing.
    for (double& norm : norms_) {
      const float length = static_cast<float>(std::sqrt(norm));
      if (!std::isfinite(length) || length == 0.0F) norm = 0.0;
    }
  }

  // Squared norms of all tokens; 0 where the similarity is 0 by definition.
  const std::vector<double>& norms() const { return norms_; }

  // k positions inside the segment: the largest `first`, then repeatedly the largest
  // theta * weight - (1 - theta) * (largest similarity to those chosen).
  std::vector<std::size_t> Run(const std::vector<double>& first, const std::vector<double>& weight,
                               double theta, std::size_t k) {
    std::vector<std::size_t> chosen;
    while (chosen.size() < k) {
      std::size_t best = 0;
      double best_value = 0.0;
      for (std::size_t i = 0; i < positions_.size(); ++i) {
        const std::size_t at = positions_[i];
        const double value = chosen.empty()
                                 ? first[at]
                                 : theta * weight[at] - (1.0 - theta) * double{similarity_[i]};
        if (i == 0 || value > best_value) {
          best = i;
          best_value = value;
        }
      }
      chosen.push_back(positions_[best]);
      if (chosen.size() < k) Choose(best);
    }
    return chosen;
  }

 private:
  // Takes candidate `best` out and raises the similarities of the others.
  void Choose(std::size_t best) {
    const double norm = norms_[best];
    const uint32_t row = index_[best];
    const auto erase = [best](auto& values) {
      values.erase(values.begin() + static_cast<std::ptrdiff_t>(best));
    };
    erase(index_);
    erase(positions_);
    erase(norms_);
    erase(similarity_);
    const double scale = norm > 0.0 ? LoadQuery(row, norm) : 0.0;
    ForRows([&](const TokenPruneRows& rows, std::size_t begin) {
      if (norm > 0.0) kernel_.functions->dots(rows, query_.data(), dots_.data() + begin);
      for (std::size_t i = begin; i < begin + rows.count; ++i) {
        float similarity = 0.0F;
        if (norm > 0.0 && norms_[i] > 0.0) {
          similarity = static_cast<float>(double{dots_[i]} * scale / std::sqrt(norms_[i] * norm));
        }
        similarity_[i] = std::max(similarity_[i], similarity);
      }
    });
  }

  // query_ = features of `row` times a power of two that makes its norm about 1, so that no dot
  // product overflows. Returns the inverse of that power.
  double LoadQuery(uint32_t row, double norm) {
    const int exponent = std::ilogb(norm) / 2;
    const double factor = std::ldexp(1.0, -exponent);
    const std::size_t begin = row * args_.dim;
    for (std::size_t d = 0; d < args_.dim; ++d) {
      const float value =
          args_.type == ElementType::kFloat32
              ? static_cast<const float*>(args_.metric)[begin + d]
              : FloatFromHalf(static_cast<const uint16_t*>(args_.metric)[begin + d]);
      query_[d] = static_cast<float>(value * factor);
    }
    return std::ldexp(1.0, exponent);
  }

  // body(rows, begin) for parts of the candidates that begin at `begin`.
  template <typename Body>
  void ForRows(const Body& body) {
    const std::size_t count = index_.size();
    const std::size_t parts = std::clamp<std::size_t>(count * args_.dim / kTaskFeatures, 1,
                                                      std::max<std::size_t>(count, 1));
    executor_.For(parts, [&](std::size_t part) {
      const std::size_t begin = count * part / parts;
      TokenPruneRows rows;
      rows.type = args_.type;
      rows.features = args_.metric;
      rows.dim = args_.dim;
      rows.index = index_.data() + begin;
      rows.count = count * (part + 1) / parts - begin;
      body(rows, begin);
    });
  }

  const TokenPruneKernel& kernel_;
  const TokenPruneArgs& args_;
  const Executor& executor_;
  // Of the candidates, in input order:
  std::vector<uint32_t> index_;         // rows of metric
  std::vector<std::size_t> positions_;  // inside the segment
  std::vector<double> norms_;           // squared
  std::vector<float> similarity_;       // the largest to any chosen token
  std::vector<float> dots_;
  std::vector<float> query_;
};

// Positions inside the segment of the k tokens to keep, in any order.
std::vector<std::size_t> SelectFrom(const TokenPruneKernel& kernel, const TokenPruneArgs& args,
                                    const Segment& segment, std::size_t k,
                                    const Executor& executor) {
  const std::size_t n = segment.tokens.size();
  const TokenPruneMode mode = args.options.mode;
  if (mode == TokenPruneMode::kRandom) return Random(args.options.seed, segment.id, n, k);
  if (mode == TokenPruneMode::kUniform) return Uniform(n, k);

  std::vector<double> scores;
  if (args.scores != nullptr) {
    bool all_nan = true;
    for (const uint32_t token : segment.tokens) {
      const float score = args.scores[segment.row * args.s + token];
      all_nan = all_nan && std::isnan(score);
      scores.push_back(std::isnan(score) ? -kInfinity : double{score});
    }
    if (all_nan) return Uniform(n, k);
  }
  if (mode == TokenPruneMode::kTopkScore) return LargestKeys(scores, k);

  GreedySelection greedy(kernel, args, segment, executor);
  if (mode == TokenPruneMode::kMmr) {
    const std::vector<double> z = NormalizedScores(scores);
    return greedy.Run(z, z, double{args.options.theta}, k);
  }
  const std::vector<double> no_weight(n, 0.0);
  const std::vector<double> first = args.scores != nullptr ? scores : greedy.norms();
  return greedy.Run(first, no_weight, 0.0, k);
}

}  // namespace

uint32_t Philox4x32(const uint32_t (&counter)[4], const uint32_t (&key)[2]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  uint32_t k[2] = {key[0], key[1]};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53U} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57U} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(product0)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9U;
    k[1] += 0xBB67AE85U;
  }
  return c[0];
}

bool ParseTokenPruneMode(std::string_view name, TokenPruneMode* mode) {
  constexpr struct {
    std::string_view name;
    TokenPruneMode mode;
  } kModes[] = {{"topk_score", TokenPruneMode::kTopkScore},
                {"maxmin", TokenPruneMode::kMaxmin},
                {"mmr", TokenPruneMode::kMmr},
                {"uniform", TokenPruneMode::kUniform},
                {"random", TokenPruneMode::kRandom},
                {"none", TokenPruneMode::kNone}};
  for (const auto& known : kModes) {
    if (known.name != name) continue;
    *mode = known.mode;
    return true;
  }
  return false;
}

std::size_t TokenPruneCount(const TokenPruneOptions& options, const int64_t* keep, std::size_t n) {
  if (options.mode == TokenPruneMode::kNone) return n;
  const int64_t tokens = static_cast<int64_t>(n);
  if (keep != nullptr) return static_cast<std::size_t>(std::min(tokens, *keep));
  int64_t wanted = tokens;
  if (options.keep_count >= 0) {
    wanted = options.keep_count;
  } else if (options.keep_ratio >= 0.0F) {
    const double share = static_cast<double>(n) * double{options.keep_ratio};
    wanted = static_cast<int64_t>(std::ceil(share - 1e-6));
  }
  return static_cast<std::size_t>(
      std::min(tokens, std::max({options.min_keep, wanted, int64_t{0}})));
}

std::vector<std::vector<int64_t>> RunTokenPrune(const TokenPruneKernel& kernel,
                                                const TokenPruneArgs& args,
                                                const Executor& executor) {
  std::vector<std::vector<int64_t>> kept(args.b);
  for (std::size_t row = 0; row < args.b; ++row) {
    std::map<int32_t, Segment> segments;
    for (std::size_t t = 0; t < args.s; ++t) {
      const int32_t id = args.segments == nullptr ? 0 : args.segments[row * args.s + t];
      if (id == -1) kept[row].push_back(static_cast<int64_t>(t));
      if (id < 0) continue;
      Segment& segment = segments[id];
      segment.row = row;
      segment.id = id;
      segment.tokens.push_back(static_cast<uint32_t>(t));
    }
    for (const auto& [id, segment] : segments) {
      const std::size_t n = segment.tokens.size();
      const std::size_t k = TokenPruneCount(args.options, args.keep, n);
      if (k == n) {
        kept[row].insert(kept[row].end(), segment.tokens.begin(), segment.tokens.end());
      } else if (k > 0) {
        for (const std::size_t position : SelectFrom(kernel, args, segment, k, executor)) {
          kept[row].push_back(segment.tokens[position]);
        }
      }
    }
    std::sort(kept[row].begin(), kept[row].end());
  }
  return kept;
}

}  // namespace bivlm
