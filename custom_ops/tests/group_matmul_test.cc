// Every kernel of GroupMatMul that this CPU has against the formula in double, on awkward shapes.
#include "bivlm/group_matmul.h"

#include <cfloat>
#include <cmath>
#include <random>
#include <sstream>
#include <string>

#include "binary_matmul_cases.h"
#include "check.h"
#include "reference.h"

namespace bivlm::testing {
namespace {

struct GroupCase {
  std::size_t m = 1;
  std::size_t n = 1;
  std::size_t k = 64;
  std::size_t bits = 8;
  std::size_t block = 64;
  bool float16 = false;
  uint64_t seed = 0;
};

std::string Text(const GroupCase& c) {
  std::ostringstream text;
  text << " m=" << c.m << " n=" << c.n << " k=" << c.k << " bits=" << c.bits << " block=" << c.block
       << " float16=" << c.float16 << " seed=" << c.seed;
  return text.str();
}

struct Weight {
  std::vector<uint8_t> codes;    // one per column
  std::vector<uint16_t> scales;  // halves

  double level(const GroupCase& c, std::size_t row, std::size_t j) const {
    return codes[row * c.k + j] - std::ldexp(1.0, static_cast<int>(c.bits) - 1);
  }
  double scale(const GroupCase& c, std::size_t row, std::size_t j) const {
    return HalfValue(scales[row * (c.k / c.block) + j / c.block]);
  }
};

// Codes of all values, often the extreme ones; scales of both signs, some zero or subnormal.
Weight RandomGroupWeight(const GroupCase& c, std::mt19937_64& random) {
  Weight w;
  const unsigned largest = (1U << c.bits) - 1U;
  for (std::size_t i = 0; i < c.n * c.k; ++i) {
    const unsigned drawn = static_cast<unsigned>(random());
    const bool is_extreme = i / c.k % 3 == 0;
    w.codes.push_back(
        static_cast<uint8_t>(is_extreme ? (drawn % 2 == 0 ? 0U : largest) : drawn & largest));
  }
  std::normal_distribution<double> normal(0.0, 0.05);
  for (std::size_t i = 0; i < c.n * c.k / c.block; ++i) {
    const uint64_t kind = random() % 16;
    const double value = normal(random);
    w.scales.push_back(NearestHalf(kind == 0 ? 0.0 : kind == 1 ? value * 1e-6 : value));
  }
  return w;
}

// The tensor `codes` of OPS.md.
std::vector<uint8_t> Pack(const GroupCase& c, const Weight& w) {
  if (c.bits == 8) return w.codes;
  std::vector<uint8_t> packed;
  for (std::size_t i = 0; i < w.codes.size(); i += 2) {
    packed.push_back(static_cast<uint8_t>(w.codes[i] | w.codes[i + 1] << 4));
  }
  return packed;
}

// Each once: some names stand for the kernel of the next.
std::vector<GroupMatMulKernel> TestedKernels() {
  std::vector<GroupMatMulKernel> kernels;
  for (const GroupMatMulKernel& kernel : GroupMatMulKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    if (!kernels.empty() && kernels.back().functions == kernel.functions) kernels.pop_back();
    kernels.push_back(kernel);
  }
  return kernels;
}

std::vector<double> Run(Checker* check, const GroupMatMulKernel& kernel, const GroupCase& c,
                        const Weight& w, const std::vector<float>& x, const Executor& executor) {
  GroupMatMulWeight weight;
  const auto size = [](std::size_t value) { return static_cast<int64_t>(value); };
  const std::string problem =
      MakeGroupMatMulWeight(size(c.k), size(c.n), size(c.bits), size(c.block), &weight);
  check->Expect(problem.empty(), "MakeGroupMatMulWeight", Text(c), ": ", problem);
  const std::vector<uint8_t> packed = Pack(c, w);
  check->Expect(packed.size() == c.n * weight.row_bytes(), "bytes of codes", Text(c));
  const Unaligned codes(packed.data(), packed.size(), c.seed % 5);
  const Unaligned scales(w.scales.data(), 2 * w.scales.size(), c.seed % 3);
  weight.codes = codes.data();
  weight.scales = scales.data();

  std::vector<uint16_t> halves;
  for (const float value : x) halves.push_back(ToHalf(value));
  GroupMatMulArgs args;
  args.weight = &weight;
  args.type = c.float16 ? ElementType::kFloat16 : ElementType::kFloat32;
  args.m = c.m;
  args.x = c.float16 ? static_cast<const void*>(halves.data()) : x.data();
  Guarded y(c.m * c.n * (c.float16 ? 2 : 4));
  args.y = y.data();
  RunGroupMatMul(kernel, args, executor);
  check->Expect(y.IsIntact(), kernel.name, " wrote outside y", Text(c));

  std::vector<double> outputs;
  for (std::size_t i = 0; i < c.m * c.n; ++i) {
    outputs.push_back(c.float16 ? HalfValue(static_cast<const uint16_t*>(args.y)[i])
                                : double{static_cast<const float*>(args.y)[i]});
  }
  return outputs;
}

struct Expected {
  ReferenceValue exact;    // bound: that of generic
  ReferenceValue rounded;  // by the int8 rule; bound: float32 summation alone
  double rounding = 0.0;   // how far the rule may be from the exact product
};

// `chunks` is QuantizeChunk of every chunk of the token.
Expected Product(const GroupCase& c, const Weight& w, const ReferenceTransform& x,
                 const std::vector<Int8Chunk>& chunks, std::size_t row) {
  Expected result;
  double absolute = 0.0;
  double rounded_absolute = 0.0;
  double products = 0.0;
  for (std::size_t j = 0; j < c.k; ++j) {
    const Int8Chunk& chunk = chunks[j / 64];
    const double what = w.level(c, row, j) * w.scale(c, row, j);
    const double rounded = chunk.q[j % 64] * chunk.scale;
    result.exact.value += what * x.v[j];
    result.rounded.value += what * rounded;
    absolute += std::fabs(what * x.v[j]);
    rounded_absolute += std::fabs(what * rounded);
    products += std::fabs(w.level(c, row, j) * chunk.q[j % 64]);
    // a chunk without a scale is 0
    result.rounding += std::fabs(what) * (chunk.scale > 0.0 ? chunk.scale / 2 : 127 * FLT_MIN);
  }
  const double roundings = 2.0 * static_cast<double>(c.k);
  result.exact.bound = roundings * (FLT_EPSILON * absolute + kSmallestFloat);
  // the product of two scales may be subnormal
  result.rounded.bound =
      roundings * (FLT_EPSILON * rounded_absolute + kSmallestFloat) + products * kSmallestFloat;
  return result;
}

void CompareGroup(Checker* check, const char* what, const char* kernel, const GroupCase& c,
                  std::size_t token, std::size_t row, double got, double want, double bound) {
  if (c.float16) bound += std::fabs(want) * 0x1p-11 + bound * 0x1p-11 + 0x1p-25;
  check->Expect(std::fabs(got - want) <= bound, kernel, " ", what, Text(c), " at (", token, ", ",
                row, "): got ", got, " want ", want, " bound ", bound);
}

std::vector<float> Activations(const GroupCase& c, std::mt19937_64& random) {
  Case drawn;
  drawn.m = c.m;
  drawn.k = c.k;
  drawn.float16 = c.float16;
  return RandomActivations(drawn, random);
}

void CheckToken(Checker* check, const GroupCase& c, const Weight& w, const std::vector<float>& x,
                std::size_t token, const std::vector<GroupMatMulKernel>& kernels,
                const std::vector<std::vector<double>>& outputs) {
  ReferenceTransform v;
  for (std::size_t j = 0; j < c.k; ++j) {
    const float value = x[token * c.k + j];
    v.v.push_back(c.float16 ? HalfValue(ToHalf(value)) : double{value});
    v.is_finite = v.is_finite && std::isfinite(v.v.back());
  }
  v.v.resize((c.k + 63) / 64 * 64, 0.0);
  v.error.resize(v.v.size(), 0.0);
  std::vector<Int8Chunk> chunks;
  for (std::size_t i = 0; i < v.v.size() / 64 && v.is_finite; ++i) {
    chunks.push_back(QuantizeChunk(v, i));
  }
  for (std::size_t row = 0; row < c.n; ++row) {
    Expected want;
    if (v.is_finite) want = Product(c, w, v, chunks, row);
    for (std::size_t i = 0; i < kernels.size(); ++i) {
      const char* name = kernels[i].name;
      const double got = outputs[i][token * c.n + row];
      if (!v.is_finite) {
        check->Expect(std::isnan(got), name, " NaN token", Text(c), " at (", token, ", ", row,
                      "): got ", got);
      } else if (kernels[i].isa == isa::kNone) {
        CompareGroup(check, "exact", name, c, token, row, got, want.exact.value, want.exact.bound);
      } else {
        CompareGroup(check, "int8", name, c, token, row, got, want.rounded.value,
                     want.rounded.bound);
        CompareGroup(check, "int8 against exact", name, c, token, row, got, want.exact.value,
                     want.rounded.bound + want.rounding);
      }
    }
  }
}

void RunCase(Checker* check, const GroupCase& c, const Executor& executor,
             std::size_t checked_tokens) {
  std::mt19937_64 random(c.seed);
  const Weight w = RandomGroupWeight(c, random);
  const std::vector<float> x = Activations(c, random);
  const std::vector<GroupMatMulKernel> kernels = TestedKernels();
  std::vector<std::vector<double>> outputs;
  for (const GroupMatMulKernel& kernel : kernels) {
    outputs.push_back(Run(check, kernel, c, w, x, executor));
  }
  const std::size_t step = std::max<std::size_t>(1, c.m / std::max<std::size_t>(1, checked_tokens));
  for (std::size_t token = 0; token < c.m; token += step) {
    CheckToken(check, c, w, x, token, kernels, outputs);
  }
}

// Columns round vectors of codes and of scales, rows round those that share a read.
void AwkwardShapes(Checker* check) {
  uint64_t seed = 100;
  for (const std::size_t bits : {4, 8}) {
    for (const std::size_t block : {16, 32, 64}) {
      for (const std::size_t blocks : {1, 2, 3, 5, 7, 9, 16, 17, 65, 70}) {
        for (const std::size_t n : {1, 3, 4, 5, 67}) {
          for (const std::size_t m : {0, 1, 2, 3, 4, 5, 9}) {
            GroupCase c;
            c.m = m;
            c.n = n;
            c.k = blocks * block;
            c.bits = bits;
            c.block = block;
            c.float16 = seed % 3 == 0;
            c.seed = ++seed;
            if (RunsCase()) RunCase(check, c, Executor(), c.m);
          }
        }
      }
    }
  }
}

// All codes and activations at their largest: the most that integers of the kernels must hold.
void Extremes(Checker* check) {
  for (const std::size_t bits : {4, 8}) {
    for (const int signs : {0, 1, 2, 3}) {
      GroupCase c;
      c.n = 5;
      c.k = 256;
      c.bits = bits;
      c.seed = 3;
      Weight w;
      const unsigned largest = (1U << bits) - 1U;
      w.codes.assign(c.n * c.k, static_cast<uint8_t>(signs % 2 == 0 ? 0U : largest));
      w.scales.assign(c.n * c.k / c.block, NearestHalf(1.0));
      const std::vector<float> x(c.k, signs < 2 ? 1.0F : -1.0F);
      const std::vector<GroupMatMulKernel> kernels = TestedKernels();
      std::vector<std::vector<double>> outputs;
      for (const GroupMatMulKernel& kernel : kernels) {
        outputs.push_back(Run(check, kernel, c, w, x, Executor()));
      }
      CheckToken(check, c, w, x, 0, kernels, outputs);
    }
  }
}

// The outputs of a token are, to the bit, those of the token alone, however the work is divided.
void TokensAsAlone(Checker* check) {
  uint64_t seed = 9000;
  for (const std::size_t m : {2, 3, 4, 6, 300}) {
    for (const std::size_t bits : {4, 8}) {
      GroupCase c;
      c.m = m;
      c.n = m == 300 ? 300 : 2100;
      c.k = 576;
      c.bits = bits;
      c.block = bits == 4 ? 32 : 64;
      c.seed = ++seed;
      if (!RunsCase()) continue;
      RunCase(check, c, ThreadsOf<5>(), 3);
      std::mt19937_64 random(c.seed);
      const Weight w = RandomGroupWeight(c, random);
      const std::vector<float> x = Activations(c, random);
      GroupCase alone = c;
      alone.m = 1;
      for (const GroupMatMulKernel& kernel : TestedKernels()) {
        const std::vector<double> y = Run(check, kernel, c, w, x, ThreadsOf<2>());
        for (std::size_t token = 0; token < c.m; token += 1 + c.m / 7) {
          const auto begin = x.begin() + static_cast<std::ptrdiff_t>(token * c.k);
          const std::vector<float> own(begin, begin + static_cast<std::ptrdiff_t>(c.k));
          const std::vector<double> want = Run(check, kernel, alone, w, own, Executor());
          check->Expect(std::memcmp(want.data(), y.data() + token * c.n, c.n * 8) == 0, kernel.name,
                        " token ", token, " differs from the token alone", Text(c));
        }
      }
    }
  }
}

// One token of a weight that is many tasks, for the kernel with the largest ones too.
void ManyTasks(Checker* check) {
  for (const std::size_t threads : {1, 2, 5}) {
    GroupCase c;
    c.n = 9001;
    c.k = 960;
    for (const GroupMatMulKernel& kernel : TestedKernels()) {
      check->Expect(c.n * c.k >= 4 * kernel.functions->task_products, kernel.name, ": one task");
    }
    c.bits = threads == 2 ? 4 : 8;
    c.block = 32;
    c.float16 = threads == 5;
    c.seed = 7000 + threads;
    const Executor executor = threads == 1   ? Executor()
                              : threads == 2 ? ThreadsOf<2>()
                                             : ThreadsOf<5>();
    if (RunsCase()) RunCase(check, c, executor, 1);
  }
}

void AttributeErrors(Checker* check) {
  const auto expect = [check](int64_t k, int64_t n, int64_t bits, int64_t block, const char* part) {
    GroupMatMulWeight weight;
    const std::string problem = MakeGroupMatMulWeight(k, n, bits, block, &weight);
    check->Expect(problem.find(part) != std::string::npos, "expected a problem with '", part,
                  "', got '", problem, "'");
  };
  expect(0, 5, 8, 16, "K is 0 and N is 5");
  expect(64, -1, 8, 16, "N is -1");
  expect(64, 5, 2, 16, "bits is 2, expected 4 or 8");
  expect(128, 5, 8, 128, "block_size is 128");
  expect(64, 5, 8, 0, "block_size is 0");
  expect(48, 5, 8, 32, "block_size is 32, expected 16, 32 or 64, and a divisor of K = 48");
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::AttributeErrors(&check);
  bivlm::testing::AwkwardShapes(&check);
  bivlm::testing::Extremes(&check);
  bivlm::testing::TokensAsAlone(&check);
  bivlm::testing::ManyTasks(&check);
  for (const bivlm::GroupMatMulKernel& kernel : bivlm::testing::TestedKernels()) {
    std::printf("kernel tested: %s\n", kernel.name);
  }
  return check.Finish("group_matmul_test");
}
