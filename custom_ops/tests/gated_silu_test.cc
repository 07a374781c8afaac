// GatedSiLU with every kernel that this CPU has against the formula in double; with BIVLM_TEST_CUDA
// the CUDA kernel, run by the shim on the CPU (cuda_gated_silu_test) or on a GPU
// (cuda_gated_silu_gpu_test).
#include "bivlm/gated_silu.h"

#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "check.h"
#include "reference.h"

#ifdef BIVLM_TEST_CUDA
#include "bivlm/cuda/gated_silu.h"
#include "cuda_device.h"
#include "cuda_memory.h"
#endif

namespace bivlm::testing {
namespace {

void Store(bool float16, std::size_t i, float value, void* memory) {
  if (float16) {
    static_cast<uint16_t*>(memory)[i] = HalfFromFloat(value);
  } else {
    static_cast<float*>(memory)[i] = value;
  }
}

double Load(bool float16, std::size_t i, const void* memory) {
  return float16 ? LoadHalf(static_cast<const uint16_t*>(memory) + i)
                 : static_cast<const float*>(memory)[i];
}

struct Implementation {
  std::string name;
  std::function<std::string(const GatedSiluArgs&, const Executor&)> run;  // "" or what is wrong
};

#ifdef BIVLM_TEST_CUDA
// With copies of x and y on the device.
Implementation OnDevice(const Enqueuer& how) {
  return {
      "cuda" + how.name, [how](const GatedSiluArgs& args, const Executor&) {
        const std::size_t bytes = args.rows * args.width * ElementBytes(args.type);
        const DeviceBytes x(args.x, 2 * bytes);
        const GuardedDeviceBytes y(bytes);
        GatedSiluArgs on_device = args;
        on_device.x = x.data();
        on_device.y = y.data();
        std::string problem;
        how.run([&](cudaStream_t stream) { problem = cuda::LaunchGatedSilu(on_device, stream); });
        bool intact = false;
        const std::vector<uint8_t> result = y.Read(&intact);
        if (!intact) problem += " wrote outside y on the device";
        if (bytes > 0) std::memcpy(args.y, result.data(), bytes);
        return problem;
      }};
}
#endif

std::vector<Implementation> Implementations() {
  std::vector<Implementation> all;
#ifdef BIVLM_TEST_CUDA
  for (const Enqueuer& how : {OnDefaultStream(), OnOwnStream(), AsGraph()}) {
    all.push_back(OnDevice(how));
  }
#else
  for (const GatedSiluKernel& kernel : GatedSiluKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    all.push_back({kernel.name, [&kernel](const GatedSiluArgs& args, const Executor& executor) {
                     RunGatedSilu(kernel, args, executor);
                     return std::string();
                   }});
  }
#endif
  return all;
}

// x (rows, 2 * width), rounded to float16 for that type.
void Run(Checker* check, const Implementation& kernel, bool float16, const std::vector<float>& x,
         std::size_t rows, const Executor& executor) {
  const std::size_t width = rows == 0 ? 7 : x.size() / rows / 2;
  const std::size_t bytes = float16 ? 2 : 4;
  Guarded input(x.size() * bytes);
  Guarded output(rows * width * bytes);
  for (std::size_t i = 0; i < x.size(); ++i) Store(float16, i, x[i], input.data());
  GatedSiluArgs args;
  args.type = float16 ? ElementType::kFloat16 : ElementType::kFloat32;
  args.rows = rows;
  args.width = width;
  args.x = input.data();
  args.y = output.data();
  const std::string problem = kernel.run(args, executor);
  const std::string what = kernel.name + (float16 ? " float16 " : " float32 ") +
                           std::to_string(rows) + " x " + std::to_string(width);
  check->Expect(problem.empty(), what, ": ", problem);
  check->Expect(input.IsIntact() && output.IsIntact(), what, ": wrote outside a tensor");
  for (std::size_t i = 0; i < rows * width; ++i) {
    const std::size_t at = i / width * 2 * width + i % width;
    const double gate = Load(float16, at, input.data());
    const double up = Load(float16, at + width, input.data());
    const double want = gate / (1 + std::exp(-gate)) * up;
    const double got = Load(float16, i, output.data());
    const double rounding = float16 ? std::max(std::fabs(want) * 0x1p-11, 0x1p-25) * 1.001 : 0.0;
    const double bound = 4 * FLT_EPSILON * std::fabs(want) + 2e-36 * std::fabs(up) + rounding;
    // beyond the largest half there is only infinity
    const bool overflows = float16 ? std::fabs(want) > 65504 : std::fabs(want) > FLT_MAX;
    const bool close = std::isnan(want)   ? std::isnan(got)
                       : overflows        ? std::isinf(got) || std::fabs(got) >= 65504
                       : std::isinf(want) ? got == want
                                          : std::fabs(got - want) <= bound;
    check->Expect(close, what, " at ", i, ": got ", got, " want ", want, " of ", gate, " and ", up);
  }
}

void RunAll(Checker* check, const std::vector<float>& x, std::size_t rows,
            const Executor& executor = Executor()) {
  for (const Implementation& kernel : Implementations()) {
    for (const bool float16 : {false, true}) Run(check, kernel, float16, x, rows, executor);
  }
}

std::vector<float> Draw(std::size_t count, float size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0F, size);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Rows and widths round vectors, parts and tasks.
void Shapes(Checker* check) {
  for (std::size_t width = 1; width < 40; ++width) RunAll(check, Draw(6 * width, 2.0F, width), 3);
  for (const std::size_t width : {127, 128, 129, 255, 1536, 4864}) {
    RunAll(check, Draw(2 * width, 4.0F, width), 1);
    RunAll(check, Draw(22 * width, 30.0F, width), 11, ThreeThreads());
  }
  RunAll(check, Draw(40000, 1.0F, 1), 1, ThreeThreads());  // a row that is more than a task
  RunAll(check, {}, 0);
}

// Gates of all sizes, and values that are not finite.
void Gates(Checker* check) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> gates = {0.0F, -0.0F, kNan, kInf, -kInf, -87.3F, -87.4F, -88.0F, 88.0F, 1e30F};
  for (float gate = -110.0F; gate < 110.0F; gate += 0.37F) gates.push_back(gate);
  for (const float up : {1.0F, -3.5F, 0.0F, kNan}) {
    std::vector<float> x = gates;
    x.insert(x.end(), gates.size(), up);
    RunAll(check, x, 1);
  }
}

#ifdef BIVLM_TEST_CUDA
// Refused before anything is read.
void TooManyRows(Checker* check) {
  GatedSiluArgs args;
  args.type = ElementType::kFloat16;
  const auto expect = [&](std::size_t rows, std::size_t width, const std::string& part) {
    args.rows = rows;
    args.width = width;
    const std::string problem = cuda::LaunchGatedSilu(args, nullptr);
    check->Expect(problem.find(part) != std::string::npos, "expected '", part, "', got '", problem,
                  "'");
  };
  expect(std::size_t{1} << 31, 256,
         "X has 2147483648 rows of 512, at most 2147483647 of this size fit one launch; divide");
  expect((std::size_t{1} << 32) + 1, 257, "X has 4294967297 rows of 514, at most 1073741823 of");
  expect(1, std::size_t{1} << 40, "at most 0 of this size");
}
#endif

}  // namespace
}  // namespace bivlm::testing

int main() {
#ifdef BIVLM_TEST_CUDA
  if (const int code = bivlm::testing::FindGpu(); code != 0) return code;
#endif
  bivlm::testing::Checker check;
  bivlm::testing::Shapes(&check);
  bivlm::testing::Gates(&check);
#ifdef BIVLM_TEST_CUDA
  bivlm::testing::TooManyRows(&check);
#endif
  return check.Finish("gated_silu_test");
}
