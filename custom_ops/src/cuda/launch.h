// Launching a kernel without <<<>>>, which only nvcc can parse.
#ifndef BIVLM_CUDA_LAUNCH_H_
#define BIVLM_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

namespace bivlm::cuda {

// What one launch can number.
inline constexpr std::size_t kMaxBlocks = 0x7FFFFFFF;

// What the launch itself returns; an error of the kernel shows later, as always with CUDA.
template <typename... Parameters>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, std::common_type_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, stream);
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_LAUNCH_H_
