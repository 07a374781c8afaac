// Every kernel of BinaryMatMul that this CPU has against the reference, on awkward shapes. Where
// BIVLM_TEST_EMULATED_ISA is set, the kernels that need it, linked with an emulation of it.
#include "bivlm/binary_matmul.h"

#include <cmath>
#include <random>
#include <string>

#include "binary_matmul_cases.h"
#include "check.h"
#include "reference.h"

#ifndef BIVLM_TEST_EMULATED_ISA
#define BIVLM_TEST_EMULATED_ISA isa::kNone
#endif

namespace bivlm::testing {
namespace {

std::vector<BinaryMatMulKernel> TestedKernels() {
  constexpr IsaSet kEmulated = BIVLM_TEST_EMULATED_ISA;
  const IsaSet present = SupportedIsa() | kEmulated;
  std::vector<BinaryMatMulKernel> kernels;
  for (const BinaryMatMulKernel& kernel : BinaryMatMulKernels()) {
    const bool runs = (kernel.isa & present) == kernel.isa;
    if (runs && (kernel.isa & kEmulated) == kEmulated) kernels.push_back(kernel);
  }
  return kernels;
}

// Which rule of OPS.md a kernel rounds by.
enum class Rule { kExact, kInt8, kLookup, kWideLookup };

constexpr std::size_t kMostLookupTokens = 4;

Rule RuleOf(const BinaryMatMulKernel& kernel, std::size_t m) {
  if (kernel.isa == isa::kNone) return Rule::kExact;
  const std::string name = kernel.name;
  const bool looks_up = name == "avx512vbmi" || name == "amx";
  if (looks_up && m <= kMostLookupTokens) return Rule::kLookup;
  return name == "avx512vbmi" ? Rule::kWideLookup : Rule::kInt8;
}

struct Outputs {
  std::vector<double> y;
  bool intact = false;
};

Outputs Run(const BinaryMatMulKernel& kernel, const Case& c, const ReferenceWeight& w,
            const std::vector<float>& x, std::size_t shift, const Executor& executor,
            Checker* check) {
  BinaryMatMulShape shape;
  shape.k = static_cast<int64_t>(c.k);
  shape.n = static_cast<int64_t>(c.n);
  shape.plane_columns = c.plane_columns.data();
  shape.plane_count = c.plane_columns.size();
  shape.hadamard_block = c.hadamard_block;
  BinaryMatMulWeight weight;
  const std::string problem = MakeBinaryMatMulWeight(shape, &weight);
  check->Expect(problem.empty(), "MakeBinaryMatMulWeight", Text(c), ": ", problem);
  const std::vector<uint8_t> codes = PackCodes(w);
  const std::vector<uint16_t> coefficients = PackCoefficients(w);
  check->Expect(codes.size() == weight.panels * weight.panel_code_bytes, "bytes of codes", Text(c));
  check->Expect(coefficients.size() == weight.panels * weight.coefficient_slots * kPanelRows,
                "number of coefficients", Text(c));
  const Unaligned codes_at(codes.data(), codes.size(), shift);
  const Unaligned coefficients_at(coefficients.data(), 2 * coefficients.size(), shift);
  const Unaligned signs_at(w.signs.data(), w.signs.size(), shift);
  const Unaligned order_at(w.order.data(), 2 * w.order.size(), shift);
  weight.codes = codes_at.data();
  weight.coefficients = coefficients_at.data();
  weight.signs = w.signs.empty() ? nullptr : signs_at.data();
  weight.order = w.order.empty() ? nullptr : order_at.data();
  weight.order_has_chunks = c.order == Order::kChunks;

  std::vector<uint16_t> halves;
  for (const float value : x) halves.push_back(ToHalf(value));
  BinaryMatMulArgs args;
  args.weight = &weight;
  args.type = c.float16 ? ElementType::kFloat16 : ElementType::kFloat32;
  args.m = c.m;
  args.x = c.float16 ? static_cast<const void*>(halves.data()) : x.data();
  Guarded y(c.m * c.n * (c.float16 ? 2 : 4));
  args.y = y.data();
  RunBinaryMatMul(kernel, args, executor);

  Outputs outputs;
  outputs.intact = y.IsIntact();
  for (std::size_t i = 0; i < c.m * c.n; ++i) {
    outputs.y.push_back(c.float16 ? HalfValue(static_cast<const uint16_t*>(args.y)[i])
                                  : double{static_cast<const float*>(args.y)[i]});
  }
  return outputs;
}

void CheckRow(Checker* check, const BinaryMatMulKernel& kernel, const Case& c,
              const ReferenceWeight& w, const double* x, std::size_t row,
              const std::vector<double>& y) {
  const ReferenceTransform transform = TransformRow(w, x);
  const Rule rule = RuleOf(kernel, c.m);
  std::vector<Int8Chunk> chunks;
  std::vector<LookupChunk> tables;
  std::vector<WideUnit> units;
  if (rule == Rule::kWideLookup && transform.is_finite) units = MakeWideUnits(w, transform);
  for (std::size_t chunk = 0; chunk < w.padded_k() / 64 && transform.is_finite; ++chunk) {
    if (rule == Rule::kInt8) chunks.push_back(QuantizeChunk(transform, chunk));
    if (rule == Rule::kLookup) tables.push_back(MakeLookupChunk(transform, chunk));
  }
  for (std::size_t i = 0; i < c.n; ++i) {
    const double got = y[row * c.n + i];
    if (!transform.is_finite) {
      check->Expect(std::isnan(got), kernel.name, " NaN row", Text(c), " at (", row, ", ", i,
                    "): got ", got);
    } else if (rule == Rule::kExact) {
      Compare(check, "exact", kernel.name, c, row, i, got, ExactProduct(w, transform, i));
    } else if (rule == Rule::kLookup) {
      const LookupProduct product = ProductByLookup(w, transform, tables, i);
      Compare(check, "lookup", kernel.name, c, row, i, got, product.emulated);
      Compare(check, "lookup against exact", kernel.name, c, row, i, got, product.exact);
    } else if (rule == Rule::kWideLookup) {
      const LookupProduct product = ProductByWideLookup(w, transform, units, i);
      Compare(check, "wide lookup", kernel.name, c, row, i, got, product.emulated);
      Compare(check, "wide lookup against exact", kernel.name, c, row, i, got, product.exact);
    } else {
      const Int8Product product = ProductInInt8(w, transform, chunks, i);
      Compare(check, "int8", kernel.name, c, row, i, got, product.emulated);
      Compare(check, "int8 against exact", kernel.name, c, row, i, got, product.exact);
    }
  }
}

// `checked_rows` of the m rows are compared with the reference.
void RunCase(Checker* check, const Case& c, const Executor& executor, std::size_t checked_rows) {
  std::mt19937_64 random(c.seed);
  const ReferenceWeight w = RandomWeight(c, random);
  const std::vector<float> x = RandomActivations(c, random);
  std::vector<double> exact_x;
  for (const float value : x) {
    exact_x.push_back(c.float16 ? HalfValue(ToHalf(value)) : double{value});
  }
  for (const BinaryMatMulKernel& kernel : TestedKernels()) {
    const Outputs outputs = Run(kernel, c, w, x, c.seed % 4, executor, check);
    check->Expect(outputs.intact, kernel.name, " wrote outside y", Text(c));
    const std::size_t step = std::max<std::size_t>(1, c.m / std::max<std::size_t>(1, checked_rows));
    for (std::size_t row = 0; row < c.m; row += step) {
      CheckRow(check, kernel, c, w, exact_x.data() + row * c.k, row, outputs.y);
    }
  }
}

void AwkwardShapes(Checker* check) {
  uint64_t seed = 1000;
  for (const std::size_t n : {1, 15, 16, 17, 31, 33, 100}) {
    for (const std::size_t k : {1, 63, 64, 65, 192, 256, 300, 704}) {
      for (const std::size_t m : {0, 1, 2, 3, 5, 8, 9, 17}) {
        Case c;
        c.m = m;
        c.n = n;
        c.k = k;
        c.seed = ++seed;
        if (!RunsCase()) continue;
        std::mt19937_64 random(seed);
        c.plane_columns = RandomPlanes(k, random);
        RandomTransform(&c, random);
        RunCase(check, c, Executor(), m);
      }
    }
  }
}

// Every list of planes over 4 chunks, with every transform.
void AllPlanesAndTransforms(Checker* check) {
  const std::vector<std::vector<int64_t>> lists = AllPlaneLists();
  check->Expect(lists.size() == 1 + 4 + 10 + 20, "number of plane lists: ", lists.size());
  uint64_t seed = 5000;
  for (const std::vector<int64_t>& list : lists) {
    for (const int64_t block : {0, 64, 128}) {
      for (const Order order : {Order::kNone, Order::kColumns, Order::kChunks}) {
        for (const bool signs : {false, true}) {
          if (signs && block == 0) continue;
          Case c;
          c.seed = ++seed;
          c.m = 1 + seed % 9;
          c.n = 33;
          c.k = seed % 2 == 0 ? 256 : 250;
          c.plane_columns = list;
          c.hadamard_block = block;
          c.order = order;
          c.signs = signs;
          if (RunsCase()) RunCase(check, c, Executor(), c.m);
        }
      }
    }
  }
}

// The outputs of a token do not depend on the tokens beside it, nor on how the work is divided: all
// rows of a product equal, to the bit, the same rows computed alone. Where a single row has another
// rule, the row is repeated until it has that of the product.
void ExpectRowsAsAlone(Checker* check, const Case& c) {
  std::mt19937_64 random(c.seed);
  const ReferenceWeight w = RandomWeight(c, random);
  const std::vector<float> x = RandomActivations(c, random);
  Case alone = c;
  for (const BinaryMatMulKernel& kernel : TestedKernels()) {
    alone.m = RuleOf(kernel, 1) == RuleOf(kernel, c.m) ? 1 : kMostLookupTokens + 1;
    const std::vector<double> y = Run(kernel, c, w, x, 0, ThreeThreads(), check).y;
    for (std::size_t row = 0; row < c.m; ++row) {
      const auto begin = x.begin() + static_cast<std::ptrdiff_t>(row * c.k);
      std::vector<float> x_row;
      for (std::size_t i = 0; i < alone.m; ++i) {
        x_row.insert(x_row.end(), begin, begin + static_cast<std::ptrdiff_t>(c.k));
      }
      const std::vector<double> want = Run(kernel, alone, w, x_row, 0, Executor(), check).y;
      check->Expect(std::memcmp(want.data(), y.data() + row * c.n, c.n * sizeof(double)) == 0,
                    kernel.name, " row ", row, " differs from the row alone", Text(c));
    }
  }
}

// Numbers of tokens around the tiles and row blocks of the kernels (up to 4 by lookup, tiles of 4
// by wide lookup, up to 8 tokens at a time; from 17 on, tiles of 6 in blocks of 128), with an odd
// number of panels and an n that is no multiple of 16, over streams that end before, at and after a
// block of 512 columns, with 0 to 4 chunks left over by runs of five.
void TilesOfTokens(Checker* check) {
  const std::vector<std::vector<int64_t>> lists = {
      {1216, 1216}, {1216}, {1216, 576, 512, 64}, {1216, 1152, 640}, {1216, 1024, 1024, 1024}};
  uint64_t seed = 8000;
  for (const std::size_t m :
       {2, 3, 4, 7, 16, 17, 18, 19, 23, 24, 25, 36, 64, 127, 128, 129, 150, 257}) {
    for (const std::vector<int64_t>& list : lists) {
      Case c;
      c.m = m;
      c.n = seed % 3 == 0 ? 48 : 37;
      c.k = 1200;
      c.plane_columns = list;
      c.hadamard_block = seed % 2 == 0 ? 64 : 0;
      c.order = static_cast<Order>(seed % 3);
      c.float16 = seed % 4 == 0;
      c.seed = ++seed;
      if (!RunsCase()) continue;
      RunCase(check, c, Executor(), 4);
      if (m >= 16 || m <= kMostLookupTokens) ExpectRowsAsAlone(check, c);
    }
  }
}

// Large enough for several passes, row blocks and tasks on several threads.
void ManyTasks(Checker* check) {
  for (const std::size_t m : {1, 70, 300}) {
    Case c;
    c.m = m;
    c.n = m == 1 ? 9000 : 100;
    c.k = 300;
    c.plane_columns = {320, 256, 64};
    c.hadamard_block = 64;
    c.signs = true;
    c.order = Order::kChunks;
    c.seed = 7000 + m;
    if (!RunsCase()) continue;
    RunCase(check, c, ThreeThreads(), 12);
    ExpectRowsAsAlone(check, c);
  }
}

void ShapeErrors(Checker* check) {
  const auto expect_problem = [check](BinaryMatMulShape shape, std::vector<int64_t> planes,
                                      const char* part) {
    shape.plane_columns = planes.data();
    shape.plane_count = planes.size();
    BinaryMatMulWeight weight;
    const std::string problem = MakeBinaryMatMulWeight(shape, &weight);
    check->Expect(problem.find(part) != std::string::npos, "expected a problem with '", part,
                  "', got '", problem, "'");
  };
  BinaryMatMulShape shape;
  shape.k = 100;
  shape.n = 5;
  expect_problem(shape, {}, "plane_columns has 0 numbers");
  expect_problem(shape, {128, 128, 128, 128, 64}, "plane_columns has 5 numbers");
  expect_problem(shape, {64}, "plane_columns is (64)");
  expect_problem(shape, {192}, "plane_columns is (192)");
  expect_problem(shape, {128, 64, 128}, "plane_columns is (128, 64, 128)");
  expect_problem(shape, {128, 0}, "plane_columns is (128, 0)");
  expect_problem(shape, {128, 65}, "plane_columns is (128, 65)");
  shape.hadamard_block = 32;
  expect_problem(shape, {128}, "hadamard_block is 32");
  shape.k = 64;
  shape.hadamard_block = 128;
  expect_problem(shape, {64}, "hadamard_block is 128");
  shape.hadamard_block = 0;
  shape.format = 2;
  expect_problem(shape, {64}, "format is 2");
  shape.format = 1;
  shape.n = 0;
  expect_problem(shape, {64}, "N is 0");
  shape.n = 5;
  shape.k = -1;
  expect_problem(shape, {64}, "K is -1");
}

// The worked examples of FORMAT.md.
void WorkedExamples(Checker* check) {
  ReferenceWeight w;
  w.n = 1;
  w.k = 64;
  w.plane_columns = {64};
  w.bits = {std::vector<uint8_t>(16 * 64)};
  w.bits[0][5] = 1;
  std::vector<uint8_t> codes = PackCodes(w);
  check->Expect(codes.size() == 128 && codes[1] == 2, "single block of FORMAT.md: byte 1 is ",
                int{codes[1]});
  w.plane_columns = {64, 64};
  w.bits = {std::vector<uint8_t>(16 * 64), std::vector<uint8_t>(16 * 64)};
  w.bits[1][21] = 1;
  codes = PackCodes(w);
  check->Expect(codes.size() == 256 && codes[65] == 8, "pair block of FORMAT.md: byte 65 is ",
                int{codes[65]});
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  const std::vector<bivlm::BinaryMatMulKernel> kernels = bivlm::testing::TestedKernels();
  if (kernels.empty()) {
    std::printf(
        "skipped: this CPU lacks AVX-512 VNNI, VBMI or GFNI, which the emulated kernel needs "
        "beside AMX\n");
    return bivlm::testing::kSkipped;
  }
  bivlm::testing::Checker check;
  bivlm::testing::WorkedExamples(&check);
  bivlm::testing::ShapeErrors(&check);
  bivlm::testing::AwkwardShapes(&check);
  bivlm::testing::AllPlanesAndTransforms(&check);
  bivlm::testing::TilesOfTokens(&check);
  bivlm::testing::ManyTasks(&check);
  for (const bivlm::BinaryMatMulKernel& kernel : kernels) {
    std::printf("kernel tested: %s\n", kernel.name);
  }
  return check.Finish("binary_matmul_test");
}
