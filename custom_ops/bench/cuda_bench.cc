// Times BinaryMatMul of the CUDA library beside cuBLAS and a copy in the card's memory; --help says
// how.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/cuda/binary_matmul.h"
#include "cublas.h"

namespace bivlm::bench {
namespace {

constexpr char kHelp[] =
    R"(usage: cuda_bench [--shape NxK]...

Medians of BinaryMatMul with float16 activations (Hadamard blocks of 64 included), as a table for
docs/PERFORMANCE.md. Each line is one CUDA graph of up to 2048 products with different weights, 256
MB and twice the L2 cache in all, so that weights come from memory. The last product is compared
with the exact one of the CPU.

  --shape NxK   output x input features; default: 576x1536 896x4864 4096x4096 3584x18944

GB/s: bytes of the weight by time; of copy: their share of what a copy from memory to memory reads
and writes; cuBLAS: what its product with float16 weights takes, as a multiple; - where there is no
libcublas or it reports an error.
)";

constexpr std::size_t kColdBytes = std::size_t{256} << 20;
constexpr std::size_t kMostProducts = 2048;  // of a graph
constexpr int kRounds = 15;

struct Shape {
  std::size_t n;
  std::size_t k;
};

void Require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

void Require(const std::string& problem) {
  if (!problem.empty()) throw std::runtime_error(problem);
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) {
    Require(cudaMalloc(&memory_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    Require(cudaMemset(memory_, 0, bytes), "cudaMemset");
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(memory_); }
  uint8_t* data() const { return static_cast<uint8_t*>(memory_); }

 private:
  void* memory_ = nullptr;
};

// What `enqueue` puts on a stream, as a graph. It runs once before that: kernels are loaded, and
// cuBLAS takes its memory, at their first launch, which a capture may refuse.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& enqueue) {
    enqueue();
    Require(cudaStreamSynchronize(stream), "kernels");
    Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    cudaGraph_t graph = nullptr;
    try {
      enqueue();
    } catch (...) {  // the stream must be of use to others
      if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
      throw;
    }
    Require(cudaStreamEndCapture(stream, &graph), "capture");
    const cudaError_t error = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    Require(error, "graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(executable_); }
  cudaGraphExec_t executable() const { return executable_; }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// The median time in us of one run of what `enqueue` puts on a stream: as a graph, so that the
// launches of the host do not count.
double Microseconds(cudaStream_t stream, const std::function<void()>& enqueue) {
  const Graph graph(stream, enqueue);
  cudaEvent_t begin;
  cudaEvent_t end;
  Require(cudaEventCreate(&begin), "event");
  Require(cudaEventCreate(&end), "event");
  std::vector<float> milliseconds(kRounds);
  for (int round = -2; round < kRounds; ++round) {  // two to warm up
    Require(cudaEventRecord(begin, stream), "event");
    Require(cudaGraphLaunch(graph.executable(), stream), "graph");
    Require(cudaEventRecord(end, stream), "event");
    Require(cudaEventSynchronize(end), "kernels");
    if (round < 0) continue;
    Require(cudaEventElapsedTime(&milliseconds[static_cast<std::size_t>(round)], begin, end),
            "event");
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(milliseconds.begin(), milliseconds.end());
  return 1e3 * double{milliseconds[kRounds / 2]};
}

// Bytes per us that a copy inside the card's memory reads and writes.
double CopyBandwidth(cudaStream_t stream) {
  const DeviceMemory from(kColdBytes);
  const DeviceMemory to(kColdBytes);
  const double us = Microseconds(stream, [&] {
    Require(cudaMemcpyAsync(to.data(), from.data(), kColdBytes, cudaMemcpyDeviceToDevice, stream),
            "copy");
  });
  return 2.0 * static_cast<double>(kColdBytes) / us;
}

// A weight of random bits in the memory of the host.
struct HostWeight {
  BinaryMatMulWeight weight;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> coefficients;

  HostWeight(const Shape& shape, double bits) {
    const std::size_t chunks = (shape.k + kChunkColumns - 1) / kChunkColumns;
    std::vector<int64_t> columns;
    for (double left = bits; left > 1e-9; left -= 1.0) {
      const double share = std::min(left, 1.0) * static_cast<double>(chunks);
      columns.push_back(std::max<int64_t>(std::llround(share), 1) * int64_t{kChunkColumns});
    }
    BinaryMatMulShape attributes;
    attributes.n = static_cast<int64_t>(shape.n);
    attributes.k = static_cast<int64_t>(shape.k);
    attributes.plane_columns = columns.data();
    attributes.plane_count = columns.size();
    attributes.hadamard_block = 64;
    Require(MakeBinaryMatMulWeight(attributes, &weight));
    std::mt19937 random(1);
    codes.resize(weight.panels * weight.panel_code_bytes);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
    coefficients.resize(weight.panels * weight.coefficient_slots * kPanelRows);
    std::uniform_real_distribution<float> uniform(0.02F, 0.04F);
    for (uint16_t& half : coefficients) half = HalfFromFloat(uniform(random));
    weight.codes = codes.data();
    weight.coefficients = reinterpret_cast<const uint8_t*>(coefficients.data());
  }
  std::size_t bytes() const { return codes.size() + 2 * coefficients.size(); }
};

// How many weights of `bytes` bytes lie in `cold_bytes`.
std::size_t ProductsOf(std::size_t bytes, std::size_t cold_bytes) {
  return std::clamp<std::size_t>((cold_bytes + bytes - 1) / bytes, 1, kMostProducts);
}

// Copies of a weight on the device, one behind the other.
struct DeviceWeights {
  std::size_t count;
  std::size_t stride;
  DeviceMemory memory;
  BinaryMatMulWeight weight;

  DeviceWeights(const HostWeight& host, std::size_t bytes)
      : count(ProductsOf(host.bytes(), bytes)),
        stride((host.bytes() + 255) / 256 * 256),
        memory(count * stride),
        weight(host.weight) {
    for (std::size_t i = 0; i < count; ++i) {
      uint8_t* at = memory.data() + i * stride;
      Require(cudaMemcpy(at, host.codes.data(), host.codes.size(), cudaMemcpyHostToDevice), "copy");
      Require(cudaMemcpy(at + host.codes.size(), host.coefficients.data(),
                         2 * host.coefficients.size(), cudaMemcpyHostToDevice),
              "copy");
    }
  }
  BinaryMatMulWeight At(std::size_t i) const {
    BinaryMatMulWeight result = weight;
    result.codes = memory.data() + i * stride;
    result.coefficients = result.codes + weight.panels * weight.panel_code_bytes;
    return result;
  }
};

// The root mean square of y against the exact product, as a share; of up to four tokens.
double RelativeError(const HostWeight& host, std::size_t m, const std::vector<uint16_t>& x,
                     const std::vector<uint16_t>& y) {
  BinaryMatMulArgs args;
  args.weight = &host.weight;
  args.type = ElementType::kFloat16;
  args.m = std::min<std::size_t>(m, 4);
  args.x = x.data();
  std::vector<uint16_t> exact(args.m * host.weight.n);
  args.y = exact.data();
  RunBinaryMatMul(*SelectBinaryMatMul(isa::kNone, ""), args, Executor());
  double error = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double want = FloatFromHalf(exact[i]);
    error += std::pow(FloatFromHalf(y[i]) - want, 2);
    size += want * want;
  }
  return std::sqrt(error / size);
}

// The time in us of cuBLAS's product x (m, k) * w^T with different weights, which are all 0; below
// 0 where there is no cuBLAS or it reports an error.
double CublasMicroseconds(Cublas* cublas, const Shape& shape, std::size_t m, const uint8_t* x,
                          uint8_t* y, std::size_t cold_bytes, cudaStream_t stream) {
  if (!cublas->IsThere()) return -1.0;
  const std::size_t bytes = 2 * shape.n * shape.k;
  const std::size_t count = ProductsOf(bytes, cold_bytes);
  const DeviceMemory weights(count * bytes);
  const auto enqueue = [&] {
    for (std::size_t i = 0; i < count; ++i) {
      if (!cublas->Product(x, weights.data() + i * bytes, y, static_cast<int>(m),
                           static_cast<int>(shape.n), static_cast<int>(shape.k), stream)) {
        throw std::runtime_error("cuBLAS reports an error");
      }
    }
  };
  try {
    return Microseconds(stream, enqueue) / static_cast<double>(count);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "cuda_bench: %s for M = %zu, %zu x %zu\n", error.what(), m, shape.n,
                 shape.k);
    cudaGetLastError();  // it is told
    return -1.0;
  }
}

// Returns whether the product is right.
bool BenchProduct(const HostWeight& host, const Shape& shape, double bits, std::size_t m,
                  double copy_bandwidth, std::size_t cold_bytes, Cublas* cublas,
                  cudaStream_t stream) {
  const DeviceWeights weights(host, cold_bytes);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(m * shape.k);
  for (uint16_t& half : x) half = HalfFromFloat(normal(random));
  std::vector<uint16_t> y(m * shape.n);
  const DeviceMemory x_device(2 * x.size());
  const DeviceMemory y_device(2 * y.size());
  const std::size_t scratch_bytes = cuda::BinaryMatMulScratchBytes(host.weight, m);
  const DeviceMemory scratch(scratch_bytes);
  Require(cudaMemcpy(x_device.data(), x.data(), 2 * x.size(), cudaMemcpyHostToDevice), "copy");
  BinaryMatMulArgs args;
  args.type = ElementType::kFloat16;
  args.m = m;
  args.x = x_device.data();
  args.y = y_device.data();
  const double us = Microseconds(stream,
                                 [&] {
                                   for (std::size_t i = 0; i < weights.count; ++i) {
                                     const BinaryMatMulWeight weight = weights.At(i);
                                     args.weight = &weight;
                                     Require(cuda::LaunchBinaryMatMul(args, scratch.data(),
                                                                      scratch_bytes, stream));
                                   }
                                 }) /
                    static_cast<double>(weights.count);
  Require(cudaMemcpy(y.data(), y_device.data(), 2 * y.size(), cudaMemcpyDeviceToHost), "copy");
  const double error = RelativeError(host, m, x, y);
  const bool is_right = error < 0.02;

  std::string ratio = "-";
  if (const double cublas_us = CublasMicroseconds(cublas, shape, m, x_device.data(),
                                                  y_device.data(), cold_bytes, stream);
      cublas_us > 0.0) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.2fx", cublas_us / us);
    ratio = text;
  }
  const double rate = static_cast<double>(host.bytes()) / us;
  const double products = static_cast<double>(m * shape.n * shape.k);
  std::printf("| %zu x %zu | %.2f | %zu | %.1f | %.1f | %.0f %% | %.2f | %s | %.2f %%%s |\n",
              shape.n, shape.k, bits, m, us, rate / 1e3, 100.0 * rate / copy_bandwidth,
              2e-6 * products / us, ratio.c_str(), 100.0 * error, is_right ? "" : " WRONG");
  std::fflush(stdout);
  return is_right;
}

std::vector<Shape> ParseShapes(int count, char** texts) {
  std::vector<Shape> shapes;
  for (int i = 1; i < count; i += 2) {
    Shape shape = {};
    char end = 0;
    if (std::string(texts[i]) != "--shape" || i + 1 == count ||
        std::sscanf(texts[i + 1], "%zux%zu%c", &shape.n, &shape.k, &end) != 2 || shape.n < 1 ||
        shape.k < 1 || shape.n > 1U << 20 || shape.k > 1U << 20) {
      throw std::invalid_argument(std::string("'") + texts[i] +
                                  "': expected --shape NxK with numbers up to 1048576");
    }
    shapes.push_back(shape);
  }
  if (shapes.empty()) return {{576, 1536}, {896, 4864}, {4096, 4096}, {3584, 18944}};
  return shapes;
}

// Returns whether all products are right.
bool Bench(const std::vector<Shape>& shapes) {
  int devices = 0;
  Require(cudaGetDeviceCount(&devices), "no GPU to measure");
  cudaDeviceProp device;
  Require(cudaGetDeviceProperties(&device, 0), "device");
  int driver = 0;
  Require(cudaDriverGetVersion(&driver), "driver");
  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "stream");
  const double bandwidth = CopyBandwidth(stream);
  const std::size_t cold_bytes =
      std::max(kColdBytes, 2 * static_cast<std::size_t>(device.l2CacheSize));
  Cublas cublas;
  std::printf(
      "%s, sm_%d%d, %d multiprocessors, driver for CUDA %d.%d; a copy reads and writes %.0f "
      "GB/s%s\n\n",
      device.name, device.major, device.minor, device.multiProcessorCount, driver / 1000,
      driver % 1000 / 10, bandwidth / 1e3, cublas.IsThere() ? "" : "; no libcublas was found");
  std::printf(
      "| N x K | bits | M | us | GB/s | of copy | TFLOP/s | cuBLAS fp16 takes | error |\n"
      "|---|---|---|---|---|---|---|---|---|\n");
  bool is_right = true;
  for (const Shape& shape : shapes) {
    for (const double bits : {2.0, 1.25, 1.0}) {
      const HostWeight host(shape, bits);
      for (const std::size_t m : {1, 4, 8, 32, 256}) {
        if (bits != 2.0 && m > 1) continue;
        is_right =
            BenchProduct(host, shape, bits, m, bandwidth, cold_bytes, &cublas, stream) && is_right;
      }
    }
  }
  cudaStreamDestroy(stream);
  return is_right;
}

}  // namespace
}  // namespace bivlm::bench

int main(int count, char** texts) {
  if (count == 2 && std::string(texts[1]) == "--help") {
    std::fputs(bivlm::bench::kHelp, stdout);
    return 0;
  }
  try {
    return bivlm::bench::Bench(bivlm::bench::ParseShapes(count, texts)) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_bench: %s\n", error.what());
    return 2;
  }
}
