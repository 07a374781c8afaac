// GroupMatMul in float32 on any CPU: the exact form that OPS.md defines.
#include <algorithm>

#include "bivlm/group_matmul.h"

namespace bivlm {
namespace {

constexpr std::size_t kTileTokens = 16;
constexpr std::size_t kMaxBlock = 64;

// Sums of every fourth product: the vectors that every CPU with vectors has.
using Vector = float __attribute__((vector_size(16)));
constexpr std::size_t kLanes = 4;

// w (block) = the weights of one block; each is exact.
void Dequantize(const GroupMatMulWeight& weight, std::size_t row, std::size_t block, float* w) {
  const float scale = LoadHalf(weight.scales + 2 * (row * weight.blocks() + block));
  const uint8_t* codes =
      weight.codes + row * weight.row_bytes() + block * weight.block * weight.bits / 8;
  for (std::size_t j = 0; j < weight.block; ++j) {
    const int code = weight.bits == 8 ? codes[j] : codes[j / 2] >> 4 * (j % 2) & 15;
    w[j] = static_cast<float>(code - (1 << (weight.bits - 1))) * scale;
  }
}

void Multiply(const GroupMatMulArgs& args, std::size_t token_begin, std::size_t token_end,
              std::size_t row_begin, std::size_t row_end, const std::byte* prepared) {
  const GroupMatMulWeight& weight = *args.weight;
  for (std::size_t first = token_begin; first < token_end; first += kTileTokens) {
    const std::size_t tokens = std::min(kTileTokens, token_end - first);
    const float* x = reinterpret_cast<const float*>(prepared) + (first - token_begin) * weight.k;
    for (std::size_t row = row_begin; row < row_end; ++row) {
      Vector sums[kTileTokens] = {};
      for (std::size_t block = 0; block < weight.blocks(); ++block) {
        float w[kMaxBlock];
        Dequantize(weight, row, block, w);
        for (std::size_t t = 0; t < tokens; ++t) {
          const float* v = x + t * weight.k + block * weight.block;
          for (std::size_t j = 0; j < weight.block; j += kLanes) {
            sums[t] += Vector{w[j], w[j + 1], w[j + 2], w[j + 3]} *
                       Vector{v[j], v[j + 1], v[j + 2], v[j + 3]};
          }
        }
      }
      for (std::size_t t = 0; t < tokens; ++t) {
        const float sum = (sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]);
        const std::size_t at = (first + t) * weight.n + row;
        if (args.type == ElementType::kFloat32) {
          static_cast<float*>(args.y)[at] = sum;
        } else {
          static_cast<uint16_t*>(args.y)[at] = HalfFromFloat(sum);
        }
      }
    }
  }
}

}  // namespace

const GroupMatMulFunctions GroupMatMulGeneric = {8000, nullptr, Multiply};

}  // namespace bivlm
