// The first NVIDIA GPU, through the driver that is found at run time: memory for the KV cache.
#ifndef BIVLM_TOOLS_GPU_H_
#define BIVLM_TOOLS_GPU_H_

#include <cstddef>

namespace bivlm::device {

// CUDA's driver API, as far as it is used: https://docs.nvidia.com/cuda/cuda-driver-api
struct CudaDriver;

class Gpu {
 public:
  // Throws RequestError if there is no driver or no GPU.
  Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu();

  // Memory of the GPU, all zero, or null if there is not enough.
  void* Allocate(std::size_t bytes) const;
  void Free(void* memory) const;
  // Copies between two places on the GPU, and returns when that is done.
  void Copy(void* to, const void* from, std::size_t bytes) const;

 private:
  CudaDriver* driver_;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_GPU_H_
