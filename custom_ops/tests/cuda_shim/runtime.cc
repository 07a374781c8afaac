#include <map>

#include "cuda_runtime.h"

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

}  // namespace cuda_shim

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
  }
  return "unknown error";
}
