// TokenPrune with every kernel that this CPU has against the reference.
#include "bivlm/token_prune.h"

#include <cmath>
#include <random>
#include <string>

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

Kept Run(const TokenPruneKernel& kernel, const ReferencePrune& p, bool float16,
         const Executor& executor) {
  std::vector<float> metric(p.metric.begin(), p.metric.end());
  std::vector<uint16_t> halves;
  for (const double value : p.metric) {
    halves.push_back(!float16 ? 0 : std::isnan(value) ? 0x7e00 : NearestHalf(value));
  }
  TokenPruneArgs args;
  ParseTokenPruneMode(p.mode, &args.options.mode);
  args.options.keep_count = p.keep_count;
  args.options.keep_ratio = p.keep_ratio;
  args.options.min_keep = p.min_keep;
  args.options.theta = p.theta;
  args.options.seed = static_cast<int64_t>(p.seed);
  args.b = p.b;
  args.s = p.s;
  args.dim = p.dim;
  args.scores = p.scores.empty() ? nullptr : p.scores.data();
  args.segments = p.segments.empty() ? nullptr : p.segments.data();
  args.keep = p.keep.empty() ? nullptr : p.keep.data();
  args.type = float16 ? ElementType::kFloat16 : ElementType::kFloat32;
  args.metric = float16 ? static_cast<const void*>(halves.data()) : metric.data();
  return RunTokenPrune(kernel, args, executor);
}

// Runs every available kernel, both element types if the metric is exact in float16.
void ExpectKept(Checker* check, const char* what, const ReferencePrune& p, const Kept& want,
                bool with_float16, const Executor& executor = Executor()) {
  for (const TokenPruneKernel& kernel : TokenPruneKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    for (const bool float16 : {false, true}) {
      if (float16 && !with_float16) continue;
      const Kept got = Run(kernel, p, float16, executor);
      check->Expect(got == want, kernel.name, " ", what, " mode=", p.mode, " s=", p.s,
                    " dim=", p.dim, " float16=", float16, ": got ", Text(got), " want ",
                    Text(want));
    }
  }
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
  }
  return p;
}

