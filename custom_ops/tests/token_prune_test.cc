// TokenPrune with every kernel that this CPU has against the reference.
#include "bivlm/token_prune.h"

#include <algorithm>
#include <random>
#include <string>

#include "check.h"
#include "reference.h"
#include "token_prune_cases.h"

namespace bivlm::testing {
namespace {

// Compares kept tokens, token_map and pruned with the reference; looks behind both ends.
void ExpectEqual(Checker* check, const TokenPruneKernel& kernel, const std::string& what,
                 const ReferencePrune& p, const ReferencePruned& want, Types types,
                 const Executor& executor) {
  const PruneProblem problem(p, types);
  const TokenPruneArgs& args = problem.args();
  check->Expect(problem.knows_words(), what, ": a word is unknown");
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
  Guarded pruned(p.b * longest * p.width * ElementBytes(types.hidden));
  WritePruned(args, got, pruned.data(), executor);
  const std::size_t wrong = WrongValues(p, want, types.hidden, longest, pruned.data());
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
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  Checker check;
  Modes(&check);
  CountRule(&check);
  PhiloxKnownAnswers(&check);
  LoopsOverTokens(&check);
  EdgeCases([&](const char* what, const ReferencePrune& p, const Kept& want) {
    ExpectKept(&check, what, p, want);
  });
  IntegerFeatures(&check);
  RealFeatures(&check);
  LargeAndExtreme(4096, [&](const std::string& what, const ReferencePrune& p) {
    ExpectPruned(&check, what, p, ReferenceTokenPrune(p), false, false, ThreeThreads());
  });
  std::printf("kernels tested: %s\n",
              bivlm::AvailableTokenPruneNames(bivlm::SupportedIsa()).c_str());
  return check.Finish("token_prune_test");
}
