// Device memory of the tests: on a GPU, or what the shim gives.
#ifndef BIVLM_TESTS_CUDA_MEMORY_H_
#define BIVLM_TESTS_CUDA_MEMORY_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace bivlm::testing {

inline void RequireCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "FAILED %s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

// `count` bytes on the device, filled with `bytes`, or with 0xFF if those are null. Copies wait for
// the device.
class DeviceBytes {
 public:
  DeviceBytes(const void* bytes, std::size_t count) : count_(count) {
    RequireCuda(cudaMalloc(&memory_, count > 0 ? count : 1), "cudaMalloc");
    if (count == 0) return;
    RequireCuda(bytes == nullptr
                    ? cudaMemsetAsync(memory_, 0xFF, count, nullptr)
                    : cudaMemcpyAsync(memory_, bytes, count, cudaMemcpyHostToDevice, nullptr),
                "copy to the device");
    RequireCuda(cudaStreamSynchronize(nullptr), "copy to the device");
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes() { cudaFree(memory_); }

  uint8_t* data() const { return static_cast<uint8_t*>(memory_); }

  std::vector<uint8_t> Read() const {
    std::vector<uint8_t> bytes(count_);
    RequireCuda(cudaMemcpyAsync(bytes.data(), memory_, count_, cudaMemcpyDeviceToHost, nullptr),
                "copy from the device");
    RequireCuda(cudaStreamSynchronize(nullptr), "copy from the device");
    return bytes;
  }

 private:
  void* memory_ = nullptr;
  std::size_t count_;
};

template <typename T>
DeviceBytes ToDevice(const std::vector<T>& values) {
  return DeviceBytes(values.data(), values.size() * sizeof(T));
}

// `bytes` bytes of 0xFF between two guards of 0xA5, to show writes outside.
class GuardedDeviceBytes {
 public:
  explicit GuardedDeviceBytes(std::size_t bytes)
      : memory_(Filled(bytes).data(), bytes + 2 * kGuard), bytes_(bytes) {
    Poison(true);
  }
  GuardedDeviceBytes(const GuardedDeviceBytes&) = delete;
  GuardedDeviceBytes& operator=(const GuardedDeviceBytes&) = delete;
  ~GuardedDeviceBytes() { Poison(false); }
  uint8_t* data() const { return memory_.data() + kGuard; }
  // What lies between the guards; sets *intact to whether these are as they were.
  std::vector<uint8_t> Read(bool* intact) const {
    Poison(false);
    const std::vector<uint8_t> all = memory_.Read();
    Poison(true);
    *intact = true;
    for (std::size_t i = 0; i < kGuard; ++i) {
      *intact = *intact && all[i] == kCanary && all[all.size() - 1 - i] == kCanary;
    }
    return {all.begin() + kGuard, all.end() - kGuard};
  }

 private:
  static constexpr int kGuard = 256;
  static constexpr uint8_t kCanary = 0xA5;
  static std::vector<uint8_t> Filled(std::size_t bytes) {
    std::vector<uint8_t> all(kGuard, kCanary);
    all.insert(all.end(), bytes, uint8_t{0xFF});
    all.insert(all.end(), kGuard, kCanary);
    return all;
  }
  // Reads of the guards show with the shim and AddressSanitizer.
  void Poison(bool is_on) const {
#if defined(__SANITIZE_ADDRESS__) && defined(BIVLM_CUDA_SHIM)
    const auto poison = is_on ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    poison(memory_.data(), kGuard);
    poison(memory_.data() + kGuard + bytes_, kGuard);
#else
    (void)is_on;
#endif
  }

  DeviceBytes memory_;
  std::size_t bytes_;
};

}  // namespace bivlm::testing

#endif  // BIVLM_TESTS_CUDA_MEMORY_H_
