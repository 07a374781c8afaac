// The part of <cuda_runtime.h> that src/cuda uses, for a C++ compiler and a CPU: kernels run as
// fibres (fibres.h) when they are launched. Test code; nothing of it is shipped.
//
// Device memory is host memory. What is enqueued on a stream is done at once, or, while the stream
// captures, when the graph is launched.
#ifndef BIVLM_TESTS_CUDA_SHIM_CUDA_RUNTIME_H_
#define BIVLM_TESTS_CUDA_SHIM_CUDA_RUNTIME_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "fibres.h"

#define BIVLM_CUDA_SHIM

// ---- Language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(...)

inline constexpr int warpSize = 32;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define BIVLM_SHIM_VECTORS(type, name)                             \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
BIVLM_SHIM_VECTORS(int, int)
BIVLM_SHIM_VECTORS(unsigned, uint)
BIVLM_SHIM_VECTORS(float, float)
#undef BIVLM_SHIM_VECTORS

// ---- Host API ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureImplicit = 906,
};
using cudaStream_t = struct CUstream_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
inline constexpr unsigned cudaStreamNonBlocking = 1;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace cuda_shim {
// What cudaFuncSetAttribute allowed a kernel, else 48 KiB.
std::size_t AllowedSharedBytes(const void* kernel);
cudaError_t AllowSharedBytes(const void* kernel, int bytes);
// The number in the environment variable BIVLM_SHIM_GPU_ERROR, which tests set to see what is said
// of GPUs and drivers that the library was not built for.
cudaError_t GpuError();
cudaError_t CheckLaunch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes);

// Does `work` now, or puts it into the graph that the stream captures. While one captures, nothing
// may be enqueued on another stream.
cudaError_t Enqueue(cudaStream_t stream, const std::function<void()>& work);

template <typename... Parameters, std::size_t... i>
std::tuple<Parameters...> CopyArguments(void (*)(Parameters...), void** arguments,
                                        std::index_sequence<i...>) {
  return {*static_cast<Parameters*>(arguments[i])...};
}
}  // namespace cuda_shim

const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
// Of just this size, so that AddressSanitizer sees what lies behind.
inline cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  return posix_memalign(pointer, 256, bytes) == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  return cuda_shim::Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  return cuda_shim::Enqueue(stream, [=] { std::memset(to, value, bytes); });
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// 8.7, a Jetson Orin.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 7;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12060;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cuda_shim::GpuError();
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return cuda_shim::AllowSharedBytes(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared_bytes, cudaStream_t stream) {
  const cudaError_t error =
      cuda_shim::CheckLaunch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes);
  if (error != cudaSuccess) return error;
  const auto copies =
      cuda_shim::CopyArguments(kernel, arguments, std::index_sequence_for<Parameters...>());
  return cuda_shim::Enqueue(stream, [=] {
    cuda_shim::RunGrid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
                       [&] { std::apply(kernel, copies); });
  });
}

#include "device_functions.h"

#endif  // BIVLM_TESTS_CUDA_SHIM_CUDA_RUNTIME_H_
