// Problems for TokenPrune, with what is to come out, for tests of any implementation.
#ifndef BIVLM_TESTS_TOKEN_PRUNE_CASES_H_
#define BIVLM_TESTS_TOKEN_PRUNE_CASES_H_

#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "bivlm/token_prune.h"
#include "check.h"
#include "reference.h"

namespace bivlm::testing {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();
using Kept = std::vector<std::vector<int64_t>>;

inline std::string Text(const Kept& kept) {
  std::string text;
  for (const std::vector<int64_t>& row : kept) {
    text += '[';
    for (const int64_t token : row) text += std::to_string(token) + " ";
    text += ']';
  }
  return text;
}

// What the metric's elements are, and whether hidden is float16, too.
struct Types {
  MetricType metric;
  ElementType hidden;
};

inline uint16_t Half(double value) {
  if (std::isnan(value)) return 0x7e00;
  static std::map<double, uint16_t> known;  // the reference is slow
  const auto [at, is_new] = known.try_emplace(value, 0);
  if (is_new) at->second = NearestHalf(value);
  return at->second;
}

inline std::vector<uint16_t> Halves(const std::vector<double>& values, bool needed) {
  std::vector<uint16_t> halves;
  if (!needed) return halves;
  for (const double value : values) {
    halves.push_back(Half(value));
  }
  return halves;
}

// The arguments for a problem, with the memory that they point to.
class PruneProblem {
 public:
  PruneProblem(const ReferencePrune& p, Types types)
      : floats_(p.metric.begin(), p.metric.end()),
        halves_(Halves(p.metric, types.metric == MetricType::kFloat16)),
        half_hidden_(
            Halves({p.hidden.begin(), p.hidden.end()}, types.hidden == ElementType::kFloat16)) {
    for (const double value : p.metric) {
      bytes_.push_back(types.metric == MetricType::kInt8 ? static_cast<int8_t>(value) : int8_t{0});
    }
    TokenPruneOptions& options = args_.options;
    knows_words_ = ParseChoice(kTokenPruneModes, p.mode, &options.mode) &&
                   ParseChoice(kScoreReductions, p.score_reduce, &options.score_reduce) &&
                   ParseChoice(kFirstTokens, p.first, &options.first) &&
                   ParseChoice(kSimilarityKinds, p.similarity, &options.similarity) &&
                   ParseChoice(kMergeKinds, p.merge, &options.merge) &&
                   ParseChoice(kTokenOrders, p.order, &options.order);
    options.keep_count = p.keep_count;
    options.keep_ratio = p.keep_ratio;
    options.min_keep = p.min_keep;
    options.theta = p.theta;
    options.seed = static_cast<int64_t>(p.seed);
    args_.b = p.b;
    args_.s = p.s;
    args_.type = types.hidden;
    args_.hidden = types.hidden == ElementType::kFloat32 ? static_cast<const void*>(p.hidden.data())
                                                         : half_hidden_.data();
    args_.width = p.width;
    args_.scores = p.scores.empty() ? nullptr : p.scores.data();
    args_.heads = p.heads;
    args_.segments = p.segments.empty() ? nullptr : p.segments.data();
    args_.keep.counts = p.keep.empty() ? nullptr : p.keep.data();
    args_.keep.rows = p.keep.size() > 1 ? p.b : 1;
    args_.keep.segments = p.keep_segments;
    args_.metric_type = types.metric;
    args_.metric = types.metric == MetricType::kFloat32   ? static_cast<const void*>(floats_.data())
                   : types.metric == MetricType::kFloat16 ? static_cast<const void*>(halves_.data())
                                                          : bytes_.data();
    args_.dim = p.dim;
  }
  PruneProblem(const PruneProblem&) = delete;
  PruneProblem& operator=(const PruneProblem&) = delete;

  // Points into `p`, too, which must stay.
  const TokenPruneArgs& args() const { return args_; }
  bool knows_words() const { return knows_words_; }

