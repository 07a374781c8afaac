// BinaryMatMul of the CUDA library, run by the shim on the CPU or, as cuda_binary_matmul_gpu_test,
// on a GPU: both paths against the int8 rule and the exact product, on awkward shapes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "binary_matmul_cases.h"
#include "bivlm/cuda/binary_matmul.h"
#include "check.h"
#include "cuda/binary_matmul_kernels.h"
#include "cuda_device.h"
#include "cuda_memory.h"
#include "reference.h"

namespace bivlm::testing {
namespace {

using cuda::Path;

const char* Name(Path path) { return path == Path::kDecode ? "decode" : "prefill"; }

std::vector<uint16_t> ToHalves(const std::vector<float>& values) {
  std::vector<uint16_t> halves;
  for (const float value : values) halves.push_back(ToHalf(value));
  return halves;
}

// A case with its tensors on the device.
struct Product {
  Case c;
  std::mt19937_64 random;
  ReferenceWeight w;
  std::vector<float> x;
  std::vector<uint16_t> x_halves;
  DeviceBytes codes;
  DeviceBytes coefficients;
  DeviceBytes signs;
  DeviceBytes order;
  DeviceBytes x_device;
  BinaryMatMulWeight weight;
  BinaryMatMulArgs args;

  explicit Product(const Case& of, Checker* check)
      : c(of),
        random(c.seed),
        w(RandomWeight(c, random)),
        x(RandomActivations(c, random)),
        x_halves(ToHalves(x)),
        codes(ToDevice(PackCodes(w))),
        coefficients(ToDevice(PackCoefficients(w))),
        signs(ToDevice(w.signs)),
        order(ToDevice(w.order)),
        x_device(c.float16 ? ToDevice(x_halves) : ToDevice(x)) {
    BinaryMatMulShape shape;
    shape.k = static_cast<int64_t>(c.k);
    shape.n = static_cast<int64_t>(c.n);
    shape.plane_columns = c.plane_columns.data();
    shape.plane_count = c.plane_columns.size();
    shape.hadamard_block = c.hadamard_block;
    const std::string problem = MakeBinaryMatMulWeight(shape, &weight);
    check->Expect(problem.empty(), "MakeBinaryMatMulWeight", Text(c), ": ", problem);
    weight.codes = codes.data();
    weight.coefficients = coefficients.data();
    weight.signs = w.signs.empty() ? nullptr : signs.data();
    weight.order = w.order.empty() ? nullptr : order.data();
    weight.order_has_chunks = c.order == Order::kChunks;
    args.weight = &weight;
    args.type = c.float16 ? ElementType::kFloat16 : ElementType::kFloat32;
    args.m = c.m;
    args.x = x_device.data();
  }
  Product(const Product&) = delete;

  double X(std::size_t at) const { return c.float16 ? HalfValue(x_halves[at]) : double{x[at]}; }

