// TokenPrune with every kernel that this CPU has against the reference.
#include "bivlm/token_prune.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <string_view>

#include "check.h"
#include "reference.h"

namespace bivlm::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
using Kept = std::vector<std::vector<int64_t>>;

std::string Text(const Kept& kept) {
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

uint16_t Half(double value) {
  if (std::isnan(value)) return 0x7e00;
  static std::map<double, uint16_t> known;  // the reference is slow
  const auto [at, is_new] = known.try_emplace(value, 0);
  if (is_new) at->second = NearestHalf(value);
  return at->second;
}

std::vector<uint16_t> Halves(const std::vector<double>& values, bool needed) {
  std::vector<uint16_t> halves;
  if (!needed) return halves;
  for (const double value : values) {
    halves.push_back(Half(value));
  }
  return halves;
}

// Compares kept tokens, token_map and pruned with the reference; looks behind both ends.
void ExpectEqual(Checker* check, const TokenPruneKernel& kernel, const std::string& what,
                 const ReferencePrune& p, const ReferencePruned& want, Types types,
                 const Executor& executor) {
  const std::vector<float> floats(p.metric.begin(), p.metric.end());
  const std::vector<uint16_t> halves = Halves(p.metric, types.metric == MetricType::kFloat16);
  std::vector<int8_t> bytes;
  for (const double value : p.metric) {
    bytes.push_back(types.metric == MetricType::kInt8 ? static_cast<int8_t>(value) : int8_t{0});
  }
  const std::vector<uint16_t> half_hidden =
      Halves({p.hidden.begin(), p.hidden.end()}, types.hidden == ElementType::kFloat16);
  TokenPruneArgs args;
  TokenPruneOptions& options = args.options;
  check->Expect(ParseChoice(kTokenPruneModes, p.mode, &options.mode) &&
                    ParseChoice(kScoreReductions, p.score_reduce, &options.score_reduce) &&
                    ParseChoice(kFirstTokens, p.first, &options.first) &&
                    ParseChoice(kSimilarityKinds, p.similarity, &options.similarity) &&
                    ParseChoice(kMergeKinds, p.merge, &options.merge) &&
                    ParseChoice(kTokenOrders, p.order, &options.order),
                what, ": a word is unknown");
  options.keep_count = p.keep_count;
  options.keep_ratio = p.keep_ratio;
  options.min_keep = p.min_keep;
  options.theta = p.theta;
  options.seed = static_cast<int64_t>(p.seed);
  args.b = p.b;
  args.s = p.s;
  args.type = types.hidden;
  args.hidden = types.hidden == ElementType::kFloat32 ? static_cast<const void*>(p.hidden.data())
                                                      : half_hidden.data();
  args.width = p.width;
  args.scores = p.scores.empty() ? nullptr : p.scores.data();
  args.heads = p.heads;
  args.segments = p.segments.empty() ? nullptr : p.segments.data();
  args.keep.counts = p.keep.empty() ? nullptr : p.keep.data();
  args.keep.rows = p.keep.size() > 1 ? p.b : 1;
  args.keep.segments = p.keep_segments;
  args.metric_type = types.metric;
  args.metric = types.metric == MetricType::kFloat32   ? static_cast<const void*>(floats.data())
                : types.metric == MetricType::kFloat16 ? static_cast<const void*>(halves.data())
                                                       : bytes.data();
  args.dim = p.dim;

  const TokenPruneSelection got = RunTokenPrune(kernel, args, executor);
  check->Expect(got.kept == want.kept, kernel.name, " ", what, " mode=", p.mode, " s=", p.s,
                " dim=", p.dim, " metric type ", static_cast<int>(types.metric), ": got ",
                Text(got.kept), " want ", Text(want.kept));
  if (got.kept != want.kept) return;

  Guarded map(p.b * p.s * sizeof(int64_t));
  auto* token_map = static_cast<int64_t*>(map.data());
  WriteTokenMap(args, got, token_map);
  check->Expect(
      std::equal(want.token_map.begin(), want.token_map.end(), token_map) && map.IsIntact(),
      kernel.name, " ", what, " mode=", p.mode, ": token_map is wrong");

  const std::size_t longest = got.Longest();
  const std::size_t element = ElementBytes(types.hidden);
  Guarded pruned(p.b * longest * p.width * element);
  WritePruned(args, got, pruned.data(), executor);
  std::size_t wrong = 0;
  for (std::size_t row = 0; row < p.b; ++row) {
    for (std::size_t i = 0; i < longest * p.width; ++i) {
      const std::vector<float>& rows = want.pruned[row];
      const float value = i < rows.size() ? rows[i] : 0.0F;
      const auto* at =
          static_cast<const uint8_t*>(pruned.data()) + (row * longest * p.width + i) * element;
      float found = 0.0F;
      if (types.hidden == ElementType::kFloat32) std::memcpy(&found, at, sizeof(found));
      if (types.hidden == ElementType::kFloat16) found = LoadHalf(at);
      const float rounded = types.hidden == ElementType::kFloat32 || std::isnan(value)
                                ? value
                                : FloatFromHalf(Half(double{value}));
      if (!(found == rounded || (std::isnan(found) && std::isnan(rounded)))) ++wrong;
    }
  }
  check->Expect(wrong == 0 && pruned.IsIntact(), kernel.name, " ", what, " mode=", p.mode,
                " merge=", p.merge, ": ", wrong, " values of pruned are wrong, or written outside");
}

// Runs every available kernel. `exact`: the metric is exact in all types (int8 if `integers`).
void ExpectPruned(Checker* check, const std::string& what, const ReferencePrune& given,
                  const ReferencePruned& want, bool exact, bool integers,
                  const Executor& executor = Executor()) {
  for (const TokenPruneKernel& kernel : TokenPruneKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    const auto expect = [&](MetricType metric, ElementType hidden) {
      ExpectEqual(check, kernel, what, given, want, {metric, hidden}, executor);
    };
    expect(MetricType::kFloat32, ElementType::kFloat32);
    if (exact) expect(MetricType::kFloat16, ElementType::kFloat16);
    if (exact && integers) expect(MetricType::kInt8, ElementType::kFloat16);
  }
}

void ExpectKept(Checker* check, const char* what, const ReferencePrune& p, const Kept& want) {
  const ReferencePruned reference = ReferenceTokenPrune(p);
  check->Expect(reference.kept == want, "reference ", what, ": got ", Text(reference.kept),
                " want ", Text(want));
  ExpectPruned(check, what, p, reference, true, false);
}

// One row of tokens with the metric's features in one dimension each.
ReferencePrune OneRow(const char* mode, std::vector<float> scores, int64_t keep_count,
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

// The table of edge cases.
void EdgeCases(Checker* check) {
  ReferencePrune p = OneRow("mmr", {1, 2, 3}, 1, 3);
  p.segments = {-1, -1, -1};
  ExpectKept(check, "no prunable token: identity", p, {{0, 1, 2}});

  p = OneRow("mmr", {1}, 0, 1);
  p.segments = {-1};
  ExpectKept(check, "decode step: identity", p, {{0}});

  p = OneRow("topk_score", {1, 2, 3, 4}, 0, 4);
  p.min_keep = 0;
  ExpectKept(check, "keep 0 drops all", p, {{}});
  p.segments = {0, -1, 0, -2};
  ExpectKept(check, "keep 0 keeps text, drops padding", p, {{1}});
  p.min_keep = 1;
  ExpectKept(check, "min_keep", p, {{1, 2}});

  for (const std::string_view name : kTokenPruneModes) {
    const char* mode = name.data();
    if (name == "none") continue;
    ExpectKept(check, "keep >= n: identity", OneRow(mode, {4, 1, 3}, 7, 3), {{0, 1, 2}});
    ExpectKept(check, "nothing given: identity", OneRow(mode, {4, 1, 3}, -1, 3), {{0, 1, 2}});
    ReferencePrune empty = OneRow(mode, {}, 2, 0);
    ExpectKept(check, "no tokens", empty, {{}});
  }
  p = OneRow("none", {4, 1, 3}, 1, 3);
  p.segments = {0, -2, 0};
  ExpectKept(check, "mode none removes padding only", p, {{0, 2}});

  ExpectKept(check, "NaN is dropped first", OneRow("topk_score", {kNan, 1, kNan, -5}, 2, 4),
             {{1, 3}});
  ExpectKept(check, "+inf wins", OneRow("topk_score", {0, kInf, 5, -kInf}, 1, 4), {{1}});
  ExpectKept(check, "-0 equals 0", OneRow("topk_score", {-0.0F, 0.0F, -1}, 1, 3), {{0}});
  ExpectKept(check, "ties: lower index", OneRow("topk_score", {2, 3, 3, 3, 2}, 2, 5), {{1, 2}});
  for (const char* mode : {"topk_score", "maxmin", "mmr", "dpp", "coverage"}) {
    ExpectKept(check, "all NaN: uniform", OneRow(mode, std::vector<float>(10, kNan), 3, 10),
               {{1, 5, 8}});
  }
  ExpectKept(check, "uniform", OneRow("uniform", {}, 3, 10), {{1, 5, 8}});
  ExpectKept(check, "equal scores: z is 0.5", OneRow("mmr", {2, 2, 2, 2, 2, 2}, 2, 6), {{0, 4}});

  p = OneRow("topk_score", {1, 2, 3, 4, 5, 6}, 5, 6);
  p.keep = {2};
  ExpectKept(check, "input keep overrides", p, {{4, 5}});
  p.keep = {0};
  ExpectKept(check, "input keep ignores min_keep", p, {{}});

  p = OneRow("uniform", {}, -1, 30);
  p.keep_ratio = 0.1F;
  ExpectKept(check, "ceil(30 * 0.1) is 3", p, {{5, 15, 25}});

  p = OneRow("maxmin", {}, 3, 4);
  p.metric = {1, 0, kNan, 1, 0, 0, 0, 2};
  ExpectKept(check, "NaN and zero rows are similar to nothing", p, {{0, 1, 3}});

  for (const char* mode : {"dpp", "coverage"}) {
    p = OneRow(mode, {}, 3, 4);
    p.metric = {kNan, 1, 0, 0, 1, 0, 0, 2};
    ExpectKept(check, "NaN and zero rows add nothing", p, {{0, 2, 3}});
  }

  for (const char* mode : {"maxmin", "dpp", "coverage"}) {
    p = OneRow(mode, {}, 10, 20);
    for (std::size_t i = 0; i < p.metric.size(); ++i) p.metric[i] = i % 2 == 0 ? 1.0 : 0.0;
    ExpectKept(check, "duplicates stay distinct", p, {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}});
  }

  p = OneRow("topk_score", {9, 1, 8, 2, 7, 3}, 1, 6);
  p.segments = {0, 0, 0, 1, 1, 1};
  p.keep = {1, 2};
  p.keep_segments = 2;
  ExpectKept(check, "a count per segment", p, {{0, 4, 5}});
  p.order = "score";
  p.keep = {2, 2};
  p.scores = {8, 1, 9, 2, 7, 3};
  ExpectKept(check, "slots shared in the order of choice", p, {{2, 0, 4, 5}});

  p = OneRow("topk_score", {5, 4, 3, 2, 1, 6, 9, 8, 7, 0, 0, 0}, 2, 6);
  p.b = 2;
  p.metric.insert(p.metric.end(), p.metric.begin(), p.metric.end());
  p.hidden.insert(p.hidden.end(), p.hidden.begin(), p.hidden.end());
  p.segments = {0, 0, 0, 7, 7, 7, -1, 3, 3, 3, -2, -2};
  ExpectKept(check, "rows and segments apart", p, {{0, 1, 3, 5}, {0, 1, 2}});
}

void CountRule(Checker* check) {
  TokenPruneOptions options;
  const auto expect = [&](std::size_t n, std::size_t want) {
    const std::size_t got = TokenPruneCount(options, nullptr, n);
    check->Expect(got == want, "count of ", n, " with ratio ", options.keep_ratio, ": got ", got,
                  " want ", want);
  };
  options.keep_ratio = 0.1F;
  expect(30, 3);
  expect(31, 4);
  expect(1, 1);
  expect(0, 0);
  options.keep_ratio = 0.0F;
  expect(30, 1);
  options.min_keep = 0;
  expect(30, 0);
  options.keep_ratio = 1.0F;
  expect(30, 30);
  options.keep_count = 4;
  expect(30, 4);
}

// Known answers of Random123 (kat_vectors, philox4x32-10).
void PhiloxKnownAnswers(Checker* check) {
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const struct {
    uint32_t counter[4];
    uint32_t key[2];
    uint32_t want;
  } cases[] = {
      {{0, 0, 0, 0}, {0, 0}, 0x6627e8d5},
      {{kAll, kAll, kAll, kAll}, {kAll, kAll}, 0x408f276d},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, 0xd16cfe09}};
  for (const auto& c : cases) {
    const uint32_t got = Philox4x32(c.counter, c.key);
    check->Expect(got == c.want, "philox: got ", got, " want ", c.want);
  }
}