 private:
  std::vector<float> floats_;
  std::vector<uint16_t> halves_;
  std::vector<uint16_t> half_hidden_;
  std::vector<int8_t> bytes_;
  TokenPruneArgs args_;
  bool knows_words_ = false;
};

// How many values of `pruned`, (b, longest, width), differ from those wanted, padding included.
inline std::size_t WrongValues(const ReferencePrune& p, const ReferencePruned& want,
                               ElementType type, std::size_t longest, const void* pruned) {
  const std::size_t element = ElementBytes(type);
  std::size_t wrong = 0;
  for (std::size_t row = 0; row < p.b; ++row) {
    for (std::size_t i = 0; i < longest * p.width; ++i) {
      const std::vector<float>& rows = want.pruned[row];
      const float value = i < rows.size() ? rows[i] : 0.0F;
      const auto* at =
          static_cast<const uint8_t*>(pruned) + (row * longest * p.width + i) * element;
      float found = 0.0F;
      if (type == ElementType::kFloat32) std::memcpy(&found, at, sizeof(found));
      if (type == ElementType::kFloat16) found = LoadHalf(at);
      const float rounded = type == ElementType::kFloat32 || std::isnan(value)
                                ? value
                                : FloatFromHalf(Half(double{value}));
      if (!(found == rounded || (std::isnan(found) && std::isnan(rounded)))) ++wrong;
    }
  }
  return wrong;
}

// One row of tokens with the metric's features in one dimension each.
inline ReferencePrune OneRow(const char* mode, std::vector<float> scores, int64_t keep_count,
                             std::size_t s) {
  ReferencePrune p;
  p.mode = mode;
  p.scores = std::move(scores);
  p.keep_count = keep_count;
  p.s = s;
  p.dim = 2;
  for (std::size_t t = 0; t < s; ++t) {
    p.metric.push_back(1.0);
    p.metric.push_back(static_cast<double>(t % 5));
    p.hidden.push_back(static_cast<float>(t));
  }
  p.width = 1;
  return p;
}

// The table of edge cases: calls expect(what, problem, tokens to keep).
template <typename Expect>
void EdgeCases(const Expect& expect) {
  ReferencePrune p = OneRow("mmr", {1, 2, 3}, 1, 3);
  p.segments = {-1, -1, -1};
  expect("no prunable token: identity", p, {{0, 1, 2}});

  p = OneRow("mmr", {1}, 0, 1);
  p.segments = {-1};
  expect("decode step: identity", p, {{0}});

  p = OneRow("topk_score", {1, 2, 3, 4}, 0, 4);
  p.min_keep = 0;
  expect("keep 0 drops all", p, {{}});
  p.segments = {0, -1, 0, -2};
  expect("keep 0 keeps text, drops padding", p, {{1}});
  p.min_keep = 1;
  expect("min_keep", p, {{1, 2}});

  for (const std::string_view name : kTokenPruneModes) {
    const char* mode = name.data();
    if (name == "none") continue;
    expect("keep >= n: identity", OneRow(mode, {4, 1, 3}, 7, 3), {{0, 1, 2}});
    expect("nothing given: identity", OneRow(mode, {4, 1, 3}, -1, 3), {{0, 1, 2}});
    ReferencePrune empty = OneRow(mode, {}, 2, 0);
    expect("no tokens", empty, {{}});
  }
  p = OneRow("none", {4, 1, 3}, 1, 3);
  p.segments = {0, -2, 0};
  expect("mode none removes padding only", p, {{0, 2}});

  expect("NaN is dropped first", OneRow("topk_score", {kNan, 1, kNan, -5}, 2, 4), {{1, 3}});
  expect("+inf wins", OneRow("topk_score", {0, kInf, 5, -kInf}, 1, 4), {{1}});
  expect("-0 equals 0", OneRow("topk_score", {-0.0F, 0.0F, -1}, 1, 3), {{0}});
  expect("ties: lower index", OneRow("topk_score", {2, 3, 3, 3, 2}, 2, 5), {{1, 2}});
  for (const char* mode : {"topk_score", "maxmin", "mmr", "dpp", "coverage"}) {
    expect("all NaN: uniform", OneRow(mode, std::vector<float>(10, kNan), 3, 10), {{1, 5, 8}});
  }
  expect("uniform", OneRow("uniform", {}, 3, 10), {{1, 5, 8}});
  expect("equal scores: z is 0.5", OneRow("mmr", {2, 2, 2, 2, 2, 2}, 2, 6), {{0, 4}});

  p = OneRow("topk_score", {1, 2, 3, 4, 5, 6}, 5, 6);
  p.keep = {2};
  expect("input keep overrides", p, {{4, 5}});
  p.keep = {0};
  expect("input keep ignores min_keep", p, {{}});

  p = OneRow("uniform", {}, -1, 30);
  p.keep_ratio = 0.1F;
  expect("ceil(30 * 0.1) is 3", p, {{5, 15, 25}});

  p = OneRow("maxmin", {}, 3, 4);
  p.metric = {1, 0, kNan, 1, 0, 0, 0, 2};
  expect("NaN and zero rows are similar to nothing", p, {{0, 1, 3}});

  for (const char* mode : {"dpp", "coverage"}) {
    p = OneRow(mode, {}, 3, 4);
    p.metric = {kNan, 1, 0, 0, 1, 0, 0, 2};
    expect("NaN and zero rows add nothing", p, {{0, 2, 3}});
  }

  for (const char* mode : {"maxmin", "dpp", "coverage"}) {
    p = OneRow(mode, {}, 10, 20);
    for (std::size_t i = 0; i < p.metric.size(); ++i) p.metric[i] = i % 2 == 0 ? 1.0 : 0.0;
    expect("duplicates stay distinct", p, {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}});
  }

  p = OneRow("topk_score", {9, 1, 8, 2, 7, 3}, 1, 6);
  p.segments = {0, 0, 0, 1, 1, 1};
  p.keep = {1, 2};
  p.keep_segments = 2;
  expect("a count per segment", p, {{0, 4, 5}});
  p.order = "score";
  p.keep = {2, 2};
  p.scores = {8, 1, 9, 2, 7, 3};
  expect("slots shared in the order of choice", p, {{2, 0, 4, 5}});

