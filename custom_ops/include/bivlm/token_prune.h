// TokenPrune: which tokens of each row to keep. export/OPS.md says what the operator computes.
//
// Letters: b rows of the batch, s tokens per row, n tokens of one segment, dim features of
// `metric`. The kernels are the two loops that touch all features; everything else is common code.
// A similarity is dot(a_i, a_j) / sqrt(|a_i|^2 |a_j|^2): the dot product in float32, the rest in
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

// Rows of `metric` that a kernel reads: row i is features + index[i] * dim elements.
struct TokenPruneRows {
  ElementType type = ElementType::kFloat32;
  const void* features = nullptr;
  std::size_t dim = 0;
  const uint32_t* index = nullptr;
  std::size_t count = 0;
};

// One instruction set's implementation.
struct TokenPruneFunctions {
  // norms[i] = sum of the squares of row i, for all i < rows.count.
  void (*squared_norms)(const TokenPruneRows& rows, double* norms);
  // dots[i] = sum of row i * query, query being (dim), for all i < rows.count.
  void (*dots)(const TokenPruneRows& rows, const float* query, float* dots);
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

enum class TokenPruneMode { kTopkScore, kMaxmin, kMmr, kUniform, kRandom, kNone };

// The mode of that name, in *mode; false if there is none.
bool ParseTokenPruneMode(std::string_view name, TokenPruneMode* mode);

struct TokenPruneOptions {
  TokenPruneMode mode = TokenPruneMode::kMmr;
  int64_t keep_count = -1;
  float keep_ratio = -1.0F;
  int64_t min_keep = 1;
  float theta = 0.5F;
  int64_t seed = 0;
};

struct TokenPruneArgs {
  TokenPruneOptions options;
  std::size_t b = 0;
  std::size_t s = 0;
  const float* scores = nullptr;      // (b, s), or null
  const int32_t* segments = nullptr;  // (b, s), >= -2, or null: all 0
  const int64_t* keep = nullptr;      // one number >= 0, or null
  ElementType type = ElementType::kFloat32;
  const void* metric = nullptr;  // (b, s, dim)
  std::size_t dim = 0;
};

// Tokens to keep of a segment with n.
std::size_t TokenPruneCount(const TokenPruneOptions& options, const int64_t* keep, std::size_t n);

// The kept tokens of each row, rising. Throws std::bad_alloc.
std::vector<std::vector<int64_t>> RunTokenPrune(const TokenPruneKernel& kernel,
                                                const TokenPruneArgs& args,
                                                const Executor& executor);

// First word of Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as
// 1, 2, 3, 2011).
uint32_t Philox4x32(const uint32_t (&counter)[4], const uint32_t (&key)[2]);

}  // namespace bivlm

#endif  // BIVLM_TOKEN_PRUNE_H_