  std::vector<double> Run(Path path, Checker* check, const Enqueuer& how = OnDefaultStream()) {
    const std::size_t scratch_bytes = cuda::BinaryMatMulScratchBytes(weight, c.m);
    const GuardedDeviceBytes y(c.m * c.n * ElementBytes(args.type));
    const GuardedDeviceBytes scratch(scratch_bytes);
    args.y = y.data();
    how.run([&](cudaStream_t stream) {
      const std::string problem = cuda::LaunchBy(path, args, scratch.data(), scratch_bytes, stream);
      check->Expect(problem.empty(), Name(path), how.name, Text(c), ": ", problem);
    });
    bool intact = false;
    const std::vector<uint8_t> bytes = y.Read(&intact);
    check->Expect(intact, Name(path), " wrote outside y", Text(c));
    scratch.Read(&intact);
    check->Expect(intact, Name(path), " wrote outside the scratch memory", Text(c));
    std::vector<double> result;
    for (std::size_t i = 0; i < c.m * c.n; ++i) {
      if (c.float16) {
        uint16_t half;
        std::memcpy(&half, bytes.data() + 2 * i, sizeof(half));
        result.push_back(HalfValue(half));
      } else {
        float value;
        std::memcpy(&value, bytes.data() + 4 * i, sizeof(value));
        result.push_back(value);
      }
    }
    return result;
  }
};

void CheckRow(Checker* check, const char* path, const Product& product, std::size_t row,
              const std::vector<double>& y) {
  const Case& c = product.c;
  std::vector<double> x;
  for (std::size_t j = 0; j < c.k; ++j) x.push_back(product.X(row * c.k + j));
  const ReferenceTransform transform = TransformRow(product.w, x.data());
  std::vector<Int8Chunk> chunks;
  for (std::size_t chunk = 0; chunk < product.weight.chunks() && transform.is_finite; ++chunk) {
    chunks.push_back(QuantizeChunk(transform, chunk));
  }
  for (std::size_t i = 0; i < c.n; ++i) {
    const double got = y[row * c.n + i];
    if (!transform.is_finite) {
      check->Expect(std::isnan(got), path, " NaN row", Text(c), " at (", row, ", ", i, "): got ",
                    got);
      continue;
    }
    const Int8Product want = ProductInInt8(product.w, transform, chunks, i);
    Compare(check, "int8", path, c, row, i, got, want.emulated);
    Compare(check, "int8 against exact", path, c, row, i, got, want.exact);
  }
}

// `checked_rows` of the m rows are compared with the reference.
void RunCase(Checker* check, const Case& c, Path path, std::size_t checked_rows) {
  Product product(c, check);
  SetReverse(c.seed % 2 != 0);
  const std::vector<double> y = product.Run(path, check);
  const std::size_t step = std::max<std::size_t>(1, c.m / std::max<std::size_t>(1, checked_rows));
  for (std::size_t row = 0; row < c.m; row += step) CheckRow(check, Name(path), product, row, y);
}

// Every number of tokens up to 9, and 17, with every n and every k; not every combination of all
// three, since fibres are slow.
void AwkwardShapes(Checker* check) {
  constexpr std::size_t kTokens[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17};
  uint64_t seed = 1000;
  for (const std::size_t n : {1, 15, 16, 17, 33, 100}) {
    for (const std::size_t k : {1, 63, 64, 65, 192, 300}) {
      for (std::size_t i = 0; i < 3; ++i) {
        Case c;
        c.m = kTokens[seed * 4 % std::size(kTokens)];
        c.n = n;
        c.k = k;
        c.seed = ++seed;
        std::mt19937_64 random(seed);
        c.plane_columns = RandomPlanes(k, random);
        RandomTransform(&c, random);
        if (RunsCase()) RunCase(check, c, seed % 7 == 0 ? Path::kPrefill : Path::kDecode, 4);
      }
    }
  }
}

// Every list of planes over 4 chunks, every block with every order.
void AllPlanesAndTransforms(Checker* check) {
  constexpr int64_t kBlocks[] = {0, 64, 128};
  constexpr Order kOrders[] = {Order::kNone, Order::kColumns, Order::kChunks};
  uint64_t seed = 5000;
  for (const std::vector<int64_t>& list : AllPlaneLists()) {
    for (std::size_t i = 0; i < 3; ++i) {
      Case c;
      c.seed = ++seed;
      c.m = 1 + seed % 9;
      c.n = 33;
      c.k = seed % 2 == 0 ? 256 : 250;
      c.plane_columns = list;
      c.hadamard_block = kBlocks[i];
      c.order = kOrders[(i + list.size() + seed / 3) % 3];
      c.signs = c.hadamard_block > 0 && seed % 4 != 0;
      c.float16 = seed % 5 == 0;
      if (RunsCase()) RunCase(check, c, i == 0 ? Path::kPrefill : Path::kDecode, 3);
    }
  }
}

// Several tiles of rows and tokens, tiles with few tokens, several streams, more chunks than
// stages, and than warps of a block times their batch.
void ManyTokens(Checker* check) {
  const std::vector<std::vector<int64_t>> lists = {
      {1216, 1216}, {1216}, {1216, 576, 512, 64}, {1216, 1152, 640}};
  constexpr std::size_t kTokens[] = {16, 24, 32, 33, 64, 65, 72, 135};
  uint64_t seed = 8000;
  for (std::size_t i = 0; i < 2 * std::size(kTokens); ++i) {
    Case c;
    c.m = kTokens[i / 2];
    c.n = 130 + seed % 31;
    c.k = 1200;
    c.plane_columns = lists[(i / 2 + i) % lists.size()];
    c.hadamard_block = i % 4 < 2 ? 64 : 0;
    c.order = static_cast<Order>(seed % 3);
    c.float16 = seed % 4 == 0;
    c.seed = ++seed;
    if (RunsCase()) RunCase(check, c, i % 2 == 0 ? Path::kPrefill : Path::kDecode, 2);
  }
  for (const std::size_t k : {4096, 8200}) {
    Case c;
    c.m = 1;
    c.n = 16;
    c.k = k;
    c.plane_columns = {static_cast<int64_t>((k + 63) / 64 * 64), 2048};
    c.seed = k;
    if (RunsCase()) RunCase(check, c, Path::kDecode, 1);
  }
}

// The same tokens give the same bits, whatever ran before, in whatever order blocks run, on every
// stream and out of a graph.
void Repeats(Checker* check) {
  Case c;
  c.m = 5;
  c.n = 70;
  c.k = 500;
  c.plane_columns = {512, 256};
  c.hadamard_block = 128;
  c.seed = 9;
  Product product(c, check);
  for (const Path path : {Path::kDecode, Path::kPrefill}) {
    SetReverse(false);
    const std::vector<double> first = product.Run(path, check);
    SetReverse(true);
    for (const Enqueuer& how : {OnDefaultStream(), OnOwnStream(), AsGraph()}) {
      const std::vector<double> again = product.Run(path, check, how);
      check->Expect(std::memcmp(first.data(), again.data(), first.size() * sizeof(double)) == 0,
                    Name(path), how.name, " gives other bits the second time");
    }
  }
}

void Errors(Checker* check) {
  Case c;
  c.m = 2;
  c.n = 20;
  c.k = 100;
  c.plane_columns = {128, 64};
  c.order = Order::kColumns;
  Product product(c, check);
  const std::size_t bytes = cuda::BinaryMatMulScratchBytes(product.weight, c.m);
  const GuardedDeviceBytes scratch(bytes);
  const GuardedDeviceBytes y(c.m * c.n * sizeof(float));
  bool intact = false;
  const std::vector<uint8_t> before = y.Read(&intact);
  const auto expect = [&](const char* part, const BinaryMatMulArgs& args, std::size_t scratch_bytes,
                          std::size_t shift) {
    const std::string problem =
        cuda::LaunchBinaryMatMul(args, scratch.data() + shift, scratch_bytes, nullptr);
    check->Expect(problem.find(part) != std::string::npos, "expected '", part, "', got '", problem,
                  "'");
    check->Expect(y.Read(&intact) == before, "y is written despite '", part, "'");
  };
  product.args.y = y.data();
  expect("scratch memory has 15 bytes, ", product.args, 15, 0);
  expect("scratch memory does not start at a multiple of 16", product.args, bytes, 4);
  BinaryMatMulArgs args = product.args;
  args.x = nullptr;
  expect("X is null", args, bytes, 0);
  args = product.args;
  args.y = y.data() + 2;
  expect("Y does not start at a multiple of 4", args, bytes, 0);
  BinaryMatMulWeight weight = product.weight;
  args = product.args;
  args.weight = &weight;
  weight.codes += 8;
  expect("codes does not start at a multiple of 16", args, bytes, 0);
  weight = product.weight;
  weight.coefficients = nullptr;
  expect("coefficients is null", args, bytes, 0);
  weight = product.weight;
  ++weight.order;
  expect("order does not start at a multiple of 2", args, bytes, 0);
  args = product.args;
  args.m = std::size_t{1} << 33;
  expect("X has 8589934592 tokens, at most", args, ~std::size_t{0}, 0);
  args.m = 0;
  args.x = nullptr;
  check->Expect(cuda::LaunchBinaryMatMul(args, nullptr, 0, nullptr).empty(), "no tokens");
  check->Expect(cuda::BinaryMatMulScratchBytes(product.weight, 0) == 0, "scratch for no tokens");
}

void Paths(Checker* check) {
  BinaryMatMulWeight weight;
  weight.n = 4096;
  check->Expect(cuda::ChoosePath(weight, 1) == Path::kDecode &&
                    cuda::ChoosePath(weight, 32) == Path::kDecode &&
                    cuda::ChoosePath(weight, 256) == Path::kPrefill,
                "paths of N = 4096");
  weight.n = 576;
  check->Expect(cuda::ChoosePath(weight, 114) == Path::kDecode &&
                    cuda::ChoosePath(weight, 1024) == Path::kPrefill,
                "paths of N = 576");
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  if (const int code = FindGpu(); code != 0) return code;
  Checker check;
  Errors(&check);
  Paths(&check);
  Repeats(&check);
  AwkwardShapes(&check);
  AllPlanesAndTransforms(&check);
  ManyTokens(&check);
  return check.Finish("cuda_binary_matmul_test");
}
