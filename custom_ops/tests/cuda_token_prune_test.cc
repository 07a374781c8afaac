// TokenPrune's CUDA kernels, run by the shim on the CPU or, as cuda_token_prune_gpu_test, on a GPU,
// against the reference.
#include <algorithm>
#include <cstring>
#include <string>

#include "bivlm/cuda/token_prune.h"
#include "check.h"
#include "cuda_device.h"
#include "cuda_memory.h"
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

std::size_t ElementBytes(MetricType type) {
  if (type == MetricType::kInt8) return 1;
  return type == MetricType::kFloat16 ? 2 : 4;
}

// The arguments of a problem with what kernels read on the device.
class DeviceProblem {
 public:
  DeviceProblem(const ReferencePrune& p, Types types)
      : problem_(p, types),
        args_(problem_.args()),
        hidden_(args_.hidden, p.b * p.s * p.width * bivlm::ElementBytes(types.hidden)),
        metric_(args_.metric, p.b * p.s * p.dim * ElementBytes(types.metric)),
        scores_(args_.scores, p.scores.size() * sizeof(float)) {
    args_.hidden = hidden_.data();
    args_.metric = metric_.data();
    if (args_.scores != nullptr) args_.scores = reinterpret_cast<const float*>(scores_.data());
  }
  const TokenPruneArgs& args() const { return args_; }

 private:
  PruneProblem problem_;
  TokenPruneArgs args_;
  DeviceBytes hidden_;
  DeviceBytes metric_;
  DeviceBytes scores_;
};

// What kernels wrote, as numbers; *intact becomes false if they also wrote outside.
std::vector<int64_t> ReadIntegers(const GuardedDeviceBytes& memory, bool* intact) {
  bool is_intact = false;
  const std::vector<uint8_t> bytes = memory.Read(&is_intact);
  *intact = *intact && is_intact;
  std::vector<int64_t> integers(bytes.size() / sizeof(int64_t));
  if (!bytes.empty()) std::memcpy(integers.data(), bytes.data(), bytes.size());
  return integers;
}

// Runs the kernels in guarded memory and compares all outputs.
void ExpectEqual(Checker* check, const std::string& what, const ReferencePrune& p,
                 const ReferencePruned& want, Types types,
                 const Enqueuer& how = OnDefaultStream()) {
  const DeviceProblem problem(p, types);
  const TokenPruneArgs& args = problem.args();
  const std::string where = what + how.name + " mode=" + p.mode + " merge=" + p.merge +
                            " order=" + p.order + " metric type " +
                            std::to_string(static_cast<int>(types.metric));
  const cuda::TokenPrunePlan plan = cuda::PlanTokenPrune(args);
  check->Expect(plan.lengths == Lengths(want), where, ": the plan's lengths are wrong");
  if (plan.lengths != Lengths(want)) return;
  const std::size_t longest = plan.Longest();
  const std::size_t scratch_bytes = cuda::TokenPruneScratchBytes(args, plan);
  const GuardedDeviceBytes scratch(scratch_bytes);
  const GuardedDeviceBytes pruned(p.b * longest * p.width * bivlm::ElementBytes(types.hidden));
  const GuardedDeviceBytes indices(p.b * longest * sizeof(int64_t));
  const GuardedDeviceBytes lengths(p.b * sizeof(int64_t));
  const GuardedDeviceBytes map(p.b * p.s * sizeof(int64_t));
  cuda::TokenPruneOutputs outputs;
  outputs.pruned = pruned.data();
  outputs.kept_indices = reinterpret_cast<int64_t*>(indices.data());
  outputs.lengths = reinterpret_cast<int64_t*>(lengths.data());
  outputs.token_map = reinterpret_cast<int64_t*>(map.data());
  how.run([&](cudaStream_t stream) {
    const std::string error =
        cuda::LaunchTokenPrune(args, plan, scratch.data(), scratch_bytes, outputs, stream);
    check->Expect(error.empty(), where, ": ", error);
  });

  bool intact = true;
  const std::vector<int64_t> kept = ReadIntegers(indices, &intact);
  std::string got;
  for (const int64_t index : kept) got += std::to_string(index) + ' ';
  check->Expect(kept == Indices(want, longest), where, " s=", p.s, " dim=", p.dim, ": got ", got,
                "want ", Text(want.kept));
  if (kept != Indices(want, longest)) return;
  check->Expect(ReadIntegers(lengths, &intact) == plan.lengths, where, ": lengths are wrong");
  check->Expect(ReadIntegers(map, &intact) == want.token_map, where, ": token_map is wrong");
  bool is_intact = false;
  const std::vector<uint8_t> rows = pruned.Read(&is_intact);
  intact = intact && is_intact;
  const std::size_t wrong = WrongValues(p, want, types.hidden, longest, rows.data());
  check->Expect(wrong == 0, where, ": ", wrong, " values of pruned are wrong");
  scratch.Read(&is_intact);
  check->Expect(intact && is_intact, where, ": wrote outside");
}

void ExpectPruned(Checker* check, const std::string& what, const ReferencePrune& p, bool exact,
                  bool integers) {
  const ReferencePruned want = ReferenceTokenPrune(p);
  ExpectEqual(check, what, p, want, {MetricType::kFloat32, ElementType::kFloat32});
  if (exact) ExpectEqual(check, what, p, want, {MetricType::kFloat16, ElementType::kFloat16});
  if (!integers) return;
  // The last threads first: nothing may depend on the order.
  SetReverse(true);
  ExpectEqual(check, what, p, want, {MetricType::kInt8, ElementType::kFloat16});
  SetReverse(false);
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

// Every mode on a stream of its own and out of a graph.
void StreamsAndGraphs(Checker* check) {
  for (uint64_t seed = 1; seed <= 21; ++seed) {
    const ReferencePrune p = RandomProblem(seed, true);
    const ReferencePruned want = ReferenceTokenPrune(p);
    for (const Enqueuer& how : {OnDefaultStream(), OnOwnStream(), AsGraph()}) {
      ExpectEqual(check, "seed " + std::to_string(seed), p, want,
                  {MetricType::kFloat32, ElementType::kFloat32}, how);
    }
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
  if (const int code = FindGpu(); code != 0) return code;
  Checker check;
  TooLittleScratch(&check);
  EdgeCases([&](const char* what, const ReferencePrune& p, const Kept& want) {
    check.Expect(ReferenceTokenPrune(p).kept == want, "reference ", what);
    ExpectPruned(&check, what, p, true, false);
  });
  ManyPieces(&check);
  IntegerFeatures(&check);
  RealFeatures(&check);
  StreamsAndGraphs(&check);
  LargeAndExtreme(300, [&](const std::string& what, const ReferencePrune& p) {
    ExpectPruned(&check, what, p, false, false);
  });
  return check.Finish("cuda_token_prune_test");
}
