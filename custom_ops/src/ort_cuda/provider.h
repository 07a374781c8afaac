// Whose operators these are; the tests put tests/cuda_shim/ort_cuda/provider.h in its place.
#ifndef BIVLM_ORT_CUDA_PROVIDER_H_
#define BIVLM_ORT_CUDA_PROVIDER_H_

namespace bivlm::ort {

inline constexpr const char* kProvider = "CUDAExecutionProvider";
inline constexpr bool kHasStreams = true;  // the provider runs kernels on them

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_CUDA_PROVIDER_H_
