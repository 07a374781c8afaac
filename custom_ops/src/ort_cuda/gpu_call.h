// What a call on a GPU gets of ONNX Runtime: its stream, and scratch memory.
#ifndef BIVLM_ORT_CUDA_GPU_CALL_H_
#define BIVLM_ORT_CUDA_GPU_CALL_H_

#include <cuda_runtime.h>

#include <cstddef>

#include "ort/adaptor.h"

namespace bivlm::ort {

cudaStream_t StreamOf(const Api* api, const KernelContext* context);

// Memory of ONNX Runtime's arena beside the first input, for one call. It belongs to the stream:
// freed before the kernels have run, it goes only to what the stream runs behind them.
class GpuScratch {
 public:
  GpuScratch(const Api* api, const KernelContext* context, std::size_t bytes);
  GpuScratch(const GpuScratch&) = delete;
  GpuScratch& operator=(const GpuScratch&) = delete;
  ~GpuScratch();

  void* data() const { return data_; }

 private:
  const Api* api_;
  Allocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// At the creation of a kernel: refuses BIVLM_FORCE_KERNEL unless it names the one kernel on a GPU,
// "cuda", and a GPU or driver on which no kernel of this library runs.
void RequireOurKernels();

// Throws what is wrong, unless that is "".
void RequireLaunch(const std::string& label, const std::string& problem);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_CUDA_GPU_CALL_H_
