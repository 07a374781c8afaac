// Tokens as the int8 kernels of GroupMatMul read them.
//
// A prepared token holds, one after the other, a row of codes being padded to a multiple of 64
// bytes:
//   int8  q[bits == 8 ? 1 : 2][bytes of a row]   x / scale of its chunk, rounded: the columns of
//         the codes' bytes; at 4 bits those of low nibbles, then those of high ones
//   int32 start[bytes of a row / 4]   -2^(bits - 1) times the sum of q over four bytes of codes:
//         what turns products of codes into products of levels
//   float scale[blocks + kPaddingBlocks]   of the chunk that a block lies in, then zeros; NaN
//         everywhere for a token with a NaN or an infinity
//
// The functions are static for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_GROUP_TOKENS_H_
#define BIVLM_CPU_GROUP_TOKENS_H_

#include <cstddef>
#include <cstdint>

#include "bivlm/group_matmul.h"

namespace bivlm {

// Blocks that vectors of scales may reach beyond the last one.
inline constexpr std::size_t kPaddingBlocks = 16;

struct GroupToken {
  int8_t* q[2];  // the second only at 4 bits
  int32_t* start;
  float* scale;
};

static inline std::size_t GroupTokenCodes(const GroupMatMulWeight& weight) {
  return (weight.row_bytes() + 63) / 64 * 64;
}

static inline std::size_t GroupTokenBytes(const GroupMatMulWeight& weight) {
  const std::size_t planes = weight.bits == 8 ? 1 : 2;
  const std::size_t scale_bytes = sizeof(float) * (weight.blocks() + kPaddingBlocks);
  return (planes + 1) * GroupTokenCodes(weight) + (scale_bytes + 63) / 64 * 64;
}

static inline GroupToken GroupTokenAt(const GroupMatMulWeight& weight, std::byte* token) {
  const std::size_t codes = GroupTokenCodes(weight);
  int8_t* q = reinterpret_cast<int8_t*>(token);
  int8_t* behind = q + (weight.bits == 8 ? 1 : 2) * codes;
  return {
      {q, q + codes}, reinterpret_cast<int32_t*>(behind), reinterpret_cast<float*>(behind + codes)};
}

}  // namespace bivlm

#endif  // BIVLM_CPU_GROUP_TOKENS_H_
