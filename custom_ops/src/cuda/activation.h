// Elements of activation tensors in kernels: float, or uint16_t for float16.
#ifndef BIVLM_CUDA_ACTIVATION_H_
#define BIVLM_CUDA_ACTIVATION_H_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace bivlm::cuda {

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(uint16_t half) {
  return __half2float(__ushort_as_half(half));
}

__device__ __forceinline__ void StoreAs(float* address, float value) { *address = value; }
__device__ __forceinline__ void StoreAs(uint16_t* address, float value) {
  *address = __half_as_ushort(__float2half_rn(value));
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_ACTIVATION_H_
