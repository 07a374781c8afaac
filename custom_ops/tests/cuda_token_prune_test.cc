// TokenPrune's CUDA kernels, run by the shim on the CPU, against the reference.
#include <algorithm>
#include <string>

#include "bivlm/cuda/token_prune.h"
#include "check.h"
#include "cuda_shim/fibres.h"
#include "reference.h"
#include "token_prune_cases.h"

namespace bivlm::testing {
namespace {

std::vector<int64_t> Lengths(const ReferencePruned& want) {
  std::vector<int64_t> lengths;
  for (const auto& row : want.kept) lengths.push_back(static_cast<int64_t>(row.size()));
  return lengths;
}

// kept_indices as the operator writes it.
std::vector<int64_t> Indices(const ReferencePruned& want, std::size_t longest) {
  std::vector<int64_t> indices;
  for (const auto& row : want.kept) {
    indices.insert(indices.end(), row.begin(), row.end());
    indices.resize(indices.size() + longest - row.size(), 0);
  }
  return indices;
}

// Runs the kernels in guarded memory and compares all outputs.
void ExpectEqual(Checker* check, const std::string& what, const ReferencePrune& p,
                 const ReferencePruned& want, Types types) {
  const PruneProblem problem(p, types);
  const TokenPruneArgs& args = problem.args();
  const std::string where = what + " mode=" + p.mode + " merge=" + p.merge + " order=" + p.order +
                            " metric type " + std::to_string(static_cast<int>(types.metric));
  const cuda::TokenPrunePlan plan = cuda::PlanTokenPrune(args);
  check->Expect(plan.lengths == Lengths(want), where, ": the plan's lengths are wrong");
  if (plan.lengths != Lengths(want)) return;
  const std::size_t longest = plan.Longest();
  const std::size_t scratch_bytes = cuda::TokenPruneScratchBytes(args, plan);
  Guarded scratch(scratch_bytes);
  Guarded pruned(p.b * longest * p.width * ElementBytes(types.hidden));
  Guarded indices(p.b * longest * sizeof(int64_t));
  Guarded lengths(p.b * sizeof(int64_t));
  Guarded map(p.b * p.s * sizeof(int64_t));
  cuda::TokenPruneOutputs outputs;
  outputs.pruned = pruned.data();
  outputs.kept_indices = static_cast<int64_t*>(indices.data());
  outputs.lengths = static_cast<int64_t*>(lengths.data());
  outputs.token_map = static_cast<int64_t*>(map.data());
  const std::string error =
      cuda::LaunchTokenPrune(args, plan, scratch.data(), scratch_bytes, outputs, nullptr);
  check->Expect(error.empty(), where, ": ", error);

  const std::vector<int64_t> kept = Indices(want, longest);
  std::string got;
  for (std::size_t i = 0; i < kept.size(); ++i) {
    got += std::to_string(outputs.kept_indices[i]) + ' ';
  }
  check->Expect(std::equal(kept.begin(), kept.end(), outputs.kept_indices), where, " s=", p.s,
                " dim=", p.dim, ": got ", got, "want ", Text(want.kept));
  if (!std::equal(kept.begin(), kept.end(), outputs.kept_indices)) return;
  check->Expect(std::equal(plan.lengths.begin(), plan.lengths.end(), outputs.lengths), where,
                ": lengths are wrong");
  check->Expect(std::equal(want.token_map.begin(), want.token_map.end(), outputs.token_map), where,
                ": token_map is wrong");
  const std::size_t wrong = WrongValues(p, want, types.hidden, longest, pruned.data());
  check->Expect(wrong == 0, where, ": ", wrong, " values of pruned are wrong");
  check->Expect(scratch.IsIntact() && pruned.IsIntact() && indices.IsIntact() &&
                    lengths.IsIntact() && map.IsIntact(),
                where, ": wrote outside");
}

void ExpectPruned(Checker* check, const std::string& what, const ReferencePrune& p, bool exact,
                  bool integers) {
  const ReferencePruned want = ReferenceTokenPrune(p);
  ExpectEqual(check, what, p, want, {MetricType::kFloat32, ElementType::kFloat32});
  if (exact) ExpectEqual(check, what, p, want, {MetricType::kFloat16, ElementType::kFloat16});
  if (!integers) return;
  // The last threads first: nothing may depend on the order.
  cuda_shim::SetReverse(true);
  ExpectEqual(check, what, p, want, {MetricType::kInt8, ElementType::kFloat16});
  cuda_shim::SetReverse(false);
}

// Integer features: all products are exact, and so are the choices, ties included.
void IntegerFeatures(Checker* check) {
  for (uint64_t seed = 1; seed <= 350; ++seed) {
    if (!RunsCase()) continue;
    ExpectPruned(check, "seed " + std::to_string(seed), RandomProblem(seed, true), true, true);
  }
}

// Gaussian features: no ties, so that rounding of 1e-7 does not change the choices of these seeds.
void RealFeatures(Checker* check) {
  for (uint64_t seed = 2001; seed <= 2100; ++seed) {
    if (!RunsCase()) continue;
    ExpectPruned(check, "seed " + std::to_string(seed), RandomProblem(seed, false), false, false);
  }
}

// More segments and more runs of tokens than one launch takes, and more tokens than a block.
void ManyPieces(Checker* check) {
  for (const char* mode : {"topk_score", "mmr", "random", "uniform"}) {
    ReferencePrune p;
    p.mode = mode;
    p.b = 2;
    p.s = 300;
    p.dim = 5;
    p.width = 2;
    p.keep_count = 1;
    p.order = "score";
    p.merge = "mean";
    std::mt19937_64 random(7);
    for (std::size_t i = 0; i < p.b * p.s; ++i) {
      p.segments.push_back(static_cast<int32_t>(i % 75) - 1);
      p.scores.push_back(static_cast<float>(random() % 50));
      p.hidden.push_back(static_cast<float>(i));
      p.hidden.push_back(1.0F);
    }
    for (std::size_t i = 0; i < p.b * p.s * p.dim; ++i) {
      p.metric.push_back(static_cast<double>(random() % 9) - 4.0);
    }
    ExpectPruned(check, "many segments", p, true, false);
    p.segments.clear();
    p.keep_count = 11;
    ExpectPruned(check, "many tokens", p, true, false);
  }
}

void TooLittleScratch(Checker* check) {
  const ReferencePrune p = OneRow("topk_score", {1, 2, 3}, 2, 3);
  const PruneProblem problem(p, {MetricType::kFloat32, ElementType::kFloat32});
  const cuda::TokenPrunePlan plan = cuda::PlanTokenPrune(problem.args());
  const std::string error =
      cuda::LaunchTokenPrune(problem.args(), plan, nullptr,
                             cuda::TokenPruneScratchBytes(problem.args(), plan) - 1, {}, nullptr);
  check->Expect(error.find("bytes of scratch memory, got") != std::string::npos, error);
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  Checker check;
  TooLittleScratch(&check);
  EdgeCases([&](const char* what, const ReferencePrune& p, const Kept& want) {
    check.Expect(ReferenceTokenPrune(p).kept == want, "reference ", what);
    ExpectPruned(&check, what, p, true, false);
  });
  ManyPieces(&check);
  IntegerFeatures(&check);
  RealFeatures(&check);
  LargeAndExtreme(300, [&](const std::string& what, const ReferencePrune& p) {
    ExpectPruned(&check, what, p, false, false);
  });
  return check.Finish("cuda_token_prune_test");
}
