// What the stages of TokenPrune share: the memory they work in, and similarities.
#ifndef BIVLM_CUDA_TOKEN_PRUNE_KERNELS_H_
#define BIVLM_CUDA_TOKEN_PRUNE_KERNELS_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "bivlm/cuda/token_prune.h"
#include "cuda/activation.h"
#include "cuda/reduce.h"

namespace bivlm::cuda {

inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kPruneWarps = 4;
inline constexpr unsigned kPruneThreads = kPruneWarps * kLanes;
inline constexpr unsigned kTokensPerBlock = 4 * kPruneWarps;  // of stages with a warp per token
inline constexpr float kLargestFloat = 3.402823466e+38F;

// Arguments and scratch memory of a call, as kernels see them. Positions count the tokens of a
// segment; "of an item" starts at its `at`.
struct TokenPruneView {
  const void* hidden;   // (b, s, width)
  const void* metric;   // (b, s, dim)
  const float* scores;  // (b, heads, s), or null
  uint64_t width;
  uint64_t dim;
  uint32_t s;
  uint32_t heads;
  ScoreReduction score_reduce;
  uint8_t is_cosine;
  uint8_t is_half;            // hidden
  uint8_t weighted_by_score;  // merging
  uint8_t uses_scores;        // the selection does, so that it gives up where all are NaN

  // (b, s)
  int32_t* target;  // the kept token, of the same row, that a token is or goes into; or -1
  double* weight;   // of tokens that go into others
  int32_t* slot;    // in the output, by the order of the input
  int32_t* place;   // in the output

  // of the tokens of an item
  uint32_t* index;  // row * s + token
  uint32_t* key;    // of modes that sort
  float* score;
  double* z;
  double* norm;  // squared; 0: similar to nothing
  float* nearest;
  uint8_t* taken;
  double* residual;
  double* log_weight;
  float* covered[2];

  double* factors;  // (n, k) of an item, at its pairs_at
  float* matrix;    // (n, n) of an item, at its pairs_at

  // of the choices of an item: positions in the order of choice, and rising
  uint32_t* chosen;
  uint32_t* rising;

  int32_t* all_nan;          // of an item: its scores are
  Candidate* candidates[2];  // (items of a launch, blocks), of this step and of the next
};

// Items as a parameter of a kernel: grid.y or grid.x counts them.
struct TokenPruneItems {
  static constexpr std::size_t kMost = 64;
  TokenPruneItem of[kMost];
};
// 4096 bytes are what the parameters of a kernel may take before CUDA 12.1.
static_assert(sizeof(TokenPruneItems) + sizeof(TokenPruneView) + 64 <= 4096);

__device__ __forceinline__ unsigned Lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ unsigned Warp() { return threadIdx.x / kLanes; }

// Not isfinite: <cmath> has it in another namespace on the CPU.
__device__ __forceinline__ bool IsFinite(float value) { return fabsf(value) <= kLargestFloat; }

template <MetricType type>
__device__ __forceinline__ float MetricAt(const void* metric, uint64_t at) {
  if constexpr (type == MetricType::kFloat32) return static_cast<const float*>(metric)[at];
  if constexpr (type == MetricType::kInt8) return static_cast<const int8_t*>(metric)[at];
  if constexpr (type == MetricType::kFloat16) {
    return ToFloat(static_cast<const uint16_t*>(metric)[at]);
  }
}

// The similarity of a token to itself.
__device__ __forceinline__ float OwnSimilarity(const TokenPruneView& v, double norm) {
  if (norm == 0.0 || v.is_cosine == 0) {
    return static_cast<float>(norm < double{kLargestFloat} ? norm : double{kLargestFloat});
  }
  return 1.0F;
}

// The similarity of tokens a and b, numbers of rows of metric, by all lanes of a warp.
template <MetricType type>
__device__ float WarpSimilarity(const TokenPruneView& v, uint32_t a, double norm_a, uint32_t b,
                                double norm_b) {
  if (!(norm_a > 0.0) || !(norm_b > 0.0)) return 0.0F;
  // Powers of two that make the norm of a 1 at most, so that no sum overflows; one alone can be
  // too large for a float.
  const int exponent = ilogb(norm_a) / 2 + 1;
  const float first = ldexpf(1.0F, -(exponent / 2));
  const float second = ldexpf(1.0F, -(exponent - exponent / 2));
  float sum = 0.0F;
  for (uint64_t d = Lane(); d < v.dim; d += kLanes) {
    const float scaled = MetricAt<type>(v.metric, a * v.dim + d) * first * second;
    sum = __fmaf_rn(scaled, MetricAt<type>(v.metric, b * v.dim + d), sum);
  }
  const double dot = double{WarpSum(sum)} * ldexp(1.0, exponent);
  if (v.is_cosine != 0) return static_cast<float>(dot / sqrt(norm_b * norm_a));
  if (dot > double{kLargestFloat}) return kLargestFloat;
  return dot < -double{kLargestFloat} ? -kLargestFloat : static_cast<float>(dot);
}

// The next stages of the items [0, count) of `items`, on `stream`; what stands in `view` is what
// the stage before wrote. token_prune_select.cu:
cudaError_t LaunchSelection(const TokenPruneOptions& options, MetricType type, bool has_scores,
                            const TokenPruneItems& items, unsigned count, unsigned largest_n,
                            unsigned largest_k, const TokenPruneView& view, cudaStream_t stream);
// token_prune_output.cu:
cudaError_t LaunchMerge(MetricType type, const TokenPruneItems& items, unsigned count,
                        unsigned largest_n, const TokenPruneView& view, cudaStream_t stream);
cudaError_t LaunchSlots(const TokenPruneView& view, std::size_t b, std::size_t longest,
                        const TokenPruneOutputs& outputs, cudaStream_t stream);
cudaError_t LaunchOrderByChoice(const TokenPruneItems& items, unsigned count,
                                const TokenPruneView& view, std::size_t longest,
                                const TokenPruneOutputs& outputs, cudaStream_t stream);
cudaError_t LaunchOutputs(const TokenPruneView& view, std::size_t b, std::size_t longest,
                          bool merges, const TokenPruneOutputs& outputs, cudaStream_t stream);

// Calls body(type) with the type as a constant of the language, and returns what it returns.
template <typename Body>
cudaError_t ForMetricType(MetricType type, const Body& body) {
  switch (type) {
    case MetricType::kFloat32:
      return body(std::integral_constant<MetricType, MetricType::kFloat32>());
    case MetricType::kFloat16:
      return body(std::integral_constant<MetricType, MetricType::kFloat16>());
    case MetricType::kInt8:
      break;
  }
  return body(std::integral_constant<MetricType, MetricType::kInt8>());
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_TOKEN_PRUNE_KERNELS_H_
