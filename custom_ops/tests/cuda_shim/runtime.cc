#include <map>
#include <vector>

#include "cuda_runtime.h"

using Work = std::vector<std::function<void()>>;
struct CUstream_st {
  Work captured;
};
struct CUgraph_st {
  Work work;
};
struct CUgraphExec_st {
  Work work;
};

namespace {

cudaStream_t capturing = nullptr;

}  // namespace

namespace cuda_shim {
namespace {

constexpr std::size_t kDefaultSharedBytes = 48 << 10;
constexpr std::size_t kMostSharedBytes = 64 << 10;  // of sm_75, the least of our architectures

std::map<const void*, std::size_t>& AllowedBytes() {
  static std::map<const void*, std::size_t> bytes;
  return bytes;
}

}  // namespace

cudaError_t AllowSharedBytes(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > kMostSharedBytes) return cudaErrorInvalidValue;
  AllowedBytes()[kernel] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

cudaError_t GpuError() {
  const char* number = std::getenv("BIVLM_SHIM_GPU_ERROR");
  return number == nullptr ? cudaSuccess
                           : static_cast<cudaError_t>(std::strtol(number, nullptr, 10));
}

cudaError_t CheckLaunch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes) {
  const auto allowed = AllowedBytes().find(kernel);
  const std::size_t limit = allowed == AllowedBytes().end() ? kDefaultSharedBytes : allowed->second;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 &&
                    grid.x <= 0x7FFFFFFFU && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535;
  if (!fits) return cudaErrorInvalidConfiguration;
  return shared_bytes <= limit ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t Enqueue(cudaStream_t stream, const std::function<void()>& work) {
  if (capturing == nullptr) {
    work();
    return cudaSuccess;
  }
  if (stream != capturing) return cudaErrorStreamCaptureImplicit;
  stream->captured.push_back(work);
  return cudaSuccess;
}

}  // namespace cuda_shim

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return capturing == nullptr ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  capturing = stream;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream != capturing) return cudaErrorStreamCaptureUnsupported;
  capturing = nullptr;
  *graph = new CUgraph_st{std::move(stream->captured)};
  stream->captured.clear();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return cuda_shim::Enqueue(stream, [executable] {
    for (const auto& work : executable->work) work();
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    default:
      return "unknown error";
  }
}
