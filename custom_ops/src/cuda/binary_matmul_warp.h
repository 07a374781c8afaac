// A warp's part of the product: one chunk of two panels (32 rows) times groups of 8 tokens.
//
// Lane 4 g + q reads 16 neighbouring bytes of codes: rows 4 g .. 4 g + 3 of the two panels and the
// 16 columns of unit q. Two tensor-core products per 32 columns, `tile` 0 with the first two rows
// of every lane and `tile` 1 with the others, then take its bytes where it has them: rows and
// columns of a product may come in any order, if both operands agree. Register r of tile t of the
// result is row 4 g + 2 t + r / 2, token 2 q + r % 2.
#ifndef BIVLM_CUDA_BINARY_MATMUL_WARP_H_
#define BIVLM_CUDA_BINARY_MATMUL_WARP_H_

#include <cuda_fp16.h>

#include "cuda/activation.h"
#include "cuda/binary_matmul_kernels.h"
#include "cuda/primitives.h"
#include "cuda/tensor_core.h"

namespace bivlm::cuda {

inline constexpr unsigned kWarpRows = 2 * kPanelRows;

// kPairBehind: a single block in chunks whose columns have the order of pair blocks.
enum class Block { kPair, kSingle, kSingleBehindPair };

struct Lane {
  unsigned g;
  unsigned q;
  unsigned panel;  // the last one where the warp's second panel does not exist
  unsigned quad;   // of rows, in the panel

  __device__ Lane(const DeviceWeight& weight, unsigned first_panel) {
    const unsigned lane = threadIdx.x % kWarp;
    g = lane / 4;
    q = lane % 4;
    panel = first_panel + g / 4;
    if (panel >= weight.panels) panel = weight.panels - 1;
    quad = g % 4;
  }

  // The 16 bytes of the stream's first chunk. Two lanes share those of a single block.
  __device__ const uint8_t* Codes(const DeviceWeight& weight, const DeviceStream& stream) const {
    const unsigned unit = stream.is_pair ? q : q / 2;
    return weight.codes + panel * weight.panel_code_bytes + stream.code_offset + 64 * unit +
           16 * quad;
  }
};

__device__ __forceinline__ uint4 LoadCodes(const uint8_t* codes) {
  return __ldg(reinterpret_cast<const uint4*>(codes));
}

// What a stream's coefficients are for the four rows of a lane.
struct LaneCoefficients {
  uint32_t levels[4];  // of a pair block: int8 for codes 0 .. 3
  float factor[4];     // a step, or a coefficient
};

__device__ __forceinline__ float Coefficient(const DeviceWeight& weight, const Lane& lane,
                                             unsigned slot) {
  const std::size_t at = std::size_t{lane.panel} * weight.coefficient_slots + slot;
  return ToFloat(weight.coefficients[at * kPanelRows + 4 * lane.quad + lane.q]);
}

// All lanes together: each makes those of one row.
template <Block block>
__device__ LaneCoefficients MakeCoefficients(const DeviceWeight& weight, const DeviceStream& stream,
                                             const Lane& lane) {
  float factor = Coefficient(weight, lane, stream.coefficient_slot);
  uint32_t levels = 0;
  if (block == Block::kPair) {
    const float b = Coefficient(weight, lane, stream.coefficient_slot + 1);
    const float l1 = factor - b;
    const float l3 = factor + b;
    factor = __fdiv_rn(fmaxf(fabsf(l1), fabsf(l3)), 127.0F);
    const bool is_zero = factor == 0.0F;
    const int32_t q1 = is_zero ? 0 : __float2int_rn(__fdiv_rn(l1, factor));
    const int32_t q3 = is_zero ? 0 : __float2int_rn(__fdiv_rn(l3, factor));
    levels = (static_cast<uint32_t>(-q3) & 0xFFU) | (static_cast<uint32_t>(q1) & 0xFFU) << 8 |
             (static_cast<uint32_t>(-q1) & 0xFFU) << 16 | static_cast<uint32_t>(q3) << 24;
  }
  LaneCoefficients all;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    all.factor[row] = __shfl_sync(kAllLanes, factor, row, 4);
    all.levels[row] = block == Block::kPair ? __shfl_sync(kAllLanes, levels, row, 4) : 0;
  }
  return all;
}

