// Times every kernel of BinaryMatMul on one thread: binary_matmul_bench [m n k planes]...
//
// Codes are random. "hot" repeats one weight; "cold" cycles through copies of 256 MiB in all, so
// that each call reads its weight from memory. Medians of the calls made in half a second.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "bivlm/binary_matmul.h"

namespace bivlm {
namespace {

constexpr std::size_t kColdBytes = std::size_t{256} << 20;

struct Problem {
  std::size_t m;
  std::size_t n;
  std::size_t k;
  std::size_t planes;
};

double CpuSeconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Median seconds of a call.
double Time(const BinaryMatMulKernel& kernel, BinaryMatMulArgs args,
            const std::vector<uint8_t>& codes, std::size_t weight_bytes, std::size_t copies) {
  BinaryMatMulWeight weight = *args.weight;
  args.weight = &weight;
  std::size_t call = 0;
  const auto seconds_of = [&](std::size_t calls) {
    const double start = CpuSeconds();
    for (std::size_t i = 0; i < calls; ++i, ++call) {
      weight.codes = codes.data() + call % copies * weight_bytes;
      RunBinaryMatMul(kernel, args, Executor());
    }
    return (CpuSeconds() - start) / static_cast<double>(calls);
  };
  // Samples of at least 50 us, far above the cost of reading the clock.
  const std::size_t calls = 1 + static_cast<std::size_t>(50e-6 / seconds_of(1));
  std::vector<double> samples;
  for (double total = 0.0; total < 0.5 || samples.size() < 3;) {
    samples.push_back(seconds_of(calls));
    total += samples.back() * static_cast<double>(calls);
  }
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

void Bench(const Problem& problem) {
  const std::vector<int64_t> columns(problem.planes,
                                     static_cast<int64_t>((problem.k + 63) / 64 * 64));
  BinaryMatMulShape shape;
  shape.n = static_cast<int64_t>(problem.n);
  shape.k = static_cast<int64_t>(problem.k);
  shape.plane_columns = columns.data();
  shape.plane_count = columns.size();
  BinaryMatMulWeight weight;
  if (const std::string text = MakeBinaryMatMulWeight(shape, &weight); !text.empty()) {
    std::printf("%s\n", text.c_str());
    return;
  }
  const std::size_t bytes = weight.panels * weight.panel_code_bytes;
  const std::size_t copies = std::max<std::size_t>(1, kColdBytes / bytes);
  std::vector<uint8_t> codes(copies * bytes);
  std::mt19937_64 random(1);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
  std::vector<uint16_t> coefficients(weight.panels * weight.coefficient_slots * kPanelRows, 0x2E66);
  std::vector<float> x(problem.m * problem.k);
  for (float& value : x) value = static_cast<float>(random() % 2001) / 1000.0F - 1.0F;
  std::vector<float> y(problem.m * problem.n);
  weight.coefficients = reinterpret_cast<const uint8_t*>(coefficients.data());
  BinaryMatMulArgs args;
  args.weight = &weight;
  args.m = problem.m;
  args.x = x.data();
  args.y = y.data();
  const double flops = 2.0 * static_cast<double>(problem.m * problem.n * problem.k);
  for (const BinaryMatMulKernel& kernel : BinaryMatMulKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    const double hot = Time(kernel, args, codes, bytes, 1);
    const double cold = Time(kernel, args, codes, bytes, copies);
    std::printf(
        "%-8s m=%zu n=%zu k=%zu planes=%zu | hot %9.1f us %6.1f GB/s %7.1f GFLOP/s | cold "
        "%9.1f us %6.1f GB/s\n",
        kernel.name, problem.m, problem.n, problem.k, problem.planes, hot * 1e6,
        static_cast<double>(bytes) / hot * 1e-9, flops / hot * 1e-9, cold * 1e6,
        static_cast<double>(bytes) / cold * 1e-9);
  }
}

}  // namespace
}  // namespace bivlm

int main(int argc, char** argv) {
  std::vector<std::size_t> numbers;
  for (int i = 1; i < argc; ++i) numbers.push_back(std::strtoull(argv[i], nullptr, 10));
  if (numbers.empty()) {
    numbers = {1, 4096, 4096, 2, 256, 4096, 4096, 2, 1, 704, 256, 2, 256, 704, 256, 2};
  }
  if (numbers.size() % 4 != 0 || std::count(numbers.begin(), numbers.end(), 0U) > 0) {
    std::fprintf(stderr, "usage: binary_matmul_bench [m n k planes]...\n");
    return 2;
  }
  for (std::size_t i = 0; i < numbers.size(); i += 4) {
    bivlm::Bench({numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]});
  }
  return 0;
}
