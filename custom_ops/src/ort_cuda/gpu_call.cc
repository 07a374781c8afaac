#include "ort_cuda/gpu_call.h"

#include "bivlm/cuda/device.h"
#include "ort_cuda/provider.h"

namespace bivlm::ort {

cudaStream_t StreamOf(const Api* api, const KernelContext* context) {
  void* stream = nullptr;
  if (kHasStreams) Check(KernelContext_GetGPUComputeStream::Call(api, context, &stream));
  return static_cast<cudaStream_t>(stream);
}

GpuScratch::GpuScratch(const Api* api, const KernelContext* context, std::size_t bytes)
    : api_(api) {
  if (bytes == 0) return;
  const Value* input = nullptr;
  Check(KernelContext_GetInput::Call(api, context, 0, &input));
  const MemoryInfo* place = nullptr;
  Check(GetTensorMemoryInfo::Call(api, input, &place));
  Check(KernelContext_GetAllocator::Call(api, context, place, &allocator_));
  if (!kHasStreams) {
    data_ = allocator_->Alloc(allocator_, bytes);
  } else if (Status* status =
                 KernelContext_GetScratchBuffer::Call(api, context, place, bytes, &data_);
             status != nullptr) {
    ReleaseAllocator::Call(api_, allocator_);
    throw StatusError(status);
  }
}

GpuScratch::~GpuScratch() {
  if (data_ != nullptr) allocator_->Free(allocator_, data_);
  if (allocator_ != nullptr) ReleaseAllocator::Call(api_, allocator_);
}

void RequireOurKernels() {
  const std::string forced = ForcedKernel();
  if (!forced.empty() && forced != "cuda") {
    throw InvalidArgument(ForcedKernelProblem(forced, "cuda"));
  }
  if (const std::string problem = cuda::DeviceProblem(); !problem.empty()) {
    throw std::runtime_error(problem);
  }
}

void RequireLaunch(const std::string& label, const std::string& problem) {
  if (!problem.empty()) throw std::runtime_error(label + ": " + problem);
}

}  // namespace bivlm::ort
