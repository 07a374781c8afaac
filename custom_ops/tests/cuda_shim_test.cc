// The CUDA shim itself: barriers, operations of a warp, the tensor-core product, limits of a
// launch, graphs, and that what CUDA leaves undefined ends the program.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <vector>

#include "bivlm/cuda/device.h"
#include "check.h"
#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "cuda/tensor_core.h"
#include "cuda_device.h"

namespace bivlm::testing {
namespace {

using cuda::Launch;

// sums[block] = sum of `values` of the block, by a tree in shared memory.
__global__ void SumKernel(const int* values, int* sums) {
  int* shared = cuda::DynamicShared<int>();
  shared[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

void Barriers(Checker* check) {
  std::vector<int> values(3 * 256);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i * i % 1000);
  for (const bool reverse : {false, true}) {
    cuda_shim::SetReverse(reverse);
    int sums[3] = {};
    const cudaError_t error =
        Launch(SumKernel, dim3(3), dim3(256), 256 * sizeof(int), nullptr, values.data(), sums);
    check->Expect(error == cudaSuccess, "launch");
    for (int block = 0; block < 3; ++block) {
      int want = 0;
      for (int i = 0; i < 256; ++i) want += values[static_cast<std::size_t>(block * 256 + i)];
      check->Expect(sums[block] == want, "sum of block ", block, ": ", sums[block]);
    }
  }
  cuda_shim::SetReverse(false);
}

// Lanes 0 to 15 of the second warp alone go through more operations than the others.
__global__ void WarpKernel(int* result, unsigned* votes, double* wide) {
  const int thread = static_cast<int>(threadIdx.x);
  int value = thread;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  result[thread] = value;
  if (thread >= 32 && thread < 48) {
    result[thread] = __shfl_sync(0xFFFFU, thread, 3, 8) + __shfl_up_sync(0xFFFFU, thread, 1);
    result[thread] += 1000 * __shfl_down_sync(0xFFFFU, thread, 2, 4);
  }
  __syncwarp();
  const unsigned odd = __ballot_sync(~0U, thread % 2);
  votes[thread] = odd + static_cast<unsigned>(__any_sync(~0U, thread == 5)) +
                  2U * static_cast<unsigned>(__all_sync(~0U, thread >= 32));
  wide[thread] = __shfl_sync(~0U, 0.5 + thread, 31);
  const int count = __syncthreads_count(thread < 10);
  if (count != 10) result[thread] = -1;
}

void Warps(Checker* check) {
  int result[64];
  unsigned votes[64];
  double wide[64];
  check->Expect(
      Launch(WarpKernel, dim3(1), dim3(64), 0, nullptr, result, votes, wide) == cudaSuccess,
      "launch");
  for (int i = 0; i < 64; ++i) {
    int want = i < 32 ? 496 : 496 + 32 * 32;
    if (i >= 32 && i < 48) {
      const int down = i % 4 < 2 ? i + 2 : i;
      want = 32 + (i - 32) / 8 * 8 + 3 + (i == 32 ? i : i - 1) + 1000 * down;
    }
    check->Expect(result[i] == want, "thread ", i, ": ", result[i], ", expected ", want);
    const unsigned vote = 0xAAAAAAAAU + (i < 32 ? 1U : 2U);
    check->Expect(votes[i] == vote, "votes of thread ", i, ": ", votes[i]);
    check->Expect(wide[i] == (i < 32 ? 31.5 : 63.5), "double of thread ", i, ": ", wide[i]);
  }
}

// c += a * b with a (16, 32) and b (32, 8) row-major, fragments by their table.
template <auto multiply>
__global__ void ProductKernel(const int8_t* a, const int8_t* b, int32_t* c) {
  const unsigned g = threadIdx.x / 4;
  const unsigned i = threadIdx.x % 4;
  const auto byte = [](int8_t value, unsigned n) { return uint32_t{uint8_t(value)} << 8 * n; };
  uint32_t a_part[4] = {};
  uint32_t b_part[2] = {};
  int32_t c_part[4];
  for (unsigned r = 0; r < 4; ++r) {
    for (unsigned n = 0; n < 4; ++n) {
      a_part[r] |= byte(a[(g + 8 * (r % 2)) * 32 + 4 * i + 16 * (r / 2) + n], n);
      if (r < 2) b_part[r] |= byte(b[(4 * i + 16 * r + n) * 8 + g], n);
    }
    c_part[r] = c[(g + 8 * (r / 2)) * 8 + 2 * i + r % 2];
  }
  multiply(a_part, b_part, c_part, c_part);
  for (unsigned r = 0; r < 4; ++r) c[(g + 8 * (r / 2)) * 8 + 2 * i + r % 2] = c_part[r];
}

// By the instruction of sm_80, by those of sm_75, and by what kernels call.
void TensorCoreProduct(Checker* check) {
  std::mt19937 random(1);
  std::vector<int8_t> a(16 * 32);
  std::vector<int8_t> b(32 * 8);
  std::vector<int32_t> before(16 * 8);
  for (int8_t& value : a) value = static_cast<int8_t>(random());
  for (int8_t& value : b) value = static_cast<int8_t>(random());
  for (int32_t& value : before) value = static_cast<int32_t>(random() % 1000);
  const struct {
    const char* name;
    void (*kernel)(const int8_t*, const int8_t*, int32_t*);
  } products[] = {{"m16n8k32", ProductKernel<cuda::MmaM16N8K32>},
                  {"m8n8k16", ProductKernel<cuda::MultiplyAccumulateS8ByQuarters>},
                  {"chosen", ProductKernel<cuda::MultiplyAccumulateS8>}};
  for (const auto& product : products) {
    std::vector<int32_t> c = before;
    check->Expect(Launch(product.kernel, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(),
                         c.data()) == cudaSuccess,
                  "launch");
    for (std::size_t row = 0; row < 16; ++row) {
      for (std::size_t column = 0; column < 8; ++column) {
        int32_t want = before[row * 8 + column];
        for (std::size_t k = 0; k < 32; ++k) want += a[row * 32 + k] * b[k * 8 + column];
        check->Expect(c[row * 8 + column] == want, product.name, " at ", row, ", ", column);
      }
    }
  }
}

void Intrinsics(Checker* check) {
  check->Expect(__byte_perm(0x33221100U, 0x77665544U, 0x7520U) == 0x77552200U, "__byte_perm");
  check->Expect(__byte_perm(0x80U, 0x7FU, 0x00C8U) == 0x808000FFU, "__byte_perm with signs");
  check->Expect(__dp4a(0x7F80FF01, 0x02FFFF03, 5) == 3 + 1 + 128 + 254 + 5, "__dp4a");
  check->Expect(__float2int_rn(2.5F) == 2 && __float2int_rn(-3.5F) == -4 &&
                    __float2int_rn(3e9F) == 2147483647 && __float2int_rn(std::nanf("")) == 0,
                "__float2int_rn");
  check->Expect(__half2float(__float2half_rn(1.0F / 3)) == 0.333251953125F, "half");
}

__global__ void NothingKernel() {}

void Limits(Checker* check) {
  const auto launch = [](dim3 grid, dim3 block, std::size_t shared) {
    return Launch(NothingKernel, grid, block, shared, nullptr);
  };
  check->Expect(launch(dim3(0), dim3(32), 0) == cudaErrorInvalidConfiguration, "no blocks");
  check->Expect(launch(dim3(1), dim3(1025), 0) == cudaErrorInvalidConfiguration, "1025 threads");
  check->Expect(launch(dim3(1, 65536), dim3(32), 0) == cudaErrorInvalidConfiguration, "65536 rows");
  check->Expect(launch(dim3(1), dim3(1024), 49152) == cudaSuccess, "48 KiB");
  check->Expect(launch(dim3(1), dim3(32), 49153) == cudaErrorInvalidValue, "more than 48 KiB");
  check->Expect(cudaFuncSetAttribute(NothingKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     65536) == cudaSuccess &&
                    launch(dim3(1), dim3(32), 65536) == cudaSuccess,
                "64 KiB on request");
}

__global__ void AddKernel(int* sum, int value) { *sum += value; }

// A graph keeps the arguments of its kernels, runs each time it is launched, and takes in only what
// its own stream is given.
void Graphs(Checker* check) {
  int sum = 0;
  const auto add = [&](int value, cudaStream_t stream) {
    return Launch(AddKernel, dim3(1), dim3(1), 0, stream, &sum, value);
  };
  AsGraph().run([&](cudaStream_t stream) {
    check->Expect(add(3, stream) == cudaSuccess && add(4, stream) == cudaSuccess, "capture");
    check->Expect(sum == 0, "a capture runs a kernel");
    check->Expect(add(100, nullptr) == cudaErrorStreamCaptureImplicit, "another stream");
    check->Expect(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported, "waiting");
  });
  check->Expect(sum == 14, "two runs of a graph: ", sum);
  OnOwnStream().run([&](cudaStream_t stream) { add(1, stream); });
  check->Expect(sum == 15, "a stream after a capture: ", sum);
}

// Which errors let the tests for a GPU be skipped; see cuda_device.h.
void SkippedTests(Checker* check) {
  for (const bool has_driver : {false, true}) {
    check->Expect(MeansNoGpu(cudaErrorNoDevice, has_driver), "no device");
    check->Expect(MeansNoGpu(cudaErrorInsufficientDriver, has_driver) == !has_driver, "driver");
    check->Expect(!MeansNoGpu(cudaErrorMemoryAllocation, has_driver), "memory, as under ASan");
  }
}

// What the library says of a GPU or a driver that it was not built for.
void DeviceProblems(Checker* check) {
  const struct {
    cudaError_t error;
    const char* text;
  } cases[] = {
      {cudaErrorNoKernelImageForDevice,
       "no code for this GPU, whose compute capability is 8.7; build it with "
       "-DBIVLM_CUDA_ARCHITECTURES=87"},
      {cudaErrorInvalidDeviceFunction, "no code for this GPU"},
      {cudaErrorInsufficientDriver,
       "driver is too old: it knows CUDA 12.6, libbivlm_custom_ops_cuda was built "
       "with CUDA 13.0"},
      {cudaErrorUnsupportedPtxVersion, "driver is too old"},
      {cudaErrorMemoryAllocation, "the GPU cannot be used: out of memory"},
  };
  for (const auto& c : cases) {
    setenv("BIVLM_SHIM_GPU_ERROR", std::to_string(c.error).c_str(), 1);
    const std::string problem = cuda::DeviceProblem();
    check->Expect(problem.find(c.text) != std::string::npos, "error ", c.error, ": '", problem,
                  "'");
  }
  unsetenv("BIVLM_SHIM_GPU_ERROR");
  check->Expect(cuda::DeviceProblem().empty(), "a GPU without problems");
}

__global__ void DivergentBarrier() {
  if (threadIdx.x != 7) __syncthreads();
}
__global__ void DivergentWarp() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(~0U, 1);
  }
}
__global__ void MissingLane() { __shfl_sync(0xFFU, 1, 0); }

// Whether a launch of `kernel` aborts; in a child process.
void ExpectAbort(Checker* check, const char* what, void (*kernel)()) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    Launch(kernel, dim3(1), dim3(32), 0, nullptr);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check->Expect(child > 0 && !(WIFEXITED(status) && WEXITSTATUS(status) == 0), what,
                " is not noticed");
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  Checker check;
  Barriers(&check);
  Warps(&check);
  TensorCoreProduct(&check);
  Intrinsics(&check);
  Limits(&check);
  Graphs(&check);
  SkippedTests(&check);
  DeviceProblems(&check);
  ExpectAbort(&check, "a barrier that one thread does not reach", DivergentBarrier);
  ExpectAbort(&check, "a warp in two operations", DivergentWarp);
  ExpectAbort(&check, "a lane outside its mask", MissingLane);
  return check.Finish("cuda_shim_test");
}
