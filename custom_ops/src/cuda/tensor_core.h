// The tensor-core product that BinaryMatMul is made of, by the instructions that a GPU has.
#ifndef BIVLM_CUDA_TENSOR_CORE_H_
#define BIVLM_CUDA_TENSOR_CORE_H_

#include <cstdint>

#include "cuda/primitives.h"

namespace bivlm::cuda {

// MmaM16N8K32 by four products m8n8k16, which sm_75 has instead: a register of the quarters of a, b
// and c lies in the lane that has it for the whole.
__device__ __forceinline__ void MultiplyAccumulateS8ByQuarters(const uint32_t (&a)[4],
                                                               const uint32_t (&b)[2],
                                                               const int32_t (&c)[4],
                                                               int32_t (&d)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t start[2] = {c[2 * half], c[2 * half + 1]};
    int32_t sum[2];
    MmaM8N8K16(a[half], b[0], start, sum);
    MmaM8N8K16(a[half + 2], b[1], sum, sum);
    d[2 * half] = sum[0];
    d[2 * half + 1] = sum[1];
  }
}

// d = a * b + c for a warp, with the fragments of MmaM16N8K32.
__device__ __forceinline__ void MultiplyAccumulateS8(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                     const int32_t (&c)[4], int32_t (&d)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  MultiplyAccumulateS8ByQuarters(a, b, c, d);
#else
  MmaM16N8K32(a, b, c, d);
#endif
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_TENSOR_CORE_H_