ReferencePrune RandomProblem(uint64_t seed, bool integers) {
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

// Integer features: every dot product and norm is exact, so the choices are too, ties included.
void IntegerFeatures(Checker* check) {
  for (uint64_t seed = 1; seed <= 700; ++seed) {
    if (!RunsCase()) continue;
    const ReferencePrune p = RandomProblem(seed, true);
    ExpectPruned(check, "seed " + std::to_string(seed), p, ReferenceTokenPrune(p), true, true);
  }
}

// Gaussian features: no ties, so that rounding of 1e-7 does not change the choices of these seeds.
void RealFeatures(Checker* check) {
  for (uint64_t seed = 2001; seed <= 2300; ++seed) {
    if (!RunsCase()) continue;
    const ReferencePrune p = RandomProblem(seed, false);
    ExpectPruned(check, "seed " + std::to_string(seed), p, ReferenceTokenPrune(p), false, false);
  }
}

// Features whose squares overflow or vanish in float32, and enough of them for several tasks.
void LargeAndExtreme(Checker* check) {
  for (const double size : {1.0, 1e25, 1e-25}) {
    ReferencePrune p;
    p.mode = "maxmin";
    p.keep_count = 9;
    p.s = 80;
    p.dim = 4096;
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
      ExpectPruned(check, "features of size " + std::to_string(size), p, ReferenceTokenPrune(p),
                   false, false, ThreeThreads());
    }
  }
}

