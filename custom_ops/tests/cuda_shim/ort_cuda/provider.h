// The CUDA operators as ones of the CPU, so that ONNX Runtime runs them without a GPU.
#ifndef BIVLM_ORT_CUDA_PROVIDER_H_
#define BIVLM_ORT_CUDA_PROVIDER_H_

namespace bivlm::ort {

inline constexpr const char* kProvider = "CPUExecutionProvider";
inline constexpr bool kHasStreams = false;

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_CUDA_PROVIDER_H_
