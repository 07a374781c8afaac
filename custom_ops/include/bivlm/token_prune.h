// TokenPrune: which tokens of each row to keep, and what becomes of the others. export/OPS.md says
// what the operator computes.
//
// Letters: b rows of the batch, s tokens per row, n tokens of one segment, dim features of
// `metric`, width features of `hidden`. The kernels are the loops that touch all features or all
// pairs of tokens; everything else is common code.
// A cosine is dot(a_i, a_j) / sqrt(|a_i|^2 |a_j|^2): the dot product in float32, the rest in
// float64, rounded to float32.
#ifndef BIVLM_TOKEN_PRUNE_H_
#define BIVLM_TOKEN_PRUNE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bivlm/cpu_features.h"
#include "bivlm/float16.h"
#include "bivlm/parallel.h"

namespace bivlm {

enum class MetricType : uint8_t { kFloat32, kFloat16, kInt8 };

// Rows of `metric` that a kernel reads: row i is features + index[i] * dim elements.
struct TokenPruneRows {
  MetricType type = MetricType::kFloat32;
  const void* features = nullptr;
  std::size_t dim = 0;
  const uint32_t* index = nullptr;
  std::size_t count = 0;
};

// One instruction set's implementation.
struct TokenPruneFunctions {
  // norms[i] = sum of the squares of row i, for all i < rows.count.
  void (*squared_norms)(const TokenPruneRows& rows, double* norms);
  // dots[q * stride + i] = sum of row i * query q, queries being (count, dim), for all
  // i < rows.count and q < count.
  void (*dots)(const TokenPruneRows& rows, const float* queries, std::size_t count, float* dots,
               std::size_t stride);
  // The sum of weights[i] * max(0, similarity[i] - covered[i]) over all i < count.
  double (*uncovered)(const float* similarity, const float* covered, const double* weights,
                      std::size_t count);
  // The sum of a[i] * b[i] over all i < count.
  double (*product)(const double* a, const double* b, std::size_t count);
};

struct TokenPruneKernel {
  const char* name;
  IsaSet isa;  // what it needs
  const TokenPruneFunctions* functions;
};

#define BIVLM_TOKEN_PRUNE_KERNEL(needs, symbol, label) extern const TokenPruneFunctions symbol;
#include "bivlm/token_prune_kernels.inc"
#undef BIVLM_TOKEN_PRUNE_KERNEL

struct TokenPruneKernelList {
  const TokenPruneKernel* first;
  std::size_t count;
  const TokenPruneKernel* begin() const { return first; }
  const TokenPruneKernel* end() const { return first + count; }
};

// All kernels of this build, best first.
TokenPruneKernelList TokenPruneKernels();

// As SelectBinaryMatMul.
const TokenPruneKernel* SelectTokenPrune(IsaSet supported, std::string_view forced);
std::string AvailableTokenPruneNames(IsaSet supported);

// The choices of each attribute, with their names in the same order.
enum class TokenPruneMode { kTopkScore, kMaxmin, kMmr, kDpp, kCoverage, kUniform, kRandom, kNone };
inline constexpr std::string_view kTokenPruneModes[] = {"topk_score", "maxmin",  "mmr",    "dpp",
                                                        "coverage",   "uniform", "random", "none"};
enum class ScoreReduction { kMean, kSum, kMax };
inline constexpr std::string_view kScoreReductions[] = {"mean", "sum", "max"};
enum class FirstToken { kAuto, kMaxScore, kMaxNorm, kFarthest };
inline constexpr std::string_view kFirstTokens[] = {"auto", "max_score", "max_norm", "farthest"};
enum class SimilarityKind { kCosine, kDot };
inline constexpr std::string_view kSimilarityKinds[] = {"cosine", "dot"};
enum class MergeKind { kNone, kMean, kScoreWeighted };
inline constexpr std::string_view kMergeKinds[] = {"none", "mean", "score_weighted"};
enum class TokenOrder { kInput, kScore };
inline constexpr std::string_view kTokenOrders[] = {"input", "score"};

// The choice of that name, in *choice; false if there is none.
template <typename Choice, std::size_t count>
bool ParseChoice(const std::string_view (&names)[count], std::string_view name, Choice* choice) {
  for (std::size_t i = 0; i < count; ++i) {
    if (names[i] != name) continue;
    *choice = static_cast<Choice>(i);
    return true;
  }
  return false;
}

struct TokenPruneOptions {
  TokenPruneMode mode = TokenPruneMode::kMmr;
  int64_t keep_count = -1;
  float keep_ratio = -1.0F;
  int64_t min_keep = 1;
  float theta = 0.5F;
  int64_t seed = 0;
  ScoreReduction score_reduce = ScoreReduction::kMean;
  FirstToken first = FirstToken::kAuto;
  SimilarityKind similarity = SimilarityKind::kCosine;
  MergeKind merge = MergeKind::kNone;
  TokenOrder order = TokenOrder::kInput;
};

// The input `keep`: numbers >= 0, (rows, segments).
struct TokenPruneQuotas {
  const int64_t* counts = nullptr;  // or null
  std::size_t rows = 1;             // 1 or b
  std::size_t segments = 0;         // above all ids, or 0: one number for all segments of a row

  // The number for a segment, or null.
  const int64_t* Of(std::size_t row, int32_t segment) const;
};

struct TokenPruneArgs {
  TokenPruneOptions options;
  std::size_t b = 0;
  std::size_t s = 0;
  ElementType type = ElementType::kFloat32;  // of hidden
  const void* hidden = nullptr;              // (b, s, width)
  std::size_t width = 0;
  const float* scores = nullptr;  // (b, heads, s), or null
  std::size_t heads = 1;
  const int32_t* segments = nullptr;  // (b, s), >= -2, or null: all 0
  TokenPruneQuotas keep;
  MetricType metric_type = MetricType::kFloat32;
  const void* metric = nullptr;  // (b, s, dim)
  std::size_t dim = 0;
};

struct TokenPruneSelection {
  std::vector<std::vector<int64_t>> kept;  // tokens of each row, in the order of the output
  std::vector<int64_t> target;  // (b, s): the kept token that a token is or goes into, or -1
  std::vector<double> weight;   // (b, s): of tokens that go into others

  // The largest number of tokens of a row.
  std::size_t Longest() const;
};

// Tokens to keep of a segment with n.
std::size_t TokenPruneCount(const TokenPruneOptions& options, const int64_t* keep, std::size_t n);

// Throws std::bad_alloc.
TokenPruneSelection RunTokenPrune(const TokenPruneKernel& kernel, const TokenPruneArgs& args,
                                  const Executor& executor);

// Writes the output `pruned`, (b, Longest(), width).
void WritePruned(const TokenPruneArgs& args, const TokenPruneSelection& selection, void* pruned,
                 const Executor& executor);

// Writes the output `token_map`, (b, s).
void WriteTokenMap(const TokenPruneArgs& args, const TokenPruneSelection& selection,
                   int64_t* token_map);

// First word of Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as
// 1, 2, 3, 2011).
uint32_t Philox4x32(const uint32_t (&counter)[4], const uint32_t (&key)[2]);

}  // namespace bivlm

#endif  // BIVLM_TOKEN_PRUNE_H_
