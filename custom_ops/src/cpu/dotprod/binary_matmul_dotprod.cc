// BinaryMatMul with the dot products of ARMv8.2: int8 levels times int8 activations.
#if !defined(__ARM_FEATURE_DOTPROD)
#error "compile this file with the flags that CMakeLists.txt gives to the dotprod kernels"
#endif

#include "neon/levels_neon.h"

namespace bivlm {
namespace {

// Adds the products of four steps with 16 channels to `sums`.
int32x4_t AddFour(int32x4_t sums, const int8x16_t* levels, int8x16_t x) {
  sums = vdotq_laneq_s32(sums, levels[0], x, 0);
  sums = vdotq_laneq_s32(sums, levels[1], x, 1);
  sums = vdotq_laneq_s32(sums, levels[2], x, 2);
  return vdotq_laneq_s32(sums, levels[3], x, 3);
}

struct DotProd : LevelsNeon {
  static constexpr std::size_t kDecodeTokens = 2;  // more take fewer instructions unpacked
  static constexpr std::size_t kTileTokens = 8;    // 16 accumulators

  template <bool is_pair, std::size_t tokens>
  static void Dot(const uint8_t* codes, const Codebook& codebook, const int8_t* const (&q)[tokens],
                  const int32_t (&q_sums)[tokens], Ints (&dots)[tokens]) {
    constexpr std::size_t kColumns = 4 * kSteps<is_pair>;  // of a byte of codes
    Begin(codes);
    Ints sums[tokens];
#pragma GCC unroll 4
    for (Ints& sum : sums) sum = Ints{};
#pragma GCC unroll 4
    for (std::size_t vector = 0; vector < kChunkColumns / kColumns; ++vector) {
      int8x16_t levels[kSteps<is_pair>];
      Levels<is_pair>(codebook, vld1q_u8(codes + 64 * vector), AllRows(), levels);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
        for (std::size_t i = 0; i < kSteps<is_pair>; i += 4) {
          sums[t] = AddFour(sums[t], levels + i, vld1q_s8(q[t] + kColumns * vector + 4 * i));
        }
      }
    }
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      dots[t] = is_pair ? sums[t] : Signed(sums[t], q_sums[t]);
      End(dots[t]);
    }
  }

  template <bool is_pair, std::size_t tokens>
  static void DotUnpacked(const uint8_t* unpacked, const Codebook (&)[4], const Tile<tokens>& tile,
                          std::size_t chunk) {
    const int8_t* levels = reinterpret_cast<const int8_t*>(unpacked);
    for (std::size_t part = 0; part < 4; part += 2) {
      int32x4_t sums[tokens][2];
#pragma GCC unroll 8
      for (auto& of_token : sums) of_token[0] = of_token[1] = vdupq_n_s32(0);
#pragma GCC unroll 1  // unrolled, g++ 12 spills
      for (std::size_t column = 0; column < kChunkColumns; column += 16) {
        const int8_t* row = levels + 16 * column + 16 * part;
        int8x16_t x[tokens];
#pragma GCC unroll 8
        for (std::size_t t = 0; t < tokens; ++t) {
          x[t] = vld1q_s8(tile.rows[t].q + chunk * kChunkColumns + column);
        }
        AddStep<0>(row, x, sums);
        AddStep<1>(row + 64, x, sums);
        AddStep<2>(row + 128, x, sums);
        AddStep<3>(row + 192, x, sums);
      }
#pragma GCC unroll 8
      for (std::size_t t = 0; t < tokens; ++t) {
        const float scale = tile.rows[t].scale[chunk];
        float* partial = tile.partial + t * kPanelRows + part * kLanes;
        AddDots<Vectors>(sums[t][0], scale, partial);
        AddDots<Vectors>(sums[t][1], scale, partial + kLanes);
      }
    }
  }

  // Adds the products of a step of two parts with the channels 4 i to 4 i + 3 of each x.
  template <int i, std::size_t tokens>
  static void AddStep(const int8_t* levels, const int8x16_t (&x)[tokens],
                      int32x4_t (&sums)[tokens][2]) {
    const int8x16_t first = vld1q_s8(levels);
    const int8x16_t second = vld1q_s8(levels + 16);
#pragma GCC unroll 8
    for (std::size_t t = 0; t < tokens; ++t) {
      sums[t][0] = vdotq_laneq_s32(sums[t][0], first, x[t], i);
      sums[t][1] = vdotq_laneq_s32(sums[t][1], second, x[t], i);
    }
  }
};

}  // namespace

const BinaryMatMulFunctions BinaryMatMulDotProd = {1U << 17, Int8RowBytes, PrepareInt8Neon,
                                                   MultiplyInt8<DotProd>};

}  // namespace bivlm
