// What the CUDA tests need of a GPU, or of the shim: whether there is one, and ways to enqueue
// work.
#ifndef BIVLM_TESTS_CUDA_DEVICE_H_
#define BIVLM_TESTS_CUDA_DEVICE_H_

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <functional>
#include <string>

#include "check.h"
#include "cuda_memory.h"

namespace bivlm::testing {

// Whether this error of cudaGetDeviceCount says no more than that the machine has no GPU. With a
// driver, that it is too old, too new or broken is no reason to skip a test.
inline bool MeansNoGpu(cudaError_t error, bool has_driver) {
  return error == cudaErrorNoDevice || (error == cudaErrorInsufficientDriver && !has_driver);
}

inline bool HasDriver() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver != nullptr) dlclose(driver);
  return driver != nullptr;
}

// 0 where there is a GPU; else why a test cannot run is printed, and this is its exit code.
inline int FindGpu() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) return 0;
  if (MeansNoGpu(error, HasDriver())) {
    std::printf("skipped: no GPU to run on (%s)\n", cudaGetErrorString(error));
    return kSkipped;
  }
  std::fprintf(stderr, "FAILED CUDA does not start: %s (error %d)\n", cudaGetErrorString(error),
               static_cast<int>(error));
  return 1;
}

// Runs blocks and threads backwards, where the shim runs them.
inline void SetReverse(bool reverse) {
#ifdef BIVLM_CUDA_SHIM
  cuda_shim::SetReverse(reverse);
#else
  (void)reverse;
#endif
}

// A way to have a GPU do what `launch(stream)` enqueues; returns when it may have been done.
struct Enqueuer {
  std::string name;
  std::function<void(const std::function<void(cudaStream_t)>& launch)> run;
};

inline Enqueuer OnDefaultStream() {
  return {"", [](const auto& launch) { launch(nullptr); }};
}

// A stream that the default one does not wait for: what goes there by mistake comes too late.
class DeviceStream {
 public:
  DeviceStream() {
    RequireCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;
  ~DeviceStream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }
  void Synchronize() const { RequireCuda(cudaStreamSynchronize(stream_), "kernels"); }

 private:
  cudaStream_t stream_ = nullptr;
};

inline Enqueuer OnOwnStream() {
  return {" on a stream of its own", [](const auto& launch) {
            const DeviceStream stream;
            launch(stream.get());
            stream.Synchronize();
          }};
}

// Captured, and run twice when `launch` and what it knew are gone. Kernels must have run before: a
// capture may refuse to load them.
inline Enqueuer AsGraph() {
  return {" as a graph", [](const auto& launch) {
            const DeviceStream stream;
            cudaGraph_t graph = nullptr;
            cudaGraphExec_t executable = nullptr;
            RequireCuda(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
                        "capture");
            launch(stream.get());
            RequireCuda(cudaStreamEndCapture(stream.get(), &graph), "capture");
            RequireCuda(cudaGraphInstantiate(&executable, graph, 0), "graph");
            for (int i = 0; i < 2; ++i) {
              RequireCuda(cudaGraphLaunch(executable, stream.get()), "graph");
            }
            stream.Synchronize();
            cudaGraphExecDestroy(executable);
            cudaGraphDestroy(graph);
          }};
}

}  // namespace bivlm::testing

#endif  // BIVLM_TESTS_CUDA_DEVICE_H_
