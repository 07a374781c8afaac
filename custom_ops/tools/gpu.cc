#include "gpu.h"

#include <dlfcn.h>

#include <cstdint>
#include <memory>
#include <string>

#include "error.h"

namespace bivlm::device {

// Names and signatures of cuda.h; a device pointer is an integer there.
struct CudaDriver {
  using Address = unsigned long long;
  struct Context;

  int (*init)(unsigned flags) = nullptr;
  int (*device_count)(int* count) = nullptr;
  int (*device)(int* device, int ordinal) = nullptr;
  int (*retain_context)(Context** context, int device) = nullptr;
  int (*release_context)(int device) = nullptr;
  int (*set_context)(Context* context) = nullptr;
  int (*synchronize)() = nullptr;
  int (*allocate)(Address* address, std::size_t bytes) = nullptr;
  int (*free)(Address address) = nullptr;
  int (*fill)(Address address, unsigned char value, std::size_t count) = nullptr;
  int (*copy)(Address to, Address from, std::size_t bytes) = nullptr;
  int gpu = 0;
};

namespace {

constexpr char kName[] = "libcuda.so.1";
constexpr char kInstead[] = ", or use --provider cpu.";
constexpr int kNoDevice = 100;  // CUDA_ERROR_NO_DEVICE

CudaDriver::Address AddressOf(const void* memory) { return reinterpret_cast<uintptr_t>(memory); }

template <typename Function>
void Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) {
    throw RequestError(std::string("--provider cuda: the NVIDIA driver here has no ") + name +
                       ". Install a newer one" + kInstead);
  }
}

std::unique_ptr<CudaDriver> OpenDriver() {
  void* library = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw RequestError(std::string("--provider cuda: no NVIDIA driver is installed here (") +
                       dlerror() + "). Install the driver of the GPU" + kInstead);
  }
  auto driver = std::make_unique<CudaDriver>();
  Find(library, "cuInit", &driver->init);
  Find(library, "cuDeviceGetCount", &driver->device_count);
  Find(library, "cuDeviceGet", &driver->device);
  Find(library, "cuDevicePrimaryCtxRetain", &driver->retain_context);
  Find(library, "cuDevicePrimaryCtxRelease_v2", &driver->release_context);
  Find(library, "cuCtxSetCurrent", &driver->set_context);
  Find(library, "cuCtxSynchronize", &driver->synchronize);
  Find(library, "cuMemAlloc_v2", &driver->allocate);
  Find(library, "cuMemFree_v2", &driver->free);
  Find(library, "cuMemsetD8_v2", &driver->fill);
  Find(library, "cuMemcpyDtoD_v2", &driver->copy);
  return driver;
}

void Check(int code) {
  if (code == 0) return;
  if (code == kNoDevice) {
    throw RequestError(
        std::string("--provider cuda: the NVIDIA driver finds no GPU. See what 'nvidia-smi' shows "
                    "and whether CUDA_VISIBLE_DEVICES hides it") +
        kInstead);
  }
  throw RequestError("--provider cuda: the NVIDIA driver fails (CUDA error " +
                     std::to_string(code) + "). See what 'nvidia-smi' says" + kInstead);
}

}  // namespace

Gpu::Gpu() {
  std::unique_ptr<CudaDriver> driver = OpenDriver();
  Check(driver->init(0));
  int count = 0;
  Check(driver->device_count(&count));
  Check(count == 0 ? kNoDevice : 0);
  Check(driver->device(&driver->gpu, 0));
  // The context of ONNX Runtime, whose CUDA runtime uses the primary one, too.
  CudaDriver::Context* context = nullptr;
  Check(driver->retain_context(&context, driver->gpu));
  Check(driver->set_context(context));
  driver_ = driver.release();
}

Gpu::~Gpu() {
  driver_->release_context(driver_->gpu);
  delete driver_;
}

void* Gpu::Allocate(std::size_t bytes) const {
  CudaDriver::Address address = 0;
  if (driver_->allocate(&address, bytes == 0 ? 1 : bytes) != 0) return nullptr;
  Check(driver_->fill(address, 0, bytes));
  Check(driver_->synchronize());
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

void Gpu::Free(void* memory) const { driver_->free(AddressOf(memory)); }

void Gpu::Copy(void* to, const void* from, std::size_t bytes) const {
  if (bytes > 0) Check(driver_->copy(AddressOf(to), AddressOf(from), bytes));
  Check(driver_->synchronize());
}

}  // namespace bivlm::device