// The table of edge cases.
void EdgeCases(Checker* check) {
  ReferencePrune p = OneRow("mmr", {1, 2, 3}, 1, 3);
  p.segments = {-1, -1, -1};
  ExpectKept(check, "no prunable token: identity", p, {{0, 1, 2}}, true);

  p = OneRow("mmr", {1}, 0, 1);
  p.segments = {-1};
  ExpectKept(check, "decode step: identity", p, {{0}}, true);

  p = OneRow("topk_score", {1, 2, 3, 4}, 0, 4);
  p.min_keep = 0;
  ExpectKept(check, "keep 0 drops all", p, {{}}, true);
  p.segments = {0, -1, 0, -2};
  ExpectKept(check, "keep 0 keeps text, drops padding", p, {{1}}, true);
  p.min_keep = 1;
  ExpectKept(check, "min_keep", p, {{1, 2}}, true);

  for (const char* mode : {"topk_score", "maxmin", "mmr", "uniform", "random"}) {
    ExpectKept(check, "keep >= n: identity", OneRow(mode, {4, 1, 3}, 7, 3), {{0, 1, 2}}, true);
    ExpectKept(check, "nothing given: identity", OneRow(mode, {4, 1, 3}, -1, 3), {{0, 1, 2}}, true);
    ReferencePrune empty = OneRow(mode, {}, 2, 0);
    ExpectKept(check, "no tokens", empty, {{}}, true);
  }
  p = OneRow("none", {4, 1, 3}, 1, 3);
  p.segments = {0, -2, 0};
  ExpectKept(check, "mode none removes padding only", p, {{0, 2}}, true);

  ExpectKept(check, "NaN is dropped first", OneRow("topk_score", {kNan, 1, kNan, -5}, 2, 4),
             {{1, 3}}, true);
  ExpectKept(check, "+inf wins", OneRow("topk_score", {0, kInf, 5, -kInf}, 1, 4), {{1}}, true);
  ExpectKept(check, "-0 equals 0", OneRow("topk_score", {-0.0F, 0.0F, -1}, 1, 3), {{0}}, true);
  ExpectKept(check, "ties: lower index", OneRow("topk_score", {2, 3, 3, 3, 2}, 2, 5), {{1, 2}},
             true);
  for (const char* mode : {"topk_score", "maxmin", "mmr"}) {
    ExpectKept(check, "all NaN: uniform", OneRow(mode, std::vector<float>(10, kNan), 3, 10),
               {{1, 5, 8}}, true);
  }
  ExpectKept(check, "uniform", OneRow("uniform", {}, 3, 10), {{1, 5, 8}}, true);
  ExpectKept(check, "equal scores: z is 0.5", OneRow("mmr", {2, 2, 2, 2, 2, 2}, 2, 6), {{0, 4}},
             true);

  p = OneRow("topk_score", {1, 2, 3, 4, 5, 6}, 5, 6);
  p.keep = {2};
  ExpectKept(check, "input keep overrides", p, {{4, 5}}, true);
  p.keep = {0};
  ExpectKept(check, "input keep ignores min_keep", p, {{}}, true);

  p = OneRow("uniform", {}, -1, 30);
  p.keep_ratio = 0.1F;
  ExpectKept(check, "ceil(30 * 0.1) is 3", p, {{5, 15, 25}}, true);

  p = OneRow("maxmin", {}, 3, 4);
  p.metric = {1, 0, kNan, 1, 0, 0, 0, 2};
  ExpectKept(check, "NaN and zero rows are similar to nothing", p, {{0, 1, 3}}, true);

  p = OneRow("maxmin", {}, 10, 20);
  for (std::size_t i = 0; i < p.metric.size(); ++i) p.metric[i] = i % 2 == 0 ? 1.0 : 0.0;
  ExpectKept(check, "duplicates stay distinct", p, {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}}, true);

  p = OneRow("topk_score", {5, 4, 3, 2, 1, 6, 9, 8, 7, 0, 0, 0}, 2, 6);
  p.b = 2;
  p.metric.insert(p.metric.end(), p.metric.begin(), p.metric.end());
  p.segments = {0, 0, 0, 7, 7, 7, -1, 3, 3, 3, -2, -2};
  ExpectKept(check, "rows and segments apart", p, {{0, 1, 3, 5}, {0, 1, 2}}, true);
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
  const char* modes[] = {"topk_score", "maxmin", "mmr", "uniform", "random"};
  ReferencePrune p;
  p.mode = modes[seed % 5];
  p.b = 1 + random() % 3;
  p.s = random() % 40;
  const std::size_t dims[] = {1, 3, 7, 8, 9, 16, 17, 31, 63, 64, 65, 100, 130};
  // With one real feature every cosine is +-1: ties that rounding would decide.
  p.dim = dims[integers ? random() % 13 : 1 + random() % 12];
  p.seed = random();
  p.theta = static_cast<float>(random() % 5) * 0.25F;
  p.min_keep = static_cast<int64_t>(random() % 3);
  switch (random() % 3) {
    case 0:
      p.keep = {static_cast<int64_t>(random() % 12)};
      break;
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
  if (p.mode != "maxmin" || random() % 2 == 0) {
    for (std::size_t i = 0; i < p.b * p.s; ++i) {
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
  return p;
}

// Integer features: every dot product and norm is exact, so the choices are too, ties included.
void IntegerFeatures(Checker* check) {
  for (uint64_t seed = 1; seed <= 1500; ++seed) {
    const ReferencePrune p = RandomProblem(seed, true);
    ExpectKept(check, ("seed " + std::to_string(seed)).c_str(), p, ReferenceTokenPrune(p), true);
  }
}

// Gaussian features: no ties, so that rounding of 1e-7 does not change the choices of these seeds.
void RealFeatures(Checker* check) {
  for (uint64_t seed = 2001; seed <= 2300; ++seed) {
    const ReferencePrune p = RandomProblem(seed, false);
    ExpectKept(check, ("seed " + std::to_string(seed)).c_str(), p, ReferenceTokenPrune(p), false);
  }
}

// Features whose squares overflow or vanish in float32, and enough of them for several tasks.
void LargeAndExtreme(Checker* check) {
  for (const double size : {1.0, 1e25, 1e-25}) {
    ReferencePrune p;
    p.mode = "maxmin";
    p.keep_count = 9;
    p.s = 150;
    p.dim = 1024;
    std::mt19937_64 random(31);
    std::normal_distribution<float> normal(0.0F, 1.0F);
    for (std::size_t i = 0; i < p.s * p.dim; ++i) {
      p.metric.push_back(double{static_cast<float>(normal(random) * size)});
    }
    ExpectKept(check, ("features of size " + std::to_string(size)).c_str(), p,
               ReferenceTokenPrune(p), false, ThreeThreads());
  }
}

void Modes(Checker* check) {
  TokenPruneMode mode = TokenPruneMode::kNone;
  check->Expect(ParseTokenPruneMode("maxmin", &mode) && mode == TokenPruneMode::kMaxmin, "maxmin");
  for (const char* name : {"", "topk", "MMR", "none "}) {
    check->Expect(!ParseTokenPruneMode(name, &mode), "accepted the mode '", name, "'");
  }
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::Modes(&check);
  bivlm::testing::CountRule(&check);
  bivlm::testing::PhiloxKnownAnswers(&check);
  bivlm::testing::EdgeCases(&check);
  bivlm::testing::IntegerFeatures(&check);
  bivlm::testing::RealFeatures(&check);
  bivlm::testing::LargeAndExtreme(&check);
  std::printf("kernels tested: %s\n",
              bivlm::AvailableTokenPruneNames(bivlm::SupportedIsa()).c_str());
  return check.Finish("token_prune_test");
}