// The loops over numbers of tokens with every tail, on integers: exact in any order.
void LoopsOverTokens(Checker* check) {
  std::mt19937_64 random(5);
  for (std::size_t count = 0; count <= 50; ++count) {
    std::vector<double> a(count);
    std::vector<double> b(count);
    std::vector<float> similarity(count);
    std::vector<float> covered(count);
    double product = 0.0;
    double uncovered = 0.0;
    for (std::size_t i = 0; i < count; ++i) {
      a[i] = static_cast<double>(random() % 99) - 50;
      b[i] = static_cast<double>(random() % 99) - 50;
      similarity[i] = static_cast<float>(random() % 9) - 4.0F;
      covered[i] = static_cast<float>(random() % 4);
      product += a[i] * b[i];
      uncovered += a[i] * std::max(0.0, double{similarity[i]} - double{covered[i]});
    }
    for (const TokenPruneKernel& kernel : TokenPruneKernels()) {
      if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
      check->Expect(kernel.functions->product(a.data(), b.data(), count) == product, kernel.name,
                    ": product of ", count);
      check->Expect(kernel.functions->uncovered(similarity.data(), covered.data(), a.data(),
                                                count) == uncovered,
                    kernel.name, ": uncovered of ", count);
    }
  }
}

void Modes(Checker* check) {
  TokenPruneMode mode = TokenPruneMode::kNone;
  check->Expect(ParseChoice(kTokenPruneModes, "maxmin", &mode) && mode == TokenPruneMode::kMaxmin,
                "maxmin");
  for (const char* name : {"", "topk", "MMR", "none "}) {
    check->Expect(!ParseChoice(kTokenPruneModes, name, &mode), "accepted the mode '", name, "'");
  }
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::Modes(&check);
  bivlm::testing::CountRule(&check);
  bivlm::testing::PhiloxKnownAnswers(&check);
  bivlm::testing::LoopsOverTokens(&check);
  bivlm::testing::EdgeCases(&check);
  bivlm::testing::IntegerFeatures(&check);
  bivlm::testing::RealFeatures(&check);
  bivlm::testing::LargeAndExtreme(&check);
  std::printf("kernels tested: %s\n",
              bivlm::AvailableTokenPruneNames(bivlm::SupportedIsa()).c_str());
  return check.Finish("token_prune_test");
}
