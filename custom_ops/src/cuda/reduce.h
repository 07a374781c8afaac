// Sums and best candidates of a warp, alike in all its lanes and in every run.
#ifndef BIVLM_CUDA_REDUCE_H_
#define BIVLM_CUDA_REDUCE_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace bivlm::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

template <typename Number>
__device__ __forceinline__ Number WarpSum(Number value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// A token that may be chosen. The highest tier wins, then the largest key, then the first position.
struct Candidate {
  double key;
  uint32_t position;
  int32_t tier;  // below 0: there is none
};

__device__ __forceinline__ Candidate NoCandidate() { return {0.0, 0xFFFFFFFFU, -1}; }

__device__ __forceinline__ Candidate Better(const Candidate& a, const Candidate& b) {
  if (a.tier != b.tier) return a.tier > b.tier ? a : b;
  if (a.key != b.key) return a.key > b.key ? a : b;
  return a.position < b.position ? a : b;
}

// The best of the candidates of all lanes.
__device__ __forceinline__ Candidate WarpBest(Candidate best) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Candidate other;
    other.key = __shfl_xor_sync(kAllLanes, best.key, step);
    other.position = __shfl_xor_sync(kAllLanes, best.position, step);
    other.tier = __shfl_xor_sync(kAllLanes, best.tier, step);
    best = Better(best, other);
  }
  return best;
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_REDUCE_H_
