// The order of rounded activations, and the division of GroupMatMul into tasks.
#include "bivlm/group_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "group_tokens.h"
#include "int8_rows.h"
#include "scratch.h"

namespace bivlm {
namespace {

// Tokens that are prepared together.
constexpr std::size_t kPassTokens = 256;

// Rows of the weight whose number in a task is a multiple of this.
constexpr std::size_t kUnitRows = 64;

// A product of fewer tasks stays on one thread, as in BinaryMatMul.
constexpr std::size_t kSerialTasks = 4;

// What BinaryMatMul's rounding is given: k, and neither transform nor order.
BinaryMatMulWeight Untransformed(const GroupMatMulWeight& weight) {
  BinaryMatMulWeight plain;
  plain.k = weight.k;
  plain.k_padded = CeilDivide(weight.k, kChunkColumns) * kChunkColumns;
  return plain;
}

// Brings a rounded row into the order of the codes.
void Arrange(const GroupMatMulWeight& weight, const Int8Row& row, const GroupToken& token) {
  const std::size_t codes = GroupTokenCodes(weight);
  const std::size_t planes = weight.bits == 8 ? 1 : 2;
  const int zero = 1 << (weight.bits - 1);
  std::fill_n(token.q[0], planes * codes, int8_t{0});
  for (std::size_t i = 0; i < weight.row_bytes(); ++i) {
    token.q[0][i] = row.q[planes * i];
    if (planes == 2) token.q[1][i] = row.q[2 * i + 1];
  }
  for (std::size_t lane = 0; lane < codes / 4; ++lane) {
    int sum = 0;
    for (std::size_t plane = 0; plane < planes; ++plane) {
      for (std::size_t i = 4 * lane; i < 4 * lane + 4; ++i) sum += token.q[plane][i];
    }
    token.start[lane] = -zero * sum;
  }
  for (std::size_t block = 0; block < weight.blocks(); ++block) {
    token.scale[block] = row.scale[block * weight.block / kChunkColumns];
  }
  std::fill_n(token.scale + weight.blocks(), kPaddingBlocks, 0.0F);
}

void PrepareFloats(const GroupMatMulArgs& args, std::size_t index, float* v) {
  const std::size_t k = args.weight->k;
  if (args.type == ElementType::kFloat32) {
    std::memcpy(v, static_cast<const float*>(args.x) + index * k, k * sizeof(float));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + index * k;
    for (std::size_t j = 0; j < k; ++j) v[j] = FloatFromHalf(x[j]);
  }
  if (std::all_of(v, v + k, [](float value) { return std::isfinite(value); })) return;
  std::fill(v, v + k, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace

std::string MakeGroupMatMulWeight(int64_t k, int64_t n, int64_t bits, int64_t block,
                                  GroupMatMulWeight* weight) {
  // Larger sizes would overflow the byte counts, long before any memory could hold such a weight.
  constexpr int64_t kMaxFeatures = int64_t{1} << 31;
  if (k < 1 || n < 1 || k > kMaxFeatures || n > kMaxFeatures) {
    return "K is " + std::to_string(k) + " and N is " + std::to_string(n) +
           ", both must be 1 to 2^31";
  }
  if (bits != 4 && bits != 8) return "bits is " + std::to_string(bits) + ", expected 4 or 8";
  if ((block != 16 && block != 32 && block != 64) || k % block != 0) {
    return "block_size is " + std::to_string(block) +
           ", expected 16, 32 or 64, and a divisor of K = " + std::to_string(k);
  }
  *weight = GroupMatMulWeight();
  weight->k = static_cast<std::size_t>(k);
  weight->n = static_cast<std::size_t>(n);
  weight->bits = static_cast<std::size_t>(bits);
  weight->block = static_cast<std::size_t>(block);
  return "";
}

void RunGroupMatMul(const GroupMatMulKernel& kernel, const GroupMatMulArgs& args,
                    const Executor& executor) {
  if (args.m == 0) return;
  const GroupMatMulWeight& weight = *args.weight;
  const GroupMatMulFunctions& functions = *kernel.functions;
  const BinaryMatMulWeight plain = Untransformed(weight);
  BinaryMatMulArgs rounded;
  rounded.weight = &plain;
  rounded.type = args.type;
  rounded.m = args.m;
  rounded.x = args.x;

  const std::size_t token_bytes =
      functions.round == nullptr ? weight.k * sizeof(float) : GroupTokenBytes(weight);
  const std::size_t pass_tokens = std::min(args.m, kPassTokens);
  const std::size_t row_bytes = Int8RowBytes(plain);
  const Scratch scratch(row_bytes + plain.k_padded * sizeof(float) + pass_tokens * token_bytes);
  std::byte* row = scratch.data();
  float* work = reinterpret_cast<float*>(row + row_bytes);
  std::byte* prepared = row + row_bytes + plain.k_padded * sizeof(float);

  for (std::size_t pass = 0; pass < args.m; pass += pass_tokens) {
    const std::size_t tokens = std::min(pass_tokens, args.m - pass);
    for (std::size_t t = 0; t < tokens; ++t) {
      std::byte* token = prepared + t * token_bytes;
      if (functions.round == nullptr) {
        PrepareFloats(args, pass + t, reinterpret_cast<float*>(token));
        continue;
      }
      functions.round(rounded, pass + t, pass + t + 1, row, work);
      Arrange(weight, Int8RowAt(plain, row), GroupTokenAt(weight, token));
    }

    const std::size_t products = tokens * weight.n * weight.k;
    const std::size_t units = CeilDivide(weight.n, kUnitRows);
    const std::size_t tasks =
        products < kSerialTasks * functions.task_products
            ? 1
            : std::clamp<std::size_t>(products / functions.task_products, 1, units);
    executor.For(tasks, [&](std::size_t task) {
      functions.multiply(args, pass, pass + tokens, units * task / tasks * kUnitRows,
                         std::min(units * (task + 1) / tasks * kUnitRows, weight.n), prepared);
    });
  }
}

}  // namespace bivlm
