// Whether kernels of this library run on the GPU at hand, asked of one of them.
#include <cuda_runtime.h>

#include "bivlm/cuda/device.h"

namespace bivlm::cuda {
namespace {

constexpr char kLibrary[] = "libbivlm_custom_ops_cuda";

// Compiled as all kernels of the library are: what is true of its code is true of theirs.
__global__ void Probe() {}

// 13.0 of 13000.
std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string DriverProblem() {
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver was found; install the driver of the GPU";
  return "the NVIDIA driver is too old: it knows CUDA " + VersionText(driver) + ", " + kLibrary +
         " was built with CUDA " + VersionText(runtime) +
         "; install a newer driver, or build the library with the CUDA toolkit of the driver's "
         "version";
}

std::string NoCodeProblem() {
  int device = 0;
  int major = 0;
  int minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string digits = std::to_string(major) + std::to_string(minor);
  return std::string(kLibrary) + " has no code for this GPU, whose compute capability is " +
         std::to_string(major) + "." + std::to_string(minor) +
         "; build it with -DBIVLM_CUDA_ARCHITECTURES=" + digits +
         " (pip install --config-settings=cmake.define.BIVLM_CUDA_ARCHITECTURES=" + digits + " .)";
}

}  // namespace

std::string DeviceProblem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, Probe);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is told here, not by the next launch
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorUnsupportedPtxVersion:  // PTX that a newer driver would compile for this GPU
      return DriverProblem();
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
      return NoCodeProblem();
    default:
      return std::string("the GPU cannot be used: ") + cudaGetErrorString(error);
  }
}

}  // namespace bivlm::cuda
