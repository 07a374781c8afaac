// Products to test BinaryMatMul with: sizes, random weights and awkward activations.
#ifndef BIVLM_TESTS_BINARY_MATMUL_CASES_H_
#define BIVLM_TESTS_BINARY_MATMUL_CASES_H_

#include <cmath>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "bivlm/binary_matmul.h"
#include "check.h"
#include "reference.h"

namespace bivlm::testing {

enum class Order { kNone, kColumns, kChunks };

struct Case {
  std::size_t m = 1;
  std::size_t n = 1;
  std::size_t k = 1;
  std::vector<int64_t> plane_columns;
  int64_t hadamard_block = 0;
  bool signs = false;
  Order order = Order::kNone;
  bool float16 = false;
  uint64_t seed = 0;
};

inline std::string Text(const Case& c) {
  std::ostringstream text;
  text << " m=" << c.m << " n=" << c.n << " k=" << c.k << " plane_columns=(";
  for (const int64_t columns : c.plane_columns) text << columns << ",";
  text << ") hadamard=" << c.hadamard_block << " signs=" << c.signs
       << " order=" << static_cast<int>(c.order) << " float16=" << c.float16 << " seed=" << c.seed;
  return text.str();
}

inline ReferenceWeight RandomWeight(const Case& c, std::mt19937_64& random) {
  ReferenceWeight w;
  w.n = c.n;
  w.k = c.k;
  w.plane_columns = c.plane_columns;
  w.hadamard_block = c.hadamard_block;
  for (const int64_t columns : c.plane_columns) {
    std::vector<uint8_t> bits(w.padded_n() * static_cast<std::size_t>(columns));
    for (uint8_t& bit : bits) bit = static_cast<uint8_t>(random() & 1);
    std::fill(bits.begin() + static_cast<std::ptrdiff_t>(c.n) * columns, bits.end(), uint8_t{0});
    w.bits.push_back(bits);
  }
  std::normal_distribution<double> normal(0.0, 0.05);
  w.alpha.assign(w.padded_n() * w.slots(), 0);
  for (std::size_t row = 0; row < c.n; ++row) {
    double previous = 0.0;
    for (std::size_t slot = 0; slot < w.slots(); ++slot) {
      double value = normal(random);
      switch (random() % 8) {
        case 0:
          value = previous;  // levels that cancel
          break;
        case 1:
          value = previous * 0.001;
          break;
        case 2:
          value = random() % 4 == 0 ? 0.0 : value;
          break;
        default:
          break;
      }
      w.alpha[row * w.slots() + slot] = NearestHalf(value);
      previous = value;
    }
  }
  if (c.signs) {
    for (std::size_t i = 0; i < w.padded_k() / 8; ++i) {
      w.signs.push_back(static_cast<uint8_t>(random()));
    }
  }
  if (c.order != Order::kNone) {
    w.order.resize(c.order == Order::kColumns ? w.padded_k() : w.padded_k() / 64);
    for (std::size_t i = 0; i < w.order.size(); ++i) w.order[i] = static_cast<uint16_t>(i);
    std::shuffle(w.order.begin(), w.order.end(), random);
  }
  return w;
}

// Rows of activations: some Gaussian, some with outliers, zeros, tiny values, NaN or an infinity.
inline std::vector<float> RandomActivations(const Case& c, std::mt19937_64& random) {
  std::normal_distribution<float> normal(0.0F, 1.0F);
  std::vector<float> x;
  for (std::size_t row = 0; row < c.m; ++row) {
    const uint64_t kind = random() % 12;
    for (std::size_t j = 0; j < c.k; ++j) {
      float value = normal(random);
      if (kind == 0) value = 0.0F;
      if (kind == 1 && random() % 50 == 0) value *= 100.0F;  // outliers
      if (kind == 2) value *= c.float16 ? 1e-7F : 1e-38F;    // subnormal scales
      if (kind == 3 && j / 64 % 2 == 0) value = 0.0F;        // whole chunks of zeros
      if (kind == 4 && j == c.k / 2) value = std::numeric_limits<float>::quiet_NaN();
      if (kind == 5 && j == c.k - 1) value = -std::numeric_limits<float>::infinity();
      if (kind == 6) value = std::nearbyint(value * 2.0F) * 0.5F;  // exact ties when rounding
      x.push_back(value);
    }
  }
  return x;
}

inline uint16_t ToHalf(float value) {
  if (std::isnan(value)) return 0x7e00;
  if (std::isinf(value)) return value > 0 ? 0x7c00 : 0xfc00;
  return NearestHalf(value);
}

// |got - want| <= bound, with the rounding of a float16 output; NaN fails.
inline void Compare(Checker* check, const char* what, const char* kernel, const Case& c,
                    std::size_t row, std::size_t column, double got, ReferenceValue want) {
  double bound = want.bound;
  if (c.float16) bound += std::fabs(want.value) * 0x1p-11 + want.bound * 0x1p-11 + 0x1p-25;
  check->Expect(std::fabs(got - want.value) <= bound, kernel, " ", what, Text(c), " at (", row,
                ", ", column, "): got ", got, " want ", want.value, " bound ", bound);
}

// A random list of planes for k columns.
inline std::vector<int64_t> RandomPlanes(std::size_t k, std::mt19937_64& random) {
  const std::size_t chunks = (k + 63) / 64;
  std::vector<int64_t> planes = {static_cast<int64_t>(chunks * 64)};
  for (std::size_t more = random() % 4; more > 0; --more) {
    const uint64_t most = static_cast<uint64_t>(planes.back()) / 64;
    planes.push_back(static_cast<int64_t>((1 + random() % most) * 64));
  }
  return planes;
}

inline void RandomTransform(Case* c, std::mt19937_64& random) {
  const std::size_t k_padded = (c->k + 63) / 64 * 64;
  const int64_t blocks[] = {0, 64, 128};
  c->hadamard_block = blocks[random() % (k_padded % 128 == 0 ? 3 : 2)];
  c->signs = c->hadamard_block > 0 && random() % 2 == 0;
  c->order = static_cast<Order>(random() % (k_padded > 64 ? 3 : 2));
  c->float16 = random() % 3 == 0;
}

// Every list of planes over 4 chunks.
inline std::vector<std::vector<int64_t>> AllPlaneLists() {
  std::vector<std::vector<int64_t>> lists = {{256}};
  for (std::size_t i = 0; i < lists.size(); ++i) {
    if (lists[i].size() == kMaxPlanes) continue;
    for (int64_t columns = 64; columns <= lists[i].back(); columns += 64) {
      std::vector<int64_t> longer = lists[i];
      longer.push_back(columns);
      lists.push_back(longer);
    }
  }
  return lists;
}

}  // namespace bivlm::testing

#endif  // BIVLM_TESTS_BINARY_MATMUL_CASES_H_