  p = OneRow("topk_score", {5, 4, 3, 2, 1, 6, 9, 8, 7, 0, 0, 0}, 2, 6);
  p.b = 2;
  p.metric.insert(p.metric.end(), p.metric.begin(), p.metric.end());
  p.hidden.insert(p.hidden.end(), p.hidden.begin(), p.hidden.end());
  p.segments = {0, 0, 0, 7, 7, 7, -1, 3, 3, 3, -2, -2};
  expect("rows and segments apart", p, {{0, 1, 3, 5}, {0, 1, 2}});
}

inline ReferencePrune RandomProblem(uint64_t seed, bool integers) {
  std::mt19937_64 random(seed);
  ReferencePrune p;
  p.mode = kTokenPruneModes[seed % 7];
  p.b = 1 + random() % 3;
  p.s = random() % 40;
  const std::size_t dims[] = {1, 3, 7, 8, 9, 16, 17, 31, 63, 64, 65, 100, 130};
  // With one real feature every cosine is +-1: ties that rounding would decide.
  p.dim = dims[integers ? random() % 13 : 1 + random() % 12];
  p.seed = random();
  p.theta = static_cast<float>(random() % 5) * 0.25F;
  p.min_keep = static_cast<int64_t>(random() % 3);
  const auto one_of = [&](const auto& words) {
    return std::string(words[random() % std::size(words)]);
  };
  switch (random() % 3) {
    case 0: {
      const std::size_t counts[] = {1, p.b, 3 * p.b};
      const std::size_t kind = random() % 3;
      for (std::size_t i = 0; i < counts[kind]; ++i) {
        p.keep.push_back(static_cast<int64_t>(random() % 12));
      }
      if (kind == 2) p.keep_segments = 3;
      break;
    }
    case 1:
      p.keep_count = static_cast<int64_t>(random() % 12);
      break;
    default:
      p.keep_ratio = static_cast<float>(random() % 11) * 0.1F;
  }
  std::normal_distribution<float> normal(0.0F, 1.0F);
  const auto number = [&] {
    return integers ? static_cast<float>(static_cast<int>(random() % 7) - 3) : normal(random);
  };
  if (p.mode == "topk_score" || p.mode == "mmr" || random() % 2 == 0) {
    p.heads = random() % 3 == 0 ? 1 + random() % 3 : 1;
    for (std::size_t i = 0; i < p.b * p.heads * p.s; ++i) {
      const float specials[] = {kNan, kInf, -kInf};
      const uint64_t kind = random() % 40;
      p.scores.push_back(kind < 3 ? specials[kind] : number());
    }
  }
  if (random() % 2 == 0) {
    for (std::size_t i = 0; i < p.b * p.s; ++i) {
      p.segments.push_back(static_cast<int32_t>(random() % 5) - 2);
    }
  }
  for (std::size_t i = 0; i < p.b * p.s * p.dim; ++i) p.metric.push_back(double{number()});
  p.width = random() % 8 == 0 ? 600 : 1 + random() % 40;
  for (std::size_t i = 0; i < p.b * p.s * p.width; ++i) {
    p.hidden.push_back(random() % 4000 == 0 ? kNan
                                            : static_cast<float>(static_cast<int>(random() % 9)));
  }
  p.score_reduce = one_of(kScoreReductions);
  p.first = one_of(kFirstTokens);
  p.similarity = one_of(kSimilarityKinds);
  p.merge = one_of(kMergeKinds);
  p.order = one_of(kTokenOrders);
  if (p.scores.empty()) {
    if (p.first == "max_score") p.first = "auto";
    if (p.merge == "score_weighted") p.merge = "mean";
  }
  return p;
}

// Features whose squares overflow or vanish in float32, and enough of them for several tasks:
// calls expect(what, problem).
template <typename Expect>
void LargeAndExtreme(std::size_t dim, const Expect& expect) {
  for (const double size : {1.0, 1e25, 1e-25}) {
    ReferencePrune p;
    p.mode = "maxmin";
    p.keep_count = 9;
    p.s = 80;
    p.dim = dim;
    std::mt19937_64 random(31);
    std::normal_distribution<float> normal(0.0F, 1.0F);
    for (std::size_t i = 0; i < p.s * p.dim; ++i) {
      p.metric.push_back(double{static_cast<float>(normal(random) * size)});
    }
    p.width = 3;
    p.hidden.assign(p.s * p.width, 1.0F);
    for (const char* mode : {"maxmin", "dpp", "coverage"}) {
      if (!RunsCase()) continue;
      p.mode = mode;
      p.merge = "mean";
      expect("features of size " + std::to_string(size), p);
    }
  }
}

}  // namespace bivlm::testing

#endif  // BIVLM_TESTS_TOKEN_PRUNE_CASES_H_
