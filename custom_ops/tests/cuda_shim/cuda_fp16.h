// The part of <cuda_fp16.h> that src/cuda uses.
#ifndef BIVLM_TESTS_CUDA_SHIM_CUDA_FP16_H_
#define BIVLM_TESTS_CUDA_SHIM_CUDA_FP16_H_

#include "bivlm/float16.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) { return bivlm::FloatFromHalf(value.bits); }
inline __half __float2half_rn(float value) { return {bivlm::HalfFromFloat(value)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

#endif  // BIVLM_TESTS_CUDA_SHIM_CUDA_FP16_H_
