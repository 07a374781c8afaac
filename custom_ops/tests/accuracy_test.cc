// How far the int8 kernels are from the exact form on activations as models have them:
// |y - y_generic| / |y_generic| over all outputs, in the Euclidean norm.
#include <cmath>
#include <random>
#include <vector>

#include "bivlm/binary_matmul.h"
#include "check.h"

namespace bivlm::testing {
namespace {

constexpr std::size_t kN = 160;

struct Activations {
  const char* name;
  double outliers;  // share of the channels that are 100 times as large
  double most_error;
};
constexpr Activations kActivations[] = {{"gaussian", 0.0, 0.01}, {"outliers", 0.001, 0.025}};

struct Case {
  Activations activations;
  std::size_t m;
  std::size_t k;
  std::size_t planes;
  int64_t hadamard_block;
  uint64_t seed;
};

struct Problem {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> coefficients;
  std::vector<float> x;
};

// Random signs; coefficients of plane p around 0.05 / 2^p, as residual binarization has them.
Problem MakeProblem(const Case& c, BinaryMatMulWeight* weight) {
  std::mt19937_64 random(c.seed);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  Problem problem;
  problem.codes.resize(weight->panels * weight->panel_code_bytes);
  for (uint8_t& code : problem.codes) code = static_cast<uint8_t>(random());
  for (std::size_t panel = 0; panel < weight->panels; ++panel) {
    for (std::size_t slot = 0; slot < weight->coefficient_slots; ++slot) {
      for (std::size_t row = 0; row < kPanelRows; ++row) {
        const float spread = std::exp(0.3F * normal(random));
        problem.coefficients.push_back(
            HalfFromFloat(0.05F * spread * std::exp2(-static_cast<float>(slot))));
      }
    }
  }
  std::vector<float> channel_scale(c.k, 1.0F);
  const double count = std::ceil(c.activations.outliers * static_cast<double>(c.k));
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    channel_scale[random() % c.k] = 100.0F;
  }
  for (std::size_t i = 0; i < c.m * c.k; ++i) {
    problem.x.push_back(normal(random) * channel_scale[i % c.k]);
  }
  weight->codes = problem.codes.data();
  weight->coefficients = reinterpret_cast<const uint8_t*>(problem.coefficients.data());
  return problem;
}

std::vector<float> Run(const BinaryMatMulKernel& kernel, const BinaryMatMulWeight& weight,
                       const Case& c, const std::vector<float>& x) {
  std::vector<float> y(c.m * kN);
  BinaryMatMulArgs args;
  args.weight = &weight;
  args.m = c.m;
  args.x = x.data();
  args.y = y.data();
  RunBinaryMatMul(kernel, args, Executor());
  return y;
}

double RelativeError(const std::vector<float>& y, const std::vector<float>& exact) {
  double error = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    error += std::pow(double{y[i]} - double{exact[i]}, 2);
    norm += std::pow(double{exact[i]}, 2);
  }
  return std::sqrt(error / norm);
}

void RunCase(Checker* check, const Case& c) {
  const std::vector<int64_t> columns(c.planes, static_cast<int64_t>((c.k + 63) / 64 * 64));
  BinaryMatMulShape shape;
  shape.n = kN;
  shape.k = static_cast<int64_t>(c.k);
  shape.plane_columns = columns.data();
  shape.plane_count = columns.size();
  shape.hadamard_block = c.hadamard_block;
  BinaryMatMulWeight weight;
  const std::string problem_text = MakeBinaryMatMulWeight(shape, &weight);
  check->Expect(problem_text.empty(), problem_text);
  const Problem problem = MakeProblem(c, &weight);
  const std::vector<float> exact =
      Run(*SelectBinaryMatMul(isa::kNone, "generic"), weight, c, problem.x);
  const IsaSet present = SupportedIsa();
  for (const BinaryMatMulKernel& kernel : BinaryMatMulKernels()) {
    if ((kernel.isa & present) != kernel.isa || kernel.isa == isa::kNone) continue;
    const double error = RelativeError(Run(kernel, weight, c, problem.x), exact);
    std::printf("%-8s %s m=%zu k=%zu planes=%zu hadamard=%d: %.2f %%\n", kernel.name,
                c.activations.name, c.m, c.k, c.planes, static_cast<int>(c.hadamard_block),
                100.0 * error);
    check->Expect(error <= c.activations.most_error, kernel.name, " ", c.activations.name,
                  " m=", c.m, " k=", c.k, " planes=", c.planes, " hadamard=", c.hadamard_block,
                  " seed=", c.seed, ": relative error ", error);
    // Rounding happened: an exact kernel in the place of an int8 one would be a mistake as well.
    check->Expect(error > 1e-4, kernel.name, " is exact: relative error ", error);
  }
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  Checker check;
  uint64_t seed = 900;
  for (const Activations& activations : kActivations) {
    for (const std::size_t k : {576, 4096}) {
      for (const std::size_t planes : {1, 2, 3}) {
        for (const int64_t hadamard_block : {0, 64}) {
          for (const std::size_t m : {4, 24}) {
            RunCase(&check, {activations, m, k, planes, hadamard_block, ++seed});
          }
        }
      }
    }
  }
  if (bivlm::SupportedIsa() == bivlm::isa::kNone) {
    std::printf("skipped: this CPU has no int8 kernel\n");
    return kSkipped;
  }
  return check.Finish("accuracy_test");
}