// The 16 columns of a row as int8, in the order of the activations: levels of a pair block, 0 and 2
// of a single block.
template <Block block>
__device__ __forceinline__ void UnpackRow(uint32_t word, uint32_t levels, unsigned q,
                                          uint32_t (&columns)[4]) {
  if (block == Block::kPair) {
    const uint32_t even = word & 0x33333333U;
    const uint32_t odd = word >> 2 & 0x33333333U;
    columns[0] = __byte_perm(levels, 0, even);
    columns[1] = __byte_perm(levels, 0, even >> 16);
    columns[2] = __byte_perm(levels, 0, odd);
    columns[3] = __byte_perm(levels, 0, odd >> 16);
  } else {
    const uint32_t bits = word >> 4 * (q % 2);
    columns[0] = bits << 1 & 0x02020202U;
    columns[1] = bits & 0x02020202U;
    columns[2] = bits >> 1 & 0x02020202U;
    columns[3] = bits >> 2 & 0x02020202U;
  }
}

// Fragments of the left operand: [tile][32 columns].
struct WeightFragments {
  uint32_t a[2][2][4];
};

template <Block block>
__device__ __forceinline__ WeightFragments Unpack(const uint4& codes, const LaneCoefficients& rows,
                                                  unsigned q) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  WeightFragments fragments;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    uint32_t columns[4];
    UnpackRow<block>(words[row], rows.levels[row], q, columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments.a[row / 2][i / 2][2 * (i % 2) + row % 2] = columns[i];
  }
  return fragments;
}

// sums[tile][r] += the products of a chunk with 8 tokens. `units` are the 16 columns of unit q of
// token g, `factors` the ChunkFactors of tokens 2 q and 2 q + 1.
template <Block block>
__device__ __forceinline__ void AddProducts(const WeightFragments& fragments, const uint4& units,
                                            const int4& factors, float (&sums)[2][4]) {
  uint32_t b[2][2] = {{units.x, units.y}, {units.z, units.w}};
  if (block == Block::kSingleBehindPair) {
    b[0][0] = __byte_perm(units.x, units.y, 0x6420);
    b[0][1] = __byte_perm(units.z, units.w, 0x6420);
    b[1][0] = __byte_perm(units.x, units.y, 0x7531);
    b[1][1] = __byte_perm(units.z, units.w, 0x7531);
  }
  const float scale[2] = {__int_as_float(factors.x), __int_as_float(factors.z)};
  const bool is_pair = block == Block::kPair;
  const int32_t start[2] = {is_pair ? kFloatBias : factors.y, is_pair ? kFloatBias : factors.w};
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int32_t c[4] = {start[0], start[1], start[0], start[1]};
    int32_t d[4];
    MultiplyAccumulateS8(fragments.a[tile][0], b[0], c, d);
    MultiplyAccumulateS8(fragments.a[tile][1], b[1], d, d);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float dot = __int_as_float(d[r]) - __int_as_float(kFloatBias);
      sums[tile][r] = fmaf(dot, scale[r % 2], sums[tile][r]);
    }
  }
}

// into += sums times the factors of the rows.
__device__ __forceinline__ void AddScaled(const float (&sums)[2][4], const LaneCoefficients& rows,
                                          float (&into)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      into[tile][r] = fmaf(sums[tile][r], rows.factor[2 * tile + r / 2], into[tile][r]);
    }
  }
}

}  // namespace bivlm::cuda

#endif  // BIVLM_CUDA_BINARY_MATMUL_WARP_H_
