// cuBLAS's product in float16, from whatever libcublas this machine has; opened at run time, so
// that nothing of it is needed to build.
#ifndef BIVLM_BENCH_CUBLAS_H_
#define BIVLM_BENCH_CUBLAS_H_

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <string>

namespace bivlm::bench {

class Cublas {
 public:
  Cublas() {
    for (const char* name : {"libcublas.so", "libcublas.so.13", "libcublas.so.12"}) {
      library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library_ != nullptr) break;
    }
    if (library_ == nullptr) return;
    const auto create = Find<int (*)(void**)>("cublasCreate_v2");
    set_stream_ = Find<int (*)(void*, cudaStream_t)>("cublasSetStream_v2");
    multiply_ = Find<Multiply>("cublasGemmEx");
    if (create == nullptr || create(&handle_) != 0) handle_ = nullptr;
  }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  bool IsThere() const { return handle_ != nullptr && set_stream_ && multiply_; }

  // y (m, n) = x (m, k) * w (n, k)^T, all float16 and row-major, sums in float32. False if cuBLAS
  // reports an error.
  bool Product(const void* x, const void* w, void* y, int m, int n, int k, cudaStream_t stream) {
    // The numbers of cublas_api.h and library_types.h.
    constexpr int kTranspose = 1, kNone = 0, kFloat16 = 2, kComputeFloat32 = 68, kDefault = -1;
    const float one = 1.0F;
    const float zero = 0.0F;
    return set_stream_(handle_, stream) == 0 &&
           multiply_(handle_, kTranspose, kNone, n, m, k, &one, w, kFloat16, k, x, kFloat16, k,
                     &zero, y, kFloat16, n, kComputeFloat32, kDefault) == 0;
  }

 private:
  using Multiply = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int,
                           const void*, int, int, const void*, void*, int, int, int, int);
  template <typename Function>
  Function Find(const char* name) {
    return reinterpret_cast<Function>(dlsym(library_, name));
  }

  void* library_ = nullptr;
  void* handle_ = nullptr;
  int (*set_stream_)(void*, cudaStream_t) = nullptr;
  Multiply multiply_ = nullptr;
};

}  // namespace bivlm::bench

#endif  // BIVLM_BENCH_CUBLAS_H_
